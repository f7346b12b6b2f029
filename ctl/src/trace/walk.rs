//! The way itself, from the source's namespace through the host's to where the packet leaves it or arrives.

use std::net::IpAddr;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::trace::packet::{Flow, ICMP, ICMPV6, Packet, TCP, UDP};
use overlay_agent::kernel::trace::{Link, Look, Lookup, Neighbour, Route, Translation};
use overlay_agent::model::endpoint::Port;
use overlay_agent::model::publish::Transport;
use overlay_agent::model::{Endpoint, Family, Mac};
use overlay_agent::plan::ruleset::Hook;

use super::ends::{End, Known, Wanted};
use super::passage::{Ended, Go, Passage};
use super::site::{Site, link_fault};
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

/// Where a packet of a container is, once the bridge has it.
enum Onward {
    /// For the host to forward or to take, in by this interface.
    Host(Flow, Box<Link>),
    /// Where it ends.
    Arrived(String),
}

/// What a container's namespace says.
struct Inside {
    route: Result<Route, String>,
    link: Option<Link>,
    neighbour: Option<Neighbour>,
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

    /// From a container's namespace to the bridge, or across it.
    fn out_of(&mut self, endpoint: &Endpoint, destination: IpAddr, protocol: u8, port: u16, origin: &mut IpAddr) -> Go<Onward> {
        let place = format!("container {}", endpoint.name);
        let netns = match Netns::open(&endpoint.netns) {
            Ok(netns) => netns,
            Err(error) => {
                let remedy = "the container has ended: detach it, or restart it";
                return Err(self.passage.stop(&place, "namespace", error, remedy));
            }
        };
        let source = endpoint.addresses().get(Family::of(destination)).copied();
        let inside = netns.run(move || inside(destination, source)).map_err(TraceError::from)??;
        let route = match inside.route {
            Ok(route) => route,
            Err(reason) => {
                let remedy = format!("`overlayctl inspect {}` says what is not in place; attach it again", endpoint.name);
                return Err(self.passage.stop(&place, "route", format!("no route to {destination}: {reason}"), remedy));
            }
        };
        *origin = source.or(route.source).unwrap_or(*origin);
        let name = inside.link.as_ref().map_or_else(|| "no interface".to_owned(), |link| link.name.clone());
        if route.kind == "local" {
            self.passage.ok(&place, "route", format!("{destination} is its own address"));
            return Ok(Onward::Arrived(format!("never leaves {place}")));
        }
        let via = route.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        self.passage.ok(&place, "route", format!("{destination}{via} dev {name} from {origin}"));
        if let Some(fault) = inside.link.as_ref().and_then(link_fault) {
            // No carrier inside is mostly the fault of the host's end.
            if let (Some(port), Some(true)) = (&endpoint.port, inside.link.as_ref().map(|link| link.up)) {
                self.port(&port.host_interface)?;
            }
            return Err(self.passage.stop(
                &place,
                "interface",
                fault,
                format!("inside the container: ip link set {name} up; or attach it again"),
            ));
        }
        let next = route.gateway.unwrap_or(destination);
        let station = self.neighbour_inside(&place, next, inside.neighbour)?;
        let Some(Port { host_interface, mac, .. }) = endpoint.port.clone() else {
            return Err(self.passage.stop(&place, "port", "it is not on the bridge", "attach it in mode overlay"));
        };
        let bridge = self.port(&host_interface)?;
        let flow = Flow { source: *origin, destination, protocol, port };
        self.forms.push((flow.source, flow.destination));
        let framed = Packet::new(&flow).framed(mac, station.or(bridge.mac).unwrap_or(Mac([0; 6])));
        let input = self.site.links.iter().find(|link| link.name == host_interface).map(|link| link.index);
        let packet = Packet { input: self.site.interface(input), ..framed };
        let judgement = self.site.book.judge(Hook::Prerouting, true, &packet);
        self.passage.judged(HOST, "rules of the bridge", &judgement)?;
        if route.gateway.is_none() && !self.site.addresses.contains(&flow.destination) {
            return self.across_the_bridge(flow, &bridge).map(Onward::Arrived);
        }
        Ok(Onward::Host(flow, Box::new(bridge)))
    }

