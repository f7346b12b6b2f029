//! A network of this host: its endpoints, its tasks, and its network namespace if it is isolated.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::backend::AgentBackend;
use super::conflist::Conflist;
use super::host_state::HostStateStore;
use super::queries::Queries;
use super::shared::{Host, OpenReconciler};
use super::wiring::{self, NetworkEnds, ReconcilerEnds};
use crate::endpoint::{EndpointNetwork, Endpoints};
use crate::kernel::netns::Netns;
use crate::kernel::{Kernel, KernelOptions, Monitor, PortManager, delete_network_netns};
use crate::model::{NamespaceName, NetworkName, NetworkRecord, PerFamily};
use crate::network::{Network, Overlay};
use crate::plan::contribution::ReconcilerInput;
use crate::reconcile::{self, Reconciler};
use crate::shutdown::Tasks;
use crate::state::{subnet_env, write_subnet_env};
use crate::store::{NetworkStore, StoreError};

/// Time limit for a network's tasks to end.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// A running network.
pub(super) struct Instance {
    pub(super) backend: Arc<AgentBackend>,
    /// Whether it is ready.
    pub(super) ready: watch::Receiver<bool>,
    /// Heartbeats of its loop.
    pub(super) heartbeat: watch::Receiver<u64>,
    store: NetworkStore,
    namespace: Option<Netns>,
    stop: CancellationToken,
    tasks: JoinHandle<()>,
}

impl Instance {
    /// Restores the network's endpoints and starts its tasks. A task that ends unexpectedly is reported to `failed`.
    pub(super) async fn start(
        host: &Arc<Host>,
        name: &NetworkName,
        isolated: bool,
        failed: mpsc::Sender<String>,
    ) -> anyhow::Result<Instance> {
        let state = host.network_state(name)?;
        if !name.is_default() {
            state.record_kind(isolated);
        }
        let stop = host.stop.child_token();
        let mut tasks = Tasks::new();
        let own = match isolated {
            true => Some(OwnNamespace::start(host, name, &state, &stop, &mut tasks)?),
            false => None,
        };
        let port_manager = own.as_ref().map_or(&host.kernel, |own| &own.kernel).port_manager();
        let endpoints = Endpoints::restore(state.directory(), port_manager.clone(), name.clone(), host.claims.clone()).await?;
        let inputs = wiring::NetworkInputs {
            endpoints: endpoints.ports(),
            applied_endpoints: endpoints.applied_endpoints(),
            others: host.records.subscribe(),
            changes: host.changes.clone(),
        };
        let own_link = own.as_ref().map(|own| own.reconciler.link.clone());
        let NetworkEnds { channels, queries, record, lease_request, overlay, ready, heartbeat } =
            wiring::network(inputs, host.reconciler.link.clone(), own_link);
        let store = host.store.network(name);
        {
            let (settings, state, metrics) = (host.network_settings(name, isolated), state.clone(), Arc::clone(&host.metrics));
            let make = move || Network::new(settings.clone(), state.clone(), Arc::clone(&metrics));
            let store = store.clone();
            host.supervisor.start_network(name.clone(), channels, make, move |events, stop| {
                let (store, lease_request) = (store.clone(), lease_request.clone());
                async move { store.run(events, lease_request, stop).await }
            });
        }
        {
            let (endpoints, stop) = (endpoints.clone(), stop.clone());
            tasks.spawn_infallible("endpoints", async move { endpoints.run(stop).await });
        }
        let ports_lost = own.as_ref().map_or(&host.reconciler, |own| &own.reconciler).ports_lost.clone();
        let files = name.is_default().then(|| Conflist::from_config(&host.config, &host.socket));
        let publisher =
            Publisher { host: Arc::clone(host), name: name.clone(), endpoints: endpoints.clone(), state: state.clone(), files };
        tasks.spawn("overlay", publisher.run(overlay, record, ports_lost, stop.clone()));
        let backend = Arc::new(AgentBackend {
            host: Arc::clone(host),
            name: name.clone(),
            queries: Queries {
                network: queries,
                host: host.reconciler.queries.clone(),
                own: own.as_ref().map(|own| own.reconciler.queries.clone()),
                failures: host.failures.clone(),
            },
            endpoints,
            port_manager,
            ttl_cache: tokio::sync::Mutex::new(None),
        });
        let tasks = tokio::spawn(watch_tasks(tasks, name.clone(), stop.clone(), failed));
        let namespace = own.map(|own| own.netns);
        Ok(Instance { backend, ready, heartbeat, store, namespace, stop, tasks })
    }

