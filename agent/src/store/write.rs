//! Conditional writes of entries: each succeeds only if the data that the decision was based on is unchanged.
//!
//! The condition is a value ([`Precondition`]) that pure functions build. It becomes an etcd comparison only when it is sent: the
//! protocol model in `tests/model.rs` evaluates the same values.

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};

use super::StoreError;
use super::connect::Session;
use super::keys::Keys;

/// The etcd lease that a write binds an entry to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LeaseBinding {
    /// Keep the current etcd lease; the entry must exist.
    Keep,
    /// Bind the entry to this etcd lease.
    To(i64),
}

/// Condition of a write. etcd evaluates it atomically with the write. A missing key has the revisions 0.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Precondition {
    /// The key's last change was at this revision; 0: the key does not exist.
    Unchanged {
        /// The full key.
        key: String,
        /// The revision.
        revision: i64,
    },
    /// No key of the range was created after this revision; 0: the range is empty.
    NoneCreated {
        /// The first key of the range.
        from: String,
        /// The end of the range, exclusive.
        to: String,
        /// The revision.
        after_revision: i64,
    },
}

impl Precondition {
    fn into_compare(self) -> Compare {
        match self {
            Precondition::Unchanged { key, revision } => Compare::mod_revision(key, CompareOp::Equal, revision),
            Precondition::NoneCreated { from, to, after_revision } => {
                Compare::create_revision(from, CompareOp::Less, after_revision + 1).with_range(to)
            }
        }
    }
}

/// Preconditions for changing or deleting an entry: it is unchanged since this revision.
pub(super) fn change_preconditions(keys: &Keys, key: &str, mod_revision: i64) -> Vec<Precondition> {
    vec![Precondition::Unchanged { key: keys.subnet(key), revision: mod_revision }]
}

/// Preconditions for creating an entry: no entry exists for the same range, and the configuration is unchanged since revision
/// `config` (0: absent). With `max_create_revision`, additionally: no entry at all was created after that revision.
pub(super) fn create_preconditions(keys: &Keys, key: &str, config: i64, max_create_revision: Option<i64>) -> Vec<Precondition> {
    let full_key = keys.subnet(key);
    // `A` and `A&B` both name the range A; the apostrophe is the character after `&`.
    let first = full_key.split('&').next().unwrap_or(&full_key).to_owned();
    let mut preconditions = vec![
        Precondition::Unchanged { key: keys.config(), revision: config },
        Precondition::NoneCreated { to: format!("{first}'"), from: first, after_revision: 0 },
    ];
    if let Some(after_revision) = max_create_revision {
        let (from, to) = keys.subnets_range();
        preconditions.push(Precondition::NoneCreated { from, to, after_revision });
    }
    preconditions
}

impl Session {
    /// Overwrites an entry if it is unchanged since this revision. Returns the revision of the write; `None` if the entry was
    /// changed.
    pub(super) async fn overwrite(
        &self,
        key: &str,
        value: String,
        binding: LeaseBinding,
        mod_revision: i64,
    ) -> Result<Option<i64>, StoreError> {
        self.put(key, value, binding, change_preconditions(&self.keys, key, mod_revision)).await
    }

    /// Creates an entry under [`create_preconditions`]. Returns the revision of the write; `None` if a precondition failed.
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

    /// Deletes an entry if it is unchanged since this revision. Returns whether it was deleted.
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
        let response = self.with_timeout("write this host's lease", kv.txn(txn)).await?;
        Ok(response.succeeded().then(|| response.header().map_or(0, |header| header.revision())))
    }
}
