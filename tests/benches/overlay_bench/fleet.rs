//! `fleet`: real agents by the hundred, each a host of one lab, all on one etcd.
//!
//! All are started at once; once everyone has a way to everyone they rest and are looked at; then one more joins, and the third one is killed and comes
//! back. Whether all have a way to all is asked of one agent at a time, in turns, so that asking costs next to nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use nix::sys::signal::Signal;
use overlay_agent::model::PerFamily;
use overlayctl::lab::{Families, Home, Host, Lab, LabName, LabOptions, Progress};

use super::gauge::{Between, Page, Used, etcd_process};
use super::memory::{field, of_process};
use super::progress;
use super::report::{Report, Row};
use super::stats::{Summary, milliseconds};

/// Without probes: with them each host asks for the address of each other one, and the kernel keeps the answers of all namespaces in one table of 1,024
/// entries (`net.ipv4.neigh.default.gc_thresh3`), which 33 hosts fill; then nobody reaches anybody. Hosts of their own have such a table each.
const FLAGS: &[&str] = &["--log-level", "warn", "--mesh-interval", "0s"];
/// How long all may take to have a way to all.
const LIMIT: Duration = Duration::from_secs(300);
/// How often an agent that has not everything yet is asked again.
const POLL: Duration = Duration::from_millis(20);
/// The time at rest that is measured: three renewals of each lease.
const REST: Duration = Duration::from_secs(60);
/// Between the full mesh and the time at rest: threads of the start end, memory is given back.
const SETTLE: Duration = Duration::from_secs(12);
/// One joins, and all have a way to it, in milliseconds.
const JOIN_GOAL: f64 = 2_000.0;
/// Processor time of an agent at the start, the largest fleet to the smallest: below the ratio of their sizes.
const GROWTH: &str = "the smallest fleet";

/// How to measure.
#[derive(Debug, Args)]
pub struct FleetArguments {
    /// Number of agents; may be given several times
    #[arg(long, value_name = "N", default_values_t = [25, 50, 100, 150])]
    agents: Vec<u16>,
    /// Fleets of each
    #[arg(long, value_name = "K", default_value_t = 1)]
    runs: usize,
}

/// What one fleet came to.
#[derive(Debug, Default, Clone)]
struct Fleet {
    /// From the first agent's start until all had a way to all, in ms.
    mesh: f64,
    /// Starting the processes alone, in ms.
    started: f64,
    /// Processor time of each agent until then, in ms.
    each: Vec<f64>,
    etcd: f64,
    requests: f64,
    events: f64,
    sent_mib: f64,
    /// In MiB: proportional size of an agent, at the median, and etcd's resident size.
    memory: f64,
    etcd_memory: f64,
    /// At rest, shares of one processor in per cent.
    rest_agent: f64,
    rest_etcd: f64,
    rest_requests: f64,
    rest_wakes: f64,
    /// One joins: until it is ready with a way to all, and until all have a way to it.
    join: f64,
    join_agents: f64,
    join_etcd: f64,
    /// The third is killed and started again.
    back: f64,
    back_changes: f64,
}

/// Measures each number of agents.
pub fn measure(arguments: &FleetArguments, report: &mut Report) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut first: Option<Vec<Fleet>> = None;
    for agents in &arguments.agents {
        ensure!(*agents >= 3, "a fleet has three agents at least");
        let mut fleets = Vec::new();
        for turn in 0..arguments.runs {
            progress(&format!("{agents} agents: fleet {} of {}", turn + 1, arguments.runs));
            fleets.push(runtime.block_on(fleet(*agents))?);
        }
        add_rows(report, &format!("{agents} agents"), &fleets, first.as_deref().unwrap_or(&fleets));
        first.get_or_insert(fleets);
    }
    Ok(())
}

