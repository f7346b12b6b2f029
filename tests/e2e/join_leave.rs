//! A host joins, leaves, returns; is restarted; changes its address: its peers follow, and it keeps what is its own.

use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_tests::story::{READY, SECOND, SOON};
use overlay_tests::{Must, Story, etcd, eventually, kernel, within};
use overlayctl::lab::Families;

/// The VXLAN device's MAC.
fn vtep(story: &Story, host: &str) -> String {
    kernel::text(&kernel::link(story, host, "ovx.1").must("ovx.1"), "address")
}

/// The routes of the agent, as destinations.
fn destinations(story: &Story, host: &str) -> Vec<String> {
    let mut all: Vec<String> =
        kernel::listed(story, host, "ip", &["route", "show", "proto", kernel::PROTOCOL, "type", "unicast"])
            .iter()
            .map(|route| kernel::text(route, "dst"))
            .collect();
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_joins_leaves_and_returns_with_its_subnet() {
    let story = Story::without_agents(3, Families::V4).await;
    story.start("h1").await;
    story.start("h2").await;
    for host in ["h1", "h2"] {
        story.at(host).wait_status(SOON, "one peer", |s| s.data_path.peers == 1).await.must(host);
    }

    let joined = story.start("h3").await.lease.must("a lease").subnet;
    let range = joined.get(Family::V4).must("a range").to_string();
    for host in ["h1", "h2"] {
        within(&format!("{host} has a route to {range}"), SECOND, || destinations(&story, host).contains(&range)).await;
    }
    let mac = vtep(&story, "h3");

    // An end in good order keeps the lease: the data path forwards on, and so the peers keep theirs.
    story.at("h3").agent_stop(Signal::SIGTERM).must("SIGTERM");
    tokio::time::sleep(Duration::from_millis(300)).await;
    for host in ["h1", "h2"] {
        assert!(destinations(&story, host).contains(&range), "{host} keeps its route to a host whose agent is stopped");
    }

    let lease = story.lease_of("h3");
    etcd::revoke(&story, lease.lease);
    for host in ["h1", "h2"] {
        within(&format!("{host} has no route to {range}"), SECOND, || !destinations(&story, host).contains(&range)).await;
        story.settled(host, SECOND).await;
        assert_eq!(story.status(host).await.data_path.peers, 1);
    }

    let returned = story.start("h3").await.lease.must("a lease").subnet;
    assert_eq!((returned, vtep(&story, "h3")), (joined, mac), "the same subnet and MAC after the lease had gone");
    story.mesh().await;
    for host in story.hosts() {
        story.settled(host.name(), SOON).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_left_while_the_agent_was_down_is_removed_at_its_start() {
    let story = Story::up(|options| options.containers = 0).await;
    story.at("h1").agent_stop(Signal::SIGKILL).must("SIGKILL");
    story.at("h3").agent_stop(Signal::SIGKILL).must("SIGKILL");
    let lease = story.lease_of("h3");
    etcd::revoke(&story, lease.lease);
    assert_eq!(destinations(&story, "h1").len(), 2, "without its agent nothing changes");
    story.start("h1").await;
    story.settled("h1", SOON).await;
    assert_eq!(destinations(&story, "h1").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_and_a_reboot_keep_subnet_and_mac() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.families = Families::Dual;
    })
    .await;
    let before = (story.status("h1").await.lease, vtep(&story, "h1"), story.lease_of("h1").value);
    let bridge = kernel::text(&kernel::link(&story, "h1", "ovb.1").must("ovb.1"), "address");
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        story.at("h1").agent_stop(signal).must("stop");
        story.start("h1").await;
        assert_eq!((story.status("h1").await.lease, vtep(&story, "h1"), story.lease_of("h1").value), before, "after {signal}");
    }
    // What a reboot does: the state directory is all that is left, /run and the kernel's state are gone.
    story.at("h1").agent_stop(Signal::SIGTERM).must("SIGTERM");
    for device in ["ovx.1", "ovx6.1", "ovb.1"] {
        kernel::run(&story, "h1", &["ip", "link", "delete", device]);
    }
    kernel::run(&story, "h1", &["nft", "delete", "table", "inet", "overlayd"]);
    kernel::run(&story, "h1", &["ip", "nexthop", "flush", "proto", kernel::PROTOCOL]);
    std::fs::remove_dir_all(story.at("h1").run_dir()).must("remove the run directory");
    story.start("h1").await;
    assert_eq!((story.status("h1").await.lease, vtep(&story, "h1"), story.lease_of("h1").value), before, "after a reboot");
    assert_eq!(kernel::text(&kernel::link(&story, "h1", "ovb.1").must("ovb.1"), "address"), bridge);
    story.settled("h1", SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_underlay_address_is_published_and_peers_follow() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let before = story.lease_of("h2");
    kernel::shell(
        &story,
        "h2",
        "ip address del 10.99.1.2/16 dev eth0
         ip address add 10.99.1.222/16 dev eth0
         ip route replace default via 10.99.0.254 dev eth0",
    );
    let now = eventually("h2 publishes its new address", READY, || {
        let now = story.lease_of("h2");
        if now.value.contains("\"PublicIP\":\"10.99.1.222\"") { Ok(now) } else { Err(now.value) }
    })
    .await;
    assert_eq!((now.key, now.lease), (before.key, before.lease), "the subnet and the etcd lease stay");
    let device =
        |story: &Story| kernel::text(&kernel::link(story, "h2", "ovx.1").must("ovx.1")["linkinfo"]["info_data"], "local");
    within("the device of h2 sends from the new address", SOON, || device(&story) == "10.99.1.222").await;
    let behind = |story: &Story| {
        let all = kernel::listed(story, "h1", "bridge", &["fdb", "show", "dev", "ovx.1"]);
        all.iter().map(|fdb| kernel::text(fdb, "dst")).collect::<Vec<_>>()
    };
    eventually("h1 sends to the new address alone", SOON, || {
        let found = behind(&story);
        if found == ["10.99.1.222"] { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    let flow = story.flow("h1-c1", "h2-c1", Family::V4).await;
    flow.go_on(Duration::from_millis(500)).await;
    flow.stop().await.assert_no_loss("after the change of address");
    story.settled("h1", SOON).await;
    story.settled("h2", SOON).await;
}

/// Its address changed while the agent was down. It could be a copy of a host that still lives, so it first looks whether the lease is
/// renewed; then it takes it, with the same subnet.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_comes_back_with_another_address() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let before = story.lease_of("h2");
    story.at("h2").agent_stop(Signal::SIGTERM).must("stop");
    kernel::shell(
        &story,
        "h2",
        "ip address del 10.99.1.2/16 dev eth0
         ip address add 10.99.1.222/16 dev eth0
         ip route replace default via 10.99.0.254 dev eth0",
    );
    story.at("h2").agent_start(&[]).must("start");
    story.at("h2").wait_ready(Duration::from_secs(60)).await.must("ready");
    let after = story.lease_of("h2");
    assert_eq!(after.key, before.key, "the subnet stays");
    assert!(after.value.contains("10.99.1.222"), "{after:?}");
    story.mesh().await;
    story.settled("h1", SOON).await;
    story.flow("h1-c1", "h2-c1", Family::V4).await.stop().await.assert_no_loss("with the new address");
}
