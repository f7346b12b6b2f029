//! Retry queue of failed entries, and contention with other processes.
//!
//! Entries that the kernel rejects are retried with jittered back-off. Entries that another process keeps changing are restored
//! at a bounded rate.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rand::RngExt;

use crate::model::api::{Drift, FailedOp};
use crate::plan::diff::stage;
use crate::plan::{Key, Op, OpError};

/// Shortest and longest pause before a retry.
const MIN_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Repairs of one entry within [`CONTENTION_WINDOW`] above which the entry counts as contended.
const CONTENTION_THRESHOLD: u32 = 10;
const CONTENTION_WINDOW: Duration = Duration::from_secs(10);
/// Number of entries with tracked repairs above which old ones are pruned.
const MAX_TRACKED_REPAIRS: usize = 4096;

/// Pending retries by entry, and statistics of repairs.
#[derive(Debug, Default)]
pub(super) struct RetryQueue {
    pending: BTreeMap<Key, Pending>,
    contention: BTreeMap<Key, Contention>,
    /// Number of tracked entries that the last pruning kept.
    live_after_prune: usize,
    repair_count: u64,
    last_drift: Option<Drift>,
}

#[derive(Debug)]
struct Pending {
    entry: String,
    error: String,
    attempts: u32,
    due: Instant,
    /// The failed entry that this one depends on: it has to be set first.
    cause: Option<Key>,
}

#[derive(Debug)]
struct Contention {
    since: Instant,
    repairs: u32,
    last_repair_at: u64,
}

impl RetryQueue {
    /// Schedules a retry of an op that the kernel rejected. `cause` is the failed entry that the op depends on.
    pub(super) fn record_failure(&mut self, op: &Op, error: OpError, cause: Option<Key>) {
        let attempts = self.pending.get(op.key()).map_or(0, |w| w.attempts) + 1;
        // Logged at the first failure, then each time the pause has grown eightfold, to limit the log.
        if let Some(cause) = &cause {
            tracing::debug!(op = %op, errno = error.errno, error = %error, attempts, %cause, "entry rejected because of another failed entry");
        } else if attempts == 1 || attempts.is_multiple_of(3) {
            tracing::warn!(op = %op, errno = error.errno, error = %error, attempts, "kernel rejected an entry, retrying");
        }
        self.schedule(op.key().clone(), op.to_string(), error.message, attempts, cause);
    }

    fn schedule(&mut self, key: Key, entry: String, error: String, attempts: u32, cause: Option<Key>) {
        let due = retry_at(attempts);
        self.pending.insert(key, Pending { entry, error, attempts, due, cause });
    }

    /// Reschedules every due entry. Due entries that produced an op in this round are already rescheduled or no longer pending.
    pub(super) fn reschedule_due(&mut self, now: Instant) {
        for waiting in self.pending.values_mut().filter(|waiting| waiting.due <= now) {
            waiting.attempts += 1;
            waiting.due = retry_at(waiting.attempts);
        }
    }

    /// Removes the pending retries that depend on these entries, which are set now. Returns the keys to set.
    pub(super) fn release_dependents(&mut self, causes: &BTreeSet<Key>) -> Vec<Key> {
        let is_dependent = |waiting: &Pending| waiting.cause.as_ref().is_some_and(|cause| causes.contains(cause));
        let keys: Vec<Key> =
            self.pending.iter().filter(|(_, waiting)| is_dependent(waiting)).map(|(key, _)| key.clone()).collect();
        keys.iter().for_each(|key| self.remove(key));
        keys
    }

    /// Removes an entry that was set. Returns whether it was pending.
    pub(super) fn record_success(&mut self, key: &Key) -> bool {
        self.pending.remove(key).is_some()
    }

    /// Removes an entry whose desired value changed, which makes earlier failures irrelevant.
    pub(super) fn remove(&mut self, key: &Key) {
        self.pending.remove(key);
    }

    /// Removes every pending entry.
    pub(super) fn clear(&mut self) {
        self.pending.clear();
    }

    /// Records a change of our entry by another process. Returns whether to restore it at once; otherwise it is scheduled.
    pub(super) fn record_drift(&mut self, key: &Key) -> bool {
        let (now, at) = (Instant::now(), unix_time());
        self.repair_count += 1;
        self.last_drift = Some(Drift { entry: key.to_string(), at });
        let contention = self.contention.entry(key.clone()).or_insert(Contention { since: now, repairs: 0, last_repair_at: at });
        if now.duration_since(contention.since) > CONTENTION_WINDOW {
            *contention = Contention { since: now, repairs: 0, last_repair_at: at };
        }
        contention.repairs += 1;
        contention.last_repair_at = at;
        let repairs = contention.repairs;
        // Only once their number has doubled: if thousands drift at once, none is old, and each call would scan all of them.
        if self.contention.len() > MAX_TRACKED_REPAIRS.max(2 * self.live_after_prune) {
            self.contention.retain(|_, fight| now.duration_since(fight.since) <= CONTENTION_WINDOW);
            self.live_after_prune = self.contention.len();
        }
        if repairs <= CONTENTION_THRESHOLD {
            return true;
        }
        if repairs == CONTENTION_THRESHOLD + 1 {
            tracing::error!(entry = %key, repairs, "another process keeps changing an entry; limiting the rate of repairs");
        }
        let error = format!(
            "changed by another process {repairs} times within {} s: find it with `ip monitor`",
            CONTENTION_WINDOW.as_secs()
        );
        self.schedule(key.clone(), key.to_string(), error, repairs - CONTENTION_THRESHOLD, None);
        false
    }

