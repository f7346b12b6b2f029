//! What the agent refuses to start with, or to touch: each told with the value, the place and what to do, and before anything is changed.

use std::os::unix::net::UnixListener;
use std::process::Command;

use nix::sys::signal::Signal;
use overlay_agent::model::api::Status;
use overlay_tests::dump::Dump;
use overlay_tests::notify::Notifications;
use overlay_tests::programs::{needs, overlayd};
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, Story, kernel};
use overlayctl::lab::Families;

/// A host whose agent has not run: what is refused must leave it as it is.
async fn host() -> (Story, Dump) {
    let story = Story::without_agents(1, Families::V4).await;
    Notifications::listen(&story.inside("h1")).settle().await;
    let before = Dump::of(&story.inside("h1"));
    (story, before)
}

#[track_caller]
fn untouched(story: &Story, before: &Dump) {
    let changes = Dump::of(&story.inside("h1")).changes_since(before);
    assert!(changes.is_empty(), "it was touched:\n{changes}");
}

/// The agent's command with directories of its own, which are not there yet.
fn agent(story: &Story) -> Command {
    story.overlayd("h1", story.dir().join("new/run"), story.dir().join("new/state"))
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_flags_are_told_all_at_once() {
    let (story, before) = host().await;
    let mut command = agent(&story);
    command.args(["--public-ip=nowhere", "--iface-regex=(", "--log-format=xml", "--resync-interval=0s", "--etcd-username=me"]);
    command.args(["--etcd-cafile=/no/such/file", "--etcd-prefix=relative"]);
    story.ends("h1", command).exits(2).complains(&[
        "7 mistakes",
        "--public-ip: `nowhere`",
        "--iface-regex: `(`",
        "--log-format: `xml`",
        "--resync-interval: `0s`",
        "--etcd-username: `me`",
        "--etcd-cafile: `/no/such/file`",
        "--etcd-prefix: `relative`",
    ]);
    let mut unknown = agent(&story);
    unknown.arg("--no-such-flag");
    story.ends("h1", unknown).exits(2).complains(&["--no-such-flag"]);
    assert!(!story.dir().join("new").exists(), "not even a directory is made");
    untouched(&story, &before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_key_in_the_file() {
    let (story, before) = host().await;
    let file = story.dir().join("overlayd.toml");
    std::fs::write(&file, "run-dri = \"/run/x\"\nlog-level = \"debug\"\n").must("a file");
    let mut command = Command::new(overlayd());
    command.arg("--config").arg(&file);
    let place = format!("run-dri in {}", file.display());
    story.ends("h1", command).exits(2).complains(&[&place, "is no setting", "did you mean `run-dir`?"]);

    std::fs::write(&file, "log-level = [\n").must("a file");
    let mut torn = Command::new(overlayd());
    torn.arg("--config").arg(&file);
    story.ends("h1", torn).exits(2).complains(&["is not TOML", &file.display().to_string()]);

    let mut missing = Command::new(overlayd());
    missing.args(["--config", "/no/such/overlayd.toml"]);
    story.ends("h1", missing).exits(2).complains(&["/no/such/overlayd.toml", "cannot be read"]);
    untouched(&story, &before);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_right_to_change_the_network() {
    let (story, before) = host().await;
    needs("setpriv", "util-linux");
    let inner = agent(&story);
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]).arg(inner.get_program()).args(inner.get_args());
    story.ends("h1", command).exits(1).complains(&["CAP_NET_ADMIN", "Nothing was touched"]);
    let mut cleanup = Command::new("setpriv");
    cleanup.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]).arg(inner.get_program()).args(inner.get_args());
    cleanup.arg("cleanup");
    story.ends("h1", cleanup).exits(1).complains(&["CAP_NET_ADMIN"]);
    assert!(!story.dir().join("new").exists(), "not even a directory is made");
    untouched(&story, &before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let before = kernel::actual(&story, "h1");
    let pid = story.at("h1").agent().must("the agent").pid;
    let same_run = story.overlayd("h1", story.at("h1").run_dir(), story.dir().join("new/state"));
    story.ends("h1", same_run).exits(1).complains(&["is in use by another overlayd", &format!("pid {pid}"), "--run-dir"]);
    story.ends("h1", agent(&story)).exits(1).complains(&["another overlayd runs in this network namespace"]);
    // In another namespace, with the state of this one.
    let state = story.at("h1").state_dir();
    let same_state = story.overlayd("h1", story.dir().join("new/run"), state.clone());
    let said = story.ends("world", same_state).exits(1);
    assert!(said.err.contains(&state.display().to_string()) && said.err.contains("in use"), "{}", said.err);
    assert_eq!(kernel::difference(&kernel::actual(&story, "h1"), &before), "");
    assert_eq!(story.at("h1").agent().must("still there").pid, pid);
    story.assert_all_reach().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sockets_path_is_taken() {
    let (story, _) = host().await;
    let (run, state) = (story.dir().join("run"), story.dir().join("state"));
    std::fs::create_dir_all(&run).must("a directory");
    let socket = run.join("overlayd.sock");
    let shown = socket.display().to_string();

    // Somebody who answers: here it is this test.
    let live = UnixListener::bind(&socket).must("a socket");
    let said = story.ends("h1", story.overlayd("h1", run.clone(), state.clone())).exits(1);
    said.complains(&[&shown, "belongs to a live agent", &format!("pid {}", std::process::id())]);
    drop(live);

    std::fs::remove_file(&socket).must("remove the socket");
    std::fs::write(&socket, "precious").must("a file");
    story.ends("h1", story.overlayd("h1", run.clone(), state)).exits(1).complains(&[&shown, "is no socket", "left alone"]);
    assert_eq!(std::fs::read_to_string(&socket).must("the file"), "precious");

    // A socket that nobody listens on any more, as a killed agent leaves it, is replaced.
    let host = story.at("h1");
    std::fs::create_dir_all(host.run_dir()).must("a directory");
    drop(UnixListener::bind(host.socket()).must("a socket"));
    assert!(host.socket().exists());
    story.start("h1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_of_our_name_that_is_not_ours() {
    let story = Story::without_agents(2, Families::V4).await;
    story.start("h2").await;
    for (device, kind) in [("ovx.1", "a bridge"), ("ovb.1", "a bridge")] {
        kernel::run(&story, "h1", &["ip", "link", "add", device, "type", "bridge"]);
        kernel::run(&story, "h1", &["ip", "address", "add", "10.77.0.1/24", "dev", device]);
        let before = kernel::listed(&story, "h1", "ip", &["address", "show", "dev", device]);
        story.at("h1").agent_start(&[]).must("start");
        let named = |s: &Status| {
            !s.ready
                && s.problems.iter().any(|p| p.contains(device))
                && s.data_path.failed.iter().any(|f| f.entry.contains(device))
        };
        let status = story.at("h1").wait_status(SOON, &format!("it does not name {device}"), named).await.must("h1");
        let failed = status.data_path.failed.iter().find(|f| f.entry.contains(device)).must(device);
        assert!(failed.error.contains("not ours") || failed.error.contains("not made by"), "{kind}: {failed:?}");
        story.logged("h1", &[device, "the kernel refused an entry"]).await;
        let after = kernel::listed(&story, "h1", "ip", &["address", "show", "dev", device]);
        assert_eq!(after, before, "it is left alone");
        story.ctl("h1", &["status"]).exits(3);

        kernel::run(&story, "h1", &["ip", "link", "delete", device]);
        story.at("h1").wait_ready(READY).await.must("ready once it is gone");
        story.mesh().await;
        story.settled("h1", SOON).await;
        story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
        let mut cleanup = story.overlayd("h1", story.at("h1").run_dir(), story.at("h1").state_dir());
        cleanup.arg("cleanup");
        story.ends("h1", cleanup).exits(0);
    }
}

/// What is not ours is not removed either, however much it looks like ours.
#[tokio::test(flavor = "multi_thread")]
async fn routes_of_others_to_the_same_place() {
    let story = Story::without_agents(2, Families::V4).await;
    story.start("h2").await;
    let subnet = story.status("h2").await.lease.must("a lease").subnet;
    let metric = ["ip", "route", "add", &subnet.to_string(), "via", "10.99.0.254", "metric", "500"];
    kernel::run(&story, "h1", &metric);
    kernel::run(&story, "h1", &["ip", "route", "add", "10.60.0.0/16", "via", "10.99.0.254", "proto", "bgp"]);
    let theirs = || {
        let all = kernel::listed(&story, "h1", "ip", &["route", "show"]);
        all.into_iter().filter(|r| kernel::text(r, "gateway") == "10.99.0.254").count()
    };
    assert_eq!(theirs(), 3, "with the default route");
    story.start("h1").await;
    story.mesh().await;
    story.settled("h1", SOON).await;
    assert_eq!(theirs(), 3);
    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    let mut cleanup = story.overlayd("h1", story.at("h1").run_dir(), story.at("h1").state_dir());
    cleanup.arg("cleanup");
    story.ends("h1", cleanup).exits(0);
    assert_eq!(theirs(), 3);
}
