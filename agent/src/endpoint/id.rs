//! Identity of an endpoint among those of all networks.

use std::fmt;

use crate::model::endpoint::EndpointName;
use crate::model::{Endpoint, NetworkName};

/// An endpoint of any network of this host. As text: `NAME`, or `NAME of network NETWORK`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct EndpointId {
    /// Its network.
    pub network: NetworkName,
    /// Its name in the network.
    pub name: EndpointName,
}

impl EndpointId {
    /// The identity of an endpoint.
    pub(super) fn of(endpoint: &Endpoint) -> EndpointId {
        EndpointId { network: endpoint.network.clone(), name: endpoint.name.clone() }
    }

    /// The command that detaches it.
    pub(super) fn detach_command(&self) -> String {
        let network = if self.network.is_default() { String::new() } else { format!(" --network {}", self.network) };
        format!("overlayctl detach {}{network}", self.name)
    }
}

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EndpointId { network, name } = self;
        if network.is_default() { name.fmt(f) } else { write!(f, "{name} of network {network}") }
    }
}
