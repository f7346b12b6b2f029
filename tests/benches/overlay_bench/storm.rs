//! `storm`: foreign routes and links that come and go in the host's namespace by the thousand. What does it cost an agent that has nothing to do with
//! them, against what they cost who makes them?

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use overlayctl::lab::Host;

use super::gauge::{Between, Page, Used};
use super::progress;
use super::report::{Report, Row};
use super::stage::Stage;
use super::stats::milliseconds;

/// The agent has come to rest when it has not used a processor for this long.
const REST: Duration = Duration::from_millis(500);
/// How long it may take to.
const LIMIT: Duration = Duration::from_secs(60);
/// The group of the foreign links, by which they go at once.
const GROUP: &str = "77";
/// What the agent uses, as a part of what who makes the storm does.
const GOAL: f64 = 0.5;

/// How to measure.
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

/// What one part of a storm came to.
struct Part {
    /// Processor time of who made it.
    maker: Duration,
    /// From its begin until it was over.
    lasted: Duration,
    agent: Between,
    reads: [f64; 2],
    repairs: f64,
}

/// Measures routes and links, coming and going.
pub fn measure(arguments: &StormArguments, report: &mut Report) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let StormArguments { routes, links, peers, runs } = *arguments;
    let stage = runtime.block_on(Stage::new(1, peers))?;
    let host = stage.lab.host("h1")?;
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
            list(links.div_ceil(2), &|n| format!("link add foreign{n} group {GROUP} type veth peer name other{n}")),
        ),
        ("links go", links, format!("link delete group {GROUP}\n")),
    ];
    let mut came: [Vec<Part>; 4] = Default::default();
    for turn in 0..runs {
        for (parts_of, (what, count, batch)) in came.iter_mut().zip(&parts) {
            progress(&format!("{peers} peers, {count} {what}: turn {} of {runs}", turn + 1));
            parts_of.push(storm(&host, batch)?);
        }
    }
    for (all, (what, count, _)) in came.iter().zip(&parts) {
        add_rows(report, &format!("{count} {what}, {peers} peers"), all);
    }
    runtime.block_on(stage.settled(&host))
}

fn add_rows(report: &mut Report, conditions: &str, parts: &[Part]) {
    let column = |value: fn(&Part) -> f64| parts.iter().map(value).collect::<Vec<f64>>();
    let row = |what: &str, unit, value: fn(&Part) -> f64| Row::new("storm", conditions, what, unit, &column(value));
    report.add(row("until it is over", "ms", |p| milliseconds(p.lasted)));
    let maker = column(|p| milliseconds(p.maker));
    let agent = column(|p| milliseconds(p.agent.processor));
    report.add(
        row("agent's processor time", "ms", |p| milliseconds(p.agent.processor))
            .map(|r| r.against("who makes it", &agent, &maker).ratio_goal(GOAL)),
    );
    report.add(row("reads of all that is ours", "reads", |p| p.reads[0]).map(|r| r.median_goal(0.0)));
    report.add(row("reads of all interfaces", "reads", |p| p.reads[1]));
    report.add(row("entries taken for drift", "entries", |p| p.repairs).map(|r| r.median_goal(0.0)));
}

/// Runs a list of commands in the host's namespace, and waits until the agent rests.
fn storm(host: &Host<'_>, batch: &str) -> anyhow::Result<Part> {
    let pid = host.agent().context("the agent has ended")?.pid;
    let file = host.dir().join("storm");
    std::fs::write(&file, batch)?;
    let (page, used) = (Page::of_agent(&host.socket())?, Used::now(pid)?);
    let (begun, made_before) = (Instant::now(), children()?);
    let output = host.exec(&["ip", "-batch", &file.to_string_lossy()])?;
    ensure!(output.status.success(), "ip -batch: {}", String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default());
    let (lasted, maker) = (begun.elapsed(), children()?.saturating_sub(made_before));
    let mut last = Used::now(pid)?;
    loop {
        std::thread::sleep(REST);
        let now = Used::now(pid)?;
        // A look costs it nothing; what it does beside the storm is well below a hundredth.
        if now.since(&last).share() < 1.0 {
            break;
        }
        ensure!(begun.elapsed() < lasted + LIMIT, "the agent does not come to rest after the storm");
        last = now;
    }
    let agent = Used::now(pid)?.since(&used);
    let after = Page::of_agent(&host.socket())?;
    let added = |name: &str, label: &str| after.added(&page, name, label);
    Ok(Part {
        maker,
        lasted,
        agent,
        reads: ["state", "interfaces"].map(|what| added("overlayd_kernel_reads_total", what)),
        repairs: added("overlayd_drift_repairs_total", ""),
    })
}

/// Processor time of the children that have ended.
fn children() -> nix::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(micros.unsigned_abs()))
}
