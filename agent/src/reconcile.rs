//! The one owner of state: an event loop that folds what the store, the kernel and the endpoints report, plans, and applies.
//!
//! One task, [`Reconciler::run`]. It owns the roster of leases, desired and actual state; nobody else has them, so nothing is locked. Each round
//! takes one event, folds whatever else is waiting, then converges: dump where actual state is in doubt, rebuild what is dirty, diff, apply, fold
//! the outcomes. The batch is applied inside the round, before the next event is folded: an event that others caused after our write is folded after
//! our write, so the last word is always the kernel's.
//!
//! Cancel safety: every await of the `select!` is a channel's `recv`, `changed` or a timer; nothing is lost when another arm wins.

mod apply;
mod inputs;
mod rate_limit;
mod ready;
mod report;
mod retry;
#[cfg(test)]
mod tests;
mod underlay;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::allocator;
use crate::metrics::{FullRead, Metrics};
use crate::model::api;
use crate::model::event::{Connection, LeaseRequest, OwnLease, StoreEvent};
use crate::model::network::ConfigErrors;
use crate::model::{Device, Endpoint, Mac, NetworkConfig, Node, Peer, PerFamily, RejectedLease, Subnet};
use crate::plan::desired::{HostSpec, NexthopIds};
use crate::plan::diff::{diff, diff_keys};
use crate::plan::lease_table::{LeaseKey, LeaseTable, LocalHost};
use crate::plan::ruleset::Table;
use crate::plan::underlay::{HostInventory, SelectionReason, Underlay, UnderlaySelector};
use crate::plan::{Batch, DataPath, KernelEvent, Key, State};

use rate_limit::LogRateLimit;
use retry::RetryQueue;

/// How long changes of foreign links and addresses settle before the external interface is looked at again.
const UNDERLAY_DEBOUNCE: Duration = Duration::from_millis(100);
/// How many times its own duration the look at all interfaces rests: a storm of foreign links costs a twentieth of a processor.
const UNDERLAY_PAUSE_FACTOR: u32 = 20;
/// The least time between two dumps, and how many times its own duration a dump rests, so that a storm of changes is no loop of dumps.
const MIN_DUMP_PAUSE: Duration = Duration::from_millis(20);
const DUMP_PAUSE_FACTOR: u32 = 5;
/// Entries that are handled as a whole rather than one by one: those of 256 peers.
const BULK_THRESHOLD: usize = 1024;
/// How long after the start, and after work on that many entries, the memory is given back that it took: the store has dropped its part by then.
const HEAP_TRIM_DELAY: Duration = Duration::from_secs(1);
/// Why a full comparison is made that nothing else asked for.
const PERIODIC_RESYNC: &str = "periodic resync";
/// Pause after a turn that the timer began and that found nothing to do: a wrong deadline then costs no processor.
const IDLE_WAKE_PAUSE: Duration = Duration::from_millis(100);
/// How many refusals and repairs of one round are logged one by one before the rest is counted.
const MAX_LOG_LINES: usize = 20;

/// What the reconciler knows from the start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Who this host is.
    pub node: Node,
    /// How the external interface is chosen.
    pub selection: UnderlaySelector,
    /// Whether what leaves the overlay gets the host's address.
    pub masquerade: bool,
    /// Transmit checksum offload on the VXLAN devices.
    pub tx_checksum: bool,
    /// Whether Docker puts containers on the bridge.
    pub docker: bool,
    /// Whether routes use next-hop objects.
    pub nexthop_objects: bool,
    /// Time between two full comparisons with the kernel.
    pub resync: Duration,
    /// How long the own lease lasts at least while the store does not answer.
    pub lease_ttl: Duration,
    /// The store's endpoints and prefix, for the status.
    pub store_endpoints: Vec<String>,
    /// The key prefix, for the status.
    pub store_prefix: String,
}

/// What is kept over restarts; `app` keeps it in the state directory.
pub trait StateStore: Send {
    /// The MAC of a device of ours: the one kept, else the one found on the device, else a new one; kept from then on.
    fn device_mac(&mut self, device: Device, found: Option<Mac>) -> Mac;
    /// The subnet that this host held last.
    fn preferred_subnet(&self) -> Option<Subnet>;
    /// The underlay addresses that this host published last.
    fn published_addresses(&self) -> PerFamily<IpAddr>;
    /// The value of a sysctl before the agent first changed it, so that `overlayd_command run_cleanup` can put it back.
    fn save_sysctl(&mut self, path: &str, value: &str);
    /// That value; `None` where the agent did not change the sysctl.
    fn saved_sysctl(&self, path: &str) -> Option<String>;
}

