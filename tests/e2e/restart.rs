//! Restarts of the agent under traffic. No packet is lost, and without a difference nothing is written to the kernel or to etcd.

use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_tests::notify::{self, Notifications, OBSERVATION_PERIOD};
use overlay_tests::test_lab::READY_TIMEOUT;
use overlay_tests::{ExpectContext, TestLab, etcd};
use overlayctl::lab::Families;

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_restart_loses_no_packet() {
    assert_restart_is_silent(Signal::SIGTERM, Families::Dual).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_restart_loses_no_packet() {
    assert_restart_is_silent(Signal::SIGKILL, Families::Dual).await;
}

async fn assert_restart_is_silent(signal: Signal, families: Families) {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.families = families;
    })
    .await;
    let kernels: Vec<(&str, Notifications)> =
        ["h1", "h2"].into_iter().map(|host| (host, Notifications::subscribe(&lab.open_netns(host)))).collect();
    for (_, notifications) in &kernels {
        notifications.wait_quiet().await;
    }
    let mut flows = Vec::new();
    for family in families.list() {
        flows.push((family, lab.start_ping("h1-c1", "h2-c2", *family).await));
    }
    let revision = etcd::revision(&lab);
    for host in ["h1", "h2"] {
        let before = lab.status(host).await;
        lab.host(host).agent_stop(signal).expect_ok("stop the agent");
        // Some packets without a running agent.
        for (_, flow) in &flows {
            flow.run_for_replies(10).await;
        }
        lab.host(host).agent_start(&[]).expect_ok("start the agent");
        let after = lab.host(host).wait_ready(READY_TIMEOUT).await.expect_ok("ready again");
        tokio::time::sleep(OBSERVATION_PERIOD).await;
        for (name, notifications) in &kernels {
            notifications.assert_none(&format!("{name}, after {signal} and the start of the agent of {host}"));
        }
        assert_eq!((after.lease, after.node_id), (before.lease, before.node_id));
        assert_eq!(lab.status(host).await.data_path.drift_repairs, 0, "nothing had to be repaired");
    }
    assert_eq!(etcd::revision(&lab), revision, "etcd's revision: nothing was written");
    notify::assert_only_new_peer(&lab, &kernels, "after the restarts").await;
    for (family, flow) in flows {
        flow.stop().await.assert_no_loss(&format!("{family} over two restarts"));
    }
    let endpoints = lab.host("h1").client().endpoints().await.expect_ok("endpoints").endpoints;
    assert_eq!(endpoints.len(), 2, "the endpoints are restored");
    lab.assert_full_reachability().await;
}

/// Restarts while kernel and store change: missed changes are applied.
#[tokio::test(flavor = "multi_thread")]
async fn repeated_kill_during_start_converges() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V4).await;
    for milliseconds in [0, 3, 10, 20, 40, 80, 160] {
        lab.host("h1").agent_start(&[]).expect_ok("start");
        // Killed at any point of its start.
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    }
    lab.start_agent("h1").await;
    lab.wait_converged("h1", READY_TIMEOUT).await;
    flow.stop().await.assert_no_loss("killed repeatedly during the start");
    assert_eq!(etcd::leases(&lab).len(), 2, "one lease per host");
}
