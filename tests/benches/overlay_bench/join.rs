//! `join`: a lease is put into a real etcd; how long until it is a route in the kernel of every host with a real agent.
//!
//! One thread a host listens to route events in the host's namespace; one more runs the store's bare watch, without agent and kernel, as
//! the baseline. One sample at a time: put, wait until all have seen it, delete, wait until all have seen that, pause.

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

use super::limit::route_of;
use super::member::Member;
use super::progress;
use super::report::{Report, Row};
use super::rtnl::Rtnl;
use super::stage::{FAMILY, Stage, etcd, key};
use super::stats::{milliseconds, ratios};
use overlay_tests::gateway::{Exchange, Gateway};

/// `RTMGRP_IPV4_ROUTE` (`linux/rtnetlink.h`).
const ROUTES: u32 = 0x40;
/// How long a sample may take.
const LIMIT: Duration = Duration::from_secs(10);
/// How often a listening thread looks whether it is over.
const POLL: Duration = Duration::from_millis(100);
/// Between samples, so that each finds all at rest.
const PAUSE: Duration = Duration::from_millis(5);
/// From the event of the bare watch to the route in the last of the hosts, in milliseconds: the median, the 99th percentile.
const GOAL: (f64, f64) = (1.0, 3.0);
/// With peers present as a multiple of the same with the first number of them.
const SAME_GOAL: f64 = 1.1;
/// Samples at the begin of which connections and caches are cold.
const WARM_UP: usize = 10;

/// How to measure.
#[derive(Debug, Args)]
pub struct JoinArguments {
    /// Number of peers that are there already; may be given several times
    #[arg(long, value_name = "N", default_values_t = [0, 1_000, 10_000])]
    peers: Vec<u32>,
    /// Samples of each
    #[arg(long, value_name = "K", default_value_t = 1_000)]
    samples: usize,
    /// Hosts with an agent
    #[arg(long, value_name = "N", default_value_t = 3)]
    hosts: u16,
}

/// Who has seen a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Who {
    Watcher,
    Host(usize),
}

/// A change that somebody has seen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) who: Who,
    pub(super) subnet: Cidr,
    pub(super) present: bool,
    pub(super) at: Instant,
}

/// In milliseconds; one of each a sample, of `each_*` one a host.
#[derive(Debug, Default)]
struct Samples {
    acknowledged: Vec<f64>,
    watched: Vec<f64>,
    first: Vec<f64>,
    last: Vec<f64>,
    last_after_ack: Vec<f64>,
    over_watch: Vec<f64>,
    gone: Vec<f64>,
    gone_watched: Vec<f64>,
}

/// Measures with each number of peers.
pub fn measure(arguments: &JoinArguments, report: &mut Report) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut first: Option<Vec<f64>> = None;
    for peers in &arguments.peers {
        progress(&format!("{} agents, {peers} peers: starting", arguments.hosts));
        let stage = runtime.block_on(Stage::new(arguments.hosts, *peers))?;
        let newcomers = runtime.block_on(stage.newcomers(arguments.samples + WARM_UP))?;
        progress(&format!("{} agents, {peers} peers: {} samples", arguments.hosts, arguments.samples));
        let samples = listen_and_sample(&stage, &newcomers)?;
        let conditions = format!("{} agents, {peers} peers", arguments.hosts);
        add_rows(report, &conditions, &samples);
        // Each in times of the bare watch of its own sample: between two sizes the machine may change.
        let watches = ratios(&samples.last, &samples.watched);
        if let Some(first) = &first {
            let row = Row::new("join", &conditions, "put sent to route on every host, in bare watches", "x", &watches);
            report.add(row.map(|row| row.against("the same with the first number", &watches, first).ratio_goal(SAME_GOAL)));
        }
        first.get_or_insert(watches);
    }
    Ok(())
}

fn add_rows(report: &mut Report, conditions: &str, samples: &Samples) {
    let row = |what: &str, values: &[f64]| Row::new("join", conditions, what, "ms", values);
    let against =
        |what: &str, values: &[f64], baseline: &[f64]| row(what, values).map(|r| r.against("bare watch", values, baseline));
    report.add(row("put sent to acknowledged", &samples.acknowledged));
    report.add(against("put sent to route on the first host", &samples.first, &samples.watched));
    report.add(against("put sent to route on every host", &samples.last, &samples.watched));
    report.add(row("of it, over the bare watch", &samples.over_watch).map(|r| r.latency_goal(GOAL.0, GOAL.1)));
    report.add(row("put acknowledged to route on every host", &samples.last_after_ack));
    report.add(against("deletion sent to route gone on every host", &samples.gone, &samples.gone_watched));
}

fn listen_and_sample(stage: &Stage, newcomers: &[Member]) -> anyhow::Result<Samples> {
    let namespaces = stage.lab.hosts().map(|host| host.netns()).collect::<Result<Vec<_>, _>>()?;
    let over = AtomicBool::new(false);
    let stop = CancellationToken::new();
    let (sender, seen) = sync_channel(4096);
    thread::scope(|scope| {
        // Whatever happens the threads are told to end, or the scope would wait for them for ever.
        let ending = Ending { over: &over, stop: stop.clone() };
        let (ready, ready_seen) = sync_channel(namespaces.len() + 1);
        let mut threads = Vec::new();
        for (number, netns) in namespaces.iter().enumerate() {
            let (sender, ready, over) = (sender.clone(), ready.clone(), &over);
            threads.push(scope.spawn(move || listen(netns, Who::Host(number), &sender, &ready, over)));
        }
        {
            let (sender, ready, stop) = (sender.clone(), ready.clone(), stop.clone());
            let netns = stage.lab.netns("net")?;
            threads.push(scope.spawn(move || watch(&netns, &sender, &ready, stop)));
        }
        drop((sender, ready));
        for _ in 0..threads.len() {
            if ready_seen.recv_timeout(LIMIT).is_err() {
                break;
            }
        }
        let hosts = namespaces.len();
        let sampled = stage.in_etcds_namespace(move |gateway| sample_all(gateway, newcomers, &seen, hosts));
        drop(ending);
        for thread in threads {
            match thread.join() {
                Ok(ended) => ended?,
                Err(_) => bail!("a listening thread panicked"),
            }
        }
        sampled
    })
}

