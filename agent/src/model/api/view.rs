//! `GET /v1/network`: an overlay network as this host has it, with what the kernel holds of it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::model::endpoint::EndpointName;
use crate::model::{Cidr, Endpoint, Mac, PerFamily, Vni};

/// The network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkView {
    /// Its name.
    pub name: String,
    /// How hosts reach each other: `vxlan_chain`.
    pub driver: String,
    /// VXLAN network identifier.
    pub vni: Vni,
    /// UDP port of the tunnel.
    pub port: u16,
    /// The overlay's MTU in bytes; absent until the overlay is in place.
    pub mtu: Option<u32>,
    /// Whether what leaves the overlay gets the host's address.
    pub masquerade: bool,
    /// Addresses, by family.
    pub ipam: PerFamily<IpamView>,
    /// The tunnel's devices.
    pub devices: Vec<DeviceView>,
    /// The bridge; absent until it is there.
    pub bridge: Option<BridgeView>,
    /// This host's endpoints, by name.
    pub endpoints: Vec<EndpointView>,
}

/// The addresses of one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpamView {
    /// The network's range.
    pub network: Cidr,
    /// This host's part of it.
    pub subnet: Cidr,
    /// The gateway's address, on the bridge.
    pub gateway: IpAddr,
    /// The part that is left to Docker, as it is to be told; absent where none is.
    pub docker: Option<Cidr>,
    /// The lowest address that containers get.
    pub first: IpAddr,
    /// The highest one.
    pub last: IpAddr,
    /// Addresses in use.
    pub in_use: usize,
    /// Addresses that are free: as a text, for it can be more than a JSON number holds exactly.
    pub free: String,
}

/// A device of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceView {
    /// The interface.
    pub interface: String,
    /// Its MAC.
    pub mac: Option<Mac>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Its addresses with their prefix lengths.
    pub addresses: Vec<String>,
    /// What went through it.
    pub counters: Counters,
}

/// The bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeView {
    /// The bridge as a device.
    #[serde(flatten)]
    pub device: DeviceView,
    /// Its ports, by number; those that others made, too.
    pub ports: Vec<PortView>,
}

/// A port of the bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortView {
    /// The number of the port.
    pub number: u16,
    /// The host's interface.
    pub interface: String,
    /// Whose it is; absent where it is no endpoint's.
    pub endpoint: Option<EndpointName>,
    /// `check_forwarding`, `disabled`, `blocking` and so on.
    pub state: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// What went through it, as the host sees it.
    pub counters: Counters,
}

/// What went through an interface since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Packets received and dropped.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Packets that were to be sent and dropped.
    pub tx_dropped: u64,
}

impl Counters {
    /// The same seen from the other end of a veth pair.
    pub fn reversed(self) -> Counters {
        let Counters { rx_bytes, rx_packets, rx_dropped, tx_bytes, tx_packets, tx_dropped } = self;
        Counters {
            rx_bytes: tx_bytes,
            rx_packets: tx_packets,
            rx_dropped: tx_dropped,
            tx_bytes: rx_bytes,
            tx_packets: rx_packets,
            tx_dropped: rx_dropped,
        }
    }
}

/// An endpoint with what the kernel holds of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointView {
    /// The endpoint.
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// `in place`, or what is not as it should be.
    pub state: String,
    /// The number of its port on the bridge; absent without one.
    pub bridge_port: Option<u16>,
    /// Who shares its namespace.
    pub shared_by: Vec<EndpointName>,
    /// What went through its interface, as the container sees it; absent without one.
    pub counters: Option<Counters>,
}
