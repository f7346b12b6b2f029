//! `fleet`: hundreds of real agents, each a host of one lab, all on one etcd.
//!
//! All start at once. Once every host reaches every other one, the idle cost is measured; then one more joins, and the third one
//! is killed and restarted. Full reachability is polled from one agent at a time, in turns, so that polling costs almost nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use nix::sys::signal::Signal;
use overlay_agent::model::PerFamily;
use overlayctl::lab::{Families, Host, Lab, LabName, LabOptions, LabsDir, Progress};

use super::memory::{proc_field_mib, read_proc_file};
use super::process_stats::{MetricsPage, Usage, UsageDelta, etcd_process};
use super::progress;
use super::report::{Report, Row};
use super::stats::{Summary, milliseconds};

/// Probes are off. With them each host resolves the address of each other one, and the kernel keeps the neighbours of all
/// namespaces in one table of 1,024 entries (`net.ipv4.neigh.default.gc_thresh3`), which 33 hosts fill; then no host reaches
/// another. Separate machines have separate tables.
const AGENT_FLAGS: &[&str] = &["--log-level", "warn", "--mesh-interval", "0s"];
/// Time limit until every agent reaches every other one.
const CONVERGE_TIMEOUT: Duration = Duration::from_secs(300);
/// Interval of polling an agent that is not complete.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The measured idle period: three renewals of each lease.
const IDLE_PERIOD: Duration = Duration::from_secs(60);
/// Delay before the idle period: threads of the start end, memory is returned.
const SETTLE_TIME: Duration = Duration::from_secs(12);
/// Goal of a join until every host reaches the new one, in milliseconds.
const MAX_JOIN_MS: f64 = 2_000.0;
/// Goal of an agent's CPU time at the start, largest fleet to smallest. It must stay below the ratio of their sizes.
const GROWTH_BASELINE: &str = "the smallest fleet";

/// Options of the measurement.
#[derive(Debug, Args)]
pub struct FleetArguments {
    /// Number of agents; may be given several times
    #[arg(long, value_name = "N", default_values_t = [25, 50, 100, 150])]
    agents: Vec<u16>,
    /// Fleets of each size
    #[arg(long, value_name = "K", default_value_t = 1)]
    runs: usize,
}

/// The result of one fleet.
#[derive(Debug, Default, Clone)]
struct FleetResult {
    /// From the first agent's start until every host reached every other one, in ms.
    mesh: f64,
    /// Starting the processes only, in ms.
    spawn_time: f64,
    /// CPU time of each agent until then, in ms.
    agent_cpu_times: Vec<f64>,
    etcd: f64,
    requests: f64,
    events: f64,
    sent_mib: f64,
    /// In MiB: median proportional size of an agent, and resident size of etcd.
    memory: f64,
    etcd_memory: f64,
    /// Idle, in per cent of one processor.
    idle_agent_cpu: f64,
    idle_etcd_cpu: f64,
    idle_requests: f64,
    idle_wakeups: f64,
    /// A host joins: until it is ready and complete, and until every host reaches it.
    join_time: f64,
    join_agent_cpu: f64,
    join_etcd_cpu: f64,
    /// The third agent is killed and restarted.
    rejoin_time: f64,
    rejoin_ops: f64,
}

/// Measures each number of agents.
pub fn measure(arguments: &FleetArguments, report: &mut Report) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut first: Option<Vec<FleetResult>> = None;
    for agents in &arguments.agents {
        ensure!(*agents >= 3, "a fleet has three agents at least");
        let mut fleets = Vec::new();
        for turn in 0..arguments.runs {
            progress(&format!("{agents} agents: fleet {} of {}", turn + 1, arguments.runs));
            fleets.push(runtime.block_on(measure_fleet(*agents))?);
        }
        add_rows(report, &format!("{agents} agents"), &fleets, first.as_deref().unwrap_or(&fleets));
        first.get_or_insert(fleets);
    }
    Ok(())
}

