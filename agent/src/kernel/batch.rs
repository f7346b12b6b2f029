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

use super::known::Known;
use super::message::messages;
use super::socket::{Refusal, outcome};
use super::wire;
use crate::plan::state::Via;
use crate::plan::{ApplyReport, Key, Op, OpError, Value};

/// Ops to one `send`: with more, the gain is below a percent, and the table locks are held longer.
const CHUNK: usize = 200;
/// Socket buffers in bytes: room for an error of some hundred bytes to each message of a chunk, many times over.
const BUFFER: usize = 8 << 20;
/// Answers are datagrams of some hundred bytes each.
const RECEIVE: usize = 16 * 1024;

/// The socket of the batches.
#[derive(Debug)]
pub struct BatchSocket {
    socket: Socket,
    port: u32,
    sequence: u32,
    output: Vec<u8>,
    input: Vec<u8>,
    /// The messages of the chunk, in order.
    sent: Vec<Sent>,
}

/// A message of a chunk.
#[derive(Debug, Clone, Copy)]
struct Sent {
    /// The op it belongs to, within the chunk.
    op: usize,
    /// It removes something: that there is nothing to remove is success.
    removes: bool,
    /// Where its header begins in the output.
    start: usize,
}

impl BatchSocket {
    /// Opens the socket in the calling thread's network namespace.
    pub fn open() -> Result<BatchSocket, OpError> {
        BatchSocket::try_open().map_err(|e| Refusal::from(e).during("cannot open an rtnetlink socket for batches"))
    }

