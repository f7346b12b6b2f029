//! Event loop that owns the agent's state: it folds events, plans changes and applies them.
//!
//! One task, [`Reconciler::run`], owns the lease table, desired state and actual state, so nothing is locked. Events come from
//! the store, the kernel and the endpoints. Each round takes one event and folds all further queued events. It then converges: it
//! dumps the kernel if actual state is in doubt, rebuilds dirty entries, diffs, applies and folds the results. The batch is
//! applied within the round, before the next event is folded. So a foreign change after our write is also folded after our write,
//! and actual state ends up as the kernel's state.
//!
//! Cancel safety: every await of the `select!` is a channel's `recv`, `changed` or a timer; no event is lost when another arm
//! wins.

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

/// Delay from a change of foreign links or addresses to the next selection of the external interface.
const UNDERLAY_DEBOUNCE: Duration = Duration::from_millis(100);
/// Pause after a read of all interfaces, as a multiple of its duration. A storm of foreign links then costs 1/20 of a processor.
const UNDERLAY_PAUSE_FACTOR: u32 = 20;
/// Minimum pause between two dumps, so that a storm of changes does not cause a loop of dumps.
const MIN_DUMP_PAUSE: Duration = Duration::from_millis(20);
/// Pause after a dump, as a multiple of its duration.
const DUMP_PAUSE_FACTOR: u32 = 5;
/// Number of entries above which they are handled in bulk instead of one by one: the entries of 256 peers.
const BULK_THRESHOLD: usize = 1024;
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
    /// Name and id of this host.
    pub node: Node,
    /// Selection rules for the external interface.
    pub selection: UnderlaySelector,
    /// Whether packets that leave the overlay are masqueraded with the host's address.
    pub masquerade: bool,
    /// Transmit checksum offload on the VXLAN devices.
    pub tx_checksum: bool,
    /// Whether Docker attaches containers to the bridge.
    pub docker: bool,
    /// Whether routes use next-hop objects.
    pub nexthop_objects: bool,
    /// Interval of full comparisons with the kernel.
    pub resync: Duration,
    /// Minimum time for which the own lease stays valid while the store does not answer.
    pub lease_ttl: Duration,
    /// The store's endpoints and prefix, for the status.
    pub store_endpoints: Vec<String>,
    /// The key prefix, for the status.
    pub store_prefix: String,
}

/// State that survives restarts; `app` stores it in the state directory.
pub trait StateStore: Send {
    /// The MAC of a device of ours: the stored one, else the one found on the device, else a new one. It is stored from then on.
    fn device_mac(&mut self, device: Device, found: Option<Mac>) -> Mac;
    /// The last subnet of this host.
    fn preferred_subnet(&self) -> Option<Subnet>;
    /// The last underlay addresses that this host published.
    fn published_addresses(&self) -> PerFamily<IpAddr>;
    /// Saves a sysctl's value from before the agent's first change, so that `overlayd cleanup` can restore it.
    fn save_sysctl(&mut self, path: &str, value: &str);
    /// The value saved by [`StateStore::save_sysctl`]; `None` if the agent did not change the sysctl.
    fn saved_sysctl(&self, path: &str) -> Option<String>;
}

/// The overlay on this host, as the endpoints and `subnet.env` use it.
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

/// A row of `overlayctl subnets`, with the id of its etcd lease, for which the caller queries the remaining time.
pub type SubnetRow = (api::SubnetEntry, Option<i64>);

/// Queries to the reconciler.
#[derive(Debug)]
pub enum ReconcilerQuery {
    /// The agent's status without the number of endpoints.
    Status(oneshot::Sender<api::Status>),
    /// Every lease.
    Subnets(oneshot::Sender<Vec<SubnetRow>>),
    /// Every peer in the data path.
    Peers(oneshot::Sender<api::Peers>),
}

impl ReconcilerQuery {
    /// Sends a query to the reconciler; `None` if it has ended.
    pub async fn ask<T>(
        queries: &mpsc::Sender<ReconcilerQuery>,
        make_query: impl FnOnce(oneshot::Sender<T>) -> ReconcilerQuery,
    ) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        queries.send(make_query(reply)).await.ok()?;
        answer.await.ok()
    }
}

