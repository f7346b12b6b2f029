//! Reports changes by other processes: rtnetlink and nf_tables events become [`KernelEvent`]s.
//!
//! One task, [`Monitor::run`], which `app` runs and whose end it notices. It reads all queued messages at once and delivers them
//! as one event, so that a flood of changes is one wake-up. While the receiver is busy, changes are merged; none is lost, and the
//! kernel's queue is still emptied.
//!
//! Our own changes must not wake the agent. A socket filter drops messages that carry the port id of one of our sockets, before
//! they are queued. Some events carry none (FDB entries, addresses, the removal of a neighbour, several of links, netconf): these
//! are compared with the cache (`cache`), which our own changes update first. A side effect of our own change may carry our port
//! id too and is then not reported: code that removes a next hop or a device must remember that its routes go with it.
//!
//! While many entries are written, their events are paused too ([`EventSubscriptions`]); other processes' changes of that time
//! are found afterwards.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket, Socket, TokioSocket};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;

use super::echo_filter::{OWN_SOCKETS, attach_filter};
use super::events::{HostInterfaces, PendingEvents, apply_event};
use super::nft::{NftChange, NftMonitor};
use super::nlmsg::messages;
use super::route_socket::KernelError;
use super::subscription::{EventSubscriptions, MissedEventsQueue, join_groups};
use super::uapi::MONITORED_GROUPS;
use super::{Shared, blocking, dump, receive_buffer};
use crate::model::{Family, Mac};
use crate::plan::{KernelEvent, Key, OpError, Value};

/// Sizes of the receive buffers of the rtnetlink and the nf_tables socket, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReceiveBuffers {
    route: usize,
    nft: usize,
}

/// Those of the host's namespace. An rtnetlink event takes some 800 bytes of kernel memory. A restart of `kube-proxy` or Docker
/// writes some thousand rules at once.
pub(super) const HOST_RECEIVE_BUFFERS: ReceiveBuffers = ReceiveBuffers { route: 32 << 20, nft: 4 << 20 };

/// Those of an isolated network's namespace, of which a host may have hundreds. Few processes change anything there; lost events
/// cost a dump.
pub(super) const NETWORK_RECEIVE_BUFFERS: ReceiveBuffers = ReceiveBuffers { route: 2 << 20, nft: 512 << 10 };

/// Messages read per acquisition of the shared lock, so that other waiters get it in between.
const MESSAGES_PER_LOCK: usize = 8192;

/// Delay before rereading paused state, so that the batch's caller returns first.
const RESYNC_DELAY: Duration = Duration::from_millis(10);

/// The monitor of one network namespace.
pub struct Monitor {
    socket: TokioSocket,
    nft: NftMonitor,
    shared: Arc<Mutex<Shared>>,
    sender: mpsc::Sender<KernelEvent>,
    pending: PendingEvents,
    host_interfaces: HostInterfaces,
    forward_drops: Option<Vec<Family>>,
    missed: Arc<MissedEventsQueue>,
    own_ports: [u32; OWN_SOCKETS],
    first_message: Vec<u8>,
}

impl Monitor {
    /// Subscribes to events in the calling thread's network namespace. Drops messages caused by sockets with the port ids
    /// `own_ports` and `nft_port`. `host_interfaces` is the initial state of interfaces that are not ours.
    pub(super) fn open(
        shared: Arc<Mutex<Shared>>,
        own_ports: [u32; OWN_SOCKETS],
        nft_port: u32,
        host_interfaces: HostInterfaces,
        sender: mpsc::Sender<KernelEvent>,
        receive_buffers: ReceiveBuffers,
    ) -> Result<Monitor, OpError> {
        let nft = NftMonitor::open(Some(nft_port), receive_buffers.nft)?;
        let socket = open_socket(own_ports, receive_buffers.route)
            .map_err(|e| KernelError::from(e).context("cannot subscribe to kernel events"))?;
        Ok(Monitor {
            socket,
            nft,
            shared,
            sender,
            pending: PendingEvents::default(),
            host_interfaces,
            forward_drops: None,
            missed: Arc::default(),
            own_ports,
            first_message: Vec::new(),
        })
    }

