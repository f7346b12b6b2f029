//! A simulated kernel, and generators of hosts, peers and kernel states.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnetwork::IpNetwork;
use proptest::prelude::*;
use proptest::sample::select;

use crate::model::peer::RemoteSubnet;
use crate::model::{
    Cidr, Device, Endpoint, Family, Mac, NetworkConfig, Peer, PeerEndpoint, PerFamily, Port, Subnet, Transport, Vni,
};
use crate::plan::Op;
use crate::plan::backend;
use crate::plan::desired::HostSpec;
use crate::plan::isolation::{Isolation, PeerNetwork, Scope, Transit};
use crate::plan::nexthop_ids::NexthopIds;
use crate::plan::ruleset::{Element, Expr, PeerPair, Rule, Table};
use crate::plan::shared::{NamespaceFacts, shared_entries};
use crate::plan::state::{Key, LinkKind, LinkState, NEXTHOP_IDS, RouteTarget, State, Value, device_of};
use crate::plan::underlay::Underlay;

/// Applies ops as the kernel and the writer of batches do.
pub struct SimulatedKernel {
    /// Its entries.
    pub state: State,
}

impl SimulatedKernel {
    pub fn new(state: State) -> SimulatedKernel {
        SimulatedKernel { state }
    }

    /// Applies an op; returns `false` if it fails with a remedy in its error. Panics at an op that must never be sent.
    pub fn apply(&mut self, op: &Op) -> bool {
        let found = self.state.get(op.key());
        let device_is_ours = |device: Device| {
            let link = self.state.get(&Key::Link(device.name().into()));
            assert!(matches!(link, Some(Value::Link(link)) if !is_foreign(link)), "`{op}` needs {device}, which is {link:?}");
        };
        match op {
            Op::Set(key @ Key::Link(_), Value::Link(wanted)) => {
                match found {
                    Some(Value::Link(found)) if is_foreign(found) => return false,
                    None if wanted.kind == LinkKind::Port => return false,
                    Some(Value::Link(found)) => match (&wanted.kind, &found.kind) {
                        (LinkKind::Vxlan(wanted), LinkKind::Vxlan(found)) => {
                            assert!(found.changes_in_place(wanted), "`{op}`: {key} has to be deleted first");
                        }
                        // The other namespace has created a pair without a target.
                        (LinkKind::Pair(_), LinkKind::Pair(_)) => {}
                        (wanted, found) => assert_eq!(wanted, found, "`{op}`: the kind of a link cannot change"),
                    },
                    _ => {}
                }
                wanted.master.into_iter().for_each(device_is_ours);
            }
            Op::Set(key, value) => {
                assert!(key.fits(value), "`{op}`");
                if let Value::Route(RouteTarget::Nexthop(id)) = value {
                    assert!(self.state.contains_key(&Key::Nexthop(*id)), "`{op}`: there is no such next hop");
                }
                assert!(*value != Value::Route(RouteTarget::Foreign), "`{op}`");
                device_of(key, value, &self.state).into_iter().for_each(device_is_ours);
            }
            Op::Delete(key, value) => {
                assert_eq!(found, Some(value), "`{op}` names a missing entry or a wrong value");
                assert!(!matches!(key, Key::Sysctl(_)), "`{op}`: a sysctl cannot be deleted");
                assert!(*value != Value::Route(RouteTarget::Foreign), "`{op}`: the route is not ours");
                match value {
                    Value::Link(link) => {
                        assert!(!is_foreign(link) && link.kind != LinkKind::Port, "`{op}`: the link is not ours")
                    }
                    _ => key.device().into_iter().for_each(device_is_ours),
                }
            }
        }
        op.apply_to(&mut self.state);
        true
    }
}

fn is_foreign(link: &LinkState) -> bool {
    matches!(link.kind, LinkKind::Foreign { .. })
}