fn add_rows(report: &mut Report, conditions: &str, fleets: &[FleetResult], first: &[FleetResult]) {
    let column = |all: &[FleetResult], value: fn(&FleetResult) -> f64| all.iter().map(value).collect::<Vec<f64>>();
    let row = |what: &str, unit, value: fn(&FleetResult) -> f64| {
        let values = column(fleets, value);
        Row::new("fleet", conditions, what, unit, &values)
            .map(|row| row.with_baseline(GROWTH_BASELINE, &values, &column(first, value)))
    };
    report.add(row("all started to full mesh", "ms", |f| f.mesh));
    report.add(row("of it, starting the processes", "ms", |f| f.spawn_time));
    let agent_times: Vec<f64> = fleets.iter().flat_map(|f| f.agent_cpu_times.clone()).collect();
    report.add(Row::new("fleet", conditions, "an agent's processor time until then", "ms", &agent_times));
    report.add(row("all started: processor time of an agent, the mean", "ms", |f| {
        f.agent_cpu_times.iter().sum::<f64>() / f64::from(u32::try_from(f.agent_cpu_times.len()).unwrap_or(1))
    }));
    report.add(row("etcd's processor time until then", "ms", |f| f.etcd));
    report.add(row("etcd's requests until then", "requests", |f| f.requests));
    report.add(row("watch events that etcd sent until then", "events", |f| f.events));
    report.add(row("bytes that etcd sent until then", "MiB", |f| f.sent_mib));
    report.add(row("an agent's memory (Pss)", "MiB", |f| f.memory));
    report.add(row("etcd's memory (VmRSS)", "MiB", |f| f.etcd_memory));
    report.add(row("at rest: an agent's share of a processor", "%", |f| f.idle_agent_cpu));
    report.add(row("at rest: etcd's share of a processor", "%", |f| f.idle_etcd_cpu));
    report.add(row("at rest: messages to etcd a minute", "messages", |f| f.idle_requests));
    report.add(row("at rest: an agent's wake-ups a minute", "wake-ups", |f| f.idle_wakeups));
    report.add(row("one joins: start to a way from all and to all", "ms", |f| f.join_time).map(|r| r.median_goal(MAX_JOIN_MS)));
    report.add(row("one joins: processor time of another agent", "ms", |f| f.join_agent_cpu));
    report.add(row("one joins: etcd's processor time", "ms", |f| f.join_etcd_cpu));
    report.add(row("one is killed and returns: start to ready with all", "ms", |f| f.rejoin_time));
    let changes = column(fleets, |f| f.rejoin_ops);
    let row = Row::new("fleet", conditions, "one is killed and returns: kernel changes of all the others", "ops", &changes);
    report.add(row.map(|row| row.median_goal(0.0)));
}

/// The overlay's network: 4,095 subnets, more than the maximum number of hosts of a lab.
const NETWORK: &str = "10.240.0.0/12";

/// Runs one fleet from its start to its end.
async fn measure_fleet(agents: u16) -> anyhow::Result<FleetResult> {
    // The last host joins later.
    let options = LabOptions {
        hosts: agents + 1,
        containers: 0,
        families: Families::V4,
        networks: PerFamily { v4: Some(NETWORK.parse()?), v6: None },
        agents: false,
        ..LabOptions::new(LabName::unique())
    };
    let lab = Lab::up(&LabsDir::for_user(), &options, Progress::silent()).await?.guarded();
    let hosts: Vec<Host<'_>> = lab.hosts().collect();
    let (last_host, hosts) = hosts.split_last().context("a lab without hosts")?;
    let etcd = etcd_process(&lab)?.pid;

    let (page, used) = (MetricsPage::of_etcd(&lab)?, Usage::now(etcd)?);
    let start = Instant::now();
    for host in hosts {
        host.agent_start(AGENT_FLAGS)?;
    }
    let mut fleet = FleetResult { spawn_time: milliseconds(start.elapsed()), ..FleetResult::default() };
    wait_all_converged(hosts, hosts.len() - 1).await?;
    fleet.mesh = milliseconds(start.elapsed());
    let after = MetricsPage::of_etcd(&lab)?;
    fleet.etcd = milliseconds(Usage::now(etcd)?.since(&used).cpu_time);
    fleet.requests = requests(&after, &page);
    fleet.events = after.delta(&page, "etcd_debugging_mvcc_events_total", "");
    fleet.sent_mib = after.delta(&page, "etcd_network_client_grpc_sent_bytes_total", "") / f64::from(1 << 20);
    fleet.agent_cpu_times = agent_usages(hosts)?.iter().map(|used| milliseconds(used.total_cpu_time())).collect();

    tokio::time::sleep(SETTLE_TIME).await;
    measure_idle(&lab, hosts, etcd, &mut fleet).await?;

    let (used, before) = (Usage::now(etcd)?, agent_usages(hosts)?);
    let start = Instant::now();
    last_host.agent_start(AGENT_FLAGS)?;
    wait_all_converged(std::slice::from_ref(last_host), hosts.len()).await?;
    wait_all_converged(hosts, hosts.len()).await?;
    fleet.join_time = milliseconds(start.elapsed());
    fleet.join_agent_cpu = mean(&usage_deltas(hosts, &before)?, |b| milliseconds(b.cpu_time));
    fleet.join_etcd_cpu = milliseconds(Usage::now(etcd)?.since(&used).cpu_time);

    let killed_host = hosts[2];
    let ops = |host: &Host<'_>| Ok::<f64, anyhow::Error>(MetricsPage::of_agent(&host.socket())?.sum("overlayd_ops_total", ""));
    let others = || hosts.iter().filter(|host| host.name() != killed_host.name());
    let before = others().map(ops).collect::<anyhow::Result<Vec<f64>>>()?;
    killed_host.agent_stop(Signal::SIGKILL)?;
    let start = Instant::now();
    killed_host.agent_start(AGENT_FLAGS)?;
    wait_all_converged(&[killed_host], hosts.len()).await?;
    fleet.rejoin_time = milliseconds(start.elapsed());
    wait_all_converged(hosts, hosts.len()).await?;
    let after = others().map(ops).collect::<anyhow::Result<Vec<f64>>>()?;
    fleet.rejoin_ops = after.iter().zip(before).map(|(after, before)| after - before).sum();
    Ok(fleet)
}