    /// Whether an entry's retry is not due yet.
    pub(super) fn is_backing_off(&self, key: &Key, now: Instant) -> bool {
        self.pending.get(key).is_some_and(|waiting| waiting.due > now)
    }

    /// The entries whose retry is due.
    pub(super) fn due_keys(&self, now: Instant) -> Vec<Key> {
        self.pending.iter().filter(|(_, waiting)| waiting.due <= now).map(|(key, _)| key.clone()).collect()
    }

    /// Time of the next retry.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.pending.values().map(|waiting| waiting.due).min()
    }

    /// Drops pending entries that are in sync by now.
    pub(super) fn prune_satisfied(&mut self, is_in_sync: impl Fn(&Key) -> bool) {
        self.pending.retain(|key, _| !is_in_sync(key));
    }

    /// Whether any pending key matches.
    pub(super) fn any(&self, wanted: impl Fn(&Key) -> bool) -> bool {
        self.pending.keys().any(wanted)
    }

    /// Number of pending entries.
    pub(super) fn len(&self) -> usize {
        self.pending.len()
    }

    /// Whether no entry is pending.
    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Whether this entry is pending.
    pub(super) fn contains(&self, key: &Key) -> bool {
        self.pending.contains_key(key)
    }

    /// At most `limit` pending entries for the status: causes before their dependents, in the order in which entries are set.
    pub(super) fn list_failures(&self, limit: usize) -> Vec<FailedOp> {
        let mut all: Vec<(&Key, &Pending)> = self.pending.iter().collect();
        all.sort_by_key(|(key, waiting)| (waiting.cause.is_some(), stage(key)));
        let failed = |w: &Pending| FailedOp { entry: w.entry.clone(), error: w.error.clone(), attempts: w.attempts };
        all.into_iter().take(limit).map(|(_, waiting)| failed(waiting)).collect()
    }

    /// Number of pending entries that no other failed entry causes.
    pub(super) fn root_failure_count(&self) -> usize {
        self.pending.values().filter(|waiting| waiting.cause.is_none()).count()
    }

    /// Error of a pending entry.
    pub(super) fn error_of(&self, key: &Key) -> Option<&str> {
        self.pending.get(key).map(|w| w.error.as_str())
    }

    /// The entries under contention now, with their numbers of repairs.
    pub(super) fn contended(&self) -> impl Iterator<Item = (&Key, u32)> {
        let is_contended =
            |fight: &Contention| fight.repairs > CONTENTION_THRESHOLD && fight.since.elapsed() <= CONTENTION_WINDOW;
        self.contention.iter().filter(move |(_, fight)| is_contended(fight)).map(|(key, fight)| (key, fight.repairs))
    }

    /// Number of repairs since the start.
    pub(super) fn repair_count(&self) -> u64 {
        self.repair_count
    }

    /// The last repair.
    pub(super) fn last_drift(&self) -> Option<&Drift> {
        self.last_drift.as_ref()
    }

    /// Time of an entry's last repair, in seconds since the epoch; old repairs are forgotten.
    pub(super) fn last_repair_of(&self, key: &Key) -> Option<u64> {
        self.contention.get(key).map(|fight| fight.last_repair_at)
    }
}

/// Time of the retry after `attempts` attempts.
fn retry_at(attempts: u32) -> Instant {
    let pause = MIN_BACKOFF.saturating_mul(1 << attempts.clamp(1, 12)).min(MAX_BACKOFF);
    Instant::now() + pause.mul_f64(rand::rng().random_range(0.5..1.0))
}

/// Seconds since the epoch.
fn unix_time() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Value;

    fn op(path: &str) -> Op {
        Op::Set(Key::Sysctl(path.into()), Value::Sysctl("1".into()))
    }

    fn kernel_error() -> OpError {
        OpError { errno: 12, message: "cannot allocate memory".to_owned() }
    }

    #[test]
    fn due_entry_is_rescheduled_with_longer_backoff() {
        let mut queue = RetryQueue::default();
        queue.record_failure(&op("ipv4/a"), kernel_error(), None);
        let due = queue.next_due().expect("a retry");
        queue.reschedule_due(due - Duration::from_millis(1));
        assert_eq!(queue.next_due(), Some(due), "not due yet");
        queue.reschedule_due(due);
        assert!(queue.next_due().is_some_and(|next| next > due && next > Instant::now()));
        assert_eq!(queue.list_failures(1)[0].attempts, 2);
    }

    #[test]
    fn recovered_cause_releases_dependents() {
        let mut queue = RetryQueue::default();
        let [a, b, c] = ["ipv4/a", "ipv4/b", "ipv4/c"].map(op);
        queue.record_failure(&a, kernel_error(), Some(c.key().clone()));
        queue.record_failure(&b, kernel_error(), None);
        queue.record_failure(&c, kernel_error(), None);
        assert_eq!((queue.len(), queue.root_failure_count()), (3, 2));
        let entries: Vec<String> = queue.list_failures(10).into_iter().map(|failed| failed.entry).collect();
        assert_eq!(entries, [&b, &c, &a].map(ToString::to_string));
        assert!(queue.record_success(c.key()));
        assert_eq!(queue.release_dependents(&BTreeSet::from([c.key().clone()])), [a.key().clone()]);
        assert_eq!(queue.len(), 1);
    }
}
