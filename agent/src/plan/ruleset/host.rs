//! The table `inet overlayd_command`: forwarding, masquerade, published ports, and who may tunnel to this host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Base, Chain, ChainKind, Counter, Expr, Field, Hook, Rule, Ruleset, SetName, Table, UDP, is, is_not, rule};
use crate::model::network::Pool;
use crate::model::{Cidr, Device, Family, NetworkConfig, PerFamily, Subnet};

/// `NF_IP_PRI_RAW`, `NF_IP_PRI_NAT_DST` and `NF_IP_PRI_NAT_SRC` in `linux/netfilter_ipv4.h`.
const NF_IP_PRI_RAW: i32 = -300;
const NF_IP_PRI_NAT_DST: i32 = -100;
const NF_IP_PRI_NAT_SRC: i32 = 100;

/// The chain that says what the overlay is.
pub const OVERLAY_CHAIN: &str = "overlay";

/// Bytes from the beginning of the UDP header of a VXLAN packet: UDP has 8 bytes, VXLAN 8, and an Ethernet header 14 (RFC 7348 section 5).
const VNI_FIELD: Field = Field::transport(12, 3);
const INNER_ETHERTYPE: Field = Field::transport(28, 2);
const INNER_IP_OFFSET: u8 = 30;

/// What the rules follow from.
#[derive(Debug, Clone, Copy)]
pub struct InetTableSpec<'a> {
    /// The network.
    pub network: &'a NetworkConfig,
    /// This host's subnet.
    pub subnet: &'a Subnet,
    /// The addresses that its VXLAN devices have as source, per family.
    pub local: &'a PerFamily<IpAddr>,
    /// Whether what leaves the overlay for elsewhere gets the host's address.
    pub masquerade: bool,
    /// Whether ports are published: without, there are no chains for them, and no connection pays for them.
    pub publishes: bool,
}

