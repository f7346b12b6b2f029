//! The part of the path between hosts of the overlay: the peer's route, next hop, neighbour and FDB entry, the outer packet, and
//! packets that arrive from another host or from outside.

use std::net::IpAddr;

use overlay_agent::kernel::trace::packet::{Flow, Packet, UDP};
use overlay_agent::kernel::trace::{Link, Route, RouteLookup};
use overlay_agent::model::Family;
use overlay_agent::plan::backend::vxlan;
use overlay_agent::plan::ruleset::Hook;

use super::hop_log::{Step, Stop};
use super::namespace_view::link_fault;
use super::tracer::Tracer;

/// Remedy for most faults of peer entries.
const REPAIR_HINT: &str =
    "the agent restores it: see `overlayctl status` and `overlayctl peers`; if it is not running: systemctl start overlayd";

/// A peer's underlay and link-layer addresses.
struct Remote {
    gateway: IpAddr,
    public: IpAddr,
    mac: overlay_agent::model::Mac,
}

impl Tracer<'_> {
    /// Whether a route for an overlay address leads into the overlay.
    pub(super) fn routes_into_overlay(&self, route: &Route) -> bool {
        self.view.link(route.interface).is_some_and(|link| link.device().is_some())
    }

    /// Stops the trace: the destination is in the overlay, and no peer's route leads to it.
    pub(super) fn no_peer_route(&mut self, flow: &Flow, route: &Route) -> Stop {
        let route_text =
            route.destination.map(|entry| format!("the route {entry}")).unwrap_or_else(|| "another route".to_owned());
        let reason = format!("no peer's route covers it: {route_text} would send it out by {}", self.view.name(route.interface));
        self.no_overlay_route(flow, &reason)
    }

    /// Stops the trace, with the state of the leases and the next-hop objects.
    pub(super) fn no_overlay_route(&mut self, flow: &Flow, reason: &str) -> Stop {
        let destination = flow.destination;
        let mut message = format!("{destination} is in the overlay network, but {reason}");
        let lease = self.inventory.lease_for(destination).cloned();
        let remedy = match (&lease, self.inventory.leases.is_some()) {
            (Some(lease), _) => {
                let host = lease.host.clone().unwrap_or_else(|| lease.key.clone());
                let base = lease.subnet.and_then(|s| s.get(Family::of(destination))).map(|range| range.base());
                if let Some(refused) = &lease.refused {
                    message.push_str(&format!("; the lease of {host} is ignored: {refused}"));
                } else {
                    let hop = base.is_some_and(|base| !self.view.kernel.nexthops_to(base).is_empty());
                    let missing = if hop {
                        "the next hop exists, the route does not"
                    } else {
                        "neither the route nor its next hop exists: the kernel deletes routes with their next hop"
                    };
                    message.push_str(&format!("; {host} holds its subnet, {missing}"));
                }
                REPAIR_HINT.to_owned()
            }
            (None, true) => {
                message.push_str("; no host holds a subnet with it: its lease expired or never existed");
                "`overlayctl subnets` lists the leases; start the agent of its host".to_owned()
            }
            (None, false) => {
                message.push_str("; the agent does not answer, so its host is unknown");
                format!("{REPAIR_HINT}; `overlayctl subnets --etcd-endpoints URL` lists the leases without an agent")
            }
        };
        self.log.stop(&self.view.place, "route", message, remedy)
    }

    /// Follows the packet through the tunnel device to the peer.
    pub(super) fn through_tunnel(&mut self, flow: &Flow, route: &Route, device: &Link) -> Step<String> {
        let Some(vxlan) = device.vxlan.clone() else {
            return Err(self.log.stop(&self.view.place, "tunnel", format!("{} is not a VXLAN device", device.name), REPAIR_HINT));
        };
        if let Some(fault) = link_fault(device) {
            return Err(self.log.stop(
                &self.view.place,
                "tunnel",
                fault,
                format!("ip link set {} up; {REPAIR_HINT}", device.name),
            ));
        }
        let local = vxlan.local.map_or("-".to_owned(), |local| local.to_string());
        let remote = self.resolve_remote(flow.destination, route, device)?;
        self.log.ok(
            &self.view.place,
            "tunnel",
            format!("{}: VNI {}, UDP {}, MTU {}, from {local}", device.name, vxlan.vni, vxlan.port, device.mtu),
        );
        let Some(source) = vxlan.local else {
            return Err(self.log.stop(
                &self.view.place,
                "tunnel",
                format!("{} has no address of its own", device.name),
                REPAIR_HINT,
            ));
        };
        let from_overlay = self.view.in_overlay(flow.source) || flow.source == source;
        self.enter_host()?;
        let lookup = RouteLookup { destination: remote.public, source: Some(source), input: None };
        let outer = match self.view.kernel.route(lookup)? {
            Ok(outer) if outer.kind == "local" => {
                let message = format!("{} is this host's own address: the FDB entry leads back here", remote.public);
                return Err(self.log.stop(&self.view.place, "outer route", message, REPAIR_HINT));
            }
            Ok(outer) => outer,
            Err(reason) => {
                let message = format!("no route to {} from {source}: {reason}", remote.public);
                let remedy = format!("the underlay's routes: ip route get {} from {source}", remote.public);
                return Err(self.log.stop(&self.view.place, "outer route", message, remedy));
            }
        };
        let via = outer.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        let exit = self.view.link(outer.interface).cloned();
        self.log.ok(&self.view.place, "outer route", format!("{}{via} dev {}", remote.public, self.view.name(outer.interface)));
        let outer_flow = Flow { source, destination: remote.public, protocol: UDP, port: vxlan.port };
        let inner = Packet::new(flow);
        let mut packet =
            Packet { output: self.view.interface(outer.interface), ..Packet::vxlan_encapsulated(&inner, &outer_flow, vxlan.vni) };
        let result = self.view.ruleset.evaluate(Hook::Output, false, &packet);
        self.log.record_rules(&self.view.place, "outer rules output", &result)?;
        packet.untracked = result.untracked;
        let result = self.view.ruleset.evaluate(Hook::Postrouting, false, &packet);
        self.log.record_rules(&self.view.place, "outer rules postrouting", &result)?;
        let Some(exit) = exit else {
            return Err(self.log.stop(&self.view.place, "outer route", "the route has no interface", REPAIR_HINT));
        };
        let required_mtu = device.mtu + vxlan::overhead(Family::of(remote.public));
        if exit.mtu < required_mtu {
            let message = format!(
                "{} has MTU {}, a full packet of {} needs {required_mtu}: large packets are lost",
                exit.name, exit.mtu, device.name
            );
            self.log.unsure(&self.view.place, "outer MTU", message, "the agent follows the underlay's MTU: `overlayctl status`");
        }
        self.leave_host(remote.public, &outer, &exit, "outer ")?;
        let host = self.inventory.host_name_at(remote.public);
        if !from_overlay {
            let message = format!("{} is not in the overlay: {host} drops it as `tunnel`, unless it runs flannel", flow.source);
            let remedy = "--ip-masq=true, the default, replaces the source by this host's overlay address";
            self.log.unsure(&self.view.place, "peer's guard", message, remedy);
        }
        Ok(format!(
            "leaves this host by {} for {host}; continue on that host: overlayctl trace {} {}",
            exit.name, flow.source, flow.destination
        ))
    }

    /// Resolves next hop, neighbour and FDB entry, in this order.
    fn resolve_remote(&mut self, destination: IpAddr, route: &Route, device: &Link) -> Step<Remote> {
        if let Some(id) = route.nexthop {
            let Some(hop) = self.view.kernel.nexthop(id) else {
                return Err(self.log.stop(&self.view.place, "next hop", format!("object {id} is missing"), REPAIR_HINT));
            };
            let target = hop.gateway.map_or_else(|| "nowhere".to_owned(), |gateway| format!("via {gateway}"));
            let target = format!("object {id} leads {target} dev {}", self.view.name(hop.interface));
            let base = route.destination.map(|entry| entry.base());
            if hop.blackhole || hop.gateway.is_none() || hop.interface != Some(device.index) {
                return Err(self.log.stop(&self.view.place, "next hop", target, REPAIR_HINT));
            }
            if base.is_some() && hop.gateway != base {
                let message = format!(
                    "{target}, which is not the peer of {}",
                    route.destination.map(|d| d.to_string()).unwrap_or_default()
                );
                return Err(self.log.stop(&self.view.place, "next hop", message, REPAIR_HINT));
            }
            self.log.ok(&self.view.place, "next hop", target);
        }
        let Some(gateway) = route.gateway else {
            let message =
                format!("the route to {destination} has no gateway: a peer's route has the base of its subnet as gateway");
            return Err(self.log.stop(&self.view.place, "next hop", message, REPAIR_HINT));
        };
        let mac = match self.view.kernel.neighbour(device.index, gateway) {
            Some(found) if found.is_usable() => {
                let mac = found.mac.unwrap_or(overlay_agent::model::Mac([0; 6]));
                self.log.ok(&self.view.place, "neighbour", format!("{gateway} is {mac} ({})", found.state));
                mac
            }
            Some(found) => {
                let message = format!("{gateway} on {} is {}: it has no MAC", device.name, found.state);
                return Err(self.log.stop(&self.view.place, "neighbour", message, REPAIR_HINT));
            }
            None => {
                let message = format!("{gateway} is unknown on {}, and a tunnel sends no neighbour requests", device.name);
                return Err(self.log.stop(&self.view.place, "neighbour", message, REPAIR_HINT));
            }
        };
        let Some(public) = self.view.kernel.fdb_destination(device.index, mac) else {
            let message = format!("{} has no entry for {mac}, so its host is unknown", device.name);
            return Err(self.log.stop(&self.view.place, "fdb", message, REPAIR_HINT));
        };
        self.log.ok(&self.view.place, "fdb", format!("{mac} is behind {}", self.inventory.host_name_at(public)));
        self.compare_with_lease(destination, public);
        Ok(Remote { gateway, public, mac })
    }

    /// Records a difference between the lease and the kernel.
    fn compare_with_lease(&mut self, destination: IpAddr, public: IpAddr) {
        match self.inventory.lease_for(destination) {
            Some(lease) if lease.public_ip.iter().all(|(_, lease_address)| *lease_address != public) => {
                let lease_addresses: Vec<String> =
                    lease.public_ip.iter().map(|(_, lease_address)| lease_address.to_string()).collect();
                let host = lease.host.clone().unwrap_or_default();
                let message = format!("the lease of {host} has {}, the kernel {public}", lease_addresses.join(" "));
                self.log.unsure(&self.view.place, "lease", message, REPAIR_HINT);
            }
            None if self.inventory.leases.is_some() => {
                let message = format!("no host holds a subnet with {destination} any more, but the kernel has its entries");
                self.log.unsure(&self.view.place, "lease", message, "`overlayctl subnets` lists the leases");
            }
            _ => {}
        }
    }

    /// Follows the packet out of an underlay interface.
    pub(super) fn leave_host(&mut self, destination: IpAddr, route: &Route, link: &Link, prefix: &str) -> Step<()> {
        if let Some(fault) = link_fault(link) {
            return Err(self.log.stop(
                &self.view.place,
                &format!("{prefix}interface"),
                fault,
                format!("ip link set {} up", link.name),
            ));
        }
        let next = route.gateway.unwrap_or(destination);
        let step = format!("{prefix}neighbour");
        match self.view.kernel.neighbour(link.index, next) {
            Some(found) if found.is_usable() => {
                let mac = found.mac.map(|mac| mac.to_string()).unwrap_or_default();
                self.log.ok(&self.view.place, &step, format!("{next} is {mac} ({})", found.state));
            }
            Some(found) if matches!(found.state.as_str(), "FAILED" | "INCOMPLETE") => {
                let message = format!("{next} does not answer on {} ({})", link.name, found.state);
                let remedy = format!("check the underlay: is {next} up, and on this network? `ip neigh show {next}`");
                return Err(self.log.stop(&self.view.place, &step, message, remedy));
            }
            _ => self.log.ok(&self.view.place, &step, format!("{next} is unresolved: the first packet triggers a request")),
        }
        Ok(())
    }

    /// Follows a packet that arrives from outside, or from another host of the overlay.
    pub(super) fn arrive(&mut self, source: IpAddr, destination: IpAddr, protocol: u8, port: u16) -> Step<String> {
        let flow = Flow { source, destination, protocol, port };
        let return_route = self.lookup_route(RouteLookup { destination: source, source: None, input: None })?;
        if self.view.in_overlay(source) || self.routes_into_overlay(&return_route) {
            return self.arrive_by_tunnel(flow, &return_route);
        }
        let input = self.view.link(return_route.interface).cloned();
        let name = self.view.name(return_route.interface);
        self.log.ok(&self.view.place, "arrival", format!("assumed input interface {name}, the route to {source}"));
        if self.view.in_overlay(destination) {
            self.note_source_filter(&flow);
        }
        self.through_host(flow, input)
    }

    /// Notes that the source filter drops packets from outside the overlay that a peer forwards through the tunnel without
    /// masquerade.
    fn note_source_filter(&mut self, flow: &Flow) {
        let peers = self.inventory.leases.iter().flatten().filter(|lease| !lease.own && lease.refused.is_none());
        let public = peers.filter_map(|lease| lease.public_ip.get(flow.family()).copied()).next();
        let vxlan = self.view.tunnel(flow.family()).and_then(|link| link.vxlan.clone());
        let (Some(public), Some(vxlan)) = (public, vxlan) else { return };
        let Some(packet) = self.encapsulated_packet(flow, public, &vxlan) else { return };
        let result = self.view.ruleset.evaluate(Hook::Input, false, &packet);
        if let Some(dropping_rule) = result.dropped.as_ref().filter(|_| result.is_certain_drop()) {
            let (source, host) = (flow.source, self.inventory.host_name_at(public));
            self.log.notes.push(format!(
                "packets from {source} that another host such as {host} forwards without masquerade are dropped here by {dropping_rule} (`{}`)",
                dropping_rule.list_command()
            ));
        }
    }

    /// Builds the packet as it arrives through the tunnel from a peer; `None` if the tunnel has no address.
    fn encapsulated_packet(
        &mut self,
        flow: &Flow,
        public: IpAddr,
        vxlan: &overlay_agent::kernel::trace::Vxlan,
    ) -> Option<Packet> {
        let outer_flow = Flow { source: public, destination: vxlan.local?, protocol: UDP, port: vxlan.port };
        let outer = self.view.kernel.route(RouteLookup { destination: public, source: None, input: None }).ok()?;
        let input = self.view.interface(outer.ok().and_then(|route| route.interface));
        Some(Packet {
            input,
            destination_is_local: Some(true),
            ..Packet::vxlan_encapsulated(&Packet::new(flow), &outer_flow, vxlan.vni)
        })
    }

    fn arrive_by_tunnel(&mut self, flow: Flow, return_route: &Route) -> Step<String> {
        let device = self.view.link(return_route.interface).cloned();
        let Some((device, vxlan)) = device.and_then(|device| device.vxlan.clone().map(|vxlan| (device, vxlan))) else {
            return Err(self.no_peer_route(&Flow { destination: flow.source, ..flow }, return_route));
        };
        self.log.ok(&self.view.place, "way back", format!("the route to {} uses {}", flow.source, device.name));
        let remote = self.resolve_remote(flow.source, return_route, &device)?;
        let Some(mut packet) = self.encapsulated_packet(&flow, remote.public, &vxlan) else {
            return Err(self.log.stop(
                &self.view.place,
                "tunnel",
                format!("{} has no address of its own", device.name),
                REPAIR_HINT,
            ));
        };
        let result = self.view.ruleset.evaluate(Hook::Prerouting, false, &packet);
        self.log.record_rules(&self.view.place, "outer rules prerouting", &result)?;
        packet.untracked = result.untracked;
        let result = self.view.ruleset.evaluate(Hook::Input, false, &packet);
        self.log.record_rules(&self.view.place, "outer rules input", &result)?;
        if let Some(fault) = link_fault(&device) {
            return Err(self.log.stop(
                &self.view.place,
                "tunnel",
                fault,
                format!("ip link set {} up; {REPAIR_HINT}", device.name),
            ));
        }
        self.log.ok(
            &self.view.place,
            "tunnel",
            format!("{} decapsulates it, from {} ({})", device.name, remote.gateway, remote.mac),
        );
        self.through_host(flow, Some(device))
    }
}
