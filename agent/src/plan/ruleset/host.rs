//! The table `inet overlayd`: forwarding, masquerade, published ports, and the tunnel source filter.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::spec::InetTableSpec;
use super::{Base, Chain, ChainKind, Counter, Expr, Field, Hook, Rule, Ruleset, SetName, Table, UDP, is, is_not, rule};
use crate::model::device::{BRIDGE_PREFIX, TRANSIT_PREFIX, VXLAN_PREFIXES};
use crate::model::network::Pool;
use crate::model::{Cidr, Family, Role, Vni, transfer_range};
use crate::plan::isolation::Scope;

/// `NF_IP_PRI_RAW`, `NF_IP_PRI_NAT_DST`, `NF_IP_PRI_FILTER` and `NF_IP_PRI_NAT_SRC` in `linux/netfilter_ipv4.h`.
const NF_IP_PRI_RAW: i32 = -300;
const NF_IP_PRI_NAT_DST: i32 = -100;
const NF_IP_PRI_FILTER: i32 = 0;
const NF_IP_PRI_NAT_SRC: i32 = 100;

/// The chain that defines the overlay's address ranges.
pub const OVERLAY_CHAIN: &str = "overlay";
/// The chain that drops packets between isolated networks and others.
const ISOLATION_CHAIN: &str = "isolation";
/// The chain of the tunnel source filter.
const TUNNEL_CHAIN: &str = "vxlan";

/// Offsets from the UDP header of a VXLAN packet: UDP has 8 bytes, VXLAN 8, and an Ethernet header 14 (RFC 7348 section 5).
const VNI_FIELD: Field = Field::transport(12, 3);
const INNER_ETHERTYPE: Field = Field::transport(28, 2);
const INNER_IP_OFFSET: u8 = 30;

impl InetTableSpec {
    /// Accepts packets with the network's VNI from its peers, and drops all others.
    fn tunnel_rules(&self) -> Vec<Rule> {
        let mut rules = Vec::new();
        for (family, pool) in self.network.pools.iter() {
            // RFC 791 section 3.1, RFC 8200 section 3: offset of the source in the inner IP header.
            let (ethertype, offset) = match family {
                Family::V4 => ([0x08, 0x00], INNER_IP_OFFSET + 12),
                Family::V6 => ([0x86, 0xdd], INNER_IP_OFFSET + 8),
            };
            rules.extend(self.tunnel_sets(family, pool.subnet_length).map(|(set, prefix)| {
                let fields = vec![Field::Source(family), Field::Transport { offset, length: family.bits() / 8, prefix }];
                rule([is(INNER_ETHERTYPE, &ethertype), Expr::In { fields, set }, Expr::Accept])
            }));
        }
        rules.push(rule([Expr::Count(Counter::Tunnel), Expr::Drop]));
        rules
    }

    /// Drops packets that the network's containers send to a VXLAN port.
    fn encapsulation_rule(&self) -> Option<Rule> {
        let from_container = Expr::InputInterface(self.inner_device()?.name());
        Some(rule([from_container, Expr::Count(Counter::Encapsulation), Expr::Drop]))
    }

