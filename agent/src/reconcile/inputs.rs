//! Folds the networks' contributions and the kernel's events, and marks dirty entries.

use tokio::time::Instant;

use super::drift::Verdict;
use super::{HOST_READ_DEBOUNCE, MAX_LOG_LINES, Reconciler, SysctlStore};
use crate::metrics::EventSource;
use crate::model::NetworkName;
use crate::plan::actual::{ActualState, LocalState};
use crate::plan::bulk::{is_bulk, merge};
use crate::plan::contribution::{Contribution, EntryChange, ReconcilerInput};
use crate::plan::diff::is_in_sync;
use crate::plan::state::{Entries, RouteTarget, State, Value};
use crate::plan::{DataPath, KernelEvent, Key, LinkKind, Op};

impl<D: DataPath, S: SysctlStore> Reconciler<D, S> {
    pub(super) fn fold_network(&mut self, input: ReconcilerInput) {
        match input {
            ReconcilerInput::Contribution(contribution) => self.fold_contribution(*contribution),
            ReconcilerInput::RefreshHost { network, number } => {
                self.refreshes.insert(network, number);
                self.schedule.host_read = Some((self.now)());
            }
            ReconcilerInput::Withdraw(network) => {
                self.no_longer_absent(&network);
                self.contributors.remove(&network);
                self.refreshes.remove(&network);
                if let Some(entries) = self.desired.networks.remove(&network) {
                    self.retries.remove_all(|key| entries.contains_key(key));
                    (self.dirty.all, self.dirty.shared) = (true, true);
                }
            }
        }
    }

    fn fold_contribution(&mut self, contribution: Contribution) {
        let Contribution { network, run, sequence, shared, change } = contribution;
        if run != self.run {
            // It continues one that an earlier run had.
            return;
        }
        self.has_desired_state = true;
        self.no_longer_absent(&network);
        let contributor = self.contributors.entry(network.clone()).or_default();
        contributor.sequence = sequence;
        if shared.is_some() {
            contributor.shared = shared;
            self.dirty.shared = true;
        }
        self.changed = true;
        let mut entries = self.desired.networks.remove(&network).unwrap_or_default();
        match change {
            EntryChange::Replace(new) => {
                self.retries.remove_all(|key| entries.contains_key(key));
                self.nexthop_ids.reserve(new.len() / 4);
                entries = self.resolve(new).into_iter().collect();
                self.retries.remove_all(|key| entries.contains_key(key));
                self.dirty.all = true;
            }
            EntryChange::Update { removed, added } => {
                for key in removed {
                    if let Some(Value::Route(RouteTarget::Nexthop(id))) = entries.remove(&key) {
                        entries.remove(&Key::Nexthop(id));
                        self.mark_dirty(Key::Nexthop(id));
                    }
                    self.mark_dirty(key);
                }
                let mut added = self.resolve(added);
                added.retain(|(key, value)| entries.get(key) != Some(value));
                if is_bulk(entries.len(), added.len()) {
                    added.iter().for_each(|(key, _)| self.retries.remove(key));
                    self.dirty.all = true;
                } else {
                    added.iter().for_each(|(key, _)| self.mark_dirty(key.clone()));
                }
                merge(&mut entries, added);
            }
        }
        self.desired.networks.insert(network, entries);
    }

    /// Records that a network's desired state is known.
    fn no_longer_absent(&mut self, network: &NetworkName) {
        if self.absent.remove(network) && self.absent.is_empty() {
            (self.dirty.all, self.dirty.shared) = (true, true);
        }
    }

    /// Replaces gateways by next-hop objects, if these are used.
    fn resolve(&mut self, entries: Vec<(Key, Value)>) -> Vec<(Key, Value)> {
        if self.settings.nexthop_objects { self.nexthop_ids.resolve(entries) } else { entries }
    }

    /// Marks an entry whose desired value changed, which makes earlier failures irrelevant.
    pub(super) fn mark_dirty(&mut self, key: Key) {
        self.retries.remove(&key);
        self.dirty.keys.insert(key);
    }

