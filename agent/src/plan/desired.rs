//! What the kernel should hold: a pure function of the network's configuration, this host's lease, the underlay, the peers and the
//! endpoints.

pub mod sysctls;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::ruleset::{Element, InetTableSpec, PeerPair, source_filter};
use super::state::{Key, LinkKind, LinkState, NEXTHOP_IDS, RouteTarget, State, Value, Vxlan};
use super::underlay::Underlay;
use crate::model::peer::RemoteSubnet;
use crate::model::{Cidr, Device, Endpoint, Family, Mac, NetworkConfig, Peer, PerFamily, Port, PublishedPort, Role, Subnet};

/// What dockerd sets on a bridge with IPv6, and looks for right afterwards: where it has gone meanwhile as an address of nobody's, dockerd does
/// not start (libnetwork, `setup_verify_linux.go` and `bridgeIPv6`). So it is there from the beginning.
const DOCKER_LINK_LOCAL: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// Everything about this host that its kernel state follows from, peers aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSpec {
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
    /// Whether Docker puts containers on the bridge, beside the endpoints.
    pub docker: bool,
    /// Whether the kernel has next-hop objects and they are to be used.
    pub nexthop_objects: bool,
    /// The endpoints that have a port on the bridge, by name.
    pub ports: Vec<Arc<Endpoint>>,
    /// Families in which iptables' FORWARD chain drops what nobody accepts.
    pub forward_drops: Vec<Family>,
    /// Addresses of the underlay that this host depends on, although the overlay may lease them.
    pub reserved: BTreeSet<IpAddr>,
    /// The host's own interfaces that would stop to take router advertisements once it forwards IPv6 ([`read_sysctls::accept_ra_interfaces`]).
    pub accept_ra_interfaces: Vec<String>,
    /// The host's own interfaces by which containers reach the world outside ([`HostInventory::uplinks`]).
    ///
    /// [`HostInventory::uplinks`]: super::underlay::Inventory::uplinks
    pub uplinks: Vec<String>,
}

