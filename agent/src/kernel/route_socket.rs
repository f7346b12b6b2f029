//! A blocking rtnetlink socket: one request, then its answer. [`super::rtnl`] has the requests.
//!
//! The socket belongs to the network namespace of the thread that opened it, whichever thread uses it later.
//!
//! `rtnetlink`'s own connection is not used, for three reasons. The kernel answers before `send` returns, so that a task between
//! a request and its answer only costs time. A dump interrupted by changes must restart, and `rtnetlink` does not pass on
//! `NLM_F_DUMP_INTR`. And a reply with one undecodable attribute still counts, while `netlink-proto` would drop it and wait on.

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    DoneBuffer, Emitable, ErrorBuffer, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NetlinkHeader,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::nlmsg::{attributes, messages, text};
use super::receive_buffer;
use super::uapi::NLMSGERR_ATTR_MSG;
use crate::plan::OpError;

/// Receive timeout. The kernel answers before `send` returns; this only limits the cost of a defect.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum attempts at a dump that changes interrupt.
const MAX_DUMP_ATTEMPTS: u32 = 5;

/// An error returned by the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelError {
    /// The error number, positive.
    pub errno: i32,
    /// The kernel's extended acknowledgement message; often empty.
    pub detail: String,
}

impl KernelError {
    /// Converts it to an op's error: the failed action, the kernel's reason, and a remedy if the number has a general one.
    pub fn context(&self, what: impl std::fmt::Display) -> OpError {
        let detail = if self.detail.is_empty() { String::new() } else { format!(": {}", self.detail) };
        let reason = io::Error::from_raw_os_error(self.errno);
        let remedy = match self.errno {
            libc::EPERM => "; this needs CAP_NET_ADMIN in the network namespace: run as root or grant the capability",
            libc::ENOMEM | libc::ENOBUFS => "; the kernel is short of memory; the agent will retry",
            _ => "",
        };
        OpError { errno: self.errno, message: format!("{what}: {reason}{detail}{remedy}") }
    }
}

impl KernelError {
    /// Whether the kernel has no IPv6, or the device disappeared while its entries were listed.
    pub fn is_unsupported_family(&self) -> bool {
        matches!(self.errno, libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::ENODEV)
    }
}

impl From<io::Error> for KernelError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => KernelError { errno, detail: String::new() },
            None => KernelError { errno: libc::EIO, detail: error.to_string() },
        }
    }
}

/// Parses the body of an `NLMSG_ERROR` message: success or the kernel's error.
pub fn parse_ack(body: &[u8]) -> Result<(), KernelError> {
    let Ok(error) = ErrorBuffer::new_checked(body) else {
        return Err(KernelError { errno: libc::EPROTO, detail: "truncated reply".to_owned() });
    };
    match error.code() {
        None => Ok(()),
        Some(code) => Err(KernelError { errno: code.get().saturating_neg(), detail: ext_ack_message(error.payload()) }),
    }
}

/// The extended acknowledgement's message, which follows the request's header. All our sockets have `NETLINK_CAP_ACK`, so the
/// kernel leaves out the request's body.
fn ext_ack_message(payload: &[u8]) -> String {
    let attribute = attributes(payload, NetlinkHeader::default().buffer_len()).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG);
    attribute.map(|(_, value)| text(value)).unwrap_or_default()
}

/// A netlink request in any representation.
pub trait Request {
    /// Appends the request with these flags (besides `NLM_F_REQUEST`) and this sequence number.
    fn write(&self, buffer: &mut Vec<u8>, flags: u16, sequence: u32);
}

impl Request for RouteNetlinkMessage {
    fn write(&self, buffer: &mut Vec<u8>, flags: u16, sequence: u32) {
        let mut header = NetlinkHeader::default();
        let (start, length) = (buffer.len(), header.buffer_len() + self.buffer_len());
        header.length = u32::try_from(length).unwrap_or(u32::MAX);
        header.message_type = self.message_type();
        header.flags = flags | NLM_F_REQUEST;
        header.sequence_number = sequence;
        buffer.resize(start + length, 0);
        header.emit(&mut buffer[start..]);
        self.emit(&mut buffer[start + header.buffer_len()..]);
    }
}

