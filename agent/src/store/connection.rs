//! The connection to etcd that all networks share.
//!
//! [`Shared::run`] is one task. It connects to one server, and then runs the watch stream (`watch_stream`) and the
//! renewal of this host's etcd lease (`host_lease`). If either fails, or a network finds the connection unusable, the session
//! ends for all networks, and the task connects again after a jittered delay. Each network follows the [`Link`].

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::connect::{self, Session, StoreConfig};
use super::host_lease::HostLease;
use super::watch_stream::{self, WatchRequest};
use super::{StoreError, discovery};
use crate::backoff::Backoff;
use crate::metrics::Metrics;

/// Delay before reconnecting.
pub(super) const RECONNECT_BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(15));
/// A connection that lasted this long resets the backoff.
pub(super) const STABLE_AFTER: Duration = Duration::from_secs(10);
/// Number of watches that wait until the server has created those before.
const WATCH_REQUEST_CAPACITY: usize = 16;

/// What the networks share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: StoreConfig,
    pub(super) metrics: Option<Arc<Metrics>>,
    pub(super) host_lease: HostLease,
    link: watch::Sender<Link>,
}

/// The state of the connection.
#[derive(Debug, Clone)]
pub(super) struct Link {
    /// All addresses that the endpoints resolved to since the start.
    pub(super) servers: Arc<BTreeSet<IpAddr>>,
    pub(super) state: LinkState,
}

#[derive(Debug, Clone)]
pub(super) enum LinkState {
    /// No attempt has ended yet, or the task does not run.
    Connecting,
    Up(Arc<SharedSession>),
    Down {
        error: String,
    },
}

/// A session that all networks use.
pub(super) struct SharedSession {
    pub(super) session: Session,
    pub(super) watches: mpsc::Sender<WatchRequest>,
    /// Whether each network reads a snapshot, because the last stream failed at a response.
    pub(super) reread: bool,
    failure: mpsc::Sender<StoreError>,
}

impl fmt::Debug for SharedSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedSession").field("endpoint", &self.session.context.endpoint).finish_non_exhaustive()
    }
}

impl SharedSession {
    /// Ends the session for all networks.
    pub(super) fn end(&self, error: StoreError) {
        // It fails if the session has ended or is ending.
        let _ = self.failure.try_send(error);
    }
}

impl Shared {
    pub(super) fn new(config: StoreConfig, metrics: Option<Arc<Metrics>>) -> Shared {
        let link = Link { servers: Arc::default(), state: LinkState::Connecting };
        Shared { host_lease: HostLease::new(&config), config, metrics, link: watch::Sender::new(link) }
    }

    pub(super) fn link(&self) -> watch::Receiver<Link> {
        self.link.subscribe()
    }

    fn set_state(&self, state: LinkState) {
        self.link.send_modify(|link| link.state = state);
    }

    /// Tells the networks that the connection is down, once per reason.
    fn report_down(&self, new: &str) {
        self.link.send_if_modified(|link| {
            let is_new = !matches!(&link.state, LinkState::Down { error } if error == new);
            link.state = LinkState::Down { error: new.to_owned() };
            is_new
        });
    }

    /// The session, for a single request. Waits while the first attempt to connect is under way.
    pub(super) async fn session(&self) -> Result<Arc<SharedSession>, StoreError> {
        let mut link = self.link();
        let state = link.wait_for(|link| !matches!(link.state, LinkState::Connecting)).await.map(|link| link.state.clone());
        match state {
            Ok(LinkState::Up(session)) => Ok(session),
            Ok(LinkState::Down { error }) => Err(StoreError::NotConnected { error }),
            // The sender is in `self`.
            Ok(LinkState::Connecting) | Err(_) => Err(StoreError::NotConnected { error: String::new() }),
        }
    }

    /// Connects to a server and publishes the addresses of all endpoints first. The agent must not install a route or rule that
    /// makes an etcd server unreachable.
    async fn connect(&self) -> Result<Session, StoreError> {
        let endpoints = self.config.candidates().await?;
        let resolved = discovery::resolve_addresses(&endpoints).await;
        self.link.send_if_modified(|link| {
            let is_new = !resolved.is_subset(&link.servers);
            if is_new {
                Arc::make_mut(&mut link.servers).extend(resolved);
            }
            is_new
        });
        connect::connect_to_any(&self.config, endpoints, self.metrics.as_ref()).await
    }

    /// The task of [`Store::run_connection`](super::Store::run_connection).
    pub(super) async fn run(&self, shutdown: CancellationToken) -> Result<(), StoreError> {
        self.config.validate()?;
        let _disconnect = Disconnect(self);
        tokio::select! {
            biased;
            () = shutdown.cancelled() => Ok(()),
            never = self.keep_connected() => match never {},
        }
    }

    async fn keep_connected(&self) -> Infallible {
        let mut random = SmallRng::from_rng(&mut rand::rng());
        let mut backoff = RECONNECT_BACKOFF;
        let mut last_logged = None;
        let mut reread = false;
        loop {
            let started = Instant::now();
            let error = match self.connect().await {
                Err(error) => error,
                Ok(session) => {
                    last_logged = None;
                    let error = self.run_session(session, reread).await;
                    reread = matches!(error, StoreError::TooLarge { .. } | StoreError::Compacted { .. });
                    error
                }
            };
            if started.elapsed() >= STABLE_AFTER {
                backoff.reset();
            }
            let error = error.to_string();
            if last_logged.as_ref() == Some(&error) {
                debug!(error, "etcd unavailable");
            } else {
                warn!(error, "etcd unavailable; retrying, data path unchanged");
            }
            self.report_down(&error);
            last_logged = Some(error);
            tokio::time::sleep(backoff.next_delay(&mut random)).await;
        }
    }

    /// Serves the networks over a connection until it fails.
    async fn run_session(&self, session: Session, reread: bool) -> StoreError {
        let (watches, requests) = mpsc::channel(WATCH_REQUEST_CAPACITY);
        let (failure, mut failures) = mpsc::channel(1);
        self.set_state(LinkState::Up(Arc::new(SharedSession { session: session.clone(), watches, reread, failure })));
        tokio::select! {
            error = watch_stream::run(&session, requests) => error,
            error = self.host_lease.renew(&session) => error,
            Some(error) = failures.recv() => error,
        }
    }
}

/// Takes the session from the networks when the task ends, however it does.
struct Disconnect<'a>(&'a Shared);

impl Drop for Disconnect<'_> {
    fn drop(&mut self) {
        self.0.set_state(LinkState::Connecting);
    }
}
