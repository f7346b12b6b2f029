//! Follows what others change: rtnetlink's multicast groups and nf_tables' events become [`KernelEvent`]s.
//!
//! One task, [`Monitor::run`], which `app` runs and whose end it notices. It reads whatever is readable at once and hands it on as one event, so
//! that a flood of changes is one wake-up. While nobody takes events they are folded together; no fact is lost, and the kernel's queue is
//! emptied all the same.
//!
//! Changes of our own must not wake us. A filter on the socket drops messages that carry the port id of one of our sockets, before they are queued.
//! Some events carry none (FDB entries, addresses, the removal of a neighbour, several of links, netconf): these are compared with what is known
//! (`known`), which our own changes update first. What the kernel does by itself because of a change of ours may carry our port id too, and
//! is not reported then: whoever removes a next hop or a device has to know that its routes go with it.
//!
//! While many entries are written, their events are kept out too ([`Ears`]), and what others did meanwhile is found afterwards.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket, Socket, TokioSocket};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;

use super::ears::{Ears, Unheard};
use super::events::{Foreign, Pending, note};
use super::message::messages;
use super::nft::{NftChange, NftMonitor};
use super::socket::Refusal;
use super::uapi::RTNLGRP;
use super::wire::AF_BRIDGE;
use super::{Shared, blocking, dump};
use crate::model::{Family, Mac};
use crate::plan::{KernelEvent, Key, OpError, Value};

/// Receive buffer in bytes: an event takes some 800 bytes of kernel memory.
const BUFFER: usize = 32 << 20;
/// Bytes of a receive: an event is a datagram of its own, links' are the largest with some 2 KiB.
const RECEIVE: usize = 32 * 1024;
/// Messages that are read before others who want the shared state get their turn.
const TURN: usize = 8192;

/// How long after it was missed something is looked at: who waits for the batch that was the cause goes first.
const LATER: Duration = Duration::from_millis(10);

/// How many sockets of ours cause events.
pub(super) const OWN: usize = 3;

/// The monitor of one network namespace.
pub struct Monitor {
    socket: TokioSocket,
    nft: NftMonitor,
    shared: Arc<Mutex<Shared>>,
    sender: mpsc::Sender<KernelEvent>,
    pending: Pending,
    foreign: Foreign,
    forward_drops: Option<Vec<Family>>,
    unheard: Arc<Unheard>,
    own: [u32; OWN],
    first: Vec<u8>,
    input: Vec<u8>,
}

impl Monitor {
    /// Begins to listen in the calling thread's network namespace. Messages caused by sockets with the port ids `own` are dropped;
    /// `foreign` is what is there and not ours.
    pub(super) fn open(
        shared: Arc<Mutex<Shared>>,
        own: [u32; OWN],
        nft_port: u32,
        foreign: Foreign,
        sender: mpsc::Sender<KernelEvent>,
    ) -> Result<Monitor, OpError> {
        let nft = NftMonitor::open(Some(nft_port))?;
        let socket = listen(own).map_err(|e| Refusal::from(e).during("cannot listen to the kernel's changes"))?;
        Ok(Monitor {
            socket,
            nft,
            shared,
            sender,
            pending: Pending::default(),
            foreign,
            forward_drops: None,
            unheard: Arc::default(),
            own,
            first: Vec::with_capacity(RECEIVE),
            input: vec![0; RECEIVE],
        })
    }

    /// What is let through.
    pub(super) fn ears(&self) -> Result<Arc<Ears>, OpError> {
        let ears = Ears::of(self.socket.socket_ref(), self.nft.socket(), self.own, Arc::clone(&self.unheard));
        ears.map(Arc::new).map_err(|e| Refusal::from(e).during("cannot share the sockets of the kernel's changes"))
    }

    /// Follows the kernel until the receiver of the events is dropped. Cancel-safe: it may be aborted at any await.
    ///
    /// # Errors
    /// A socket failed; the kernel's changes are no longer seen. Or the connection ended by which links and addresses are changed.
    pub async fn run(mut self) -> Result<(), OpError> {
        let sender = self.sender.clone();
        let mut ended = pin!(self.shared.lock().await.rtnl.ended());
        let mut look = None;
        loop {
            tokio::select! {
                received = first(&self.socket, &mut self.first) => {
                    let mut shared = self.shared.lock().await;
                    let mut news = News { shared: &mut shared, foreign: &mut self.foreign, pending: &mut self.pending };
                    news.take(received.map(|()| self.first.as_slice())).map_err(failed)?;
                    news.drain(self.socket.socket_ref(), &mut self.input).map_err(failed)?;
                    self.pending.prune();
                }
                change = self.nft.changed() => {
                    let change = change?;
                    self.note_rules(change).await;
                }
                () = self.unheard.told() => { look.get_or_insert_with(|| Instant::now() + LATER); }
                () = at(look) => {
                    look = None;
                    self.look().await;
                }
                permit = sender.reserve(), if !self.pending.is_empty() => {
                    let Ok(permit) = permit else { return Ok(()) };
                    if let Some(event) = self.pending.take() {
                        permit.send(event);
                    }
                }
                () = &mut ended => return Err(OpError { errno: libc::EPIPE, message: "the rtnetlink connection has ended".to_owned() }),
                () = sender.closed() => return Ok(()),
            }
        }
    }

