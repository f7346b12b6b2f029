//! The batch writer: sends many entries per `send`, without an acknowledgement for each.
//!
//! The kernel processes all messages of a `send` before it returns, and continues after a failed one (`netlink_rcv_skb` in
//! `net/netlink/af_netlink.c`). It answers each failure with the message's sequence number. The last message requests an
//! acknowledgement, which shows that the whole `send` was processed. If replies are lost for lack of buffer space, the messages
//! are sent again one by one. All of them are idempotent.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_ACK, NLMSG_ERROR};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sys::socket::{setsockopt, sockopt};

use super::cache::KernelCache;
use super::nlmsg::messages;
use super::peer_messages;
use super::receive_buffer;
use super::route_socket::{KernelError, parse_ack};
use crate::plan::state::RouteTarget;
use crate::plan::{ApplyReport, Key, Op, OpError, Value};

/// Ops per `send`. More would gain less than one percent and hold the table locks longer.
const OPS_PER_SEND: usize = 200;
/// Size of each socket buffer in bytes, one pair per network namespace. An error takes some hundred bytes, and 1 KiB of kernel
/// memory; this is four times the room for one per message of a chunk.
const SOCKET_BUFFER_SIZE: usize = 1 << 20;

/// The netlink socket for batches.
#[derive(Debug)]
pub struct BatchSocket {
    socket: Socket,
    port_id: u32,
    sequence: u32,
    output: Vec<u8>,
    /// The messages of the current chunk, in order.
    sent: Vec<SentMessage>,
}

/// A message of a chunk.
#[derive(Debug, Clone, Copy)]
struct SentMessage {
    /// Index of its op within the chunk.
    op_index: usize,
    /// Whether it removes an entry: a missing entry then counts as success.
    is_delete: bool,
    /// Offset of its header in the output.
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
        // Without CAP_NET_ADMIN in the initial user namespace the kernel caps the size at net.core.{r,w}mem_max. That only makes
        // lost replies more likely.
        if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_SIZE).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER_SIZE)?;
        }
        if setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER_SIZE).is_err() {
            setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER_SIZE)?;
        }
        Ok(BatchSocket { socket, port_id, sequence: 0, output: Vec::new(), sent: Vec::new() })
    }

    /// The port id that identifies this socket in the kernel's events.
    pub fn port_id(&self) -> u32 {
        self.port_id
    }

    /// Shrinks the receive buffer to this many bytes, so that replies get lost.
    #[cfg(test)]
    pub fn set_receive_buffer(&self, bytes: usize) {
        setsockopt(&self.socket, sockopt::RcvBuf, &bytes).expect("a small buffer");
    }

    /// Applies ops, all of which must satisfy [`Key::is_peer_entry`]. `first` is the index of the first op in the
    /// report.
    pub fn apply(&mut self, ops: &[Op], first: usize, cache: &mut KernelCache, report: &mut ApplyReport) {
        cache.reserve(ops);
        for (n, chunk) in ops.chunks(OPS_PER_SEND).enumerate() {
            let first = first + n * OPS_PER_SEND;
            let mut failed = Vec::new();
            if !self.send_chunk(chunk, cache, &mut failed) {
                failed.clear();
                tracing::debug!(ops = chunk.len(), "batch replies lost; resending messages one by one");
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
        // Not kept while the socket is idle.
        (self.output, self.sent) = Default::default();
    }

    /// Sends a chunk and collects its failures. Returns false if the outcome is unknown.
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
        // Not returned: a failed send shows as a missing acknowledgement.
        if let Err(error) = self.socket.send(&self.output, 0) {
            tracing::debug!(%error, bytes = self.output.len(), "cannot send batch");
        }
        receive_buffer::with(|input| self.read_replies(base, input, failed))
    }

    /// Reads all replies to the messages from sequence number `base` on.
    fn read_replies(&self, base: u32, input: &mut Vec<u8>, failed: &mut Vec<(usize, KernelError)>) -> bool {
        let (mut complete, mut lost) = (false, false);
        loop {
            input.clear();
            match self.socket.recv(input, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return complete && !lost,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    // ENOBUFS is reported once; replies that arrived earlier are still queued.
                    lost = true;
                    if e.raw_os_error() == Some(libc::ENOBUFS) {
                        continue;
                    }
                    return false;
                }
            }
            for (header, body) in messages(input) {
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
            let detail = device.map_or_else(String::new, |d| format!("device {d} does not exist"));
            return match op {
                Op::Set(..) => Err(KernelError { errno: libc::ENODEV, detail }),
                // The kernel removed FDB entries and neighbours with their device. Deleting a next hop or route needs only its id
                // or destination.
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
            return Err(KernelError { errno: libc::EINVAL, detail: "this value cannot be encoded".to_owned() });
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

/// The error of an op, with a remedy if one is known.
fn op_error(op: &Op, cause: &KernelError) -> OpError {
    let mut error = cause.context(op);
    // `ip6_route_check_nh_onlink` in `net/ipv6/route.c` looks up even an on-link gateway, and ignores only default routes.
    let gateway = match op {
        Op::Set(_, Value::Nexthop { gateway, .. } | Value::Route(RouteTarget::Gateway(_, gateway))) => Some(*gateway),
        _ => None,
    };
    if let (libc::EINVAL, Some(gateway @ IpAddr::V6(_))) = (cause.errno, gateway) {
        let remedy = format!(
            "; a route by another interface may cover {gateway}: find it (ip -6 route show match {gateway}) and remove it"
        );
        error.message.push_str(&remedy);
    }
    error
}
