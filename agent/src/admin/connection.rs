//! The connection by which a request came.

use std::os::fd::RawFd;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

/// A client's connection; valid while a handler of its requests runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Connection(pub(super) RawFd);

impl Connection {
    /// Whether the client has closed its end.
    pub(super) fn is_closed(self) -> bool {
        let received = recv(self.0, &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
        matches!(received, Ok(0) | Err(Errno::ECONNRESET))
    }
}
