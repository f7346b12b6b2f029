//! `peers`: N peers added by one snapshot, until the last route is in the kernel; removed by another; and removed with the
//! devices.
//!
//! The agent (`driver`) runs in turns with the raw limit (`raw_netlink`), each turn in a fresh namespace.

use std::time::Duration;

use clap::Args;
use overlay_agent::model::Family;

use super::driver::{AgentTiming, measure_agent};
use super::progress;
use super::raw_netlink::{RawTiming, measure_raw};
use super::report::{Report, Row};
use super::stats::{milliseconds, ratios};
use super::synthetic_peer::{SyntheticPeer, synthetic_peers};

/// Pause between turns. The kernel removes a namespace in the background, and frees its contents after RCU's grace periods.
const PAUSE: Duration = Duration::from_millis(400);
/// Goals relative to the raw limit: the kernel's busy time, and the total time until the last entry.
const MAX_BATCH_RATIO: f64 = 1.2;
const MAX_TOTAL_RATIO: f64 = 1.5;
/// Goal of the batch's ratio to the raw limit, relative to that of the first size. It must scale with the peers like the kernel.
/// And goal of the IPv6 batch relative to the IPv4 batch.
const MAX_SCALING_RATIO: f64 = 1.2;
const MAX_IPV6_RATIO: f64 = 2.0;

/// Options of the measurement.
#[derive(Debug, Args)]
pub struct PeersArguments {
    /// Number of peers; may be given several times
    #[arg(long, value_name = "N", default_values_t = [1_000, 5_000, 10_000, 50_000])]
    peers: Vec<u32>,
    /// Turns of each; a turn is the raw limit once and the agent once
    #[arg(long, value_name = "K", default_value_t = 7)]
    runs: usize,
    /// Only peers of these families: 4, 6 or both
    #[arg(long, value_name = "4|6|both", value_parser = families)]
    family: Option<Families>,
}

/// The families of a peer.
pub type Families = &'static [Family];

const BOTH: Families = &Family::ALL;
const FAMILY_SETS: [Families; 3] = [&[Family::V4], &[Family::V6], BOTH];

fn families(text: &str) -> Result<Families, String> {
    match text {
        "both" => Ok(BOTH),
        _ => family(text).map_err(|_| "expected 4, 6 or both".to_owned()).map(|family| match family {
            Family::V4 => FAMILY_SETS[0],
            Family::V6 => FAMILY_SETS[1],
        }),
    }
}

/// Parses a family's number.
pub fn family(text: &str) -> Result<Family, String> {
    match text {
        "4" => Ok(Family::V4),
        "6" => Ok(Family::V6),
        _ => Err("expected 4 or 6".to_owned()),
    }
}

/// The times of all turns of one size, in milliseconds.
#[derive(Debug, Default)]
struct PhaseTimings {
    set: PhaseSamples,
    removed: PhaseSamples,
    torn_down: PhaseSamples,
}

/// The times of one step.
#[derive(Debug, Default)]
struct PhaseSamples {
    raw: Vec<f64>,
    raw_processor: Vec<f64>,
    last: Vec<f64>,
    batch: Vec<f64>,
    settled: Vec<f64>,
    processor: Vec<f64>,
}

