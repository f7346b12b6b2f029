//! The agent's data path without its process: network and reconciler with the real kernel and monitor, in a fresh namespace.
//!
//! Channels feed it like the store would.

use std::net::IpAddr;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use overlay_agent::app::wiring;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::{Kernel, KernelOptions};
use overlay_agent::metrics::Metrics;
use overlay_agent::model::event::{Connection, HeldLease, LeaseOrigin, OwnLease, StoreEntry, StoreEvent};
use overlay_agent::model::{
    Cidr, Device, Endpoint, Family, Mac, NamespaceName, NetworkName, NetworkRecord, Node, PerFamily, StorePosition, Subnet, Vni,
};
use overlay_agent::network::{self, Network, NetworkStateStore};
use overlay_agent::plan::actual::{ActualState, LocalState};
use overlay_agent::plan::contribution::Progress;
use overlay_agent::plan::diff::diff;
use overlay_agent::plan::isolation::Transit;
use overlay_agent::plan::underlay::{HostInventory, UnderlaySelector};
use overlay_agent::plan::{ApplyReport, Batch, DataPath, Dump, OpError, State};
use overlay_agent::reconcile::{self, Reconciler, SysctlStore};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::netns_guard::{NetnsGuard, UNDERLAY};
use super::raw_netlink::{DevicePeers, KernelEntryCounts};
use super::stats::{Cost, CostTimer};
use super::synthetic_peer::{SyntheticPeer, network_config, store_entry};

/// Worker threads of the agent's runtime (`agent/src/main.rs`).
const WORKER_THREADS: usize = 2;
/// Time limit of one step of a turn.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// Period without changes after which the agent is quiet; longer than its delay for changes of the underlay.
const QUIET_PERIOD: Duration = Duration::from_millis(300);

/// The times of a snapshot.
#[derive(Debug, Clone, Copy)]
pub struct SnapshotTiming {
    /// From sending the snapshot until the batch with the last entry was applied.
    pub last_applied: Duration,
    /// The time of applying, a part of this.
    pub apply_time: Duration,
    /// Until the reconciler had processed everything and reported it.
    pub settled: Cost,
}

/// The agent's times.
#[derive(Debug, Clone, Copy)]
pub struct AgentTiming {
    /// Adding all peers.
    pub set: SnapshotTiming,
    /// Removing all peers.
    pub removed: SnapshotTiming,
    /// `overlayd cleanup` with all peers present: existing entries are read, compared and removed with the devices.
    pub cleanup: Duration,
    /// The time of applying, a part of this.
    pub cleanup_apply: Duration,
}

/// Measures the agent in its own namespace, for the peers of each family. The kernel's entries are counted after each step.
pub async fn measure_agent(fleet: &[&[SyntheticPeer]]) -> anyhow::Result<AgentTiming> {
    let netns_guard = NetnsGuard::new()?;
    let peers = fleet.first().map_or(0, |peers| peers.len());
    let peer = |n: usize| store_entry(&fleet.iter().filter_map(|peers| peers.get(n).copied()).collect::<Vec<_>>());
    let entries = (0..peers).map(peer).collect::<anyhow::Result<Vec<_>>>()?;
    netns_guard.netns().run(|| {
        // The runtime's threads inherit the namespace of this one.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKER_THREADS).enable_all().build()?;
        runtime.block_on(run_snapshots(&netns_guard, fleet, entries)).context("agent")
    })?
}

/// Feeds a reconciler until it is ready, then with the snapshots, and cleans up.
async fn run_snapshots(
    netns_guard: &NetnsGuard,
    fleet: &[&[SyntheticPeer]],
    entries: Vec<StoreEntry>,
) -> anyhow::Result<AgentTiming> {
    let families: Vec<Family> = fleet.iter().filter_map(|peers| Some(peers.first()?.subnet.family())).collect();
    let mut agent = Agent::start(&families).await?;
    let mut device_peers: Vec<DevicePeers<'_>> = Vec::new();
    for (peers, family) in fleet.iter().zip(&families) {
        device_peers.push((peers, netns_guard.link_index(&Device::vxlan(*family, Vni::DEFAULT).name())?));
    }
    let set = agent.apply_snapshot(entries.clone()).await?;
    KernelEntryCounts::assert_all(&device_peers, true)?;
    let removed = agent.apply_snapshot(Vec::new()).await?;
    KernelEntryCounts::assert_all(&device_peers, false)?;
    agent.apply_snapshot(entries).await?;
    KernelEntryCounts::assert_all(&device_peers, true)?;
    agent.stop().await?;

    let start = Instant::now();
    let (mut kernel, _events, _monitor) = Kernel::open(&Netns::current()?, &KernelOptions::default())?;
    let peers = kernel.dump().await?.peers;
    let batch = diff(&State::new(), &ActualState { local: &kernel.local(), peers: &peers });
    let read = Instant::now();
    let report = kernel.apply(&batch).await;
    let (cleanup_time, cleanup_apply_time) = (start.elapsed(), read.elapsed());
    ensure!(report.failed.is_empty(), "the kernel refused {} ops", report.failed.len());
    KernelEntryCounts::assert_all(&device_peers, false)?;
    for family in families {
        let device = Device::vxlan(family, Vni::DEFAULT).name();
        ensure!(netns_guard.link_index(&device).is_err(), "{device} is still there");
    }
    Ok(AgentTiming { set, removed, cleanup: cleanup_time, cleanup_apply: cleanup_apply_time })
}

