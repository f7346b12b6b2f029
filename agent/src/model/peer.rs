//! A peer host, reduced to the fields that the data path needs.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Cidr, Mac, PerFamily};

/// How one family of a peer's subnet is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteSubnet {
    /// The peer's range in the overlay.
    pub subnet: Cidr,
    /// The peer's underlay address.
    pub public_ip: IpAddr,
    /// The MAC of the peer's VXLAN device.
    pub vtep: Mac,
}

/// A peer whose lease has passed every check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The peer's subnet and its tunnel endpoint, per family.
    pub remote_subnets: PerFamily<RemoteSubnet>,
}
