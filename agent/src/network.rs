//! One overlay network: folds store events and facts about the host, and plans the network's desired entries.
//!
//! One task per network, [`Network::run`], owns the lease table and the peers, so nothing is locked. It changes nothing in the
//! kernel: it sends each change of desired entries to the reconcilers of its network namespaces as a
//! [`Contribution`](crate::plan::contribution::Contribution), and learns from
//! [`Progress`](crate::plan::contribution::Progress) which of them are applied. An isolated network has entries in two
//! namespaces, its own and the host's.
//!
//! Cancel safety: every await of the `select!` is a channel's `recv`, `changed` or a timer; no event is lost when another arm
//! wins.

mod isolation;
mod link;
mod planner;
mod report;
mod scope;
mod store_view;
mod underlay;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::OptionFuture;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::metrics::{EventSource, Metrics, NetworkGauges};
use crate::model::api;
use crate::model::event::{LeaseRequest, OwnLease, StoreEvent};
use crate::model::peer::RemoteSubnet;
use crate::model::{Device, Endpoint, ExpiryId, Mac, NetworkConfig, NetworkName, NetworkRecord, Node, PerFamily, Subnet};
use crate::plan::Key;
use crate::plan::contribution::ReconcilerInput;
use crate::plan::isolation::Transit;
use crate::plan::underlay::UnderlaySelector;

pub use link::ReconcilerLink;

use isolation::Connections;
use planner::Planner;
use scope::ScopeState;
use store_view::{Dirty, StoreView};
use underlay::UnderlayState;

/// Fixed settings of a network.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the network.
    pub name: NetworkName,
    /// Whether it was started as an isolated network. It plans nothing while its record has the other kind.
    pub isolated: bool,
    /// Start of the names of isolated networks' namespaces.
    pub netns_prefix: String,
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
    /// Minimum time for which the own lease stays valid while the store does not answer.
    pub lease_ttl: Duration,
    /// The store's endpoints, for the status.
    pub store_endpoints: Vec<String>,
    /// The key prefix, for the status.
    pub store_prefix: String,
}

/// State of a network that survives restarts; `app` stores it in the state directory.
pub trait NetworkStateStore: Send {
    /// The MAC of a device of ours: the stored one, else the one found on the device, else a new one. It is stored from then on.
    fn device_mac(&mut self, device: Device, found: Option<Mac>) -> Mac;
    /// The last subnet of this host.
    fn preferred_subnet(&self) -> Option<Subnet>;
    /// The last underlay addresses that this host published.
    fn published_addresses(&self) -> PerFamily<IpAddr>;
    /// The number of the network's transit: the stored one, else the lowest free one, which is stored from then on. `None` if no
    /// number is free.
    fn transit(&mut self) -> Option<Transit>;
    /// Stores the network's record, for a start without the store.
    fn save_record(&mut self, record: &NetworkRecord);
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

/// A row of `overlayctl subnets`, with its expiry, for which the caller queries the remaining time.
pub type SubnetRow = (api::SubnetEntry, Option<ExpiryId>);

/// A peer in one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerRow {
    /// Name of the interface towards it.
    pub interface: String,
    /// Its subnet and addresses.
    pub remote: RemoteSubnet,
    /// Name of its host, if the lease has one.
    pub host: Option<String>,
    /// Its entries in the kernel's tables.
    pub entries: Vec<Key>,
}

/// A network's part of the status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkStatus {
    /// The status, without its health and without the state of the kernel and of the endpoints.
    pub status: api::Status,
    /// The problem text if leases are rejected; it comes after all other problems.
    pub rejected_problem: Option<String>,
}

/// Queries to a network.
#[derive(Debug)]
pub enum NetworkQuery {
    /// The status.
    Status(oneshot::Sender<NetworkStatus>),
    /// Every lease.
    Subnets(oneshot::Sender<Vec<SubnetRow>>),
    /// Every peer in the data path.
    Peers(oneshot::Sender<Vec<PeerRow>>),
}

