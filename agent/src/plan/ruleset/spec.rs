//! A network's input of the rules in `inet overlayd`, and what follows from it.

use std::net::IpAddr;

use super::SetName;
use crate::model::{Device, Family, NetworkConfig, PerFamily, Subnet, Vni};
use crate::plan::isolation::{Isolation, Scope, Transit};

/// The UDP packets between hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tunnel {
    /// Their destination port.
    pub port: u16,
    /// The VNI of VXLAN packets, whose inner source address the rules check.
    pub vni: Option<Vni>,
}

/// A network's input of the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InetTableSpec {
    /// The network.
    pub network: NetworkConfig,
    /// The bridge of this host's containers.
    pub bridge: Device,
    /// This host's devices towards the peers of each family; none if packets take the external interface.
    pub devices: PerFamily<Device>,
    /// The UDP packets between hosts; `None` if packets are not encapsulated in UDP.
    pub tunnel: Option<Tunnel>,
    /// This host's subnet.
    pub subnet: Subnet,
    /// The source addresses of its VXLAN devices, per family.
    pub local: PerFamily<IpAddr>,
    /// Whether traffic that leaves the overlay gets the host's address.
    pub masquerade: bool,
    /// Whether ports are published. Without them, their chains are left out, so that no connection pays for them.
    pub publishes: bool,
    /// Whether the names of its tunnel sets end with its VNI; those of the default network do not.
    pub numbered_sets: bool,
    /// Which of the network's namespaces the table is in.
    pub scope: Scope,
    /// What an isolated network needs besides; `None` for a routed one.
    pub isolation: Option<Isolation>,
}

impl InetTableSpec {
    /// Whether the table is the host's, whose namespace has one end of an isolated network's transit and none of its containers.
    pub(super) fn is_host_end(&self) -> bool {
        self.scope == Scope::Host && self.isolation.is_some()
    }

    pub(super) fn transit(&self) -> Option<Transit> {
        self.isolation.as_ref()?.transit
    }

    pub(super) fn transit_device(&self) -> Device {
        Device::transit(self.bridge.vni)
    }

    /// The device that containers' packets come from: the bridge, or the transit of an isolated network.
    pub(super) fn inner_device(&self) -> Option<Device> {
        if self.is_host_end() { self.transit().map(|_| self.transit_device()) } else { Some(self.bridge) }
    }

    /// The device from which replies to the host's loopback addresses come; `None` without published ports.
    pub fn loopback_device(&self) -> Option<Device> {
        self.inner_device().filter(|_| self.publishes && self.scope == Scope::Host)
    }

    /// The VNI of its tunnel, whose inner source address the rules check; `None` if there is none. The outer packets are in the
    /// host's namespace.
    pub(super) fn vni(&self) -> Option<Vni> {
        self.tunnel.filter(|_| self.scope == Scope::Host)?.vni
    }

    /// Its sets in the tunnel source filter, and those of its peer networks to which it adds elements.
    pub(super) fn all_tunnel_sets(&self) -> Vec<SetName> {
        let own = self.network.families().flat_map(|family| self.tunnel_sets(family, 0)).map(|(set, _)| set);
        let peers = self.isolation.iter().flat_map(|isolation| &isolation.peers);
        let of_peers = peers.flat_map(|peer| {
            let common = self.network.families().filter(|family| peer.ranges.get(*family).is_some());
            common.map(|family| SetName::Ranges(family).of_network(Some(peer.vni)))
        });
        own.chain(of_peers).collect()
    }

    /// The network's sets in the tunnel source filter of a family, with the length of their inner source's prefix.
    pub(super) fn tunnel_sets(&self, family: Family, subnet_length: u8) -> impl Iterator<Item = (SetName, u8)> {
        let (vni, bits) = (self.vni().filter(|_| self.numbered_sets), family.bits());
        let hosts = (!self.masquerade).then_some((SetName::Hosts(family), bits));
        let sets = [Some((SetName::Peers(family), subnet_length)), hosts, Some((SetName::Ranges(family), bits))];
        sets.into_iter().flatten().map(move |(set, length)| (set.of_network(vni), length))
    }
}
