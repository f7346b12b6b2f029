//! Host faults: its underlay interface, its address, its disk, and an agent frozen past its lease's expiry.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_agent::model::api::{Health, Status};
use overlay_tests::faults::Fault;
use overlay_tests::notify::Notifications;
use overlay_tests::programs::CommandOutput;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::tmpfs::Tmpfs;
use overlay_tests::traffic::Traffic;
use overlay_tests::{ExpectContext, TestLab, etcd, eventually, kernel};
use overlayctl::lab::Families;

async fn start_lab() -> TestLab {
    TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await
}

/// Pings per second.
const PINGS_PER_SECOND: usize = 100;

#[tokio::test(flavor = "multi_thread")]
async fn underlay_link_flap_recovers() {
    let lab = start_lab().await;
    let before = kernel::actual_state(&lab, "h1");
    let traffic = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    let fault = Fault::UnderlayDown("h1");
    fault.begin(&lab).await;
    traffic.run_for(Duration::from_secs(2)).await;
    fault.end(&lab).await;
    for host in ["h1", "h2"] {
        lab.wait_converged(host, READY_TIMEOUT).await;
        lab.host(host).wait_ready(READY_TIMEOUT).await.expect_ok(host);
    }
    assert_eq!(kernel::difference(&kernel::actual_state(&lab, "h1"), &before), "");
    traffic.run_for(Duration::from_secs(1)).await;
    // Loss: packets sent while the interface was down, and until both hosts resolved each other again.
    traffic.stop().await.assert_loss_at_most(6 * PINGS_PER_SECOND, Duration::from_secs(15), "two seconds without a link");
    lab.assert_full_reachability().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn underlay_mtu_change_is_followed() {
    let lab = start_lab().await;
    let traffic = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    let fault = Fault::UnderlayMtu("h1", 1400);
    fault.begin(&lab).await;
    lab.host("h1").wait_status(CONVERGE_TIMEOUT, "MTU 1350", |s| s.data_path.mtu == Some(1350) && s.ready).await.expect_ok("h1");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    traffic.run_for(Duration::from_secs(1)).await;
    fault.end(&lab).await;
    lab.host("h1").wait_status(CONVERGE_TIMEOUT, "MTU 1450", |s| s.data_path.mtu == Some(1450) && s.ready).await.expect_ok("h1");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    traffic.run_for(Duration::from_millis(500)).await;
    traffic.stop().await.assert_no_loss("the underlay MTU decreases and increases");
}

/// The host's address changes: its peers learn the new one, and traffic recovers at once.
#[tokio::test(flavor = "multi_thread")]
async fn underlay_address_change_is_followed() {
    let lab = start_lab().await;
    let traffic = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    let lease = lab.lease_of("h1");
    let new: IpAddr = [10, 99, 7, 7].into();
    let fault = Fault::UnderlayAddress("h1", new);
    for (what, address) in [("another address", new), ("its old address", [10, 99, 1, 1].into())] {
        let start = std::time::Instant::now();
        if address == new {
            fault.begin(&lab).await
        } else {
            fault.end(&lab).await
        };
        eventually("the peer sends to the new address", READY_TIMEOUT, || {
            let fdb = kernel::run(&lab, "h2", &["bridge", "fdb", "show", "dev", "ovx.1"]);
            if fdb.contains(&format!("dst {address} ")) { Ok(()) } else { Err(fdb) }
        })
        .await;
        println!("{what}: the peer knows after {} ms", start.elapsed().as_millis());
        assert!(start.elapsed() < Duration::from_secs(3), "{what}: {:?}", start.elapsed());
        lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("h1");
        traffic.run_for(Duration::from_secs(1)).await;
    }
    let now = lab.lease_of("h1");
    assert_eq!((now.key, now.lease), (lease.key, lease.lease), "the lease is the same");
    for host in ["h1", "h2"] {
        lab.wait_converged(host, CONVERGE_TIMEOUT).await;
    }
    traffic.stop().await.assert_loss_at_most(5 * PINGS_PER_SECOND, Duration::from_secs(15), "two changes of the address");
    lab.assert_full_reachability().await;
}

/// Like a resumed virtual machine: its lease has expired meanwhile, and its subnet belongs to another host.
#[tokio::test(flavor = "multi_thread")]
async fn frozen_agent_moves_to_new_subnet() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.families = Families::V4;
    })
    .await;
    let before = lab.lease_of("h1");
    let sleep = Fault::AgentFrozen("h1");
    sleep.begin(&lab).await;
    etcd::revoke(&lab, before.lease);
    let other = r#"{"PublicIP":"10.99.7.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}}"#;
    etcd::put(&lab, &before.key, other);
    sleep.end(&lab).await;
    let moved =
        |s: &Status| s.ready && s.lease.as_ref().is_some_and(|lease| etcd::lease_key(&lease.subnet.to_key()) != before.key);
    lab.host("h1").wait_status(READY_TIMEOUT, "it does not move", moved).await.expect_ok("h1");
    lab.wait_for_log("h1", &["WARN", "SUBNET HAS CHANGED"]).await;
    assert!(etcd::leases(&lab).iter().any(|entry| entry.key == before.key && entry.value == other), "the new owner keeps it");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
}