fn add_rows(report: &mut Report, conditions: &str, fleets: &[Fleet], first: &[Fleet]) {
    let column = |all: &[Fleet], value: fn(&Fleet) -> f64| all.iter().map(value).collect::<Vec<f64>>();
    let row = |what: &str, unit, value: fn(&Fleet) -> f64| {
        let values = column(fleets, value);
        Row::new("fleet", conditions, what, unit, &values).map(|row| row.against(GROWTH, &values, &column(first, value)))
    };
    report.add(row("all started to full mesh", "ms", |f| f.mesh));
    report.add(row("of it, starting the processes", "ms", |f| f.started));
    let each: Vec<f64> = fleets.iter().flat_map(|f| f.each.clone()).collect();
    report.add(Row::new("fleet", conditions, "an agent's processor time until then", "ms", &each));
    report.add(row("all started: processor time of an agent, the mean", "ms", |f| {
        f.each.iter().sum::<f64>() / f64::from(u32::try_from(f.each.len()).unwrap_or(1))
    }));
    report.add(row("etcd's processor time until then", "ms", |f| f.etcd));
    report.add(row("etcd's requests until then", "requests", |f| f.requests));
    report.add(row("watch events that etcd sent until then", "events", |f| f.events));
    report.add(row("bytes that etcd sent until then", "MiB", |f| f.sent_mib));
    report.add(row("an agent's memory (Pss)", "MiB", |f| f.memory));
    report.add(row("etcd's memory (VmRSS)", "MiB", |f| f.etcd_memory));
    report.add(row("at rest: an agent's share of a processor", "%", |f| f.rest_agent));
    report.add(row("at rest: etcd's share of a processor", "%", |f| f.rest_etcd));
    report.add(row("at rest: messages to etcd a minute", "messages", |f| f.rest_requests));
    report.add(row("at rest: an agent's wake-ups a minute", "wake-ups", |f| f.rest_wakes));
    report.add(row("one joins: start to a way from all and to all", "ms", |f| f.join).map(|r| r.median_goal(JOIN_GOAL)));
    report.add(row("one joins: processor time of another agent", "ms", |f| f.join_agents));
    report.add(row("one joins: etcd's processor time", "ms", |f| f.join_etcd));
    report.add(row("one is killed and returns: start to ready with all", "ms", |f| f.back));
    let changes = column(fleets, |f| f.back_changes);
    let row = Row::new("fleet", conditions, "one is killed and returns: kernel changes of all the others", "ops", &changes);
    report.add(row.map(|row| row.median_goal(0.0)));
}

/// The overlay's network: 4,095 subnets, more hosts than a lab has.
const NETWORK: &str = "10.240.0.0/12";

/// One fleet from its start to its end.
async fn fleet(agents: u16) -> anyhow::Result<Fleet> {
    // The last host joins later.
    let options = LabOptions {
        hosts: agents + 1,
        containers: 0,
        families: Families::V4,
        networks: PerFamily { v4: Some(NETWORK.parse()?), v6: None },
        agents: false,
        ..LabOptions::new(LabName::unique())
    };
    let lab = Lab::up(&Home::of_user(), &options, Progress::silent()).await?.guarded();
    let hosts: Vec<Host<'_>> = lab.hosts().collect();
    let (late, hosts) = hosts.split_last().context("a lab without hosts")?;
    let etcd = etcd_process(&lab)?.pid;

    let (page, used) = (Page::of_etcd(&lab)?, Used::now(etcd)?);
    let begun = Instant::now();
    for host in hosts {
        host.agent_start(FLAGS)?;
    }
    let mut fleet = Fleet { started: milliseconds(begun.elapsed()), ..Fleet::default() };
    all_have(hosts, hosts.len() - 1).await?;
    fleet.mesh = milliseconds(begun.elapsed());
    let after = Page::of_etcd(&lab)?;
    fleet.etcd = milliseconds(Used::now(etcd)?.since(&used).processor);
    fleet.requests = requests(&after, &page);
    fleet.events = after.added(&page, "etcd_debugging_mvcc_events_total", "");
    fleet.sent_mib = after.added(&page, "etcd_network_client_grpc_sent_bytes_total", "") / f64::from(1 << 20);
    fleet.each = each_used(hosts)?.iter().map(|used| milliseconds(used.since_start())).collect();

    tokio::time::sleep(SETTLE).await;
    at_rest(&lab, hosts, etcd, &mut fleet).await?;

    let (used, before) = (Used::now(etcd)?, each_used(hosts)?);
    let begun = Instant::now();
    late.agent_start(FLAGS)?;
    all_have(std::slice::from_ref(late), hosts.len()).await?;
    all_have(hosts, hosts.len()).await?;
    fleet.join = milliseconds(begun.elapsed());
    fleet.join_agents = mean(&between(hosts, &before)?, |b| milliseconds(b.processor));
    fleet.join_etcd = milliseconds(Used::now(etcd)?.since(&used).processor);

    let third = hosts[2];
    let ops = |host: &Host<'_>| Ok::<f64, anyhow::Error>(Page::of_agent(&host.socket())?.sum("overlayd_ops_total", ""));
    let others = || hosts.iter().filter(|host| host.name() != third.name());
    let before = others().map(ops).collect::<anyhow::Result<Vec<f64>>>()?;
    third.agent_stop(Signal::SIGKILL)?;
    let begun = Instant::now();
    third.agent_start(FLAGS)?;
    all_have(&[third], hosts.len()).await?;
    fleet.back = milliseconds(begun.elapsed());
    all_have(hosts, hosts.len()).await?;
    let after = others().map(ops).collect::<anyhow::Result<Vec<f64>>>()?;
    fleet.back_changes = after.iter().zip(before).map(|(after, before)| after - before).sum();
    Ok(fleet)
}

