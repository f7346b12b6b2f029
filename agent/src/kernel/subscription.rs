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
use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netlink_sys::Socket;
use tokio::sync::Notify;

use super::echo_filter::{OWN_SOCKETS, attach_filter};
use super::nft::NFNLGRP_NFTABLES;
use super::uapi::PEER_ENTRY_GROUPS;

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
