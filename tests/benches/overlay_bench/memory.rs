//! `memory`: what a real `overlayd` keeps resident, once all its peers are in the kernel and it has come to rest.

use std::fs;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::progress;
use super::report::{Report, Row};
use super::stage::Stage;

/// How long the agent rests before it is looked at: what the start needed has been given back by then, as far as it is.
const REST: Duration = Duration::from_secs(3);
/// Resident size in MiB, and the number of peers for which it is the goal.
const GOAL: (u32, f64) = (10_000, 40.0);

/// How to measure.
#[derive(Debug, Args)]
pub struct MemoryArguments {
    /// Number of leases beside the agent's own; may be given several times
    #[arg(long, value_name = "N", default_values_t = [0, 1_000, 10_000])]
    peers: Vec<u32>,
    /// Agents started for each
    #[arg(long, value_name = "K", default_value_t = 3)]
    runs: usize,
}

/// What a process occupies, in MiB.
#[derive(Debug, Default, Clone, Copy)]
struct Size {
    resident: f64,
    proportional: f64,
    private: f64,
    peak: f64,
}

/// Measures all sizes.
pub fn measure(arguments: &MemoryArguments, report: &mut Report) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let sizes = |peers: u32| -> anyhow::Result<Vec<Size>> {
        let run = |turn: usize| {
            progress(&format!("{peers} peers: agent {} of {}", turn + 1, arguments.runs));
            runtime.block_on(one(peers))
        };
        (0..arguments.runs).map(run).collect()
    };
    let alone = sizes(0)?;
    for peers in &arguments.peers {
        let with_peers = if *peers == 0 { alone.clone() } else { sizes(*peers)? };
        let row = |what: &str, part: fn(&Size) -> f64| {
            let (samples, baseline): (Vec<f64>, Vec<f64>) =
                (with_peers.iter().map(part).collect(), alone.iter().map(part).collect());
            Row::new("memory", &format!("{peers} peers"), what, "MiB", &samples)
                .map(|r| r.against("no peers", &samples, &baseline))
        };
        let resident = row("resident (VmRSS)", |s| s.resident);
        report.add(if *peers == GOAL.0 { resident.map(|r| r.median_goal(GOAL.1)) } else { resident });
        report.add(row("proportional (Pss)", |s| s.proportional));
        report.add(row("private", |s| s.private));
        report.add(row("peak resident (VmHWM)", |s| s.peak));
    }
    Ok(())
}

/// An agent of its own lab.
async fn one(peers: u32) -> anyhow::Result<Size> {
    let stage = Stage::new(1, peers).await?;
    tokio::time::sleep(REST).await;
    let agent = stage.lab.host("h1")?.agent().context("the agent has ended")?;
    read(agent.pid)
}

fn read(pid: i32) -> anyhow::Result<Size> {
    let text = |file: &str| {
        let path = format!("/proc/{pid}/{file}");
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    };
    let (status, rollup) = (text("status")?, text("smaps_rollup")?);
    Ok(Size {
        resident: field(&status, "VmRSS:")?,
        peak: field(&status, "VmHWM:")?,
        proportional: field(&rollup, "Pss:")?,
        private: field(&rollup, "Private_Clean:")? + field(&rollup, "Private_Dirty:")?,
    })
}

/// A line `Name:   123 kB`, in MiB.
fn field(text: &str, name: &str) -> anyhow::Result<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("there is no line {name}"))?;
    let kib: f64 = rest.trim().trim_end_matches(" kB").parse().with_context(|| format!("{name}{rest}"))?;
    Ok(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read() {
        let text = "Name:\toverlayd\nVmHWM:\t    4096 kB\nVmRSS:\t    2048 kB\n";
        assert_eq!(field(text, "VmRSS:").expect("a field"), 2.0);
        assert!(field(text, "Pss:").is_err());
    }
}
