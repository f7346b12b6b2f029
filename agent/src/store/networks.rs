//! The networks' records: reads all at one revision, writes or removes one in a transaction.
//!
//! A transaction succeeds only if the records that the change was checked against are unchanged. Otherwise they are read again
//! and the change is checked again, so that two operators cannot make networks that contradict each other.
//! `docs/decisions/0040-network-records.md` has the reasons.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use etcd_client::{Compare, CompareOp, DeleteOptions, GetOptions, Txn, TxnOp};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tracing::debug;

use super::connect::{Session, connect};
use super::keys::Keys;
use super::read::{RawConfig, cluster_state};
use super::{ConfigText, StoreConfig, StoreError, codec};
use crate::backoff::Backoff;
use crate::model::network::{ConfigErrors, FieldError};
use crate::model::network_set::joined;
use crate::model::text::printable;
use crate::model::{NetworkChange, NetworkName, NetworkRecord, NetworkSet, Vni};

/// Maximum number of attempts while other operators change networks. Of several transactions at once, one succeeds.
const MAX_ATTEMPTS: u32 = 20;
/// Delay before the next attempt.
const RETRY_BACKOFF: Backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(500));

/// All networks at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Networks {
    /// The revision.
    pub revision: i64,
    /// The networks.
    pub set: NetworkSet,
    /// Each record as stored.
    texts: BTreeMap<NetworkName, ConfigText>,
}

/// Which network a write expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteKind {
    /// None with the name.
    Create,
    /// A present one.
    Change,
}

/// Result of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenNetwork {
    /// The full key of the record.
    pub key: String,
    /// The record.
    pub record: NetworkRecord,
    /// Its text before; `None` for a new network.
    pub before: Option<String>,
    /// Its text now.
    pub text: String,
    /// Whether the text was written: it was different.
    pub changed: bool,
}

/// Failure to write or remove a network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Error of the connection or a request.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The user may not write networks.
    #[error(
        "{who} may not {what} at etcd {endpoint}: networks are the role overlay-admin's; use its user \
         (--etcd-username overlay-admin --etcd-password-file FILE), or grant your role \
         `etcdctl role grant-permission ROLE readwrite --prefix {prefix}/`"
    )]
    Role {
        /// The rejected user.
        who: String,
        /// The request.
        what: &'static str,
        /// The endpoint.
        endpoint: String,
        /// The prefix.
        prefix: String,
    },
    /// The name is taken.
    #[error("network {name} exists: choose another name, or change it with `overlayctl network set {name}`")]
    Exists {
        /// The name.
        name: NetworkName,
    },
    /// No network has this name.
    #[error("no network {name}; present: {present}")]
    Missing {
        /// The name.
        name: NetworkName,
        /// The networks that exist.
        present: String,
    },
    /// The network breaks rules.
    #[error("network {name}: {errors}")]
    Invalid {
        /// The name.
        name: NetworkName,
        /// Each broken rule.
        errors: ConfigErrors,
    },
    /// Hosts hold leases of the network.
    #[error(
        "network {name} is in use by {}: detach the containers and stop the agents there, or repeat with --force, which \
         deletes the leases",
        shortened(holders)
    )]
    InUse {
        /// The name.
        name: NetworkName,
        /// Each host with its subnet.
        holders: Vec<String>,
    },
    /// Other networks name it as their peer.
    #[error("networks {} name {name} in Peers: first `overlayctl network set NAME --remove-peer {name}`", joined(peers))]
    Peered {
        /// The name.
        name: NetworkName,
        /// The networks that name it.
        peers: Vec<NetworkName>,
    },
    /// Other operators changed networks at each attempt.
    #[error("networks were changed by others at each of {MAX_ATTEMPTS} attempts; nothing was written: repeat the command")]
    Contended,
}

/// Reads all networks.
///
/// # Errors
/// Any error of the connection or a request.
pub async fn read_networks(config: &StoreConfig) -> Result<Networks, StoreError> {
    connect(config).await?.networks().await
}

