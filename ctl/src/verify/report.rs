//! The result: for each ordered pair of networks the ways from one to the other.

use serde::{Deserialize, Serialize};

/// Result for an ordered pair of networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// No packet passes.
    Isolated,
    /// Packets pass only by ways that the networks are configured to have.
    ByDesign,
    /// Whether packets pass cannot be decided.
    Unknown,
    /// Packets pass by a way that no configuration has.
    Reachable,
}

/// A way from one network to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// What opens it: `published port 8080/tcp`, `Peers`, a route, a rule, a device.
    pub by: String,
    /// Whether the networks are configured to have it.
    pub by_design: bool,
    /// A packet that takes it; absent if frames pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packet: Option<String>,
    /// Its hops, in order.
    pub hops: Vec<WayHop>,
}

/// A hop of a way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WayHop {
    /// Namespace: `host`, `ov-NAME`, or the path of a container's.
    pub namespace: String,
    /// Device by which the packet leaves the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The route, rule or link.
    pub what: String,
}

/// Result for packets of one network to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// The sending network.
    pub from: String,
    /// The receiving network.
    pub to: String,
    /// Result.
    pub verdict: Verdict,
    /// The ways that were found.
    pub ways: Vec<Way>,
    /// What could not be decided.
    pub unknown: Vec<String>,
}

/// Result for this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The isolated networks of this host.
    pub networks: Vec<String>,
    /// The ordered pairs.
    pub pairs: Vec<Pair>,
}

impl Pair {
    /// The result of these findings.
    pub(super) fn new(from: String, to: String, ways: Vec<Way>, unknown: Vec<String>) -> Pair {
        let verdict = if ways.iter().any(|way| !way.by_design) {
            Verdict::Reachable
        } else if !unknown.is_empty() {
            Verdict::Unknown
        } else if ways.is_empty() {
            Verdict::Isolated
        } else {
            Verdict::ByDesign
        };
        Pair { from, to, verdict, ways, unknown }
    }
}
