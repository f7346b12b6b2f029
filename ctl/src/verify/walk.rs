//! Follows packets of a network through the namespaces of this host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use overlay_agent::kernel::trace::packet::{Flow, Packet, TCP, UDP};
use overlay_agent::kernel::trace::{EvalResult, Link, PossibleTranslation, Route, RouteLookup, RuleRef, Translation};
use overlay_agent::model::publish::Transport;
use overlay_agent::model::{Device, Family, Mac, Role};
use overlay_agent::plan::ruleset::{Hook, TABLE};
use overlay_agent::plan::sysctls;

use super::report::{Pair, Way, WayHop};
use super::segments::{Node, Segments, switch_of};
use super::spaces::{HOST, Network, Spaces};
use super::{packets, taints};
use crate::trace::TraceError;

/// Maximum number of namespaces that a packet passes.
const MAX_SPACES: usize = 16;

/// A packet on its way.
#[derive(Debug, Clone)]
struct State {
    flow: Flow,
    /// The packet as it was sent.
    sent: Flow,
    /// The namespace and device where it arrives.
    at: (usize, u32),
    /// Namespaces passed, in order.
    passed: Vec<usize>,
    /// Its arrivals so far.
    trail: Vec<((usize, u32), Flow)>,
    hops: Vec<WayHop>,
    /// Rules whose verdict is not certain.
    uncertain: Vec<String>,
    /// Translations of the destination.
    translations: Vec<Translated>,
    /// Whether it left its network by the link to a peer network.
    by_peer_link: bool,
    /// Whether conntrack ignores it in this namespace.
    untracked: bool,
}

/// A translation of the destination.
#[derive(Debug, Clone)]
struct Translated {
    rule: RuleRef,
    place: String,
    /// Protocol and port, if it is a published port's.
    published: Option<(u8, u16)>,
}

/// Where a packet arrives, its addresses, protocol and port, the namespaces passed, and the rules that translated it.
type Arrival = ((usize, u32), IpAddr, IpAddr, u8, u16, Vec<usize>, Vec<String>);

/// Follows all packets of a network.
struct Walk<'a> {
    spaces: &'a mut Spaces,
    segments: &'a Segments,
    from: usize,
    targets: &'a [usize],
    ways: BTreeMap<usize, Vec<Way>>,
    unknown: BTreeMap<usize, BTreeSet<String>>,
    /// Namespaces that packets passed.
    passed: BTreeSet<usize>,
    seen: BTreeSet<Arrival>,
}

/// Examines the pairs from a network to others.
pub(super) fn pairs_from(
    spaces: &mut Spaces,
    segments: &Segments,
    from: usize,
    targets: &[usize],
) -> Result<Vec<Pair>, TraceError> {
    let mut walk = Walk {
        spaces,
        segments,
        from,
        targets,
        ways: BTreeMap::new(),
        unknown: BTreeMap::new(),
        passed: BTreeSet::new(),
        seen: BTreeSet::new(),
    };
    walk.frames();
    walk.packets()?;
    walk.add_taints()?;
    let Walk { spaces, mut ways, mut unknown, .. } = walk;
    let name = |network: usize| spaces.networks[network].name.clone();
    let pair = |to: &usize| {
        let unknown = unknown.remove(to).unwrap_or_default().into_iter().collect();
        Pair::new(name(from), name(*to), ways.remove(to).unwrap_or_default(), unknown)
    };
    Ok(targets.iter().map(pair).collect())
}