/// Runs the measurement for all sizes in all families.
pub fn measure(arguments: &PeersArguments, report: &mut Report) -> anyhow::Result<()> {
    // With its own thread, so that a turn's connections end with it and do not hold its namespace until the next turn.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    // The raw limit's times for the first size, for each set of families.
    let mut firsts: [Option<Vec<f64>>; FAMILY_SETS.len()] = Default::default();
    for peers in &arguments.peers {
        let mut ipv4 = None;
        for (n, families) in FAMILY_SETS.into_iter().enumerate().filter(|(_, f)| arguments.family.is_none_or(|only| only == *f)) {
            let family_names: Vec<String> = families.iter().map(ToString::to_string).collect();
            let conditions = format!("{}, {peers} peers", family_names.join(" and "));
            let all = families.iter().map(|family| synthetic_peers(*family, 1..=*peers)).collect::<anyhow::Result<Vec<_>>>()?;
            let fleet: Vec<&[SyntheticPeer]> = all.iter().map(Vec::as_slice).collect();
            let mut turns = PhaseTimings::default();
            for turn in 0..arguments.runs {
                progress(&format!("{conditions}: turn {} of {}", turn + 1, arguments.runs));
                // In every other turn the agent runs first, so that cold caches affect both.
                for part in 0..2 {
                    std::thread::sleep(PAUSE);
                    if (turn + part) % 2 == 0 {
                        turns.add_raw(&runtime.block_on(measure_raw(&fleet))?);
                    } else {
                        turns.add_agent(&runtime.block_on(measure_agent(&fleet))?);
                    }
                }
            }
            turns.report(&conditions, report);
            let batch_per_peer: Vec<f64> = turns.set.batch.iter().map(|took| took * 1e3 / f64::from(*peers)).collect();
            report.add(Row::new("peers", &conditions, "a peer's share of the batch", "us", &batch_per_peer));
            let of_raw = ratios(&turns.set.batch, &turns.set.raw);
            if let Some(first) = &firsts[n] {
                let row = Row::new("peers", &conditions, "the batch, in raw limits", "x", &of_raw);
                let compared = row.map(|row| row.with_baseline("the same of the first size", &of_raw, first));
                report.add(compared.map(|row| row.ratio_goal(MAX_SCALING_RATIO)));
            }
            firsts[n].get_or_insert(of_raw);
            match families {
                [Family::V4] => ipv4 = Some(turns),
                [Family::V6] => {
                    if let Some(ipv4) = &ipv4 {
                        let row = Row::new("peers", &conditions, "the batch of all coming", "ms", &turns.set.batch);
                        let compared = row.map(|row| row.with_baseline("the same of IPv4", &turns.set.batch, &ipv4.set.batch));
                        report.add(compared.map(|row| row.ratio_goal(MAX_IPV6_RATIO)));
                    }
                }
                _ => {}
            }
        }
    }
    Ok(())
}

impl PhaseTimings {
    fn add_raw(&mut self, timing: &RawTiming) {
        for (steps, cost) in
            [(&mut self.set, timing.set), (&mut self.removed, timing.removed), (&mut self.torn_down, timing.torn_down)]
        {
            steps.raw.push(milliseconds(cost.wall));
            steps.raw_processor.push(milliseconds(cost.processor));
        }
    }

    fn add_agent(&mut self, timing: &AgentTiming) {
        for (steps, step) in [(&mut self.set, timing.set), (&mut self.removed, timing.removed)] {
            steps.last.push(milliseconds(step.last_applied));
            steps.batch.push(milliseconds(step.apply_time));
            steps.settled.push(milliseconds(step.settled.wall));
            steps.processor.push(milliseconds(step.settled.processor));
        }
        self.torn_down.last.push(milliseconds(timing.cleanup));
        self.torn_down.batch.push(milliseconds(timing.cleanup_apply));
    }

    fn report(&self, conditions: &str, report: &mut Report) {
        let row = |what: &str, samples: &[f64], raw: &[f64]| {
            Row::new("peers", conditions, what, "ms", samples).map(|row| row.with_baseline("raw netlink", samples, raw))
        };
        for (steps, total) in [
            (&self.set, "snapshot to last route"),
            (&self.removed, "all gone: snapshot to last entry"),
            (&self.torn_down, "all taken down with the devices"),
        ] {
            report.add(row(total, &steps.last, &steps.raw).map(|r| r.ratio_goal(MAX_TOTAL_RATIO)));
            report.add(row("of it, the batch", &steps.batch, &steps.raw).map(|r| r.ratio_goal(MAX_BATCH_RATIO)));
            report.add(row("until rest", &steps.settled, &steps.raw));
            report.add(row("processor time until rest", &steps.processor, &steps.raw_processor));
        }
    }
}
