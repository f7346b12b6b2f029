//! Docker's containers on the overlay: Debian's dockerd on lab hosts, told what `overlayctl docker-options` says.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use overlay_agent::model::api::{Attached, NetworkView};
use overlay_agent::model::{Cidr, DockerShare, Family, Subnet};
use overlay_tests::docker::{Docker, DockerFiles, IMAGE};
use overlay_tests::programs::{Said, needs, needs_root, overlayctl};
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, Story, eventually, kernel};
use overlayctl::lab::Families;
use serde_json::{Value, json};

/// The drop-in that operators install.
const DROP_IN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/docker/60-overlay.conf");

/// An address outside the overlay, with no route into it.
const WORLD: &str = "203.0.113.1";

/// The commands that the drop-in runs before dockerd, on a host of the lab: with dockerd's file at another place.
fn before_docker(story: &Story, host: &str, config: &Path) -> Vec<Command> {
    let text = fs::read_to_string(DROP_IN).must(DROP_IN);
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
        story.command(host, &words).must(host)
    };
    lines.iter().map(command).collect()
}

fn ends_well(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().must("the command");
    Said::of(&["overlayctl"], &output).exits(0);
}

/// The address of a Docker container in a family.
fn address(docker: &Docker<'_>, container: &str, family: Family) -> IpAddr {
    let network = docker.network_of(container);
    let field = if family == Family::V4 { "IPAddress" } else { "GlobalIPv6Address" };
    kernel::text(&network, field).parse().must(&format!("{field} in {network}"))
}

/// One container pings another and fetches its page; the server sees the client's own address.
async fn reaches(from: (&Docker<'_>, &str), to: (&Docker<'_>, &str), family: Family, page: &str) {
    let (own, other) = (address(from.0, from.1, family), address(to.0, to.1, family));
    let ping = if family == Family::V4 { "/bin/ping" } else { "/bin/ping6" };
    let other_text = other.to_string();
    from.0.run(&["exec", from.1, ping, "-c", "2", "-W", "10", &other_text]);
    // Not by wget: the static busybox has no services by name, which it asks for.
    let request = format!("printf 'GET / HTTP/1.0\r\n\r\n' | /bin/nc -w 20 {other} 80");
    let fetched = from.0.run(&["exec", from.1, "/bin/sh", "-c", &request]);
    assert!(fetched.starts_with("HTTP/1.") && fetched.ends_with(page), "{fetched}");
    eventually(&format!("{other} was asked by {own}"), SOON, || {
        let said = to.0.attempt(&["logs", to.1]);
        // httpd writes `[ADDRESS]:PORT: response:200`, IPv4 as ::ffff:ADDRESS.
        let seen = |line: &str| line.contains("response:200") && line.contains(&format!("{own}]:"));
        if said.err.lines().any(seen) { Ok(()) } else { Err(said.err) }
    })
    .await;
}

fn own_subnet(story: &Story, host: &str, family: Family) -> Cidr {
    let view: NetworkView = story.ctl(host, &["-o", "json", "inspect"]).exits(0).json();
    view.ipam.get(family).must("a subnet").subnet
}

fn policy(story: &Story, host: &str) -> String {
    let rules = kernel::shell(story, host, "iptables -S FORWARD");
    rules.lines().next().must("a policy").to_owned()
}

