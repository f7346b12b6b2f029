//! Errors of a lab.

use std::path::PathBuf;
use std::time::Duration;

use overlay_agent::kernel::netns::NetnsError;
use overlay_agent::plan::OpError;

use crate::client::ClientError;
use crate::etcd::EtcdError;

/// Failure of an operation on a lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The options are invalid.
    #[error("{message}")]
    Options {
        /// The error, and the valid values.
        message: String,
    },
    /// A lab of that name exists.
    #[error("lab `{name}` exists ({}): remove it with `overlayctl lab down --name {name}`, or choose another --name", dir.display())]
    Exists {
        /// Name of the lab.
        name: String,
        /// Directory of the lab.
        dir: PathBuf,
    },
    /// No lab has that name.
    #[error("no lab `{name}`{}; start one: overlayctl lab up --name {name}", known_labs(known))]
    Missing {
        /// Requested name.
        name: String,
        /// Existing labs.
        known: Vec<String>,
    },
    /// The lab has no such host or container.
    #[error("lab `{lab}` has no `{target}`; it has {}", known.join(" "))]
    UnknownTarget {
        /// Name of the lab.
        lab: String,
        /// Requested target.
        target: String,
        /// Existing targets.
        known: Vec<String>,
    },
    /// Operation on a file of the lab.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// Attempted action.
        action: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// Error of the system call.
        source: std::io::Error,
    },
    /// The layout file is invalid.
    #[error("{} is damaged: {reason}. `overlayctl lab down` still removes the lab", path.display())]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// Reason.
        reason: String,
    },
    /// Network namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Operation on a link, address or route.
    #[error("{what}: {source}")]
    Link {
        /// Location.
        what: String,
        /// The kernel's error.
        source: OpError,
    },
    /// A program is not installed.
    #[error("{program} is not installed: {remedy}")]
    Program {
        /// Name of the program.
        program: String,
        /// How to install it.
        remedy: String,
    },
    /// A program cannot be started.
    #[error("cannot run {program}: {source}")]
    Spawn {
        /// Name or path of the program.
        program: String,
        /// Error of the system call.
        source: std::io::Error,
    },
    /// A program ended unexpectedly.
    #[error("{program} ended unexpectedly; the end of its log ({}):\n{tail}", log.display())]
    Ended {
        /// Name of the program.
        program: String,
        /// Path of its log.
        log: PathBuf,
        /// Last lines of its log.
        tail: String,
    },
    /// A condition was not met in time.
    #[error("{what} within {}: {detail}", humantime::format_duration(*limit))]
    TimedOut {
        /// The unmet condition.
        what: String,
        /// Timeout.
        limit: Duration,
        /// State at the timeout.
        detail: String,
    },
    /// Response of an agent.
    #[error("{host}: {source}")]
    Agent {
        /// Name of the host.
        host: String,
        /// The client's error.
        source: ClientError,
    },
    /// The private etcd.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// Namespaces cannot be created without root.
    #[error("cannot create a lab without root: {reason}. Run it as root (sudo overlayctl lab ...){advice}")]
    Rootless {
        /// Reason.
        reason: String,
        /// Setting that may allow it.
        advice: String,
    },
    /// The start failed, and the removal of the incomplete lab too.
    #[error("{error}\nremoving the incomplete lab failed too: {second}")]
    RollbackFailed {
        /// Error of the start.
        error: Box<LabError>,
        /// Error of the removal.
        second: Box<LabError>,
    },
    /// Objects of the lab remain.
    #[error("lab `{name}` is not completely removed:\n  {}", failures.join("\n  "))]
    NotRemoved {
        /// Name of the lab.
        name: String,
        /// Remaining objects, with the reason.
        failures: Vec<String>,
    },
}

fn known_labs(known: &[String]) -> String {
    if known.is_empty() { String::new() } else { format!(" (existing: {})", known.join(", ")) }
}