    /// Looks at what was not heard of.
    async fn look(&mut self) {
        let missed = self.unheard.take();
        if missed.entries {
            self.pending.stale("most peers went, and nobody listened to changes of entries");
            // A default route of others may have changed.
            self.pending.underlay();
        }
        if missed.fdb {
            self.note_fdb().await;
        }
        if missed.rules {
            let others = self.shared.lock().await.nft.others().ok();
            if others.is_none() || others != missed.others {
                self.note_rules(NftChange::Lost).await;
            }
        }
    }

    /// Reads the FDB and tells what differs from what is known.
    async fn note_fdb(&mut self) {
        let mut shared = self.shared.lock().await;
        match blocking(|| dump::fdb(&mut shared)) {
            Ok(found) => {
                let before = std::mem::replace(&mut shared.known.fdb, found);
                let found = &shared.known.fdb;
                let gone = before.keys().filter(|at| !found.contains_key(at));
                let differs = found.iter().filter(|(at, remote)| before.get(at) != Some(remote)).map(|(at, _)| at);
                for (index, mac) in gone.chain(differs) {
                    let Some(device) = shared.known.device(*index) else { continue };
                    let value = |all: &HashMap<(u32, Mac), IpAddr>| all.get(&(*index, *mac)).copied().map(Value::Fdb);
                    self.pending.changed_from(Key::Fdb(device, *mac), value(&before), value(found));
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the FDB could not be read");
                self.pending.stale("the FDB could not be read");
            }
        }
    }

    /// Reads the rules anew and tells what differs from what is known.
    async fn note_rules(&mut self, change: NftChange) {
        let mut shared = self.shared.lock().await;
        let forward_alone = change == NftChange::Forward;
        let read = blocking(|| if forward_alone { shared.nft.dump_forward() } else { shared.nft.dump() });
        let rules = match read {
            Ok(rules) => rules,
            Err(error) => {
                tracing::warn!(%error, ?change, "nf_tables changed and could not be read");
                self.pending.stale("nf_tables changed and could not be read");
                return;
            }
        };
        if self.forward_drops.as_ref() != Some(&rules.forward_drops) {
            self.forward_drops = Some(rules.forward_drops.clone());
            self.pending.underlay();
        }
        let now = rules.into_entries();
        let known = &mut shared.known.rules;
        let concerned = |key: &Key| !forward_alone || matches!(key, Key::ForwardAccept(_));
        let gone: Vec<Key> = known.keys().filter(|key| concerned(key) && !now.contains_key(key)).cloned().collect();
        for key in gone {
            known.remove(&key);
            self.pending.changed(key, None);
        }
        for (key, value) in now {
            if known.get(&key) != Some(&value) {
                known.insert(key.clone(), value.clone());
                self.pending.changed(key, Some(value));
            }
        }
    }

    /// A receive buffer of that many bytes, so small that events get lost.
    #[cfg(test)]
    pub fn shrink(&self, bytes: usize) {
        setsockopt(self.socket.socket_ref(), sockopt::RcvBuf, &bytes).expect("a small buffer");
    }
}

fn failed(error: io::Error) -> OpError {
    Refusal::from(error).during("cannot read the kernel's changes")
}

/// Waits for a moment; without one, for ever.
async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Waits for a message. Cancel-safe: it is read only where the wait ends.
async fn first(socket: &TokioSocket, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    poll_fn(|context| socket.poll_recv(context, buffer)).await?;
    // A full buffer means that the end was cut off.
    if buffer.len() == buffer.capacity() { Err(io::Error::from_raw_os_error(libc::EMSGSIZE)) } else { Ok(()) }
}

/// Where messages are judged, with the shared state held.
struct News<'a> {
    shared: &'a mut Shared,
    foreign: &'a mut Foreign,
    pending: &'a mut Pending,
}

