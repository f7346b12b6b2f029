//! Desired kernel state: a pure function of network configuration, own lease, underlay, peers and endpoints.

mod pairs;
mod published;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::backend::{self, Backend};
use super::ruleset::{Element, InetTableSpec};
use super::shared::SharedSpec;
use super::state::{Key, LinkKind, LinkState, State, Value};
use crate::model::network::Pool;
use crate::model::{Cidr, Endpoint, Family, Mac, Peer, PerFamily, Port, transfer_range};

pub use super::host_spec::HostSpec;
use super::isolation::Scope;
use super::sysctls;
use published::{TransitPorts, mappings};

/// Link-local address that dockerd sets on a bridge with IPv6. dockerd checks for it right afterwards, and does not start if the
/// agent has removed it as a foreign address by then (libnetwork, `setup_verify_linux.go` and `bridgeIPv6`). So the agent sets it
/// itself.
const DOCKER_LINK_LOCAL: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// The index of the external interface in a namespace without one. The kernel counts from 1.
const NO_INTERFACE: u32 = 0;

impl HostSpec {
    /// The families of the network in which this host has a subnet.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        self.network.families().filter(|family| self.subnet.get(*family).is_some())
    }

    /// Whether both have the same peer entries and accept the same leases, so that they differ in this host's own entries only.
    pub fn has_same_peer_entries(&self, other: &HostSpec) -> bool {
        self.network == other.network
            && self.subnet == other.subnet
            && self.underlay.public_ip == other.underlay.public_ip
            && self.backend_data == other.backend_data
            && self.masquerade == other.masquerade
            && self.isolation == other.isolation
    }

    /// The network's backend.
    pub fn backend(&self) -> &dyn Backend {
        backend::of(&self.network)
    }

    /// MTU of a family's packets in bytes: the underlay's MTU minus the encapsulation.
    pub fn family_mtu(&self, family: Family) -> u32 {
        let backend = self.backend();
        backend.underlay_mtu().unwrap_or(self.underlay.mtu).saturating_sub(backend.overhead(family))
    }

    /// MTU of the bridge and the containers in bytes: the minimum over the families, since one interface carries all of them.
    pub fn mtu(&self) -> u32 {
        self.families().map(|family| self.family_mtu(family)).min().unwrap_or(self.underlay.mtu)
    }

    /// The scopes of its entries: both for an isolated network, else the host's only.
    pub fn scopes(&self) -> &'static [Scope] {
        if self.isolation.is_some() { &[Scope::Host, Scope::Network] } else { &[Scope::Host] }
    }

    /// The scope of one of [`HostSpec::peer_entries`]. The tunnel source filter is in the host's namespace, as are the packets
    /// that it filters.
    pub fn peer_entry_scope(&self, key: &Key) -> Scope {
        match key {
            Key::Element(_) => Scope::Host,
            _ if self.isolation.is_some() => Scope::Network,
            _ => Scope::Host,
        }
    }

    /// Inputs of the entries that this network shares with others in the namespace of one of its [`HostSpec::scopes`].
    pub fn shared(&self, scope: Scope) -> SharedSpec {
        let backend = self.backend();
        let in_host = scope == Scope::Host;
        // A network without a way out has no packets in the host's namespace but the tunnel's.
        let has_packets = !in_host || self.has_way_out();
        SharedSpec {
            families: self.families().filter(|_| has_packets).collect(),
            external: if in_host { self.underlay.index } else { NO_INTERFACE },
            forwarded: self.forwarded(scope).filter(|_| has_packets).collect(),
            inet: InetTableSpec {
                network: self.network.clone(),
                bridge: backend.bridge(),
                devices: self.network.families().filter_map(|family| Some((family, backend.device(family)?))).collect(),
                tunnel: backend.tunnel(),
                subnet: self.subnet,
                local: if in_host { self.underlay.local } else { PerFamily::default() },
                masquerade: self.masquerades(),
                publishes: self.has_published_ports(),
                numbered_sets: self.numbered_sets,
                scope,
                isolation: self.isolation.clone(),
            },
        }
    }

    /// Whether the bridge with this host's containers is in the namespace of a scope.
    fn has_bridge(&self, scope: Scope) -> bool {
        (scope == Scope::Network) == self.isolation.is_some()
    }

    /// The ranges whose packets iptables' FORWARD chain has to accept.
    fn forwarded(&self, scope: Scope) -> impl Iterator<Item = (Family, Cidr)> {
        // Not the whole network: the rest of it may contain hosts, whose packets iptables has to filter. But all transits, so
        // that an isolated network that joins changes no rule.
        let is_host_end = scope == Scope::Host && self.isolation.is_some();
        let range = move |family, pool: &Pool| if is_host_end { transfer_range(family) } else { pool.span() };
        self.network.pools.iter().map(move |(family, pool)| (family, range(family, pool)))
    }

    /// The entries of a scope that belong to this network alone and do not depend on peers.
    pub fn entries(&self, scope: Scope) -> State {
        let mut state = State::new();
        if self.has_bridge(scope) {
            self.insert_bridge(&mut state);
        }
        if let Some(isolation) = &self.isolation {
            if let Some(transit) = isolation.transit {
                self.insert_transit(&mut state, transit, scope);
            }
            for peer in isolation.peers.iter().filter(|_| scope == Scope::Network) {
                self.insert_peer_link(&mut state, peer);
            }
        }
        let transit_ports = self.transit_ports();
        state.extend(self.ports.iter().flat_map(|endpoint| self.port_entries(endpoint, scope, &transit_ports)));
        state
    }

    /// Adds the entries of the bridge and of the devices towards the peers.
    fn insert_bridge(&self, state: &mut State) {
        let backend = self.backend();
        let bridge = backend.bridge();
        for family in self.families() {
            let device = backend.device(family);
            if let (Some(device), Some(link)) = (device, backend.link(self, family)) {
                state.insert(Key::Link(device.name().into()), Value::Link(Box::new(link)));
            }
            if let Some(subnet) = self.subnet.get(family) {
                // The host's own address in the overlay.
                state.insert(Key::Address(device.unwrap_or(bridge), IpNetwork::from(subnet.base())), Value::Address);
                if let Some(gateway) = subnet.nth(1).and_then(|a| IpNetwork::new(a, subnet.length()).ok()) {
                    state.insert(Key::Address(bridge, gateway), Value::Address);
                }
            }
            if family == Family::V6 {
                // A router needs a link-local address for neighbour solicitations (RFC 4861 section 4.3). The kernel would
                // generate the same one, but only after duplicate address detection; an address set by the agent works at once.
                let docker = self.docker.then_some(DOCKER_LINK_LOCAL);
                for address in [link_local(self.bridge_mac)].into_iter().chain(docker) {
                    if let Ok(address) = IpNetwork::new(address, 64) {
                        state.insert(Key::Address(bridge, address), Value::Address);
                    }
                }
            }
            for device in [Some(bridge), device].into_iter().flatten() {
                sysctls::insert_device_settings(state, device, family);
            }
        }
        if self.families().any(|family| family == Family::V4) {
            // For a published port of 127.0.0.1: the packet leaves with that source address, and the reply returns to it. A chain
            // of the nftables table keeps containers from using this setting for other packets. In an isolated network the
            // transit's end in the host's namespace has it.
            let is_used = self.isolation.is_none() && self.has_published_ports();
            let path = sysctls::interface_path(&bridge.name(), Family::V4, "route_localnet");
            sysctls::insert(state, path, if is_used { "1" } else { "0" });
        }
        for device in self.families().filter_map(|family| backend.device(family)).chain([bridge]) {
            sysctls::ignore_router_advertisements(state, device);
        }
        let mac = Some(self.bridge_mac);
        let link = LinkState { kind: LinkKind::Bridge, mac, mtu: self.mtu(), up: true, master: None, hairpin: false };
        state.insert(Key::Link(bridge.name().into()), Value::Link(Box::new(link)));
        // Packets to unleased subnets must not leave by another route, such as the default route: they would be unencapsulated
        // and have the container's source address. A subnet with an address that this host depends on keeps its other routes; the
        // host depends on none in a namespace of its own.
        let reserved = if self.isolation.is_some() { &BTreeSet::new() } else { &self.reserved };
        for (_, pool) in self.network.pools.iter() {
            let ranges = pool.leasable_without(reserved).into_iter();
            state.extend(ranges.map(|range| (Key::Unreachable(range), Value::Unreachable)));
        }
    }

    /// The entries of an endpoint with a port on the bridge, in a scope.
    fn port_entries<'a>(
        &self,
        endpoint: &'a Endpoint,
        scope: Scope,
        transit_ports: &'a TransitPorts,
    ) -> impl Iterator<Item = (Key, Value)> + use<'a> {
        let bridge = self.backend().bridge();
        let mtu = self.mtu();
        let is_isolated = self.isolation.is_some();
        let transit = self.isolation.as_ref().and_then(|isolation| isolation.transit);
        let has_bridge = self.has_bridge(scope);
        endpoint.port.iter().flat_map(move |port| {
            // With br_netfilter, DNAT happens in the bridge: a packet from an endpoint to its own published port returns through
            // its own port. That of an isolated network returns through the transit.
            let hairpin = !endpoint.published.is_empty() && !is_isolated;
            let link = LinkState { kind: LinkKind::Port, mac: None, mtu, up: true, master: Some(bridge), hairpin };
            let link = (Key::Link(port.host_interface.clone().into()), Value::Link(Box::new(link)));
            let sources = source_elements(port, endpoint.source_check);
            let sources = sources.map(|element| (Key::Element(element), Value::Element(None)));
            let published = endpoint.published.iter().flat_map(|publish| mappings(publish, port));
            let published = published.filter_map(move |mapping| match transit {
                Some(transit) => mapping.transit_element(scope, transit, transit_ports),
                None => (!is_isolated).then(|| mapping.element()),
            });
            let published = published.map(|(element, target)| (Key::Element(element), Value::Element(Some(Box::new(target)))));
            [link].into_iter().chain(sources).filter(move |_| has_bridge).chain(published)
        })
    }

    /// The transit's ports of the endpoints' published ports, as far as they are not the host's; none for a routed network.
    fn transit_ports(&self) -> TransitPorts {
        if self.isolation.is_some() { TransitPorts::of(&self.ports) } else { TransitPorts::default() }
    }

    /// The entries of a scope, without peers, of `self` and of `other` that may differ. If only ports were added or removed,
    /// these are the entries of the changed endpoints; the entries of unchanged endpoints are not built.
    pub fn changed_entries(&self, other: &HostSpec, scope: Scope) -> (State, State) {
        if self.has_published_ports() != other.has_published_ports() || !self.eq_ignoring_ports(other) {
            return (self.entries(scope), other.entries(scope));
        }
        let (added, removed) = diff_endpoints(&self.ports, &other.ports);
        let mut transit_ports = TransitPorts::default();
        if added.iter().chain(&removed).any(|endpoint| !endpoint.published.is_empty()) {
            transit_ports = self.transit_ports();
            if transit_ports != other.transit_ports() {
                return (self.entries(scope), other.entries(scope));
            }
        }
        let entries = |ports: Vec<&Arc<Endpoint>>| {
            ports.into_iter().flat_map(|endpoint| self.port_entries(endpoint, scope, &transit_ports)).collect()
        };
        (entries(added), entries(removed))
    }

    /// Whether both are equal except for their ports.
    fn eq_ignoring_ports(&self, other: &HostSpec) -> bool {
        let HostSpec {
            network,
            subnet,
            underlay,
            backend_data,
            bridge_mac,
            masquerade,
            numbered_sets,
            tx_checksum,
            docker,
            ports: _,
            reserved,
            isolation,
        } = self;
        *network == other.network
            && *subnet == other.subnet
            && *underlay == other.underlay
            && *backend_data == other.backend_data
            && *bridge_mac == other.bridge_mac
            && *masquerade == other.masquerade
            && *numbered_sets == other.numbered_sets
            && *tx_checksum == other.tx_checksum
            && *docker == other.docker
            && *reserved == other.reserved
            && *isolation == other.isolation
    }

    /// Whether any endpoint has published ports, and the network a way to them.
    fn has_published_ports(&self) -> bool {
        self.has_way_out() && self.ports.iter().any(|endpoint| !endpoint.published.is_empty())
    }

    /// The entries of a peer in each family, of all scopes; with VXLAN four, and five with next-hop objects.
    pub fn peer_entries(&self, peer: &Peer) -> Vec<(Key, Value)> {
        let mut entries = Vec::with_capacity(8);
        let backend = self.backend();
        for family in self.families() {
            if let Some(remote) = peer.remote_subnets.get(family) {
                backend.peer_entries(self, family, remote, &mut entries);
            }
        }
        entries
    }
}

