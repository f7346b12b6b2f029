//! A long partition from the store, over which the lease ends. What a host does then: its own data path stays as it is while it cannot know; once
//! it is back it takes the same subnet again where nobody has it, and moves where somebody has, naming the containers that need a restart.

use std::time::Duration;

use overlay_agent::model::Family;
use overlay_agent::model::api::{Health, Status};
use overlay_tests::faults::{Cut, Fault};
use overlay_tests::notify::Notifications;
use overlay_tests::story::{READY, SOON};
use overlay_tests::traffic::Traffic;
use overlay_tests::{Must, Story, cluster, etcd, eventually, kernel};
use overlayctl::lab::Families;

/// How long an agent may take to notice that its store is silent: 10 s by pings, and what a request takes.
const NOTICED: Duration = Duration::from_secs(20);

/// Cuts h1 off until it knows, and ends its etcd lease as its TTL would.
async fn expired(story: &Story, cut: &Fault) -> etcd::Entry {
    let lease = story.lease_of("h1");
    cut.begin(story).await;
    etcd::revoke(story, lease.lease);
    story.at("h1").wait_status(NOTICED, "it does not notice", |s| !s.store.connected).await.must("h1");
    assert!(etcd::leases(story).iter().all(|entry| entry.key != lease.key), "the store has forgotten h1");
    lease
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_has_taken_the_subnet() {
    let story = cluster::up(|options| options.hosts = 2).await;
    let notifications = Notifications::listen(&story.inside("h1"));
    notifications.settle().await;
    let inside = Traffic::start(&story, "h1-c1", "h1-c2", Family::V4).await;
    let between = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    let cut = Fault::Cut(Cut::from_cluster("h1"));
    let before = (kernel::actual(&story, "h1"), story.status("h1").await);
    let lease = expired(&story, &cut).await;

    // It cannot know: nothing changes, it says how it stands, and works on.
    let status = story.status("h1").await;
    assert_eq!((&status.lease, status.health), (&before.1.lease, Health::Degraded));
    assert_eq!(kernel::difference(&kernel::actual(&story, "h1"), &before.0), "");
    notifications.assert_silence("the lease has ended, and h1 cannot know");
    story.ctl("h1", &["attach", "late"]).exits(0);
    story.ctl("h1", &["detach", "late"]).exits(0);
    // The others have let it go.
    story.at("h2").wait_status(SOON, "h2 keeps its peer", |s| s.data_path.peers == 0).await.must("h2");

    cut.end(&story).await;
    cluster::all_well(&story).await;
    let again = story.lease_of("h1");
    assert_eq!((&again.key, &again.value), (&lease.key, &lease.value), "the same subnet");
    assert_ne!(again.lease, lease.lease, "by a new etcd lease");
    story.logged("h1", &["WARN", "lease is lost"]).await;
    for host in ["h1", "h2"] {
        story.settled(host, SOON).await;
    }
    story.assert_all_reach().await;
    // On the host itself nothing is ever lost. Between hosts, what is sent while the lease is gone; TCP outlives it.
    inside.stop().await.assert_none("inside the host");
    let toll = between.stop().await;
    toll.assert_at_most(toll.pings.sent, Duration::from_secs(45), "between the hosts");
}

/// A pool of two subnets for two hosts that live and one that is new: the new one gets what was h1's.
#[tokio::test(flavor = "multi_thread")]
async fn another_has_taken_the_subnet() {
    let story = cluster::up(|options| {
        options.hosts = 3;
        options.containers = 0;
        options.agents = false;
        options.families = Families::V4;
        options.networks.v4 = "10.200.0.0/28".parse().ok();
    })
    .await;
    let reserved = etcd::lease_key("10.200.0.8-30");
    etcd::put(&story, &reserved, "{}");
    for host in ["h1", "h2"] {
        story.start(host).await;
        story.at(host).attach("c1").await.must("attach");
    }
    let before = kernel::actual(&story, "h1");
    let cut = Fault::Cut(Cut::from_cluster("h1"));
    let lease = expired(&story, &cut).await;
    story.start("h3").await;
    assert_eq!(story.lease_of("h3").key, lease.key, "the only one that is free");
    let difference = kernel::difference(&kernel::actual(&story, "h1"), &before);
    assert_eq!(difference, "", "h1 cannot know, and forwards on");

    // Back again, there is none left for it: it does not take what is another's, and says so.
    cut.end(&story).await;
    let without = |s: &Status| s.store.connected && s.lease.is_none() && s.problems.iter().any(|p| p.contains("no free subnet"));
    story.at("h1").wait_status(READY, "it does not say that there is none left", without).await.must("h1");
    assert_eq!(story.lease_of("h3").key, lease.key);
    assert_eq!(etcd::leases(&story).len(), 3, "h2's, h3's and the reservation");

    // One becomes free: it moves there, loudly, and names the container that has an address of the old one.
    etcd::delete(&story, &reserved);
    let named = |s: &Status| {
        let problem = s.problems.iter().any(|p| p.contains("outside this host's subnet") && p.contains("c1"));
        s.ready && s.lease.is_some() && problem
    };
    story.at("h1").wait_status(READY, "it does not name the container", named).await.must("h1");
    assert_eq!(story.lease_of("h1").key, reserved);
    story.logged("h1", &["WARN", "SUBNET HAS CHANGED"]).await;
    story.logged("h1", &["WARN", "outside the present subnet", "endpoint=c1"]).await;
    story.mesh().await;
    for host in ["h1", "h2", "h3"] {
        story.settled(host, SOON).await;
    }
    story.ctl("h1", &["detach", "c1"]).exits(0);
    kernel::run(&story, "net", &["ip", "netns", "delete", &story.layout().namespace("h1-c1")]);
    story.at("h1").attach("c1").await.must("attach again");
    story.at("h3").attach("c1").await.must("attach");
    eventually("h1 is well", SOON, || {
        let said = story.ctl("h1", &["status"]);
        if said.code == Some(0) { Ok(()) } else { Err(said.out) }
    })
    .await;
    story.assert_all_reach().await;
}