/// Removes impossible entries from a generated state: entries on missing links, routes with missing next hops, next hops and
/// routes on links that are down, and elements without their table. The kernel does not report the other end of a pair.
pub fn normalise(mut state: State) -> State {
    loop {
        let old = state.clone();
        state.retain(|key, value| {
            if let Value::Route(RouteTarget::Nexthop(id)) = value
                && !old.contains_key(&Key::Nexthop(*id))
            {
                return false;
            }
            if let Key::Element(element) = key {
                return old.contains_key(&Key::Ruleset(element.set().table()));
            }
            let Some(device) = device_of(key, value, &old) else { return true };
            match old.get(&Key::Link(device.name().into())) {
                Some(Value::Link(link)) => link.up || !matches!(value, Value::Nexthop { .. } | Value::Route(_)),
                _ => false,
            }
        });
        for value in state.values_mut() {
            if let Value::Link(link) = value
                && let LinkKind::Pair(target) = &mut link.kind
            {
                *target = None;
            }
            if let Value::Link(link) = value
                && link.master.is_some_and(|master| !old.contains_key(&Key::Link(master.name().into())))
            {
                link.master = None;
            }
        }
        if state == old {
            return state;
        }
    }
}

/// A host and its peers, with few enough values that random ones conflict.
#[derive(Debug, Clone)]
pub struct Setup {
    pub families: u8,
    pub vni: u32,
    pub port: u16,
    pub underlay_mtu: u32,
    pub own_subnet: u8,
    pub own_address: u8,
    pub own_mac: u8,
    pub flags: [bool; 4],
    pub ports: Vec<u8>,
    pub peers: [Option<(u8, u8, u8)>; 5],
    /// Whether the entries are those of an isolated network in its own namespace.
    pub isolated: bool,
}

impl Setup {
    pub fn families(&self) -> impl Iterator<Item = Family> + use<> {
        let which = self.families;
        Family::ALL.into_iter().filter(move |family| which == 2 || *family == Family::ALL[usize::from(which)])
    }

    /// All settings that the devices depend on.
    pub fn device_settings(&self) -> (u32, u16, u8, bool) {
        (self.vni, self.port, self.own_mac, self.flags[3])
    }

    /// Number of subnets, one per family, of peers that both setups have, so that the change must not interrupt their packets.
    pub fn surviving_peer_count(&self, other: &Setup) -> usize {
        let both =
            self.peers.iter().zip(&other.peers).filter(|(a, b)| a.is_some() && b.is_some() && a.map(|p| p.2) == b.map(|p| p.2));
        both.flat_map(|(peer, _)| peer).map(|peer| peer_families(peer.2, self).count()).sum()
    }

    pub fn host(&self) -> HostSpec {
        let [masquerade, tx_checksum, ..] = self.flags;
        let v4 = self.families().any(|family| family == Family::V4);
        let v6 = self.families().any(|family| family == Family::V6);
        let text = format!(
            r#"{{"EnableIPv4":{v4},"Network":"10.244.0.0/16","EnableIPv6":{v6},"IPv6Network":"fd00:10:244::/56","Backend":{{"VNI":{},"Port":{}}}}}"#,
            self.vni, self.port
        );
        let network = NetworkConfig::parse(&text).expect("a configuration").config;
        let local: PerFamily<IpAddr> = self.families().map(|family| (family, public_ip(family, self.own_address))).collect();
        HostSpec {
            backend_data: backend::of(&network).lease_data(&network, &mut |_| Mac([2, 1, 0, 0, 0, self.own_mac])),
            network,
            subnet: Subnet::new(self.families().map(|family| (family, subnet(family, self.own_subnet))).collect())
                .expect("a subnet"),
            underlay: Underlay {
                index: 2 + u32::from(self.own_address % 2),
                name: format!("eth{}", self.own_address % 2),
                mtu: self.underlay_mtu,
                public_ip: local,
                local,
            },
            bridge_mac: Mac([2, 2, 0, 0, 0, self.own_mac]),
            masquerade,
            numbered_sets: false,
            tx_checksum,
            docker: false,
            ports: self.ports.iter().map(|i| self.endpoint(*i)).collect(),
            reserved: BTreeSet::new(),
            isolation: self.isolated.then(|| self.isolation()),
        }
    }

