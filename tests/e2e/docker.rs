//! Docker containers on the overlay: Debian's dockerd on lab hosts, with the options of `overlayctl docker-options`.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use overlay_agent::model::api::{AttachResponse, NetworkView};
use overlay_agent::model::{Cidr, DockerShare, Family, Subnet};
use overlay_tests::docker::{Docker, DockerFiles, IMAGE};
use overlay_tests::programs::{CommandOutput, overlayctl, require_program, require_root};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, eventually, kernel};
use overlayctl::lab::Families;
use serde_json::{Value, json};

/// The drop-in that operators install.
const DROP_IN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/docker/60-overlay.conf");

/// An address outside the overlay, with no route into it.
const OUTSIDE_ADDRESS: &str = "203.0.113.1";

/// The drop-in's commands before dockerd for a lab host, with another path of dockerd's configuration file.
fn exec_start_pre_commands(lab: &TestLab, host: &str, config: &Path) -> Vec<Command> {
    let text = fs::read_to_string(DROP_IN).expect_ok(DROP_IN);
    let lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("ExecStartPre=")).collect();
    assert_eq!(lines.len(), 2, "{text}");
    let file = config.to_string_lossy();
    let command = |line: &&str| {
        let words: Vec<String> = line
            .split_whitespace()
            .map(|word| match word {
                "/usr/bin/overlayctl" => overlayctl().to_string_lossy().into_owned(),
                "/etc/docker/daemon.json" => file.clone().into_owned(),
                word => word.to_owned(),
            })
            .collect();
        lab.command(host, &words).expect_ok(host)
    };
    lines.iter().map(command).collect()
}

fn assert_success(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().expect_ok("the command");
    CommandOutput::from_output(&["overlayctl"], &output).assert_code(0);
}

/// The address of a Docker container in a family.
fn address(docker: &Docker<'_>, container: &str, family: Family) -> IpAddr {
    let network = docker.network_settings(container);
    let field = if family == Family::V4 { "IPAddress" } else { "GlobalIPv6Address" };
    kernel::text(&network, field).parse().expect_ok(&format!("{field} in {network}"))
}

/// One container pings another and fetches its page; the server sees the client's own address.
async fn assert_reaches(from: (&Docker<'_>, &str), to: (&Docker<'_>, &str), family: Family, page: &str) {
    let (source, target) = (address(from.0, from.1, family), address(to.0, to.1, family));
    let ping = if family == Family::V4 { "/bin/ping" } else { "/bin/ping6" };
    let other_text = target.to_string();
    from.0.run(&["exec", from.1, ping, "-c", "2", "-W", "10", &other_text]);
    // Without wget: the static busybox has no service names, which wget needs.
    let request = format!("printf 'GET / HTTP/1.0\r\n\r\n' | /bin/nc -w 20 {target} 80");
    let response = from.0.run(&["exec", from.1, "/bin/sh", "-c", &request]);
    assert!(response.starts_with("HTTP/1.") && response.ends_with(page), "{response}");
    eventually(&format!("{target} has a request of {source}"), CONVERGE_TIMEOUT, || {
        let output = to.0.attempt(&["logs", to.1]);
        // httpd writes `[ADDRESS]:PORT: response:200`, IPv4 as ::ffff:ADDRESS.
        let seen = |line: &str| line.contains("response:200") && line.contains(&format!("{source}]:"));
        if output.stderr.lines().any(seen) { Ok(()) } else { Err(output.stderr) }
    })
    .await;
}

fn own_subnet(lab: &TestLab, host: &str, family: Family) -> Cidr {
    let view: NetworkView = lab.ctl(host, &["-o", "json", "inspect"]).assert_code(0).json();
    view.ipam.get(family).expect_ok("a subnet").subnet
}

fn forward_policy(lab: &TestLab, host: &str) -> String {
    let rules = kernel::shell(lab, host, "iptables -S FORWARD");
    rules.lines().next().expect_ok("a policy").to_owned()
}

