//! What the socket answers from: the reconciler for what it owns, the endpoints for containers, the store for the time left of leases.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, mpsc, oneshot, watch};

use crate::admin::{ApiError, Backend, ErrorKind};
use crate::endpoint::{Class, EndpointError, Endpoints};
use crate::kernel::Plugger;
use crate::metrics::Metrics;
use crate::model::endpoint::EndpointName;
use crate::model::{Device, api};
use crate::reconcile::Query;
use crate::store::{self, StoreConfig};
use crate::telemetry::LevelHandle;

/// How long a look at the leases' ends counts: a table that is watched asks etcd no more often.
const TIME_LEFT_AGE: Duration = Duration::from_secs(10);
/// How long etcd may take to tell; the table comes without the ends of leases then.
const TIME_LEFT_WAIT: Duration = Duration::from_secs(1);

/// How long an attach waits for the network where the agent is ready.
const NETWORK_WAIT: Duration = Duration::from_secs(2);

/// How long the reconcile loop may be busy before it counts as stuck. A batch of the largest fleets takes a second or two; `/healthz` must answer
/// before the socket gives a request up.
const ALIVE_WAIT: Duration = Duration::from_secs(8);

/// The agent behind its socket.
pub(super) struct AgentBackend {
    pub(super) queries: mpsc::Sender<Query>,
    pub(super) endpoints: Endpoints<Plugger>,
    pub(super) plugger: Plugger,
    pub(super) mesh: Arc<super::mesh::Shared>,
    pub(super) masquerade: bool,
    pub(super) store: StoreConfig,
    pub(super) time_left: Mutex<Option<TimeLeft>>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) changed: watch::Receiver<u64>,
    pub(super) level: LevelHandle,
}

/// When each etcd lease ends, as far as was known at some moment.
pub(super) struct TimeLeft {
    at: Instant,
    left: BTreeMap<i64, Duration>,
}

impl AgentBackend {
    async fn ask<T>(&self, query: impl FnOnce(oneshot::Sender<T>) -> Query) -> Result<T, ApiError> {
        Query::ask(&self.queries, query).await.ok_or_else(|| ApiError::new(ErrorKind::NotReady, "the agent is ending"))
    }

    /// The status, or that the loop which knows it is stuck.
    async fn ask_in_time(&self) -> Result<api::Status, String> {
        match tokio::time::timeout(ALIVE_WAIT, self.ask(Query::Status)).await {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(_) => Err(format!(
                "the reconcile loop has not turned for {} s: the data path forwards on, but follows nothing any more; restart overlayd, and please \
                 report its log",
                ALIVE_WAIT.as_secs()
            )),
        }
    }

    /// Packets that the guards dropped, by reason; `None` where the kernel does not tell.
    async fn dropped(&self) -> Option<BTreeMap<&'static str, u64>> {
        let plugger = self.plugger.clone();
        let looked = tokio::task::spawn_blocking(move || plugger.dropped()).await;
        match looked.map_err(|error| error.to_string()).and_then(|counted| counted.map_err(|error| error.to_string())) {
            Ok(counted) => Some(counted.into_iter().map(|(counter, packets)| (counter.name(), packets)).collect()),
            Err(error) => {
                tracing::debug!(error, "the counters of dropped packets cannot be read");
                None
            }
        }
    }

    /// Seconds until each of these etcd leases ends; what is not known is not there.
    async fn seconds_left(&self, ids: Vec<i64>) -> BTreeMap<i64, i64> {
        let mut known = self.time_left.lock().await;
        if known.as_ref().is_none_or(|known| known.at.elapsed() > TIME_LEFT_AGE) {
            let left = match tokio::time::timeout(TIME_LEFT_WAIT, store::time_left(&self.store, ids)).await {
                Ok(Ok(left)) => left,
                Ok(Err(error)) => {
                    tracing::debug!(%error, "etcd does not tell when leases end");
                    BTreeMap::new()
                }
                Err(_) => BTreeMap::new(),
            };
            *known = Some(TimeLeft { at: Instant::now(), left });
        }
        let Some(known) = known.as_ref() else { return BTreeMap::new() };
        let age = known.at.elapsed();
        let seconds = |left: Duration| i64::try_from(left.saturating_sub(age).as_secs()).unwrap_or(i64::MAX);
        known.left.iter().map(|(id, left)| (*id, seconds(*left))).collect()
    }
}

impl Backend for AgentBackend {
    async fn status(&self) -> Result<api::Status, ApiError> {
        let mut status = self.ask(Query::Status).await?;
        let stale = self.endpoints.stale();
        if !stale.is_empty() {
            let names: Vec<String> = stale.iter().map(|endpoint| endpoint.name.to_string()).collect();
            status
                .problems
                .push(format!("endpoints with an address outside this host's subnet, restart them: {}", names.join(", ")));
            status.health = status.health.max(api::Health::Degraded);
        }
        status.endpoints = self.endpoints.list().len();
        let dropped = self.dropped().await.unwrap_or_default();
        status.data_path.dropped = dropped.into_iter().map(|(reason, packets)| (reason.to_owned(), packets)).collect();
        Ok(status)
    }

