//! Faults of the agent and of the store under traffic: no packet is lost, and where nothing differs the kernel is told nothing.

use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_tests::churn::Churn;
use overlay_tests::faults::{Cut, Fault};
use overlay_tests::notify::Notifications;
use overlay_tests::story::READY;
use overlay_tests::traffic::Traffic;
use overlay_tests::{Must, Story, cluster, etcd};
use overlayctl::lab::LabOptions;

/// How long after a fault something may still come to light.
const AFTER: Duration = Duration::from_millis(700);

const SHORT: Duration = Duration::from_secs(2);

/// Longer than an agent takes to notice that a silent server is gone (10 s).
const LONG: Duration = Duration::from_secs(12);

/// The hosts' subnets are apart from those of peers that are leases alone.
fn apart(options: &mut LabOptions) {
    options.config.insert("SubnetMax".to_owned(), "10.244.200.0".into());
}

/// Faults one after the other, in a lab with a cluster, under one traffic; between them nothing may be written to a kernel or, the faults' own
/// writes aside, to the store.
async fn in_silence(faults: &[(Fault, Duration)]) {
    let story = cluster::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let kernels = ["h1", "h2"].map(|host| (host, Notifications::listen(&story.inside(host))));
    for (_, notifications) in &kernels {
        notifications.settle().await;
    }
    let traffic = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    let (revision, leases) = (etcd::revision(&story), etcd::leases(&story));
    for (fault, time) in faults {
        fault.over(&story, *time).await;
        traffic.go_on(AFTER).await;
        for (host, notifications) in &kernels {
            notifications.assert_silence(&format!("{host}, after {fault}"));
            let repairs = story.status(host).await.data_path.drift_repairs;
            assert_eq!(repairs, 0, "{host}, after {fault}: nothing had to be repaired");
        }
        assert_eq!((etcd::revision(&story), etcd::leases(&story)), (revision, leases.clone()), "the store, after {fault}");
        println!("{fault}: silence on both hosts");
    }
    traffic.stop().await.assert_none("faults of agents and store");
    story.assert_all_reach().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_ends_or_hangs() {
    in_silence(&[
        (Fault::AgentEnds("h1", Signal::SIGTERM), SHORT / 4),
        (Fault::AgentEnds("h2", Signal::SIGKILL), SHORT / 4),
        (Fault::AgentHangs("h1"), SHORT),
        (Fault::AgentHangs("h2"), SHORT),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_the_store_end_or_hang() {
    in_silence(&[
        (Fault::LeaderMoves, SHORT / 4),
        (Fault::MembersDie(vec![1]), SHORT),
        (Fault::MembersDie(vec![2, 3]), SHORT),
        (Fault::all_members_die(), SHORT),
        (Fault::MembersHang(vec![1]), SHORT),
        (Fault::MembersHang(vec![1, 2, 3]), SHORT),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_cut_off() {
    in_silence(&[
        (Fault::Cut(Cut::from_cluster("h1")), SHORT),
        // Requests arrive and answers do not.
        (Fault::Cut(Cut::one_way(&["e1", "e2", "e3"], &["h1", "h2"])), LONG),
        (Fault::Cut(Cut::between(&["e1"], &["e2", "e3"])), SHORT),
    ])
    .await;
}

/// History is dropped; with a host cut off meanwhile, which then has to read all leases again: no peer flaps.
#[tokio::test(flavor = "multi_thread")]
async fn history_is_dropped() {
    let story = cluster::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        apart(options);
    })
    .await;
    let notifications = Notifications::listen(&story.inside("h1"));
    notifications.settle().await;
    let traffic = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    Fault::Compacted.over(&story, SHORT / 4).await;
    Fault::Defragmented.over(&story, SHORT / 4).await;
    notifications.assert_silence("compacted and defragmented");

    let cut = Fault::Cut(Cut::from_cluster("h1"));
    cut.begin(&story).await;
    let gone = |s: &overlay_agent::model::api::Status| !s.store.connected;
    story.at("h1").wait_status(READY, "it does not notice", gone).await.must("h1");
    // What h1 misses: a lease that comes and goes, so that its place in the history is not the end.
    let key = etcd::lease_key("10.244.240.0-24");
    etcd::put(&story, &key, &overlay_tests::churn::lease(1, 1));
    etcd::delete(&story, &key);
    Fault::Compacted.begin(&story).await;
    cut.end(&story).await;
    cluster::all_well(&story).await;
    story.logged("h1", &["reading all leases again"]).await;
    traffic.go_on(AFTER).await;
    notifications.assert_silence("all leases were read again");
    traffic.stop().await.assert_none("history dropped");
    story.assert_all_reach().await;
}

/// Other peers come, change and go while the lead moves and a member ends: who has nothing to do with it loses nothing.
#[tokio::test(flavor = "multi_thread")]
async fn others_come_and_go() {
    let story = cluster::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        apart(options);
    })
    .await;
    let traffic = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    let churn = Churn::start(&story);
    traffic.go_on(SHORT).await;
    for fault in [Fault::LeaderMoves, Fault::LeaderMoves, Fault::MembersDie(vec![2]), Fault::AgentEnds("h1", Signal::SIGKILL)] {
        fault.begin(&story).await;
        traffic.go_on(SHORT / 2).await;
        fault.end(&story).await;
        traffic.go_on(SHORT / 2).await;
    }
    let count = churn.stop().await;
    println!("{count:?}");
    assert!(count.done >= 50, "peers came and went: {count:?}");
    cluster::all_well(&story).await;
    for host in ["h1", "h2"] {
        story.settled(host, READY).await;
    }
    traffic.stop().await.assert_none("others come and go");
}

/// The binary is replaced as a package manager does it, under the running agent, and the agent is started anew.
#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade() {
    let place = tempfile::tempdir().must("a directory");
    let binary = place.path().join("overlayd");
    std::fs::copy(overlay_tests::programs::overlayd(), &binary).must("a copy of the agent");
    let installed = binary.clone();
    let story = Story::up(move |options| {
        options.hosts = 2;
        options.containers = 1;
        options.overlayd = Some(installed);
    })
    .await;
    let kernels = ["h1", "h2"].map(|host| (host, Notifications::listen(&story.inside(host))));
    for (_, notifications) in &kernels {
        notifications.settle().await;
    }
    let traffic = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    // Another file with another content; what follows an ELF file's sections is nobody's.
    let new = place.path().join("overlayd.new");
    std::fs::copy(&binary, &new).must("another copy");
    let mut file = std::fs::File::options().append(true).open(&new).must("the copy");
    std::io::Write::write_all(&mut file, b"another version").must("write");
    drop(file);
    std::fs::rename(&new, &binary).must("replace the agent");
    for host in ["h1", "h2"] {
        let before = story.at(host).agent().must("an agent");
        let running = std::fs::read_link(format!("/proc/{}/exe", before.pid)).must("its program");
        assert!(running.to_string_lossy().ends_with("(deleted)"), "the old program runs on: {running:?}");
        story.at(host).agent_stop(Signal::SIGTERM).must("stop");
        story.start(host).await;
        let after = story.at(host).agent().must("an agent");
        assert_eq!(std::fs::read_link(format!("/proc/{}/exe", after.pid)).must("its program"), binary);
    }
    traffic.go_on(AFTER).await;
    for (host, notifications) in &kernels {
        notifications.assert_silence(&format!("{host}, after the upgrade"));
    }
    traffic.stop().await.assert_none("an upgrade");
    story.assert_all_reach().await;
}
