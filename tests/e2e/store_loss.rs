//! etcd goes away, comes back, forgets: the data path forwards on, the status says how it stands, and what was lost is taken again.

use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_agent::model::api::{Health, Status};
use overlay_tests::notify::Notifications;
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, Story, etcd, eventually, kernel};
use overlayctl::lab::Families;

async fn lab() -> Story {
    Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await
}

/// How long the agent may take to notice that etcd does not answer, or answers again: its requests' limits and its back-off.
const NOTICED: Duration = Duration::from_secs(20);

fn lost(status: &Status) -> bool {
    !status.store.connected && status.store.error.is_some() && status.health == Health::Degraded
}

fn well(status: &Status) -> bool {
    status.store.connected && status.ready && status.health == Health::Ok
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_is_gone_for_a_while() {
    let story = lab().await;
    let notifications = Notifications::listen(&story.inside("h1"));
    notifications.settle().await;
    let flow = story.flow("h1-c1", "h2-c1", Family::V4).await;
    let before = story.status("h1").await;
    etcd::kill(&story);
    let status = story.at("h1").wait_status(NOTICED, "it does not notice", lost).await.must("h1");
    assert!(status.problems.iter().any(|p| p.contains("etcd does not answer")), "{:?}", status.problems);
    assert_eq!((status.lease, status.data_path.peers), (before.lease.clone(), 1), "nothing changes");
    let said = story.ctl("h1", &["status"]).exits(3);
    assert!(said.out.contains("not connected"), "{}", said.out);
    // What needs no etcd works on: containers come and go.
    story.ctl("h1", &["attach", "late"]).exits(0);
    story.ctl("h1", &["detach", "late"]).exits(0);
    // Drift is repaired as well.
    kernel::shell(&story, "h1", "ip route show proto 86 type unicast | while read dst _; do ip route delete $dst proto 86; done");
    story.settled("h1", SOON).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    notifications.settle().await;

    etcd::start(&story).await;
    for host in ["h1", "h2"] {
        story.at(host).wait_status(NOTICED, "it does not come back", well).await.must(host);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    notifications.assert_silence("etcd is back, and nothing has changed");
    assert_eq!(story.status("h1").await.lease, before.lease);
    let outcome = flow.stop().await;
    // The routes were deleted on purpose: what was sent in that moment may be lost, and nothing else.
    assert!(outcome.lost.len() <= 20, "{} packets lost at {:?}", outcome.lost.len(), outcome.lost);
    story.assert_all_reach().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_hangs() {
    let story = lab().await;
    let flow = story.flow("h1-c1", "h2-c1", Family::V4).await;
    etcd::freeze(&story, Duration::from_secs(3)).await;
    for host in ["h1", "h2"] {
        story.at(host).wait_status(NOTICED, "it does not come back", well).await.must(host);
    }
    // A lease written now reaches both.
    let value = r#"{"PublicIP":"10.99.7.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}}"#;
    etcd::put(&story, &etcd::lease_key("10.244.200.0-24"), value);
    for host in ["h1", "h2"] {
        story.at(host).wait_status(NOTICED, "it does not follow any more", |s| s.data_path.peers == 2).await.must(host);
    }
    flow.stop().await.assert_no_loss("while etcd hung");
}

/// The agent starts while etcd is away: the data path of its last run is left as it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_without_etcd() {
    let story = lab().await;
    let before = kernel::actual(&story, "h1");
    let notifications = Notifications::listen(&story.inside("h1"));
    notifications.settle().await;
    let flow = story.flow("h1-c1", "h2-c1", Family::V4).await;
    etcd::kill(&story);
    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    story.at("h1").agent_start(&[]).must("start");
    let waiting = |s: &Status| !s.ready && s.problems.iter().any(|p| p.contains("etcd does not answer"));
    story.at("h1").wait_status(NOTICED, "it does not say that it waits", waiting).await.must("h1");
    tokio::time::sleep(Duration::from_secs(1)).await;
    notifications.assert_silence("the agent has started without etcd");
    assert_eq!(kernel::difference(&kernel::actual(&story, "h1"), &before), "");
    etcd::start(&story).await;
    story.at("h1").wait_status(NOTICED, "it does not become ready", well).await.must("h1");
    notifications.assert_silence("etcd has come, and nothing differs");
    flow.stop().await.assert_no_loss("over a start without etcd");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_own_key_is_deleted() {
    let story = lab().await;
    let flow = story.flow("h1-c1", "h2-c1", Family::V4).await;
    let before = story.lease_of("h1");
    etcd::delete(&story, &before.key);
    taken_again(&story, &before).await;
    let _outcome = flow.stop().await;
    story.assert_all_reach().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_own_etcd_lease_is_revoked() {
    let story = lab().await;
    let before = story.lease_of("h1");
    etcd::revoke(&story, before.lease);
    taken_again(&story, &before).await;
    story.assert_all_reach().await;
}

/// The same subnet is taken again at once, and the peer has its way back.
async fn taken_again(story: &Story, before: &etcd::Entry) {
    let again = eventually("the lease is there again", SOON, || {
        let all = etcd::leases(story);
        all.iter().find(|e| e.key == before.key).cloned().ok_or_else(|| format!("{all:?}"))
    })
    .await;
    assert_eq!(again.value, before.value);
    assert_ne!(again.lease, 0, "bound to an etcd lease");
    story.at("h1").wait_status(SOON, "it is not well again", well).await.must("h1");
    story.at("h2").wait_status(SOON, "h2 does not have its peer again", |s| s.data_path.peers == 1).await.must("h2");
    story.settled("h1", SOON).await;
    story.settled("h2", SOON).await;
    story.logged("h1", &["WARN", "lease"]).await;
}

/// Another host has taken the subnet in the meantime: this one moves and says so loudly.
#[tokio::test(flavor = "multi_thread")]
async fn the_subnet_is_anothers_now() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.families = Families::V4;
    })
    .await;
    let before = story.lease_of("h1");
    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    let other = r#"{"PublicIP":"10.99.7.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}}"#;
    etcd::revoke(&story, before.lease);
    etcd::put(&story, &before.key, other);
    story.at("h1").agent_start(&[]).must("start");
    let status = story.at("h1").wait_ready(READY).await.must("ready");
    let now = story.lease_of("h1");
    assert_ne!(now.key, before.key);
    assert_eq!(status.data_path.peers, 2, "the other one is a peer like any");
    story.settled("h1", SOON).await;
    story.logged("h1", &["WARN", "SUBNET HAS CHANGED"]).await;
}