impl Walk<'_> {
    /// Reports networks in whose segments frames of this one arrive.
    fn frames(&mut self) {
        for to in self.targets {
            if let Some(hops) = self.segments.joined(self.spaces, self.from, *to) {
                let by = crossing(&hops, &self.place_of(*to));
                self.ways.entry(*to).or_default().push(Way { by, by_design: false, packet: None, hops });
            }
        }
    }

    fn place_of(&self, network: usize) -> String {
        self.spaces.all[self.spaces.networks[network].space].view.place.clone()
    }

    /// Follows the packets from each device that receives the network's frames.
    fn packets(&mut self) -> Result<(), TraceError> {
        let segments: Vec<usize> = self.segments.of_network(self.from).collect();
        let devices = segments.into_iter().flat_map(|segment| self.segments.routed_devices(segment));
        let devices: Vec<(usize, u32)> = devices.filter(|(space, _)| self.routes_between_segments(*space)).collect();
        for start in packets::starts(self.spaces, self.segments, self.from, self.targets) {
            if start.forged && self.is_forged_dropped(&start.flow) {
                continue;
            }
            for (space, index) in &devices {
                let links = self.segments.path(self.spaces, self.from, Node::Device(*space, *index)).unwrap_or_default();
                self.receive(State {
                    flow: start.flow,
                    sent: start.flow,
                    at: (*space, *index),
                    passed: Vec::new(),
                    trail: Vec::new(),
                    hops: links,
                    uncertain: Vec::new(),
                    translations: Vec::new(),
                    by_peer_link: false,
                    untracked: false,
                })?;
            }
        }
        Ok(())
    }

    /// Whether a namespace has devices in several segments, besides `lo`.
    fn routes_between_segments(&self, space: usize) -> bool {
        let links = self.spaces.all[space].view.links.iter().filter(|link| link.up && link.name != "lo");
        let segments: BTreeSet<usize> = links.filter_map(|link| self.segments.of(Node::Device(space, link.index))).collect();
        segments.len() > 1
    }

    /// Whether the source filter of the network's bridge drops a packet with this source.
    fn is_forged_dropped(&self, flow: &Flow) -> bool {
        let network = &self.spaces.networks[self.from];
        let Some((port, mac)) = packets::container_port(self.spaces, network) else { return true };
        self.bridge_filter(network.space, port, mac, flow).is_certain_drop()
    }

    fn bridge_filter(&self, space: usize, port: u32, source: Mac, flow: &Flow) -> EvalResult {
        let view = &self.spaces.all[space].view;
        let bridge = view.link(Some(port)).and_then(|link| view.link(link.master)).and_then(|bridge| bridge.mac);
        let packet = Packet::new(flow).with_ethernet_header(source, bridge.unwrap_or(Mac([0; 6])));
        view.ruleset.evaluate(Hook::Prerouting, true, &Packet { input: view.interface(Some(port)), ..packet })
    }

    /// Follows a packet from the device where it arrives.
    fn receive(&mut self, mut state: State) -> Result<(), TraceError> {
        let rules = state.translations.iter().map(|translated| translated.rule.to_string()).collect();
        let Flow { source, destination, protocol, port } = state.flow;
        let arrival = (state.at, source, destination, protocol, port, state.passed.clone(), rules);
        // A packet that arrives again in the same form circulates until its hop limit ends it.
        if state.trail.contains(&(state.at, state.flow)) || !self.seen.insert(arrival) {
            return Ok(());
        }
        state.trail.push((state.at, state.flow));
        let (space, input) = state.at;
        if state.passed.len() >= MAX_SPACES {
            state.uncertain.push(format!("packets to {destination} pass more than {MAX_SPACES} namespaces"));
            self.targets.iter().for_each(|to| self.arrive(*to, &state));
            return Ok(());
        }
        state.passed.push(space);
        self.passed.insert(space);
        state.untracked = false;
        let view = &self.spaces.all[space].view;
        let mut packet = Packet { input: view.interface(Some(input)), ..Packet::new(&state.flow) };
        // The sender chooses destination, protocol and port: any rule that matches only these translates some of its packets.
        if state.flow == Flow::echo_request(source, destination) {
            let any = Packet { any_destination: true, ..packet.clone() };
            let result = view.ruleset.evaluate(Hook::Prerouting, false, &any);
            let certain = result.translation.into_iter();
            let certain = certain.map(|(translation, rule)| PossibleTranslation { translation, rule, published: None });
            for possible in result.possible_translations.into_iter().chain(certain) {
                self.translate(&state, &possible)?;
            }
        }
        let view = &self.spaces.all[space].view;
        packet.destination_is_local = Some(view.addresses.contains(&destination));
        let result = view.ruleset.evaluate(Hook::Prerouting, false, &packet);
        if !state.passes(&view.place, &result) {
            return Ok(());
        }
        state.untracked = result.untracked;
        match result.translation {
            Some((Translation::Destination { address, port }, rule)) => {
                state.translated(&view.place.clone(), rule, None, address, port);
                self.route(state, true)
            }
            Some((Translation::Redirect, _)) => Ok(()),
            Some((_, rule)) => {
                state.uncertain.push(format!("{}: {rule} translates the destination in an unknown way", view.place));
                self.route(state, true)
            }
            None => self.route(state, false),
        }
    }

    /// Follows packets that a rule may translate.
    fn translate(&mut self, state: &State, possible: &PossibleTranslation) -> Result<(), TraceError> {
        let place = self.spaces.all[state.at.0].view.place.clone();
        let PossibleTranslation { translation, rule, published } = possible;
        match translation {
            Translation::Destination { address, port } => {
                let protocols = match published {
                    Some((protocol, _)) => vec![*protocol],
                    None => vec![state.flow.protocol, TCP, UDP],
                };
                for protocol in protocols {
                    let mut state = state.clone();
                    state.flow.protocol = protocol;
                    state.flow.port = published.map_or(0, |(_, port)| port);
                    state.sent = Flow { protocol, port: state.flow.port, ..state.sent };
                    state.translated(&place, rule.clone(), *published, *address, *port);
                    self.route(state, true)?;
                }
            }
            Translation::Unknown => {
                let text = format!("{place}: {rule} translates the destination in an unknown way");
                for to in self.targets {
                    self.unknown.entry(*to).or_default().insert(text.clone());
                }
            }
            Translation::Redirect | Translation::Source { .. } | Translation::Masquerade => {}
        }
        Ok(())
    }

    /// Routes a packet in the namespace where it is.
    fn route(&mut self, mut state: State, translated: bool) -> Result<(), TraceError> {
        let (space, input) = state.at;
        let Flow { source, destination, .. } = state.flow;
        let view = &mut self.spaces.all[space].view;
        let lookup = RouteLookup { destination, source: Some(source), input: Some(input) };
        let Ok(route) = view.kernel.route(lookup)? else { return Ok(()) };
        if route.kind == "local" {
            let has_foreign_translation = state.translations.iter().any(|translated| translated.rule.table != TABLE);
            let network = self.spaces.network_of(space).filter(|network| self.targets.contains(network));
            if let Some(to) = network
                && (has_foreign_translation || self.spaces.networks[to].gateways.contains(&destination))
            {
                let what = format!("{destination} is an address of the namespace");
                state.hops.push(WayHop { namespace: self.place_of(to), device: None, what });
                self.arrive(to, &state);
            }
            return Ok(());
        }
        if !forwards(view, state.flow.family(), input) {
            return Ok(());
        }
        let packet = Packet {
            input: view.interface(Some(input)),
            output: view.interface(route.interface),
            destination_is_local: Some(false),
            destination_translated: translated,
            untracked: state.untracked,
            ..Packet::new(&state.flow)
        };
        let result = view.ruleset.evaluate(Hook::Forward, false, &packet);
        if !state.passes(&view.place, &result) {
            return Ok(());
        }
        let result = view.ruleset.evaluate(Hook::Postrouting, false, &packet);
        if !state.passes(&view.place, &result) {
            return Ok(());
        }
        match result.translation {
            Some((Translation::Source { address: Some(address) }, _)) => state.flow.source = address,
            Some((Translation::Masquerade, _)) => {
                let addresses = route.interface.map(|index| view.kernel.addresses(index)).transpose()?.unwrap_or_default();
                let is_usable = |ip: &IpAddr| match ip {
                    IpAddr::V4(_) => state.flow.family() == Family::V4,
                    IpAddr::V6(ip) => state.flow.family() == Family::V6 && !ip.is_unicast_link_local(),
                };
                state.flow.source = addresses.into_iter().find(is_usable).unwrap_or(source);
            }
            Some((_, rule)) => state.uncertain.push(format!("{}: {rule} translates the source in an unknown way", view.place)),
            None => {}
        }
        self.leave(state, &route)
    }

    /// Sends a packet out of a namespace.
    fn leave(&mut self, mut state: State, route: &Route) -> Result<(), TraceError> {
        let (space, input) = state.at;
        let Some(exit) = route.interface else { return Ok(()) };
        let view = &self.spaces.all[space].view;
        let Some(link) = view.link(Some(exit)).filter(|link| link.up).cloned() else { return Ok(()) };
        state.hops.push(WayHop {
            namespace: view.place.clone(),
            device: Some(link.name.clone()),
            what: route_text(route, &link),
        });
        let end = self.spaces.other_end(space, &link);
        state.by_peer_link |= self.is_peer_link(space, &link);
        if let Some((other, end)) = end
            && switch_of(&self.spaces.all[other].view.links, end).is_some_and(|bridge| bridge.kind == "bridge")
        {
            let result = self.bridge_filter(other, end.index, link.mac.unwrap_or(Mac([0; 6])), &state.flow);
            if !state.passes(&self.spaces.all[other].view.place, &result) {
                return Ok(());
            }
        }
        let Some(segment) = self.segments.of(Node::Device(space, exit)) else { return Ok(()) };
        let networks: Vec<usize> = self.segments.networks_of(segment).collect();
        for to in networks.iter().filter(|to| self.targets.contains(to)) {
            self.arrive(*to, &state);
        }
        // All devices of these segments were starts.
        if networks.contains(&self.from) {
            return Ok(());
        }
        for at in self.segments.routed_devices(segment).filter(|at| *at != (space, exit) && *at != (space, input)) {
            self.receive(State { at, ..state.clone() })?;
        }
        Ok(())
    }

    /// Whether a link is the agent's from the sending network to a peer network.
    fn is_peer_link(&self, space: usize, link: &Link) -> bool {
        let Network { space: own, vni: own_vni, .. } = &self.spaces.networks[self.from];
        let Some(Device { role: Role::PeerLink, vni }) = link.device().filter(|_| space == *own && link.is_marked()) else {
            return false;
        };
        let end = self.spaces.other_end(space, link);
        end.is_some_and(|(other, end)| {
            let network = self.spaces.network_of(other).map(|network| &self.spaces.networks[network]);
            network.is_some_and(|network| network.vni == vni) && end.device() == Some(Device::peer_link(*own_vni))
        })
    }

    /// Records that a packet reaches a network.
    fn arrive(&mut self, to: usize, state: &State) {
        if !state.uncertain.is_empty() {
            let packet = flow_text(&state.sent);
            let reasons = state.uncertain.iter().map(|reason| format!("{packet}: {reason}"));
            self.unknown.entry(to).or_default().extend(reasons);
            return;
        }
        let network = &self.spaces.networks[to];
        let own = self.spaces.networks[self.from].space;
        let is_direct = |allowed: &[usize]| state.passed.iter().all(|space| allowed.contains(space));
        let foreign = state.translations.iter().find(|translated| translated.rule.table != TABLE);
        let published = state.translations.iter().find_map(|translated| translated.published);
        let (by, by_design) = match (published, foreign) {
            (_, Some(Translated { rule, place, .. })) => (format!("{rule} of {place}"), false),
            (Some((protocol, port)), None) if is_direct(&[own, HOST, network.space]) => {
                (format!("published port {port}/{}", protocol_name(protocol)), true)
            }
            (None, None) if state.by_peer_link && state.passed == [own, network.space] => ("Peers".to_owned(), true),
            _ => (crossing(&state.hops, &self.place_of(to)), false),
        };
        let ways = self.ways.entry(to).or_default();
        if ways.iter().all(|way| way.by != by) {
            ways.push(Way { by, by_design, packet: Some(flow_text(&state.sent)), hops: state.hops.clone() });
        }
    }

    /// Adds what the namespaces that packets passed may do besides.
    fn add_taints(&mut self) -> Result<(), TraceError> {
        for space in self.passed.clone() {
            let general = taints::of_space(&mut self.spaces.all[space])?;
            for to in self.targets {
                let mut found = taints::unpredictable_routes(self.spaces, self.segments, space, *to);
                if self.is_connected(space, self.spaces.networks[*to].space) {
                    found.extend(general.iter().cloned());
                }
                if !found.is_empty() {
                    self.unknown.entry(*to).or_default().extend(found);
                }
            }
        }
        Ok(())
    }

    /// Whether links lead from a namespace to another one, directly or by others.
    fn is_connected(&self, from: usize, to: usize) -> bool {
        let (mut reached, mut queue) = (BTreeSet::new(), vec![from]);
        while let Some(space) = queue.pop() {
            if !reached.insert(space) {
                continue;
            }
            for link in self.spaces.all[space].view.links.iter().filter(|link| link.up) {
                let Some(segment) = self.segments.of(Node::Device(space, link.index)) else { continue };
                if self.segments.networks_of(segment).any(|network| self.spaces.networks[network].space == to) {
                    return true;
                }
                queue.extend(self.segments.routed_devices(segment).map(|(space, _)| space));
            }
        }
        reached.contains(&to)
    }
}

