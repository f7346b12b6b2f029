//! Wires all parts of the agent together and supervises their tasks.
//!
//! | task | does |
//! | --- | --- |
//! | `signals` | SIGTERM and SIGINT |
//! | `kernel` | follows kernel events |
//! | `supervisor` | the networks, each with its part of the store, and the reconcilers; restarts those that fail |
//! | `endpoints` | audits endpoints |
//! | `overlay` | passes the overlay's parameters to endpoints, `subnet.env` and the CNI network list |
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
mod mesh;
mod path_mtu;
mod preflight;
pub mod queries;
mod reload;
mod supervision;
pub mod supervisor;
pub mod wiring;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::watch;

use crate::admin::{self, AdminSocket};
use crate::config::{EtcdConfig, HostConfig};
use crate::endpoint::{EndpointNetwork, Endpoints, HostClaims};
use crate::kernel::netns::Netns;
use crate::kernel::{Kernel, KernelOptions, PortManager};
use crate::metrics::Metrics;
use crate::model::{NamespaceName, NetworkName, Node, PerFamily};
use crate::network::{self, Network, Overlay};
use crate::reconcile::{self, Reconciler};
use crate::shutdown::{Shutdown, Signals, TaskOutcome, Tasks};
use crate::state::{DirLock, StateDir, subnet_env, write_subnet_env};
use crate::store::{Store, StoreConfig};
use crate::systemd::{Notifier, take_listener};
use crate::telemetry::LevelHandle;

pub use cleanup::cleanup;
pub use reload::SettingsSource;

use backend::AgentBackend;
use conflist::Conflist;
use host_state::HostStateStore;
use reload::Reload;
use supervision::HealthInputs;
use supervisor::Supervisor;

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
    let (kernel, kernel_events, kernel_monitor) = Kernel::open(
        &Netns::current()?,
        &KernelOptions { force_classic_routes: !config.nexthop_objects, ..KernelOptions::default() },
    )?;
    let port_manager = kernel.port_manager();
    let claims = HostClaims::default();
    let endpoints: Endpoints<PortManager> =
        Endpoints::restore(Arc::clone(&state), port_manager.clone(), NetworkName::default(), claims).await?;
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

    let (network_channels, reconciler_channels, outputs) = wiring::connect(wiring::Inputs {
        kernel: kernel_events,
        endpoints: endpoints.ports(),
        applied_endpoints: endpoints.applied_endpoints(),
    });
    let wiring::Outputs { queries, lease_request, overlay, changes, ready, ports_lost, heartbeats, progress: _ } = outputs;
    let health_inputs = HealthInputs { ready, heartbeats: heartbeats.into() };
    let store_config = store_config(&config.etcd);
    store_config.validate()?;
    let shutdown = Shutdown::default();
    let stop_token = || shutdown.graceful.clone();
    let supervisor = Supervisor::new(queries.failures.clone(), Arc::clone(&metrics), stop_token());
    let reconciler_settings = reconcile::Settings {
        namespace: NamespaceName::Host,
        nexthop_objects: kernel.nexthop_objects(),
        resync: config.resync_interval,
        probe_address: config.selection.can_reach,
    };
    let network_settings = network::Settings {
        name: NetworkName::default(),
        isolated: false,
        node,
        selection: config.selection.clone(),
        masquerade: config.ip_masq,
        tx_checksum: config.vxlan_tx_checksum,
        docker: config.docker,
        lease_ttl: store_config.min_lease_validity(),
        store_endpoints: match &config.etcd.discovery_srv {
            Some(domain) => vec![format!("srv:{domain}")],
            None => config.etcd.endpoints.clone(),
        },
        store_prefix: config.etcd.prefix.clone(),
    };
    let network_name = network_settings.name.clone();
    let store = Store::new(store_config.clone()).with_metrics(Arc::clone(&metrics));
    {
        let (host_state, metrics) = (host_state.clone(), Arc::clone(&metrics));
        supervisor.start_reconciler(NamespaceName::Host, reconciler_channels, move || {
            Reconciler::new(reconciler_settings.clone(), kernel.clone(), host_state.clone(), Arc::clone(&metrics))
        });
    }
    {
        let (host_state, metrics) = (host_state.clone(), Arc::clone(&metrics));
        let make = move || Network::new(network_settings.clone(), host_state.clone(), Arc::clone(&metrics));
        supervisor.start_network(network_name.clone(), network_channels, make, move |events, stop| {
            let (store, lease_request) = (store.clone(), lease_request.clone());
            async move { store.run(events, lease_request, stop).await }
        });
    }
    let mesh = Arc::new(mesh::MeshState::new(config.node_name.clone(), config.mesh_interval, Arc::clone(&metrics)));
    let (probes, mesh_changes) = (queries.clone(), changes.clone());
    let backend = Arc::new(AgentBackend {
        network_name,
        mesh: Arc::clone(&mesh),
        queries,
        endpoints: endpoints.clone(),
        port_manager,
        masquerade: config.ip_masq,
        store: store_config.clone(),
        ttl_cache: tokio::sync::Mutex::new(None),
        metrics: Arc::clone(&metrics),
        changes,
        level,
    });

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
    {
        let stop = stop_token();
        tasks.spawn("kernel", async move {
            tokio::select! {
                ended = kernel_monitor.run() => ended,
                () = stop.cancelled() => Ok(()),
            }
        });
    }
    tasks.spawn("supervisor", supervisor.run());
    {
        let (endpoints, stop) = (endpoints.clone(), stop_token());
        tasks.spawn_infallible("endpoints", async move { endpoints.run(stop).await });
    }
    tasks.spawn("overlay", publish_overlay(overlay, ports_lost, endpoints, config.clone(), host_state, stop_token()));
    {
        let networks = Arc::new(directory::DefaultNetwork(Arc::clone(&backend)));
        tasks.spawn_infallible("admin", admin::serve(socket, networks, stop_token()));
    }
    tasks.spawn_infallible("systemd", supervision::notify(notifier, health_inputs, Arc::clone(&backend), stop_token()));
    tasks.spawn_infallible("path-mtu", path_mtu::run(probes.clone(), mesh_changes.clone(), stop_token()));
    tasks.spawn_infallible("mesh", mesh::run(mesh, probes, mesh_changes, stop_token()));
    tasks.spawn_infallible("reload", reload.run(stop_token()));
    if let Some(listener) = metrics_listener {
        tasks.spawn_infallible("metrics", admin::serve_metrics(listener, backend, stop_token()));
    }
    supervise(tasks, shutdown).await
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

