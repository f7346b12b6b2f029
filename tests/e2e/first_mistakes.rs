//! What goes wrong on the first day: each mistake is made as a new user makes it, and what is said names the value, the place and the remedy.
//!
//! Stories of their own have a second agent, rights that are missing and unknown keys (`refusal`), a configuration that comes late or is bad
//! (`late_config`), values of an attach (`bad_input`), and certificates, passwords and roles (`etcd_access`).

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::process::Command;

use nix::sys::signal::Signal;
use overlay_agent::model::api::Status;
use overlay_tests::programs::overlayd;
use overlay_tests::story::{READY, SOON};
use overlay_tests::wait::eventually_asked;
use overlay_tests::{Must, Story, etcd, kernel, peers};
use overlayctl::lab::{Families, agent, process};

/// Hosts whose agents have not been started yet.
async fn hosts(count: u16, families: Families) -> Story {
    Story::without_agents(count, families).await
}

/// Starts the agent of h1 with this endpoint and no other.
fn start_at(story: &Story, endpoint: &str) {
    let host = story.at("h1");
    for dir in [host.run_dir(), host.state_dir()] {
        fs::create_dir_all(dir).must("a directory");
    }
    let mut command = Command::new(overlayd());
    command.args(["--config", "/dev/null", "--node-name", "h1", "--etcd-endpoints", endpoint]);
    command.arg("--run-dir").arg(host.run_dir()).arg("--state-dir").arg(host.state_dir());
    process::start(command, Some(&story.inside("h1")), &host.log(), &agent::record(story.dir(), "h1")).must("start");
}

/// Starts the agent of h1 so, and waits until a problem has all these words; the problem.
async fn problem(story: &Story, flags: &[&str], words: &[&str]) -> String {
    let host = story.at("h1");
    host.agent_start(flags).must("start");
    let has = |problem: &&String| words.iter().all(|word| problem.contains(word));
    let holds = |status: &Status| !status.ready && status.problems.iter().any(|problem| has(&problem));
    let status = host.wait_status(SOON, &format!("no problem says {words:?}"), holds).await.must("h1");
    story.ctl("h1", &["status"]).exits(3);
    status.problems.iter().find(has).cloned().must("a problem")
}