/// The reconciler's ends of its channels; all are bounded.
#[derive(Debug)]
pub struct Channels {
    /// Events of the store.
    pub store: mpsc::Receiver<StoreEvent>,
    /// Events of the kernel.
    pub kernel: mpsc::Receiver<KernelEvent>,
    /// Queries of the admin socket.
    pub queries: mpsc::Receiver<ReconcilerQuery>,
    /// The endpoints that have a port on the bridge.
    pub endpoints: watch::Receiver<Vec<Arc<Endpoint>>>,
    /// The endpoints whose entries were applied, or failed once and are being retried.
    pub applied_endpoints: watch::Sender<Vec<Arc<Endpoint>>>,
    /// To the store: the lease that this host requests.
    pub lease_request: watch::Sender<Option<LeaseRequest>>,
    /// To the endpoints and `subnet.env`: the overlay, once it is in place.
    pub overlay: watch::Sender<Option<Overlay>>,
    /// Incremented whenever the answer to a [`ReconcilerQuery`] may have changed.
    pub changes: watch::Sender<u64>,
    /// Whether the agent is ready.
    pub ready: watch::Sender<bool>,
    /// Incremented whenever another process removed the host end of an endpoint's veth pair. Only `endpoint` can
    /// recreate it.
    pub ports_lost: watch::Sender<u64>,
    /// Incremented by each iteration of the loop. An idle loop does not iterate, so a liveness probe has to send a query.
    pub heartbeat: watch::Sender<u64>,
}

/// Owner of the lease table, of desired state and of actual state.
pub struct Reconciler<D, M> {
    settings: Settings,
    data_path: D,
    state_store: M,
    metrics: Arc<Metrics>,
    started: Instant,

    // State of the store.
    connection: Connection,
    network: Option<NetworkConfig>,
    config_missing: bool,
    config_errors: Option<ConfigErrors>,
    has_snapshot: bool,
    leases: LeaseTable,
    own_lease: OwnLease,
    /// Addresses of the store's servers.
    servers: BTreeSet<std::net::IpAddr>,
    /// Time at which the own lease expires unless the store answers again; `None` while it answers.
    lease_expires_at: Option<Instant>,
    /// `lease_expires_at` has passed: another host may have the subnet by now.
    lease_expired: bool,

    // State of the host.
    inventory: HostInventory,
    underlay: Option<Underlay>,
    /// Why the underlay's addresses were chosen.
    underlay_reasons: PerFamily<SelectionReason>,
    underlay_errors: Vec<String>,
    /// IPv6 was disabled when the external interface was chosen.
    ipv4_only: bool,
    endpoints: Vec<Arc<Endpoint>>,
    /// Whether `applied_endpoints` has to be sent.
    endpoints_changed: bool,

    // Derived state.
    host: Option<HostSpec>,
    local_host: Option<LocalHost>,
    peers: BTreeMap<LeaseKey, Peer>,
    rejected: BTreeMap<LeaseKey, RejectedLease>,
    nexthop_ids: NexthopIds,
    desired: State,
    actual: State,

    // Pending work.
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
    /// A reconciler without any state yet.
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

    /// Runs until `shutdown`, which leaves the data path unchanged.
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
            // Queued events are folded into the same round. The channels' sizes bound their number.
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

    /// The next time at which work is due without an event.
    fn next_deadline(&self) -> Instant {
        let next_dump = self.resync_reason.map(|_| self.dump_not_before);
        [next_dump, self.underlay_due, self.heap_trim_due, self.lease_expires_at, self.retries.next_due()]
            .into_iter()
            .flatten()
            .fold(self.resync_due, Instant::min)
    }

    /// Brings actual state as close to desired state as is possible now. Returns whether there was any work.
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
                // Changes of `accept_ra` and of resolvers cause no event.
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
        // A retried entry was set, so the entries that depend on it, which the previous plan left out, can be planned now. The
        // loop ends, because each iteration needs another pending entry that was set.
        while self.host.is_some() && (self.all_dirty || !self.dirty_keys.is_empty()) {
            let batch = self.plan();
            progress |= self.apply_due(batch, now).await;
        }
        self.retries.reschedule_due(now);
        self.broadcast(channels);
        progress
    }

    /// Replaces actual state by a dump of the kernel. Returns the previous actual state if a desired state exists to compare it
    /// with.
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
                tracing::error!(reason, %error, "cannot dump kernel state, retrying in 1 s");
                self.dump_error = Some(error.to_string());
                self.resync_reason = Some("retry after an error");
                self.dump_not_before = Instant::now() + Duration::from_secs(1);
                None
            }
        }
    }

    /// Plans the ops for the dirty entries.
    fn plan(&mut self) -> Batch {
        let dirty = std::mem::take(&mut self.dirty_keys);
        // Without a lease there is no desired state. The data path of an earlier run stays untouched and keeps forwarding.
        if self.host.is_none() {
            return Batch::new();
        }
        if std::mem::take(&mut self.all_dirty) {
            diff(&self.desired, &self.actual)
        } else {
            diff_keys(&self.desired, &self.actual, dirty.iter())
        }
    }

    /// Publishes metrics and changed values on the channels.
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
                // Missing container ports do not count: the endpoints recreate them once they receive this overlay.
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
