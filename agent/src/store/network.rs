//! A network's part of the store: its watch and its lease, over the connection that all networks share.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::StoreError;
use super::connection::{Link, LinkState, RECONNECT_BACKOFF, STABLE_AFTER, Shared, SharedSession};
use super::keys::Keys;
use super::lease_keeper::LeaseKeeper;
use super::oneshot::{ReleaseReport, release_entries};
use super::watch::{WatchState, Watcher, send_event};
use crate::model::NetworkName;
use crate::model::event::{Connection, LeaseRequest, StoreEvent};

/// The etcd client of one network. [`Store::run_connection`](super::Store::run_connection) must run.
#[derive(Debug, Clone)]
pub struct NetworkStore {
    shared: Arc<Shared>,
    name: NetworkName,
}

impl NetworkStore {
    pub(super) fn new(shared: Arc<Shared>, name: NetworkName) -> NetworkStore {
        NetworkStore { shared, name }
    }

    /// Sends the network's events and keeps the requested lease until the token is cancelled. An unreachable etcd is not an
    /// error: it is reported as [`Connection::Down`] and retried, whatever its answer was.
    ///
    /// The lease is kept on return: the data path continues, and the next start reuses the lease. [`Self::release`] gives it
    /// back.
    ///
    /// # Errors
    /// Invalid settings, which no retry can fix (see [`StoreConfig::validate`](super::StoreConfig::validate)), or
    /// [`StoreError::ReceiverClosed`].
    pub async fn run(
        &self,
        events: mpsc::Sender<StoreEvent>,
        lease_request: watch::Receiver<Option<LeaseRequest>>,
        shutdown: CancellationToken,
    ) -> Result<(), StoreError> {
        let shared = &self.shared;
        let keys = shared.config.validate()?.network(&self.name);
        let watch_state = WatchState::new();
        let mut lease_keeper = LeaseKeeper::new(&shared.config, &shared.host_lease, &watch_state, events.clone(), lease_request);
        let mut last_session = None;
        let follow = self.follow(keys, &watch_state, &mut lease_keeper, &mut last_session, &events);
        let result = tokio::select! {
            biased;
            () = shutdown.cancelled() => Ok(()),
            error = follow => Err(error),
        };
        if let Some(session) = &last_session {
            lease_keeper.revoke_unused(&session.session).await;
        }
        result
    }

    /// Follows the connection's state, and uses each session, until the events' receiver is dropped.
    async fn follow(
        &self,
        keys: Keys,
        watch_state: &WatchState,
        lease_keeper: &mut LeaseKeeper<'_>,
        last_session: &mut Option<Arc<SharedSession>>,
        events: &mpsc::Sender<StoreEvent>,
    ) -> StoreError {
        let mut watcher = Watcher::new();
        let mut link = self.shared.link();
        let mut servers = BTreeSet::new();
        let mut last_reported = None;
        let mut random = SmallRng::from_rng(&mut rand::rng());
        let mut backoff = RECONNECT_BACKOFF;
        loop {
            let Link { servers: known_servers, state } = link.borrow_and_update().clone();
            if let Err(error) = report_servers(&known_servers, &mut servers, events).await {
                return error;
            }
            let shared = match state {
                LinkState::Up(shared) => shared,
                LinkState::Connecting => {
                    changed(&mut link).await;
                    continue;
                }
                LinkState::Down { error } => {
                    if watcher.is_connected() {
                        last_reported = None;
                    }
                    if let Err(error) = watcher.report_down(error, &mut last_reported, events).await {
                        return error;
                    }
                    changed(&mut link).await;
                    continue;
                }
            };
            let session = shared.session.of_network(keys.clone());
            if last_session.as_ref().is_none_or(|last| !Arc::ptr_eq(last, &shared)) {
                watcher.begin_session(&session, shared.reread);
                *last_session = Some(Arc::clone(&shared));
            }
            let started = Instant::now();
            let error = tokio::select! {
                biased;
                () = changed(&mut link) => continue,
                error = watcher.run(&session, &shared.watches, watch_state, events) => error,
                error = lease_keeper.run(&session) => error,
            };
            if matches!(error, StoreError::ReceiverClosed) {
                return error;
            }
            if error.ends_session() || matches!(error, StoreError::Unavailable { .. }) {
                shared.end(error);
                changed(&mut link).await;
                continue;
            }
            // An error of this network alone, for example a missing permission.
            if started.elapsed() >= STABLE_AFTER {
                backoff.reset();
            }
            if watcher.is_connected() {
                last_reported = None;
            }
            let error = error.to_string();
            match last_reported {
                Some(Connection::Down { error: ref last }) if *last == error => {
                    debug!(network = %self.name, error, "cannot watch")
                }
                _ => warn!(network = %self.name, error, "cannot watch the network; retrying, data path unchanged"),
            }
            if let Err(error) = watcher.report_down(error, &mut last_reported, events).await {
                return error;
            }
            tokio::select! {
                () = changed(&mut link) => {}
                () = tokio::time::sleep(backoff.next_delay(&mut random)) => {}
            }
        }
    }

    /// Leaves the network after [`Self::run`] has ended: deletes the entries of the host with this identity. Reservations stay.
    /// The etcd lease stays for other networks; without another entry it is revoked.
    ///
    /// # Errors
    /// Any error of a request. The caller repeats it until it succeeds, because the entries do not expire while this host renews
    /// their etcd lease for another network.
    pub async fn release(&self, node_id: &str) -> Result<ReleaseReport, StoreError> {
        let shared = self.shared.session().await?;
        let session = shared.session.of_network(shared.session.keys.network(&self.name));
        let host_lease = &self.shared.host_lease;
        release_entries(&session, node_id, |id| host_lease.revoke_unused(&session, id)).await
    }
}

/// Waits until the connection's state changes. The sender outlives the network's store.
async fn changed(link: &mut watch::Receiver<Link>) {
    if link.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Sends the servers' addresses if there are new ones.
async fn report_servers(
    known: &BTreeSet<IpAddr>,
    reported: &mut BTreeSet<IpAddr>,
    events: &mpsc::Sender<StoreEvent>,
) -> Result<(), StoreError> {
    if known == reported {
        return Ok(());
    }
    reported.clone_from(known);
    send_event(events, StoreEvent::Servers(known.clone())).await
}
