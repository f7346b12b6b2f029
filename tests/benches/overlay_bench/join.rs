//! `join`: the time from a lease's put into a real etcd until every host with a real agent has its route in the kernel.
//!
//! One thread per host listens to route events in the host's namespace; another one runs a bare watch of the store, without agent
//! and kernel, as the baseline. One sample at a time: put, wait for all observers, delete, wait for all observers, pause.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Cidr;
use overlay_agent::model::event::StoreEvent;
use overlay_agent::store::{Store, StoreConfig};
use overlayctl::lab::layout::ETCD_PREFIX;
use tokio_util::sync::CancellationToken;

use super::bench_lab::{BenchLab, FAMILY, etcd_key, etcd_socket_addr};
use super::progress;
use super::raw_netlink::route_of;
use super::report::{Report, Row};
use super::rtnl::Rtnl;
use super::stats::{milliseconds, ratios};
use super::synthetic_peer::SyntheticPeer;
use overlay_tests::etcd_gateway::{EtcdGateway, RequestTiming};

/// `RTMGRP_IPV4_ROUTE` (`linux/rtnetlink.h`).
const RTMGRP_IPV4_ROUTE: u32 = 0x40;
/// Time limit of a sample.
const SAMPLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval at which a listening thread checks for its end.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Pause between samples, so that each starts in a quiet state.
const PAUSE: Duration = Duration::from_millis(5);
/// Goal from the bare watch's event to the route on the last host, in milliseconds: median, 99th percentile.
const MAX_LATENCY_MS: (f64, f64) = (1.0, 3.0);
/// Goal of the latency with peers relative to that with the first number of them.
const MAX_SCALING_RATIO: f64 = 1.1;
/// Initial samples, with cold connections and caches.
const WARM_UP_SAMPLES: usize = 10;

/// Options of the measurement.
#[derive(Debug, Args)]
pub struct JoinArguments {
    /// Number of existing peers; may be given several times
    #[arg(long, value_name = "N", default_values_t = [0, 1_000, 10_000])]
    peers: Vec<u32>,
    /// Samples of each
    #[arg(long, value_name = "K", default_value_t = 1_000)]
    samples: usize,
    /// Hosts with an agent
    #[arg(long, value_name = "N", default_value_t = 3)]
    hosts: u16,
}

/// The observer of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Observer {
    Watcher,
    Host(usize),
}

/// A change seen by an observer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Observation {
    pub(super) observer: Observer,
    pub(super) subnet: Cidr,
    pub(super) present: bool,
    pub(super) at: Instant,
}

/// In milliseconds; one value per sample, in `each_*` one per host.
#[derive(Debug, Default)]
struct Samples {
    acknowledged: Vec<f64>,
    watched: Vec<f64>,
    first: Vec<f64>,
    last: Vec<f64>,
    last_after_ack: Vec<f64>,
    over_watch: Vec<f64>,
    removed: Vec<f64>,
    removed_watched: Vec<f64>,
}

/// Measures with each number of peers.
pub fn measure(arguments: &JoinArguments, report: &mut Report) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut first: Option<Vec<f64>> = None;
    for peers in &arguments.peers {
        progress(&format!("{} agents, {peers} peers: starting", arguments.hosts));
        let bench = runtime.block_on(BenchLab::new(arguments.hosts, *peers))?;
        let new_peers = runtime.block_on(bench.unused_peers(arguments.samples + WARM_UP_SAMPLES))?;
        progress(&format!("{} agents, {peers} peers: {} samples", arguments.hosts, arguments.samples));
        let samples = listen_and_sample(&bench, &new_peers)?;
        let conditions = format!("{} agents, {peers} peers", arguments.hosts);
        add_rows(report, &conditions, &samples);
        // Relative to the bare watch of the same sample, because the machine may change between two sizes.
        let watch_ratios = ratios(&samples.last, &samples.watched);
        if let Some(first) = &first {
            let row = Row::new("join", &conditions, "put sent to route on every host, in bare watches", "x", &watch_ratios);
            report.add(row.map(|row| {
                row.with_baseline("the same with the first number", &watch_ratios, first).ratio_goal(MAX_SCALING_RATIO)
            }));
        }
        first.get_or_insert(watch_ratios);
    }
    Ok(())
}

