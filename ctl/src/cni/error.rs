//! Errors in the specification's format: code, message, details.

use std::fmt;

use serde_json::{Value, json};

/// Error codes: below 100 the specification's, from 100 on this plugin's. `docs/cni.md` documents them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The configuration's version is unsupported, or has no such verb.
    IncompatibleVersion = 1,
    /// A field of the configuration requests an unsupported feature; the message has its key and value.
    UnsupportedField = 2,
    /// The container's namespace does not exist.
    UnknownContainer = 3,
    /// An environment variable is missing or invalid; the message has its name.
    InvalidEnvironment = 4,
    /// Standard input or the agent's socket is unusable.
    Io = 5,
    /// The configuration is not JSON of the expected structure.
    Decode = 6,
    /// The configuration has an invalid value.
    InvalidConfig = 7,
    /// The agent did not answer, or was not ready, before the deadline.
    TryAgain = 11,
    /// STATUS: no container can be attached at present.
    NotAvailable = 50,
    /// The agent rejects a value.
    Refused = 100,
    /// The request conflicts with existing state: an address or port in use, a full subnet, an existing interface.
    Conflict = 101,
    /// The agent or the kernel failed.
    Failed = 102,
    /// CHECK: the container differs from its attachment.
    Mismatch = 103,
}

/// Failure of a verb.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniError {
    /// Error code.
    pub code: Code,
    /// The value, its location and the remedy.
    pub message: String,
    /// Further details, one per line; may be empty.
    pub details: String,
}

impl CniError {
    /// Creates an error without details.
    pub fn new(code: Code, message: impl Into<String>) -> CniError {
        CniError { code, message: message.into(), details: String::new() }
    }

    /// Adds details.
    pub fn with_details(mut self, details: impl Into<String>) -> CniError {
        self.details = details.into();
        self
    }

    /// Formats the error as JSON (`SPEC.md`, "Error"), for that `cniVersion`.
    pub fn to_json(&self, version: &str) -> Value {
        let mut value = json!({ "cniVersion": version, "code": self.code as u32, "msg": self.message });
        if !self.details.is_empty() {
            value["details"] = self.details.clone().into();
        }
        value
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.message, self.code as u32)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, ": {}", self.details.replace('\n', "; ")) }
    }
}

impl std::error::Error for CniError {}
