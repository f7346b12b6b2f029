//! [`Backend`] of the socket: queries the network and the reconciler, the endpoints for containers, and etcd for the remaining TTLs of leases.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, watch};

use super::queries::Queries;
use super::shared::Host;
use crate::admin::{ApiError, Backend, ErrorKind};
use crate::endpoint::{EndpointError, Endpoints, ErrorClass};
use crate::kernel::PortManager;
use crate::model::endpoint::EndpointName;
use crate::model::{ExpiryId, NetworkName, api};
use crate::plan::backend;

/// How long fetched lease TTLs are reused, which bounds the queries to etcd of `overlayctl subnets --watch`.
const TTL_CACHE_AGE: Duration = Duration::from_secs(10);
/// Time limit of the TTL query; after it the table is served without expiry times.
const TTL_QUERY_TIMEOUT: Duration = Duration::from_secs(1);

/// How long an attach waits for the network if the agent is ready.
const NETWORK_TIMEOUT: Duration = Duration::from_secs(2);

/// How long an attach waits for the network that the host has just joined for it.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the reconcile loop may be busy before it counts as stuck.
///
/// The largest batches take a second or two, and `/healthz` must answer before the socket's request timeout.
const STUCK_LOOP_TIMEOUT: Duration = Duration::from_secs(8);

/// A network of the agent behind its socket.
pub(super) struct AgentBackend {
    pub(super) host: Arc<Host>,
    pub(super) name: NetworkName,
    pub(super) queries: Queries,
    pub(super) endpoints: Endpoints<PortManager>,
    pub(super) port_manager: PortManager,
    pub(super) ttl_cache: Mutex<Option<CachedTtls>>,
}

/// The remaining TTL of each etcd lease at the time of the query.
pub(super) struct CachedTtls {
    fetched_at: Instant,
    remaining: BTreeMap<ExpiryId, Duration>,
}

impl AgentBackend {
    /// Refuses to publish ports in a network without a way in.
    fn check_publish(&self, request: &api::AttachRequest) -> Result<(), ApiError> {
        let is_internal = self.host.records.borrow().get(&self.name).is_some_and(|record| record.internal);
        let Some(port) = request.publish.first().filter(|_| is_internal) else { return Ok(()) };
        let text = format!(
            "port {port} cannot be published: network {} is internal, so nothing outside reaches it; leave --publish out, or attach to \
             another network",
            self.name
        );
        Err(ApiError::new(ErrorKind::BadValue, text))
    }

    /// The answer to an attach.
    fn attached(&self, outcome: Result<api::AttachResponse, EndpointError>) -> Result<api::AttachResponse, ApiError> {
        if outcome.is_ok() && !self.name.is_default() {
            self.host.attached.notify_one();
        }
        outcome.map_err(api_error)
    }

    async fn query_status(&self) -> Result<api::Status, ApiError> {
        self.queries.status().await.ok_or_else(stopping)
    }

    /// The status, or an error if the reconcile loop does not answer.
    async fn query_status_with_timeout(&self) -> Result<api::Status, String> {
        match tokio::time::timeout(STUCK_LOOP_TIMEOUT, self.query_status()).await {
            Ok(response) => response.map_err(|error| error.to_string()),
            Err(_) => Err(format!(
                "the reconcile loop has made no progress for {} s: the data path keeps forwarding, but no longer follows changes; restart \
                 overlayd, and please report its log",
                STUCK_LOOP_TIMEOUT.as_secs()
            )),
        }
    }

