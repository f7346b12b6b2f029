//! A packet as the kernel's rules see it: its header bytes and metadata.

use std::net::IpAddr;
use std::ops::Range;

use crate::model::{Family, Mac};

/// ICMP for IPv4. IP protocol numbers (IANA).
pub const ICMP: u8 = 1;
/// UDP.
pub const UDP: u8 = 17;
/// TCP.
pub const TCP: u8 = 6;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;

/// A flow from one address to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the same family.
    pub destination: IpAddr,
    /// The protocol's number in the IP header.
    pub protocol: u8,
    /// Destination port; 0 if the protocol has no ports.
    pub port: u16,
}

/// Assumed source port: the first ephemeral port of Linux (`net.ipv4.ip_local_port_range`).
pub const SOURCE_PORT: u16 = 32768;

impl Flow {
    /// An echo request.
    pub fn echo_request(source: IpAddr, destination: IpAddr) -> Flow {
        let protocol = if source.is_ipv4() { ICMP } else { ICMPV6 };
        Flow { source, destination, protocol, port: 0 }
    }

    /// Its family.
    pub fn family(&self) -> Family {
        Family::of(self.destination)
    }

    /// The IP header (RFC 791 section 3.1, RFC 8200 section 3) of a packet with `length` bytes of payload.
    fn network_header(&self, length: u16) -> Vec<u8> {
        let mut header = match self.family() {
            Family::V4 => {
                let mut header = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, self.protocol, 0, 0];
                header[2..4].copy_from_slice(&(length + 20).to_be_bytes());
                header
            }
            Family::V6 => {
                let [high, low] = length.to_be_bytes();
                vec![0x60, 0, 0, 0, high, low, self.protocol, 64]
            }
        };
        for address in [self.source, self.destination] {
            match address {
                IpAddr::V4(address) => header.extend_from_slice(&address.octets()),
                IpAddr::V6(address) => header.extend_from_slice(&address.octets()),
            }
        }
        header
    }

    /// The transport header of an echo request, a TCP SYN, or UDP.
    fn transport_header(&self) -> Vec<u8> {
        let mut ports = SOURCE_PORT.to_be_bytes().to_vec();
        ports.extend_from_slice(&self.port.to_be_bytes());
        match self.protocol {
            ICMP => vec![8, 0, 0, 0, 0, 1, 0, 1],
            ICMPV6 => vec![128, 0, 0, 0, 0, 1, 0, 1],
            TCP => {
                // Header length five words, the SYN flag, a window (RFC 9293 section 3.1).
                ports.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xfa, 0xf0, 0, 0, 0, 0]);
                ports
            }
            _ => {
                ports.extend_from_slice(&[0, 8, 0, 0]);
                ports
            }
        }
    }
}

/// The input or output interface of a packet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
}

/// A packet at a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Its family.
    pub family: Family,
    /// The transport protocol's number.
    pub protocol: u8,
    /// The Ethernet header; empty if none.
    pub link: Vec<u8>,
    /// The IP header.
    pub network: Vec<u8>,
    /// The transport header and payload.
    pub transport: Vec<u8>,
    /// The input interface.
    pub input: Option<Interface>,
    /// The output interface.
    pub output: Option<Interface>,
    /// Whether the destination is an address of this host; `None` if unknown.
    pub destination_is_local: Option<bool>,
    /// Whether the destination was translated.
    pub destination_translated: bool,
    /// Whether conntrack ignores it.
    pub untracked: bool,
    /// The marks of the packet and its connection; `None` if unknown.
    pub mark: Option<u32>,
    /// It stands for all packets of its source: destination, protocol and ports are unknown.
    pub any_destination: bool,
}

impl Packet {
    /// The first packet of a flow.
    pub fn new(flow: &Flow) -> Packet {
        let transport = flow.transport_header();
        Packet {
            family: flow.family(),
            protocol: flow.protocol,
            link: Vec::new(),
            network: flow.network_header(u16::try_from(transport.len()).unwrap_or(u16::MAX)),
            transport,
            input: None,
            output: None,
            destination_is_local: None,
            destination_translated: false,
            untracked: false,
            mark: Some(0),
            any_destination: false,
        }
    }

