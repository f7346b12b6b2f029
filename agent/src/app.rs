//! The one place that wires everything, and notices the end of every task.
//!
//! Tasks: `signals`, `kernel` (follows the kernel's events), `store`, `reconcile`, `endpoints` (audit), `overlay` (tells endpoints and
//! `subnet.env` of the overlay once it is in place), `admin` (the socket), `systemd` (tells it how the agent is), `reload` (SIGHUP), `mesh` (probes
//! peers), `path-mtu` (has the kernel learn the MTU of the path to each), and `metrics` where a TCP address is set. Channels between them are bounded. A task that ends while it should run ends the agent with an error, and systemd starts it anew: the data path forwards on meanwhile.

mod backend;
mod cleanup;
mod conflist;
mod guard;
mod memory;
mod mesh;
mod path_mtu;
mod reload;
mod supervision;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{mpsc, watch};

use crate::admin::{self, AdminSocket};
use crate::config::{EtcdConfig, HostConfig};
use crate::endpoint::{EndpointNetwork, Endpoints};
use crate::kernel::{Kernel, KernelOptions, Plugger};
use crate::metrics::Metrics;
use crate::model::{Node, PerFamily};
use crate::reconcile::{Channels, Overlay, Reconciler, Settings};
use crate::shutdown::{Outcome, Shutdown, Signals, Tasks};
use crate::state::{RunLock, StateDir, subnet_env, write_subnet_env};
use crate::store::{Store, StoreConfig};
use crate::systemd::{Notifier, take_listener};
use crate::telemetry::LevelHandle;

pub use cleanup::cleanup;
pub use reload::Source;

use backend::AgentBackend;
use conflist::Conflist;
use memory::HostMemory;
use reload::Reload;
use supervision::Signs;

/// The socket's name in the run directory.
const SOCKET: &str = "overlayd.sock";
/// How long tasks may take to end once they were told to.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);
/// Events and questions that may wait. A store that is faster than the reconciler waits at the channel, which etcd's flow control passes on.
const STORE_EVENTS: usize = 1024;
const QUERIES: usize = 64;

/// Runs the agent until a signal, or until something fails that no retry can heal.
pub async fn run(config: HostConfig, level: LevelHandle, source: Source) -> anyhow::Result<()> {
    // First, before anything else can be mistaken for it.
    let inherited = take_listener(&config.run_dir.join(SOCKET))?;
    guard::check_capabilities()?;
    let signals = Signals::catch().context("cannot catch signals")?;
    let notifier = Arc::new(Notifier::from_environment()?);
    let reload = Reload::catch(source, level.clone(), Arc::clone(&notifier)).context("cannot catch signals")?;
    let _run_lock = RunLock::acquire(&config.run_dir).context("the run directory (--run-dir) cannot be used")?;
    let _namespace_lock = guard::lock_namespace()?;
    let state = Arc::new(StateDir::open(&config.state_dir).context("the state directory (--state-dir) cannot be used")?);
    let node = Node { name: config.node_name.clone(), id: state.node_id()? };
    let socket = match inherited {
        Some(listener) => AdminSocket::inherit(listener, &config.run_dir.join(SOCKET))?,
        None => AdminSocket::bind(&config.run_dir.join(SOCKET))?,
    };
    let metrics_listener = match config.metrics_listen {
        Some(address) => Some(admin::bind_tcp(address).await?),
        None => None,
    };
    let (kernel, kernel_events, follow) =
        Kernel::open(&KernelOptions { force_classic_routes: !config.nexthop_objects, ..KernelOptions::default() })?;
    let plugger = kernel.plugger();
    let endpoints: Endpoints<Plugger> = Endpoints::restore(Arc::clone(&state), plugger.clone()).await?;
    let memory = HostMemory::load(Arc::clone(&state))?;
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

    let (store_events_in, store_events) = mpsc::channel(STORE_EVENTS);
    let (queries_in, queries) = mpsc::channel(QUERIES);
    let (wish, wishes) = watch::channel(None);
    let (overlay, overlays) = watch::channel(None);
    let (changes, changed) = watch::channel(0);
    let (ready, readiness) = watch::channel(false);
    let (ports_lost, losses) = watch::channel(0);
    let (beat, beats) = watch::channel(0);
    let signs = Signs { ready: readiness, beats };
    let store_config = store_config(&config.etcd);
    let reconciler = Reconciler::new(
        Settings {
            node,
            selection: config.selection.clone(),
            masquerade: config.ip_masq,
            tx_checksum: config.vxlan_tx_checksum,
            docker: config.docker,
            nexthop_objects: kernel.nexthop_objects(),
            resync: config.resync_interval,
            lease_lasts: store_config.lease_lasts(),
            store_endpoints: match &config.etcd.discovery_srv {
                Some(domain) => vec![format!("srv:{domain}")],
                None => config.etcd.endpoints.clone(),
            },
            store_prefix: config.etcd.prefix.clone(),
        },
        kernel,
        memory.clone(),
        Arc::clone(&metrics),
    );
    let channels = Channels {
        store: store_events,
        kernel: kernel_events,
        queries,
        endpoints: endpoints.plugged(),
        programmed: endpoints.programmed(),
        wish,
        overlay,
        changes,
        ready,
        ports_lost,
        beat,
    };
    let store = Store::new(store_config.clone()).counted(Arc::clone(&metrics));
    let mesh = Arc::new(mesh::Shared::new(config.node_name.clone(), config.mesh_interval, Arc::clone(&metrics)));
    let (probes, news) = (queries_in.clone(), changed.clone());
    let backend = Arc::new(AgentBackend {
        mesh: Arc::clone(&mesh),
        queries: queries_in,
        endpoints: endpoints.clone(),
        plugger,
        masquerade: config.ip_masq,
        store: store_config.clone(),
        time_left: tokio::sync::Mutex::new(None),
        metrics: Arc::clone(&metrics),
        changed,
        level,
    });

    let shutdown = Shutdown::default();
    let mut tasks = Tasks::new();
    let begin = || shutdown.begin.clone();
    {
        let shutdown = shutdown.clone();
        tasks.spawn("signals", async move {
            let done = shutdown.begin.clone();
            tokio::select! {
                () = signals.watch(shutdown) => {}
                // Whoever else began the end: nothing is left to wait for.
                () = done.cancelled() => {}
            }
            Ok::<_, std::convert::Infallible>(())
        });
    }
    {
        let stop = begin();
        tasks.spawn("kernel", async move {
            tokio::select! {
                ended = follow.run() => ended,
                () = stop.cancelled() => Ok(()),
            }
        });
    }
    {
        let stop = begin();
        tasks.spawn("store", async move { store.run(store_events_in, wishes, stop).await });
    }
    tasks.spawn("reconcile", infallible(reconciler.run(channels, begin())));
    {
        let (endpoints, stop) = (endpoints.clone(), begin());
        tasks.spawn("endpoints", infallible(async move { endpoints.run(stop).await }));
    }
    tasks.spawn("overlay", tell_overlay(overlays, losses, endpoints, config.clone(), memory, begin()));
    {
        let (backend, stop) = (Arc::clone(&backend), begin());
        tasks.spawn("admin", infallible(admin::serve(socket, backend, stop)));
    }
    tasks.spawn("systemd", infallible(supervision::tell(notifier, signs, Arc::clone(&backend), begin())));
    tasks.spawn("path-mtu", infallible(path_mtu::run(probes.clone(), news.clone(), begin())));
    tasks.spawn("mesh", infallible(mesh::run(mesh, probes, news, begin())));
    tasks.spawn("reload", infallible(reload.run(begin())));
    if let Some(listener) = metrics_listener {
        tasks.spawn("metrics", infallible(admin::serve_metrics(listener, backend, begin())));
    }
    supervise(tasks, shutdown).await
}