fn stop(story: &Story) {
    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_is_not_where_it_is_looked_for() {
    let story = hosts(1, Families::V4).await;
    let etcd = story.layout().etcd_endpoints()[0].clone();
    let unused = |flag: &str| etcd.replace("2379", flag);
    for (endpoint, words) in [
        // Nothing listens; nothing has the address, which the kernel finds after three seconds or the agent gives up after five; the name is nobody's.
        (unused("2399"), &["2399 cannot be reached: Connection refused", "start etcd, or set --etcd-endpoints"][..]),
        ("http://10.99.77.77:2379".to_owned(), &["etcd http://10.99.77.77:2379 "]),
        ("http://no-such-host.invalid:2379".to_owned(), &["http://no-such-host.invalid:2379", "name"]),
        // The wrong scheme.
        (etcd.replace("http:", "https:"), &["TLS with etcd https://", "use an http:// endpoint"]),
    ] {
        // A resolver may take a while to give a name up.
        let host = story.at("h1");
        start_at(&story, &endpoint);
        let said = |status: &Status| {
            let first = status.problems.first().map_or("", String::as_str);
            !status.ready && words.iter().all(|word| first.contains(word)) && !first.contains("transport error")
        };
        let status = host.wait_status(READY, &format!("{endpoint}: {words:?} are not said"), said).await.must("h1");
        assert!(status.network.is_none() && status.lease.is_none(), "{status:#?}");
        let shown = story.ctl("h1", &["status"]).exits(3).out;
        // Once, and without the advice to write a configuration that may well be there.
        assert!(shown.contains("store        not connected ("), "{shown}");
        assert!(shown.contains("not known yet") && !shown.contains("config set"), "{shown}");
        stop(&story);
    }
    // The same of a command that asks etcd itself.
    let said = story.ctl("h1", &["config", "show", "--etcd-endpoints", &unused("2399")]).exits(1);
    said.complains(&["Connection refused", "start etcd, or set --etcd-endpoints"]);
    let flags = |endpoint: &str| {
        let mut command = story.overlayd("h1", story.dir().join("new/run"), story.dir().join("new/state"));
        command.args(["--etcd-prefix", "/x", "--etcd-endpoints", endpoint]);
        command
    };
    for (endpoint, words) in [
        ("10.99.0.2:2379", "`10.99.0.2:2379` has no scheme: http://10.99.0.2:2379, or https://10.99.0.2:2379"),
        ("http://10.99.0.2", "`http://10.99.0.2` has no port: is it http://10.99.0.2:2379?"),
        ("http://10.99.0.2:2379/v3", "is not a URL such as http://"),
    ] {
        story.ends("h1", flags(endpoint)).exits(2).complains(&["--etcd-endpoints", words]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http_to_an_etcd_that_speaks_tls() {
    let story = hosts(1, Families::V4).await;
    // What a TLS server does with a request in the clear: it ends the connection.
    let listener = story.inside("h1").run(|| TcpListener::bind("127.0.0.1:2398")).must("h1").must("a port");
    let server = std::thread::spawn(move || {
        // Each try of the agent, until the test asks for nothing.
        while let Ok((mut stream, _)) = listener.accept() {
            use std::io::Read;
            let mut asked = [0; 64];
            if matches!(stream.read(&mut asked), Ok(length) if asked[..length].starts_with(b"end")) {
                return;
            }
        }
    });
    start_at(&story, "http://127.0.0.1:2398");
    problem(&story, &[], &["http://127.0.0.1:2398", "use an https:// endpoint", "--etcd-cafile"]).await;
    stop(&story);
    kernel::shell(&story, "h1", "bash -c 'echo end >/dev/tcp/127.0.0.1/2398'");
    server.join().unwrap_or_default();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_external_interface_that_is_not_there() {
    let story = hosts(1, Families::Dual).await;
    problem(&story, &["--iface", "eth9"], &["--iface", "no interface eth9", "candidates: eth0 (10.99.1.1"]).await;
    story.ctl("h1", &["attach", "web"]).exits(1).complains(&["not in place", "overlayctl status"]);
    stop(&story);
    // It is there, and lacks what the network needs.
    kernel::shell(&story, "h1", "ip -6 address flush dev eth0 scope global");
    problem(&story, &[], &["eth0 has no IPv6 address", "--iface"]).await;
    kernel::shell(&story, "h1", "ip address add fd99::1:1/64 dev eth0 nodad");
    story.at("h1").wait_ready(READY).await.must("ready once it has one");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_is_not_what_it_should_be() {
    let story = hosts(1, Families::V4).await;
    let path = story.dir().join("overlayd.toml");
    let shown = path.display().to_string();
    for (text, words) in [
        ("etcd-endpoint = \"http://x:1\"\n", &["etcd-endpoint in", "did you mean `etcd-endpoints`?"][..]),
        (
            "[etcd]\nendpoints = \"http://x:1\"\npassword = \"hush\"\n",
            &["etcd in", "`[etcd]`", "a table", "`etcd-endpoints = ...`"],
        ),
        ("[overlayd]\niface = \"eth0\"\n", &["overlayd in", "top of the file", "`iface = ...`"]),
        ("etcd-endpoints = http://x:1\n", &["line 1", "is not TOML", "quoted"]),
        ("iface = \"eth0\"\nlog-level = \n", &["line 2", "is not TOML"]),
        ("ip-masq = \"no\"\n", &["ip-masq in", "`no` is not true or false"]),
    ] {
        fs::write(&path, text).must("a file");
        let mut command = Command::new(overlayd());
        command.arg("--config").arg(&path);
        let said = story.ends("h1", command).exits(2).complains(&[&["1 mistake", &shown], words].concat());
        assert!(!said.err.contains("hush"), "{}", said.err);
    }
    // A key that others may read is told once, not as a certificate without its key as well.
    let (certificate, key) = (story.dir().join("a.crt"), story.dir().join("a.key"));
    fs::write(&certificate, "x").must("a file");
    fs::write(&key, "x").must("a file");
    fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).must("a mode");
    let mut command = story.overlayd("h1", story.dir().join("new/run"), story.dir().join("new/state"));
    command.arg("--etcd-certfile").arg(&certificate).arg("--etcd-keyfile").arg(&key);
    let said = story.ends("h1", command).exits(2).complains(&["--etcd-keyfile", "chmod 600"]);
    assert!(!said.err.contains("needs --etcd-keyfile"), "{}", said.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_networks_file_is_not_what_it_should_be() {
    let story = hosts(1, Families::V4).await;
    let path = story.dir().join("network.json");
    let shown = path.display().to_string();
    let stored = || etcd::list(&story, &etcd::config_key()).into_iter().map(|entry| entry.value).collect::<Vec<_>>();
    let before = stored();
    for (text, words) in [
        ("{\"Network\": \"10.244.0.0/16\",}", &["is not JSON", "line 1 column"][..]),
        ("{\"Network\": \"10.244.0.1/16\"}", &["Network: `10.244.0.1/16`", "10.244.0.0/16"]),
        (
            "{\"Network\": \"10.244.0.0/16\", \"Backend\": {\"Type\": \"vxlan\", \"MTU\": 1200}}",
            &["Backend.MTU: `1200`", "1350", "IPv6"],
        ),
    ] {
        fs::write(&path, text).must("a file");
        let said = story.ctl("h1", &["config", "validate", &shown]).exits(1);
        let all = format!("{}{}", said.out, said.err);
        assert!(words.iter().all(|word| all.contains(word)) && all.contains(&shown), "{all}");
        let endpoints = story.layout().etcd_endpoints().join(",");
        let said = story.ctl("h1", &["config", "set", &shown, "--etcd-endpoints", &endpoints]).exits(1);
        said.complains(&[&[shown.as_str(), "nothing was written"], words].concat());
    }
    assert_eq!(stored(), before);
    // One that got there by other hands.
    etcd::put(&story, &etcd::config_key(), "{\"Network\": \"10.244.0.0/16\"");
    problem(&story, &[], &["/config is bad", "is not JSON", "overlayctl config set FILE"]).await;
    let said = story.ctl("h1", &["status"]).exits(3).out;
    assert!(said.contains("what is written is bad"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_agent_runs() {
    let story = hosts(1, Families::V4).await;
    for command in [&["status"][..], &["peers"], &["subnets"], &["mesh"], &["attach", "web"]] {
        story.ctl("h1", command).exits(1).complains(&["no agent at", "overlayd.sock", "systemctl status overlayd", "--socket"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_that_are_taken() {
    let story = hosts(1, Families::V4).await;
    let metrics = story.inside("h1").run(|| TcpListener::bind("0.0.0.0:9780")).must("h1").must("a port");
    let mut command = story.overlayd("h1", story.dir().join("new/run"), story.dir().join("new/state"));
    command.args(["--metrics-listen", "127.0.0.1:9780"]);
    story.ends("h1", command).exits(1).complains(&["127.0.0.1:9780", "--metrics-listen", "in use"]);
    drop(metrics);

    let tunnel = story.inside("h1").run(|| UdpSocket::bind("0.0.0.0:8472")).must("h1").must("a port");
    problem(&story, &[], &["UDP port 8472 is taken", "ss -ulnp", "Backend.Port"]).await;
    // The lease is held: that is not what is missing.
    story.ctl("h1", &["attach", "web"]).exits(1).complains(&["devices are not in place", "overlayctl status"]);
    drop(tunnel);
    story.at("h1").wait_ready(READY).await.must("ready once the port is free");
    stop(&story);
}

/// All that peers need stands on the device: its failure is reported, with the remedy, and none of those that follow from it.
#[tokio::test(flavor = "multi_thread")]
async fn device_left_by_flannel_is_reported_as_the_one_cause() {
    const PEERS: u16 = 20;
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.agents = false;
        options.networks.v4 = peers::networks().v4;
    })
    .await;
    story.start("h2").await;
    peers::put_all(&story, &peers::beside(&story, PEERS, false));
    kernel::shell(&story, "h1", "ip link add flannel.1 type vxlan id 1 dstport 8472 dev eth0; ip link set flannel.1 up");
    let cause = ["set link ovx.1", "in use by interface flannel.1", "delete it"];
    let said = problem(&story, &[], &cause).await;
    assert!(said.starts_with("1 entry cannot be programmed: set link ovx.1"), "{said}");
    // Some tries later it is the same.
    let waited = story.ctl("h1", &["status", "--wait", "3s"]).exits(4).out;
    assert!(cause.iter().all(|word| waited.contains(word)), "{waited}");
    let status = story.status("h1").await;
    assert_eq!(status.data_path.failed.len(), 1, "{:?}", status.data_path.failed);
    let shown = story.ctl("h1", &["peers"]).exits(0).out;
    assert!(shown.contains("waits for link ovx.1"), "{shown}");
    let log = story.log("h1");
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN") || line.contains("ERROR")).collect();
    let follows = |line: &&&str| line.contains("exthop") || line.contains("No such device") || line.contains("does not exist");
    assert_eq!(warnings.iter().filter(follows).collect::<Vec<_>>(), Vec::<&&str>::new(), "{log}");
    assert!(warnings.iter().any(|line| line.contains("flannel.1")), "{log}");

    kernel::shell(&story, "h1", "ip link delete flannel.1");
    let all = |status: &Status| status.ready && status.data_path.peers == usize::from(PEERS) + 1;
    story.at("h1").wait_status(READY, "it has not all peers once the device is gone", all).await.must("h1");
    story.settled("h1", SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_subnet_is_free() {
    let story = hosts(2, Families::V4).await;
    let only = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.7.0","SubnetMax":"10.244.7.0"}"#;
    etcd::put(&story, &etcd::config_key(), only);
    story.start("h2").await;
    let said = problem(&story, &[], &["no free subnet: all 1 of 10.244.0.0/16", "overlayctl subnets", "larger network"]).await;
    assert!(said.starts_with("no subnet is leased"), "{said}");
    etcd::put(&story, &etcd::config_key(), &story.layout().config);
    story.at("h1").wait_ready(READY).await.must("ready once there are more");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_mtu_that_is_too_small() {
    // IPv6 needs 1280 bytes, and the kernel has none on a device with less.
    let story = hosts(1, Families::Dual).await;
    kernel::shell(&story, "h1", "ip link set eth0 mtu 1349");
    problem(&story, &[], &["the overlay's MTU is 1279", "IPv6 needs 1280", "eth0 (now 1349) to 1350"]).await;
    kernel::shell(&story, "h1", "ip link set eth0 mtu 1350");
    kernel::shell(&story, "h1", "ip address add fd99::1:1/64 dev eth0 nodad 2>/dev/null || true");
    story.at("h1").wait_ready(READY).await.must("ready with one byte more");
    story.settled("h1", SOON).await;
}

/// Without IPv6 in the network there is nothing wrong with it; and when it grows, nothing of IPv6 comes that the agent does not want.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_mtu_without_ipv6() {
    let story = hosts(1, Families::V4).await;
    kernel::shell(&story, "h1", "ip link set eth0 mtu 1300");
    let status = story.start("h1").await;
    assert_eq!((status.data_path.mtu, status.problems), (Some(1250), Vec::new()));
    story.ctl("h1", &["attach", "web"]).exits(0);
    kernel::shell(&story, "h1", "ip link set eth0 mtu 1500");
    let grown = |status: &Status| status.ready && status.data_path.mtu == Some(1450);
    story.at("h1").wait_status(SOON, "the MTU is not followed", grown).await.must("h1");
    story.settled("h1", SOON).await;
    eventually_asked("no router is listened to, and no address is made up", SOON, || {
        let said = kernel::shell(
            &story,
            "h1",
            "cat /proc/sys/net/ipv6/conf/ovx.1/accept_ra /proc/sys/net/ipv6/conf/ovb.1/accept_ra; ip -6 -o address show dev ovx.1; ip -6 -o address show dev ovb.1",
        );
        std::future::ready(if said.trim() == "0\n0" { Ok(()) } else { Err(said) })
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_firewall_before_there_are_peers() {
    let story = Story::one_host(Families::V4).await;
    let check = || story.ctl("h1", &["check", "firewall"]);
    check().exits(0);
    kernel::shell(
        &story,
        "h1",
        "nft 'table inet strict { chain in { type filter hook input priority 0; policy drop; tcp sport 2379 accept; }; }'",
    );
    let said = check().exits(3).out;
    for word in
        ["UDP port 8472", "from peers", "table inet strict, chain in", "nft insert rule inet strict in udp dport 8472 accept"]
    {
        assert!(said.contains(word), "{word}: {said}");
    }
    kernel::shell(&story, "h1", "nft delete table inet strict");
    check().exits(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn state_of_before() {
    let story = hosts(2, Families::V4).await;
    story.start("h1").await;
    stop(&story);
    // A copy of the first host, by its disk.
    let (own, copy) = (story.at("h1").state_dir(), story.at("h2").state_dir());
    fs::create_dir_all(&copy).must("a directory");
    for name in ["node-id", "state.json"] {
        fs::copy(own.join(name), copy.join(name)).must(name);
    }
    story.start("h1").await;
    let host = story.at("h2");
    host.agent_start(&[]).must("start");
    let named = |status: &Status| {
        status.problems.iter().any(|p| p.contains("this host's identity is that of host h1") && p.contains("node-id"))
    };
    host.wait_status(READY, "the copy is not named", named).await.must("h2");
    assert!(story.status("h1").await.ready, "the first one keeps what it has");
    host.agent_stop(Signal::SIGTERM).must("stop");

    // The remedy is enough: what else was copied does not stand in the way.
    fs::remove_file(copy.join("node-id")).must("the remedy");
    story.start("h2").await;
    story.mesh().await;
    host.agent_stop(Signal::SIGTERM).must("stop");

    // Files that are torn are set aside by name, and one that is in the way is named with its flag.
    fs::write(copy.join("state.json"), "{\"torn").must("a torn file");
    story.start("h2").await;
    story.logged("h2", &["state.json", "set aside", "torn"]).await;
    let file = story.dir().join("file");
    fs::write(&file, "").must("a file");
    for (run, state, flag) in
        [(file.join("run"), copy.clone(), "--run-dir"), (story.dir().join("new/run"), file.join("state"), "--state-dir")]
    {
        let said =
            story.ends("world", story.overlayd("h1", run, state)).exits(1).complains(&[flag, "Not a directory", "remove it"]);
        assert_eq!(said.err.matches("Not a directory").count(), 1, "{}", said.err);
    }
}
