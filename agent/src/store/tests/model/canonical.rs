//! Canonical form of model states. States are equal if they differ only in the values of revisions and etcd lease IDs: only the
//! order of revisions and the equality of lease IDs matter.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};

use super::etcd::{Operation, TxnRequest};
use super::state::{ModelState, PlannedWrite, Stage};
use crate::store::lease::HeldEntry;
use crate::store::write::Precondition;

impl ModelState {
    /// The equivalent state with the smallest numbers.
    pub(super) fn canonical(&self) -> ModelState {
        let mut state = self.clone();
        let (mut revisions, mut leases) = (BTreeSet::from([0]), BTreeSet::new());
        state.visit_numbers(
            &mut |revision| {
                revisions.insert(*revision);
            },
            &mut |id| {
                leases.insert(*id);
            },
        );
        let rank = |all: &BTreeSet<i64>| all.iter().copied().zip(0..).collect::<BTreeMap<i64, i64>>();
        let (revisions, leases) = (rank(&revisions), rank(&leases));
        state.visit_numbers(&mut |revision| *revision = revisions[revision], &mut |id| *id = leases[id]);
        state.live_leases = state.live_leases.iter().filter_map(|id| leases.get(id).copied()).collect();
        state.last_lease_id = i64::try_from(leases.len()).unwrap();
        state
    }

    /// Visits all revisions and etcd lease IDs.
    fn visit_numbers(&mut self, revision: &mut dyn FnMut(&mut i64), lease: &mut dyn FnMut(&mut i64)) {
        revision(&mut self.revision);
        revision(&mut self.config.1);
        for stored in self.entries.values_mut() {
            revision(&mut stored.create_revision);
            revision(&mut stored.mod_revision);
            stored.etcd_lease.iter_mut().for_each(&mut *lease);
        }
        for host in &mut self.hosts {
            host.unused_lease.iter_mut().chain(&mut host.stale_lease).for_each(&mut *lease);
            if let Some(held) = &mut host.state.held {
                visit_held(held, revision, lease);
            }
            if let Some((_, changed)) = &mut host.state.dead_entry {
                revision(changed);
            }
            match &mut host.stage {
                Stage::Write(request) => visit_request(request, revision, lease),
                Stage::Grant(PlannedWrite::TakeOver(held)) => visit_held(held, revision, lease),
                Stage::Grant(PlannedWrite::Create { config, max_create_revision, .. }) => {
                    revision(config);
                    max_create_revision.iter_mut().for_each(&mut *revision);
                }
                Stage::Decide | Stage::Hold => {}
            }
        }
        for (_, request) in &mut self.delayed_writes {
            visit_request(request, revision, lease);
        }
    }

    /// A hash of the state.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut text = String::with_capacity(2048);
        write!(text, "{self:?}").unwrap();
        // Same algorithm as rustc's own hasher. 64 bits are enough to distinguish some hundred thousand states.
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        let step = |hash: u64, word: u64| (hash.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
        let words = text.as_bytes().chunks_exact(8);
        let rest = word(words.remainder());
        step(words.map(|w| u64::from_le_bytes(w.try_into().unwrap())).fold(0, step), rest)
    }
}

fn visit_held(held: &mut HeldEntry, revision: &mut dyn FnMut(&mut i64), lease: &mut dyn FnMut(&mut i64)) {
    revision(&mut held.mod_revision);
    held.lease.etcd_lease.iter_mut().for_each(lease);
}

fn visit_request(request: &mut TxnRequest, revision: &mut dyn FnMut(&mut i64), lease: &mut dyn FnMut(&mut i64)) {
    for precondition in &mut request.preconditions {
        match precondition {
            Precondition::Unchanged { revision: number, .. } | Precondition::NoneCreated { after_revision: number, .. } => {
                revision(number)
            }
        }
    }
    match &mut request.operation {
        Operation::Put { binding, held, .. } => {
            binding.iter_mut().for_each(&mut *lease);
            visit_held(held, revision, lease);
        }
        Operation::Remove { etcd_lease } => etcd_lease.iter_mut().for_each(lease),
    }
}

impl fmt::Debug for ModelState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ModelState {
            scenario: _,
            revision,
            config,
            entries,
            live_leases,
            last_lease_id: _,
            hosts,
            delayed_writes,
            remaining_faults,
        } = self;
        write!(f, "{revision} {config:?} {live_leases:?} {remaining_faults} ")?;
        f.debug_struct("World").field("entries", entries).field("hosts", hosts).field("late", delayed_writes).finish()
    }
}
