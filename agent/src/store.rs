//! The etcd cluster, as this host sees it: the network's configuration, every host's lease, and this host's own. Only here is
//! `etcd-client` named.
//!
//! [`Store::run`] is one task. In it the watch (`watch`) and the lease holder (`hold`) run side by side over one connection to one
//! server; where either fails, both are dropped and start again over a new connection, after a jittered wait. Neither spawns anything.
//!
//! ```text
//!               wish                          StoreEvent
//!   reconcile ---------> hold --+-> etcd      (bounded)
//!                          ^    |         watch ---------> reconcile
//!                          +----+--- board --+
//! ```
//!
//! | file | holds |
//! | --- | --- |
//! | `connect` | settings, endpoints, TLS, login, timeouts; `discovery` finds endpoints by DNS |
//! | `next_keys`, `codec` | keys and values of the flannel v3 schema |
//! | `read`, `watch` | everything at one revision, page by page; then every change |
//! | `lease`, `by_family` | what to do about the own lease, as pure functions |
//! | `hold`, `write`, `renew` | doing it: transactions, renewal, proof of life |
//! | `oneshot` | single requests for programs without an agent; `clock` asks a server what time it is |

use std::collections::BTreeSet;
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

mod certificate;
mod clock;
mod codec;
mod connect;
mod discovery;
mod error;
mod keys;
mod lease;
mod lease_keeper;
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
pub use oneshot::{
    ConfigText, MemberStatus, ReleaseReport, ReplaceCondition, Snapshot, get_config, member_status, put_config, read_all,
    release, remaining_ttls,
};

/// Waiting before connecting again.
const RECONNECT_BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(15));
/// A connection that lasted this long was a good one: the next wait is short again.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// The store, for an agent.
#[derive(Debug, Clone)]
pub struct Store {
    config: StoreConfig,
    metrics: Option<Arc<Metrics>>,
}

impl Store {
    /// A store with these settings. Nothing is connected yet.
    pub fn new(config: StoreConfig) -> Store {
        Store { config, metrics: None }
    }

    /// The same, with its round trips counted.
    pub fn with_metrics(self, metrics: Arc<Metrics>) -> Store {
        Store { metrics: Some(metrics), ..self }
    }

    /// Hands on what happens in the store, and takes and keeps the lease that is wished, until the token is cancelled. An etcd that
    /// cannot be reached is no error: it is told as [`Connection::Down`] and tried again, whatever its answer was.
    ///
    /// Ending does not give the lease back: the data path goes on, and the next start finds it again.
    ///
    /// # Errors
    /// Settings that no retry can heal (see [`StoreConfig::validate`]), or [`StoreError::ReceiverClosed`].
    pub async fn run(
        &self,
        events: mpsc::Sender<StoreEvent>,
        lease_request: latest::Receiver<Option<LeaseRequest>>,
        shutdown: CancellationToken,
    ) -> Result<(), StoreError> {
        self.config.validate()?;
        let watch_state = watch::WatchState::new();
        let mut watcher = watch::Watcher::new();
        let mut keeper = lease_keeper::LeaseKeeper::new(&self.config, &watch_state, events.clone(), lease_request);
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
                            error = keeper.run(session) => error,
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
                    Some(Connection::Down { error: ref known }) if *known == error => debug!(error, "etcd cannot be used"),
                    _ => warn!(error, "etcd cannot be used, trying again; the data path stays as it is"),
                }
                if let Err(gone) = watcher.report_down(error, &mut last_reported, &events).await {
                    return gone;
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
            keeper.revoke_unused(session).await;
        }
        result
    }

    /// Connects to a server, and hands on the addresses of all before: what this host makes unreachable must not be among them.
    async fn connect(
        &self,
        servers: &mut BTreeSet<IpAddr>,
        events: &mpsc::Sender<StoreEvent>,
    ) -> Result<connect::Session, StoreError> {
        let endpoints = self.config.candidates().await?;
        let known = servers.len();
        servers.extend(discovery::resolve_addresses(&endpoints).await);
        if servers.len() > known {
            events.send(StoreEvent::Servers(servers.clone())).await.map_err(|_| StoreError::ReceiverClosed)?;
        }
        connect::connect_to_any(&self.config, endpoints, self.metrics.as_ref()).await
    }

    /// Hands on what happens in the store until the token is cancelled, without a lease.
    ///
    /// # Errors
    /// As [`Store::run`].
    pub async fn watch(&self, events: mpsc::Sender<StoreEvent>, shutdown: CancellationToken) -> Result<(), StoreError> {
        let (_nobody, lease_request) = latest::channel(None);
        self.run(events, lease_request, shutdown).await
    }
}

#[cfg(test)]
mod tests;
