//! Access to etcd without an agent: its flags, the network configuration, and all leases.
//!
//! [`SubnetsWatch`] runs one task, the store's; it ends with the watch.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use overlay_agent::model::api::{SubnetEntry, Subnets};
use overlay_agent::model::event::{Connection, StoreEvent};
use overlay_agent::model::{ExpiryId, NetworkChange, NetworkConfig, NetworkName};
use overlay_agent::plan::lease_table::{Classification, LeaseTable};
use overlay_agent::store::{
    self, DEFAULT_PREFIX, Keys, NetworkError, Networks, ReplaceCondition, Store, StoreConfig, StoreError, WriteKind,
    WrittenNetwork,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Default endpoint, the same as overlayd's.
const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:2379";

/// Capacity of the event queue; a full queue blocks the store's task.
const EVENT_QUEUE_CAPACITY: usize = 1024;

/// Access to etcd, with overlayd's flag names and variables.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "etcd")]
pub struct EtcdArgs {
    /// etcd servers, as https://HOST:2379
    #[arg(long = "etcd-endpoints", value_name = "URLS", env = "OVERLAYD_ETCD_ENDPOINTS", value_delimiter = ',')]
    pub endpoints: Vec<String>,
    /// Key prefix
    #[arg(long = "etcd-prefix", value_name = "PREFIX", env = "OVERLAYD_ETCD_PREFIX", default_value = DEFAULT_PREFIX)]
    pub prefix: String,
    /// CAs that sign the servers' certificates (PEM)
    #[arg(long = "etcd-cafile", value_name = "FILE", env = "OVERLAYD_ETCD_CAFILE")]
    pub cafile: Option<PathBuf>,
    /// Client certificate (PEM)
    #[arg(long = "etcd-certfile", value_name = "FILE", env = "OVERLAYD_ETCD_CERTFILE")]
    pub certfile: Option<PathBuf>,
    /// Private key of the client certificate (PEM)
    #[arg(long = "etcd-keyfile", value_name = "FILE", env = "OVERLAYD_ETCD_KEYFILE")]
    pub keyfile: Option<PathBuf>,
    /// User name
    #[arg(long = "etcd-username", value_name = "NAME", env = "OVERLAYD_ETCD_USERNAME")]
    pub username: Option<String>,
    /// File with the user's password
    #[arg(long = "etcd-password-file", value_name = "FILE", env = "OVERLAYD_ETCD_PASSWORD_FILE")]
    pub password_file: Option<PathBuf>,
    /// Domain whose SRV records name the servers
    #[arg(long = "etcd-discovery-srv", value_name = "DOMAIN", env = "OVERLAYD_ETCD_DISCOVERY_SRV")]
    pub discovery_srv: Option<String>,
}

/// Failure of an access to etcd.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// Error of the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A network cannot be written or removed.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The store's task ended unexpectedly.
    #[error("watching etcd ended: {reason}")]
    WatchEnded {
        /// Reason.
        reason: String,
    },
}

/// The network configuration stored in etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredConfig {
    /// JSON text.
    pub text: String,
    /// Revision of its last change.
    pub mod_revision: i64,
}

impl EtcdArgs {
    /// Settings for servers without TLS or login.
    pub fn without_tls(endpoints: Vec<String>, prefix: &str) -> EtcdArgs {
        EtcdArgs { endpoints, prefix: prefix.to_owned(), ..EtcdArgs::default() }
    }

    /// Whether the flags select etcd instead of the agent.
    pub fn is_given(&self) -> bool {
        !self.endpoints.is_empty() || self.discovery_srv.is_some()
    }

    /// Key of the network configuration.
    pub fn config_key(&self) -> String {
        format!("{}/config", self.prefix.trim_end_matches('/'))
    }

    /// Converts the flags to the store's settings.
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

    /// Reads the configuration; `None` if none is stored.
    pub async fn read_config(&self) -> Result<Option<StoredConfig>, EtcdError> {
        let found = store::get_config(&self.store_config()).await?;
        Ok(found.text.map(|text| StoredConfig { text, mod_revision: found.mod_revision }))
    }

    /// Writes the configuration, if etcd still has the previous one or none: a concurrent change is not overwritten.
    pub async fn put_config(&self, text: &str, previous: Option<&StoredConfig>) -> Result<(), EtcdError> {
        let replace = ReplaceCondition::Revision(previous.map_or(0, |b| b.mod_revision));
        store::put_config(&self.store_config(), text, replace).await?;
        Ok(())
    }

    /// Access to one network of these: its records have the same form below a prefix of their own.
    pub fn of_network(&self, name: &NetworkName) -> Result<EtcdArgs, EtcdError> {
        Ok(EtcdArgs { prefix: Keys::new(&self.prefix)?.network(name).prefix().to_owned(), ..self.clone() })
    }

    /// Reads all networks.
    pub async fn networks(&self) -> Result<Networks, EtcdError> {
        Ok(store::read_networks(&self.store_config()).await?)
    }

