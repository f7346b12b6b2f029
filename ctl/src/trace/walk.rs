//! The way itself, from the source's namespace through the host's to where the packet leaves it or arrives.

use std::net::IpAddr;

use overlay_agent::kernel::trace::packet::{Flow, ICMP, ICMPV6, Packet, TCP, UDP};
use overlay_agent::kernel::trace::{Judgement, Link, Look, Lookup, Route, Translation};
use overlay_agent::model::Family;
use overlay_agent::model::publish::Transport;
use overlay_agent::plan::desired::sysctls;
use overlay_agent::plan::ruleset::Hook;

use super::container::Onward;
use super::ends::{End, Known, Wanted};
use super::passage::{Ended, Go, Passage};
use super::site::Site;
use super::{EndView, Outcome, Trace, TraceError};

/// The place of most hops.
pub(super) const HOST: &str = "host";

/// A way that is being gone.
pub(super) struct Walk<'a> {
    pub(super) site: Site,
    pub(super) known: &'a Known,
    pub(super) passage: Passage,
    /// Source and destination in each form so far.
    pub(super) forms: Vec<(IpAddr, IpAddr)>,
}

/// Goes the way from SRC to DST. To be called on a thread that may block, in the host's namespace.
///
/// # Errors
/// The kernel cannot be asked, or an end is nothing that is known. That the packet stops is none.
pub fn trace(from: &str, to: &str, family: Option<Family>, known: &Known) -> Result<Trace, TraceError> {
    let (source, target) = (Wanted::parse(from)?, Wanted::parse(to)?);
    let (start, goal) = (known.end(&source.name)?, known.end(&target.name)?);
    let site = Site::open()?;
    let common = |f: &Family| start.families().contains(f) && goal.families().contains(f) && family.is_none_or(|only| only == *f);
    let family = Family::ALL
        .into_iter()
        .find(common)
        .ok_or_else(|| TraceError::End { message: format!("{from} and {to} have no address family in common") })?;
    let destination = destination(&goal, family, &start, &site)?;
    let (protocol, port) = match target.port {
        None => (if family == Family::V4 { ICMP } else { ICMPV6 }, 0),
        Some((port, Transport::Tcp)) => (TCP, port),
        Some((port, Transport::Udp)) => (UDP, port),
        Some((port, transport)) => (transport.number(), port),
    };
    let tunnel_port = site.tunnel(family).and_then(|link| link.vxlan.as_ref()).map_or(8472, |vxlan| vxlan.port);
    let from_view = describe(&start, known, &site);
    let to_view = EndView { what: describe_address(&goal, destination, known, &site), address: destination };
    let mut walk = Walk { site, known, passage: Passage::default(), forms: Vec::new() };
    let mut origin = start.address(family).unwrap_or_else(|| family.unspecified());
    let went = walk.start(&start, destination, protocol, port, &mut origin);
    let end = match went {
        Ok(end) => end,
        Err(Ended::Stopped) => {
            let hop = walk.passage.hops.last();
            hop.map_or_else(String::new, |hop| format!("stops at the {} of {}: {}", hop.step, hop.place, hop.answer))
        }
        Err(Ended::Failed(error)) => return Err(error),
    };
    let worst = |hops: &[super::Hop]| {
        let has = |outcome| hops.iter().any(|hop| hop.outcome == outcome);
        if has(Outcome::Stop) {
            Outcome::Stop
        } else if has(Outcome::Unsure) {
            Outcome::Unsure
        } else {
            Outcome::Ok
        }
    };
    let legacy = std::fs::read_to_string("/proc/net/ip_tables_names").unwrap_or_default();
    if !legacy.trim().is_empty() {
        let note =
            "this host has rules of iptables-legacy (`iptables-legacy -S`), which cannot be read here: they may drop what passes";
        walk.passage.notes.push(note.to_owned());
    }
    let Passage { hops, notes } = walk.passage;
    Ok(Trace {
        from: EndView { what: from_view, address: origin },
        to: to_view,
        protocol: protocol_word(protocol),
        port: (port != 0).then_some(port),
        outcome: worst(&hops),
        end,
        hops,
        notes,
        live: None,
        forms: walk.forms,
        tunnel_port,
    })
}