    pub(super) fn fold_kernel(&mut self, event: KernelEvent) {
        self.metrics
            .count_events(EventSource::Kernel, if let KernelEvent::Changed(entries) = &event { entries.len() } else { 1 });
        match event {
            KernelEvent::Changed(entries) => {
                let mut lines = 0;
                for (key, value) in entries {
                    lines += usize::from(self.fold_change(key, value, lines < MAX_LOG_LINES));
                }
                if lines > MAX_LOG_LINES {
                    tracing::warn!(entries = lines, "drift: restoring entries changed by another process");
                }
            }
            KernelEvent::ResyncNeeded { reason } => {
                tracing::debug!(reason, "kernel state in doubt");
                self.schedule.dump_reason = Some(reason);
            }
            KernelEvent::HostNetworkChanged => {
                let due = ((self.now)() + HOST_READ_DEBOUNCE).max(self.schedule.host_read_not_before);
                self.schedule.host_read.get_or_insert(due);
            }
        }
    }

    /// Folds a changed entry. Returns whether the change is drift.
    fn fold_change(&mut self, key: Key, value: Option<Value>, log: bool) -> bool {
        // The local part has its changes already; an entry that was not in sync before is dirty or waits for a retry.
        let was_in_sync = if key.is_peer_entry() {
            self.is_in_sync(&key)
        } else {
            !self.dirty.all && !self.dirty.keys.contains(&key) && !self.retries.contains(&key)
        };
        match (value, &key) {
            (Some(value), key) if key.is_peer_entry() => drop(self.peers.insert(key.clone(), value)),
            (None, key) if key.is_peer_entry() => drop(self.peers.remove(key)),
            // Nobody owns the elements of a port that is gone.
            (None, Key::Link(name)) => {
                self.dirty.keys.extend(self.data_path.local().source_elements(name).map(Key::Element));
            }
            _ => {}
        }
        if !self.has_desired_state || self.is_in_sync(&key) {
            return false;
        }
        // The other namespace's reconciler created the pair that this one waited for.
        let is_awaited = matches!(self.desired.get(&key), Some(Value::Link(link)) if link.kind == LinkKind::Pair(None));
        if is_awaited && self.exists(&key) {
            self.retries.make_due(&key, (self.now)());
        }
        let is_port = matches!(self.desired.get(&key), Some(Value::Link(link)) if link.kind == LinkKind::Port);
        self.port_lost |= is_port && self.data_path.local().get(&key).is_none();
        self.dirty.keys.insert(key.clone());
        if was_in_sync {
            self.record_drift(&key, (self.now)(), log);
        }
        was_in_sync
    }

    fn record_drift(&mut self, key: &Key, now: Instant, log: bool) {
        if log {
            let show = |value: Option<&Value>| value.map_or_else(|| "absent".to_owned(), ToString::to_string);
            let local = self.data_path.local();
            tracing::warn!(
                entry = %key,
                found = show((ActualState { local: &local, peers: &self.peers }).get(key)),
                wanted = show(self.desired.get(key)),
                "drift: restoring an entry changed by another process"
            );
        }
        if let Verdict::Contended { repairs, excess } = self.drift.record(key, now, (self.unix_time)()) {
            if excess == 1 {
                tracing::error!(entry = %key, repairs, "another process keeps changing an entry; limiting the rate of repairs");
            }
            self.retries.record_contention(key, repairs, excess, now);
        }
        self.metrics.drift_repaired(key.kind());
        self.changed = true;
    }

    /// Records drift after a dump: entries that were in sync before it and are not now.
    pub(super) fn record_dump_drift(&mut self, (local, peers): &(LocalState, State), batch: &[Op], now: Instant) {
        let before = ActualState { local, peers };
        let drifted: Vec<Key> = batch
            .iter()
            .map(Op::key)
            .filter(|key| is_in_sync(key, &self.desired, &before))
            .filter(|key| !self.is_in_sync(key))
            .cloned()
            .collect();
        for (line, key) in drifted.iter().enumerate() {
            self.record_drift(key, now, line < MAX_LOG_LINES);
        }
        if drifted.len() > MAX_LOG_LINES {
            tracing::warn!(entries = drifted.len(), "drift: restoring entries changed by another process");
        }
    }

    /// Drops pending retries of entries that are in sync by now.
    pub(super) fn prune_satisfied(&mut self) {
        let local = self.data_path.local();
        let (desired, actual) = (&self.desired, ActualState { local: &local, peers: &self.peers });
        self.retries.remove_all(|key| is_in_sync(key, desired, &actual));
    }

    fn is_in_sync(&self, key: &Key) -> bool {
        is_in_sync(key, &self.desired, &ActualState { local: &self.data_path.local(), peers: &self.peers })
    }
}
