//! `churn`: continuous changes of leases. Does the agent keep up, how many changes does it batch, and what does it cost?
//!
//! Writers put, delete and put again at a steady rate, each lease in turn. The kernel's route events and a bare watch of the
//! store give the arrival time of each change; the begin and the end of the run are compared.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use overlay_agent::model::{Cidr, Mac};
use tokio_util::sync::CancellationToken;

use super::bench_lab::{BenchLab, etcd_key, etcd_socket_addr};
use super::join::{Observation, Observer, StopOnDrop, listen_routes, watch_leases};
use super::process_stats::{MetricsPage, Usage, etcd_process};
use super::progress;
use super::report::{Report, Row};
use super::stats::milliseconds;
use super::synthetic_peer::SyntheticPeer;
use overlay_tests::etcd_gateway::EtcdGateway;

/// Time limit for the arrival of the last changes.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// The compared parts at the begin and at the end: this fraction of the run.
const EDGE_FRACTION: u32 = 6;
/// Goal of the median latency at the end relative to the begin: above it there is a backlog.
const MAX_SLOWDOWN: f64 = 1.5;

/// Options of the measurement.
#[derive(Debug, Args)]
pub struct ChurnArguments {
    /// Changes of leases per second
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    rate: u32,
    /// Duration in seconds
    #[arg(long, value_name = "S", default_value_t = 60)]
    seconds: u32,
    /// Leases, changed one after the other
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    peers: u32,
    /// Connections that write to etcd
    #[arg(long, value_name = "K", default_value_t = 8)]
    writers: usize,
}

/// A sent change.
#[derive(Debug, Clone, Copy)]
struct SentChange {
    subnet: Cidr,
    /// Whether the lease exists afterwards.
    present: bool,
    /// Whether it adds or removes the kernel's route.
    changes_route: bool,
    at: Instant,
}

/// The latency of each change in milliseconds, with the time of sending.
#[derive(Debug, Default)]
struct Latencies {
    samples: Vec<(Instant, f64)>,
    /// Changes superseded by another one of the same lease before they arrived.
    superseded: usize,
}

/// Runs the measurement.
pub fn measure(arguments: &ChurnArguments, report: &mut Report) -> anyhow::Result<()> {
    let ChurnArguments { rate, seconds, peers, writers } = *arguments;
    ensure!(rate > 0 && seconds > 0 && peers > 0 && writers > 0, "rate, seconds, peers and writers have to be at least 1");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    progress(&format!("one agent, {peers} leases: starting"));
    let bench = runtime.block_on(BenchLab::new(1, peers))?;
    let host = bench.lab.host("h1")?;
    let (agent, etcd) = (host.agent().context("the agent has ended")?.pid, etcd_process(&bench.lab)?.pid);
    progress(&format!("{rate} changes a second for {seconds} s"));
    let before = (MetricsPage::of_agent(&host.socket())?, Usage::now(agent)?, Usage::now(etcd)?);
    let (sent, observations) = listen_and_write(&bench, arguments)?;
    let after = (MetricsPage::of_agent(&host.socket())?, Usage::now(agent)?, Usage::now(etcd)?);
    runtime.block_on(wait_converged(&bench, &sent))?;

    let conditions = format!("{rate} changes/s for {seconds} s, {peers} leases");
    let single_row = |what: &str, unit, value: f64| Row::new("churn", &conditions, what, unit, &[value]);
    let (Some(first), Some(last)) = (sent.iter().map(|s| s.at).min(), sent.iter().map(|s| s.at).max()) else {
        bail!("nothing was sent");
    };
    let duration = last.duration_since(first);
    #[expect(clippy::cast_precision_loss, reason = "some hundred thousand changes")]
    let changes = sent.len() as f64;
    report.add(single_row("changes that etcd took", "1/s", changes / duration.as_secs_f64()));
    let kernel = match_latencies(sent.iter().filter(|s| s.changes_route), &sent, &observations, Observer::Host(0));
    let watch_latencies = match_latencies(sent.iter(), &sent, &observations, Observer::Watcher);
    let part = duration / EDGE_FRACTION;
    let begin = |lags: &Latencies| lags.between(first, first + part);
    let end = |lags: &Latencies| lags.between(last - part, last);
    let lag = |what: &str, values: &[f64]| Row::new("churn", &conditions, what, "ms", values);
    let (kernel_begin, kernel_end) = (begin(&kernel), end(&kernel));
    report.add(
        lag("put to route, begin", &kernel_begin).map(|r| r.with_baseline("bare watch", &kernel_begin, &begin(&watch_latencies))),
    );
    report.add(lag("put to route, end", &kernel_end).map(|r| r.with_baseline("bare watch", &kernel_end, &end(&watch_latencies))));
    let compared = lag("put to route, end to begin", &kernel_end);
    report.add(compared.map(|r| r.with_baseline("begin", &sorted(&kernel_end), &sorted(&kernel_begin)).ratio_goal(MAX_SLOWDOWN)));
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    report.add(single_row("overtaken by the next change of the same lease", "changes", kernel.superseded as f64));
    let last_route_time = observations.iter().filter(|s| s.observer == Observer::Host(0)).map(|s| s.at).max();
    report.add(single_row(
        "last change sent to last route",
        "ms",
        last_route_time.map_or(f64::NAN, |at| milliseconds(at.saturating_duration_since(last))),
    ));

    let (agent, etcd) = (after.1.since(&before.1), after.2.since(&before.2));
    let share = Row::new("churn", &conditions, "agent's share of one processor", "%", &[agent.cpu_percent()]);
    report.add(share.map(|row| row.with_baseline("etcd", &[agent.cpu_percent()], &[etcd.cpu_percent()])));
    report.add(single_row("agent's processor time a change", "µs", agent.cpu_time.as_secs_f64() * 1e6 / changes));
    let added = |name: &str, label: &str| after.0.delta(&before.0, name, label);
    let (events, batches) = (added("overlayd_events_total", "store"), added("overlayd_batch_ops_count", ""));
    report.add(single_row("events from the store", "events", events));
    report.add(single_row("rounds of the reconcile loop", "rounds", added("overlayd_rounds_total", "")));
    report.add(single_row("batches", "batches", batches));
    report.add(single_row("events a batch", "events", events / batches));
    report.add(single_row("kernel changes a batch", "ops", added("overlayd_batch_ops_sum", "") / batches));
    let repairs = added("overlayd_drift_repairs_total", "");
    report.add(single_row("own changes taken for drift", "entries", repairs).map(|row| row.median_goal(0.0)));
    let reads = added("overlayd_kernel_reads_total", "");
    report.add(single_row("reads of the kernel as a whole", "reads", reads).map(|row| row.median_goal(1.0)));
    Ok(())
}