    fn postrouting_rules(&self) -> Vec<Rule> {
        let mut rules = Vec::new();
        if let Some(inner) = self.loopback_device() {
            let own = |family| match self.transit() {
                Some(transit) => Some(Cidr::host(transit.network(family))),
                None => self.subnet.get(family),
            };
            let sources = self.network.families().flat_map(|family| [own(family), Some(loopback(family))]).flatten();
            for cidr in sources {
                let source = Expr::Source { cidr, negate: false };
                rules.push(rule([Expr::OutputInterface(inner.name()), Expr::Translated, source, Expr::Masquerade]));
            }
        }
        if self.scope == Scope::Network && self.transit().is_some() {
            rules.extend(self.network.pools.iter().map(|(family, pool)| {
                rule([
                    in_leased_range(Field::Source(family), pool, false),
                    Expr::OutputInterface(self.transit_device().name()),
                    in_leased_range(Field::Destination(family), pool, true),
                    Expr::Masquerade,
                ])
            }));
        }
        if self.masquerade && self.isolation.is_none() {
            for (family, pool) in self.network.pools.iter() {
                let tunnel = self.devices.get(family).map(|device| device.name());
                let mut leaving = vec![
                    in_leased_range(Field::Source(family), pool, false),
                    interface_is_not(Field::OutputInterface, &self.bridge.name()),
                ];
                leaving.extend(tunnel.iter().map(|tunnel| interface_is_not(Field::OutputInterface, tunnel)));
                leaving.extend([
                    in_leased_range(Field::Destination(family), pool, true),
                    Expr::Destination { cidr: multicast(family), negate: true },
                    Expr::Masquerade,
                ]);
                rules.push(rule(leaving));
                if let Some(tunnel) = tunnel {
                    let from_outside = in_leased_range(Field::Source(family), pool, true);
                    rules.push(rule([Expr::OutputInterface(tunnel), from_outside, Expr::Masquerade]));
                }
            }
        }
        rules
    }
}