/// A blocking rtnetlink socket.
#[derive(Debug)]
pub struct RouteSocket {
    socket: Socket,
    sequence: u32,
    output: Vec<u8>,
}

impl RouteSocket {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<RouteSocket, OpError> {
        RouteSocket::try_open().map_err(|e| KernelError::from(e).context("cannot open an rtnetlink socket"))
    }

    fn try_open() -> io::Result<RouteSocket> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        socket.set_netlink_get_strict_chk(true)?;
        let timeout = TimeVal::new(i64::try_from(ANSWER_TIMEOUT.as_secs()).unwrap_or(i64::MAX), 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
        Ok(RouteSocket { socket, sequence: 0, output: Vec::new() })
    }

    /// Sends a request that changes an object, with these flags, and reads its acknowledgement.
    pub fn change(&mut self, request: &impl Request, flags: u16) -> Result<(), KernelError> {
        self.exchange(request, flags | NLM_F_ACK, |_, _| ())
    }

    /// Like [`RouteSocket::change`], for an object that must not exist yet.
    pub fn create(&mut self, request: &impl Request) -> Result<(), KernelError> {
        self.change(request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// The port id that identifies this socket in the kernel's events.
    pub fn port_id(&self) -> io::Result<u32> {
        let mut address = SocketAddr::new(0, 0);
        self.socket.get_address(&mut address)?;
        Ok(address.port_number())
    }

    /// Requests one object and reads it.
    pub fn get<T>(&mut self, request: &impl Request, read: impl Fn(&[u8]) -> Option<T>) -> Result<T, KernelError> {
        let mut found = None;
        self.exchange(request, NLM_F_ACK, |_, body| found = read(body))?;
        found.ok_or_else(|| KernelError { errno: libc::EPROTO, detail: "the reply contains no such object".to_owned() })
    }

    /// Requests all objects of a kind. A dump interrupted by a change restarts with a new state from `init`.
    pub fn dump<S>(
        &mut self,
        request: &impl Request,
        init: impl Fn() -> S,
        mut each: impl FnMut(&mut S, NetlinkHeader, &[u8]),
    ) -> Result<S, KernelError> {
        let mut attempts = 0;
        loop {
            let mut state = init();
            let mut interrupted = false;
            self.exchange(request, NLM_F_DUMP, |header, body| {
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                each(&mut state, header, body);
            })?;
            attempts += 1;
            if !interrupted || attempts == MAX_DUMP_ATTEMPTS {
                if interrupted {
                    tracing::debug!("dump interrupted by changes on every attempt; using the last one");
                }
                return Ok(state);
            }
        }
    }

    fn exchange(
        &mut self,
        request: &impl Request,
        flags: u16,
        mut each: impl FnMut(NetlinkHeader, &[u8]),
    ) -> Result<(), KernelError> {
        self.sequence = self.sequence.wrapping_add(1);
        self.output.clear();
        request.write(&mut self.output, flags, self.sequence);
        self.socket.send(&self.output, 0)?;
        receive_buffer::with(|input| {
            loop {
                input.clear();
                let received = self.socket.recv(input, libc::MSG_TRUNC)?;
                if received > input.len() {
                    return Err(KernelError {
                        errno: libc::EMSGSIZE,
                        detail: format!("a reply of {received} bytes exceeds the receive buffer"),
                    });
                }
                for (header, body) in messages(input) {
                    if header.sequence_number != self.sequence {
                        continue;
                    }
                    match header.message_type {
                        NLMSG_ERROR => return parse_ack(body),
                        NLMSG_DONE => {
                            each(header, &[]);
                            // A dump that fails midway reports the error in its last message.
                            let code = DoneBuffer::new_checked(body).map_or(0, |done| done.code());
                            return if code < 0 {
                                Err(KernelError { errno: code.saturating_neg(), detail: String::new() })
                            } else {
                                Ok(())
                            };
                        }
                        _ => each(header, body),
                    }
                }
            }
        })
    }
}
