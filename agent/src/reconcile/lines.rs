//! How many lines of one kind the log gets: what others write into the store must not fill a disk.

use std::time::{Duration, Instant};

/// Lines within [`WINDOW`]; what is beyond is counted, and told in one line.
const MOST: usize = 40;
const WINDOW: Duration = Duration::from_secs(10);

/// The account.
#[derive(Debug, Default)]
pub(super) struct Lines {
    since: Option<Instant>,
    told: usize,
    kept_back: usize,
}

impl Lines {
    /// Whether a line is to be written; counted where it is not.
    pub(super) fn admits(&mut self, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.duration_since(since) > WINDOW) {
            self.since = Some(now);
            self.told = 0;
        }
        let admits = self.told < MOST;
        if admits {
            self.told += 1;
        } else {
            self.kept_back += 1;
        }
        admits
    }

    /// How many lines were not written and have not been told of, where it is time to tell: at the first of them, and then with each window.
    pub(super) fn kept_back(&mut self, now: Instant) -> Option<usize> {
        let first = self.told == MOST;
        if self.kept_back == 0 || !(first || self.since.is_none_or(|since| now.duration_since(since) > WINDOW)) {
            return None;
        }
        // One more than lines: the first is told.
        self.told += 1;
        Some(std::mem::take(&mut self.kept_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted() {
        let (mut lines, start) = (Lines::default(), Instant::now());
        let told = (0..1000).filter(|_| lines.admits(start)).count();
        assert_eq!((told, lines.kept_back(start)), (MOST, Some(1000 - MOST)));
        assert!(!lines.admits(start));
        assert_eq!(lines.kept_back(start), None, "one line a window");
        let later = start + WINDOW + Duration::from_millis(1);
        assert!(lines.admits(later), "a new window");
        assert_eq!(lines.kept_back(later), None);
        let told = (0..MOST).filter(|_| lines.admits(later)).count();
        assert_eq!((told, lines.kept_back(later)), (MOST - 1, Some(2)), "what the last window kept back is not forgotten");
    }

    #[test]
    fn a_few_are_all_told() {
        let (mut lines, now) = (Lines::default(), Instant::now());
        assert!((0..MOST).all(|_| lines.admits(now)));
        assert_eq!(lines.kept_back(now), None);
    }
}
