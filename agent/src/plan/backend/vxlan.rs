//! VXLAN (RFC 7348): a device per family, whose FDB and neighbour entries lead to the peers.

use super::Backend;
use crate::model::backend::VxlanConfig;
use crate::model::peer::RemoteSubnet;
use crate::model::{BackendData, Device, Family, LeaseRecord, Mac, NetworkConfig, PeerEndpoint, RejectReason};
use crate::plan::host_spec::HostSpec;
use crate::plan::ruleset::{Element, PeerPair, Tunnel};
use crate::plan::state::{Key, LinkKind, LinkState, RouteTarget, Value, Vxlan};

/// Bytes in front of an inner packet: outer IP header (20 or 40), UDP (8), VXLAN (8), inner Ethernet (14). RFC 7348 section 5.
pub const fn overhead(family: Family) -> u32 {
    match family {
        Family::V4 => 50,
        Family::V6 => 70,
    }
}

impl Backend for VxlanConfig {
    fn name(&self) -> &'static str {
        "vxlan"
    }

    fn label(&self) -> String {
        format!("VXLAN VNI {}", self.vni)
    }

    fn bridge(&self) -> Device {
        Device::bridge(self.vni)
    }

    fn device(&self, family: Family) -> Option<Device> {
        Some(Device::vxlan(family, self.vni))
    }

    fn tunnel(&self) -> Option<Tunnel> {
        Some(Tunnel { port: self.port, vni: Some(self.vni) })
    }

    fn overhead(&self, family: Family) -> u32 {
        overhead(family)
    }

    fn underlay_mtu(&self) -> Option<u32> {
        self.mtu
    }

    fn lease_data(&self, network: &NetworkConfig, mac: &mut dyn FnMut(Device) -> Mac) -> BackendData {
        let vtep = network.families().map(|family| (family, mac(Device::vxlan(family, self.vni)))).collect();
        BackendData::Vxlan { vni: self.vni, vtep }
    }

    fn check_lease(&self, record: &LeaseRecord) -> Result<(), RejectReason> {
        match &record.lease.backend {
            BackendData::Vxlan { vni, .. } if *vni == self.vni => Ok(()),
            BackendData::Vxlan { vni, .. } => Err(RejectReason::OtherVni { theirs: *vni, ours: self.vni }),
            other => Err(RejectReason::OtherBackend { name: other.name().to_owned() }),
        }
    }

    fn link(&self, host: &HostSpec, family: Family) -> Option<LinkState> {
        let vxlan = Vxlan {
            vni: self.vni,
            port: self.port,
            local: *host.underlay.local.get(family)?,
            underlay: host.underlay.index,
            learning: false,
            tx_checksum: host.tx_checksum,
        };
        let mac = host.backend_data.endpoints().get(family)?.mac();
        let mtu = host.family_mtu(family);
        Some(LinkState { kind: LinkKind::Vxlan(vxlan), mac, mtu, up: true, master: None, hairpin: false })
    }

    fn peer_entries(&self, host: &HostSpec, family: Family, remote: &RemoteSubnet, entries: &mut Vec<(Key, Value)>) {
        let RemoteSubnet { subnet, public_ip, endpoint } = *remote;
        let Some(PeerEndpoint::Vxlan(mac)) = endpoint else { return };
        let (device, gateway) = (Device::vxlan(family, self.vni), subnet.base());
        let vni = host.numbered_sets.then_some(self.vni);
        let sources = allowed_sources(host, family, remote).map(|element| element.of_network(vni));
        let sources = sources.chain(sources_in_peer_networks(host, family, remote));
        entries.extend(sources.map(|element| (Key::Element(element), Value::Element(None))));
        entries.push((Key::Fdb(device, mac), Value::Fdb(public_ip)));
        entries.push((Key::Neigh(device, gateway), Value::Neigh(mac)));
        entries.push((Key::Route(subnet), Value::Route(RouteTarget::Gateway(device, gateway))));
    }
}

/// The source addresses that a peer may use in the tunnel: its subnet, and without masquerade also its host address, for its
/// replies to containers.
fn allowed_sources(host: &HostSpec, family: Family, remote: &RemoteSubnet) -> impl Iterator<Item = Element> {
    let RemoteSubnet { subnet, public_ip, .. } = *remote;
    let has_pool_length = host.network.pools.get(family).is_some_and(|pool| pool.subnet_length == subnet.length());
    let pair = PeerPair::new(public_ip, subnet.base()).filter(|_| has_pool_length);
    let source = pair.map_or_else(|| Element::Range(Box::new((public_ip, subnet.base(), subnet.last()))), Element::Peer);
    [Some(source), (!host.masquerades()).then_some(Element::Host(public_ip))].into_iter().flatten()
}

/// The same subnet in the tunnels of the peer networks: a packet to a peer network travels with that network's VNI. Always as a
/// range, since that network's subnets may have another length.
fn sources_in_peer_networks(host: &HostSpec, family: Family, remote: &RemoteSubnet) -> impl Iterator<Item = Element> {
    let RemoteSubnet { subnet, public_ip, .. } = *remote;
    let peers = host.isolation.iter().flat_map(|isolation| &isolation.peers);
    let in_family = peers.filter(move |peer| peer.ranges.get(family).is_some());
    in_family.map(move |peer| Element::Range(Box::new((public_ip, subnet.base(), subnet.last()))).of_network(Some(peer.vni)))
}
