//! Names of overlay networks, and of the network namespaces that they live in.

use std::fmt;
use std::sync::Arc;

/// The name of an overlay network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkName(Arc<str>);

impl Default for NetworkName {
    /// The network whose configuration is under `<prefix>/config`.
    fn default() -> Self {
        NetworkName("default".into())
    }
}

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