/// Waits for the signal, or for a task that ends without being told to.
async fn supervise(mut tasks: Tasks, shutdown: Shutdown) -> anyhow::Result<()> {
    let broken = tokio::select! {
        biased;
        () = shutdown.begin.cancelled() => None,
        end = tasks.next_end() => end,
    };
    if let Some(end) = &broken {
        tracing::error!(%end, "a task ended that should not have");
    }
    shutdown.begin.cancel();
    let failed = tokio::select! {
        failed = tasks.finish(SHUTDOWN_DEADLINE) => failed,
        () = shutdown.now.cancelled() => anyhow::bail!("ended at once by a second signal"),
    };
    for end in &failed {
        tracing::warn!(%end, "while ending");
    }
    match broken {
        Some(end) => match &end.outcome {
            Outcome::Done => anyhow::bail!("task {} ended although nothing asked it to", end.task),
            _ => anyhow::bail!("{end}"),
        },
        None => {
            tracing::info!("ended; the data path is left forwarding");
            Ok(())
        }
    }
}

/// Tells all who build on the overlay that it is in place (`subnet.env`, the CNI network list), and again at each change; has containers wired anew whose interface others removed
/// or whose MTU is another now.
async fn tell_overlay(
    mut overlays: watch::Receiver<Option<Overlay>>,
    mut losses: watch::Receiver<u64>,
    endpoints: Endpoints<Plugger>,
    config: HostConfig,
    memory: HostMemory,
    stop: tokio_util::sync::CancellationToken,
) -> anyhow::Result<()> {
    let mut conflist = Conflist::of(&config, &config.run_dir.join(SOCKET));
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
            memory.held(overlay.subnet, overlay.public_ip);
            let text = subnet_env(&networks, &overlay.subnet, overlay.mtu, config.ip_masq);
            heal(&endpoints).await;
            match write_subnet_env(&config.subnet_file, &text) {
                Ok(true) => {
                    tracing::info!(file = %config.subnet_file.display(), subnet = %overlay.subnet, mtu = overlay.mtu, "overlay in place")
                }
                Ok(false) => {}
                // Containers are attached all the same; only other tools miss the file.
                Err(error) => tracing::error!(%error, "the subnet file cannot be written"),
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
            lost = losses.changed() => if lost.is_err() {
                return Ok(());
            },
        }
    }
}

async fn heal(endpoints: &Endpoints<Plugger>) {
    for (endpoint, error) in endpoints.heal().await {
        tracing::warn!(%endpoint, %error, "an endpoint cannot be wired anew");
    }
}

async fn infallible(task: impl Future<Output = ()>) -> Result<(), std::convert::Infallible> {
    task.await;
    Ok(())
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
