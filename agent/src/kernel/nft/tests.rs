//! Tests against the real kernel, as root. Each test thread creates its own network namespace, which disappears with the thread.

mod elements;
mod eval;
mod forward;
mod isolated;
mod monitor;
mod networks;
mod table;

use std::io::Write;
use std::process::{Command, Stdio};

use super::Nft;
use crate::model::{Family, NetworkConfig, PerFamily, Subnet};
use crate::plan::backend;
use crate::plan::isolation::Scope;
use crate::plan::ruleset::{InetTableSpec, Table, inet_table};
use crate::plan::{Key, Op, Ruleset, State, Value};

/// Runs `body` on a thread with a new network namespace. Commands that it starts run in the same namespace.
fn in_netns<T: Send>(body: impl FnOnce() -> T + Send) -> T {
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

/// The output of a command, which must succeed.
fn run_command(program: &str, arguments: &[&str], input: &str) -> String {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!("{program}: {error}: `apt-get install nftables iptables` installs the tools for these tests")
        });
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("the command reads its input");
    let output = child.wait_with_output().expect("the command ends");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// Runs `nft` with a script.
fn nft(script: &str) -> String {
    run_command("nft", &["-f", "-"], script)
}

/// Runs an iptables or ip6tables command line, split at spaces.
fn iptables(line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    run_command(words[0], &words[1..], "")
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

/// This host's subnet in a network.
fn local_subnet(network: &NetworkConfig) -> Subnet {
    let of = |family: Family| network.pools.get(family).and_then(|pool| pool.nth(3)).map(|cidr| (family, cidr));
    Subnet::new(Family::ALL.into_iter().filter_map(of).collect()).expect("a subnet")
}

/// The input of the rules for a network.
fn spec(network: &NetworkConfig, masquerade: bool, publishes: bool) -> InetTableSpec {
    let local: PerFamily<_> = network.families().map(|family| (family, underlay_address(family))).collect();
    let subnet = local_subnet(network);
    let backend = backend::of(network);
    InetTableSpec {
        network: network.clone(),
        bridge: backend.bridge(),
        devices: network.families().filter_map(|family| Some((family, backend.device(family)?))).collect(),
        tunnel: backend.tunnel(),
        subnet,
        local,
        masquerade,
        publishes,
        numbered_sets: false,
        scope: Scope::Host,
        isolation: None,
    }
}

/// The rules for a network alone.
fn ruleset(network: &NetworkConfig, masquerade: bool, publishes: bool) -> Ruleset {
    inet_table(&[&spec(network, masquerade, publishes)])
}

/// This host's address on the underlay.
fn underlay_address(family: Family) -> std::net::IpAddr {
    match family {
        Family::V4 => [192, 0, 2, 3].into(),
        Family::V6 => [0x2001, 0xdb8, 0, 0, 0, 0, 0, 3].into(),
    }
}

/// The full ruleset of a dual-stack network.
fn rules() -> Ruleset {
    ruleset(&dual(), true, true)
}

/// nf_tables and the cached state of it.
struct Tables {
    nft: Nft,
    cached: State,
}

impl Tables {
    fn open() -> Tables {
        Tables { nft: Nft::open().expect("open"), cached: State::new() }
    }

    /// Applies ops, all of which must succeed.
    fn apply(&mut self, ops: &[Op]) {
        assert_eq!(self.nft.apply(ops, &mut self.cached), []);
    }

    /// Sets tables.
    fn set(&mut self, rules: impl IntoIterator<Item = Ruleset>) {
        let ops: Vec<Op> = rules.into_iter().map(set_table).collect();
        self.apply(&ops);
    }

    fn delete(&mut self) {
        let ops = Table::ALL.map(|table| Op::Delete(Key::Ruleset(table), Value::Ruleset(Box::default())));
        self.apply(&ops);
    }

    /// The inet table in the kernel.
    fn ruleset(&mut self) -> Option<Ruleset> {
        self.nft.dump().expect("dump").ruleset(Table::Inet).cloned()
    }
}

fn set_table(rules: Ruleset) -> Op {
    Op::Set(Key::Ruleset(rules.table), Value::Ruleset(Box::new(rules)))
}