/// Waits until the agent has routes to exactly the current leases.
async fn wait_converged(bench: &BenchLab, sent: &[SentChange]) -> anyhow::Result<()> {
    let mut present: BTreeMap<Cidr, bool> = bench.peers.iter().map(|peer| (peer.subnet, true)).collect();
    // The changes of one lease are in order, because it has one writer.
    present.extend(sent.iter().map(|sent| (sent.subnet, sent.present)));
    let peers = present.values().filter(|is_present| **is_present).count();
    let is_converged = |status: &overlay_agent::model::api::Status| status.ready && status.data_path.peers == peers;
    bench
        .lab
        .host("h1")?
        .wait_status(DRAIN_TIMEOUT, &format!("h1 does not have {peers} peers after the churn"), is_converged)
        .await?;
    Ok(())
}

/// Writes changes while threads record their arrivals.
fn listen_and_write(bench: &BenchLab, arguments: &ChurnArguments) -> anyhow::Result<(Vec<SentChange>, Vec<Observation>)> {
    let (host, net) = (bench.lab.netns("h1")?, bench.lab.netns("net")?);
    let finished = AtomicBool::new(false);
    let stop = CancellationToken::new();
    let (sender, receiver) = sync_channel(4096);
    let (ready, ready_receiver) = sync_channel(2);
    thread::scope(|scope| {
        let stop_guard = StopOnDrop { finished: &finished, stop: stop.clone() };
        let collector = scope.spawn(move || receiver.iter().collect::<Vec<Observation>>());
        let watcher = {
            let (sender, ready, net) = (sender.clone(), ready.clone(), &net);
            scope.spawn(move || watch_leases(net, &sender, &ready, stop))
        };
        let listener = {
            let (host, finished) = (&host, &finished);
            scope.spawn(move || listen_routes(host, Observer::Host(0), &sender, &ready, finished))
        };
        for _ in 0..2 {
            if ready_receiver.recv_timeout(DRAIN_TIMEOUT).is_err() {
                break;
            }
        }
        let start = Instant::now();
        let writers: Vec<_> = (0..arguments.writers)
            .map(|number| {
                let net = &net;
                scope.spawn(move || net.run(|| write(bench, arguments, number, start))?)
            })
            .collect();
        let mut sent = Vec::new();
        let mut failed = None;
        for writer in writers {
            match writer.join() {
                Ok(Ok(changes)) => sent.extend(changes),
                Ok(Err(error)) => failed = Some(error),
                Err(_) => bail!("a writer panicked"),
            }
        }
        // Outstanding changes arrive after the last write.
        thread::sleep(Duration::from_secs(2));
        drop(stop_guard);
        for thread in [watcher, listener] {
            match thread.join() {
                Ok(result) => result?,
                Err(_) => bail!("a listening thread panicked"),
            }
        }
        let observations = collector.join().unwrap_or_default();
        failed.map_or(Ok((sent, observations)), Err)
    })
}

