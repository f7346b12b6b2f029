//! Names of overlay networks, and of the network namespaces that they live in.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::text::printable;

/// The name of an overlay network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NetworkName(Arc<str>);

/// The name of the default network.
const DEFAULT: &str = "default";

/// Longest name, in bytes: with its prefix it is the name of a network namespace and part of host names.
const MAX_LENGTH: usize = 32;

/// A text that is no network name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "network name `{text}` is not a DNS label of 1 to {MAX_LENGTH} characters: use `a` to `z`, `0` to `9`, and `-` except at \
     either end"
)]
pub struct NetworkNameError {
    /// The rejected text.
    pub text: String,
}

impl NetworkName {
    /// Whether this is the network whose configuration is under `<prefix>/config`.
    pub fn is_default(&self) -> bool {
        self.as_str() == DEFAULT
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NetworkName {
    type Err = NetworkNameError;

    /// RFC 1123's label in lower case, because names are compared byte by byte.
    fn from_str(text: &str) -> Result<Self, NetworkNameError> {
        let is_allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let valid = (1..=MAX_LENGTH).contains(&text.len())
            && text.bytes().all(is_allowed)
            && !text.starts_with('-')
            && !text.ends_with('-');
        if valid { Ok(NetworkName(text.into())) } else { Err(NetworkNameError { text: printable(text) }) }
    }
}

impl Default for NetworkName {
    /// The network whose configuration is under `<prefix>/config`.
    fn default() -> Self {
        NetworkName(DEFAULT.into())
    }
}

impl TryFrom<String> for NetworkName {
    type Error = NetworkNameError;

    fn try_from(text: String) -> Result<Self, NetworkNameError> {
        text.parse()
    }
}

impl From<NetworkName> for String {
    fn from(name: NetworkName) -> String {
        name.to_string()
    }
}

/// For tests: without a check.
#[cfg(test)]
impl From<&str> for NetworkName {
    fn from(name: &str) -> Self {
        NetworkName(name.into())
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A network namespace with overlay networks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NamespaceName {
    /// The host's, for all routed networks.
    Host,
    /// That of an isolated network.
    Network(NetworkName),
}

impl fmt::Display for NamespaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NamespaceName::Host => f.write_str("the host's namespace"),
            NamespaceName::Network(network) => write!(f, "the namespace of network {network}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_name_is_a_dns_label() {
        let longest = "a".repeat(MAX_LENGTH);
        for text in ["blue", "a", "0", "team-1", "default", &longest] {
            assert_eq!(text.parse::<NetworkName>().expect(text).to_string(), text);
        }
        let too_long = "a".repeat(MAX_LENGTH + 1);
        for text in ["", "-a", "a-", "Blue", "a.b", "a/b", "a_b", "a b", "bl\u{fc}", "a\n", &too_long] {
            let error = text.parse::<NetworkName>().expect_err(text).to_string();
            assert!(error.contains("1 to 32 characters") && !error.contains('\n'), "{error}");
        }
        assert!(NetworkName::default().is_default() && !NetworkName::from("blue").is_default());
    }
}
