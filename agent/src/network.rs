//! One overlay network: folds store events and facts about the host, and plans the network's desired entries.
//!
//! One task per network, [`Network::run`], owns the lease table and the peers, so nothing is locked. It changes nothing in the
//! kernel: it sends each change of desired entries to the reconciler of its network namespace as a
//! [`Contribution`](crate::plan::contribution::Contribution), and learns
//! from [`Progress`] which of them are applied.
//!
//! Cancel safety: every await of the `select!` is a channel's `recv`, `changed` or a timer; no event is lost when another arm
//! wins.

mod planner;
mod report;
mod store_view;
mod underlay;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::metrics::{EventSource, Metrics};
use crate::model::api;
use crate::model::event::{LeaseRequest, OwnLease, StoreEvent};
use crate::model::peer::RemoteSubnet;
use crate::model::{Device, Endpoint, ExpiryId, Mac, NetworkConfig, NetworkName, Node, PerFamily, Subnet};
use crate::plan::contribution::{HostView, NetworkProgress, Progress, ReconcilerInput};
use crate::plan::underlay::UnderlaySelector;

use planner::Planner;
use store_view::{Dirty, StoreView};
use underlay::UnderlayState;

/// Fixed settings of a network.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the network.
    pub name: NetworkName,
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
    /// Our device towards it.
    pub device: Device,
    /// Its subnet and addresses.
    pub remote: RemoteSubnet,
    /// Name of its host, if the lease has one.
    pub host: Option<String>,
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

/// A network's ends of its channels; all are bounded.
#[derive(Debug)]
pub struct Channels {
    /// Events of the store.
    pub store: mpsc::Receiver<StoreEvent>,
    /// The host as the reconciler read it; `None` before the first read.
    pub host: watch::Receiver<Option<Arc<HostView>>>,
    /// The endpoints that have a port on the bridge.
    pub endpoints: watch::Receiver<Vec<Arc<Endpoint>>>,
    /// What the reconciler applied.
    pub progress: watch::Receiver<Progress>,
    /// Queries of the admin socket.
    pub queries: mpsc::Receiver<NetworkQuery>,
    /// To the reconciler.
    pub reconciler: mpsc::Sender<ReconcilerInput>,
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

/// One overlay network on this host.
pub struct Network<M> {
    settings: Settings,
    state_store: M,
    metrics: Arc<Metrics>,
    started: Instant,
    store: StoreView,
    underlay: UnderlayState,
    endpoints: Vec<Arc<Endpoint>>,
    planner: Planner,
    dirty: Dirty,
    progress: Progress,
    endpoints_changed: bool,
    /// The contribution that has the endpoints; `None` once they are reported as applied.
    endpoints_sequence: Option<u64>,
    /// Whether the answer to a query may have changed.
    changed: bool,
}

impl<M: NetworkStateStore> Network<M> {
    /// A network without any state yet.
    pub fn new(settings: Settings, state_store: M, metrics: Arc<Metrics>) -> Self {
        let now = Instant::now();
        Network {
            store: StoreView::new(settings.lease_ttl),
            settings,
            state_store,
            metrics,
            started: now,
            underlay: UnderlayState::default(),
            endpoints: Vec::new(),
            planner: Planner::default(),
            dirty: Dirty::default(),
            progress: Progress::default(),
            endpoints_changed: true,
            endpoints_sequence: None,
            changed: true,
        }
    }

    /// Runs until `shutdown`, or until the reconciler has ended.
    pub async fn run(mut self, mut channels: Channels, shutdown: CancellationToken) {
        channels.host.mark_changed();
        channels.endpoints.mark_changed();
        channels.progress.mark_changed();
        let mut queries = Vec::new();
        loop {
            // Queries first: an answer includes every event sent before its query.
            while let Ok(query) = channels.queries.try_recv() {
                queries.push(query);
            }
            // Everything queued is folded into one iteration, so that answers include it. The channels' sizes bound it.
            while let Ok(event) = channels.store.try_recv() {
                self.fold_store(event);
            }
            self.fold_watches(&mut channels);
            channels.heartbeat.send_modify(|count| *count += 1);
            let deadline = tokio::select! {
                reconciler = self.converge(&channels) => match reconciler {
                    Ok(()) => self.next_deadline(),
                    Err(_ended) => return,
                },
                () = shutdown.cancelled() => return,
            };
            queries.drain(..).for_each(|query| self.answer_query(query));
            let timer = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(event) = channels.store.recv() => self.fold_store(event),
                Ok(()) = channels.host.changed() => channels.host.mark_changed(),
                Ok(()) = channels.endpoints.changed() => channels.endpoints.mark_changed(),
                Ok(()) = channels.progress.changed() => channels.progress.mark_changed(),
                Some(query) = channels.queries.recv() => queries.push(query),
                () = timer => {}
            }
        }
    }

