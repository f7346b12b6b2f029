//! Acquires, renews and releases this host's lease: executes the decisions of [`lease`].
//!
//! Runs concurrently with the watch in the task of [`NetworkStore::run`](super::NetworkStore::run) and never blocks it. It may be
//! dropped at any await: the next snapshot contains every completed write, because the entry names this host. [`HolderState`]
//! only saves work. The etcd lease is that of all networks; [`HostLease`] renews it.

use std::sync::Arc;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::connect::{Session, StoreConfig};
use super::host_lease::{HostLease, UsedLease};
use super::lease::{self, Action, HeldEntry, HeldLease, HolderState, LeaseSnapshot, RETRY_INTERVAL};
use super::renew::{self, Liveness};
use super::watch::{WatchProgress, WatchState, send_event};
use super::write::LeaseBinding;
use super::{StoreError, codec};
use crate::backoff::Backoff;
use crate::model::Subnet;
use crate::model::event::{LeaseOrigin, LeaseRequest, OwnLease, StoreEvent};

/// Backoff after a lost race. Short: the other host has finished, and the next choice is a different subnet.
const RACE_BACKOFF: Backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(500));
/// Backoff after an error response.
const ERROR_BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(15));
/// Timeout for revoking an unused etcd lease at shutdown.
const REVOKE_TIMEOUT: Duration = Duration::from_secs(1);

/// Keeps this host's lease across connections.
pub(super) struct LeaseKeeper<'a> {
    keep_alive: Duration,
    host_lease: &'a HostLease,
    watch_state: &'a WatchState,
    events: mpsc::Sender<StoreEvent>,
    lease_request: watch::Receiver<Option<LeaseRequest>>,
    state: HolderState,
    /// The state that was reported last.
    last_reported: Option<OwnLease>,
    /// The entries are known up to this revision.
    known_revision: i64,
    /// The etcd lease of the held entry.
    held_lease: Option<Arc<UsedLease>>,
    /// The etcd lease for the next write.
    next_lease: Option<Arc<UsedLease>>,
    /// The etcd lease of an entry that was lost or bound to another one.
    stale_lease: Option<i64>,
    /// The etcd lease whose liveness is being checked, and the start of the check.
    probed_lease: Option<(i64, Instant)>,
    random: SmallRng,
    race_backoff: Backoff,
    error_backoff: Backoff,
}

/// What to do after an action.
enum ActionOutcome {
    /// Read a new snapshot.
    Retry,
    /// Read a new snapshot after a short delay: another host was faster.
    LostRace,
    /// Read a new snapshot after this delay, or earlier on a change.
    RetryAfter(Duration),
    /// Hold the entry until a change.
    Hold,
}

