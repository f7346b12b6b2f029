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
mod lines;
mod ready;
mod repair;
mod report;
#[cfg(test)]
mod tests;
mod underlay;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::heap;
use crate::metrics::{Metrics, Whole};
use crate::model::api;
use crate::model::event::{Connection, LeaseWish, OwnLease, StoreEvent};
use crate::model::network::ConfigErrors;
use crate::model::{Device, Endpoint, Mac, NetworkConfig, Node, Peer, PerFamily, Refusal, Subnet};
use crate::plan::desired::{Host, NexthopIds};
use crate::plan::diff::{diff, diff_keys};
use crate::plan::roster::{LeaseKey, OwnHost, Roster};
use crate::plan::ruleset::Table;
use crate::plan::underlay::{Inventory, Reason, Selection, Underlay};
use crate::plan::{Batch, DataPath, KernelEvent, Key, State};

use lines::Lines;
use repair::Repairs;

/// How long changes of foreign links and addresses settle before the external interface is looked at again.
const UNDERLAY_SETTLE: Duration = Duration::from_millis(100);
/// How many times its own duration the look at all interfaces rests: a storm of foreign links costs a twentieth of a processor.
const UNDERLAY_REST_FACTOR: u32 = 20;
/// The least time between two dumps, and how many times its own duration a dump rests, so that a storm of changes is no loop of dumps.
const DUMP_REST: Duration = Duration::from_millis(20);
const DUMP_REST_FACTOR: u32 = 5;
/// Entries that are handled as a whole rather than one by one: those of 256 peers.
const WHOLESALE: usize = 1024;
/// How long after the start, and after work on that many entries, the memory is given back that it took: the store has dropped its part by then.
const HEAP_REST: Duration = Duration::from_secs(1);
/// Why a full comparison is made that nothing else asked for.
const RESYNC: &str = "periodic resync";
/// Pause after a turn that the timer began and that found nothing to do: a wrong deadline then costs no processor.
const IDLE_TURN_PAUSE: Duration = Duration::from_millis(100);
/// How many refusals and repairs of one round are logged one by one before the rest is counted.
const LOG_LINES: usize = 20;

/// What the reconciler knows from the start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Who this host is.
    pub node: Node,
    /// How the external interface is chosen.
    pub selection: Selection,
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
    pub lease_lasts: Duration,
    /// The store's endpoints and prefix, for the status.
    pub store_endpoints: Vec<String>,
    /// The key prefix, for the status.
    pub store_prefix: String,
}

/// What is kept over restarts; `app` keeps it in the state directory.
pub trait Memory: Send {
    /// The MAC of a device of ours: the one kept, else the one found on the device, else a new one; kept from then on.
    fn mac(&mut self, device: Device, found: Option<Mac>) -> Mac;
    /// The subnet that this host held last.
    fn preferred(&self) -> Option<Subnet>;
    /// The underlay addresses that this host published last.
    fn published(&self) -> PerFamily<IpAddr>;
    /// The value of a sysctl before the agent first changed it, so that `overlayd cleanup` can put it back.
    fn sysctl_was(&mut self, path: &str, value: &str);
    /// That value; `None` where the agent did not change the sysctl.
    fn sysctl_before(&self, path: &str) -> Option<String>;
}

/// The overlay as this host has it, for all who build on it (endpoints, `subnet.env`).
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
pub enum Query {
    /// The agent's status, the endpoints' number aside.
    Status(oneshot::Sender<api::Status>),
    /// Every lease.
    Subnets(oneshot::Sender<Vec<SubnetRow>>),
    /// Every peer in the data path.
    Peers(oneshot::Sender<api::Peers>),
}

impl Query {
    /// Asks the reconciler; `None` where it has ended.
    pub async fn ask<T>(queries: &mpsc::Sender<Query>, question: impl FnOnce(oneshot::Sender<T>) -> Query) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        queries.send(question(reply)).await.ok()?;
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
    pub queries: mpsc::Receiver<Query>,
    /// The endpoints that are plugged into the bridge.
    pub endpoints: watch::Receiver<Vec<Arc<Endpoint>>>,
    /// Those for which all has been done, or tried and will be tried again.
    pub programmed: watch::Sender<Vec<Arc<Endpoint>>>,
    /// To the store: what this host wants to hold.
    pub wish: watch::Sender<Option<LeaseWish>>,
    /// To the endpoints and `subnet.env`: the overlay once it is in place.
    pub overlay: watch::Sender<Option<Overlay>>,
    /// Counts up whenever an answer to a [`Query`] may have changed.
    pub changes: watch::Sender<u64>,
    /// Whether the agent is ready.
    pub ready: watch::Sender<bool>,
    /// Counts up whenever others removed the host's end of an endpoint's veth pair: only the endpoints can make it again.
    pub ports_lost: watch::Sender<u64>,
    /// Counts up with each turn of the loop. With nothing to do it does not turn: who wants to know whether it can asks it something.
    pub beat: watch::Sender<u64>,
}

