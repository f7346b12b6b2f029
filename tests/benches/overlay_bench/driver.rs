//! The agent's own path without its process: the reconciler with the real data path and its monitor, in a fresh namespace, fed by channels as the
//! store would.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use overlay_agent::kernel::{Kernel, KernelOptions};
use overlay_agent::metrics::Metrics;
use overlay_agent::model::event::{Connection, HeldLease, LeaseOrigin, LeaseWish, OwnLease, StoreEntry, StoreEvent};
use overlay_agent::model::{Cidr, Device, Endpoint, Family, Mac, NetworkConfig, Node, PerFamily, Subnet, Vni};
use overlay_agent::plan::diff::diff;
use overlay_agent::plan::state::LinkState;
use overlay_agent::plan::underlay::{Inventory, Selection};
use overlay_agent::plan::{ApplyReport, Batch, DataPath, OpError, State};
use overlay_agent::reconcile::{Channels, Memory, Overlay, Query, Reconciler, Settings};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::limit::{Behind, Holdings};
use super::member::{Member, config, entry};
use super::space::{Space, UNDERLAY};
use super::stats::{Begin, Cost};

/// Worker threads of the agent's runtime (`agent/src/main.rs`).
const WORKERS: usize = 2;
/// How long one step of a turn may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Nothing changes for this long: the agent has come to rest. Longer than what it lets the underlay settle for.
const REST: Duration = Duration::from_millis(300);

/// What a snapshot took.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// From the snapshot's sending until the batch with the last entry was applied.
    pub last: Duration,
    /// Of this, applying.
    pub batch: Duration,
    /// Until the reconciler had taken note of everything and said so.
    pub settled: Cost,
}

/// What the agent took.
#[derive(Debug, Clone, Copy)]
pub struct Took {
    /// All peers come.
    pub set: Step,
    /// All peers go.
    pub removed: Step,
    /// `overlayd cleanup` with all peers there: what it finds read, compared and removed with the devices.
    pub taken_down: Duration,
    /// Of this, applying.
    pub taken_down_batch: Duration,
}

/// The agent's path in a namespace of its own, for the members of each family. What the kernel holds is counted after each step.
pub async fn agent(fleet: &[&[Member]]) -> anyhow::Result<Took> {
    let space = Space::new().await?;
    let peers = fleet.first().map_or(0, |members| members.len());
    let peer = |n: usize| entry(&fleet.iter().filter_map(|members| members.get(n).copied()).collect::<Vec<_>>());
    let entries = (0..peers).map(peer).collect::<anyhow::Result<Vec<_>>>()?;
    space.netns().run(|| {
        // Threads that the runtime starts are in the namespace because this one is.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
        runtime.block_on(drive(&space, fleet, entries)).context("agent")
    })?
}

/// Feeds a reconciler until it is ready, then the snapshots, and cleans up behind it.
async fn drive(space: &Space, fleet: &[&[Member]], entries: Vec<StoreEntry>) -> anyhow::Result<Took> {
    let families: Vec<Family> = fleet.iter().filter_map(|members| Some(members.first()?.subnet.family())).collect();
    let mut agent = Agent::start(&families).await?;
    let mut behind: Vec<Behind<'_>> = Vec::new();
    for (members, family) in fleet.iter().zip(&families) {
        behind.push((members, space.index(&Device::vxlan(*family, Vni::DEFAULT).name()).await?));
    }
    let set = agent.step(entries.clone()).await?;
    Holdings::expect_all(&behind, true)?;
    let removed = agent.step(Vec::new()).await?;
    Holdings::expect_all(&behind, false)?;
    agent.step(entries).await?;
    Holdings::expect_all(&behind, true)?;
    agent.stop().await?;

    let begun = Instant::now();
    let (mut kernel, _events, _monitor) = Kernel::open(&KernelOptions::default())?;
    let batch = diff(&State::new(), &kernel.dump().await?);
    let read = Instant::now();
    let report = kernel.apply(&batch).await;
    let (taken_down, taken_down_batch) = (begun.elapsed(), read.elapsed());
    ensure!(report.failed.is_empty(), "the kernel refused {} ops", report.failed.len());
    Holdings::expect_all(&behind, false)?;
    for family in families {
        let device = Device::vxlan(family, Vni::DEFAULT).name();
        ensure!(space.index(&device).await.is_err(), "{device} is still there");
    }
    Ok(Took { set, removed, taken_down, taken_down_batch })
}

