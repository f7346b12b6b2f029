//! Direct access to a lab's etcd: raw keys, leases, revisions, and the process itself.

use std::time::Duration;

use nix::sys::signal::Signal;
use overlayctl::lab::process::{ProcessId, TERM_GRACE};
use overlayctl::lab::{self, Lab, layout};
use serde_json::Value;

use crate::ExpectContext;
use crate::programs::{CommandOutput, require_program};

/// The key of the network configuration.
pub fn config_key() -> String {
    format!("{}/config", layout::ETCD_PREFIX)
}

/// The key of a subnet lease.
pub fn lease_key(name: &str) -> String {
    format!("{}/subnets/{name}", layout::ETCD_PREFIX)
}

/// Runs etcdctl against a lab's etcd and accepts any exit code.
pub fn etcdctl(lab: &Lab, arguments: &[&str]) -> CommandOutput {
    etcdctl_at(lab, "net", &lab.layout().etcd_endpoints().join(","), arguments)
}

/// Runs etcdctl inside a target against chosen endpoints and accepts any exit code.
pub fn etcdctl_at(lab: &Lab, target: &str, endpoints: &str, arguments: &[&str]) -> CommandOutput {
    require_program("etcdctl", "etcd-client");
    let endpoint = format!("--endpoints={endpoints}");
    let command: Vec<&str> = ["env", "ETCDCTL_API=3", "etcdctl", "--command-timeout=5s", &endpoint]
        .into_iter()
        .chain(arguments.iter().copied())
        .collect();
    let output = lab.exec(target, &command).expect_ok("etcdctl");
    CommandOutput::from_output(&command, &output)
}

/// Writes a key; below `subnets/` this is a reservation.
pub fn put(lab: &Lab, key: &str, value: &str) {
    etcdctl(lab, &["put", "--", key, value]).assert_code(0);
}

/// Writes a key whose value is too long for a command line.
pub fn put_long(lab: &Lab, key: &str, value: &[u8]) {
    let file = lab.dir().join("value");
    std::fs::write(&file, value).expect_ok("a file for the value");
    let endpoint = lab.layout().etcd_endpoints().join(",");
    let script = "ETCDCTL_API=3 exec etcdctl --endpoints=\"$1\" put -- \"$2\" <\"$3\"";
    let file = file.to_string_lossy().into_owned();
    let command = ["sh", "-c", script, "sh", &endpoint, key, &file];
    CommandOutput::from_output(&command, &lab.exec("net", &command).expect_ok("etcdctl")).assert_code(0);
}

/// Grants an etcd lease with a TTL in seconds; returns its id as etcdctl prints it.
pub fn grant(lab: &Lab, seconds: u32) -> String {
    let output = etcdctl(lab, &["lease", "grant", &seconds.to_string()]).assert_code(0);
    output.stdout.split_whitespace().nth(1).expect_ok("the id of an etcd lease").to_owned()
}

/// Writes a key attached to an etcd lease.
pub fn put_leased(lab: &Lab, key: &str, value: &str, lease: &str) {
    etcdctl(lab, &["put", &format!("--lease={lease}"), "--", key, value]).assert_code(0);
}

/// Deletes a key, which must exist.
pub fn delete(lab: &Lab, key: &str) {
    let output = etcdctl(lab, &["del", "--", key]).assert_code(0);
    assert_eq!(output.stdout.trim(), "1", "{key} is deleted");
}

/// Revokes an etcd lease, which deletes its keys.
pub fn revoke(lab: &Lab, lease: i64) {
    etcdctl(lab, &["lease", "revoke", &format!("{lease:x}")]).assert_code(0);
}

/// A key with its metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: String,
    /// The etcd lease; 0 for none.
    pub lease: i64,
    /// The revision of its creation.
    pub create_revision: i64,
    /// The revision of its last change.
    pub mod_revision: i64,
}

