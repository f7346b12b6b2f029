//! `storm`: thousands of foreign routes and links, added and removed in the host's namespace.
//!
//! Compares the cost for an agent that ignores them with the cost for the process that makes them.

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use overlayctl::lab::Host;

use super::bench_lab::BenchLab;
use super::process_stats::{MetricsPage, Usage, UsageDelta};
use super::progress;
use super::report::{Report, Row};
use super::stats::milliseconds;

/// The agent is quiet when it has used no CPU time for this long.
const QUIET_PERIOD: Duration = Duration::from_millis(500);
/// Time limit until the agent is quiet.
const QUIET_TIMEOUT: Duration = Duration::from_secs(60);
/// The link group of the foreign links, for their removal in one command.
const LINK_GROUP: &str = "77";
/// Goal of the agent's CPU time relative to that of the process that makes the storm.
const MAX_CPU_RATIO: f64 = 0.5;

/// Options of the measurement.
#[derive(Debug, Args)]
pub struct StormArguments {
    /// Foreign routes
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    routes: u32,
    /// Foreign links: two for each veth pair
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    links: u32,
    /// Peers of the host
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    peers: u32,
    /// Turns
    #[arg(long, value_name = "K", default_value_t = 3)]
    runs: usize,
}

/// The result of one phase of a storm.
struct StormPhase {
    /// CPU time of the process that made it.
    generator_cpu_time: Duration,
    /// From its begin to its end.
    duration: Duration,
    agent: UsageDelta,
    reads: [f64; 2],
    repairs: f64,
}

/// Measures adding and removing of routes and links.
pub fn measure(arguments: &StormArguments, report: &mut Report) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let StormArguments { routes, links, peers, runs } = *arguments;
    let bench = runtime.block_on(BenchLab::new(1, peers))?;
    let host = bench.lab.host("h1")?;
    let route = |n: u32| format!("blackhole {}/32 proto 99", std::net::Ipv4Addr::from_bits(0xc612_0000 + n));
    let list = |count: u32, line: &dyn Fn(u32) -> String| {
        (0..count).fold(String::new(), |mut text, n| {
            let _written = writeln!(text, "{}", line(n));
            text
        })
    };
    let parts: [(&str, u32, String); 4] = [
        ("routes come", routes, list(routes, &|n| format!("route add {}", route(n)))),
        ("routes go", routes, list(routes, &|n| format!("route delete {}", route(n)))),
        (
            "links come",
            links,
            list(links.div_ceil(2), &|n| format!("link add foreign{n} group {LINK_GROUP} type veth peer name other{n}")),
        ),
        ("links go", links, format!("link delete group {LINK_GROUP}\n")),
    ];
    let mut phases: [Vec<StormPhase>; 4] = Default::default();
    for turn in 0..runs {
        for (samples, (what, count, batch)) in phases.iter_mut().zip(&parts) {
            progress(&format!("{peers} peers, {count} {what}: turn {} of {runs}", turn + 1));
            samples.push(run_batch(&host, batch)?);
        }
    }
    for (all, (what, count, _)) in phases.iter().zip(&parts) {
        add_rows(report, &format!("{count} {what}, {peers} peers"), all);
    }
    runtime.block_on(bench.wait_converged(&host))
}

fn add_rows(report: &mut Report, conditions: &str, parts: &[StormPhase]) {
    let column = |value: fn(&StormPhase) -> f64| parts.iter().map(value).collect::<Vec<f64>>();
    let row = |what: &str, unit, value: fn(&StormPhase) -> f64| Row::new("storm", conditions, what, unit, &column(value));
    report.add(row("until it is over", "ms", |p| milliseconds(p.duration)));
    let maker = column(|p| milliseconds(p.generator_cpu_time));
    let agent = column(|p| milliseconds(p.agent.cpu_time));
    report.add(
        row("agent's processor time", "ms", |p| milliseconds(p.agent.cpu_time))
            .map(|r| r.with_baseline("who makes it", &agent, &maker).ratio_goal(MAX_CPU_RATIO)),
    );
    report.add(row("reads of all that is ours", "reads", |p| p.reads[0]).map(|r| r.median_goal(0.0)));
    report.add(row("reads of all interfaces", "reads", |p| p.reads[1]));
    report.add(row("entries taken for drift", "entries", |p| p.repairs).map(|r| r.median_goal(0.0)));
}

/// Runs a list of commands in the host's namespace, and waits until the agent is quiet.
fn run_batch(host: &Host<'_>, batch: &str) -> anyhow::Result<StormPhase> {
    let pid = host.agent().context("the agent has ended")?.pid;
    let file = host.dir().join("storm");
    std::fs::write(&file, batch)?;
    let (page, used) = (MetricsPage::of_agent(&host.socket())?, Usage::now(pid)?);
    let (start, children_time_before) = (Instant::now(), children_cpu_time()?);
    let output = host.exec(&["ip", "-batch", &file.to_string_lossy()])?;
    ensure!(output.status.success(), "ip -batch: {}", String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default());
    let (duration, generator_time) = (start.elapsed(), children_cpu_time()?.saturating_sub(children_time_before));
    let mut last = Usage::now(pid)?;
    loop {
        std::thread::sleep(QUIET_PERIOD);
        let now = Usage::now(pid)?;
        // Polling costs the agent nothing; its other activity is well below one per cent.
        if now.since(&last).cpu_percent() < 1.0 {
            break;
        }
        ensure!(start.elapsed() < duration + QUIET_TIMEOUT, "the agent does not come to rest after the storm");
        last = now;
    }
    let agent = Usage::now(pid)?.since(&used);
    let after = MetricsPage::of_agent(&host.socket())?;
    let added = |name: &str, label: &str| after.delta(&page, name, label);
    Ok(StormPhase {
        generator_cpu_time: generator_time,
        duration,
        agent,
        reads: ["state", "interfaces"].map(|what| added("overlayd_kernel_reads_total", what)),
        repairs: added("overlayd_drift_repairs_total", ""),
    })
}

/// CPU time of the ended child processes.
fn children_cpu_time() -> nix::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(micros.unsigned_abs()))
}
