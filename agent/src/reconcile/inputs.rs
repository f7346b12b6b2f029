//! Folds events into the reconciler's state, marks dirty entries and rebuilds desired state.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use super::apply::{is_bulk, merge};
use super::{BULK_THRESHOLD, Channels, MAX_LOG_LINES, Reconciler, StateStore, UNDERLAY_DEBOUNCE};
use crate::metrics::EventSource;
use crate::model::event::{Connection, LeaseRequest, OwnLease, StoreEvent};
use crate::model::{Device, Family, NetworkConfig, PerFamily, RejectedLease};
use crate::plan::desired::HostSpec;
use crate::plan::diff::is_satisfied;
use crate::plan::lease_table::{Classification, LeaseKey, LocalHost};
use crate::plan::state::{State, Value};
use crate::plan::{DataPath, KernelEvent, Key, LinkKind, Op};

impl<D: DataPath, M: StateStore> Reconciler<D, M> {
    /// Names of the host ends of the endpoints' veth pairs.
    pub(super) fn ports(&self) -> Vec<String> {
        self.endpoints.iter().filter_map(|endpoint| endpoint.port.as_ref()).map(|port| port.host_interface.clone()).collect()
    }

    pub(super) fn fold_store(&mut self, event: StoreEvent) {
        self.changed = true;
        self.metrics.count_events(EventSource::Store, 1);
        match event {
            StoreEvent::Config(None) => {
                self.config_missing = true;
                self.config_errors = None;
            }
            StoreEvent::Config(Some(Err(errors))) => {
                tracing::error!(%errors, "invalid network configuration in etcd: {}", match self.network {
                    Some(_) => "keeping the last valid one",
                    None => "waiting for a valid one",
                });
                self.config_missing = false;
                self.config_errors = Some(errors);
            }
            StoreEvent::Config(Some(Ok(network))) => {
                self.config_missing = false;
                self.config_errors = None;
                if self.network.as_ref() != Some(&network) {
                    tracing::info!(network = %describe(&network), vni = network.vxlan.vni.get(), port = network.vxlan.port, "network configured");
                    self.network = Some(network);
                    // The families that the external interface has to serve may have changed.
                    self.underlay_due = Some(Instant::now());
                    self.host_dirty = true;
                }
            }
            StoreEvent::Snapshot(entries) => {
                let (begun, leases) = (Instant::now(), entries.len());
                match self.leases.replace(entries) {
                    Some(affected) => self.dirty_leases.extend(affected),
                    None => self.all_leases_dirty = true,
                }
                tracing::debug!(leases, ms = begun.elapsed().as_secs_f64() * 1e3, "leases classified");
                self.has_snapshot = true;
            }
            StoreEvent::Upsert(entry) => {
                if let (Connection::Up { revision }, Ok(record)) = (&mut self.connection, &entry.value) {
                    *revision = record.mod_revision.max(*revision);
                }
                let affected = self.leases.upsert(entry);
                self.dirty_leases.extend(affected);
            }
            StoreEvent::Remove { key } => {
                let affected = self.leases.remove(&key);
                self.dirty_leases.extend(affected);
            }
            StoreEvent::Own(own) => {
                if let (OwnLease::Held(old), OwnLease::Held(new)) = (&self.own_lease, &own)
                    && old.subnet != new.subnet
                {
                    tracing::error!(old = %old.subnet, new = %new.subnet, "this host's subnet changed: restart its containers");
                }
                self.own_lease = own;
                self.host_dirty = true;
            }
            StoreEvent::Connection(connection) => self.fold_connection(connection),
            StoreEvent::Servers(servers) => {
                self.servers = servers;
                self.host_dirty = true;
            }
        }
    }

    pub(super) fn fold_kernel(&mut self, event: KernelEvent) {
        self.metrics
            .count_events(EventSource::Kernel, if let KernelEvent::Changed(entries) = &event { entries.len() } else { 1 });
        match event {
            KernelEvent::Changed(entries) => {
                let mut lines = 0;
                for (key, value) in entries {
                    if let Key::Link(name) = key {
                        self.changed_links.insert(name);
                    } else if self.fold_change(key, value, lines < MAX_LOG_LINES) {
                        lines += 1;
                    }
                }
                if lines > MAX_LOG_LINES {
                    tracing::warn!(entries = lines, "drift: restoring entries changed by another process");
                }
            }
            KernelEvent::ResyncNeeded { reason } => {
                tracing::debug!(reason, "kernel state in doubt");
                self.resync_reason = Some(reason);
            }
            KernelEvent::HostNetworkChanged => {
                self.underlay_due.get_or_insert((Instant::now() + UNDERLAY_DEBOUNCE).max(self.underlay_not_before));
            }
        }
    }

