//! Faults of the host itself: its wire, its address, its disk, and an agent that stands still beyond its lease's end.

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
use overlay_tests::programs::Said;
use overlay_tests::story::{READY, SOON};
use overlay_tests::traffic::Traffic;
use overlay_tests::volume::Volume;
use overlay_tests::{Must, Story, etcd, eventually, kernel};
use overlayctl::lab::Families;

async fn lab() -> Story {
    Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await
}

/// Pings a second.
const PACE: usize = 100;

#[tokio::test(flavor = "multi_thread")]
async fn the_wire_goes_down_and_up() {
    let story = lab().await;
    let before = kernel::actual(&story, "h1");
    let traffic = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    let fault = Fault::UnderlayDown("h1");
    fault.begin(&story).await;
    traffic.go_on(Duration::from_secs(2)).await;
    fault.end(&story).await;
    for host in ["h1", "h2"] {
        story.settled(host, READY).await;
        story.at(host).wait_ready(READY).await.must(host);
    }
    assert_eq!(kernel::difference(&kernel::actual(&story, "h1"), &before), "");
    traffic.go_on(Duration::from_secs(1)).await;
    // What was sent while the wire was down, and until the two found each other again.
    traffic.stop().await.assert_at_most(6 * PACE, Duration::from_secs(15), "two seconds without a wire");
    story.assert_all_reach().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mtu_of_the_wire_changes() {
    let story = lab().await;
    let traffic = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    let fault = Fault::UnderlayMtu("h1", 1400);
    fault.begin(&story).await;
    story.at("h1").wait_status(SOON, "MTU 1350", |s| s.data_path.mtu == Some(1350) && s.ready).await.must("h1");
    story.settled("h1", SOON).await;
    traffic.go_on(Duration::from_secs(1)).await;
    fault.end(&story).await;
    story.at("h1").wait_status(SOON, "MTU 1450", |s| s.data_path.mtu == Some(1450) && s.ready).await.must("h1");
    story.settled("h1", SOON).await;
    traffic.go_on(Duration::from_millis(500)).await;
    traffic.stop().await.assert_none("the wire's MTU goes down and up");
}

/// The host gets another address: its peers are told, and the traffic goes on as soon as they know.
#[tokio::test(flavor = "multi_thread")]
async fn the_address_changes() {
    let story = lab().await;
    let traffic = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    let lease = story.lease_of("h1");
    let new: IpAddr = [10, 99, 7, 7].into();
    let fault = Fault::UnderlayAddress("h1", new);
    for (what, address) in [("another address", new), ("its old address", [10, 99, 1, 1].into())] {
        let start = std::time::Instant::now();
        if address == new {
            fault.begin(&story).await
        } else {
            fault.end(&story).await
        };
        eventually("the peer sends there", READY, || {
            let fdb = kernel::run(&story, "h2", &["bridge", "fdb", "show", "dev", "ovx.1"]);
            if fdb.contains(&format!("dst {address} ")) { Ok(()) } else { Err(fdb) }
        })
        .await;
        println!("{what}: the peer knows after {} ms", start.elapsed().as_millis());
        assert!(start.elapsed() < Duration::from_secs(3), "{what}: {:?}", start.elapsed());
        story.at("h1").wait_ready(READY).await.must("h1");
        traffic.go_on(Duration::from_secs(1)).await;
    }
    let now = story.lease_of("h1");
    assert_eq!((now.key, now.lease), (lease.key, lease.lease), "the lease is the same");
    for host in ["h1", "h2"] {
        story.settled(host, SOON).await;
    }
    traffic.stop().await.assert_at_most(5 * PACE, Duration::from_secs(15), "two changes of the address");
    story.assert_all_reach().await;
}

/// As a virtual machine that was suspended: meanwhile its lease has ended and its subnet is another host's.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_slept_too_long() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.families = Families::V4;
    })
    .await;
    let before = story.lease_of("h1");
    let sleep = Fault::AgentHangs("h1");
    sleep.begin(&story).await;
    etcd::revoke(&story, before.lease);
    let other = r#"{"PublicIP":"10.99.7.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}}"#;
    etcd::put(&story, &before.key, other);
    sleep.end(&story).await;
    let moved =
        |s: &Status| s.ready && s.lease.as_ref().is_some_and(|lease| etcd::lease_key(&lease.subnet.to_key()) != before.key);
    story.at("h1").wait_status(READY, "it does not move", moved).await.must("h1");
    story.logged("h1", &["WARN", "SUBNET HAS CHANGED"]).await;
    assert!(etcd::leases(&story).iter().any(|entry| entry.key == before.key && entry.value == other), "the other one keeps it");
    story.settled("h1", SOON).await;
}

