//! Errors as the specification has them: a code, a message, details.

use std::fmt;

use serde_json::{Value, json};

use super::version::Version;

/// The codes in use: below 100 the specification's, from 100 on ours. `docs/cni.md` has them for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The configuration's version is not served, or has no such verb.
    IncompatibleVersion = 1,
    /// A field of the configuration asks for what is not served; the message has its key and value.
    UnsupportedField = 2,
    /// The container's namespace is not there.
    UnknownContainer = 3,
    /// A variable of the environment is missing or wrong; the message has its name.
    InvalidEnvironment = 4,
    /// Standard input, or the agent's socket, cannot be used.
    Io = 5,
    /// The configuration is no JSON of the right shape.
    Decode = 6,
    /// The configuration says what cannot be.
    InvalidConfig = 7,
    /// The agent did not answer, or is not ready, in the time there is.
    TryAgain = 11,
    /// STATUS: no container can be attached now.
    NotAvailable = 50,
    /// The agent refuses a value.
    Refused = 100,
    /// What is asked for contradicts what is there: an address or port in use, a subnet that is full, an interface that exists.
    Conflict = 101,
    /// The agent or the kernel failed.
    Failed = 102,
    /// CHECK: the container is not as its attachment left it.
    Mismatch = 103,
}

/// Why a verb failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniError {
    /// The code.
    pub code: Code,
    /// The value, the place and the remedy.
    pub message: String,
    /// More of it, one thing a line; may be empty.
    pub details: String,
}

impl CniError {
    /// An error without details.
    pub fn new(code: Code, message: impl Into<String>) -> CniError {
        CniError { code, message: message.into(), details: String::new() }
    }

    /// The same with details.
    pub fn with_details(mut self, details: impl Into<String>) -> CniError {
        self.details = details.into();
        self
    }

    /// The error as a runtime reads it (`SPEC.md`, "Error").
    pub fn to_json(&self, version: Version) -> Value {
        let mut value = json!({ "cniVersion": version.as_str(), "code": self.code as u32, "msg": self.message });
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
