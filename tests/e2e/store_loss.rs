//! etcd outages and data loss. The data path keeps forwarding, the status reports it, and lost leases are restored.

use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_agent::model::api::{Health, Status};
use overlay_tests::notify::{self, Notifications};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, etcd, eventually, kernel};
use overlayctl::lab::Families;

async fn start_lab() -> TestLab {
    TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await
}

/// Time limit for the agent to notice that etcd is gone or back: its request timeouts and its backoff.
const DETECT_TIMEOUT: Duration = Duration::from_secs(20);

fn is_disconnected(status: &Status) -> bool {
    !status.store.connected && status.store.error.is_some() && status.health == Health::Degraded
}

fn is_healthy(status: &Status) -> bool {
    status.store.connected && status.ready && status.health == Health::Ok
}

#[tokio::test(flavor = "multi_thread")]
async fn data_path_survives_etcd_outage() {
    let lab = start_lab().await;
    let kernels = [("h1", Notifications::subscribe(&lab.open_netns("h1")))];
    kernels[0].1.wait_quiet().await;
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V4).await;
    let before = lab.status("h1").await;
    etcd::kill(&lab);
    let status = lab.host("h1").wait_status(DETECT_TIMEOUT, "it does not notice", is_disconnected).await.expect_ok("h1");
    assert!(status.problems.iter().any(|p| p.contains("etcd does not answer")), "{:?}", status.problems);
    assert_eq!((status.lease, status.data_path.peers), (before.lease.clone(), 1), "nothing changes");
    let output = lab.ctl("h1", &["status"]).assert_code(3);
    assert!(output.stdout.contains("not connected"), "{}", output.stdout);
    // Everything that does not need etcd works: containers are attached and detached.
    lab.ctl("h1", &["attach", "late"]).assert_code(0);
    lab.ctl("h1", &["detach", "late"]).assert_code(0);
    // Drift is repaired as well.
    kernel::shell(&lab, "h1", "ip route show proto 86 type unicast | while read dst _; do ip route delete $dst proto 86; done");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    kernels[0].1.wait_quiet().await;

    etcd::start(&lab).await;
    for host in ["h1", "h2"] {
        lab.host(host).wait_status(DETECT_TIMEOUT, "it does not come back", is_healthy).await.expect_ok(host);
    }
    notify::assert_only_new_peer(&lab, &kernels, "etcd is back without changes").await;
    assert_eq!(lab.status("h1").await.lease, before.lease);
    let outcome = flow.stop().await;
    // The routes were deleted on purpose: packets sent in that moment may be lost, but no others.
    assert!(outcome.lost.len() <= 20, "{} packets lost at {:?}", outcome.lost.len(), outcome.lost);
    lab.assert_full_reachability().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_recover_from_hung_etcd() {
    let lab = start_lab().await;
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V4).await;
    etcd::freeze(&lab, Duration::from_secs(3)).await;
    for host in ["h1", "h2"] {
        lab.host(host).wait_status(DETECT_TIMEOUT, "it does not come back", is_healthy).await.expect_ok(host);
    }
    // A lease written now reaches both agents.
    let value = r#"{"PublicIP":"10.99.7.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}}"#;
    etcd::put(&lab, &etcd::lease_key(&format!("{}-24", etcd::free_subnet(&lab))), value);
    for host in ["h1", "h2"] {
        lab.host(host)
            .wait_status(DETECT_TIMEOUT, "it no longer receives changes", |s| s.data_path.peers == 2)
            .await
            .expect_ok(host);
    }
    flow.stop().await.assert_no_loss("while etcd hung");
}

/// The agent starts without etcd: the data path of its last run is kept.
#[tokio::test(flavor = "multi_thread")]
async fn agent_start_without_etcd_keeps_data_path() {
    let lab = start_lab().await;
    let before = kernel::actual_state(&lab, "h1");
    let kernels = [("h1", Notifications::subscribe(&lab.open_netns("h1")))];
    kernels[0].1.wait_quiet().await;
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V4).await;
    etcd::kill(&lab);
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    lab.host("h1").agent_start(&[]).expect_ok("start");
    let waiting = |s: &Status| !s.ready && s.problems.iter().any(|p| p.contains("etcd does not answer"));
    lab.host("h1").wait_status(DETECT_TIMEOUT, "it does not report that it waits", waiting).await.expect_ok("h1");
    flow.run_for_replies(100).await;
    kernels[0].1.assert_none("the agent has started without etcd");
    assert_eq!(kernel::difference(&kernel::actual_state(&lab, "h1"), &before), "");
    etcd::start(&lab).await;
    lab.host("h1").wait_status(DETECT_TIMEOUT, "it does not become ready", is_healthy).await.expect_ok("h1");
    notify::assert_only_new_peer(&lab, &kernels, "etcd is back without differences").await;
    flow.stop().await.assert_no_loss("over a start without etcd");
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_lease_key_is_restored() {
    let lab = start_lab().await;
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V4).await;
    let before = lab.lease_of("h1");
    etcd::delete(&lab, &before.key);
    assert_lease_restored(&lab, &before).await;
    let _outcome = flow.stop().await;
    lab.assert_full_reachability().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_etcd_lease_is_restored() {
    let lab = start_lab().await;
    let before = lab.lease_of("h1");
    etcd::revoke(&lab, before.lease);
    assert_lease_restored(&lab, &before).await;
    lab.assert_full_reachability().await;
}

/// Checks that the same subnet is taken again at once, and that the peer has its route again.
async fn assert_lease_restored(lab: &TestLab, before: &etcd::Entry) {
    let again = eventually("the lease is restored", CONVERGE_TIMEOUT, || {
        let all = etcd::leases(lab);
        all.iter().find(|e| e.key == before.key).cloned().ok_or_else(|| format!("{all:?}"))
    })
    .await;
    assert_eq!(again.value, before.value);
    assert_ne!(again.lease, 0, "bound to an etcd lease");
    lab.host("h1").wait_status(CONVERGE_TIMEOUT, "not healthy again", is_healthy).await.expect_ok("h1");
    lab.host("h2")
        .wait_status(CONVERGE_TIMEOUT, "h2 does not have its peer again", |s| s.data_path.peers == 1)
        .await
        .expect_ok("h2");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    lab.wait_converged("h2", CONVERGE_TIMEOUT).await;
    lab.wait_for_log("h1", &["WARN", "lease"]).await;
}

/// Another host has taken the subnet in the meantime: this one moves and logs a warning.
#[tokio::test(flavor = "multi_thread")]
async fn host_moves_when_subnet_is_taken() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.families = Families::V4;
    })
    .await;
    let before = lab.lease_of("h1");
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    let other = r#"{"PublicIP":"10.99.7.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}}"#;
    etcd::revoke(&lab, before.lease);
    etcd::put(&lab, &before.key, other);
    lab.host("h1").agent_start(&[]).expect_ok("start");
    let status = lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    let now = lab.lease_of("h1");
    assert_ne!(now.key, before.key);
    assert_eq!(status.data_path.peers, 2, "the new owner is a regular peer");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    lab.wait_for_log("h1", &["WARN", "SUBNET HAS CHANGED"]).await;
}