/// On h1 Docker ran before the overlay, and left its FORWARD policy DROP; on h2 Docker's start waits for the lease.
#[tokio::test(flavor = "multi_thread")]
async fn containers_on_two_hosts_reach_each_other() {
    let lab = TestLab::without_agents(2, Families::V4).await;
    let (files1, files2) = (DockerFiles::new(&lab, "h1"), DockerFiles::new(&lab, "h2"));
    // On a host without forwarding, dockerd enables it and sets the DROP policy.
    kernel::shell(&lab, "h1", "echo 0 >/proc/sys/net/ipv4/ip_forward");
    drop(files1.start(&lab, "h1", None).await);
    assert_eq!(forward_policy(&lab, "h1"), "-P FORWARD DROP");
    fs::write(files1.config(), r#"{"log-opts": {"max-size": "1m"}}"#).expect_ok("dockerd's file");

    // Docker's start on h2 waits for the lease.
    let mut waiting = exec_start_pre_commands(&lab, "h2", &files2.config()).into_iter();
    let mut first: Child = waiting.next().expect_ok("a command").stdout(Stdio::null()).spawn().expect_ok("overlayctl");
    lab.host("h1").agent_start(&["--docker"]).expect_ok("the agent");
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    assert!(first.try_wait().expect_ok("wait").is_none(), "docker-options waits while h2 has no agent");
    assert!(!files2.config().exists());
    lab.host("h2").agent_start(&["--docker"]).expect_ok("the agent");
    lab.wait_full_mesh().await;
    assert!(first.wait().expect_ok("wait").success());
    waiting.for_each(|mut command| assert_success(&mut command));
    exec_start_pre_commands(&lab, "h1", &files1.config()).iter_mut().for_each(assert_success);

    let d1 = files1.start(&lab, "h1", Some(&files1.config())).await;
    let d2 = files2.start(&lab, "h2", Some(&files2.config())).await;
    for (host, docker, name) in [("h1", &d1, "one"), ("h2", &d2, "two")] {
        docker.import_image(&format!("the page of {host}"));
        docker.run_web_server(name);
        let subnet = own_subnet(&lab, host, Family::V4);
        let own = address(docker, name, Family::V4);
        assert!(
            DockerShare::from_range(subnet).expect_ok("a share").fixed_cidr.contains(own),
            "{own} is in Docker's part of {subnet}"
        );
        let network = docker.network_settings(name);
        assert_eq!(network["Gateway"], json!(subnet.nth(1).expect_ok("a gateway").to_string()));
        assert_eq!(network["IPPrefixLen"], subnet.length());
        let link = docker.run(&["exec", name, "/bin/ip", "link", "show", "eth0"]);
        assert!(link.contains("mtu 1450"), "{link}");
    }
    // Earlier settings of the file are kept and have effect.
    assert_eq!(d1.run(&["inspect", "--format", "{{index .HostConfig.LogConfig.Config \"max-size\"}}", "one"]), "1m");
    assert_eq!(forward_policy(&lab, "h1"), "-P FORWARD DROP");

    assert_reaches((&d1, "one"), (&d2, "two"), Family::V4, "the page of h2").await;
    assert_reaches((&d2, "two"), (&d1, "one"), Family::V4, "the page of h1").await;
    // Packets to the outside have the host's address, because the outside has no route to a container.
    d1.run(&["exec", "one", "/bin/ping", "-c", "2", "-W", "10", OUTSIDE_ADDRESS]);
    let nat = kernel::shell(&lab, "h1", "iptables -t nat -S");
    assert!(!nat.contains("MASQUERADE"), "Docker masquerades nothing:\n{nat}");

    assert_reaches_overlay_endpoints(&lab, &d1, &d2).await;
    assert_docker_published_port(&lab, &d1).await;
    assert_survives_crash(&lab, &d1, &d2).await;
    assert_drop_policy_is_handled(&lab, &d1, &d2).await;
}

/// Docker's containers and endpoints share one bridge, with addresses of separate ranges.
async fn assert_reaches_overlay_endpoints(lab: &TestLab, d1: &Docker<'_>, d2: &Docker<'_>) {
    let attached: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "web"]).assert_code(0).json();
    let own = *attached.endpoint.addresses().get(Family::V4).expect_ok("an address");
    assert!(!DockerShare::from_range(own_subnet(lab, "h1", Family::V4)).expect_ok("a share").fixed_cidr.contains(own));
    for (docker, name) in [(d1, "one"), (d2, "two")] {
        let other = address(docker, name, Family::V4).to_string();
        kernel::run(lab, "h1-web", &["ping", "-c", "2", "-W", "10", &other]);
        docker.run(&["exec", name, "/bin/ping", "-c", "2", "-W", "10", &own.to_string()]);
    }
    let held = lab.ctl("h1", &["attach", "other", "--ip", &address(d1, "one", Family::V4).to_string()]);
    held.assert_code(1).assert_stderr_contains(&["is in Docker's part of subnet"]);
    // Docker's port belongs to no endpoint.
    let view: NetworkView = lab.ctl("h1", &["-o", "json", "inspect"]).assert_code(0).json();
    let ports = view.bridge.expect_ok("the bridge").ports;
    assert_eq!(ports.iter().filter(|port| port.endpoint.is_none()).count(), 1, "{ports:?}");
    assert_eq!(ports.len(), 2);
}

