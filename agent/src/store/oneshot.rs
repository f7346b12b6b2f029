//! Single requests for programs without an agent: `overlayctl` commands that access etcd directly, and `overlayd cleanup`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use futures_util::{StreamExt, TryStreamExt, stream};
use tracing::debug;

use super::connect::{Session, StoreConfig, connect};
use super::lease::{LeaseEntry, LeaseSnapshot};
use super::{StoreError, codec};
use crate::model::ExpiryId;
use crate::model::event::StoreEntry;

/// Maximum number of concurrent requests for remaining TTLs.
const MAX_CONCURRENT_REQUESTS: usize = 64;
/// Maximum number of attempts to release entries that change concurrently.
const MAX_RELEASE_ATTEMPTS: u32 = 5;

/// Configuration and all entries at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The revision.
    pub revision: i64,
    /// The configuration.
    pub config: ConfigText,
    /// Every entry below `<prefix>/subnets/`.
    pub entries: Vec<StoreEntry>,
    /// Remaining TTL of each etcd lease by its ID, if requested.
    pub remaining_ttls: BTreeMap<ExpiryId, Duration>,
}

/// The network's configuration as stored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConfigText {
    /// The JSON text; `None` if no configuration exists.
    pub text: Option<String>,
    /// The revision of its last change; 0 if absent.
    pub mod_revision: i64,
}

/// Status that one etcd server reports of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberStatus {
    /// etcd's version.
    pub version: String,
    /// Whether this server knows a leader of the cluster.
    pub has_leader: bool,
    /// Active alarms: no space, corrupt database.
    pub alarms: Vec<String>,
}

/// Condition for replacing the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplaceCondition {
    /// Its last change was at this revision; 0: it must not exist.
    Revision(i64),
    /// No condition.
    Any,
}

/// Result of releasing a host's entries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReleaseReport {
    /// Deleted keys.
    pub released: Vec<String>,
    /// Keys of reservations, which are kept.
    pub reservations: Vec<String>,
}

/// Reads the configuration and all leases; with `with_remaining_ttls`, also the remaining TTL of each etcd lease.
///
/// # Errors
/// Any error of the connection or a request.
pub async fn read_all(config: &StoreConfig, with_remaining_ttls: bool) -> Result<Snapshot, StoreError> {
    let session = connect(config).await?;
    let listing = session.list().await?;
    let entries: Vec<StoreEntry> = listing.entries.iter().map(codec::decode).collect();
    let remaining_ttls = match with_remaining_ttls {
        true => request_remaining_ttls(&session, listing.entries.iter().filter_map(|entry| entry.etcd_lease)).await?,
        false => BTreeMap::new(),
    };
    let config = config_text(listing.config);
    Ok(Snapshot { revision: listing.revision, config, entries, remaining_ttls })
}

/// Reads the remaining TTLs of these etcd leases. An expired lease is missing from the result.
///
/// # Errors
/// Any error of the connection or a request.
pub async fn remaining_ttls(config: &StoreConfig, ids: Vec<ExpiryId>) -> Result<BTreeMap<ExpiryId, Duration>, StoreError> {
    request_remaining_ttls(&connect(config).await?, ids.into_iter().map(|id| id.0)).await
}

pub(super) async fn request_remaining_ttls(
    session: &Session,
    ids: impl IntoIterator<Item = i64>,
) -> Result<BTreeMap<ExpiryId, Duration>, StoreError> {
    let ids: BTreeSet<i64> = ids.into_iter().collect();
    stream::iter(ids)
        .map(|id| async move { Ok::<_, StoreError>((id, session.time_to_live(id).await?)) })
        .buffer_unordered(MAX_CONCURRENT_REQUESTS)
        .try_filter_map(|(id, ttl)| async move { Ok(ttl.map(|ttl| (ExpiryId(id), ttl.remaining))) })
        .try_collect()
        .await
}

/// Reads the status of the first server that answers. Connecting has already read the configuration from it.
///
/// # Errors
/// Any error of the connection or a request.
pub async fn member_status(config: &StoreConfig) -> Result<MemberStatus, StoreError> {
    let session = connect(config).await?;
    let mut client = session.client.maintenance_client();
    let status = session.with_timeout("read the server's status", client.status()).await?;
    Ok(MemberStatus { version: status.version().to_owned(), has_leader: status.leader() != 0, alarms: status.errors().to_vec() })
}

/// Reads the network's configuration.
///
/// # Errors
/// Any error of the connection or a request.
pub async fn get_config(config: &StoreConfig) -> Result<ConfigText, StoreError> {
    Ok(config_text(connect(config).await?.get_config().await?.0))
}

fn config_text(raw: Option<super::read::RawConfig>) -> ConfigText {
    raw.map_or_else(ConfigText::default, |raw| ConfigText { text: Some(raw.text), mod_revision: raw.mod_revision })
}

/// Writes the network's configuration unchanged; the caller has validated it. Returns the revision of the change.
///
/// # Errors
/// [`StoreError::Conflict`] if the stored configuration is not the one that the caller wants to replace.
pub async fn put_config(config: &StoreConfig, text: &str, replace: ReplaceCondition) -> Result<i64, StoreError> {
    let session = connect(config).await?;
    let key = session.keys.config();
    let mut txn = Txn::new();
    if let ReplaceCondition::Revision(revision) = replace {
        txn = txn.when(vec![Compare::mod_revision(key.clone(), CompareOp::Equal, revision)]);
    }
    let txn = txn.and_then(vec![TxnOp::put(key, text, None)]);
    let mut kv = session.kv();
    let response = session.with_timeout("write the configuration", kv.txn(txn)).await?;
    match (response.succeeded(), replace) {
        (false, ReplaceCondition::Revision(expected)) => {
            let found = session.get_config().await?.0.map_or(0, |config| config.mod_revision);
            Err(StoreError::Conflict { expected, found })
        }
        _ => Ok(response.header().map_or(0, |header| header.revision())),
    }
}

/// Releases the leases of the host with this identity: deletes its entries, and revokes their etcd leases unless entries of other
/// networks are bound to them. Reservations are kept.
///
/// # Errors
/// Any error of the connection or a request. Entries released before the error stay released.
pub async fn release(config: &StoreConfig, node_id: &str) -> Result<ReleaseReport, StoreError> {
    let session = connect(config).await?;
    release_entries(&session, node_id, |id| session.revoke_unbound(id)).await
}

/// Deletes a host's entries, and releases the etcd lease of each.
pub(super) async fn release_entries<F>(
    session: &Session,
    node_id: &str,
    release_lease: impl Fn(i64) -> F,
) -> Result<ReleaseReport, StoreError>
where
    F: Future<Output = Result<(), StoreError>>,
{
    let mut report = ReleaseReport::default();
    for _ in 0..MAX_RELEASE_ATTEMPTS {
        let snapshot = LeaseSnapshot::from_listing(session.list().await?, node_id);
        let is_ours = |entry: &&LeaseEntry| entry.owner.node.as_ref().is_some_and(|node| node.id == node_id);
        report.reservations =
            snapshot.entries.iter().filter(is_ours).filter(|c| c.etcd_lease.is_none()).map(|c| c.key.clone()).collect();
        let mut retry = false;
        for entry in snapshot.entries.iter().filter(is_ours) {
            let Some(id) = entry.etcd_lease else { continue };
            if session.remove(&entry.key, entry.mod_revision).await? {
                report.released.push(entry.key.clone());
                release_lease(id).await?;
            } else {
                debug!(key = entry.key, "entry changed during release; retrying");
                retry = true;
            }
        }
        if !retry {
            break;
        }
    }
    Ok(report)
}
