//! Reading the configuration and every lease at one revision, page by page, because one answer of etcd is limited.

use std::time::Instant;

use etcd_client::{GetOptions, KeyValue, ResponseHeader};
use tracing::debug;

use super::StoreError;
use super::connect::{Greeting, Session};
use super::keys::Place;

/// Leases in one answer.
const PAGE: i64 = 2_000;

/// The configuration as it stands in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawConfig {
    pub(super) text: String,
    pub(super) mod_revision: i64,
}

/// An entry of `subnets/` as it stands in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawEntry {
    /// The part of the key behind `subnets/`.
    pub(super) key: String,
    pub(super) value: Vec<u8>,
    pub(super) create_revision: i64,
    pub(super) mod_revision: i64,
    pub(super) etcd_lease: Option<i64>,
}

/// Everything at one revision.
#[derive(Debug, Clone)]
pub(super) struct Listing {
    pub(super) revision: i64,
    pub(super) config: Option<RawConfig>,
    pub(super) entries: Vec<RawEntry>,
}

impl RawConfig {
    pub(super) fn of(kv: &KeyValue) -> RawConfig {
        RawConfig { text: String::from_utf8_lossy(kv.value()).into_owned(), mod_revision: kv.mod_revision() }
    }
}

impl RawEntry {
    /// An entry from its key's last part and what etcd says of it.
    pub(super) fn of(key: String, kv: &KeyValue) -> RawEntry {
        RawEntry {
            key,
            value: kv.value().to_vec(),
            create_revision: kv.create_revision(),
            mod_revision: kv.mod_revision(),
            etcd_lease: (kv.lease() != 0).then_some(kv.lease()),
        }
    }
}

/// Where a server stands, by the header of an answer.
pub(super) fn greeting(header: Option<&ResponseHeader>) -> Greeting {
    match header {
        Some(h) => Greeting { cluster: h.cluster_id(), term: h.raft_term(), revision: h.revision() },
        None => Greeting { cluster: 0, term: 0, revision: 0 },
    }
}

impl Session {
    /// The configuration now.
    pub(super) async fn get_config(&self) -> Result<(Option<RawConfig>, Greeting), StoreError> {
        let mut kv = self.kv();
        let answer = self.within("read the configuration", kv.get(self.keys.config(), None)).await?;
        Ok((answer.kvs().first().map(RawConfig::of), greeting(answer.header())))
    }

    /// One entry, and the revision at which it is so.
    pub(super) async fn get_entry(&self, key: &str) -> Result<(Option<RawEntry>, i64), StoreError> {
        let mut kv = self.kv();
        let answer = self.within("read a lease", kv.get(self.keys.subnet(key), None)).await?;
        let entry = answer.kvs().first().map(|kv| RawEntry::of(key.to_owned(), kv));
        Ok((entry, greeting(answer.header()).revision))
    }

    /// The configuration and every entry at one revision.
    ///
    /// # Errors
    /// Also [`StoreError::Compacted`] where the revision was compacted away between two pages: read again.
    pub(super) async fn list(&self) -> Result<Listing, StoreError> {
        let begun = Instant::now();
        let (config, now) = self.get_config().await?;
        let mut listing = Listing { revision: now.revision, config, entries: Vec::new() };
        let (mut from, to) = self.keys.subnets();
        let mut from = std::mem::take(&mut from).into_bytes();
        let mut page = PAGE;
        loop {
            let options = GetOptions::new().with_range(to.clone()).with_limit(page).with_revision(listing.revision);
            let mut kv = self.kv();
            let answer = match self.within("read the leases", kv.get(from.clone(), Some(options))).await {
                // Somebody put large values there: ask for fewer of them.
                Err(StoreError::TooLarge { detail, .. }) if page > 1 => {
                    debug!(page, detail, "answer too large, asking for smaller pages");
                    page = (page / 8).max(1);
                    continue;
                }
                other => other?,
            };
            let kvs = answer.kvs();
            for kv in kvs {
                if let Place::Subnet(key) = self.keys.place(kv.key()) {
                    listing.entries.push(RawEntry::of(key, kv));
                }
            }
            match kvs.last() {
                Some(last) if answer.more() => {
                    // The next key in order is this one with a zero byte behind it.
                    from = [last.key(), &[0]].concat();
                }
                _ => {
                    debug!(leases = listing.entries.len(), ms = begun.elapsed().as_secs_f64() * 1e3, "leases read");
                    return Ok(listing);
                }
            }
        }
    }
}
