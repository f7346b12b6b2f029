//! ICMP echo: sends requests and receives replies, over one socket per family.
//!
//! The kernel's ping sockets (`IPPROTO_ICMP` datagrams, `icmp(7)`) need no capability if `net.ipv4.ping_group_range` contains the
//! group, as some distributions set it. Otherwise a raw socket is tried (`CAP_NET_RAW`).

use std::io;
use std::net::{IpAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, SockaddrStorage, recvfrom, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::model::Family;
use crate::plan::OpError;

/// Length of the header (RFC 792, RFC 4443 section 4.1).
const ICMP_HEADER_LEN: usize = 8;
/// Minimum length of the payload: the token and the sequence number.
const MIN_PAYLOAD_LEN: usize = 16;

/// Types of echo request and echo reply (RFC 792 and RFC 4443 section 4).
const fn echo_types(family: Family) -> (u8, u8) {
    match family {
        Family::V4 => (8, 0),
        Family::V6 => (128, 129),
    }
}

/// An echo reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EchoReply {
    /// Its source address.
    pub from: IpAddr,
    /// Sequence number of the request.
    pub sequence: u64,
}

/// A socket for echo requests of one family, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct PingSocket {
    socket: OwnedFd,
    family: Family,
    raw: bool,
    token: u64,
}

