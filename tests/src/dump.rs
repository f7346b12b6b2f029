//! The complete state of a network namespace as lines, for comparisons.
//!
//! Values that change by themselves (counters, timers, learned neighbours) are left out.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use overlay_agent::kernel::netns::Netns;
use serde_json::Value;

use crate::ExpectContext;
use crate::programs::{CommandOutput, require_program};

/// The dump of a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetnsDump(BTreeSet<String>);

/// Fields that a clock or a counter changes.
const VOLATILE: [&str; 13] = [
    "forward_delay_timer",
    "hold_timer",
    "message_age_timer",
    "hello_timer",
    "tcn_timer",
    "topology_change_timer",
    "gc_timer",
    "valid_life_time",
    "preferred_life_time",
    "expires",
    "used",
    "confirmed",
    "updated",
];

/// Sysctls that a counter or a random number generator changes.
const VOLATILE_SYSCTLS: [&str; 3] = ["nf_conntrack_count", "tcp_fastopen_key", "stable_secret"];

impl NetnsDump {
    /// Dumps the namespace's current state.
    pub fn of(netns: &Netns) -> NetnsDump {
        require_program("nft", "nftables");
        let mut lines = BTreeSet::new();
        for (kind, command) in [
            ("link", &["ip", "-j", "-d", "link"][..]),
            ("address", &["ip", "-j", "-d", "address"]),
            ("route", &["ip", "-j", "-d", "-4", "route", "show", "table", "all"]),
            ("route6", &["ip", "-j", "-d", "-6", "route", "show", "table", "all"]),
            ("rule", &["ip", "-j", "-d", "-4", "rule"]),
            ("rule6", &["ip", "-j", "-d", "-6", "rule"]),
            ("neigh", &["ip", "-j", "-d", "neigh", "show", "nud", "permanent"]),
            ("fdb", &["bridge", "-j", "-d", "fdb", "show"]),
            ("nexthop", &["ip", "-j", "-d", "nexthop", "show"]),
        ] {
            let output = run_command(netns, command);
            let values: Vec<Value> = if output.stdout.trim().is_empty() { Vec::new() } else { output.json() };
            for mut value in values {
                if kind == "fdb" && value["state"] != "permanent" {
                    continue;
                }
                remove_volatile(&mut value);
                lines.insert(format!("{kind} {value}"));
            }
        }
        let rules = run_command(netns, &["nft", "-s", "list", "ruleset"]).stdout;
        lines.extend(rules.lines().enumerate().map(|(number, line)| format!("nft {number:04} {line}")));
        netns.run(|| read_sysctls(Path::new("/proc/sys/net"), &mut lines)).expect_ok("read /proc/sys/net");
        NetnsDump(lines)
    }

    /// The lines.
    pub fn lines(&self) -> &BTreeSet<String> {
        &self.0
    }

    /// The differences from an earlier dump as text; empty if equal. New sysctls are ignored: a kernel module brought them.
    pub fn changes_since(&self, before: &NetnsDump) -> String {
        let names = |dump: &NetnsDump| -> BTreeSet<String> {
            dump.0.iter().filter(|l| l.starts_with("sysctl ")).filter_map(|l| l.split(" = ").next().map(str::to_owned)).collect()
        };
        let known_names = names(before);
        let is_new_sysctl = |line: &str| {
            line.starts_with("sysctl net/netfilter/") && !line.split(" = ").next().is_some_and(|n| known_names.contains(n))
        };
        let removed = before.0.difference(&self.0).map(|line| format!("  gone: {line}\n"));
        let added = self.0.difference(&before.0).filter(|line| !is_new_sysctl(line)).map(|line| format!("  new: {line}\n"));
        removed.chain(added).collect()
    }
}

fn run_command(netns: &Netns, command: &[&str]) -> CommandOutput {
    let Some((program, arguments)) = command.split_first() else { panic!("no command") };
    let output = netns.run(|| std::process::Command::new(program).args(arguments).output()).expect_ok("enter the namespace");
    CommandOutput::from_output(command, &output.expect_ok(&format!("{program} (apt-get install iproute2 nftables)")))
        .assert_code(0)
}

/// Removes volatile fields at any depth.
fn remove_volatile(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !VOLATILE.contains(&name.as_str()));
            fields.values_mut().for_each(remove_volatile);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_volatile),
        _ => {}
    }
}

fn read_sysctls(dir: &Path, lines: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            read_sysctls(&path, lines);
            continue;
        }
        // Some sysctls are write-only, others are readable only after they were set.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let name = path.strip_prefix("/proc/sys").unwrap_or(&path).display().to_string();
        if !VOLATILE_SYSCTLS.iter().any(|volatile| name.contains(volatile)) {
            lines.insert(format!("sysctl {name} = {}", text.trim()));
        }
    }
}