/// A script that runs the agent with its own wall clock, whose offset is read from a file (`faketime(1)`, "advanced usage"). The
/// monotonic clock is unchanged, as in a step of the wall clock.
fn faketime_wrapper(folder: &Path) -> PathBuf {
    let libraries = fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let library = libraries.map(|lib| lib.path().join("faketime/libfaketimeMT.so.1")).find(|file| file.exists());
    let library = library.ok_or("libfaketimeMT.so.1 is missing: apt-get install faketime").expect_ok("a clock to step");
    let agent = overlayctl::lab::agent::find_program(None).expect_ok("overlayd");
    let script = folder.join("overlayd");
    let text = format!(
        "#!/bin/sh\nexport LD_PRELOAD={} FAKETIME_TIMESTAMP_FILE={} FAKETIME_NO_CACHE=1\nexport DONT_FAKE_MONOTONIC=1 \
         FAKETIME_DONT_FAKE_MONOTONIC=1\nexec {} \"$@\"\n",
        library.display(),
        folder.join("offset").display(),
        agent.display()
    );
    fs::write(&script, text).expect_ok("a script");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect_ok("an executable script");
    script
}

/// The wall clock steps by years under a running agent. The agent uses the monotonic clock, and etcd's lease expiry its own
/// clock.
#[tokio::test(flavor = "multi_thread")]
async fn wall_clock_step_has_no_effect() {
    let folder = tempfile::tempdir().expect_ok("a directory");
    let step = |offset: &str| fs::write(folder.path().join("offset"), offset).expect_ok("an offset");
    step("+0");
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::V4;
        options.overlayd = Some(faketime_wrapper(folder.path()));
    })
    .await;
    let lease = lab.lease_of("h1");
    let notifications = Notifications::subscribe(&lab.open_netns("h1"));
    notifications.wait_quiet().await;
    let traffic = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    let mut years = BTreeSet::new();
    for offset in ["+0", "+3650d", "-3650d", "+0"] {
        step(offset);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(lab.lease_of("h1"), lease, "{offset}: the lease is the same, and was not rewritten");
        let status = lab.status("h1").await;
        assert!(status.ready && status.health == Health::Ok, "{offset}: {status:?}");
        notifications.assert_none(&format!("the clock is off by {offset}"));
        // The agent still works: a container is attached and detached. Its log timestamps show the wrong clock.
        let lines = lab.log("h1").lines().count();
        lab.ctl("h1", &["attach", "late"]).assert_code(0);
        lab.ctl("h1", &["detach", "late"]).assert_code(0);
        years.extend(lab.log("h1").lines().skip(lines).filter_map(|line| Some(line.get(..4)?.to_owned())));
        notifications.wait_quiet().await;
    }
    assert_eq!(years.len(), 3, "three clocks: {years:?}");
    traffic.stop().await.assert_no_loss("steps of the clock");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
}

/// Creates the containers' namespaces before the tmpfs: later mounts are not visible in its mount namespace.
fn create_container_namespaces(lab: &TestLab) {
    for target in ["h1-c1", "h1-web", "h2-c1"] {
        kernel::run(lab, "net", &["ip", "netns", "add", &lab.layout().namespace(target)]);
    }
}

