//! Which interface is the external one, and which addresses of it peers send to.

use std::net::IpAddr;

use crate::model::{Family, PerFamily};

/// The host's interfaces that are not ours, as the kernel lists them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// The links.
    pub links: Vec<ForeignLink>,
    /// Default routes, the preferred (lowest metric) first within each family.
    pub defaults: Vec<DefaultRoute>,
    /// Families in which iptables' FORWARD chain (`ip filter FORWARD`, `ip6 filter FORWARD`) has policy DROP, as Docker and ufw set it.
    pub forward_drops: Vec<Family>,
}

/// A link that is not ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignLink {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The loopback device.
    pub loopback: bool,
    /// Its addresses of global scope, permanent ones and those that are preferred first.
    pub addresses: Vec<IpAddr>,
}

/// A default route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefaultRoute {
    /// The family.
    pub family: Family,
    /// Interface index.
    pub interface: u32,
    /// Learned from a router advertisement: the host needs `accept_ra=2` to keep it once it forwards.
    pub from_router_advertisement: bool,
}

/// The chosen underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// Interface index of the external interface.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The address that peers send to, per family.
    pub public_ip: PerFamily<IpAddr>,
    /// The address that the VXLAN device has as source, per family: differs from `public_ip` behind NAT.
    pub local: PerFamily<IpAddr>,
    /// Whether the default IPv6 route of the interface lives from router advertisements.
    pub router_advertisements: bool,
}
