//! A peer host, reduced to the fields that the data path needs.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Cidr, PeerEndpoint, PerFamily};

/// How one family of a peer's subnet is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteSubnet {
    /// The peer's range in the overlay.
    pub subnet: Cidr,
    /// The peer's underlay address.
    pub public_ip: IpAddr,
    /// What packets to it need besides that address; `None` if nothing.
    pub endpoint: Option<PeerEndpoint>,
}

/// A peer whose lease has passed every check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The peer's subnet and how it is reached, per family.
    pub remote_subnets: PerFamily<RemoteSubnet>,
}
