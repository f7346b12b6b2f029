//! Counters and gauges of the agent, rendered in Prometheus' text format (version 0.0.4). Owns the numbers; no tasks, no sockets.
//! Callers count through methods; `admin` serves [`Metrics::render`].

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Upper bounds of the batch size histogram, in ops: a single repair up to a snapshot of 100,000 peers and more.
const SIZE_BOUNDS: [u64; 6] = [1, 10, 100, 1_000, 10_000, 100_000];

/// Upper bounds of the batch duration histogram, in nanoseconds, with the text Prometheus sees in seconds: 0.1 ms (one peer) up to 10 s.
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

/// The agent's numbers. All methods may be called from any thread.
#[derive(Debug, Default)]
pub struct Metrics {
    ready: AtomicBool,
    peers: AtomicU64,
    leases: AtomicU64,
    refused_leases: AtomicU64,
    endpoints: AtomicU64,
    failed_entries: AtomicU64,
    store_connected: AtomicBool,
    store_reconnects: AtomicU64,
    ops_applied: AtomicU64,
    ops_failed: AtomicU64,
    drift_repairs: Mutex<BTreeMap<&'static str, u64>>,
    dropped: Mutex<BTreeMap<&'static str, u64>>,
    batch_size: Histogram<{ SIZE_BOUNDS.len() }>,
    batch_duration: Histogram<{ DURATION_BOUNDS.len() }>,
}

/// Observations by bucket; what is above the last bound counts only in `count`.
#[derive(Debug)]
struct Histogram<const N: usize> {
    buckets: [AtomicU64; N],
    sum: AtomicU64,
    count: AtomicU64,
}

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        Histogram { buckets: [const { AtomicU64::new(0) }; N], sum: AtomicU64::new(0), count: AtomicU64::new(0) }
    }
}