    /// Reads the links named by link events. An event may be older than our own last change of the link, so it is no evidence of
    /// drift.
    pub(super) async fn reread_links(&mut self) {
        let changed = std::mem::take(&mut self.changed_links);
        if changed.len() > BULK_THRESHOLD {
            self.resync_reason.get_or_insert("many links changed");
            return;
        }
        // The dump that is due reads all links.
        if self.resync_reason.is_some() && Instant::now() >= self.dump_not_before {
            return;
        }
        for (line, name) in changed.into_iter().enumerate() {
            match self.data_path.get_link(&name).await {
                Ok(link) => {
                    self.fold_change(Key::Link(name), link.map(|link| Value::Link(Box::new(link))), line < MAX_LOG_LINES);
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot read a link of ours");
                    self.resync_reason = Some("a link could not be read");
                }
            }
        }
    }

    /// Folds a changed entry. Returns whether the change is drift.
    fn fold_change(&mut self, key: Key, value: Option<Value>, log: bool) -> bool {
        let was_in_sync = self.is_in_sync(&key);
        match value {
            Some(value) => self.actual.insert(key.clone(), value),
            None => self.actual.remove(&key),
        };
        if self.host.is_none() || self.is_in_sync(&key) {
            return false;
        }
        if let Key::Link(name) = &key {
            self.port_lost |= !self.actual.contains_key(&key) && self.ports().iter().any(|port| **port == **name);
        }
        self.dirty_keys.insert(key.clone());
        if was_in_sync {
            self.record_drift(&key, log);
        }
        was_in_sync
    }

    fn record_drift(&mut self, key: &Key, log: bool) {
        if log {
            let show = |value: Option<&Value>| value.map_or_else(|| "absent".to_owned(), ToString::to_string);
            tracing::warn!(
                entry = %key,
                found = show(self.actual.get(key)),
                wanted = show(self.desired.get(key)),
                "drift: restoring an entry changed by another process"
            );
        }
        self.retries.record_drift(key);
        self.metrics.drift_repaired(key.kind());
        self.changed = true;
    }

    /// Records drift after a dump: entries that were in sync before it and are not now.
    pub(super) fn record_dump_drift(&mut self, before: &State, batch: &[Op]) {
        let drifted: Vec<Key> = batch
            .iter()
            .map(Op::key)
            .filter(|key| is_entry_in_sync(self.desired.get(key), before.get(key)))
            .filter(|key| !self.is_in_sync(key))
            .cloned()
            .collect();
        for (line, key) in drifted.iter().enumerate() {
            self.record_drift(key, line < MAX_LOG_LINES);
        }
        if drifted.len() > MAX_LOG_LINES {
            tracing::warn!(entries = drifted.len(), "drift: restoring entries changed by another process");
        }
    }

    /// Drops pending retries of entries that are in sync by now.
    pub(super) fn prune_satisfied(&mut self) {
        let (desired, actual) = (&self.desired, &self.actual);
        self.retries.prune_satisfied(|key| is_entry_in_sync(desired.get(key), actual.get(key)));
    }

    fn is_in_sync(&self, key: &Key) -> bool {
        is_entry_in_sync(self.desired.get(key), self.actual.get(key))
    }

    /// Rebuilds desired state: the host's entries if the host changed, and the entries of the peers whose leases changed.
    pub(super) fn rebuild(&mut self, channels: &Channels) {
        if std::mem::take(&mut self.host_dirty) {
            self.request_lease(channels);
            if let Some(host) = self.desired_host() {
                match &self.host {
                    Some(was) if *was == host => {}
                    Some(was) if was.has_same_peer_entries(&host) => {
                        let (was, entries) = was.changed_entries(&host);
                        self.rebuild_local(host, was, entries);
                    }
                    _ => self.rebuild_all(host),
                }
            }
        }
        let leases = std::mem::take(&mut self.dirty_leases);
        if self.host.is_none() {
            // Leases are classified once there is a host: `rebuild_all` classifies the whole lease table.
            return;
        }
        let has_classified = !self.peers.is_empty() || !self.rejected.is_empty();
        if (self.all_leases_dirty && has_classified) || is_bulk(self.peers.len(), leases.len()) {
            if let Some(host) = self.host.clone() {
                self.rebuild_all(host);
            }
            return;
        }
        let mut rejected = BTreeMap::new();
        for key in &leases {
            if let Some(peer) = self.peers.remove(key) {
                self.remove_peer(&peer);
            }
            rejected.extend(self.rejected.remove_entry(key));
        }
        if std::mem::take(&mut self.all_leases_dirty) {
            self.accept_all_leases(&rejected);
        } else {
            self.accept_leases(leases, &rejected);
        }
    }

