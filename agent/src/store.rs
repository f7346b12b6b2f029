//! etcd client: watches the network's configuration and all leases, and keeps this host's lease. Only this module uses
//! `etcd-client`.
//!
//! [`Store::run`] is one task. It runs the watch (`watch`) and the lease keeper (`lease_keeper`) concurrently over one connection
//! to one server. If either fails, both are dropped and restarted over a new connection after a jittered delay. Neither spawns a
//! task.
//!
//! ```text
//!   reconcile --LeaseRequest--> lease_keeper --> etcd --> watch --StoreEvent (bounded)--> reconcile
//!                                     ^                      |
//!                                     +----- WatchState -----+
//! ```
//!
//! | file | contents |
//! | --- | --- |
//! | `connect` | settings, endpoints, TLS, login, timeouts; `discovery`: endpoints by DNS; `certificate`: expiry dates |
//! | `keys`, `codec` | keys and values of the flannel v3 schema |
//! | `read`, `watch` | a paged snapshot at one revision; then every change after it |
//! | `lease`, `pick` | decisions about this host's lease, as pure functions |
//! | `lease_keeper`, `write`, `renew` | their execution: transactions, renewal, liveness checks of another lease's holder |
//! | `networks` | the networks' records: read at one revision, written and removed in one transaction each |
//! | `oneshot` | single requests for programs without an agent; `clock` reads an etcd server's clock |

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::{mpsc, watch as latest};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::backoff::Backoff;
use crate::metrics::Metrics;
use crate::model::event::{Connection, LeaseRequest, StoreEvent};
use crate::model::{ExpiryId, NetworkName, NetworkRecord};

mod certificate;
mod clock;
mod codec;
mod connect;
mod discovery;
mod error;
mod keys;
mod lease;
mod lease_keeper;
mod network;
mod networks;
mod oneshot;
mod pick;
mod read;
mod renew;
mod watch;
mod write;

pub use clock::server_clock;
pub use codec::{MAX_NODE_ID, MAX_NODE_NAME, MAX_VALUE, read_entry};
pub use connect::StoreConfig;
pub use error::StoreError;
pub use keys::{DEFAULT_PREFIX, Keys};
pub use network::NetworkStore;
pub use networks::{NetworkError, Networks, WriteKind, WrittenNetwork, read_networks, remove_network, write_network};
pub use oneshot::{
    ConfigText, MemberStatus, ReleaseReport, ReplaceCondition, Snapshot, get_config, member_status, put_config, read_all,
    release, remaining_ttls,
};

/// Delay before reconnecting.
const RECONNECT_BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(15));
/// A connection that lasted this long resets the backoff.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// The agent's etcd client.
#[derive(Debug, Clone)]
pub struct Store {
    config: StoreConfig,
    metrics: Option<Arc<Metrics>>,
}

impl Store {
    /// Creates a store with these settings. Does not connect.
    pub fn new(config: StoreConfig) -> Store {
        Store { config, metrics: None }
    }

    /// Records the duration and result of each request in `metrics`.
    pub fn with_metrics(self, metrics: Arc<Metrics>) -> Store {
        Store { metrics: Some(metrics), ..self }
    }

    /// The shared part of all networks: connects, reconnects, and renews this host's etcd lease until the token is cancelled.
    /// Exactly one task runs this. Networks can start and stop while it runs.
    ///
    /// # Errors
    /// Invalid settings, which no retry can fix (see [`StoreConfig::validate`]).
    pub async fn run_connection(&self, shutdown: CancellationToken) -> Result<(), StoreError> {
        self.config.validate()?;
        shutdown.cancelled().await;
        Ok(())
    }

    /// A network's part of the store, which uses the shared connection, watch stream and etcd lease.
    pub fn network(&self, name: &NetworkName) -> NetworkStore {
        NetworkStore::new(self.clone(), name.clone())
    }

    /// Reads a network's record over the shared connection.
    ///
    /// # Errors
    /// [`NetworkError::Missing`] with the names of the present networks, [`NetworkError::Invalid`], or
    /// [`StoreError::NotConnected`].
    pub async fn read_network(&self, name: &NetworkName) -> Result<NetworkRecord, NetworkError> {
        let networks = read_networks(&self.config).await?;
        match networks.set.networks.get(name) {
            Some(Ok(record)) => Ok(record.clone()),
            Some(Err(errors)) => Err(NetworkError::Invalid { name: name.clone(), errors: errors.clone() }),
            None => Err(networks.missing(name)),
        }
    }

