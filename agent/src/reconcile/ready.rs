//! Readiness of the agent, and validity of its lease while the store does not answer.

use std::time::Instant;

use super::{Reconciler, StateStore};
use crate::model::event::{Connection, OwnLease};
use crate::plan::DataPath;

impl<D: DataPath, M: StateStore> Reconciler<D, M> {
    /// Folds the state of the store's connection. The lease's time starts when the store stops answering.
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

    /// Marks the lease as expired once its time has passed.
    pub(super) fn check_lease_expiry(&mut self, now: Instant) {
        if self.lease_expires_at.is_some_and(|end| now >= end) {
            self.lease_expires_at = None;
            self.lease_expired = true;
            self.changed = true;
            if self.lease_can_expire() {
                tracing::error!("etcd outage exceeds this host's lease TTL: another host may get its subnet");
            }
        }
    }

    /// Whether the own lease can expire; a reservation cannot.
    pub(super) fn lease_can_expire(&self) -> bool {
        matches!(&self.own_lease, OwnLease::Held(held) if held.etcd_lease.is_some())
    }

    /// Whether this host holds its lease. While the store does not answer, it counts as held until it can have expired.
    pub(super) fn holds_lease(&self) -> bool {
        matches!(self.own_lease, OwnLease::Held(_)) && !(self.lease_expired && self.lease_can_expire())
    }

    /// Whether the snapshot was read, the own lease is held, and no failed entry is pending.
    pub(super) fn is_ready(&self) -> bool {
        self.has_snapshot && self.host.is_some() && self.holds_lease() && self.dump_error.is_none() && self.retries.is_empty()
    }
}