    async fn subnets(&self) -> Result<api::Subnets, ApiError> {
        let rows = self.ask(Query::Subnets).await?;
        let left = self.seconds_left(rows.iter().filter_map(|(_, lease)| *lease).collect()).await;
        let subnets = rows
            .into_iter()
            .map(|(mut entry, lease)| {
                entry.expires_in_seconds = lease.and_then(|id| left.get(&id).copied());
                entry
            })
            .collect();
        Ok(api::Subnets { subnets })
    }

    fn mesh(&self) -> api::Mesh {
        self.mesh.view()
    }

    async fn peers(&self) -> Result<api::Peers, ApiError> {
        self.ask(Query::Peers).await
    }

    async fn endpoints(&self) -> Result<api::Endpoints, ApiError> {
        Ok(api::Endpoints { endpoints: self.endpoints.list() })
    }

    async fn network(&self) -> Result<api::NetworkView, ApiError> {
        let status = self.ask(Query::Status).await?;
        let missing =
            || ApiError::new(ErrorKind::NotReady, "the network's configuration is not there yet: see `overlayctl status`");
        let network = status.network.ok_or_else(missing)?;
        let (plugger, bridge) = (self.plugger.clone(), Device::bridge(network.vxlan.vni));
        let looked = tokio::task::spawn_blocking(move || plugger.view(bridge)).await;
        let internal = |error: &dyn std::fmt::Display| ApiError::new(ErrorKind::Internal, error);
        let mut seen = looked.map_err(|error| internal(&error))?.map_err(|error| internal(&error))?;
        let mut endpoints = self.endpoints.views().await;
        for port in seen.bridge.iter_mut().flat_map(|bridge| &mut bridge.ports) {
            let owner =
                |view: &&mut api::EndpointView| view.endpoint.port.as_ref().is_some_and(|p| p.host_interface == port.interface);
            if let Some(view) = endpoints.iter_mut().find(owner) {
                port.endpoint = Some(view.endpoint.name.clone());
                view.bridge_port = Some(port.number);
                view.counters = Some(port.counters.reversed());
            }
        }
        Ok(api::NetworkView {
            name: "default".to_owned(),
            driver: "vxlan".to_owned(),
            vni: network.vxlan.vni,
            port: network.vxlan.port,
            mtu: status.data_path.mtu,
            masquerade: self.masquerade,
            ipam: self.endpoints.ipam(&network),
            devices: seen.devices,
            bridge: seen.bridge,
            endpoints,
        })
    }

    async fn attach(&self, name: EndpointName, request: api::AttachRequest) -> Result<api::Attached, ApiError> {
        let attach = || self.endpoints.attach(name.clone(), request.clone());
        let outcome = match attach().await {
            // The agent is ready, and its endpoints are about to learn of the network.
            Err(EndpointError::NoSubnet) if self.ready().await.is_ok() => {
                let _known = tokio::time::timeout(NETWORK_WAIT, self.endpoints.network_known()).await;
                attach().await
            }
            outcome => outcome,
        };
        outcome.map_err(api_error)
    }

    async fn detach(&self, name: EndpointName, force: bool) -> Result<api::Detached, ApiError> {
        self.endpoints.detach(name, force).await.map_err(api_error)
    }

    async fn alive(&self) -> Result<(), String> {
        self.ask_in_time().await.map(|_| ())
    }

    async fn ready(&self) -> Result<(), Vec<String>> {
        // Asked rather than remembered: a loop that is stuck would be ready for ever.
        match self.ask_in_time().await {
            Ok(status) if status.ready => Ok(()),
            Ok(status) if status.problems.is_empty() => Err(vec!["the data path is being programmed".to_owned()]),
            Ok(status) => Err(status.problems),
            Err(reason) => Err(vec![reason]),
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changed.clone()
    }

    async fn metrics(&self) -> String {
        if let Some(dropped) = self.dropped().await {
            self.metrics.set_dropped(dropped);
        }
        self.metrics.set_endpoints(self.endpoints.list().len());
        self.mesh.count();
        self.metrics.render()
    }

    fn log_level(&self) -> String {
        self.level.get()
    }

    fn set_log_level(&self, level: &str) -> Result<(), ApiError> {
        self.level.set(level).map_err(|error| ApiError::new(ErrorKind::BadValue, error))?;
        tracing::info!(level, "log level set through the socket");
        Ok(())
    }
}

fn api_error(error: EndpointError) -> ApiError {
    let kind = match error.class() {
        Class::BadValue => ErrorKind::BadValue,
        Class::NotFound => ErrorKind::NotFound,
        Class::Conflict => ErrorKind::Conflict,
        Class::NotReady => ErrorKind::NotReady,
        Class::Internal => ErrorKind::Internal,
    };
    ApiError::new(kind, error)
}
