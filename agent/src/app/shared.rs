//! What the networks of this host share.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::host_state::{HostStateStore, NetworkStates};
use super::mesh::MeshState;
use super::supervisor::{Failures, Supervisor};
use crate::config::HostConfig;
use crate::endpoint::HostClaims;
use crate::kernel::Kernel;
use crate::kernel::netns::Netns;
use crate::metrics::Metrics;
use crate::model::{NetworkName, NetworkRecord, Node};
use crate::network::{self, ReconcilerLink};
use crate::reconcile::ReconcilerQuery;
use crate::state::StateError;
use crate::store::{Store, StoreConfig};
use crate::telemetry::LevelHandle;

/// The channels to a reconciler.
#[derive(Debug, Clone)]
pub(super) struct OpenReconciler {
    /// For each network of its namespace.
    pub(super) link: ReconcilerLink,
    pub(super) queries: mpsc::Sender<ReconcilerQuery>,
    /// Incremented whenever another process removed the host end of an endpoint's veth pair.
    pub(super) ports_lost: watch::Receiver<u64>,
    /// Heartbeats of its loop.
    pub(super) heartbeat: watch::Receiver<u64>,
}

/// What the networks of this host share.
pub(super) struct Host {
    pub(super) config: HostConfig,
    pub(super) node: Node,
    /// The admin socket.
    pub(super) socket: PathBuf,
    /// The host's network namespace, its data path and its reconciler.
    pub(super) netns: Netns,
    pub(super) kernel: Kernel,
    pub(super) reconciler: OpenReconciler,
    pub(super) store: Store,
    pub(super) store_config: StoreConfig,
    /// The state of the host and of the default network, and those of named networks.
    pub(super) default_state: HostStateStore,
    pub(super) states: NetworkStates,
    pub(super) claims: HostClaims,
    pub(super) mesh: Arc<MeshState>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) level: LevelHandle,
    pub(super) supervisor: Supervisor,
    pub(super) failures: Failures,
    /// Incremented whenever the answer to a query may have changed.
    pub(super) changes: watch::Sender<u64>,
    /// Why networks of the settings, or peers of networks, cannot be joined.
    pub(super) join_problems: Mutex<BTreeMap<NetworkName, String>>,
    /// The records of the networks that this host is in.
    pub(super) records: watch::Sender<Arc<BTreeMap<NetworkName, NetworkRecord>>>,
    /// Notified of each container that is attached to a named network: the host may have to join that network's peers.
    pub(super) attached: Notify,
    /// Stops the agent.
    pub(super) stop: CancellationToken,
}

impl Host {
    /// A network's state on this host.
    pub(super) fn network_state(&self, name: &NetworkName) -> Result<HostStateStore, StateError> {
        if name.is_default() { Ok(self.default_state.clone()) } else { self.states.open(name) }
    }

    /// The name of an isolated network's namespace.
    pub(super) fn namespace_of(&self, name: &NetworkName) -> String {
        format!("{}{name}", self.config.netns_prefix)
    }

    /// A network's settings.
    pub(super) fn network_settings(&self, name: &NetworkName, isolated: bool) -> network::Settings {
        let (config, etcd) = (&self.config, &self.config.etcd);
        network::Settings {
            name: name.clone(),
            isolated,
            netns_prefix: config.netns_prefix.clone(),
            node: self.node.clone(),
            selection: config.selection.clone(),
            masquerade: config.ip_masq,
            tx_checksum: config.vxlan_tx_checksum,
            docker: config.docker && name.is_default(),
            lease_ttl: self.store_config.min_lease_validity(),
            store_endpoints: match &etcd.discovery_srv {
                Some(domain) => vec![format!("srv:{domain}")],
                None => etcd.endpoints.clone(),
            },
            store_prefix: etcd.prefix.clone(),
        }
    }

    /// Sets or removes the reason why a network cannot be joined, and logs a new one.
    pub(super) fn set_join_problem(&self, name: &NetworkName, problem: Option<String>) {
        let mut problems = self.join_problems.lock().unwrap_or_else(PoisonError::into_inner);
        match problem {
            Some(problem) if problems.get(name) == Some(&problem) => {}
            Some(problem) => {
                tracing::warn!(network = %name, problem, "cannot join network; retrying");
                problems.insert(name.clone(), problem);
            }
            None => drop(problems.remove(name)),
        }
    }

    /// The networks that cannot be joined, for the status.
    pub(super) fn join_problems(&self) -> Vec<String> {
        let problems = self.join_problems.lock().unwrap_or_else(PoisonError::into_inner);
        problems.iter().map(|(name, problem)| format!("this host cannot join network {name}: {problem}")).collect()
    }

    /// Publishes a network's record to the other networks; `None` once the network has none.
    pub(super) fn set_record(&self, name: &NetworkName, record: Option<NetworkRecord>) {
        self.records.send_if_modified(|records| {
            if records.get(name) == record.as_ref() {
                return false;
            }
            let records = Arc::make_mut(records);
            match record {
                Some(record) => records.insert(name.clone(), record),
                None => records.remove(name),
            };
            true
        });
    }
}