/// A port published by Docker is reachable from another host and from outside; an endpoint cannot publish it.
async fn assert_docker_published_port(lab: &TestLab, d1: &Docker<'_>) {
    require_program("curl", "curl");
    d1.run(&["run", "--detach", "--name", "open", "--publish", "8080:80", IMAGE, "/bin/httpd", "-f", "-p", "80", "-h", "/www"]);
    for from in ["h2", "world"] {
        let page = || kernel::attempt(lab, from, &["curl", "-sS", "--max-time", "10", "http://10.99.1.1:8080/"]);
        eventually(&format!("{from} gets the page"), CONVERGE_TIMEOUT, || match page() {
            output if output.stdout == "the page of h1" => Ok(()),
            output => Err(output.stderr),
        })
        .await;
    }
    lab.ctl("h1", &["attach", "late", "--publish", "8080:80"]).assert_code(1).assert_stderr_contains(&["8080", "docker-proxy"]);
    d1.run(&["rm", "--force", "open"]);
}

/// The agent does not touch Docker's port, also after a restart, and when it repairs the bridge's ports.
async fn assert_survives_crash(lab: &TestLab, d1: &Docker<'_>, d2: &Docker<'_>) {
    let host = lab.host("h1");
    host.agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    host.agent_start(&["--docker"]).expect_ok("the agent");
    host.wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    assert_eq!(lab.status("h1").await.data_path.drift_repairs, 0);
    assert_reaches((d2, "two"), (d1, "one"), Family::V4, "the page of h1").await;
    // Docker ends and removes its state; the bridge belongs to the agent and stays.
    d2.run(&["rm", "--force", "two"]);
    lab.wait_converged("h2", CONVERGE_TIMEOUT).await;
    d2.run_web_server("two");
}

