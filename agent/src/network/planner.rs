//! Plans a network's desired entries: those of this host, and those of the peers with accepted leases.

use std::collections::{BTreeMap, BTreeSet};
use tokio::time::Instant;

use super::{Dirty, Network, NetworkStateStore};
use crate::metrics::Metrics;
use crate::model::event::OwnLease;
use crate::model::{BackendData, Device, Family, Mac, NetworkConfig, NetworkName, Peer, RejectedLease};
use crate::plan::backend;
use crate::plan::bulk::{is_bulk, merge};
use crate::plan::contribution::{Contribution, EntryChange};
use crate::plan::desired::HostSpec;
use crate::plan::isolation::Scope;
use crate::plan::lease_table::{Classification, LeaseKey, LeaseTable, LocalHost};
use crate::plan::shared::SharedSpec;
use crate::plan::{Key, Value};
use crate::telemetry::rate_limit::LogRateLimit;

/// What is planned, and the change that the reconciler does not have yet.
#[derive(Debug, Default)]
pub(super) struct Planner {
    /// This host; `None` until its first lease is held.
    pub(super) host: Option<HostSpec>,
    /// This host, as far as other leases can conflict with it.
    pub(super) local_host: Option<LocalHost>,
    /// Peers with accepted leases.
    pub(super) peers: BTreeMap<LeaseKey, Peer>,
    /// Rejected leases.
    pub(super) rejected: BTreeMap<LeaseKey, RejectedLease>,
    /// The last contribution that changed `host`.
    pub(super) host_sequence: u64,
    /// The shared input that the reconciler has.
    shared: Option<SharedSpec>,
    pending: Option<EntryChange>,
    /// Number of the last contribution.
    pub(super) sequence: u64,
    rejection_log: LogRateLimit,
}

impl Planner {
    /// The change since the last call, if there is any, for this run of the reconciler.
    pub(super) fn take_contribution(&mut self, network: &NetworkName, run: u64) -> Option<Contribution> {
        let change = self.pending.take()?;
        self.sequence += 1;
        let changed_host = self.host.as_ref().filter(|_| self.host_sequence == self.sequence);
        let shared = changed_host.map(|host| host.shared(Scope::Host)).filter(|shared| self.shared.as_ref() != Some(shared));
        if let Some(shared) = &shared {
            self.shared = Some(shared.clone());
        }
        Some(Contribution { network: network.clone(), run, sequence: self.sequence, shared, change })
    }

    /// Plans this host's entries. If the peers' entries depend on the change, plans these too.
    fn set_host(&mut self, host: HostSpec, leases: &LeaseTable, metrics: &Metrics, dirty: &mut Dirty, now: Instant) {
        match &self.host {
            Some(current) if *current == host => return,
            Some(current) if current.has_same_peer_entries(&host) => {
                let (old_entries, entries) = current.changed_entries(&host, Scope::Host);
                let removed = old_entries.into_keys().filter(|key| !entries.contains_key(key)).collect();
                self.host = Some(host);
                self.update(removed, entries.into_iter().collect());
            }
            _ => self.replan_all(host, leases, metrics, dirty, now),
        }
        self.host_sequence = self.sequence + 1;
    }

    /// Plans everything again, for a reconciler that has nothing of this network.
    pub(super) fn start_over(&mut self, leases: &LeaseTable, metrics: &Metrics, dirty: &mut Dirty, now: Instant) {
        self.shared = None;
        if let Some(host) = self.host.take() {
            self.replan_all(host, leases, metrics, dirty, now);
            self.host_sequence = self.sequence + 1;
        }
    }

    /// Plans the entries of all peers whose leases changed.
    fn plan_leases(&mut self, leases: &LeaseTable, metrics: &Metrics, dirty: &mut Dirty, now: Instant) {
        let changed = std::mem::take(&mut dirty.leases);
        if changed.is_empty() && !dirty.all_leases {
            return;
        }
        let Some(host) = self.host.take() else {
            // Leases are classified once there is a host: `replan_all` classifies the whole lease table.
            return;
        };
        let has_classified = !self.peers.is_empty() || !self.rejected.is_empty();
        if (dirty.all_leases && has_classified) || is_bulk(self.peers.len(), changed.len()) {
            self.replan_all(host, leases, metrics, dirty, now);
            return;
        }
        let mut removed = Vec::new();
        let mut rejected_before = BTreeMap::new();
        for key in &changed {
            // Entries shared with another peer return when that peer's lease is accepted again.
            if let Some(peer) = self.peers.remove(key) {
                removed.extend(host.peer_entries(&peer).into_iter().map(|(key, _)| key));
            }
            rejected_before.extend(self.rejected.remove_entry(key));
        }
        let classified = if std::mem::take(&mut dirty.all_leases) {
            self.classify_all(&host, leases)
        } else {
            self.classify(changed, &host, leases)
        };
        let added = self.record(&host, classified, &rejected_before, metrics, now);
        self.host = Some(host);
        self.update(removed, added);
    }

    fn replan_all(&mut self, host: HostSpec, leases: &LeaseTable, metrics: &Metrics, dirty: &mut Dirty, now: Instant) {
        self.local_host =
            Some(LocalHost { subnet: host.subnet, public_ip: host.underlay.public_ip, endpoints: host.backend_data.endpoints() });
        self.peers.clear();
        let rejected_before = std::mem::take(&mut self.rejected);
        let mut entries: Vec<(Key, Value)> = host.entries(Scope::Host).into_iter().collect();
        let classified = self.classify_all(&host, leases);
        entries.append(&mut self.record(&host, classified, &rejected_before, metrics, now));
        self.host = Some(host);
        self.pending = Some(EntryChange::Replace(entries));
        dirty.leases.clear();
        dirty.all_leases = false;
    }

