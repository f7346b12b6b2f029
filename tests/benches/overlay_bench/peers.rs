//! `peers`: N peers in one snapshot, until the last route is in the kernel.
//!
//! The agent's own path: the reconciler with the real data path and its monitor, fed by channels as the store would. It runs in turns with the
//! raw limit, each turn in a fresh namespace, and what the kernel holds afterwards is counted.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use overlay_agent::kernel::setup::Setup;
use overlay_agent::kernel::{Kernel, KernelOptions};
use overlay_agent::metrics::Metrics;
use overlay_agent::model::event::{Connection, HeldLease, LeaseOrigin, OwnLease, StoreEntry, StoreEvent};
use overlay_agent::model::{Cidr, Device, Family, Mac, NetworkConfig, Node, Subnet, Vni};
use overlay_agent::plan::underlay::{Inventory, Selection};
use overlay_agent::plan::{ApplyReport, Batch, DataPath, OpError, State};
use overlay_agent::reconcile::{Channels, Memory, Reconciler, Settings};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::limit::{Holdings, Requests};
use super::member::{Member, config, members};
use super::progress;
use super::report::{Report, Row};
use super::space::{Space, UNDERLAY};
use super::stats::{Begin, Cost, milliseconds};

/// Worker threads of the agent's runtime (`agent/src/main.rs`).
const WORKERS: usize = 2;
/// How long one step of a turn may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Nothing changes for this long: the agent has come to rest. Longer than what it lets the underlay settle for.
const REST: Duration = Duration::from_millis(300);
/// Between turns: the kernel removes a namespace in the background, and frees what was in it when RCU's grace periods are over.
const PAUSE: Duration = Duration::from_millis(400);
/// Snapshot to last route, as a multiple of the raw limit; and the batch alone.
const GOAL: f64 = 1.5;
const BATCH_GOAL: f64 = 1.2;

/// How to measure.
#[derive(Debug, Args)]
pub struct PeersArguments {
    /// Number of peers; may be given several times
    #[arg(long, value_name = "N", default_values_t = [1_000, 5_000, 10_000])]
    peers: Vec<u32>,
    /// Turns of each; a turn is the raw limit once and the agent once
    #[arg(long, value_name = "K", default_value_t = 7)]
    runs: usize,
    /// Only one family: 4 or 6
    #[arg(long, value_name = "4|6", value_parser = family)]
    family: Option<Family>,
}

/// A family by its number.
pub fn family(text: &str) -> Result<Family, String> {
    match text {
        "4" => Ok(Family::V4),
        "6" => Ok(Family::V6),
        _ => Err("expected 4 or 6".to_owned()),
    }
}

/// What the turns took, in milliseconds.
#[derive(Debug, Default)]
struct Turns {
    raw: Vec<f64>,
    raw_processor: Vec<f64>,
    processor: Vec<f64>,
    routed: Vec<f64>,
    batch: Vec<f64>,
    settled: Vec<f64>,
}

/// Measures all sizes in all families.
pub fn measure(arguments: &PeersArguments, report: &mut Report) -> anyhow::Result<()> {
    // With a thread of its own, so that the connections of a turn end with it and do not hold its namespace until the next one.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    for family in Family::ALL.into_iter().filter(|f| arguments.family.is_none_or(|only| only == *f)) {
        for peers in &arguments.peers {
            let fleet = members(family, 1..=*peers)?;
            let mut turns = Turns::default();
            for turn in 0..arguments.runs {
                progress(&format!("{family}, {peers} peers: turn {} of {}", turn + 1, arguments.runs));
                // In every other turn the agent goes first, so that whatever the first one finds cold is cold for both.
                for part in 0..2 {
                    std::thread::sleep(PAUSE);
                    if (turn + part) % 2 == 0 {
                        let took = runtime.block_on(raw(family, &fleet))?;
                        turns.raw.push(milliseconds(took.wall));
                        turns.raw_processor.push(milliseconds(took.processor));
                    } else {
                        let took = runtime.block_on(agent(family, &fleet))?;
                        turns.routed.push(milliseconds(took.routed));
                        turns.batch.push(milliseconds(took.batch));
                        turns.settled.push(milliseconds(took.settled.wall));
                        turns.processor.push(milliseconds(took.settled.processor));
                    }
                }
            }
            add_rows(report, &format!("{family}, {peers} peers"), &turns);
        }
    }
    Ok(())
}

