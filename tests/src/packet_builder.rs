//! Builds arbitrary frames, and sends and receives them: for containers and hosts that break the rules.
//!
//! A [`PacketSocket`] is a packet socket (`packet(7)`) at one interface of a namespace: it sends frames unchanged, and receives
//! every frame. The other functions build parts of a frame, from the inside out. Checksums are correct, so that a packet is
//! dropped only for the tested reason.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use overlay_agent::kernel::netns::Netns;

use crate::ExpectContext;
use crate::rules::link_local;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The broadcast address.
pub const BROADCAST: Mac = [0xff; 6];
/// The multicast address of all IPv6 nodes (RFC 2464 section 7).
pub const ALL_NODES: Mac = [0x33, 0x33, 0, 0, 0, 1];
/// IP protocol numbers (IANA).
pub const UDP: u8 = 17;
/// ICMPv6.
pub const ICMPV6: u8 = 58;
/// EtherTypes (IEEE 802 numbers).
pub const ARP: u16 = 0x0806;
/// The ICMPv6 type of a router's advertisement (RFC 4861 section 4.2).
pub const ROUTER_ADVERTISEMENT: u8 = 134;
/// VXLAN header (RFC 7348 section 5): the flag of a valid VNI.
const VNI_VALID: u8 = 0x08;
/// Receive buffer in bytes: a test reads the frames only now and then.
const RECEIVE_BUFFER_SIZE: usize = 4 << 20;
/// Longer than any frame of the overlay.
const MAX_FRAME_SIZE: usize = 9000;

/// A packet socket at an interface.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
}

impl PacketSocket {
    /// Opens a packet socket at an interface of a namespace.
    #[track_caller]
    pub fn open(netns: &Netns, interface: &str) -> PacketSocket {
        netns
            .run(|| PacketSocket::open_in_current_netns(interface))
            .expect_ok("enter the namespace")
            .expect_ok(&format!("a packet socket at {interface}"))
    }

    /// Opens a packet socket at all interfaces of a namespace, those of the future too. It sends with
    /// [`PacketSocket::try_send_at`].
    #[track_caller]
    pub fn open_all(netns: &Netns) -> PacketSocket {
        netns.run(PacketSocket::new).expect_ok("enter the namespace").expect_ok("a packet socket")
    }

    fn new() -> io::Result<PacketSocket> {
        let protocol = u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?.to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers; the result is checked.
        let fd = Errno::result(unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(protocol)) })?;
        // SAFETY: just opened, and without another owner.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &RECEIVE_BUFFER_SIZE)?;
        Ok(PacketSocket { socket })
    }

    fn open_in_current_netns(interface: &str) -> io::Result<PacketSocket> {
        let opened = PacketSocket::new()?;
        let (address, length) = link_address(nix::net::if_::if_nametoindex(interface)?)?;
        // SAFETY: the address outlives the call and has that length.
        Errno::result(unsafe { libc::bind(opened.socket.as_raw_fd(), (&raw const address).cast(), length) })?;
        Ok(opened)
    }

    /// Sends a frame at the interface with this index. Returns whether the kernel accepted it.
    pub fn try_send_at(&self, interface: u32, frame: &[u8]) -> bool {
        let Ok((address, length)) = link_address(interface) else { return false };
        // SAFETY: frame and address outlive the call and have these lengths.
        let sent = unsafe {
            libc::sendto(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, (&raw const address).cast(), length)
        };
        usize::try_from(sent) == Ok(frame.len())
    }

    /// Sends a frame.
    #[track_caller]
    pub fn send(&self, frame: &[u8]) {
        let sent = nix::sys::socket::send(self.socket.as_raw_fd(), frame, nix::sys::socket::MsgFlags::empty());
        assert_eq!(sent.expect_ok("send a frame"), frame.len());
    }

    /// The frames received or sent since the last call.
    #[track_caller]
    pub fn frames(&self) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        let mut buffer = vec![0; MAX_FRAME_SIZE];
        loop {
            match nix::sys::socket::recv(self.socket.as_raw_fd(), &mut buffer, nix::sys::socket::MsgFlags::MSG_DONTWAIT) {
                Ok(length) => all.push(buffer[..length].to_vec()),
                Err(Errno::EAGAIN) => return all,
                Err(Errno::EINTR | Errno::ENETDOWN) => {}
                Err(error) => panic!("receive a frame: {error}"),
            }
        }
    }
}

/// The address of an interface for packet sockets, and its length.
fn link_address(interface: u32) -> io::Result<(libc::sockaddr_ll, libc::socklen_t)> {
    // SAFETY: a plain structure of integers, for which all zeros is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?.to_be();
    address.sll_ifindex = i32::try_from(interface).map_err(io::Error::other)?;
    let length = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    Ok((address, length))
}

/// Builds a frame.
pub fn frame(to: Mac, from: Mac, ether_type: u16, payload: &[u8]) -> Vec<u8> {
    [to.as_slice(), &from, &ether_type.to_be_bytes(), payload].concat()
}

