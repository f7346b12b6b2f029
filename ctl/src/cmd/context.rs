//! What every command gets, and what it returns.

use std::path::PathBuf;

use crate::bundle::BundleError;
use crate::client::{Client, ClientError};
use crate::docker::DockerError;
use crate::etcd::EtcdError;
use crate::lab::LabError;
use crate::netns::NamespaceError;
use crate::output::{OutputError, Printer};
use crate::resolver::ResolverError;
use crate::trace::TraceError;
use crate::verify::VerifyError;

/// Shared input of every command.
#[derive(Debug)]
pub struct Context {
    /// Client of the agent.
    pub client: Client,
    /// Standard output.
    pub printer: Printer,
}

/// Result of a command that ran to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Exit code 0.
    Ok,
    /// Exit code 1: the answer is negative.
    Negative,
    /// Exit code 3.
    Degraded,
    /// Exit code 4.
    TimedOut,
    /// Exit code of a command that ran inside a lab or a container.
    Code(u8),
}

/// Failure of a command.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Request to the agent.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Request to etcd.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// Lab.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// Network namespace.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// Resolver file.
    #[error(transparent)]
    Resolver(#[from] ResolverError),
    /// Support archive.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Packet trace.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// Proof of isolation.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// Docker's options.
    #[error(transparent)]
    Docker(#[from] DockerError),
    /// Standard output.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A file that the command line names cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system call.
        source: std::io::Error,
    },
    /// A file or directory cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system call.
        source: std::io::Error,
    },
    /// The named object does not exist.
    #[error("{message}")]
    Missing {
        /// The missing object and how to list the existing ones.
        message: String,
    },
    /// An object is in use.
    #[error("{message}")]
    InUse {
        /// The object, what uses it, and the remedy.
        message: String,
    },
    /// The arguments are well-formed but conflict; exit code 2.
    #[error("{message}")]
    Usage {
        /// The conflict and the remedy.
        message: String,
    },
}