/// Who asks a reconciler, plugs endpoints in, and hears what it wishes and what is in place.
type Others = (
    mpsc::Sender<Query>,
    watch::Sender<Vec<Arc<Endpoint>>>,
    watch::Receiver<Option<LeaseWish>>,
    watch::Receiver<Option<Overlay>>,
);

/// A reconciler that runs.
struct Agent {
    store: mpsc::Sender<StoreEvent>,
    changed: watch::Receiver<u64>,
    clock: Clock,
    stop: CancellationToken,
    tasks: JoinSet<anyhow::Result<()>>,
    /// The other ends of its channels: without them it would end, or wait for nothing.
    _others: Others,
}

impl Agent {
    /// Starts it in the calling thread's namespace and waits until it is ready, without peers.
    async fn start(families: &[Family]) -> anyhow::Result<Agent> {
        let (kernel, kernel_events, monitor) = Kernel::open(&KernelOptions::default())?;
        let clock = Clock::default();
        let settings = Settings {
            node: Node { name: "bench".to_owned(), id: "bench".to_owned() },
            selection: Selection { interfaces: vec![UNDERLAY.to_owned()], ..Selection::default() },
            masquerade: true,
            tx_checksum: true,
            docker: false,
            nexthop_objects: kernel.nexthop_objects(),
            resync: Duration::from_secs(300),
            lease_lasts: Duration::from_secs(3600),
            store_endpoints: Vec::new(),
            store_prefix: String::new(),
        };
        ensure!(settings.nexthop_objects, "this kernel has no next-hop objects: the raw limit needs Linux 5.3");
        let data_path = Timed { inner: kernel, clock: clock.clone() };
        let reconciler = Reconciler::new(settings, data_path, FirstMac, Arc::new(Metrics::new()));

        let (store_in, store) = mpsc::channel(1024);
        let (asked, queries) = mpsc::channel(1);
        let (plugged, endpoints) = watch::channel(Vec::new());
        let (wish, wishes) = watch::channel(None);
        let (overlay, overlays) = watch::channel(None);
        let (changes, mut changed) = watch::channel(0);
        let (ready, mut readiness) = watch::channel(false);
        let channels = Channels {
            store,
            kernel: kernel_events,
            queries,
            endpoints,
            wish,
            overlay,
            changes,
            ready,
            programmed: watch::channel(Vec::new()).0,
            ports_lost: watch::channel(0).0,
            beat: watch::channel(0).0,
        };
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { monitor.run().await.context("the monitor ended") });
        let (reconcile, token) = (reconciler.run(channels, stop.clone()), stop.clone());
        tasks.spawn(async move {
            reconcile.await;
            token.cancel();
            Ok(())
        });
        for event in introduction(families)? {
            store_in.send(event).await?;
        }
        tokio::time::timeout(LIMIT, readiness.wait_for(|ready| *ready)).await.context("the agent does not become ready")??;
        rest(&mut changed).await?;
        Ok(Agent { store: store_in, changed, clock, stop, tasks, _others: (asked, plugged, wishes, overlays) })
    }

    /// Hands it a snapshot and waits until all of it is in the kernel.
    async fn step(&mut self, entries: Vec<StoreEntry>) -> anyhow::Result<Step> {
        self.clock.reset();
        let begun = Begin::now()?;
        self.store.send(StoreEvent::Snapshot(entries)).await?;
        tokio::time::timeout(LIMIT, self.changed.changed()).await.context("the snapshot has no effect")??;
        let settled = begun.cost()?;
        let applied = self.clock.read();
        rest(&mut self.changed).await?;
        match applied {
            Applied { last: Some(last), busy, failed: 0 } => {
                Ok(Step { last: last.duration_since(begun.wall()), batch: busy, settled })
            }
            Applied { last: None, .. } => bail!("the snapshot led to no batch"),
            Applied { failed, .. } => bail!("the kernel refused {failed} ops"),
        }
    }

    async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended??;
        }
        Ok(())
    }
}