fn add_rows(report: &mut Report, conditions: &str, samples: &Samples) {
    let row = |what: &str, values: &[f64]| Row::new("join", conditions, what, "ms", values);
    let row_with_watch_baseline =
        |what: &str, values: &[f64], baseline: &[f64]| row(what, values).map(|r| r.with_baseline("bare watch", values, baseline));
    report.add(row("put sent to acknowledged", &samples.acknowledged));
    report.add(row_with_watch_baseline("put sent to route on the first host", &samples.first, &samples.watched));
    report.add(row_with_watch_baseline("put sent to route on every host", &samples.last, &samples.watched));
    report
        .add(row("of it, over the bare watch", &samples.over_watch).map(|r| r.latency_goal(MAX_LATENCY_MS.0, MAX_LATENCY_MS.1)));
    report.add(row("put acknowledged to route on every host", &samples.last_after_ack));
    report.add(row_with_watch_baseline("deletion sent to route gone on every host", &samples.removed, &samples.removed_watched));
}

fn listen_and_sample(bench: &BenchLab, new_peers: &[SyntheticPeer]) -> anyhow::Result<Samples> {
    let namespaces = bench.lab.hosts().map(|host| host.netns()).collect::<Result<Vec<_>, _>>()?;
    let finished = AtomicBool::new(false);
    let stop = CancellationToken::new();
    let (sender, observations) = sync_channel(4096);
    thread::scope(|scope| {
        // The threads must end in every case, or the scope would wait for them for ever.
        let stop_guard = StopOnDrop { finished: &finished, stop: stop.clone() };
        let (ready, ready_receiver) = sync_channel(namespaces.len() + 1);
        let mut threads = Vec::new();
        for (number, netns) in namespaces.iter().enumerate() {
            let (sender, ready, finished) = (sender.clone(), ready.clone(), &finished);
            threads.push(scope.spawn(move || listen_routes(netns, Observer::Host(number), &sender, &ready, finished)));
        }
        {
            let (sender, ready, stop) = (sender.clone(), ready.clone(), stop.clone());
            let netns = bench.lab.netns("net")?;
            threads.push(scope.spawn(move || watch_leases(&netns, &sender, &ready, stop)));
        }
        drop((sender, ready));
        for _ in 0..threads.len() {
            if ready_receiver.recv_timeout(SAMPLE_TIMEOUT).is_err() {
                break;
            }
        }
        let hosts = namespaces.len();
        let sampled = bench.with_etcd_gateway(move |gateway| sample_all(gateway, new_peers, &observations, hosts));
        drop(stop_guard);
        for thread in threads {
            match thread.join() {
                Ok(result) => result?,
                Err(_) => bail!("a listening thread panicked"),
            }
        }
        sampled
    })
}

/// Stops the listening threads on drop.
pub(super) struct StopOnDrop<'a> {
    pub(super) finished: &'a AtomicBool,
    pub(super) stop: CancellationToken,
}

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.finished.store(true, Ordering::Relaxed);
        self.stop.cancel();
    }
}

/// Sends every route that is added or removed in a namespace.
pub(super) fn listen_routes(
    netns: &Netns,
    observer: Observer,
    sender: &SyncSender<Observation>,
    ready: &SyncSender<()>,
    finished: &AtomicBool,
) -> anyhow::Result<()> {
    netns.run(|| {
        let mut socket = Rtnl::with_groups(RTMGRP_IPV4_ROUTE)?;
        socket.set_timeout(POLL_INTERVAL)?;
        ready.send(())?;
        while !finished.load(Ordering::Relaxed) {
            let mut events = Vec::new();
            socket.next_events(|kind, body| {
                let at = Instant::now();
                let present = match kind {
                    libc::RTM_NEWROUTE => true,
                    libc::RTM_DELROUTE => false,
                    _ => return,
                };
                if let Some((subnet, _)) = route_of(body) {
                    events.push(Observation { observer, subnet, present, at });
                }
            })?;
            for event in events {
                // Without a receiver, the thread ends.
                let _ignored = sender.send(event);
            }
        }
        Ok(())
    })?
}

