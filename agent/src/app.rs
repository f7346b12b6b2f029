//! Wires all parts of the agent together and supervises their tasks.
//!
//! | task | does |
//! | --- | --- |
//! | `signals` | SIGTERM and SIGINT |
//! | `kernel` | follows kernel events |
//! | `supervisor` | the networks, each with its part of the store, and the reconcilers; restarts those that fail |
//! | `networks` | joins and leaves networks; each has tasks of its own for endpoints, overlay and kernel events |
//! | `store` | the connection to etcd |
//! | `admin` | serves the UNIX socket |
//! | `systemd` | sends readiness, status and watchdog messages |
//! | `reload` | SIGHUP |
//! | `mesh` | probes peers |
//! | `path-mtu` | makes the kernel learn the path MTU to each peer |
//! | `metrics` | serves metrics over TCP, if an address is set |
//!
//! Channels between tasks are bounded. An unexpected end of one of these tasks ends the agent with an error, and systemd restarts
//! the agent; the data path keeps forwarding meanwhile.

mod backend;
mod cleanup;
mod conflist;
mod directory;
pub mod host_state;
mod instance;
mod mesh;
mod networks;
mod path_mtu;
mod preflight;
pub mod queries;
mod reload;
mod shared;
mod supervision;
pub mod supervisor;
pub mod wiring;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{Notify, watch};

use crate::admin::{self, AdminSocket, Directory};
use crate::config::{EtcdConfig, HostConfig};
use crate::endpoint::HostClaims;
use crate::kernel::netns::Netns;
use crate::kernel::{Kernel, KernelOptions};
use crate::metrics::Metrics;
use crate::model::{NamespaceName, NetworkName, Node};
use crate::network::NetworkStateStore;
use crate::plan::contribution::NetworkProgress;
use crate::reconcile::{self, Reconciler};
use crate::shutdown::{Shutdown, Signals, TaskOutcome, Tasks};
use crate::state::{DirLock, StateDir};
use crate::store::{Store, StoreConfig};
use crate::systemd::{Notifier, take_listener};
use crate::telemetry::LevelHandle;

pub use cleanup::cleanup;
pub use reload::SettingsSource;

use host_state::{HostStateStore, NetworkStates};
use networks::HostNetworks;
use reload::Reload;
use shared::{Host, OpenReconciler};
use supervisor::{Failures, Supervisor};
use wiring::ReconcilerEnds;

/// The socket's name in the run directory.
const SOCKET_NAME: &str = "overlayd.sock";
/// Time limit for tasks to end after the stop signal.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);

