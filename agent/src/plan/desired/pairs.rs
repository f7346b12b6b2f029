//! The veth pairs of an isolated network: its transit to the host, and the links to its peer networks.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::model::{Cidr, Device, Family, Mac, Vni};
use crate::plan::host_spec::HostSpec;
use crate::plan::isolation::{PEER_GATEWAY_V4, PEER_GATEWAY_V6, PeerNetwork, Scope, Transit, peer_link_mac};
use crate::plan::state::{Key, LinkKind, LinkState, PairTarget, RouteTarget, State, Value};
use crate::plan::sysctls;

impl HostSpec {
    /// Adds the entries of the transit's end in a scope. The network's end creates the pair, and its namespace has the default
    /// routes over it.
    pub(super) fn insert_transit(&self, state: &mut State, transit: Transit, scope: Scope) {
        let device = Device::transit(self.vni());
        self.insert_pair(state, device, (scope == Scope::Network).then_some(PairTarget::Host), None);
        for family in self.families() {
            let address = match scope {
                Scope::Host => transit.host(family),
                Scope::Network => transit.network(family),
            };
            if let Ok(address) = IpNetwork::new(address, Transit::prefix_length(family)) {
                state.insert(Key::Address(device, address), Value::Address);
            }
            // Without a link-local address the kernel resolves no neighbour for an IPv6 packet that it forwards (`ndisc_send_ns`).
            if family == Family::V6 {
                let host = if scope == Scope::Host { 1 } else { 2 };
                let address = IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, host]);
                if let Ok(address) = IpNetwork::new(address, 64) {
                    state.insert(Key::Address(device, address), Value::Address);
                }
            }
            if scope == Scope::Network {
                let gateway = RouteTarget::Gateway(device, transit.host(family));
                state.insert(Key::Route(Cidr::all(family)), Value::Route(gateway));
            }
        }
        if scope == Scope::Host && self.families().any(|family| family == Family::V4) {
            let path = sysctls::interface_path(&device.name(), Family::V4, "route_localnet");
            sysctls::insert(state, path, if self.has_published_ports() { "1" } else { "0" });
        }
    }

    /// Adds the entries of the link to a peer network, in the network's scope. Of the two networks the one with the smaller VNI
    /// creates the pair, so that they do not race.
    pub(super) fn insert_peer_link(&self, state: &mut State, peer: &PeerNetwork) {
        let (own, device) = (self.vni(), Device::peer_link(peer.vni));
        let target = || PairTarget::Namespace(peer.namespace.clone(), Device::peer_link(own));
        self.insert_pair(state, device, (own < peer.vni).then(target), Some(peer_link_mac(own)));
        for family in self.families() {
            let Some(range) = peer.ranges.get(family) else { continue };
            let gateway: IpAddr = match family {
                Family::V4 => PEER_GATEWAY_V4.into(),
                Family::V6 => PEER_GATEWAY_V6.into(),
            };
            state.insert(Key::Neigh(device, gateway), Value::Neigh(peer_link_mac(peer.vni)));
            state.insert(Key::Route(*range), Value::Route(RouteTarget::Gateway(device, gateway)));
        }
    }

    /// Adds one end of a veth pair. Both ends have the external interface's MTU: packets of the overlay are smaller.
    fn insert_pair(&self, state: &mut State, device: Device, target: Option<PairTarget>, mac: Option<Mac>) {
        let kind = LinkKind::Pair(target);
        let link = LinkState { kind, mac, mtu: self.underlay.mtu, up: true, master: None, hairpin: false };
        state.insert(Key::Link(device.name().into()), Value::Link(Box::new(link)));
        for family in self.families() {
            sysctls::insert_device_settings(state, device, family);
        }
        sysctls::ignore_router_advertisements(state, device);
    }

    fn vni(&self) -> Vni {
        self.backend().bridge().vni
    }
}