/// A network's ends of its channels, which outlive a run of it; all are bounded.
#[derive(Debug)]
pub struct Channels {
    /// The reconciler of the host's network namespace.
    pub host: ReconcilerLink,
    /// The reconciler of the network's own namespace, if it is isolated.
    pub own: Option<ReconcilerLink>,
    /// To the agent: the last valid record, also if its kind is not the one that the network was started as.
    pub record: watch::Sender<Option<NetworkRecord>>,
    /// The records of this host's networks.
    pub others: watch::Receiver<Arc<BTreeMap<NetworkName, NetworkRecord>>>,
    /// The endpoints that have a port on the bridge.
    pub endpoints: watch::Receiver<Vec<Arc<Endpoint>>>,
    /// Queries of the admin socket.
    pub queries: mpsc::Receiver<NetworkQuery>,
    /// What a restarted network takes over from the run before.
    pub carried: Carried,
    /// The endpoints whose entries were applied, or failed once and are being retried.
    pub applied_endpoints: watch::Sender<Vec<Arc<Endpoint>>>,
    /// To the store: the lease that this host requests.
    pub lease_request: watch::Sender<Option<LeaseRequest>>,
    /// To the endpoints and `subnet.env`: the overlay, once it is in place.
    pub overlay: watch::Sender<Option<Overlay>>,
    /// Incremented whenever the answer to a query may have changed.
    pub changes: watch::Sender<u64>,
    /// Whether the network is ready.
    pub ready: watch::Sender<bool>,
    /// Incremented by each iteration of the loop. An idle loop does not iterate, so a liveness probe has to send a query.
    pub heartbeat: watch::Sender<u64>,
}

/// What a restarted network takes over from the run before.
#[derive(Debug, Clone, Copy, Default)]
pub struct Carried {
    /// Start of the first run.
    started: Option<Instant>,
    /// Numbers of the last messages to the reconcilers. They go on, so that no answer to an earlier run is mistaken.
    contribution: u64,
    refresh: u64,
    /// IPv6 stays unused until the agent is restarted, because with it the host would get another subnet.
    ipv4_only: bool,
}

/// One overlay network on this host.
pub struct Network<M> {
    settings: Settings,
    state_store: M,
    metrics: Arc<Metrics>,
    started: Instant,
    /// Start of the first run.
    uptime_since: Instant,
    /// Reads the clock.
    now: fn() -> Instant,
    store: StoreView,
    underlay: UnderlayState,
    connections: Connections,
    endpoints: Vec<Arc<Endpoint>>,
    planner: Planner,
    dirty: Dirty,
    endpoints_changed: bool,
    /// Whether endpoints are not reported as applied yet.
    endpoints_pending: bool,
    /// Whether the answer to a query may have changed.
    changed: bool,
}

impl<M: NetworkStateStore> Network<M> {
    /// A network without any state yet.
    pub fn new(settings: Settings, state_store: M, metrics: Arc<Metrics>) -> Self {
        let now = Instant::now();
        Network {
            store: StoreView::new(settings.lease_ttl),
            planner: Planner::new(settings.name.clone(), settings.isolated),
            settings,
            state_store,
            metrics,
            started: now,
            uptime_since: now,
            now: Instant::now,
            underlay: UnderlayState::default(),
            connections: Connections::default(),
            endpoints: Vec::new(),
            dirty: Dirty::default(),
            endpoints_changed: true,
            endpoints_pending: false,
            changed: true,
        }
    }

    /// The same with another clock.
    pub fn with_clock(self, now: fn() -> Instant) -> Self {
        Network { now, ..self }
    }

