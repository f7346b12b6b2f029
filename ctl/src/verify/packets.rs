//! Packets that stand for all that a network's containers can send.

use std::collections::BTreeSet;
use std::net::IpAddr;

use overlay_agent::kernel::trace::packet::{Flow, TCP, UDP};
use overlay_agent::model::{Cidr, Family};

use super::segments::{Node, Segments, switch_of};
use super::spaces::{HOST, Network, Space, Spaces};

/// Destination port of TCP and UDP. Rules are unlikely to name it.
const ANY_PORT: u16 = 49_771;
/// Maximum number of a network's containers that send. More would only differ by address.
const MAX_SENDERS: usize = 16;

/// A packet to follow.
pub(super) struct Start {
    pub(super) flow: Flow,
    /// Whether the source is none of the network's own addresses.
    pub(super) forged: bool,
}

/// The packets of a network: from its containers, and from addresses that policy rules name, to each target's containers and
/// transfer addresses, and to a destination elsewhere.
pub(super) fn starts(spaces: &Spaces, segments: &Segments, from: usize, targets: &[usize]) -> Vec<Start> {
    let mut starts = Vec::new();
    for family in Family::ALL {
        let mut seen = BTreeSet::new();
        let mut destinations: Vec<IpAddr> = targets.iter().flat_map(|to| receivers(spaces, segments, *to)).collect();
        destinations.push(elsewhere(family));
        destinations.retain(|ip| Family::of(*ip) == family && seen.insert(*ip));
        let senders = containers(spaces, segments, from).into_iter().take(MAX_SENDERS);
        let network = &spaces.networks[from];
        let mut sources: Vec<IpAddr> = senders.chain(network.local.iter().chain(&network.remote).filter_map(sample)).collect();
        sources.retain(|ip| Family::of(*ip) == family);
        if sources.is_empty() {
            sources.push(elsewhere(family));
        }
        let forged = forged_sources(spaces, from).into_iter().filter(|ip| Family::of(*ip) == family && !sources.contains(ip));
        let sources: Vec<(IpAddr, bool)> = sources.iter().map(|ip| (*ip, false)).chain(forged.map(|ip| (ip, true))).collect();
        for (source, forged) in sources {
            for destination in &destinations {
                let echo = Flow::echo_request(source, *destination);
                starts.push(Start { flow: echo, forged });
                starts.extend([TCP, UDP].map(|protocol| Start { flow: Flow { protocol, port: ANY_PORT, ..echo }, forged }));
            }
        }
    }
    starts
}

/// An address that no overlay has (RFC 5737, RFC 3849): it takes the default routes.
fn elsewhere(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([192, 0, 2, 1]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
    }
}

/// An address of a container in a range. The first ones are the network's and the gateway's.
fn sample(range: &Cidr) -> Option<IpAddr> {
    range.nth(2).or_else(|| range.nth(0))
}

/// Addresses of a network's containers on this host.
fn containers(spaces: &Spaces, segments: &Segments, network: usize) -> BTreeSet<IpAddr> {
    let Network { space, local, .. } = &spaces.networks[network];
    let devices = segments.of_network(network).flat_map(|segment| segments.routed_devices(segment));
    let others: BTreeSet<usize> = devices.map(|(number, _)| number).filter(|number| number != space).collect();
    let addresses = others.into_iter().flat_map(|number| spaces.all[number].view.addresses.iter().copied());
    addresses.filter(|address| local.iter().any(|range| range.contains(*address))).collect()
}

/// Destinations that reveal a way to a network: its containers, an address of each route that leads there, gateways and transfer
/// addresses.
fn receivers(spaces: &Spaces, segments: &Segments, to: usize) -> Vec<IpAddr> {
    let network = &spaces.networks[to];
    let mut found: Vec<IpAddr> = containers(spaces, segments, to).into_iter().collect();
    found.extend(network.local.iter().chain(&network.remote).filter_map(sample));
    for number in (0..spaces.all.len()).filter(|number| *number != network.space) {
        found.extend(routes_to(spaces, segments, number, to).filter_map(|route| sample(&route)));
    }
    found.extend(network.gateways.iter().chain(&network.transfer));
    found
}

/// The destinations of a namespace's routes that lead to a network: into its segments, or to its namespace.
fn routes_to<'s>(spaces: &'s Spaces, segments: &'s Segments, from: usize, to: usize) -> impl Iterator<Item = Cidr> + 's {
    let routes = spaces.all[from].forwarding_routes().filter(|route| route.destination.length() > 0);
    let leads = move |interface: &u32| leads_to(spaces, segments, from, *interface, to);
    routes.filter(move |route| route.interfaces.iter().any(leads)).map(|route| route.destination)
}

/// Whether a packet that leaves a namespace by an interface arrives in a network's segments or namespace.
pub(super) fn leads_to(spaces: &Spaces, segments: &Segments, from: usize, interface: u32, to: usize) -> bool {
    let Some(segment) = segments.of(Node::Device(from, interface)) else { return false };
    let target = spaces.networks[to].space;
    segments.networks_of(segment).any(|network| network == to)
        || (from != target && segments.routed_devices(segment).any(|(space, _)| space == target))
}

/// An address of each range that policy rules of the network's namespace and of the host's name as source.
fn forged_sources(spaces: &Spaces, from: usize) -> BTreeSet<IpAddr> {
    let rules = [HOST, spaces.networks[from].space].into_iter().flat_map(|space| &spaces.all[space].rules);
    rules.filter_map(|rule| rule.from).filter(|range| range.length() > 0).filter_map(|range| sample(&range)).collect()
}

/// A container's port on a network's bridge, with the MAC of its other end.
pub(super) fn container_port(spaces: &Spaces, network: &Network) -> Option<(u32, overlay_agent::model::Mac)> {
    let Space { view, .. } = &spaces.all[network.space];
    let ports = view.links.iter().filter(|link| link.up && link.kind == "veth");
    let mut ports = ports.filter(|link| switch_of(&view.links, link).is_some_and(|bridge| bridge.kind == "bridge"));
    ports.find_map(|link| Some((link.index, spaces.other_end(network.space, link)?.1.mac?)))
}