fn protocol_word(protocol: u8) -> String {
    match protocol {
        ICMP | ICMPV6 => "icmp".to_owned(),
        TCP => "tcp".to_owned(),
        UDP => "udp".to_owned(),
        other => Transport::Sctp.name().to_owned() + if other == Transport::Sctp.number() { "" } else { "?" },
    }
}

/// The address that is sent to.
fn destination(goal: &End, family: Family, start: &End, site: &Site) -> Result<IpAddr, TraceError> {
    match goal {
        End::Host => {
            // Containers call this host by the gateway's address; everyone else by the one that the tunnel has.
            let bridge = site.bridge().map(|link| link.index);
            let of = |index: Option<u32>| {
                let mut look = Look::open().ok()?;
                let usable = |a: &IpAddr| match a {
                    IpAddr::V6(a) => family == Family::V6 && !a.is_unicast_link_local(),
                    IpAddr::V4(_) => family == Family::V4,
                };
                look.addresses(index?).ok()?.into_iter().find(usable)
            };
            let tunnel = site.tunnel(family).and_then(|link| link.vxlan.as_ref()).and_then(|vxlan| vxlan.local);
            let found = if matches!(start, End::Container(_)) { of(bridge).or(tunnel) } else { tunnel.or_else(|| of(bridge)) };
            found.ok_or_else(|| TraceError::End {
                message: "this host has no address in the overlay: write its address".to_owned(),
            })
        }
        goal => goal
            .address(family)
            .ok_or_else(|| TraceError::End { message: format!("{} has no {family} address", goal_name(goal)) }),
    }
}

fn goal_name(end: &End) -> String {
    match end {
        End::Container(endpoint) => format!("container {}", endpoint.name),
        End::Host => "this host".to_owned(),
        End::Peer(name, _) => format!("host {name}"),
        End::Address(address) => address.to_string(),
    }
}

fn describe(end: &End, known: &Known, site: &Site) -> String {
    match end {
        End::Address(address) => describe_address(end, *address, known, site),
        end => goal_name(end),
    }
}

fn describe_address(end: &End, address: IpAddr, known: &Known, site: &Site) -> String {
    match (end, known.lease_of(address)) {
        (End::Container(_) | End::Host | End::Peer(..), _) => goal_name(end),
        _ if site.addresses.contains(&address) => "this host".to_owned(),
        (_, Some(lease)) if !lease.own => match &lease.host {
            Some(host) => format!("on host {host}"),
            None => "on another host".to_owned(),
        },
        _ if site.in_overlay(address) => "in the overlay".to_owned(),
        _ => "outside the overlay".to_owned(),
    }
}

