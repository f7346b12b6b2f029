//! One container's attachment to the overlay.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Mac, NetworkName, PerFamily, PublishedPort};

/// A container's attachment, as stored in the state directory and shown by `overlayctl endpoints`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The name, unique in the network on this host.
    pub name: EndpointName,
    /// Its overlay network; left out of the JSON if it is the default one.
    #[serde(default, skip_serializing_if = "NetworkName::is_default")]
    pub network: NetworkName,
    /// The container's network mode.
    #[serde(default)]
    pub mode: Mode,
    /// The path of its network namespace: the host's own in mode host, the other endpoint's in mode container.
    pub netns: PathBuf,
    /// Its veth pair to the bridge; only in mode overlay.
    #[serde(flatten)]
    pub port: Option<Port>,
    /// Host ports that are forwarded to it.
    #[serde(default)]
    pub published: Vec<PublishedPort>,
    /// Whether packets from it with a foreign source address or MAC are dropped. Off for routers and virtual addresses.
    #[serde(default = "yes")]
    pub source_check: bool,
    /// Whether its default route uses the overlay. Otherwise only a route to the overlay network does, and another network
    /// provides the default route.
    #[serde(default = "yes")]
    pub default_route: bool,
    /// The program that attached it, if any: text for `overlayctl endpoints`, and for the program to find its endpoints again.
    #[serde(default)]
    pub owner: Option<String>,
    /// Time of the attachment in seconds since the epoch.
    pub attached_at: u64,
}

fn yes() -> bool {
    true
}

impl Endpoint {
    /// An endpoint with this port on the bridge, and defaults otherwise.
    #[cfg(test)]
    pub fn on_bridge(name: &str, port: Port) -> Endpoint {
        Endpoint {
            name: name.parse().expect(name),
            network: NetworkName::default(),
            mode: Mode::Overlay,
            netns: PathBuf::from("/run/netns").join(name),
            port: Some(port),
            published: Vec::new(),
            source_check: true,
            default_route: true,
            owner: None,
            attached_at: 0,
        }
    }

    /// Its addresses in the host's subnet; empty except in mode overlay.
    pub fn addresses(&self) -> PerFamily<IpAddr> {
        self.port.as_ref().map(|port| port.addresses).unwrap_or_default()
    }

    /// Whether a published port has an address of this endpoint to forward to.
    pub fn has_address_for(&self, published: &PublishedPort) -> bool {
        published.has_effect(|family| self.addresses().get(family).is_some())
    }
}

/// An endpoint's veth pair: one end in the container, the other a port of the bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// The interface inside the namespace; default `eth0`.
    pub interface: String,
    /// The host's end of the veth pair, a port of the bridge.
    pub host_interface: String,
    /// The MAC of the inner interface.
    pub mac: Mac,
    /// The address in each family of the host's subnet.
    pub addresses: PerFamily<IpAddr>,
}

/// A container's network mode. As text: `overlay`, `none`, `host`, `container:NAME`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Mode {
    /// An interface on the bridge, with addresses of the host's subnet.
    #[default]
    Overlay,
    /// A namespace with loopback only.
    None,
    /// The host's own namespace; no interface is created.
    Host,
    /// The namespace of another endpoint.
    Container(EndpointName),
}

/// Error of parsing a [`Mode`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModeError {
    /// The text is none of the modes.
    #[error("`{text}` is not a mode: use overlay, none, host or container:NAME")]
    Unknown {
        /// The rejected text, cut to 80 characters.
        text: String,
    },
    /// The name after `container:` is invalid.
    #[error(transparent)]
    Name(#[from] EndpointNameError),
}

impl std::str::FromStr for Mode {
    type Err = ModeError;

    fn from_str(text: &str) -> Result<Self, ModeError> {
        match text {
            "overlay" => Ok(Mode::Overlay),
            "none" => Ok(Mode::None),
            "host" => Ok(Mode::Host),
            _ => match text.strip_prefix("container:") {
                Some(name) => Ok(Mode::Container(name.parse()?)),
                None => Err(ModeError::Unknown { text: super::text::printable(text) }),
            },
        }
    }
}

impl TryFrom<String> for Mode {
    type Error = ModeError;

    fn try_from(text: String) -> Result<Self, ModeError> {
        text.parse()
    }
}

impl From<Mode> for String {
    fn from(mode: Mode) -> String {
        mode.to_string()
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mode::Overlay => f.write_str("overlay"),
            Mode::None => f.write_str("none"),
            Mode::Host => f.write_str("host"),
            Mode::Container(name) => write!(f, "container:{name}"),
        }
    }
}

/// The name of an endpoint: 1 to 63 of `a-z A-Z 0-9 . _ -`, the first one a letter or digit. It is used as a file name
/// (`/run/netns/NAME`), so it must not contain a slash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EndpointName(String);

/// Error of parsing an [`EndpointName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no endpoint name: 1 to 63 of a-z A-Z 0-9 . _ - beginning with a letter or digit")]
pub struct EndpointNameError {
    /// The rejected text, cut to 80 characters.
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
            Err(EndpointNameError { text: super::text::printable(&text) })
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
