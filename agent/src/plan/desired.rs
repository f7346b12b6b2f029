//! What the kernel should hold: a pure function of the network's configuration, this host's lease, the underlay, the peers and the
//! endpoints.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::ruleset::ruleset;
use super::state::{Key, LinkKind, LinkState, NEXTHOP_IDS, State, Value, Via, Vxlan};
use super::underlay::Underlay;
use crate::model::{Device, Family, Mac, NetworkConfig, Peer, PerFamily, Role, Subnet};

/// Everything about this host that its kernel state follows from, peers aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The network.
    pub network: NetworkConfig,
    /// The subnet that this host holds.
    pub subnet: Subnet,
    /// The external interface.
    pub underlay: Underlay,
    /// The MACs of the VXLAN devices.
    pub vtep: PerFamily<Mac>,
    /// The MAC of the bridge.
    pub bridge_mac: Mac,
    /// Whether what leaves the overlay gets the host's address.
    pub masquerade: bool,
    /// Transmit checksum offload on the VXLAN devices.
    pub tx_checksum: bool,
    /// Whether the kernel has next-hop objects and they are to be used.
    pub nexthop_objects: bool,
    /// The host's ends of the endpoints' veth pairs.
    pub ports: Vec<String>,
    /// Families in which iptables' FORWARD chain drops what nobody accepts.
    pub forward_drops: Vec<Family>,
}

impl Host {
    /// The families that the network has and this host holds a subnet of.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        self.network.families().filter(|family| self.subnet.get(*family).is_some())
    }

    /// Whether what peers need, and which leases count, is the same for both: they differ in what concerns this host alone.
    pub fn has_peers_of(&self, other: &Host) -> bool {
        self.network == other.network
            && self.subnet == other.subnet
            && self.underlay.public_ip == other.underlay.public_ip
            && self.vtep == other.vtep
            && self.nexthop_objects == other.nexthop_objects
    }

    /// MTU of a family's VXLAN device in bytes: the underlay's less the encapsulation.
    pub fn vxlan_mtu(&self, family: Family) -> u32 {
        self.network.vxlan.mtu.unwrap_or(self.underlay.mtu).saturating_sub(family.vxlan_overhead())
    }

    /// MTU of the bridge and the containers in bytes: the smallest of the families', since one interface carries them all.
    pub fn mtu(&self) -> u32 {
        self.families().map(|family| self.vxlan_mtu(family)).min().unwrap_or(self.underlay.mtu)
    }

    /// What the kernel should hold whoever the peers are.
    pub fn entries(&self) -> State {
        let vni = self.network.vxlan.vni;
        let bridge = Device::bridge(vni);
        let mut state = State::new();
        for family in self.families() {
            let device = Device::vxlan(family, vni);
            if let (Some(local), Some(mac)) = (self.underlay.local.get(family), self.vtep.get(family)) {
                let vxlan = Vxlan {
                    vni,
                    port: self.network.vxlan.port,
                    local: *local,
                    underlay: self.underlay.index,
                    learning: false,
                    tx_checksum: self.tx_checksum,
                };
                let link = LinkState {
                    kind: LinkKind::Vxlan(vxlan),
                    mac: Some(*mac),
                    mtu: self.vxlan_mtu(family),
                    up: true,
                    master: None,
                };
                state.insert(Key::Link(device.name()), Value::Link(Box::new(link)));
            }
            if let Some(subnet) = self.subnet.get(family) {
                state.insert(Key::Address(device, IpNetwork::from(subnet.base())), Value::Address);
                if let Some(gateway) = subnet.nth(1).and_then(|a| IpNetwork::new(a, subnet.length()).ok()) {
                    state.insert(Key::Address(bridge, gateway), Value::Address);
                }
            }
            if family == Family::V6 {
                // A router needs a link-local address to ask for neighbours (RFC 4861 section 4.3). The kernel would make this very one
                // and then wait for duplicate address detection; made by us it works at once.
                if let Ok(address) = IpNetwork::new(link_local(self.bridge_mac), 64) {
                    state.insert(Key::Address(bridge, address), Value::Address);
                }
            }
            for path in forwarding(family) {
                state.insert(Key::Sysctl((*path).to_owned()), Value::Sysctl("1".to_owned()));
            }
        }
        // What we create takes no router advertisement, neither from a container nor through the tunnel; also where the network has no
        // IPv6, because the host may have it.
        for device in self.families().map(|family| Device::vxlan(family, vni)).chain([bridge]) {
            state.insert(Key::Sysctl(format!("ipv6/conf/{device}/accept_ra")), Value::Sysctl("0".to_owned()));
        }
        if self.underlay.router_advertisements && self.families().any(|family| family == Family::V6) {
            // A host that forwards ignores advertisements unless told otherwise: its default route would run out.
            let path = format!("ipv6/conf/{}/accept_ra", self.underlay.name);
            state.insert(Key::Sysctl(path), Value::Sysctl("2".to_owned()));
        }
        let link = |kind, mac, master| Value::Link(Box::new(LinkState { kind, mac, mtu: self.mtu(), up: true, master }));
        state.insert(Key::Link(bridge.name()), link(LinkKind::Bridge, Some(self.bridge_mac), None));
        for port in &self.ports {
            state.insert(Key::Link(port.clone()), link(LinkKind::Port, None, Some(bridge)));
        }
        state.insert(Key::Ruleset, Value::Ruleset(Box::new(ruleset(&self.network, self.masquerade))));
        for family in &self.forward_drops {
            if let Some(network) = self.network.network(*family) {
                state.insert(Key::ForwardAccept(*family), Value::ForwardAccept(network));
            }
        }
        state
    }

    /// What the kernel should hold for a peer: four entries a family, three with classic routes.
    pub fn peer_entries(&self, peer: &Peer, ids: &mut NexthopIds) -> Vec<(Key, Value)> {
        let mut entries = Vec::with_capacity(8);
        for family in self.families() {
            let Some(reach) = peer.reach.get(family) else { continue };
            let device = Device { role: Role::Vxlan(family), vni: self.network.vxlan.vni };
            let gateway = reach.subnet.base();
            entries.push((Key::Fdb(device, reach.vtep), Value::Fdb(reach.public_ip)));
            entries.push((Key::Neigh(device, gateway), Value::Neigh(reach.vtep)));
            let via = if self.nexthop_objects {
                let id = ids.id_for(device, gateway);
                entries.push((Key::Nexthop(id), Value::Nexthop { device, gateway }));
                Via::Nexthop(id)
            } else {
                Via::Gateway(device, gateway)
            };
            entries.push((Key::Route(reach.subnet), Value::Route(via)));
        }
        entries
    }
}