/// The source filter's elements for an endpoint: its MAC with each of its addresses. With IPv6 they include the link-local
/// address that the kernel derives from the MAC. Without a source check there is one element that allows every source.
pub fn source_elements(port: &Port, source_check: bool) -> impl Iterator<Item = Element> {
    let own = port.addresses.iter().map(|(_, address)| *address);
    let addresses = own.chain(port.addresses.v6.map(|_| link_local(port.mac))).filter(move |_| source_check);
    let unchecked = (!source_check).then(|| Element::Unchecked(port.host_interface.as_str().into()));
    let source = move |address| Element::Source(Box::new((port.host_interface.clone(), port.mac, address)));
    addresses.map(source).chain(unchecked)
}

/// Endpoints that are only in `new`, and those only in `old`, both sorted by name. A changed endpoint is in both results.
fn diff_endpoints<'a>(new: &'a [Arc<Endpoint>], old: &'a [Arc<Endpoint>]) -> (Vec<&'a Arc<Endpoint>>, Vec<&'a Arc<Endpoint>>) {
    let (mut left, mut right) = (new.iter().peekable(), old.iter().peekable());
    let (mut added, mut removed) = (Vec::new(), Vec::new());
    loop {
        match (left.peek(), right.peek()) {
            // Most are the same allocation, so `Arc` compares their pointers.
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

/// The link-local address of a MAC: modified EUI-64 (RFC 4291 appendix A).
fn link_local(mac: Mac) -> IpAddr {
    let [a, b, c, d, e, f] = mac.0;
    let words = [[a ^ 0x02, b], [c, 0xff], [0xfe, d], [e, f]].map(u16::from_be_bytes);
    IpAddr::V6(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, words[0], words[1], words[2], words[3]))
}

#[cfg(test)]
mod tests;
