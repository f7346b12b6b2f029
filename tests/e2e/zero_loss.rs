//! Faults of agent and store under traffic. No packet is lost, and without a difference nothing is written to the kernel.

use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_tests::churn::Churn;
use overlay_tests::faults::{Fault, LinkCut};
use overlay_tests::notify::{self, Notifications, OBSERVATION_PERIOD};
use overlay_tests::test_lab::READY_TIMEOUT;
use overlay_tests::traffic::Traffic;
use overlay_tests::{ExpectContext, TestLab, cluster, etcd};
use overlayctl::lab::LabOptions;

const SHORT_FAULT: Duration = Duration::from_secs(2);

/// Longer than an agent's detection of a silent server (10 s).
const LONG_FAULT: Duration = Duration::from_secs(12);

/// Separates the hosts' subnets from those of lease-only peers.
fn reserve_subnets(options: &mut LabOptions) {
    options.config.insert("SubnetMax".to_owned(), "10.244.200.0".into());
}

/// Faults in sequence, in a lab with a cluster, under continuous traffic. Between them nothing may be written to a kernel, or to
/// the store apart from the faults' own writes.
async fn assert_faults_are_silent(faults: &[(Fault, Duration)]) {
    let lab = cluster::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let kernels = ["h1", "h2"].map(|host| (host, Notifications::subscribe(&lab.open_netns(host))));
    for (_, notifications) in &kernels {
        notifications.wait_quiet().await;
    }
    let traffic = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    let (revision, leases) = (etcd::revision(&lab), etcd::leases(&lab));
    for (fault, time) in faults {
        fault.run_for(&lab, *time).await;
        traffic.run_for(OBSERVATION_PERIOD).await;
        for (host, notifications) in &kernels {
            notifications.assert_none(&format!("{host}, after {fault}"));
            let repairs = lab.status(host).await.data_path.drift_repairs;
            assert_eq!(repairs, 0, "{host}, after {fault}: nothing had to be repaired");
        }
        assert_eq!((etcd::revision(&lab), etcd::leases(&lab)), (revision, leases.clone()), "the store, after {fault}");
        println!("{fault}: no writes on both hosts");
    }
    notify::assert_only_new_peer(&lab, &kernels, "after all faults").await;
    traffic.stop().await.assert_no_loss("faults of agents and store");
    lab.assert_full_reachability().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_kill_or_hang_loses_no_packet() {
    assert_faults_are_silent(&[
        (Fault::AgentKilled("h1", Signal::SIGTERM), SHORT_FAULT / 4),
        (Fault::AgentKilled("h2", Signal::SIGKILL), SHORT_FAULT / 4),
        (Fault::AgentFrozen("h1"), SHORT_FAULT),
        (Fault::AgentFrozen("h2"), SHORT_FAULT),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_member_faults_lose_no_packet() {
    assert_faults_are_silent(&[
        (Fault::LeaderMoves, SHORT_FAULT / 4),
        (Fault::MembersKilled(vec![1]), SHORT_FAULT),
        (Fault::MembersKilled(vec![2, 3]), SHORT_FAULT),
        (Fault::all_members_killed(), SHORT_FAULT),
        (Fault::MembersFrozen(vec![1]), SHORT_FAULT),
        (Fault::MembersFrozen(vec![1, 2, 3]), SHORT_FAULT),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_partition_loses_no_packet() {
    assert_faults_are_silent(&[
        (Fault::LinkCut(LinkCut::from_cluster("h1")), SHORT_FAULT),
        // Requests arrive, but responses do not.
        (Fault::LinkCut(LinkCut::one_way(&["e1", "e2", "e3"], &["h1", "h2"])), LONG_FAULT),
        (Fault::LinkCut(LinkCut::between(&["e1"], &["e2", "e3"])), SHORT_FAULT),
    ])
    .await;
}

/// Compaction of the history, also while a host is partitioned, which then has to read all leases again. No peer flaps.
#[tokio::test(flavor = "multi_thread")]
async fn compaction_loses_no_packet() {
    let lab = cluster::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        reserve_subnets(options);
    })
    .await;
    let kernels = [("h1", Notifications::subscribe(&lab.open_netns("h1")))];
    kernels[0].1.wait_quiet().await;
    let traffic = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    Fault::HistoryCompacted.run_for(&lab, SHORT_FAULT / 4).await;
    Fault::Defragmented.run_for(&lab, SHORT_FAULT / 4).await;
    kernels[0].1.assert_none("compacted and defragmented");

    let cut = Fault::LinkCut(LinkCut::from_cluster("h1"));
    cut.begin(&lab).await;
    let gone = |s: &overlay_agent::model::api::Status| !s.store.connected;
    lab.host("h1").wait_status(READY_TIMEOUT, "it does not notice", gone).await.expect_ok("h1");
    // A lease that h1 misses, so that h1's revision is not the latest.
    let key = etcd::lease_key("10.244.240.0-24");
    etcd::put(&lab, &key, &overlay_tests::churn::lease(1, 1));
    etcd::delete(&lab, &key);
    Fault::HistoryCompacted.begin(&lab).await;
    cut.end(&lab).await;
    cluster::wait_agents_healthy(&lab).await;
    lab.wait_for_log("h1", &["rereading all leases"]).await;
    notify::assert_only_new_peer(&lab, &kernels, "all leases were read again").await;
    traffic.stop().await.assert_no_loss("history dropped");
    lab.assert_full_reachability().await;
}

/// Other peers join, change and leave while the leader moves and a member ends. Unrelated hosts lose no packet.
#[tokio::test(flavor = "multi_thread")]
async fn peer_churn_loses_no_packet() {
    let lab = cluster::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        reserve_subnets(options);
    })
    .await;
    let traffic = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    let churn = Churn::start(&lab);
    traffic.run_for(SHORT_FAULT).await;
    for fault in
        [Fault::LeaderMoves, Fault::LeaderMoves, Fault::MembersKilled(vec![2]), Fault::AgentKilled("h1", Signal::SIGKILL)]
    {
        fault.begin(&lab).await;
        traffic.run_for(SHORT_FAULT / 2).await;
        fault.end(&lab).await;
        traffic.run_for(SHORT_FAULT / 2).await;
    }
    let count = churn.stop().await;
    println!("{count:?}");
    assert!(count.succeeded >= 50, "peers joined and left: {count:?}");
    cluster::wait_agents_healthy(&lab).await;
    for host in ["h1", "h2"] {
        lab.wait_converged(host, READY_TIMEOUT).await;
    }
    traffic.stop().await.assert_no_loss("other peers join and leave");
}

/// The running agent's binary is replaced as by a package manager, and the agent is restarted.
#[tokio::test(flavor = "multi_thread")]
async fn upgrade_loses_no_packet() {
    let dir = tempfile::tempdir().expect_ok("a directory");
    let binary = dir.path().join("overlayd");
    std::fs::copy(overlay_tests::programs::overlayd(), &binary).expect_ok("a copy of the agent");
    let installed = binary.clone();
    let lab = TestLab::up(move |options| {
        options.hosts = 2;
        options.containers = 1;
        options.overlayd = Some(installed);
    })
    .await;
    let kernels = ["h1", "h2"].map(|host| (host, Notifications::subscribe(&lab.open_netns(host))));
    for (_, notifications) in &kernels {
        notifications.wait_quiet().await;
    }
    let traffic = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    // A file with other content; ELF ignores data after its sections.
    let new = dir.path().join("overlayd.new");
    std::fs::copy(&binary, &new).expect_ok("another copy");
    let mut file = std::fs::File::options().append(true).open(&new).expect_ok("the copy");
    std::io::Write::write_all(&mut file, b"another version").expect_ok("write");
    drop(file);
    std::fs::rename(&new, &binary).expect_ok("replace the agent");
    for host in ["h1", "h2"] {
        let before = lab.host(host).agent().expect_ok("an agent");
        let running = std::fs::read_link(format!("/proc/{}/exe", before.pid)).expect_ok("its program");
        assert!(running.to_string_lossy().ends_with("(deleted)"), "the old program runs on: {running:?}");
        lab.host(host).agent_stop(Signal::SIGTERM).expect_ok("stop");
        lab.start_agent(host).await;
        let after = lab.host(host).agent().expect_ok("an agent");
        assert_eq!(std::fs::read_link(format!("/proc/{}/exe", after.pid)).expect_ok("its program"), binary);
    }
    notify::assert_only_new_peer(&lab, &kernels, "after the upgrade").await;
    traffic.stop().await.assert_no_loss("an upgrade");
    lab.assert_full_reachability().await;
}