impl State {
    /// Applies the verdict of rules. Returns false if they certainly drop the packet.
    fn passes(&mut self, place: &str, result: &EvalResult) -> bool {
        if result.is_certain_drop() {
            return false;
        }
        let uncertain = result.dropped.iter().chain(&result.possible_drops);
        self.uncertain.extend(uncertain.map(|rule| format!("{place}: {rule} may drop it")));
        true
    }

    /// Applies a translation of the destination.
    fn translated(
        &mut self,
        place: &str,
        rule: RuleRef,
        published: Option<(u8, u16)>,
        address: Option<IpAddr>,
        port: Option<u16>,
    ) {
        self.flow.destination = address.unwrap_or(self.flow.destination);
        self.flow.port = port.unwrap_or(self.flow.port);
        let what = format!("destination becomes {}, by {rule}", flow_destination(&self.flow));
        self.hops.push(WayHop { namespace: place.to_owned(), device: None, what });
        self.translations.push(Translated { rule, place: place.to_owned(), published });
    }
}

/// Whether a namespace forwards packets of a device.
fn forwards(view: &crate::trace::namespace_view::NamespaceView, family: Family, input: u32) -> bool {
    // For IPv4 the kernel's lookup respects the setting.
    let name = view.name(Some(input));
    let is_on = |path: &str| view.sysctl(path).is_some_and(|value| value != "0");
    family == Family::V4
        || is_on(sysctls::forwarding(family))
        || is_on(&sysctls::interface_path(&name, family, "force_forwarding"))
}

fn route_text(route: &Route, link: &Link) -> String {
    let destination = route.destination.map_or_else(|| "route".to_owned(), |destination| format!("route {destination}"));
    let via = route.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
    format!("{destination}{via} dev {}", link.name)
}

/// The hop by which a path enters a network's namespace or segments.
fn crossing(hops: &[WayHop], place: &str) -> String {
    let last = hops.iter().rfind(|hop| hop.namespace != place).or(hops.last());
    last.map_or_else(|| "one bridge".to_owned(), |hop| format!("{} in {}", hop.what, hop.namespace))
}

fn protocol_name(protocol: u8) -> String {
    let transport =
        [Transport::Tcp, Transport::Udp, Transport::Sctp].into_iter().find(|transport| transport.number() == protocol);
    transport.map_or_else(|| "icmp".to_owned(), |transport| transport.name().to_owned())
}

fn flow_destination(flow: &Flow) -> String {
    if flow.port == 0 { flow.destination.to_string() } else { std::net::SocketAddr::new(flow.destination, flow.port).to_string() }
}

fn flow_text(flow: &Flow) -> String {
    format!("{} from {} to {}", protocol_name(flow.protocol), flow.source, flow_destination(flow))
}
