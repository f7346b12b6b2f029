//! Worlds that are the same but for the size of their numbers are one: of revisions only the order counts, of etcd leases only which are the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};

use super::etcd::{Request, What};
use super::world::{Plan, Stage, World};
use crate::store::lease::Held;
use crate::store::write::Guard;

impl World {
    /// The same world with small numbers: of revisions only the order counts, of etcd leases only which are the same.
    pub(super) fn canonical(&self) -> World {
        let mut world = self.clone();
        let (mut revisions, mut leases) = (BTreeSet::from([0]), BTreeSet::new());
        world.numbers(
            &mut |revision| {
                revisions.insert(*revision);
            },
            &mut |id| {
                leases.insert(*id);
            },
        );
        let rank = |all: &BTreeSet<i64>| all.iter().copied().zip(0..).collect::<BTreeMap<i64, i64>>();
        let (revisions, leases) = (rank(&revisions), rank(&leases));
        world.numbers(&mut |revision| *revision = revisions[revision], &mut |id| *id = leases[id]);
        world.alive = world.alive.iter().filter_map(|id| leases.get(id).copied()).collect();
        world.granted = i64::try_from(leases.len()).unwrap();
        world
    }

    /// Visits every revision and every etcd lease.
    fn numbers(&mut self, revision: &mut dyn FnMut(&mut i64), lease: &mut dyn FnMut(&mut i64)) {
        revision(&mut self.revision);
        revision(&mut self.config.1);
        for stored in self.entries.values_mut() {
            revision(&mut stored.created);
            revision(&mut stored.changed);
            stored.etcd_lease.iter_mut().for_each(&mut *lease);
        }
        for host in &mut self.hosts {
            host.spare.iter_mut().chain(&mut host.orphan).for_each(&mut *lease);
            if let Some(held) = &mut host.memory.held {
                of_held(held, revision, lease);
            }
            if let Some((_, changed)) = &mut host.memory.dead {
                revision(changed);
            }
            match &mut host.stage {
                Stage::Write(request) => of_request(request, revision, lease),
                Stage::Grant(Plan::TakeOver(held)) => of_held(held, revision, lease),
                Stage::Grant(Plan::Create { config, whole, .. }) => {
                    revision(config);
                    whole.iter_mut().for_each(&mut *revision);
                }
                Stage::Look | Stage::Hold => {}
            }
        }
        for (_, request) in &mut self.late {
            of_request(request, revision, lease);
        }
    }

    /// A number that is the same for the same world.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut text = String::with_capacity(2048);
        write!(text, "{self:?}").unwrap();
        // As rustc's own hasher does it: some hundred thousand worlds are told apart by 64 bits.
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        let step = |hash: u64, word: u64| (hash.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
        let words = text.as_bytes().chunks_exact(8);
        let rest = word(words.remainder());
        step(words.map(|w| u64::from_le_bytes(w.try_into().unwrap())).fold(0, step), rest)
    }
}

fn of_held(held: &mut Held, revision: &mut dyn FnMut(&mut i64), lease: &mut dyn FnMut(&mut i64)) {
    revision(&mut held.mod_revision);
    held.lease.etcd_lease.iter_mut().for_each(lease);
}

fn of_request(request: &mut Request, revision: &mut dyn FnMut(&mut i64), lease: &mut dyn FnMut(&mut i64)) {
    for guard in &mut request.guards {
        match guard {
            Guard::Unchanged { revision: number, .. } | Guard::NoneMade { behind: number, .. } => revision(number),
        }
    }
    match &mut request.what {
        What::Put { binding, held, .. } => {
            binding.iter_mut().for_each(&mut *lease);
            of_held(held, revision, lease);
        }
        What::Remove { etcd_lease } => etcd_lease.iter_mut().for_each(lease),
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let World { setting: _, revision, config, entries, alive, granted: _, hosts, late, faults } = self;
        write!(f, "{revision} {config:?} {alive:?} {faults} ")?;
        f.debug_struct("World").field("entries", entries).field("hosts", hosts).field("late", late).finish()
    }
}
