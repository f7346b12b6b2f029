//! Channels between a network, the reconciler of its network namespace, and the agent's other tasks.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::queries::Queries;
use super::supervisor::Failures;
use crate::model::Endpoint;
use crate::model::event::LeaseRequest;
use crate::network::{self, Overlay};
use crate::plan::KernelEvent;
use crate::plan::contribution::Progress;
use crate::reconcile;

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

/// Connects a network with a reconciler.
pub fn connect(inputs: Inputs) -> (network::Channels, reconcile::Channels, Outputs) {
    let (to_reconciler, networks) = mpsc::channel(CONTRIBUTION_CAPACITY);
    let (network_queries, network_queries_out) = mpsc::channel(QUERY_CAPACITY);
    let (reconciler_queries, reconciler_queries_out) = mpsc::channel(QUERY_CAPACITY);
    let (host, host_views) = watch::channel(None);
    let (progress, progress_reports) = watch::channel(Progress::default());
    let (lease_request, lease_requests) = watch::channel(None);
    let (overlay, overlays) = watch::channel(None);
    let (changes, changed) = watch::channel(0);
    let (ready, readiness) = watch::channel(false);
    let (ports_lost, losses) = watch::channel(0);
    let (network_heartbeat, network_heartbeats) = watch::channel(0);
    let (reconciler_heartbeat, reconciler_heartbeats) = watch::channel(0);
    let network = network::Channels {
        host: host_views,
        endpoints: inputs.endpoints,
        progress: progress_reports.clone(),
        queries: network_queries_out,
        reconciler: to_reconciler,
        carried: network::Carried::default(),
        applied_endpoints: inputs.applied_endpoints,
        lease_request,
        overlay,
        changes: changes.clone(),
        ready,
        heartbeat: network_heartbeat,
    };
    let reconciler = reconcile::Channels {
        networks,
        kernel: inputs.kernel,
        queries: reconciler_queries_out,
        host,
        progress,
        changes,
        ports_lost,
        heartbeat: reconciler_heartbeat,
        run: 0,
    };
    let outputs = Outputs {
        queries: Queries { network: network_queries, reconciler: reconciler_queries, failures: Failures::default() },
        lease_request: lease_requests,
        overlay: overlays,
        progress: progress_reports,
        changes: changed,
        ready: readiness,
        ports_lost: losses,
        heartbeats: [network_heartbeats, reconciler_heartbeats],
    };
    (network, reconciler, outputs)
}
