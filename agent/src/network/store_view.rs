//! The store as a network sees it: configuration, leases, own lease, connection; and how long the own lease is valid.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::event::{Connection, OwnLease, StoreEvent};
use crate::model::network::ConfigErrors;
use crate::model::{NetworkConfig, NetworkRecord, Vni};
use crate::plan::backend;
use crate::plan::lease_table::{LeaseKey, LeaseTable};

/// What has to be planned again.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    /// The selection of the external interface.
    pub(super) underlay: bool,
    /// This host's own entries.
    pub(super) host: bool,
    /// The entries of all peers.
    pub(super) all_leases: bool,
    /// The entries of the peers with these leases.
    pub(super) leases: BTreeSet<LeaseKey>,
}

/// State of the store.
#[derive(Debug)]
pub(super) struct StoreView {
    /// Whether the store answers.
    pub(super) connection: Connection,
    /// The last valid record.
    pub(super) record: Option<NetworkRecord>,
    /// Whether there is no record now.
    pub(super) config_missing: bool,
    /// The errors of the record now, if it is invalid.
    pub(super) config_errors: Option<ConfigErrors>,
    /// Whether all leases were read once.
    pub(super) has_snapshot: bool,
    /// All leases.
    pub(super) leases: LeaseTable,
    /// This host's lease.
    pub(super) own_lease: OwnLease,
    /// Addresses of the store's servers.
    pub(super) servers: BTreeSet<IpAddr>,
    lease_ttl: Duration,
    /// Time at which the own lease expires unless the store answers again; `None` while it answers.
    lease_expires_at: Option<Instant>,
    /// `lease_expires_at` has passed: another host may have the subnet by now.
    lease_expired: bool,
    config_changed: bool,
    record_changed: bool,
}

impl StoreView {
    /// The view before the first event.
    pub(super) fn new(lease_ttl: Duration) -> StoreView {
        StoreView {
            connection: Connection::Down { error: "not connected yet".to_owned() },
            record: None,
            config_missing: false,
            config_errors: None,
            has_snapshot: false,
            leases: LeaseTable::default(),
            own_lease: OwnLease::NotHeld { reason: "not requested yet".to_owned() },
            servers: BTreeSet::new(),
            lease_ttl,
            lease_expires_at: None,
            lease_expired: false,
            config_changed: false,
            record_changed: false,
        }
    }

    /// Folds an event, and marks what has to be planned again.
    pub(super) fn fold(&mut self, event: StoreEvent, now: Instant, dirty: &mut Dirty) {
        match event {
            StoreEvent::Config(None) => {
                self.config_missing = true;
                self.config_errors = None;
            }
            StoreEvent::Config(Some(Err(errors))) => {
                tracing::error!(%errors, "invalid network configuration in etcd: {}", match self.record {
                    Some(_) => "keeping the last valid one",
                    None => "waiting for a valid one",
                });
                self.config_missing = false;
                self.config_errors = Some(errors);
            }
            StoreEvent::Config(Some(Ok(record))) => {
                self.config_missing = false;
                self.config_errors = None;
                let config = &record.config;
                if self.config() != Some(config) {
                    let ranges = config.pools.iter().map(|(_, pool)| pool.network.to_string()).collect::<Vec<_>>().join(" ");
                    let tunnel = backend::of(config).tunnel();
                    let (vni, port) = (tunnel.and_then(|tunnel| tunnel.vni).map(Vni::get), tunnel.map(|tunnel| tunnel.port));
                    tracing::info!(network = ranges, vni, port, "network configured");
                    self.config_changed = true;
                }
                if self.record.as_ref() != Some(&record) {
                    self.record = Some(record);
                    self.record_changed = true;
                    dirty.host = true;
                }
            }
            StoreEvent::Snapshot(entries) => {
                let (begun, leases) = (Instant::now(), entries.len());
                match self.leases.replace(entries) {
                    Some(affected) => dirty.leases.extend(affected),
                    None => dirty.all_leases = true,
                }
                tracing::debug!(leases, ms = begun.elapsed().as_secs_f64() * 1e3, "leases classified");
                dirty.host |= !self.has_snapshot;
                self.has_snapshot = true;
            }
            StoreEvent::Upsert(entry) => {
                if let (Connection::Up { position }, Ok(record)) = (&mut self.connection, &entry.value) {
                    *position = record.changed.max(*position);
                }
                dirty.leases.extend(self.leases.upsert(entry));
            }
            StoreEvent::Remove { key } => dirty.leases.extend(self.leases.remove(&key)),
            StoreEvent::Own(own) => {
                if let (OwnLease::Held(old), OwnLease::Held(new)) = (&self.own_lease, &own)
                    && old.subnet != new.subnet
                {
                    tracing::error!(old = %old.subnet, new = %new.subnet, "this host's subnet changed: restart its containers");
                }
                self.own_lease = own;
                dirty.host = true;
            }
            StoreEvent::Connection(connection) => self.fold_connection(connection, now),
            StoreEvent::Servers(servers) => {
                self.servers = servers;
                dirty.host = true;
            }
        }
    }

    /// Folds the state of the store's connection. The lease's time starts when the store stops answering.
    fn fold_connection(&mut self, connection: Connection, now: Instant) {
        if matches!(connection, Connection::Up { .. }) {
            self.lease_expires_at = None;
            self.lease_expired = false;
        } else if self.is_connected() {
            self.lease_expires_at = Some(now + self.lease_ttl);
        }
        self.connection = connection;
    }

    /// Whether the store answers.
    pub(super) fn is_connected(&self) -> bool {
        matches!(self.connection, Connection::Up { .. })
    }

    /// The last valid configuration.
    pub(super) fn config(&self) -> Option<&NetworkConfig> {
        self.record.as_ref().map(|record| &record.config)
    }

    /// The record, if it is new since the last call.
    pub(super) fn take_new_record(&mut self) -> Option<&NetworkRecord> {
        self.record.as_ref().filter(|_| std::mem::take(&mut self.record_changed))
    }

    /// Whether there is a new configuration since the last call.
    pub(super) fn take_config_changed(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    /// Time at which the own lease expires unless the store answers again.
    pub(super) fn lease_expires_at(&self) -> Option<Instant> {
        self.lease_expires_at
    }

    /// Marks the lease as expired once its time has passed. Returns whether it has just expired.
    pub(super) fn check_lease_expiry(&mut self, now: Instant) -> bool {
        let expired = self.lease_expires_at.is_some_and(|expiry| now >= expiry);
        if expired {
            self.lease_expires_at = None;
            self.lease_expired = true;
            if self.lease_can_expire() {
                tracing::error!("etcd outage exceeds this host's lease TTL: another host may get its subnet");
            }
        }
        expired
    }

    /// Whether the own lease can expire; a reservation cannot.
    fn lease_can_expire(&self) -> bool {
        matches!(&self.own_lease, OwnLease::Held(held) if held.expiry.is_some())
    }

    /// Whether the own lease may have expired because of an outage of the store.
    pub(super) fn lease_may_have_expired(&self) -> bool {
        self.lease_expired && self.lease_can_expire()
    }

    /// Whether this host holds its lease. While the store does not answer, it counts as held until it can have expired.
    pub(super) fn holds_lease(&self) -> bool {
        matches!(self.own_lease, OwnLease::Held(_)) && !self.lease_may_have_expired()
    }
}
