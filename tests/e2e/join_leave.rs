//! A host joins, leaves, returns, restarts, and changes its address: its peers follow, and it keeps its subnet.

use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT, REPAIR_DEADLINE};
use overlay_tests::{ExpectContext, TestLab, churn, etcd, eventually, eventually_true, kernel};
use overlayctl::lab::Families;

/// The VXLAN device's MAC.
fn vtep_mac(lab: &TestLab, host: &str) -> String {
    kernel::text(&kernel::link(lab, host, "ovx.1").expect_ok("ovx.1"), "address")
}

/// The routes of the agent, as destinations.
fn route_destinations(lab: &TestLab, host: &str) -> Vec<String> {
    let mut all: Vec<String> =
        kernel::list_json(lab, host, "ip", &["route", "show", "proto", kernel::ROUTE_PROTOCOL, "type", "unicast"])
            .iter()
            .map(|route| kernel::text(route, "dst"))
            .collect();
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn returning_host_gets_same_subnet() {
    let lab = TestLab::without_agents(3, Families::V4).await;
    lab.start_agent("h1").await;
    lab.start_agent("h2").await;
    for host in ["h1", "h2"] {
        lab.host(host).wait_status(CONVERGE_TIMEOUT, "one peer", |s| s.data_path.peers == 1).await.expect_ok(host);
    }

    let joined = lab.start_agent("h3").await.lease.expect_ok("a lease").subnet;
    let range = joined.get(Family::V4).expect_ok("a range").to_string();
    for host in ["h1", "h2"] {
        eventually_true(&format!("{host} has a route to {range}"), REPAIR_DEADLINE, || {
            route_destinations(&lab, host).contains(&range)
        })
        .await;
    }
    let mac = vtep_mac(&lab, "h3");

    // A regular stop keeps the lease: the data path keeps forwarding, and so the peers keep their routes.
    lab.host("h3").agent_stop(Signal::SIGTERM).expect_ok("SIGTERM");
    // A later lease takes the same path as a removal would.
    let [later, ..] = etcd::free_keys(&lab);
    etcd::put(&lab, &later, &churn::lease(1, 1));
    let later_range = later.rsplit('/').next().expect_ok("a subnet").replace('-', "/");
    for host in ["h1", "h2"] {
        eventually_true(&format!("{host} has a route to the later lease"), CONVERGE_TIMEOUT, || {
            route_destinations(&lab, host).contains(&later_range)
        })
        .await;
        assert!(route_destinations(&lab, host).contains(&range), "{host} keeps its route to a host whose agent is stopped");
    }

    etcd::delete(&lab, &later);
    let lease = lab.lease_of("h3");
    etcd::revoke(&lab, lease.lease);
    for host in ["h1", "h2"] {
        eventually_true(&format!("{host} has no route to {range}"), REPAIR_DEADLINE, || {
            !route_destinations(&lab, host).contains(&range)
        })
        .await;
        lab.wait_converged(host, REPAIR_DEADLINE).await;
        assert_eq!(lab.status(host).await.data_path.peers, 1);
    }

    let returned = lab.start_agent("h3").await.lease.expect_ok("a lease").subnet;
    assert_eq!((returned, vtep_mac(&lab, "h3")), (joined, mac), "the same subnet and MAC after the loss of the lease");
    lab.wait_full_mesh().await;
    for host in lab.hosts() {
        lab.wait_converged(host.name(), CONVERGE_TIMEOUT).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_start_removes_departed_peer() {
    let lab = TestLab::up(|options| options.containers = 0).await;
    lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    lab.host("h3").agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    let lease = lab.lease_of("h3");
    etcd::revoke(&lab, lease.lease);
    assert_eq!(route_destinations(&lab, "h1").len(), 2, "without its agent nothing changes");
    lab.start_agent("h1").await;
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    assert_eq!(route_destinations(&lab, "h1").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn restart_and_reboot_keep_subnet_and_mac() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.families = Families::Dual;
    })
    .await;
    let before = (lab.status("h1").await.lease, vtep_mac(&lab, "h1"), lab.lease_of("h1").value);
    let bridge = kernel::text(&kernel::link(&lab, "h1", "ovb.1").expect_ok("ovb.1"), "address");
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        lab.host("h1").agent_stop(signal).expect_ok("stop");
        lab.start_agent("h1").await;
        assert_eq!((lab.status("h1").await.lease, vtep_mac(&lab, "h1"), lab.lease_of("h1").value), before, "after {signal}");
    }
    // A reboot: only the state directory remains; /run and the kernel state are gone.
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("SIGTERM");
    for device in ["ovx.1", "ovx6.1", "ovb.1"] {
        kernel::run(&lab, "h1", &["ip", "link", "delete", device]);
    }
    kernel::run(&lab, "h1", &["nft", "delete", "table", "inet", "overlayd"]);
    kernel::run(&lab, "h1", &["ip", "nexthop", "flush", "proto", kernel::ROUTE_PROTOCOL]);
    std::fs::remove_dir_all(lab.host("h1").run_dir()).expect_ok("remove the run directory");
    lab.start_agent("h1").await;
    assert_eq!((lab.status("h1").await.lease, vtep_mac(&lab, "h1"), lab.lease_of("h1").value), before, "after a reboot");
    assert_eq!(kernel::text(&kernel::link(&lab, "h1", "ovb.1").expect_ok("ovb.1"), "address"), bridge);
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn new_underlay_address_reaches_peers() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let before = lab.lease_of("h2");
    kernel::shell(
        &lab,
        "h2",
        "ip address del 10.99.1.2/16 dev eth0
         ip address add 10.99.1.222/16 dev eth0
         ip route replace default via 10.99.0.254 dev eth0",
    );
    let now = eventually("h2 publishes its new address", READY_TIMEOUT, || {
        let now = lab.lease_of("h2");
        if now.value.contains("\"PublicIP\":\"10.99.1.222\"") { Ok(now) } else { Err(now.value) }
    })
    .await;
    assert_eq!((now.key, now.lease), (before.key, before.lease), "the subnet and the etcd lease stay");
    let device =
        |lab: &TestLab| kernel::text(&kernel::link(lab, "h2", "ovx.1").expect_ok("ovx.1")["linkinfo"]["info_data"], "local");
    eventually_true("the device of h2 sends from the new address", CONVERGE_TIMEOUT, || device(&lab) == "10.99.1.222").await;
    let destinations = |lab: &TestLab| {
        let all = kernel::list_json(lab, "h1", "bridge", &["fdb", "show", "dev", "ovx.1"]);
        all.iter().map(|fdb| kernel::text(fdb, "dst")).collect::<Vec<_>>()
    };
    eventually("h1 sends only to the new address", CONVERGE_TIMEOUT, || {
        let found = destinations(&lab);
        if found == ["10.99.1.222"] { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V4).await;
    flow.run_for(Duration::from_millis(500)).await;
    flow.stop().await.assert_no_loss("after the change of address");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    lab.wait_converged("h2", CONVERGE_TIMEOUT).await;
}

/// Its address changed while the agent was down. It could be a copy of a live host, so it first observes whether the lease is
/// renewed; then it takes the lease over, with the same subnet.
#[tokio::test(flavor = "multi_thread")]
async fn host_with_new_address_keeps_subnet() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let before = lab.lease_of("h2");
    lab.host("h2").agent_stop(Signal::SIGTERM).expect_ok("stop");
    kernel::shell(
        &lab,
        "h2",
        "ip address del 10.99.1.2/16 dev eth0
         ip address add 10.99.1.222/16 dev eth0
         ip route replace default via 10.99.0.254 dev eth0",
    );
    lab.host("h2").agent_start(&[]).expect_ok("start");
    lab.host("h2").wait_ready(Duration::from_secs(60)).await.expect_ok("ready");
    let after = lab.lease_of("h2");
    assert_eq!(after.key, before.key, "the subnet stays");
    assert!(after.value.contains("10.99.1.222"), "{after:?}");
    lab.wait_full_mesh().await;
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    lab.start_ping("h1-c1", "h2-c1", Family::V4).await.stop().await.assert_no_loss("with the new address");
}