impl HostSpec {
    /// The families that the network has and this host holds a subnet of.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        self.network.families().filter(|family| self.subnet.get(*family).is_some())
    }

    /// Whether what peers need, and which leases count, is the same for both: they differ in what concerns this host alone.
    pub fn has_same_peer_entries(&self, other: &HostSpec) -> bool {
        self.network == other.network
            && self.subnet == other.subnet
            && self.underlay.public_ip == other.underlay.public_ip
            && self.vtep == other.vtep
            && self.nexthop_objects == other.nexthop_objects
            && self.masquerade == other.masquerade
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
                    hairpin: false,
                };
                state.insert(Key::Link(device.name().into()), Value::Link(Box::new(link)));
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
                let docker = self.docker.then_some(DOCKER_LINK_LOCAL);
                for address in [link_local(self.bridge_mac)].into_iter().chain(docker) {
                    if let Ok(address) = IpNetwork::new(address, 64) {
                        state.insert(Key::Address(bridge, address), Value::Address);
                    }
                }
            }
            sysctls::insert(&mut state, sysctls::forwarding(family), "1");
            for (path, value) in [bridge, device].into_iter().flat_map(|device| sysctls::device_settings(device, family)) {
                sysctls::insert(&mut state, path, value);
            }
        }
        if self.families().any(|family| family == Family::V4) {
            // Answers to containers, and what comes for published ports.
            for interface in &self.uplinks {
                sysctls::insert(&mut state, sysctls::interface_path(interface, Family::V4, "forwarding"), "1");
            }
            // A port of 127.0.0.1 that leads to a container: the packet leaves with that source, and its answer comes back to it. The table has a
            // chain that keeps containers from using it for anything else.
            let path = sysctls::interface_path(&bridge.name(), Family::V4, "route_localnet");
            sysctls::insert(&mut state, path, if self.has_published_ports() { "1" } else { "0" });
        }
        if self.has_published_ports() && self.families().any(|family| family == Family::V6) {
            // The same for ::1: what comes back by the bridge finds the address on no other device (`ip6_route_input_lookup` in the kernel's
            // net/ipv6/route.c). A packet that says so on the wire is dropped before (`ip6_rcv_core`).
            state.insert(Key::Route(Cidr::host(std::net::Ipv6Addr::LOCALHOST.into())), Value::Route(RouteTarget::Local(bridge)));
        }
        // What we create takes no router advertisement, neither from a container nor through the tunnel; also where the network has no
        // IPv6, because the host may have it.
        for device in self.families().map(|family| Device::vxlan(family, vni)).chain([bridge]) {
            sysctls::insert(&mut state, sysctls::interface_path(&device.name(), Family::V6, "accept_ra"), "0");
        }
        if self.families().any(|family| family == Family::V6) {
            // A host that forwards ignores advertisements unless told otherwise, and drops the routes that came from them.
            for interface in &self.accept_ra_interfaces {
                sysctls::insert(&mut state, sysctls::interface_path(interface, Family::V6, "accept_ra"), "2");
            }
        }
        let mac = Some(self.bridge_mac);
        let link = LinkState { kind: LinkKind::Bridge, mac, mtu: self.mtu(), up: true, master: None, hairpin: false };
        state.insert(Key::Link(bridge.name().into()), Value::Link(Box::new(link)));
        state.extend(self.ports.iter().flat_map(|endpoint| self.port_entries(endpoint)));
        let publishes = self.has_published_ports();
        let HostSpec { network, subnet, masquerade, .. } = self;
        let rules = InetTableSpec { network, subnet, local: &self.underlay.local, masquerade: *masquerade, publishes };
        for ruleset in [rules.ruleset(), source_filter()] {
            state.insert(Key::Ruleset(ruleset.table), Value::Ruleset(Box::new(ruleset)));
        }
        // What nobody holds leaves by no other route, the default route above all: in clear and with the container's address as source. A subnet that has
        // an address this host depends on is left to those routes.
        for (_, pool) in self.network.pools.iter() {
            let ranges = pool.leasable_without(&self.reserved).into_iter();
            state.extend(ranges.map(|range| (Key::Unreachable(range), Value::Unreachable)));
        }
        for family in &self.forward_drops {
            // Not the whole network: hosts may lie in the rest of it, whose packets iptables is to decide on.
            if let Some(pool) = self.network.pools.get(*family) {
                state.insert(Key::ForwardAccept(*family), Value::ForwardAccept(pool.span()));
            }
        }
        state
    }

    /// What the kernel should hold for an endpoint with a port on the bridge.
    fn port_entries<'a>(&self, endpoint: &'a Endpoint) -> impl Iterator<Item = (Key, Value)> + use<'a> {
        let bridge = Device::bridge(self.network.vxlan.vni);
        let mtu = self.mtu();
        endpoint.port.iter().flat_map(move |port| {
            // With br_netfilter the bridge translates by itself: what an endpoint sends to its own published port comes back by its own port.
            let hairpin = !endpoint.published.is_empty();
            let link = LinkState { kind: LinkKind::Port, mac: None, mtu, up: true, master: Some(bridge), hairpin };
            let link = (Key::Link(port.host_interface.clone().into()), Value::Link(Box::new(link)));
            let own = port.addresses.iter().map(|(_, address)| *address);
            let sources = source_elements(&port.host_interface, port.mac, own, endpoint.source_check);
            let sources = sources.map(|element| (Key::Element(element), Value::Element(None)));
            let published = endpoint.published.iter().flat_map(|publish| dnat_elements(publish, port));
            let published = published.map(|(element, target)| (Key::Element(element), Value::Element(Some(Box::new(target)))));
            [link].into_iter().chain(sources).chain(published)
        })
    }

    /// What of its own, peers aside, the kernel should hold for this host and what for the other one, without what is the same for both as far as
    /// that is seen without making it: the entries of all endpoints but those that came or went.
    pub fn changed_entries(&self, other: &HostSpec) -> (State, State) {
        if self.has_published_ports() != other.has_published_ports() || !self.eq_ignoring_ports(other) {
            return (self.entries(), other.entries());
        }
        let (added, removed) = diff_endpoints(&self.ports, &other.ports);
        let entries = |ports: Vec<&Arc<Endpoint>>| ports.into_iter().flat_map(|endpoint| self.port_entries(endpoint)).collect();
        (entries(added), entries(removed))
    }

    /// Whether both are the same, their ports aside.
    fn eq_ignoring_ports(&self, other: &HostSpec) -> bool {
        let HostSpec {
            network,
            subnet,
            underlay,
            vtep,
            bridge_mac,
            masquerade,
            tx_checksum,
            docker,
            nexthop_objects,
            ports: _,
            forward_drops,
            reserved,
            accept_ra_interfaces: keep_routers,
            uplinks,
        } = self;
        *network == other.network
            && *subnet == other.subnet
            && *underlay == other.underlay
            && *vtep == other.vtep
            && *bridge_mac == other.bridge_mac
            && *masquerade == other.masquerade
            && *tx_checksum == other.tx_checksum
            && *docker == other.docker
            && *nexthop_objects == other.nexthop_objects
            && *forward_drops == other.forward_drops
            && *reserved == other.reserved
            && *keep_routers == other.accept_ra_interfaces
            && *uplinks == other.uplinks
    }

    /// Whether any port of this host leads to an endpoint.
    fn has_published_ports(&self) -> bool {
        self.ports.iter().any(|endpoint| !endpoint.published.is_empty())
    }

    /// What a peer may send through the tunnel: from its subnet, and where packets to it are not masqueraded, its own answers to them.
    fn tunnel_elements(&self, family: Family, reach: &RemoteSubnet) -> impl Iterator<Item = Element> {
        let RemoteSubnet { subnet, public_ip, .. } = *reach;
        let usual = self.network.pools.get(family).is_some_and(|pool| pool.subnet_length == subnet.length());
        let pair = PeerPair::new(public_ip, subnet.base()).filter(|_| usual);
        let from = pair.map_or_else(|| Element::Range(Box::new((public_ip, subnet.base(), subnet.last()))), Element::Peer);
        [Some(from), (!self.masquerade).then_some(Element::Host(public_ip))].into_iter().flatten()
    }

    /// What the kernel should hold for a peer: five entries a family, four with classic routes.
    pub fn peer_entries(&self, peer: &Peer, ids: &mut NexthopIds) -> Vec<(Key, Value)> {
        let mut entries = Vec::with_capacity(8);
        for family in self.families() {
            let Some(reach) = peer.remote_subnets.get(family) else { continue };
            let device = Device { role: Role::Vxlan(family), vni: self.network.vxlan.vni };
            let gateway = reach.subnet.base();
            entries.extend(self.tunnel_elements(family, reach).map(|element| (Key::Element(element), Value::Element(None))));
            entries.push((Key::Fdb(device, reach.vtep), Value::Fdb(reach.public_ip)));
            entries.push((Key::Neigh(device, gateway), Value::Neigh(reach.vtep)));
            let via = if self.nexthop_objects {
                let id = ids.id_for(device, gateway);
                entries.push((Key::Nexthop(id), Value::Nexthop { device, gateway }));
                RouteTarget::Nexthop(id)
            } else {
                RouteTarget::Gateway(device, gateway)
            };
            entries.push((Key::Route(reach.subnet), Value::Route(via)));
        }
        entries
    }
}

