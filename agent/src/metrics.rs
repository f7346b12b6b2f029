//! The agent's counters and gauges, rendered in Prometheus' text format. Owns the values; no tasks, no sockets.
//! Callers update them through methods; `admin` serves [`Metrics::render`]. `docs/metrics.md` documents each metric.

mod mesh;
mod page;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::model::RejectReason;
use crate::plan::Key;
use crate::plan::mesh::{ProbePath, Summary};

use mesh::MeshMetrics;
use page::{Histogram, Page, nanoseconds, seconds};

/// Upper bounds of the batch size histogram, in ops: from a single repair to a snapshot of 100,000 peers and more.
const BATCH_SIZE_BOUNDS: [u64; 6] = [1, 10, 100, 1_000, 10_000, 100_000];

/// Upper bounds of the duration histograms, in nanoseconds and as Prometheus' text in seconds.
///
/// From 0.1 ms (one peer; etcd on the same machine) to 10 s (a very large snapshot; more than the timeout of an etcd request).
const DURATION_BOUNDS: [(u64, &str); 11] = [
    (100_000, "0.0001"),
    (500_000, "0.0005"),
    (1_000_000, "0.001"),
    (5_000_000, "0.005"),
    (10_000_000, "0.01"),
    (50_000_000, "0.05"),
    (100_000_000, "0.1"),
    (500_000_000, "0.5"),
    (1_000_000_000, "1"),
    (5_000_000_000, "5"),
    (10_000_000_000, "10"),
];

/// The agent's metrics. All methods may be called from any thread.
#[derive(Debug)]
pub struct Metrics {
    started: SystemTime,
    ready: AtomicBool,
    lease_held: AtomicBool,
    peers: AtomicU64,
    leases: AtomicU64,
    rejected_leases: AtomicU64,
    rejected_values: Mutex<BTreeMap<&'static str, u64>>,
    config_errors: AtomicU64,
    endpoints: AtomicU64,
    failed_entries: AtomicU64,
    contended_entries: AtomicU64,
    store_connected: AtomicBool,
    store_was_connected: AtomicBool,
    store_reconnects: AtomicU64,
    store_requests: Histogram<{ DURATION_BOUNDS.len() }>,
    store_requests_failed: AtomicU64,
    ops_applied: AtomicU64,
    ops_failed: AtomicU64,
    drift_repairs: Mutex<BTreeMap<&'static str, u64>>,
    dropped: Mutex<BTreeMap<&'static str, u64>>,
    batch_size: Histogram<{ BATCH_SIZE_BOUNDS.len() }>,
    batch_duration: Histogram<{ DURATION_BOUNDS.len() }>,
    mesh: MeshMetrics,
    loop_iterations: AtomicU64,
    idle_wakeups: AtomicU64,
    events: [AtomicU64; EVENT_SOURCES.len()],
    full_reads: [AtomicU64; FULL_READS.len()],
}

/// Label values of [`EventSource`].
const EVENT_SOURCES: [&str; 2] = ["kernel", "store"];

/// Label values of [`FullRead`].
const FULL_READS: [&str; 2] = ["interfaces", "state"];

/// The source of an event.
#[derive(Debug, Clone, Copy)]
pub enum EventSource {
    /// The kernel: another process changed an entry, or a foreign interface changed.
    Kernel,
    /// The store: a lease or the configuration changed.
    Store,
}