    /// A transit, and a peer network with a larger VNI. If there is room, another with a smaller one.
    fn isolation(&self) -> Isolation {
        let cidr = |text: &str| text.parse().expect(text);
        let ranges = [
            PerFamily { v4: Some(cidr("10.99.0.0/16")), v6: Some(cidr("fd00:99::/48")) },
            PerFamily { v4: Some(cidr("10.98.0.0/16")), v6: None },
        ];
        let peers = [("red", 3), ("green", 1)].into_iter().zip(ranges).filter(|((_, vni), _)| *vni != self.vni);
        let peer = |((name, vni), ranges): ((&str, u32), _)| PeerNetwork {
            name: name.into(),
            namespace: format!("ov-{name}"),
            vni: Vni::try_from(vni).expect("a VNI"),
            ranges,
        };
        Isolation { transit: Transit::new(self.own_subnet.into()), peers: peers.map(peer).collect() }
    }

    fn scope(&self) -> Scope {
        if self.isolated { Scope::Network } else { Scope::Host }
    }

    /// The entries without those of peers.
    fn entries(&self) -> State {
        let [_, _, forward_drops, _] = self.flags;
        let facts = NamespaceFacts {
            forward_drops: if forward_drops { self.families().collect() } else { Vec::new() },
            accept_ra_interfaces: (self.own_address == 3).then(|| "eth0".to_owned()).into_iter().collect(),
            uplinks: vec!["eth0".to_owned()],
        };
        let host = self.host();
        let mut state = host.entries(self.scope());
        state.extend(shared_entries(&[&host.shared(self.scope())], &facts));
        state
    }

    /// An endpoint: the first has no source check, the last has published ports.
    fn endpoint(&self, i: u8) -> Arc<Endpoint> {
        let address = |family| subnet(family, self.own_subnet).nth(2 + u128::from(i)).expect("an address");
        let port = Port {
            interface: "eth0".to_owned(),
            host_interface: format!("veth{i}"),
            mac: Mac([2, 4, 0, 0, 0, i]),
            addresses: self.families().map(|family| (family, address(family))).collect(),
        };
        let published = if i == 2 { vec!["80:8080".parse().expect("a port")] } else { Vec::new() };
        Arc::new(Endpoint { published, source_check: i != 0, ..Endpoint::on_bridge(&format!("e{i}"), port) })
    }

    pub fn desired(&self, ids: &mut NexthopIds) -> State {
        let host = self.host();
        let mut resolve = |entries: Vec<_>| if self.flags[3] { ids.resolve(entries) } else { entries };
        let mut state: State = resolve(self.entries().into_iter().collect()).into_iter().collect();
        for (i, peer) in (10u8..).zip(&self.peers) {
            let Some((address, mac, families)) = *peer else { continue };
            let remote_subnets: PerFamily<RemoteSubnet> = peer_families(families, self)
                .map(|family| {
                    let mac = Mac([2, 0, 0, 0, i, mac]);
                    (
                        family,
                        RemoteSubnet {
                            subnet: subnet(family, i),
                            public_ip: public_ip(family, 16 * (i - 9) + address),
                            endpoint: Some(PeerEndpoint::Vxlan(mac)),
                        },
                    )
                })
                .collect();
            if !remote_subnets.is_empty() {
                let mut entries = host.peer_entries(&Peer { remote_subnets });
                entries.retain(|(key, _)| host.peer_entry_scope(key) == self.scope());
                state.extend(resolve(entries));
            }
        }
        state
    }
}

fn peer_families(which: u8, setup: &Setup) -> impl Iterator<Item = Family> {
    setup.families().filter(move |family| which == 2 || *family == Family::ALL[usize::from(which)])
}

pub fn subnet(family: Family, i: u8) -> Cidr {
    let (address, length): (IpAddr, u8) = match family {
        Family::V4 => (Ipv4Addr::new(10, 244, i, 0).into(), 24),
        Family::V6 => (Ipv6Addr::new(0xfd00, 0x10, 0x244, i.into(), 0, 0, 0, 0).into(), 64),
    };
    Cidr::containing(address, length).expect("a CIDR")
}