/// A script that runs the agent with a wall clock of its own, which is off by what stands in a file (`faketime(1)`, "advanced usage"). The clock that only
/// goes on is left alone, as a step leaves it.
fn with_a_clock(folder: &Path) -> PathBuf {
    let libraries = fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let library = libraries.map(|lib| lib.path().join("faketime/libfaketimeMT.so.1")).find(|file| file.exists());
    let library = library.ok_or("libfaketimeMT.so.1 is missing: apt-get install faketime").must("a clock to step");
    let agent = overlayctl::lab::agent::program(None).must("overlayd");
    let script = folder.join("overlayd");
    let text = format!(
        "#!/bin/sh\nexport LD_PRELOAD={} FAKETIME_TIMESTAMP_FILE={} FAKETIME_NO_CACHE=1\nexport DONT_FAKE_MONOTONIC=1 \
         FAKETIME_DONT_FAKE_MONOTONIC=1\nexec {} \"$@\"\n",
        library.display(),
        folder.join("offset").display(),
        agent.display()
    );
    fs::write(&script, text).must("a script");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).must("an executable script");
    script
}

/// The wall clock is stepped by years under an agent that runs: what it does follows the clock that only goes on, and etcd ends leases by its own.
#[tokio::test(flavor = "multi_thread")]
async fn the_clock_is_stepped() {
    let folder = tempfile::tempdir().must("a directory");
    let step = |offset: &str| fs::write(folder.path().join("offset"), offset).must("an offset");
    step("+0");
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::V4;
        options.overlayd = Some(with_a_clock(folder.path()));
    })
    .await;
    let lease = story.lease_of("h1");
    let notifications = Notifications::listen(&story.inside("h1"));
    notifications.settle().await;
    let traffic = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    let mut years = BTreeSet::new();
    for offset in ["+0", "+3650d", "-3650d", "+0"] {
        step(offset);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(story.lease_of("h1"), lease, "{offset}: the lease is the same, and was not written anew");
        let status = story.status("h1").await;
        assert!(status.ready && status.health == Health::Ok, "{offset}: {status:?}");
        notifications.assert_silence(&format!("the clock is off by {offset}"));
        // It works on: a container comes and goes. What it logs shows that its clock was off.
        let lines = story.log("h1").lines().count();
        story.ctl("h1", &["attach", "late"]).exits(0);
        story.ctl("h1", &["detach", "late"]).exits(0);
        years.extend(story.log("h1").lines().skip(lines).filter_map(|line| Some(line.get(..4)?.to_owned())));
        notifications.settle().await;
    }
    assert_eq!(years.len(), 3, "three clocks: {years:?}");
    traffic.stop().await.assert_none("steps of the clock");
    story.settled("h1", SOON).await;
}

/// Containers' namespaces, made before the small disk: what is mounted later is not seen beside it.
fn containers(story: &Story) {
    for target in ["h1-c1", "h1-web", "h2-c1"] {
        kernel::run(story, "net", &["ip", "netns", "add", &story.layout().namespace(target)]);
    }
}