impl News<'_> {
    /// Reads what is there, up to a bound.
    fn drain(&mut self, socket: &Socket, input: &mut [u8]) -> io::Result<()> {
        for _ in 0..TURN {
            let received = socket.recv(&mut &mut *input, libc::MSG_DONTWAIT | libc::MSG_TRUNC);
            let bytes = received.and_then(|n| input.get(..n).ok_or_else(|| io::Error::from_raw_os_error(libc::EMSGSIZE)));
            match bytes {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                other => self.take(other)?,
            }
        }
        Ok(())
    }

    /// Judges what was received.
    fn take(&mut self, received: io::Result<&[u8]>) -> io::Result<()> {
        match received {
            Ok(bytes) => {
                for (header, body) in messages(bytes) {
                    note(header, body, self.shared, self.foreign, self.pending);
                }
            }
            Err(e) => match e.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EMSGSIZE) => self.pending.stale("an event was too long to be read"),
                Some(libc::ENOBUFS) => {
                    self.pending.stale("events were lost: more came than the receive buffer holds");
                    self.pending.underlay();
                }
                _ => return Err(e),
            },
        }
        Ok(())
    }
}

fn listen(own: [u32; OWN]) -> io::Result<TokioSocket> {
    let mut listener = TokioSocket::new(NETLINK_ROUTE)?;
    let socket = listener.socket_mut();
    // Without CAP_NET_ADMIN in the initial user namespace the size is cut to net.core.rmem_max: overruns are more likely, no more.
    if setsockopt(socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        setsockopt(socket, sockopt::RcvBuf, &BUFFER)?;
    }
    attach_filter(socket.as_fd(), own, true)?;
    socket.bind_auto()?;
    join(socket, RTNLGRP)?;
    Ok(listener)
}

/// Begins to listen to groups.
pub(super) fn join(socket: &Socket, groups: impl IntoIterator<Item = u32>) -> io::Result<()> {
    groups.into_iter().try_for_each(|group| match socket.add_membership(group) {
        // RTNLGRP_NEXTHOP is unknown to kernels without next-hop objects.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    })
}

/// Drops messages whose `nlmsg_pid` is one of ours, and those about FDB entries unless `fdb`: a classic BPF program (`linux/filter.h`), run by the
/// kernel on each message before it is queued.
pub(super) fn attach_filter(socket: BorrowedFd<'_>, own: [u32; OWN], fdb: bool) -> io::Result<()> {
    /// Offsets of `nlmsg_type` and `nlmsg_pid` in `struct nlmsghdr`, and of `ndm_family` behind it.
    const TYPE: u32 = 4;
    const PORT: u32 = 12;
    const FAMILY: u32 = 16;
    /// `BPF_LD | BPF_ABS` of a word, of half of one (both in network byte order) and of a byte.
    const LOAD: u16 = 0x20;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    /// `BPF_JMP | BPF_JEQ | BPF_K`.
    const JUMP_IF_EQUAL: u16 = 0x15;
    /// `BPF_RET | BPF_K`: how many bytes of the message are kept.
    const RETURN: u16 = 0x06;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let loaded = |port: u32| u32::from_be_bytes(port.to_ne_bytes());
    let loaded_half = |kind: u16| u32::from(u16::from_be_bytes(kind.to_ne_bytes()));
    let family = if fdb { u32::MAX } else { AF_BRIDGE.into() };
    let mut program = [
        step(LOAD, 0, 0, PORT),
        step(JUMP_IF_EQUAL, 8, 0, loaded(own[0])),
        step(JUMP_IF_EQUAL, 7, 0, loaded(own[1])),
        step(JUMP_IF_EQUAL, 6, 0, loaded(own[2])),
        step(LOAD_BYTE, 0, 0, FAMILY),
        // Links have a family at the same place, which is the bridge's for what bridges tell of their ports.
        step(JUMP_IF_EQUAL, 0, 3, family),
        step(LOAD_HALF, 0, 0, TYPE),
        step(JUMP_IF_EQUAL, 2, 0, loaded_half(libc::RTM_NEWNEIGH)),
        step(JUMP_IF_EQUAL, 1, 0, loaded_half(libc::RTM_DELNEIGH)),
        step(RETURN, 0, 0, u32::MAX),
        step(RETURN, 0, 0, 0),
    ];
    let filter = libc::sock_fprog { len: 11, filter: program.as_mut_ptr() };
    let length = libc::socklen_t::try_from(size_of::<libc::sock_fprog>()).unwrap_or_default();
    // SAFETY: the program and its description live until the call returns; the kernel copies both (sk_attach_filter in net/core/filter.c).
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, (&raw const filter).cast(), length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
