//! Captures the packets of a flow at all interfaces of a namespace, plain or inside VXLAN. An `AF_PACKET` socket filters in the
//! kernel, so a busy host only pays for matching packets (`packet(7)`).

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;
use serde::{Deserialize, Serialize};

use crate::kernel::packet::UDP;
use crate::kernel::socket_filter::attach_program;
use crate::model::Family;
use crate::plan::OpError;

/// Captured bytes per packet. An outer IPv6 header, UDP, VXLAN, Ethernet and an inner IPv6 header are 110.
const SNAPLEN: u32 = 128;
/// Offset from the UDP header to the inner IP header: UDP 8, VXLAN 8, Ethernet 14 (RFC 7348 section 5).
const INNER_IP_OFFSET: u32 = 30;

/// A packet of the flow at an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturedPacket {
    /// Interface index.
    pub interface: u32,
    /// The direction: outgoing or incoming.
    pub outgoing: bool,
    /// The outer addresses, if the packet is inside VXLAN.
    pub tunnel: Option<(IpAddr, IpAddr)>,
    /// The source address, without the tunnel.
    pub source: IpAddr,
    /// The destination address, without the tunnel.
    pub destination: IpAddr,
}

/// The packets to capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureFilter {
    /// Source and destination pairs, one for each translation of the flow.
    pub pairs: Vec<(IpAddr, IpAddr)>,
    /// The UDP port of the tunnel.
    pub port: u16,
}

/// A capture at all interfaces of the calling thread's namespace.
pub struct Capture {
    socket: OwnedFd,
    filter: CaptureFilter,
}

impl Capture {
    /// Starts capturing. One wait lasts at most `timeout`.
    ///
    /// # Errors
    /// No permission (`CAP_NET_RAW`), or the kernel refused the filter.
    pub fn open(filter: CaptureFilter, timeout: Duration) -> Result<Capture, OpError> {
        let open = || -> io::Result<OwnedFd> {
            let socket = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, Some(SockProtocol::EthAll))?;
            attach_program(socket.as_fd(), &mut bpf_program(&filter))?;
            let micros = i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX);
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(micros / 1_000_000, micros % 1_000_000))?;
            Ok(socket)
        };
        let failed = |error: io::Error| OpError {
            errno: error.raw_os_error().unwrap_or_default(),
            message: format!("cannot capture packets: {error}; this needs CAP_NET_RAW: run as root"),
        };
        Ok(Capture { socket: open().map_err(failed)?, filter })
    }

    /// Waits for the next packet; `None` after the timeout.
    ///
    /// # Errors
    /// The socket failed.
    pub fn wait(&mut self) -> Result<Option<CapturedPacket>, OpError> {
        let mut buffer = [0; SNAPLEN as usize];
        let (length, from) = match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
            Ok(received) => received,
            // The interface went down.
            Err(nix::Error::EAGAIN | nix::Error::EINTR | nix::Error::ENETDOWN) => return Ok(None),
            Err(errno) => {
                return Err(OpError { errno: errno as i32, message: format!("cannot read packets: {errno}") });
            }
        };
        let Some(from) = from else { return Ok(None) };
        let outgoing = from.pkttype() == libc::PACKET_OUTGOING;
        let read = self.filter.match_packet(buffer.get(..length).unwrap_or(&buffer));
        Ok(read.map(|(tunnel, (source, destination))| CapturedPacket {
            interface: u32::try_from(from.ifindex()).unwrap_or(0),
            outgoing,
            tunnel,
            source,
            destination,
        }))
    }
}

type AddressPair = (IpAddr, IpAddr);

impl CaptureFilter {
    /// Matches a packet that starts with its IP header. Returns the outer addresses, if any, and the flow's own.
    fn match_packet(&self, packet: &[u8]) -> Option<(Option<AddressPair>, AddressPair)> {
        let (outer, protocol, header_length) = parse_ip_header(packet)?;
        if self.pairs.contains(&outer) {
            return Some((None, outer));
        }
        let port = packet.get(header_length + 2..header_length + 4)?;
        let inner = packet.get(header_length + INNER_IP_OFFSET as usize..)?;
        if protocol != UDP || port != self.port.to_be_bytes() {
            return None;
        }
        let (inner, ..) = parse_ip_header(inner)?;
        self.pairs.contains(&inner).then_some((Some(outer), inner))
    }
}

/// Reads addresses, protocol and length of an IP header.
fn parse_ip_header(packet: &[u8]) -> Option<(AddressPair, u8, usize)> {
    let first = *packet.first()?;
    match first >> 4 {
        4 => {
            let part = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
            Some(((part(12)?, part(16)?), *packet.get(9)?, usize::from(first & 0xf) * 4))
        }
        6 => {
            let part = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
            Some(((part(8)?, part(24)?), *packet.get(6)?, 40))
        }
        _ => None,
    }
}

/// One comparison of the filter.
#[derive(Clone, Copy)]
enum BpfTest {
    /// Offset, mask and value of a byte.
    Byte(u32, u32, u32),
    /// Offset after the IPv4 header, and value, of two bytes.
    HalfIndirect(u32, u32),
    /// Offset and value of two bytes.
    Half(u32, u32),
    /// Offset and value of four bytes.
    Word(u32, u32),
    /// Offset after the IPv4 header, and value, of four bytes.
    WordIndirect(u32, u32),
}

