//! Follows the path from the source's namespace through the host to the packet's exit or arrival.

use std::net::IpAddr;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::trace::packet::{Flow, ICMP, ICMPV6, Packet, TCP, UDP};
use overlay_agent::kernel::trace::{EvalResult, KernelQuery, Link, Route, RouteLookup, Translation};
use overlay_agent::model::Family;
use overlay_agent::model::publish::Transport;
use overlay_agent::plan::ruleset::Hook;
use overlay_agent::plan::sysctls;

use super::hop_log::{HopLog, Step, Stop};
use super::namespace_view::{HOST, NamespaceView, NetworkNamespace};
use super::targets::{Inventory, TargetArg, TraceEnd};
use super::{EndView, Trace, TraceError, TraceOutcome};

/// A trace in progress.
pub(super) struct Tracer<'a> {
    /// The namespace in which the packet is.
    pub(super) view: NamespaceView,
    /// The host's namespace.
    pub(super) host: Netns,
    /// The namespaces of isolated networks.
    pub(super) networks: Vec<NetworkNamespace>,
    pub(super) inventory: &'a Inventory,
    pub(super) log: HopLog,
    /// Forms of source and destination so far.
    pub(super) addresses_seen: Vec<(IpAddr, IpAddr)>,
}

/// Traces the path from SRC to DST. Must run on a thread that may block, in the host's namespace.
///
/// # Errors
/// The kernel cannot be queried, or an end is unknown. A stopped packet is not an error.
pub fn trace(from: &str, to: &str, family: Option<Family>, inventory: &Inventory) -> Result<Trace, TraceError> {
    let (source, target) = (TargetArg::parse(from)?, TargetArg::parse(to)?);
    let (start, goal) = (inventory.resolve(&source.name)?, inventory.resolve(&target.name)?);
    let host = NamespaceView::host()?;
    let networks = NamespaceView::of_networks(&host.netns)?;
    let common = |f: &Family| start.families().contains(f) && goal.families().contains(f) && family.is_none_or(|only| only == *f);
    let family = Family::ALL
        .into_iter()
        .find(common)
        .ok_or_else(|| TraceError::Target { message: format!("{from} and {to} have no address family in common") })?;
    let destination = resolve_destination(&goal, family, &start, &host)?;
    let (protocol, port) = match target.port {
        None => (if family == Family::V4 { ICMP } else { ICMPV6 }, 0),
        Some((port, Transport::Tcp)) => (TCP, port),
        Some((port, Transport::Udp)) => (UDP, port),
        Some((port, transport)) => (transport.number(), port),
    };
    let tunnel_port = host.tunnel(family).and_then(|link| link.vxlan.as_ref()).map_or(8472, |vxlan| vxlan.port);
    let from_view = EndView { what: describe(&start, inventory, &host), address: destination };
    let to_view = EndView { what: describe_address(&goal, destination, inventory, &host), address: destination };
    let netns = host.netns.clone();
    let mut tracer = Tracer { view: host, host: netns, networks, inventory, log: HopLog::default(), addresses_seen: Vec::new() };
    let (from_view, to_view) = (tracer.with_network(&start, from_view), tracer.with_network(&goal, to_view));
    let live_netns = tracer.enter_network_of(&start)?;
    tracer.note_isolation(&start, &goal);
    let mut origin = start.address(family).unwrap_or_else(|| family.unspecified());
    let outcome = tracer.start_at_source(&start, destination, protocol, port, &mut origin);
    let end = match outcome {
        Ok(end) => end,
        Err(Stop::AtLastHop) => {
            let hop = tracer.log.hops.last();
            hop.map_or_else(String::new, |hop| format!("stops at the {} of {}: {}", hop.step, hop.place, hop.answer))
        }
        Err(Stop::Failed(error)) => return Err(error),
    };
    let worst = |hops: &[super::Hop]| {
        let has = |outcome| hops.iter().any(|hop| hop.outcome == outcome);
        if has(TraceOutcome::Stop) {
            TraceOutcome::Stop
        } else if has(TraceOutcome::Unsure) {
            TraceOutcome::Unsure
        } else {
            TraceOutcome::Ok
        }
    };
    if !tracer.view.legacy_tables(family).is_empty() {
        let program = if family == Family::V4 { "iptables-legacy" } else { "ip6tables-legacy" };
        tracer.log.notes.push(format!(
            "this host has rules of {program} (`{program} -S`), which are not evaluated: they may drop packets that pass here"
        ));
    }
    let HopLog { hops, notes } = tracer.log;
    Ok(Trace {
        from: EndView { address: origin, ..from_view },
        to: to_view,
        protocol: protocol_name(protocol),
        port: (port != 0).then_some(port),
        outcome: worst(&hops),
        end,
        hops,
        notes,
        live: None,
        addresses_seen: tracer.addresses_seen,
        tunnel_port,
        netns: live_netns,
    })
}

