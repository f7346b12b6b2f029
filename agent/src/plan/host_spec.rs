//! The inputs of this host's desired state. `desired` computes the entries, with what the network's backend adds.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::isolation::Isolation;
use super::underlay::Underlay;
use crate::model::{BackendData, Endpoint, Mac, NetworkConfig, Subnet};

/// Inputs of this host's desired state, without the peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSpec {
    /// The network.
    pub network: NetworkConfig,
    /// The subnet of this host.
    pub subnet: Subnet,
    /// The external interface.
    pub underlay: Underlay,
    /// What this host's lease carries.
    pub backend_data: BackendData,
    /// The MAC of the bridge.
    pub bridge_mac: Mac,
    /// Whether packets that leave the overlay are masqueraded with the host's address.
    pub masquerade: bool,
    /// Whether the names of the network's tunnel sets end with its VNI; those of the default network do not.
    pub numbered_sets: bool,
    /// Transmit checksum offload on the VXLAN devices.
    pub tx_checksum: bool,
    /// Whether Docker attaches containers to the bridge, in addition to the endpoints.
    pub docker: bool,
    /// The endpoints that have a port on the bridge, by name.
    pub ports: Vec<Arc<Endpoint>>,
    /// Underlay addresses in the overlay's leasable range that this host depends on.
    pub reserved: BTreeSet<IpAddr>,
    /// What an isolated network needs besides; `None` for a routed one.
    pub isolation: Option<Isolation>,
}

impl HostSpec {
    /// Whether packets that leave the overlay are masqueraded. Nothing outside could answer an isolated network's containers, so
    /// theirs always are.
    pub fn masquerades(&self) -> bool {
        self.masquerade || self.isolation.is_some()
    }

    /// Whether its containers' packets pass the host's namespace.
    pub fn has_way_out(&self) -> bool {
        self.isolation.as_ref().is_none_or(|isolation| isolation.transit.is_some())
    }
}
