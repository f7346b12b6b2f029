//! The doctor: looks at what on this host stands in the way of the overlay, with evidence and a remedy for each finding. It changes nothing.
//!
//! This file is the engine: what a finding is, which families of checks there are, how they are run. Each family has a file of its own and reads what
//! it needs through [`Facts`].
//!
//! | file | looks at |
//! | --- | --- |
//! | `agent` | whether it answers, what it says itself, its rights |
//! | `fake_kernel` | features, tried in a network namespace of its own; sysctls; the connection table |
//! | `inject_store_fault` | etcd: reachable, version, TLS, clock |
//! | `addresses` | the overlay's ranges against routes, Docker's networks, resolvers; reverse path filters |
//! | `firewall` | rules that drop the tunnel or forwarding |
//! | `paths` | every peer: MTU end to end, checksums and segmentation, by real packets |
//! | `neighbours` | who else manages our devices: NetworkManager, systemd-networkd, flannel |
//! | `endpoint_count` | the containers: agent, state directory and kernel agree |

mod addresses;
mod agent;
mod endpoints;
mod facts;
mod firewall;
mod kernel;
mod neighbours;
mod paths;
mod store;

use std::fmt::Display;
use std::time::Instant;

use serde::{Deserialize, Serialize};

pub(crate) use facts::read_net_stat;
pub use facts::{Facts, Settings};

/// The part of a table of the kernel, in percent, from which on it is called nearly full.
const FULL_WARNING_PERCENT: usize = 90;

/// The version of the report's JSON. Within a version fields and checks are only ever added.
pub const VERSION: u32 = 1;

/// How grave a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing; or what could not be looked at, and why.
    Info,
    /// Works, but not well, or not for long.
    Warning,
    /// Traffic is lost.
    Error,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The family of checks, as in [`Report::checks`].
    pub check: String,
    /// How grave it is.
    pub severity: Severity,
    /// What is the matter, in one line.
    pub summary: String,
    /// What was seen: a rule, a route, a measured value.
    pub evidence: Vec<String>,
    /// What to do about it.
    pub remedy: String,
}

/// One family of checks, as it was run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckResult {
    /// Its name.
    pub name: String,
    /// What it looks at.
    pub about: String,
    /// The gravest of its findings; absent where there is none.
    pub worst: Option<Severity>,
    /// How long it took, in milliseconds.
    pub milliseconds: u64,
}

/// What the doctor says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// The gravest finding; absent where there is none.
    pub worst: Option<Severity>,
    /// The families, in the order in which they were run.
    pub checks: Vec<CheckResult>,
    /// What was found, the gravest first.
    pub findings: Vec<Finding>,
}

/// Takes findings of one family.
#[derive(Debug)]
pub struct Findings {
    check: &'static str,
    items: Vec<Finding>,
}

impl Findings {
    /// Of a family, none yet.
    pub fn for_check(check: &'static str) -> Findings {
        Findings { check, items: Vec::new() }
    }

    fn add(&mut self, severity: Severity, summary: impl Display, evidence: Vec<String>, remedy: impl Display) {
        let evidence = evidence.into_iter().filter(|line| !line.is_empty()).collect();
        let (summary, remedy) = (summary.to_string(), remedy.to_string());
        self.items.push(Finding { check: self.check.to_owned(), severity, summary, evidence, remedy });
    }

    /// Traffic is lost.
    fn error(&mut self, summary: impl Display, evidence: Vec<String>, remedy: impl Display) {
        self.add(Severity::Error, summary, evidence, remedy);
    }

    /// Works, but not well.
    fn warning(&mut self, summary: impl Display, evidence: Vec<String>, remedy: impl Display) {
        self.add(Severity::Warning, summary, evidence, remedy);
    }

    /// Worth knowing.
    fn info(&mut self, summary: impl Display, evidence: Vec<String>, remedy: impl Display) {
        self.add(Severity::Info, summary, evidence, remedy);
    }

    /// The findings.
    pub fn into_vec(self) -> Vec<Finding> {
        self.items
    }
}

/// The families: name, and what each looks at.
const CHECKS: [(&str, &str); 8] = [
    ("agent", "the agent answers, and has the rights that it needs"),
    ("kernel", "features, sysctls, connection table"),
    ("store", "etcd: reachable, version, TLS, clock"),
    ("addresses", "the overlay's ranges beside the host's routes, reverse path filters"),
    ("firewall", "rules that drop the tunnel or forwarding"),
    ("paths", "peers: MTU, checksums, segmentation, by real packets"),
    ("neighbours", "NetworkManager, systemd-networkd, flannel"),
    ("endpoints", "containers: agent, state directory and kernel agree"),
];

/// The names of all families.
pub fn names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().map(|(name, _)| *name)
}

/// Runs the families; those named, or all where none is.
pub async fn run(settings: Settings, only: &[String]) -> Report {
    let facts = Facts::gather(settings).await;
    let mut report = Report { version: VERSION, worst: None, checks: Vec::new(), findings: Vec::new() };
    for (name, about) in CHECKS {
        if !only.is_empty() && !only.iter().any(|wanted| wanted == name) {
            continue;
        }
        let begun = Instant::now();
        let mut findings = Findings::for_check(name);
        match name {
            "agent" => agent::check(&facts, &mut findings).await,
            "kernel" => kernel::check(&facts, &mut findings).await,
            "store" => store::check(&facts, &mut findings).await,
            "addresses" => addresses::check(&facts, &mut findings).await,
            "firewall" => firewall::check(&facts, &mut findings).await,
            "paths" => paths::check(&facts, &mut findings).await,
            "neighbours" => neighbours::check(&facts, &mut findings).await,
            _ => endpoints::check(&facts, &mut findings),
        }
        let found = findings.into_vec();
        report.checks.push(CheckResult {
            name: name.to_owned(),
            about: about.to_owned(),
            worst: found.iter().map(|finding| finding.severity).max(),
            milliseconds: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        report.findings.extend(found);
    }
    report.findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    report.worst = report.findings.first().map(|finding| finding.severity);
    report
}
