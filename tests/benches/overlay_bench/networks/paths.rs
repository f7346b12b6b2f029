//! Throughput and cost in an isolated network beside the default one: between two hosts, and to the outside.
//!
//! Two hosts with a container in each network, and frozen agents. Each turn goes through all paths.

use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use tokio::runtime::Runtime;

use super::super::bench_lab::FAMILY;
use super::super::data::LOADS;
use super::super::data::parallel::Throughput;
use super::super::data::path::{TrafficPath, pin_to_cpu};
use super::super::data::single_flow::{FlowEnds, Operation};
use super::super::data::testbed::OverlayHosts;
use super::super::progress;
use super::super::report::{Report, Row};

/// The isolated network.
const NETWORK: &str = "blue";
/// Each comparison: conditions, goal of the throughput, the network's path and the default network's.
const PAIRS: [(&str, f64, usize, usize); 2] =
    [("isolated network, two hosts", 0.95, 1, 0), ("isolated network to the outside by the transit", 0.85, 3, 2)];

/// Runs the measurement.
pub fn measure(turns: usize, time: Duration, runtime: &Runtime, report: &mut Report) -> anyhow::Result<()> {
    progress("two hosts with a container in the default network and one in an isolated network");
    let hosts = runtime.block_on(OverlayHosts::with_isolated_network(FAMILY, NETWORK))?;
    let own = format!("{NETWORK}-c1");
    let paths = [
        hosts.containers(("h1", "c1"), ("h2", "c1"))?,
        hosts.containers(("h1", &own), ("h2", &own))?,
        hosts.outside(("h1", "c1"))?,
        hosts.outside(("h1", &own))?,
    ];
    add_throughput(report, &paths, turns, time)?;
    // The measuring thread is pinned to one processor; it ends here, so that nothing else is pinned.
    let result = thread::scope(|scope| scope.spawn(|| add_costs(report, &paths, turns, time / 5)).join());
    result.map_err(|_| anyhow!("the thread that measures panicked"))?
}

fn add_throughput(report: &mut Report, paths: &[TrafficPath; 4], turns: usize, time: Duration) -> anyhow::Result<()> {
    // By load, path and turn.
    let mut samples: [[Vec<Throughput>; 4]; LOADS.len()] = Default::default();
    for turn in 0..turns {
        progress(&format!("an isolated network beside the default one: turn {} of {turns}", turn + 1));
        for ((load, what, ..), samples) in LOADS.iter().zip(&mut samples) {
            for step in 0..paths.len() {
                let path = (turn + step) % paths.len();
                samples[path].push(load.run(&paths[path], time).with_context(|| format!("{what} to {}", paths[path].address))?);
            }
        }
    }
    for (conditions, goal, path, baseline) in PAIRS {
        for ((_, what, unit, factor), samples) in LOADS.iter().zip(&samples) {
            let rate = |path: usize| samples[path].iter().map(|sample| sample.per_second * factor).collect::<Vec<f64>>();
            let row = Row::new("networks", conditions, *what, unit, &rate(path));
            report.add(row.map(|row| row.with_baseline("default network", &rate(path), &rate(baseline)).ratio_floor(goal)));
        }
    }
    Ok(())
}

/// The cost of single operations, which varies less than throughput.
fn add_costs(report: &mut Report, paths: &[TrafficPath; 4], turns: usize, time: Duration) -> anyhow::Result<()> {
    pin_to_cpu(true)?;
    let mut ends = paths.iter().map(FlowEnds::open).collect::<anyhow::Result<Vec<_>>>()?;
    // By operation, path and turn.
    let mut samples: [[Vec<f64>; 4]; Operation::ALL.len()] = Default::default();
    for turn in 0..turns {
        for (operation, samples) in Operation::ALL.into_iter().zip(&mut samples) {
            for step in 0..paths.len() {
                let path = (turn + step) % paths.len();
                // The first packets create entries and fill caches.
                ends[path].cost(operation, time / 10)?;
                samples[path].push(ends[path].cost(operation, time)?);
            }
        }
    }
    for (conditions, _, path, baseline) in PAIRS {
        for (operation, samples) in Operation::ALL.into_iter().zip(&samples) {
            let (what, unit) = operation.label();
            let row = Row::new("networks", conditions, format!("cost of {what}"), unit, &samples[path]);
            report.add(row.map(|row| row.with_baseline("default network", &samples[path], &samples[baseline])));
        }
    }
    Ok(())
}
