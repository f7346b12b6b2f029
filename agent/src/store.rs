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
//! | `keys`, `codec` | keys and values of the flannel v3 schema |
//! | `read`, `watch` | everything at one revision, page by page; then every change |
//! | `lease`, `pick` | what to do about the own lease, as pure functions |
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
use crate::model::event::{Connection, LeaseWish, StoreEvent};

mod certificate;
mod clock;
mod codec;
mod connect;
mod discovery;
mod error;
mod hold;
mod keys;
mod lease;
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
    ConfigText, Member, Released, Replace, Snapshot, get_config, member, put_config, read_all, release, time_left,
};

/// Waiting before connecting again.
const RECONNECT: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(15));
/// A connection that lasted this long was a good one: the next wait is short again.
const GOOD: Duration = Duration::from_secs(10);

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
    pub fn counted(self, metrics: Arc<Metrics>) -> Store {
        Store { metrics: Some(metrics), ..self }
    }

    /// Hands on what happens in the store, and takes and keeps the lease that is wished, until the token is cancelled. An etcd that
    /// cannot be reached is no error: it is told as [`Connection::Down`] and tried again, whatever its answer was.
    ///
    /// Ending does not give the lease back: the data path goes on, and the next start finds it again.
    ///
    /// # Errors
    /// Settings that no retry can heal (see [`StoreConfig::validate`]), or [`StoreError::ReceiverGone`].
    pub async fn run(
        &self,
        events: mpsc::Sender<StoreEvent>,
        wish: latest::Receiver<Option<LeaseWish>>,
        shutdown: CancellationToken,
    ) -> Result<(), StoreError> {
        self.config.validate()?;
        let board = watch::Board::new();
        let mut follower = watch::Follower::new();
        let mut holder = hold::Holder::new(&self.config, &board, events.clone(), wish);
        let mut random = SmallRng::from_rng(&mut rand::rng());
        let mut wait = RECONNECT;
        let mut told: Option<Connection> = None;
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
                            error = follower.run(session, &board, &events) => error,
                            error = holder.run(session) => error,
                        }
                    }
                };
                if matches!(error, StoreError::ReceiverGone) {
                    return error;
                }
                if follower.connected() {
                    told = None;
                }
                if started.elapsed() >= GOOD {
                    wait.reset();
                }
                let error = error.to_string();
                match told {
                    Some(Connection::Down { error: ref known }) if *known == error => debug!(error, "etcd cannot be used"),
                    _ => warn!(error, "etcd cannot be used, trying again; the data path stays as it is"),
                }
                if let Err(gone) = follower.down(error, &mut told, &events).await {
                    return gone;
                }
                tokio::time::sleep(wait.next_delay(&mut random)).await;
            }
        };
        let ended = tokio::select! {
            biased;
            () = shutdown.cancelled() => Ok(()),
            error = work => Err(error),
        };
        if let Some(session) = &last_session {
            holder.leave(session).await;
        }
        ended
    }

    /// Connects to a server, and hands on the addresses of all before: what this host makes unreachable must not be among them.
    async fn connect(
        &self,
        servers: &mut BTreeSet<IpAddr>,
        events: &mpsc::Sender<StoreEvent>,
    ) -> Result<connect::Session, StoreError> {
        let endpoints = self.config.candidates().await?;
        let known = servers.len();
        servers.extend(discovery::addresses(&endpoints).await);
        if servers.len() > known {
            events.send(StoreEvent::Servers(servers.clone())).await.map_err(|_| StoreError::ReceiverGone)?;
        }
        connect::connect_to_any(&self.config, endpoints, self.metrics.as_ref()).await
    }

    /// Hands on what happens in the store until the token is cancelled, without a lease.
    ///
    /// # Errors
    /// As [`Store::run`].
    pub async fn watch(&self, events: mpsc::Sender<StoreEvent>, shutdown: CancellationToken) -> Result<(), StoreError> {
        let (_nobody, wish) = latest::channel(None);
        self.run(events, wish, shutdown).await
    }
}

#[cfg(test)]
mod tests;