/// Two hosts: on one Docker ran before there was an overlay, and left its FORWARD policy DROP; on the other it waits for the lease.
#[tokio::test(flavor = "multi_thread")]
async fn two_hosts() {
    let story = Story::without_agents(2, Families::V4).await;
    let (files1, files2) = (DockerFiles::new(&story, "h1"), DockerFiles::new(&story, "h2"));
    // A host that forwards nothing: then dockerd switches forwarding on, and closes what it has opened.
    kernel::shell(&story, "h1", "echo 0 >/proc/sys/net/ipv4/ip_forward");
    drop(files1.start(&story, "h1", None).await);
    assert_eq!(policy(&story, "h1"), "-P FORWARD DROP");
    fs::write(files1.config(), r#"{"log-opts": {"max-size": "1m"}}"#).must("dockerd's file");

    // Docker's start on h2 waits for the lease.
    let mut waiting = before_docker(&story, "h2", &files2.config()).into_iter();
    let mut first: Child = waiting.next().must("a command").stdout(Stdio::null()).spawn().must("overlayctl");
    story.at("h1").agent_start(&["--docker"]).must("the agent");
    story.at("h1").wait_ready(READY).await.must("ready");
    assert!(first.try_wait().must("wait").is_none(), "it waits while h2 has no agent");
    assert!(!files2.config().exists());
    story.at("h2").agent_start(&["--docker"]).must("the agent");
    story.mesh().await;
    assert!(first.wait().must("wait").success());
    waiting.for_each(|mut command| ends_well(&mut command));
    before_docker(&story, "h1", &files1.config()).iter_mut().for_each(ends_well);

    let d1 = files1.start(&story, "h1", Some(&files1.config())).await;
    let d2 = files2.start(&story, "h2", Some(&files2.config())).await;
    for (host, docker, name) in [("h1", &d1, "one"), ("h2", &d2, "two")] {
        docker.import_image(&format!("the page of {host}"));
        docker.serve(name);
        let subnet = own_subnet(&story, host, Family::V4);
        let own = address(docker, name, Family::V4);
        assert!(DockerShare::of(subnet).must("a share").fixed.contains(own), "{own} is of Docker's part of {subnet}");
        let network = docker.network_of(name);
        assert_eq!(network["Gateway"], json!(subnet.nth(1).must("a gateway").to_string()));
        assert_eq!(network["IPPrefixLen"], subnet.length());
        let link = docker.run(&["exec", name, "/bin/ip", "link", "show", "eth0"]);
        assert!(link.contains("mtu 1450"), "{link}");
    }
    // What stood in the file before is kept, and heeded.
    assert_eq!(d1.run(&["inspect", "--format", "{{index .HostConfig.LogConfig.Config \"max-size\"}}", "one"]), "1m");
    assert_eq!(policy(&story, "h1"), "-P FORWARD DROP");

    reaches((&d1, "one"), (&d2, "two"), Family::V4, "the page of h2").await;
    reaches((&d2, "two"), (&d1, "one"), Family::V4, "the page of h1").await;
    // What leaves the overlay has the host's address: the world outside has no way back to a container.
    d1.run(&["exec", "one", "/bin/ping", "-c", "2", "-W", "10", WORLD]);
    let nat = kernel::shell(&story, "h1", "iptables -t nat -S");
    assert!(!nat.contains("MASQUERADE"), "Docker masquerades nothing:\n{nat}");

    beside_endpoints(&story, &d1, &d2).await;
    published_by_docker(&story, &d1).await;
    over_a_crash(&story, &d1, &d2).await;
    behind_the_policy(&story, &d1, &d2).await;
}

/// Docker's containers and endpoints are on one bridge, each with an address of its own part.
async fn beside_endpoints(story: &Story, d1: &Docker<'_>, d2: &Docker<'_>) {
    let attached: Attached = story.ctl("h1", &["-o", "json", "attach", "web"]).exits(0).json();
    let own = *attached.endpoint.addresses().get(Family::V4).must("an address");
    assert!(!DockerShare::of(own_subnet(story, "h1", Family::V4)).must("a share").fixed.contains(own));
    for (docker, name) in [(d1, "one"), (d2, "two")] {
        let other = address(docker, name, Family::V4).to_string();
        kernel::run(story, "h1-web", &["ping", "-c", "2", "-W", "10", &other]);
        docker.run(&["exec", name, "/bin/ping", "-c", "2", "-W", "10", &own.to_string()]);
    }
    let held = story.ctl("h1", &["attach", "wish", "--ip", &address(d1, "one", Family::V4).to_string()]);
    held.exits(1).complains(&["is of Docker's part of subnet"]);
    // Docker's port is shown as nobody's endpoint.
    let view: NetworkView = story.ctl("h1", &["-o", "json", "inspect"]).exits(0).json();
    let ports = view.bridge.must("the bridge").ports;
    assert_eq!(ports.iter().filter(|port| port.endpoint.is_none()).count(), 1, "{ports:?}");
    assert_eq!(ports.len(), 2);
}

/// A port that Docker publishes leads to its container, from a host of the overlay and from the world; to an endpoint it is taken.
async fn published_by_docker(story: &Story, d1: &Docker<'_>) {
    needs("curl", "curl");
    d1.run(&["run", "--detach", "--name", "open", "--publish", "8080:80", IMAGE, "/bin/httpd", "-f", "-p", "80", "-h", "/www"]);
    for from in ["h2", "world"] {
        let page = || kernel::attempt(story, from, &["curl", "-sS", "--max-time", "10", "http://10.99.1.1:8080/"]);
        eventually(&format!("{from} gets the page"), SOON, || match page() {
            said if said.out == "the page of h1" => Ok(()),
            said => Err(said.err),
        })
        .await;
    }
    story.ctl("h1", &["attach", "late", "--publish", "8080:80"]).exits(1).complains(&["8080", "docker-proxy"]);
    d1.run(&["rm", "--force", "open"]);
}

/// The agent leaves Docker's port alone, also when it starts anew, and when it has to repair the bridge's.
async fn over_a_crash(story: &Story, d1: &Docker<'_>, d2: &Docker<'_>) {
    let host = story.at("h1");
    host.agent_stop(Signal::SIGKILL).must("SIGKILL");
    host.agent_start(&["--docker"]).must("the agent");
    host.wait_ready(READY).await.must("ready");
    assert_eq!(story.status("h1").await.data_path.drift_repairs, 0);
    reaches((d2, "two"), (d1, "one"), Family::V4, "the page of h1").await;
    // Docker ends, and takes its own away; the bridge is the agent's and stays.
    d2.run(&["rm", "--force", "two"]);
    story.settled("h2", SOON).await;
    d2.serve("two");
}

/// It is the agent's accept that lets packets through where Docker's policy drops them.
async fn behind_the_policy(story: &Story, d1: &Docker<'_>, d2: &Docker<'_>) {
    let target = address(d1, "one", Family::V4).to_string();
    // Each connection is a new one to the kernel. A ping may not be: its identifier is the process' number, which comes back in a new
    // container, and Docker lets answers and what belongs to them through.
    let request = format!("printf 'GET / HTTP/1.0\r\n\r\n' | /bin/nc -w 5 {target} 80");
    let page = || d2.attempt(&["exec", "two", "/bin/sh", "-c", &request]);
    let arrives = || assert!(page().exits(0).out.ends_with("the page of h1"));
    let host = story.at("h1");
    host.agent_stop(Signal::SIGTERM).must("SIGTERM");
    arrives();
    kernel::shell(
        story,
        "h1",
        "iptables-save -t filter | grep -v overlayd | iptables-restore; ! iptables -S FORWARD | grep overlayd",
    );
    assert_eq!(policy(story, "h1"), "-P FORWARD DROP");
    let dropped = page();
    assert!(
        dropped.code == Some(1) && dropped.out.is_empty(),
        "Docker's policy drops what the agent does not accept: {dropped:?}"
    );
    host.agent_start(&["--docker"]).must("the agent");
    host.wait_ready(READY).await.must("ready");
    arrives();
    assert_eq!(policy(story, "h1"), "-P FORWARD DROP");
    // And while it runs: the rules are back by themselves.
    kernel::shell(story, "h1", "iptables -F FORWARD");
    eventually("the agent's accept is back", SOON, || {
        let rules = kernel::shell(story, "h1", "iptables -S FORWARD");
        if rules.matches("overlayd").count() == 2 { Ok(()) } else { Err(rules) }
    })
    .await;
    arrives();
}

/// Both families: Docker makes IPv6 addresses of MACs, far from those that the agent hands out.
#[tokio::test(flavor = "multi_thread")]
async fn both_families() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.families = Families::Dual;
        options.agent_args = vec!["--docker".to_owned()];
    })
    .await;
    let (files1, files2) = (DockerFiles::new(&story, "h1"), DockerFiles::new(&story, "h2"));
    for (host, files) in [("h1", &files1), ("h2", &files2)] {
        story.ctl(host, &["docker-options", "--write", &files.config().to_string_lossy()]).exits(0);
    }
    let d1 = files1.start(&story, "h1", Some(&files1.config())).await;
    let d2 = files2.start(&story, "h2", Some(&files2.config())).await;
    for (host, docker, name) in [("h1", &d1, "one"), ("h2", &d2, "two")] {
        docker.import_image(&format!("the page of {host}"));
        docker.serve(name);
        let subnet = own_subnet(&story, host, Family::V6);
        let own = address(docker, name, Family::V6);
        let share = DockerShare::of(subnet).must("a share");
        assert!(subnet.contains(own) && own >= share.first, "{own} of {subnet}");
        assert_eq!(docker.network_of(name)["IPv6Gateway"], json!(subnet.nth(1).must("a gateway").to_string()));
    }
    for family in Family::ALL {
        reaches((&d1, "one"), (&d2, "two"), family, "the page of h2").await;
        reaches((&d2, "two"), (&d1, "one"), family, "the page of h1").await;
    }
    // Docker sets addresses of bridges, too: the agent's are as they were.
    story.settled("h1", SOON).await;
    story.settled("h2", SOON).await;
}

