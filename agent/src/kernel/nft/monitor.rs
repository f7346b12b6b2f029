//! Changes of nf_tables by others, as they happen. No task of its own: whoever awaits [`NftMonitor::changed`] does the work.

use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket, Socket, TokioSocket};
use nix::sys::socket::{setsockopt, sockopt};

use super::codec::{self, NFPROTO_BRIDGE, NFPROTO_INET, Object, Payload};
use super::expr::protocol_family;
use super::forward;
use super::nfnl_socket::io_error;
use super::table::attribute_equals;
use crate::kernel::monitor::{OWN_SOCKETS, attach_filter};
use crate::plan::OpError;
use crate::plan::ruleset::TABLE;

/// Bytes of a receive: events come in datagrams of at most a page (`NLMSG_GOODSIZE`), several to one.
const RECEIVE_BUFFER_LEN: usize = 64 * 1024;

/// Receive buffer in bytes: `kube-proxy` or Docker starting anew write some thousand rules at once.
const SOCKET_BUFFER_LEN: usize = 4 * 1024 * 1024;

/// What others changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NftChange {
    /// Something in one of our tables, or the table itself.
    OwnTables,
    /// The FORWARD chain of iptables in one of the families: its rules, its policy, or that it exists.
    Forward,
    /// Events were lost: anything may have changed.
    Lost,
}

/// Follows nf_tables in one network namespace.
pub struct NftMonitor {
    socket: TokioSocket,
    own_port_id: Option<u32>,
    buffer: Vec<u8>,
    pending: PendingChanges,
}

/// What was seen and not handed out yet.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct PendingChanges {
    own_tables: bool,
    forward: bool,
    lost: bool,
}

impl NftMonitor {
    /// Begins to follow the calling thread's network namespace. Changes through sockets with these port ids ([`super::Nft::port_id`]) are
    /// left out. Must be called inside a tokio runtime with I/O.
    ///
    /// # Errors
    /// The kernel has no nfnetlink, or the process may not listen (`CAP_NET_ADMIN`).
    pub fn open(own_port_id: Option<u32>) -> Result<NftMonitor, OpError> {
        let open = || -> io::Result<TokioSocket> {
            let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
            socket.socket_mut().bind_auto()?;
            if setsockopt(socket.socket_ref(), sockopt::RcvBufForce, &SOCKET_BUFFER_LEN).is_err() {
                setsockopt(socket.socket_ref(), sockopt::RcvBuf, &SOCKET_BUFFER_LEN)?;
            }
            // A transaction's events come together and carry the port id of its socket: our own are not even queued.
            if let Some(own) = own_port_id {
                attach_filter(socket.socket_ref().as_fd(), [own; OWN_SOCKETS], true)?;
            }
            socket.socket_mut().add_membership(codec::NFNLGRP_NFTABLES)?;
            Ok(socket)
        };
        let socket = open().map_err(|error| io_error("listening to changes of nf_tables", &error))?;
        Ok(NftMonitor { socket, own_port_id, buffer: Vec::with_capacity(RECEIVE_BUFFER_LEN), pending: PendingChanges::default() })
    }

    /// The socket that listens.
    pub(in crate::kernel) fn socket(&self) -> &Socket {
        self.socket.socket_ref()
    }

    /// Waits for the next change by others. Changes of a kind that arrive before it is asked for come out as one. Cancel-safe: what
    /// was received is kept in `self` before anything is awaited.
    ///
    /// # Errors
    /// The socket failed; open a new monitor.
    pub async fn changed(&mut self) -> Result<NftChange, OpError> {
        loop {
            if let Some(change) = self.pending.pop() {
                return Ok(change);
            }
            self.buffer.clear();
            let (socket, buffer) = (&self.socket, &mut self.buffer);
            match poll_fn(|context| socket.poll_recv(context, buffer)).await {
                // A full buffer means that the end was cut off.
                Ok(()) if self.buffer.len() == self.buffer.capacity() => self.pending.lost = true,
                Ok(()) => self.pending.record(&self.buffer, self.own_port_id),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.pending.lost = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io_error("reading changes of nf_tables", &error)),
            }
        }
    }
}

impl PendingChanges {
    fn pop(&mut self) -> Option<NftChange> {
        if std::mem::take(&mut self.lost) {
            // Who dumps again sees the rest as well.
            *self = PendingChanges::default();
            Some(NftChange::Lost)
        } else if std::mem::take(&mut self.own_tables) {
            Some(NftChange::OwnTables)
        } else {
            std::mem::take(&mut self.forward).then_some(NftChange::Forward)
        }
    }

    /// Folds in the events of a datagram.
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

/// Whom an event concerns. The table's name is the first attribute of each kind of event, so that this costs little.
fn classify_event(object: Object<'_>) -> Option<NftChange> {
    // Attribute 1 is the table's name in every nf_tables message but this one, which closes each transaction.
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