/// The sysctls that let a host forward a family.
fn forwarding(family: Family) -> &'static [&'static str] {
    match family {
        Family::V4 => &["ipv4/ip_forward"],
        Family::V6 => &["ipv6/conf/all/forwarding"],
    }
}

/// The link-local address of a MAC: modified EUI-64 (RFC 4291 appendix A).
fn link_local(mac: Mac) -> IpAddr {
    let [a, b, c, d, e, f] = mac.0;
    let words = [[a ^ 0x02, b], [c, 0xff], [0xfe, d], [e, f]].map(u16::from_be_bytes);
    IpAddr::V6(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, words[0], words[1], words[2], words[3]))
}

/// Which next-hop object stands for which gateway. Ids are a detail of the kernel's, so they are not planned but handed out: an existing
/// object keeps its id, a new one gets the next id that is free. The ids go round the whole range, so that one is not used again while
/// something may still refer to it.
#[derive(Debug)]
pub struct NexthopIds {
    ids: HashMap<(Device, IpAddr), u32>,
    used: HashSet<u32>,
    next: u32,
}

impl Default for NexthopIds {
    fn default() -> Self {
        NexthopIds { ids: HashMap::new(), used: HashSet::new(), next: NEXTHOP_IDS.start }
    }
}

impl NexthopIds {
    /// Makes room for so many more gateways at once.
    pub fn reserve(&mut self, gateways: usize) {
        self.ids.reserve(gateways);
        self.used.reserve(gateways);
    }

    /// Takes the ids of the objects that the kernel holds already. Of two objects for one gateway the first counts; the other's id is
    /// not given to anybody else, because routes may still use it.
    pub fn adopt(&mut self, actual: &State) {
        for (key, value) in actual.range(Key::Nexthop(0)..=Key::Nexthop(u32::MAX)) {
            if let (Key::Nexthop(id), Value::Nexthop { device, gateway }) = (key, value)
                && NEXTHOP_IDS.contains(id)
                && self.used.insert(*id)
            {
                self.ids.entry((*device, *gateway)).or_insert(*id);
            }
        }
    }

    /// The id of a gateway's object.
    pub fn id_for(&mut self, device: Device, gateway: IpAddr) -> u32 {
        if let Some(id) = self.ids.get(&(device, gateway)) {
            return *id;
        }
        while self.used.contains(&self.next) {
            self.advance();
        }
        let id = self.next;
        self.advance();
        self.ids.insert((device, gateway), id);
        self.used.insert(id);
        id
    }

    /// Gives a gateway's id back.
    pub fn release(&mut self, device: Device, gateway: IpAddr) {
        if let Some(id) = self.ids.remove(&(device, gateway)) {
            self.used.remove(&id);
        }
    }

    fn advance(&mut self) {
        self.next = if self.next + 1 < NEXTHOP_IDS.end { self.next + 1 } else { NEXTHOP_IDS.start };
    }
}

#[cfg(test)]
mod tests;