impl Walk<'_> {
    fn start(&mut self, start: &End, destination: IpAddr, protocol: u8, port: u16, origin: &mut IpAddr) -> Go<String> {
        match start {
            End::Container(endpoint) => {
                let endpoint = endpoint.clone();
                let flow = self.out_of(&endpoint, destination, protocol, port, origin)?;
                match flow {
                    Onward::Host(flow, input) => self.through(flow, Some(*input)),
                    Onward::Arrived(end) => Ok(end),
                }
            }
            End::Peer(..) => self.arriving(*origin, destination, protocol, port),
            End::Address(address) if !self.site.addresses.contains(address) => {
                self.arriving(*address, destination, protocol, port)
            }
            End::Address(_) | End::Host => {
                let source = match start {
                    End::Address(address) => Some(*address),
                    _ => None,
                };
                let route = self.route(Lookup { destination, source, input: None })?;
                *origin = source.or(route.source).unwrap_or(*origin);
                let flow = Flow { source: *origin, destination, protocol, port };
                self.through(flow, None)
            }
        }
    }

    /// Through the host: the rules before routing, the route, the rules behind it, and out.
    pub(super) fn through(&mut self, mut flow: Flow, input: Option<Link>) -> Go<String> {
        if !self.forms.contains(&(flow.source, flow.destination)) {
            self.forms.push((flow.source, flow.destination));
        }
        let entry = input.as_ref().map(|link| link.index);
        let mut packet = Packet { input: self.site.interface(entry), ..Packet::new(&flow) };
        packet.local = Some(self.site.addresses.contains(&flow.destination));
        let (hook, step) = if input.is_some() { (Hook::Prerouting, "rules prerouting") } else { (Hook::Output, "rules output") };
        if input.is_none() {
            let route = self.route(Lookup { destination: flow.destination, source: Some(flow.source), input: None })?;
            packet.output = self.site.interface(route.interface);
        }
        let judgement = self.site.book.judge(hook, false, &packet);
        self.passage.judged(HOST, step, &judgement)?;
        let mut translated = false;
        let untracked = judgement.untracked;
        if let Some((Translation::Destination { address, port }, place)) = &judgement.translation {
            let (address, port) = (address.unwrap_or(flow.destination), port.unwrap_or(flow.port));
            self.passage.ok(HOST, "translation", format!("destination becomes {}, by {place}", socket(address, port)));
            flow.destination = address;
            flow.port = port;
            translated = true;
            self.forms.push((flow.source, flow.destination));
        }
        // Without forwarding the kernel answers as if there were no route.
        if let Some(input) = input.as_ref().filter(|_| !self.site.addresses.contains(&flow.destination)) {
            self.forwarding(flow.family(), &input.name)?;
        }
        let lookup = Lookup { destination: flow.destination, source: input.as_ref().map(|_| flow.source), input: entry };
        let route = self.route(lookup)?;
        let exit = route.interface;
        let mut packet = Packet { input: self.site.interface(entry), ..Packet::new(&flow) };
        (packet.translated, packet.untracked) = (translated, untracked);
        packet.local = Some(route.kind == "local");
        if route.kind == "local" {
            self.note_route(&flow, &route);
            if input.is_some() {
                let judgement = self.site.book.judge(Hook::Input, false, &packet);
                self.passage.judged(HOST, "rules input", &judgement)?;
            }
            return Ok(format!("arrives at this host: {}", socket(flow.destination, flow.port)));
        }
        if self.site.in_overlay(flow.destination) && !self.leads_into_overlay(&route) {
            return Err(self.no_peer(&flow, &route));
        }
        self.note_route(&flow, &route);
        packet.output = self.site.interface(exit);
        if input.is_some() {
            let judgement = self.site.book.judge(Hook::Forward, false, &packet);
            self.passage.judged(HOST, "rules forward", &judgement)?;
        }
        let judgement = self.site.book.judge(Hook::Postrouting, false, &packet);
        self.passage.judged(HOST, "rules postrouting", &judgement)?;
        self.translate_source(&mut flow, &judgement, exit);
        let Some(link) = self.site.link(exit).cloned() else {
            return Err(self.passage.stop(HOST, "interface", "the route names no interface", "ip route get"));
        };
        if link.is_tunnel(flow.family()) {
            return self.tunnel(&flow, &route, &link);
        }
        if self.site.bridge().is_some_and(|bridge| bridge.index == link.index) {
            return self.deliver(flow.destination, &link);
        }
        self.leave(flow.destination, &route, &link, "")?;
        Ok(format!(
            "leaves this host by {} for {}",
            link.name,
            route.gateway.map_or(flow.destination.to_string(), |g| format!("the gateway {g}"))
        ))
    }

    fn note_route(&mut self, flow: &Flow, route: &Route) {
        let entry = route.destination.map(|entry| format!(" by {entry}")).unwrap_or_default();
        let via = route.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        let name = self.site.name(route.interface);
        let kind = if route.kind == "local" { " local" } else { "" };
        let id = route.nexthop.map(|id| format!(" next hop {id}")).unwrap_or_default();
        self.passage.ok(HOST, "route", format!("{}{entry}:{kind}{via} dev {name}{id}", flow.destination));
    }

    /// Asks for the route; where there is none the way ends.
    pub(super) fn route(&mut self, lookup: Lookup) -> Go<Route> {
        match self.site.look.route(lookup)? {
            Ok(route) => Ok(route),
            Err(_) if self.site.in_overlay(lookup.destination) => {
                let flow = Flow::echo(lookup.source.unwrap_or(lookup.destination), lookup.destination);
                let what = match self.site.look.unreachable(lookup.destination) {
                    Some(range) => {
                        format!("no peer's route covers it: {range} is unreachable but for the subnets that hosts hold")
                    }
                    None => "the kernel has no route".to_owned(),
                };
                Err(self.no_route_in_overlay(&flow, &what))
            }
            Err(reason) => {
                let from = lookup
                    .input
                    .map(|index| format!(" for what comes in by {}", self.site.name(Some(index))))
                    .unwrap_or_default();
                let strict = if reason.contains("cross-device") {
                    "; the reverse path filter refuses the source: sysctl net.ipv4.conf.all.rp_filter"
                } else {
                    ""
                };
                let answer = format!("no route to {}{from}: {reason}", lookup.destination);
                Err(self.passage.stop(HOST, "route", answer, format!("ip route get {}{strict}", lookup.destination)))
            }
        }
    }

    /// `net.ipv4.conf.IN.forwarding`, the setting that counts for what comes in by an interface; for IPv6 that of all interfaces does.
    fn forwarding(&mut self, family: Family, input: &str) -> Go<()> {
        let path = match family {
            Family::V4 => sysctls::of(input, family, "forwarding"),
            Family::V6 => sysctls::forwarding(family).to_owned(),
        };
        match Site::sysctl(&path).as_deref() {
            Some("0") => {
                let name = path.replace('/', ".");
                Err(self.passage.stop(HOST, "forwarding", format!("net.{name} is 0"), format!("sysctl -w net/{path}=1")))
            }
            _ => {
                self.passage.ok(HOST, "forwarding", format!("on for what comes in by {input}"));
                Ok(())
            }
        }
    }

    fn translate_source(&mut self, flow: &mut Flow, judgement: &Judgement, exit: Option<u32>) {
        match &judgement.translation {
            Some((Translation::Masquerade, place)) => {
                let own = exit.and_then(|index| self.site.look.addresses(index).ok()).unwrap_or_default();
                let global = |address: &IpAddr| !matches!(address, IpAddr::V6(a) if a.is_unicast_link_local());
                let own = own.into_iter().find(|address| Family::of(*address) == flow.family() && global(address));
                let shown = own.map_or_else(|| "the address of the interface".to_owned(), |own| own.to_string());
                self.passage.ok(HOST, "translation", format!("source becomes {shown} (masquerade), by {place}"));
                if let Some(own) = own {
                    flow.source = own;
                    self.forms.push((flow.source, flow.destination));
                }
            }
            Some((Translation::Source { address: Some(address) }, place)) => {
                self.passage.ok(HOST, "translation", format!("source becomes {address}, by {place}"));
                flow.source = *address;
                self.forms.push((flow.source, flow.destination));
            }
            Some((_, place)) => {
                self.passage.unsure(HOST, "translation", format!("translated by {place} in a way that cannot be read"), "")
            }
            None => self.passage.ok(HOST, "translation", "none: source and destination stay"),
        }
    }
}

/// An address with a port, where there is one.
pub(super) fn socket(address: IpAddr, port: u16) -> String {
    if port == 0 { address.to_string() } else { std::net::SocketAddr::new(address, port).to_string() }
}
