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
pub(super) enum LeaseBinding {
    /// It stays as it is; the entry must be there.
    Keep,
    /// The entry is bound to this etcd lease.
    To(i64),
}

/// What must be so for a write to go through. etcd compares at the moment of the write, in one step with it; a key that is not there has
/// the revisions 0.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Precondition {
    /// The key was changed at this revision last; 0: it is not there.
    Unchanged {
        /// The whole key.
        key: String,
        /// The revision.
        revision: i64,
    },
    /// No key of a range was made behind this revision; 0: there is none.
    NoneCreated {
        /// The first key of the range.
        from: String,
        /// The key behind the range.
        to: String,
        /// The revision.
        after_revision: i64,
    },
}

impl Precondition {
    fn into_compare(self) -> Compare {
        match self {
            Precondition::Unchanged { key, revision } => Compare::mod_revision(key, CompareOp::Equal, revision),
            Precondition::NoneCreated { from, to, after_revision: behind } => {
                Compare::create_revision(from, CompareOp::Less, behind + 1).with_range(to)
            }
        }
    }
}

/// An entry may be changed or deleted where it was not changed since this revision.
pub(super) fn change_preconditions(keys: &Keys, key: &str, mod_revision: i64) -> Vec<Precondition> {
    vec![Precondition::Unchanged { key: keys.subnet(key), revision: mod_revision }]
}

/// An entry may be made where nobody has one for the same range and the configuration was not changed since revision `config` (0: absent).
/// With `whole`, also only where no entry at all was made behind that revision.
pub(super) fn create_preconditions(keys: &Keys, key: &str, config: i64, max_create_revision: Option<i64>) -> Vec<Precondition> {
    let full = keys.subnet(key);
    // `A` and `A&B` both name the range A; the apostrophe is the character behind `&`.
    let first = full.split('&').next().unwrap_or(&full).to_owned();
    let mut preconditions = vec![
        Precondition::Unchanged { key: keys.config(), revision: config },
        Precondition::NoneCreated { to: format!("{first}'"), from: first, after_revision: 0 },
    ];
    if let Some(behind) = max_create_revision {
        let (from, to) = keys.subnets_range();
        preconditions.push(Precondition::NoneCreated { from, to, after_revision: behind });
    }
    preconditions
}

impl Session {
    /// Writes an entry where it was not changed since this revision. Returns the revision of the write; `None` where it was changed.
    pub(super) async fn overwrite(
        &self,
        key: &str,
        value: String,
        binding: LeaseBinding,
        mod_revision: i64,
    ) -> Result<Option<i64>, StoreError> {
        self.put(key, value, binding, change_preconditions(&self.keys, key, mod_revision)).await
    }

    /// Makes an entry under [`create_preconditions`]. Returns the revision of the write; `None` where anything stood in the way.
    pub(super) async fn create(
        &self,
        key: &str,
        value: String,
        etcd_lease: i64,
        config: i64,
        max_create_revision: Option<i64>,
    ) -> Result<Option<i64>, StoreError> {
        let preconditions = create_preconditions(&self.keys, key, config, max_create_revision);
        self.put(key, value, LeaseBinding::To(etcd_lease), preconditions).await
    }

    /// Deletes an entry where it was not changed since this revision; whether it is gone.
    pub(super) async fn remove(&self, key: &str, mod_revision: i64) -> Result<bool, StoreError> {
        let compares: Vec<Compare> =
            change_preconditions(&self.keys, key, mod_revision).into_iter().map(Precondition::into_compare).collect();
        let txn = Txn::new().when(compares).and_then(vec![TxnOp::delete(self.keys.subnet(key), None)]);
        let mut kv = self.kv();
        Ok(self.with_timeout("delete a lease", kv.txn(txn)).await?.succeeded())
    }

    async fn put(
        &self,
        key: &str,
        value: String,
        binding: LeaseBinding,
        preconditions: Vec<Precondition>,
    ) -> Result<Option<i64>, StoreError> {
        let options = match binding {
            LeaseBinding::Keep => PutOptions::new().with_ignore_lease(),
            LeaseBinding::To(id) => PutOptions::new().with_lease(id),
        };
        let compares: Vec<Compare> = preconditions.into_iter().map(Precondition::into_compare).collect();
        let txn = Txn::new().when(compares).and_then(vec![TxnOp::put(self.keys.subnet(key), value, Some(options))]);
        let mut kv = self.kv();
        let answer = self.with_timeout("write this host's lease", kv.txn(txn)).await?;
        Ok(answer.succeeded().then(|| answer.header().map_or(0, |header| header.revision())))
    }
}