    /// Desired state of this host; `None` while an input is missing. After the loss of the lease its subnet stays in use.
    fn desired_host(&mut self) -> Option<HostSpec> {
        let underlay = self.underlay.clone()?;
        let network = self.network.as_ref()?.restricted_to(underlay.local.families());
        let subnet = match &self.own_lease {
            OwnLease::Held(held) => held.subnet,
            OwnLease::NotHeld { .. } => self.host.as_ref()?.subnet,
        };
        if !self.has_snapshot {
            return None;
        }
        let required = self.inventory.required_addresses().chain(self.servers.iter().copied());
        let leasable =
            |address: &IpAddr| network.pools.get(Family::of(*address)).is_some_and(|pool| pool.covers_address(*address));
        let reserved = required.filter(leasable).collect();
        let vtep = self.vtep(&network);
        let bridge_mac = self.device_mac(Device::bridge(network.vxlan.vni));
        Some(HostSpec {
            subnet,
            vtep,
            bridge_mac,
            masquerade: self.settings.masquerade,
            tx_checksum: self.settings.tx_checksum,
            docker: self.settings.docker,
            nexthop_objects: self.settings.nexthop_objects,
            ports: self.endpoints.iter().filter(|endpoint| endpoint.port.is_some()).cloned().collect(),
            forward_drops: self.inventory.forward_drops.clone(),
            reserved,
            accept_ra_interfaces: self.accept_ra_interfaces(&underlay),
            uplinks: self.inventory.uplinks(underlay.index),
            network,
            underlay,
        })
    }

    fn vtep(&mut self, network: &NetworkConfig) -> PerFamily<crate::model::Mac> {
        let families: Vec<Family> = network.families().collect();
        families.into_iter().map(|family| (family, self.device_mac(Device::vxlan(family, network.vxlan.vni)))).collect()
    }

    fn device_mac(&mut self, device: Device) -> crate::model::Mac {
        let found = match self.actual.get(&Key::Link(device.name().into())) {
            Some(Value::Link(link)) if !matches!(link.kind, LinkKind::Foreign { .. }) => link.mac,
            _ => None,
        };
        self.state_store.device_mac(device, found)
    }

    /// Sends the lease request of this host to the store.
    fn request_lease(&mut self, channels: &Channels) {
        let (Some(network), Some(underlay)) = (self.network.clone(), self.underlay.clone()) else { return };
        let preferred = match &self.own_lease {
            OwnLease::Held(held) => Some(held.subnet),
            OwnLease::NotHeld { .. } => {
                self.host.as_ref().map(|host| host.subnet).or_else(|| self.state_store.preferred_subnet())
            }
        };
        let vtep = self.vtep(&network.restricted_to(underlay.local.families()));
        let request = LeaseRequest { node: self.settings.node.clone(), public_ip: underlay.public_ip, vtep, preferred, network };
        channels.lease_request.send_if_modified(|was| {
            let new = was.as_ref() != Some(&request);
            if new {
                *was = Some(request);
            }
            new
        });
    }

    /// Replaces the host's own entries (such as those of a port) and keeps the peers' entries.
    fn rebuild_local(&mut self, host: HostSpec, was: State, entries: State) {
        for key in was.into_keys().filter(|key| !entries.contains_key(key)) {
            self.desired.remove(&key);
            self.retries.remove(&key);
            self.dirty_keys.insert(key);
        }
        for (key, value) in entries {
            if self.desired.get(&key) != Some(&value) {
                self.retries.remove(&key);
                self.dirty_keys.insert(key.clone());
                self.desired.insert(key, value);
            }
        }
        self.host = Some(host);
        self.changed = true;
    }

    fn rebuild_all(&mut self, host: HostSpec) {
        self.local_host = Some(LocalHost { subnet: host.subnet, public_ip: host.underlay.public_ip, vtep: host.vtep });
        self.desired = host.entries();
        self.host = Some(host);
        self.peers.clear();
        let rejected = std::mem::take(&mut self.rejected);
        self.accept_all_leases(&rejected);
        self.dirty_leases.clear();
        self.all_leases_dirty = false;
        self.retries.clear();
        self.all_dirty = true;
        self.changed = true;
    }

