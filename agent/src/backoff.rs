//! Exponential backoff with full jitter. Pure: the caller supplies the random numbers and waits.
//!
//! Jitter keeps hosts that lost the same etcd from reconnecting at the same moment.

use std::time::Duration;

use rand::{Rng, RngExt};

/// The retry delays of one repeated operation.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// Delays from `base` up to `cap`.
    pub const fn new(base: Duration, cap: Duration) -> Backoff {
        Backoff { base, cap, failures: 0 }
    }

    /// The delay after one more failure: uniformly distributed from `base` to `base * 2^failures`, at most `cap`.
    pub fn next_delay(&mut self, random: &mut impl Rng) -> Duration {
        let ceiling = self.base.saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX)).min(self.cap).max(self.base);
        self.failures = self.failures.saturating_add(1);
        if ceiling == self.base { self.base } else { random.random_range(self.base..=ceiling) }
    }

    /// Restarts with the shortest delay, after a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    const BASE: Duration = Duration::from_millis(100);
    const CAP: Duration = Duration::from_secs(15);

    #[test]
    fn delay_stays_within_doubling_ceiling() {
        for seed in 0..200 {
            let mut random = SmallRng::seed_from_u64(seed);
            let mut backoff = Backoff::new(BASE, CAP);
            let mut ceiling = BASE;
            for _ in 0..40 {
                let delay = backoff.next_delay(&mut random);
                assert!(delay >= BASE && delay <= ceiling, "{delay:?} is not within {BASE:?} to {ceiling:?}");
                ceiling = (ceiling * 2).min(CAP);
            }
        }
    }

    #[test]
    fn delays_spread_over_whole_range() {
        let mut random = SmallRng::seed_from_u64(7);
        let mut delays = Vec::new();
        for _ in 0..300 {
            let mut backoff = Backoff::new(BASE, CAP);
            backoff.failures = 20;
            delays.push(backoff.next_delay(&mut random));
        }
        assert!(delays.iter().any(|d| *d < CAP / 4) && delays.iter().any(|d| *d > CAP / 4 * 3));
    }

    #[test]
    fn reset_restarts_at_base() {
        let mut random = SmallRng::seed_from_u64(1);
        let mut backoff = Backoff::new(BASE, CAP);
        for _ in 0..10 {
            backoff.next_delay(&mut random);
        }
        assert_eq!(backoff.failures(), 10);
        backoff.reset();
        assert_eq!(backoff.next_delay(&mut random), BASE);
    }
}
