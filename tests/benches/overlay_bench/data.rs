//! `data`: throughput between containers compared with that between their hosts, and the cost of the rules.
//!
//! Two hosts of one lab with frozen agents, and a plain bridge. First the throughput, with threads in parallel; then the cost of
//! one packet, one request and one megabyte, with and without rules, by one thread on one processor. Each turn goes through all
//! paths, or all rulesets, and starts with another one than the previous turn.

mod ablation;
pub mod parallel;
pub mod path;
mod rules;
pub mod single_flow;
pub mod testbed;

use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use overlay_agent::model::Family;
use overlay_agent::plan::backend::vxlan;

use super::progress;
use super::report::{Report, Row};
use ablation::Setting;
use parallel::{Load, Throughput};
use path::{TrafficPath, pin_to_cpu};
use rules::{Rules, RulesetSwitch, set_on_all};
use single_flow::{FlowEnds, Operation};
use testbed::{OverlayHosts, PlainBridge};

/// Goal of the overlay's cost per packet with our rules, relative to that without.
const MAX_OVERHEAD_RATIO: f64 = 1.01;
/// The underlay MTU of the lab in bytes; the containers' is smaller by VXLAN's overhead.
const UNDERLAY_MTU: u32 = 1500;

/// Options of the measurement.
#[derive(Debug, Args)]
pub struct DataArguments {
    /// Turns through all paths; 0 omits them
    #[arg(long, value_name = "K", default_value_t = 15)]
    turns: usize,
    /// Turns through all rulesets; 0 omits them
    #[arg(long, value_name = "K", default_value_t = 40)]
    rules: usize,
    /// Only these rulesets, for a profile; may be given several times
    #[arg(long, value_name = "RULES")]
    only: Vec<Rules>,
    /// A shell command that applies a setting on each host, such as `ethtool -K eth0 gro off`: measures only the overlay with and
    /// without it
    #[arg(long, value_name = "COMMAND", requires = "without")]
    with: Option<String>,
    /// The command that reverts the setting
    #[arg(long, value_name = "COMMAND", requires = "with")]
    without: Option<String>,
    /// Milliseconds of each load in a turn; a fifth of it for the rules
    #[arg(long, value_name = "MS", default_value_t = 500)]
    time: u64,
    /// The family of underlay and overlay: 4 or 6
    #[arg(long, value_name = "4|6", default_value = "4", value_parser = super::peers::family)]
    family: Family,
}

/// The loads of the throughput measurement.
pub const LOADS: [(Load, &str, &str, f64); 4] = [
    (Load::Streams(1), "TCP, one stream", "Gbit/s", 8e-9),
    (Load::Streams(4), "TCP, four streams", "Gbit/s", 8e-9),
    (Load::Requests, "requests of one byte by TCP", "1/s", 1.0),
    (Load::Packets, "UDP packets of 64 bytes", "1/s", 1.0),
];

/// Runs the measurement.
pub fn measure(arguments: &DataArguments, report: &mut Report) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let family = arguments.family;
    progress("two hosts with two containers each, and a plain bridge");
    let hosts = runtime.block_on(OverlayHosts::new(family))?;
    let time = Duration::from_millis(arguments.time.max(10));
    if let (Some(with), Some(without)) = (&arguments.with, &arguments.without) {
        return add_ablation(report, &hosts, arguments, Setting { with, without });
    }
    if arguments.turns > 0 {
        let plain = PlainBridge::new(family, UNDERLAY_MTU - vxlan::overhead(family))?;
        let paths = [hosts.underlay()?, hosts.overlay()?, plain.path(family)?, hosts.bridge()?];
        add_throughput(report, family, &paths, arguments.turns, time)?;
    }
    if arguments.rules > 0 {
        // The measuring thread is pinned to one processor; it ends here, so that nothing else is pinned.
        let result = std::thread::scope(|scope| scope.spawn(|| add_costs(report, &hosts, arguments)).join());
        result.map_err(|_| anyhow::anyhow!("the thread that measures panicked"))??;
    }
    Ok(())
}

/// Measures the throughput.
fn add_throughput(
    report: &mut Report,
    family: Family,
    paths: &[TrafficPath; 4],
    turns: usize,
    time: Duration,
) -> anyhow::Result<()> {
    let mut samples: [[Vec<Throughput>; 4]; 4] = Default::default();
    for turn in 0..turns {
        progress(&format!("{family}, ways: turn {} of {turns}", turn + 1));
        for (number, (load, what, ..)) in LOADS.iter().enumerate() {
            for step in 0..paths.len() {
                let path_index = (turn + step) % paths.len();
                let throughput =
                    load.run(&paths[path_index], time).with_context(|| format!("{what} to {}", paths[path_index].address))?;
                samples[number][path_index].push(throughput);
            }
        }
    }
    let pairs =
        [("container to container, two hosts", "host to host", 1, 0), ("container to container, one host", "plain bridge", 3, 2)];
    for (conditions, baseline, path_index, other) in pairs {
        let conditions = format!("{family}, {conditions}");
        for ((_, what, unit, factor), all) in LOADS.iter().zip(&samples) {
            let rate =
                |path_index: usize| all[path_index].iter().map(|throughput| throughput.per_second * factor).collect::<Vec<f64>>();
            let row = Row::new("data", &conditions, *what, unit, &rate(path_index));
            report.add(row.map(|r| r.with_baseline(baseline, &rate(path_index), &rate(other))));
        }
        let cost =
            |path_index: usize| samples[0][path_index].iter().map(|p| p.processor / p.per_second * 1e12).collect::<Vec<f64>>();
        let row = Row::new("data", &conditions, "TCP, one stream: processor time for a gigabyte", "ms", &cost(path_index));
        report.add(row.map(|r| r.with_baseline(baseline, &cost(path_index), &cost(other))));
    }
    Ok(())
}

