//! A minimal rtnetlink for baselines: one blocking socket, handmade requests, counted dumps.
//!
//! It shares no code with the agent, and so none of its errors. Layout: `linux/netlink.h`, `linux/rtnetlink.h`,
//! `linux/neighbour.h`, `linux/nexthop.h`.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// Socket buffers in bytes, the same as in the C program.
const SOCKET_BUFFER_SIZE: usize = 8 << 20;
/// Bytes of a receive: the kernel fills dumps up to 32 KiB.
const RECEIVE_SIZE: usize = 64 * 1024;
const NLMSG_HDRLEN: usize = 16;

/// `linux/rtnetlink.h`.
pub const RTM_NEWNEXTHOP: u16 = 104;
/// `linux/rtnetlink.h`.
pub const RTM_DELNEXTHOP: u16 = 105;
/// `linux/rtnetlink.h`.
pub const RTM_GETNEXTHOP: u16 = 106;

/// A socket of one network namespace.
#[derive(Debug)]
pub struct Rtnl {
    fd: OwnedFd,
    sequence: u32,
    receive_buffer: Vec<u8>,
}

impl Rtnl {
    /// Opens a socket in the calling thread's namespace.
    pub fn open() -> io::Result<Rtnl> {
        Rtnl::with_groups(0)
    }

    /// Opens a socket that receives the events of a mask of groups (`RTMGRP_...` in `linux/rtnetlink.h`).
    pub fn with_groups(groups: u32) -> io::Result<Rtnl> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, Some(SockProtocol::NetlinkRoute))?;
        setsockopt(&fd, sockopt::SndBufForce, &SOCKET_BUFFER_SIZE)?;
        setsockopt(&fd, sockopt::RcvBufForce, &SOCKET_BUFFER_SIZE)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Rtnl { fd, sequence: 0, receive_buffer: vec![0; RECEIVE_SIZE] })
    }

    /// Sets the time limit of [`Rtnl::next_events`].
    pub fn set_timeout(&self, limit: Duration) -> io::Result<()> {
        let limit = TimeVal::milliseconds(i64::try_from(limit.as_millis()).unwrap_or(i64::MAX));
        Ok(setsockopt(&self.fd, sockopt::ReceiveTimeout, &limit)?)
    }

    /// Sends requests, which the kernel processes before this returns; returns the number of rejected ones.
    pub fn request(&mut self, messages: &[u8]) -> io::Result<usize> {
        send(self.fd.as_raw_fd(), messages, MsgFlags::empty())?;
        let mut errors = 0;
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.receive_buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(received) => {
                    errors += parse_messages(&self.receive_buffer[..received]).filter(|m| error_code(m).is_some()).count()
                }
                Err(Errno::EAGAIN) => return Ok(errors),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Dumps all objects of a kind; `body` is the request's fixed part.
    pub fn dump(&mut self, kind: u16, body: &[u8], mut on_message: impl FnMut(&[u8])) -> io::Result<()> {
        self.sequence += 1;
        let mut request = Vec::new();
        write(&mut request, kind, flag(libc::NLM_F_DUMP), self.sequence, body, &[]);
        send(self.fd.as_raw_fd(), &request, MsgFlags::empty())?;
        loop {
            let received = recv(self.fd.as_raw_fd(), &mut self.receive_buffer, MsgFlags::empty())?;
            for message in parse_messages(&self.receive_buffer[..received]) {
                if let Some(errno) = error_code(&message) {
                    return Err(io::Error::from_raw_os_error(errno));
                }
                match libc::c_int::from(message.kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    _ => on_message(message.body),
                }
            }
        }
    }

    /// Waits for events and passes each to `each`; returns false at the time limit.
    pub fn next_events(&mut self, mut on_message: impl FnMut(u16, &[u8])) -> io::Result<bool> {
        match recv(self.fd.as_raw_fd(), &mut self.receive_buffer, MsgFlags::empty()) {
            Ok(received) => {
                for message in parse_messages(&self.receive_buffer[..received]) {
                    on_message(message.kind, message.body);
                }
                Ok(true)
            }
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// A received message.
struct Message<'a> {
    kind: u16,
    body: &'a [u8],
}

/// The error number of an error message.
fn error_code(message: &Message<'_>) -> Option<i32> {
    let is_error = libc::c_int::from(message.kind) == libc::NLMSG_ERROR;
    let code = u32_at(message.body, 0).filter(|_| is_error)?.cast_signed();
    (code != 0).then_some(code.saturating_neg())
}

fn parse_messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let body = bytes.get(NLMSG_HDRLEN..length)?;
        let message = Message { kind: u16::from_ne_bytes([bytes[4], bytes[5]]), body };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes after a fixed part, as kind and value.
pub fn attributes(body: &[u8], fixed: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut bytes = body.get(fixed..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A 32-bit number at an offset.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}

/// An address attribute's value.
pub fn address(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
        _ => None,
    }
}

/// An address as the value of an attribute.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// Appends a request; `NLM_F_REQUEST` is added to the flags.
pub fn write(buffer: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, body: &[u8], attributes: &[(u16, &[u8])]) {
    let padded = |length: usize| length.next_multiple_of(4);
    let start = buffer.len();
    let total = NLMSG_HDRLEN + padded(body.len()) + attributes.iter().map(|(_, v)| padded(4 + v.len())).sum::<usize>();
    buffer.extend_from_slice(&u32::try_from(total).unwrap_or(u32::MAX).to_ne_bytes());
    buffer.extend_from_slice(&kind.to_ne_bytes());
    buffer.extend_from_slice(&(flags | flag(libc::NLM_F_REQUEST)).to_ne_bytes());
    buffer.extend_from_slice(&sequence.to_ne_bytes());
    buffer.extend_from_slice(&[0; 4]);
    buffer.extend_from_slice(body);
    for (kind, value) in attributes {
        buffer.resize(start + padded(buffer.len() - start), 0);
        buffer.extend_from_slice(&u16::try_from(4 + value.len()).unwrap_or(u16::MAX).to_ne_bytes());
        buffer.extend_from_slice(&kind.to_ne_bytes());
        buffer.extend_from_slice(value);
    }
    buffer.resize(start + padded(buffer.len() - start), 0);
}

/// Header flags, which are 16 bits wide.
pub fn flag(flags: libc::c_int) -> u16 {
    u16::try_from(flags).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_message_is_parsed() {
        let mut buffer = Vec::new();
        write(&mut buffer, RTM_NEWNEXTHOP, 0, 7, &[1; 8], &[(1, &[9, 9, 9, 9]), (2, &[8, 8])]);
        write(&mut buffer, RTM_DELNEXTHOP, 0, 8, &[0; 8], &[]);
        let all: Vec<Message<'_>> = parse_messages(&buffer).collect();
        assert_eq!(all.iter().map(|m| m.kind).collect::<Vec<_>>(), [RTM_NEWNEXTHOP, RTM_DELNEXTHOP]);
        let read: Vec<_> = attributes(all[0].body, 8).collect();
        assert_eq!(read, [(1, &[9u8, 9, 9, 9][..]), (2, &[8, 8][..])]);
    }
}
