//! The etcd lease that the subnets of all networks of this host are bound to.
//!
//! All entries that this process writes are bound to one etcd lease: the first that a network uses. An entry that was written
//! with another one, by an earlier agent, keeps it until its value changes. [`HostLease::renew`] renews all that are in use; it
//! is part of the shared task.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tracing::warn;

use super::StoreError;
use super::connect::{Session, StoreConfig, keep_alive_interval};
use crate::backoff::Backoff;

/// Shortest time between two renewals, whatever the TTL.
const MIN_INTERVAL: Duration = Duration::from_millis(100);
/// Delay before a renewal that etcd refused is repeated.
const ERROR_BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(15));

/// The etcd leases in use.
#[derive(Debug)]
pub(super) struct HostLease {
    ttl: Duration,
    keep_alive: Duration,
    /// In the order of their first use.
    leases: Mutex<Vec<Weak<UsedLease>>>,
    /// Held while an etcd lease is granted or revoked, so that networks which start together share one, and none takes one that
    /// another one revokes.
    changing: tokio::sync::Mutex<()>,
    added: Notify,
}

/// An etcd lease. It is in use, and renewed, while a network holds this value.
#[derive(Debug)]
pub(super) struct UsedLease {
    pub(super) id: i64,
    state: watch::Sender<RenewalState>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RenewalState {
    /// Not renewed yet.
    Pending,
    /// Renewed once.
    Renewed,
    /// Expired or revoked.
    Lost,
}

impl UsedLease {
    /// Waits until it was renewed once.
    ///
    /// # Errors
    /// [`StoreError::LeaseNotFound`].
    pub(super) async fn renewed(&self) -> Result<(), StoreError> {
        match self.wait_for(|state| state != RenewalState::Pending).await {
            RenewalState::Lost => Err(StoreError::LeaseNotFound { lease: self.id }),
            _ => Ok(()),
        }
    }

    /// Waits until it has expired or was revoked.
    pub(super) async fn lost(&self) {
        self.wait_for(|state| state == RenewalState::Lost).await;
    }

    async fn wait_for(&self, condition: impl Fn(RenewalState) -> bool) -> RenewalState {
        // The sender is in `self`, so this cannot fail.
        self.state.subscribe().wait_for(|state| condition(*state)).await.map_or(RenewalState::Lost, |state| *state)
    }
}

/// When an etcd lease is renewed next.
struct Schedule {
    /// Not its id: a network that starts again uses the same etcd lease by another value, which waits for a renewal of its own.
    lease: Weak<UsedLease>,
    /// `None` until its TTL was read.
    interval: Option<Duration>,
    due: Instant,
    backoff: Backoff,
}

impl HostLease {
    pub(super) fn new(config: &StoreConfig) -> HostLease {
        HostLease {
            ttl: config.lease_ttl,
            keep_alive: config.keep_alive,
            leases: Mutex::new(Vec::new()),
            changing: tokio::sync::Mutex::new(()),
            added: Notify::new(),
        }
    }

    /// Uses the etcd lease of an entry.
    pub(super) fn use_lease(&self, id: i64) -> Arc<UsedLease> {
        let mut leases = self.lock();
        if let Some(lease) = leases.iter().filter_map(Weak::upgrade).find(|lease| lease.id == id) {
            return lease;
        }
        let lease = Arc::new(UsedLease { id, state: watch::Sender::new(RenewalState::Pending) });
        leases.push(Arc::downgrade(&lease));
        self.added.notify_one();
        lease
    }

    /// The etcd lease for new entries: the first in use, or a new one.
    pub(super) async fn obtain(&self, session: &Session) -> Result<Arc<UsedLease>, StoreError> {
        let _changing = self.changing.lock().await;
        if let Some(lease) = self.common() {
            return Ok(lease);
        }
        Ok(self.use_lease(session.grant(self.ttl).await?))
    }

    /// The first etcd lease in use.
    pub(super) fn common(&self) -> Option<Arc<UsedLease>> {
        self.lock().iter().find_map(Weak::upgrade)
    }

    pub(super) fn is_used(&self, id: i64) -> bool {
        self.lock().iter().any(|lease| lease.upgrade().is_some_and(|lease| lease.id == id))
    }

    /// Tells the networks that use an etcd lease that it has expired or was revoked.
    pub(super) fn set_lost(&self, id: i64) {
        self.set_state(id, RenewalState::Lost);
        self.lock().retain(|lease| lease.upgrade().is_some_and(|lease| lease.id != id));
    }

    /// Revokes an etcd lease that no network uses and no key is bound to. The key can be another network's, which has not started
    /// yet.
    pub(super) async fn revoke_unused(&self, session: &Session, id: i64) -> Result<(), StoreError> {
        let _changing = self.changing.lock().await;
        if self.is_used(id) { Ok(()) } else { session.revoke_unbound(id).await }
    }

    /// Renews the etcd leases in use until the session fails.
    pub(super) async fn renew(&self, session: &Session) -> StoreError {
        let mut random = SmallRng::from_rng(&mut rand::rng());
        let mut schedules: Vec<Schedule> = Vec::new();
        loop {
            let used = self.used();
            schedules.retain(|schedule| used.iter().any(|lease| lease.ptr_eq(&schedule.lease)));
            for lease in used {
                if !schedules.iter().any(|schedule| schedule.lease.ptr_eq(&lease)) {
                    schedules.push(Schedule { lease, interval: None, due: Instant::now(), backoff: ERROR_BACKOFF });
                }
            }
            for schedule in schedules.iter_mut().filter(|schedule| schedule.due <= Instant::now()) {
                let Some(id) = schedule.lease.upgrade().map(|lease| lease.id) else { continue };
                let delay = match self.renew_once(session, id, schedule.interval).await {
                    Ok(interval) => {
                        schedule.backoff.reset();
                        self.set_state(id, RenewalState::Renewed);
                        *schedule.interval.insert(interval)
                    }
                    Err(StoreError::LeaseNotFound { .. }) => {
                        self.set_lost(id);
                        continue;
                    }
                    Err(error) if error.ends_session() => return error,
                    // The etcd lease stays valid; only its renewal is delayed.
                    Err(error) => {
                        warn!(%error, "cannot renew lease; retrying");
                        schedule.backoff.next_delay(&mut random)
                    }
                };
                schedule.due = Instant::now() + delay;
            }
            let next = schedules.iter().map(|schedule| schedule.due).min();
            tokio::select! {
                () = sleep_until(next) => {}
                () = self.added.notified() => {}
            }
        }
    }

    /// Renews an etcd lease. Returns the time until the next renewal, which depends on its TTL.
    async fn renew_once(&self, session: &Session, id: i64, interval: Option<Duration>) -> Result<Duration, StoreError> {
        session.renew(id).await?;
        if let Some(interval) = interval {
            return Ok(interval);
        }
        let ttl = session.time_to_live(id).await?.ok_or(StoreError::LeaseNotFound { lease: id })?.granted;
        Ok(keep_alive_interval(ttl, self.keep_alive).max(MIN_INTERVAL))
    }

    fn used(&self) -> Vec<Weak<UsedLease>> {
        let mut leases = self.lock();
        leases.retain(|lease| lease.strong_count() > 0);
        leases.clone()
    }

    fn set_state(&self, id: i64, new: RenewalState) {
        for lease in self.lock().iter().filter_map(Weak::upgrade).filter(|lease| lease.id == id) {
            lease.state.send_if_modified(|state| std::mem::replace(state, new) != new);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<UsedLease>>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until an instant; forever without one.
async fn sleep_until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
