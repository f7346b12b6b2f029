//! Medians and spreads of samples, and costs.

use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};

/// Number of values of a distribution.
const QUANTILES: usize = 21;

/// The summary of a set of samples, in their unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Number of samples.
    pub samples: usize,
    /// The median: of an even number, the mean of the two middle samples.
    pub median: f64,
    /// The minimum.
    pub min: f64,
    /// The 99th percentile, by nearest rank.
    pub p99: f64,
    /// The maximum.
    pub max: f64,
    /// Quantiles by nearest rank: 0 % (the minimum), 5 %, 10 % and so on to 100 %.
    pub distribution: [f64; QUANTILES],
}

impl Summary {
    /// The summary; `None` without samples.
    pub fn of(samples: &[f64]) -> Option<Summary> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], sorted[middle]) } else { sorted[middle] };
        let nearest_rank = |parts: usize, of: usize| sorted[(sorted.len() * parts).div_ceil(of).max(1) - 1];
        let distribution = std::array::from_fn(|n| nearest_rank(n, QUANTILES - 1));
        Some(Summary { samples: sorted.len(), median, min, p99: nearest_rank(99, 100), max, distribution })
    }

    /// The summary of the ratios of samples to the baseline's of the same turn. A disturbance that lasts longer than a turn
    /// affects both and cancels out.
    pub fn of_ratios(samples: &[f64], baseline: &[f64]) -> Option<Summary> {
        Summary::of(&ratios(samples, baseline))
    }
}

/// Each sample divided by the baseline's of the same turn.
pub fn ratios(samples: &[f64], baseline: &[f64]) -> Vec<f64> {
    samples.iter().zip(baseline).map(|(sample, baseline)| sample / baseline).collect()
}

/// A start time for costs.
#[derive(Debug, Clone, Copy)]
pub struct CostTimer {
    wall: Instant,
    processor: Duration,
}

/// The cost of an operation.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Elapsed time.
    pub wall: Duration,
    /// CPU time of this process, user and kernel mode. Other load on the machine affects it less.
    pub processor: Duration,
}

impl CostTimer {
    /// Starts now.
    pub fn start() -> nix::Result<CostTimer> {
        let processor = processor_time()?;
        Ok(CostTimer { wall: Instant::now(), processor })
    }

    /// The cost since the start.
    pub fn cost(&self) -> nix::Result<Cost> {
        let wall = self.wall.elapsed();
        Ok(Cost { wall, processor: processor_time()?.saturating_sub(self.processor) })
    }

    /// The start time.
    pub fn wall(&self) -> Instant {
        self.wall
    }
}

fn processor_time() -> nix::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let microseconds = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(microseconds.unsigned_abs()))
}

/// A duration in milliseconds.
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_has_median_and_quantiles() {
        assert_eq!(Summary::of(&[]), None);
        let one = Summary::of(&[3.0]).expect("a sample");
        assert_eq!((one.median, one.min, one.p99, one.max), (3.0, 3.0, 3.0, 3.0));
        let four = Summary::of(&[4.0, 1.0, 3.0, 2.0]).expect("samples");
        assert_eq!((four.samples, four.median, four.min, four.max), (4, 2.5, 1.0, 4.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(Summary::of(&hundred).expect("samples").p99, 99.0);
        let ratios = Summary::of_ratios(&[2.0, 9.0], &[1.0, 3.0]).expect("samples");
        assert_eq!((ratios.min, ratios.max), (2.0, 3.0));
    }
}
