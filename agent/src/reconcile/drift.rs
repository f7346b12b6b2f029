//! Changes of our entries by other processes: their number, the last one, and entries that are changed again and again.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::api::Drift;
use crate::plan::Key;

/// Repairs of one entry within [`CONTENTION_WINDOW`] above which the entry counts as contended.
const CONTENTION_THRESHOLD: u32 = 10;
/// Time within which repairs of one entry count together.
pub(super) const CONTENTION_WINDOW: Duration = Duration::from_secs(10);
/// Number of entries with tracked repairs above which old ones are pruned.
const MAX_TRACKED_REPAIRS: usize = 4096;

/// Statistics of repairs.
#[derive(Debug, Default)]
pub(super) struct DriftLog {
    repairs: BTreeMap<Key, Repairs>,
    /// Number of tracked entries that the last pruning kept.
    live_after_prune: usize,
    count: u64,
    last: Option<Drift>,
}

/// The repairs of one entry.
#[derive(Debug)]
struct Repairs {
    since: Instant,
    count: u32,
    last_at: u64,
}

/// What follows from a drift.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Restore the entry at once.
    Restore,
    /// The entry is contended: restore it with a delay.
    Contended {
        /// Number of repairs within [`CONTENTION_WINDOW`].
        repairs: u32,
        /// Number of repairs beyond the threshold.
        excess: u32,
    },
}

impl DriftLog {
    /// Records a change of our entry by another process, `at` seconds after the epoch.
    pub(super) fn record(&mut self, key: &Key, now: Instant, at: u64) -> Verdict {
        self.count += 1;
        self.last = Some(Drift { entry: key.to_string(), at });
        let entry = self.repairs.entry(key.clone()).or_insert(Repairs { since: now, count: 0, last_at: at });
        if now.duration_since(entry.since) > CONTENTION_WINDOW {
            *entry = Repairs { since: now, count: 0, last_at: at };
        }
        entry.count += 1;
        entry.last_at = at;
        let repairs = entry.count;
        // Only once their number has doubled: if thousands drift at once, none is old, and each call would scan all of them.
        if self.repairs.len() > MAX_TRACKED_REPAIRS.max(2 * self.live_after_prune) {
            self.repairs.retain(|_, entry| now.duration_since(entry.since) <= CONTENTION_WINDOW);
            self.live_after_prune = self.repairs.len();
        }
        match repairs.checked_sub(CONTENTION_THRESHOLD) {
            None | Some(0) => Verdict::Restore,
            Some(excess) => Verdict::Contended { repairs, excess },
        }
    }

    /// The entries under contention now, with their numbers of repairs.
    pub(super) fn contended(&self, now: Instant) -> impl Iterator<Item = (&Key, u32)> {
        let is_contended =
            move |entry: &Repairs| entry.count > CONTENTION_THRESHOLD && now.duration_since(entry.since) <= CONTENTION_WINDOW;
        self.repairs.iter().filter(move |(_, entry)| is_contended(entry)).map(|(key, entry)| (key, entry.count))
    }

    /// Number of repairs since the start.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// The last repair.
    pub(super) fn last(&self) -> Option<&Drift> {
        self.last.as_ref()
    }

    /// Time of an entry's last repair, in seconds since the epoch; old repairs are forgotten.
    pub(super) fn last_repair_of(&self, key: &Key) -> Option<u64> {
        self.repairs.get(key).map(|entry| entry.last_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> Key {
        Key::Sysctl(number.to_string().into())
    }

    #[test]
    fn frequent_drift_is_contention_until_window_ends() {
        let (mut log, start) = (DriftLog::default(), Instant::now());
        for _ in 0..CONTENTION_THRESHOLD {
            assert_eq!(log.record(&key(1), start, 7), Verdict::Restore);
        }
        assert_eq!(log.contended(start).count(), 0);
        assert_eq!(log.record(&key(1), start, 8), Verdict::Contended { repairs: 11, excess: 1 });
        assert_eq!(log.record(&key(2), start, 9), Verdict::Restore, "another entry");
        assert_eq!(log.contended(start).collect::<Vec<_>>(), [(&key(1), 11)]);
        assert_eq!((log.count(), log.last().map(|last| last.at), log.last_repair_of(&key(1))), (12, Some(9), Some(8)));
        let later = start + CONTENTION_WINDOW + Duration::from_millis(1);
        assert_eq!(log.contended(later).count(), 0);
        assert_eq!(log.record(&key(1), later, 20), Verdict::Restore, "a new window");
    }

    #[test]
    fn old_repairs_are_pruned() {
        let (mut log, start) = (DriftLog::default(), Instant::now());
        for number in 0..MAX_TRACKED_REPAIRS {
            log.record(&key(number), start, 0);
        }
        log.record(&key(MAX_TRACKED_REPAIRS), start + CONTENTION_WINDOW * 2, 0);
        assert_eq!(log.repairs.len(), 1);
    }
}