/// The usage of agents and etcd while idle.
async fn measure_idle(lab: &Lab, hosts: &[Host<'_>], etcd: i32, fleet: &mut FleetResult) -> anyhow::Result<()> {
    let (page, used, before) = (MetricsPage::of_etcd(lab)?, Usage::now(etcd)?, agent_usages(hosts)?);
    tokio::time::sleep(IDLE_PERIOD).await;
    let deltas = usage_deltas(hosts, &before)?;
    fleet.idle_etcd_cpu = Usage::now(etcd)?.since(&used).cpu_percent();
    fleet.idle_agent_cpu = mean(&deltas, UsageDelta::cpu_percent);
    fleet.idle_wakeups = mean(&deltas, |b| f64::from(u32::try_from(b.wakeups).unwrap_or(u32::MAX)));
    fleet.idle_requests = MetricsPage::of_etcd(lab)?.delta(&page, "grpc_server_msg_received_total", "");
    let sizes = hosts.iter().map(|host| proc_mib(pid(host)?, "smaps_rollup", "Pss:")).collect::<anyhow::Result<Vec<f64>>>()?;
    fleet.memory = Summary::of(&sizes).map_or(0.0, |all| all.median);
    fleet.etcd_memory = proc_mib(etcd, "status", "VmRSS:")?;
    Ok(())
}

/// The number of requests that etcd has started to handle; a stream counts once.
fn requests(after: &MetricsPage, before: &MetricsPage) -> f64 {
    after.delta(before, "grpc_server_started_total", "")
}

/// Waits until each of these agents is ready and has this many peers in its kernel.
async fn wait_all_converged(hosts: &[Host<'_>], peers: usize) -> anyhow::Result<()> {
    let end = Instant::now() + CONVERGE_TIMEOUT;
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
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
    Ok(())
}

fn pid(host: &Host<'_>) -> anyhow::Result<i32> {
    Ok(host.agent().with_context(|| format!("overlayd of {} has ended", host.name()))?.pid)
}

fn agent_usages(hosts: &[Host<'_>]) -> anyhow::Result<Vec<Usage>> {
    hosts.iter().map(|host| Usage::now(pid(host)?)).collect()
}

fn usage_deltas(hosts: &[Host<'_>], before: &[Usage]) -> anyhow::Result<Vec<UsageDelta>> {
    Ok(agent_usages(hosts)?.iter().zip(before).map(|(now, before)| now.since(before)).collect())
}

fn mean(all: &[UsageDelta], value: impl Fn(&UsageDelta) -> f64) -> f64 {
    all.iter().map(value).sum::<f64>() / f64::from(u32::try_from(all.len().max(1)).unwrap_or(u32::MAX))
}

/// A line `Name:   123 kB` of a process, in MiB.
fn proc_mib(pid: i32, file: &str, name: &str) -> anyhow::Result<f64> {
    proc_field_mib(&read_proc_file(pid, file)?, name)
}
