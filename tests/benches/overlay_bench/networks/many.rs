//! A real `overlayd` in N isolated networks with some peers each: its start, its memory and its wake-ups.
//!
//! All networks have the same range and the same peers' addresses, as those of customers may.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use overlay_agent::model::Vni;
use overlayctl::lab::Host;
use overlayctl::lab::layout::ETCD_PREFIX;
use serde_json::json;
use tokio::runtime::Runtime;

use super::super::bench_lab::{BenchLab, FAMILY};
use super::super::memory::{proc_field_mib, read_proc_file};
use super::super::process_stats::{Usage, UsageDelta};
use super::super::progress;
use super::super::report::{Report, Row};
use super::super::stats::milliseconds;
use super::super::synthetic_peer::{SUBNET_LENGTH, SyntheticPeer, network_cidr, synthetic_peers};
use super::{NetworksArguments, network_status};

/// Goal of the resident memory of one more network at rest, in KiB.
const MAX_NETWORK_KIB: f64 = 200.0;
/// Goal of wake-ups relative to those with the smallest number of networks: equal, apart from the variation between two minutes.
const MAX_WAKEUP_RATIO: f64 = 1.1;
/// The baseline of all rows.
const BASELINE: &str = "the smallest number of networks";
/// Time limit for all networks to be in place.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// Interval of polling the agent.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Delay before memory is read. By then the agent has returned the memory of its start.
const SETTLE_BEFORE_READ: Duration = Duration::from_secs(3);
/// Delay before wake-ups are counted: threads of the start end.
const SETTLE_BEFORE_WAKEUPS: Duration = Duration::from_secs(15);
/// The period of counting wake-ups.
const WAKEUP_WINDOW: Duration = Duration::from_secs(60);

/// The result of one start.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// Process begun to all networks in place, in ms.
    start: f64,
    /// CPU time of the agent until then, in ms.
    processor: f64,
    /// Resident memory at rest, in KiB.
    resident: f64,
    /// The usage of an idle minute.
    minute: Option<UsageDelta>,
}

/// Runs the measurement for all numbers of networks.
pub fn measure(arguments: &NetworksArguments, runtime: &Runtime, report: &mut Report) -> anyhow::Result<()> {
    let peers = synthetic_peers(FAMILY, 1..=arguments.peers)?;
    let mut smallest: Option<(u16, Vec<Sample>)> = None;
    for networks in arguments.networks.iter().copied() {
        let mut samples = Vec::new();
        for turn in 0..arguments.runs {
            progress(&format!("{networks} networks: agent {} of {}", turn + 1, arguments.runs));
            let with_minute = turn == 0 && !arguments.no_wakes;
            samples.push(runtime.block_on(measure_agent(networks, &peers, with_minute))?);
        }
        let (least, baseline) = smallest.get_or_insert_with(|| (networks, samples.clone()));
        add_rows(report, &format!("{networks} networks, {} peers each", peers.len()), &samples, baseline);
        let more = f64::from(networks) - f64::from(*least);
        if more > 0.0 {
            let pairs = samples.iter().zip(baseline.iter());
            let each: Vec<f64> = pairs.map(|(sample, baseline)| (sample.resident - baseline.resident) / more).collect();
            let conditions = format!("{networks} networks less {least}, {} peers each", peers.len());
            let row = Row::new("networks", &conditions, "resident memory of one network", "KiB", &each);
            report.add(row.map(|row| row.median_goal(MAX_NETWORK_KIB)));
        }
    }
    Ok(())
}

