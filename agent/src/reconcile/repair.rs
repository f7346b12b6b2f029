//! Which entries wait for another try, and who keeps changing them: jittered back-off for what the kernel refuses, and a bounded rate for what
//! others undo again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rand::RngExt;

use crate::model::api::{Drift, FailedOp};
use crate::plan::diff::stage;
use crate::plan::{Key, Op, OpError};

/// The first and the longest pause before another try.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Repairs of one entry within [`FIGHT_WINDOW`] that are taken for accidents; from then on it is a fight.
const FIGHT_REPAIRS: u32 = 10;
const FIGHT_WINDOW: Duration = Duration::from_secs(10);
/// So many entries' repairs are remembered before the old ones are looked for.
const REMEMBERED: usize = 4096;

/// The entries that are not as they should be for a known reason, and the account of repairs.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    waiting: BTreeMap<Key, Waiting>,
    fights: BTreeMap<Key, Fight>,
    /// How many repairs were still of use when the old ones were last forgotten.
    lasting: usize,
    count: u64,
    last: Option<Drift>,
}

#[derive(Debug)]
struct Waiting {
    entry: String,
    error: String,
    attempts: u32,
    due: Instant,
    /// The failed entry that this one stands on: it cannot be set before that one is.
    cause: Option<Key>,
}

#[derive(Debug)]
struct Fight {
    since: Instant,
    repairs: u32,
    at: u64,
}

impl Repairs {
    /// The kernel refused an op: it is retried later. `cause` is the failed entry that it stands on.
    pub(super) fn failed(&mut self, op: &Op, error: OpError, cause: Option<Key>) {
        let attempts = self.waiting.get(op.key()).map_or(0, |w| w.attempts) + 1;
        // Once at the first failure, then each time the pause has grown eightfold: a log that tells and does not flood.
        if let Some(cause) = &cause {
            tracing::debug!(op = %op, errno = error.errno, error = %error, attempts, %cause, "entry refused because of another one");
        } else if attempts == 1 || attempts.is_multiple_of(3) {
            tracing::warn!(op = %op, errno = error.errno, error = %error, attempts, "the kernel refused an entry, trying again");
        }
        self.wait(op.key().clone(), op.to_string(), error.message, attempts, cause);
    }

    fn wait(&mut self, key: Key, entry: String, error: String, attempts: u32, cause: Option<Key>) {
        let due = retry_at(attempts);
        self.waiting.insert(key, Waiting { entry, error, attempts, due, cause });
    }

    /// Gives every due entry another pause. Due entries that produced an op in this round have a new pause already, or wait no longer.
    pub(super) fn rearm(&mut self, now: Instant) {
        for waiting in self.waiting.values_mut().filter(|waiting| waiting.due <= now) {
            waiting.attempts += 1;
            waiting.due = retry_at(waiting.attempts);
        }
    }

    /// Stops waiting with what stands on these entries, which are set now. Returns what to set.
    pub(super) fn release(&mut self, causes: &BTreeSet<Key>) -> Vec<Key> {
        let freed = |waiting: &Waiting| waiting.cause.as_ref().is_some_and(|cause| causes.contains(cause));
        let keys: Vec<Key> = self.waiting.iter().filter(|(_, waiting)| freed(waiting)).map(|(key, _)| key.clone()).collect();
        keys.iter().for_each(|key| self.forget(key));
        keys
    }

    /// The entry is as it should be. Returns whether it had been waiting.
    pub(super) fn succeeded(&mut self, key: &Key) -> bool {
        self.waiting.remove(key).is_some()
    }

    /// What is wanted has changed: old failures say nothing any more.
    pub(super) fn forget(&mut self, key: &Key) {
        self.waiting.remove(key);
    }

    /// The same for every entry.
    pub(super) fn forget_all(&mut self) {
        self.waiting.clear();
    }

    /// Others changed an entry of ours. Returns whether it is to be put back at once; otherwise it waits.
    pub(super) fn drifted(&mut self, key: &Key) -> bool {
        let (now, at) = (Instant::now(), unix_time());
        self.count += 1;
        self.last = Some(Drift { entry: key.to_string(), at });
        let fight = self.fights.entry(key.clone()).or_insert(Fight { since: now, repairs: 0, at });
        if now.duration_since(fight.since) > FIGHT_WINDOW {
            *fight = Fight { since: now, repairs: 0, at };
        }
        fight.repairs += 1;
        fight.at = at;
        let repairs = fight.repairs;
        // Not before there are twice as many as lasted: where thousands drift at once, none of them is old, and each would look through all.
        if self.fights.len() > REMEMBERED.max(2 * self.lasting) {
            self.fights.retain(|_, fight| now.duration_since(fight.since) <= FIGHT_WINDOW);
            self.lasting = self.fights.len();
        }
        if repairs <= FIGHT_REPAIRS {
            return true;
        }
        if repairs == FIGHT_REPAIRS + 1 {
            tracing::error!(entry = %key, repairs, "something on this host keeps undoing an entry: it is put back at a bounded rate from now on");
        }
        let error =
            format!("changed by others {repairs} times within {} s: find who does it with `ip monitor`", FIGHT_WINDOW.as_secs());
        self.wait(key.clone(), key.to_string(), error, repairs - FIGHT_REPAIRS, None);
        false
    }