    fn fold_store(&mut self, event: StoreEvent) {
        self.changed = true;
        self.metrics.count_events(EventSource::Store, 1);
        self.store.fold(event, Instant::now(), &mut self.dirty);
        self.metrics.set_store_connected(self.store.is_connected());
    }

    fn fold_watches(&mut self, channels: &mut Channels) {
        if channels.host.has_changed().unwrap_or(false)
            && let Some(view) = channels.host.borrow_and_update().clone()
        {
            self.underlay.view = Some(view);
            self.dirty.underlay = true;
        }
        if channels.endpoints.has_changed().unwrap_or(false) {
            self.endpoints = channels.endpoints.borrow_and_update().clone();
            self.endpoints_changed = true;
            self.dirty.host = true;
        }
        if channels.progress.has_changed().unwrap_or(false) {
            let progress = channels.progress.borrow_and_update().clone();
            self.changed |= progress != self.progress;
            self.progress = progress;
        }
    }

    /// The next time at which work is due without an event.
    fn next_deadline(&self) -> Option<Instant> {
        [self.store.lease_expires_at(), self.underlay.reselect_at].into_iter().flatten().min()
    }

    /// Plans what is dirty, sends it to the reconciler, and publishes changed values. Fails if the reconciler has ended.
    async fn converge(&mut self, channels: &Channels) -> Result<(), mpsc::error::SendError<ReconcilerInput>> {
        let now = Instant::now();
        self.changed |= self.store.check_lease_expiry(now);
        if self.store.take_config_changed() {
            // The families that the external interface has to serve may have changed. The selection waits for a new read.
            self.underlay.refresh += 1;
            let refresh = ReconcilerInput::RefreshHost { network: self.settings.name.clone(), number: self.underlay.refresh };
            channels.reconciler.send(refresh).await?;
        }
        if std::mem::take(&mut self.dirty.underlay) || self.underlay.reselect_at.is_some_and(|at| now >= at) {
            self.select_underlay(now);
        }
        if self.dirty.host {
            self.request_lease(channels);
        }
        self.plan(now);
        if let Some(contribution) = self.planner.take_contribution(&self.settings.name) {
            self.changed = true;
            channels.reconciler.send(ReconcilerInput::Contribution(Box::new(contribution))).await?;
        }
        if std::mem::take(&mut self.endpoints_changed) {
            self.endpoints_sequence = Some(self.planner.sequence());
        }
        self.publish(channels);
        Ok(())
    }

    /// Sends the lease request of this host to the store.
    fn request_lease(&mut self, channels: &Channels) {
        let (Some(network), Some(underlay)) = (self.store.config.clone(), self.underlay.selected.clone()) else { return };
        let preferred = match &self.store.own_lease {
            OwnLease::Held(held) => Some(held.subnet),
            OwnLease::NotHeld { .. } => {
                self.planner.host.as_ref().map(|host| host.subnet).or_else(|| self.state_store.preferred_subnet())
            }
        };
        let vtep = self.vtep(&network.restricted_to(underlay.local.families()));
        let request = LeaseRequest { node: self.settings.node.clone(), public_ip: underlay.public_ip, vtep, preferred, network };
        replace_if_changed(&channels.lease_request, Some(request));
    }

    /// What the reconciler applied of this network.
    fn applied(&self) -> NetworkProgress {
        self.progress.networks.get(&self.settings.name).copied().unwrap_or_default()
    }

    /// Whether the snapshot was read, the own lease is held, the first contribution is applied, and no failed entry is pending. A
    /// later contribution on its way to the kernel is no reason to revoke readiness.
    fn is_ready(&self) -> bool {
        let applied = self.applied();
        self.store.has_snapshot
            && self.planner.host.is_some()
            && self.store.holds_lease()
            && applied.sequence > 0
            && applied.failed == 0
            && !self.progress.dump_failed
    }

    /// Publishes metrics and changed values on the channels.
    fn publish(&mut self, channels: &Channels) {
        self.metrics.set_peers(self.planner.peers.len());
        self.metrics.set_leases(self.store.leases.len(), self.planner.rejected.len());
        self.metrics.set_config_errors(self.store.config_errors.as_ref().map_or(0, |errors| errors.0.len()));
        self.metrics.set_lease_held(self.store.holds_lease());
        let ready = self.is_ready();
        self.metrics.set_ready(ready);
        replace_if_changed(&channels.ready, ready);
        let applied = self.applied();
        if let Some(host) = &self.planner.host
            && applied.sequence >= self.planner.host_sequence
            && !applied.base_failed
        {
            let overlay = Overlay {
                network: host.network.clone(),
                subnet: host.subnet,
                bridge: Device::bridge(host.network.vxlan.vni),
                mtu: host.mtu(),
                public_ip: host.underlay.public_ip,
            };
            replace_if_changed(&channels.overlay, Some(overlay));
        }
        if self.endpoints_sequence.is_some_and(|sequence| applied.sequence >= sequence) {
            self.endpoints_sequence = None;
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