fn attach(lab: &TestLab, host: &str, name: &str) -> CommandOutput {
    let netns = format!("/run/netns/{}", lab.layout().namespace(&format!("{host}-{name}")));
    lab.ctl(host, &["attach", name, "--netns", &netns])
}

#[tokio::test(flavor = "multi_thread")]
async fn full_disk_is_survived() {
    let lab = TestLab::without_agents(2, Families::V4).await;
    create_container_namespaces(&lab);
    let volume = Tmpfs::new(&lab, "h1").await;
    // On a full disk the first start fails, because it cannot save its state.
    volume.fill();
    volume.start_failing_agent();
    eventually("the agent ends", CONVERGE_TIMEOUT, || {
        if lab.host("h1").agent().is_none() { Ok(()) } else { Err("it runs".to_owned()) }
    })
    .await;
    lab.wait_for_log("h1", &["the file system is full", "state"]).await;
    assert!(etcd::leases(&lab).is_empty() && kernel::link(&lab, "h1", "ovx.1").is_none(), "nothing was touched");
    volume.free_space();
    volume.start_agent();
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    lab.start_agent("h2").await;
    lab.wait_full_mesh().await;
    for host in ["h1", "h2"] {
        attach(&lab, host, "c1").assert_code(0);
    }

    // At its end the agent compacts its journal: without that, a few more lines would fit into the journal's last block.
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("SIGTERM");
    volume.start_agent();
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready");

    // While it runs: requests that need the disk are refused with the reason, all others work.
    let traffic = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    let before = kernel::actual_state(&lab, "h1");
    volume.fill();
    attach(&lab, "h1", "web").assert_code(1).assert_stderr_contains(&["full", "state"]);
    assert!(kernel::link(&lab, "h1-web", "eth0").is_none(), "nothing is left behind");
    assert_eq!(lab.status("h1").await.endpoints, 1);
    kernel::shell(
        &lab,
        "h1",
        "ip route show proto 86 type unicast | head -1 | while read dst _; do ip route replace $dst via 10.99.0.254; done",
    );
    eventually("drift is repaired", CONVERGE_TIMEOUT, || {
        let difference = kernel::difference(&kernel::actual_state(&lab, "h1"), &before);
        if difference.is_empty() { Ok(()) } else { Err(difference) }
    })
    .await;
    // A restart on the full disk: existing state is read, and forwarding continues.
    lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    volume.start_agent();
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready on a full disk");
    assert_eq!(lab.status("h1").await.endpoints, 1);
    volume.free_space();
    attach(&lab, "h1", "web").assert_code(0);
    assert!(!volume.file_names().iter().any(|name| name.ends_with(".tmp")), "no half written file: {:?}", volume.file_names());
    // One route was wrong for a moment.
    traffic.stop().await.assert_loss_at_most(PINGS_PER_SECOND / 5, Duration::from_secs(5), "a full disk");
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_state_dir_is_survived() {
    let lab = TestLab::without_agents(2, Families::V4).await;
    create_container_namespaces(&lab);
    let volume = Tmpfs::new(&lab, "h1").await;
    volume.start_agent();
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    lab.start_agent("h2").await;
    lab.wait_full_mesh().await;
    for host in ["h1", "h2"] {
        attach(&lab, host, "c1").assert_code(0);
    }
    let notifications = Notifications::subscribe(&lab.open_netns("h1"));
    notifications.wait_quiet().await;
    let traffic = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    volume.set_read_only(true);
    attach(&lab, "h1", "web").assert_code(1).assert_stderr_contains(&["read-only", "state"]);
    assert_eq!(lab.status("h1").await.endpoints, 1);
    notifications.drain();

    // A start fails with the reason, and the data path stays as it is.
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("SIGTERM");
    volume.start_failing_agent();
    eventually("the agent ends", CONVERGE_TIMEOUT, || {
        if lab.host("h1").agent().is_none() { Ok(()) } else { Err("it runs".to_owned()) }
    })
    .await;
    lab.wait_for_log("h1", &["the file system is read-only"]).await;
    notifications.assert_none("an agent that cannot start");
    volume.set_read_only(false);
    volume.start_agent();
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    notifications.assert_none("an agent that can");
    traffic.stop().await.assert_no_loss("a read-only state directory");
    attach(&lab, "h1", "web").assert_code(0);
}