    /// Waits until its tasks have ended, because the agent stops.
    pub(super) async fn join(self) {
        if let Err(error) = self.tasks.await {
            tracing::error!(network = %self.backend.name, %error, "cannot stop");
        }
    }

    /// Whether it runs as an isolated network.
    pub(super) fn is_isolated(&self) -> bool {
        self.namespace.is_some()
    }

    /// Stops the network. Its entries stay in the kernel.
    pub(super) async fn stop(self, host: &Host) -> Stopped {
        let Instance { backend, store, namespace, stop, tasks, .. } = self;
        stop.cancel();
        if let Err(error) = tasks.await {
            tracing::error!(network = %backend.name, %error, "cannot stop");
        }
        host.supervisor.stop_network(&backend.name, false).await;
        if namespace.is_some() {
            host.supervisor.stop_reconciler(NamespaceName::Network(backend.name.clone())).await;
        }
        Stopped { name: backend.name.clone(), store, namespace }
    }

    /// Makes the file of its namespace name it again, if another program removed that.
    pub(super) fn restore_namespace_name(&self) {
        let Some(netns) = self.namespace.as_ref().filter(|netns| !netns.is_named()) else { return };
        match netns.name_again() {
            Ok(()) => {
                tracing::warn!(network = %self.backend.name, netns = %netns.path().display(), "restored the namespace's name")
            }
            Err(error) => tracing::warn!(network = %self.backend.name, %error, "cannot restore the namespace's name"),
        }
    }
}

/// What is left of a stopped network.
pub(super) struct Stopped {
    name: NetworkName,
    store: NetworkStore,
    namespace: Option<Netns>,
}

impl Stopped {
    /// Gives this host's lease back.
    pub(super) async fn release(&self, host: &Host) -> Result<(), StoreError> {
        self.store.release(&host.node.id).await.map(|_| ())
    }

    /// Removes the network's entries, namespace and state from this host.
    pub(super) async fn remove(self, host: &Host) -> anyhow::Result<()> {
        let Stopped { name, namespace, .. } = self;
        // Fails only while the agent stops.
        let _ = host.reconciler.link.input.send(ReconcilerInput::Withdraw(name.clone())).await;
        if let Some(netns) = namespace {
            let file = netns.path().file_name().and_then(|file| file.to_str()).unwrap_or_default().to_owned();
            drop(netns);
            tokio::task::spawn_blocking(move || delete_network_netns(&file)).await??;
        }
        host.states.remove(&name)?;
        Ok(())
    }
}

/// An isolated network's namespace, with its reconciler.
struct OwnNamespace {
    netns: Netns,
    kernel: Kernel,
    reconciler: OpenReconciler,
}

impl OwnNamespace {
    fn start(
        host: &Arc<Host>,
        name: &NetworkName,
        state: &HostStateStore,
        stop: &CancellationToken,
        tasks: &mut Tasks,
    ) -> anyhow::Result<OwnNamespace> {
        let netns = Netns::ensure(&host.namespace_of(name))?;
        let options = KernelOptions {
            force_classic_routes: !host.config.nexthop_objects,
            host: Some(host.netns.clone()),
            ..KernelOptions::default()
        };
        let (kernel, events, monitor) = Kernel::open(&netns, &options)?;
        let ReconcilerEnds { channels, link, queries, ports_lost, heartbeat } = wiring::reconciler(events, host.changes.clone());
        let reconciler = OpenReconciler { link, queries, ports_lost, heartbeat };
        let settings = reconcile::Settings {
            namespace: NamespaceName::Network(name.clone()),
            nexthop_objects: kernel.nexthop_objects(),
            resync: host.config.resync_interval,
            probe_address: None,
        };
        {
            let (kernel, state, metrics) = (kernel.clone(), state.clone(), Arc::clone(&host.metrics));
            host.supervisor.start_reconciler(settings.namespace.clone(), channels, move || {
                Reconciler::new(settings.clone(), kernel.clone(), state.clone(), Arc::clone(&metrics))
            });
        }
        tasks.spawn("kernel", run_monitor(monitor, stop.clone()));
        Ok(OwnNamespace { netns, kernel, reconciler })
    }
}

