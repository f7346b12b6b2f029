//! The part of the path inside containers of this host and on the bridge: out of a container, across the bridge, into a
//! container.

use std::net::IpAddr;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::trace::packet::{Flow, Packet};
use overlay_agent::kernel::trace::{KernelQuery, Link, Neighbour, Route, RouteLookup};
use overlay_agent::model::endpoint::Port;
use overlay_agent::model::{Endpoint, Family, Mac};
use overlay_agent::plan::ruleset::Hook;

use super::TraceError;
use super::hop_log::Step;
use super::namespace_view::link_fault;
use super::tracer::{BridgeDecision, Tracer};

/// Lookups in a container's namespace.
struct NetnsView {
    route: Result<Route, String>,
    link: Option<Link>,
    neighbour: Option<Neighbour>,
}

impl Tracer<'_> {
    /// Follows the packet from a container's namespace to the bridge, or across it.
    pub(super) fn leave_container(
        &mut self,
        endpoint: &Endpoint,
        destination: IpAddr,
        protocol: u8,
        port: u16,
        origin: &mut IpAddr,
    ) -> Step<BridgeDecision> {
        let location = format!("container {}", endpoint.name);
        let netns = match Netns::open(&endpoint.netns) {
            Ok(netns) => netns,
            Err(error) => {
                let remedy = "the container has ended: detach it, or restart it";
                return Err(self.log.stop(&location, "namespace", error, remedy));
            }
        };
        let source = endpoint.addresses().get(Family::of(destination)).copied();
        let view = netns.run(move || query_namespace(destination, source)).map_err(TraceError::from)??;
        let route = match view.route {
            Ok(route) => route,
            Err(reason) => {
                let remedy = format!("`overlayctl inspect {}` shows the fault; attach it again", endpoint.name);
                return Err(self.log.stop(&location, "route", format!("no route to {destination}: {reason}"), remedy));
            }
        };
        *origin = source.or(route.source).unwrap_or(*origin);
        let name = view.link.as_ref().map_or_else(|| "no interface".to_owned(), |link| link.name.clone());
        if route.kind == "local" {
            self.log.ok(&location, "route", format!("{destination} is the container's own address"));
            return Ok(BridgeDecision::Delivered(format!("never leaves {location}")));
        }
        let via = route.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        self.log.ok(&location, "route", format!("{destination}{via} dev {name} from {origin}"));
        if let Some(fault) = view.link.as_ref().and_then(link_fault) {
            // A missing carrier inside is usually a fault of the host interface.
            if let (Some(port), Some(true)) = (&endpoint.port, view.link.as_ref().map(|link| link.up)) {
                self.check_port(&port.host_interface)?;
            }
            return Err(self.log.stop(
                &location,
                "interface",
                fault,
                format!("inside the container: ip link set {name} up; or attach it again"),
            ));
        }
        let next = route.gateway.unwrap_or(destination);
        let neighbour_mac = self.check_neighbour(&location, next, view.neighbour)?;
        let Some(Port { host_interface, mac, .. }) = endpoint.port.clone() else {
            return Err(self.log.stop(&location, "port", "the container is not on the bridge", "attach it in mode overlay"));
        };
        let bridge = self.check_port(&host_interface)?;
        let flow = Flow { source: *origin, destination, protocol, port };
        self.addresses_seen.push((flow.source, flow.destination));
        let packet_with_ethernet =
            Packet::new(&flow).with_ethernet_header(mac, neighbour_mac.or(bridge.mac).unwrap_or(Mac([0; 6])));
        let input = self.view.links.iter().find(|link| link.name == host_interface).map(|link| link.index);
        let packet = Packet { input: self.view.interface(input), ..packet_with_ethernet };
        let result = self.view.ruleset.evaluate(Hook::Prerouting, true, &packet);
        self.log.record_rules(&self.view.place, "rules of the bridge", &result)?;
        if route.gateway.is_none() && !self.view.addresses.contains(&flow.destination) {
            return self.forward_on_bridge(flow, &bridge).map(BridgeDecision::Delivered);
        }
        Ok(BridgeDecision::ToHost(flow, Box::new(bridge)))
    }

    fn check_neighbour(&mut self, location: &str, next: IpAddr, neighbour: Option<Neighbour>) -> Step<Option<Mac>> {
        let bridge = self.view.bridge().and_then(|bridge| bridge.mac);
        let gateway = self.view.addresses.contains(&next);
        match neighbour {
            Some(found) if found.is_usable() => {
                let mac = found.mac.unwrap_or(Mac([0; 6]));
                if gateway && bridge.is_some_and(|bridge| bridge != mac) {
                    let message = format!("{next} resolves to {mac} ({}), which is not the bridge", found.state);
                    return Err(self.log.stop(
                        location,
                        "neighbour",
                        message,
                        format!("remove the entry in the container: ip neigh del {next} dev eth0"),
                    ));
                }
                self.log.ok(location, "neighbour", format!("{next} is {mac} ({})", found.state));
                Ok(Some(mac))
            }
            Some(found) if found.state == "FAILED" => {
                let message = format!("{next} did not answer the last request ({})", found.state);
                self.log.unsure(location, "neighbour", message, "the next packet triggers a new request");
                Ok(None)
            }
            _ => {
                self.log.ok(location, "neighbour", format!("{next} is unresolved: the first packet triggers a request"));
                Ok(None)
            }
        }
    }

    /// Checks the host interface of a container's veth pair, and that it is a port of the bridge.
    pub(super) fn check_port(&mut self, host_interface: &str) -> Step<Link> {
        let remedy = "the agent restores it: `overlayctl status`, or `ip link set dev NAME up master BRIDGE`";
        let Some(port) = self.view.links.iter().find(|link| link.name == host_interface).cloned() else {
            return Err(self.log.stop(&self.view.place, "port", format!("{host_interface} is missing"), remedy));
        };
        let Some(bridge) = self.view.bridge().cloned() else {
            return Err(self.log.stop(
                &self.view.place,
                "bridge",
                "the overlay's bridge is missing",
                "start the agent: systemctl start overlayd",
            ));
        };
        if let Some(fault) = link_fault(&port) {
            return Err(self.log.stop(&self.view.place, "port", fault, remedy));
        }
        if port.master != Some(bridge.index) {
            return Err(self.log.stop(
                &self.view.place,
                "port",
                format!("{host_interface} is not a port of {}", bridge.name),
                remedy,
            ));
        }
        if let Some(fault) = link_fault(&bridge) {
            return Err(self.log.stop(&self.view.place, "bridge", fault, format!("ip link set {} up", bridge.name)));
        }
        let state = port.port_state.as_deref().unwrap_or("unknown");
        if !matches!(state, "forwarding" | "unknown") {
            return Err(self.log.stop(
                &self.view.place,
                "port",
                format!("{host_interface} is {state} on {}", bridge.name),
                remedy,
            ));
        }
        self.log.ok(&self.view.place, "port", format!("{host_interface} is {state} on {}", bridge.name));
        Ok(bridge)
    }

    /// Follows the packet between two ports of the bridge. With `br_netfilter` the IP rules apply too.
    fn forward_on_bridge(&mut self, flow: Flow, bridge: &Link) -> Step<String> {
        let calls = if flow.family() == Family::V4 { "iptables" } else { "ip6tables" };
        if self.view.sysctl(&format!("bridge/bridge-nf-call-{calls}")).as_deref() == Some("1") {
            let device = self.view.interface(Some(bridge.index));
            let packet = Packet { input: device.clone(), output: device, ..Packet::new(&flow) };
            let result = self.view.ruleset.evaluate(Hook::Forward, false, &packet);
            self.log.record_rules(&self.view.place, "rules forward", &result)?;
        }
        self.deliver_to_container(flow.destination, bridge)
    }

    /// Delivers the packet to a container of this host.
    pub(super) fn deliver_to_container(&mut self, destination: IpAddr, bridge: &Link) -> Step<String> {
        let Some(endpoint) = self.container_here(destination).cloned() else {
            let neighbour = self.view.kernel.neighbour(bridge.index, destination);
            let message = match neighbour {
                Some(found) if found.is_usable() => {
                    self.log.unsure(
                        &self.view.place,
                        "endpoint",
                        format!("{destination} is not an endpoint of the agent, but answers on {}", bridge.name),
                        "",
                    );
                    return Ok(format!("delivered on {}", bridge.name));
                }
                _ => format!("{destination} is not a container of this host"),
            };
            return Err(self.log.stop(
                &self.view.place,
                "endpoint",
                message,
                "the container has ended, or has another address: `overlayctl endpoints` lists them",
            ));
        };
        let location = format!("container {}", endpoint.name);
        if let Some(port) = &endpoint.port {
            self.check_port(&port.host_interface)?;
        }
        let netns = match Netns::open(&endpoint.netns) {
            Ok(netns) => netns,
            Err(error) => {
                return Err(self.log.stop(&location, "namespace", error, "the container has ended: detach it, or restart it"));
            }
        };
        let name = endpoint.port.as_ref().map(|port| port.interface.clone()).unwrap_or_default();
        let (link, addresses) = netns
            .run(move || -> Result<_, TraceError> {
                let mut kernel = KernelQuery::open()?;
                let link = kernel.links()?.into_iter().find(|link| link.name == name);
                Ok((link, kernel.addresses(0)?))
            })
            .map_err(TraceError::from)??;
        let remedy = format!("`overlayctl inspect {}` shows the fault; attach it again", endpoint.name);
        match link {
            None => return Err(self.log.stop(&location, "interface", "the interface is missing", remedy)),
            Some(link) => {
                if let Some(fault) = link_fault(&link) {
                    return Err(self.log.stop(&location, "interface", fault, remedy));
                }
                if !addresses.contains(&destination) {
                    let message = format!("{} has no address {destination}", link.name);
                    return Err(self.log.stop(&location, "address", message, remedy));
                }
                self.log.ok(&location, "interface", format!("{} is up and has {destination}", link.name));
            }
        }
        Ok(format!("arrives in {location}"))
    }
}

fn query_namespace(destination: IpAddr, source: Option<IpAddr>) -> Result<NetnsView, TraceError> {
    let mut kernel = KernelQuery::open()?;
    let route = kernel.route(RouteLookup { destination, source, input: None })?;
    let links = kernel.links()?;
    let (mut link, mut neighbour) = (None, None);
    if let Ok(route) = &route {
        link = links.into_iter().find(|link| Some(link.index) == route.interface);
        neighbour = route.interface.and_then(|index| kernel.neighbour(index, route.gateway.unwrap_or(destination)));
    }
    Ok(NetnsView { route, link, neighbour })
}