/// What `docker-options` prints, and when it prints nothing.
#[tokio::test(flavor = "multi_thread")]
async fn options() {
    let story = Story::up(|options| {
        options.hosts = 1;
        options.containers = 1;
    })
    .await;
    let refused = story.ctl("h1", &["docker-options"]).exits(1);
    refused.complains(&["hands out every address of", "docker = true"]);
    let subnet: Subnet = story.status("h1").await.lease.must("a lease").subnet;
    let range = subnet.get(Family::V4).must("IPv4");
    let share = DockerShare::of(range).must("a share");

    // An endpoint from a time when all addresses were the agent's.
    story.ctl("h1", &["attach", "early", "--ip", &share.first.to_string()]).exits(0);
    let host = story.at("h1");
    host.agent_stop(Signal::SIGTERM).must("SIGTERM");
    story.ctl("h1", &["docker-options"]).exits(1).complains(&["no agent at"]);
    host.agent_start(&["--docker"]).must("the agent");
    host.wait_ready(READY).await.must("ready");
    story.ctl("h1", &["docker-options"]).exits(1).complains(&[&format!("{} by early", share.first), "detach"]);
    story.ctl("h1", &["detach", "early"]).exits(0);

    let wanted = json!({"bridge": "ovb.1", "fixed-cidr": share.fixed.to_string(), "mtu": 1450, "ip-masq": false});
    for arguments in [&["docker-options"][..], &["-o", "json", "docker-options"]] {
        assert_eq!(story.ctl("h1", arguments).exits(0).json::<Value>(), wanted);
    }
    let flags = story.ctl("h1", &["docker-options", "--flags"]).exits(0).out;
    assert_eq!(flags, format!("--bridge=ovb.1 --fixed-cidr={} --ip-masq=false --mtu=1450\n", share.fixed));

    let dir = tempfile::tempdir().must("a directory");
    let file = dir.path().join("etc/daemon.json");
    let path = file.to_string_lossy().into_owned();
    let write = || story.ctl("h1", &["docker-options", "--write", &path]);
    assert!(write().exits(0).out.contains("written"));
    let first = fs::read_to_string(&file).must("the file");
    assert_eq!(serde_json::from_str::<Value>(&first).must("JSON"), wanted);
    assert!(write().exits(0).out.contains("as it was"));
    let contrary = r#"{"bip": "172.17.0.1/16", "debug": true}"#;
    fs::write(&file, contrary).must("the file");
    write().exits(1).complains(&["\"bip\": \"172.17.0.1/16\"", "nothing was written"]);
    assert_eq!(fs::read_to_string(&file).must("the file"), contrary);
    // Nothing else is left in the directory.
    assert_eq!(fs::read_dir(dir.path().join("etc")).must("the directory").count(), 1);
}

