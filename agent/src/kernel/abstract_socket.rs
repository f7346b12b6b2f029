//! Finds the owners of a name in the abstract socket address space (unix(7)).
//!
//! Any user may take any name there, so a taken name proves nothing by itself.
//!
//! The query uses sock_diag(7) (`linux/unix_diag.h`), which reports the owner's user since Linux 5.3.

use std::io;
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_DUMP, NLMSG_DONE, NLMSG_ERROR};
use netlink_sys::Socket;

use super::nlmsg::{Message, attributes, messages, u32_at};

/// `NETLINK_SOCK_DIAG` in `linux/netlink.h`, `SOCK_DIAG_BY_FAMILY` in `linux/sock_diag.h`.
const NETLINK_SOCK_DIAG: isize = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// `UDIAG_SHOW_NAME` and `UDIAG_SHOW_UID`, and the attributes that they request.
const UDIAG_SHOW: u32 = 0x1 | 0x40;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_UID: u16 = 7;
/// The length of `struct unix_diag_msg`.
const UNIX_DIAG_MSG_LEN: usize = 16;
/// Size of the receive buffer in bytes: the kernel's replies to a dump are at most 32 KiB.
const RECEIVE_SIZE: usize = 64 << 10;
/// Time limit for all replies together.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);

/// Lists the users that have sockets of that abstract name in the calling thread's network namespace. The numbers are those of
/// this user namespace. Empty if the kernel does not report users.
///
/// # Errors
/// The query failed.
pub fn owners(name: &str) -> io::Result<Vec<u32>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    let mut request = Vec::new();
    let family = u8::try_from(libc::AF_UNIX).unwrap_or_default();
    {
        let mut message = Message::begin(&mut request, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, 1);
        // struct unix_diag_req: family, protocol, padding; states, inode, what to show, cookie.
        message
            .body(&[family, 0, 0, 0])
            .body(&u32::MAX.to_ne_bytes())
            .body(&[0; 4])
            .body(&UDIAG_SHOW.to_ne_bytes())
            .body(&[0; 8]);
    }
    socket.send(&request, 0)?;
    let (mut users, mut input, deadline) = (Vec::new(), vec![0; RECEIVE_SIZE], Instant::now() + QUERY_TIMEOUT);
    while Instant::now() < deadline {
        // The kernel's replies are queued when `send` and each `recv` return.
        let received = match socket.recv(&mut input.as_mut_slice(), libc::MSG_DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        for (header, body) in messages(input.get(..received).unwrap_or_default()) {
            match header.message_type {
                NLMSG_DONE | NLMSG_ERROR => return Ok(users),
                SOCK_DIAG_BY_FAMILY => users.extend(owner(body, name)),
                _ => {}
            }
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// The owner of the socket, if it has this name.
fn owner(body: &[u8], name: &str) -> Option<u32> {
    let attribute = |wanted: u16| attributes(body, UNIX_DIAG_MSG_LEN).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    // A zero before the name makes it abstract.
    (attribute(UNIX_DIAG_NAME)?.strip_prefix(&[0])? == name.as_bytes()).then_some(())?;
    u32_at(attribute(UNIX_DIAG_UID)?, 0)
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener};

    use super::*;

    #[test]
    fn abstract_socket_owner_is_found() {
        let name = format!("overlayd-test-{}", std::process::id());
        assert!(owners(&name).unwrap().is_empty());
        let _held = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        assert_eq!(owners(&name).unwrap(), [nix::unistd::geteuid().as_raw()]);
        assert!(owners(&name[1..]).unwrap().is_empty(), "another name");
    }
}
