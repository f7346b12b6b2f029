//! Guarded writes of entries: each goes through only where nothing has changed that the decision rests on.

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};

use super::StoreError;
use super::connect::Session;

/// What becomes of the etcd lease that an entry is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Binding {
    /// It stays as it is; the entry must be there.
    Keep,
    /// The entry is bound to this etcd lease.
    To(i64),
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
        let guard = Compare::mod_revision(self.keys.subnet(key), CompareOp::Equal, mod_revision);
        self.put(key, value, binding, vec![guard]).await
    }

    /// Makes an entry where nobody has one for the same range and the configuration was not changed since this revision (0: absent).
    /// With `whole`, also only where no entry at all was made behind that revision. Returns the revision of the write; `None` where
    /// anything stood in the way.
    pub(super) async fn create(
        &self,
        key: &str,
        value: String,
        etcd_lease: i64,
        config: i64,
        whole: Option<i64>,
    ) -> Result<Option<i64>, StoreError> {
        let full = self.keys.subnet(key);
        // `A` and `A&B` both name the range A; the apostrophe is the character behind `&`.
        let first = full.split('&').next().unwrap_or(&full);
        let mut guards = vec![
            Compare::mod_revision(self.keys.config(), CompareOp::Equal, config),
            Compare::create_revision(first, CompareOp::Equal, 0).with_range(format!("{first}'")),
        ];
        if let Some(revision) = whole {
            let (from, to) = self.keys.subnets();
            guards.push(Compare::create_revision(from, CompareOp::Less, revision + 1).with_range(to));
        }
        self.put(key, value, Binding::To(etcd_lease), guards).await
    }

    /// Deletes an entry where it was not changed since this revision; whether it is gone.
    pub(super) async fn remove(&self, key: &str, mod_revision: i64) -> Result<bool, StoreError> {
        let full = self.keys.subnet(key);
        let guard = Compare::mod_revision(full.clone(), CompareOp::Equal, mod_revision);
        let txn = Txn::new().when(vec![guard]).and_then(vec![TxnOp::delete(full, None)]);
        let mut kv = self.kv();
        Ok(self.within("delete a lease", kv.txn(txn)).await?.succeeded())
    }

    async fn put(&self, key: &str, value: String, binding: Binding, guards: Vec<Compare>) -> Result<Option<i64>, StoreError> {
        let options = match binding {
            Binding::Keep => PutOptions::new().with_ignore_lease(),
            Binding::To(id) => PutOptions::new().with_lease(id),
        };
        let txn = Txn::new().when(guards).and_then(vec![TxnOp::put(self.keys.subnet(key), value, Some(options))]);
        let mut kv = self.kv();
        let answer = self.within("write this host's lease", kv.txn(txn)).await?;
        Ok(answer.succeeded().then(|| answer.header().map_or(0, |header| header.revision())))
    }
}