/// One writer: every n-th lease, each change at its time, or as soon after as etcd accepts it.
fn write(bench: &BenchLab, arguments: &ChurnArguments, number: usize, start: Instant) -> anyhow::Result<Vec<SentChange>> {
    let mut gateway = EtcdGateway::connect(etcd_socket_addr())?;
    let own: Vec<&SyntheticPeer> = bench.peers.iter().skip(number).step_by(arguments.writers).collect();
    ensure!(!own.is_empty(), "more writers than leases");
    let total = u64::from(arguments.rate) * u64::from(arguments.seconds);
    let step = Duration::from_secs(1) / arguments.rate;
    let mut sent = Vec::new();
    for count in (number as u64..total).step_by(arguments.writers) {
        let send_time = start + step * u32::try_from(count)?;
        thread::sleep(send_time.saturating_duration_since(Instant::now()));
        let turn = sent.len() / own.len();
        let peer = own[sent.len() % own.len()];
        let key = etcd_key(peer)?;
        // Another MAC, deleted, restored.
        let exchange = match turn % 3 {
            1 => gateway.delete(&key)?,
            _ => gateway.put(&key, &with_mac(peer, turn).lease_value())?,
        };
        sent.push(SentChange {
            subnet: peer.subnet,
            present: turn % 3 != 1,
            changes_route: !turn.is_multiple_of(3),
            at: exchange.sent,
        });
    }
    Ok(sent)
}

/// The peer with its MAC of a turn.
fn with_mac(peer: &SyntheticPeer, turn: usize) -> SyntheticPeer {
    let [a, b, _, d, e, f] = peer.mac.0;
    SyntheticPeer { mac: Mac([a, b, u8::try_from(1 + turn % 200).unwrap_or(1), d, e, f]), ..*peer }
}

/// Matches sent changes with the arrivals at one observer.
fn match_latencies<'a>(
    selected: impl Iterator<Item = &'a SentChange>,
    all: &[SentChange],
    observations: &[Observation],
    observer: Observer,
) -> Latencies {
    let mut changes: BTreeMap<Cidr, Vec<Instant>> = BTreeMap::new();
    for change in all {
        changes.entry(change.subnet).or_default().push(change.at);
    }
    changes.values_mut().for_each(|times| times.sort_unstable());
    let mut arrivals: BTreeMap<Cidr, Vec<(Instant, bool)>> = BTreeMap::new();
    for observation in observations.iter().filter(|seen| seen.observer == observer) {
        arrivals.entry(observation.subnet).or_default().push((observation.at, observation.present));
    }
    let mut lags = Latencies::default();
    for change in selected {
        let next = changes.get(&change.subnet).and_then(|times| times.iter().find(|at| **at > change.at));
        let mut of_subnet = arrivals.get(&change.subnet).into_iter().flatten();
        let arrival =
            of_subnet.find(|(at, present)| *present == change.present && *at >= change.at && next.is_none_or(|n| at < n));
        match arrival {
            Some((at, _)) => lags.samples.push((change.at, milliseconds(at.duration_since(change.at)))),
            None => lags.superseded += 1,
        }
    }
    lags
}

impl Latencies {
    fn between(&self, from: Instant, to: Instant) -> Vec<f64> {
        self.samples.iter().filter(|(at, _)| (from..=to).contains(at)).map(|(_, lag)| *lag).collect()
    }
}

/// Sorted samples, so that the ratio of two sets of samples is that of their quantiles.
fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::super::synthetic_peer::synthetic_peers;
    use super::*;
    use overlay_agent::model::Family;

    #[test]
    fn change_matches_only_its_own_arrival() {
        let peer = synthetic_peers(Family::V4, 1..=1).expect("room")[0];
        let subnet = peer.subnet;
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let sent = |ms, present| SentChange { subnet, present, changes_route: true, at: at(ms) };
        let observation_at = |ms, present| Observation { observer: Observer::Host(0), subnet, present, at: at(ms) };
        let all = [sent(0, false), sent(100, true), sent(200, false), sent(300, true)];
        // The fourth change superseded the third one.
        let arrived = [observation_at(2, false), observation_at(105, true), observation_at(310, true)];
        let lags = match_latencies(all.iter(), &all, &arrived, Observer::Host(0));
        assert_eq!(lags.samples.iter().map(|(_, lag)| *lag).collect::<Vec<_>>(), [2.0, 5.0, 10.0]);
        assert_eq!(lags.superseded, 1);
        assert_eq!(lags.between(at(50), at(300)), [5.0, 10.0]);
    }

    #[test]
    fn turn_changes_only_the_mac() {
        let peer = synthetic_peers(Family::V4, 7..=7).expect("room")[0];
        let (first, second) = (with_mac(&peer, 0), with_mac(&peer, 3));
        assert!(first.mac != second.mac && first.mac != peer.mac);
        assert_eq!((first.subnet, first.public_ip), (peer.subnet, peer.public_ip));
    }
}