/// Waits until nothing changes any more.
async fn rest(changed: &mut watch::Receiver<u64>) -> anyhow::Result<()> {
    while let Ok(change) = tokio::time::timeout(REST, changed.changed()).await {
        change?;
    }
    Ok(())
}

/// What the store says before the peers come.
fn introduction(families: &[Family]) -> anyhow::Result<[StoreEvent; 4]> {
    let network = NetworkConfig::parse(&config(families))?.config;
    let own = |family: &Family| -> anyhow::Result<(Family, Cidr)> {
        Ok((*family, network.pools.get(*family).context("the network lacks its family")?.max))
    };
    let subnet = Subnet::new(families.iter().map(own).collect::<anyhow::Result<_>>()?)?;
    let held = HeldLease { subnet, etcd_lease: None, origin: LeaseOrigin::Acquired };
    Ok([
        StoreEvent::Connection(Connection::Up { revision: 1 }),
        StoreEvent::Config(Some(Ok(network))),
        StoreEvent::Own(OwnLease::Held(held)),
        StoreEvent::Snapshot(Vec::new()),
    ])
}

/// What was applied since the last reset.
#[derive(Debug, Clone, Copy, Default)]
struct Applied {
    last: Option<Instant>,
    busy: Duration,
    failed: usize,
}

#[derive(Debug, Clone, Default)]
struct Clock(Arc<Mutex<Applied>>);

impl Clock {
    fn reset(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Applied::default();
    }

    fn read(&self) -> Applied {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A data path that notes how long it takes.
struct Timed<D> {
    inner: D,
    clock: Clock,
}

impl<D: DataPath> DataPath for Timed<D> {
    async fn dump(&mut self) -> Result<State, OpError> {
        self.inner.dump().await
    }

    async fn apply(&mut self, batch: &Batch) -> ApplyReport {
        let begun = Instant::now();
        let report = self.inner.apply(batch).await;
        let end = Instant::now();
        let mut applied = self.clock.0.lock().unwrap_or_else(PoisonError::into_inner);
        applied.last = Some(end);
        applied.busy += end.duration_since(begun);
        applied.failed += report.failed.len();
        drop(applied);
        report
    }

    async fn follow(&mut self, paths: Vec<String>) -> Result<State, OpError> {
        self.inner.follow(paths).await
    }

    async fn link(&mut self, name: &str) -> Result<Option<LinkState>, OpError> {
        self.inner.link(name).await
    }

    async fn inventory(&mut self) -> Result<Inventory, OpError> {
        self.inner.inventory().await
    }

    async fn route_to(&mut self, address: IpAddr) -> Result<Option<u32>, OpError> {
        self.inner.route_to(address).await
    }
}

/// A memory that remembers nothing: each device has a MAC of its own.
struct FirstMac;

impl Memory for FirstMac {
    fn mac(&mut self, device: Device, _found: Option<Mac>) -> Mac {
        let last = device.name().bytes().fold(0u8, u8::wrapping_add);
        Mac::local([0x02, 0xbb, 0, 0, 0, last])
    }

    fn preferred(&self) -> Option<Subnet> {
        None
    }

    fn published(&self) -> PerFamily<IpAddr> {
        PerFamily::default()
    }

    fn sysctl_was(&mut self, _path: &str, _value: &str) {}

    fn sysctl_before(&self, _path: &str) -> Option<String> {
        None
    }
}