/// What agents and etcd use while nothing happens.
async fn at_rest(lab: &Lab, hosts: &[Host<'_>], etcd: i32, fleet: &mut Fleet) -> anyhow::Result<()> {
    let (page, used, before) = (Page::of_etcd(lab)?, Used::now(etcd)?, each_used(hosts)?);
    tokio::time::sleep(REST).await;
    let each = between(hosts, &before)?;
    fleet.rest_etcd = Used::now(etcd)?.since(&used).share();
    fleet.rest_agent = mean(&each, Between::share);
    fleet.rest_wakes = mean(&each, |b| f64::from(u32::try_from(b.wakes).unwrap_or(u32::MAX)));
    fleet.rest_requests = Page::of_etcd(lab)?.added(&page, "grpc_server_msg_received_total", "");
    let sizes = hosts.iter().map(|host| kib(pid(host)?, "smaps_rollup", "Pss:")).collect::<anyhow::Result<Vec<f64>>>()?;
    fleet.memory = Summary::of(&sizes).map_or(0.0, |all| all.median);
    fleet.etcd_memory = kib(etcd, "status", "VmRSS:")?;
    Ok(())
}

/// Requests that etcd has begun to answer, streams counted once.
fn requests(after: &Page, before: &Page) -> f64 {
    after.added(before, "grpc_server_started_total", "")
}

/// Waits until each of these agents is ready and has that many peers in its kernel.
async fn all_have(hosts: &[Host<'_>], peers: usize) -> anyhow::Result<()> {
    let end = Instant::now() + LIMIT;
    for host in hosts {
        let client = host.client().with_timeout(Duration::from_secs(30));
        loop {
            let status = client.status().await;
            match &status {
                Ok(status) if status.ready && status.data_path.peers == peers => {
                    ensure!(status.data_path.failed.is_empty(), "{}: {:?}", host.name(), status.data_path.failed);
                    break;
                }
                _ => {}
            }
            ensure!(host.agent().is_some(), "overlayd of {} has ended: see {}", host.name(), host.log().display());
            ensure!(Instant::now() < end, "{} has no way to each of {peers} peers: {status:?}", host.name());
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(())
}

fn pid(host: &Host<'_>) -> anyhow::Result<i32> {
    Ok(host.agent().with_context(|| format!("overlayd of {} has ended", host.name()))?.pid)
}

fn each_used(hosts: &[Host<'_>]) -> anyhow::Result<Vec<Used>> {
    hosts.iter().map(|host| Used::now(pid(host)?)).collect()
}

fn between(hosts: &[Host<'_>], before: &[Used]) -> anyhow::Result<Vec<Between>> {
    Ok(each_used(hosts)?.iter().zip(before).map(|(now, before)| now.since(before)).collect())
}

fn mean(all: &[Between], value: impl Fn(&Between) -> f64) -> f64 {
    all.iter().map(value).sum::<f64>() / f64::from(u32::try_from(all.len().max(1)).unwrap_or(u32::MAX))
}

/// A line `Name:   123 kB` of a process, in MiB.
fn kib(pid: i32, file: &str, name: &str) -> anyhow::Result<f64> {
    field(&of_process(pid, file)?, name)
}
