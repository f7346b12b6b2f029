//! Whether the agent is ready, and how long its lease counts while the store does not answer.

use std::time::Instant;

use super::{Memory, Reconciler};
use crate::model::event::{Connection, OwnLease};
use crate::plan::DataPath;

impl<D: DataPath, M: Memory> Reconciler<D, M> {
    /// Takes in whether the store answers. The lease's time runs from the moment at which it stopped to.
    pub(super) fn fold_connection(&mut self, connection: Connection) {
        let up = matches!(connection, Connection::Up { .. });
        self.metrics.set_store_connected(up);
        if up {
            self.lease_ends = None;
            self.lease_over = false;
        } else if matches!(self.connection, Connection::Up { .. }) {
            self.lease_ends = Some(Instant::now() + self.settings.lease_lasts);
        }
        self.connection = connection;
    }

    /// Notices that the lease's time is over.
    pub(super) fn look_at_lease(&mut self, now: Instant) {
        if self.lease_ends.is_some_and(|end| now >= end) {
            self.lease_ends = None;
            self.lease_over = true;
            self.changed = true;
            if self.held_for_a_time() {
                tracing::error!("etcd has not answered for as long as this host's lease lasts: another host may get its subnet");
            }
        }
    }

    /// Whether the own lease is one that expires.
    pub(super) fn held_for_a_time(&self) -> bool {
        matches!(&self.own, OwnLease::Held(held) if held.etcd_lease.is_some())
    }

    /// Whether the own lease is held: for certain while the store answers, and for as long as it lasts after that.
    pub(super) fn holds_lease(&self) -> bool {
        matches!(self.own, OwnLease::Held(_)) && !(self.lease_over && self.held_for_a_time())
    }

    /// Snapshot seen, own lease held, nothing failed pending.
    pub(super) fn is_ready(&self) -> bool {
        self.snapshot_seen && self.host.is_some() && self.holds_lease() && self.dump_error.is_none() && self.repairs.is_empty()
    }
}
