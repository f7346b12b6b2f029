//! `overlayctl run`: a command on the overlay from its start to its end, whatever ends it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use overlay_tests::leftovers::Leftovers;
use overlay_tests::programs::{overlayctl, require_program};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, eventually, kernel};
use overlayctl::lab::Families;

fn run_args<'a>(flags: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    [&["run"], flags, &["--"], command].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn command_gets_own_network_and_leaves_nothing() {
    let lab = TestLab::one_host(Families::Dual).await;
    let before = Leftovers::baseline(&lab).await;
    let host_file = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let script = "cat /etc/resolv.conf; ls /sys/class/net; ip -o address show dev eth0 scope global; exit 7";
    let flags = ["--dns", "192.0.2.53", "--dns-search", "."];
    let output = lab.ctl("h1", &run_args(&flags, &["sh", "-c", script])).assert_code(7);
    for wanted in ["nameserver 192.0.2.53\n", "eth0\nlo\n", "inet 10.", "inet6 fd00:"] {
        assert!(output.stdout.contains(wanted), "{wanted:?} in {}", output.stdout);
    }
    assert!(!output.stdout.contains("search"), "{}", output.stdout);
    before.assert_unchanged(&lab, "a command").await;
    assert_eq!(std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(), host_file);

    for (command, code) in [
        (&["true"][..], 0),
        (&["no-such-command"], 127),
        (&["/etc"], 126),
        (&["sh", "-c", "kill -KILL $$"], 137),
        (&["sh", "-c", "exit 255"], 255),
    ] {
        lab.ctl("h1", &run_args(&[], command)).assert_code(code);
        before.assert_unchanged(&lab, &command.join(" ")).await;
    }
    // What the agent refuses is never begun.
    let output = lab.ctl("h1", &run_args(&["--ip", "192.0.2.1"], &["echo", "begun"])).assert_code(1);
    assert!(
        output.stdout.is_empty() && output.stderr.contains("outside this host's subnet"),
        "{}{}",
        output.stdout,
        output.stderr
    );
    lab.ctl("h1", &["run"]).assert_code(2);
    lab.ctl("h1", &run_args(&["--name", "a/b"], &["true"])).assert_code(2);
    before.assert_unchanged(&lab, "commands that are refused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn run_supports_all_modes() {
    let lab = TestLab::one_host(Families::Dual).await;
    lab.ctl("h1", &["attach", "web", "--dns", "192.0.2.77"]).assert_code(0);
    let output =
        lab.ctl("h1", &run_args(&["--mode", "container:web"], &["sh", "-c", "cat /etc/resolv.conf; ip -o link"])).assert_code(0);
    assert!(output.stdout.contains("192.0.2.77") && output.stdout.contains("eth0"), "{}", output.stdout);
    let output = lab.ctl("h1", &run_args(&["--mode", "none"], &["ip", "-o", "address"])).assert_code(0);
    assert!(output.stdout.contains("127.0.0.1") && !output.stdout.contains("eth0"), "{}", output.stdout);
    let output = lab.ctl("h1", &run_args(&["--mode", "host"], &["ip", "-o", "link"])).assert_code(0);
    assert!(output.stdout.contains("ovb.1"), "{}", output.stdout);
    lab.ctl("h1", &run_args(&["--name", "web"], &["true"])).assert_code(2).assert_stderr_contains(&["endpoint web exists"]);
    assert_eq!(lab.endpoints("h1").len(), 1, "web is still there, the others are gone");
    kernel::run(&lab, "h1-web", &["ip", "link", "show", "eth0"]);
}

/// overlayctl in the background; killed with the test.
struct BackgroundRun(Child);

impl BackgroundRun {
    /// Starts it and waits for its first line.
    fn start(lab: &TestLab, words: &[&str]) -> BackgroundRun {
        // Whoever runs the tests in the background of a script has SIGINT ignored, and what is ignored stays so.
        let defaults = ["env", "--default-signal=HUP,INT,TERM"].map(str::to_owned);
        let mut command: Vec<String> = defaults.into_iter().chain([overlayctl().display().to_string()]).collect();
        command.extend(words.iter().map(|w| (*w).to_owned()));
        let mut command: Command = lab.command("h1", &command).expect_ok("a command");
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = lab.open_netns("h1").run(|| command.spawn()).expect_ok("enter").expect_ok("overlayctl");
        let mut line = String::new();
        let out = child.stdout.as_mut().expect_ok("its output");
        BufReader::new(out).read_line(&mut line).expect_ok("a line");
        assert_eq!(line, "up\n");
        BackgroundRun(child)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).expect_ok("a pid")), signal).expect_ok("send it");
    }

    async fn wait(mut self) -> Option<i32> {
        let status = eventually("it ends", READY_TIMEOUT, || match self.0.try_wait() {
            Ok(Some(status)) => Ok(status),
            other => Err(format!("{other:?}")),
        })
        .await;
        status.code()
    }
}

impl Drop for BackgroundRun {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_reach_command_and_cleanup_follows() {
    let lab = TestLab::one_host(Families::Dual).await;
    let before = Leftovers::baseline(&lab).await;
    for (signal, trap, code) in [
        (Signal::SIGTERM, "exit 9", 9),
        (Signal::SIGHUP, "exit 10", 10),
        (Signal::SIGINT, "exit 11", 11),
        (Signal::SIGTERM, "trap - TERM; kill -TERM $$", 143),
    ] {
        let name = signal.as_str().trim_start_matches("SIG");
        let script = format!("trap '{trap}' {name}; echo up; while :; do sleep 0.05; done");
        let running = BackgroundRun::start(&lab, &run_args(&[], &["sh", "-c", &script]));
        assert_eq!(lab.endpoints("h1").len(), 1, "attached while it runs");
        running.signal(signal);
        assert_eq!(running.wait().await, Some(code), "{signal}: {trap}");
        before.assert_unchanged(&lab, trap).await;
    }
    // A terminal, for what wants one; Ctrl-C is the command's alone.
    require_program("script", "bsdutils");
    let inner = format!("{} run -- sh -c 'test -t 0 && tty >/dev/null && echo a terminal'", overlayctl().display());
    let output = kernel::attempt(&lab, "h1", &["script", "-qec", &inner, "/dev/null"]).assert_code(0);
    assert!(output.stdout.contains("a terminal"), "{}", output.stdout);
}

/// The agent starts anew while a command runs: what was made is taken down all the same.
#[tokio::test(flavor = "multi_thread")]
async fn run_cleanup_survives_agent_restart() {
    let lab = TestLab::one_host(Families::Dual).await;
    let before = Leftovers::baseline(&lab).await;
    let running = BackgroundRun::start(
        &lab,
        &run_args(&["--name", "web"], &["sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done"]),
    );
    lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    running.signal(Signal::SIGTERM);
    // The namespace stays until the agent has let go of what is in it.
    eventually("the command has ended", CONVERGE_TIMEOUT, || {
        let pids = lab.open_netns("h1-web").pids().expect_ok("its processes");
        if pids.is_empty() { Ok(()) } else { Err(format!("{pids:?}")) }
    })
    .await;
    lab.host("h1").agent_start(&[]).expect_ok("start");
    assert_eq!(running.wait().await, Some(3));
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    before.assert_unchanged(&lab, "a restart").await;
}
