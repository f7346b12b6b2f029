//! The agent's end and start under traffic: not one packet is lost, and where nothing differs nothing is written, neither to the kernel nor
//! to etcd.

use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_tests::notify::Notifications;
use overlay_tests::story::READY;
use overlay_tests::{Must, Story, etcd};
use overlayctl::lab::Families;

/// How long after the restart something may still come to light.
const AFTER: Duration = Duration::from_millis(700);

#[tokio::test(flavor = "multi_thread")]
async fn an_end_in_good_order() {
    restarted(Signal::SIGTERM, Families::Dual).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_without_warning() {
    restarted(Signal::SIGKILL, Families::Dual).await;
}

async fn restarted(signal: Signal, families: Families) {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.families = families;
    })
    .await;
    let kernels: Vec<(&str, Notifications)> =
        ["h1", "h2"].into_iter().map(|host| (host, Notifications::listen(&story.inside(host)))).collect();
    for (_, notifications) in &kernels {
        notifications.settle().await;
    }
    let mut flows = Vec::new();
    for family in families.list() {
        flows.push((family, story.flow("h1-c1", "h2-c2", *family).await));
    }
    let revision = etcd::revision(&story);
    for host in ["h1", "h2"] {
        let before = story.status(host).await;
        story.at(host).agent_stop(signal).must("stop the agent");
        // Some packets without it.
        tokio::time::sleep(Duration::from_millis(200)).await;
        story.at(host).agent_start(&[]).must("start the agent");
        let after = story.at(host).wait_ready(READY).await.must("ready again");
        tokio::time::sleep(AFTER).await;
        for (name, notifications) in &kernels {
            notifications.assert_silence(&format!("{name}, after {signal} and the start of the agent of {host}"));
        }
        assert_eq!((after.lease, after.node_id), (before.lease, before.node_id));
        assert_eq!(story.status(host).await.data_path.drift_repairs, 0, "nothing had to be repaired");
    }
    assert_eq!(etcd::revision(&story), revision, "etcd's revision: nothing is written there either");
    for (family, flow) in flows {
        flow.stop().await.assert_no_loss(&format!("{family} over two restarts"));
    }
    let endpoints = story.at("h1").client().endpoints().await.must("endpoints").endpoints;
    assert_eq!(endpoints.len(), 2, "the endpoints are known again");
    story.assert_all_reach().await;
}

/// Restarts while the kernel and the store change underneath: what was missed is made up for.
#[tokio::test(flavor = "multi_thread")]
async fn again_and_again_at_any_moment() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let flow = story.flow("h1-c1", "h2-c1", Family::V4).await;
    for milliseconds in [0, 3, 10, 20, 40, 80, 160] {
        story.at("h1").agent_start(&[]).must("start");
        // Killed at any point of its start.
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        story.at("h1").agent_stop(Signal::SIGKILL).must("SIGKILL");
    }
    story.start("h1").await;
    story.settled("h1", READY).await;
    flow.stop().await.assert_no_loss("killed again and again while it starts");
    assert_eq!(etcd::leases(&story).len(), 2, "one lease a host");
}