/// A test run that is killed cannot clear up: the next one does, as far as the processes of the first are over.
#[test]
fn what_a_killed_run_left_is_removed() {
    needs_root();
    let controllers = fs::read_dir("/sys/fs/cgroup").must("control groups").flatten().map(|entry| entry.path());
    let parents: Vec<PathBuf> = controllers.filter(|path| path.join("cgroup.procs").is_file()).collect();
    let parents = if parents.is_empty() { vec![PathBuf::from("/sys/fs/cgroup")] } else { parents };
    let made = |lab: &str| {
        let groups = parents.iter().map(|parent| parent.join(format!("overlay-tests-{lab}-h1")));
        let all: Vec<PathBuf> = groups.chain([PathBuf::from(format!("/var/tmp/overlay-docker-{lab}-x"))]).collect();
        for path in &all {
            fs::create_dir_all(path.join("docker/inner")).must("a group or a directory");
        }
        all
    };
    let (over, lives) = (format!("over{}", std::process::id()), format!("lives{}", std::process::id()));
    let (gone, kept) = (made(&over), made(&lives));
    overlay_tests::docker::remove_left_over(|lab| lab == over);
    let left: Vec<&PathBuf> = gone.iter().filter(|path| path.exists()).collect();
    let missing: Vec<&PathBuf> = kept.iter().filter(|path| !path.exists()).collect();
    overlay_tests::docker::remove_left_over(|lab| lab == lives);
    assert!(left.is_empty() && missing.is_empty(), "left {left:?}, missing {missing:?}");
    assert!(!kept.iter().any(|path| path.exists()), "{kept:?}");
}
