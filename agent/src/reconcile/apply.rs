//! Applies batches and folds their results into actual state.
//!
//! Devices are applied first. Entries that depend on a failed entry are left out.

use std::collections::BTreeSet;

use tokio::time::Instant;

use super::{HEAP_TRIM_DELAY, Reconciler, SysctlStore};
use crate::model::Device;
use crate::plan::actual::ActualState;
use crate::plan::bulk::{BULK_THRESHOLD, merge};
use crate::plan::diff::prerequisite;
use crate::plan::ops::remove_device_entries;
use crate::plan::state::Entries;
use crate::plan::{Batch, DataPath, Key, LinkKind, Op, Value};

impl<D: DataPath, S: SysctlStore> Reconciler<D, S> {
    /// Applies the ops that are not backing off. Returns whether there was one.
    pub(super) async fn apply_due(&mut self, mut batch: Batch, now: Instant) -> bool {
        batch.retain(|op| !self.retries.is_backing_off(op.key(), now));
        // Devices first, so that no op is attempted on a device whose creation failed.
        let device = |op: &Op| matches!(op, Op::Set(Key::Link(name), _) if Device::from_name(name).is_some());
        let rest_start = batch.iter().rposition(device).map_or(0, |last| last + 1);
        let mut remaining_ops = batch.split_off(rest_start);
        let mut applied = false;
        if !batch.is_empty() {
            applied = true;
            self.apply(batch).await;
        }
        if !self.retries.is_empty() {
            remaining_ops.retain(|op| !matches!(op, Op::Set(key, value) if self.blocked_by(key, value).is_some()));
        }
        if !remaining_ops.is_empty() {
            applied = true;
            self.apply(remaining_ops).await;
        }
        applied
    }

    /// The failed entry that this one depends on, directly or through other entries.
    pub(super) fn blocked_by(&self, key: &Key, value: &Value) -> Option<Key> {
        if self.retries.is_empty() {
            return None;
        }
        let mut next = prerequisite(key, value, &self.desired);
        while let Some(key) = next {
            if self.retries.contains(&key) && !self.exists(&key) {
                return Some(key);
            }
            next = prerequisite(&key, self.desired.get(&key)?, &self.desired);
        }
        None
    }

    /// Whether the entry exists as ours, with any value.
    pub(super) fn exists(&self, key: &Key) -> bool {
        let local = self.data_path.local();
        match (ActualState { local: &local, peers: &self.peers }).get(key) {
            Some(Value::Link(link)) => !matches!(link.kind, LinkKind::Foreign { .. }),
            found => found.is_some(),
        }
    }

    /// Applies a batch and folds the result of each op.
    async fn apply(&mut self, batch: Batch) {
        // Devices that get another MAC: the kernel then deletes their neighbours.
        let mut changed_macs = BTreeSet::new();
        for op in &batch {
            match op {
                // Sysctls of our own devices vanish with the devices.
                Op::Set(key @ Key::Sysctl(path), _) if key.device().is_none() => {
                    if let Some(Value::Sysctl(original)) = self.data_path.local().get(key) {
                        self.sysctl_store.save_sysctl(path, original);
                    }
                }
                Op::Set(key @ Key::Link(name), Value::Link(new)) => {
                    let local = self.data_path.local();
                    if local.link(name).is_some_and(|old| new.mac.is_some() && new.mac != old.mac) {
                        changed_macs.insert(key.clone());
                    }
                }
                _ => {}
            }
        }
        if batch.len() > BULK_THRESHOLD {
            self.schedule.heap_trim = Some((self.now)() + HEAP_TRIM_DELAY);
        }
        let begun = Instant::now();
        let report = self.data_path.apply(&batch).await;
        let took = begun.elapsed();
        self.metrics.batch_applied(batch.len(), report.failed.len(), took);
        tracing::debug!(ops = batch.len(), failed = report.failed.len(), ms = took.as_secs_f64() * 1e3, "batch applied");
        let mut failed = report.failed.into_iter().peekable();
        let mut set = Vec::new();
        let mut recovered = BTreeSet::new();
        for (index, op) in batch.into_iter().enumerate() {
            if let Some((_, error)) = failed.next_if(|(i, _)| *i == index) {
                let cause = if let Op::Set(key, value) = &op { self.blocked_by(key, value) } else { None };
                self.retries.record_failure(&op, error, cause, (self.now)());
                continue;
            }
            if self.retries.record_success(op.key()) {
                self.dirty.all |= matches!(op, Op::Set(Key::Link(_), _));
                recovered.insert(op.key().clone());
            }
            match op {
                Op::Set(key, value) if key.is_peer_entry() => set.push((key, value)),
                op if op.key().is_peer_entry()
                    || matches!(op, Op::Delete(Key::Link(_), _))
                    || changed_macs.contains(op.key()) =>
                {
                    merge(&mut self.peers, std::mem::take(&mut set));
                    self.fold_applied(op);
                }
                // The local part has the op's result already.
                _ => {}
            }
        }
        merge(&mut self.peers, set);
        if !recovered.is_empty() {
            self.dirty.keys.extend(self.retries.release_dependents(&recovered));
        }
        self.changed = true;
    }

    /// Folds an op that the kernel accepted into the peers' entries.
    fn fold_applied(&mut self, op: Op) {
        match op {
            Op::Set(link, _) => remove_device_entries(&mut self.peers, &link, |key| matches!(key, Key::Neigh(..))),
            // The most frequent case. The next hop's routes were deleted before it, so no dependent entries have to be removed.
            Op::Delete(key @ Key::Nexthop(_), value) => {
                if let (Value::Nexthop { device, gateway }, false) = (value, self.desired.contains_key(&key)) {
                    self.nexthop_ids.release(device, gateway);
                }
                self.peers.remove(&key);
            }
            op => op.apply_to(&mut self.peers),
        }
    }
}
