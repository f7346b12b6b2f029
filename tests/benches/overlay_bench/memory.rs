//! `memory`: resident memory of a real `overlayd` with all peers in the kernel while idle, its wake-ups, and its program size.

use std::fs;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use overlayctl::lab;

use super::bench_lab::BenchLab;
use super::process_stats::{Usage, UsageDelta};
use super::progress;
use super::report::{Report, Row};

/// Delay before memory is read. By then the agent has returned the memory of its start, as far as it does.
const SETTLE_BEFORE_READ: Duration = Duration::from_secs(3);
/// Delay before wake-ups are counted: threads of the start end, and memory is returned.
const SETTLE_BEFORE_WAKEUPS: Duration = Duration::from_secs(15);
/// The period of counting wake-ups.
const WAKEUP_WINDOW: Duration = Duration::from_secs(60);
/// Without probes: the agent's other costs are measured alone.
const NO_PROBES: &[&str] = &["--mesh-interval", "0s"];
/// Goal of the resident size in MiB, for a number of peers.
const MAX_RSS_MIB: [(u32, f64); 2] = [(0, 12.0), (10_000, 25.0)];
/// Goal of wake-ups of an agent's threads in an idle minute. Its timers are three renewals of the lease, ten pings of the
/// connection to etcd (each with a later answer, which wakes the thread again) and two checks of the endpoints.
const MAX_WAKEUPS: f64 = 60.0;

/// Options of the measurement.
#[derive(Debug, Args)]
pub struct MemoryArguments {
    /// Number of leases besides the agent's own; may be given several times
    #[arg(long, value_name = "N", default_values_t = [0, 1_000, 10_000, 50_000])]
    peers: Vec<u32>,
    /// Agents started for each number
    #[arg(long, value_name = "K", default_value_t = 3)]
    runs: usize,
    /// Do not count wake-ups, which takes more than a minute for each number of leases
    #[arg(long)]
    no_wakes: bool,
}

/// Memory sizes of a process, in MiB.
#[derive(Debug, Default, Clone, Copy)]
struct MemorySize {
    resident: f64,
    proportional: f64,
    private: f64,
    peak: f64,
}

/// Runs the measurement for all sizes.
pub fn measure(arguments: &MemoryArguments, report: &mut Report) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let sizes = |peers: u32| -> anyhow::Result<(Vec<MemorySize>, Vec<UsageDelta>)> {
        let mut all = (Vec::new(), Vec::new());
        for turn in 0..arguments.runs {
            progress(&format!("{peers} peers: agent {} of {}", turn + 1, arguments.runs));
            let (size, minute) = runtime.block_on(measure_agent(peers, turn == 0 && !arguments.no_wakes, NO_PROBES))?;
            all.0.push(size);
            all.1.extend(minute.map(|(_, delta)| delta));
        }
        Ok(all)
    };
    let probing = |peers: u32| {
        progress(&format!("{peers} peers: an agent that probes them"));
        runtime.block_on(measure_agent(peers, true, &[]))
    };
    let program = lab::agent::find_program(None)?;
    #[expect(clippy::cast_precision_loss, reason = "a few million bytes")]
    let bytes = fs::metadata(&program).with_context(|| format!("cannot look at {}", program.display()))?.len() as f64;
    report.add(Row::new("memory", "overlayd", "size of the program", "MiB", &[bytes / f64::from(1 << 20)]));
    let (without_peers, minute) = sizes(0)?;
    for peers in &arguments.peers {
        let (with_peers, minute) = if *peers == 0 { (without_peers.clone(), minute.clone()) } else { sizes(*peers)? };
        let row = |what: &str, part: fn(&MemorySize) -> f64| {
            let (samples, baseline): (Vec<f64>, Vec<f64>) =
                (with_peers.iter().map(part).collect(), without_peers.iter().map(part).collect());
            Row::new("memory", &format!("{peers} peers"), what, "MiB", &samples)
                .map(|r| r.with_baseline("no peers", &samples, &baseline))
        };
        let resident = row("resident (VmRSS)", |s| s.resident);
        let goal = MAX_RSS_MIB.iter().find(|(of, _)| of == peers);
        report.add(resident.map(|r| match goal {
            Some((_, limit)) => r.median_goal(*limit),
            None => r,
        }));
        report.add(row("proportional (Pss)", |s| s.proportional));
        report.add(row("private", |s| s.private));
        report.add(row("peak resident (VmHWM)", |s| s.peak));
        let idle_row = |what: &str, unit, value: fn(&UsageDelta) -> f64| {
            let values: Vec<f64> = minute.iter().map(value).collect();
            Row::new("memory", &format!("{peers} peers, a minute at rest"), what, unit, &values)
        };
        let wakeups_row =
            idle_row("wake-ups of its threads", "wake-ups", |b| f64::from(u32::try_from(b.wakeups).unwrap_or(u32::MAX)));
        report.add(wakeups_row.map(|row| row.median_goal(MAX_WAKEUPS)));
        report.add(idle_row("processor time", "ms", |b| b.cpu_time.as_secs_f64() * 1e3));
        if !arguments.no_wakes {
            let (_, Some((size, minute))) = probing(*peers)? else { continue };
            let conditions = format!("{peers} peers, a minute with probes of them");
            let row = |what: &str, unit, value: f64| Row::new("memory", &conditions, what, unit, &[value]);
            report.add(row("resident (VmRSS)", "MiB", size.resident));
            report.add(row("wake-ups of its threads", "wake-ups", f64::from(u32::try_from(minute.wakeups).unwrap_or(u32::MAX))));
            report.add(row("processor time", "ms", minute.cpu_time.as_secs_f64() * 1e3));
        }
    }
    Ok(())
}

