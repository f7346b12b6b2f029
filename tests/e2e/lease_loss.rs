//! A partition from the store that outlasts the lease.
//!
//! The host keeps its data path while it is disconnected. When it is back it takes the same subnet if it is free; otherwise it
//! moves, and names the containers that need a restart.

use std::time::Duration;

use overlay_agent::model::Family;
use overlay_agent::model::api::{Health, Status};
use overlay_tests::faults::{Fault, LinkCut};
use overlay_tests::notify::Notifications;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::traffic::Traffic;
use overlay_tests::{ExpectContext, TestLab, cluster, etcd, eventually, kernel};
use overlayctl::lab::Families;

/// Time limit for an agent to notice a silent store: 10 s by pings, plus a request's timeout.
const DETECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Partitions h1, waits until it notices, and ends its etcd lease as its TTL would.
async fn expire_lease(lab: &TestLab, partition: &Fault) -> etcd::Entry {
    let lease = lab.lease_of("h1");
    partition.begin(lab).await;
    etcd::revoke(lab, lease.lease);
    lab.host("h1").wait_status(DETECT_TIMEOUT, "it does not notice", |s| !s.store.connected).await.expect_ok("h1");
    assert!(etcd::leases(lab).iter().all(|entry| entry.key != lease.key), "the store has forgotten h1");
    lease
}

#[tokio::test(flavor = "multi_thread")]
async fn host_reclaims_free_subnet() {
    let lab = cluster::up(|options| options.hosts = 2).await;
    let notifications = Notifications::subscribe(&lab.open_netns("h1"));
    notifications.wait_quiet().await;
    let inside = Traffic::start(&lab, "h1-c1", "h1-c2", Family::V4).await;
    let between = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    let cut = Fault::LinkCut(LinkCut::from_cluster("h1"));
    let before = (kernel::actual_state(&lab, "h1"), lab.status("h1").await);
    let lease = expire_lease(&lab, &cut).await;

    // It cannot know of the expiry: nothing changes, it reports the disconnection, and keeps working.
    let status = lab.status("h1").await;
    assert_eq!((&status.lease, status.health), (&before.1.lease, Health::Degraded));
    assert_eq!(kernel::difference(&kernel::actual_state(&lab, "h1"), &before.0), "");
    notifications.assert_none("the lease has expired without h1's knowledge");
    lab.ctl("h1", &["attach", "late"]).assert_code(0);
    lab.ctl("h1", &["detach", "late"]).assert_code(0);
    // The other host has removed it.
    lab.host("h2").wait_status(CONVERGE_TIMEOUT, "h2 keeps its peer", |s| s.data_path.peers == 0).await.expect_ok("h2");

    cut.end(&lab).await;
    cluster::wait_agents_healthy(&lab).await;
    let again = lab.lease_of("h1");
    assert_eq!((&again.key, &again.value), (&lease.key, &lease.value), "the same subnet");
    assert_ne!(again.lease, lease.lease, "by a new etcd lease");
    lab.wait_for_log("h1", &["WARN", "lease lost"]).await;
    for host in ["h1", "h2"] {
        lab.wait_converged(host, CONVERGE_TIMEOUT).await;
    }
    lab.assert_full_reachability().await;
    // Local traffic loses nothing. Traffic between hosts is lost while the lease is missing; TCP survives it.
    inside.stop().await.assert_no_loss("inside the host");
    let stats = between.stop().await;
    stats.assert_loss_at_most(stats.pings.sent, Duration::from_secs(45), "between the hosts");
}

/// A pool of two subnets for two running hosts and a new one. The new one gets h1's subnet.
#[tokio::test(flavor = "multi_thread")]
async fn host_moves_when_subnet_is_taken() {
    let lab = cluster::up(|options| {
        options.hosts = 3;
        options.containers = 0;
        options.agents = false;
        options.families = Families::V4;
        options.networks.v4 = "10.200.0.0/28".parse().ok();
    })
    .await;
    let reserved = etcd::lease_key("10.200.0.8-30");
    etcd::put(&lab, &reserved, "{}");
    for host in ["h1", "h2"] {
        lab.start_agent(host).await;
        lab.host(host).attach("c1").await.expect_ok("attach");
    }
    let before = kernel::actual_state(&lab, "h1");
    let cut = Fault::LinkCut(LinkCut::from_cluster("h1"));
    let lease = expire_lease(&lab, &cut).await;
    lab.start_agent("h3").await;
    assert_eq!(lab.lease_of("h3").key, lease.key, "the only free subnet");
    let difference = kernel::difference(&kernel::actual_state(&lab, "h1"), &before);
    assert_eq!(difference, "", "h1 keeps forwarding without knowing");

    // Back again, there is no free subnet: it does not take another host's subnet, and reports it.
    cut.end(&lab).await;
    let without = |s: &Status| s.store.connected && s.lease.is_none() && s.problems.iter().any(|p| p.contains("no free subnet"));
    lab.host("h1").wait_status(READY_TIMEOUT, "it does not report the exhausted pool", without).await.expect_ok("h1");
    assert_eq!(lab.lease_of("h3").key, lease.key);
    assert_eq!(etcd::leases(&lab).len(), 3, "h2's, h3's and the reservation");

    // One becomes free: it moves there, logs a warning, and names the container with an address of the old one.
    etcd::delete(&lab, &reserved);
    let named = |s: &Status| {
        let problem = s.problems.iter().any(|p| p.contains("outside this host's subnet") && p.contains("c1"));
        s.ready && s.lease.is_some() && problem
    };
    lab.host("h1").wait_status(READY_TIMEOUT, "it does not name the container", named).await.expect_ok("h1");
    assert_eq!(lab.lease_of("h1").key, reserved);
    lab.wait_for_log("h1", &["WARN", "SUBNET HAS CHANGED"]).await;
    lab.wait_for_log("h1", &["WARN", "outside the present subnet", "endpoint=c1"]).await;
    lab.wait_full_mesh().await;
    for host in ["h1", "h2", "h3"] {
        lab.wait_converged(host, CONVERGE_TIMEOUT).await;
    }
    lab.ctl("h1", &["detach", "c1"]).assert_code(0);
    kernel::run(&lab, "net", &["ip", "netns", "delete", &lab.layout().namespace("h1-c1")]);
    lab.host("h1").attach("c1").await.expect_ok("attach again");
    lab.host("h3").attach("c1").await.expect_ok("attach");
    eventually("h1 is healthy", CONVERGE_TIMEOUT, || {
        let output = lab.ctl("h1", &["status"]);
        if output.code == Some(0) { Ok(()) } else { Err(output.stdout) }
    })
    .await;
    lab.assert_full_reachability().await;
}