/// Creates or changes a network. A new named network without a VNI gets the lowest free one.
///
/// # Errors
/// All [`NetworkError`]s but those of a removal. Nothing is written then.
pub async fn write_network(
    config: &StoreConfig,
    name: &NetworkName,
    kind: WriteKind,
    change: &NetworkChange,
) -> Result<WrittenNetwork, NetworkError> {
    let session = connect(config).await?;
    let what = match kind {
        WriteKind::Create => "create a network",
        WriteKind::Change => "change a network",
    };
    let mut attempts = Attempts::new();
    loop {
        let networks = attempts.next(&session).await?;
        let written = networks.plan_write(&session.keys, name, kind, change)?;
        if !written.changed {
            return Ok(written);
        }
        let vni = written.record.vni().filter(|_| !name.is_default());
        let mut operations = vec![TxnOp::put(written.key.clone(), written.text.clone(), None)];
        // Also when the VNI stays: the new revision of its key tells other operators that the network changed.
        operations.extend(vni.map(|vni| TxnOp::put(session.keys.vni(vni), name.to_string(), None)));
        let old = networks.vnis_of(name).filter(|old| Some(*old) != vni);
        operations.extend(old.map(|old| TxnOp::delete(session.keys.vni(old), None)));
        let compares = networks.unchanged(&session.keys, [name].into_iter().chain(&written.record.peers));
        if session.commit(what, compares, operations).await? {
            return Ok(written);
        }
    }
}

/// Removes a network with its VNI. With `force` also with its leases; otherwise it must have none. Returns the deleted leases,
/// each with its host.
///
/// # Errors
/// All [`NetworkError`]s but those of a write. Nothing is removed then.
pub async fn remove_network(config: &StoreConfig, name: &NetworkName, force: bool) -> Result<Vec<String>, NetworkError> {
    let session = connect(config).await?;
    let own = session.of_network(session.keys.network(name));
    let mut attempts = Attempts::new();
    loop {
        let networks = attempts.next(&session).await?;
        if !networks.set.networks.contains_key(name) {
            return Err(networks.missing(name));
        }
        let peers: Vec<NetworkName> = networks.set.peered_with(name).into_iter().filter(|peer| *peer != name).cloned().collect();
        if !peers.is_empty() {
            return Err(NetworkError::Peered { name: name.clone(), peers });
        }
        let listing = own.list().await?;
        let holders: Vec<String> = listing.entries.iter().map(|entry| holder(&entry.key, &entry.value)).collect();
        if !force && !holders.is_empty() {
            return Err(NetworkError::InUse { name: name.clone(), holders });
        }
        let mut compares = networks.unchanged(&session.keys, [name]);
        let (from, to) = own.keys.subnets_range();
        // No lease, or none that is missing in the returned list.
        let last_created = if force { listing.revision } else { 0 };
        compares.push(Compare::create_revision(from.clone(), CompareOp::Less, last_created + 1).with_range(to.clone()));
        // Below the default network's prefix are all others.
        let (from, to) = if name.is_default() { (from, to) } else { own.keys.prefix_range() };
        let mut operations =
            vec![TxnOp::delete(own.keys.config(), None), TxnOp::delete(from, Some(DeleteOptions::new().with_range(to)))];
        operations.extend(networks.vnis_of(name).map(|vni| TxnOp::delete(session.keys.vni(vni), None)));
        if session.commit("remove a network", compares, operations).await? {
            return Ok(holders);
        }
    }
}

/// The attempts of one write or removal. Each begins with a read of all networks.
struct Attempts {
    count: u32,
    backoff: Backoff,
    random: SmallRng,
}

impl Attempts {
    fn new() -> Attempts {
        Attempts { count: 0, backoff: RETRY_BACKOFF, random: SmallRng::from_rng(&mut rand::rng()) }
    }

    /// Waits after an attempt whose transaction did not apply, and reads the networks.
    async fn next(&mut self, session: &Session) -> Result<Networks, NetworkError> {
        if self.count == MAX_ATTEMPTS {
            return Err(NetworkError::Contended);
        }
        if self.count > 0 {
            debug!(attempts = self.count, "networks changed during the transaction; retrying");
            tokio::time::sleep(self.backoff.next_delay(&mut self.random)).await;
        }
        self.count += 1;
        Ok(session.networks().await?)
    }
}

impl Networks {
    /// The stored text of a network's record; `None` without a record.
    pub fn text(&self, name: &NetworkName) -> Option<&str> {
        self.texts.get(name)?.text.as_deref()
    }

