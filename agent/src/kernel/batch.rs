//! The batch writer: many entries to one `send`, without an acknowledgement each.
//!
//! The kernel works through all messages of a `send` before it returns and goes on behind one that fails (`netlink_rcv_skb` in
//! `net/netlink/af_netlink.c`). Each failure is answered with the message's sequence number; the last message asks for an acknowledgement, which
//! shows that the whole `send` was worked through. Where answers were lost for want of buffer, the messages are sent again one by one: all of them
//! can be repeated.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_ACK, NLMSG_ERROR};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sys::socket::{setsockopt, sockopt};

use super::cache::KernelCache;
use super::nlmsg::messages;
use super::peer_messages;
use super::route_socket::{KernelError, parse_ack};
use crate::plan::state::RouteTarget;
use crate::plan::{ApplyReport, Key, Op, OpError, Value};

/// Ops to one `send`: with more, the gain is below a percent, and the table locks are held longer.
const OPS_PER_SEND: usize = 200;
/// Socket buffers in bytes: room for an error of some hundred bytes to each message of a chunk, many times over.
const SOCKET_BUFFER_SIZE: usize = 8 << 20;
/// Answers are datagrams of some hundred bytes each.
const RECEIVE_SIZE: usize = 16 * 1024;

/// The socket of the batches.
#[derive(Debug)]
pub struct BatchSocket {
    socket: Socket,
    port_id: u32,
    sequence: u32,
    output: Vec<u8>,
    input: Vec<u8>,
    /// The messages of the chunk, in order.
    sent: Vec<SentMessage>,
}

/// A message of a chunk.
#[derive(Debug, Clone, Copy)]
struct SentMessage {
    /// The op it belongs to, within the chunk.
    op_index: usize,
    /// It removes something: that there is nothing to remove is success.
    is_delete: bool,
    /// Where its header begins in the output.
    start: usize,
}

impl BatchSocket {
    /// Opens the socket in the calling thread's network namespace.
    pub fn open() -> Result<BatchSocket, OpError> {
        BatchSocket::try_open().map_err(|e| KernelError::from(e).context("cannot open an rtnetlink socket for batches"))
    }

