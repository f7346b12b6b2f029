//! Refusals of the agent: each error names the value, the place and the remedy, and precedes any change.

use std::os::unix::net::UnixListener;
use std::process::Command;

use nix::sys::signal::Signal;
use overlay_agent::model::api::Status;
use overlay_tests::dump::NetnsDump;
use overlay_tests::notify::Notifications;
use overlay_tests::programs::{overlayd, require_program};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, kernel};
use overlayctl::lab::Families;

/// A host without a previous agent: a refusal must leave it unchanged.
async fn start_quiet_host() -> (TestLab, NetnsDump) {
    let lab = TestLab::without_agents(1, Families::V4).await;
    Notifications::subscribe(&lab.open_netns("h1")).wait_quiet().await;
    let before = NetnsDump::of(&lab.open_netns("h1"));
    (lab, before)
}

#[track_caller]
fn assert_untouched(lab: &TestLab, before: &NetnsDump) {
    let changes = NetnsDump::of(&lab.open_netns("h1")).changes_since(before);
    assert!(changes.is_empty(), "the host has changed:\n{changes}");
}

/// The agent's command with separate directories, which do not exist yet.
fn agent_command(lab: &TestLab) -> Command {
    lab.overlayd_command("h1", lab.dir().join("new/run"), lab.dir().join("new/state"))
}

#[tokio::test(flavor = "multi_thread")]
async fn all_invalid_flags_are_reported() {
    let (lab, before) = start_quiet_host().await;
    let mut command = agent_command(&lab);
    command.args(["--public-ip=nowhere", "--iface-regex=(", "--log-format=xml", "--resync-interval=0s", "--etcd-username=me"]);
    command.args(["--etcd-cafile=/no/such/file", "--etcd-prefix=relative"]);
    lab.run_to_exit("h1", command).assert_code(2).assert_stderr_contains(&[
        "7 errors",
        "--public-ip: `nowhere`",
        "--iface-regex: `(`",
        "--log-format: `xml`",
        "--resync-interval: `0s`",
        "--etcd-username: `me`",
        "--etcd-cafile: `/no/such/file`",
        "--etcd-prefix: `relative`",
    ]);
    let mut unknown = agent_command(&lab);
    unknown.arg("--no-such-flag");
    lab.run_to_exit("h1", unknown).assert_code(2).assert_stderr_contains(&["--no-such-flag"]);
    assert!(!lab.dir().join("new").exists(), "no directory is created");
    assert_untouched(&lab, &before);
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_config_key_is_refused() {
    let (lab, before) = start_quiet_host().await;
    let file = lab.dir().join("overlayd.toml");
    std::fs::write(&file, "run-dri = \"/run/x\"\nlog-level = \"debug\"\n").expect_ok("a file");
    let mut command = Command::new(overlayd());
    command.arg("--config").arg(&file);
    let location = format!("run-dri in {}", file.display());
    lab.run_to_exit("h1", command).assert_code(2).assert_stderr_contains(&[
        &location,
        "is not a setting",
        "did you mean `run-dir`?",
    ]);

    std::fs::write(&file, "log-level = [\n").expect_ok("a file");
    let mut torn = Command::new(overlayd());
    torn.arg("--config").arg(&file);
    lab.run_to_exit("h1", torn).assert_code(2).assert_stderr_contains(&["is not TOML", &file.display().to_string()]);

    let mut missing = Command::new(overlayd());
    missing.args(["--config", "/no/such/overlayd.toml"]);
    lab.run_to_exit("h1", missing).assert_code(2).assert_stderr_contains(&["/no/such/overlayd.toml", "cannot be read"]);
    assert_untouched(&lab, &before);
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_cap_net_admin_is_refused() {
    let (lab, before) = start_quiet_host().await;
    require_program("setpriv", "util-linux");
    let inner = agent_command(&lab);
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]).arg(inner.get_program()).args(inner.get_args());
    lab.run_to_exit("h1", command).assert_code(1).assert_stderr_contains(&["CAP_NET_ADMIN", "Nothing was touched"]);
    let mut cleanup = Command::new("setpriv");
    cleanup.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]).arg(inner.get_program()).args(inner.get_args());
    cleanup.arg("cleanup");
    lab.run_to_exit("h1", cleanup).assert_code(1).assert_stderr_contains(&["CAP_NET_ADMIN"]);
    assert!(!lab.dir().join("new").exists(), "no directory is created");
    assert_untouched(&lab, &before);
}