/// The overlay as this host has it, for all who build on it (endpoints, `local_subnet.env`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// The network.
    pub network: NetworkConfig,
    /// This host's subnet.
    pub subnet: Subnet,
    /// The bridge.
    pub bridge: Device,
    /// MTU in bytes.
    pub mtu: u32,
    /// This host's underlay addresses.
    pub public_ip: PerFamily<IpAddr>,
}

/// A lease for the table, with its etcd lease so that the time left can be asked for.
pub type SubnetRow = (api::SubnetEntry, Option<i64>);

/// Questions to the reconciler.
#[derive(Debug)]
pub enum ReconcilerQuery {
    /// The agent's status, the endpoints' number aside.
    Status(oneshot::Sender<api::Status>),
    /// Every lease.
    Subnets(oneshot::Sender<Vec<SubnetRow>>),
    /// Every peer in the data path.
    Peers(oneshot::Sender<api::Peers>),
}

impl ReconcilerQuery {
    /// Asks the reconciler; `None` where it has ended.
    pub async fn ask<T>(
        queries: &mpsc::Sender<ReconcilerQuery>,
        make_query: impl FnOnce(oneshot::Sender<T>) -> ReconcilerQuery,
    ) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        queries.send(make_query(reply)).await.ok()?;
        answer.await.ok()
    }
}

/// The ends of the channels that the reconciler holds; all are bounded.
#[derive(Debug)]
pub struct Channels {
    /// From the store.
    pub store: mpsc::Receiver<StoreEvent>,
    /// From the kernel.
    pub kernel: mpsc::Receiver<KernelEvent>,
    /// From the admin socket.
    pub queries: mpsc::Receiver<ReconcilerQuery>,
    /// The endpoints that are plugged into the bridge.
    pub endpoints: watch::Receiver<Vec<Arc<Endpoint>>>,
    /// Those for which all has been done, or tried and will be tried again.
    pub applied_endpoints: watch::Sender<Vec<Arc<Endpoint>>>,
    /// To the store: what this host wants to hold.
    pub lease_request: watch::Sender<Option<LeaseRequest>>,
    /// To the endpoints and `local_subnet.env`: the overlay once it is in place.
    pub overlay: watch::Sender<Option<Overlay>>,
    /// Counts up whenever an answer to a [`Query`] may have changed.
    pub changes: watch::Sender<u64>,
    /// Whether the agent is ready.
    pub ready: watch::Sender<bool>,
    /// Counts up whenever others removed the host's end of an endpoint's veth pair: only the endpoints can make it again.
    pub ports_lost: watch::Sender<u64>,
    /// Counts up with each turn of the loop. With nothing to do it does not turn: who wants to know whether it can asks it something.
    pub heartbeat: watch::Sender<u64>,
}

/// The owner of state.
pub struct Reconciler<D, M> {
    settings: Settings,
    data_path: D,
    state_store: M,
    metrics: Arc<Metrics>,
    started: Instant,

    // What the store says.
    connection: Connection,
    network: Option<NetworkConfig>,
    config_missing: bool,
    config_errors: Option<ConfigErrors>,
    has_snapshot: bool,
    leases: LeaseTable,
    own_lease: OwnLease,
    /// The addresses of its servers.
    servers: BTreeSet<std::net::IpAddr>,
    /// When the own lease ends unless the store answers again; absent while it answers.
    lease_expires_at: Option<Instant>,
    /// That moment has passed: others may have the subnet by now.
    lease_expired: bool,

    // What the host is like.
    inventory: HostInventory,
    underlay: Option<Underlay>,
    /// Why its addresses were chosen.
    underlay_reasons: PerFamily<SelectionReason>,
    underlay_errors: Vec<String>,
    /// IPv6 was switched off when the external interface was chosen.
    ipv4_only: bool,
    endpoints: Vec<Arc<Endpoint>>,
    /// Whether those who wait for them have to be told.
    endpoints_changed: bool,

    // What follows.
    host: Option<HostSpec>,
    local_host: Option<LocalHost>,
    peers: BTreeMap<LeaseKey, Peer>,
    rejected: BTreeMap<LeaseKey, RejectedLease>,
    nexthop_ids: NexthopIds,
    desired: State,
    actual: State,

    // What is to be done.
    host_dirty: bool,
    dirty_leases: BTreeSet<LeaseKey>,
    all_leases_dirty: bool,
    dirty_keys: BTreeSet<Key>,
    changed_links: BTreeSet<Box<str>>,
    all_dirty: bool,
    resync_reason: Option<&'static str>,
    dump_error: Option<String>,
    dump_not_before: Instant,
    underlay_due: Option<Instant>,
    underlay_not_before: Instant,
    resync_due: Instant,
    heap_trim_due: Option<Instant>,
    rejection_log: LogRateLimit,
    retries: RetryQueue,
    changed: bool,
    port_lost: bool,
}

