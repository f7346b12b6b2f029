//! Plans a network's desired entries: those of this host, and those of the peers with accepted leases.

use std::collections::{BTreeMap, BTreeSet};
use tokio::time::Instant;

use super::scope::Scopes;
use super::{Dirty, Network, NetworkStateStore};
use crate::metrics::Metrics;
use crate::model::event::OwnLease;
use crate::model::{BackendData, Device, Family, Mac, NetworkConfig, NetworkName, Peer, RejectedLease};
use crate::plan::backend;
use crate::plan::bulk::{is_bulk, merge};
use crate::plan::desired::HostSpec;
use crate::plan::lease_table::{Classification, LeaseKey, LeaseTable, LocalHost};
use crate::plan::{Key, Value};
use crate::telemetry::rate_limit::LogRateLimit;

/// What is planned, and the changes that the reconcilers do not have yet.
#[derive(Debug)]
pub(super) struct Planner {
    /// The network's name.
    network: NetworkName,
    /// This host; `None` until its first lease is held.
    pub(super) host: Option<HostSpec>,
    /// This host, as far as other leases can conflict with it.
    pub(super) local_host: Option<LocalHost>,
    /// Peers with accepted leases.
    pub(super) peers: BTreeMap<LeaseKey, Peer>,
    /// Rejected leases.
    pub(super) rejected: BTreeMap<LeaseKey, RejectedLease>,
    /// The namespaces that the entries belong to.
    pub(super) scopes: Scopes,
    /// Number of the last contribution to any scope.
    pub(super) sequence: u64,
    rejection_log: LogRateLimit,
}

impl Planner {
    /// A planner without any state.
    pub(super) fn new(network: NetworkName, isolated: bool) -> Planner {
        Planner {
            network,
            host: None,
            local_host: None,
            peers: BTreeMap::new(),
            rejected: BTreeMap::new(),
            scopes: Scopes::new(isolated),
            sequence: 0,
            rejection_log: LogRateLimit::default(),
        }
    }

    /// Plans this host's entries. If the peers' entries depend on the change, plans these too.
    fn set_host(&mut self, host: HostSpec, leases: &LeaseTable, metrics: &Metrics, dirty: &mut Dirty, now: Instant) {
        match &self.host {
            Some(current) if *current == host => {}
            Some(current) if current.has_same_peer_entries(&host) => {
                for state in self.scopes.iter_mut() {
                    let (old_entries, entries) = current.changed_entries(&host, state.scope);
                    let removed = old_entries.into_keys().filter(|key| !entries.contains_key(key)).collect();
                    state.update_host(host.shared(state.scope), removed, entries.into_iter().collect());
                }
                self.host = Some(host);
            }
            _ => self.replan_all(host, leases, metrics, dirty, now),
        }
    }

    /// Plans all entries of the scopes whose reconcilers were restarted: these have nothing of this network. Returns whether the
    /// host's is one of them.
    pub(super) fn start_over(&mut self) -> bool {
        let host_restarted = self.scopes.host.restarted;
        for state in self.scopes.iter_mut() {
            if std::mem::take(&mut state.restarted)
                && let Some(host) = &self.host
            {
                let peers = self.peers.values().flat_map(|peer| host.peer_entries(peer));
                let peers = peers.filter(|(key, _)| host.peer_entry_scope(key) == state.scope);
                state.start_over(host.shared(state.scope), host.entries(state.scope).into_iter().chain(peers).collect());
            }
        }
        host_restarted
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
        let removed = self.scopes.divide(removed, |key| host.peer_entry_scope(key));
        let added = self.scopes.divide(added, |(key, _)| host.peer_entry_scope(key));
        for ((state, removed), added) in self.scopes.iter_mut().zip(removed).zip(added) {
            state.update(removed, added);
        }
        self.host = Some(host);
    }

    fn replan_all(&mut self, host: HostSpec, leases: &LeaseTable, metrics: &Metrics, dirty: &mut Dirty, now: Instant) {
        self.local_host = Some(LocalHost {
            subnet: host.subnet,
            public_ip: host.underlay.public_ip,
            endpoints: host.backend_data.endpoints(),
            isolated: host.isolation.is_some(),
        });
        self.peers.clear();
        let rejected_before = std::mem::take(&mut self.rejected);
        let classified = self.classify_all(&host, leases);
        let peer_entries = self.record(&host, classified, &rejected_before, metrics, now);
        let peer_entries = self.scopes.divide(peer_entries, |(key, _)| host.peer_entry_scope(key));
        for (state, mut peer_entries) in self.scopes.iter_mut().zip(peer_entries) {
            let mut entries: Vec<(Key, Value)> = host.entries(state.scope).into_iter().collect();
            entries.append(&mut peer_entries);
            state.replace(host.shared(state.scope), entries);
        }
        self.host = Some(host);
        dirty.leases.clear();
        dirty.all_leases = false;
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
                        metrics.count_rejected_value(&self.network, rejected.kind.as_str());
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
        let record = self.store.record.as_ref()?;
        let network = record.config.restricted_to(underlay.local.families());
        let subnet = match &self.store.own_lease {
            OwnLease::Held(held) => held.subnet,
            OwnLease::NotHeld { .. } => self.planner.host.as_ref()?.subnet,
        };
        if !self.store.has_snapshot {
            return None;
        }
        let view = self.planner.scopes.host.view.as_ref()?;
        let required = view.inventory.required_addresses().chain(self.store.servers.iter().copied());
        // An isolated network's routes never meet the host's packets.
        let leasable = |address: &std::net::IpAddr| {
            let pool = network.pools.get(Family::of(*address)).filter(|_| !self.settings.isolated);
            pool.is_some_and(|pool| pool.covers_address(*address))
        };
        let reserved = required.filter(leasable).collect();
        let backend_data = self.lease_data(&network);
        let bridge_mac = self.device_mac(backend::of(&network).bridge());
        let isolation = if self.settings.isolated { Some(self.isolation()?) } else { None };
        Some(HostSpec {
            subnet,
            backend_data,
            bridge_mac,
            masquerade: self.settings.masquerade,
            numbered_sets: !self.settings.name.is_default(),
            tx_checksum: self.settings.tx_checksum,
            docker: self.settings.docker,
            ports: self.endpoints.iter().filter(|endpoint| endpoint.port.is_some()).cloned().collect(),
            reserved,
            isolation,
            network,
            underlay,
        })
    }

    /// What this host's lease carries.
    pub(super) fn lease_data(&mut self, network: &NetworkConfig) -> BackendData {
        backend::of(network).lease_data(network, &mut |device| self.device_mac(device))
    }

    fn device_mac(&mut self, device: Device) -> Mac {
        let found = self.planner.scopes.device_view().and_then(|view| view.devices.get(&device)).and_then(|link| link.mac);
        self.state_store.device_mac(device, found)
    }
}