impl PingSocket {
    /// Opens a socket. [`PingSocket::receive`] waits at most `receive_timeout`; without one it does not wait. `token`
    /// distinguishes our replies from those to other sockets.
    ///
    /// # Errors
    /// Neither kind of socket can be opened.
    pub fn open(family: Family, token: u64, receive_timeout: Option<Duration>) -> Result<PingSocket, OpError> {
        let domain = if family == Family::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let protocol = if family == Family::V4 { SockProtocol::Icmp } else { SockProtocol::IcmpV6 };
        let flags = SockFlag::SOCK_CLOEXEC | if receive_timeout.is_none() { SockFlag::SOCK_NONBLOCK } else { SockFlag::empty() };
        let open_socket = |kind| socket(domain, kind, flags, Some(protocol));
        let opened = match open_socket(SockType::Datagram) {
            Ok(socket) => Ok((socket, false)),
            Err(_) => open_socket(SockType::Raw).map(|socket| (socket, true)),
        };
        let socket_error = |errno: nix::Error| OpError {
            errno: errno as i32,
            message: format!(
                "cannot open a socket for ICMP echo over {family}: {errno}; this needs CAP_NET_RAW, or a group within the sysctl \
                 net.ipv4.ping_group_range"
            ),
        };
        let (socket, raw) = opened.map_err(socket_error)?;
        if let Some(timeout) = receive_timeout {
            let micros = i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX);
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(micros / 1_000_000, micros % 1_000_000))
                .map_err(socket_error)?;
        }
        Ok(PingSocket { socket, family, raw, token })
    }

    /// Opens a socket whose requests may be as large as the interface can send, regardless of the known path MTU. It is not for
    /// receiving replies.
    ///
    /// # Errors
    /// As [`PingSocket::open`].
    pub fn open_pmtu_probe(family: Family) -> Result<PingSocket, OpError> {
        let ping = PingSocket::open(family, 0, None)?;
        let (level, option, probe) = match family {
            Family::V4 => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
            Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
        };
        let length = libc::socklen_t::try_from(size_of_val(&probe)).unwrap_or_default();
        // SAFETY: the kernel reads `length` bytes, the size of the integer that the pointer refers to.
        let set = unsafe { libc::setsockopt(ping.socket.as_raw_fd(), level, option, (&raw const probe).cast(), length) };
        nix::Error::result(set).map_err(|errno| OpError {
            errno: errno as i32,
            message: format!("cannot enable path MTU probing over {family}: {errno}"),
        })?;
        Ok(ping)
    }

    /// Sends a request in a packet of `size` bytes.
    ///
    /// # Errors
    /// As [`PingSocket::send`].
    pub fn send_sized(&self, to: IpAddr, size: u32) -> io::Result<()> {
        let header = if self.family == Family::V4 { 20 } else { 40 };
        let payload = usize::try_from(size).unwrap_or(0).saturating_sub(header + ICMP_HEADER_LEN);
        self.send_request(to, 0, payload)
    }

    /// Sends a request.
    ///
    /// # Errors
    /// There is no route, a rule drops the request (`EPERM`), or the address is of the other family.
    pub fn send(&self, to: IpAddr, sequence: u64) -> io::Result<()> {
        self.send_request(to, sequence, MIN_PAYLOAD_LEN)
    }

    /// Sends a request with `payload` bytes after the header, at least [`MIN_PAYLOAD_LEN`].
    fn send_request(&self, to: IpAddr, sequence: u64, payload: usize) -> io::Result<()> {
        let (request, _) = echo_types(self.family);
        let mut message = vec![0; ICMP_HEADER_LEN];
        message[0] = request;
        // A ping socket overwrites the identifier with its own.
        message[4..6].copy_from_slice(&self.token.to_be_bytes()[..2]);
        message[6..8].copy_from_slice(&sequence.to_be_bytes()[6..]);
        message.extend_from_slice(&self.token.to_be_bytes());
        message.extend_from_slice(&sequence.to_be_bytes());
        message.resize(ICMP_HEADER_LEN + payload.max(MIN_PAYLOAD_LEN), 0);
        if self.raw && self.family == Family::V4 {
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let fd = self.socket.as_raw_fd();
        match to {
            IpAddr::V4(ip) => sendto(fd, &message, &SockaddrIn::from(SocketAddrV4::new(ip, 0)), MsgFlags::empty()),
            IpAddr::V6(ip) => sendto(fd, &message, &SockaddrIn6::from(SocketAddrV6::new(ip, 0, 0, 0)), MsgFlags::empty()),
        }?;
        Ok(())
    }

    /// Reads the next reply to a request of this socket; `None` if there is none (yet).
    ///
    /// # Errors
    /// The socket failed.
    pub fn receive(&self) -> io::Result<Option<EchoReply>> {
        loop {
            let mut buffer = [0; 256];
            let (length, from) = match recvfrom::<SockaddrStorage>(self.socket.as_raw_fd(), &mut buffer) {
                Ok(received) => received,
                Err(nix::Error::EAGAIN) => return Ok(None),
                Err(nix::Error::EINTR) => continue,
                // An ICMP error about an earlier request.
                Err(nix::Error::EHOSTUNREACH | nix::Error::ENETUNREACH | nix::Error::ECONNREFUSED | nix::Error::EMSGSIZE) => {
                    continue;
                }
                Err(errno) => return Err(errno.into()),
            };
            let from = from.and_then(|from| {
                let v4 = from.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
                v4.or_else(|| from.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
            });
            let sequence = buffer.get(..length).and_then(|bytes| self.parse_reply(bytes));
            if let (Some(from), Some(sequence)) = (from, sequence) {
                return Ok(Some(EchoReply { from, sequence }));
            }
        }
    }

    /// The sequence number of the message, if it is a reply to this socket.
    fn parse_reply(&self, bytes: &[u8]) -> Option<u64> {
        // A raw IPv4 socket also delivers the IP header (raw(7)).
        let skip = if self.raw && self.family == Family::V4 { usize::from(bytes.first()? & 0xf) * 4 } else { 0 };
        let message = bytes.get(skip..)?;
        let word = |at: usize| Some(u64::from_be_bytes(message.get(at..at + 8)?.try_into().ok()?));
        let is_own = *message.first()? == echo_types(self.family).1
            && message.len() >= ICMP_HEADER_LEN + MIN_PAYLOAD_LEN
            && word(ICMP_HEADER_LEN)? == self.token;
        if is_own { word(ICMP_HEADER_LEN + 8) } else { None }
    }
}

impl AsFd for PingSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for PingSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|b| u32::from(u16::from_be_bytes([b[0], b.get(1).copied().unwrap_or(0)])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netns::Netns;

    #[test]
    fn loopback_replies_in_both_families() {
        let name = format!("echo-{}", std::process::id());
        let netns = Netns::create(&name).expect("a namespace");
        let result = netns.run(|| {
            for (family, address) in [(Family::V4, "127.0.0.1"), (Family::V6, "::1")] {
                let address: IpAddr = address.parse().expect("an address");
                let first = PingSocket::open(family, 7, Some(Duration::from_secs(5))).expect("a socket");
                let other = PingSocket::open(family, 8, Some(Duration::from_millis(20))).expect("a socket");
                first.send(address, 1 << 40).expect("sent");
                assert_eq!(first.receive().expect("received"), Some(EchoReply { from: address, sequence: 1 << 40 }), "{family}");
                assert_eq!(other.receive().expect("received"), None, "{family}: the reply belongs to the first socket");
                assert!(first.send("192.0.2.1".parse().expect("ip"), 2).is_err(), "there is no route");
            }
        });
        Netns::delete(&name).expect("deleted");
        result.expect("the namespace");
    }

    #[test]
    fn checksum_matches_rfc_1071_example() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