/// A running reconciler.
struct Agent {
    store: mpsc::Sender<StoreEvent>,
    changed: watch::Receiver<u64>,
    apply_stats: SharedApplyStats,
    stop: CancellationToken,
    tasks: JoinSet<anyhow::Result<()>>,
    progress: watch::Receiver<Progress>,
    /// The other ends of its channels: without them it would end, or wait for ever.
    _other_ends: (watch::Sender<Vec<Arc<Endpoint>>>, wiring::Outputs),
}

impl Agent {
    /// Starts it in the calling thread's namespace and waits until it is ready, without peers.
    async fn start(families: &[Family]) -> anyhow::Result<Agent> {
        let (kernel, kernel_events, monitor) = Kernel::open(&Netns::current()?, &KernelOptions::default())?;
        let clock = SharedApplyStats::default();
        ensure!(kernel.nexthop_objects(), "this kernel has no next-hop objects: the raw limit needs Linux 5.3");
        let settings = network::Settings {
            name: NetworkName::default(),
            isolated: false,
            netns_prefix: "ov-".to_owned(),
            node: Node { name: "bench".to_owned(), id: "bench".to_owned() },
            selection: UnderlaySelector { interfaces: vec![UNDERLAY.to_owned()], ..UnderlaySelector::default() },
            masquerade: true,
            tx_checksum: true,
            docker: false,
            lease_ttl: Duration::from_secs(3600),
            store_endpoints: Vec::new(),
            store_prefix: String::new(),
        };
        let metrics = Arc::new(Metrics::new());
        let network = Network::new(settings, EphemeralState, Arc::clone(&metrics));
        let settings = reconcile::Settings {
            namespace: NamespaceName::Host,
            nexthop_objects: true,
            resync: Duration::from_secs(300),
            probe_address: None,
        };
        let data_path = TimedDataPath { inner: kernel, apply_stats: clock.clone() };
        let reconciler = Reconciler::new(settings, data_path, EphemeralState, metrics);
        let (store_in, store) = mpsc::channel(1024);
        let (ports, endpoints) = watch::channel(Vec::new());
        let inputs = wiring::Inputs { kernel: kernel_events, endpoints, applied_endpoints: watch::channel(Vec::new()).0 };
        let (mut network_channels, mut reconciler_channels, mut outputs) = wiring::connect(inputs);
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { monitor.run().await.context("the monitor ended") });
        let token = stop.clone();
        tasks.spawn(async move {
            network.run(store, &mut network_channels, Duration::ZERO, token.clone()).await;
            token.cancel();
            Ok(())
        });
        let token = stop.clone();
        tasks.spawn(async move {
            reconciler.run(&mut reconciler_channels, Duration::ZERO, token.clone()).await;
            token.cancel();
            Ok(())
        });
        for event in initial_events(families)? {
            store_in.send(event).await?;
        }
        tokio::time::timeout(STEP_TIMEOUT, outputs.ready.wait_for(|ready| *ready))
            .await
            .context("the agent does not become ready")??;
        let (mut changed, progress) = (outputs.changes.clone(), outputs.progress.clone());
        wait_quiet(&mut changed).await?;
        Ok(Agent { store: store_in, changed, apply_stats: clock, stop, tasks, progress, _other_ends: (ports, outputs) })
    }

    /// Sends it a snapshot and waits until all of it is in the kernel.
    async fn apply_snapshot(&mut self, entries: Vec<StoreEntry>) -> anyhow::Result<SnapshotTiming> {
        self.apply_stats.reset();
        let timer = CostTimer::start()?;
        self.progress.mark_unchanged();
        self.store.send(StoreEvent::Snapshot(entries)).await?;
        tokio::time::timeout(STEP_TIMEOUT, self.progress.changed()).await.context("the snapshot has no effect")??;
        let settled = timer.cost()?;
        let applied = self.apply_stats.read();
        wait_quiet(&mut self.changed).await?;
        match applied {
            ApplyStats { last_applied: Some(last), apply_time, failed: 0 } => {
                Ok(SnapshotTiming { last_applied: last.duration_since(timer.wall()), apply_time, settled })
            }
            ApplyStats { last_applied: None, .. } => bail!("the snapshot led to no batch"),
            ApplyStats { failed, .. } => bail!("the kernel refused {failed} ops"),
        }
    }

    async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        while let Some(result) = self.tasks.join_next().await {
            result??;
        }
        Ok(())
    }
}