    /// Packets dropped by our rules, by reason; `None` if the kernel's counters cannot be read.
    async fn dropped(&self) -> Option<BTreeMap<&'static str, u64>> {
        let port_manager = self.port_manager.clone();
        let result = tokio::task::spawn_blocking(move || port_manager.dropped_packets()).await;
        match result.map_err(|error| error.to_string()).and_then(|counted| counted.map_err(|error| error.to_string())) {
            Ok(counted) => Some(counted.into_iter().map(|(counter, packets)| (counter.name(), packets)).collect()),
            Err(error) => {
                tracing::debug!(error, "cannot read counters of dropped packets");
                None
            }
        }
    }

    /// Seconds until each of these etcd leases expires; leases with an unknown TTL are left out.
    async fn remaining_seconds(&self, ids: Vec<ExpiryId>) -> BTreeMap<ExpiryId, i64> {
        let mut cache = self.ttl_cache.lock().await;
        if cache.as_ref().is_none_or(|cached| cached.fetched_at.elapsed() > TTL_CACHE_AGE) {
            let remaining = match tokio::time::timeout(TTL_QUERY_TIMEOUT, self.host.store.remaining_ttls(ids)).await {
                Ok(Ok(remaining)) => remaining,
                Ok(Err(error)) => {
                    tracing::debug!(%error, "cannot read lease TTLs from etcd");
                    BTreeMap::new()
                }
                Err(_) => BTreeMap::new(),
            };
            *cache = Some(CachedTtls { fetched_at: Instant::now(), remaining });
        }
        let Some(cached) = cache.as_ref() else { return BTreeMap::new() };
        let age = cached.fetched_at.elapsed();
        let seconds = |remaining: Duration| i64::try_from(remaining.saturating_sub(age).as_secs()).unwrap_or(i64::MAX);
        cached.remaining.iter().map(|(id, remaining)| (*id, seconds(*remaining))).collect()
    }
}

impl Backend for AgentBackend {
    async fn status(&self) -> Result<api::Status, ApiError> {
        let mut status = self.query_status().await?;
        let stale = self.endpoints.stale();
        if !stale.is_empty() {
            let names: Vec<String> = stale.iter().map(|endpoint| endpoint.name.to_string()).collect();
            status
                .problems
                .push(format!("endpoints with an address outside this host's subnet, restart them: {}", names.join(", ")));
            status.health = status.health.max(api::Health::Degraded);
        }
        if self.name.is_default() {
            let problems = self.host.join_problems();
            if !problems.is_empty() {
                status.problems.extend(problems);
                status.health = status.health.max(api::Health::Degraded);
            }
        }
        status.endpoints = self.endpoints.list().len();
        let dropped = self.dropped().await.unwrap_or_default();
        status.data_path.dropped = dropped.into_iter().map(|(reason, packets)| (reason.to_owned(), packets)).collect();
        Ok(status)
    }

    async fn subnets(&self) -> Result<api::Subnets, ApiError> {
        let rows = self.queries.subnets().await.ok_or_else(stopping)?;
        let remaining = self.remaining_seconds(rows.iter().filter_map(|(_, lease)| *lease).collect()).await;
        let subnets = rows
            .into_iter()
            .map(|(mut entry, lease)| {
                entry.expires_in_seconds = lease.and_then(|id| remaining.get(&id).copied());
                entry
            })
            .collect();
        Ok(api::Subnets { subnets })
    }

    fn mesh(&self) -> api::Mesh {
        self.host.mesh.view()
    }

    async fn peers(&self) -> Result<api::Peers, ApiError> {
        self.queries.peers().await.ok_or_else(stopping)
    }

    async fn endpoints(&self) -> Result<api::Endpoints, ApiError> {
        Ok(api::Endpoints { endpoints: self.endpoints.list() })
    }