fn attach(story: &Story, host: &str, name: &str) -> Said {
    let netns = format!("/run/netns/{}", story.layout().namespace(&format!("{host}-{name}")));
    story.ctl(host, &["attach", name, "--netns", &netns])
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_is_full() {
    let story = Story::without_agents(2, Families::V4).await;
    containers(&story);
    let volume = Volume::new(&story, "h1").await;
    // Before the first start: nothing can be kept, so nothing is begun.
    volume.fill();
    volume.agent_start();
    eventually("the agent ends", SOON, || if story.at("h1").agent().is_none() { Ok(()) } else { Err("it runs".to_owned()) })
        .await;
    story.logged("h1", &["the file system is full", "state"]).await;
    assert!(etcd::leases(&story).is_empty() && kernel::link(&story, "h1", "ovx.1").is_none(), "nothing was touched");
    volume.free();
    volume.agent_start();
    story.at("h1").wait_ready(READY).await.must("ready");
    story.start("h2").await;
    story.mesh().await;
    for host in ["h1", "h2"] {
        attach(&story, host, "c1").exits(0);
    }

    // At its end it makes one file of what it appended: a few lines more would have had room in the journal's last block.
    story.at("h1").agent_stop(Signal::SIGTERM).must("SIGTERM");
    volume.agent_start();
    story.at("h1").wait_ready(READY).await.must("ready");

    // While it runs: what needs the disk is refused with the reason, the rest works on.
    let traffic = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    let before = kernel::actual(&story, "h1");
    volume.fill();
    attach(&story, "h1", "web").exits(1).complains(&["full", "state"]);
    assert!(kernel::link(&story, "h1-web", "eth0").is_none(), "nothing is left behind");
    assert_eq!(story.status("h1").await.endpoints, 1);
    kernel::shell(
        &story,
        "h1",
        "ip route show proto 86 type unicast | head -1 | while read dst _; do ip route replace $dst via 10.99.0.254; done",
    );
    eventually("drift is repaired", SOON, || {
        let difference = kernel::difference(&kernel::actual(&story, "h1"), &before);
        if difference.is_empty() { Ok(()) } else { Err(difference) }
    })
    .await;
    // A restart on the full disk: what is there is read, and forwards on.
    story.at("h1").agent_stop(Signal::SIGKILL).must("SIGKILL");
    volume.agent_start();
    story.at("h1").wait_ready(READY).await.must("ready on a full disk");
    assert_eq!(story.status("h1").await.endpoints, 1);
    volume.free();
    attach(&story, "h1", "web").exits(0);
    assert!(!volume.names().iter().any(|name| name.ends_with(".tmp")), "no half written file: {:?}", volume.names());
    // One route led elsewhere for a moment.
    traffic.stop().await.assert_at_most(PACE / 5, Duration::from_secs(5), "a full disk");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_directory_is_read_only() {
    let story = Story::without_agents(2, Families::V4).await;
    containers(&story);
    let volume = Volume::new(&story, "h1").await;
    volume.agent_start();
    story.at("h1").wait_ready(READY).await.must("ready");
    story.start("h2").await;
    story.mesh().await;
    for host in ["h1", "h2"] {
        attach(&story, host, "c1").exits(0);
    }
    let notifications = Notifications::listen(&story.inside("h1"));
    notifications.settle().await;
    let traffic = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    volume.read_only(true);
    attach(&story, "h1", "web").exits(1).complains(&["read-only", "state"]);
    assert_eq!(story.status("h1").await.endpoints, 1);
    notifications.take();

    // It cannot start so: it says why, and the data path stays as it is.
    story.at("h1").agent_stop(Signal::SIGTERM).must("SIGTERM");
    volume.agent_start();
    eventually("the agent ends", SOON, || if story.at("h1").agent().is_none() { Ok(()) } else { Err("it runs".to_owned()) })
        .await;
    story.logged("h1", &["the file system is read-only"]).await;
    notifications.assert_silence("an agent that cannot start");
    volume.read_only(false);
    volume.agent_start();
    story.at("h1").wait_ready(READY).await.must("ready");
    notifications.assert_silence("an agent that can");
    traffic.stop().await.assert_none("a read-only state directory");
    attach(&story, "h1", "web").exits(0);
}
