//! The findings of a check.

use std::fmt::Display;

use serde::{Deserialize, Serialize};

/// Fill level from which a kernel table counts as nearly full, in percent.
pub(super) const FULL_WARNING_PERCENT: usize = 90;

/// Severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Information, or a check that could not run, with the reason.
    Info,
    /// The overlay works, but badly, or not for long.
    Warning,
    /// Traffic is lost.
    Error,
}

/// Result of a check that needs attention.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Name of the check, as in the report.
    pub check: String,
    /// Severity.
    pub severity: Severity,
    /// Summary on one line.
    pub summary: String,
    /// Evidence: a rule, a route, a measured value.
    pub evidence: Vec<String>,
    /// Remedy.
    pub remedy: String,
}

/// Collects the findings of one check.
#[derive(Debug)]
pub struct Findings {
    check: &'static str,
    items: Vec<Finding>,
}

impl Findings {
    /// Creates an empty collection for a check.
    pub fn for_check(check: &'static str) -> Findings {
        Findings { check, items: Vec::new() }
    }

    fn add(&mut self, severity: Severity, summary: impl Display, evidence: Vec<String>, remedy: impl Display) {
        let evidence = evidence.into_iter().filter(|line| !line.is_empty()).collect();
        let (summary, remedy) = (summary.to_string(), remedy.to_string());
        self.items.push(Finding { check: self.check.to_owned(), severity, summary, evidence, remedy });
    }

    /// Adds an error: traffic is lost.
    pub(super) fn error(&mut self, summary: impl Display, evidence: Vec<String>, remedy: impl Display) {
        self.add(Severity::Error, summary, evidence, remedy);
    }

    /// Adds a warning: the overlay works, but badly.
    pub(super) fn warning(&mut self, summary: impl Display, evidence: Vec<String>, remedy: impl Display) {
        self.add(Severity::Warning, summary, evidence, remedy);
    }

    /// Adds information.
    pub(super) fn info(&mut self, summary: impl Display, evidence: Vec<String>, remedy: impl Display) {
        self.add(Severity::Info, summary, evidence, remedy);
    }

    /// Returns the findings.
    pub fn into_vec(self) -> Vec<Finding> {
        self.items
    }
}