    /// The error that no network has this name.
    pub fn missing(&self, name: &NetworkName) -> NetworkError {
        NetworkError::Missing { name: name.clone(), present: joined(self.set.networks.keys()) }
    }

    /// The record after a change, checked against these networks.
    fn plan_write(
        &self,
        keys: &Keys,
        name: &NetworkName,
        kind: WriteKind,
        change: &NetworkChange,
    ) -> Result<WrittenNetwork, NetworkError> {
        match (kind, self.set.networks.contains_key(name)) {
            (WriteKind::Create, true) => return Err(NetworkError::Exists { name: name.clone() }),
            (WriteKind::Change, false) => return Err(self.missing(name)),
            _ => {}
        }
        let mut change = change.clone();
        if kind == WriteKind::Create && !name.is_default() {
            change.vni = change.vni.or_else(|| self.set.free_vni());
        }
        let before = self.text(name).map(str::to_owned);
        let text = change.apply(before.as_deref().unwrap_or_default());
        let invalid = |errors| NetworkError::Invalid { name: name.clone(), errors };
        let record = NetworkRecord::parse(&text).map_err(invalid)?;
        // Another network's defect, such as a record written by hand, must not keep this one from any change.
        let old_errors = match self.set.networks.get(name) {
            Some(Ok(old)) => self.set.check(name, old).err(),
            _ => None,
        };
        if let Err(ConfigErrors(mut errors)) = self.set.check(name, &record) {
            errors.retain(|error| !old_errors.as_ref().is_some_and(|old| old.0.contains(error)));
            if !errors.is_empty() {
                return Err(invalid(ConfigErrors(errors)));
            }
        }
        // A network made by hand may lack its VNI's key, or have another.
        let has_vni_key = name.is_default() || self.vnis_of(name).eq(record.vni());
        let changed = !(has_vni_key && before.as_deref().is_some_and(|before| is_same_json(before, &text)));
        Ok(WrittenNetwork { key: keys.network(name).config(), record, before, text, changed })
    }

    /// The VNIs whose keys name this network.
    fn vnis_of<'a>(&'a self, name: &'a NetworkName) -> impl Iterator<Item = Vni> + 'a {
        self.set.vnis.iter().filter(move |(_, holder)| *holder == name).map(|(vni, _)| *vni)
    }

    /// Compares for a change that was checked against these networks: the records of the networks that it names and of the
    /// default network are unchanged, and so is each VNI key. Each write of a named network sets its VNI key. A removal leaves no
    /// trace there, but makes only a change invalid that names the removed network.
    fn unchanged<'a>(&self, keys: &Keys, names: impl IntoIterator<Item = &'a NetworkName>) -> Vec<Compare> {
        let names: BTreeSet<NetworkName> = names.into_iter().cloned().chain([NetworkName::default()]).collect();
        let (from, to) = keys.vnis_range();
        let vnis = Compare::mod_revision(from, CompareOp::Less, self.revision + 1).with_range(to);
        let record = |name: &NetworkName| {
            let revision = self.texts.get(name).map_or(0, |stored| stored.mod_revision);
            Compare::mod_revision(keys.network(name).config(), CompareOp::Equal, revision)
        };
        names.iter().map(record).chain([vnis]).collect()
    }
}

impl Session {
    /// Reads the record of one network.
    pub(super) async fn network(&self, name: &NetworkName) -> Result<NetworkRecord, NetworkError> {
        let own = self.of_network(self.keys.network(name));
        let invalid = |errors| NetworkError::Invalid { name: name.clone(), errors };
        if let (Some(raw), _) = own.get_config().await? {
            return NetworkRecord::parse(&raw.text).map_err(invalid);
        }
        let mut networks = self.networks().await?;
        match networks.set.networks.remove(name) {
            None => Err(networks.missing(name)),
            Some(record) => record.map_err(invalid),
        }
    }