/// What comes in by an endpoint's interface may have: its MAC with its addresses, and where it has IPv6 with the link-local address that the kernel
/// makes of the MAC; or anything, unless its source is checked.
pub fn source_elements(
    interface: &str,
    mac: Mac,
    addresses: impl IntoIterator<Item = IpAddr>,
    source_check: bool,
) -> impl Iterator<Item = Element> {
    let mut all: Vec<IpAddr> = addresses.into_iter().filter(|_| source_check).collect();
    if all.iter().any(IpAddr::is_ipv6) {
        all.push(link_local(mac));
    }
    let unchecked = (!source_check).then(|| Element::Unchecked(interface.into()));
    all.into_iter().map(move |address| Element::Source(Box::new((interface.to_owned(), mac, address)))).chain(unchecked)
}

/// The endpoints, in the order of their names, that only the first or only the second has, or both with different contents.
fn diff_endpoints<'a>(
    ours: &'a [Arc<Endpoint>],
    others: &'a [Arc<Endpoint>],
) -> (Vec<&'a Arc<Endpoint>>, Vec<&'a Arc<Endpoint>>) {
    let (mut left, mut right) = (ours.iter().peekable(), others.iter().peekable());
    let (mut added, mut removed) = (Vec::new(), Vec::new());
    loop {
        match (left.peek(), right.peek()) {
            // Most of them are the very same, which their addresses tell.
            (Some(a), Some(b)) if a == b => {
                left.next();
                right.next();
            }
            (Some(a), Some(b)) if a.name > b.name => removed.extend(right.next()),
            (Some(a), Some(b)) if a.name == b.name => {
                added.extend(left.next());
                removed.extend(right.next());
            }
            (Some(_), _) => added.extend(left.next()),
            (None, Some(_)) => removed.extend(right.next()),
            (None, None) => return (added, removed),
        }
    }
}

/// The elements of a published port, or run of ports, and where each leads. One element a port: a run of the whole range is 65,535 of them, a look-up
/// costs the same.
fn dnat_elements<'a>(publish: &'a PublishedPort, port: &'a Port) -> impl Iterator<Item = (Element, SocketAddr)> + 'a {
    let PublishedPort { address, protocol, .. } = *publish;
    port.addresses.iter().filter(|(family, _)| publish.has_effect(|bound| bound == *family)).flat_map(move |(family, to)| {
        (0..publish.count).filter_map(move |n| {
            let host_port = publish.host_port.checked_add(n)?;
            let element = match address.filter(|address| !address.is_unspecified()) {
                Some(address) => Element::Bound(address, protocol, host_port),
                None => Element::Port(family, protocol, host_port),
            };
            Some((element, SocketAddr::new(*to, publish.container_port.checked_add(n)?)))
        })
    })
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
