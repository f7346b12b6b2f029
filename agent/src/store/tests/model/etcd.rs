//! Model of etcd: entries, leases, and atomic transactions.

use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::rc::Rc;

use super::state::{ModelState, Stage};
use crate::store::codec;
use crate::store::keys::claimed_ranges;
use crate::store::lease::HeldEntry;
use crate::store::read::{Listing, RawConfig, RawEntry};
use crate::store::write::Precondition;

/// The writer of reservations, which is not a host.
pub(super) const NO_HOST: usize = usize::MAX;

#[derive(Debug, Clone)]
pub(super) struct StoredEntry {
    pub(super) writer: usize,
    pub(super) value: Rc<StoredValue>,
    pub(super) create_revision: i64,
    pub(super) mod_revision: i64,
    pub(super) etcd_lease: Option<i64>,
}

/// A transaction in flight.
#[derive(Debug, Clone)]
pub(super) struct TxnRequest {
    pub(super) key: String,
    pub(super) preconditions: Vec<Precondition>,
    pub(super) operation: Operation,
}

#[derive(Debug, Clone)]
pub(super) enum Operation {
    /// Put this value, bound to another etcd lease if one is given. On success the writer holds `held`.
    Put { value: Rc<StoredValue>, binding: Option<i64>, held: HeldEntry, creates: bool },
    /// Delete, and revoke the etcd lease if one is given.
    Remove { etcd_lease: Option<i64> },
}

/// A value with a hash, for compact debug output.
pub(super) struct StoredValue {
    pub(super) bytes: Vec<u8>,
    /// The identity that it names.
    pub(super) id: Option<String>,
    hash: u64,
}

impl StoredValue {
    pub(super) fn new(text: String) -> Rc<StoredValue> {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let id = codec::owner(text.as_bytes()).node.map(|node| node.id);
        Rc::new(StoredValue { bytes: text.into_bytes(), id, hash: hasher.finish() })
    }
}

impl fmt::Debug for StoredValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.hash)
    }
}

/// Result of a transaction.
pub(super) enum TxnResult {
    Written(i64),
    PreconditionFailed,
    LeaseNotFound,
}

impl ModelState {
    pub(super) fn listing(&self) -> Listing {
        let entries = self.entries.iter().map(|(key, stored)| RawEntry {
            key: key.clone(),
            value: stored.value.bytes.clone(),
            create_revision: stored.create_revision,
            mod_revision: stored.mod_revision,
            etcd_lease: stored.etcd_lease,
        });
        let (number, mod_revision) = self.config;
        let config = RawConfig { text: self.scenario.configs[number].0.clone(), mod_revision };
        Listing { revision: self.revision, config: Some(config), entries: entries.collect() }
    }

    /// Executes a transaction like etcd: compares and writes atomically.
    pub(super) fn commit(&mut self, number: usize, request: &TxnRequest) -> Result<TxnResult, String> {
        if !request.preconditions.iter().all(|precondition| self.satisfies(precondition)) {
            return Ok(TxnResult::PreconditionFailed);
        }
        let previous = self.entries.get(&request.key).cloned();
        let victim = previous.as_ref().filter(|stored| stored.writer != number && self.is_held(&request.key, stored));
        let takeover = victim.map(|stored| format!("h{number} takes {}, which h{} holds", request.key, stored.writer));
        match &request.operation {
            Operation::Put { binding: Some(id), .. } if !self.live_leases.contains(id) => return Ok(TxnResult::LeaseNotFound),
            Operation::Put { value, binding, .. } => {
                let Some(etcd_lease) = binding.map(Some).or(previous.as_ref().map(|stored| stored.etcd_lease)) else {
                    // etcd rejects keeping the lease of a key that does not exist.
                    return Ok(TxnResult::PreconditionFailed);
                };
                self.revision += 1;
                let created = previous.map_or(self.revision, |stored| stored.create_revision);
                let stored = StoredEntry {
                    writer: number,
                    value: Rc::clone(value),
                    create_revision: created,
                    mod_revision: self.revision,
                    etcd_lease,
                };
                self.entries.insert(request.key.clone(), stored);
            }
            Operation::Remove { .. } if previous.is_none() => return Ok(TxnResult::PreconditionFailed),
            Operation::Remove { etcd_lease } => {
                self.revision += 1;
                self.entries.remove(&request.key);
                if let Some(id) = etcd_lease {
                    self.revoke_lease(*id);
                }
            }
        }
        match takeover.or_else(|| self.overlap(number, &request.key)) {
            Some(violation) => Err(violation),
            None => Ok(TxnResult::Written(self.revision)),
        }
    }

    fn satisfies(&self, precondition: &Precondition) -> bool {
        let keys = &self.scenario.keys;
        match precondition {
            Precondition::Unchanged { key, revision } if *key == keys.config() => self.config.1 == *revision,
            Precondition::Unchanged { key, revision } => {
                let stored = self.entries.iter().find(|(last, _)| keys.subnet(last) == *key);
                stored.map_or(0, |(_, stored)| stored.mod_revision) == *revision
            }
            Precondition::NoneCreated { from, to, after_revision } => self
                .entries
                .iter()
                .filter(|(last, _)| (from..to).contains(&&keys.subnet(last)))
                .all(|(_, stored)| stored.create_revision <= *after_revision),
        }
    }

    /// Describes an overlap between the entry just written and another host's entry.
    fn overlap(&self, number: usize, key: &str) -> Option<String> {
        let ranges = claimed_ranges(key);
        let other_entries = self.entries.iter().filter(|(_, stored)| stored.writer != number);
        let overlapping =
            other_entries.filter(|(other, _)| claimed_ranges(other).iter().any(|o| ranges.iter().any(|r| o.overlaps(*r))));
        let present = self.entries.contains_key(key);
        let host_name = |writer: usize| if writer == NO_HOST { "nobody".to_owned() } else { format!("h{writer}") };
        overlapping
            .map(|(other, stored)| format!("h{number} has {key} while {} has {other}", host_name(stored.writer)))
            .next()
            .filter(|_| present)
    }

    pub(super) fn revoke_lease(&mut self, id: i64) {
        self.live_leases.remove(&id);
        let previous_count = self.entries.len();
        self.entries.retain(|_, stored| stored.etcd_lease != Some(id));
        self.revision += i64::from(self.entries.len() != previous_count);
    }

    /// Whether the writer of an entry is up, connected and holds it.
    pub(super) fn is_held(&self, key: &str, stored: &StoredEntry) -> bool {
        let Some(host) = self.hosts.get(stored.writer) else { return false };
        let held = host.state.held.as_ref().is_some_and(|held| held.key == *key && held.mod_revision == stored.mod_revision);
        host.up && host.connected && matches!(host.stage, Stage::Hold) && held
    }
}
