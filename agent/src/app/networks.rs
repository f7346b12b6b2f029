//! The networks that this host is in: the default network, those of the setting `networks`, those with containers here, and the
//! peer networks of these.
//!
//! A network is joined with its first container and left some minutes after the last one. Joining and leaving change nothing of
//! other networks. The task [`HostNetworks::run`] joins and leaves; an attach joins by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;

use super::backend::AgentBackend;
use super::host_state::HostStateStore;
use super::instance::Instance;
use super::shared::Host;
use super::supervision::HealthInputs;
use crate::model::{NetworkName, NetworkRecord};
use crate::store::NetworkError;

/// Interval of checks while this host is in a named network.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// Pause before a network is joined again that could not be joined.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Why a network cannot be joined.
#[derive(Debug, thiserror::Error)]
pub(super) enum JoinError {
    /// Its record cannot be read, or is missing or invalid.
    #[error(transparent)]
    Record(#[from] NetworkError),
    /// Its tasks, its namespace or its state cannot be made.
    #[error("cannot join network {name}: {source:#}")]
    Start {
        /// The network.
        name: NetworkName,
        /// The cause.
        source: anyhow::Error,
    },
}

/// The networks that this host is in.
pub(super) struct HostNetworks {
    pub(super) host: Arc<Host>,
    pub(super) default: Arc<AgentBackend>,
    /// The present ones, for look-ups that must not wait for a join.
    backends: RwLock<BTreeMap<NetworkName, Arc<AgentBackend>>>,
    /// Locked while a network is joined or left.
    instances: Mutex<BTreeMap<NetworkName, Instance>>,
    /// Receives a task that ended unexpectedly.
    failed: mpsc::Sender<String>,
    failures: Mutex<mpsc::Receiver<String>>,
}

impl HostNetworks {
    /// Starts the default network, and the networks that have state on this host.
    pub(super) async fn start(
        host: Arc<Host>,
        stored: BTreeMap<NetworkName, HostStateStore>,
    ) -> anyhow::Result<(HostNetworks, HealthInputs)> {
        let (failed, failures) = mpsc::channel(1);
        let name = NetworkName::default();
        let default = Instance::start(&host, &name, false, failed.clone()).await?;
        let health = HealthInputs {
            ready: default.ready.clone(),
            heartbeats: vec![default.heartbeat.clone(), host.reconciler.heartbeat.clone()],
        };
        let networks = HostNetworks {
            host,
            default: Arc::clone(&default.backend),
            backends: RwLock::new([(name.clone(), Arc::clone(&default.backend))].into()),
            instances: Mutex::new([(name, default)].into()),
            failed,
            failures: Mutex::new(failures),
        };
        let mut instances = networks.instances.lock().await;
        for (name, state) in stored {
            // Known without the store, so that the containers' data path is kept while it does not answer.
            if let Some((isolated, _)) = state.last_record() {
                networks.start_instance(&mut instances, &name, isolated).await?;
            }
        }
        drop(instances);
        Ok((networks, health))
    }

    /// A network that this host is in.
    pub(super) fn get(&self, name: &NetworkName) -> Option<Arc<AgentBackend>> {
        self.backends.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// All networks that this host is in, by name.
    pub(super) fn all(&self) -> Vec<Arc<AgentBackend>> {
        self.backends.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Joins a network, unless this host is in it.
    pub(super) async fn join(&self, name: &NetworkName) -> Result<Arc<AgentBackend>, JoinError> {
        if let Some(backend) = self.get(name) {
            return Ok(backend);
        }
        let mut instances = self.instances.lock().await;
        if let Some(instance) = instances.get(name) {
            return Ok(Arc::clone(&instance.backend));
        }
        let record = self.host.store.read_network(name).await?;
        self.join_with(&mut instances, name, &record).await
    }

    async fn join_with(
        &self,
        instances: &mut BTreeMap<NetworkName, Instance>,
        name: &NetworkName,
        record: &NetworkRecord,
    ) -> Result<Arc<AgentBackend>, JoinError> {
        let started = self.start_instance(instances, name, record.isolated).await;
        let backend = started.map_err(|source| JoinError::Start { name: name.clone(), source })?;
        tracing::info!(network = %name, isolated = record.isolated, "joined network");
        Ok(backend)
    }

    async fn start_instance(
        &self,
        instances: &mut BTreeMap<NetworkName, Instance>,
        name: &NetworkName,
        isolated: bool,
    ) -> anyhow::Result<Arc<AgentBackend>> {
        let instance = Instance::start(&self.host, name, isolated, self.failed.clone()).await?;
        let backend = Arc::clone(&instance.backend);
        self.backends.write().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), Arc::clone(&backend));
        instances.insert(name.clone(), instance);
        Ok(backend)
    }

