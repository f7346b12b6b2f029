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

use super::monitor::{OWN, attach_filter, join};
use super::nft::NFNLGRP_NFTABLES;
use super::uapi::RTNLGRP_ENTRIES;

/// What is kept out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Out {
    Fdb,
    Entries,
    /// With the number of others' transactions until now.
    Rules(u32),
}

/// What the monitor has to look at, because it was not listened to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Missed {
    pub fdb: bool,
    pub entries: bool,
    pub rules: bool,
    /// How many transactions others had made when rules began not to be heard. Nothing where that was taken already.
    pub others: Option<u32>,
}

/// Tells the monitor what it missed.
#[derive(Debug, Default)]
pub(super) struct Unheard {
    missed: Mutex<Missed>,
    told: Notify,
}

impl Unheard {
    /// Waits until something was missed. Cancel-safe.
    pub async fn told(&self) {
        self.told.notified().await;
    }

    /// What was missed until now.
    pub fn take(&self) -> Missed {
        std::mem::take(&mut self.locked())
    }

    fn locked(&self) -> MutexGuard<'_, Missed> {
        self.missed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the monitor's sockets let through, for the one who writes.
pub(super) struct Ears {
    entries: Socket,
    rules: Socket,
    own: [u32; OWN],
    unheard: Arc<Unheard>,
}

impl Ears {
    /// Of the two sockets, whose owners keep them.
    pub fn of(entries: &Socket, rules: &Socket, own: [u32; OWN], unheard: Arc<Unheard>) -> io::Result<Ears> {
        Ok(Ears { entries: shared(entries)?, rules: shared(rules)?, own, unheard })
    }

    /// Keeps these out, at least one, until the answer is dropped; the monitor then looks for itself.
    pub fn without(self: &Arc<Self>, out: Vec<Out>) -> Covered {
        for out in &out {
            let kept_out = match out {
                Out::Fdb => attach_filter(self.entries.as_fd(), self.own, false),
                Out::Entries => RTNLGRP_ENTRIES.into_iter().try_for_each(|group| self.entries.drop_membership(group)),
                Out::Rules(others) => {
                    // Unless an earlier number was not taken yet: what came after it is to be found.
                    self.unheard.locked().others.get_or_insert(*others);
                    self.rules.drop_membership(NFNLGRP_NFTABLES)
                }
            };
            if let Err(error) = kept_out {
                tracing::debug!(%error, ?out, "events cannot be kept out");
            }
        }
        Covered { ears: Arc::clone(self), out }
    }
}

/// While this lives the monitor does not hear about some entries.
pub(super) struct Covered {
    ears: Arc<Ears>,
    out: Vec<Out>,
}

impl Drop for Covered {
    fn drop(&mut self) {
        let Ears { entries, rules, own, unheard } = &*self.ears;
        let mut missed = unheard.locked();
        for out in &self.out {
            let (heard_again, those) = match out {
                Out::Fdb => (attach_filter(entries.as_fd(), *own, true), &mut missed.fdb),
                Out::Entries => (join(entries, RTNLGRP_ENTRIES), &mut missed.entries),
                Out::Rules(_) => (join(rules, [NFNLGRP_NFTABLES]), &mut missed.rules),
            };
            *those = true;
            if let Err(error) = heard_again {
                // Cannot be: the same was done before. The resync finds what is not heard.
                tracing::error!(%error, ?out, "changes are not heard any more");
            }
        }
        drop(missed);
        unheard.told.notify_one();
    }
}

/// Another descriptor of the same socket.
fn shared(socket: &Socket) -> io::Result<Socket> {
    let descriptor = socket.as_fd().try_clone_to_owned()?;
    // SAFETY: the descriptor is a netlink socket's, and this is its only owner.
    Ok(unsafe { Socket::from_raw_fd(descriptor.into_raw_fd()) })
}
