//! Desired kernel state: a pure function of network configuration, own lease, underlay, peers and endpoints.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::backend::{self, Backend};
use super::isolation::Scope;
use super::ruleset::{Element, InetTableSpec};
use super::shared::SharedSpec;
use super::state::{Key, LinkKind, LinkState, State, Value};
use crate::model::{Endpoint, Family, Mac, Peer, Port, PublishedPort};

pub use super::host_spec::HostSpec;
use super::sysctls;

/// Link-local address that dockerd sets on a bridge with IPv6. dockerd checks for it right afterwards, and does not start if the
/// agent has removed it as a foreign address by then (libnetwork, `setup_verify_linux.go` and `bridgeIPv6`). So the agent sets it
/// itself.
const DOCKER_LINK_LOCAL: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

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

    /// The scope of one of [`HostSpec::peer_entries`]. The tunnel source filter is in the host's namespace, since the outer packets
    /// are.
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
        SharedSpec {
            families: self.families().collect(),
            external: self.underlay.index,
            // Not the whole network: the rest of it may contain hosts, whose packets iptables has to filter.
            forwarded: self.network.pools.map(|_, pool| pool.span()),
            inet: InetTableSpec {
                network: self.network.clone(),
                bridge: backend.bridge(),
                devices: self.network.families().filter_map(|family| Some((family, backend.device(family)?))).collect(),
                tunnel: backend.tunnel(),
                subnet: self.subnet,
                local: self.underlay.local,
                masquerade: self.masquerade,
                publishes: self.has_published_ports(),
                numbered_sets: self.numbered_sets,
                scope,
                isolation: self.isolation.clone(),
            },
        }
    }

    /// The entries of a scope that belong to this network alone and do not depend on peers.
    pub fn entries(&self, _scope: Scope) -> State {
        let backend = self.backend();
        let bridge = backend.bridge();
        let mut state = State::new();
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
            let devices = [Some(bridge), device].into_iter().flatten();
            for (path, value) in devices.flat_map(|device| sysctls::device_settings(device, family)) {
                sysctls::insert(&mut state, path, value);
            }
        }
        if self.families().any(|family| family == Family::V4) {
            // For a published port of 127.0.0.1: the packet leaves with that source address, and the reply returns to it. A chain
            // of the nftables table keeps containers from using this setting for other packets.
            let path = sysctls::interface_path(&bridge.name(), Family::V4, "route_localnet");
            sysctls::insert(&mut state, path, if self.has_published_ports() { "1" } else { "0" });
        }
        // Our devices accept no router advertisements, neither from a container nor through the tunnel. This also applies to a
        // network without IPv6, because the host may have IPv6.
        for device in self.families().filter_map(|family| backend.device(family)).chain([bridge]) {
            sysctls::insert(&mut state, sysctls::interface_path(&device.name(), Family::V6, "accept_ra"), "0");
        }
        let mac = Some(self.bridge_mac);
        let link = LinkState { kind: LinkKind::Bridge, mac, mtu: self.mtu(), up: true, master: None, hairpin: false };
        state.insert(Key::Link(bridge.name().into()), Value::Link(Box::new(link)));
        state.extend(self.ports.iter().flat_map(|endpoint| self.port_entries(endpoint)));
        // Packets to unleased subnets must not leave by another route, such as the default route: they would be unencapsulated
        // and have the container's source address. A subnet with an address that this host depends on keeps its other routes.
        for (_, pool) in self.network.pools.iter() {
            let ranges = pool.leasable_without(&self.reserved).into_iter();
            state.extend(ranges.map(|range| (Key::Unreachable(range), Value::Unreachable)));
        }
        state
    }

    /// The entries of an endpoint with a port on the bridge.
    fn port_entries<'a>(&self, endpoint: &'a Endpoint) -> impl Iterator<Item = (Key, Value)> + use<'a> {
        let bridge = self.backend().bridge();
        let mtu = self.mtu();
        endpoint.port.iter().flat_map(move |port| {
            // With br_netfilter, DNAT happens in the bridge: a packet from an endpoint to its own published port returns through
            // its own port.
            let hairpin = !endpoint.published.is_empty();
            let link = LinkState { kind: LinkKind::Port, mac: None, mtu, up: true, master: Some(bridge), hairpin };
            let link = (Key::Link(port.host_interface.clone().into()), Value::Link(Box::new(link)));
            let sources = source_elements(port, endpoint.source_check);
            let sources = sources.map(|element| (Key::Element(element), Value::Element(None)));
            let published = endpoint.published.iter().flat_map(|publish| dnat_elements(publish, port));
            let published = published.map(|(element, target)| (Key::Element(element), Value::Element(Some(Box::new(target)))));
            [link].into_iter().chain(sources).chain(published)
        })
    }

    /// The entries of a scope, without peers, of `self` and of `other` that may differ. If only ports were added or removed, these are the
    /// entries of the changed endpoints; the entries of unchanged endpoints are not built.
    pub fn changed_entries(&self, other: &HostSpec, scope: Scope) -> (State, State) {
        if self.has_published_ports() != other.has_published_ports() || !self.eq_ignoring_ports(other) {
            return (self.entries(scope), other.entries(scope));
        }
        let (added, removed) = diff_endpoints(&self.ports, &other.ports);
        let entries = |ports: Vec<&Arc<Endpoint>>| ports.into_iter().flat_map(|endpoint| self.port_entries(endpoint)).collect();
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

    /// Whether any endpoint has published ports.
    fn has_published_ports(&self) -> bool {
        self.ports.iter().any(|endpoint| !endpoint.published.is_empty())
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

/// The elements of a published port or port range, with the target of each. Each port is one element: the full range has 65,535
/// elements, and a lookup costs the same.
fn dnat_elements<'a>(publish: &'a PublishedPort, port: &'a Port) -> impl Iterator<Item = (Element, SocketAddr)> + 'a {
    let PublishedPort { address, protocol, .. } = *publish;
    port.addresses.iter().filter(|(family, _)| publish.has_effect(|bound| bound == *family)).flat_map(
        move |(family, container_address)| {
            (0..publish.count).filter_map(move |n| {
                let host_port = publish.host_port.checked_add(n)?;
                let element = match address.filter(|address| !address.is_unspecified()) {
                    Some(address) => Element::Bound(address, protocol, host_port),
                    None => Element::Port(family, protocol, host_port),
                };
                Some((element, SocketAddr::new(*container_address, publish.container_port.checked_add(n)?)))
            })
        },
    )
}

/// The link-local address of a MAC: modified EUI-64 (RFC 4291 appendix A).
fn link_local(mac: Mac) -> IpAddr {
    let [a, b, c, d, e, f] = mac.0;
    let words = [[a ^ 0x02, b], [c, 0xff], [0xfe, d], [e, f]].map(u16::from_be_bytes);
    IpAddr::V6(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, words[0], words[1], words[2], words[3]))
}

#[cfg(test)]
mod tests;
