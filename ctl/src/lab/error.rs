//! What can go wrong with a lab.

use std::path::PathBuf;
use std::time::Duration;

use overlay_agent::kernel::netns::NetnsError;
use overlay_agent::plan::OpError;

use crate::client::ClientError;
use crate::etcd::EtcdError;

/// Why a lab does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The options make no lab.
    #[error("{message}")]
    Options {
        /// What is wrong, and what is allowed.
        message: String,
    },
    /// There is one of that name.
    #[error("lab `{name}` is there already ({}): take it down with `overlayctl lab down --name {name}`, or choose another --name", dir.display())]
    Exists {
        /// Its name.
        name: String,
        /// Its directory.
        dir: PathBuf,
    },
    /// There is none of that name.
    #[error("there is no lab `{name}`{}. Bring one up: overlayctl lab up --name {name}", known_labs(known))]
    Missing {
        /// The name asked for.
        name: String,
        /// The labs that are there.
        known: Vec<String>,
    },
    /// There is no such host or container.
    #[error("lab `{lab}` has no `{target}`; it has {}", known.join(" "))]
    UnknownTarget {
        /// The lab.
        lab: String,
        /// What was asked for.
        target: String,
        /// What is there.
        known: Vec<String>,
    },
    /// A file of the lab.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The description of the lab cannot be read.
    #[error("{} is damaged: {reason}. `overlayctl lab down` removes the lab all the same", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A network namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A link, address or route.
    #[error("{what}: {source}")]
    Link {
        /// Where.
        what: String,
        /// The kernel's answer.
        source: OpError,
    },
    /// A program is not there.
    #[error("{program} is not installed: {remedy}")]
    Program {
        /// Its name.
        program: String,
        /// How to get it.
        remedy: String,
    },
    /// A program cannot be started.
    #[error("cannot run {program}: {source}")]
    Spawn {
        /// Its name or path.
        program: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// A program ended that should run.
    #[error("{program} ended by itself; the end of its log ({}):\n{tail}", log.display())]
    Ended {
        /// Which.
        program: String,
        /// Its log.
        log: PathBuf,
        /// The last lines.
        tail: String,
    },
    /// Something is not the case in time.
    #[error("{what} within {}: {detail}", humantime::format_duration(*limit))]
    TimedOut {
        /// What is not the case.
        what: String,
        /// The time allowed.
        limit: Duration,
        /// How it stands.
        detail: String,
    },
    /// An agent's answer.
    #[error("{host}: {source}")]
    Agent {
        /// The host.
        host: String,
        /// The answer.
        source: ClientError,
    },
    /// The private etcd.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// No namespaces without root.
    #[error("cannot make a lab without root: {reason}. Run it as root (sudo overlayctl lab ...){advice}")]
    Rootless {
        /// What happened.
        reason: String,
        /// What may be switched off.
        advice: String,
    },
    /// Bringing up failed, and so did taking down what was made.
    #[error("{error}\nand taking down what was made failed too: {second}")]
    RollbackFailed {
        /// The first error.
        error: Box<LabError>,
        /// The second one.
        second: Box<LabError>,
    },
    /// Something stays behind.
    #[error("lab `{name}` is not wholly removed:\n  {}", failures.join("\n  "))]
    NotRemoved {
        /// The lab.
        name: String,
        /// What stays, and why.
        failures: Vec<String>,
    },
}

fn known_labs(known: &[String]) -> String {
    if known.is_empty() { String::new() } else { format!(" (there is {})", known.join(", ")) }
}
