//! A blocking rtnetlink socket: one request and its answer, or one dump. It belongs to the network namespace of the thread that opened it,
//! whoever uses it later.

use std::io;
use std::time::Duration;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::message::{Header, Message, attributes, flag, messages, text, u32_at};
use super::uapi::{NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP_INTR, NLMSGERR_ATTR_MSG};
use crate::plan::OpError;

/// The kernel answers before `send` returns; this only bounds what a defect could cost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// A dump's datagrams are at most 32 KiB (`netlink_dump` in `net/netlink/af_netlink.c`).
const RECEIVE: usize = 64 * 1024;
/// How often a dump that was disturbed by a change is begun again.
const DUMP_TRIES: u32 = 5;

/// Why the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The error number, positive.
    pub errno: i32,
    /// What the kernel says beyond the number; often empty.
    pub detail: String,
}

impl Refusal {
    /// As the error of an op: what was tried, what the kernel said, and the remedy where the number has a general one.
    pub fn during(&self, what: impl std::fmt::Display) -> OpError {
        let detail = if self.detail.is_empty() { String::new() } else { format!(": {}", self.detail) };
        let reason = io::Error::from_raw_os_error(self.errno);
        let remedy = match self.errno {
            libc::EPERM => "; this needs CAP_NET_ADMIN in the network namespace: run as root or grant the capability",
            libc::ENOMEM | libc::ENOBUFS => "; the kernel is short of memory, it is tried again",
            _ => "",
        };
        OpError { errno: self.errno, message: format!("{what}: {reason}{detail}{remedy}") }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Refusal { errno, detail: String::new() },
            None => Refusal { errno: libc::EIO, detail: error.to_string() },
        }
    }
}

/// What a message of kind `NLMSG_ERROR` says: success or the refusal.
pub fn outcome(header: Header, body: &[u8]) -> Result<(), Refusal> {
    let code = u32_at(body, 0).map_or(-libc::EPROTO, u32::cast_signed);
    if code == 0 {
        return Ok(());
    }
    let mut detail = String::new();
    if header.flags & NLM_F_ACK_TLVS != 0 {
        // Behind the number stands the request's header, and unless capped its body.
        let request = u32_at(body, 4).and_then(|n| usize::try_from(n).ok()).unwrap_or_default();
        let skip = 4 + if header.flags & NLM_F_CAPPED != 0 { super::message::HEADER } else { request };
        if let Some((_, value)) = attributes(body, skip).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG) {
            detail = text(value);
        }
    }
    Err(Refusal { errno: code.saturating_neg(), detail })
}

/// The socket.
#[derive(Debug)]
pub struct RouteSocket {
    socket: Socket,
    port: u32,
    sequence: u32,
    output: Vec<u8>,
    input: Vec<u8>,
}

impl RouteSocket {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<RouteSocket, OpError> {
        RouteSocket::try_open().map_err(|e| Refusal::from(e).during("cannot open an rtnetlink socket"))
    }

    fn try_open() -> io::Result<RouteSocket> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let port = socket.bind_auto()?.port_number();
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        socket.set_netlink_get_strict_chk(true)?;
        let timeout = TimeVal::new(i64::try_from(ANSWER_TIMEOUT.as_secs()).unwrap_or(i64::MAX), 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
        Ok(RouteSocket { socket, port, sequence: 0, output: Vec::new(), input: vec![0; RECEIVE] })
    }

    /// The port id by which the kernel names this socket in events.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Sends one request and reads its acknowledgement.
    pub fn request(&mut self, kind: u16, flags: u16, build: impl FnOnce(&mut Message<'_>)) -> Result<(), Refusal> {
        self.exchange(kind, flags | flag(libc::NLM_F_ACK), build, |_, _| ())
    }

    /// Sends one request for one object and reads it.
    pub fn get<T>(
        &mut self,
        kind: u16,
        build: impl FnOnce(&mut Message<'_>),
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<T, Refusal> {
        let mut found = None;
        self.exchange(kind, flag(libc::NLM_F_ACK), build, |_, body| found = read(body))?;
        found.ok_or_else(|| Refusal { errno: libc::EPROTO, detail: "the answer holds no such object".to_owned() })
    }

    /// Asks for all objects of a kind. A dump that a change disturbed is begun again: `each` then gets what it had once more, after `restart`.
    pub fn dump<S>(
        &mut self,
        kind: u16,
        build: impl Fn(&mut Message<'_>),
        fresh: impl Fn() -> S,
        mut each: impl FnMut(&mut S, Header, &[u8]),
    ) -> Result<S, Refusal> {
        let mut tries = 0;
        loop {
            let mut state = fresh();
            let mut disturbed = false;
            self.exchange(kind, flag(libc::NLM_F_DUMP), &build, |header, body| {
                disturbed |= header.flags & NLM_F_DUMP_INTR != 0;
                each(&mut state, header, body);
            })?;
            tries += 1;
            if !disturbed || tries == DUMP_TRIES {
                if disturbed {
                    tracing::debug!(kind, "a dump was disturbed by changes again and again; taking the last one");
                }
                return Ok(state);
            }
        }
    }

    fn exchange(
        &mut self,
        kind: u16,
        flags: u16,
        build: impl FnOnce(&mut Message<'_>),
        mut each: impl FnMut(Header, &[u8]),
    ) -> Result<(), Refusal> {
        self.sequence = self.sequence.wrapping_add(1);
        self.output.clear();
        build(&mut Message::begin(&mut self.output, kind, flags, self.sequence));
        self.socket.send(&self.output, 0)?;
        loop {
            let received = self.socket.recv(&mut self.input.as_mut_slice(), libc::MSG_TRUNC)?;
            let Some(bytes) = self.input.get(..received) else {
                return Err(Refusal { errno: libc::EMSGSIZE, detail: format!("an answer of {received} bytes") });
            };
            for (header, body) in messages(bytes) {
                if header.sequence != self.sequence {
                    continue;
                }
                match libc::c_int::from(header.kind) {
                    libc::NLMSG_ERROR => return outcome(header, body),
                    libc::NLMSG_DONE => {
                        each(header, &[]);
                        // A dump that fails half way says so in its last message.
                        let code = u32_at(body, 0).map_or(0, u32::cast_signed);
                        return if code < 0 {
                            Err(Refusal { errno: code.saturating_neg(), detail: String::new() })
                        } else {
                            Ok(())
                        };
                    }
                    _ => each(header, body),
                }
            }
        }
    }
}
