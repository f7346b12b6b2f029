//! Transmit checksum offload of an interface, through the ethtool ioctls (`linux/ethtool.h`, `ETHTOOL_GTXCSUM` and
//! `ETHTOOL_STXCSUM`).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::route_socket::KernelError;
use crate::plan::OpError;

const ETHTOOL_GTXCSUM: u32 = 0x16;
const ETHTOOL_STXCSUM: u32 = 0x17;
/// `SIOCETHTOOL` of `linux/sockios.h`.
const SIOCETHTOOL: u16 = 0x8946;

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// A socket for the ioctls. It belongs to the network namespace in which it was opened.
#[derive(Debug)]
pub struct Ethtool {
    socket: OwnedFd,
}

impl Ethtool {
    /// Opens the socket in the calling thread's network namespace.
    pub fn open() -> Result<Ethtool, OpError> {
        let opened = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
        let socket = opened.map_err(|e| KernelError::from(io::Error::from(e)).context("cannot open a socket for ethtool"))?;
        Ok(Ethtool { socket })
    }

    /// Whether transmit checksum offload is on: the interface, or a device below it, computes the checksums of sent packets. If
    /// the query fails, the kernel's default is assumed: on.
    pub fn tx_checksum(&self, interface: &str) -> bool {
        self.ioctl(interface, ETHTOOL_GTXCSUM, 0).map_or(true, |value| value != 0)
    }

    /// Switches transmit checksum offload on or off.
    pub fn set_tx_checksum(&self, interface: &str, on: bool) -> Result<(), OpError> {
        self.ioctl(interface, ETHTOOL_STXCSUM, u32::from(on)).map(|_| ()).map_err(|e| {
            let wanted = if on { "on" } else { "off" };
            KernelError::from(e)
                .context(format!("cannot switch transmit checksums of {interface} {wanted} (ethtool -K {interface} tx {wanted})"))
        })
    }

    fn ioctl(&self, interface: &str, command: u32, data: u32) -> io::Result<u32> {
        let mut value = EthtoolValue { command, data };
        // SAFETY: all-zero bytes are a valid ifreq: integers, arrays and pointers that the kernel does not read for this request.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays zero to terminate the name.
        let max_length = request.ifr_name.len() - 1;
        if interface.is_empty() || interface.len() > max_length {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // SAFETY: both structures live until the call returns and have the layout that SIOCETHTOOL expects. The kernel writes at
        // most an ethtool_value for these two commands (dev_ethtool in net/ethtool/ioctl.c).
        let result = unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL.into(), &raw mut request) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value.data) }
    }
}