/// Sends every lease that is added or removed in the store.
pub(super) fn watch_leases(
    netns: &Netns,
    sender: &SyncSender<Observation>,
    ready: &SyncSender<()>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let store = Store::new(StoreConfig {
        endpoints: vec![format!("http://{}", etcd_socket_addr())],
        prefix: ETCD_PREFIX.to_owned(),
        ..StoreConfig::default()
    });
    netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let (events_in, mut events) = tokio::sync::mpsc::channel(1024);
            let hand_on = async {
                while let Some(event) = events.recv().await {
                    let at = Instant::now();
                    let (key, present) = match event {
                        StoreEvent::Snapshot(_) => {
                            let _ignored = ready.send(());
                            continue;
                        }
                        StoreEvent::Upsert(entry) => (entry.key, true),
                        StoreEvent::Remove { key } => (key, false),
                        _ => continue,
                    };
                    let subnet =
                        overlay_agent::model::Subnet::from_key(&key)?.get(FAMILY).context("a lease of another family")?;
                    let _ignored = sender.send(Observation { observer: Observer::Watcher, subnet, present, at });
                }
                anyhow::Ok(())
            };
            tokio::select! {
                ended = store.watch(events_in, stop) => Ok(ended?),
                ended = hand_on => ended,
            }
        })
    })?
}

fn sample_all(
    mut gateway: EtcdGateway,
    new_peers: &[SyntheticPeer],
    observations: &Receiver<Observation>,
    hosts: usize,
) -> anyhow::Result<Samples> {
    let mut samples = Samples::default();
    for (number, peer) in new_peers.iter().enumerate() {
        let key = etcd_key(peer)?;
        let put = gateway.put(&key, &peer.lease_value())?;
        let added = collect(observations, peer.subnet, true, hosts)?;
        let delete = gateway.delete(&key)?;
        let removed = collect(observations, peer.subnet, false, hosts)?;
        if number >= WARM_UP_SAMPLES {
            samples.record(put, &added, delete, &removed);
        }
        thread::sleep(PAUSE);
    }
    Ok(samples)
}

impl Samples {
    fn record(
        &mut self,
        put: RequestTiming,
        added: &BTreeMap<Observer, Instant>,
        delete: RequestTiming,
        removed: &BTreeMap<Observer, Instant>,
    ) {
        let Some((watched, first, last)) = observation_times(added) else { return };
        let Some((removed_watched, _, removed_last)) = observation_times(removed) else { return };
        self.acknowledged.push(milliseconds(put.acknowledged - put.sent));
        self.watched.push(milliseconds(watched - put.sent));
        self.first.push(milliseconds(first - put.sent));
        self.last.push(milliseconds(last - put.sent));
        self.last_after_ack.push(signed_milliseconds(put.acknowledged, last));
        self.over_watch.push(signed_milliseconds(watched, last));
        self.removed.push(milliseconds(removed_last - delete.sent));
        self.removed_watched.push(milliseconds(removed_watched - delete.sent));
    }
}

/// The times at which the watcher, the first host and the last host saw it.
fn observation_times(all: &BTreeMap<Observer, Instant>) -> Option<(Instant, Instant, Instant)> {
    let hosts = || all.iter().filter(|(observer, _)| **observer != Observer::Watcher).map(|(_, at)| *at);
    Some((*all.get(&Observer::Watcher)?, hosts().min()?, hosts().max()?))
}

/// Milliseconds between two times, possibly negative: a route may exist before the acknowledgement.
fn signed_milliseconds(from: Instant, to: Instant) -> f64 {
    milliseconds(to.saturating_duration_since(from)) - milliseconds(from.saturating_duration_since(to))
}

/// Waits until the watcher and every host have seen a change.
fn collect(
    observations: &Receiver<Observation>,
    subnet: Cidr,
    present: bool,
    hosts: usize,
) -> anyhow::Result<BTreeMap<Observer, Instant>> {
    let end = Instant::now() + SAMPLE_TIMEOUT;
    let mut all = BTreeMap::new();
    while all.len() < hosts + 1 {
        match observations.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(event) if event.subnet == subnet && event.present == present => {
                all.entry(event.observer).or_insert(event.at);
            }
            Ok(_) => {}
            Err(_) => bail!(
                "{subnet} {} within {} s by {:?} alone",
                if present { "was seen to come" } else { "was seen to go" },
                SAMPLE_TIMEOUT.as_secs(),
                all.keys().collect::<Vec<_>>()
            ),
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signed_difference_has_both_signs() {
        let begin = Instant::now();
        let later = begin + Duration::from_millis(2);
        assert_eq!(signed_milliseconds(begin, later), 2.0);
        assert_eq!(signed_milliseconds(later, begin), -2.0);
    }
}