/// Builds a frame with an IP packet.
pub fn ip_frame(to: Mac, from: Mac, packet: &[u8]) -> Vec<u8> {
    let v4 = packet.first().is_some_and(|first| first >> 4 == 4);
    frame(to, from, if v4 { 0x0800 } else { 0x86dd }, packet)
}

/// Builds an IP packet, in the family of the addresses. The hop limit is 255, as neighbour discovery requires (RFC 4861 section
/// 6.1).
pub fn ip(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let length = length(20 + payload.len());
            let mut header = vec![0x45, 0, length[0], length[1], 0, 0, 0, 0, 255, protocol, 0, 0];
            header.extend(source.octets());
            header.extend(destination.octets());
            let sum = checksum(&[&header]);
            header[10..12].copy_from_slice(&sum);
            [header.as_slice(), payload].concat()
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let length = length(payload.len());
            let header = [0x60, 0, 0, 0, length[0], length[1], protocol, 255];
            [header.as_slice(), &source.octets(), &destination.octets(), payload].concat()
        }
        _ => panic!("{source} and {destination} have different families"),
    }
}

/// Builds an IP packet with a UDP datagram.
pub fn udp(source: SocketAddr, destination: SocketAddr, data: &[u8]) -> Vec<u8> {
    let length = length(8 + data.len());
    let mut datagram = [source.port().to_be_bytes(), destination.port().to_be_bytes(), length, [0, 0]].concat();
    datagram.extend(data);
    let sum = transport_checksum(source.ip(), destination.ip(), UDP, &datagram);
    // Zero would mean "no checksum" (RFC 768).
    datagram[6..8].copy_from_slice(if sum == [0, 0] { &[0xff, 0xff] } else { &sum });
    ip(source.ip(), destination.ip(), UDP, &datagram)
}

/// Builds an IPv6 packet with an ICMPv6 message; `body` follows the checksum.
pub fn icmpv6(source: IpAddr, destination: IpAddr, kind: u8, body: &[u8]) -> Vec<u8> {
    ip(source, destination, ICMPV6, &icmpv6_message(source, destination, kind, body))
}

/// Builds a router advertisement with a /64 prefix for address autoconfiguration, valid for an hour.
pub fn router_advertisement(mac: Mac, prefix: IpAddr) -> Vec<u8> {
    let all_nodes = IpAddr::from([0xff02, 0, 0, 0, 0, 0, 0, 1]);
    let (lifetime, source) = (3600_u32.to_be_bytes(), link_local(mac));
    let head = [64, 0, 0x0e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0];
    let body = [head.as_slice(), &[3, 4, 64, 0xc0], &lifetime, &lifetime, &[0; 4], &octets(prefix)].concat();
    ip_frame(ALL_NODES, mac, &icmpv6(source, all_nodes, ROUTER_ADVERTISEMENT, &body))
}

/// Builds an ICMPv6 message without an IP header.
pub fn icmpv6_message(source: IpAddr, destination: IpAddr, kind: u8, body: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, 0, 0, 0], body].concat();
    let sum = transport_checksum(source, destination, ICMPV6, &message);
    message[2..4].copy_from_slice(&sum);
    message
}

/// Builds an ARP packet (RFC 826): `operation` 1 is a request, 2 a reply.
pub fn arp(operation: u8, sender: (Mac, IpAddr), target: (Mac, IpAddr)) -> Vec<u8> {
    let head = [0, 1, 0x08, 0, 6, 4, 0, operation];
    [head.as_slice(), &sender.0, &octets(sender.1), &target.0, &octets(target.1)].concat()
}

/// Builds a VXLAN header with an inner frame.
pub fn vxlan(vni: u32, inner: &[u8]) -> Vec<u8> {
    [&[VNI_VALID, 0, 0, 0], (vni << 8).to_be_bytes().as_slice(), inner].concat()
}

/// The bytes of an address.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).expect_ok("a packet that fits its header").to_be_bytes()
}

/// A checksum with the pseudo header of either family (RFC 768, RFC 8200 section 8.1). The order of the words does not matter.
fn transport_checksum(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> [u8; 2] {
    checksum(&[&octets(source), &octets(destination), &length(payload.len()), &[0, protocol], payload])
}

/// The Internet checksum (RFC 1071) of parts; all but the last have an even length.
pub fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
    let mut sum: u32 = parts.iter().flat_map(|part| part.chunks(2).map(word)).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [.., high, low] = (!sum).to_be_bytes();
    [high, low]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071 section 3 gives these bytes and their sum.
    #[test]
    fn checksums_match_rfc_examples() {
        assert_eq!(checksum(&[&[0x00, 0x01, 0xf2, 0x03], &[0xf4, 0xf5, 0xf6, 0xf7]]), [0x22, 0x0d]);
        let address = "192.0.2.1:9".parse().expect("an address");
        let packet = udp(address, address, b"odd");
        assert_eq!(checksum(&[&packet[..20]]), [0, 0], "a header with its checksum has the sum zero");
    }
}
