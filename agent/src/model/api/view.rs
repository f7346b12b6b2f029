//! `GET /v1/network`: the overlay network on this host, with the kernel's state of it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::model::endpoint::EndpointName;
use crate::model::{Cidr, Endpoint, Mac, PerFamily, Vni};

/// The overlay network on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkView {
    /// Its name.
    pub name: String,
    /// The encapsulation between hosts: `vxlan`.
    pub driver: String,
    /// VXLAN network identifier; absent with other backends.
    pub vni: Option<Vni>,
    /// UDP port of the tunnel; absent without a tunnel.
    pub port: Option<u16>,
    /// The overlay's MTU in bytes; absent until the overlay is in place.
    pub mtu: Option<u32>,
    /// Whether traffic that leaves the overlay is masqueraded.
    pub masquerade: bool,
    /// Address allocation, by family.
    pub ipam: PerFamily<IpamView>,
    /// The tunnel's devices.
    pub devices: Vec<DeviceView>,
    /// The bridge; absent until it exists.
    pub bridge: Option<BridgeView>,
    /// This host's endpoints, by name.
    pub endpoints: Vec<EndpointView>,
}

/// Address allocation of one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpamView {
    /// The network's range.
    pub network: Cidr,
    /// This host's part of it.
    pub subnet: Cidr,
    /// The gateway's address, on the bridge.
    pub gateway: IpAddr,
    /// The value of Docker's `fixed-cidr`; absent if no part is left to Docker.
    pub docker: Option<Cidr>,
    /// The lowest address for containers.
    pub first: IpAddr,
    /// The highest address for containers.
    pub last: IpAddr,
    /// Number of addresses in use.
    pub in_use: usize,
    /// Number of free addresses. A string, because it can exceed the exact range of a JSON number.
    pub free: String,
}

/// A device of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceView {
    /// The interface.
    pub interface: String,
    /// Its MAC.
    pub mac: Option<Mac>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Its addresses with their prefix lengths.
    pub addresses: Vec<String>,
    /// Its traffic counters.
    pub counters: Counters,
}

/// The bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeView {
    /// The bridge as a device.
    #[serde(flatten)]
    pub device: DeviceView,
    /// All its ports, by number, including those that other programs added.
    pub ports: Vec<PortView>,
}

/// A port of the bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortView {
    /// The number of the port.
    pub number: u16,
    /// The host's interface.
    pub interface: String,
    /// The endpoint it belongs to, if any.
    pub endpoint: Option<EndpointName>,
    /// The port's STP state: `forwarding`, `disabled`, `blocking` and so on.
    pub state: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its traffic counters, seen from the host.
    pub counters: Counters,
}

/// Traffic of an interface since its creation.
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
    /// Packets dropped on transmit.
    pub tx_dropped: u64,
}

impl Counters {
    /// The counters seen from the other end of the veth pair.
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

/// An endpoint with the kernel's state of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointView {
    /// The endpoint.
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// `in place`, or the deviation.
    pub state: String,
    /// The number of its bridge port; absent without one.
    pub bridge_port: Option<u16>,
    /// The endpoints that share its namespace.
    pub shared_by: Vec<EndpointName>,
    /// The traffic counters of its interface, seen from the container; absent without an interface.
    pub counters: Option<Counters>,
}
