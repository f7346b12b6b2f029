//! The lab without agents, through the binary: it starts, works and ends, and leaves nothing behind, also after a crash.
//!
//! Needs root (or `unshare --user --map-root-user --mount --net` with a tmpfs on /run/netns) and etcd.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A lab with its own name and directory; removed at the end of the test, whatever its result.
struct TestLab {
    name: String,
    dir: tempfile::TempDir,
}

impl TestLab {
    fn new() -> TestLab {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!("c{:x}n{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        // A short path, because a socket's path has a maximum length.
        let dir = tempfile::Builder::new().prefix("ovl").tempdir_in("/tmp").expect("a temporary directory");
        TestLab { name, dir }
    }

    /// Builds `overlayctl lab VERB --name NAME ARGUMENTS`.
    fn command(&self, verb: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_overlayctl"));
        command.args(["lab", verb, "--name", &self.name]).args(arguments).env("OVERLAY_LAB_DIR", self.dir.path());
        command
    }

    fn run(&self, verb: &str, arguments: &[&str]) -> Output {
        self.command(verb, arguments).output().expect("overlayctl runs")
    }

    /// Runs the command, which must succeed. Returns its standard output.
    fn run_ok(&self, verb: &str, arguments: &[&str]) -> String {
        let output = self.run(verb, arguments);
        assert!(output.status.success(), "lab {verb} {arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn namespaces(&self) -> BTreeSet<String> {
        let prefix = format!("ov-{}-", self.name);
        let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
        entries.filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with(&prefix)).collect()
    }

    /// Asserts that nothing of the lab remains: no namespace, no file, no process that names its directory.
    fn assert_gone(&self) {
        assert_eq!(self.namespaces(), BTreeSet::new());
        let files: Vec<_> =
            std::fs::read_dir(self.dir.path()).expect("the directory of labs").flatten().map(|e| e.path()).collect();
        assert_eq!(files, Vec::<std::path::PathBuf>::new());
        let lab_path = self.dir.path().to_string_lossy().into_owned();
        let leftovers: Vec<String> =
            processes().filter(|(_, line)| line.contains(&lab_path)).map(|(pid, line)| format!("{pid} {line}")).collect();
        assert_eq!(leftovers, Vec::<String>::new());
    }
}

impl Drop for TestLab {
    fn drop(&mut self) {
        let output = self.run("down", &[]);
        if !output.status.success() {
            eprintln!("{}", text(&output.stderr));
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Lists every process with its command line.
fn processes() -> impl Iterator<Item = (u32, String)> {
    std::fs::read_dir("/proc").expect("/proc").flatten().filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some((pid, text(&line).replace('\0', " ")))
    })
}

/// Links and addresses of this process's own namespace.
fn own_namespace() -> String {
    text(&Command::new("ip").args(["-o", "address"]).output().expect("iproute2 is installed").stdout)
}

#[test]
fn parallel_labs_leave_nothing_behind() {
    let before = own_namespace();
    let (one, two) = (TestLab::new(), TestLab::new());
    one.run_ok("up", &["--hosts", "2", "--no-agents", "--family", "dual"]);
    two.run_ok("up", &["--hosts", "1", "--no-agents", "--family", "6"]);
    assert_eq!(one.namespaces().len(), 4);
    assert_eq!(own_namespace(), before, "the machine's own namespace is unchanged");

    // Hosts reach each other and the world in every family, tested with iproute2.
    let route = one.run_ok("exec", &["h1", "--", "ip", "-o", "route", "get", "203.0.113.1"]);
    assert!(route.contains("via 10.99.0.254") && route.contains("src 10.99.1.1"), "{route}");
    let route = two.run_ok("exec", &["h1", "--", "ip", "-o", "route", "get", "2001:db8:ffff::1"]);
    assert!(route.contains("via fd99::254"), "{route}");

    // A host can read the network configuration from etcd.
    let endpoints = ["--etcd-endpoints", "http://10.99.0.2:2379"];
    let config = one.run_ok("exec", &[&["h2", "--", "overlayctl", "config", "show"][..], &endpoints].concat());
    assert!(config.contains("10.244.0.0/16") && config.contains("fd00:10:244::/56"), "{config}");
    let subnets = one.run_ok("exec", &[&["h2", "--", "overlayctl", "subnets"][..], &endpoints].concat());
    assert_eq!(subnets, "no subnets: no host has a lease yet\n");

    one.run_ok("down", &[]);
    one.assert_gone();
    assert_eq!(two.namespaces().len(), 3, "the other lab stays");
    two.run_ok("down", &[]);
    two.assert_gone();
    assert_eq!(own_namespace(), before);
}

#[test]
fn invalid_configuration_is_not_written() {
    let lab = TestLab::new();
    lab.run_ok("up", &["--hosts", "1", "--no-agents"]);
    let file = lab.dir.path().join("network.json");
    let path = file.to_str().expect("a path");
    let config = |arguments: &[&str]| {
        let endpoints = ["--etcd-endpoints", "http://10.99.0.2:2379"];
        lab.run("exec", &[&["h1", "--", "overlayctl", "config"][..], arguments, &endpoints].concat())
    };
    std::fs::write(&file, r#"{"Network":"10.7.0.1/16","SubnetLen":99}"#).expect("writable");
    let refused = config(&["set", path]);
    assert_eq!(refused.status.code(), Some(1));
    let message = text(&refused.stderr);
    assert!(message.contains("10.7.0.0/16") && message.contains("nothing was written"), "{message}");
    assert!(text(&config(&["show"]).stdout).contains("10.244.0.0/16"), "the old one stays");

    std::fs::write(&file, r#"{"Network":"10.7.0.0/16","Netwrk":1}"#).expect("writable");
    let done = config(&["set", path]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(text(&done.stderr).contains("Netwrk"), "unknown fields are named");
    assert!(text(&done.stdout).contains("10.244.0.0/16"), "the previous configuration is printed");
    assert!(text(&config(&["set", path]).stdout).contains("nothing to change"));
    std::fs::remove_file(&file).expect("there");
}

#[test]
fn exec_returns_exit_code_of_command() {
    let lab = TestLab::new();
    lab.run_ok("up", &["--hosts", "1", "--no-agents"]);
    assert_eq!(lab.run("exec", &["h1", "--", "sh", "-c", "exit 7"]).status.code(), Some(7));
    assert_eq!(lab.run("exec", &["h1", "--", "no-such-program"]).status.code(), Some(127));
    let unknown = lab.run("exec", &["h9", "--", "true"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("net world h1"), "{}", text(&unknown.stderr));
    let status: serde_json::Value = serde_json::from_str(&lab.run_ok("status", &["-o", "json"])).expect("JSON");
    assert_eq!((&status["hosts"][0]["name"], &status["etcd_running"]), (&"h1".into(), &true.into()));

    // A second lab of that name is rejected and changes nothing.
    let second = lab.run("up", &["--no-agents"]);
    assert!(text(&second.stderr).contains("lab down"), "{}", text(&second.stderr));
    lab.run_ok("exec", &["h1", "--", "true"]);

    // A process inside is ended too, even if it ignores SIGTERM.
    let ignores_sigterm = ["h1", "--", "sh", "-c", "trap '' TERM; echo inside; while :; do sleep 0.1; done"];
    let mut child = lab.command("exec", &ignores_sigterm).stdout(Stdio::piped()).spawn().expect("overlayctl runs");
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().expect("its output")).read_line(&mut line).expect("a line");
    assert_eq!(line, "inside\n");
    lab.run_ok("down", &[]);
    assert!(!child.wait().expect("a child").success());
    lab.assert_gone();
}

/// A lab that was killed during its start can be removed by its name, and started again.
#[test]
fn down_removes_half_built_lab() {
    let lab = TestLab::new();
    let steps = [1, 5, 10, 15, 20, 30, 50, 100, 200, 400];
    for delay in steps.map(Duration::from_millis) {
        let mut up = lab.command("up", &["--hosts", "3", "--no-agents"]).spawn().expect("overlayctl runs");
        std::thread::sleep(delay);
        up.kill().expect("a child can be killed");
        up.wait().expect("a child");
        lab.run_ok("down", &[]);
        lab.assert_gone();
    }
    lab.run_ok("up", &["--hosts", "1", "--no-agents"]);
}

#[test]
fn interrupt_removes_half_built_lab() {
    let lab = TestLab::new();
    let mut up = lab.command("up", &["--hosts", "40", "--no-agents"]).spawn().expect("overlayctl runs");
    let end = Instant::now() + Duration::from_secs(20);
    while lab.namespaces().len() < 5 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = i32::try_from(up.id()).expect("a process id");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGINT).expect("a child");
    assert_eq!(up.wait().expect("a child").code(), Some(130));
    lab.assert_gone();
}

/// An ordinary user's lab depends on a user namespace.
#[test]
fn lab_works_without_root() {
    let lab = TestLab::new();
    // The ordinary user may not read the build directory.
    let program = lab.dir.path().join("overlayctl");
    std::fs::copy(env!("CARGO_BIN_EXE_overlayctl"), &program).expect("a copy");
    let home_dir = lab.dir.path().join("home");
    std::fs::create_dir(&home_dir).expect("a directory");
    std::fs::set_permissions(lab.dir.path(), std::fs::Permissions::from_mode(0o755)).expect("own directory");
    std::os::unix::fs::chown(&home_dir, Some(65_534), Some(65_534)).expect("root gives it away");
    let run = |verb: &str, arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--"]).arg(&program);
        command.args(["lab", verb, "--name", &lab.name]).args(arguments).env("OVERLAY_LAB_DIR", &home_dir).env("LC_ALL", "C");
        command.output().expect("setpriv (util-linux) runs")
    };
    for kill_supervisor in [false, true] {
        let up = run("up", &["--hosts", "2", "--no-agents", "--family", "dual"]);
        assert!(up.status.success(), "user namespaces are needed: {}", text(&up.stderr));
        assert_eq!(lab.namespaces(), BTreeSet::new(), "no namespaces on the machine itself");
        let route = text(&run("exec", &["h2", "--", "ip", "-o", "route", "get", "10.99.1.1"]).stdout);
        assert!(route.contains("dev eth0 src 10.99.1.2"), "{route}");
        assert_eq!(run("exec", &["h2", "--", "sh", "-c", "exit 9"]).status.code(), Some(9));
        assert!(text(&run("up", &["--no-agents"]).stderr).contains("exists"));
        if kill_supervisor {
            let record =
                std::fs::read_to_string(home_dir.join(&lab.name).join("supervisor.pid")).expect("the supervisor's record");
            let pid = record.split(' ').next().and_then(|p| p.parse().ok()).expect("a process id");
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("it runs");
        }
        let down = run("down", &[]);
        assert!(down.status.success(), "{}", text(&down.stderr));
        assert_eq!(std::fs::read_dir(&home_dir).expect("a directory").count(), 0);
        let program = program.to_string_lossy().into_owned();
        assert_eq!(processes().filter(|(_, line)| line.contains(&program)).collect::<Vec<_>>(), Vec::new());
    }
    std::fs::remove_dir(&home_dir).and_then(|()| std::fs::remove_file(&program)).expect("own files");
}

#[test]
fn invalid_options_create_nothing() {
    let lab = TestLab::new();
    for (arguments, wanted) in [
        (&["--hosts", "0"][..], "--hosts 0"),
        (&["--network", "10.99.0.0/16"], "underlay"),
        (&["--overlayd", "/no/such/overlayd"], "/no/such/overlayd"),
    ] {
        let output = lab.run("up", arguments);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains(wanted), "{}", text(&output.stderr));
        assert!(!Path::new(lab.dir.path()).join(&lab.name).exists());
    }
    assert_eq!(lab.run("up", &["--family", "5"]).status.code(), Some(2));
}