/// Builds the table `inet overlayd` of a network namespace from its networks, at least one. Without a tunnel it lacks `tunnel`,
/// `vxlan`, `encapsulated` and `outgoing`:
///
/// - `tunnel` and `vxlan`: the tunnel source filter. VXLAN with our VNI is only accepted from a peer, and only with an inner
///   source in that peer's subnet. With several networks, a chain for each VNI. The hook is input, after fragment reassembly, so
///   that a later fragment cannot hide a checked field. Other VNIs on the port pass unchecked.
/// - `incoming`: drops encapsulation forged by a container, for this host or another one. Containers neither send from
///   127.0.0.0/8 nor reach it, regardless of `route_localnet`.
/// - `encapsulated` (jumped to from `incoming`) and `outgoing`: exempt the tunnel's own packets from conntrack. Otherwise
///   conntrack would track them as a connection, in addition to the inner one. VXLAN packets that this host only forwards
///   stay tracked, because foreign rules may translate them.
/// - `overlay`: no packet traverses it. It documents the overlay's address ranges for operators and `overlayctl trace`. The
///   ranges cover the leased subnets, not the whole network, which may also contain hosts. Accepting forwarded packets needs
///   no rule: a packet that passes this table is accepted, and no rule here can override a drop in another table.
/// - `prerouting`, `output`: published ports.
/// - `postrouting`: with `masquerade`, traffic that leaves the overlay gets the host's address, except multicast and traffic
///   that stays on the bridge. With `masquerade`, traffic that enters the tunnel from outside the overlay gets this host's
///   address in the overlay, because peers accept only its subnet from a host. Connections to a published port from the
///   container's own bridge or the host's loopback are masqueraded too, so that the container answers through this host.
///   Traffic inside the overlay is not translated, nor is traffic from a container to a peer whose subnet the network no
///   longer leases.
///
/// An isolated network's containers are behind its transit. In the host's table its published ports lead to the transit's other
/// end, what comes from a transit and leaves by another device gets the host's address, and there are two more chains:
///
/// - `forward`, `isolation`: a packet between a transit and another network of this host is dropped, unless a published port
///   translated it. Nothing else enters a transit, except replies to connections from it, whose source was translated: otherwise
///   a neighbour of the host who knows the transfer address would reach a port that is bound to another address of the host.
///
/// The network's own table has no tunnel source filter and no `output`. Its `prerouting` translates what comes by the transit,
/// and its `postrouting` masquerades what leaves by it.
pub fn inet_table(specs: &[&InetTableSpec]) -> Ruleset {
    let has = |family: &Family| specs.iter().any(|spec| spec.network.families().any(|f| f == *family));
    let families: Vec<Family> = Family::ALL.into_iter().filter(has).collect();
    let publishes = specs.iter().any(|spec| spec.publishes);
    let ports: BTreeSet<u16> = specs.iter().filter_map(|spec| spec.tunnel).map(|tunnel| tunnel.port).collect();
    let to_tunnel_port = |statement: Expr| {
        let to = |port: &u16| [is(Field::Layer4, &UDP), is(Field::DestinationPort, &port.to_be_bytes())];
        ports.iter().map(|port| rule(to(port).into_iter().chain([statement.clone()]))).collect::<Vec<_>>()
    };
    let filter = |name, hook, rules| base_chain(name, hook, ChainKind::Filter, NF_IP_PRI_RAW, rules);
    let in_host = specs.iter().all(|spec| spec.scope == Scope::Host);
    let transits: Vec<&InetTableSpec> =
        specs.iter().copied().filter(|spec| spec.is_host_end() && spec.transit().is_some()).collect();
    let mut incoming = to_tunnel_port(Expr::Jump("encapsulated".to_owned()));
    incoming.extend(loopback_rules(specs, &families));
    let mut chains = vec![filter("incoming", Hook::Prerouting, incoming), overlay_chain(specs)];
    if !ports.is_empty() {
        chains.push(encapsulated_chain(specs));
        if in_host {
            chains.push(filter("outgoing", Hook::Output, to_tunnel_port(Expr::Untrack)));
        }
    }
    let with_vni: Vec<(&InetTableSpec, Vni)> = specs.iter().filter_map(|spec| Some((*spec, spec.vni()?))).collect();
    if !with_vni.is_empty() {
        chains.push(filter("tunnel", Hook::Input, to_tunnel_port(Expr::Jump(TUNNEL_CHAIN.to_owned()))));
        chains.extend(tunnel_chains(&with_vni));
    }
    if publishes {
        let nat = |name, hook, rules| base_chain(name, hook, ChainKind::Nat, NF_IP_PRI_NAT_DST, rules);
        if in_host {
            chains.push(nat("prerouting", Hook::Prerouting, publish_rules(&families, true)));
            chains.push(nat("output", Hook::Output, publish_rules(&families, false)));
        } else {
            chains.push(nat("prerouting", Hook::Prerouting, specs.iter().flat_map(|spec| transit_port_rules(spec)).collect()));
        }
    }
    if !transits.is_empty() {
        chains.extend(isolation_chains());
    }
    let mut postrouting: Vec<Rule> = specs.iter().flat_map(|spec| spec.postrouting_rules()).collect();
    postrouting.extend(transfer_rules(&transits));
    if !postrouting.is_empty() {
        chains.push(base_chain("postrouting", Hook::Postrouting, ChainKind::Nat, NF_IP_PRI_NAT_SRC, postrouting));
    }
    chains.sort_by(|a, b| a.name.cmp(&b.name));
    let mut sets: Vec<SetName> = Vec::new();
    for (spec, _) in &with_vni {
        sets.extend(spec.all_tunnel_sets());
    }
    if publishes {
        sets.extend(families.iter().map(|family| SetName::Ports(*family)));
        sets.extend(families.iter().filter(|_| in_host).map(|family| SetName::Bound(*family)));
    }
    sets.sort();
    sets.dedup();
    let mut counters = vec![Counter::Encapsulation, Counter::Isolation, Counter::Loopback, Counter::Tunnel];
    counters.retain(|counter| match counter {
        Counter::Isolation => !transits.is_empty(),
        Counter::Loopback => families.contains(&Family::V4),
        Counter::Tunnel => in_host,
        _ => true,
    });
    Ruleset { table: Table::Inet, counters, sets, chains, foreign: Vec::new() }
}

/// The tunnel source filter: one chain for a single network, or one that jumps to a chain for each VNI.
fn tunnel_chains(specs: &[(&InetTableSpec, Vni)]) -> Vec<Chain> {
    let mut rules: Vec<Rule> = specs.iter().filter_map(|(spec, _)| spec.encapsulation_rule()).collect();
    let mut chains = Vec::new();
    for (spec, vni) in specs {
        let [_, field @ ..] = vni.get().to_be_bytes();
        if specs.len() == 1 {
            rules.push(rule([is_not(VNI_FIELD, &field), Expr::Return]));
            rules.extend(spec.tunnel_rules());
        } else {
            let name = format!("{TUNNEL_CHAIN}.{vni}");
            rules.push(rule([is(VNI_FIELD, &field), Expr::Jump(name.clone())]));
            chains.push(Chain { name, base: None, rules: spec.tunnel_rules() });
        }
    }
    chains.push(Chain { name: TUNNEL_CHAIN.to_owned(), base: None, rules });
    chains
}

