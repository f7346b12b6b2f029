//! Metrics of the peer probes. Their number does not grow with the number of peers; `overlayctl mesh` names the unreachable
//! peers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::page::{Histogram, Page, nanoseconds, seconds};
use crate::model::api::Reachability;
use crate::plan::mesh::{ProbePath, Summary};

/// Upper bounds of the round-trip histogram, in nanoseconds and as Prometheus' text in seconds.
///
/// From 0.1 ms, within a rack, to 1 s; a reply may take up to [`PROBE_TIMEOUT`](crate::plan::mesh::PROBE_TIMEOUT).
const ROUND_TRIP_BOUNDS: [(u64, &str); 12] = [
    (100_000, "0.0001"),
    (250_000, "0.00025"),
    (500_000, "0.0005"),
    (1_000_000, "0.001"),
    (2_500_000, "0.0025"),
    (5_000_000, "0.005"),
    (10_000_000, "0.01"),
    (25_000_000, "0.025"),
    (50_000_000, "0.05"),
    (100_000_000, "0.1"),
    (250_000_000, "0.25"),
    (1_000_000_000, "1"),
];

/// The states of current peers; departed peers are not counted.
const STATES: [Reachability; 6] = [
    Reachability::Ok,
    Reachability::Lossy,
    Reachability::UnderlaySilent,
    Reachability::OverlayDown,
    Reachability::Unreachable,
    Reachability::Unknown,
];

/// The metrics of one probe path: overlay or underlay.
#[derive(Debug, Default)]
struct PathMetrics {
    answered: Histogram<{ ROUND_TRIP_BOUNDS.len() }>,
    lost: AtomicU64,
}

/// All metrics of the probes.
#[derive(Debug, Default)]
pub(super) struct MeshMetrics {
    overlay: PathMetrics,
    underlay: PathMetrics,
    current: Mutex<(bool, Summary)>,
}

impl MeshMetrics {
    fn path_metrics(&self, path: ProbePath) -> &PathMetrics {
        match path {
            ProbePath::Overlay => &self.overlay,
            ProbePath::Underlay => &self.underlay,
        }
    }

    pub(super) fn answered(&self, path: ProbePath, took: Duration) {
        self.path_metrics(path).answered.observe(nanoseconds(took), ROUND_TRIP_BOUNDS.map(|(bound, _)| bound));
    }

    pub(super) fn lost(&self, path: ProbePath) {
        self.path_metrics(path).lost.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn set(&self, probing: bool, summary: Summary) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = (probing, summary);
    }

    pub(super) fn render(&self, page: &mut Page) {
        let (probing, summary) = self.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        page.gauge(
            "overlayd_mesh_probing",
            "1 while peers are probed; 0 if probing is disabled or not permitted.",
            u64::from(probing),
        );
        page.header("overlayd_mesh_peers", "Peers by reachability; each address family counts separately.", "gauge");
        let counts: BTreeMap<Reachability, u64> = summary.states;
        for state in STATES {
            let count = counts.get(&state).copied().unwrap_or_default();
            page.line(&format!("overlayd_mesh_peers{{state=\"{}\"}} {count}", state.as_str()));
        }
        let paths = [(ProbePath::Overlay, summary.worst_overlay), (ProbePath::Underlay, summary.worst_underlay)];
        page.header("overlayd_mesh_worst_round_trip_seconds", "The longest mean round trip of all peers.", "gauge");
        for (path, worst) in paths {
            let worst = seconds(worst.saturating_mul(1_000));
            page.line(&format!("overlayd_mesh_worst_round_trip_seconds{{way=\"{}\"}} {worst}", path.as_str()));
        }
        page.header("overlayd_mesh_lost_probes_total", "Probes without a reply in time, or that could not be sent.", "counter");
        for (path, _) in paths {
            let lost = self.path_metrics(path).lost.load(Ordering::Relaxed);
            page.line(&format!("overlayd_mesh_lost_probes_total{{way=\"{}\"}} {lost}", path.as_str()));
        }
        page.header("overlayd_mesh_round_trip_seconds", "Round trips of answered probes.", "histogram");
        for (path, _) in paths {
            let label = format!("way=\"{}\"", path.as_str());
            let bounds = ROUND_TRIP_BOUNDS.map(|(_, text)| text);
            self.path_metrics(path).answered.samples(page, "overlayd_mesh_round_trip_seconds", &label, bounds, seconds);
        }
    }
}
