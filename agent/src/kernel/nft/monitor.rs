//! Reports nf_tables changes by other processes. It spawns no task: the caller that awaits [`NftMonitor::changed`] does the work.

use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd;
use std::task::Context;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket, Socket, TokioSocket};
use nix::sys::socket::{setsockopt, sockopt};

use super::codec::{self, NFPROTO_BRIDGE, NFPROTO_INET, Object, Payload, attribute_equals, protocol_family};
use super::forward;
use super::nfnl_socket::io_error;
use crate::kernel::echo_filter::{OWN_SOCKETS, attach_filter};
use crate::kernel::receive_buffer;
use crate::plan::OpError;
use crate::plan::ruleset::TABLE;

/// A change by another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NftChange {
    /// One of our tables, or an object in it.
    OwnTables,
    /// An iptables FORWARD chain: its rules, its policy, or its existence.
    Forward,
    /// Events were lost: anything may have changed.
    Lost,
}

/// Monitors nf_tables in one network namespace.
pub struct NftMonitor {
    socket: TokioSocket,
    own_port_id: Option<u32>,
    pending: PendingChanges,
}

/// Changes seen but not yet returned.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct PendingChanges {
    own_tables: bool,
    forward: bool,
    lost: bool,
}

impl NftMonitor {
    /// Subscribes to nf_tables events of the calling thread's network namespace. Changes by the socket with `own_port_id`
    /// ([`super::Nft::port_id`]) are not reported. The kernel queues events of up to `receive_buffer` bytes. Must be called inside a
    /// tokio runtime with I/O.
    ///
    /// # Errors
    /// The kernel has no nfnetlink, or the process lacks permission (`CAP_NET_ADMIN`).
    pub fn open(own_port_id: Option<u32>, receive_buffer: usize) -> Result<NftMonitor, OpError> {
        let open = || -> io::Result<TokioSocket> {
            let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
            socket.socket_mut().bind_auto()?;
            if setsockopt(socket.socket_ref(), sockopt::RcvBufForce, &receive_buffer).is_err() {
                setsockopt(socket.socket_ref(), sockopt::RcvBuf, &receive_buffer)?;
            }
            // All events of a transaction carry the port id of its socket. The socket filter drops our own events before the
            // kernel queues them.
            if let Some(own) = own_port_id {
                attach_filter(socket.socket_ref().as_fd(), [own; OWN_SOCKETS], true)?;
            }
            socket.socket_mut().add_membership(codec::NFNLGRP_NFTABLES)?;
            Ok(socket)
        };
        let socket = open().map_err(|error| io_error("subscribing to nf_tables events", &error))?;
        Ok(NftMonitor { socket, own_port_id, pending: PendingChanges::default() })
    }

    /// The event socket.
    pub(in crate::kernel) fn socket(&self) -> &Socket {
        self.socket.socket_ref()
    }

    /// Waits for the next change by another process. Changes of one kind that arrive between two calls are merged. Cancel-safe:
    /// received data are kept in `self` before the next await.
    ///
    /// # Errors
    /// The socket failed; open a new monitor.
    pub async fn changed(&mut self) -> Result<NftChange, OpError> {
        loop {
            if let Some(change) = self.pending.pop() {
                return Ok(change);
            }
            let NftMonitor { socket, own_port_id, pending } = self;
            let receive = |context: &mut Context<'_>| {
                receive_buffer::with(|buffer| {
                    let received = socket.poll_recv(context, buffer);
                    received.map_ok(|()| {
                        pending.record(buffer, *own_port_id);
                        // A full buffer means a truncated datagram.
                        pending.lost |= buffer.len() == buffer.capacity();
                    })
                })
            };
            match poll_fn(receive).await {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.pending.lost = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io_error("reading nf_tables events", &error)),
            }
        }
    }
}

impl PendingChanges {
    fn pop(&mut self) -> Option<NftChange> {
        if std::mem::take(&mut self.lost) {
            // The new dump after a loss covers the other pending changes too.
            *self = PendingChanges::default();
            Some(NftChange::Lost)
        } else if std::mem::take(&mut self.own_tables) {
            Some(NftChange::OwnTables)
        } else {
            std::mem::take(&mut self.forward).then_some(NftChange::Forward)
        }
    }

    /// Adds the events of a datagram.
    fn record(&mut self, datagram: &[u8], own_port_id: Option<u32>) {
        for received in codec::messages(datagram) {
            if own_port_id == Some(received.port_id) {
                continue;
            }
            if let Payload::Object(object) = received.payload {
                match classify_event(object) {
                    Some(NftChange::OwnTables) => self.own_tables = true,
                    Some(NftChange::Forward) => self.forward = true,
                    Some(NftChange::Lost) | None => {}
                }
            }
        }
    }
}

/// Maps an event to the change that it means for us. This is cheap: the table's name is the first attribute of each event.
fn classify_event(object: Object<'_>) -> Option<NftChange> {
    // NEWGEN ends each transaction. In every other nf_tables message, attribute 1 is the table's name.
    if object.kind == codec::NFT_MSG_NEWGEN {
        return None;
    }
    if matches!(object.family, NFPROTO_INET | NFPROTO_BRIDGE) {
        return attribute_equals(object.attributes, codec::NFTA_TABLE_NAME, TABLE).then_some(NftChange::OwnTables);
    }
    protocol_family(object.family)?;
    if !attribute_equals(object.attributes, codec::NFTA_TABLE_NAME, forward::TABLE) {
        return None;
    }
    let concerned = match object.kind {
        codec::NFT_MSG_NEWTABLE | codec::NFT_MSG_DELTABLE => true,
        codec::NFT_MSG_NEWCHAIN | codec::NFT_MSG_DELCHAIN => {
            attribute_equals(object.attributes, codec::NFTA_CHAIN_NAME, forward::CHAIN)
        }
        codec::NFT_MSG_NEWRULE | codec::NFT_MSG_DELRULE => {
            attribute_equals(object.attributes, codec::NFTA_RULE_CHAIN, forward::CHAIN)
        }
        _ => false,
    };
    concerned.then_some(NftChange::Forward)
}