/// Starts an agent in its own lab. On request also reads its size and its usage after an idle minute.
async fn measure_agent(
    peers: u32,
    wakes: bool,
    flags: &[&str],
) -> anyhow::Result<(MemorySize, Option<(MemorySize, UsageDelta)>)> {
    let bench = BenchLab::with_agent_flags(1, peers, flags).await?;
    tokio::time::sleep(SETTLE_BEFORE_READ).await;
    let agent = bench.lab.host("h1")?.agent().context("the agent has ended")?.pid;
    let size = read_memory_size(agent)?;
    if !wakes {
        return Ok((size, None));
    }
    tokio::time::sleep(SETTLE_BEFORE_WAKEUPS).await;
    let before = Usage::now(agent)?;
    tokio::time::sleep(WAKEUP_WINDOW).await;
    Ok((size, Some((read_memory_size(agent)?, Usage::now(agent)?.since(&before)))))
}

fn read_memory_size(pid: i32) -> anyhow::Result<MemorySize> {
    let (status, rollup) = (read_proc_file(pid, "status")?, read_proc_file(pid, "smaps_rollup")?);
    Ok(MemorySize {
        resident: proc_field_mib(&status, "VmRSS:")?,
        peak: proc_field_mib(&status, "VmHWM:")?,
        proportional: proc_field_mib(&rollup, "Pss:")?,
        private: proc_field_mib(&rollup, "Private_Clean:")? + proc_field_mib(&rollup, "Private_Dirty:")?,
    })
}

/// A file of a process in `/proc`.
pub fn read_proc_file(pid: i32, file: &str) -> anyhow::Result<String> {
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
}

/// A line `Name:   123 kB`, in MiB.
pub fn proc_field_mib(text: &str, name: &str) -> anyhow::Result<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no line {name}"))?;
    let kib: f64 = rest.trim().trim_end_matches(" kB").parse().with_context(|| format!("{name}{rest}"))?;
    Ok(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_fields_are_parsed() {
        let text = "Name:\toverlayd\nVmHWM:\t    4096 kB\nVmRSS:\t    2048 kB\n";
        assert_eq!(proc_field_mib(text, "VmRSS:").expect("a field"), 2.0);
        assert!(proc_field_mib(text, "Pss:").is_err());
    }
}
