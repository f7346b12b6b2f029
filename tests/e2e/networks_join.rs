//! Joining, leaving and deleting a network touches no other one: not one kernel notification, not one packet.

use std::time::Duration;

use overlay_agent::model::Family;
use overlay_tests::networks::{self, attach_to_each};
use overlay_tests::notify::{Notifications, OBSERVATION_PERIOD};
use overlay_tests::prober::Prober;
use overlay_tests::{ExpectContext, TestLab, kernel};

/// The notifications of a host's namespace that concern other networks than the named one: all but those of the transit, whose
/// interface index is given, and of the rules.
fn foreign(notifications: &Notifications, transits: &[u64]) -> Vec<String> {
    let of_transit = |line: &String| transits.iter().any(|index| line.contains(&format!("interface {index},")));
    let of_rules_or_kernel = |line: &String| line.starts_with("nftables") || line.contains("proto 2,") || line.starts_with("netconf");
    notifications.drain().into_iter().filter(|line| !of_transit(line) && !of_rules_or_kernel(line)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn join_leave_and_removal_touch_no_other_network() {
    let lab = TestLab::up(|options| options.containers = 1).await;
    networks::create_all(&lab, &["blue", "green"]);
    let hosts = ["h1", "h2"];
    let blue = attach_to_each(&lab, "blue", &hosts).await;
    let prober = Prober::start(&lab).await;
    let flow = networks::ping(&lab, "h1-blue-c1", "h2-blue-c1", &blue[1], Family::V4).await;
    let default = lab.start_ping("h1-c1", "h3-c1", Family::V4).await;
    let subscribe = |target: &str| Notifications::subscribe(&lab.open_netns(target));
    // In these nothing may change at all: the other network, and a host that is in neither.
    let untouched = ["h1.blue", "h2.blue", "h3"].map(|target| (target.to_owned(), subscribe(target)));
    let host = subscribe("h1");
    for (_, notifications) in &untouched {
        notifications.wait_quiet().await;
    }
    host.wait_quiet().await;
    let transit_index = || kernel::link(&lab, "h1", &format!("ovt.{}", networks::vni(&lab, "green"))).map(|l| kernel::number(&l, "ifindex"));

    attach_to_each(&lab, "green", &hosts).await;
    tokio::time::sleep(OBSERVATION_PERIOD).await;
    networks::assert_quiet(&untouched, "two hosts joined another network");
    let transits = vec![transit_index().expect_ok("the transit of green")];
    let changes = foreign(&host, &transits);
    assert!(changes.is_empty(), "the join changed entries of other networks: {changes:#?}");

    // More containers there, and fewer.
    networks::attach(&lab, "h1", "green", "green-c2").await;
    for container in ["green-c2", "green-c1"] {
        networks::detach(&lab, "h1", "green", container).await;
    }
    networks::detach(&lab, "h2", "green", "green-c1").await;
    for host in hosts {
        networks::wait_left(&lab, host, "green").await;
    }
    networks::network_command(&lab, &["rm", "green"]).assert_code(0);
    tokio::time::sleep(OBSERVATION_PERIOD + Duration::from_millis(300)).await;
    networks::assert_quiet(&untouched, "two hosts left another network, which was removed");
    let changes = foreign(&host, &transits);
    assert!(changes.is_empty(), "the end of a network changed entries of other networks: {changes:#?}");
    prober.stop("joined, left and removed").await;
    flow.stop().await.assert_no_loss("the other isolated network");
    default.stop().await.assert_no_loss("the default network");
}