fn add_rows(report: &mut Report, conditions: &str, samples: &[Sample], baseline: &[Sample]) {
    let mut add = |what: &str, unit, goal: Option<f64>, value: fn(&Sample) -> Option<f64>| {
        let column = |all: &[Sample]| all.iter().filter_map(value).collect::<Vec<f64>>();
        let (values, baseline) = (column(samples), column(baseline));
        let row = Row::new("networks", conditions, what, unit, &values);
        let row = row.map(|row| row.with_baseline(BASELINE, &values, &baseline));
        report.add(row.map(|row| match goal {
            Some(limit) => row.ratio_goal(limit),
            None => row,
        }));
    };
    add("process begun to all networks in place", "ms", None, |s| Some(s.start));
    add("processor time until then", "ms", None, |s| Some(s.processor));
    add("resident (VmRSS)", "KiB", None, |s| Some(s.resident));
    add("a minute at rest: wake-ups of its threads", "wake-ups", Some(MAX_WAKEUP_RATIO), |s| {
        s.minute.map(|minute| f64::from(u32::try_from(minute.wakeups).unwrap_or(u32::MAX)))
    });
    add("a minute at rest: processor time", "ms", None, |s| s.minute.map(|minute| milliseconds(minute.cpu_time)));
}

/// Starts an agent in a lab of its own with these networks. On request also measures a minute at rest.
async fn measure_agent(networks: u16, peers: &[SyntheticPeer], with_minute: bool) -> anyhow::Result<Sample> {
    let bench = BenchLab::without_agents(1, 0).await?;
    let names: Vec<String> = (1..=networks).map(|number| format!("net{number}")).collect();
    put_networks(&bench, &names, peers)?;
    let host = bench.lab.host("h1")?;
    // Without probes: the agent's other costs are measured alone.
    let mut flags = vec!["--log-level", "warn", "--mesh-interval", "0s"];
    flags.extend(names.iter().flat_map(|name| ["--networks", name.as_str()]));
    let begun = Instant::now();
    let agent = host.agent_start(&flags)?.pid;
    wait_in_place(&host, &names, peers.len()).await?;
    let start = milliseconds(begun.elapsed());
    let processor = milliseconds(Usage::now(agent)?.total_cpu_time());
    tokio::time::sleep(SETTLE_BEFORE_READ).await;
    let resident = proc_field_mib(&read_proc_file(agent, "status")?, "VmRSS:")? * 1024.0;
    let mut minute = None;
    if with_minute {
        tokio::time::sleep(SETTLE_BEFORE_WAKEUPS).await;
        let before = Usage::now(agent)?;
        tokio::time::sleep(WAKEUP_WINDOW).await;
        minute = Some(Usage::now(agent)?.since(&before));
    }
    Ok(Sample { start, processor, resident, minute })
}

/// Writes the records and leases of isolated networks.
fn put_networks(bench: &BenchLab, names: &[String], peers: &[SyntheticPeer]) -> anyhow::Result<()> {
    let mut pairs = Vec::new();
    for (name, number) in names.iter().zip(2u32..) {
        let vni = Vni::try_from(number)?;
        let record = json!({
            "Network": network_cidr(FAMILY), "SubnetLen": SUBNET_LENGTH, "Isolated": true,
            "Backend": { "Type": "vxlan", "VNI": vni }
        });
        let prefix = format!("{ETCD_PREFIX}/networks/{name}");
        pairs.push((format!("{prefix}/config"), record.to_string()));
        pairs.push((format!("{ETCD_PREFIX}/vnis/{vni}"), name.clone()));
        for peer in peers {
            pairs.push((format!("{prefix}/subnets/{}", peer.store_key()?), peer.lease_value_in(vni)));
        }
    }
    bench.with_etcd_gateway(|mut gateway| gateway.put_all(&pairs))
}

/// Waits until the agent is ready in each of these networks and has all peers there. Asks about one network at a time, so that
/// polling costs almost nothing.
async fn wait_in_place(host: &Host<'_>, names: &[String], peers: usize) -> anyhow::Result<()> {
    let end = Instant::now() + READY_TIMEOUT;
    for name in names {
        loop {
            // The socket appears some milliseconds after the process, and a network when it is joined.
            let status = network_status(host, name);
            if let Ok(status) = &status
                && status.ready
                && status.data_path.peers == peers
                // An entry waits for the other end of a transit while another network starts.
                && status.data_path.failed.is_empty()
            {
                break;
            }
            host.agent().with_context(|| format!("overlayd of {} has ended: see {}", host.name(), host.log().display()))?;
            ensure!(Instant::now() < end, "{name} is not in place with {peers} peers: {status:?}");
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
    Ok(())
}