    fn neighbour_inside(&mut self, place: &str, next: IpAddr, neighbour: Option<Neighbour>) -> Go<Option<Mac>> {
        let bridge = self.site.bridge().and_then(|bridge| bridge.mac);
        let gateway = self.site.addresses.contains(&next);
        match neighbour {
            Some(found) if found.is_usable() => {
                let mac = found.mac.unwrap_or(Mac([0; 6]));
                if gateway && bridge.is_some_and(|bridge| bridge != mac) {
                    let answer = format!("{next} is taken for {mac} ({}), which is not the bridge", found.state);
                    return Err(self.passage.stop(
                        place,
                        "neighbour",
                        answer,
                        format!("remove the entry in the container: ip neigh del {next} dev eth0"),
                    ));
                }
                self.passage.ok(place, "neighbour", format!("{next} is {mac} ({})", found.state));
                Ok(Some(mac))
            }
            Some(found) if found.state == "FAILED" => {
                let answer = format!("{next} did not answer when it was asked for last ({})", found.state);
                self.passage.unsure(place, "neighbour", answer, "it is asked for again with the next packet");
                Ok(None)
            }
            _ => {
                self.passage.ok(place, "neighbour", format!("{next} is not known yet: it is asked for with the first packet"));
                Ok(None)
            }
        }
    }

    /// The host's end of a container's veth pair and the bridge that it is to be a port of.
    pub(super) fn port(&mut self, host_interface: &str) -> Go<Link> {
        let remedy = "the agent puts it back: `overlayctl status`, or `ip link set dev NAME up master BRIDGE`";
        let Some(port) = self.site.links.iter().find(|link| link.name == host_interface).cloned() else {
            return Err(self.passage.stop(HOST, "port", format!("{host_interface} is not there"), remedy));
        };
        let Some(bridge) = self.site.bridge().cloned() else {
            return Err(self.passage.stop(
                HOST,
                "bridge",
                "the overlay's bridge is not there",
                "start the agent: systemctl start overlayd",
            ));
        };
        if let Some(fault) = link_fault(&port) {
            return Err(self.passage.stop(HOST, "port", fault, remedy));
        }
        if port.master != Some(bridge.index) {
            return Err(self.passage.stop(HOST, "port", format!("{host_interface} is no port of {}", bridge.name), remedy));
        }
        if let Some(fault) = link_fault(&bridge) {
            return Err(self.passage.stop(HOST, "bridge", fault, format!("ip link set {} up", bridge.name)));
        }
        let state = port.port_state.as_deref().unwrap_or("unknown");
        if !matches!(state, "forwarding" | "unknown") {
            return Err(self.passage.stop(HOST, "port", format!("{host_interface} is {state} on {}", bridge.name), remedy));
        }
        self.passage.ok(HOST, "port", format!("{host_interface} is {state} on {}", bridge.name));
        Ok(bridge)
    }

    /// From one port of the bridge to another. Where bridges ask the IP rules (`br_netfilter`), these count, too.
    fn across_the_bridge(&mut self, flow: Flow, bridge: &Link) -> Go<String> {
        let calls = if flow.family() == Family::V4 { "iptables" } else { "ip6tables" };
        if Site::sysctl(&format!("bridge/bridge-nf-call-{calls}")).as_deref() == Some("1") {
            let device = self.site.interface(Some(bridge.index));
            let packet = Packet { input: device.clone(), output: device, ..Packet::new(&flow) };
            let judgement = self.site.book.judge(Hook::Forward, false, &packet);
            self.passage.judged(HOST, "rules forward", &judgement)?;
        }
        self.deliver(flow.destination, bridge)
    }

