//! Single requests for programs that are no agent: `overlayctl` straight at etcd, and `overlayd_command run_cleanup`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use futures_util::{StreamExt, TryStreamExt, stream};
use tracing::debug;

use super::connect::{Session, StoreConfig, connect};
use super::lease::{LeaseEntry, LeaseSnapshot};
use super::{StoreError, codec};
use crate::model::event::StoreEntry;

/// Requests for the time left of etcd leases that are under way at once.
const MAX_CONCURRENT_REQUESTS: usize = 64;
/// How often an entry is looked at again that was changed while it was being released.
const MAX_RELEASE_ATTEMPTS: u32 = 5;

/// Everything in the store at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The revision.
    pub revision: i64,
    /// The configuration.
    pub config: ConfigText,
    /// Every entry below `<prefix>/subnets/`.
    pub entries: Vec<StoreEntry>,
    /// What is left of each etcd lease, by its id, where it was asked for.
    pub remaining_ttls: BTreeMap<i64, Duration>,
}

/// The network's configuration as it stands in the store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConfigText {
    /// The JSON text; absent where nothing was configured.
    pub text: Option<String>,
    /// The revision of its last change; 0 where it is absent.
    pub mod_revision: i64,
}

/// What one server says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberStatus {
    /// etcd's version.
    pub version: String,
    /// Whether the cluster has a leader, as this server sees it.
    pub has_leader: bool,
    /// What it reports as wrong: no space, a damaged database.
    pub alarms: Vec<String>,
}

/// Which configuration may be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplaceCondition {
    /// The one that was last changed at this revision; 0 where there must be none.
    Revision(i64),
    /// Any.
    Any,
}

/// What became of a host's entries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReleaseReport {
    /// Keys that were deleted.
    pub released: Vec<String>,
    /// Keys of reservations, which stay.
    pub reservations: Vec<String>,
}

/// Reads the configuration and every lease; with `time_left`, also what is left of each etcd lease.
///
/// # Errors
/// Whatever keeps etcd from answering.
pub async fn read_all(config: &StoreConfig, with_remaining_ttls: bool) -> Result<Snapshot, StoreError> {
    let session = connect(config).await?;
    let listing = session.list().await?;
    let entries: Vec<StoreEntry> = listing.entries.iter().map(codec::decode).collect();
    let left = match with_remaining_ttls {
        true => request_remaining_ttls(&session, listing.entries.iter().filter_map(|entry| entry.etcd_lease)).await?,
        false => BTreeMap::new(),
    };
    let config = config_text(listing.config);
    Ok(Snapshot { revision: listing.revision, config, entries, remaining_ttls: left })
}

/// What is left of these etcd leases; one that is gone is not in the answer.
///
/// # Errors
/// Whatever keeps etcd from answering.
pub async fn remaining_ttls(config: &StoreConfig, ids: Vec<i64>) -> Result<BTreeMap<i64, Duration>, StoreError> {
    request_remaining_ttls(&connect(config).await?, ids).await
}

async fn request_remaining_ttls(
    session: &Session,
    ids: impl IntoIterator<Item = i64>,
) -> Result<BTreeMap<i64, Duration>, StoreError> {
    let ids: BTreeSet<i64> = ids.into_iter().collect();
    stream::iter(ids)
        .map(|id| async move { Ok::<_, StoreError>((id, session.time_to_live(id).await?)) })
        .buffer_unordered(MAX_CONCURRENT_REQUESTS)
        .try_filter_map(|(id, ttl)| async move { Ok(ttl.map(|ttl| (id, ttl.remaining))) })
        .try_collect()
        .await
}

/// Asks the first server that answers about itself, after it has let us read the configuration.
///
/// # Errors
/// Whatever keeps etcd from answering.
pub async fn member_status(config: &StoreConfig) -> Result<MemberStatus, StoreError> {
    let session = connect(config).await?;
    let mut client = session.client.maintenance_client();
    let status = session.with_timeout("read the server's status", client.status()).await?;
    Ok(MemberStatus { version: status.version().to_owned(), has_leader: status.leader() != 0, alarms: status.errors().to_vec() })
}

/// Reads the network's configuration.
///
/// # Errors
/// Whatever keeps etcd from answering.
pub async fn get_config(config: &StoreConfig) -> Result<ConfigText, StoreError> {
    Ok(config_text(connect(config).await?.get_config().await?.0))
}

fn config_text(raw: Option<super::read::RawConfig>) -> ConfigText {
    raw.map_or_else(ConfigText::default, |raw| ConfigText { text: Some(raw.text), mod_revision: raw.mod_revision })
}

/// Writes the network's configuration as it is given: the caller has checked it. Returns the revision of the change.
///
/// # Errors
/// [`StoreError::Conflict`] where another one stands there than the caller wants to replace.
pub async fn put_config(config: &StoreConfig, text: &str, replace: ReplaceCondition) -> Result<i64, StoreError> {
    let session = connect(config).await?;
    let key = session.keys.config();
    let mut txn = Txn::new();
    if let ReplaceCondition::Revision(revision) = replace {
        txn = txn.when(vec![Compare::mod_revision(key.clone(), CompareOp::Equal, revision)]);
    }
    let txn = txn.and_then(vec![TxnOp::put(key, text, None)]);
    let mut kv = session.kv();
    let answer = session.with_timeout("write the configuration", kv.txn(txn)).await?;
    match (answer.succeeded(), replace) {
        (false, ReplaceCondition::Revision(expected)) => {
            let found = session.get_config().await?.0.map_or(0, |config| config.mod_revision);
            Err(StoreError::Conflict { expected, found })
        }
        _ => Ok(answer.header().map_or(0, |header| header.revision())),
    }
}

/// Gives back what the host with this identity holds: deletes its entries and revokes their etcd leases. Reservations stay.
///
/// # Errors
/// Whatever keeps etcd from answering; what was released before stays released.
pub async fn release(config: &StoreConfig, node_id: &str) -> Result<ReleaseReport, StoreError> {
    let session = connect(config).await?;
    let mut report = ReleaseReport::default();
    for _ in 0..MAX_RELEASE_ATTEMPTS {
        let snapshot = LeaseSnapshot::from_listing(session.list().await?, node_id);
        let is_ours = |claim: &&LeaseEntry| claim.owner.node.as_ref().is_some_and(|node| node.id == node_id);
        report.reservations =
            snapshot.entries.iter().filter(is_ours).filter(|c| c.etcd_lease.is_none()).map(|c| c.key.clone()).collect();
        let mut again = false;
        for claim in snapshot.entries.iter().filter(is_ours) {
            let Some(id) = claim.etcd_lease else { continue };
            if session.remove(&claim.key, claim.mod_revision).await? {
                report.released.push(claim.key.clone());
                if !snapshot.entries.iter().any(|other| other.key != claim.key && other.etcd_lease == Some(id)) {
                    session.revoke(id).await?;
                }
            } else {
                debug!(key = claim.key, "changed while it was being released, looking again");
                again = true;
            }
        }
        if !again {
            break;
        }
    }
    Ok(report)
}