    fn update(&mut self, mut removed: Vec<Key>, mut added: Vec<(Key, Value)>) {
        match &mut self.pending {
            None => self.pending = Some(EntryChange::Update { removed, added }),
            Some(EntryChange::Update { removed: removed_before, added: added_before }) => {
                removed_before.append(&mut removed);
                added_before.append(&mut added);
            }
            Some(EntryChange::Replace(entries)) => {
                let removed: BTreeSet<Key> = removed.into_iter().collect();
                entries.retain(|(key, _)| !removed.contains(key));
                entries.append(&mut added);
            }
        }
    }

    fn classify(&self, keys: BTreeSet<LeaseKey>, host: &HostSpec, leases: &LeaseTable) -> Vec<(LeaseKey, Classification)> {
        let classify = |key: LeaseKey| {
            let classification = leases.classify(&key, &host.network, self.local_host.as_ref());
            classification.map(|classification| (key, classification))
        };
        keys.into_iter().filter_map(classify).collect()
    }

    fn classify_all(&self, host: &HostSpec, leases: &LeaseTable) -> Vec<(LeaseKey, Classification)> {
        let all = leases.classify_all(&host.network, self.local_host.as_ref());
        let mut classified: Vec<_> = all.map(|(key, classification)| (key.clone(), classification)).collect();
        // Leases sorted by address produce entries that are mostly sorted.
        classified.sort_by_cached_key(|(_, classification)| match classification {
            Classification::Accepted(peer) => Some(peer.remote_subnets.map(|_, remote| remote.subnet)),
            Classification::Own | Classification::Rejected(_) => None,
        });
        classified
    }

    /// Records accepted peers and rejected leases. A rejection is logged unless it is unchanged. Returns the peers' entries.
    fn record(
        &mut self,
        host: &HostSpec,
        classified: Vec<(LeaseKey, Classification)>,
        rejected_before: &BTreeMap<LeaseKey, RejectedLease>,
        metrics: &Metrics,
        now: Instant,
    ) -> Vec<(Key, Value)> {
        let mut entries = Vec::with_capacity(4 * classified.len());
        let mut peers = Vec::with_capacity(classified.len());
        for (key, classification) in classified {
            match classification {
                Classification::Own => {}
                Classification::Accepted(peer) => {
                    entries.extend(host.peer_entries(&peer));
                    peers.push((key, peer));
                }
                Classification::Rejected(rejected) => {
                    if rejected_before.get(&key) != Some(&rejected) {
                        metrics.count_rejected_value(rejected.kind.as_str());
                        if self.rejection_log.allows(now.into_std()) {
                            tracing::warn!(key = rejected.key, reason = rejected.kind.as_str(), "{rejected}");
                        }
                    }
                    self.rejected.insert(key, rejected);
                }
            }
        }
        if let Some(leases) = self.rejection_log.take_suppressed(now.into_std()) {
            tracing::warn!(leases, "more leases ignored; list them with `overlayctl subnets`");
        }
        merge(&mut self.peers, peers);
        entries
    }
}

impl<M: NetworkStateStore> Network<M> {
    /// Plans the dirty entries.
    pub(super) fn plan(&mut self, now: Instant) {
        if std::mem::take(&mut self.dirty.host)
            && let Some(host) = self.desired_host()
        {
            self.planner.set_host(host, &self.store.leases, &self.metrics, &mut self.dirty, now);
        }
        self.planner.plan_leases(&self.store.leases, &self.metrics, &mut self.dirty, now);
    }

    /// This host's desired state; `None` while an input is missing. After the loss of the lease its subnet stays in use.
    fn desired_host(&mut self) -> Option<HostSpec> {
        let underlay = self.underlay.selected.clone()?;
        let network = self.store.config.as_ref()?.restricted_to(underlay.local.families());
        let subnet = match &self.store.own_lease {
            OwnLease::Held(held) => held.subnet,
            OwnLease::NotHeld { .. } => self.planner.host.as_ref()?.subnet,
        };
        if !self.store.has_snapshot {
            return None;
        }
        let view = self.underlay.view.as_ref()?;
        let required = view.inventory.required_addresses().chain(self.store.servers.iter().copied());
        let leasable = |address: &std::net::IpAddr| {
            network.pools.get(Family::of(*address)).is_some_and(|pool| pool.covers_address(*address))
        };
        let reserved = required.filter(leasable).collect();
        let backend_data = self.lease_data(&network);
        let bridge_mac = self.device_mac(backend::of(&network).bridge());
        Some(HostSpec {
            subnet,
            backend_data,
            bridge_mac,
            masquerade: self.settings.masquerade,
            numbered_sets: self.settings.name != NetworkName::default(),
            tx_checksum: self.settings.tx_checksum,
            docker: self.settings.docker,
            ports: self.endpoints.iter().filter(|endpoint| endpoint.port.is_some()).cloned().collect(),
            reserved,
            isolation: None,
            network,
            underlay,
        })
    }

    /// What this host's lease carries.
    pub(super) fn lease_data(&mut self, network: &NetworkConfig) -> BackendData {
        backend::of(network).lease_data(network, &mut |device| self.device_mac(device))
    }

    fn device_mac(&mut self, device: Device) -> Mac {
        let found = self.underlay.view.as_ref().and_then(|view| view.devices.get(&device)).and_then(|link| link.mac);
        self.state_store.device_mac(device, found)
    }
}