impl InetTableSpec<'_> {
    /// The table `inet overlayd_command`:
    ///
    /// - `tunnel` and `vxlan_chain`: VXLAN with our VNI passes only from a peer, and only with an inner source of that peer's subnet.
    ///   The hook is input, behind the reassembly of fragments: nothing that is checked can hide in the next fragment. Other VNIs of the port
    ///   are not ours to judge.
    /// - `incoming_chain`: encapsulation that a container forged is dropped, be it for this host or for another one; containers neither send from 127.0.0.0/8
    ///   nor reach it, whatever `route_localnet` says.
    /// - `encapsulated_chain` (from `incoming_chain`) and `outgoing`: conntrack takes no notice of the tunnel's own packets, each of which it would look up as a connection of
    ///   its own, beside the one inside. What VXLAN packets this host only forwards are somebody else's, and may be translated by it.
    /// - `overlay`: no packet goes through it. It says what the overlay is (the addresses of the subnets that are leased, not the whole network, in
    ///   which hosts may lie as well), to people and to `overlayctl trace`. That forwarding is accepted needs no rule: what
    ///   passes all of this table's rules is accepted, and what another table drops no rule of this one lifts.
    /// - `prerouting`, `run_command`: published ports.
    /// - `postrouting_rules`: with `masquerade` what leaves the overlay for elsewhere (not multicast, nor what stays on the bridge) gets the host's address; a container that was
    ///   reached by a published port from its own bridge or from the host's loopback answers through this host. What enters the tunnel from outside the overlay
    ///   gets this host's address in it, because peers take from a host its own subnet only. Inside the overlay nothing is translated, nor what a container sends
    ///   to a peer whose subnet the network does not lease any more.
    pub fn ruleset(&self) -> Ruleset {
        let mut counters = vec![Counter::Encapsulation, Counter::Loopback, Counter::Tunnel];
        let families: Vec<Family> = self.network.families().collect();
        let mut chains = vec![
            self.tunnel_chain(),
            self.vxlan_chain(&families),
            self.incoming_chain(&families),
            self.encapsulated_chain(&families),
            base_chain(
                "outgoing",
                Hook::Output,
                ChainKind::Filter,
                NF_IP_PRI_RAW,
                vec![rule([self.vxlan_port_match(), vec![Expr::Untrack]].concat())],
            ),
            self.overlay_chain(),
        ];
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
        Device::bridge(self.network.vxlan.vni).name()
    }

    /// UDP to the VXLAN port.
    fn vxlan_port_match(&self) -> Vec<Expr> {
        vec![is(Field::Layer4, &UDP), is(Field::DestinationPort, &self.network.vxlan.port.to_be_bytes())]
    }

    fn tunnel_chain(&self) -> Chain {
        let jump = rule([self.vxlan_port_match(), vec![Expr::Jump("vxlan".to_owned())]].concat());
        base_chain("tunnel", Hook::Input, ChainKind::Filter, NF_IP_PRI_RAW, vec![jump])
    }

    fn vxlan_chain(&self, families: &[Family]) -> Chain {
        let [_, vni @ ..] = self.network.vxlan.vni.get().to_be_bytes();
        let mut rules = vec![
            rule([Expr::InputInterface(self.bridge_name()), Expr::Count(Counter::Encapsulation), Expr::Drop]),
            rule([is_not(VNI_FIELD, &vni), Expr::Return]),
        ];
        for family in families {
            let Some(pool) = self.network.pools.get(*family) else { continue };
            let bits = family.bits();
            // RFC 791 section 3.1, RFC 8200 section 3: where the source stands in the inner IP header.
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

    /// What comes by another interface than the bridge is through after one comparison.
    fn incoming_chain(&self, families: &[Family]) -> Chain {
        let mut rules = vec![rule([self.vxlan_port_match(), vec![Expr::Jump("encapsulated".to_owned())]].concat())];
        if families.contains(&Family::V4) {
            let cidr = loopback(Family::V4);
            rules.push(rule([interface_is_not(Field::InputInterface, &self.bridge_name()), Expr::Accept]));
            let ends = [Expr::Destination { cidr, negate: false }, Expr::Source { cidr, negate: false }];
            rules.extend(ends.map(|end| rule([end, Expr::Count(Counter::Loopback), Expr::Drop])));
        }
        base_chain("incoming", Hook::Prerouting, ChainKind::Filter, NF_IP_PRI_RAW, rules)
    }

    fn encapsulated_chain(&self, families: &[Family]) -> Chain {
        let mut rules = vec![rule([Expr::InputInterface(self.bridge_name()), Expr::Count(Counter::Encapsulation), Expr::Drop])];
        let here = families.iter().filter_map(|family| self.local.get(*family));
        let here = here.map(|address| Expr::Destination { cidr: Cidr::host(*address), negate: false });
        rules.extend(here.map(|to_us| rule([to_us, Expr::Untrack, Expr::Accept])));
        Chain { name: "encapsulated".to_owned(), base: None, rules }
    }

    fn overlay_chain(&self) -> Chain {
        let ends = |family| [Field::Source(family), Field::Destination(family)];
        let ends =
            self.network.pools.iter().flat_map(|(family, pool)| ends(family).map(|field| in_leased_range(field, pool, false)));
        Chain { name: OVERLAY_CHAIN.to_owned(), base: None, rules: ends.map(|end| rule([end, Expr::Accept])).collect() }
    }

    /// Ports of one address before those of any. From outside, an address of the loopback device is nobody's: what is bound there is reached from
    /// this host alone.
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
                let from = Expr::Source { cidr, negate: false };
                rules.push(rule([Expr::OutputInterface(self.bridge_name()), Expr::Translated, from, Expr::Masquerade]));
            }
        }
        if self.masquerade {
            for (family, pool) in self.network.pools.iter() {
                let tunnel = Device::vxlan(family, self.network.vxlan.vni).name();
                rules.push(rule([
                    in_leased_range(Field::Source(family), pool, false),
                    interface_is_not(Field::OutputInterface, &self.bridge_name()),
                    interface_is_not(Field::OutputInterface, &tunnel),
                    in_leased_range(Field::Destination(family), pool, true),
                    Expr::Destination { cidr: multicast(family), negate: true },
                    Expr::Masquerade,
                ]));
                let from_outside = in_leased_range(Field::Source(family), pool, true);
                rules.push(rule([Expr::OutputInterface(tunnel), from_outside, Expr::Masquerade]));
            }
        }
        rules
    }
}

fn base_chain(name: &str, hook: Hook, kind: ChainKind, priority: i32, rules: Vec<Rule>) -> Chain {
    Chain { name: name.to_owned(), base: Some(Base { hook, kind, priority }), rules }
}

/// Not in, or not out, by this interface. With br_netfilter, frames that stay on the bridge pass the hooks, too: a broadcast would get the host's address.
fn interface_is_not(field: Field, interface: &str) -> Expr {
    let mut padded = vec![0; usize::from(field.length())];
    for (to, from) in padded.iter_mut().zip(interface.as_bytes()) {
        *to = *from;
    }
    is_not(field, &padded)
}

/// The addresses of the subnets that a pool leases; with `negate`, all others.
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