    /// Returns the handle that pauses the monitor's events.
    pub(super) fn subscriptions(&self) -> Result<Arc<EventSubscriptions>, OpError> {
        let subscriptions =
            EventSubscriptions::new(self.socket.socket_ref(), self.nft.socket(), self.own_ports, Arc::clone(&self.missed));
        subscriptions.map(Arc::new).map_err(|e| KernelError::from(e).context("cannot duplicate the monitor's sockets"))
    }

    /// Follows the kernel until the receiver of the events is dropped. Cancel-safe: it may be aborted at any await.
    ///
    /// # Errors
    /// A socket failed, so that the kernel's changes are no longer seen.
    pub async fn run(mut self) -> Result<(), OpError> {
        let sender = self.sender.clone();
        let mut reread_at = None;
        loop {
            tokio::select! {
                received = receive_first(&self.socket, &mut self.first_message) => {
                    let mut shared = self.shared.lock().await;
                    let mut decoder = EventDecoder { shared: &mut shared, host_interfaces: &mut self.host_interfaces, pending: &mut self.pending };
                    decoder.handle(received.map(|()| self.first_message.as_slice())).map_err(read_error)?;
                    decoder.drain(self.socket.socket_ref()).map_err(read_error)?;
                    self.pending.read_links(&mut shared);
                    self.pending.drop_reverted();
                }
                change = self.nft.changed() => {
                    let change = change?;
                    self.reread_rules(change).await;
                }
                () = self.missed.wait() => { reread_at.get_or_insert_with(|| Instant::now() + RESYNC_DELAY); }
                () = sleep_until(reread_at) => {
                    reread_at = None;
                    self.reread_missed().await;
                }
                permit = sender.reserve(), if !self.pending.is_empty() => {
                    let Ok(permit) = permit else { return Ok(()) };
                    if let Some(event) = self.pending.next_event() {
                        permit.send(event);
                    }
                }
                () = sender.closed() => return Ok(()),
            }
        }
    }

    /// Rereads the state whose events were paused.
    async fn reread_missed(&mut self) {
        let missed = self.missed.take();
        if missed.peer_entries {
            self.pending.require_resync("most peers were removed while entry events were paused");
            // A foreign default route may have changed.
            self.pending.host_network_changed();
        }
        if missed.fdb {
            self.reread_fdb().await;
        }
        if missed.rules {
            let generation = self.shared.lock().await.nft.foreign_generation().ok();
            if generation.is_none() || generation != missed.foreign_generation {
                self.reread_rules(NftChange::Lost).await;
            }
        }
    }

