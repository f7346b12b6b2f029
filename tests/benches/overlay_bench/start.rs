//! `start`: a real `overlayd` from its process start until the overlay is in place with all peers.
//!
//! Once with an empty kernel, and again with a complete one. The phases come from the agent's own log.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use clap::Args;
use nix::sys::signal::Signal;
use overlay_tests::programs::process_cpu_time;
use overlayctl::lab::Host;
use serde_json::Value;

use super::bench_lab::{BenchLab, etcd_socket_addr};
use super::progress;
use super::raw_netlink::measure_raw;
use super::report::{Report, Row};
use super::stats::milliseconds;

/// Goal of the time until the overlay is in place, in ms, for a number of leases: with an empty kernel, and with a complete one.
const MAX_START_MS: (u32, f64, f64) = (10_000, 400.0, 250.0);

/// Options of the measurement.
#[derive(Debug, Args)]
pub struct StartArguments {
    /// Number of leases besides the agent's own; may be given several times
    #[arg(long, value_name = "N", default_values_t = [0, 1_000, 10_000])]
    peers: Vec<u32>,
    /// Turns of each: a start with an empty kernel, and another one
    #[arg(long, value_name = "K", default_value_t = 5)]
    runs: usize,
}

/// The phases of a start: the label in the table, and the log message with its time.
const PHASES: [(&str, &str); 6] = [
    ("kernel state read", "kernel state read"),
    ("leases read from etcd", "leases read"),
    ("decoded", "leases decoded"),
    ("classified", "leases classified"),
    ("planned and compared", "planned"),
    ("applied", "batch applied"),
];

/// The times of one start, in ms.
#[derive(Debug, Default, Clone)]
struct StartTiming {
    in_place: f64,
    processor: f64,
    phases: [f64; PHASES.len()],
    /// Number of kernel changes.
    ops: u64,
}

/// Runs the measurement for all sizes.
pub fn measure(arguments: &StartArguments, report: &mut Report) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    for peers in &arguments.peers {
        let (mut cold_starts, mut warm_starts, mut read_times, mut raw_times) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for turn in 0..arguments.runs {
            progress(&format!("{peers} peers: turn {} of {}", turn + 1, arguments.runs));
            let bench = runtime.block_on(BenchLab::without_agents(1, *peers))?;
            read_times.push(etcdctl_read(&bench, *peers)?);
            let written =
                if bench.peers.is_empty() { 0.0 } else { milliseconds(runtime.block_on(measure_raw(&[&bench.peers]))?.set.wall) };
            raw_times.push(written);
            let host = bench.lab.host("h1")?;
            cold_starts.push(runtime.block_on(start_agent(&bench, &host))?);
            host.agent_stop(Signal::SIGTERM)?;
            let restart = runtime.block_on(start_agent(&bench, &host))?;
            ensure!(restart.ops == 0, "a start with everything in place changed the kernel: {} ops", restart.ops);
            warm_starts.push(restart);
        }
        let baseline_times: Vec<f64> = read_times.iter().zip(&raw_times).map(|(read, limit)| read + limit).collect();
        let is_goal = *peers == MAX_START_MS.0;
        for (conditions, starts, baseline, values, goal) in [
            (format!("{peers} peers, empty kernel"), &cold_starts, "etcdctl + raw netlink", &baseline_times, MAX_START_MS.1),
            (format!("{peers} peers, all in place"), &warm_starts, "etcdctl", &read_times, MAX_START_MS.2),
        ] {
            let column = |part: fn(&StartTiming) -> f64| starts.iter().map(part).collect::<Vec<f64>>();
            let total = column(|start| start.in_place);
            let row = Row::new("start", &conditions, "process begun to overlay in place", "ms", &total)
                .map(|row| row.with_baseline(baseline, &total, values));
            report.add(if is_goal { row.map(|row| row.median_goal(goal)) } else { row });
            for (number, (name, _)) in PHASES.iter().enumerate() {
                let part: Vec<f64> = starts.iter().map(|start| start.phases[number]).collect();
                let row = Row::new("start", &conditions, format!("of it: {name}"), "ms", &part);
                report.add(match *name {
                    "leases read from etcd" => row.map(|row| row.with_baseline("etcdctl", &part, &read_times)),
                    "applied" if std::ptr::eq(starts, &cold_starts) && *peers > 0 => {
                        row.map(|row| row.with_baseline("raw netlink", &part, &raw_times))
                    }
                    _ => row,
                });
            }
            report.add(Row::new("start", &conditions, "processor time until then", "ms", &column(|start| start.processor)));
        }
    }
    Ok(())
}