    /// Creates or changes a network in one transaction.
    pub async fn write_network(
        &self,
        name: &NetworkName,
        kind: WriteKind,
        change: &NetworkChange,
    ) -> Result<WrittenNetwork, EtcdError> {
        Ok(store::write_network(&self.store_config(), name, kind, change).await?)
    }

    /// Removes a network, with `force` also its leases. Returns the deleted leases.
    pub async fn remove_network(&self, name: &NetworkName, force: bool) -> Result<Vec<String>, EtcdError> {
        Ok(store::remove_network(&self.store_config(), name, force).await?)
    }

    /// Reads all leases with their remaining time.
    pub async fn subnets(&self) -> Result<Subnets, EtcdError> {
        let snapshot = store::read_all(&self.store_config(), true).await?;
        let network =
            snapshot.config.text.as_deref().and_then(|text| NetworkConfig::parse(text).ok()).map(|parsed| parsed.config);
        let mut leases = LeaseTable::default();
        leases.replace(snapshot.entries);
        Ok(list_subnets(&leases, network.as_ref(), &snapshot.remaining_ttls))
    }
}

/// Lists the leases from the view of a host without a lease. Without a configuration none is rejected.
fn list_subnets(leases: &LeaseTable, network: Option<&NetworkConfig>, time_left: &BTreeMap<ExpiryId, Duration>) -> Subnets {
    let entry = |(key, value): (&std::sync::Arc<str>, &Result<_, _>)| match value {
        Err(rejected) => SubnetEntry::from_rejected(rejected),
        Ok(record) => {
            let mut entry = SubnetEntry::from_record(key, record);
            let left = record.expiry.and_then(|id| time_left.get(&id));
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

/// Watches all leases. Errors of etcd are printed to standard error and retried.
#[derive(Debug)]
pub struct SubnetsWatch {
    events: mpsc::Receiver<StoreEvent>,
    task: JoinSet<Result<(), StoreError>>,
    leases: LeaseTable,
    network: Option<NetworkConfig>,
    has_snapshot: bool,
}

impl SubnetsWatch {
    /// Starts the watch. Settings that can never work are an immediate error.
    pub async fn start(args: &EtcdArgs) -> Result<SubnetsWatch, EtcdError> {
        let config = args.store_config();
        config.validate()?;
        let (sender, events) = mpsc::channel(EVENT_QUEUE_CAPACITY);
        let mut task = JoinSet::new();
        task.spawn(async move { Store::new(config).watch(sender, CancellationToken::new()).await });
        Ok(SubnetsWatch { events, task, leases: LeaseTable::default(), network: None, has_snapshot: false })
    }

    /// Returns the leases, first at once, then after each change; simultaneous changes count as one.
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

    /// Applies an event. Returns whether the list may have changed.
    fn apply_event(&mut self, event: StoreEvent) -> bool {
        match event {
            StoreEvent::Config(config) => {
                // An invalid configuration leaves the last valid one in force, as in the agents.
                if let Some(Ok(record)) = config {
                    self.network = Some(record.config);
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
                eprintln!("overlayctl: etcd does not answer, retrying: {error}");
                false
            }
            StoreEvent::Connection(Connection::Up { .. }) | StoreEvent::Own(_) | StoreEvent::Servers(_) => false,
        }
    }

    async fn watch_error(&mut self) -> EtcdError {
        match self.task.join_next().await {
            Some(Ok(Err(error))) => error.into(),
            Some(Err(error)) => EtcdError::WatchEnded { reason: error.to_string() },
            Some(Ok(Ok(()))) | None => EtcdError::WatchEnded { reason: "unknown".to_owned() },
        }
    }
}

#[cfg(test)]
mod tests {
    use overlay_agent::model::event::StoreEntry;
    use overlay_agent::model::{BackendData, Lease, LeaseRecord, PerFamily, StorePosition, Subnet, Vni};

    use super::*;

    fn entry(key: &str, lease: Option<i64>) -> StoreEntry {
        let subnet = Subnet::from_key(key).expect(key);
        let backend =
            BackendData::Vxlan { vni: Vni::DEFAULT, vtep: PerFamily { v4: "02:00:00:00:00:01".parse().ok(), v6: None } };
        let public_ip = PerFamily { v4: "10.99.1.1".parse().ok(), v6: None };
        let record = LeaseRecord {
            subnet,
            lease: Lease { public_ip, backend, node: None },
            created: StorePosition(1),
            changed: StorePosition(1),
            expiry: lease.map(ExpiryId),
        };
        StoreEntry { key: key.to_owned(), value: Ok(record) }
    }

    #[test]
    fn rejected_leases_are_listed_last() {
        let network = NetworkConfig::parse(r#"{"Network":"10.244.0.0/16"}"#).expect("a network").config;
        let mut leases = LeaseTable::default();
        leases.replace(vec![entry("10.1.1.0-24", Some(7)), entry("10.244.9.0-24", None), entry("10.244.1.0-24", Some(8))]);
        let time_left = BTreeMap::from([(ExpiryId(8), Duration::from_secs(60))]);
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