    /// Leaves a network: gives its lease back, and removes its entries, namespace and state from this host. If etcd does not answer,
    /// the host stays in the network.
    async fn leave(&self, instances: &mut BTreeMap<NetworkName, Instance>, name: &NetworkName) {
        let Some(instance) = instances.get(name) else { return };
        if !instance.backend.endpoints.close_if_unused() {
            return;
        }
        self.backends.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        let Some(instance) = instances.remove(name) else { return };
        let isolated = instance.is_isolated();
        let stopped = instance.stop(&self.host).await;
        if let Err(error) = stopped.release(&self.host).await {
            tracing::warn!(network = %name, %error, "cannot leave network; retrying");
            if let Err(error) = self.start_instance(instances, name, isolated).await {
                tracing::error!(network = %name, error = format!("{error:#}"), "cannot start network again");
            }
            return;
        }
        self.host.set_record(name, None);
        match stopped.remove(&self.host).await {
            Ok(()) => tracing::info!(network = %name, "left network"),
            Err(error) => {
                tracing::warn!(network = %name, error = format!("{error:#}"), "left network, but something of it is left")
            }
        }
    }

    /// The task: joins and leaves networks until the agent stops.
    ///
    /// # Errors
    /// The name and outcome of a network's task that ended unexpectedly.
    pub(super) async fn run(self: Arc<Self>) -> Result<(), String> {
        let (mut records, mut failures) = (self.host.records.subscribe(), self.failures.lock().await);
        let mut idle_since = BTreeMap::new();
        loop {
            records.borrow_and_update();
            let retry = self.update(&mut idle_since).await;
            let pause = match retry {
                true => RETRY_INTERVAL,
                // A network that is to be left soon is left in time.
                false => CHECK_INTERVAL.min(self.host.config.leave_after),
            };
            let is_alone = self.all().len() == 1 && !retry;
            tokio::select! {
                () = self.host.stop.cancelled() => break,
                Some(failure) = failures.recv() => return Err(failure),
                Ok(()) = records.changed() => {}
                () = self.host.attached.notified() => {}
                () = tokio::time::sleep(pause), if !is_alone => {}
            }
        }
        let instances = std::mem::take(&mut *self.instances.lock().await);
        futures_util::future::join_all(instances.into_values().map(Instance::join)).await;
        Ok(())
    }

    /// Joins and leaves networks as is due. Returns whether a join failed.
    async fn update(&self, idle_since: &mut BTreeMap<NetworkName, Instant>) -> bool {
        let mut instances = self.instances.lock().await;
        instances.values().for_each(Instance::restore_namespace_name);
        let mut needed = self.needed();
        let mut failed = false;
        for (name, peer_of) in self.wanted_peers(&needed) {
            if instances.contains_key(&name) {
                needed.insert(name);
            } else if let Ok(record) = self.host.store.read_network(&name).await
                // Two networks are routed to each other only if each names the other one.
                && record.peers.contains(&peer_of)
            {
                needed.insert(name);
            }
        }
        for name in needed.iter().filter(|name| !instances.contains_key(*name)).cloned().collect::<Vec<_>>() {
            let joined = match self.host.store.read_network(&name).await {
                Ok(record) => self.join_with(&mut instances, &name, &record).await.map(|_| ()),
                Err(error) => Err(error.into()),
            };
            failed |= joined.is_err();
            self.host.set_join_problem(&name, joined.err().map(|error| error.to_string()));
        }
        let now = Instant::now();
        idle_since.retain(|name, _| instances.contains_key(name) && !needed.contains(name));
        for name in instances.keys().filter(|name| !needed.contains(*name)).cloned().collect::<Vec<_>>() {
            if now.duration_since(*idle_since.entry(name.clone()).or_insert(now)) >= self.host.config.leave_after {
                idle_since.remove(&name);
                self.leave(&mut instances, &name).await;
            }
        }
        failed
    }

    /// The networks that this host has to be in by its settings and its containers.
    fn needed(&self) -> BTreeSet<NetworkName> {
        let with_containers = self.all().into_iter().filter(|backend| !backend.endpoints.list().is_empty());
        let named = self.host.config.networks.iter().cloned().chain([NetworkName::default()]);
        with_containers.map(|backend| backend.name.clone()).chain(named).collect()
    }

    /// The peers that these networks name, each with the network that names it; without those that do not name it in turn.
    fn wanted_peers(&self, networks: &BTreeSet<NetworkName>) -> Vec<(NetworkName, NetworkName)> {
        let records = self.host.records.borrow();
        let named = networks.iter().filter_map(|name| Some((name, records.get(name)?)));
        let peers = named.flat_map(|(name, record)| record.peers.iter().map(move |peer| (peer, name)));
        let mutual =
            |(peer, name): &(&NetworkName, &NetworkName)| records.get(*peer).is_none_or(|record| record.peers.contains(*name));
        peers.filter(mutual).map(|(peer, name)| (peer.clone(), name.clone())).collect()
    }
}