    /// Reads the FDB and reports differences from the cache.
    async fn reread_fdb(&mut self) {
        let mut shared = self.shared.lock().await;
        match blocking(|| dump::read_fdb(&mut shared)) {
            Ok(found) => {
                let before = std::mem::replace(&mut shared.cache.fdb, found);
                let found = &shared.cache.fdb;
                let removed = before.keys().filter(|key| !found.contains_key(key));
                let changed = found.iter().filter(|(key, remote)| before.get(key) != Some(remote)).map(|(key, _)| key);
                for (index, mac) in removed.chain(changed) {
                    let Some(device) = shared.cache.device(*index) else { continue };
                    let value = |fdb: &HashMap<(u32, Mac), IpAddr>| fdb.get(&(*index, *mac)).copied().map(Value::Fdb);
                    self.pending.record_change(Key::Fdb(device, *mac), value(&before), value(found));
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot read the FDB");
                self.pending.require_resync("cannot read the FDB");
            }
        }
    }

    /// Reads the rules and reports differences from the cache.
    async fn reread_rules(&mut self, change: NftChange) {
        let mut shared = self.shared.lock().await;
        let forward_only = change == NftChange::Forward;
        let read = blocking(|| if forward_only { shared.nft.dump_forward() } else { shared.nft.dump() });
        let rules = match read {
            Ok(rules) => rules,
            Err(error) => {
                tracing::warn!(%error, ?change, "cannot read nf_tables after a change");
                self.pending.require_resync("cannot read nf_tables after a change");
                return;
            }
        };
        if self.forward_drops.as_ref() != Some(&rules.forward_drops) {
            self.forward_drops = Some(rules.forward_drops.clone());
            self.pending.host_network_changed();
        }
        let current = rules.into_entries();
        let mut local = shared.cache.local();
        let cached = &mut local.rules;
        let is_affected = |key: &Key| !forward_only || matches!(key, Key::ForwardAccept(_));
        let removed: Vec<Key> = cached.keys().filter(|key| is_affected(key) && !current.contains_key(key)).cloned().collect();
        for key in removed {
            cached.remove(&key);
            self.pending.record(key, None);
        }
        for (key, value) in current {
            if cached.get(&key) != Some(&value) {
                cached.insert(key.clone(), value.clone());
                self.pending.record(key, Some(value));
            }
        }
    }

    /// Shrinks the receive buffer to this many bytes, so that events get lost.
    #[cfg(test)]
    pub fn set_receive_buffer(&self, bytes: usize) {
        setsockopt(self.socket.socket_ref(), sockopt::RcvBuf, &bytes).expect("a small buffer");
    }
}

fn read_error(error: io::Error) -> OpError {
    KernelError::from(error).context("cannot read kernel events")
}

/// Sleeps until the deadline; without one, forever.
async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Receives a message. Cancel-safe: the message is read only when the wait ends.
async fn receive_first(socket: &TokioSocket, message: &mut Vec<u8>) -> io::Result<()> {
    let receive = |context: &mut Context<'_>| {
        receive_buffer::with(|buffer| {
            let received = socket.poll_recv(context, buffer);
            received.map_ok(|()| {
                *message = buffer.clone();
                // A full buffer means that the message was truncated.
                buffer.len() == buffer.capacity()
            })
        })
    };
    if poll_fn(receive).await? { Err(io::Error::from_raw_os_error(libc::EMSGSIZE)) } else { Ok(()) }
}

/// Decodes events while the shared state is locked.
struct EventDecoder<'a> {
    shared: &'a mut Shared,
    host_interfaces: &'a mut HostInterfaces,
    pending: &'a mut PendingEvents,
}

impl EventDecoder<'_> {
    /// Reads all queued messages, up to a limit.
    fn drain(&mut self, socket: &Socket) -> io::Result<()> {
        receive_buffer::with(|input| {
            for _ in 0..MESSAGES_PER_LOCK {
                input.clear();
                let received = socket.recv(input, libc::MSG_DONTWAIT | libc::MSG_TRUNC);
                let bytes = received.and_then(|n| input.get(..n).ok_or_else(|| io::Error::from_raw_os_error(libc::EMSGSIZE)));
                match bytes {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    other => self.handle(other)?,
                }
            }
            Ok(())
        })
    }

    /// Applies the received messages, or records the receive error.
    fn handle(&mut self, received: io::Result<&[u8]>) -> io::Result<()> {
        match received {
            Ok(bytes) => {
                for (header, body) in messages(bytes) {
                    apply_event(header, body, self.shared, self.host_interfaces, self.pending);
                }
            }
            Err(e) => match e.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EMSGSIZE) => self.pending.require_resync("an event was truncated"),
                Some(libc::ENOBUFS) => {
                    self.pending.require_resync("events were lost: the receive buffer overflowed");
                    self.pending.host_network_changed();
                }
                _ => return Err(e),
            },
        }
        Ok(())
    }
}

fn open_socket(own_ports: [u32; OWN_SOCKETS], receive_buffer: usize) -> io::Result<TokioSocket> {
    let mut listener = TokioSocket::new(NETLINK_ROUTE)?;
    let socket = listener.socket_mut();
    // Without CAP_NET_ADMIN in the initial user namespace the kernel caps the size at net.core.rmem_max. That only makes overruns
    // more likely.
    if setsockopt(socket, sockopt::RcvBufForce, &receive_buffer).is_err() {
        setsockopt(socket, sockopt::RcvBuf, &receive_buffer)?;
    }
    attach_filter(socket.as_fd(), own_ports, true)?;
    socket.bind_auto()?;
    join_groups(socket, MONITORED_GROUPS)?;
    Ok(listener)
}
