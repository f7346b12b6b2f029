//! Diagnosis of this host: findings with evidence and a remedy each. It changes nothing.
//!
//! This file is the engine: the list of checks, and their execution. Each check has its own file and reads its
//! input from [`Facts`].
//!
//! | file | checks |
//! | --- | --- |
//! | `agent` | whether the agent answers, its reported problems, its capabilities |
//! | `kernel` | features, tried in a temporary network namespace; sysctls; the connection table |
//! | `store` | etcd: reachable, version, TLS, clock |
//! | `addresses` | the overlay's ranges against routes, Docker's networks, resolvers; reverse path filters |
//! | `firewall` | rules that drop the tunnel or forwarding |
//! | `paths` | every peer: MTU end to end, checksums and segmentation, by real packets |
//! | `neighbours` | other managers of the agent's devices: NetworkManager, systemd-networkd, flannel |
//! | `endpoints` | the containers: agent, state directory and kernel agree |
//! | `networks` | the namespaces of isolated networks, and ways between them |

mod addresses;
mod agent;
mod endpoints;
mod facts;
mod findings;
mod firewall;
mod kernel;
mod neighbours;
mod networks;
mod paths;
mod store;

use std::time::Instant;

use serde::{Deserialize, Serialize};

pub(crate) use addresses::route_collisions;
pub(crate) use facts::read_net_stat;
pub use facts::{Facts, Settings};
pub use findings::{Finding, Findings, Severity};

/// Version of the report's JSON. Within a version fields and checks are only added.
pub const VERSION: u32 = 1;

/// Result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckResult {
    /// Name of the check.
    pub name: String,
    /// Subject of the check.
    pub about: String,
    /// Highest severity of its findings; absent without findings.
    pub worst: Option<Severity>,
    /// Duration in milliseconds.
    pub milliseconds: u64,
}

/// Report of all checks that ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// Highest severity; absent without findings.
    pub worst: Option<Severity>,
    /// Checks, in the order of their execution.
    pub checks: Vec<CheckResult>,
    /// Findings, highest severity first.
    pub findings: Vec<Finding>,
}

/// Name and subject of each check.
const CHECKS: [(&str, &str); 9] = [
    ("agent", "the agent answers and has its capabilities"),
    ("kernel", "features, sysctls, connection table"),
    ("store", "etcd: reachable, version, TLS, clock"),
    ("addresses", "the overlay's ranges against the host's routes, reverse path filters"),
    ("firewall", "rules that drop the tunnel or forwarding"),
    ("paths", "peers: MTU, checksums, segmentation, by real packets"),
    ("neighbours", "NetworkManager, systemd-networkd, flannel"),
    ("endpoints", "containers: agent, state directory and kernel agree"),
    ("networks", "isolated networks: their namespaces, and ways between them"),
];

/// Names of all checks.
pub fn names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().map(|(name, _)| *name)
}

/// Runs the named checks, or all if none is named.
pub async fn run(settings: Settings, only: &[String]) -> Report {
    let facts = Facts::gather(settings).await;
    let mut report = Report { version: VERSION, worst: None, checks: Vec::new(), findings: Vec::new() };
    for (name, about) in CHECKS {
        if !only.is_empty() && !only.iter().any(|wanted| wanted == name) {
            continue;
        }
        let start = Instant::now();
        let mut findings = Findings::for_check(name);
        match name {
            "agent" => agent::check(&facts, &mut findings).await,
            "kernel" => kernel::check(&facts, &mut findings).await,
            "store" => store::check(&facts, &mut findings).await,
            "addresses" => addresses::check(&facts, &mut findings).await,
            "firewall" => firewall::check(&facts, &mut findings).await,
            "paths" => paths::check(&facts, &mut findings).await,
            "neighbours" => neighbours::check(&facts, &mut findings),
            "endpoints" => endpoints::check(&facts, &mut findings),
            _ => networks::check(&facts, &mut findings),
        }
        let found = findings.into_vec();
        report.checks.push(CheckResult {
            name: name.to_owned(),
            about: about.to_owned(),
            worst: found.iter().map(|finding| finding.severity).max(),
            milliseconds: u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        report.findings.extend(found);
    }
    report.findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    report.worst = report.findings.first().map(|finding| finding.severity);
    report
}
