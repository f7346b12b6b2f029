//! Guarded writes of entries: each goes through only where nothing has changed that the decision rests on.
//!
//! What guards a write is a value ([`Guard`]), made by pure functions and turned into etcd's comparison at the last moment: the model of the
//! protocol in `tests/model.rs` judges the same values.

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};

use super::StoreError;
use super::connect::Session;
use super::keys::Keys;

/// What becomes of the etcd lease that an entry is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Binding {
    /// It stays as it is; the entry must be there.
    Keep,
    /// The entry is bound to this etcd lease.
    To(i64),
}

/// What must be so for a write to go through. etcd compares at the moment of the write, in one step with it; a key that is not there has
/// the revisions 0.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Guard {
    /// The key was changed at this revision last; 0: it is not there.
    Unchanged {
        /// The whole key.
        key: String,
        /// The revision.
        revision: i64,
    },
    /// No key of a range was made behind this revision; 0: there is none.
    NoneMade {
        /// The first key of the range.
        from: String,
        /// The key behind the range.
        to: String,
        /// The revision.
        behind: i64,
    },
}

impl Guard {
    fn compare(self) -> Compare {
        match self {
            Guard::Unchanged { key, revision } => Compare::mod_revision(key, CompareOp::Equal, revision),
            Guard::NoneMade { from, to, behind } => Compare::create_revision(from, CompareOp::Less, behind + 1).with_range(to),
        }
    }
}

/// An entry may be changed or deleted where it was not changed since this revision.
pub(super) fn change_guards(keys: &Keys, key: &str, mod_revision: i64) -> Vec<Guard> {
    vec![Guard::Unchanged { key: keys.subnet(key), revision: mod_revision }]
}

/// An entry may be made where nobody has one for the same range and the configuration was not changed since revision `config` (0: absent).
/// With `whole`, also only where no entry at all was made behind that revision.
pub(super) fn create_guards(keys: &Keys, key: &str, config: i64, whole: Option<i64>) -> Vec<Guard> {
    let full = keys.subnet(key);
    // `A` and `A&B` both name the range A; the apostrophe is the character behind `&`.
    let first = full.split('&').next().unwrap_or(&full).to_owned();
    let mut guards = vec![
        Guard::Unchanged { key: keys.config(), revision: config },
        Guard::NoneMade { to: format!("{first}'"), from: first, behind: 0 },
    ];
    if let Some(behind) = whole {
        let (from, to) = keys.subnets();
        guards.push(Guard::NoneMade { from, to, behind });
    }
    guards
}

impl Session {
    /// Writes an entry where it was not changed since this revision. Returns the revision of the write; `None` where it was changed.
    pub(super) async fn overwrite(
        &self,
        key: &str,
        value: String,
        binding: Binding,
        mod_revision: i64,
    ) -> Result<Option<i64>, StoreError> {
        self.put(key, value, binding, change_guards(&self.keys, key, mod_revision)).await
    }

    /// Makes an entry under [`create_guards`]. Returns the revision of the write; `None` where anything stood in the way.
    pub(super) async fn create(
        &self,
        key: &str,
        value: String,
        etcd_lease: i64,
        config: i64,
        whole: Option<i64>,
    ) -> Result<Option<i64>, StoreError> {
        let guards = create_guards(&self.keys, key, config, whole);
        self.put(key, value, Binding::To(etcd_lease), guards).await
    }

    /// Deletes an entry where it was not changed since this revision; whether it is gone.
    pub(super) async fn remove(&self, key: &str, mod_revision: i64) -> Result<bool, StoreError> {
        let guards: Vec<Compare> = change_guards(&self.keys, key, mod_revision).into_iter().map(Guard::compare).collect();
        let txn = Txn::new().when(guards).and_then(vec![TxnOp::delete(self.keys.subnet(key), None)]);
        let mut kv = self.kv();
        Ok(self.within("delete a lease", kv.txn(txn)).await?.succeeded())
    }

    async fn put(&self, key: &str, value: String, binding: Binding, guards: Vec<Guard>) -> Result<Option<i64>, StoreError> {
        let options = match binding {
            Binding::Keep => PutOptions::new().with_ignore_lease(),
            Binding::To(id) => PutOptions::new().with_lease(id),
        };
        let guards: Vec<Compare> = guards.into_iter().map(Guard::compare).collect();
        let txn = Txn::new().when(guards).and_then(vec![TxnOp::put(self.keys.subnet(key), value, Some(options))]);
        let mut kv = self.kv();
        let answer = self.within("write this host's lease", kv.txn(txn)).await?;
        Ok(answer.succeeded().then(|| answer.header().map_or(0, |header| header.revision())))
    }
}