pub fn public_ip(family: Family, i: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, i).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, i.into()).into(),
    }
}

pub fn any_setup() -> impl Strategy<Value = Setup> {
    let peer = prop_oneof![2 => (0u8..2, 0u8..2, 0u8..3).prop_map(Some), 1 => Just(None)];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), prop::bool::weighted(0.8)).prop_map(|(a, b, c, d)| [a, b, c, d]);
    let vxlan = (prop_oneof![4 => Just(1u32), 1 => Just(2)], prop_oneof![4 => Just(8472u16), 1 => Just(4789)]);
    let own = (1u8..3, 1u8..4, prop_oneof![4 => Just(1u8), 1 => Just(2)]);
    let ports = prop::collection::btree_set(0u8..3, 0..3).prop_map(|ports| ports.into_iter().collect());
    let isolated = prop::bool::weighted(0.3);
    (0u8..3, vxlan, select(vec![1400u32, 1500]), own, flags, ports, prop::array::uniform5(peer), isolated).prop_map(
        |(families, (vni, port), underlay_mtu, (own_subnet, own_address, own_mac), flags, ports, peers, isolated)| Setup {
            families,
            vni,
            port,
            underlay_mtu,
            own_subnet,
            own_address,
            own_mac,
            flags,
            ports,
            peers,
            isolated,
        },
    )
}

/// Two setups of one host with the same start-up settings and mostly the same peers.
pub fn similar_setups() -> impl Strategy<Value = (Setup, Setup)> {
    (any_setup(), any_setup(), any::<[bool; 5]>()).prop_map(|(before, after, kept)| {
        let mut peers = before.peers;
        for ((peer, other), kept) in peers.iter_mut().zip(after.peers).zip(kept) {
            if !kept {
                *peer = other;
            }
        }
        // Ports exist in both setups.
        let after = Setup { families: before.families, ports: before.ports.clone(), peers, isolated: before.isolated, ..after };
        (before, after)
    })
}

/// Any possible kernel state: another setup's entries, with some removed and others added or changed.
pub fn any_state() -> impl Strategy<Value = State> {
    let changes = prop::collection::vec((any_entry(), any::<Option<prop::sample::Index>>()), 0..16);
    (prop::option::weighted(0.8, any_setup()), changes).prop_map(|(setup, changes)| {
        let mut state = setup.map(|setup| setup.desired(&mut NexthopIds::default())).unwrap_or_default();
        for ((key, value), lost) in changes {
            if let Some(index) = lost
                && !state.is_empty()
            {
                let key = state.keys().nth(index.index(state.len())).cloned();
                key.and_then(|key| state.remove(&key));
            }
            state.insert(key, value);
        }
        normalise(state)
    })
}

