//! etcd without an agent: the flags that reach it, the configuration, and every lease.
//!
//! [`SubnetsWatch`] runs one task, the store's; it ends with the watch.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use overlay_agent::model::NetworkConfig;
use overlay_agent::model::api::{SubnetEntry, Subnets};
use overlay_agent::model::event::{Connection, StoreEvent};
use overlay_agent::plan::lease_table::{Classification, LeaseTable};
use overlay_agent::store::{self, DEFAULT_PREFIX, ReplaceCondition, Store, StoreConfig, StoreError};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Where etcd is unless told otherwise: as overlayd has it.
const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:2379";

/// Changes that wait to be shown; more hold the store's task up until they are.
const EVENT_QUEUE_CAPACITY: usize = 1024;

/// How to reach etcd, with the names and variables that overlayd has.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "etcd")]
pub struct EtcdArgs {
    /// Servers, as https://HOST:2379
    #[arg(long = "etcd-endpoints", value_name = "URLS", env = "OVERLAYD_ETCD_ENDPOINTS", value_delimiter = ',')]
    pub endpoints: Vec<String>,
    /// The key prefix
    #[arg(long = "etcd-prefix", value_name = "PREFIX", env = "OVERLAYD_ETCD_PREFIX", default_value = DEFAULT_PREFIX)]
    pub prefix: String,
    /// The CAs that sign the servers' certificates (PEM)
    #[arg(long = "etcd-cafile", value_name = "FILE", env = "OVERLAYD_ETCD_CAFILE")]
    pub cafile: Option<PathBuf>,
    /// The client certificate (PEM)
    #[arg(long = "etcd-certfile", value_name = "FILE", env = "OVERLAYD_ETCD_CERTFILE")]
    pub certfile: Option<PathBuf>,
    /// The client certificate's key (PEM)
    #[arg(long = "etcd-keyfile", value_name = "FILE", env = "OVERLAYD_ETCD_KEYFILE")]
    pub keyfile: Option<PathBuf>,
    /// The user
    #[arg(long = "etcd-username", value_name = "NAME", env = "OVERLAYD_ETCD_USERNAME")]
    pub username: Option<String>,
    /// The file with the user's password
    #[arg(long = "etcd-password-file", value_name = "FILE", env = "OVERLAYD_ETCD_PASSWORD_FILE")]
    pub password_file: Option<PathBuf>,
    /// The domain whose SRV records name the servers
    #[arg(long = "etcd-discovery-srv", value_name = "DOMAIN", env = "OVERLAYD_ETCD_DISCOVERY_SRV")]
    pub discovery_srv: Option<String>,
}

/// Why etcd was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The task that follows the store ended, which it never does by itself.
    #[error("following etcd ended: {reason}")]
    WatchEnded {
        /// What is known of it.
        reason: String,
    },
}

/// The configuration as it stands in etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredConfig {
    /// The JSON text.
    pub text: String,
    /// The revision of its last change.
    pub mod_revision: i64,
}

impl EtcdArgs {
    /// Servers without TLS or login.
    pub fn without_tls(endpoints: Vec<String>, prefix: &str) -> EtcdArgs {
        EtcdArgs { endpoints, prefix: prefix.to_owned(), ..EtcdArgs::default() }
    }

    /// Whether etcd is to be asked rather than the agent.
    pub fn is_given(&self) -> bool {
        !self.endpoints.is_empty() || self.discovery_srv.is_some()
    }

    /// The key of the configuration.
    pub fn config_key(&self) -> String {
        format!("{}/config", self.prefix.trim_end_matches('/'))
    }

    /// The store's settings.
    pub fn store_config(&self) -> StoreConfig {
        let endpoints = if self.is_given() { self.endpoints.clone() } else { vec![DEFAULT_ENDPOINT.to_owned()] };
        StoreConfig {
            endpoints,
            discovery_srv: self.discovery_srv.clone(),
            prefix: self.prefix.clone(),
            cafile: self.cafile.clone(),
            certfile: self.certfile.clone(),
            keyfile: self.keyfile.clone(),
            username: self.username.clone(),
            password_file: self.password_file.clone(),
            ..StoreConfig::default()
        }
    }

