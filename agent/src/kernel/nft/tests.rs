//! Against the real kernel, as root: each test in a network namespace of its own, made by its thread and gone with it.

mod forward;
mod monitor;
mod table;

use std::io::Write;
use std::process::{Command, Stdio};

use crate::model::NetworkConfig;
use crate::plan::Ruleset;
use crate::plan::ruleset::ruleset;

/// Runs `body` on a thread that has a fresh network namespace. Commands started by it live in the same namespace.
fn in_namespace<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    let run = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .expect("a network namespace for the test: run the tests as root, or under `unshare --user --map-root-user`");
        body()
    };
    match std::thread::scope(|scope| scope.spawn(run).join()) {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// What a command prints. It must succeed.
fn output(program: &str, arguments: &[&str], input: &str) -> String {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}: `apt-get install nftables iptables` brings what these tests need"));
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("the command reads its input");
    let done = child.wait_with_output().expect("the command ends");
    assert!(done.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).expect("text")
}

/// Runs `nft` with a script.
fn nft(script: &str) -> String {
    output("nft", &["-f", "-"], script)
}

/// Runs a command line of iptables or ip6tables, split at spaces.
fn iptables(line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    output(words[0], &words[1..], "")
}

fn network(json: &str) -> NetworkConfig {
    NetworkConfig::parse(json).expect("a valid configuration").config
}

fn ipv4() -> NetworkConfig {
    network(r#"{"Network":"10.244.0.0/15"}"#)
}

fn ipv6() -> NetworkConfig {
    network(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#)
}

fn dual() -> NetworkConfig {
    network(r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/53"}"#)
}

/// The full ruleset of a dual-stack network.
fn rules() -> Ruleset {
    ruleset(&dual(), true)
}
