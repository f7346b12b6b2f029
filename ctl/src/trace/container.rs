//! The part of the way inside containers of this host and on the bridge: out of one, across, into one.

use std::net::IpAddr;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::trace::packet::{Flow, Packet};
use overlay_agent::kernel::trace::{Link, Look, Lookup, Neighbour, Route};
use overlay_agent::model::endpoint::Port;
use overlay_agent::model::{Endpoint, Family, Mac};
use overlay_agent::plan::ruleset::Hook;

use super::TraceError;
use super::passage::Go;
use super::site::{Site, link_fault};
use super::walk::{HOST, Walk};

/// Where a packet of a container is, once the bridge has it.
pub(super) enum Onward {
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
    /// From a container's namespace to the bridge, or across it.
    pub(super) fn out_of(
        &mut self,
        endpoint: &Endpoint,
        destination: IpAddr,
        protocol: u8,
        port: u16,
        origin: &mut IpAddr,
    ) -> Go<Onward> {
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