    /// The configuration; `None` where none is written.
    pub async fn read_config(&self) -> Result<Option<StoredConfig>, EtcdError> {
        let found = store::get_config(&self.store_config()).await?;
        Ok(found.text.map(|text| StoredConfig { text, mod_revision: found.mod_revision }))
    }

    /// Writes the configuration in place of the one that was read, or of none; whoever else has written meanwhile is not overwritten.
    pub async fn put_config(&self, text: &str, previous: Option<&StoredConfig>) -> Result<(), EtcdError> {
        let replace = ReplaceCondition::Revision(previous.map_or(0, |b| b.mod_revision));
        store::put_config(&self.store_config(), text, replace).await?;
        Ok(())
    }

    /// Every lease, with the time left of each.
    pub async fn subnets(&self) -> Result<Subnets, EtcdError> {
        let snapshot = store::read_all(&self.store_config(), true).await?;
        let network =
            snapshot.config.text.as_deref().and_then(|text| NetworkConfig::parse(text).ok()).map(|parsed| parsed.config);
        let mut leases = LeaseTable::default();
        leases.replace(snapshot.entries);
        Ok(list_subnets(&leases, network.as_ref(), &snapshot.remaining_ttls))
    }
}

/// The leases as a host sees them that has none itself. Without a configuration none is judged.
fn list_subnets(leases: &LeaseTable, network: Option<&NetworkConfig>, time_left: &BTreeMap<i64, Duration>) -> Subnets {
    let entry = |(key, value): (&std::sync::Arc<str>, &Result<_, _>)| match value {
        Err(rejected) => SubnetEntry::from_rejected(rejected),
        Ok(record) => {
            let mut entry = SubnetEntry::from_record(key, record);
            let left = record.etcd_lease.and_then(|id| time_left.get(&id));
            entry.expires_in_seconds = left.and_then(|left| i64::try_from(left.as_secs()).ok());
            let status = network.and_then(|network| leases.classify(key, network, None));
            if let Some(Classification::Rejected(rejected)) = status {
                entry.refused = Some(rejected.kind.to_string());
            }
            entry
        }
    };
    let mut subnets: Vec<SubnetEntry> = leases.iter().map(entry).collect();
    subnets.sort_by(|a, b| (a.refused.is_some(), a.subnet, &a.key).cmp(&(b.refused.is_some(), b.subnet, &b.key)));
    Subnets { subnets }
}

/// Every lease, again at each change. What keeps etcd from answering is told on standard error, and waited out.
#[derive(Debug)]
pub struct SubnetsWatch {
    events: mpsc::Receiver<StoreEvent>,
    task: JoinSet<Result<(), StoreError>>,
    leases: LeaseTable,
    network: Option<NetworkConfig>,
    has_snapshot: bool,
}

impl SubnetsWatch {
    /// Begins to follow the store. Settings that can never work are an error at once.
    pub async fn start(args: &EtcdArgs) -> Result<SubnetsWatch, EtcdError> {
        let config = args.store_config();
        config.validate()?;
        let (sender, events) = mpsc::channel(EVENT_QUEUE_CAPACITY);
        let mut task = JoinSet::new();
        task.spawn(async move { Store::new(config).watch(sender, CancellationToken::new()).await });
        Ok(SubnetsWatch { events, task, leases: LeaseTable::default(), network: None, has_snapshot: false })
    }

    /// The leases at first, and then after each change; changes that arrive together are one.
    pub async fn next(&mut self) -> Result<Subnets, EtcdError> {
        loop {
            let Some(event) = self.events.recv().await else { return Err(self.watch_error().await) };
            let mut changed = self.apply_event(event);
            while let Ok(event) = self.events.try_recv() {
                changed |= self.apply_event(event);
            }
            if changed && self.has_snapshot {
                return Ok(list_subnets(&self.leases, self.network.as_ref(), &BTreeMap::new()));
            }
        }
    }