/// The agent's accept rule lets packets through despite Docker's DROP policy.
async fn assert_drop_policy_is_handled(lab: &TestLab, d1: &Docker<'_>, d2: &Docker<'_>) {
    let target = address(d1, "one", Family::V4).to_string();
    // Each connection is a new one to conntrack. A ping may not be: its identifier is the PID, which is reused in a new
    // container, and Docker accepts established and related packets.
    let request = format!("printf 'GET / HTTP/1.0\r\n\r\n' | /bin/nc -w 5 {target} 80");
    let page = || d2.attempt(&["exec", "two", "/bin/sh", "-c", &request]);
    let arrives = || assert!(page().assert_code(0).stdout.ends_with("the page of h1"));
    let host = lab.host("h1");
    host.agent_stop(Signal::SIGTERM).expect_ok("SIGTERM");
    arrives();
    kernel::shell(
        lab,
        "h1",
        "iptables-save -t filter | grep -v overlayd | iptables-restore; ! iptables -S FORWARD | grep overlayd",
    );
    assert_eq!(forward_policy(lab, "h1"), "-P FORWARD DROP");
    let dropped = page();
    assert!(
        dropped.code == Some(1) && dropped.stdout.is_empty(),
        "Docker's policy drops what the agent does not accept: {dropped:?}"
    );
    host.agent_start(&["--docker"]).expect_ok("the agent");
    host.wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    arrives();
    assert_eq!(forward_policy(lab, "h1"), "-P FORWARD DROP");
    // With a running agent the rules come back.
    kernel::shell(lab, "h1", "iptables -F FORWARD");
    eventually("the agent's accept is back", CONVERGE_TIMEOUT, || {
        let rules = kernel::shell(lab, "h1", "iptables -S FORWARD");
        if rules.matches("overlayd").count() == 2 { Ok(()) } else { Err(rules) }
    })
    .await;
    arrives();
}

/// Both families: Docker derives IPv6 addresses from MACs, far from the agent's range.
#[tokio::test(flavor = "multi_thread")]
async fn dual_stack_containers_reach_each_other() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.families = Families::Dual;
        options.agent_args = vec!["--docker".to_owned()];
    })
    .await;
    let (files1, files2) = (DockerFiles::new(&lab, "h1"), DockerFiles::new(&lab, "h2"));
    for (host, files) in [("h1", &files1), ("h2", &files2)] {
        lab.ctl(host, &["docker-options", "--write", &files.config().to_string_lossy()]).assert_code(0);
    }
    let d1 = files1.start(&lab, "h1", Some(&files1.config())).await;
    let d2 = files2.start(&lab, "h2", Some(&files2.config())).await;
    for (host, docker, name) in [("h1", &d1, "one"), ("h2", &d2, "two")] {
        docker.import_image(&format!("the page of {host}"));
        docker.run_web_server(name);
        let subnet = own_subnet(&lab, host, Family::V6);
        let own = address(docker, name, Family::V6);
        let share = DockerShare::from_range(subnet).expect_ok("a share");
        assert!(subnet.contains(own) && own >= share.first_address, "{own} of {subnet}");
        assert_eq!(docker.network_settings(name)["IPv6Gateway"], json!(subnet.nth(1).expect_ok("a gateway").to_string()));
    }
    for family in Family::ALL {
        assert_reaches((&d1, "one"), (&d2, "two"), family, "the page of h2").await;
        assert_reaches((&d2, "two"), (&d1, "one"), family, "the page of h1").await;
    }
    // Docker also sets bridge addresses: the agent's must be unchanged.
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    lab.wait_converged("h2", CONVERGE_TIMEOUT).await;
}

