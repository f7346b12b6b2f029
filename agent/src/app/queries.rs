//! Queries to the agent's tasks, whose answers it puts together.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::supervisor::Failures;
use crate::model::PeerEndpoint;
use crate::model::api::{Health, PeerEntry, Peers, Status};
use crate::network::{NetworkQuery, NetworkStatus, PeerRow, SubnetRow};
use crate::reconcile::{DataPathReport, PeerState, ReconcilerQuery};

/// A handle for queries; cheap to clone. Each answer is `None` if a task has ended.
#[derive(Debug, Clone)]
pub struct Queries {
    /// To the network.
    pub network: mpsc::Sender<NetworkQuery>,
    /// To the reconciler of the host's network namespace.
    pub host: mpsc::Sender<ReconcilerQuery>,
    /// To the reconciler of the network's own namespace, if it is isolated.
    pub own: Option<mpsc::Sender<ReconcilerQuery>>,
    /// Failures of any of them.
    pub failures: Failures,
}

impl Queries {
    /// The agent's status, without what the endpoints know.
    pub async fn status(&self) -> Option<Status> {
        let network = send_query(&self.network, NetworkQuery::Status).await?;
        let mut data_path = send_query(&self.host, ReconcilerQuery::Status).await?;
        if let Some(own) = &self.own {
            data_path = merge_reports(data_path, send_query(own, ReconcilerQuery::Status).await?, &network.status.name);
        }
        Some(merge_status(network, data_path, self.failures.problems()))
    }

    /// Every lease.
    pub async fn subnets(&self) -> Option<Vec<SubnetRow>> {
        send_query(&self.network, NetworkQuery::Subnets).await
    }

    /// Every peer in the data path.
    pub async fn peers(&self) -> Option<Peers> {
        let mut rows = send_query(&self.network, NetworkQuery::Peers).await?;
        let keys: Arc<[_]> = rows.iter_mut().map(|row| std::mem::take(&mut row.entries)).collect();
        let reconciler = self.own.as_ref().unwrap_or(&self.host);
        let states = send_query(reconciler, |reply| ReconcilerQuery::Peers(Arc::clone(&keys), reply)).await?;
        let mut peers: Vec<PeerEntry> = rows.into_iter().zip(states).map(peer_entry).collect();
        peers.sort_by_key(|peer| peer.subnet);
        Some(Peers { peers })
    }
}

/// Sends a query again if the task fails before it answers: the restarted one answers.
async fn send_query<Q, T>(queries: &mpsc::Sender<Q>, query: impl Fn(oneshot::Sender<T>) -> Q) -> Option<T> {
    loop {
        let (reply, response) = oneshot::channel();
        queries.send(query(reply)).await.ok()?;
        if let Ok(answer) = response.await {
            return Some(answer);
        }
    }
}

/// The reports of the host's namespace and of an isolated network's own.
fn merge_reports(host: DataPathReport, own: DataPathReport, network: &str) -> DataPathReport {
    let own_problems = own.problems.into_iter().map(|problem| format!("network {network}: {problem}"));
    DataPathReport {
        failed: host.failed.into_iter().chain(own.failed).collect(),
        drift_repairs: host.drift_repairs + own.drift_repairs,
        last_drift: [host.last_drift, own.last_drift].into_iter().flatten().max_by_key(|drift| drift.at),
        nexthop_objects: own.nexthop_objects,
        problems: host.problems.into_iter().chain(own_problems).collect(),
    }
}

fn merge_status(network: NetworkStatus, data_path: DataPathReport, failures: Vec<String>) -> Status {
    let NetworkStatus { mut status, rejected_problem } = network;
    let DataPathReport { failed, drift_repairs, last_drift, nexthop_objects, problems } = data_path;
    status.problems.splice(0..0, failures);
    status.problems.extend(problems.into_iter().chain(rejected_problem));
    (status.data_path.failed, status.data_path.drift_repairs) = (failed, drift_repairs);
    (status.data_path.last_drift, status.data_path.nexthop_objects) = (last_drift, nexthop_objects);
    status.health = match (status.ready, status.problems.is_empty()) {
        (true, true) => Health::Ok,
        (true, false) => Health::Degraded,
        // An existing data path keeps forwarding while the agent waits.
        (false, _) if status.data_path.mtu.is_some() => Health::Degraded,
        (false, _) => Health::Waiting,
    };
    status
}

fn peer_entry((row, state): (PeerRow, PeerState)) -> PeerEntry {
    let PeerRow { interface, remote, host, entries: _ } = row;
    let PeerState { nexthop_id, state, last_repair } = state;
    PeerEntry {
        subnet: remote.subnet,
        host,
        public_ip: remote.public_ip,
        vtep: remote.endpoint.and_then(PeerEndpoint::mac),
        device: interface,
        nexthop_id,
        state,
        last_repair,
    }
}