    /// Classifies some leases and adds the peers of accepted ones to desired state.
    fn accept_leases(&mut self, leases: BTreeSet<LeaseKey>, rejected_before: &BTreeMap<LeaseKey, RejectedLease>) {
        let Some(host) = &self.host else { return };
        let classify = |key: LeaseKey| {
            let classification = self.leases.classify(&key, &host.network, self.local_host.as_ref());
            classification.map(|standing| (key, standing))
        };
        let classified = leases.into_iter().filter_map(classify).collect();
        self.apply_classifications(classified, rejected_before);
    }

    /// Classifies all leases and adds the peers of accepted ones to desired state.
    fn accept_all_leases(&mut self, rejected_before: &BTreeMap<LeaseKey, RejectedLease>) {
        let Some(host) = &self.host else { return };
        let classifications = self.leases.classify_all(&host.network, self.local_host.as_ref());
        let mut classified: Vec<_> = classifications.map(|(key, standing)| (key.clone(), standing)).collect();
        // Leases sorted by address produce entries that are mostly sorted.
        classified.sort_by_cached_key(|(_, standing)| match standing {
            Classification::Accepted(peer) => Some(peer.remote_subnets.map(|_, reach| reach.subnet)),
            Classification::Own | Classification::Rejected(_) => None,
        });
        self.nexthop_ids.reserve(classified.len());
        self.apply_classifications(classified, rejected_before);
    }

    /// Records accepted peers and rejected leases. A rejection is logged unless it is unchanged.
    fn apply_classifications(
        &mut self,
        classified: Vec<(LeaseKey, Classification)>,
        rejected_before: &BTreeMap<LeaseKey, RejectedLease>,
    ) {
        let Some(host) = &self.host else { return };
        let now = Instant::now();
        let mut entries = Vec::with_capacity(4 * classified.len());
        let mut peers = Vec::with_capacity(classified.len());
        for (key, standing) in classified {
            match standing {
                Classification::Own => {}
                Classification::Accepted(peer) => {
                    entries.extend(host.peer_entries(&peer, &mut self.nexthop_ids));
                    peers.push((key, peer));
                }
                Classification::Rejected(refusal) => {
                    if rejected_before.get(&key) != Some(&refusal) {
                        self.metrics.count_rejected_value(refusal.kind.as_str());
                        if self.rejection_log.allows(now) {
                            tracing::warn!(key = refusal.key, reason = refusal.kind.as_str(), "{refusal}");
                        }
                    }
                    self.rejected.insert(key, refusal);
                }
            }
        }
        if let Some(leases) = self.rejection_log.take_suppressed(now) {
            tracing::warn!(leases, "more leases ignored; list them with `overlayctl subnets`");
        }
        merge(&mut self.peers, peers);
        self.add_desired(entries);
    }

    /// Adds entries to desired state.
    fn add_desired(&mut self, entries: Vec<(Key, Value)>) {
        for (key, _) in &entries {
            self.retries.remove(key);
        }
        if is_bulk(self.desired.len(), entries.len()) {
            self.all_dirty = true;
        } else {
            self.dirty_keys.extend(entries.iter().map(|(key, _)| key.clone()));
        }
        merge(&mut self.desired, entries);
    }

    /// Removes a peer's entries from desired state. Entries shared with another peer return when that peer's lease is accepted
    /// again.
    fn remove_peer(&mut self, peer: &crate::model::Peer) {
        let Some(host) = &self.host else { return };
        for (entry, _) in host.peer_entries(peer, &mut self.nexthop_ids) {
            self.desired.remove(&entry);
            self.retries.remove(&entry);
            self.dirty_keys.insert(entry);
        }
    }
}

fn is_entry_in_sync(wanted: Option<&Value>, found: Option<&Value>) -> bool {
    match (wanted, found) {
        (Some(wanted), Some(found)) => is_satisfied(wanted, found),
        (None, None) | (None, Some(Value::Sysctl(_))) => true,
        (None, Some(Value::Link(link))) => matches!(link.kind, LinkKind::Foreign { .. } | LinkKind::Port),
        (None, Some(Value::Route(crate::plan::state::RouteTarget::Foreign))) => true,
        _ => false,
    }
}

fn describe(network: &NetworkConfig) -> String {
    network.pools.iter().map(|(_, pool)| pool.network.to_string()).collect::<Vec<_>>().join(" ")
}