/// Compiles a filter with the matches of [`CaptureFilter::match_packet`]: plain packets, and packets inside VXLAN over either
/// family.
fn bpf_program(filter: &CaptureFilter) -> Vec<libc::sock_filter> {
    let mut alternatives: Vec<Vec<BpfTest>> = Vec::new();
    let port = u32::from(filter.port);
    for pair in &filter.pairs {
        let mut plain = vec![ip_version(Family::of(pair.0))];
        plain.extend(address_words(*pair).into_iter().map(|(at, word)| BpfTest::Word(at, word)));
        alternatives.push(plain);
        let udp = u32::from(UDP);
        let mut over4 = vec![ip_version(Family::V4), BpfTest::Byte(9, 0xff, udp), BpfTest::HalfIndirect(2, port)];
        over4.extend(address_words(*pair).into_iter().map(|(at, word)| BpfTest::WordIndirect(INNER_IP_OFFSET + at, word)));
        alternatives.push(over4);
        let mut over6 = vec![ip_version(Family::V6), BpfTest::Byte(6, 0xff, udp), BpfTest::Half(42, port)];
        over6.extend(address_words(*pair).into_iter().map(|(at, word)| BpfTest::Word(40 + INNER_IP_OFFSET + at, word)));
        alternatives.push(over6);
    }
    // BPF_LD with BPF_ABS or BPF_IND and a size, BPF_LDX with BPF_MSH, BPF_ALU with BPF_AND, BPF_JMP with BPF_JEQ, BPF_RET
    // (`linux/bpf_common.h`).
    const BYTE: u16 = 0x30;
    const HALF: u16 = 0x28;
    const WORD: u16 = 0x20;
    const HALF_INDIRECT: u16 = 0x48;
    const WORD_INDIRECT: u16 = 0x40;
    const HEADER_LENGTH: u16 = 0xb1;
    const AND: u16 = 0x54;
    const EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = Vec::new();
    for alternative in alternatives {
        let mut block = Vec::new();
        for check in alternative {
            let value = match check {
                BpfTest::Byte(at, mask, value) => {
                    block.extend([step(BYTE, 0, 0, at), step(AND, 0, 0, mask)]);
                    value
                }
                BpfTest::Half(at, value) => {
                    block.push(step(HALF, 0, 0, at));
                    value
                }
                BpfTest::Word(at, value) => {
                    block.push(step(WORD, 0, 0, at));
                    value
                }
                BpfTest::HalfIndirect(at, value) => {
                    block.extend([step(HEADER_LENGTH, 0, 0, 0), step(HALF_INDIRECT, 0, 0, at)]);
                    value
                }
                BpfTest::WordIndirect(at, value) => {
                    block.push(step(WORD_INDIRECT, 0, 0, at));
                    value
                }
            };
            block.push(step(EQUAL, 0, 0, value));
        }
        block.push(step(RETURN, 0, 0, SNAPLEN));
        // A failed comparison jumps to the next alternative.
        let end = block.len();
        for (at, step) in block.iter_mut().enumerate() {
            if step.code == EQUAL {
                step.jf = u8::try_from(end - at - 1).unwrap_or(u8::MAX);
            }
        }
        program.extend(block);
    }
    program.push(step(RETURN, 0, 0, 0));
    program
}

fn ip_version(family: Family) -> BpfTest {
    BpfTest::Byte(0, 0xf0, if family == Family::V4 { 0x40 } else { 0x60 })
}

/// Source and destination as words, each with its offset in the IP header.
fn address_words((source, destination): AddressPair) -> Vec<(u32, u32)> {
    let mut bytes = Vec::new();
    for address in [source, destination] {
        match address {
            IpAddr::V4(address) => bytes.extend(address.octets()),
            IpAddr::V6(address) => bytes.extend(address.octets()),
        }
    }
    let first = if source.is_ipv4() { 12 } else { 8 };
    let words = bytes.chunks(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
    (first..).step_by(4).zip(words).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::packet::{Flow, Packet};

    #[test]
    fn plain_and_vxlan_packets_are_matched() {
        let ip = |text: &str| text.parse::<IpAddr>().expect(text);
        for (a, b) in [("10.244.1.2", "10.244.2.3"), ("fd00:1::2", "fd00:2::3")] {
            let filter = CaptureFilter { pairs: vec![(ip(a), ip(b))], port: 8472 };
            let inner = Packet::new(&Flow::echo_request(ip(a), ip(b)));
            let bytes = |packet: &Packet| [packet.network.clone(), packet.transport.clone()].concat();
            assert_eq!(filter.match_packet(&bytes(&inner)), Some((None, (ip(a), ip(b)))));
            assert_eq!(filter.match_packet(&bytes(&Packet::new(&Flow::echo_request(ip(b), ip(a))))), None);
            for (x, y) in [("192.0.2.1", "192.0.2.2"), ("fd99::1", "fd99::2")] {
                let outer = Flow { source: ip(x), destination: ip(y), protocol: UDP, port: 8472 };
                let tunnel = bytes(&Packet::vxlan_encapsulated(&inner, &outer, 1));
                assert_eq!(filter.match_packet(&tunnel), Some((Some((ip(x), ip(y))), (ip(a), ip(b)))));
                let other = bytes(&Packet::vxlan_encapsulated(&inner, &Flow { port: 4789, ..outer }, 1));
                assert_eq!(filter.match_packet(&other), None);
                for end in 0..tunnel.len() {
                    let _ = filter.match_packet(&tunnel[..end]);
                }
            }
        }
    }
}