fn any_entry() -> impl Strategy<Value = (Key, Value)> {
    let family = || select(Family::ALL.to_vec());
    let vni = || prop_oneof![3 => Just(1u32), 1 => Just(2)].prop_map(|vni| Vni::try_from(vni).expect("a VNI"));
    let vxlan = move || (family(), vni()).prop_map(|(family, vni)| (family, Device::vxlan(family, vni)));
    let device = move || prop_oneof![vxlan().prop_map(|(_, device)| device), vni().prop_map(Device::bridge)];
    let mac = || (10u8..15, 0u8..3).prop_map(|(i, mac)| Mac([2, 0, 0, 0, i, mac]));
    let index = || 1u8..15;
    let id = || (0u32..14).prop_map(|i| NEXTHOP_IDS.start + i);
    let route = (vxlan(), index(), index(), id(), 0u8..4).prop_map(|((family, device), i, j, id, which)| {
        let via = match which {
            0 => RouteTarget::Nexthop(id),
            1 => RouteTarget::Gateway(device, subnet(family, j).base()),
            2 => RouteTarget::Via(public_ip(family, j)),
            _ => RouteTarget::Foreign,
        };
        (Key::Route(subnet(family, i)), Value::Route(via))
    });
    prop_oneof![
        2 => (vxlan(), mac(), any::<u8>()).prop_map(|((f, d), mac, i)| (Key::Fdb(d, mac), Value::Fdb(public_ip(f, i)))),
        2 => (vxlan(), index(), mac()).prop_map(|((f, d), i, mac)| (Key::Neigh(d, subnet(f, i).base()), Value::Neigh(mac))),
        3 => (id(), vxlan(), index())
            .prop_map(|(id, (f, device), i)| (Key::Nexthop(id), Value::Nexthop { device, gateway: subnet(f, i).base() })),
        3 => route,
        1 => (device(), family(), index())
            .prop_map(|(d, f, i)| (Key::Address(d, IpNetwork::from(subnet(f, i).base())), Value::Address)),
        1 => (device(), any::<bool>()).prop_map(|(d, on)| sysctl(&format!("ipv6/conf/{d}/accept_ra"), on)),
        1 => select(vec!["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/tcp_sack"]).prop_map(|path| sysctl(path, false)),
        1 => family().prop_map(|f| (Key::ForwardAccept(f), Value::ForwardAccept([subnet(f, 9)].into()))),
        1 => select(Table::ALL.to_vec()).prop_map(|table| (Key::Ruleset(table), Value::Ruleset(Box::default()))),
        1 => (family(), index(), index())
            .prop_map(|(f, i, j)| Element::Peer(PeerPair::new(public_ip(f, i), subnet(f, j).base()).expect("one family")))
            .prop_map(|element| (Key::Element(element), Value::Element(None))),
        1 => (family(), index(), 79u16..81).prop_map(|(f, i, port)| {
            let target = std::net::SocketAddr::new(subnet(f, i).base(), port);
            (Key::Element(Element::Port(f, Transport::Tcp, 80)), Value::Element(Some(Box::new(target))))
        }),
        1 => any_setup().prop_map(|setup| drifted_ruleset(&setup)),
        4 => any_link(),
    ]
}

fn sysctl(path: &str, on: bool) -> (Key, Value) {
    (Key::Sysctl(path.into()), Value::Sysctl(u8::from(on).to_string().into()))
}

fn drifted_ruleset(setup: &Setup) -> (Key, Value) {
    let table = Table::ALL[usize::from(setup.own_address % 2)];
    let entries = setup.entries();
    let Value::Ruleset(rules) = &entries[&Key::Ruleset(table)] else { unreachable!("each host has both tables") };
    let mut rules = rules.clone();
    for chain in &mut rules.chains {
        chain.rules.push(Rule { exprs: vec![Expr::Foreign] });
    }
    (Key::Ruleset(table), Value::Ruleset(rules))
}

/// A link of another setup: unchanged, drifted, foreign, or an endpoint's port.
fn any_link() -> impl Strategy<Value = (Key, Value)> {
    (any_setup(), any::<prop::sample::Index>(), 0u8..8).prop_map(|(setup, index, form)| {
        let links: Vec<(Key, Value)> = setup.entries().into_iter().filter(|(_, value)| matches!(value, Value::Link(_))).collect();
        let (key, value) = links[index.index(links.len())].clone();
        let Value::Link(mut link) = value else { unreachable!("only links are left") };
        link.mac = link.mac.or(Some(Mac([2, 3, 0, 0, 0, 1])));
        match form {
            0 => link.up = false,
            1 => link.mtu = 1280,
            2 if link.kind != LinkKind::Port => link.mac = Some(Mac([2, 3, 0, 0, 0, 2])),
            3 => link.master = None,
            4 => {
                link.kind = LinkKind::Foreign { kind: "dummy".to_owned() };
                link.master = None;
            }
            5 => link.master = link.master.and(Vni::try_from(2).ok()).map(Device::bridge),
            _ => {}
        }
        (key, Value::Link(link))
    })
}
