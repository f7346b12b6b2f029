//! Rate limit for log lines of one kind, so that invalid values in the store cannot fill the disk.

use std::time::{Duration, Instant};

/// Maximum number of lines within [`WINDOW`]. Further lines are counted and reported in one line.
const MAX_LINES: usize = 40;
const WINDOW: Duration = Duration::from_secs(10);

/// Counts logged and suppressed lines.
#[derive(Debug, Default)]
pub(super) struct LogRateLimit {
    window_start: Option<Instant>,
    logged: usize,
    suppressed: usize,
}

impl LogRateLimit {
    /// Whether to write a line; otherwise counts it as suppressed.
    pub(super) fn allows(&mut self, now: Instant) -> bool {
        if self.window_start.is_none_or(|since| now.duration_since(since) > WINDOW) {
            self.window_start = Some(now);
            self.logged = 0;
        }
        let allowed = self.logged < MAX_LINES;
        if allowed {
            self.logged += 1;
        } else {
            self.suppressed += 1;
        }
        allowed
    }

    /// The number of suppressed lines since the last report, if a report is due: at the first suppressed line, then once per
    /// window.
    pub(super) fn take_suppressed(&mut self, now: Instant) -> Option<usize> {
        let first = self.logged == MAX_LINES;
        if self.suppressed == 0 || !(first || self.window_start.is_none_or(|since| now.duration_since(since) > WINDOW)) {
            return None;
        }
        // One above `MAX_LINES` marks the first suppressed line as reported.
        self.logged += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excess_lines_are_counted() {
        let (mut limit, start) = (LogRateLimit::default(), Instant::now());
        let logged = (0..1000).filter(|_| limit.allows(start)).count();
        assert_eq!((logged, limit.take_suppressed(start)), (MAX_LINES, Some(1000 - MAX_LINES)));
        assert!(!limit.allows(start));
        assert_eq!(limit.take_suppressed(start), None, "one line a window");
        let later = start + WINDOW + Duration::from_millis(1);
        assert!(limit.allows(later), "a new window");
        assert_eq!(limit.take_suppressed(later), None);
        let logged = (0..MAX_LINES).filter(|_| limit.allows(later)).count();
        assert_eq!(
            (logged, limit.take_suppressed(later)),
            (MAX_LINES - 1, Some(2)),
            "lines suppressed in the last window are reported"
        );
    }

    #[test]
    fn few_lines_are_all_logged() {
        let (mut limit, now) = (LogRateLimit::default(), Instant::now());
        assert!((0..MAX_LINES).all(|_| limit.allows(now)));
        assert_eq!(limit.take_suppressed(now), None);
    }
}