    fn try_open() -> io::Result<BatchSocket> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let port = socket.bind_auto()?.port_number();
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        // Without CAP_NET_ADMIN in the initial user namespace the size is cut to net.core.{r,w}mem_max: then losses are more likely, no more.
        if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &BUFFER)?;
        }
        if setsockopt(&socket, sockopt::SndBufForce, &BUFFER).is_err() {
            setsockopt(&socket, sockopt::SndBuf, &BUFFER)?;
        }
        Ok(BatchSocket { socket, port, sequence: 0, output: Vec::new(), input: vec![0; RECEIVE], sent: Vec::new() })
    }

    /// The port id by which the kernel names this socket in events.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// A receive buffer of that many bytes, so small that answers get lost.
    #[cfg(test)]
    pub fn shrink(&self, bytes: usize) {
        setsockopt(&self.socket, sockopt::RcvBuf, &bytes).expect("a small buffer");
    }

    /// Applies ops that are all of the kinds of [`wire::is_wire`]; `first` is the index of the first one in the report.
    pub fn apply(&mut self, ops: &[Op], first: usize, known: &mut Known, report: &mut ApplyReport) {
        known.reserve(ops);
        for (n, chunk) in ops.chunks(CHUNK).enumerate() {
            let first = first + n * CHUNK;
            let mut failed = Vec::new();
            if !self.send(chunk, known, &mut failed) {
                failed.clear();
                tracing::debug!(ops = chunk.len(), "answers to a batch were lost; sending its messages one by one");
                for (i, op) in chunk.iter().enumerate() {
                    let mut one = Vec::new();
                    if !self.send(std::slice::from_ref(op), known, &mut one) {
                        one = vec![(0, Refusal { errno: libc::EIO, detail: "the kernel did not answer".to_owned() })];
                    }
                    failed.extend(one.into_iter().map(|(_, refusal)| (i, refusal)));
                }
            }
            failed.sort_by_key(|(i, _)| *i);
            failed.dedup_by_key(|(i, _)| *i);
            report.failed.extend(failed.into_iter().map(|(i, refusal)| (first + i, explain(&chunk[i], &refusal))));
        }
    }

    /// Sends a chunk and collects its failures. False: the outcome is not known.
    fn send(&mut self, ops: &[Op], known: &mut Known, failed: &mut Vec<(usize, Refusal)>) -> bool {
        let base = self.sequence.wrapping_add(1);
        self.output.clear();
        self.sent.clear();
        for (i, op) in ops.iter().enumerate() {
            if let Err(refusal) = self.write(i, op, known) {
                failed.push((i, refusal));
            }
        }
        let Some(last) = self.sent.last() else { return true };
        let flags = last.start + 6;
        let acknowledged = u16::from_ne_bytes([self.output[flags], self.output[flags + 1]]) | NLM_F_ACK;
        self.output[flags..flags + 2].copy_from_slice(&acknowledged.to_ne_bytes());
        // A failure shows in the missing acknowledgement.
        if let Err(error) = self.socket.send(&self.output, 0) {
            tracing::debug!(%error, bytes = self.output.len(), "a batch could not be sent");
        }
        self.collect(base, failed)
    }

    /// Reads all answers to the messages from sequence number `base` on.
    fn collect(&mut self, base: u32, failed: &mut Vec<(usize, Refusal)>) -> bool {
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
                if let Err(refusal) = outcome(body)
                    && !(sent.removes && matches!(refusal.errno, libc::ENOENT | libc::ESRCH | libc::ENODEV))
                {
                    failed.push((sent.op, refusal));
                }
            }
        }
    }

    /// Appends the messages of an op.
    fn write(&mut self, i: usize, op: &Op, known: &mut Known) -> Result<(), Refusal> {
        let (key, value) = match op {
            Op::Set(key, value) | Op::Delete(key, value) => (key, value),
        };
        let device = wire::device(key, value);
        let Some(index) = device.map_or(Some(0), |d| known.index(d)) else {
            let detail = device.map_or_else(String::new, |d| format!("{d} is not there"));
            return match op {
                Op::Set(..) => Err(Refusal { errno: libc::ENODEV, detail }),
                // The kernel removed the entry with its device. Of a next hop or route only the id and destination count.
                Op::Delete(Key::Fdb(..) | Key::Neigh(..), _) => Ok(()),
                Op::Delete(..) => {
                    self.message(i, true, |buffer, sequence| wire::write_delete(buffer, sequence, 0, key));
                    Ok(())
                }
            };
        };
        let fits = match op {
            Op::Set(..) => self.message(i, false, |buffer, sequence| wire::write_set(buffer, sequence, index, key, value)),
            Op::Delete(..) => self.message(i, true, |buffer, sequence| wire::write_delete(buffer, sequence, index, key)),
        };
        if !fits {
            return Err(Refusal { errno: libc::EINVAL, detail: "this value cannot be written".to_owned() });
        }
        match (op, key, value) {
            (Op::Set(..), Key::Fdb(_, mac), Value::Fdb(remote)) => {
                known.fdb.insert((index, *mac), *remote);
            }
            (Op::Delete(..), Key::Fdb(_, mac), _) => {
                known.fdb.remove(&(index, *mac));
            }
            (Op::Set(..), Key::Neigh(_, address), _) if !known.removed_neighbours.is_empty() => {
                known.removed_neighbours.remove(&(index, *address));
            }
            (Op::Delete(..), Key::Neigh(_, address), _) => {
                known.removed_neighbours.insert((index, *address));
            }
            _ => {}
        }
        Ok(())
    }

    fn message(&mut self, op: usize, removes: bool, write: impl FnOnce(&mut Vec<u8>, u32) -> bool) -> bool {
        let start = self.output.len();
        let sequence = self.sequence.wrapping_add(1);
        let fits = write(&mut self.output, sequence);
        if fits {
            self.sequence = sequence;
            self.sent.push(Sent { op, removes, start });
        }
        fits
    }
}

/// The error of an op, with the remedy where one is known.
fn explain(op: &Op, refusal: &Refusal) -> OpError {
    let mut error = refusal.during(op);
    // `ip6_route_check_nh_onlink` in `net/ipv6/route.c` looks the gateway up although it is on link, and ignores only default routes.
    let gateway = match op {
        Op::Set(_, Value::Nexthop { gateway, .. } | Value::Route(Via::Gateway(_, gateway))) => Some(*gateway),
        _ => None,
    };
    if let (libc::EINVAL, Some(gateway @ IpAddr::V6(_))) = (refusal.errno, gateway) {
        let remedy =
            format!("; does a route by another interface cover {gateway}? ip -6 route show match {gateway} tells: remove it");
        error.message.push_str(&remedy);
    }
    error
}