impl<D: DataPath, M: StateStore> Reconciler<D, M> {
    /// A reconciler that knows nothing yet.
    pub fn new(settings: Settings, data_path: D, state_store: M, metrics: Arc<Metrics>) -> Self {
        let now = Instant::now();
        Reconciler {
            resync_due: now + settings.resync,
            settings,
            data_path,
            state_store,
            metrics,
            started: now,
            connection: Connection::Down { error: "not connected yet".to_owned() },
            network: None,
            config_missing: false,
            config_errors: None,
            has_snapshot: false,
            leases: LeaseTable::default(),
            own_lease: OwnLease::NotHeld { reason: "not asked for yet".to_owned() },
            servers: BTreeSet::new(),
            lease_expires_at: None,
            lease_expired: false,
            inventory: HostInventory::default(),
            underlay: None,
            underlay_reasons: PerFamily::default(),
            underlay_errors: Vec::new(),
            ipv4_only: false,
            endpoints: Vec::new(),
            endpoints_changed: true,
            host: None,
            local_host: None,
            peers: BTreeMap::new(),
            rejected: BTreeMap::new(),
            nexthop_ids: NexthopIds::default(),
            desired: State::new(),
            actual: State::new(),
            host_dirty: false,
            dirty_leases: BTreeSet::new(),
            all_leases_dirty: false,
            dirty_keys: BTreeSet::new(),
            changed_links: BTreeSet::new(),
            all_dirty: false,
            resync_reason: Some("start"),
            dump_error: None,
            dump_not_before: now,
            underlay_due: Some(now),
            underlay_not_before: now,
            heap_trim_due: Some(now + HEAP_TRIM_DELAY),
            rejection_log: LogRateLimit::default(),
            retries: RetryQueue::default(),
            changed: true,
            port_lost: false,
        }
    }

