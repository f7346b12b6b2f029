//! Reconciler of one network namespace: compares desired with actual kernel state, and applies the difference.
//!
//! One task per network namespace, [`Reconciler::run`], owns desired state, the peers' part of actual state, and the entries that
//! networks share there. The data path owns the local part. Networks contribute their desired entries; the kernel reports
//! changes. Each round takes one event and folds all further queued events. It then converges: it dumps the kernel if actual
//! state is in doubt, diffs, applies and folds the results. The batch is applied within the round, before the next event is
//! folded. So a foreign change after our write is also folded after our write, and actual state ends up as the kernel's state.
//!
//! Cancel safety: every await of the `select!` is a channel's `recv` or a timer; no event is lost when another arm wins.

mod apply;
mod drift;
mod host;
mod inputs;
mod report;
mod retry;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::allocator;
use crate::metrics::{FullRead, Metrics};
use crate::model::{Device, NamespaceName, NetworkName};
use crate::plan::actual::{ActualState, LocalState};
use crate::plan::bulk::BULK_THRESHOLD;
use crate::plan::contribution::{HostView, NetworkProgress, Progress, ReconcilerInput};
use crate::plan::diff::{diff, diff_keys};
use crate::plan::nexthop_ids::NexthopIds;
use crate::plan::ruleset::Table;
use crate::plan::shared::SharedSpec;
use crate::plan::state::Entries;
use crate::plan::union::DesiredState;
use crate::plan::{Batch, DataPath, Dump, KernelEvent, Key, LinkKind, State};

pub use report::{DataPathReport, PeerState};

use drift::DriftLog;
use retry::RetryQueue;

/// Delay from a change of foreign links or addresses to the next read of the host's interfaces.
const HOST_READ_DEBOUNCE: Duration = Duration::from_millis(100);
/// Pause after a read of all interfaces, as a multiple of its duration. A storm of foreign links then costs 1/20 of a processor.
const HOST_READ_PAUSE_FACTOR: u32 = 20;
/// Minimum pause between two dumps, so that a storm of changes does not cause a loop of dumps.
const MIN_DUMP_PAUSE: Duration = Duration::from_millis(20);
/// Pause after a dump, as a multiple of its duration.
const DUMP_PAUSE_FACTOR: u32 = 5;
/// Delay from the start, or from work on more than [`BULK_THRESHOLD`] entries, to the release of unused heap memory. By then the
/// store has dropped its copy.
const HEAP_TRIM_DELAY: Duration = Duration::from_secs(1);
/// Reason of a dump that only the resync timer caused.
const PERIODIC_RESYNC: &str = "periodic resync";
/// Pause after a timer wakeup that found nothing to do, so that a wrong deadline cannot cause a busy loop.
const IDLE_WAKE_PAUSE: Duration = Duration::from_millis(100);
/// Maximum number of drifted entries that one round logs individually; the rest is counted.
const MAX_LOG_LINES: usize = 20;

/// Fixed settings of the reconciler.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The network namespace.
    pub namespace: NamespaceName,
    /// Whether routes use next-hop objects.
    pub nexthop_objects: bool,
    /// Interval of full comparisons with the kernel.
    pub resync: Duration,
    /// The address that the external interface has to reach, if one is configured.
    pub probe_address: Option<IpAddr>,
}

/// State of a network namespace that survives restarts; `app` stores it in the state directory.
pub trait SysctlStore: Send {
    /// Saves a sysctl's value from before the agent's first change, so that `overlayd cleanup` can restore it.
    fn save_sysctl(&mut self, path: &str, value: &str);
    /// The value saved by [`SysctlStore::save_sysctl`]; `None` if the agent did not change the sysctl.
    fn saved_sysctl(&self, path: &str) -> Option<String>;
}

/// Queries to the reconciler.
#[derive(Debug)]
pub enum ReconcilerQuery {
    /// The state of the data path.
    Status(oneshot::Sender<DataPathReport>),
    /// The state of the entries of each of these peers.
    Peers(Arc<[Vec<Key>]>, oneshot::Sender<Vec<PeerState>>),
}