    fn try_open() -> io::Result<BatchSocket> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let port_id = socket.bind_auto()?.port_number();
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        // Without CAP_NET_ADMIN in the initial user namespace the size is cut to net.core.{r,w}mem_max: then losses are more likely, no more.
        if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_SIZE).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER_SIZE)?;
        }
        if setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER_SIZE).is_err() {
            setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER_SIZE)?;
        }
        Ok(BatchSocket { socket, port_id, sequence: 0, output: Vec::new(), input: vec![0; RECEIVE_SIZE], sent: Vec::new() })
    }

    /// The port id by which the kernel names this socket in events.
    pub fn port_id(&self) -> u32 {
        self.port_id
    }

    /// A receive buffer of that many bytes, so small that answers get lost.
    #[cfg(test)]
    pub fn set_receive_buffer(&self, bytes: usize) {
        setsockopt(&self.socket, sockopt::RcvBuf, &bytes).expect("a small buffer");
    }

    /// Applies ops that are all of the kinds of [`wire::is_peer_entry`]; `first` is the index of the first one in the report.
    pub fn apply(&mut self, ops: &[Op], first: usize, cache: &mut KernelCache, report: &mut ApplyReport) {
        cache.reserve(ops);
        for (n, chunk) in ops.chunks(OPS_PER_SEND).enumerate() {
            let first = first + n * OPS_PER_SEND;
            let mut failed = Vec::new();
            if !self.send_chunk(chunk, cache, &mut failed) {
                failed.clear();
                tracing::debug!(ops = chunk.len(), "answers to a batch were lost; sending its messages one by one");
                for (i, op) in chunk.iter().enumerate() {
                    let mut failure = Vec::new();
                    if !self.send_chunk(std::slice::from_ref(op), cache, &mut failure) {
                        failure = vec![(0, KernelError { errno: libc::EIO, detail: "the kernel did not answer".to_owned() })];
                    }
                    failed.extend(failure.into_iter().map(|(_, error)| (i, error)));
                }
            }
            failed.sort_by_key(|(i, _)| *i);
            failed.dedup_by_key(|(i, _)| *i);
            report.failed.extend(failed.into_iter().map(|(i, error)| (first + i, op_error(&chunk[i], &error))));
        }
    }

    /// Sends a chunk and collects its failures. False: the outcome is not known.
    fn send_chunk(&mut self, ops: &[Op], cache: &mut KernelCache, failed: &mut Vec<(usize, KernelError)>) -> bool {
        let base = self.sequence.wrapping_add(1);
        self.output.clear();
        self.sent.clear();
        for (i, op) in ops.iter().enumerate() {
            if let Err(error) = self.append_op(i, op, cache) {
                failed.push((i, error));
            }
        }
        let Some(last) = self.sent.last() else { return true };
        let flags = last.start + 6;
        let with_ack = u16::from_ne_bytes([self.output[flags], self.output[flags + 1]]) | NLM_F_ACK;
        self.output[flags..flags + 2].copy_from_slice(&with_ack.to_ne_bytes());
        // A failure shows in the missing acknowledgement.
        if let Err(error) = self.socket.send(&self.output, 0) {
            tracing::debug!(%error, bytes = self.output.len(), "a batch could not be sent");
        }
        self.read_replies(base, failed)
    }

    /// Reads all answers to the messages from sequence number `base_chain` on.
    fn read_replies(&mut self, base: u32, failed: &mut Vec<(usize, KernelError)>) -> bool {
        let (mut complete, mut lost) = (false, false);
        loop {
            let received = match self.socket.recv(&mut self.input.as_mut_slice(), libc::MSG_DONTWAIT) {
                Ok(received) => received,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return complete && !lost,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    // ENOBUFS is told once; what arrived before it is still to be read.
                    lost = true;
                    if e.raw_os_error() == Some(libc::ENOBUFS) {
                        continue;
                    }
                    return false;
                }
            };
            for (header, body) in messages(self.input.get(..received).unwrap_or_default()) {
                let position = usize::try_from(header.sequence_number.wrapping_sub(base)).unwrap_or(usize::MAX);
                let Some(sent) = self.sent.get(position) else { continue };
                if header.message_type != NLMSG_ERROR {
                    continue;
                }
                complete |= position + 1 == self.sent.len();
                if let Err(error) = parse_ack(body)
                    && !(sent.is_delete && matches!(error.errno, libc::ENOENT | libc::ESRCH | libc::ENODEV))
                {
                    failed.push((sent.op_index, error));
                }
            }
        }
    }

    /// Appends the messages of an op.
    fn append_op(&mut self, i: usize, op: &Op, cache: &mut KernelCache) -> Result<(), KernelError> {
        let (key, value) = match op {
            Op::Set(key, value) | Op::Delete(key, value) => (key, value),
        };
        let device = peer_messages::entry_device(key, value);
        let Some(index) = device.map_or(Some(0), |d| cache.index(d)) else {
            let detail = device.map_or_else(String::new, |d| format!("{d} is not there"));
            return match op {
                Op::Set(..) => Err(KernelError { errno: libc::ENODEV, detail }),
                // The kernel removed the entry with its device. Of a next hop or route only the id and destination count.
                Op::Delete(Key::Fdb(..) | Key::Neigh(..), _) => Ok(()),
                Op::Delete(..) => {
                    self.append_message(i, true, |buffer, sequence| peer_messages::write_delete(buffer, sequence, 0, key));
                    Ok(())
                }
            };
        };
        let written = match op {
            Op::Set(..) => {
                self.append_message(i, false, |buffer, sequence| peer_messages::write_set(buffer, sequence, index, key, value))
            }
            Op::Delete(..) => {
                self.append_message(i, true, |buffer, sequence| peer_messages::write_delete(buffer, sequence, index, key))
            }
        };
        if !written {
            return Err(KernelError { errno: libc::EINVAL, detail: "this value cannot be written".to_owned() });
        }
        match (op, key, value) {
            (Op::Set(..), Key::Fdb(_, mac), Value::Fdb(remote)) => {
                cache.fdb.insert((index, *mac), *remote);
            }
            (Op::Delete(..), Key::Fdb(_, mac), _) => {
                cache.fdb.remove(&(index, *mac));
            }
            (Op::Set(..), Key::Neigh(_, address), _) if !cache.removed_neighbours.is_empty() => {
                cache.removed_neighbours.remove(&(index, *address));
            }
            (Op::Delete(..), Key::Neigh(_, address), _) => {
                cache.removed_neighbours.insert((index, *address));
            }
            _ => {}
        }
        Ok(())
    }

    fn append_message(&mut self, op_index: usize, is_delete: bool, write: impl FnOnce(&mut Vec<u8>, u32) -> bool) -> bool {
        let start = self.output.len();
        let sequence = self.sequence.wrapping_add(1);
        let written = write(&mut self.output, sequence);
        if written {
            self.sequence = sequence;
            self.sent.push(SentMessage { op_index, is_delete, start });
        }
        written
    }
}

/// The error of an op, with the remedy where one is known.
fn op_error(op: &Op, cause: &KernelError) -> OpError {
    let mut error = cause.context(op);
    // `ip6_route_check_nh_onlink` in `net/is_ipv6/route.c` looks the gateway up although it is on link, and ignores only default routes.
    let gateway = match op {
        Op::Set(_, Value::Nexthop { gateway, .. } | Value::Route(RouteTarget::Gateway(_, gateway))) => Some(*gateway),
        _ => None,
    };
    if let (libc::EINVAL, Some(gateway @ IpAddr::V6(_))) = (cause.errno, gateway) {
        let remedy =
            format!("; does a route by another interface cover {gateway}? ip -6 route show match {gateway} tells: remove it");
        error.message.push_str(&remedy);
    }
    error
}