/// Drops containers' packets from and to loopback addresses. Packets from other interfaces leave the chain after one comparison.
fn loopback_rules(specs: &[&InetTableSpec], families: &[Family]) -> Vec<Rule> {
    if !families.contains(&Family::V4) {
        return Vec::new();
    }
    let cidr = loopback(Family::V4);
    let matches = [Expr::Destination { cidr, negate: false }, Expr::Source { cidr, negate: false }];
    let drops = |from: Option<Expr>| {
        let drop = move |expr: Expr| rule(from.iter().cloned().chain([expr, Expr::Count(Counter::Loopback), Expr::Drop]));
        matches.clone().map(drop)
    };
    let comes_from = |role| specs.iter().filter_map(|spec| spec.inner_device()).any(|device| device.role == role);
    let mut rules = Vec::new();
    if comes_from(Role::Transit) {
        rules.extend(drops(Some(is(Field::InputInterface, TRANSIT_PREFIX.as_bytes()))));
    }
    if comes_from(Role::Bridge) {
        let not_from_bridge = match specs {
            [only] => interface_is_not(Field::InputInterface, &only.bridge.name()),
            _ => is_not(Field::InputInterface, BRIDGE_PREFIX.as_bytes()),
        };
        rules.push(rule([not_from_bridge, Expr::Accept]));
        rules.extend(drops(None));
    }
    rules
}

fn encapsulated_chain(specs: &[&InetTableSpec]) -> Chain {
    let mut rules: Vec<Rule> = specs.iter().filter_map(|spec| spec.encapsulation_rule()).collect();
    let mut local: Vec<IpAddr> = Vec::new();
    for spec in specs {
        let addresses = spec.network.families().filter_map(|family| spec.local.get(family).copied());
        for address in addresses {
            if !local.contains(&address) {
                local.push(address);
            }
        }
    }
    let destinations = local.into_iter().map(|address| Expr::Destination { cidr: Cidr::host(address), negate: false });
    rules.extend(destinations.map(|to_us| rule([to_us, Expr::Untrack, Expr::Accept])));
    Chain { name: "encapsulated".to_owned(), base: None, rules }
}

fn overlay_chain(specs: &[&InetTableSpec]) -> Chain {
    let fields = |family| [Field::Source(family), Field::Destination(family)];
    let pools = specs.iter().filter(|spec| !spec.is_host_end()).flat_map(|spec| spec.network.pools.iter());
    let exprs = pools.flat_map(|(family, pool)| fields(family).map(|field| in_leased_range(field, pool, false)));
    Chain { name: OVERLAY_CHAIN.to_owned(), base: None, rules: exprs.map(|expr| rule([expr, Expr::Accept])).collect() }
}

/// Ports bound to one address come before ports of any address. A loopback address cannot be reached from outside: ports bound to
/// it are reachable from this host only.
fn publish_rules(families: &[Family], from_outside: bool) -> Vec<Rule> {
    let mut rules = Vec::new();
    if from_outside && families.contains(&Family::V4) {
        rules.push(rule([Expr::Destination { cidr: loopback(Family::V4), negate: false }, Expr::Accept]));
    }
    let port = [Field::Layer4, Field::DestinationPort];
    for family in families {
        let fields = [Field::Destination(*family)].into_iter().chain(port).collect();
        rules.push(rule([Expr::Translate { fields, map: SetName::Bound(*family) }]));
    }
    for family in families {
        rules.push(rule([Expr::ToThisHost, Expr::Translate { fields: port.to_vec(), map: SetName::Ports(*family) }]));
    }
    rules
}