fn protocol_name(protocol: u8) -> String {
    match protocol {
        ICMP | ICMPV6 => "icmp".to_owned(),
        TCP => "tcp".to_owned(),
        UDP => "udp".to_owned(),
        other => Transport::Sctp.name().to_owned() + if other == Transport::Sctp.number() { "" } else { "?" },
    }
}

/// Chooses the destination address.
fn resolve_destination(goal: &TraceEnd, family: Family, start: &TraceEnd, host: &NamespaceView) -> Result<IpAddr, TraceError> {
    match goal {
        TraceEnd::Host => {
            // Containers reach this host at the gateway's address, all others at the tunnel's.
            let bridge = host.bridge().map(|link| link.index);
            let of = |index: Option<u32>| {
                let mut kernel = KernelQuery::open_in(&host.netns).ok()?;
                let usable = |a: &IpAddr| match a {
                    IpAddr::V6(a) => family == Family::V6 && !a.is_unicast_link_local(),
                    IpAddr::V4(_) => family == Family::V4,
                };
                kernel.addresses(index?).ok()?.into_iter().find(usable)
            };
            let tunnel = host.tunnel(family).and_then(|link| link.vxlan.as_ref()).and_then(|vxlan| vxlan.local);
            let found =
                if matches!(start, TraceEnd::Container(_)) { of(bridge).or(tunnel) } else { tunnel.or_else(|| of(bridge)) };
            found.ok_or_else(|| TraceError::Target {
                message: "this host has no address in the overlay: use one of its addresses".to_owned(),
            })
        }
        goal => goal
            .address(family)
            .ok_or_else(|| TraceError::Target { message: format!("{} has no {family} address", end_name(goal)) }),
    }
}

fn end_name(end: &TraceEnd) -> String {
    match end {
        TraceEnd::Container(endpoint) => format!("container {}", endpoint.name),
        TraceEnd::Host => "this host".to_owned(),
        TraceEnd::Peer(name, _) => format!("host {name}"),
        TraceEnd::Address(address) => address.to_string(),
    }
}

fn describe(end: &TraceEnd, inventory: &Inventory, host: &NamespaceView) -> String {
    match end {
        TraceEnd::Address(address) => describe_address(end, *address, inventory, host),
        end => end_name(end),
    }
}

fn describe_address(end: &TraceEnd, address: IpAddr, inventory: &Inventory, host: &NamespaceView) -> String {
    match (end, inventory.lease_for(address)) {
        (TraceEnd::Container(_) | TraceEnd::Host | TraceEnd::Peer(..), _) => end_name(end),
        _ if host.addresses.contains(&address) => "this host".to_owned(),
        (_, Some(lease)) if !lease.own => match &lease.host {
            Some(host) => format!("on host {host}"),
            None => "on another host".to_owned(),
        },
        _ if host.in_overlay(address) => "in the overlay".to_owned(),
        _ => "outside the overlay".to_owned(),
    }
}