    /// To a container of this host.
    pub(super) fn deliver(&mut self, destination: IpAddr, bridge: &Link) -> Go<String> {
        let Some(endpoint) = self.known.container_with(destination).cloned() else {
            let neighbour = self.site.look.neighbour(bridge.index, destination);
            let answer = match neighbour {
                Some(found) if found.is_usable() => {
                    self.passage.unsure(
                        HOST,
                        "endpoint",
                        format!("{destination} is no container that the agent knows, but answers on {}", bridge.name),
                        "",
                    );
                    return Ok(format!("delivered on {}", bridge.name));
                }
                _ => format!("{destination} is no container of this host"),
            };
            return Err(self.passage.stop(
                HOST,
                "endpoint",
                answer,
                "`overlayctl endpoints` lists them: the container has ended, or has another address",
            ));
        };
        let place = format!("container {}", endpoint.name);
        if let Some(port) = &endpoint.port {
            self.port(&port.host_interface)?;
        }
        let netns = match Netns::open(&endpoint.netns) {
            Ok(netns) => netns,
            Err(error) => {
                return Err(self.passage.stop(&place, "namespace", error, "the container has ended: detach it, or restart it"));
            }
        };
        let name = endpoint.port.as_ref().map(|port| port.interface.clone()).unwrap_or_default();
        let (link, addresses) = netns
            .run(move || -> Result<_, TraceError> {
                let mut look = Look::open()?;
                let link = look.links()?.into_iter().find(|link| link.name == name);
                Ok((link, look.addresses(0)?))
            })
            .map_err(TraceError::from)??;
        let remedy = format!("`overlayctl inspect {}` says what is not in place; attach it again", endpoint.name);
        match link {
            None => return Err(self.passage.stop(&place, "interface", "its interface is not there", remedy)),
            Some(link) => {
                if let Some(fault) = link_fault(&link) {
                    return Err(self.passage.stop(&place, "interface", fault, remedy));
                }
                if !addresses.contains(&destination) {
                    let answer = format!("{} has no address {destination}", link.name);
                    return Err(self.passage.stop(&place, "address", answer, remedy));
                }
                self.passage.ok(&place, "interface", format!("{} is up and has {destination}", link.name));
            }
        }
        Ok(format!("arrives in {place}"))
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
        packet.translated = translated;
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
                Err(self.no_route_in_overlay(&flow, "the kernel has no route"))
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

    /// `net.ipv4.conf.IN.forwarding`, the setting that counts for what comes in by an interface.
    fn forwarding(&mut self, family: Family, input: &str) -> Go<()> {
        let dir = if family == Family::V4 { "ipv4" } else { "ipv6" };
        let path = format!("{dir}/conf/{input}/forwarding");
        match Site::sysctl(&path).as_deref() {
            Some("0") => {
                let name = path.replace('/', ".");
                Err(self.passage.stop(
                    HOST,
                    "forwarding",
                    format!("net.{name} is 0"),
                    format!("sysctl -w net.{dir}.conf.all.forwarding=1"),
                ))
            }
            _ => {
                self.passage.ok(HOST, "forwarding", format!("on for what comes in by {input}"));
                Ok(())
            }
        }
    }

    fn translate_source(&mut self, flow: &mut Flow, judgement: &overlay_agent::kernel::trace::Judgement, exit: Option<u32>) {
        match &judgement.translation {
            Some((Translation::Masquerade, place)) => {
                let own = exit.and_then(|index| self.site.look.addresses(index).ok()).unwrap_or_default();
                let own = own.into_iter().find(|address| Family::of(*address) == flow.family());
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

fn inside(destination: IpAddr, source: Option<IpAddr>) -> Result<Inside, TraceError> {
    let mut look = Look::open()?;
    let route = look.route(Lookup { destination, source, input: None })?;
    let links = look.links()?;
    let (mut link, mut neighbour) = (None, None);
    if let Ok(route) = &route {
        link = links.into_iter().find(|link| Some(link.index) == route.interface);
        neighbour = route.interface.and_then(|index| look.neighbour(index, route.gateway.unwrap_or(destination)));
    }
    Ok(Inside { route, link, neighbour })
}

/// An address with a port, where there is one.
pub(super) fn socket(address: IpAddr, port: u16) -> String {
    if port == 0 { address.to_string() } else { std::net::SocketAddr::new(address, port).to_string() }
}
