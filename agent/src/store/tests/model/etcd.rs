//! etcd: entries, leases, and transactions that compare and write in one step.

use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::rc::Rc;

use super::world::{Stage, World};
use crate::store::codec;
use crate::store::keys::claimed_ranges;
use crate::store::lease::Held;
use crate::store::read::{Listing, RawConfig, RawEntry};
use crate::store::write::Guard;

/// The writer of reservations, which is no host.
pub(super) const NOBODY: usize = usize::MAX;

#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) writer: usize,
    pub(super) value: Rc<Text>,
    pub(super) created: i64,
    pub(super) changed: i64,
    pub(super) etcd_lease: Option<i64>,
}

/// A transaction on its way.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) key: String,
    pub(super) guards: Vec<Guard>,
    pub(super) what: What,
}

#[derive(Debug, Clone)]
pub(super) enum What {
    /// Put this value, bound to another etcd lease where one is given; with success this is held.
    Put { value: Rc<Text>, binding: Option<i64>, held: Held, made: bool },
    /// Delete, and end the etcd lease where nothing else is bound to it.
    Remove { etcd_lease: Option<i64> },
}

/// A value, with a number by which it is told from others at a glance.
pub(super) struct Text {
    pub(super) bytes: Vec<u8>,
    /// The identity that it names.
    pub(super) id: Option<String>,
    number: u64,
}

impl Text {
    pub(super) fn new(text: String) -> Rc<Text> {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let id = codec::owner(text.as_bytes()).node.map(|node| node.id);
        Rc::new(Text { bytes: text.into_bytes(), id, number: hasher.finish() })
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.number)
    }
}

/// How a transaction ended.
pub(super) enum Answer {
    Written(i64),
    Refused,
    LeaseGone,
}

impl World {
    pub(super) fn listing(&self) -> Listing {
        let entries = self.entries.iter().map(|(key, stored)| RawEntry {
            key: key.clone(),
            value: stored.value.bytes.clone(),
            create_revision: stored.created,
            mod_revision: stored.changed,
            etcd_lease: stored.etcd_lease,
        });
        let (number, mod_revision) = self.config;
        let config = RawConfig { text: self.setting.configs[number].0.clone(), mod_revision };
        Listing { revision: self.revision, config: Some(config), entries: entries.collect() }
    }

    /// A transaction, as etcd does it: compare and write in one step.
    pub(super) fn carry_out(&mut self, number: usize, request: &Request) -> Result<Answer, String> {
        if !request.guards.iter().all(|guard| self.permits(guard)) {
            return Ok(Answer::Refused);
        }
        let before = self.entries.get(&request.key).cloned();
        let victim = before.as_ref().filter(|stored| stored.writer != number && self.is_held(&request.key, stored));
        let taken = victim.map(|stored| format!("h{number} takes {}, which h{} holds", request.key, stored.writer));
        match &request.what {
            What::Put { binding: Some(id), .. } if !self.alive.contains(id) => return Ok(Answer::LeaseGone),
            What::Put { value, binding, .. } => {
                let Some(etcd_lease) = binding.map(Some).or(before.as_ref().map(|stored| stored.etcd_lease)) else {
                    // The lease is to stay as it is, of a key that is not there: etcd refuses.
                    return Ok(Answer::Refused);
                };
                self.revision += 1;
                let created = before.map_or(self.revision, |stored| stored.created);
                let stored = Stored { writer: number, value: Rc::clone(value), created, changed: self.revision, etcd_lease };
                self.entries.insert(request.key.clone(), stored);
            }
            What::Remove { .. } if before.is_none() => return Ok(Answer::Refused),
            What::Remove { etcd_lease } => {
                self.revision += 1;
                self.entries.remove(&request.key);
                if let Some(id) = etcd_lease {
                    self.end_lease(*id);
                }
            }
        }
        match taken.or_else(|| self.overlap(number, &request.key)) {
            Some(violation) => Err(violation),
            None => Ok(Answer::Written(self.revision)),
        }
    }

    fn permits(&self, guard: &Guard) -> bool {
        let keys = &self.setting.keys;
        match guard {
            Guard::Unchanged { key, revision } if *key == keys.config() => self.config.1 == *revision,
            Guard::Unchanged { key, revision } => {
                let stored = self.entries.iter().find(|(last, _)| keys.subnet(last) == *key);
                stored.map_or(0, |(_, stored)| stored.changed) == *revision
            }
            Guard::NoneMade { from, to, behind } => self
                .entries
                .iter()
                .filter(|(last, _)| (from..to).contains(&&keys.subnet(last)))
                .all(|(_, stored)| stored.created <= *behind),
        }
    }

    /// Two hosts' entries that overlap, one of which was just written.
    fn overlap(&self, number: usize, key: &str) -> Option<String> {
        let ranges = claimed_ranges(key);
        let others = self.entries.iter().filter(|(_, stored)| stored.writer != number);
        let bad = others.filter(|(other, _)| claimed_ranges(other).iter().any(|o| ranges.iter().any(|r| o.overlaps(*r))));
        let present = self.entries.contains_key(key);
        let named = |writer: usize| if writer == NOBODY { "nobody".to_owned() } else { format!("h{writer}") };
        bad.map(|(other, stored)| format!("h{number} has {key} while {} has {other}", named(stored.writer)))
            .next()
            .filter(|_| present)
    }

    pub(super) fn end_lease(&mut self, id: i64) {
        self.alive.remove(&id);
        let before = self.entries.len();
        self.entries.retain(|_, stored| stored.etcd_lease != Some(id));
        self.revision += i64::from(self.entries.len() != before);
    }

    /// Whether the writer of an entry is up and linked and holds it.
    pub(super) fn is_held(&self, key: &str, stored: &Stored) -> bool {
        let Some(host) = self.hosts.get(stored.writer) else { return false };
        let held = host.memory.held.as_ref().is_some_and(|held| held.key == *key && held.mod_revision == stored.changed);
        host.up && host.linked && matches!(host.stage, Stage::Hold) && held
    }
}