/// Measures the effect of a setting: throughput, and cost of single operations.
fn add_ablation(
    report: &mut Report,
    hosts: &OverlayHosts,
    arguments: &DataArguments,
    setting: Setting<'_>,
) -> anyhow::Result<()> {
    let DataArguments { turns, family, .. } = arguments;
    let time = Duration::from_millis(arguments.time.max(10));
    let (namespaces, path) = (hosts.namespaces()?, hosts.overlay()?);
    let mut throughputs: [[Vec<Throughput>; 2]; 4] = Default::default();
    let mut costs: [[Vec<f64>; 2]; 3] = Default::default();
    for turn in 0..*turns {
        progress(&format!("{family}, with and without: turn {} of {turns}", turn + 1));
        for step in 0..2 {
            let side = (turn + step) % 2;
            setting.set(&namespaces, side == 1)?;
            for ((load, what, ..), all) in LOADS.iter().zip(&mut throughputs) {
                all[side].push(load.run(&path, time).context(*what)?);
            }
            let measure_costs = || -> anyhow::Result<Vec<f64>> {
                pin_to_cpu(true)?;
                let mut ends = FlowEnds::open(&path)?;
                Operation::ALL.into_iter().map(|kind| ends.cost(kind, time / 5)).collect()
            };
            let measured = std::thread::scope(|scope| scope.spawn(measure_costs).join());
            for (cost, all) in measured.map_err(|_| anyhow::anyhow!("the thread that measures panicked"))??.iter().zip(&mut costs)
            {
                all[side].push(*cost);
            }
        }
    }
    setting.set(&namespaces, false)?;
    let conditions = format!("{family}, with {}", setting.with);
    let mut add = |what: &str, unit, [without, with]: [&[f64]; 2]| {
        report.add(Row::new("data", &conditions, what, unit, with).map(|r| r.with_baseline("without", with, without)));
    };
    for ((_, what, unit, factor), all) in LOADS.iter().zip(&throughputs) {
        let rates = all.each_ref().map(|side| side.iter().map(|p| p.per_second * factor).collect::<Vec<f64>>());
        add(what, unit, rates.each_ref().map(Vec::as_slice));
    }
    for (kind, all) in Operation::ALL.into_iter().zip(&costs) {
        let (what, unit) = kind.label();
        add(what, unit, all.each_ref().map(Vec::as_slice));
    }
    Ok(())
}

/// Measures the cost of the rules.
fn add_costs(report: &mut Report, hosts: &OverlayHosts, arguments: &DataArguments) -> anyhow::Result<()> {
    pin_to_cpu(true)?;
    let (family, turns, time) = (arguments.family, arguments.rules, Duration::from_millis(arguments.time.max(10)) / 5);
    let mut switches = hosts.namespaces()?.iter().map(RulesetSwitch::new).collect::<anyhow::Result<Vec<_>>>()?;
    let paths = [("two hosts", hosts.overlay()?), ("one host", hosts.bridge()?)];
    let mut ends = paths.iter().map(|(_, path)| FlowEnds::open(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut rulesets = Rules::WITH_BASELINE.to_vec();
    rulesets.retain(|(rules, _)| arguments.only.is_empty() || arguments.only.contains(rules));
    // Indexed by path, operation, ruleset.
    let mut samples = vec![vec![vec![Vec::new(); rulesets.len()]; Operation::ALL.len()]; paths.len()];
    for turn in 0..turns {
        progress(&format!("{family}, rules: turn {} of {turns}", turn + 1));
        for step in 0..rulesets.len() {
            let number = (turn + step) % rulesets.len();
            set_on_all(&mut switches, rulesets[number].0)?;
            for (ends, samples) in ends.iter_mut().zip(&mut samples) {
                for (kind, samples) in Operation::ALL.into_iter().zip(samples) {
                    // The first packets create entries and fill caches.
                    ends.cost(kind, time / 10)?;
                    let cost = ends.cost(kind, time).with_context(|| format!("with {}", rulesets[number].0.label()))?;
                    samples[number].push(cost);
                }
            }
        }
    }
    set_on_all(&mut switches, Rules::All)?;
    for switch in &mut switches {
        ensure!(switch.is_restored()?, "the rules that were put back are not those that the agent had made");
    }
    for ((path_name, _), by_kind) in paths.iter().zip(&samples) {
        for (kind, by_rules) in Operation::ALL.into_iter().zip(by_kind) {
            let (what, unit) = kind.label();
            for ((rules, baseline), costs) in rulesets.iter().zip(by_rules) {
                let conditions = format!("{family}, {path_name}, {}", rules.label());
                let row = Row::new("data", &conditions, what, unit, costs);
                let with_ruleset_baseline =
                    |row: Row| match baseline.and_then(|b| Some((b, rulesets.iter().position(|(r, _)| *r == b)?))) {
                        Some((baseline, number)) => row.with_baseline(baseline.label(), costs, &by_rules[number]),
                        None => row,
                    };
                let row = row.map(with_ruleset_baseline);
                let has_goal = matches!(rules, Rules::All | Rules::AllAndOthers);
                report.add(if has_goal { row.map(|r| r.ratio_goal(MAX_OVERHEAD_RATIO)) } else { row });
            }
        }
    }
    Ok(())
}
