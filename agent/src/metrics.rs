//! The agent's counters and gauges, rendered in Prometheus' text format. Owns the values; no tasks, no sockets.
//! Callers update them through methods; `admin` serves [`Metrics::render`]. `docs/metrics.md` documents each metric.

mod mesh;
mod networks;
mod registry;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::prometheus_text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::model::{NamespaceName, NetworkName};
use crate::plan::mesh::{ProbePath, Summary};
use crate::plan::{Key, ruleset};

use mesh::MeshMetrics;
pub use networks::NetworkGauges;
use networks::{NetworkValues, Networks};
use registry::{ByLabel, Number, add, counters, zero};

/// Upper bounds of the batch size histogram, in ops: from a single repair to a snapshot of 100,000 peers and more.
const BATCH_SIZE_BOUNDS: [f64; 6] = [1.0, 10.0, 100.0, 1_000.0, 10_000.0, 100_000.0];

/// Upper bounds of the duration histograms, in seconds.
///
/// From 0.1 ms (one peer; etcd on the same machine) to 10 s (a very large snapshot; more than the timeout of an etcd request).
const DURATION_BOUNDS: [f64; 11] = [0.000_1, 0.000_5, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0];

/// The agent's metrics. All methods may be called from any thread.
#[derive(Debug)]
pub struct Metrics {
    networks: Networks,
    /// Failed and contended entries of each network namespace.
    data_paths: Mutex<BTreeMap<NamespaceName, (usize, usize)>>,
    failed_entries: Number,
    contended_entries: Number,
    store_requests: Histogram,
    store_requests_failed: Counter,
    ops: ByLabel<Counter>,
    drift_repairs: ByLabel<Counter>,
    dropped: ByLabel<Counter>,
    batch_size: Histogram,
    batch_duration: Histogram,
    mesh: MeshMetrics,
    events: ByLabel<Counter>,
    loop_iterations: Counter,
    idle_wakeups: Counter,
    full_reads: ByLabel<Counter>,
    registry: Registry,
}

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
    pub fn new() -> Metrics {
        let mut registry = Registry::default();
        let page = &mut registry;
        let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
        let build = [("version", env!("CARGO_PKG_VERSION")), ("arch", std::env::consts::ARCH), ("profile", profile)];
        page.register("overlayd_build", "The running program; the value is always 1", Info::new(build));
        let started = ConstGauge::new(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        page.register("process_start_time_seconds", "Start of the process, in seconds since the epoch", started);
        let networks = Networks::new();
        let mut network = |name, help, value| networks.gauge(page, name, help, value);
        network("overlayd_ready", "1 if a snapshot was received, the lease is held and no failed entry is pending", |values| {
            values.gauges.ready.into()
        });
        network("overlayd_lease_held", "1 while this host holds its lease, as far as it knows", |values| {
            values.gauges.lease_held.into()
        });
        network("overlayd_peers", "Peers in the data path", |values| values.gauges.peers as u64);
        network("overlayd_leases", "Leases in the store, including this host's", |values| values.gauges.leases as u64);
        network("overlayd_refused_leases", "Rejected leases, which are not in the data path", |values| {
            values.gauges.rejected_leases as u64
        });
        network(
            "overlayd_config_errors",
            "Invalid fields of the configuration in the store; the last valid one stays in use",
            |values| values.gauges.config_errors as u64,
        );
        network("overlayd_endpoints", "Containers of this host on the overlay", |values| values.endpoints as u64);
        network("overlayd_store_connected", "1 while the store answers", NetworkValues::is_connected);
        networks.register_rejected(page);
        networks.register_reconnects(page);
        Metrics {
            networks,
            data_paths: Mutex::default(),
            failed_entries: zero(page, "overlayd_failed_entries", "Kernel entries that failed and are retried"),
            contended_entries: zero(
                page,
                "overlayd_contested_entries",
                "Kernel entries that another process on this host changes again and again",
            ),
            store_requests: add(
                page,
                "overlayd_store_request_duration_seconds",
                "Round-trip time of requests to the store, failed ones included",
                Histogram::new(DURATION_BOUNDS),
            ),
            store_requests_failed: zero(
                page,
                "overlayd_store_request_failures",
                "Requests to the store that were rejected or timed out",
            ),
            ops: counters(page, "overlayd_ops", "Kernel changes by outcome", "outcome", ["applied", "failed"]),
            drift_repairs: counters(
                page,
                "overlayd_drift_repairs",
                "Entries repaired after another process changed them, by kind of entry",
                "kind",
                Key::KINDS,
            ),
            dropped: counters(
                page,
                "overlayd_dropped_packets",
                "Packets dropped by our rules, by reason",
                "reason",
                ruleset::Counter::ALL.map(ruleset::Counter::name),
            ),
            batch_size: add(page, "overlayd_batch_ops", "Kernel changes per batch", Histogram::new(BATCH_SIZE_BOUNDS)),
            batch_duration: add(
                page,
                "overlayd_batch_duration_seconds",
                "Time to apply a batch",
                Histogram::new(DURATION_BOUNDS),
            ),
            mesh: MeshMetrics::new(page),
            events: counters(page, "overlayd_events", "Events handled, by source", "source", ["kernel", "store"]),
            loop_iterations: zero(page, "overlayd_rounds", "Iterations of the reconcile loop"),
            idle_wakeups: zero(page, "overlayd_idle_turns", "Timer wake-ups of the reconcile loop without work"),
            full_reads: counters(page, "overlayd_kernel_reads", "Full reads of kernel state", "what", ["interfaces", "state"]),
            registry,
        }
    }

    /// The present state of a network.
    pub fn set_network(&self, network: &NetworkName, gauges: NetworkGauges) {
        self.networks.change(network, |values| values.gauges = gauges);
    }

    /// Forgets a network that was stopped.
    pub fn remove_network(&self, network: &NetworkName) {
        self.networks.remove(network);
    }

    /// Counts a newly rejected value of the store; `reason` is a `RejectReason::as_str`.
    pub fn count_rejected_value(&self, network: &NetworkName, reason: &'static str) {
        self.networks.change(network, |values| values.count_rejected(reason));
    }

    /// Endpoints of this host in a network.
    pub fn set_endpoints(&self, network: &NetworkName, count: usize) {
        self.networks.change(network, |values| values.endpoints = count);
    }

    /// A network namespace's entries that failed and are retried, and those that another process changes again and again.
    pub fn set_data_path(&self, namespace: &NamespaceName, failed: usize, contended: usize) {
        let mut data_paths = lock(&self.data_paths);
        data_paths.insert(namespace.clone(), (failed, contended));
        self.failed_entries.set(data_paths.values().map(|(failed, _)| *failed as u64).sum());
        self.contended_entries.set(data_paths.values().map(|(_, contended)| *contended as u64).sum());
    }

    /// Whether the store answers a network. Each change from no to yes except the first is a reconnect.
    pub fn set_store_connected(&self, network: &NetworkName, connected: bool) {
        self.networks.change(network, |values| values.set_connected(connected));
    }

    /// Records a finished request to the store: its duration, and whether it succeeded.
    pub fn store_request_finished(&self, took: Duration, answered: bool) {
        self.store_requests.observe(took.as_secs_f64());
        if !answered {
            self.store_requests_failed.inc();
        }
    }

    /// Counts the repair of an entry that another process changed; `kind` is a `plan::state::Key::kind`.
    pub fn drift_repaired(&self, kind: &'static str) {
        self.drift_repairs.count(kind, 1);
    }

    /// Repaired entries of all kinds since the start.
    pub fn drift_repairs(&self) -> u64 {
        self.drift_repairs.iter().map(|(_, repairs)| repairs.get()).sum()
    }

    /// Packets dropped by our rules, from the kernel's counters, by reason (`plan::ruleset::Counter::name`).
    pub fn set_dropped(&self, packets: BTreeMap<&'static str, u64>) {
        for (reason, packets) in packets {
            if let Some(counter) = self.dropped.get(reason) {
                counter.inner().store(packets, Ordering::Relaxed);
            }
        }
    }

    /// Records an applied batch: its ops, the failed ops, and the duration.
    pub fn batch_applied(&self, ops: usize, failed: usize, took: Duration) {
        self.ops.count("applied", ops.saturating_sub(failed) as u64);
        self.ops.count("failed", failed as u64);
        self.batch_size.observe(ops as f64);
        self.batch_duration.observe(took.as_secs_f64());
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
        self.mesh.set(probing, &summary);
    }

    /// Counts events that arrived together.
    pub fn count_events(&self, source: EventSource, count: usize) {
        let source = match source {
            EventSource::Kernel => "kernel",
            EventSource::Store => "store",
        };
        self.events.count(source, count as u64);
    }

    /// Counts an iteration of the reconcile loop.
    pub fn count_loop_iteration(&self) {
        self.loop_iterations.inc();
    }

    /// Counts a timer wake-up of the reconcile loop without work.
    pub fn count_idle_wakeup(&self) {
        self.idle_wakeups.inc();
    }

    /// Counts a full read of kernel state.
    pub fn count_full_read(&self, what: FullRead) {
        let what = match what {
            FullRead::Interfaces => "interfaces",
            FullRead::State => "state",
        };
        self.full_reads.count(what, 1);
    }

    /// The page for Prometheus.
    pub fn render(&self) -> String {
        let mut page = String::with_capacity(8 << 10);
        // Writing to a String cannot fail.
        let _ = prometheus_text::encode(&mut page, &self.registry);
        page
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::RejectReason;
    use crate::model::api::Reachability;

    /// The name with labels, and the value as a number: `60.087090000` is 60.08709.
    fn sample(line: &str) -> Option<(&str, f64)> {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name, value.parse().ok()?))
    }

    #[test]
    fn rendered_page_contains_counted_values() {
        let metrics = Metrics::new();
        let gauges = NetworkGauges { ready: true, peers: 3, leases: 5, rejected_leases: 1, ..NetworkGauges::default() };
        metrics.set_network(&NetworkName::default(), gauges);
        metrics.drift_repaired("route");
        metrics.drift_repaired("route");
        metrics.drift_repaired("fdb");
        metrics.count_rejected_value(&NetworkName::default(), "duplicate-mac");
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
            "overlayd_ready{network=\"default\"} 1",
            "overlayd_peers{network=\"default\"} 3",
            "overlayd_leases{network=\"default\"} 5",
            "overlayd_refused_leases{network=\"default\"} 1",
            "overlayd_drift_repairs_total{kind=\"fdb\"} 1",
            "overlayd_drift_repairs_total{kind=\"route\"} 2",
            "overlayd_drift_repairs_total{kind=\"sysctl\"} 0",
            "overlayd_refused_values_total{network=\"default\",reason=\"duplicate-mac\"} 1",
            "overlayd_refused_values_total{network=\"default\",reason=\"overlap\"} 0",
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
            assert!(page.lines().any(|l| sample(l) == sample(line)), "{line} is not in\n{page}");
        }
        assert_eq!(metrics.drift_repairs(), 3);
    }

    /// Families and label values keep their order, so that pages can be compared.
    #[test]
    fn samples_have_fixed_order() {
        let page = Metrics::new().render();
        let names = page.lines().filter(|line| !line.starts_with('#')).filter_map(sample).map(|(name, _)| name);
        let ops: Vec<&str> = names.filter(|name| name.contains("reason=") || name.starts_with("overlayd_mesh_p")).collect();
        let rejected = RejectReason::NAMES
            .iter()
            .map(|name| format!("overlayd_refused_values_total{{network=\"default\",reason=\"{name}\"}}"));
        let dropped = ["encapsulation", "isolation", "loopback", "tunnel", "dhcp", "router", "source"]
            .map(|name| format!("overlayd_dropped_packets_total{{reason=\"{name}\"}}"));
        let peers = ["ok", "lossy", "underlay-silent", "overlay-down", "unreachable", "unknown"]
            .map(|name| format!("overlayd_mesh_peers{{state=\"{name}\"}}"));
        let probing = ["overlayd_mesh_probing".to_owned()];
        let wanted: Vec<String> = rejected.chain(dropped).chain(probing).chain(peers).collect();
        assert_eq!(ops, wanted);
        assert!(page.contains(
            "# HELP overlayd_peers Peers in the data path.\n# TYPE overlayd_peers gauge\noverlayd_peers{network=\"default\"} 0\n"
        ));
    }

    #[test]
    fn first_store_connection_is_not_a_reconnect() {
        let metrics = Metrics::new();
        let reconnects = || metrics.render().lines().any(|line| line == "overlayd_store_reconnects_total{network=\"default\"} 1");
        for connected in [false, true, true, false] {
            metrics.set_store_connected(&NetworkName::default(), connected);
            assert!(!reconnects());
        }
        metrics.set_store_connected(&NetworkName::default(), true);
        assert!(reconnects());
    }

    #[test]
    fn networks_do_not_overwrite_each_other() {
        let metrics = Metrics::new();
        let gauges = |peers, ready| NetworkGauges { peers, ready, ..NetworkGauges::default() };
        let [one, two] = ["one", "two"].map(NetworkName::from);
        metrics.set_network(&one, gauges(3, true));
        metrics.set_network(&two, gauges(4, false));
        metrics.set_store_connected(&two, true);
        metrics.count_rejected_value(&one, "overlap");
        metrics.set_data_path(&NamespaceName::Host, 1, 0);
        metrics.set_data_path(&NamespaceName::Network(two.clone()), 2, 1);
        let has = |line: &str| metrics.render().lines().any(|l| l == line);
        for line in [
            r#"overlayd_peers{network="one"} 3"#,
            r#"overlayd_peers{network="two"} 4"#,
            r#"overlayd_ready{network="one"} 1"#,
            r#"overlayd_ready{network="two"} 0"#,
            r#"overlayd_store_connected{network="one"} 0"#,
            r#"overlayd_store_connected{network="two"} 1"#,
            r#"overlayd_refused_values_total{network="one",reason="overlap"} 1"#,
            r#"overlayd_refused_values_total{network="two",reason="overlap"} 0"#,
            "overlayd_failed_entries 3",
            "overlayd_contested_entries 1",
        ] {
            assert!(has(line), "{line} is not in\n{}", metrics.render());
        }
        metrics.remove_network(&two);
        assert!(has(r#"overlayd_peers{network="one"} 3"#) && !metrics.render().contains("\"two\""));
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