/// Runs the agent until a signal or an unrecoverable error.
pub async fn run(config: HostConfig, level: LevelHandle, source: SettingsSource) -> anyhow::Result<()> {
    // Before the process opens a file that could get the inherited descriptor's number.
    let inherited = take_listener(&config.run_dir.join(SOCKET_NAME))?;
    preflight::check_capabilities()?;
    let signals = Signals::catch().context("cannot catch signals")?;
    let notifier = Arc::new(Notifier::from_environment()?);
    let reload = Reload::catch(source, level.clone(), Arc::clone(&notifier)).context("cannot catch signals")?;
    let _run_lock = DirLock::acquire(&config.run_dir).context("the run directory (--run-dir) cannot be used")?;
    let _namespace_lock = preflight::lock_namespace()?;
    let state = Arc::new(StateDir::open(&config.state_dir).context("the state directory (--state-dir) cannot be used")?);
    let node = Node { name: config.node_name.clone(), id: state.node_id()? };
    let socket = match inherited {
        Some(listener) => AdminSocket::from_listener(listener, &config.run_dir.join(SOCKET_NAME))?,
        None => AdminSocket::bind(&config.run_dir.join(SOCKET_NAME))?,
    };
    let metrics_listener = match config.metrics_listen {
        Some(address) => Some(admin::bind_tcp(address).await?),
        None => None,
    };
    let netns = Netns::current()?;
    let (kernel, kernel_events, kernel_monitor) =
        Kernel::open(&netns, &KernelOptions { force_classic_routes: !config.nexthop_objects, ..KernelOptions::default() })?;
    let host_state = HostStateStore::load(Arc::clone(&state))?;
    let metrics = Arc::new(Metrics::new());
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        node = node.name,
        id = node.id,
        run_dir = %config.run_dir.display(),
        state_dir = %config.state_dir.display(),
        nexthop_objects = kernel.nexthop_objects(),
        "starting"
    );

    let store_config = store_config(&config.etcd);
    store_config.validate()?;
    let shutdown = Shutdown::default();
    let stop_token = || shutdown.graceful.clone();
    let failures = Failures::default();
    let supervisor = Supervisor::new(failures.clone(), Arc::clone(&metrics), stop_token());
    let (changes, changed) = watch::channel(0);
    let ReconcilerEnds { channels, link, queries, ports_lost, heartbeat } = wiring::reconciler(kernel_events, changes.clone());
    let (states, stored) = NetworkStates::load(state)?;
    // Entries in the host's namespace may be those of a network that has not contributed yet.
    channels.progress.send_modify(|progress| progress.networks.extend(contributors(&host_state, &stored)));
    {
        let settings = reconcile::Settings {
            namespace: NamespaceName::Host,
            nexthop_objects: kernel.nexthop_objects(),
            resync: config.resync_interval,
            probe_address: config.selection.can_reach,
        };
        let (kernel, host_state, metrics) = (kernel.clone(), host_state.clone(), Arc::clone(&metrics));
        supervisor.start_reconciler(NamespaceName::Host, channels, move || {
            Reconciler::new(settings.clone(), kernel.clone(), host_state.clone(), Arc::clone(&metrics))
        });
    }
    let store = Store::new(store_config.clone()).with_metrics(Arc::clone(&metrics));
    let mesh = Arc::new(mesh::MeshState::new(config.node_name.clone(), config.mesh_interval, Arc::clone(&metrics)));
    let host = Arc::new(Host {
        node,
        socket: config.run_dir.join(SOCKET_NAME),
        netns,
        kernel,
        reconciler: OpenReconciler { link, queries, ports_lost, heartbeat },
        store: store.clone(),
        store_config,
        default_state: host_state,
        states,
        claims: HostClaims::default(),
        mesh: Arc::clone(&mesh),
        metrics,
        level,
        supervisor: supervisor.clone(),
        failures,
        changes,
        join_problems: std::sync::Mutex::default(),
        records: watch::Sender::default(),
        attached: Notify::new(),
        stop: stop_token(),
        config,
    });
    let (networks, health_inputs) = HostNetworks::start(host, stored).await?;
    let networks = Arc::new(networks);
    let backend = networks.default_network();

    let mut tasks = Tasks::new();
    {
        let shutdown = shutdown.clone();
        tasks.spawn("signals", async move {
            let done = shutdown.graceful.clone();
            tokio::select! {
                () = signals.watch(shutdown) => {}
                // A failed task started the shutdown: no signal is needed any more.
                () = done.cancelled() => {}
            }
            Ok::<_, std::convert::Infallible>(())
        });
    }
    tasks.spawn("kernel", instance::run_monitor(kernel_monitor, stop_token()));
    tasks.spawn("supervisor", supervisor.run());
    tasks.spawn("networks", Arc::clone(&networks).run());
    {
        let stop = stop_token();
        tasks.spawn("store", async move { store.run_connection(stop).await });
    }
    tasks.spawn_infallible("admin", admin::serve(socket, Arc::clone(&networks), stop_token()));
    tasks.spawn_infallible("systemd", supervision::notify(notifier, health_inputs, Arc::clone(&backend), stop_token()));
    tasks.spawn_infallible("path-mtu", path_mtu::run(Arc::clone(&networks), changed.clone(), stop_token()));
    tasks.spawn_infallible("mesh", mesh::run(mesh, backend.queries.clone(), changed, stop_token()));
    tasks.spawn_infallible("reload", reload.run(stop_token()));
    if let Some(listener) = metrics_listener {
        tasks.spawn_infallible("metrics", admin::serve_metrics(listener, backend, stop_token()));
    }
    supervise(tasks, shutdown).await
}

/// The networks whose entries an earlier run of the agent may have left in the host's namespace, if there are named ones.
fn contributors(
    default: &HostStateStore,
    named: &BTreeMap<NetworkName, HostStateStore>,
) -> BTreeMap<NetworkName, NetworkProgress> {
    let name = NetworkName::default();
    let all = named.iter().chain([(&name, default)].into_iter().filter(|_| !named.is_empty()));
    // A network without a subnet has no entries yet, and it may never have any.
    let held =
        all.filter(|(name, state)| state.preferred_subnet().is_some() && (name.is_default() || state.last_record().is_some()));
    held.map(|(name, _)| (name.clone(), NetworkProgress::default())).collect()
}

/// Waits for a signal or for an unexpected end of a task, then stops all tasks.
async fn supervise(mut tasks: Tasks, shutdown: Shutdown) -> anyhow::Result<()> {
    let unexpected_exit = tokio::select! {
        biased;
        () = shutdown.graceful.cancelled() => None,
        end = tasks.next_exit() => end,
    };
    if let Some(end) = &unexpected_exit {
        tracing::error!(%end, "task exited unexpectedly");
    }
    shutdown.graceful.cancel();
    let failed = tokio::select! {
        failed = tasks.join_all(SHUTDOWN_DEADLINE) => failed,
        () = shutdown.immediate.cancelled() => anyhow::bail!("exited immediately after a second signal"),
    };
    for end in &failed {
        tracing::warn!(%end, "task failed during shutdown");
    }
    match unexpected_exit {
        Some(exit) => match &exit.outcome {
            TaskOutcome::Completed => anyhow::bail!("task {} exited unexpectedly", exit.task),
            _ => anyhow::bail!("{exit}"),
        },
        None => {
            tracing::info!("stopped; data path keeps forwarding");
            Ok(())
        }
    }
}

fn store_config(etcd: &EtcdConfig) -> StoreConfig {
    let (certfile, keyfile) = etcd.client_certificate.clone().unzip();
    let (username, password_file) = etcd.user.clone().unzip();
    StoreConfig {
        endpoints: etcd.endpoints.clone(),
        discovery_srv: etcd.discovery_srv.clone(),
        prefix: etcd.prefix.clone(),
        cafile: etcd.cafile.clone(),
        certfile,
        keyfile,
        username,
        password_file,
        ..StoreConfig::default()
    }
}
