//! Mistakes of the first day, as a new user makes them. Each error names the value, the place and the remedy.
//!
//! Other tests cover a second agent, missing privileges and unknown keys (`refusal`), a late or invalid network configuration
//! (`late_config`), attach values (`bad_input`), and certificates, passwords and roles (`etcd_access`).

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::process::Command;

use nix::sys::signal::Signal;
use overlay_agent::model::api::Status;
use overlay_tests::programs::overlayd;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::wait::eventually_async;
use overlay_tests::{ExpectContext, TestLab, etcd, kernel, synthetic_leases};
use overlayctl::lab::{Families, agent, process};

/// Hosts without running agents.
async fn start_lab_without_agents(count: u16, families: Families) -> TestLab {
    TestLab::without_agents(count, families).await
}

/// Starts the agent of h1 with only this endpoint.
fn start_agent_with_endpoint(lab: &TestLab, endpoint: &str) {
    let host = lab.host("h1");
    for dir in [host.run_dir(), host.state_dir()] {
        fs::create_dir_all(dir).expect_ok("a directory");
    }
    let mut command = Command::new(overlayd());
    command.args(["--config", "/dev/null", "--node-name", "h1", "--etcd-endpoints", endpoint]);
    command.arg("--run-dir").arg(host.run_dir()).arg("--state-dir").arg(host.state_dir());
    process::start(command, Some(&lab.open_netns("h1")), &host.log(), &agent::pid_file(lab.dir(), "h1")).expect_ok("start");
}

/// Starts the agent of h1, waits for a problem with all these words, and returns it.
async fn start_and_wait_for_problem(lab: &TestLab, flags: &[&str], words: &[&str]) -> String {
    let host = lab.host("h1");
    host.agent_start(flags).expect_ok("start");
    let has = |problem: &&String| words.iter().all(|word| problem.contains(word));
    let holds = |status: &Status| !status.ready && status.problems.iter().any(|problem| has(&problem));
    let status = host.wait_status(CONVERGE_TIMEOUT, &format!("no problem says {words:?}"), holds).await.expect_ok("h1");
    lab.ctl("h1", &["status"]).assert_code(3);
    status.problems.iter().find(has).cloned().expect_ok("a problem")
}