    /// Reads all networks at one revision. The number of requests grows with the networks, not with their leases.
    async fn networks(&self) -> Result<Networks, StoreError> {
        let mut kv = self.kv();
        let (from, to) = self.keys.vnis_range();
        let options = GetOptions::new().with_range(to);
        let response = self.with_timeout("read the networks", kv.get(from.clone(), Some(options))).await?;
        let revision = cluster_state(response.header()).revision;
        let vnis: BTreeMap<Vni, NetworkName> = response
            .kvs()
            .iter()
            .filter_map(|kv| {
                let vni = kv.key_str().ok()?.strip_prefix(&from)?.parse::<u32>().ok()?;
                Some((Vni::try_from(vni).ok()?, kv.value_str().ok()?.parse().ok()?))
            })
            .collect();
        let mut texts: BTreeMap<NetworkName, ConfigText> =
            vnis.values().map(|name| (name.clone(), ConfigText::default())).collect();
        let default = NetworkName::default();
        if let Some(stored) = self.config_at(&default, revision).await? {
            texts.insert(default, stored);
        }
        // From the first key of each name on, the next name is after all keys of this one.
        let (mut from, to) = self.keys.networks_range();
        loop {
            let options = GetOptions::new().with_range(to.clone()).with_limit(1).with_keys_only().with_revision(revision);
            let response = self.with_timeout("read the networks", kv.get(from.clone(), Some(options))).await?;
            let Some(key) = response.kvs().first() else { break };
            let key = String::from_utf8_lossy(key.key()).into_owned();
            let Some(part) = self.keys.network_part(&key) else { break };
            // `0` is the character after `/`.
            from = format!("{}{part}0", self.keys.networks_range().0);
            match part.parse::<NetworkName>() {
                Ok(name) if !name.is_default() => {
                    let stored = self.config_at(&name, revision).await?.unwrap_or_default();
                    texts.insert(name, stored);
                }
                _ => debug!(key = printable(&key), "key of no network; ignoring it"),
            }
        }
        let networks = texts.iter().map(|(name, stored)| (name.clone(), parse(stored))).collect();
        Ok(Networks { revision, set: NetworkSet { networks, vnis }, texts })
    }

    async fn config_at(&self, name: &NetworkName, revision: i64) -> Result<Option<ConfigText>, StoreError> {
        let mut kv = self.kv();
        let options = GetOptions::new().with_revision(revision);
        let response = self.with_timeout("read the networks", kv.get(self.keys.network(name).config(), Some(options))).await?;
        let raw = response.kvs().first().map(RawConfig::from_kv);
        Ok(raw.map(|raw| ConfigText { text: Some(raw.text), mod_revision: raw.mod_revision }))
    }

    /// Returns whether the operations were applied: all, or none if a compare failed.
    async fn commit(&self, what: &'static str, compares: Vec<Compare>, operations: Vec<TxnOp>) -> Result<bool, NetworkError> {
        let txn = Txn::new().when(compares).and_then(operations);
        let mut kv = self.kv();
        match self.with_timeout(what, kv.txn(txn)).await {
            Ok(response) => Ok(response.succeeded()),
            Err(StoreError::Permission { who, what, endpoint, prefix }) => {
                Err(NetworkError::Role { who, what, endpoint, prefix })
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn parse(stored: &ConfigText) -> Result<NetworkRecord, ConfigErrors> {
    match &stored.text {
        Some(text) => NetworkRecord::parse(text),
        None => {
            let rule = "is missing: other keys of the network are left; `overlayctl network rm` removes them";
            Err(ConfigErrors(vec![FieldError { field: "config".to_owned(), value: String::new(), rule: rule.to_owned() }]))
        }
    }
}

/// The host of a lease with its subnet, for a sentence.
fn holder(key: &str, value: &[u8]) -> String {
    let owner = codec::owner(value);
    let host = owner.node.map(|node| node.name).unwrap_or_else(|| owner.public_ip.to_string());
    let host = if host.is_empty() { "an unknown host" } else { &host };
    format!("{host} ({})", printable(key).replace('&', " ").replace('-', "/"))
}

/// The first holders, for one line.
fn shortened(holders: &[String]) -> String {
    const SHOWN: usize = 10;
    let more = holders.len().saturating_sub(SHOWN);
    let shown = holders[..holders.len() - more].join(", ");
    if more == 0 { shown } else { format!("{shown} and {more} more (overlayctl network inspect)") }
}

fn is_same_json(one: &str, other: &str) -> bool {
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
    json(one).is_some_and(|one| Some(one) == json(other))
}