    async fn network(&self) -> Result<api::NetworkView, ApiError> {
        let status = self.query_status().await?;
        let missing =
            || ApiError::new(ErrorKind::NotReady, "the network's configuration is not known yet: see `overlayctl status`");
        let network = status.network.ok_or_else(missing)?;
        let (backend, port_manager) = (backend::of(&network), self.port_manager.clone());
        let (bridge, tunnel) = (backend.bridge(), backend.tunnel());
        let result = tokio::task::spawn_blocking(move || port_manager.snapshot(bridge)).await;
        let internal = |error: &dyn std::fmt::Display| ApiError::new(ErrorKind::Internal, error);
        let mut snapshot = result.map_err(|error| internal(&error))?.map_err(|error| internal(&error))?;
        let mut endpoints = self.endpoints.views().await;
        for port in snapshot.bridge.iter_mut().flat_map(|bridge| &mut bridge.ports) {
            let owner =
                |view: &&mut api::EndpointView| view.endpoint.port.as_ref().is_some_and(|p| p.host_interface == port.interface);
            if let Some(view) = endpoints.iter_mut().find(owner) {
                port.endpoint = Some(view.endpoint.name.clone());
                view.bridge_port = Some(port.number);
                view.counters = Some(port.counters.reversed());
            }
        }
        Ok(api::NetworkView {
            name: self.name.to_string(),
            driver: backend.name().to_owned(),
            vni: tunnel.and_then(|tunnel| tunnel.vni),
            port: tunnel.map(|tunnel| tunnel.port),
            mtu: status.data_path.mtu,
            masquerade: self.host.config.ip_masq,
            ipam: self.endpoints.ipam(&network),
            devices: snapshot.devices,
            bridge: snapshot.bridge,
            endpoints,
        })
    }

    async fn attach(&self, name: EndpointName, request: api::AttachRequest) -> Result<api::AttachResponse, ApiError> {
        let attach = || self.endpoints.attach(name.clone(), request.clone());
        self.check_publish(&request)?;
        let timeout = match attach().await {
            // The host has just joined the network for this container.
            Err(EndpointError::NoSubnet) if !self.name.is_default() => JOIN_TIMEOUT,
            // The agent is ready, so the endpoints receive the network's parameters within moments.
            Err(EndpointError::NoSubnet) if self.ready().await.is_ok() => NETWORK_TIMEOUT,
            outcome => return self.attached(outcome),
        };
        let _known = tokio::time::timeout(timeout, self.endpoints.wait_for_network()).await;
        self.check_publish(&request)?;
        match attach().await {
            Err(EndpointError::NoSubnet) if !self.name.is_default() => {
                let problems = self.ready().await.err().unwrap_or_default().join("; ");
                let text = format!("network {} is not ready on this host: {problems}; repeat the attach", self.name);
                Err(ApiError::new(ErrorKind::NotReady, text))
            }
            outcome => self.attached(outcome),
        }
    }

    async fn detach(&self, name: EndpointName, force: bool) -> Result<api::DetachResponse, ApiError> {
        self.endpoints.detach(name, force).await.map_err(api_error)
    }

    async fn alive(&self) -> Result<(), String> {
        self.query_status_with_timeout().await.map(|_| ())
    }

    async fn ready(&self) -> Result<(), Vec<String>> {
        // Queried rather than cached: a stuck loop would stay ready for ever.
        match self.query_status_with_timeout().await {
            Ok(status) if status.ready => Ok(()),
            Ok(status) if status.problems.is_empty() => Err(vec!["the data path is being programmed".to_owned()]),
            Ok(status) => Err(status.problems),
            Err(reason) => Err(vec![reason]),
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.host.changes.subscribe()
    }

    async fn metrics(&self) -> String {
        if let Some(dropped) = self.dropped().await {
            self.host.metrics.set_dropped(dropped);
        }
        self.host.metrics.set_endpoints(&self.name, self.endpoints.list().len());
        self.host.mesh.update_metrics();
        self.host.metrics.render()
    }

    fn log_level(&self) -> String {
        self.host.level.get()
    }

    fn set_log_level(&self, level: &str) -> Result<(), ApiError> {
        self.host.level.set(level).map_err(|error| ApiError::new(ErrorKind::BadValue, error))?;
        tracing::info!(level, "log level changed through the socket");
        Ok(())
    }
}

/// The answer while the agent stops.
fn stopping() -> ApiError {
    ApiError::new(ErrorKind::NotReady, "the agent is shutting down")
}

fn api_error(error: EndpointError) -> ApiError {
    let kind = match error.class() {
        ErrorClass::InvalidRequest => ErrorKind::BadValue,
        ErrorClass::NotFound => ErrorKind::NotFound,
        ErrorClass::Conflict => ErrorKind::Conflict,
        ErrorClass::NotReady => ErrorKind::NotReady,
        ErrorClass::Internal => ErrorKind::Internal,
    };
    ApiError::new(kind, error)
}
