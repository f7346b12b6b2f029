//! The table `inet overlayd`: forwarding, masquerade, published ports, and the tunnel source filter.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Base, Chain, ChainKind, Counter, Expr, Field, Hook, Rule, Ruleset, SetName, Table, UDP, is, is_not, rule};
use crate::model::network::Pool;
use crate::model::{Cidr, Device, Family, NetworkConfig, PerFamily, Subnet, Vni};
use crate::plan::backend::{self, Backend, Tunnel};

/// `NF_IP_PRI_RAW`, `NF_IP_PRI_NAT_DST` and `NF_IP_PRI_NAT_SRC` in `linux/netfilter_ipv4.h`.
const NF_IP_PRI_RAW: i32 = -300;
const NF_IP_PRI_NAT_DST: i32 = -100;
const NF_IP_PRI_NAT_SRC: i32 = 100;

/// The chain that defines the overlay's address ranges.
pub const OVERLAY_CHAIN: &str = "overlay";

/// Offsets from the UDP header of a VXLAN packet: UDP has 8 bytes, VXLAN 8, and an Ethernet header 14 (RFC 7348 section 5).
const VNI_FIELD: Field = Field::transport(12, 3);
const INNER_ETHERTYPE: Field = Field::transport(28, 2);
const INNER_IP_OFFSET: u8 = 30;

/// The input of the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InetTableSpec {
    /// The network.
    pub network: NetworkConfig,
    /// This host's subnet.
    pub subnet: Subnet,
    /// The source addresses of its VXLAN devices, per family.
    pub local: PerFamily<IpAddr>,
    /// Whether traffic that leaves the overlay gets the host's address.
    pub masquerade: bool,
    /// Whether ports are published. Without them, their chains are left out, so that no connection pays for them.
    pub publishes: bool,
}

impl InetTableSpec {
    /// Builds the table `inet overlayd`. Without a tunnel it lacks `tunnel`, `vxlan`, `encapsulated` and `outgoing`:
    ///
    /// - `tunnel` and `vxlan`: the tunnel source filter. VXLAN with our VNI is only accepted from a peer, and only with an inner
    ///   source in that peer's subnet. The hook is input, after fragment reassembly, so that a later fragment cannot hide a
    ///   checked field. Other VNIs on the port pass unchecked.
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
    pub fn ruleset(&self) -> Ruleset {
        let mut counters = vec![Counter::Encapsulation, Counter::Loopback, Counter::Tunnel];
        let families: Vec<Family> = self.network.families().collect();
        let mut chains = vec![self.incoming_chain(&families), self.overlay_chain()];
        if let Some(tunnel) = self.backend().tunnel() {
            let untrack = vec![rule([port_match(tunnel), vec![Expr::Untrack]].concat())];
            chains.push(self.encapsulated_chain(&families));
            chains.push(base_chain("outgoing", Hook::Output, ChainKind::Filter, NF_IP_PRI_RAW, untrack));
            chains.extend(tunnel.vni.map(|_| tunnel_chain(tunnel)));
            chains.extend(tunnel.vni.map(|vni| self.vxlan_chain(vni, &families)));
        }
        if !families.contains(&Family::V4) {
            counters.retain(|counter| *counter != Counter::Loopback);
        }
        if self.publishes {
            chains.push(base_chain(
                "prerouting",
                Hook::Prerouting,
                ChainKind::Nat,
                NF_IP_PRI_NAT_DST,
                self.publish_rules(&families, true),
            ));
            chains.push(base_chain(
                "output",
                Hook::Output,
                ChainKind::Nat,
                NF_IP_PRI_NAT_DST,
                self.publish_rules(&families, false),
            ));
        }
        let postrouting = self.postrouting_rules(&families);
        if !postrouting.is_empty() {
            chains.push(base_chain("postrouting", Hook::Postrouting, ChainKind::Nat, NF_IP_PRI_NAT_SRC, postrouting));
        }
        let mut sets = Vec::new();
        for family in families {
            sets.extend([SetName::Peers(family), SetName::Ranges(family)]);
            if !self.masquerade {
                sets.push(SetName::Hosts(family));
            }
            if self.publishes {
                sets.extend([SetName::Bound(family), SetName::Ports(family)]);
            }
        }
        sets.sort();
        chains.sort_by(|a, b| a.name.cmp(&b.name));
        Ruleset { table: Table::Inet, counters, sets, chains, foreign: Vec::new() }
    }

    fn bridge_name(&self) -> String {
        self.backend().bridge().name()
    }

    fn backend(&self) -> &dyn Backend {
        backend::of(&self.network)
    }

