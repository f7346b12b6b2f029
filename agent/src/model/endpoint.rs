//! One container's attachment to the overlay.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Mac, PerFamily};

/// A container's attachment, as it is kept in the state directory and shown by `overlayctl endpoints`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The name, unique on the host.
    pub name: EndpointName,
    /// The path of its network namespace.
    pub netns: PathBuf,
    /// The interface inside the namespace; `eth0` unless asked otherwise.
    pub interface: String,
    /// The host's end of the veth pair, a port of the bridge.
    pub host_interface: String,
    /// The MAC of the inner interface.
    pub mac: Mac,
    /// The address in each family of the host's subnet.
    pub addresses: PerFamily<IpAddr>,
    /// Seconds since the epoch at which it was attached.
    pub attached_at: u64,
}

/// The name of an endpoint: 1 to 63 of `a-z A-Z 0-9 . _ -`, the first one a letter or digit. It is used as a file name
/// (`/run/netns/NAME`), so it can hold no slash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EndpointName(String);

/// Why a text is no [`EndpointName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no endpoint name: 1 to 63 of a-z A-Z 0-9 . _ - beginning with a letter or digit")]
pub struct EndpointNameError {
    /// The refused text, cut to 80 characters.
    pub text: String,
}

impl EndpointName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for EndpointName {
    type Error = EndpointNameError;

    fn try_from(text: String) -> Result<Self, EndpointNameError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let first = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if first && text.len() <= 63 && text.chars().all(allowed) {
            Ok(EndpointName(text))
        } else {
            Err(EndpointNameError { text: super::lease::printable(&text) })
        }
    }
}

impl std::str::FromStr for EndpointName {
    type Err = EndpointNameError;

    fn from_str(text: &str) -> Result<Self, EndpointNameError> {
        EndpointName::try_from(text.to_owned())
    }
}

impl From<EndpointName> for String {
    fn from(name: EndpointName) -> String {
        name.0
    }
}

impl fmt::Display for EndpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