/// Ports that the host translated to the network's end of its transit.
fn transit_port_rules(spec: &InetTableSpec) -> Vec<Rule> {
    let fields = vec![Field::Layer4, Field::DestinationPort];
    let translate = |family| Expr::Translate { fields: fields.clone(), map: SetName::Ports(family) };
    let from_host = Expr::InputInterface(spec.transit_device().name());
    spec.network.families().map(|family| rule([from_host.clone(), translate(family)])).collect()
}

/// The chains between transits and other devices of ours.
fn isolation_chains() -> [Chain; 2] {
    let jump = || Expr::Jump(ISOLATION_CHAIN.to_owned());
    let from_transit = || is(Field::InputInterface, TRANSIT_PREFIX.as_bytes());
    let leaves_by = |prefix: &str| is(Field::OutputInterface, prefix.as_bytes());
    let other_networks = [BRIDGE_PREFIX].into_iter().chain(VXLAN_PREFIXES);
    let mut rules: Vec<Rule> = other_networks.map(|prefix| rule([from_transit(), leaves_by(prefix), jump()])).collect();
    rules.push(rule([leaves_by(TRANSIT_PREFIX), jump()]));
    let isolation = vec![rule([Expr::AddressTranslated, Expr::Accept]), rule([Expr::Count(Counter::Isolation), Expr::Drop])];
    [
        base_chain("forward", Hook::Forward, ChainKind::Filter, NF_IP_PRI_FILTER, rules),
        Chain { name: ISOLATION_CHAIN.to_owned(), base: None, rules: isolation },
    ]
}

/// Masquerades transfer addresses, which nothing outside could answer. Between transits only published ports are translated.
fn transfer_rules(transits: &[&InetTableSpec]) -> Vec<Rule> {
    let has = |family: &Family| transits.iter().any(|spec| spec.network.families().any(|f| f == *family));
    let masquerade = |family| {
        let range = transfer_range(family);
        let in_range = |field, negate| Expr::Range { field, first: range.base(), last: range.last(), negate };
        rule([
            in_range(Field::Source(family), false),
            is_not(Field::OutputInterface, TRANSIT_PREFIX.as_bytes()),
            in_range(Field::Destination(family), true),
            Expr::Masquerade,
        ])
    };
    Family::ALL.into_iter().filter(has).map(masquerade).collect()
}

fn base_chain(name: &str, hook: Hook, kind: ChainKind, priority: i32, rules: Vec<Rule>) -> Chain {
    Chain { name: name.to_owned(), base: Some(Base { hook, kind, priority }), rules }
}

/// A match: the packet's input or output interface is another one. With br_netfilter, frames that stay on the bridge also pass
/// the hooks; without this match, a broadcast would get the host's address.
fn interface_is_not(field: Field, interface: &str) -> Expr {
    let mut padded = vec![0; usize::from(field.length())];
    for (to, from) in padded.iter_mut().zip(interface.as_bytes()) {
        *to = *from;
    }
    is_not(field, &padded)
}

/// A match on the addresses of a pool's leased subnets. With `negate`, a match on all other addresses.
fn in_leased_range(field: Field, pool: &Pool, negate: bool) -> Expr {
    Expr::Range { field, first: pool.min.base(), last: pool.max.last(), negate }
}

fn loopback(family: Family) -> Cidr {
    match family {
        Family::V4 => to_cidr(Ipv4Addr::LOCALHOST.into(), 8),
        Family::V6 => to_cidr(Ipv6Addr::LOCALHOST.into(), 128),
    }
}

fn multicast(family: Family) -> Cidr {
    match family {
        Family::V4 => to_cidr(Ipv4Addr::new(224, 0, 0, 0).into(), 4),
        Family::V6 => to_cidr(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), 8),
    }
}

fn to_cidr(address: IpAddr, length: u8) -> Cidr {
    Cidr::containing(address, length).unwrap_or_else(|| Cidr::host(address))
}
