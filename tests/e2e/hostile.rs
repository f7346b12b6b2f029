//! Hostile leases and configurations in etcd are rejected: named, counted, ignored. Everything else works, and no traffic leaves
//! the network.

use overlay_agent::model::api::Status;
use overlay_agent::model::{Family, Subnet};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, etcd, eventually, http, kernel};
use overlayctl::lab::Families;

const PEER_MAC: &str = "02:00:00:00:00:77";

fn lease(public_ip: &str, mac: &str) -> String {
    format!(r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#)
}

/// Keys in a block of thirty subnets without a host's own subnet, which a hash selects.
fn free_subnet_keys(taken: &[Subnet]) -> impl Fn(u8) -> String + use<> {
    let free = |block: u8| (block..block + 30).all(|n| taken.iter().all(|subnet| subnet.to_key() != format!("10.244.{n}.0-24")));
    let block = [201, 101, 1].into_iter().find(|block| free(*block)).expect_ok("two hosts cannot hold a part of three blocks");
    move |n| format!("10.244.{}.0-24", block + n)
}

/// Name, key, value, and a word of the rejection's reason.
fn hostile_leases(own: &str, peer_subnet: &str, v4: &impl Fn(u8) -> String) -> Vec<(&'static str, String, String, &'static str)> {
    let good = lease("10.99.7.7", PEER_MAC);
    let plain = |n: u8, mac: &str| lease(&format!("10.99.7.{n}"), mac);
    vec![
        ("no JSON", v4(0), "not json at all".to_owned(), "not JSON"),
        ("half a JSON", v4(1), good[..40].to_owned(), "not JSON"),
        ("an array", v4(2), "[1,2,3]".to_owned(), "not a JSON object"),
        ("empty", v4(3), String::new(), "not JSON"),
        ("no MAC", v4(4), r#"{"PublicIP":"10.99.7.5","BackendType":"vxlan","BackendData":{"VNI":1}}"#.to_owned(), "VtepMAC"),
        ("a multicast MAC", v4(5), plain(6, "01:00:5e:00:00:01"), "VtepMAC"),
        ("a broadcast MAC", v4(6), plain(7, "ff:ff:ff:ff:ff:ff"), "VtepMAC"),
        ("a MAC of zeros", v4(7), plain(8, "00:00:00:00:00:00"), "VtepMAC"),
        ("a MAC that is none", v4(8), plain(9, "02:00"), "VtepMAC"),
        ("our public IP", v4(9), lease(own, PEER_MAC), "this host's own"),
        ("a loopback public IP", v4(10), lease("127.0.0.1", PEER_MAC), "loopback"),
        ("a multicast public IP", v4(11), lease("224.0.0.1", PEER_MAC), "multicast"),
        ("an unspecified public IP", v4(12), lease("0.0.0.0", PEER_MAC), "unspecified"),
        ("a broadcast public IP", v4(13), lease("255.255.255.255", PEER_MAC), "broadcast"),
        ("a link-local public IP", v4(14), lease("169.254.1.1", PEER_MAC), "link-local"),
        ("a public IP inside the overlay", v4(15), lease("10.244.3.3", PEER_MAC), "must not lie among the overlay's subnets"),
        ("a public IP that is text", v4(16), lease("$(reboot)", PEER_MAC), "must be an IPv4 address"),
        ("a subnet outside the network", "10.50.0.0-24".to_owned(), plain(18, "02:00:00:00:01:18"), "not inside the network"),
        ("the default route", "0.0.0.0-0".to_owned(), plain(19, "02:00:00:00:01:19"), "not inside the network"),
        ("the whole network", "10.244.0.0-16".to_owned(), plain(20, "02:00:00:00:01:20"), "more than a quarter"),
        ("a part of another's", peer_subnet.replace("-24", "-26"), plain(21, "02:00:00:00:01:21"), "overlaps"),
        ("another VNI", v4(21), good.replace("\"VNI\":1", "\"VNI\":99"), "VNI 99"),
        ("a VNI that is none", v4(22), good.replace("\"VNI\":1", "\"VNI\":16777216"), "VNI"),
        (
            "another backend",
            v4(23),
            r#"{"PublicIP":"10.99.7.24","PublicIPv6":null,"BackendType":"host-gw"}"#.to_owned(),
            "host-gw",
        ),
        ("shell in the key", "10.244.225.0-24;reboot".to_owned(), good.clone(), "key is no subnet"),
        ("a key with escapes", "10.244.226.0-24\u{1b}[31m\u{7}".to_owned(), good.clone(), "key is no subnet"),
        ("a key that is not canonical", "10.244.227.1-24".to_owned(), good.clone(), "key is no subnet"),
        ("a key in IPv6", "fd00:10:244:51::-64".to_owned(), good.clone(), "PublicIPv6"),
        (
            "shell in the name",
            v4(28),
            format!(r#"{},"Node":{{"Name":"$(touch /tmp/x); `reboot`\u001b[31m","Id":"aa"}}}}"#, &good[..good.len() - 1]),
            "Node",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_leases_are_refused() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let before = kernel::actual_state(&lab, "h1");
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V4).await;
    let own = lab.host("h1").layout().addresses.v4.expect_ok("an address").to_string();
    let ours = lab.status("h1").await.lease.expect_ok("a lease").subnet;
    let peer = lab.status("h2").await.lease.expect_ok("a lease").subnet;
    let v4 = free_subnet_keys(&[ours, peer]);
    let all = hostile_leases(&own, &peer.to_key(), &v4);
    for (_, key, value, _) in &all {
        etcd::put(&lab, &etcd::lease_key(key), value);
    }
    let megabyte = etcd::lease_key(&v4(29));
    etcd::put_long(&lab, &megabyte, format!("{{\"PublicIP\":\"{}\"}}", "A".repeat(1 << 20)).as_bytes());
    let count = all.len() + 1;
    let counted = |s: &Status| s.store.refused.len() == count && s.store.leases == count + 2;
    let status = lab
        .host("h1")
        .wait_status(CONVERGE_TIMEOUT, &format!("it does not count {count} refusals"), counted)
        .await
        .expect_ok("h1");
    assert!(status.ready, "the rest works: {status:#?}");
    assert!(status.problems.iter().any(|p| p.contains(&format!("{count} leases ignored"))), "{:?}", status.problems);
    lab.ctl("h1", &["status"]).assert_code(3);

    let subnets = lab.host("h1").client().subnets().await.expect_ok("subnets").subnets;
    let log = lab.log("h1");
    for (name, key, _, reason) in &all {
        // The key with its control characters replaced.
        let printed: String = key.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        let entry = subnets.iter().find(|s| s.key == *key || s.key == printed).expect_ok(&format!("{name}: an entry {printed}"));
        let refused = entry.refused.as_deref().unwrap_or_default();
        assert!(refused.contains(reason), "{name}: `{refused}` does not say `{reason}`");
        assert!(
            log.lines().any(|line| line.contains(&printed) && line.contains("is ignored")),
            "{name}: not in the log: {printed}"
        );
    }
    assert!(subnets.iter().any(|s| s.refused.as_deref().is_some_and(|r| r.contains("more than the"))), "1 MB is named");
    let table = lab.ctl("h1", &["subnets"]).assert_code(0);
    assert_eq!(table.stdout.matches("ignored:").count(), count, "{}", table.stdout);
    for text in [&table.stdout, &log] {
        assert!(!text.contains('\u{1b}') && !text.contains('\u{7}'), "no foreign escape sequence reaches a terminal");
        assert!(text.lines().all(|line| line.len() < 2000), "no line is too long");
    }
    let metrics = http::request(&lab.host("h1").socket(), "GET", "/metrics", "").body;
    assert!(metrics.contains(&format!("overlayd_refused_leases{{network=\"default\"}} {count}\n")), "{metrics}");

    assert_eq!(kernel::difference(&kernel::actual_state(&lab, "h1"), &before), "", "the kernel state is unchanged");
    assert_eq!(lab.host("h1").client().peers().await.expect_ok("peers").peers.len(), 1);
    lab.assert_full_reachability().await;
    flow.stop().await.assert_no_loss("during hostile writes");

    // The agent also starts with them present.
    lab.host("h1").agent_stop(nix::sys::signal::Signal::SIGTERM).expect_ok("stop");
    lab.start_agent("h1").await;
    assert_eq!(kernel::difference(&kernel::actual_state(&lab, "h1"), &before), "");
    for (_, key, ..) in &all {
        etcd::delete(&lab, &etcd::lease_key(key));
    }
    etcd::delete(&lab, &megabyte);
    let healthy = |s: &Status| s.store.refused.is_empty() && s.problems.is_empty();
    lab.host("h1").wait_status(CONVERGE_TIMEOUT, "not healthy again", healthy).await.expect_ok("h1");
}

/// A route outside the network must not be created, whatever etcd contains at the start.
#[tokio::test(flavor = "multi_thread")]
async fn oldest_of_conflicting_leases_wins() {
    let lab = TestLab::without_agents(1, Families::V4).await;
    etcd::put(&lab, &etcd::lease_key("10.244.50.0-24"), &lease("10.99.7.1", "02:00:00:00:00:01"));
    etcd::put(&lab, &etcd::lease_key("10.244.50.0-26"), &lease("10.99.7.2", "02:00:00:00:00:02"));
    etcd::put(&lab, &etcd::lease_key("10.244.51.0-24"), &lease("10.99.7.3", "02:00:00:00:00:01"));
    let status = lab.start_agent("h1").await;
    assert_eq!((status.data_path.peers, status.store.refused.len()), (1, 2), "{status:#?}");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    // The older one is deleted: the younger ones are accepted.
    etcd::delete(&lab, &etcd::lease_key("10.244.50.0-24"));
    lab.host("h1")
        .wait_status(CONVERGE_TIMEOUT, "the younger ones are not accepted", |s| {
            s.data_path.peers == 2 && s.store.refused.is_empty()
        })
        .await
        .expect_ok("h1");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_configs_are_refused() {
    let lab = TestLab::up(|options| {
        options.hosts = 1;
        options.containers = 0;
    })
    .await;
    let before = etcd::list(&lab, &etcd::config_key());
    let file = lab.dir().join("network.json");
    for (text, wanted) in [
        (r#"{"Network":"10.244.0.1/16"}"#, &["Network", "10.244.0.1/16", "10.244.0.0/16"][..]),
        (r#"{"Network":"10.244.0.0/30"}"#, &["Network", "10.244.0.0/30", "too small"]),
        (
            r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.9.0","SubnetMax":"10.244.5.0"}"#,
            &["SubnetMin", "10.244.9.0", "SubnetMax"],
        ),
        (r#"{"Network":"10.244.0.0/16","SubnetMin":"10.245.0.0"}"#, &["SubnetMin", "10.245.0.0", "not inside"]),
        (r#"{"Network":"10.244.0.0/16","SubnetMax":"10.244.5.7"}"#, &["SubnetMax", "10.244.5.7", "10.244.5.0"]),
        (r#"{"Network":"10.244.0.0/16","SubnetLen":31}"#, &["SubnetLen", "31", "18 to 30"]),
        (r#"{"Network":"10.244.0.0/16","SubnetLen":17}"#, &["SubnetLen", "17", "18 to 30"]),
        (r#"{"Network":"224.0.0.0/8"}"#, &["Network", "224.0.0.0/8", "multicast"]),
        (r#"{"Network":"10.244.0.0/16","Backend":{"VNI":16777216}}"#, &["Backend.VNI", "16777216"]),
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#, &["Backend.Type", "udp", "vxlan"]),
        (r#"{"Network":"10.244.0.0/16","EnableIPv6":true}"#, &["IPv6Network", "missing"]),
        (r#"{"Network":"10.244.0.0/16""#, &["JSON"]),
        ("{}", &["Network", "missing"]),
    ] {
        std::fs::write(&file, text).expect_ok("a file");
        let path = file.to_string_lossy().into_owned();
        lab.ctl("h1", &["config", "set", &path])
            .assert_code(1)
            .assert_stderr_contains(wanted)
            .assert_stderr_contains(&["nothing was written"]);
        lab.ctl("h1", &["config", "validate", &path]).assert_code(1);
        assert_eq!(etcd::list(&lab, &etcd::config_key()), before, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exhausted_pool_is_reported() {
    let lab = TestLab::up(|options| {
        options.hosts = 3;
        options.containers = 0;
        options.agents = false;
        options.networks.v4 = "10.200.0.0/28".parse().ok();
    })
    .await;
    // Three subnets of /30; one is reserved.
    let reserved = etcd::lease_key("10.200.0.8-30");
    etcd::put(&lab, &reserved, "{}");
    lab.start_agent("h1").await;
    lab.start_agent("h2").await;
    lab.host("h3").agent_start(&[]).expect_ok("start");
    let exhausted = |s: &Status| s.problems.iter().any(|p| p.contains("10.200.0.0/28"));
    let status =
        lab.host("h3").wait_status(CONVERGE_TIMEOUT, "it does not name the exhausted pool", exhausted).await.expect_ok("h3");
    assert!(!status.ready && status.lease.is_none(), "{status:#?}");
    lab.wait_for_log("h3", &["10.200.0.0/28"]).await;
    etcd::delete(&lab, &reserved);
    lab.host("h3").wait_ready(READY_TIMEOUT).await.expect_ok("it acquires the freed subnet");
    lab.wait_full_mesh().await;
    eventually("all agents are healthy", CONVERGE_TIMEOUT, || {
        let output = lab.ctl("h3", &["status"]);
        if output.code == Some(0) { Ok(()) } else { Err(output.stdout) }
    })
    .await;
}