/// Every key below a prefix.
pub fn list(lab: &Lab, prefix: &str) -> Vec<Entry> {
    let answer: Value = etcdctl(lab, &["get", "--prefix", "-w", "json", "--", prefix]).assert_code(0).json();
    let number = |v: &Value, name: &str| v[name].as_i64().unwrap_or(0);
    answer["kvs"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
        .iter()
        .map(|kv| Entry {
            key: decode_base64(kv["key"].as_str().unwrap_or_default()),
            value: decode_base64(kv["value"].as_str().unwrap_or_default()),
            lease: number(kv, "lease"),
            create_revision: number(kv, "create_revision"),
            mod_revision: number(kv, "mod_revision"),
        })
        .collect()
}

/// All subnet leases of the overlay network.
pub fn leases(lab: &Lab) -> Vec<Entry> {
    list(lab, &lease_key(""))
}

/// Lease keys of free subnets of 10.244.0.0/16.
pub fn free_keys(lab: &Lab) -> [String; 3] {
    let taken = leases(lab);
    let keys = (1..=254).rev().map(|third| lease_key(&format!("10.244.{third}.0-24")));
    let free: Vec<String> = keys.filter(|key| taken.iter().all(|entry| entry.key != *key)).take(3).collect();
    free.try_into().ok().expect_ok("three free subnets")
}

/// The subnet lease whose value contains this text.
#[track_caller]
pub fn lease_with(lab: &Lab, text: &str) -> Entry {
    let all = leases(lab);
    let found = all.iter().find(|entry| entry.value.contains(text)).cloned();
    found.expect_ok(&format!("a lease with {text} in {all:#?}"))
}

/// The base of a /24 of 10.244.0.0/16 that no host has leased: the hosts' subnets are random.
pub fn free_subnet(lab: &Lab) -> String {
    let leases = leases(lab);
    let bases = (200..255).map(|third| format!("10.244.{third}.0"));
    let is_free = |base: &String| leases.iter().all(|lease| !lease.key.contains(base.as_str()));
    bases.into_iter().find(is_free).expect_ok("a free subnet")
}

/// The store's revision, which every write increases.
pub fn revision(lab: &Lab) -> i64 {
    let answer: Value = etcdctl(lab, &["get", "-w", "json", "no-such-key"]).assert_code(0).json();
    answer["header"]["revision"].as_i64().expect_ok("a revision")
}

/// Kills etcd with SIGKILL.
pub fn kill(lab: &Lab) {
    let id = ProcessId::from_pid_file(&lab::etcd::pid_file(lab.dir())).expect_ok("etcd's process id");
    id.signal(Signal::SIGKILL).expect_ok("SIGKILL to etcd");
    assert!(id.wait(TERM_GRACE), "etcd ends on SIGKILL");
}

/// Starts etcd again with its data.
pub async fn start(lab: &Lab) {
    lab::etcd::start(lab).await.expect_ok("etcd starts again");
}

/// Stops etcd (SIGSTOP) for some time: connections stay open without an answer.
pub async fn freeze(lab: &Lab, time: Duration) {
    let id = ProcessId::from_pid_file(&lab::etcd::pid_file(lab.dir())).expect_ok("etcd's process id");
    id.signal(Signal::SIGSTOP).expect_ok("SIGSTOP to etcd");
    tokio::time::sleep(time).await;
    id.signal(Signal::SIGCONT).expect_ok("SIGCONT to etcd");
}

/// Decodes base64 (RFC 4648 section 4), the encoding of keys and values in etcdctl's JSON.
fn decode_base64(text: &str) -> String {
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0u32, 0);
    for c in text.bytes() {
        let six = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => continue,
        };
        bits = bits << 6 | u32::from(six);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).unwrap_or(0));
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64_decodes_rfc_4648_values() {
        for (text, wanted) in [("", ""), ("YQ==", "a"), ("YWI=", "ab"), ("YWJj", "abc"), ("eyI/Ijoi8J+YgCJ9", r#"{"?":"😀"}"#)]
        {
            assert_eq!(super::decode_base64(text), wanted);
        }
    }
}
