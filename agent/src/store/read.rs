//! Reads the configuration and all leases at one revision, page by page, because etcd limits the size of a response.

use std::time::Instant;

use etcd_client::{GetOptions, KeyValue, ResponseHeader};
use tracing::debug;

use super::StoreError;
use super::connect::{ClusterState, Session};
use super::keys::KeyKind;

/// Maximum number of leases in one response.
const PAGE_SIZE: i64 = 2_000;

/// The raw configuration in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawConfig {
    pub(super) text: String,
    pub(super) mod_revision: i64,
}

/// A raw entry of `subnets/` in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawEntry {
    /// The part of the key after `subnets/`.
    pub(super) key: String,
    pub(super) value: Vec<u8>,
    pub(super) create_revision: i64,
    pub(super) mod_revision: i64,
    pub(super) etcd_lease: Option<i64>,
}

/// Configuration and all entries at one revision.
#[derive(Debug, Clone)]
pub(super) struct Listing {
    pub(super) revision: i64,
    pub(super) config: Option<RawConfig>,
    pub(super) entries: Vec<RawEntry>,
}

impl RawConfig {
    pub(super) fn from_kv(kv: &KeyValue) -> RawConfig {
        RawConfig { text: String::from_utf8_lossy(kv.value()).into_owned(), mod_revision: kv.mod_revision() }
    }
}

impl RawEntry {
    /// Builds an entry from the last part of its key and etcd's key-value record.
    pub(super) fn from_kv(key: String, kv: &KeyValue) -> RawEntry {
        RawEntry {
            key,
            value: kv.value().to_vec(),
            create_revision: kv.create_revision(),
            mod_revision: kv.mod_revision(),
            etcd_lease: (kv.lease() != 0).then_some(kv.lease()),
        }
    }
}

/// The cluster state in a response header.
pub(super) fn cluster_state(header: Option<&ResponseHeader>) -> ClusterState {
    match header {
        Some(h) => ClusterState { cluster_id: h.cluster_id(), term: h.raft_term(), revision: h.revision() },
        None => ClusterState { cluster_id: 0, term: 0, revision: 0 },
    }
}

impl Session {
    /// Reads the current configuration.
    pub(super) async fn get_config(&self) -> Result<(Option<RawConfig>, ClusterState), StoreError> {
        let mut kv = self.kv();
        let response = self.with_timeout("read the configuration", kv.get(self.keys.config(), None)).await?;
        Ok((response.kvs().first().map(RawConfig::from_kv), cluster_state(response.header())))
    }

    /// Reads one entry.
    pub(super) async fn get_entry(&self, key: &str) -> Result<Option<RawEntry>, StoreError> {
        let mut kv = self.kv();
        let response = self.with_timeout("read a lease", kv.get(self.keys.subnet(key), None)).await?;
        Ok(response.kvs().first().map(|kv| RawEntry::from_kv(key.to_owned(), kv)))
    }

    /// Reads the configuration and all entries at one revision.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if the revision was compacted between two pages; the caller reads again.
    pub(super) async fn list(&self) -> Result<Listing, StoreError> {
        let started = Instant::now();
        let (config, now) = self.get_config().await?;
        let mut listing = Listing { revision: now.revision, config, entries: Vec::new() };
        let (mut from, to) = self.keys.subnets_range();
        let mut from = std::mem::take(&mut from).into_bytes();
        let mut page = PAGE_SIZE;
        loop {
            let options = GetOptions::new().with_range(to.clone()).with_limit(page).with_revision(listing.revision);
            let mut kv = self.kv();
            let response = match self.with_timeout("read the leases", kv.get(from.clone(), Some(options))).await {
                // Another client wrote large values: request fewer entries per page.
                Err(StoreError::TooLarge { detail, .. }) if page > 1 => {
                    debug!(page, detail, "response too large; requesting smaller pages");
                    page = (page / 8).max(1);
                    continue;
                }
                other => other?,
            };
            let kvs = response.kvs();
            for kv in kvs {
                if let KeyKind::Subnet(key) = self.keys.kind_of(kv.key()) {
                    listing.entries.push(RawEntry::from_kv(key, kv));
                }
            }
            match kvs.last() {
                Some(last) if response.more() => {
                    // The next key in order is this one with a zero byte appended.
                    from = [last.key(), &[0]].concat();
                }
                _ => {
                    debug!(leases = listing.entries.len(), ms = started.elapsed().as_secs_f64() * 1e3, "leases read");
                    return Ok(listing);
                }
            }
        }
    }
}
