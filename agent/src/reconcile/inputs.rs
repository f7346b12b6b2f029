//! Folding: what each event makes dirty, and how desired state follows from what is known.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use super::apply::{is_wholesale, merge};
use super::{Channels, LOG_LINES, Memory, Reconciler, UNDERLAY_SETTLE, WHOLESALE};
use crate::metrics::Source;
use crate::model::event::{Connection, LeaseWish, OwnLease, StoreEvent};
use crate::model::{Device, Family, NetworkConfig, PerFamily, Refusal};
use crate::plan::desired::Host;
use crate::plan::diff::satisfied;
use crate::plan::roster::{LeaseKey, OwnHost, Standing};
use crate::plan::state::{State, Value};
use crate::plan::{DataPath, KernelEvent, Key, LinkKind, Op};

impl<D: DataPath, M: Memory> Reconciler<D, M> {
    /// The host's ends of the endpoints' veth pairs.
    pub(super) fn ports(&self) -> Vec<String> {
        self.endpoints.iter().filter_map(|endpoint| endpoint.port.as_ref()).map(|port| port.host_interface.clone()).collect()
    }

    pub(super) fn fold_store(&mut self, event: StoreEvent) {
        self.changed = true;
        self.metrics.events(Source::Store, 1);
        match event {
            StoreEvent::Config(None) => {
                self.config_missing = true;
                self.config_errors = None;
            }
            StoreEvent::Config(Some(Err(errors))) => {
                tracing::error!(%errors, "the network's configuration in etcd is bad: {}", match self.network {
                    Some(_) => "the last good one stays in force",
                    None => "waiting for a good one",
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
                    // Which families the external interface has to serve may have changed.
                    self.underlay_due = Some(Instant::now());
                    self.host_dirty = true;
                }
            }
            StoreEvent::Snapshot(entries) => {
                let (begun, leases) = (Instant::now(), entries.len());
                match self.roster.replace(entries) {
                    Some(affected) => self.leases_dirty.extend(affected),
                    None => self.roster_dirty = true,
                }
                tracing::debug!(leases, ms = begun.elapsed().as_secs_f64() * 1e3, "leases judged");
                self.snapshot_seen = true;
            }
            StoreEvent::Upsert(entry) => {
                if let (Connection::Up { revision }, Ok(record)) = (&mut self.connection, &entry.value) {
                    *revision = record.mod_revision.max(*revision);
                }
                let affected = self.roster.upsert(entry);
                self.leases_dirty.extend(affected);
            }
            StoreEvent::Remove { key } => {
                let affected = self.roster.remove(&key);
                self.leases_dirty.extend(affected);
            }
            StoreEvent::Own(own) => {
                if let (OwnLease::Held(old), OwnLease::Held(new)) = (&self.own, &own)
                    && old.subnet != new.subnet
                {
                    tracing::error!(old = %old.subnet, new = %new.subnet, "this host moved to another subnet: its containers need a restart");
                }
                self.own = own;
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
        self.metrics.events(Source::Kernel, if let KernelEvent::Changed(entries) = &event { entries.len() } else { 1 });
        match event {
            KernelEvent::Changed(entries) => {
                let mut lines = 0;
                for (key, value) in entries {
                    if let Key::Link(name) = key {
                        self.links_told.insert(name);
                    } else if self.fold_change(key, value, lines < LOG_LINES) {
                        lines += 1;
                    }
                }
                if lines > LOG_LINES {
                    tracing::warn!(entries = lines, "entries changed by others, putting them back");
                }
            }
            KernelEvent::Stale { reason } => {
                tracing::debug!(reason, "kernel state in doubt");
                self.stale = Some(reason);
            }
            KernelEvent::Underlay => {
                self.underlay_due.get_or_insert((Instant::now() + UNDERLAY_SETTLE).max(self.underlay_not_before));
            }
        }
    }

    /// Looks at the links that the kernel told of: by now a change of ours may have come after what it told, and others have changed nothing.
    pub(super) async fn look_at_links(&mut self) {
        let told = std::mem::take(&mut self.links_told);
        if told.len() > WHOLESALE {
            self.stale.get_or_insert("many links changed");
            return;
        }
        // All is read at once then.
        if self.stale.is_some() && Instant::now() >= self.not_before {
            return;
        }
        for (line, name) in told.into_iter().enumerate() {
            match self.data_path.link(&name).await {
                Ok(link) => {
                    self.fold_change(Key::Link(name), link.map(|link| Value::Link(Box::new(link))), line < LOG_LINES);
                }
                Err(error) => {
                    tracing::warn!(%error, "a link of ours cannot be looked at");
                    self.stale = Some("a link could not be looked at");
                }
            }
        }
    }

    /// Folds one entry that others changed. Returns whether that is drift.
    fn fold_change(&mut self, key: Key, value: Option<Value>, log: bool) -> bool {
        let was_right = self.is_right(&key);
        match value {
            Some(value) => self.actual.insert(key.clone(), value),
            None => self.actual.remove(&key),
        };
        if self.host.is_none() || self.is_right(&key) {
            return false;
        }
        if let Key::Link(name) = &key {
            self.port_lost |= !self.actual.contains_key(&key) && self.ports().iter().any(|port| **port == **name);
        }
        self.dirty.insert(key.clone());
        if was_right {
            self.drifted(&key, log);
        }
        was_right
    }

    fn drifted(&mut self, key: &Key, log: bool) {
        if log {
            let show = |value: Option<&Value>| value.map_or_else(|| "absent".to_owned(), ToString::to_string);
            tracing::warn!(
                entry = %key,
                found = show(self.actual.get(key)),
                wanted = show(self.desired.get(key)),
                "an entry was changed by others, putting it back"
            );
        }
        self.repairs.drifted(key);
        self.metrics.drift_repaired(key.kind());
        self.changed = true;
    }

    /// After a dump: what was right before and is not now has drifted.
    pub(super) fn count_drift_of_dump(&mut self, before: &State, batch: &[Op]) {
        let drifted: Vec<Key> = batch
            .iter()
            .map(Op::key)
            .filter(|key| matches_entry(self.desired.get(key), before.get(key)))
            .filter(|key| !self.is_right(key))
            .cloned()
            .collect();
        for (line, key) in drifted.iter().enumerate() {
            self.drifted(key, line < LOG_LINES);
        }
        if drifted.len() > LOG_LINES {
            tracing::warn!(entries = drifted.len(), "entries changed by others, putting them back");
        }
    }

    /// What waits for another try although nothing is wrong with it any more waits no longer.
    pub(super) fn settle(&mut self) {
        let (desired, actual) = (&self.desired, &self.actual);
        self.repairs.settle(|key| matches_entry(desired.get(key), actual.get(key)));
    }

    fn is_right(&self, key: &Key) -> bool {
        matches_entry(self.desired.get(key), self.actual.get(key))
    }

    /// Makes desired state follow from what has changed: all of it where this host did, else the peers of the leases that did.
    pub(super) fn rebuild(&mut self, channels: &Channels) {
        if std::mem::take(&mut self.host_dirty) {
            self.wish(channels);
            if let Some(host) = self.wanted_host() {
                match &self.host {
                    Some(was) if *was == host => {}
                    Some(was) if was.has_peers_of(&host) => {
                        let (was, entries) = was.own_entries(&host);
                        self.rebuild_own(host, was, entries);
                    }
                    _ => self.rebuild_all(host),
                }
            }
        }
        let leases = std::mem::take(&mut self.leases_dirty);
        if self.host.is_none() {
            // Judged once there is a host: `rebuild_all` goes over the whole roster.
            return;
        }
        let judged = !self.peers.is_empty() || !self.refused.is_empty();
        if (self.roster_dirty && judged) || is_wholesale(self.peers.len(), leases.len()) {
            if let Some(host) = self.host.clone() {
                self.rebuild_all(host);
            }
            return;
        }
        let mut refused = BTreeMap::new();
        for key in &leases {
            if let Some(peer) = self.peers.remove(key) {
                self.retract(&peer);
            }
            refused.extend(self.refused.remove_entry(key));
        }
        if std::mem::take(&mut self.roster_dirty) {
            self.admit_roster(&refused);
        } else {
            self.admit_all(leases, &refused);
        }
    }

    /// This host as it should be; `None` while something is not known yet. A lease that was lost leaves things as they were.
    fn wanted_host(&mut self) -> Option<Host> {
        let underlay = self.underlay.clone()?;
        let network = self.network.as_ref()?.only(underlay.local.families());
        let subnet = match &self.own {
            OwnLease::Held(held) => held.subnet,
            OwnLease::Wanted { .. } => self.host.as_ref()?.subnet,
        };
        if !self.snapshot_seen {
            return None;
        }
        let needed = self.inventory.depends_on().chain(self.servers.iter().copied());
        let leasable = |address: &IpAddr| network.pools.get(Family::of(*address)).is_some_and(|pool| pool.may_lease(*address));
        let reserved = needed.filter(leasable).collect();
        let vtep = self.vtep(&network);
        let bridge_mac = self.mac(Device::bridge(network.vxlan.vni));
        Some(Host {
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
            keep_routers: self.keep_routers(&underlay),
            uplinks: self.inventory.uplinks(underlay.index),
            network,
            underlay,
        })
    }

    fn vtep(&mut self, network: &NetworkConfig) -> PerFamily<crate::model::Mac> {
        let families: Vec<Family> = network.families().collect();
        families.into_iter().map(|family| (family, self.mac(Device::vxlan(family, network.vxlan.vni)))).collect()
    }

    fn mac(&mut self, device: Device) -> crate::model::Mac {
        let found = match self.actual.get(&Key::Link(device.name().into())) {
            Some(Value::Link(link)) if !matches!(link.kind, LinkKind::Foreign { .. }) => link.mac,
            _ => None,
        };
        self.memory.mac(device, found)
    }

    /// Tells the store what this host wants to hold.
    fn wish(&mut self, channels: &Channels) {
        let (Some(network), Some(underlay)) = (self.network.clone(), self.underlay.clone()) else { return };
        let preferred = match &self.own {
            OwnLease::Held(held) => Some(held.subnet),
            OwnLease::Wanted { .. } => self.host.as_ref().map(|host| host.subnet).or_else(|| self.memory.preferred()),
        };
        let vtep = self.vtep(&network.only(underlay.local.families()));
        let wish = LeaseWish { node: self.settings.node.clone(), public_ip: underlay.public_ip, vtep, preferred, network };
        channels.wish.send_if_modified(|was| {
            let new = was.as_ref() != Some(&wish);
            if new {
                *was = Some(wish);
            }
            new
        });
    }

    /// Only what concerns this host alone has changed (a port, say): the peers' entries stay.
    fn rebuild_own(&mut self, host: Host, was: State, entries: State) {
        for key in was.into_keys().filter(|key| !entries.contains_key(key)) {
            self.desired.remove(&key);
            self.repairs.forget(&key);
            self.dirty.insert(key);
        }
        for (key, value) in entries {
            if self.desired.get(&key) != Some(&value) {
                self.repairs.forget(&key);
                self.dirty.insert(key.clone());
                self.desired.insert(key, value);
            }
        }
        self.host = Some(host);
        self.changed = true;
    }

    fn rebuild_all(&mut self, host: Host) {
        self.own_host = Some(OwnHost { subnet: host.subnet, public_ip: host.underlay.public_ip, vtep: host.vtep });
        self.desired = host.entries();
        self.host = Some(host);
        self.peers.clear();
        let refused = std::mem::take(&mut self.refused);
        self.admit_roster(&refused);
        self.leases_dirty.clear();
        self.roster_dirty = false;
        self.repairs.forget_all();
        self.all_dirty = true;
        self.changed = true;
    }

    /// Takes some leases into the data path, or notes why not.
    fn admit_all(&mut self, leases: BTreeSet<LeaseKey>, refused_before: &BTreeMap<LeaseKey, Refusal>) {
        let Some(host) = &self.host else { return };
        let judge = |key: LeaseKey| {
            let standing = self.roster.standing(&key, &host.network, self.own_host.as_ref());
            standing.map(|standing| (key, standing))
        };
        let judged = leases.into_iter().filter_map(judge).collect();
        self.admit(judged, refused_before);
    }

    /// Takes all leases that there are into the data path, or notes why not.
    fn admit_roster(&mut self, refused_before: &BTreeMap<LeaseKey, Refusal>) {
        let Some(host) = &self.host else { return };
        let standings = self.roster.standings(&host.network, self.own_host.as_ref());
        let mut judged: Vec<_> = standings.map(|(key, standing)| (key.clone(), standing)).collect();
        // In the order of their addresses most of what follows from them is in order already.
        judged.sort_by_cached_key(|(_, standing)| match standing {
            Standing::Peer(peer) => Some(peer.reach.map(|_, reach| reach.subnet)),
            Standing::Own | Standing::Refused(_) => None,
        });
        self.ids.reserve(judged.len());
        self.admit(judged, refused_before);
    }

    /// Notes what leases are to this host. A refusal is logged unless it stood before.
    fn admit(&mut self, judged: Vec<(LeaseKey, Standing)>, refused_before: &BTreeMap<LeaseKey, Refusal>) {
        let Some(host) = &self.host else { return };
        let now = Instant::now();
        let mut entries = Vec::with_capacity(4 * judged.len());
        let mut peers = Vec::with_capacity(judged.len());
        for (key, standing) in judged {
            match standing {
                Standing::Own => {}
                Standing::Peer(peer) => {
                    entries.extend(host.peer_entries(&peer, &mut self.ids));
                    peers.push((key, peer));
                }
                Standing::Refused(refusal) => {
                    if refused_before.get(&key) != Some(&refusal) {
                        self.metrics.value_refused(refusal.kind.word());
                        if self.refusals_told.admits(now) {
                            tracing::warn!(key = refusal.key, reason = refusal.kind.word(), "{refusal}");
                        }
                    }
                    self.refused.insert(key, refusal);
                }
            }
        }
        if let Some(leases) = self.refusals_told.kept_back(now) {
            tracing::warn!(leases, "more leases are left out: `overlayctl subnets` lists them");
        }
        merge(&mut self.peers, peers);
        self.desire(entries);
    }

    /// Adds entries to desired state.
    fn desire(&mut self, entries: Vec<(Key, Value)>) {
        for (key, _) in &entries {
            self.repairs.forget(key);
        }
        if is_wholesale(self.desired.len(), entries.len()) {
            self.all_dirty = true;
        } else {
            self.dirty.extend(entries.iter().map(|(key, _)| key.clone()));
        }
        merge(&mut self.desired, entries);
    }

    /// Takes a peer's entries out of desired state. What another peer has in common with it is put in again when that one is admitted.
    fn retract(&mut self, peer: &crate::model::Peer) {
        let Some(host) = &self.host else { return };
        for (entry, _) in host.peer_entries(peer, &mut self.ids) {
            self.desired.remove(&entry);
            self.repairs.forget(&entry);
            self.dirty.insert(entry);
        }
    }
}

fn matches_entry(wanted: Option<&Value>, found: Option<&Value>) -> bool {
    match (wanted, found) {
        (Some(wanted), Some(found)) => satisfied(wanted, found),
        (None, None) | (None, Some(Value::Sysctl(_))) => true,
        (None, Some(Value::Link(link))) => matches!(link.kind, LinkKind::Foreign { .. } | LinkKind::Port),
        (None, Some(Value::Route(crate::plan::state::Via::Foreign))) => true,
        _ => false,
    }
}

fn describe(network: &NetworkConfig) -> String {
    network.pools.iter().map(|(_, pool)| pool.network.to_string()).collect::<Vec<_>>().join(" ")
}