/// The reconciler's ends of its channels, which outlive a run of it; all are bounded.
#[derive(Debug)]
pub struct Channels {
    /// From the networks.
    pub networks: mpsc::Receiver<ReconcilerInput>,
    /// Events of the kernel.
    pub kernel: mpsc::Receiver<KernelEvent>,
    /// Queries of the admin socket.
    pub queries: mpsc::Receiver<ReconcilerQuery>,
    /// To the networks: the host; `None` before the first read.
    pub host: watch::Sender<Option<Arc<HostView>>>,
    /// To the networks: what is applied.
    pub progress: watch::Sender<Progress>,
    /// Incremented whenever the answer to a query may have changed.
    pub changes: watch::Sender<u64>,
    /// Incremented whenever another process removed the host end of an endpoint's veth pair. Only [`crate::endpoint`] can
    /// recreate it.
    pub ports_lost: watch::Sender<u64>,
    /// Incremented by each iteration of the loop. An idle loop does not iterate, so a liveness probe has to send a query.
    pub heartbeat: watch::Sender<u64>,
    /// Number of the last run.
    pub run: u64,
}

/// Owner of desired state and actual state of a network namespace.
pub struct Reconciler<D, S> {
    settings: Settings,
    data_path: D,
    sysctl_store: S,
    metrics: Arc<Metrics>,
    /// Number of this run, from 1.
    run: u64,

    /// What the networks contributed besides their entries.
    contributors: BTreeMap<NetworkName, Contributor>,
    /// Whether a network has contributed since the start. Without one there is no desired state: the data path of an earlier run
    /// stays untouched and keeps forwarding.
    has_desired_state: bool,
    /// Networks that contributed to an earlier run and not yet to this one. What nobody desires may be theirs, so it is not deleted,
    /// and the entries that networks share stay as they are.
    absent: BTreeSet<NetworkName>,
    desired: DesiredState,
    /// The peers' part of actual state; the data path has the local part.
    peers: State,
    nexthop_ids: NexthopIds,

    /// The host, as last read; `None` before the first read.
    host: Option<Arc<HostView>>,
    /// The last request of each network for a new read.
    refreshes: BTreeMap<NetworkName, u64>,
    dirty: Dirty,
    schedule: Schedule,
    retries: RetryQueue,
    drift: DriftLog,
    /// Reads the clock.
    now: fn() -> Instant,
    /// Returns the seconds since the epoch, for the status.
    unix_time: fn() -> u64,
    dump_error: Option<String>,
    /// Whether the answer to a query may have changed.
    changed: bool,
    port_lost: bool,
}

/// A network that has contributed.
#[derive(Debug, Default)]
struct Contributor {
    /// Its last contribution.
    sequence: u64,
    /// Its input to the shared entries.
    shared: Option<SharedSpec>,
}

/// What has to be compared again.
#[derive(Debug, Default)]
struct Dirty {
    keys: BTreeSet<Key>,
    /// All entries.
    all: bool,
    /// The shared entries have to be planned again.
    shared: bool,
}

/// Work that is due at a time.
#[derive(Debug)]
struct Schedule {
    /// Why a dump is due; `None` if none is.
    dump_reason: Option<&'static str>,
    dump_not_before: Instant,
    resync: Instant,
    host_read: Option<Instant>,
    host_read_not_before: Instant,
    heap_trim: Option<Instant>,
}

impl<D: DataPath, S: SysctlStore> Reconciler<D, S> {
    /// A reconciler without any state yet.
    pub fn new(settings: Settings, data_path: D, sysctl_store: S, metrics: Arc<Metrics>) -> Self {
        let now = Instant::now();
        Reconciler {
            schedule: Schedule {
                dump_reason: Some("start"),
                dump_not_before: now,
                resync: now + settings.resync,
                host_read: Some(now),
                host_read_not_before: now,
                heap_trim: Some(now + HEAP_TRIM_DELAY),
            },
            settings,
            data_path,
            sysctl_store,
            metrics,
            run: 0,
            contributors: BTreeMap::new(),
            has_desired_state: false,
            absent: BTreeSet::new(),
            desired: DesiredState::default(),
            peers: State::new(),
            nexthop_ids: NexthopIds::default(),
            host: None,
            refreshes: BTreeMap::new(),
            dirty: Dirty::default(),
            retries: RetryQueue::new(random_fraction),
            drift: DriftLog::default(),
            now: Instant::now,
            unix_time,
            dump_error: None,
            changed: true,
            port_lost: false,
        }
    }

    /// The same with another clock.
    pub fn with_clock(self, now: fn() -> Instant) -> Self {
        Reconciler { now, ..self }
    }