#[tokio::test(flavor = "multi_thread")]
async fn second_agent_is_refused() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let before = kernel::actual_state(&lab, "h1");
    let pid = lab.host("h1").agent().expect_ok("the agent").pid;
    let same_run = lab.overlayd_command("h1", lab.host("h1").run_dir(), lab.dir().join("new/state"));
    lab.run_to_exit("h1", same_run).assert_code(1).assert_stderr_contains(&[
        "is in use by another overlayd",
        &format!("pid {pid}"),
        "--run-dir",
    ]);
    lab.run_to_exit("h1", agent_command(&lab))
        .assert_code(1)
        .assert_stderr_contains(&["another overlayd runs in this network namespace"]);
    // In another namespace, with this one's state directory.
    let state = lab.host("h1").state_dir();
    let same_state = lab.overlayd_command("h1", lab.dir().join("new/run"), state.clone());
    let output = lab.run_to_exit("world", same_state).assert_code(1);
    assert!(output.stderr.contains(&state.display().to_string()) && output.stderr.contains("in use"), "{}", output.stderr);
    assert_eq!(kernel::difference(&kernel::actual_state(&lab, "h1"), &before), "");
    assert_eq!(lab.host("h1").agent().expect_ok("still there").pid, pid);
    lab.assert_full_reachability().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn occupied_socket_path_is_refused() {
    let (lab, _) = start_quiet_host().await;
    let (run, state) = (lab.dir().join("run"), lab.dir().join("state"));
    std::fs::create_dir_all(&run).expect_ok("a directory");
    let socket = run.join("overlayd.sock");
    let path = socket.display().to_string();

    // A listener on the socket: this test.
    let live = UnixListener::bind(&socket).expect_ok("a socket");
    let output = lab.run_to_exit("h1", lab.overlayd_command("h1", run.clone(), state.clone())).assert_code(1);
    output.assert_stderr_contains(&[&path, "belongs to a live agent", &format!("pid {}", std::process::id())]);
    drop(live);

    std::fs::remove_file(&socket).expect_ok("remove the socket");
    std::fs::write(&socket, "precious").expect_ok("a file");
    lab.run_to_exit("h1", lab.overlayd_command("h1", run.clone(), state)).assert_code(1).assert_stderr_contains(&[
        &path,
        "is not a socket",
        "left unchanged",
    ]);
    assert_eq!(std::fs::read_to_string(&socket).expect_ok("the file"), "precious");

    // A stale socket of a killed agent is replaced.
    let host = lab.host("h1");
    std::fs::create_dir_all(host.run_dir()).expect_ok("a directory");
    drop(UnixListener::bind(host.socket()).expect_ok("a socket"));
    assert!(host.socket().exists());
    lab.start_agent("h1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_device_with_agent_name_is_kept() {
    let lab = TestLab::without_agents(2, Families::V4).await;
    lab.start_agent("h2").await;
    for (device, kind) in [("ovx.1", "a bridge"), ("ovb.1", "a bridge")] {
        kernel::run(&lab, "h1", &["ip", "link", "add", device, "type", "bridge"]);
        kernel::run(&lab, "h1", &["ip", "address", "add", "10.77.0.1/24", "dev", device]);
        let before = kernel::list_json(&lab, "h1", "ip", &["address", "show", "dev", device]);
        lab.host("h1").agent_start(&[]).expect_ok("start");
        let named = |s: &Status| {
            !s.ready
                && s.problems.iter().any(|p| p.contains(device))
                && s.data_path.failed.iter().any(|f| f.entry.contains(device))
        };
        let status =
            lab.host("h1").wait_status(CONVERGE_TIMEOUT, &format!("it does not report {device}"), named).await.expect_ok("h1");
        let failed = status.data_path.failed.iter().find(|f| f.entry.contains(device)).expect_ok(device);
        assert!(failed.error.contains("not managed by overlayd"), "{kind}: {failed:?}");
        lab.wait_for_log("h1", &[device, "kernel rejected an entry"]).await;
        let after = kernel::list_json(&lab, "h1", "ip", &["address", "show", "dev", device]);
        assert_eq!(after, before, "it is unchanged");
        lab.ctl("h1", &["status"]).assert_code(3);

        kernel::run(&lab, "h1", &["ip", "link", "delete", device]);
        lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready after its removal");
        lab.wait_full_mesh().await;
        lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
        lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
        let mut cleanup = lab.overlayd_command("h1", lab.host("h1").run_dir(), lab.host("h1").state_dir());
        cleanup.arg("cleanup");
        lab.run_to_exit("h1", cleanup).assert_code(0);
    }
}

/// Foreign entries are kept, even if they resemble ours.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_routes_are_kept() {
    let lab = TestLab::without_agents(2, Families::V4).await;
    lab.start_agent("h2").await;
    let subnet = lab.status("h2").await.lease.expect_ok("a lease").subnet;
    let metric = ["ip", "route", "add", &subnet.to_string(), "via", "10.99.0.254", "metric", "500"];
    kernel::run(&lab, "h1", &metric);
    kernel::run(&lab, "h1", &["ip", "route", "add", "10.60.0.0/16", "via", "10.99.0.254", "proto", "bgp"]);
    let foreign_routes = || {
        let all = kernel::list_json(&lab, "h1", "ip", &["route", "show"]);
        all.into_iter().filter(|r| kernel::text(r, "gateway") == "10.99.0.254").count()
    };
    assert_eq!(foreign_routes(), 3, "with the default route");
    lab.start_agent("h1").await;
    lab.wait_full_mesh().await;
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    assert_eq!(foreign_routes(), 3);
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    let mut cleanup = lab.overlayd_command("h1", lab.host("h1").run_dir(), lab.host("h1").state_dir());
    cleanup.arg("cleanup");
    lab.run_to_exit("h1", cleanup).assert_code(0);
    assert_eq!(foreign_routes(), 3);
}