/// A full read of kernel state.
#[derive(Debug, Clone, Copy)]
pub enum FullRead {
    /// All interfaces with their addresses, and the default routes.
    Interfaces,
    /// All entries of the agent.
    State,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

impl Metrics {
    /// All metrics at zero, with the current time as start.
    ///
    /// Counters with a label start with all label values at zero, because Prometheus would not see the first increase of a new
    /// series.
    pub fn new() -> Metrics {
        let zeros = |words: &[&'static str]| Mutex::new(words.iter().map(|word| (*word, 0)).collect());
        Metrics {
            started: SystemTime::now(),
            ready: AtomicBool::default(),
            lease_held: AtomicBool::default(),
            peers: AtomicU64::default(),
            leases: AtomicU64::default(),
            rejected_leases: AtomicU64::default(),
            rejected_values: zeros(&RejectReason::NAMES),
            config_errors: AtomicU64::default(),
            endpoints: AtomicU64::default(),
            failed_entries: AtomicU64::default(),
            contended_entries: AtomicU64::default(),
            store_connected: AtomicBool::default(),
            store_was_connected: AtomicBool::default(),
            store_reconnects: AtomicU64::default(),
            store_requests: Histogram::default(),
            store_requests_failed: AtomicU64::default(),
            ops_applied: AtomicU64::default(),
            ops_failed: AtomicU64::default(),
            drift_repairs: zeros(&Key::KINDS),
            dropped: Mutex::default(),
            batch_size: Histogram::default(),
            batch_duration: Histogram::default(),
            mesh: MeshMetrics::default(),
            loop_iterations: AtomicU64::default(),
            idle_wakeups: AtomicU64::default(),
            events: Default::default(),
            full_reads: Default::default(),
        }
    }

    /// Whether the agent is ready.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// Whether this host holds its lease, as far as it knows.
    pub fn set_lease_held(&self, held: bool) {
        self.lease_held.store(held, Ordering::Relaxed);
    }

    /// Peers in the data path.
    pub fn set_peers(&self, count: usize) {
        self.peers.store(count as u64, Ordering::Relaxed);
    }

    /// Leases in the store, and how many of them are rejected.
    pub fn set_leases(&self, total: usize, rejected: usize) {
        self.leases.store(total as u64, Ordering::Relaxed);
        self.rejected_leases.store(rejected as u64, Ordering::Relaxed);
    }

    /// Counts a newly rejected value of the store; `reason` is a `RejectReason::as_str`.
    pub fn count_rejected_value(&self, reason: &'static str) {
        *lock(&self.rejected_values).entry(reason).or_default() += 1;
    }

    /// Invalid fields of the configuration in the store, while the last valid configuration stays in use.
    pub fn set_config_errors(&self, count: usize) {
        self.config_errors.store(count as u64, Ordering::Relaxed);
    }

    /// Endpoints of this host.
    pub fn set_endpoints(&self, count: usize) {
        self.endpoints.store(count as u64, Ordering::Relaxed);
    }

    /// Entries that could not be programmed and are retried.
    pub fn set_failed_entries(&self, count: usize) {
        self.failed_entries.store(count as u64, Ordering::Relaxed);
    }

    /// Entries that another process on this host changes again and again.
    pub fn set_contended_entries(&self, count: usize) {
        self.contended_entries.store(count as u64, Ordering::Relaxed);
    }

    /// Whether the store answers. Each change from no to yes except the first is a reconnect.
    pub fn set_store_connected(&self, connected: bool) {
        let was = self.store_connected.swap(connected, Ordering::Relaxed);
        if connected && !was && self.store_was_connected.swap(true, Ordering::Relaxed) {
            self.store_reconnects.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Records a finished request to the store: its duration, and whether it succeeded.
    pub fn store_request_finished(&self, took: Duration, answered: bool) {
        self.store_requests.observe(nanoseconds(took), DURATION_BOUNDS.map(|(bound, _)| bound));
        if !answered {
            self.store_requests_failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts the repair of an entry that another process changed; `kind` is a `plan::state::Key::kind`.
    pub fn drift_repaired(&self, kind: &'static str) {
        *lock(&self.drift_repairs).entry(kind).or_default() += 1;
    }

    /// Repaired entries of all kinds since the start.
    pub fn drift_repairs(&self) -> u64 {
        lock(&self.drift_repairs).values().sum()
    }

    /// Packets dropped by our rules, from the kernel's counters, by reason (`plan::ruleset::Counter::name`).
    pub fn set_dropped(&self, packets: BTreeMap<&'static str, u64>) {
        *lock(&self.dropped) = packets;
    }

    /// Records an applied batch: its ops, the failed ops, and the duration.
    pub fn batch_applied(&self, ops: usize, failed: usize, took: Duration) {
        self.ops_applied.fetch_add(ops.saturating_sub(failed) as u64, Ordering::Relaxed);
        self.ops_failed.fetch_add(failed as u64, Ordering::Relaxed);
        self.batch_size.observe(ops as u64, BATCH_SIZE_BOUNDS);
        self.batch_duration.observe(nanoseconds(took), DURATION_BOUNDS.map(|(bound, _)| bound));
    }

    /// Records the reply to a probe of a peer.
    pub fn probe_answered(&self, path: ProbePath, took: Duration) {
        self.mesh.answered(path, took);
    }

    /// Counts a probe of a peer without a reply in time, or that could not be sent.
    pub fn probe_lost(&self, path: ProbePath) {
        self.mesh.lost(path);
    }

    /// Whether peers are probed, and the current results.
    pub fn set_mesh(&self, probing: bool, summary: Summary) {
        self.mesh.set(probing, summary);
    }

    /// Counts events that arrived together.
    pub fn count_events(&self, source: EventSource, count: usize) {
        self.events[source as usize].fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Counts an iteration of the reconcile loop.
    pub fn count_loop_iteration(&self) {
        self.loop_iterations.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a timer wake-up of the reconcile loop without work.
    pub fn count_idle_wakeup(&self) {
        self.idle_wakeups.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a full read of kernel state.
    pub fn count_full_read(&self, what: FullRead) {
        self.full_reads[what as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// The page for Prometheus.
    pub fn render(&self) -> String {
        let mut page = Page::new();
        let value = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let flag = |flag: &AtomicBool| u64::from(flag.load(Ordering::Relaxed));
        page.header("overlayd_build_info", "The running program; the value is always 1.", "gauge");
        page.line(&format!(
            "overlayd_build_info{{version=\"{}\",arch=\"{}\",profile=\"{}\"}} 1",
            env!("CARGO_PKG_VERSION"),
            std::env::consts::ARCH,
            if cfg!(debug_assertions) { "debug" } else { "release" },
        ));
        page.header("process_start_time_seconds", "Start of the process, in seconds since the epoch.", "gauge");
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        page.line(&format!("process_start_time_seconds {}", seconds(nanoseconds(started))));
        page.gauge(
            "overlayd_ready",
            "1 if a snapshot was received, the lease is held and no failed entry is pending.",
            flag(&self.ready),
        );
        page.gauge("overlayd_lease_held", "1 while this host holds its lease, as far as it knows.", flag(&self.lease_held));
        page.gauge("overlayd_peers", "Peers in the data path.", value(&self.peers));
        page.gauge("overlayd_leases", "Leases in the store, including this host's.", value(&self.leases));
        page.gauge("overlayd_refused_leases", "Rejected leases, which are not in the data path.", value(&self.rejected_leases));
        page.counters(
            "overlayd_refused_values_total",
            "Rejected values of the store, by reason.",
            "reason",
            lock(&self.rejected_values).iter().map(|(reason, count)| (*reason, *count)),
        );
        page.gauge(
            "overlayd_config_errors",
            "Invalid fields of the configuration in the store; the last valid one stays in use.",
            value(&self.config_errors),
        );
        page.gauge("overlayd_endpoints", "Containers of this host on the overlay.", value(&self.endpoints));
        page.gauge("overlayd_failed_entries", "Kernel entries that failed and are retried.", value(&self.failed_entries));
        page.gauge(
            "overlayd_contested_entries",
            "Kernel entries that another process on this host changes again and again.",
            value(&self.contended_entries),
        );
        page.gauge("overlayd_store_connected", "1 while the store answers.", flag(&self.store_connected));
        page.counter("overlayd_store_reconnects_total", "Reconnects to the store.", value(&self.store_reconnects));
        self.store_requests.render(
            &mut page,
            "overlayd_store_request_duration_seconds",
            "Round-trip time of requests to the store, failed ones included.",
            DURATION_BOUNDS.map(|(_, text)| text),
            seconds,
        );
        page.counter(
            "overlayd_store_request_failures_total",
            "Requests to the store that were rejected or timed out.",
            value(&self.store_requests_failed),
        );
        page.counters(
            "overlayd_ops_total",
            "Kernel changes by outcome.",
            "outcome",
            [("applied", value(&self.ops_applied)), ("failed", value(&self.ops_failed))],
        );
        page.counters(
            "overlayd_drift_repairs_total",
            "Entries repaired after another process changed them, by kind of entry.",
            "kind",
            lock(&self.drift_repairs).iter().map(|(kind, count)| (*kind, *count)),
        );
        page.counters(
            "overlayd_dropped_packets_total",
            "Packets dropped by our rules, by reason.",
            "reason",
            lock(&self.dropped).iter().map(|(reason, packets)| (*reason, *packets)),
        );
        let sizes = BATCH_SIZE_BOUNDS.map(|bound| bound.to_string());
        self.batch_size.render(
            &mut page,
            "overlayd_batch_ops",
            "Kernel changes per batch.",
            std::array::from_fn(|i| sizes[i].as_str()),
            |sum| sum.to_string(),
        );
        self.batch_duration.render(
            &mut page,
            "overlayd_batch_duration_seconds",
            "Time to apply a batch.",
            DURATION_BOUNDS.map(|(_, text)| text),
            seconds,
        );
        self.mesh.render(&mut page);
        let each = |names: [&'static str; 2], numbers: &[AtomicU64; 2]| {
            let [first, second] = numbers.each_ref().map(value);
            [(names[0], first), (names[1], second)]
        };
        page.counters("overlayd_events_total", "Events handled, by source.", "source", each(EVENT_SOURCES, &self.events));
        page.counter("overlayd_rounds_total", "Iterations of the reconcile loop.", value(&self.loop_iterations));
        page.counter(
            "overlayd_idle_turns_total",
            "Timer wake-ups of the reconcile loop without work.",
            value(&self.idle_wakeups),
        );
        page.counters("overlayd_kernel_reads_total", "Full reads of kernel state.", "what", each(FULL_READS, &self.full_reads));
        page.text()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::api::Reachability;

    #[test]
    fn rendered_page_contains_counted_values() {
        let metrics = Metrics::new();
        metrics.set_ready(true);
        metrics.set_peers(3);
        metrics.set_leases(5, 1);
        metrics.drift_repaired("route");
        metrics.drift_repaired("route");
        metrics.drift_repaired("fdb");
        metrics.count_rejected_value("duplicate-mac");
        metrics.store_request_finished(Duration::from_millis(3), true);
        metrics.store_request_finished(Duration::from_secs(5), false);
        metrics.set_dropped(BTreeMap::from([("source", 7), ("tunnel", 0)]));
        metrics.batch_applied(40_000, 2, Duration::from_millis(87));
        metrics.batch_applied(1, 0, Duration::from_micros(90));
        metrics.batch_applied(1, 0, Duration::from_secs(60));
        metrics.probe_answered(ProbePath::Overlay, Duration::from_micros(800));
        metrics.probe_lost(ProbePath::Underlay);
        let states = BTreeMap::from([(Reachability::Ok, 4), (Reachability::OverlayDown, 1)]);
        metrics.set_mesh(true, Summary { states, worst_overlay: 2_500, worst_underlay: 0 });
        metrics.count_events(EventSource::Store, 5);
        metrics.count_full_read(FullRead::State);
        metrics.count_loop_iteration();
        let page = metrics.render();
        for line in [
            "overlayd_events_total{source=\"store\"} 5",
            "overlayd_events_total{source=\"kernel\"} 0",
            "overlayd_kernel_reads_total{what=\"state\"} 1",
            "overlayd_rounds_total 1",
            "overlayd_ready 1",
            "overlayd_peers 3",
            "overlayd_leases 5",
            "overlayd_refused_leases 1",
            "overlayd_drift_repairs_total{kind=\"fdb\"} 1",
            "overlayd_drift_repairs_total{kind=\"route\"} 2",
            "overlayd_drift_repairs_total{kind=\"sysctl\"} 0",
            "overlayd_refused_values_total{reason=\"duplicate-mac\"} 1",
            "overlayd_refused_values_total{reason=\"overlap\"} 0",
            "overlayd_store_request_duration_seconds_bucket{le=\"0.005\"} 1",
            "overlayd_store_request_duration_seconds_count 2",
            "overlayd_store_request_failures_total 1",
            "overlayd_dropped_packets_total{reason=\"source\"} 7",
            "overlayd_dropped_packets_total{reason=\"tunnel\"} 0",
            "overlayd_ops_total{outcome=\"applied\"} 40000",
            "overlayd_ops_total{outcome=\"failed\"} 2",
            "overlayd_batch_ops_bucket{le=\"1\"} 2",
            "overlayd_batch_ops_bucket{le=\"10000\"} 2",
            "overlayd_batch_ops_bucket{le=\"100000\"} 3",
            "overlayd_batch_duration_seconds_bucket{le=\"0.0001\"} 1",
            "overlayd_batch_duration_seconds_bucket{le=\"0.1\"} 2",
            "overlayd_batch_duration_seconds_bucket{le=\"10\"} 2",
            "overlayd_batch_duration_seconds_bucket{le=\"+Inf\"} 3",
            "overlayd_batch_duration_seconds_sum 60.087090000",
            "overlayd_mesh_probing 1",
            "overlayd_mesh_peers{state=\"ok\"} 4",
            "overlayd_mesh_peers{state=\"overlay-down\"} 1",
            "overlayd_mesh_peers{state=\"unreachable\"} 0",
            "overlayd_mesh_worst_round_trip_seconds{way=\"overlay\"} 0.002500000",
            "overlayd_mesh_lost_probes_total{way=\"overlay\"} 0",
            "overlayd_mesh_lost_probes_total{way=\"underlay\"} 1",
            "overlayd_mesh_round_trip_seconds_bucket{way=\"overlay\",le=\"0.0005\"} 0",
            "overlayd_mesh_round_trip_seconds_bucket{way=\"overlay\",le=\"0.001\"} 1",
            "overlayd_mesh_round_trip_seconds_bucket{way=\"underlay\",le=\"+Inf\"} 0",
            "overlayd_mesh_round_trip_seconds_sum{way=\"overlay\"} 0.000800000",
            "overlayd_mesh_round_trip_seconds_count{way=\"overlay\"} 1",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
        }
        assert_eq!(metrics.drift_repairs(), 3);
    }

    #[test]
    fn first_store_connection_is_not_a_reconnect() {
        let metrics = Metrics::new();
        let reconnects = || metrics.render().lines().any(|line| line == "overlayd_store_reconnects_total 1");
        for connected in [false, true, true, false] {
            metrics.set_store_connected(connected);
            assert!(!reconnects());
        }
        metrics.set_store_connected(true);
        assert!(reconnects());
    }

    #[test]
    fn samples_follow_their_type_line() {
        let metrics = Metrics::new();
        metrics.drift_repaired("link");
        let page = metrics.render();
        let mut family = String::new();
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                family = rest.split(' ').next().unwrap().to_owned();
            } else if !line.starts_with('#') {
                assert!(line.starts_with(&family), "{line} under {family}");
                assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
            }
        }
    }
}