fn add_rows(report: &mut Report, conditions: &str, turns: &Turns) {
    let row = |what, samples: &[f64], raw: &[f64]| {
        Row::new("peers", conditions, what, "ms", samples).map(|row| row.against("raw netlink", samples, raw))
    };
    report.add(row("snapshot to last route", &turns.routed, &turns.raw).map(|r| r.ratio_goal(GOAL)));
    report.add(row("of it, the batch", &turns.batch, &turns.raw).map(|r| r.ratio_goal(BATCH_GOAL)));
    report.add(row("snapshot to rest", &turns.settled, &turns.raw));
    report.add(row("processor time until rest", &turns.processor, &turns.raw_processor));
}

/// The raw limit in a namespace of its own.
pub async fn raw(family: Family, fleet: &[Member]) -> anyhow::Result<Cost> {
    let space = Space::new().await?;
    let device = space.add_vxlan(family).await?;
    let requests = Requests::build(fleet, device);
    let took = space.netns().run(|| requests.send())??;
    count_and_remove(&space, family, fleet.len()).await.context("raw limit")?;
    Ok(took)
}

/// Counts what the kernel holds, and removes it with its device while nobody measures: the kernel would do so in the background, holding
/// the lock that the next turn needs.
async fn count_and_remove(space: &Space, family: Family, peers: usize) -> anyhow::Result<()> {
    let name = Device::vxlan(family, Vni::DEFAULT).name();
    let device = space.index(&name).await?;
    space.netns().run(|| {
        let holdings = Holdings::read(family, device)?;
        holdings.expect(peers)?;
        holdings.remove()
    })??;
    Ok(Setup::open(space.netns())?.delete_link(&name).await?)
}

/// What the agent took.
struct Took {
    /// From the snapshot's sending until the batch with the last route was applied.
    routed: Duration,
    /// Of this, applying.
    batch: Duration,
    /// Until the reconciler had taken note of everything and said so.
    settled: Cost,
}

/// The agent's path in a namespace of its own.
async fn agent(family: Family, fleet: &[Member]) -> anyhow::Result<Took> {
    let space = Space::new().await?;
    let entries = fleet.iter().map(Member::entry).collect::<anyhow::Result<Vec<_>>>()?;
    let took = space.netns().run(|| {
        // Threads that the runtime starts are in the namespace because this one is.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
        runtime.block_on(drive(family, entries))
    })??;
    count_and_remove(&space, family, fleet.len()).await.context("agent")?;
    Ok(took)
}

/// Feeds a reconciler until it is ready, then the snapshot.
async fn drive(family: Family, entries: Vec<StoreEntry>) -> anyhow::Result<Took> {
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
    let (_queries_in, queries) = mpsc::channel(1);
    let (_plugged, endpoints) = watch::channel(Vec::new());
    let (wish, _wishes) = watch::channel(None);
    let (overlay, _overlays) = watch::channel(None);
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
    tasks.spawn(monitor.run());
    let (reconcile, token) = (reconciler.run(channels, stop.clone()), stop.clone());
    tasks.spawn(async move {
        reconcile.await;
        token.cancel();
        Ok(())
    });

    for event in introduction(family)? {
        store_in.send(event).await?;
    }
    tokio::time::timeout(LIMIT, readiness.wait_for(|ready| *ready)).await.context("the agent does not become ready")??;
    while let Ok(change) = tokio::time::timeout(REST, changed.changed()).await {
        change?;
    }
    clock.reset();
    let begun = Begin::now()?;
    store_in.send(StoreEvent::Snapshot(entries)).await?;
    tokio::time::timeout(LIMIT, changed.changed()).await.context("the snapshot has no effect")??;
    let settled = begun.cost()?;
    let applied = clock.read();
    stop.cancel();
    while let Some(ended) = tasks.join_next().await {
        ended?.context("the monitor ended")?;
    }
    match applied {
        Applied { last: Some(last), busy, failed: 0 } => {
            Ok(Took { routed: last.duration_since(begun.wall()), batch: busy, settled })
        }
        Applied { last: None, .. } => bail!("the snapshot led to no batch"),
        Applied { failed, .. } => bail!("the kernel refused {failed} ops"),
    }
}

/// What the store says before the peers come.
fn introduction(family: Family) -> anyhow::Result<[StoreEvent; 4]> {
    let network = NetworkConfig::parse(&config(family))?.config;
    let pool = network.pools.get(family).context("the network lacks its family")?;
    let own: Cidr = pool.max;
    let subnet = Subnet::new(std::iter::once((family, own)).collect())?;
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

    fn sysctl_was(&mut self, _path: &str, _value: &str) {}
}
