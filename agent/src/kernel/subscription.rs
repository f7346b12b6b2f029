//! Pauses the monitor's events while many entries are written.
//!
//! Waking a reader for each entry, or just writing a message for it, costs the kernel as much as the entry. The monitor is
//! notified afterwards and rereads the paused state, so that it finds other processes' changes.
//!
//! | paused | how | afterwards |
//! | --- | --- | --- |
//! | FDB entries | by the filter: the group also carries other neighbours | the FDB is read and compared |
//! | all peers' entries, while most are removed | by leaving their groups: the kernel writes no messages | everything is read |
//! | rules and elements | by leaving nf_tables' group | they are read if other processes' transaction count has changed |

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netlink_sys::Socket;
use tokio::sync::Notify;

use super::nft::NFNLGRP_NFTABLES;
use super::peer_messages::AF_BRIDGE;
use super::uapi::PEER_ENTRY_GROUPS;

/// Number of our sockets that cause events.
pub(super) const OWN_SOCKETS: usize = 3;

/// A class of events that can be paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EventClass {
    Fdb,
    PeerEntries,
    /// Carries the number of other processes' transactions so far.
    Rules(u32),
}

/// State that the monitor must reread, because its events were paused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct MissedEvents {
    pub fdb: bool,
    pub peer_entries: bool,
    pub rules: bool,
    /// Other processes' transaction count when rule events were paused; `None` if it was taken already.
    pub foreign_generation: Option<u32>,
}

/// Notifies the monitor of missed events.
#[derive(Debug, Default)]
pub(super) struct MissedEventsQueue {
    missed: Mutex<MissedEvents>,
    notify: Notify,
}

impl MissedEventsQueue {
    /// Waits until events were missed. Cancel-safe.
    pub async fn wait(&self) {
        self.notify.notified().await;
    }

    /// Takes the events missed so far.
    pub fn take(&self) -> MissedEvents {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, MissedEvents> {
        self.missed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The writer's handle to the monitor's sockets.
pub(super) struct EventSubscriptions {
    route_socket: Socket,
    nft_socket: Socket,
    own_ports: [u32; OWN_SOCKETS],
    missed: Arc<MissedEventsQueue>,
}

impl EventSubscriptions {
    /// Duplicates the two sockets; their owners keep the originals.
    pub fn new(
        route_socket: &Socket,
        nft_socket: &Socket,
        own_ports: [u32; OWN_SOCKETS],
        missed: Arc<MissedEventsQueue>,
    ) -> io::Result<EventSubscriptions> {
        Ok(EventSubscriptions {
            route_socket: duplicate_socket(route_socket)?,
            nft_socket: duplicate_socket(nft_socket)?,
            own_ports,
            missed,
        })
    }

    /// Pauses these classes, at least one, until the returned guard is dropped. The monitor rereads them then.
    pub fn pause(self: &Arc<Self>, classes: Vec<EventClass>) -> PauseGuard {
        for out in &classes {
            let paused = match out {
                EventClass::Fdb => attach_filter(self.route_socket.as_fd(), self.own_ports, false),
                EventClass::PeerEntries => {
                    PEER_ENTRY_GROUPS.into_iter().try_for_each(|group| self.route_socket.drop_membership(group))
                }
                EventClass::Rules(foreign_generation) => {
                    // Keep an earlier number that was not taken yet: changes since then must be found.
                    self.missed.lock().foreign_generation.get_or_insert(*foreign_generation);
                    self.nft_socket.drop_membership(NFNLGRP_NFTABLES)
                }
            };
            if let Err(error) = paused {
                tracing::debug!(%error, ?out, "cannot pause events");
            }
        }
        PauseGuard { subscriptions: Arc::clone(self), classes }
    }
}

/// Pauses some of the monitor's events while it lives.
pub(super) struct PauseGuard {
    subscriptions: Arc<EventSubscriptions>,
    classes: Vec<EventClass>,
}

impl Drop for PauseGuard {
    fn drop(&mut self) {
        let EventSubscriptions { route_socket, nft_socket, own_ports, missed: queue } = &*self.subscriptions;
        let mut missed = queue.lock();
        for out in &self.classes {
            let (resumed, flag) = match out {
                EventClass::Fdb => (attach_filter(route_socket.as_fd(), *own_ports, true), &mut missed.fdb),
                EventClass::PeerEntries => (join_groups(route_socket, PEER_ENTRY_GROUPS), &mut missed.peer_entries),
                EventClass::Rules(_) => (join_groups(nft_socket, [NFNLGRP_NFTABLES]), &mut missed.rules),
            };
            *flag = true;
            if let Err(error) = resumed {
                // Unexpected: the same calls succeeded before. The periodic resync finds later changes.
                tracing::error!(%error, ?out, "cannot resume netlink events; relying on periodic resync");
            }
        }
        drop(missed);
        queue.notify.notify_one();
    }
}

/// Duplicates the descriptor of a socket.
fn duplicate_socket(socket: &Socket) -> io::Result<Socket> {
    let descriptor = socket.as_fd().try_clone_to_owned()?;
    // SAFETY: the descriptor is a netlink socket's, and this is its only owner.
    Ok(unsafe { Socket::from_raw_fd(descriptor.into_raw_fd()) })
}

/// Joins multicast groups.
pub(super) fn join_groups(socket: &Socket, groups: impl IntoIterator<Item = u32>) -> io::Result<()> {
    groups.into_iter().try_for_each(|group| match socket.add_membership(group) {
        // RTNLGRP_NEXTHOP is unknown to kernels without next-hop objects.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    })
}

/// Attaches a filter that drops messages whose `nlmsg_pid` is one of ours, and FDB events unless `with_fdb`. The kernel runs this
/// classic BPF program (`linux/filter.h`) on each message before it is queued.
pub(super) fn attach_filter(socket: BorrowedFd<'_>, own_ports: [u32; OWN_SOCKETS], with_fdb: bool) -> io::Result<()> {
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
    let family = if with_fdb { u32::MAX } else { AF_BRIDGE.into() };
    let mut program = [
        step(LOAD, 0, 0, PORT),
        step(JUMP_IF_EQUAL, 8, 0, loaded(own_ports[0])),
        step(JUMP_IF_EQUAL, 7, 0, loaded(own_ports[1])),
        step(JUMP_IF_EQUAL, 6, 0, loaded(own_ports[2])),
        step(LOAD_BYTE, 0, 0, FAMILY),
        // Link messages have a family at the same offset, AF_BRIDGE in those of bridges about their ports: so the type is checked
        // too.
        step(JUMP_IF_EQUAL, 0, 3, family),
        step(LOAD_HALF, 0, 0, TYPE),
        step(JUMP_IF_EQUAL, 2, 0, loaded_half(libc::RTM_NEWNEIGH)),
        step(JUMP_IF_EQUAL, 1, 0, loaded_half(libc::RTM_DELNEIGH)),
        step(RETURN, 0, 0, u32::MAX),
        step(RETURN, 0, 0, 0),
    ];
    let filter = libc::sock_fprog { len: 11, filter: program.as_mut_ptr() };
    let length = libc::socklen_t::try_from(size_of::<libc::sock_fprog>()).unwrap_or_default();
    // SAFETY: the program and its description live until the call returns; the kernel copies both (sk_attach_filter in
    // net/core/filter.c).
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, (&raw const filter).cast(), length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