/// The owner of state.
pub struct Reconciler<D, M> {
    settings: Settings,
    data_path: D,
    memory: M,
    metrics: Arc<Metrics>,
    started: Instant,

    // What the store says.
    connection: Connection,
    network: Option<NetworkConfig>,
    config_missing: bool,
    config_errors: Option<ConfigErrors>,
    snapshot_seen: bool,
    roster: Roster,
    own: OwnLease,
    /// The addresses of its servers.
    servers: BTreeSet<std::net::IpAddr>,
    /// When the own lease ends unless the store answers again; absent while it answers.
    lease_ends: Option<Instant>,
    /// That moment has passed: others may have the subnet by now.
    lease_over: bool,

    // What the host is like.
    inventory: Inventory,
    underlay: Option<Underlay>,
    /// Why its addresses were chosen.
    underlay_reasons: PerFamily<Reason>,
    underlay_trouble: Vec<String>,
    /// IPv6 was switched off when the external interface was chosen.
    ipv4_alone: bool,
    endpoints: Vec<Arc<Endpoint>>,
    /// Whether those who wait for them have to be told.
    endpoints_new: bool,

    // What follows.
    host: Option<Host>,
    own_host: Option<OwnHost>,
    peers: BTreeMap<LeaseKey, Peer>,
    refused: BTreeMap<LeaseKey, Refusal>,
    ids: NexthopIds,
    desired: State,
    actual: State,

    // What is to be done.
    host_dirty: bool,
    leases_dirty: BTreeSet<LeaseKey>,
    roster_dirty: bool,
    dirty: BTreeSet<Key>,
    links_told: BTreeSet<Box<str>>,
    all_dirty: bool,
    stale: Option<&'static str>,
    dump_error: Option<String>,
    not_before: Instant,
    underlay_due: Option<Instant>,
    underlay_not_before: Instant,
    resync_due: Instant,
    heap_due: Option<Instant>,
    refusals_told: Lines,
    repairs: Repairs,
    changed: bool,
    port_lost: bool,
}