    /// Reads the remaining TTLs of these etcd leases, of any networks, over the shared connection. An expired lease is missing
    /// from the result.
    ///
    /// # Errors
    /// Any error of a request, or [`StoreError::NotConnected`].
    pub async fn remaining_ttls(&self, ids: Vec<ExpiryId>) -> Result<BTreeMap<ExpiryId, Duration>, StoreError> {
        remaining_ttls(&self.config, ids).await
    }

    /// Sends store events and keeps the requested lease until the token is cancelled. An unreachable etcd is not an error: it is
    /// reported as [`Connection::Down`] and retried, whatever its answer was.
    ///
    /// The lease is kept on return: the data path continues, and the next start reuses the lease.
    ///
    /// # Errors
    /// Invalid settings, which no retry can fix (see [`StoreConfig::validate`]), or [`StoreError::ReceiverClosed`].
    pub async fn run(
        &self,
        events: mpsc::Sender<StoreEvent>,
        lease_request: latest::Receiver<Option<LeaseRequest>>,
        shutdown: CancellationToken,
    ) -> Result<(), StoreError> {
        self.config.validate()?;
        let watch_state = watch::WatchState::new();
        let mut watcher = watch::Watcher::new();
        let mut lease_keeper = lease_keeper::LeaseKeeper::new(&self.config, &watch_state, events.clone(), lease_request);
        let mut random = SmallRng::from_rng(&mut rand::rng());
        let mut backoff = RECONNECT_BACKOFF;
        let mut last_reported: Option<Connection> = None;
        let mut last_session = None;
        let mut servers = BTreeSet::new();
        let work = async {
            loop {
                let started = Instant::now();
                let error = match self.connect(&mut servers, &events).await {
                    Err(error) => error,
                    Ok(session) => {
                        let session = &*last_session.insert(session);
                        tokio::select! {
                            error = watcher.run(session, &watch_state, &events) => error,
                            error = lease_keeper.run(session) => error,
                        }
                    }
                };
                if matches!(error, StoreError::ReceiverClosed) {
                    return error;
                }
                if watcher.is_connected() {
                    last_reported = None;
                }
                if started.elapsed() >= STABLE_AFTER {
                    backoff.reset();
                }
                let error = error.to_string();
                match last_reported {
                    Some(Connection::Down { error: ref last }) if *last == error => debug!(error, "etcd unavailable"),
                    _ => warn!(error, "etcd unavailable; retrying, data path unchanged"),
                }
                if let Err(send_error) = watcher.report_down(error, &mut last_reported, &events).await {
                    return send_error;
                }
                tokio::time::sleep(backoff.next_delay(&mut random)).await;
            }
        };
        let result = tokio::select! {
            biased;
            () = shutdown.cancelled() => Ok(()),
            error = work => Err(error),
        };
        if let Some(session) = &last_session {
            lease_keeper.revoke_unused(session).await;
        }
        result
    }

    /// Connects to a server and sends the addresses of all endpoints first. The agent must not install a route or rule that makes
    /// an etcd server unreachable.
    async fn connect(
        &self,
        servers: &mut BTreeSet<IpAddr>,
        events: &mpsc::Sender<StoreEvent>,
    ) -> Result<connect::Session, StoreError> {
        let endpoints = self.config.candidates().await?;
        let known_count = servers.len();
        servers.extend(discovery::resolve_addresses(&endpoints).await);
        if servers.len() > known_count {
            events.send(StoreEvent::Servers(servers.clone())).await.map_err(|_| StoreError::ReceiverClosed)?;
        }
        connect::connect_to_any(&self.config, endpoints, self.metrics.as_ref()).await
    }

    /// Sends store events until the token is cancelled, without a lease.
    ///
    /// # Errors
    /// As [`Store::run`].
    pub async fn watch(&self, events: mpsc::Sender<StoreEvent>, shutdown: CancellationToken) -> Result<(), StoreError> {
        let (_sender, lease_request) = latest::channel(None);
        self.run(events, lease_request, shutdown).await
    }
}

#[cfg(test)]
mod tests;
