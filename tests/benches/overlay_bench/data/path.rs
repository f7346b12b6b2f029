//! A path from one namespace to another, and sockets at both ends.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::Context;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;
use overlay_agent::kernel::netns::Netns;

/// Time limit of a receive, after which the measurement has failed.
pub const SOCKET_TIMEOUT: Duration = Duration::from_secs(5);
/// Receive buffer in bytes: more than a sender is ever ahead.
const SOCKET_BUFFER_SIZE: usize = 8 << 20;
/// UDP payload in bytes: 18, plus 8 of UDP, 20 of IPv4, 14 of Ethernet and 4 of its checksum, is the minimum frame of 64 (IEEE
/// 802.3).
pub const UDP_PAYLOAD_LEN: usize = 18;

/// From one namespace to an address in another one.
#[derive(Debug, Clone)]
pub struct TrafficPath {
    /// The sender's side.
    pub from: Netns,
    /// The receiver's side.
    pub to: Netns,
    /// The receiver's address.
    pub address: IpAddr,
}

impl TrafficPath {
    /// Opens a connection: the sender's and the receiver's end.
    pub fn connect(&self) -> anyhow::Result<(TcpStream, TcpStream)> {
        let at = SocketAddr::new(self.address, 0);
        let listener = self.to.run(|| TcpListener::bind(at))?.with_context(|| format!("cannot listen at {at}"))?;
        let at = listener.local_addr()?;
        let near = self
            .from
            .run(|| TcpStream::connect_timeout(&at, SOCKET_TIMEOUT))?
            .with_context(|| format!("cannot connect to {at}"))?;
        // The kernel completes the handshake before accept().
        let (far, _) = listener.accept()?;
        for end in [&near, &far] {
            end.set_nodelay(true)?;
            end.set_read_timeout(Some(SOCKET_TIMEOUT))?;
            end.set_write_timeout(Some(SOCKET_TIMEOUT))?;
        }
        Ok((near, far))
    }

    /// Opens a pair of UDP sockets: a connected sender, and a receiver.
    pub fn datagrams(&self) -> anyhow::Result<(UdpSocket, UdpSocket)> {
        let far = self.to.run(|| UdpSocket::bind(SocketAddr::new(self.address, 0)))?.context("cannot bind a UDP socket")?;
        let at = far.local_addr()?;
        let any: IpAddr = if at.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let near = || -> io::Result<UdpSocket> {
            let near = UdpSocket::bind(SocketAddr::new(any, 0))?;
            near.connect(at)?;
            Ok(near)
        };
        let near = self.from.run(near)?.with_context(|| format!("cannot send to {at}"))?;
        for end in [&near, &far] {
            setsockopt(end, sockopt::RcvBufForce, &SOCKET_BUFFER_SIZE)?;
            setsockopt(end, sockopt::SndBufForce, &SOCKET_BUFFER_SIZE)?;
            end.set_read_timeout(Some(SOCKET_TIMEOUT))?;
        }
        Ok((near, far))
    }
}

/// Pins the calling thread to one processor: the first, or the last.
pub fn pin_to_cpu(last: bool) -> anyhow::Result<()> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = CpuSet::new();
    set.set(if last { processors - 1 } else { 0 })?;
    sched_setaffinity(Pid::from_raw(0), &set).context("cannot choose a processor")
}
