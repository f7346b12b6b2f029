//! Looks at the bridge, its ports and the tunnel's devices, with their counters, and at what the guards have dropped: for people, so on sockets of
//! its own and without waiting for what is being changed.

use std::collections::BTreeMap;

use netlink_packet_core::ParseableParametrized;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    BridgePortState, InfoBridgePort, InfoPortData, LinkAttribute, LinkInfo as Info, LinkMessage, Stats64,
};

use super::nft::Nft;
use super::objects::{self, LinkInfo, raw_attributes};
use super::socket::RouteSocket;
use crate::model::api::{BridgeView, Counters, DeviceView, PortView};
use crate::model::{Device, Role};
use crate::plan::OpError;
use crate::plan::ruleset::Counter;

/// Length of `struct ifinfomsg`.
const IFINFOMSG: usize = 16;

/// The devices of the overlay as the kernel has them. Ports are told by their interfaces; whose they are is for the caller to add.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OverlayView {
    /// The tunnel's devices.
    pub devices: Vec<DeviceView>,
    /// The bridge.
    pub bridge: Option<BridgeView>,
}

/// A link with what the agent itself does not need.
struct Seen {
    link: LinkInfo,
    counters: Counters,
    port: Option<(u16, String)>,
}

/// Looks. Blocks for as long as a dump of all links takes.
pub fn overlay(bridge: Device) -> Result<OverlayView, OpError> {
    let mut socket = RouteSocket::open()?;
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let all = socket
        .dump(&request, Vec::new, |all: &mut Vec<Seen>, header, body| {
            if header.message_type == libc::RTM_NEWLINK {
                all.extend(seen(body));
            }
        })
        .map_err(|e| e.during("cannot list the links"))?;
    let addresses = objects::addresses(&mut socket, 0)?;
    let device = |seen: &Seen| DeviceView {
        interface: seen.link.name.clone(),
        mac: seen.link.mac,
        mtu: seen.link.mtu,
        up: seen.link.up(),
        addresses: addresses.iter().filter(|a| a.index == seen.link.index).map(|a| a.address.to_string()).collect(),
        counters: seen.counters,
    };
    let mut view = OverlayView::default();
    for seen in &all {
        match Device::from_name(&seen.link.name) {
            Some(found) if found == bridge => {
                let ports = all.iter().filter(|other| other.link.master == Some(seen.link.index)).filter_map(port);
                let mut ports: Vec<PortView> = ports.collect();
                ports.sort_by_key(|port| port.number);
                view.bridge = Some(BridgeView { device: device(seen), ports });
            }
            Some(Device { role: Role::Vxlan(_), vni }) if vni == bridge.vni => view.devices.push(device(seen)),
            _ => {}
        }
    }
    Ok(view)
}

/// What the guards have dropped, in packets; nothing where our tables are not there.
pub fn dropped() -> Result<BTreeMap<Counter, u64>, OpError> {
    let counted = Nft::open()?.counters()?;
    Ok(counted.into_iter().map(|(counter, counted)| (counter, counted.packets)).collect())
}

fn port(seen: &Seen) -> Option<PortView> {
    let (number, state) = seen.port.clone()?;
    let link = &seen.link;
    Some(PortView { number, interface: link.name.clone(), endpoint: None, state, mtu: link.mtu, counters: seen.counters })
}

fn seen(body: &[u8]) -> Option<Seen> {
    let mut seen = Seen { link: LinkInfo::read(body)?, counters: Counters::default(), port: None };
    for attribute in raw_attributes(body, IFINFOMSG) {
        match LinkAttribute::parse_with_param(&attribute, netlink_packet_route::AddressFamily::Unspec) {
            Ok(LinkAttribute::Stats64(stats)) => seen.counters = counters(&stats),
            Ok(LinkAttribute::LinkInfo(infos)) => {
                for info in infos {
                    if let Info::PortData(InfoPortData::BridgePort(settings)) = info {
                        seen.port = Some(bridge_port(&settings));
                    }
                }
            }
            _ => {}
        }
    }
    Some(seen)
}

fn bridge_port(settings: &[InfoBridgePort]) -> (u16, String) {
    let mut port = (0, "unknown".to_owned());
    for setting in settings {
        match setting {
            InfoBridgePort::PortNumber(number) => port.0 = *number,
            InfoBridgePort::State(state) => {
                port.1 = match state {
                    BridgePortState::Disabled => "disabled",
                    BridgePortState::Listening => "listening",
                    BridgePortState::Learning => "learning",
                    BridgePortState::Forwarding => "forwarding",
                    BridgePortState::Blocking => "blocking",
                    _ => "unknown",
                }
                .to_owned();
            }
            _ => {}
        }
    }
    port
}

fn counters(stats: &Stats64) -> Counters {
    Counters {
        rx_bytes: stats.rx_bytes,
        rx_packets: stats.rx_packets,
        rx_dropped: stats.rx_dropped,
        tx_bytes: stats.tx_bytes,
        tx_packets: stats.tx_packets,
        tx_dropped: stats.tx_dropped,
    }
}