/// The output of `overlayctl docker-options`, and its refusals.
#[tokio::test(flavor = "multi_thread")]
async fn docker_options_match_lease() {
    let lab = TestLab::up(|options| {
        options.hosts = 1;
        options.containers = 1;
    })
    .await;
    let refused = lab.ctl("h1", &["docker-options"]).assert_code(1);
    refused.assert_stderr_contains(&["assigns every address of", "docker = true"]);
    let subnet: Subnet = lab.status("h1").await.lease.expect_ok("a lease").subnet;
    let range = subnet.get(Family::V4).expect_ok("IPv4");
    let share = DockerShare::from_range(range).expect_ok("a share");

    // An endpoint from the time before the address range was divided.
    lab.ctl("h1", &["attach", "early", "--ip", &share.first_address.to_string()]).assert_code(0);
    let host = lab.host("h1");
    host.agent_stop(Signal::SIGTERM).expect_ok("SIGTERM");
    lab.ctl("h1", &["docker-options"]).assert_code(1).assert_stderr_contains(&["no agent at"]);
    host.agent_start(&["--docker"]).expect_ok("the agent");
    host.wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    lab.ctl("h1", &["docker-options"])
        .assert_code(1)
        .assert_stderr_contains(&[&format!("{} by early", share.first_address), "detach"]);
    lab.ctl("h1", &["detach", "early"]).assert_code(0);

    let wanted = json!({"bridge": "ovb.1", "fixed-cidr": share.fixed_cidr.to_string(), "mtu": 1450, "ip-masq": false});
    for arguments in [&["docker-options"][..], &["-o", "json", "docker-options"]] {
        assert_eq!(lab.ctl("h1", arguments).assert_code(0).json::<Value>(), wanted);
    }
    let flags = lab.ctl("h1", &["docker-options", "--flags"]).assert_code(0).stdout;
    assert_eq!(flags, format!("--bridge=ovb.1 --fixed-cidr={} --ip-masq=false --mtu=1450\n", share.fixed_cidr));

    let dir = tempfile::tempdir().expect_ok("a directory");
    let file = dir.path().join("etc/daemon.json");
    let path = file.to_string_lossy().into_owned();
    let write = || lab.ctl("h1", &["docker-options", "--write", &path]);
    assert!(write().assert_code(0).stdout.contains("written"));
    let first = fs::read_to_string(&file).expect_ok("the file");
    assert_eq!(serde_json::from_str::<Value>(&first).expect_ok("JSON"), wanted);
    assert!(write().assert_code(0).stdout.contains("unchanged"));
    let contrary = r#"{"bip": "172.17.0.1/16", "debug": true}"#;
    fs::write(&file, contrary).expect_ok("the file");
    write().assert_code(1).assert_stderr_contains(&["\"bip\": \"172.17.0.1/16\"", "nothing was written"]);
    assert_eq!(fs::read_to_string(&file).expect_ok("the file"), contrary);
    // No other file is left in the directory.
    assert_eq!(fs::read_dir(dir.path().join("etc")).expect_ok("the directory").count(), 1);
}

/// The next test run cleans up after a killed one, once the processes of the killed one have ended.
#[test]
fn leftovers_of_killed_run_are_removed() {
    require_root();
    let controllers = fs::read_dir("/sys/fs/cgroup").expect_ok("cgroups").flatten().map(|entry| entry.path());
    let parents: Vec<PathBuf> = controllers.filter(|path| path.join("cgroup.procs").is_file()).collect();
    let parents = if parents.is_empty() { vec![PathBuf::from("/sys/fs/cgroup")] } else { parents };
    let made = |lab: &str| {
        let groups = parents.iter().map(|parent| parent.join(format!("overlay-tests-{lab}-h1")));
        let all: Vec<PathBuf> = groups.chain([PathBuf::from(format!("/var/tmp/overlay-docker-{lab}-x"))]).collect();
        for path in &all {
            fs::create_dir_all(path.join("docker/inner")).expect_ok("a cgroup or a directory");
        }
        all
    };
    let (over, lives) = (format!("over{}", std::process::id()), format!("lives{}", std::process::id()));
    let (gone, kept) = (made(&over), made(&lives));
    overlay_tests::docker::remove_leftovers(|lab| lab == over);
    let left: Vec<&PathBuf> = gone.iter().filter(|path| path.exists()).collect();
    let missing: Vec<&PathBuf> = kept.iter().filter(|path| !path.exists()).collect();
    overlay_tests::docker::remove_leftovers(|lab| lab == lives);
    assert!(left.is_empty() && missing.is_empty(), "left {left:?}, missing {missing:?}");
    assert!(!kept.iter().any(|path| path.exists()), "{kept:?}");
}
