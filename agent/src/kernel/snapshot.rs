//! Reads the bridge, its ports, the VXLAN devices, their counters and the filters' drop counters, for display.
//!
//! It uses sockets of its own, so that it does not wait for running changes.

use std::collections::BTreeMap;

use netlink_packet_core::ParseableParametrized;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoBridgePort, InfoPortData, LinkAttribute, LinkInfo as Info, LinkMessage, Stats64};

use super::netns::Netns;
use super::nft::Nft;
use super::objects::{self, LinkInfo, raw_attributes};
use crate::model::api::{BridgeView, Counters, DeviceView, PortView};
use crate::model::{Device, Role};
use crate::plan::OpError;
use crate::plan::ruleset::Counter;

/// Length of `struct ifinfomsg`.
const IFINFOMSG_LEN: usize = 16;

/// The overlay's devices as the kernel has them. Ports are named by interface; the caller adds their endpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OverlaySnapshot {
    /// The VXLAN devices.
    pub devices: Vec<DeviceView>,
    /// The bridge.
    pub bridge: Option<BridgeView>,
}

/// A link with its counters and bridge port state, which the agent itself does not need.
struct LinkStats {
    info: LinkInfo,
    counters: Counters,
    port: Option<(u16, String)>,
}

/// Reads the snapshot. Blocks for as long as a dump of all links takes.
pub fn read_overlay(netns: &Netns, bridge: Device) -> Result<OverlaySnapshot, OpError> {
    let mut socket = netns.route_socket()?;
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let all = socket
        .dump(&request, Vec::new, |all: &mut Vec<LinkStats>, header, body| {
            if header.message_type == libc::RTM_NEWLINK {
                all.extend(read_link_stats(body));
            }
        })
        .map_err(|e| e.context("cannot list the links"))?;
    let addresses = objects::addresses(&mut socket, 0)?;
    let device = |link: &LinkStats| DeviceView {
        interface: link.info.name.clone(),
        mac: link.info.mac,
        mtu: link.info.mtu,
        up: link.info.up(),
        addresses: addresses.iter().filter(|a| a.index == link.info.index).map(|a| a.address.to_string()).collect(),
        counters: link.counters,
    };
    let mut snapshot = OverlaySnapshot::default();
    for link in &all {
        match Device::from_name(&link.info.name) {
            Some(found) if found == bridge => {
                let ports = all.iter().filter(|other| other.info.master == Some(link.info.index)).filter_map(port_view);
                let mut ports: Vec<PortView> = ports.collect();
                ports.sort_by_key(|port| port.number);
                snapshot.bridge = Some(BridgeView { device: device(link), ports });
            }
            Some(Device { role: Role::Vxlan(_), vni }) if vni == bridge.vni => snapshot.devices.push(device(link)),
            _ => {}
        }
    }
    Ok(snapshot)
}

/// Reads how many packets our filters have dropped; empty if our tables do not exist.
pub fn dropped_packets(netns: &Netns) -> Result<BTreeMap<Counter, u64>, OpError> {
    let counted = netns.run_in_place(Nft::open).map_err(|e| OpError::from(&e))??.counters()?;
    Ok(counted.into_iter().map(|(counter, counted)| (counter, counted.packets)).collect())
}

fn port_view(stats: &LinkStats) -> Option<PortView> {
    let (number, state) = stats.port.clone()?;
    let link = &stats.info;
    Some(PortView { number, interface: link.name.clone(), endpoint: None, state, mtu: link.mtu, counters: stats.counters })
}

fn read_link_stats(body: &[u8]) -> Option<LinkStats> {
    let mut link = LinkStats { info: LinkInfo::read(body)?, counters: Counters::default(), port: None };
    for attribute in raw_attributes(body, IFINFOMSG_LEN) {
        match LinkAttribute::parse_with_param(&attribute, netlink_packet_route::AddressFamily::Unspec) {
            Ok(LinkAttribute::Stats64(stats)) => link.counters = counters(&stats),
            Ok(LinkAttribute::LinkInfo(infos)) => {
                for info in infos {
                    if let Info::PortData(InfoPortData::BridgePort(settings)) = info {
                        link.port = Some(bridge_port(&settings));
                    }
                }
            }
            _ => {}
        }
    }
    Some(link)
}

fn bridge_port(settings: &[InfoBridgePort]) -> (u16, String) {
    let mut port = (0, "unknown".to_owned());
    for setting in settings {
        match setting {
            InfoBridgePort::PortNumber(number) => port.0 = *number,
            InfoBridgePort::State(state) => port.1 = objects::port_state_name(*state).to_owned(),
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