impl<'a> LeaseKeeper<'a> {
    pub(super) fn new(
        config: &StoreConfig,
        host_lease: &'a HostLease,
        watch_state: &'a WatchState,
        events: mpsc::Sender<StoreEvent>,
        lease_request: watch::Receiver<Option<LeaseRequest>>,
    ) -> LeaseKeeper<'a> {
        LeaseKeeper {
            keep_alive: config.keep_alive,
            host_lease,
            watch_state,
            events,
            lease_request,
            state: HolderState::default(),
            last_reported: None,
            known_revision: 0,
            held_lease: None,
            next_lease: None,
            stale_lease: None,
            probed_lease: None,
            random: SmallRng::from_rng(&mut rand::rng()),
            race_backoff: RACE_BACKOFF,
            error_backoff: ERROR_BACKOFF,
        }
    }

    /// Acquires and keeps the requested lease until the connection fails.
    pub(super) async fn run(&mut self, session: &Session) -> StoreError {
        let mut address = None;
        loop {
            let request = self.lease_request.borrow_and_update().clone();
            let Some(request) = request else {
                request_changed(&mut self.lease_request).await;
                continue;
            };
            // A family that is added or removed changes no address that the connection may be bound to.
            let before = address.replace(request.public_ip).unwrap_or_default();
            if before.iter().any(|(family, ip)| request.public_ip.get(family).is_some_and(|new| new != ip)) {
                return StoreError::AddressChanged;
            }
            self.watch_state.node_id.send_replace(Some(request.node.id.clone()));
            match self.step(session, &request).await {
                Ok(()) => self.error_backoff.reset(),
                Err(error) if error.ends_session() => return error,
                Err(error) => {
                    if let Err(send_error) = self.report_error(&error).await {
                        return send_error;
                    }
                    let delay = self.error_backoff.next_delay(&mut self.random);
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = request_changed(&mut self.lease_request) => {}
                    }
                }
            }
        }
    }

    /// Revokes an etcd lease that was granted and not used, by any network.
    pub(super) async fn revoke_unused(&mut self, session: &Session) {
        let Some(lease) = self.next_lease.take() else { return };
        let id = lease.id;
        drop(lease);
        if !matches!(tokio::time::timeout(REVOKE_TIMEOUT, self.host_lease.revoke_unused(session, id)).await, Ok(Ok(()))) {
            debug!(etcd_lease = format!("{id:x}"), "unused etcd lease not revoked; it will expire");
        }
    }

    /// Reads a snapshot, decides and executes; returns when the next snapshot is due.
    async fn step(&mut self, session: &Session, request: &LeaseRequest) -> Result<(), StoreError> {
        let snapshot = LeaseSnapshot::from_listing(session.list().await?, &request.node.id);
        self.known_revision = snapshot.revision;
        if let Some((lost, reason)) = self.state.detect_loss(&snapshot, request) {
            warn!(subnet = %lost.lease.subnet, reason, "lease lost; acquiring a new one");
            self.stale_lease = lost.lease.etcd_lease.or(self.stale_lease);
            self.held_lease = None;
            self.report_state(OwnLease::NotHeld { reason }).await?;
        }
        if let Some(id) = self.stale_lease.take_if(|id| !snapshot.entries.iter().any(|entry| entry.etcd_lease == Some(*id)))
            && let Err(error) = self.host_lease.revoke_unused(session, id).await
        {
            debug!(%error, "etcd lease of the lost entry not revoked; it will expire");
        }
        let step = lease::decide(&snapshot, request, &self.state);
        debug!(revision = snapshot.revision, attempt = self.state.attempt, ?step, "decided");
        match self.execute(session, request, snapshot, step).await? {
            ActionOutcome::Retry => Ok(()),
            ActionOutcome::LostRace => {
                let delay = self.race_backoff.next_delay(&mut self.random);
                tokio::time::sleep(delay).await;
                Ok(())
            }
            ActionOutcome::RetryAfter(delay) => {
                self.watch_state.held_key.send_replace(None);
                self.held_lease = None;
                self.revoke_unused(session).await;
                self.wait_for_change(delay).await;
                Ok(())
            }
            ActionOutcome::Hold => self.hold_until_change(request).await,
        }
    }

    /// Waits for a new lease request, an entry that was removed after the snapshot, or the end of the delay.
    async fn wait_for_change(&mut self, delay: Duration) {
        let known_revision = self.known_revision;
        let mut progress = self.watch_state.progress.subscribe();
        let removed = wait_until(&mut progress, |current| current.removal_revision > known_revision);
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = request_changed(&mut self.lease_request) => {}
            () = removed => {}
        }
    }

    async fn execute(
        &mut self,
        session: &Session,
        request: &LeaseRequest,
        snapshot: LeaseSnapshot,
        action: Action,
    ) -> Result<ActionOutcome, StoreError> {
        match action {
            Action::Keep(held) => {
                self.watch_state.held_key.send_replace(Some(held.key.clone()));
                let watched_revision = self.watch_state.progress.borrow().revision;
                if watched_revision > snapshot.revision {
                    // The watch has already passed the snapshot's revision, at a time when it did not track this entry.
                    drop(snapshot);
                    let current = session.get_entry(&held.key).await?;
                    if current.is_none_or(|entry| entry.mod_revision != held.mod_revision) {
                        return Ok(ActionOutcome::Retry);
                    }
                    // Another entry of this host that came after the snapshot is not known: the wait ends at once then.
                }
                self.record_held(held);
                Ok(ActionOutcome::Hold)
            }
            Action::Write(mut held) => {
                drop(snapshot);
                // An entry with an etcd lease of its own, of an earlier agent, moves to the common one.
                if held.lease.etcd_lease.is_some()
                    && let Some(common) = self.host_lease.common().filter(|common| Some(common.id) != held.lease.etcd_lease)
                {
                    self.stale_lease = held.lease.etcd_lease.replace(common.id);
                    self.next_lease = Some(common);
                }
                self.overwrite(session, request, held).await
            }
            Action::TakeOver(mut held) => {
                let from = snapshot.entry(&held.key).and_then(|entry| entry.owner.node.clone()).map(|node| node.name);
                info!(subnet = %held.lease.subnet, from, "taking over lease with this host's public IP");
                drop(snapshot);
                if held.lease.etcd_lease.is_some() {
                    held.lease.etcd_lease = Some(self.obtain(session).await?);
                }
                self.overwrite(session, request, held).await
            }
            Action::Acquire { subnet, compare_all } => self.acquire(session, request, &snapshot, subnet, compare_all).await,
            Action::Release { key, mod_revision, etcd_lease, reason } => {
                warn!(key, reason, "releasing lease");
                if self.state.held.as_ref().is_some_and(|held| held.key == key) {
                    self.state.held = None;
                    self.held_lease = None;
                    self.report_state(OwnLease::NotHeld { reason }).await?;
                }
                let deleted = session.remove(&key, mod_revision).await?;
                if let (true, Some(id)) = (deleted, etcd_lease) {
                    self.host_lease.revoke_unused(session, id).await?;
                }
                Ok(if deleted { ActionOutcome::Retry } else { ActionOutcome::LostRace })
            }
            Action::VerifyLiveness { key, mod_revision, etcd_lease, reason } => {
                drop(snapshot);
                self.state.forget_held();
                self.held_lease = None;
                self.verify_liveness(session, (key, mod_revision), etcd_lease, reason).await
            }
            Action::RetryLater { reason } => {
                self.state.forget_held();
                self.report_not_held(reason).await?;
                Ok(ActionOutcome::RetryAfter(RETRY_INTERVAL))
            }
            Action::Idle if self.state.held.is_some() => Ok(ActionOutcome::Hold),
            Action::Idle => Ok(ActionOutcome::RetryAfter(RETRY_INTERVAL)),
        }
    }

    /// Writes this host's value into an existing entry, unless it was changed since the snapshot.
    async fn overwrite(
        &mut self,
        session: &Session,
        request: &LeaseRequest,
        mut held: HeldEntry,
    ) -> Result<ActionOutcome, StoreError> {
        self.watch_state.held_key.send_replace(Some(held.key.clone()));
        let binding = match held.lease.etcd_lease {
            Some(id) if self.next_lease.as_ref().is_some_and(|next| next.id == id) => LeaseBinding::To(id),
            _ => LeaseBinding::Keep,
        };
        let written = session.overwrite(&held.key, Self::encode_lease(session, request)?, binding, held.mod_revision).await;
        match self.expired_as_lost_race(written)? {
            None => Ok(ActionOutcome::LostRace),
            Some(revision) => {
                held.mod_revision = revision;
                info!(subnet = %held.lease.subnet, reservation = held.lease.etcd_lease.is_none(), "lease written");
                self.record_held(held);
                Ok(ActionOutcome::Hold)
            }
        }
    }

    /// Creates a new entry in one transaction, which fails if another host was faster.
    async fn acquire(
        &mut self,
        session: &Session,
        request: &LeaseRequest,
        snapshot: &LeaseSnapshot,
        subnet: Subnet,
        compare_all: bool,
    ) -> Result<ActionOutcome, StoreError> {
        let etcd_lease = self.obtain(session).await?;
        let key = subnet.to_key();
        let config = snapshot.config.as_ref().map_or(0, |config| config.mod_revision);
        let max_create_revision = compare_all.then_some(snapshot.revision);
        self.watch_state.held_key.send_replace(Some(key.clone()));
        let written = session.create(&key, Self::encode_lease(session, request)?, etcd_lease, config, max_create_revision).await;
        let Some(mod_revision) = self.expired_as_lost_race(written)? else {
            debug!(%subnet, attempt = self.state.attempt, "lost race for subnet");
            self.state.attempt = self.state.attempt.saturating_add(1);
            return Ok(ActionOutcome::LostRace);
        };
        match self.state.last_subnet.or(request.preferred) {
            Some(last) if last != subnet => {
                warn!(from = %last, to = %subnet, "THIS HOST'S SUBNET HAS CHANGED: the old one is allocated or outside the network");
            }
            _ => info!(%subnet, "acquired free subnet"),
        }
        let lease = HeldLease { subnet, etcd_lease: Some(etcd_lease), origin: LeaseOrigin::Acquired };
        self.record_held(HeldEntry { key, mod_revision, lease });
        Ok(ActionOutcome::Hold)
    }

    /// This host's value as JSON.
    fn encode_lease(session: &Session, request: &LeaseRequest) -> Result<String, StoreError> {
        codec::encode(&lease::lease_value(request)).map_err(|error| StoreError::RequestFailed {
            endpoint: session.context.endpoint.clone(),
            what: "write this host's lease",
            detail: error.to_string(),
        })
    }

    /// Treats an etcd lease that expired before the write as a lost race.
    fn expired_as_lost_race(&mut self, result: Result<Option<i64>, StoreError>) -> Result<Option<i64>, StoreError> {
        if let Err(StoreError::LeaseNotFound { .. }) = result
            && let Some(next) = self.next_lease.take()
        {
            self.host_lease.set_lost(next.id);
            return Ok(None);
        }
        result
    }

    /// Returns the etcd lease for the next write.
    async fn obtain(&mut self, session: &Session) -> Result<i64, StoreError> {
        let next = match self.next_lease.take() {
            Some(next) => next,
            None => self.host_lease.obtain(session).await?,
        };
        Ok(self.next_lease.insert(next).id)
    }

    /// Checks whether the holder of an entry that may be this host's is alive.
    async fn verify_liveness(
        &mut self,
        session: &Session,
        entry: (String, i64),
        etcd_lease: i64,
        reason: String,
    ) -> Result<ActionOutcome, StoreError> {
        let now = Instant::now();
        let since = match self.probed_lease {
            Some((id, since)) if id == etcd_lease => since,
            _ => now,
        };
        self.probed_lease = Some((etcd_lease, since));
        // Another network of this host renews it. After an overwrite, the other host may do so.
        if self.state.contender.is_none() && self.host_lease.is_used(etcd_lease) {
            self.state.dead_entry = Some(entry);
            return Ok(ActionOutcome::Retry);
        }
        let Some(ttl) = session.time_to_live(etcd_lease).await? else {
            // Expired: etcd deletes the entry shortly.
            return Ok(ActionOutcome::LostRace);
        };
        let (reason, recheck_after) = match renew::liveness(ttl, self.keep_alive, now - since) {
            Liveness::Dead => {
                info!(key = entry.0, "entry's holder has stopped renewing");
                self.state.dead_entry = Some(entry);
                self.probed_lease = None;
                return Ok(ActionOutcome::Retry);
            }
            Liveness::Alive { recheck_after } => (reason, recheck_after),
            Liveness::Unknown { recheck_after } => {
                (format!("{reason}; checking whether it still renews its lease"), recheck_after)
            }
        };
        self.report_not_held(reason).await?;
        Ok(ActionOutcome::RetryAfter(recheck_after))
    }

    /// Records the held entry.
    fn record_held(&mut self, held: HeldEntry) {
        self.held_lease = held.lease.etcd_lease.map(|id| self.host_lease.use_lease(id));
        self.next_lease.take_if(|next| Some(next.id) == held.lease.etcd_lease);
        self.stale_lease.take_if(|stale| Some(*stale) == held.lease.etcd_lease);
        self.probed_lease = None;
        self.state = HolderState { last_subnet: Some(held.lease.subnet), held: Some(held), ..HolderState::default() };
        self.race_backoff.reset();
    }

    /// Holds the entry until it, its etcd lease or the lease request changes.
    async fn hold_until_change(&mut self, request: &LeaseRequest) -> Result<(), StoreError> {
        let Some(held) = self.state.held.clone() else { return Ok(()) };
        let lease = self.held_lease.clone();
        if let Some(lease) = &lease
            && let Err(StoreError::LeaseNotFound { lease: id }) = lease.renewed().await
        {
            return Err(self.handle_expired(&held, id).await?);
        }
        self.report_state(OwnLease::Held(held.lease.to_event())).await?;
        let known_revision = self.known_revision.max(held.mod_revision);
        let mut progress = self.watch_state.progress.subscribe();
        loop {
            let entry_changed = wait_until(&mut progress, |current| current.held_revision > known_revision);
            tokio::select! {
                () = entry_changed => return Ok(()),
                () = request_changed(&mut self.lease_request) => {
                    if self.lease_request.borrow_and_update().as_ref().is_some_and(|new| new != request) {
                        return Ok(());
                    }
                }
                id = lost(lease.as_deref()) => return Err(self.handle_expired(&held, id).await?),
            }
        }
    }

    /// Handles the loss of the held entry's etcd lease; etcd deletes the entry with it.
    async fn handle_expired(&mut self, held: &HeldEntry, id: i64) -> Result<StoreError, StoreError> {
        let reason = format!("the etcd lease of {} has expired or was revoked", held.lease.subnet);
        warn!(subnet = %held.lease.subnet, etcd_lease = format!("{id:x}"), "etcd lease expired or revoked");
        self.state.forget_held();
        self.held_lease = None;
        self.report_state(OwnLease::NotHeld { reason }).await?;
        Ok(StoreError::LeaseNotFound { lease: id })
    }

    /// Reports an error that prevents holding the lease.
    async fn report_error(&mut self, error: &StoreError) -> Result<(), StoreError> {
        match error {
            StoreError::LeaseNotFound { .. } | StoreError::Compacted { .. } => Ok(()),
            // The held lease stays valid; only its change or renewal is delayed.
            _ if self.state.held.is_some() => {
                warn!(%error, "cannot update lease; retrying");
                Ok(())
            }
            _ => self.report_not_held(error.to_string()).await,
        }
    }

    /// Reports that no lease is held, and logs a new reason.
    async fn report_not_held(&mut self, reason: String) -> Result<(), StoreError> {
        let not_held = OwnLease::NotHeld { reason };
        if self.last_reported.as_ref() != Some(&not_held)
            && let OwnLease::NotHeld { reason } = &not_held
        {
            warn!(reason, "no lease held");
        }
        self.report_state(not_held).await
    }

    /// Reports the state of the lease if it changed.
    async fn report_state(&mut self, own: OwnLease) -> Result<(), StoreError> {
        if self.last_reported.as_ref() != Some(&own) {
            self.last_reported = Some(own.clone());
            send_event(&self.events, StoreEvent::Own(own)).await?;
        }
        Ok(())
    }
}

/// Waits for a new lease request; never returns once the sender is dropped.
async fn request_changed(request: &mut watch::Receiver<Option<LeaseRequest>>) {
    if request.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits until an etcd lease has expired or was revoked, and returns it; never returns without one.
async fn lost(lease: Option<&UsedLease>) -> i64 {
    let Some(lease) = lease else { return std::future::pending().await };
    lease.lost().await;
    lease.id
}

/// Waits until the watch's progress satisfies the predicate.
async fn wait_until(progress: &mut watch::Receiver<WatchProgress>, predicate: impl FnMut(&WatchProgress) -> bool) {
    // The sender in `WatchState` outlives every receiver, so this cannot fail.
    let _ = progress.wait_for(predicate).await;
}

#[cfg(test)]
mod tests;