impl<const N: usize> Histogram<N> {
    fn observe(&self, value: u64, bounds: impl IntoIterator<Item = u64>) {
        if let Some((bucket, _)) = self.buckets.iter().zip(bounds).find(|(_, bound)| value <= *bound) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum.fetch_add(value, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    fn render(&self, page: &mut Page, name: &str, help: &str, bounds: [&str; N], sum: impl FnOnce(u64) -> String) {
        page.head(name, help, "histogram");
        let mut below = 0;
        for (bucket, bound) in self.buckets.iter().zip(bounds) {
            below += bucket.load(Ordering::Relaxed);
            page.line(&format!("{name}_bucket{{le=\"{bound}\"}} {below}"));
        }
        // Read behind the buckets, and never below them: a scrape may run beside an observation.
        let count = self.count.load(Ordering::Relaxed).max(below);
        page.line(&format!("{name}_bucket{{le=\"+Inf\"}} {count}"));
        page.line(&format!("{name}_sum {}", sum(self.sum.load(Ordering::Relaxed))));
        page.line(&format!("{name}_count {count}"));
    }
}

impl Metrics {
    /// All zero.
    pub fn new() -> Metrics {
        Metrics::default()
    }

    /// Whether the agent is ready.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// Peers in the data path.
    pub fn set_peers(&self, count: usize) {
        self.peers.store(count as u64, Ordering::Relaxed);
    }

    /// Leases seen in the store, and how many of them are left out.
    pub fn set_leases(&self, seen: usize, refused: usize) {
        self.leases.store(seen as u64, Ordering::Relaxed);
        self.refused_leases.store(refused as u64, Ordering::Relaxed);
    }

    /// Endpoints of this host.
    pub fn set_endpoints(&self, count: usize) {
        self.endpoints.store(count as u64, Ordering::Relaxed);
    }

    /// Entries that could not be programmed and are tried again.
    pub fn set_failed_entries(&self, count: usize) {
        self.failed_entries.store(count as u64, Ordering::Relaxed);
    }

    /// Whether the store answers. Each change from no to yes but the first is a reconnect; count it by [`Metrics::store_reconnected`].
    pub fn set_store_connected(&self, connected: bool) {
        self.store_connected.store(connected, Ordering::Relaxed);
    }

    /// The store answers again.
    pub fn store_reconnected(&self) {
        self.store_reconnects.fetch_add(1, Ordering::Relaxed);
    }

    /// An entry was put back after others changed it; `kind` as of `plan::state::Key::kind`.
    pub fn drift_repaired(&self, kind: &'static str) {
        *self.drift_repairs.lock().unwrap_or_else(PoisonError::into_inner).entry(kind).or_default() += 1;
    }

    /// Entries put back since the start, of all kinds.
    pub fn drift_repairs(&self) -> u64 {
        self.drift_repairs.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }

    /// Packets that the guards dropped, as the kernel counts them; by reason, as of `plan::ruleset::Counter::name`.
    pub fn set_dropped(&self, packets: BTreeMap<&'static str, u64>) {
        *self.dropped.lock().unwrap_or_else(PoisonError::into_inner) = packets;
    }

    /// A batch was applied: its ops, how many of them failed, and how long it took.
    pub fn batch_applied(&self, ops: usize, failed: usize, took: Duration) {
        self.ops_applied.fetch_add(ops.saturating_sub(failed) as u64, Ordering::Relaxed);
        self.ops_failed.fetch_add(failed as u64, Ordering::Relaxed);
        self.batch_size.observe(ops as u64, SIZE_BOUNDS);
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.batch_duration.observe(nanoseconds, DURATION_BOUNDS.map(|(bound, _)| bound));
    }

    /// The page that Prometheus reads.
    pub fn render(&self) -> String {
        let mut page = Page(String::with_capacity(4096));
        page.head("overlayd_build_info", "The running version; the value is always 1.", "gauge");
        page.line(concat!("overlayd_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"));
        let value = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let flag = |flag: &AtomicBool| u64::from(flag.load(Ordering::Relaxed));
        page.gauge(
            "overlayd_ready",
            "1 when a snapshot is seen, the own lease is held and nothing failed is pending.",
            flag(&self.ready),
        );
        page.gauge("overlayd_peers", "Peers in the data path.", value(&self.peers));
        page.gauge("overlayd_leases", "Leases seen in the store, this host's included.", value(&self.leases));
        page.gauge("overlayd_refused_leases", "Leases that are left out of the data path.", value(&self.refused_leases));
        page.gauge("overlayd_endpoints", "Containers of this host on the overlay.", value(&self.endpoints));
        page.gauge("overlayd_failed_entries", "Kernel entries that failed and are tried again.", value(&self.failed_entries));
        page.gauge("overlayd_store_connected", "1 while the store answers.", flag(&self.store_connected));
        page.head("overlayd_store_reconnects_total", "Times that the store answered again after it did not.", "counter");
        page.line(&format!("overlayd_store_reconnects_total {}", value(&self.store_reconnects)));
        page.head("overlayd_ops_total", "Kernel changes by outcome.", "counter");
        page.line(&format!("overlayd_ops_total{{outcome=\"applied\"}} {}", value(&self.ops_applied)));
        page.line(&format!("overlayd_ops_total{{outcome=\"failed\"}} {}", value(&self.ops_failed)));
        page.head("overlayd_drift_repairs_total", "Entries put back after others changed them, by kind of entry.", "counter");
        for (kind, count) in self.drift_repairs.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            page.line(&format!("overlayd_drift_repairs_total{{kind=\"{kind}\"}} {count}"));
        }
        page.head("overlayd_dropped_packets_total", "Packets that the guards dropped, by reason.", "counter");
        for (reason, packets) in self.dropped.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            page.line(&format!("overlayd_dropped_packets_total{{reason=\"{reason}\"}} {packets}"));
        }
        let sizes = SIZE_BOUNDS.map(|bound| bound.to_string());
        self.batch_size.render(
            &mut page,
            "overlayd_batch_ops",
            "Kernel changes a batch.",
            std::array::from_fn(|i| sizes[i].as_str()),
            |sum| sum.to_string(),
        );
        self.batch_duration.render(
            &mut page,
            "overlayd_batch_duration_seconds",
            "Time to apply a batch.",
            DURATION_BOUNDS.map(|(_, text)| text),
            |sum| format!("{}.{:09}", sum / 1_000_000_000, sum % 1_000_000_000),
        );
        page.0
    }
}

/// The text as it grows.
struct Page(String);

impl Page {
    fn line(&mut self, line: &str) {
        self.0.push_str(line);
        self.0.push('\n');
    }

    fn head(&mut self, name: &str, help: &str, kind: &str) {
        // Writing to a String cannot fail.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, help, "gauge");
        self.line(&format!("{name} {value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_holds_what_was_counted() {
        let metrics = Metrics::new();
        metrics.set_ready(true);
        metrics.set_peers(3);
        metrics.set_leases(5, 1);
        metrics.drift_repaired("route");
        metrics.drift_repaired("route");
        metrics.drift_repaired("fdb");
        metrics.set_dropped(BTreeMap::from([("source", 7), ("tunnel", 0)]));
        metrics.batch_applied(40_000, 2, Duration::from_millis(87));
        metrics.batch_applied(1, 0, Duration::from_micros(90));
        metrics.batch_applied(1, 0, Duration::from_secs(60));
        let page = metrics.render();
        for line in [
            "overlayd_ready 1",
            "overlayd_peers 3",
            "overlayd_leases 5",
            "overlayd_refused_leases 1",
            "overlayd_drift_repairs_total{kind=\"fdb\"} 1",
            "overlayd_drift_repairs_total{kind=\"route\"} 2",
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
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
        }
        assert_eq!(metrics.drift_repairs(), 3);
    }

    #[test]
    fn each_sample_stands_behind_its_type() {
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