    /// The fields of the IP header that a real packet has otherwise: DSCP, lengths, the fragment ID, TTL, checksum, flow label.
    pub fn assumed_network_bytes(&self) -> &'static [Range<usize>] {
        match (self.family, self.any_destination) {
            (Family::V4, false) => &[1..6, 8..9, 10..12],
            (Family::V6, false) => &[1..6, 7..8],
            (Family::V4, true) => &[1..12, 16..20],
            (Family::V6, true) => &[1..8, 24..40],
        }
    }

    /// The fields of the transport header that a real packet has otherwise: sequence numbers, lengths, checksums.
    pub fn assumed_transport_bytes(&self) -> &'static [Range<usize>] {
        if self.any_destination {
            // Ports, and all that follows.
            return &[0..4, 4..usize::MAX];
        }
        match self.protocol {
            TCP => &[4..12, 14..20],
            ICMP | ICMPV6 => &[2..4, 4..8],
            _ => &[4..6, 6..8],
        }
    }

    /// Adds an Ethernet header, as a bridge sees it.
    pub fn with_ethernet_header(mut self, source: Mac, destination: Mac) -> Packet {
        self.link = ethernet_header(self.family, source, destination);
        self
    }

    /// The VXLAN packet that carries `inner` (RFC 7348 section 5).
    pub fn vxlan_encapsulated(inner: &Packet, outer: &Flow, vni: u32) -> Packet {
        let mut packet = Packet::new(outer);
        let [_, vni @ ..] = vni.to_be_bytes();
        packet.transport.extend_from_slice(&[0x08, 0, 0, 0, vni[0], vni[1], vni[2], 0]);
        packet.transport.extend_from_slice(&ethernet_header(inner.family, Mac([0; 6]), Mac([0; 6])));
        packet.transport.extend_from_slice(&inner.network);
        packet.transport.extend_from_slice(&inner.transport);
        packet
    }
}

fn ethernet_header(family: Family, source: Mac, destination: Mac) -> Vec<u8> {
    let mut header = destination.0.to_vec();
    header.extend_from_slice(&source.0);
    header.extend_from_slice(&ethertype(family));
    header
}

/// The EtherType of a family (IEEE 802 numbers, IANA).
pub const fn ethertype(family: Family) -> [u8; 2] {
    match family {
        Family::V4 => [0x08, 0x00],
        Family::V6 => [0x86, 0xdd],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packet_headers_match_wire_layout() {
        for (source, destination, at, length) in [("10.1.0.2", "10.2.0.3", 12, 20), ("fd00::2", "fd01::3", 8, 40)] {
            let (source, destination): (IpAddr, IpAddr) = (source.parse().expect("ip"), destination.parse().expect("ip"));
            let packet = Packet::new(&Flow { source, destination, protocol: TCP, port: 80 });
            let bits = usize::from(packet.family.bits()) / 8;
            assert_eq!(packet.network.len(), length);
            let text = |at: usize| packet.network[at..at + bits].to_vec();
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            assert_eq!((text(at), text(at + bits)), (octets(source), octets(destination)));
            assert_eq!((&packet.transport[2..4], packet.transport[13], packet.transport.len()), (&[0, 80][..], 2, 20));
            let outer = Flow { source, destination, protocol: UDP, port: 8472 };
            let tunnel = Packet::vxlan_encapsulated(&packet, &outer, 0x01_02_03);
            // Offsets that the tunnel filter reads: the VNI, the inner EtherType, the inner source.
            assert_eq!(tunnel.transport[12..15], [1, 2, 3]);
            assert_eq!(tunnel.transport[28..30], ethertype(packet.family));
            assert_eq!(tunnel.transport[30 + at..30 + at + bits], octets(source));
        }
    }
}
