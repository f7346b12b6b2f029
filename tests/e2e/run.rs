//! `overlayctl run`: a command on the overlay from its start to its end, whatever ends it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use overlay_tests::left::Left;
use overlay_tests::programs::{needs, overlayctl};
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, Story, eventually, kernel};
use overlayctl::lab::Families;

fn run<'a>(flags: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    [&["run"], flags, &["--"], command].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_has_a_network_of_its_own_and_leaves_nothing() {
    let story = Story::one_host(Families::Dual).await;
    let before = Left::settled(&story).await;
    let host_file = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let script = "cat /etc/resolv.conf; ls /sys/class/net; ip -o address show dev eth0 scope global; exit 7";
    let flags = ["--dns", "192.0.2.53", "--dns-search", "."];
    let said = story.ctl("h1", &run(&flags, &["sh", "-c", script])).exits(7);
    for wanted in ["nameserver 192.0.2.53\n", "eth0\nlo\n", "inet 10.", "inet6 fd00:"] {
        assert!(said.out.contains(wanted), "{wanted:?} in {}", said.out);
    }
    assert!(!said.out.contains("search"), "{}", said.out);
    before.same(&story, "a command").await;
    assert_eq!(std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(), host_file);

    for (command, code) in [
        (&["true"][..], 0),
        (&["no-such-command"], 127),
        (&["/etc"], 126),
        (&["sh", "-c", "kill -KILL $$"], 137),
        (&["sh", "-c", "exit 255"], 255),
    ] {
        story.ctl("h1", &run(&[], command)).exits(code);
        before.same(&story, &command.join(" ")).await;
    }
    // What the agent refuses is never begun.
    let said = story.ctl("h1", &run(&["--ip", "192.0.2.1"], &["echo", "begun"])).exits(1);
    assert!(said.out.is_empty() && said.err.contains("outside this host's subnet"), "{}{}", said.out, said.err);
    story.ctl("h1", &["run"]).exits(2);
    story.ctl("h1", &run(&["--name", "a/b"], &["true"])).exits(2);
    before.same(&story, "commands that are refused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_others_and_without_a_network() {
    let story = Story::one_host(Families::Dual).await;
    story.ctl("h1", &["attach", "web", "--dns", "192.0.2.77"]).exits(0);
    let said = story.ctl("h1", &run(&["--mode", "container:web"], &["sh", "-c", "cat /etc/resolv.conf; ip -o link"])).exits(0);
    assert!(said.out.contains("192.0.2.77") && said.out.contains("eth0"), "{}", said.out);
    let said = story.ctl("h1", &run(&["--mode", "none"], &["ip", "-o", "address"])).exits(0);
    assert!(said.out.contains("127.0.0.1") && !said.out.contains("eth0"), "{}", said.out);
    let said = story.ctl("h1", &run(&["--mode", "host"], &["ip", "-o", "link"])).exits(0);
    assert!(said.out.contains("ovb.1"), "{}", said.out);
    story.ctl("h1", &run(&["--name", "web"], &["true"])).exits(2).complains(&["endpoint web is there already"]);
    assert_eq!(story.endpoints("h1").len(), 1, "web is still there, the others are gone");
    kernel::run(&story, "h1-web", &["ip", "link", "show", "eth0"]);
}

/// overlayctl in the background; killed with the test.
struct Running(Child);

impl Running {
    /// Starts it and waits for its first line.
    fn start(story: &Story, words: &[&str]) -> Running {
        // Whoever runs the tests in the background of a script has SIGINT ignored, and what is ignored stays so.
        let defaults = ["env", "--default-signal=HUP,INT,TERM"].map(str::to_owned);
        let mut command: Vec<String> = defaults.into_iter().chain([overlayctl().display().to_string()]).collect();
        command.extend(words.iter().map(|w| (*w).to_owned()));
        let mut command: Command = story.command("h1", &command).must("a command");
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = story.inside("h1").run(|| command.spawn()).must("enter").must("overlayctl");
        let mut line = String::new();
        let out = child.stdout.as_mut().must("its output");
        BufReader::new(out).read_line(&mut line).must("a line");
        assert_eq!(line, "up\n");
        Running(child)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).must("a pid")), signal).must("send it");
    }

    async fn ends(mut self) -> Option<i32> {
        let status = eventually("it ends", READY, || match self.0.try_wait() {
            Ok(Some(status)) => Ok(status),
            other => Err(format!("{other:?}")),
        })
        .await;
        status.code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_reach_the_command_and_what_was_made_is_taken_down() {
    let story = Story::one_host(Families::Dual).await;
    let before = Left::settled(&story).await;
    for (signal, trap, code) in [
        (Signal::SIGTERM, "exit 9", 9),
        (Signal::SIGHUP, "exit 10", 10),
        (Signal::SIGINT, "exit 11", 11),
        (Signal::SIGTERM, "trap - TERM; kill -TERM $$", 143),
    ] {
        let name = signal.as_str().trim_start_matches("SIG");
        let script = format!("trap '{trap}' {name}; echo up; while :; do sleep 0.05; done");
        let running = Running::start(&story, &run(&[], &["sh", "-c", &script]));
        assert_eq!(story.endpoints("h1").len(), 1, "attached while it runs");
        running.signal(signal);
        assert_eq!(running.ends().await, Some(code), "{signal}: {trap}");
        before.same(&story, trap).await;
    }
    // A terminal, for what wants one; Ctrl-C is the command's alone.
    needs("script", "bsdutils");
    let inner = format!("{} run -- sh -c 'test -t 0 && tty >/dev/null && echo a terminal'", overlayctl().display());
    let said = kernel::attempt(&story, "h1", &["script", "-qec", &inner, "/dev/null"]).exits(0);
    assert!(said.out.contains("a terminal"), "{}", said.out);
}

/// The agent starts anew while a command runs: what was made is taken down all the same.
#[tokio::test(flavor = "multi_thread")]
async fn over_a_restart_of_the_agent() {
    let story = Story::one_host(Families::Dual).await;
    let before = Left::settled(&story).await;
    let running = Running::start(
        &story,
        &run(&["--name", "web"], &["sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done"]),
    );
    story.at("h1").agent_stop(Signal::SIGKILL).must("SIGKILL");
    running.signal(Signal::SIGTERM);
    // The namespace stays until the agent has let go of what is in it.
    eventually("the command has ended", SOON, || {
        let pids = story.inside("h1-web").pids().must("its processes");
        if pids.is_empty() { Ok(()) } else { Err(format!("{pids:?}")) }
    })
    .await;
    story.at("h1").agent_start(&[]).must("start");
    assert_eq!(running.ends().await, Some(3));
    story.at("h1").wait_ready(READY).await.must("ready");
    before.same(&story, "a restart").await;
}