fn stop_agent(lab: &TestLab) {
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_etcd_is_reported() {
    let lab = start_lab_without_agents(1, Families::V4).await;
    let etcd = lab.layout().etcd_endpoints()[0].clone();
    let unused = |flag: &str| etcd.replace("2379", flag);
    for (endpoint, words) in [
        // No listener; an unused address, found by the kernel after three seconds or by the agent's timeout of five; an unknown
        // name.
        (unused("2399"), &["2399 cannot be reached: Connection refused", "start etcd, or set --etcd-endpoints"][..]),
        ("http://10.99.77.77:2379".to_owned(), &["etcd http://10.99.77.77:2379 "]),
        ("http://no-such-host.invalid:2379".to_owned(), &["http://no-such-host.invalid:2379", "name"]),
        // Wrong scheme.
        (etcd.replace("http:", "https:"), &["TLS with etcd https://", "use an http:// endpoint"]),
    ] {
        // A resolver may take some time to give up.
        let host = lab.host("h1");
        start_agent_with_endpoint(&lab, &endpoint);
        let output = |status: &Status| {
            let first = status.problems.first().map_or("", String::as_str);
            !status.ready && words.iter().all(|word| first.contains(word)) && !first.contains("transport error")
        };
        let status =
            host.wait_status(READY_TIMEOUT, &format!("{endpoint}: {words:?} are not output"), output).await.expect_ok("h1");
        assert!(status.network.is_none() && status.lease.is_none(), "{status:#?}");
        let output = lab.ctl("h1", &["status"]).assert_code(3).stdout;
        // Once, and without advice to write a configuration that may exist.
        assert!(output.contains("store        not connected ("), "{output}");
        assert!(output.contains("not known yet") && !output.contains("config set"), "{output}");
        stop_agent(&lab);
    }
    // The same for a command that connects to etcd itself.
    let output = lab.ctl("h1", &["config", "show", "--etcd-endpoints", &unused("2399")]).assert_code(1);
    output.assert_stderr_contains(&["Connection refused", "start etcd, or set --etcd-endpoints"]);
    let flags = |endpoint: &str| {
        let mut command = lab.overlayd_command("h1", lab.dir().join("new/run"), lab.dir().join("new/state"));
        command.args(["--etcd-prefix", "/x", "--etcd-endpoints", endpoint]);
        command
    };
    for (endpoint, words) in [
        ("10.99.0.2:2379", "`10.99.0.2:2379` has no scheme: http://10.99.0.2:2379, or https://10.99.0.2:2379"),
        ("http://10.99.0.2", "`http://10.99.0.2` has no port: is it http://10.99.0.2:2379?"),
        ("http://10.99.0.2:2379/v3", "is not a URL such as http://"),
    ] {
        lab.run_to_exit("h1", flags(endpoint)).assert_code(2).assert_stderr_contains(&["--etcd-endpoints", words]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_to_tls_etcd_is_reported() {
    let lab = start_lab_without_agents(1, Families::V4).await;
    // A TLS server closes the connection on a plaintext request.
    let listener = lab.open_netns("h1").run(|| TcpListener::bind("127.0.0.1:2398")).expect_ok("h1").expect_ok("a port");
    let server = std::thread::spawn(move || {
        // Each attempt of the agent, until the test connects and sends nothing.
        while let Ok((mut stream, _)) = listener.accept() {
            use std::io::Read;
            let mut buffer = [0; 64];
            if matches!(stream.read(&mut buffer), Ok(length) if buffer[..length].starts_with(b"end")) {
                return;
            }
        }
    });
    start_agent_with_endpoint(&lab, "http://127.0.0.1:2398");
    start_and_wait_for_problem(&lab, &[], &["http://127.0.0.1:2398", "use an https:// endpoint", "--etcd-cafile"]).await;
    stop_agent(&lab);
    kernel::shell(&lab, "h1", "bash -c 'echo end >/dev/tcp/127.0.0.1/2398'");
    server.join().unwrap_or_default();
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_external_interface_is_reported() {
    let lab = start_lab_without_agents(1, Families::Dual).await;
    start_and_wait_for_problem(&lab, &["--iface", "eth9"], &["--iface", "no interface eth9", "candidates: eth0 (10.99.1.1"])
        .await;
    lab.ctl("h1", &["attach", "web"]).assert_code(1).assert_stderr_contains(&["not in place", "overlayctl status"]);
    stop_agent(&lab);
    // The interface exists, but lacks an address that the network needs.
    kernel::shell(&lab, "h1", "ip -6 address flush dev eth0 scope global");
    start_and_wait_for_problem(&lab, &[], &["eth0 has no IPv6 address", "--iface"]).await;
    kernel::shell(&lab, "h1", "ip address add fd99::1:1/64 dev eth0 nodad");
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready with an IPv6 address");
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_config_file_is_reported() {
    let lab = start_lab_without_agents(1, Families::V4).await;
    let path = lab.dir().join("overlayd.toml");
    let path_text = path.display().to_string();
    for (text, words) in [
        ("etcd-endpoint = \"http://x:1\"\n", &["etcd-endpoint in", "did you mean `etcd-endpoints`?"][..]),
        (
            "[etcd]\nendpoints = \"http://x:1\"\npassword = \"hush\"\n",
            &["etcd in", "`[etcd]`", "a table", "`etcd-endpoints = ...`"],
        ),
        ("[overlayd]\niface = \"eth0\"\n", &["overlayd in", "top level of the file", "`iface = ...`"]),
        ("etcd-endpoints = http://x:1\n", &["line 1", "is not TOML", "quoted"]),
        ("iface = \"eth0\"\nlog-level = \n", &["line 2", "is not TOML"]),
        ("ip-masq = \"no\"\n", &["ip-masq in", "`no` is not true or false"]),
    ] {
        fs::write(&path, text).expect_ok("a file");
        let mut command = Command::new(overlayd());
        command.arg("--config").arg(&path);
        let output =
            lab.run_to_exit("h1", command).assert_code(2).assert_stderr_contains(&[&["1 error", &path_text], words].concat());
        assert!(!output.stderr.contains("hush"), "{}", output.stderr);
    }
    // A world-readable key is one error, without a second one about a certificate without its key.
    let (certificate, key) = (lab.dir().join("a.crt"), lab.dir().join("a.key"));
    fs::write(&certificate, "x").expect_ok("a file");
    fs::write(&key, "x").expect_ok("a file");
    fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect_ok("a mode");
    let mut command = lab.overlayd_command("h1", lab.dir().join("new/run"), lab.dir().join("new/state"));
    command.arg("--etcd-certfile").arg(&certificate).arg("--etcd-keyfile").arg(&key);
    let output = lab.run_to_exit("h1", command).assert_code(2).assert_stderr_contains(&["--etcd-keyfile", "chmod 600"]);
    assert!(!output.stderr.contains("needs --etcd-keyfile"), "{}", output.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_network_file_is_reported() {
    let lab = start_lab_without_agents(1, Families::V4).await;
    let path = lab.dir().join("network.json");
    let path_text = path.display().to_string();
    let stored = || etcd::list(&lab, &etcd::config_key()).into_iter().map(|entry| entry.value).collect::<Vec<_>>();
    let before = stored();
    for (text, words) in [
        ("{\"Network\": \"10.244.0.0/16\",}", &["is not JSON", "line 1 column"][..]),
        ("{\"Network\": \"10.244.0.1/16\"}", &["Network: `10.244.0.1/16`", "10.244.0.0/16"]),
        (
            "{\"Network\": \"10.244.0.0/16\", \"Backend\": {\"Type\": \"vxlan\", \"MTU\": 1200}}",
            &["Backend.MTU: `1200`", "1350", "IPv6"],
        ),
    ] {
        fs::write(&path, text).expect_ok("a file");
        let output = lab.ctl("h1", &["config", "validate", &path_text]).assert_code(1);
        let all = format!("{}{}", output.stdout, output.stderr);
        assert!(words.iter().all(|word| all.contains(word)) && all.contains(&path_text), "{all}");
        let endpoints = lab.layout().etcd_endpoints().join(",");
        let output = lab.ctl("h1", &["config", "set", &path_text, "--etcd-endpoints", &endpoints]).assert_code(1);
        output.assert_stderr_contains(&[&[path_text.as_str(), "nothing was written"], words].concat());
    }
    assert_eq!(stored(), before);
    // An invalid one written by other means.
    etcd::put(&lab, &etcd::config_key(), "{\"Network\": \"10.244.0.0/16\"");
    start_and_wait_for_problem(&lab, &[], &["/config is invalid", "is not JSON", "overlayctl config set FILE"]).await;
    let output = lab.ctl("h1", &["status"]).assert_code(3).stdout;
    assert!(output.contains("the stored configuration is invalid"), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_without_agent_name_remedy() {
    let lab = start_lab_without_agents(1, Families::V4).await;
    for command in [&["status"][..], &["peers"], &["subnets"], &["mesh"], &["attach", "web"]] {
        lab.ctl("h1", command).assert_code(1).assert_stderr_contains(&[
            "no agent at",
            "overlayd.sock",
            "systemctl status overlayd",
            "--socket",
        ]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn taken_ports_are_reported() {
    let lab = start_lab_without_agents(1, Families::V4).await;
    let metrics = lab.open_netns("h1").run(|| TcpListener::bind("0.0.0.0:9780")).expect_ok("h1").expect_ok("a port");
    let mut command = lab.overlayd_command("h1", lab.dir().join("new/run"), lab.dir().join("new/state"));
    command.args(["--metrics-listen", "127.0.0.1:9780"]);
    lab.run_to_exit("h1", command).assert_code(1).assert_stderr_contains(&["127.0.0.1:9780", "--metrics-listen", "in use"]);
    drop(metrics);

    let tunnel = lab.open_netns("h1").run(|| UdpSocket::bind("0.0.0.0:8472")).expect_ok("h1").expect_ok("a port");
    start_and_wait_for_problem(&lab, &[], &["UDP port 8472 is taken", "ss -ulnp", "Backend.Port"]).await;
    // The lease is held, so it is not named as the missing part.
    lab.ctl("h1", &["attach", "web"]).assert_code(1).assert_stderr_contains(&["devices are not in place", "overlayctl status"]);
    drop(tunnel);
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready with a free port");
    stop_agent(&lab);
}

/// All peer entries depend on the device: only its failure is reported, with the remedy.
#[tokio::test(flavor = "multi_thread")]
async fn leftover_flannel_device_is_sole_reported_cause() {
    const PEERS: u16 = 20;
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.agents = false;
        options.networks.v4 = synthetic_leases::networks().v4;
    })
    .await;
    lab.start_agent("h2").await;
    synthetic_leases::put_all(&lab, &synthetic_leases::unused_leases(&lab, PEERS, false));
    kernel::shell(&lab, "h1", "ip link add flannel.1 type vxlan id 1 dstport 8472 dev eth0; ip link set flannel.1 up");
    let cause = ["set link ovx.1", "in use by interface flannel.1", "delete it"];
    let output = start_and_wait_for_problem(&lab, &[], &cause).await;
    assert!(output.starts_with("1 entry cannot be programmed: set link ovx.1"), "{output}");
    // It is the same after some retries.
    let waited = lab.ctl("h1", &["status", "--wait", "3s"]).assert_code(4).stdout;
    assert!(cause.iter().all(|word| waited.contains(word)), "{waited}");
    let status = lab.status("h1").await;
    assert_eq!(status.data_path.failed.len(), 1, "{:?}", status.data_path.failed);
    let output = lab.ctl("h1", &["peers"]).assert_code(0).stdout;
    assert!(output.contains("waits for link ovx.1"), "{output}");
    let log = lab.log("h1");
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN") || line.contains("ERROR")).collect();
    let follows = |line: &&&str| line.contains("exthop") || line.contains("No such device") || line.contains("does not exist");
    assert_eq!(warnings.iter().filter(follows).collect::<Vec<_>>(), Vec::<&&str>::new(), "{log}");
    assert!(warnings.iter().any(|line| line.contains("flannel.1")), "{log}");

    kernel::shell(&lab, "h1", "ip link delete flannel.1");
    let all = |status: &Status| status.ready && status.data_path.peers == usize::from(PEERS) + 1;
    lab.host("h1").wait_status(READY_TIMEOUT, "not all peers after the device is removed", all).await.expect_ok("h1");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exhausted_pool_is_reported() {
    let lab = start_lab_without_agents(2, Families::V4).await;
    let only = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.7.0","SubnetMax":"10.244.7.0"}"#;
    etcd::put(&lab, &etcd::config_key(), only);
    lab.start_agent("h2").await;
    let output = start_and_wait_for_problem(
        &lab,
        &[],
        &["no free subnet: all 1 of 10.244.0.0/16", "overlayctl subnets", "larger network"],
    )
    .await;
    assert!(output.starts_with("no subnet is leased"), "{output}");
    etcd::put(&lab, &etcd::config_key(), &lab.layout().config);
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready with a larger pool");
}

#[tokio::test(flavor = "multi_thread")]
async fn too_small_mtu_is_reported() {
    // IPv6 needs 1280 bytes; the kernel disables it on a device with a smaller MTU.
    let lab = start_lab_without_agents(1, Families::Dual).await;
    kernel::shell(&lab, "h1", "ip link set eth0 mtu 1349");
    start_and_wait_for_problem(&lab, &[], &["the overlay's MTU is 1279", "IPv6 needs 1280", "eth0 (now 1349) to 1350"]).await;
    kernel::shell(&lab, "h1", "ip link set eth0 mtu 1350");
    kernel::shell(&lab, "h1", "ip address add fd99::1:1/64 dev eth0 nodad 2>/dev/null || true");
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready with one byte more");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
}

/// A small MTU is no problem without IPv6 in the network. A larger one later enables no unwanted IPv6.
#[tokio::test(flavor = "multi_thread")]
async fn small_mtu_works_without_ipv6() {
    let lab = start_lab_without_agents(1, Families::V4).await;
    kernel::shell(&lab, "h1", "ip link set eth0 mtu 1300");
    let status = lab.start_agent("h1").await;
    assert_eq!((status.data_path.mtu, status.problems), (Some(1250), Vec::new()));
    lab.ctl("h1", &["attach", "web"]).assert_code(0);
    kernel::shell(&lab, "h1", "ip link set eth0 mtu 1500");
    let grown = |status: &Status| status.ready && status.data_path.mtu == Some(1450);
    lab.host("h1").wait_status(CONVERGE_TIMEOUT, "the MTU is not updated", grown).await.expect_ok("h1");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    eventually_async("no router advertisement is accepted, and no address is generated", CONVERGE_TIMEOUT, || {
        let output = kernel::shell(
            &lab,
            "h1",
            "cat /proc/sys/net/ipv6/conf/ovx.1/accept_ra /proc/sys/net/ipv6/conf/ovb.1/accept_ra; ip -6 -o address show dev ovx.1; ip -6 -o address show dev ovb.1",
        );
        std::future::ready(if output.trim() == "0\n0" { Ok(()) } else { Err(output) })
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn firewall_is_reported_without_peers() {
    let lab = TestLab::one_host(Families::V4).await;
    let check = || lab.ctl("h1", &["check", "firewall"]);
    check().assert_code(0);
    kernel::shell(
        &lab,
        "h1",
        "nft 'table inet strict { chain in { type filter hook input priority 0; policy drop; tcp sport 2379 accept; }; }'",
    );
    let output = check().assert_code(3).stdout;
    for word in
        ["UDP port 8472", "from peers", "table inet strict, chain in", "nft insert rule inet strict in udp dport 8472 accept"]
    {
        assert!(output.contains(word), "{word}: {output}");
    }
    kernel::shell(&lab, "h1", "nft delete table inet strict");
    check().assert_code(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn copied_or_torn_state_is_reported() {
    let lab = start_lab_without_agents(2, Families::V4).await;
    lab.start_agent("h1").await;
    stop_agent(&lab);
    // A copy of the first host's disk.
    let (own, copy) = (lab.host("h1").state_dir(), lab.host("h2").state_dir());
    fs::create_dir_all(&copy).expect_ok("a directory");
    for name in ["node-id", "state.json"] {
        fs::copy(own.join(name), copy.join(name)).expect_ok(name);
    }
    lab.start_agent("h1").await;
    let host = lab.host("h2");
    host.agent_start(&[]).expect_ok("start");
    let named = |status: &Status| {
        status.problems.iter().any(|p| p.contains("this host's identity is that of host h1") && p.contains("node-id"))
    };
    host.wait_status(READY_TIMEOUT, "the copy is not reported", named).await.expect_ok("h2");
    assert!(lab.status("h1").await.ready, "the first host keeps its lease");
    host.agent_stop(Signal::SIGTERM).expect_ok("stop");

    // The remedy suffices: the other copied files do no harm.
    fs::remove_file(copy.join("node-id")).expect_ok("the remedy");
    lab.start_agent("h2").await;
    lab.wait_full_mesh().await;
    host.agent_stop(Signal::SIGTERM).expect_ok("stop");

    // Truncated files are renamed and reported; a file in place of a directory is reported with its flag.
    fs::write(copy.join("state.json"), "{\"torn").expect_ok("a torn file");
    lab.start_agent("h2").await;
    lab.wait_for_log("h2", &["state.json", "set aside", "torn"]).await;
    let file = lab.dir().join("file");
    fs::write(&file, "").expect_ok("a file");
    for (run, state, flag) in
        [(file.join("run"), copy.clone(), "--run-dir"), (lab.dir().join("new/run"), file.join("state"), "--state-dir")]
    {
        let output = lab.run_to_exit("world", lab.overlayd_command("h1", run, state)).assert_code(1).assert_stderr_contains(&[
            flag,
            "Not a directory",
            "remove it",
        ]);
        assert_eq!(output.stderr.matches("Not a directory").count(), 1, "{}", output.stderr);
    }
}