/// All leases read by etcdctl as a whole process, in ms.
fn etcdctl_read(bench: &BenchLab, peers: u32) -> anyhow::Result<f64> {
    let endpoints = format!("--endpoints={}", etcd_socket_addr());
    let start_time = std::time::Instant::now();
    let output = bench.lab.exec("net", &["etcdctl", &endpoints, "get", "--prefix", "--keys-only=false", "/"])?;
    let elapsed_ms = milliseconds(start_time.elapsed());
    let lines = output.stdout.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"/")).count();
    ensure!(
        output.status.success() && lines >= peers as usize,
        "etcdctl read {lines} keys: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(elapsed_ms)
}

/// The log after a position, once it reports the overlay in place. The report follows the kernel shortly, because the agent
/// writes a file in between.
async fn wait_in_place_logged(log: &Path, before: usize) -> anyhow::Result<Vec<u8>> {
    const IN_PLACE_MESSAGE: &[u8] = b"overlay in place";
    for _ in 0..500 {
        let text = fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
        let new = text.get(before..).unwrap_or_default();
        if new.windows(IN_PLACE_MESSAGE.len()).any(|part| part == IN_PLACE_MESSAGE) && new.ends_with(b"\n") {
            return Ok(new.to_vec());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bail!("{} does not say that the overlay is in place", log.display())
}

/// Starts the agent and reads its phases from the log, until the overlay is in place with all peers.
async fn start_agent(bench: &BenchLab, host: &Host<'_>) -> anyhow::Result<StartTiming> {
    let log = host.log();
    let before = fs::metadata(&log).map_or(0, |file| file.len());
    // The agent rewrites and reports it at each start, as after a boot.
    let _ignored = fs::remove_file(host.run_dir().join("subnet.env"));
    let begun = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let agent = host.agent_start(&["--log-level", "debug", "--log-format", "json"])?;
    bench.wait_converged(host).await?;
    let text = wait_in_place_logged(&log, usize::try_from(before)?).await?;
    let mut start = StartTiming { processor: milliseconds(process_cpu_time(agent.pid)?), ..StartTiming::default() };
    for line in text.split(|byte| *byte == b'\n') {
        let Ok(line) = serde_json::from_slice::<Value>(line) else { continue };
        let field = |name: &str| line.get(name).or_else(|| line.get("fields")?.get(name));
        let Some(message) = field("message").and_then(Value::as_str) else { continue };
        let elapsed_ms = field("ms").and_then(Value::as_f64).unwrap_or_default();
        if let Some(part) = PHASES.iter().position(|(_, phase_message)| *phase_message == message) {
            start.phases[part] += elapsed_ms;
        }
        if message == "batch applied" {
            start.ops += field("ops").and_then(Value::as_u64).unwrap_or_default();
        }
        if message == "overlay in place" {
            let text = field("timestamp").and_then(Value::as_str).context("a line of the log has no timestamp")?;
            let at = humantime::parse_rfc3339(text).with_context(|| format!("timestamp {text}"))?;
            start.in_place = milliseconds(at.duration_since(UNIX_EPOCH)?.saturating_sub(begun));
        }
    }
    ensure!(start.in_place > 0.0, "{} does not say that the overlay is in place", log.display());
    Ok(start)
}
