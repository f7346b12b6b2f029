//! Channels between networks, the reconcilers of their network namespaces, and the agent's other tasks.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::queries::Queries;
use super::supervisor::Failures;
use crate::model::event::LeaseRequest;
use crate::model::{Endpoint, NetworkName, NetworkRecord};
use crate::network::{self, NetworkQuery, Overlay, ReconcilerLink};
use crate::plan::KernelEvent;
use crate::plan::contribution::Progress;
use crate::reconcile::{self, ReconcilerQuery};

/// Capacity of a channel for queries.
const QUERY_CAPACITY: usize = 64;
/// A network whose contributions wait here plans later changes together.
const CONTRIBUTION_CAPACITY: usize = 4;

/// What the wired tasks receive from others.
#[derive(Debug)]
pub struct Inputs {
    /// Events of the kernel.
    pub kernel: mpsc::Receiver<KernelEvent>,
    /// The endpoints that have a port on the bridge.
    pub endpoints: watch::Receiver<Vec<Arc<Endpoint>>>,
    /// Where to report the endpoints whose entries were applied.
    pub applied_endpoints: watch::Sender<Vec<Arc<Endpoint>>>,
}

/// What the wired tasks send to others.
#[derive(Debug)]
pub struct Outputs {
    /// Queries to both tasks.
    pub queries: Queries,
    /// The lease that this host requests.
    pub lease_request: watch::Receiver<Option<LeaseRequest>>,
    /// The overlay, once it is in place.
    pub overlay: watch::Receiver<Option<Overlay>>,
    /// What is applied.
    pub progress: watch::Receiver<Progress>,
    /// Incremented whenever the answer to a query may have changed.
    pub changes: watch::Receiver<u64>,
    /// Whether the network is ready.
    pub ready: watch::Receiver<bool>,
    /// Incremented whenever another process removed the host end of an endpoint's veth pair.
    pub ports_lost: watch::Receiver<u64>,
    /// Heartbeats of the network's loop and of the reconciler's loop.
    pub heartbeats: [watch::Receiver<u64>; 2],
}

/// A reconciler's channels.
#[derive(Debug)]
pub struct ReconcilerEnds {
    /// The reconciler's ends.
    pub channels: reconcile::Channels,
    /// The ends of each network in its namespace.
    pub link: ReconcilerLink,
    /// To the reconciler.
    pub queries: mpsc::Sender<ReconcilerQuery>,
    /// Incremented whenever another process removed the host end of an endpoint's veth pair.
    pub ports_lost: watch::Receiver<u64>,
    /// Heartbeats of its loop.
    pub heartbeat: watch::Receiver<u64>,
}

/// A network's channels to other tasks than reconcilers.
#[derive(Debug)]
pub struct NetworkEnds {
    /// The network's ends.
    pub channels: network::Channels,
    /// To the network.
    pub queries: mpsc::Sender<NetworkQuery>,
    /// The last valid record.
    pub record: watch::Receiver<Option<NetworkRecord>>,
    /// The lease that this host requests.
    pub lease_request: watch::Receiver<Option<LeaseRequest>>,
    /// The overlay, once it is in place.
    pub overlay: watch::Receiver<Option<Overlay>>,
    /// Whether the network is ready.
    pub ready: watch::Receiver<bool>,
    /// Heartbeats of its loop.
    pub heartbeat: watch::Receiver<u64>,
}

/// What a network receives, besides the links to its reconcilers.
#[derive(Debug)]
pub struct NetworkInputs {
    /// The endpoints that have a port on the bridge.
    pub endpoints: watch::Receiver<Vec<Arc<Endpoint>>>,
    /// Where to report the endpoints whose entries were applied.
    pub applied_endpoints: watch::Sender<Vec<Arc<Endpoint>>>,
    /// The records of this host's networks.
    pub others: watch::Receiver<Arc<BTreeMap<NetworkName, NetworkRecord>>>,
    /// Incremented whenever the answer to a query may have changed.
    pub changes: watch::Sender<u64>,
}

/// Makes the channels of a reconciler.
pub fn reconciler(kernel: mpsc::Receiver<KernelEvent>, changes: watch::Sender<u64>) -> ReconcilerEnds {
    let (input, networks) = mpsc::channel(CONTRIBUTION_CAPACITY);
    let (queries, queries_out) = mpsc::channel(QUERY_CAPACITY);
    let (host, view) = watch::channel(None);
    let (progress, progress_reports) = watch::channel(Progress::default());
    let (ports_lost, losses) = watch::channel(0);
    let (heartbeat, heartbeats) = watch::channel(0);
    let channels =
        reconcile::Channels { networks, kernel, queries: queries_out, host, progress, changes, ports_lost, heartbeat, run: 0 };
    let link = ReconcilerLink { input, view, progress: progress_reports };
    ReconcilerEnds { channels, link, queries, ports_lost: losses, heartbeat: heartbeats }
}

/// Makes the channels of a network and links it with the reconcilers of its namespaces.
pub fn network(inputs: NetworkInputs, host: ReconcilerLink, own: Option<ReconcilerLink>) -> NetworkEnds {
    let (queries, queries_out) = mpsc::channel(QUERY_CAPACITY);
    let (record, records) = watch::channel(None);
    let (lease_request, lease_requests) = watch::channel(None);
    let (overlay, overlays) = watch::channel(None);
    let (ready, readiness) = watch::channel(false);
    let (heartbeat, heartbeats) = watch::channel(0);
    let channels = network::Channels {
        host,
        own,
        record,
        others: inputs.others,
        endpoints: inputs.endpoints,
        queries: queries_out,
        carried: network::Carried::default(),
        applied_endpoints: inputs.applied_endpoints,
        lease_request,
        overlay,
        changes: inputs.changes,
        ready,
        heartbeat,
    };
    NetworkEnds {
        channels,
        queries,
        record: records,
        lease_request: lease_requests,
        overlay: overlays,
        ready: readiness,
        heartbeat: heartbeats,
    }
}

/// Connects a routed network with the reconciler of the host's namespace.
pub fn connect(inputs: Inputs) -> (network::Channels, reconcile::Channels, Outputs) {
    let (changes, changed) = watch::channel(0);
    let reconciler = reconciler(inputs.kernel, changes.clone());
    let progress = reconciler.link.progress.clone();
    let network_inputs = NetworkInputs {
        endpoints: inputs.endpoints,
        applied_endpoints: inputs.applied_endpoints,
        others: watch::channel(Arc::default()).1,
        changes,
    };
    let network = network(network_inputs, reconciler.link, None);
    let outputs = Outputs {
        queries: Queries { network: network.queries, host: reconciler.queries, own: None, failures: Failures::default() },
        lease_request: network.lease_request,
        overlay: network.overlay,
        progress,
        changes: changed,
        ready: network.ready,
        ports_lost: reconciler.ports_lost,
        heartbeats: [network.heartbeat, reconciler.heartbeat],
    };
    (network.channels, reconciler.channels, outputs)
}
