//! The lab itself: several side by side, one that is killed half way, and the machine's own namespace untouched by all of it.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use overlay_agent::kernel::netns::Netns;
use overlay_tests::dump::NetnsDump;
use overlay_tests::programs::{CommandOutput, overlayctl, require_root};
use overlay_tests::{ExpectContext, eventually_true};
use overlayctl::lab::LabName;

/// Labs of one test, by the command line; taken down at the end.
struct Labs {
    dir: tempfile::TempDir,
    names: Vec<String>,
}

impl Labs {
    fn new(count: usize) -> Labs {
        require_root();
        let dir = tempfile::Builder::new().prefix("ovl").tempdir_in("/tmp").expect_ok("a directory");
        Labs { dir, names: (0..count).map(|_| LabName::unique().to_string()).collect() }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(overlayctl());
        command.arg("lab").args(arguments).env("OVERLAY_LAB_DIR", self.dir.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> CommandOutput {
        CommandOutput::from_output(
            &[&["overlayctl", "lab"], arguments].concat(),
            &self.command(arguments).output().expect_ok("overlayctl"),
        )
    }

    fn spawn(&self, arguments: &[&str]) -> Child {
        self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect_ok("overlayctl")
    }

    fn namespaces(&self, name: &str) -> Vec<String> {
        let prefix = format!("ov-{name}-");
        Netns::list().expect_ok("namespaces").into_iter().filter(|n| n.starts_with(&prefix)).collect()
    }

    /// Processes that name the lab's directory.
    fn processes(&self, name: &str) -> Vec<String> {
        let mark = self.dir.path().join(name).to_string_lossy().into_owned();
        let all = std::fs::read_dir("/proc").expect_ok("/proc").flatten();
        let lines =
            all.filter_map(|e| std::fs::read_to_string(e.path().join("cmdline")).ok()).map(|line| line.replace('\0', " "));
        lines.filter(|line| line.contains(&mark)).collect()
    }

    async fn assert_nothing_left(&self, name: &str) {
        eventually_true(&format!("nothing is left of lab {name}"), Duration::from_secs(5), || {
            self.namespaces(name).is_empty() && self.processes(name).is_empty() && !self.path(name).exists()
        })
        .await;
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Labs {
    fn drop(&mut self) {
        for name in &self.names {
            let _down = self.command(&["down", "--name", name]).output();
        }
    }
}

fn host_dump() -> NetnsDump {
    NetnsDump::of(&Netns::current().expect_ok("the machine's namespace"))
}

#[tokio::test(flavor = "multi_thread")]
async fn labs_run_side_by_side() {
    let labs = Labs::new(3);
    let before = host_dump();
    let up: Vec<Child> = labs
        .names
        .iter()
        .map(|name| labs.spawn(&["up", "--name", name, "--hosts", "2", "--containers", "1", "--family", "dual"]))
        .collect();
    for child in up {
        let output = child.wait_with_output().expect_ok("overlayctl");
        CommandOutput::from_output(&["lab up"], &output).assert_code(0);
    }
    for name in &labs.names {
        labs.run(&["check", "--name", name]).assert_code(0);
        assert_eq!(labs.namespaces(name).len(), 6, "two hosts, two containers, the switch and the world");
    }
    labs.run(&["up", "--name", &labs.names[0]]).assert_code(1).assert_stderr_contains(&["exists", "lab down"]);
    labs.run(&["check", "--name", &labs.names[0]]).assert_code(0);
    // One goes, the others stay as they are.
    labs.run(&["down", "--name", &labs.names[0]]).assert_code(0);
    labs.assert_nothing_left(&labs.names[0]).await;
    for name in &labs.names[1..] {
        labs.run(&["check", "--name", name]).assert_code(0);
    }
    labs.run(&["down", "--all"]).assert_code(0);
    for name in &labs.names {
        labs.assert_nothing_left(name).await;
    }
    let changes = host_dump().changes_since(&before);
    assert!(changes.is_empty(), "the machine's own namespace has changed:\n{changes}");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_lab_up_is_cleaned_by_down() {
    let labs = Labs::new(1);
    let name = &labs.names[0];
    for milliseconds in [10, 40, 90, 160, 250, 350, 500, 700] {
        let mut child = labs.spawn(&["up", "--name", name, "--hosts", "3", "--containers", "2"]);
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        child.kill().expect_ok("SIGKILL");
        child.wait().expect_ok("its end");
        labs.run(&["down", "--name", name]).assert_code(0);
        labs.assert_nothing_left(name).await;
    }
    // The name is free again.
    labs.run(&["up", "--name", name, "--hosts", "1", "--containers", "1"]).assert_code(0);
    labs.run(&["down", "--name", name]).assert_code(0);
    labs.assert_nothing_left(name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_lab_up_leaves_nothing() {
    let labs = Labs::new(1);
    let name = &labs.names[0];
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let child = labs.spawn(&["up", "--name", name, "--hosts", "3", "--containers", "2"]);
        eventually_true("it has begun", Duration::from_secs(10), || !labs.namespaces(name).is_empty()).await;
        kill(Pid::from_raw(i32::try_from(child.id()).expect_ok("a process id")), signal).expect_ok("a signal");
        let output = CommandOutput::from_output(&["lab up"], &child.wait_with_output().expect_ok("overlayctl"));
        assert_eq!(output.code, Some(128 + signal as i32), "{}", output.stderr);
        labs.assert_nothing_left(name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_arguments_create_nothing() {
    let labs = Labs::new(1);
    let name = &labs.names[0];
    for (arguments, code, wanted) in [
        (&["up", "--name", "Bad_Name"][..], 2, "not a lab name"),
        (&["up", "--name", name, "--hosts", "0"], 1, "--hosts 0"),
        (&["up", "--name", name, "--network", "10.99.0.0/16"], 1, "underlay"),
        (&["up", "--name", name, "--network", "10.1.0.0/16", "--network", "10.2.0.0/16"], 2, "one IPv4 network"),
        (&["up", "--name", name, "--overlayd", "/no/such/overlayd"], 1, "/no/such/overlayd"),
        (&["check", "--name", name], 1, "no lab `"),
        (&["exec", "--name", name, "h1", "--", "true"], 1, "no lab `"),
    ] {
        labs.run(arguments).assert_code(code).assert_stderr_contains(&[wanted]);
        assert!(labs.namespaces(name).is_empty() && !labs.path(name).join("lab.json").exists(), "{arguments:?}");
    }
    labs.run(&["down", "--name", name]).assert_code(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn lab_exec_runs_in_target_namespace() {
    let labs = Labs::new(1);
    let name = &labs.names[0];
    labs.run(&["up", "--name", name, "--hosts", "1", "--containers", "1"]).assert_code(0);
    let exec = |target: &str, command: &[&str]| labs.run(&[&["exec", "--name", name, target, "--"], command].concat());
    assert!(exec("h1", &["overlayctl", "status", "--brief"]).assert_code(0).stdout.starts_with("h1 ready"));
    assert!(exec("h1-c1", &["ip", "-o", "address"]).assert_code(0).stdout.contains("10.244."));
    assert!(exec("world", &["ip", "-o", "address"]).assert_code(0).stdout.contains("203.0.113.1"));
    exec("h1", &["sh", "-c", "exit 7"]).assert_code(7);
    exec("h7", &["true"]).assert_code(1).assert_stderr_contains(&["has no `h7`", "h1-c1"]);
    let status = labs.run(&["status", "--name", name]).assert_code(0);
    assert!(status.stdout.contains("ready") && status.stdout.contains("c1"), "{}", status.stdout);
}
