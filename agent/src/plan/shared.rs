//! Desired entries that the networks of one network namespace share: forwarding, rule tables, accept rules in iptables.

use std::collections::BTreeSet;

use super::ruleset::{InetTableSpec, inet_table, source_filter};
use super::state::{Key, RouteTarget, State, Value};
use super::sysctls;
use crate::model::{Cidr, Family, PerFamily};

/// A network's input to the shared entries of its network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedSpec {
    /// The families of this host's subnet.
    pub families: Vec<Family>,
    /// Index of the external interface; 0 in an isolated network's own namespace.
    pub external: u32,
    /// The ranges whose packets iptables' FORWARD chain has to accept.
    pub forwarded: PerFamily<Cidr>,
    /// Input of the table `inet overlayd`.
    pub inet: InetTableSpec,
}

/// Facts about the network namespace that the shared entries depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamespaceFacts {
    /// Families in which the policy of iptables' FORWARD chain drops packets.
    pub forward_drops: Vec<Family>,
    /// The host's own interfaces that would stop accepting router advertisements once the host forwards IPv6
    /// ([`sysctls::accept_ra_interfaces`]).
    pub accept_ra_interfaces: Vec<String>,
    /// The host's own interfaces through which containers reach external networks
    /// ([`HostInventory::uplinks`](super::underlay::HostInventory::uplinks)).
    pub uplinks: Vec<String>,
}

/// The shared entries; none without a network.
pub fn shared_entries(specs: &[&SharedSpec], facts: &NamespaceFacts) -> State {
    let mut state = State::new();
    if specs.is_empty() {
        return state;
    }
    let uses = |family: Family| specs.iter().any(|spec| spec.families.contains(&family));
    for family in Family::ALL.into_iter().filter(|family| uses(*family)) {
        sysctls::insert(&mut state, sysctls::forwarding(family), "1");
    }
    if uses(Family::V4) {
        // For replies to containers, and for packets to published ports.
        for interface in &facts.uplinks {
            sysctls::insert(&mut state, sysctls::interface_path(interface, Family::V4, "forwarding"), "1");
        }
    }
    if uses(Family::V6) {
        // With forwarding enabled, the kernel ignores advertisements unless `accept_ra` is 2, and drops the routes learned
        // from them.
        for interface in &facts.accept_ra_interfaces {
            sysctls::insert(&mut state, sysctls::interface_path(interface, Family::V6, "accept_ra"), "2");
        }
    }
    let with_ipv6 = specs.iter().filter(|spec| spec.families.contains(&Family::V6));
    if let Some(device) = with_ipv6.filter_map(|spec| spec.inet.loopback_device()).next() {
        // For a published port of ::1: for a reply that arrives on the device, the kernel finds the address on no other device
        // (`ip6_route_input_lookup` in net/ipv6/route.c). Packets with that address from the wire are dropped before
        // (`ip6_rcv_core`). A route has one device, so of several networks the first has this.
        let loopback = Cidr::host(std::net::Ipv6Addr::LOCALHOST.into());
        state.insert(Key::Route(loopback), Value::Route(RouteTarget::Local(device)));
    }
    let inet: Vec<&InetTableSpec> = specs.iter().map(|spec| &spec.inet).collect();
    for ruleset in [inet_table(&inet), source_filter()] {
        state.insert(Key::Ruleset(ruleset.table), Value::Ruleset(Box::new(ruleset)));
    }
    for family in &facts.forward_drops {
        let ranges: BTreeSet<Cidr> = specs.iter().filter_map(|spec| spec.forwarded.get(*family).copied()).collect();
        if !ranges.is_empty() {
            state.insert(Key::ForwardAccept(*family), Value::ForwardAccept(ranges.into_iter().collect()));
        }
    }
    state
}
