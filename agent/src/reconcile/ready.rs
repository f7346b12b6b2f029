//! Whether the agent is ready, and how long its lease counts while the store does not answer.

use std::time::Instant;

use super::{Reconciler, StateStore};
use crate::model::event::{Connection, OwnLease};
use crate::plan::DataPath;

impl<D: DataPath, M: StateStore> Reconciler<D, M> {
    /// Takes in whether the store answers. The lease's time runs from the moment at which it stopped to.
    pub(super) fn fold_connection(&mut self, connection: Connection) {
        let up = matches!(connection, Connection::Up { .. });
        self.metrics.set_store_connected(up);
        if up {
            self.lease_expires_at = None;
            self.lease_expired = false;
        } else if matches!(self.connection, Connection::Up { .. }) {
            self.lease_expires_at = Some(Instant::now() + self.settings.lease_ttl);
        }
        self.connection = connection;
    }

    /// Notices that the lease's time is over.
    pub(super) fn check_lease_expiry(&mut self, now: Instant) {
        if self.lease_expires_at.is_some_and(|end| now >= end) {
            self.lease_expires_at = None;
            self.lease_expired = true;
            self.changed = true;
            if self.lease_can_expire() {
                tracing::error!("etcd has not answered for as long as this host's lease lasts: another host may get its subnet");
            }
        }
    }

    /// Whether the own lease is one that expires.
    pub(super) fn lease_can_expire(&self) -> bool {
        matches!(&self.own_lease, OwnLease::Held(held) if held.etcd_lease.is_some())
    }

    /// Whether the own lease is held: for certain while the store answers, and for as long as it lasts after that.
    pub(super) fn holds_lease(&self) -> bool {
        matches!(self.own_lease, OwnLease::Held(_)) && !(self.lease_expired && self.lease_can_expire())
    }

    /// Snapshot seen, own lease held, nothing failed pending.
    pub(super) fn is_ready(&self) -> bool {
        self.has_snapshot && self.host.is_some() && self.holds_lease() && self.dump_error.is_none() && self.retries.is_empty()
    }
}