impl<D: DataPath, M: Memory> Reconciler<D, M> {
    /// A reconciler that knows nothing yet.
    pub fn new(settings: Settings, data_path: D, memory: M, metrics: Arc<Metrics>) -> Self {
        let now = Instant::now();
        Reconciler {
            resync_due: now + settings.resync,
            settings,
            data_path,
            memory,
            metrics,
            started: now,
            connection: Connection::Down { error: "not connected yet".to_owned() },
            network: None,
            config_missing: false,
            config_errors: None,
            snapshot_seen: false,
            roster: Roster::default(),
            own: OwnLease::Wanted { reason: "not asked for yet".to_owned() },
            servers: BTreeSet::new(),
            lease_ends: None,
            lease_over: false,
            inventory: Inventory::default(),
            underlay: None,
            underlay_reasons: PerFamily::default(),
            underlay_trouble: Vec::new(),
            ipv4_alone: false,
            endpoints: Vec::new(),
            endpoints_new: true,
            host: None,
            own_host: None,
            peers: BTreeMap::new(),
            refused: BTreeMap::new(),
            ids: NexthopIds::default(),
            desired: State::new(),
            actual: State::new(),
            host_dirty: false,
            leases_dirty: BTreeSet::new(),
            roster_dirty: false,
            dirty: BTreeSet::new(),
            links_told: BTreeSet::new(),
            all_dirty: false,
            stale: Some("start"),
            dump_error: None,
            not_before: now,
            underlay_due: Some(now),
            underlay_not_before: now,
            heap_due: Some(now + HEAP_REST),
            refusals_told: Lines::default(),
            repairs: Repairs::default(),
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
            channels.beat.send_modify(|count| *count += 1);
            let timer = tokio::time::sleep_until(self.next_deadline().max(timer_not_before).into());
            let mut by_timer = false;
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(event) = channels.store.recv() => self.fold_store(event),
                Some(event) = channels.kernel.recv() => self.fold_kernel(event),
                Some(query) = channels.queries.recv() => {
                    self.answer(query);
                    continue;
                }
                Ok(()) = channels.endpoints.changed() => {
                    self.endpoints = channels.endpoints.borrow_and_update().clone();
                    self.endpoints_new = true;
                    self.host_dirty = true;
                }
                () = timer => by_timer = true,
            }
            // What waits already is folded into the same round. Bounded by the channels' sizes.
            while let Ok(event) = channels.kernel.try_recv() {
                self.fold_kernel(event);
            }
            while let Ok(event) = channels.store.try_recv() {
                self.fold_store(event);
            }
            let progress = self.converge(&channels).await;
            if by_timer && !progress {
                self.metrics.idle_turn();
                timer_not_before = Instant::now() + IDLE_TURN_PAUSE;
            }
        }
    }

    /// The next moment at which something is due without an event.
    fn next_deadline(&self) -> Instant {
        let stale = self.stale.map(|_| self.not_before);
        [stale, self.underlay_due, self.heap_due, self.lease_ends, self.repairs.next_due()]
            .into_iter()
            .flatten()
            .fold(self.resync_due, Instant::min)
    }

    /// Brings actual state as near to desired state as it can be brought now. Returns whether there was anything to do.
    async fn converge(&mut self, channels: &Channels) -> bool {
        let now = Instant::now();
        let mut progress = false;
        self.metrics.round_done();
        if now >= self.resync_due {
            self.stale.get_or_insert(RESYNC);
            self.resync_due = now + self.settings.resync;
        }
        self.look_at_links().await;
        let mut before_dump = None;
        if self.stale.is_some() && now >= self.not_before {
            progress = true;
            if self.stale == Some(RESYNC) {
                // The kernel tells nobody what becomes of `accept_ra`, nor of resolvers.
                self.underlay_due.get_or_insert(now);
            }
            before_dump = self.dump().await;
        }
        if self.underlay_due.is_some_and(|due| now >= due) {
            progress = true;
            self.look_at_underlay().await;
        }
        progress |= self.lease_ends.is_some_and(|end| now >= end);
        self.look_at_lease(now);
        if self.heap_due.is_some_and(|due| now >= due) {
            progress = true;
            self.heap_due = None;
            heap::give_back();
        }
        let begun = Instant::now();
        self.rebuild(channels);
        self.read_settings().await;
        self.settle();
        self.dirty.extend(self.repairs.due(now));
        let batch = self.plan();
        if !batch.is_empty() {
            tracing::debug!(ops = batch.len(), ms = begun.elapsed().as_secs_f64() * 1e3, "planned");
        }
        if let Some(before) = before_dump {
            self.count_drift_of_dump(&before, &batch);
        }
        progress |= self.apply_due(batch, now).await;
        // An entry was set at another attempt: what stands on it was left out of the plan before. Ends, because each turn of this loop needs an
        // entry that waited and was set.
        while self.host.is_some() && (self.all_dirty || !self.dirty.is_empty()) {
            let batch = self.plan();
            progress |= self.apply_due(batch, now).await;
        }
        self.repairs.rearm(now);
        self.publish(channels);
        progress
    }

    /// Reads actual state anew. Returns the state as it was believed to be, once there has been a plan to compare with.
    async fn dump(&mut self) -> Option<State> {
        let reason = self.stale.take().unwrap_or_default();
        let begun = Instant::now();
        self.metrics.read_whole(Whole::State);
        match self.data_path.dump().await {
            Ok(state) => {
                let took = begun.elapsed();
                tracing::debug!(reason, entries = state.len(), ms = took.as_secs_f64() * 1e3, "kernel state read");
                self.not_before = Instant::now() + DUMP_REST.max(took * DUMP_REST_FACTOR);
                self.dump_error = None;
                let before = std::mem::replace(&mut self.actual, state);
                self.ids.adopt(&self.actual);
                self.all_dirty = true;
                if self.actual.len() > WHOLESALE {
                    self.heap_due = Some(Instant::now() + HEAP_REST);
                }
                let missing = |port: String| !self.actual.contains_key(&Key::Link(port.into()));
                self.port_lost |= self.ports().into_iter().any(missing);
                self.host.is_some().then_some(before)
            }
            Err(error) => {
                tracing::error!(reason, %error, "kernel state cannot be read, trying again in a second");
                self.dump_error = Some(error.to_string());
                self.stale = Some("retry after an error");
                self.not_before = Instant::now() + Duration::from_secs(1);
                None
            }
        }
    }

    /// The ops that are due.
    fn plan(&mut self) -> Batch {
        let dirty = std::mem::take(&mut self.dirty);
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
    fn publish(&mut self, channels: &Channels) {
        self.metrics.set_peers(self.peers.len());
        self.metrics.set_leases(self.roster.len(), self.refused.len());
        self.metrics.set_failed_entries(self.repairs.len());
        self.metrics.set_contested_entries(self.repairs.fights().count());
        self.metrics.set_config_errors(self.config_errors.as_ref().map_or(0, |errors| errors.0.len()));
        self.metrics.set_lease_held(self.holds_lease());
        let ready = self.is_ready();
        self.metrics.set_ready(ready);
        channels.ready.send_if_modified(|was| std::mem::replace(was, ready) != ready);
        if let Some(host) = &self.host
            && !self.repairs.any(|key| match key {
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
        if std::mem::take(&mut self.endpoints_new) {
            channels.programmed.send_replace(self.endpoints.clone());
        }
        if std::mem::take(&mut self.port_lost) {
            channels.ports_lost.send_modify(|count| *count += 1);
        }
        if std::mem::take(&mut self.changed) {
            channels.changes.send_modify(|count| *count += 1);
        }
    }
}