/// Publishes the overlay's parameters at each change: to endpoints, `subnet.env` and the CNI network list.
///
/// Also recreates veth pairs that another process deleted, or whose MTU differs from the overlay's.
async fn publish_overlay(
    mut overlays: watch::Receiver<Option<Overlay>>,
    mut ports_lost: watch::Receiver<u64>,
    endpoints: Endpoints<PortManager>,
    config: HostConfig,
    host_state: HostStateStore,
    stop: tokio_util::sync::CancellationToken,
) -> anyhow::Result<()> {
    let mut conflist = Conflist::from_config(&config, &config.run_dir.join(SOCKET_NAME));
    loop {
        let overlay = overlays.borrow_and_update().clone();
        if let Some(overlay) = overlay {
            let networks: PerFamily<_> = overlay.network.pools.map(|_, pool| pool.network);
            endpoints.set_network(Some(EndpointNetwork {
                subnet: overlay.subnet,
                networks,
                bridge: overlay.bridge,
                mtu: overlay.mtu,
                docker: config.docker,
            }));
            host_state.record_held_subnet(overlay.subnet, overlay.public_ip);
            let text = subnet_env(&networks, &overlay.subnet, overlay.mtu, config.ip_masq);
            reconcile_ports(&endpoints).await;
            match write_subnet_env(&config.subnet_file, &text) {
                Ok(true) => {
                    tracing::info!(file = %config.subnet_file.display(), subnet = %overlay.subnet, mtu = overlay.mtu, "overlay in place")
                }
                Ok(false) => {}
                // Only other tools need the file: attaching containers works without it.
                Err(error) => tracing::error!(%error, "cannot write subnet file"),
            }
            if let Some(conflist) = &mut conflist {
                conflist.write();
            }
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = overlays.changed() => if changed.is_err() {
                return Ok(());
            },
            lost = ports_lost.changed() => if lost.is_err() {
                return Ok(());
            },
        }
    }
}

async fn reconcile_ports(endpoints: &Endpoints<PortManager>) {
    for (endpoint, error) in endpoints.reconcile_ports().await {
        tracing::warn!(%endpoint, %error, "cannot recreate veth pair");
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