    /// Runs until `shutdown`, which leaves the data path unchanged. `delay` is the pause before a restart.
    pub async fn run(mut self, channels: &mut Channels, delay: Duration, shutdown: CancellationToken) {
        channels.run += 1;
        self.run = channels.run;
        self.absent = channels.progress.borrow().networks.keys().cloned().collect();
        if !delay.is_zero() && shutdown.run_until_cancelled(self.wait(channels, delay)).await.is_none() {
            return;
        }
        let mut queries = Vec::new();
        let mut woken_by_timer = false;
        let mut timer_not_before = (self.now)();
        loop {
            // Queries first: an answer includes every event sent before its query.
            while let Ok(query) = channels.queries.try_recv() {
                queries.push(query);
            }
            // Everything queued is folded into one round, so that answers include it. The channels' sizes bound it.
            while let Ok(event) = channels.kernel.try_recv() {
                self.fold_kernel(event);
            }
            while let Ok(input) = channels.networks.try_recv() {
                self.fold_network(input);
            }
            channels.heartbeat.send_modify(|count| *count += 1);
            let progress = self.converge(channels).await;
            if std::mem::take(&mut woken_by_timer) && !progress {
                self.metrics.count_idle_wakeup();
                timer_not_before = (self.now)() + IDLE_WAKE_PAUSE;
            }
            queries.drain(..).for_each(|query| self.answer_query(query));
            let timer = tokio::time::sleep_until(self.next_deadline().max(timer_not_before));
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(event) = channels.kernel.recv() => self.fold_kernel(event),
                Some(input) = channels.networks.recv() => self.fold_network(input),
                Some(query) = channels.queries.recv() => queries.push(query),
                () = timer => woken_by_timer = true,
            }
        }
    }

    /// Answers queries and takes messages for the time of `delay`, without any other work.
    async fn wait(&mut self, channels: &mut Channels, delay: Duration) {
        self.publish(channels, (self.now)());
        let mut delay = pin!(tokio::time::sleep(delay));
        loop {
            tokio::select! {
                () = &mut delay => return,
                Some(input) = channels.networks.recv() => self.fold_network(input),
                Some(query) = channels.queries.recv() => self.answer_query(query),
            }
            channels.heartbeat.send_modify(|count| *count += 1);
        }
    }

    /// The next time at which work is due without an event.
    fn next_deadline(&self) -> Instant {
        let next_dump = self.schedule.dump_reason.map(|_| self.schedule.dump_not_before);
        [next_dump, self.schedule.host_read, self.schedule.heap_trim, self.retries.next_due()]
            .into_iter()
            .flatten()
            .fold(self.schedule.resync, Instant::min)
    }

    /// Brings actual state as close to desired state as is possible now. Returns whether there was any work.
    async fn converge(&mut self, channels: &mut Channels) -> bool {
        let now = (self.now)();
        let mut progress = false;
        self.metrics.count_loop_iteration();
        if now >= self.schedule.resync {
            self.schedule.dump_reason.get_or_insert(PERIODIC_RESYNC);
            self.schedule.resync = now + self.settings.resync;
        }
        let mut before_dump = None;
        if self.schedule.dump_reason.is_some() && now >= self.schedule.dump_not_before {
            progress = true;
            if self.schedule.dump_reason == Some(PERIODIC_RESYNC) {
                // Changes of `accept_ra` and of resolvers cause no event.
                self.schedule.host_read.get_or_insert(now);
            }
            before_dump = self.dump(&mut channels.kernel).await;
        }
        if self.schedule.host_read.is_some_and(|due| now >= due) && self.dump_error.is_none() {
            progress = true;
            self.read_host(channels).await;
        }
        if self.schedule.heap_trim.is_some_and(|due| now >= due) {
            progress = true;
            self.schedule.heap_trim = None;
            allocator::trim_memory();
        }
        let begun = Instant::now();
        if std::mem::take(&mut self.dirty.shared) {
            self.plan_shared();
        }
        self.read_sysctls().await;
        self.prune_satisfied();
        self.dirty.keys.extend(self.retries.due_keys(now));
        let batch = self.plan();
        if !batch.is_empty() {
            tracing::debug!(ops = batch.len(), ms = begun.elapsed().as_secs_f64() * 1e3, "planned");
        }
        if let Some(before) = before_dump {
            self.record_dump_drift(&before, &batch, now);
        }
        progress |= self.apply_due(batch, now).await;
        // A retried entry was set, so the entries that depend on it, which the previous plan left out, can be planned now. The
        // loop ends, because each iteration needs another pending entry that was set.
        while self.has_desired_state && (self.dirty.all || !self.dirty.keys.is_empty()) {
            let batch = self.plan();
            progress |= self.apply_due(batch, now).await;
        }
        self.retries.reschedule_due(now);
        self.publish(channels, now);
        progress
    }

    /// Replaces actual state by a dump of the kernel. Returns the previous actual state if a desired state exists to compare it
    /// with.
    async fn dump(&mut self, events: &mut mpsc::Receiver<KernelEvent>) -> Option<(LocalState, State)> {
        let reason = self.schedule.dump_reason.take().unwrap_or_default();
        let begun = Instant::now();
        self.metrics.count_full_read(FullRead::State);
        match self.data_path.dump().await {
            Ok(Dump { peers, local_before }) => {
                let took = begun.elapsed();
                tracing::debug!(reason, peer_entries = peers.len(), ms = took.as_secs_f64() * 1e3, "kernel state read");
                self.schedule.dump_not_before = (self.now)() + MIN_DUMP_PAUSE.max(took * DUMP_PAUSE_FACTOR);
                self.dump_error = None;
                let peers_before = std::mem::replace(&mut self.peers, peers);
                self.nexthop_ids.adopt(&self.peers);
                // Local changes that are older than the dump: the comparison below would repair them uncounted.
                while let Ok(event) = events.try_recv() {
                    self.fold_kernel(event);
                }
                self.dirty.all = true;
                if self.peers.len() > BULK_THRESHOLD {
                    self.schedule.heap_trim = Some((self.now)() + HEAP_TRIM_DELAY);
                }
                let local = self.data_path.local();
                let is_lost =
                    |(key, link): (&Key, &crate::plan::LinkState)| link.kind == LinkKind::Port && local.get(key).is_none();
                self.port_lost |= self.desired.links().any(is_lost);
                self.has_desired_state.then_some((local_before, peers_before))
            }
            Err(error) => {
                tracing::error!(reason, %error, "cannot dump kernel state, retrying in 1 s");
                self.dump_error = Some(error.to_string());
                self.schedule.dump_reason = Some("retry after an error");
                self.schedule.dump_not_before = (self.now)() + Duration::from_secs(1);
                None
            }
        }
    }

    /// Plans the ops for the dirty entries.
    fn plan(&mut self) -> Batch {
        let dirty = std::mem::take(&mut self.dirty.keys);
        if !self.has_desired_state {
            return Batch::new();
        }
        let local = self.data_path.local();
        let actual = ActualState { local: &local, peers: &self.peers };
        if std::mem::take(&mut self.dirty.all) {
            let mut batch = diff(&self.desired, &actual);
            if !self.absent.is_empty() {
                batch.retain(|op| self.desired.contains_key(op.key()));
            }
            batch
        } else {
            diff_keys(&self.desired, &actual, dirty.iter())
        }
    }

    /// Publishes metrics and changed values on the channels.
    fn publish(&mut self, channels: &Channels, now: Instant) {
        self.metrics.set_data_path(&self.settings.namespace, self.retries.len(), self.drift.contended(now).count());
        let progress = self.progress();
        channels.progress.send_if_modified(|current| {
            let changed = *current != progress;
            *current = progress;
            changed
        });
        if std::mem::take(&mut self.port_lost) {
            channels.ports_lost.send_modify(|count| *count += 1);
        }
        if std::mem::take(&mut self.changed) {
            channels.changes.send_modify(|count| *count += 1);
        }
    }

    /// What is applied of each network. A failed entry counts for every network except those that another one contributed.
    fn progress(&self) -> Progress {
        let networks = self.contributors.iter().map(|(name, contributor)| {
            let of_another =
                |key: &Key| self.desired.networks.iter().any(|(other, entries)| other != name && entries.contains_key(key));
            let failed: Vec<&Key> = self.retries.keys().filter(|key| !of_another(key)).collect();
            let base_failed = failed.iter().any(|key| match key {
                // Missing container ports do not count: the endpoints recreate them once the overlay is in place.
                Key::Link(name) => Device::from_name(name).is_some(),
                key => matches!(key, Key::Address(..) | Key::Sysctl(_) | Key::Ruleset(Table::Inet)),
            });
            (name.clone(), NetworkProgress { sequence: contributor.sequence, failed: failed.len(), base_failed })
        });
        let absent = self.absent.iter().map(|name| (name.clone(), NetworkProgress::default()));
        Progress { networks: networks.chain(absent).collect(), dump_failed: self.dump_error.is_some() }
    }
}

/// Seconds since the epoch.
fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// A random fraction, for jitter.
fn random_fraction() -> f64 {
    use rand::RngExt;
    rand::rng().random_range(0.0..1.0)
}