/// Waits until nothing changes any more.
async fn wait_quiet(changed: &mut watch::Receiver<u64>) -> anyhow::Result<()> {
    while let Ok(change) = tokio::time::timeout(QUIET_PERIOD, changed.changed()).await {
        change?;
    }
    Ok(())
}

/// The store's events before the peers.
fn initial_events(families: &[Family]) -> anyhow::Result<[StoreEvent; 4]> {
    let network = NetworkRecord::parse(&network_config(families))?;
    let pool_subnet = |family: &Family| -> anyhow::Result<(Family, Cidr)> {
        Ok((*family, network.config.pools.get(*family).context("the network lacks its family")?.max))
    };
    let subnet = Subnet::new(families.iter().map(pool_subnet).collect::<anyhow::Result<_>>()?)?;
    let lease = HeldLease { subnet, expiry: None, origin: LeaseOrigin::Acquired };
    Ok([
        StoreEvent::Connection(Connection::Up { position: StorePosition(1) }),
        StoreEvent::Config(Some(Ok(network))),
        StoreEvent::Own(OwnLease::Held(lease)),
        StoreEvent::Snapshot(Vec::new()),
    ])
}

/// The applied changes since the last reset.
#[derive(Debug, Clone, Copy, Default)]
struct ApplyStats {
    last_applied: Option<Instant>,
    apply_time: Duration,
    failed: usize,
}

#[derive(Debug, Clone, Default)]
struct SharedApplyStats(Arc<Mutex<ApplyStats>>);

impl SharedApplyStats {
    fn reset(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = ApplyStats::default();
    }

    fn read(&self) -> ApplyStats {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A data path that records its times.
struct TimedDataPath<D> {
    inner: D,
    apply_stats: SharedApplyStats,
}

impl<D: DataPath> DataPath for TimedDataPath<D> {
    async fn dump(&mut self) -> Result<Dump, OpError> {
        self.inner.dump().await
    }

    fn local(&self) -> impl Deref<Target = LocalState> {
        self.inner.local()
    }

    async fn apply(&mut self, batch: &Batch) -> ApplyReport {
        let start = Instant::now();
        let report = self.inner.apply(batch).await;
        let end = Instant::now();
        let mut applied = self.apply_stats.0.lock().unwrap_or_else(PoisonError::into_inner);
        applied.last_applied = Some(end);
        applied.apply_time += end.duration_since(start);
        applied.failed += report.failed.len();
        drop(applied);
        report
    }

    async fn watch_sysctls(&mut self, paths: Vec<String>) -> Result<(), OpError> {
        self.inner.watch_sysctls(paths).await
    }

    async fn inventory(&mut self) -> Result<HostInventory, OpError> {
        self.inner.inventory().await
    }

    async fn route_to(&mut self, address: IpAddr) -> Result<Option<u32>, OpError> {
        self.inner.route_to(address).await
    }
}

/// A state store without persistence: each device has a random MAC.
struct EphemeralState;

impl NetworkStateStore for EphemeralState {
    fn device_mac(&mut self, device: Device, _found: Option<Mac>) -> Mac {
        let last = device.name().bytes().fold(0u8, u8::wrapping_add);
        Mac::local([0x02, 0xbb, 0, 0, 0, last])
    }

    fn preferred_subnet(&self) -> Option<Subnet> {
        None
    }

    fn published_addresses(&self) -> PerFamily<IpAddr> {
        PerFamily::default()
    }

    fn transit(&mut self) -> Option<Transit> {
        None
    }

    fn save_record(&mut self, _record: &NetworkRecord) {}
}

impl SysctlStore for EphemeralState {
    fn save_sysctl(&mut self, _path: &str, _value: &str) {}

    fn saved_sysctl(&self, _path: &str) -> Option<String> {
        None
    }
}
