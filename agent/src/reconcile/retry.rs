//! Retry queue: entries that the kernel rejected or that are contended, each with jittered back-off.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::drift::CONTENTION_WINDOW;
use crate::model::api::FailedOp;
use crate::plan::diff::stage;
use crate::plan::{Key, LinkKind, Op, OpError, Value};

/// Shortest and longest pause before a retry.
const MIN_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Pending retries by entry.
#[derive(Debug)]
pub(super) struct RetryQueue {
    pending: BTreeMap<Key, Pending>,
    /// Returns a random fraction for the jitter.
    random: fn() -> f64,
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

/// Whether the reconciler of another network namespace makes the link, usually within milliseconds.
fn is_made_elsewhere(op: &Op) -> bool {
    matches!(op, Op::Set(_, Value::Link(link)) if link.kind == LinkKind::Pair(None))
}

impl RetryQueue {
    /// An empty queue. `random` returns a fraction from 0 to 1.
    pub(super) fn new(random: fn() -> f64) -> RetryQueue {
        RetryQueue { pending: BTreeMap::new(), random }
    }

    /// Schedules a retry of an op that the kernel rejected. `cause` is the failed entry that the op depends on.
    pub(super) fn record_failure(&mut self, op: &Op, error: OpError, cause: Option<Key>, now: Instant) {
        let attempts = self.pending.get(op.key()).map_or(0, |pending| pending.attempts) + 1;
        // Logged at the first failure, then each time the pause has grown eightfold, to limit the log.
        if let Some(cause) = &cause {
            tracing::debug!(op = %op, errno = error.errno, error = %error, attempts, %cause, "entry rejected because of another failed entry");
        } else if attempts == 1 && is_made_elsewhere(op) {
            tracing::debug!(op = %op, error = %error, "waiting for the other end of a veth pair");
        } else if attempts == 1 || attempts.is_multiple_of(3) {
            tracing::warn!(op = %op, errno = error.errno, error = %error, attempts, "kernel rejected an entry, retrying");
        }
        let due = self.retry_at(attempts, now);
        self.pending.insert(op.key().clone(), Pending { entry: op.to_string(), error: error.message, attempts, due, cause });
    }

    /// Schedules the repair of a contended entry. `excess` is the number of repairs beyond the threshold.
    pub(super) fn record_contention(&mut self, key: &Key, repairs: u32, excess: u32, now: Instant) {
        let error = format!(
            "changed by another process {repairs} times within {} s: find it with `ip monitor`",
            CONTENTION_WINDOW.as_secs()
        );
        let due = self.retry_at(excess, now);
        self.pending.insert(key.clone(), Pending { entry: key.to_string(), error, attempts: excess, due, cause: None });
    }

    /// Time of the retry after `attempts` attempts.
    fn retry_at(&self, attempts: u32, now: Instant) -> Instant {
        let pause = MIN_BACKOFF.saturating_mul(1 << attempts.clamp(1, 12)).min(MAX_BACKOFF);
        now + pause.mul_f64((1.0 + (self.random)()) / 2.0)
    }

    /// Makes the retry of an entry due now, if it is pending.
    pub(super) fn make_due(&mut self, key: &Key, now: Instant) {
        if let Some(entry) = self.pending.get_mut(key) {
            entry.due = now;
        }
    }

    /// Reschedules every due entry. Due entries that produced an op in this round are already rescheduled or no longer pending.
    pub(super) fn reschedule_due(&mut self, now: Instant) {
        for key in self.due_keys(now) {
            let attempts = self.pending.get(&key).map_or(0, |entry| entry.attempts) + 1;
            let due = self.retry_at(attempts, now);
            if let Some(entry) = self.pending.get_mut(&key) {
                (entry.attempts, entry.due) = (attempts, due);
            }
        }
    }

    /// Removes the pending retries that depend on these entries, which are set now. Returns the keys to set.
    pub(super) fn release_dependents(&mut self, causes: &BTreeSet<Key>) -> Vec<Key> {
        let is_dependent = |pending: &Pending| pending.cause.as_ref().is_some_and(|cause| causes.contains(cause));
        let keys: Vec<Key> =
            self.pending.iter().filter(|(_, pending)| is_dependent(pending)).map(|(key, _)| key.clone()).collect();
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

    /// Removes the pending entries that match.
    pub(super) fn remove_all(&mut self, matches: impl Fn(&Key) -> bool) {
        self.pending.retain(|key, _| !matches(key));
    }

    /// Whether an entry's retry is not due yet.
    pub(super) fn is_backing_off(&self, key: &Key, now: Instant) -> bool {
        self.pending.get(key).is_some_and(|pending| pending.due > now)
    }

    /// The entries whose retry is due.
    pub(super) fn due_keys(&self, now: Instant) -> Vec<Key> {
        self.pending.iter().filter(|(_, pending)| pending.due <= now).map(|(key, _)| key.clone()).collect()
    }

    /// Time of the next retry.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.pending.values().map(|pending| pending.due).min()
    }

    /// The pending entries.
    pub(super) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.pending.keys()
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
        all.sort_by_key(|(key, pending)| (pending.cause.is_some(), stage(key)));
        let failed = |pending: &Pending| FailedOp {
            entry: pending.entry.clone(),
            error: pending.error.clone(),
            attempts: pending.attempts,
        };
        all.into_iter().take(limit).map(|(_, pending)| failed(pending)).collect()
    }

    /// Number of pending entries that no other failed entry causes.
    pub(super) fn root_failure_count(&self) -> usize {
        self.pending.values().filter(|pending| pending.cause.is_none()).count()
    }

    /// Error of a pending entry.
    pub(super) fn error_of(&self, key: &Key) -> Option<&str> {
        self.pending.get(key).map(|pending| pending.error.as_str())
    }
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
        let (mut queue, now) = (RetryQueue::new(|| 0.5), Instant::now());
        queue.record_failure(&op("ipv4/a"), kernel_error(), None, now);
        let due = queue.next_due().expect("a retry");
        queue.reschedule_due(due - Duration::from_millis(1));
        assert_eq!(queue.next_due(), Some(due), "not due yet");
        queue.reschedule_due(due);
        assert_eq!(queue.next_due(), Some(due + MIN_BACKOFF * 3), "twice the base pause, with half the jitter");
        assert_eq!(queue.list_failures(1)[0].attempts, 2);
    }

    #[test]
    fn recovered_cause_releases_dependents() {
        let (mut queue, now) = (RetryQueue::new(|| 0.5), Instant::now());
        let [a, b, c] = ["ipv4/a", "ipv4/b", "ipv4/c"].map(op);
        queue.record_failure(&a, kernel_error(), Some(c.key().clone()), now);
        queue.record_failure(&b, kernel_error(), None, now);
        queue.record_failure(&c, kernel_error(), None, now);
        assert_eq!((queue.len(), queue.root_failure_count()), (3, 2));
        let entries: Vec<String> = queue.list_failures(10).into_iter().map(|failed| failed.entry).collect();
        assert_eq!(entries, [&b, &c, &a].map(ToString::to_string));
        assert!(queue.record_success(c.key()));
        assert_eq!(queue.release_dependents(&BTreeSet::from([c.key().clone()])), [a.key().clone()]);
        assert_eq!(queue.len(), 1);
    }
}
