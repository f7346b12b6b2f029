//! Binding a socket in a container's namespace to an address that an earlier socket of the same test may have had.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use overlay_agent::kernel::netns::Netns;

use crate::ExpectContext;

/// How long an address may stay in use. A command that another thread starts shares a closed socket until it executes its
/// program, and a task that was aborted closes its socket a moment later.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// A non-blocking UDP socket.
#[track_caller]
pub fn udp(netns: &Netns, at: SocketAddr) -> UdpSocket {
    bind(netns, at, || {
        let socket = UdpSocket::bind(at)?;
        socket.set_nonblocking(true).map(|()| socket)
    })
}

/// A non-blocking TCP listener.
#[track_caller]
pub fn tcp(netns: &Netns, at: SocketAddr) -> TcpListener {
    bind(netns, at, || {
        let listener = TcpListener::bind(at)?;
        listener.set_nonblocking(true).map(|()| listener)
    })
}

#[track_caller]
fn bind<T: Send>(netns: &Netns, at: SocketAddr, open: impl Fn() -> io::Result<T> + Sync) -> T {
    let end = Instant::now() + RELEASE_TIMEOUT;
    loop {
        match netns.run(&open).expect_ok("enter the container") {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            bound => return bound.expect_ok(&format!("bind {at}")),
        }
    }
}