impl Tracer<'_> {
    fn start_at_source(
        &mut self,
        start: &TraceEnd,
        destination: IpAddr,
        protocol: u8,
        port: u16,
        origin: &mut IpAddr,
    ) -> Step<String> {
        match start {
            TraceEnd::Container(endpoint) => {
                let endpoint = endpoint.clone();
                let flow = self.leave_container(&endpoint, destination, protocol, port, origin)?;
                match flow {
                    BridgeDecision::ToHost(flow, input) => self.through_host(flow, Some(*input)),
                    BridgeDecision::Delivered(end) => Ok(end),
                }
            }
            TraceEnd::Peer(..) => self.arrive(*origin, destination, protocol, port),
            TraceEnd::Address(address) if !self.view.addresses.contains(address) => {
                self.arrive(*address, destination, protocol, port)
            }
            TraceEnd::Address(_) | TraceEnd::Host => {
                let source = match start {
                    TraceEnd::Address(address) => Some(*address),
                    _ => None,
                };
                let route = self.lookup_route(RouteLookup { destination, source, input: None })?;
                *origin = source.or(route.source).unwrap_or(*origin);
                let flow = Flow { source: *origin, destination, protocol, port };
                self.through_host(flow, None)
            }
        }
    }

    /// Follows the packet through the namespace where it is: rules before routing, the route, rules after it, and out.
    pub(super) fn through_host(&mut self, mut flow: Flow, input: Option<Link>) -> Step<String> {
        if !self.addresses_seen.contains(&(flow.source, flow.destination)) {
            self.addresses_seen.push((flow.source, flow.destination));
        }
        let entry = input.as_ref().map(|link| link.index);
        let mut packet = Packet { input: self.view.interface(entry), ..Packet::new(&flow) };
        packet.destination_is_local = Some(self.view.addresses.contains(&flow.destination));
        let (hook, step) = if input.is_some() { (Hook::Prerouting, "rules prerouting") } else { (Hook::Output, "rules output") };
        if input.is_none() {
            let route =
                self.lookup_route(RouteLookup { destination: flow.destination, source: Some(flow.source), input: None })?;
            packet.output = self.view.interface(route.interface);
        }
        let result = self.view.ruleset.evaluate(hook, false, &packet);
        self.log.record_rules(&self.view.place, step, &result)?;
        let mut translated = false;
        let untracked = result.untracked;
        if let Some((Translation::Destination { address, port }, rule_ref)) = &result.translation {
            let (address, port) = (address.unwrap_or(flow.destination), port.unwrap_or(flow.port));
            self.log.ok(
                &self.view.place,
                "translation",
                format!("destination becomes {}, by {rule_ref}", socket_text(address, port)),
            );
            flow.destination = address;
            flow.port = port;
            translated = true;
            self.addresses_seen.push((flow.source, flow.destination));
        }
        // Without forwarding the kernel returns the same error as without a route.
        if let Some(input) = input.as_ref().filter(|_| !self.view.addresses.contains(&flow.destination)) {
            self.check_forwarding(flow.family(), &input.name)?;
        }
        let lookup = RouteLookup { destination: flow.destination, source: input.as_ref().map(|_| flow.source), input: entry };
        let route = self.lookup_route(lookup)?;
        let exit = route.interface;
        let mut packet = Packet { input: self.view.interface(entry), ..Packet::new(&flow) };
        (packet.destination_translated, packet.untracked) = (translated, untracked);
        packet.destination_is_local = Some(route.kind == "local");
        if route.kind == "local" {
            self.log_route(&flow, &route);
            if input.is_some() {
                let result = self.view.ruleset.evaluate(Hook::Input, false, &packet);
                self.log.record_rules(&self.view.place, "rules input", &result)?;
            }
            let place = if self.view.place == HOST { "this host" } else { &self.view.place };
            return Ok(format!("arrives at {place}: {}", socket_text(flow.destination, flow.port)));
        }
        if self.view.in_overlay(flow.destination) && !self.routes_into_overlay(&route) {
            return Err(self.no_peer_route(&flow, &route));
        }
        self.log_route(&flow, &route);
        packet.output = self.view.interface(exit);
        if input.is_some() {
            let result = self.view.ruleset.evaluate(Hook::Forward, false, &packet);
            self.log.record_rules(&self.view.place, "rules forward", &result)?;
        }
        let result = self.view.ruleset.evaluate(Hook::Postrouting, false, &packet);
        self.log.record_rules(&self.view.place, "rules postrouting", &result)?;
        self.apply_snat(&mut flow, &result, exit);
        let Some(link) = self.view.link(exit).cloned() else {
            return Err(self.log.stop(&self.view.place, "interface", "the route has no interface", "ip route get"));
        };
        if let Some(input) = self.cross(&link)? {
            return self.through_host(flow, Some(input));
        }
        if link.is_tunnel(flow.family()) {
            return self.through_tunnel(&flow, &route, &link);
        }
        if self.view.bridge().is_some_and(|bridge| bridge.index == link.index) {
            return self.deliver_to_container(flow.destination, &link);
        }
        self.leave_host(flow.destination, &route, &link, "")?;
        Ok(format!(
            "leaves this host by {} for {}",
            link.name,
            route.gateway.map_or(flow.destination.to_string(), |g| format!("the gateway {g}"))
        ))
    }

    fn log_route(&mut self, flow: &Flow, route: &Route) {
        let entry = route.destination.map(|entry| format!(" by {entry}")).unwrap_or_default();
        let via = route.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        let name = self.view.name(route.interface);
        let kind = if route.kind == "local" { " local" } else { "" };
        let id = route.nexthop.map(|id| format!(" next hop {id}")).unwrap_or_default();
        self.log.ok(&self.view.place, "route", format!("{}{entry}:{kind}{via} dev {name}{id}", flow.destination));
    }

    /// Looks up the route; without one the path ends.
    pub(super) fn lookup_route(&mut self, lookup: RouteLookup) -> Step<Route> {
        match self.view.kernel.route(lookup)? {
            Ok(route) => Ok(route),
            Err(_) if self.view.in_overlay(lookup.destination) => {
                let flow = Flow::echo_request(lookup.source.unwrap_or(lookup.destination), lookup.destination);
                let reason = match self.view.kernel.unreachable_route(lookup.destination) {
                    Some(range) => {
                        format!("no peer's route covers it: {range} is unreachable except for leased subnets")
                    }
                    None => "the kernel has no route".to_owned(),
                };
                Err(self.no_overlay_route(&flow, &reason))
            }
            Err(reason) => {
                let from =
                    lookup.input.map(|index| format!(" for packets from {}", self.view.name(Some(index)))).unwrap_or_default();
                let strict = if reason.contains("cross-device") {
                    "; the reverse path filter rejects the source: sysctl net.ipv4.conf.all.rp_filter"
                } else {
                    ""
                };
                let answer = format!("no route to {}{from}: {reason}", lookup.destination);
                Err(self.log.stop(&self.view.place, "route", answer, format!("ip route get {}{strict}", lookup.destination)))
            }
        }
    }

    /// Checks `net.ipv4.conf.IN.forwarding`, which applies to packets from an interface; for IPv6 the setting of all interfaces
    /// applies.
    fn check_forwarding(&mut self, family: Family, input: &str) -> Step<()> {
        let path = match family {
            Family::V4 => sysctls::interface_path(input, family, "forwarding"),
            Family::V6 => sysctls::forwarding(family).to_owned(),
        };
        match self.view.sysctl(&path).as_deref() {
            Some("0") => {
                let name = path.replace('/', ".");
                Err(self.log.stop(&self.view.place, "forwarding", format!("net.{name} is 0"), format!("sysctl -w net/{path}=1")))
            }
            _ => {
                self.log.ok(&self.view.place, "forwarding", format!("on for packets from {input}"));
                Ok(())
            }
        }
    }

    fn apply_snat(&mut self, flow: &mut Flow, result: &EvalResult, exit: Option<u32>) {
        match &result.translation {
            Some((Translation::Masquerade, rule_ref)) => {
                let exit_addresses = exit.and_then(|index| self.view.kernel.addresses(index).ok()).unwrap_or_default();
                let global = |address: &IpAddr| !matches!(address, IpAddr::V6(a) if a.is_unicast_link_local());
                let exit_address =
                    exit_addresses.into_iter().find(|address| Family::of(*address) == flow.family() && global(address));
                let source_text = exit_address.map_or_else(|| "the address of the interface".to_owned(), |own| own.to_string());
                self.log.ok(&self.view.place, "translation", format!("source becomes {source_text} (masquerade), by {rule_ref}"));
                if let Some(exit_address) = exit_address {
                    flow.source = exit_address;
                    self.addresses_seen.push((flow.source, flow.destination));
                }
            }
            Some((Translation::Source { address: Some(address) }, rule_ref)) => {
                self.log.ok(&self.view.place, "translation", format!("source becomes {address}, by {rule_ref}"));
                flow.source = *address;
                self.addresses_seen.push((flow.source, flow.destination));
            }
            Some((_, rule_ref)) => {
                self.log.unsure(&self.view.place, "translation", format!("translated by {rule_ref} in an unknown way"), "")
            }
            None => self.log.ok(&self.view.place, "translation", "none: source and destination unchanged"),
        }
    }
}

/// Formats an address, with the port if it is not 0.
pub(super) fn socket_text(address: IpAddr, port: u16) -> String {
    if port == 0 { address.to_string() } else { std::net::SocketAddr::new(address, port).to_string() }
}

/// Next stage of a container's packet after the bridge.
pub(super) enum BridgeDecision {
    /// The host forwards or receives it; input interface.
    ToHost(Flow, Box<Link>),
    /// The packet's destination.
    Delivered(String),
}