    /// Runs until `shutdown`. The data path is left as it is then.
    pub async fn run(mut self, mut channels: Channels, shutdown: CancellationToken) {
        self.endpoints = channels.endpoints.borrow_and_update().clone();
        self.converge(&channels).await;
        let mut timer_not_before = self.started;
        loop {
            channels.heartbeat.send_modify(|count| *count += 1);
            let timer = tokio::time::sleep_until(self.next_deadline().max(timer_not_before).into());
            let mut woken_by_timer = false;
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(event) = channels.store.recv() => self.fold_store(event),
                Some(event) = channels.kernel.recv() => self.fold_kernel(event),
                Some(query) = channels.queries.recv() => {
                    self.answer_query(query);
                    continue;
                }
                Ok(()) = channels.endpoints.changed() => {
                    self.endpoints = channels.endpoints.borrow_and_update().clone();
                    self.endpoints_changed = true;
                    self.host_dirty = true;
                }
                () = timer => woken_by_timer = true,
            }
            // What waits already is folded into the same round. Bounded by the channels' sizes.
            while let Ok(event) = channels.kernel.try_recv() {
                self.fold_kernel(event);
            }
            while let Ok(event) = channels.store.try_recv() {
                self.fold_store(event);
            }
            let progress = self.converge(&channels).await;
            if woken_by_timer && !progress {
                self.metrics.count_idle_wakeup();
                timer_not_before = Instant::now() + IDLE_WAKE_PAUSE;
            }
        }
    }

    /// The next moment at which something is due without an event.
    fn next_deadline(&self) -> Instant {
        let next_dump = self.resync_reason.map(|_| self.dump_not_before);
        [next_dump, self.underlay_due, self.heap_trim_due, self.lease_expires_at, self.retries.next_due()]
            .into_iter()
            .flatten()
            .fold(self.resync_due, Instant::min)
    }

    /// Brings actual state as near to desired state as it can be brought now. Returns whether there was anything to do.
    async fn converge(&mut self, channels: &Channels) -> bool {
        let now = Instant::now();
        let mut progress = false;
        self.metrics.count_loop_iteration();
        if now >= self.resync_due {
            self.resync_reason.get_or_insert(PERIODIC_RESYNC);
            self.resync_due = now + self.settings.resync;
        }
        self.reread_links().await;
        let mut before_dump = None;
        if self.resync_reason.is_some() && now >= self.dump_not_before {
            progress = true;
            if self.resync_reason == Some(PERIODIC_RESYNC) {
                // The kernel tells nobody what becomes of `accept_ra`, nor of resolvers.
                self.underlay_due.get_or_insert(now);
            }
            before_dump = self.dump().await;
        }
        if self.underlay_due.is_some_and(|due| now >= due) {
            progress = true;
            self.update_underlay().await;
        }
        progress |= self.lease_expires_at.is_some_and(|end| now >= end);
        self.check_lease_expiry(now);
        if self.heap_trim_due.is_some_and(|due| now >= due) {
            progress = true;
            self.heap_trim_due = None;
            allocator::trim_memory();
        }
        let begun = Instant::now();
        self.rebuild(channels);
        self.read_sysctls().await;
        self.prune_satisfied();
        self.dirty_keys.extend(self.retries.due_keys(now));
        let batch = self.plan();
        if !batch.is_empty() {
            tracing::debug!(ops = batch.len(), ms = begun.elapsed().as_secs_f64() * 1e3, "planned");
        }
        if let Some(before) = before_dump {
            self.record_dump_drift(&before, &batch);
        }
        progress |= self.apply_due(batch, now).await;
        // An entry was set at another attempt: what stands on it was left out of the plan before. Ends, because each turn of this loop needs an
        // entry that waited and was set.
        while self.host.is_some() && (self.all_dirty || !self.dirty_keys.is_empty()) {
            let batch = self.plan();
            progress |= self.apply_due(batch, now).await;
        }
        self.retries.reschedule_due(now);
        self.broadcast(channels);
        progress
    }

    /// Reads actual state anew. Returns the state as it was believed to be, once there has been a plan to compare with.
    async fn dump(&mut self) -> Option<State> {
        let reason = self.resync_reason.take().unwrap_or_default();
        let begun = Instant::now();
        self.metrics.count_full_read(FullRead::State);
        match self.data_path.dump().await {
            Ok(state) => {
                let took = begun.elapsed();
                tracing::debug!(reason, entries = state.len(), ms = took.as_secs_f64() * 1e3, "kernel state read");
                self.dump_not_before = Instant::now() + MIN_DUMP_PAUSE.max(took * DUMP_PAUSE_FACTOR);
                self.dump_error = None;
                let before = std::mem::replace(&mut self.actual, state);
                self.nexthop_ids.adopt(&self.actual);
                self.all_dirty = true;
                if self.actual.len() > BULK_THRESHOLD {
                    self.heap_trim_due = Some(Instant::now() + HEAP_TRIM_DELAY);
                }
                let missing = |port: String| !self.actual.contains_key(&Key::Link(port.into()));
                self.port_lost |= self.ports().into_iter().any(missing);
                self.host.is_some().then_some(before)
            }
            Err(error) => {
                tracing::error!(reason, %error, "kernel state cannot be read, trying again in a second");
                self.dump_error = Some(error.to_string());
                self.resync_reason = Some("retry after an error");
                self.dump_not_before = Instant::now() + Duration::from_secs(1);
                None
            }
        }
    }

    /// The ops that are due.
    fn plan(&mut self) -> Batch {
        let dirty = std::mem::take(&mut self.dirty_keys);
        // Until there is a lease nothing is known to be wrong: what an earlier run left forwards on, untouched.
        if self.host.is_none() {
            return Batch::new();
        }
        if std::mem::take(&mut self.all_dirty) {
            diff(&self.desired, &self.actual)
        } else {
            diff_keys(&self.desired, &self.actual, dirty.iter())
        }
    }

    /// Tells the others what is new.
    fn broadcast(&mut self, channels: &Channels) {
        self.metrics.set_peers(self.peers.len());
        self.metrics.set_leases(self.leases.len(), self.rejected.len());
        self.metrics.set_failed_entries(self.retries.len());
        self.metrics.set_contended_entries(self.retries.contended().count());
        self.metrics.set_config_errors(self.config_errors.as_ref().map_or(0, |errors| errors.0.len()));
        self.metrics.set_lease_held(self.holds_lease());
        let ready = self.is_ready();
        self.metrics.set_ready(ready);
        channels.ready.send_if_modified(|was| std::mem::replace(was, ready) != ready);
        if let Some(host) = &self.host
            && !self.retries.any(|key| match key {
                // A container's port that is gone is made again by whoever is told of the overlay here.
                Key::Link(name) => Device::from_name(name).is_some(),
                key => matches!(key, Key::Address(..) | Key::Sysctl(_) | Key::Ruleset(Table::Inet)),
            })
        {
            let overlay = Overlay {
                network: host.network.clone(),
                subnet: host.subnet,
                bridge: Device::bridge(host.network.vxlan.vni),
                mtu: host.mtu(),
                public_ip: host.underlay.public_ip,
            };
            channels.overlay.send_if_modified(|was| {
                let new = was.as_ref() != Some(&overlay);
                if new {
                    *was = Some(overlay);
                }
                new
            });
        }
        if std::mem::take(&mut self.endpoints_changed) {
            channels.applied_endpoints.send_replace(self.endpoints.clone());
        }
        if std::mem::take(&mut self.port_lost) {
            channels.ports_lost.send_modify(|count| *count += 1);
        }
        if std::mem::take(&mut self.changed) {
            channels.changes.send_modify(|count| *count += 1);
        }
    }
}
