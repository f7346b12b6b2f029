//! What the monitor does not listen to while many entries are written: to wake a reader for each, or only to write a message for it, costs the kernel as
//! much as the entry. What others did meanwhile is found afterwards: the monitor is told, and looks.
//!
//! | kept out | how | afterwards |
//! | --- | --- | --- |
//! | FDB entries | by the filter: other neighbours are told in the same group | the FDB is read and compared |
//! | all of peers' entries, while most of them go | by leaving their groups: nobody to tell | all is read |
//! | rules and elements | by leaving the group of nf_tables | they are read where others made a transaction, which their number tells |

use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netlink_sys::Socket;
use tokio::sync::Notify;

use super::monitor::{OWN_SOCKETS, attach_filter, join_groups};
use super::nft::NFNLGRP_NFTABLES;
use super::uapi::PEER_ENTRY_GROUPS;

/// What is kept out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EventClass {
    Fdb,
    PeerEntries,
    /// With the number of others' transactions until now.
    Rules(u32),
}

/// What the monitor has to look at, because it was not listened to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct MissedEvents {
    pub fdb: bool,
    pub peer_entries: bool,
    pub rules: bool,
    /// How many transactions others had made when rules began not to be heard. Nothing where that was taken already.
    pub foreign_generation: Option<u32>,
}

/// Tells the monitor what it missed.
#[derive(Debug, Default)]
pub(super) struct MissedEventsQueue {
    missed: Mutex<MissedEvents>,
    notify: Notify,
}

impl MissedEventsQueue {
    /// Waits until something was missed. Cancel-safe.
    pub async fn wait(&self) {
        self.notify.notified().await;
    }

    /// What was missed until now.
    pub fn take(&self) -> MissedEvents {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, MissedEvents> {
        self.missed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the monitor's sockets let through, for the one who writes.
pub(super) struct EventSubscriptions {
    route_socket: Socket,
    nft_socket: Socket,
    own_ports: [u32; OWN_SOCKETS],
    missed: Arc<MissedEventsQueue>,
}

impl EventSubscriptions {
    /// Of the two sockets, whose owners keep them.
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

    /// Keeps these out, at least one, until the answer is dropped; the monitor then looks for itself.
    pub fn pause(self: &Arc<Self>, classes: Vec<EventClass>) -> PauseGuard {
        for out in &classes {
            let paused = match out {
                EventClass::Fdb => attach_filter(self.route_socket.as_fd(), self.own_ports, false),
                EventClass::PeerEntries => {
                    PEER_ENTRY_GROUPS.into_iter().try_for_each(|group| self.route_socket.drop_membership(group))
                }
                EventClass::Rules(others) => {
                    // Unless an earlier number was not taken yet: what came after it is to be found.
                    self.missed.lock().foreign_generation.get_or_insert(*others);
                    self.nft_socket.drop_membership(NFNLGRP_NFTABLES)
                }
            };
            if let Err(error) = paused {
                tracing::debug!(%error, ?out, "events cannot be kept out");
            }
        }
        PauseGuard { subscriptions: Arc::clone(self), classes }
    }
}

/// While this lives the monitor does not hear about some entries.
pub(super) struct PauseGuard {
    subscriptions: Arc<EventSubscriptions>,
    classes: Vec<EventClass>,
}

impl Drop for PauseGuard {
    fn drop(&mut self) {
        let EventSubscriptions { route_socket: entries, nft_socket: rules, own_ports: own, missed: unheard } =
            &*self.subscriptions;
        let mut missed = unheard.lock();
        for out in &self.classes {
            let (resumed, flag) = match out {
                EventClass::Fdb => (attach_filter(entries.as_fd(), *own, true), &mut missed.fdb),
                EventClass::PeerEntries => (join_groups(entries, PEER_ENTRY_GROUPS), &mut missed.peer_entries),
                EventClass::Rules(_) => (join_groups(rules, [NFNLGRP_NFTABLES]), &mut missed.rules),
            };
            *flag = true;
            if let Err(error) = resumed {
                // Cannot be: the same was done before. The resync finds what is not heard.
                tracing::error!(%error, ?out, "changes are not heard any more");
            }
        }
        drop(missed);
        unheard.notify.notify_one();
    }
}

/// Another descriptor of the same socket.
fn duplicate_socket(socket: &Socket) -> io::Result<Socket> {
    let descriptor = socket.as_fd().try_clone_to_owned()?;
    // SAFETY: the descriptor is a netlink socket's, and this is its only owner.
    Ok(unsafe { Socket::from_raw_fd(descriptor.into_raw_fd()) })
}