/// Tells the listening threads to end when it is dropped.
pub(super) struct Ending<'a> {
    pub(super) over: &'a AtomicBool,
    pub(super) stop: CancellationToken,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.stop.cancel();
    }
}

/// Tells of every route that comes or goes in a namespace.
pub(super) fn listen(
    netns: &Netns,
    who: Who,
    sender: &SyncSender<Seen>,
    ready: &SyncSender<()>,
    over: &AtomicBool,
) -> anyhow::Result<()> {
    netns.run(|| {
        let mut socket = Rtnl::with_groups(ROUTES)?;
        socket.set_timeout(POLL)?;
        ready.send(())?;
        while !over.load(Ordering::Relaxed) {
            let mut events = Vec::new();
            socket.next(|kind, body| {
                let at = Instant::now();
                let present = match kind {
                    libc::RTM_NEWROUTE => true,
                    libc::RTM_DELROUTE => false,
                    _ => return,
                };
                if let Some((subnet, _)) = route_of(body) {
                    events.push(Seen { who, subnet, present, at });
                }
            })?;
            for event in events {
                // Where nobody listens any more, it is over.
                let _gone = sender.send(event);
            }
        }
        Ok(())
    })?
}

/// Tells of every lease that comes or goes, as the store hands it on.
pub(super) fn watch(
    netns: &Netns,
    sender: &SyncSender<Seen>,
    ready: &SyncSender<()>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let store = Store::new(StoreConfig {
        endpoints: vec![format!("http://{}", etcd())],
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
                            let _gone = ready.send(());
                            continue;
                        }
                        StoreEvent::Upsert(entry) => (entry.key, true),
                        StoreEvent::Remove { key } => (key, false),
                        _ => continue,
                    };
                    let subnet =
                        overlay_agent::model::Subnet::from_key(&key)?.get(FAMILY).context("a lease of another family")?;
                    let _gone = sender.send(Seen { who: Who::Watcher, subnet, present, at });
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

fn sample_all(mut gateway: Gateway, newcomers: &[Member], seen: &Receiver<Seen>, hosts: usize) -> anyhow::Result<Samples> {
    let mut samples = Samples::default();
    for (number, member) in newcomers.iter().enumerate() {
        let key = key(member)?;
        let put = gateway.put(&key, &member.value())?;
        let came = collect(seen, member.subnet, true, hosts)?;
        let delete = gateway.delete(&key)?;
        let went = collect(seen, member.subnet, false, hosts)?;
        if number >= WARM_UP {
            samples.note(put, &came, delete, &went);
        }
        thread::sleep(PAUSE);
    }
    Ok(samples)
}

impl Samples {
    fn note(&mut self, put: Exchange, came: &BTreeMap<Who, Instant>, delete: Exchange, went: &BTreeMap<Who, Instant>) {
        let Some((watched, first, last)) = ends(came) else { return };
        let Some((gone_watched, _, gone)) = ends(went) else { return };
        self.acknowledged.push(milliseconds(put.acknowledged - put.sent));
        self.watched.push(milliseconds(watched - put.sent));
        self.first.push(milliseconds(first - put.sent));
        self.last.push(milliseconds(last - put.sent));
        self.last_after_ack.push(signed(put.acknowledged, last));
        self.over_watch.push(signed(watched, last));
        self.gone.push(milliseconds(gone - delete.sent));
        self.gone_watched.push(milliseconds(gone_watched - delete.sent));
    }
}

/// When the watcher, the first host and the last host saw it.
fn ends(all: &BTreeMap<Who, Instant>) -> Option<(Instant, Instant, Instant)> {
    let hosts = || all.iter().filter(|(who, _)| **who != Who::Watcher).map(|(_, at)| *at);
    Some((*all.get(&Who::Watcher)?, hosts().min()?, hosts().max()?))
}

/// Milliseconds from one moment to another, negative where that came first: a route may be there before the acknowledgement.
fn signed(from: Instant, to: Instant) -> f64 {
    milliseconds(to.saturating_duration_since(from)) - milliseconds(from.saturating_duration_since(to))
}

/// Waits until the watcher and every host have seen a change.
fn collect(seen: &Receiver<Seen>, subnet: Cidr, present: bool, hosts: usize) -> anyhow::Result<BTreeMap<Who, Instant>> {
    let end = Instant::now() + LIMIT;
    let mut all = BTreeMap::new();
    while all.len() < hosts + 1 {
        match seen.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(event) if event.subnet == subnet && event.present == present => {
                all.entry(event.who).or_insert(event.at);
            }
            Ok(_) => {}
            Err(_) => bail!(
                "{subnet} {} within {} s by {:?} alone",
                if present { "was seen to come" } else { "was seen to go" },
                LIMIT.as_secs(),
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
    fn both_signs() {
        let begin = Instant::now();
        let later = begin + Duration::from_millis(2);
        assert_eq!(signed(begin, later), 2.0);
        assert_eq!(signed(later, begin), -2.0);
    }
}