    /// Runs until `shutdown`, or until a reconciler's end of a channel is dropped. `store` begins with a snapshot. `delay` is the
    /// pause before a restart.
    pub async fn run(
        mut self,
        mut store: mpsc::Receiver<StoreEvent>,
        channels: &mut Channels,
        delay: Duration,
        shutdown: CancellationToken,
    ) {
        let carried = &mut channels.carried;
        self.uptime_since = *carried.started.get_or_insert(self.started);
        (self.planner.sequence, self.underlay.refresh) = (carried.contribution, carried.refresh);
        self.underlay.ipv4_only = carried.ipv4_only;
        if !delay.is_zero() && shutdown.run_until_cancelled(self.wait(channels, delay)).await.is_none() {
            return;
        }
        for link in [Some(&mut channels.host), channels.own.as_mut()].into_iter().flatten() {
            link.view.mark_changed();
            link.progress.mark_changed();
        }
        channels.others.mark_changed();
        channels.endpoints.mark_changed();
        let mut queries = Vec::new();
        loop {
            // Queries first: an answer includes every event sent before its query.
            while let Ok(query) = channels.queries.try_recv() {
                queries.push(query);
            }
            // Everything queued is folded into one iteration, so that answers include it. The channels' sizes bound it.
            while let Ok(event) = store.try_recv() {
                self.fold_store(event);
            }
            self.fold_watches(channels);
            channels.heartbeat.send_modify(|count| *count += 1);
            let deadline = tokio::select! {
                reconciler = self.converge(channels) => match reconciler {
                    Ok(()) => self.next_deadline(),
                    Err(_ended) => return,
                },
                () = shutdown.cancelled() => return,
            };
            queries.drain(..).for_each(|query| self.answer_query(query));
            let timer = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(event) = store.recv() => self.fold_store(event),
                () = channels.host.changed() => {}
                Some(()) = OptionFuture::from(channels.own.as_mut().map(ReconcilerLink::changed)) => {}
                Ok(()) = channels.others.changed() => channels.others.mark_changed(),
                Ok(()) = channels.endpoints.changed() => channels.endpoints.mark_changed(),
                Some(query) = channels.queries.recv() => queries.push(query),
                () = timer => {}
            }
        }
    }

    /// Answers queries for the time of `delay`, without any other work.
    async fn wait(&mut self, channels: &mut Channels, delay: Duration) {
        self.metrics.set_store_connected(&self.settings.name, false);
        self.publish(channels);
        let mut delay = pin!(tokio::time::sleep(delay));
        loop {
            tokio::select! {
                () = &mut delay => return,
                Some(query) = channels.queries.recv() => self.answer_query(query),
            }
            channels.heartbeat.send_modify(|count| *count += 1);
        }
    }

    fn fold_store(&mut self, event: StoreEvent) {
        self.changed = true;
        self.metrics.count_events(EventSource::Store, 1);
        let event = match event {
            StoreEvent::Config(Some(Ok(record))) => {
                StoreEvent::Config(Some(record.check_name(&self.settings.name).map(|()| record)))
            }
            event => event,
        };
        self.store.fold(event, (self.now)(), &mut self.dirty);
        self.metrics.set_store_connected(&self.settings.name, self.store.is_connected());
    }

    fn fold_watches(&mut self, channels: &mut Channels) {
        let links = std::iter::once(&mut channels.host).chain(&mut channels.own);
        for (state, link) in self.planner.scopes.iter_mut().zip(links) {
            let (view, progress) = state.fold(link);
            self.dirty.underlay |= view;
            self.changed |= progress;
        }
        if channels.others.has_changed().unwrap_or(false) {
            self.connections.others = channels.others.borrow_and_update().clone();
            self.dirty.host |= self.settings.isolated;
        }
        if channels.endpoints.has_changed().unwrap_or(false) {
            self.endpoints = channels.endpoints.borrow_and_update().clone();
            self.endpoints_changed = true;
            self.dirty.host = true;
        }
    }

    /// The next time at which work is due without an event.
    fn next_deadline(&self) -> Option<Instant> {
        let reselect_at = self.underlay.reselect_at.filter(|_| self.is_of_recorded_kind());
        [self.store.lease_expires_at(), reselect_at].into_iter().flatten().min()
    }

    /// Whether the network was started as its record says. Otherwise it plans nothing, and its data path stays.
    fn is_of_recorded_kind(&self) -> bool {
        self.store.record.as_ref().is_none_or(|record| record.isolated == self.settings.isolated)
    }

    /// Plans what is dirty, sends it to the reconcilers, and publishes changed values. Fails if a reconciler has ended.
    async fn converge(&mut self, channels: &mut Channels) -> Result<(), mpsc::error::SendError<ReconcilerInput>> {
        let now = (self.now)();
        self.changed |= self.store.check_lease_expiry(now);
        if let Some(record) = self.store.take_new_record() {
            self.state_store.save_record(record);
            channels.record.send_replace(Some(record.clone()));
        }
        let host_restarted = self.planner.start_over();
        let plans = self.is_of_recorded_kind();
        if host_restarted || (plans && self.store.take_config_changed()) {
            // The families that the external interface has to serve may have changed. The selection waits for a new read.
            self.underlay.refresh += 1;
            channels.carried.refresh = self.underlay.refresh;
            let refresh = ReconcilerInput::RefreshHost { network: self.settings.name.clone(), number: self.underlay.refresh };
            channels.host.input.send(refresh).await?;
        }
        if plans {
            if std::mem::take(&mut self.dirty.underlay) || self.underlay.reselect_at.is_some_and(|at| now >= at) {
                self.select_underlay(now);
                channels.carried.ipv4_only = self.underlay.ipv4_only;
            }
            if self.dirty.host {
                self.request_lease(channels);
            }
            self.plan(now);
        }
        let links = std::iter::once(&channels.host).chain(&channels.own);
        for (state, link) in self.planner.scopes.iter_mut().zip(links) {
            if let Some(contribution) = state.take_contribution(&self.settings.name, &mut self.planner.sequence) {
                self.changed = true;
                channels.carried.contribution = contribution.sequence;
                link.input.send(ReconcilerInput::Contribution(Box::new(contribution))).await?;
            }
        }
        if plans && std::mem::take(&mut self.endpoints_changed) {
            self.planner.scopes.iter_mut().for_each(ScopeState::mark_endpoints);
            self.endpoints_pending = true;
        }
        self.publish(channels);
        Ok(())
    }

    /// Sends the lease request of this host to the store.
    fn request_lease(&mut self, channels: &Channels) {
        let (Some(network), Some(underlay)) = (self.store.config().cloned(), self.underlay.selected.clone()) else { return };
        let preferred = match &self.store.own_lease {
            OwnLease::Held(held) => Some(held.subnet),
            OwnLease::NotHeld { .. } => {
                self.planner.host.as_ref().map(|host| host.subnet).or_else(|| self.state_store.preferred_subnet())
            }
        };
        let backend = self.lease_data(&network.restricted_to(underlay.local.families()));
        let request =
            LeaseRequest { node: self.settings.node.clone(), public_ip: underlay.public_ip, backend, preferred, network };
        replace_if_changed(&channels.lease_request, Some(request));
    }

    /// Whether the snapshot was read, the own lease is held, the first contributions are applied, and no failed entry is pending.
    /// A later contribution on its way to the kernel is no reason to revoke readiness.
    fn is_ready(&self) -> bool {
        self.store.has_snapshot
            && self.planner.host.is_some()
            && self.store.holds_lease()
            && self.planner.scopes.iter().all(|state| state.is_in_place(&self.settings.name))
    }

    /// Publishes metrics and changed values on the channels.
    fn publish(&mut self, channels: &Channels) {
        let ready = self.is_ready();
        let gauges = NetworkGauges {
            ready,
            lease_held: self.store.holds_lease(),
            peers: self.planner.peers.len(),
            leases: self.store.leases.len(),
            rejected_leases: self.planner.rejected.len(),
            config_errors: self.store.config_errors.as_ref().map_or(0, |errors| errors.0.len()),
        };
        self.metrics.set_network(&self.settings.name, gauges);
        replace_if_changed(&channels.ready, ready);
        let (scopes, name) = (&self.planner.scopes, &self.settings.name);
        if let Some(host) = &self.planner.host
            && scopes.iter().all(|state| state.has_host_entries(name))
        {
            let overlay = Overlay {
                network: host.network.clone(),
                subnet: host.subnet,
                bridge: host.backend().bridge(),
                mtu: host.mtu(),
                public_ip: host.underlay.public_ip,
            };
            replace_if_changed(&channels.overlay, Some(overlay));
        }
        if self.endpoints_pending && scopes.iter().all(|state| state.has_endpoints(name)) {
            self.endpoints_pending = false;
            channels.applied_endpoints.send_replace(self.endpoints.clone());
        }
        if std::mem::take(&mut self.changed) {
            channels.changes.send_modify(|count| *count += 1);
        }
    }
}

fn replace_if_changed<T: PartialEq>(channel: &watch::Sender<T>, value: T) {
    channel.send_if_modified(|current| {
        let changed = *current != value;
        *current = value;
        changed
    });
}