    /// Takes an event in; whether what is listed may have changed.
    fn apply_event(&mut self, event: StoreEvent) -> bool {
        match event {
            StoreEvent::Config(config) => {
                // A bad one leaves the last good one in force, as in the agents.
                if let Some(Ok(network)) = config {
                    self.network = Some(network);
                }
                true
            }
            StoreEvent::Snapshot(entries) => {
                let first = !std::mem::replace(&mut self.has_snapshot, true);
                self.leases.replace(entries).is_none_or(|affected| !affected.is_empty()) || first
            }
            StoreEvent::Upsert(entry) => !self.leases.upsert(entry).is_empty(),
            StoreEvent::Remove { key } => !self.leases.remove(&key).is_empty(),
            StoreEvent::Connection(Connection::Down { error }) => {
                eprintln!("overlayctl: etcd does not answer, trying again: {error}");
                false
            }
            StoreEvent::Connection(Connection::Up { .. }) | StoreEvent::Own(_) | StoreEvent::Servers(_) => false,
        }
    }

    async fn watch_error(&mut self) -> EtcdError {
        match self.task.join_next().await {
            Some(Ok(Err(error))) => error.into(),
            Some(Err(error)) => EtcdError::WatchEnded { reason: error.to_string() },
            Some(Ok(Ok(()))) | None => EtcdError::WatchEnded { reason: "without a reason".to_owned() },
        }
    }
}

#[cfg(test)]
mod tests {
    use overlay_agent::model::event::StoreEntry;
    use overlay_agent::model::{Backend, Lease, LeaseRecord, PerFamily, Subnet, Vni};

    use super::*;

    fn entry(key: &str, lease: Option<i64>) -> StoreEntry {
        let subnet = Subnet::from_key(key).expect(key);
        let backend = Backend::Vxlan { vni: Vni::DEFAULT, vtep: PerFamily { v4: "02:00:00:00:00:01".parse().ok(), v6: None } };
        let public_ip = PerFamily { v4: "10.99.1.1".parse().ok(), v6: None };
        let record = LeaseRecord {
            subnet,
            lease: Lease { public_ip, backend, node: None },
            create_revision: 1,
            mod_revision: 1,
            etcd_lease: lease,
        };
        StoreEntry { key: key.to_owned(), value: Ok(record) }
    }

    #[test]
    fn rejected_leases_are_listed_last() {
        let network = NetworkConfig::parse(r#"{"Network":"10.244.0.0/16"}"#).expect("a network").config;
        let mut leases = LeaseTable::default();
        leases.replace(vec![entry("10.1.1.0-24", Some(7)), entry("10.244.9.0-24", None), entry("10.244.1.0-24", Some(8))]);
        let time_left = BTreeMap::from([(8, Duration::from_secs(60))]);
        let subnets = list_subnets(&leases, Some(&network), &time_left).subnets;
        let keys: Vec<&str> = subnets.iter().map(|s| s.key.as_str()).collect();
        assert_eq!(keys, ["10.244.1.0-24", "10.244.9.0-24", "10.1.1.0-24"]);
        assert_eq!(subnets[0].expires_in_seconds, Some(60));
        assert!(subnets[1].reservation);
        assert!(subnets[2].refused.as_deref().is_some_and(|r| r.contains("10.244.0.0/16")));
    }

    #[test]
    fn missing_endpoints_fall_back_to_default() {
        let none = EtcdArgs::without_tls(Vec::new(), "/x/");
        assert!(!none.is_given());
        assert_eq!(none.store_config().endpoints, [DEFAULT_ENDPOINT]);
        assert_eq!(none.config_key(), "/x/config");
    }
}