    fn vxlan_chain(&self, vni: Vni, families: &[Family]) -> Chain {
        let [_, vni @ ..] = vni.get().to_be_bytes();
        let mut rules = vec![
            rule([Expr::InputInterface(self.bridge_name()), Expr::Count(Counter::Encapsulation), Expr::Drop]),
            rule([is_not(VNI_FIELD, &vni), Expr::Return]),
        ];
        for family in families {
            let Some(pool) = self.network.pools.get(*family) else { continue };
            let bits = family.bits();
            // RFC 791 section 3.1, RFC 8200 section 3: offset of the source in the inner IP header.
            let (ethertype, offset) = match family {
                Family::V4 => ([0x08, 0x00], INNER_IP_OFFSET + 12),
                Family::V6 => ([0x86, 0xdd], INNER_IP_OFFSET + 8),
            };
            let mut allow = |set, prefix| {
                let fields = vec![Field::Source(*family), Field::Transport { offset, length: bits / 8, prefix }];
                rules.push(rule([is(INNER_ETHERTYPE, &ethertype), Expr::In { fields, set }, Expr::Accept]));
            };
            allow(SetName::Peers(*family), pool.subnet_length);
            if !self.masquerade {
                allow(SetName::Hosts(*family), bits);
            }
            allow(SetName::Ranges(*family), bits);
        }
        rules.push(rule([Expr::Count(Counter::Tunnel), Expr::Drop]));
        Chain { name: "vxlan".to_owned(), base: None, rules }
    }

    /// Packets from interfaces other than the bridge leave this chain after one comparison.
    fn incoming_chain(&self, families: &[Family]) -> Chain {
        let jump = |tunnel| rule([port_match(tunnel), vec![Expr::Jump("encapsulated".to_owned())]].concat());
        let mut rules: Vec<Rule> = self.backend().tunnel().map(jump).into_iter().collect();
        if families.contains(&Family::V4) {
            let cidr = loopback(Family::V4);
            rules.push(rule([interface_is_not(Field::InputInterface, &self.bridge_name()), Expr::Accept]));
            let matches = [Expr::Destination { cidr, negate: false }, Expr::Source { cidr, negate: false }];
            rules.extend(matches.map(|expr| rule([expr, Expr::Count(Counter::Loopback), Expr::Drop])));
        }
        base_chain("incoming", Hook::Prerouting, ChainKind::Filter, NF_IP_PRI_RAW, rules)
    }

    fn encapsulated_chain(&self, families: &[Family]) -> Chain {
        let mut rules = vec![rule([Expr::InputInterface(self.bridge_name()), Expr::Count(Counter::Encapsulation), Expr::Drop])];
        let local_addresses = families.iter().filter_map(|family| self.local.get(*family));
        let destinations = local_addresses.map(|address| Expr::Destination { cidr: Cidr::host(*address), negate: false });
        rules.extend(destinations.map(|to_us| rule([to_us, Expr::Untrack, Expr::Accept])));
        Chain { name: "encapsulated".to_owned(), base: None, rules }
    }

    fn overlay_chain(&self) -> Chain {
        let fields = |family| [Field::Source(family), Field::Destination(family)];
        let exprs =
            self.network.pools.iter().flat_map(|(family, pool)| fields(family).map(|field| in_leased_range(field, pool, false)));
        Chain { name: OVERLAY_CHAIN.to_owned(), base: None, rules: exprs.map(|expr| rule([expr, Expr::Accept])).collect() }
    }

    /// Ports bound to one address come before ports of any address. A loopback address cannot be reached from outside: ports
    /// bound to it are reachable from this host only.
    fn publish_rules(&self, families: &[Family], from_outside: bool) -> Vec<Rule> {
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

    fn postrouting_rules(&self, families: &[Family]) -> Vec<Rule> {
        let mut rules = Vec::new();
        if self.publishes {
            let sources = families.iter().flat_map(|family| [self.subnet.get(*family), Some(loopback(*family))]).flatten();
            for cidr in sources {
                let source = Expr::Source { cidr, negate: false };
                rules.push(rule([Expr::OutputInterface(self.bridge_name()), Expr::Translated, source, Expr::Masquerade]));
            }
        }
        if self.masquerade {
            for (family, pool) in self.network.pools.iter() {
                let tunnel = self.backend().device(family).map(Device::name);
                let mut leaving = vec![
                    in_leased_range(Field::Source(family), pool, false),
                    interface_is_not(Field::OutputInterface, &self.bridge_name()),
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

/// UDP to the tunnel's port.
fn port_match(tunnel: Tunnel) -> Vec<Expr> {
    vec![is(Field::Layer4, &UDP), is(Field::DestinationPort, &tunnel.port.to_be_bytes())]
}

fn tunnel_chain(tunnel: Tunnel) -> Chain {
    let jump = rule([port_match(tunnel), vec![Expr::Jump("vxlan".to_owned())]].concat());
    base_chain("tunnel", Hook::Input, ChainKind::Filter, NF_IP_PRI_RAW, vec![jump])
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