/// Follows the kernel's events until `stop`.
pub(super) async fn run_monitor(monitor: Monitor, stop: CancellationToken) -> Result<(), String> {
    tokio::select! {
        ended = monitor.run() => ended.map_err(|error| error.to_string()),
        () = stop.cancelled() => Ok(()),
    }
}

/// Waits for the end of a network's tasks, and reports one that ends before `stop`.
async fn watch_tasks(mut tasks: Tasks, name: NetworkName, stop: CancellationToken, failed: mpsc::Sender<String>) {
    let first = tokio::select! {
        biased;
        () = stop.cancelled() => None,
        exit = tasks.next_exit() => exit,
    };
    if let Some(exit) = first {
        // Fails only while the agent stops.
        let _ = failed.send(format!("network {name}: {exit}")).await;
        stop.cancel();
    }
    for exit in tasks.join_all(STOP_DEADLINE).await {
        tracing::warn!(network = %name, %exit, "task failed during shutdown");
    }
}

/// Publishes the overlay's parameters at each change: to the endpoints and, for the default network, `subnet.env` and the CNI
/// network list.
///
/// Also recreates veth pairs that another process deleted, or whose MTU differs from the overlay's.
struct Publisher {
    host: Arc<Host>,
    name: NetworkName,
    endpoints: Endpoints<PortManager>,
    state: HostStateStore,
    /// For the default network: the CNI network list, if it is configured.
    files: Option<Option<Conflist>>,
}

impl Publisher {
    async fn run(
        mut self,
        mut overlays: watch::Receiver<Option<Overlay>>,
        mut records: watch::Receiver<Option<NetworkRecord>>,
        mut ports_lost: watch::Receiver<u64>,
        stop: CancellationToken,
    ) -> Result<(), std::convert::Infallible> {
        loop {
            let record = records.borrow_and_update().clone();
            self.host.set_record(&self.name, record);
            let overlay = overlays.borrow_and_update().clone();
            if let Some(overlay) = overlay {
                self.publish(&overlay).await;
            }
            let open = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                changed = overlays.changed() => changed.is_ok(),
                changed = records.changed() => changed.is_ok(),
                lost = ports_lost.changed() => lost.is_ok(),
            };
            if !open {
                return Ok(());
            }
        }
    }

    async fn publish(&mut self, overlay: &Overlay) {
        let config = &self.host.config;
        let networks: PerFamily<_> = overlay.network.pools.map(|_, pool| pool.network);
        self.endpoints.set_network(Some(EndpointNetwork {
            subnet: overlay.subnet,
            networks,
            bridge: overlay.bridge,
            mtu: overlay.mtu,
            docker: config.docker && self.name.is_default(),
        }));
        self.state.record_held_subnet(overlay.subnet, overlay.public_ip);
        for (endpoint, error) in self.endpoints.reconcile_ports().await {
            tracing::warn!(network = %self.name, %endpoint, %error, "cannot recreate veth pair");
        }
        let Some(conflist) = &mut self.files else { return };
        let text = subnet_env(&networks, &overlay.subnet, overlay.mtu, config.ip_masq);
        match write_subnet_env(&config.subnet_file, &text) {
            Ok(true) => {
                tracing::info!(file = %config.subnet_file.display(), subnet = %overlay.subnet, mtu = overlay.mtu, "overlay in place")
            }
            Ok(false) => {}
            // Only other tools need the file: attaching containers works without it.
            Err(error) => tracing::error!(%error, "cannot write subnet file"),
        }
        if let Some(conflist) = conflist {
            conflist.write();
        }
    }
}