    /// Whether an entry waits at this moment.
    pub(super) fn holds_back(&self, key: &Key, now: Instant) -> bool {
        self.waiting.get(key).is_some_and(|waiting| waiting.due > now)
    }

    /// The entries whose pause is over.
    pub(super) fn due(&self, now: Instant) -> Vec<Key> {
        self.waiting.iter().filter(|(_, waiting)| waiting.due <= now).map(|(key, _)| key.clone()).collect()
    }

    /// When the next pause is over.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.waiting.values().map(|waiting| waiting.due).min()
    }

    /// Forgets entries that wait although nothing is wrong with them any more.
    pub(super) fn settle(&mut self, is_right: impl Fn(&Key) -> bool) {
        self.waiting.retain(|key, _| !is_right(key));
    }

    /// Whether an entry of some kind waits.
    pub(super) fn any(&self, wanted: impl Fn(&Key) -> bool) -> bool {
        self.waiting.keys().any(wanted)
    }

    /// How many entries wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether this entry waits.
    pub(super) fn waits(&self, key: &Key) -> bool {
        self.waiting.contains_key(key)
    }

    /// At most `most` of the entries that wait, for the status: causes before what follows from them, in the order in which entries are set.
    pub(super) fn failures(&self, most: usize) -> Vec<FailedOp> {
        let mut all: Vec<(&Key, &Waiting)> = self.waiting.iter().collect();
        all.sort_by_key(|(key, waiting)| (waiting.cause.is_some(), stage(key)));
        let failed = |w: &Waiting| FailedOp { entry: w.entry.clone(), error: w.error.clone(), attempts: w.attempts };
        all.into_iter().take(most).map(|(_, waiting)| failed(waiting)).collect()
    }

    /// How many of the entries that wait do so for a reason of their own.
    pub(super) fn causes(&self) -> usize {
        self.waiting.values().filter(|waiting| waiting.cause.is_none()).count()
    }

    /// Why one entry waits.
    pub(super) fn failure(&self, key: &Key) -> Option<&str> {
        self.waiting.get(key).map(|w| w.error.as_str())
    }

    /// The entries that others change again and again at present, with how often.
    pub(super) fn fights(&self) -> impl Iterator<Item = (&Key, u32)> {
        let lasts = |fight: &Fight| fight.repairs > FIGHT_REPAIRS && fight.since.elapsed() <= FIGHT_WINDOW;
        self.fights.iter().filter(move |(_, fight)| lasts(fight)).map(|(key, fight)| (key, fight.repairs))
    }

    /// Number of repairs since the start.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// The last repair.
    pub(super) fn last(&self) -> Option<&Drift> {
        self.last.as_ref()
    }

    /// When one entry was put back last, in seconds since the epoch; repairs are remembered for a while only.
    pub(super) fn last_of(&self, key: &Key) -> Option<u64> {
        self.fights.get(key).map(|fight| fight.at)
    }
}

/// When an entry is retried after so many attempts.
fn retry_at(attempts: u32) -> Instant {
    let pause = FIRST_PAUSE.saturating_mul(1 << attempts.clamp(1, 12)).min(LONGEST_PAUSE);
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

    fn refused() -> OpError {
        OpError { errno: 12, message: "cannot allocate memory".to_owned() }
    }

    #[test]
    fn due_entry_is_rearmed_with_a_longer_pause() {
        let mut repairs = Repairs::default();
        repairs.failed(&op("ipv4/a"), refused(), None);
        let due = repairs.next_due().expect("a retry");
        repairs.rearm(due - Duration::from_millis(1));
        assert_eq!(repairs.next_due(), Some(due), "not due yet");
        repairs.rearm(due);
        assert!(repairs.next_due().is_some_and(|next| next > due && next > Instant::now()));
        assert_eq!(repairs.failures(1)[0].attempts, 2);
    }

    #[test]
    fn cause_comes_first_and_frees_what_stands_on_it() {
        let mut repairs = Repairs::default();
        let [a, b, c] = ["ipv4/a", "ipv4/b", "ipv4/c"].map(op);
        repairs.failed(&a, refused(), Some(c.key().clone()));
        repairs.failed(&b, refused(), None);
        repairs.failed(&c, refused(), None);
        assert_eq!((repairs.len(), repairs.causes()), (3, 2));
        let entries: Vec<String> = repairs.failures(10).into_iter().map(|failed| failed.entry).collect();
        assert_eq!(entries, [&b, &c, &a].map(ToString::to_string));
        assert!(repairs.succeeded(c.key()));
        assert_eq!(repairs.release(&BTreeSet::from([c.key().clone()])), [a.key().clone()]);
        assert_eq!(repairs.len(), 1);
    }
}
