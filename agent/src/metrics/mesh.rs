//! Metrics of the peer probes. Their number does not grow with the number of peers; `overlayctl mesh` names the unreachable
//! peers.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::registry::{ByLabel, Number, add, counters, zero};
use crate::model::api::Reachability;
use crate::plan::mesh::{ProbePath, Summary};

/// Upper bounds of the round-trip histogram, in seconds.
///
/// From 0.1 ms, within a rack, to 1 s; a reply may take up to [`PROBE_TIMEOUT`](crate::plan::mesh::PROBE_TIMEOUT).
const ROUND_TRIP_BOUNDS: [f64; 12] = [0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0];

/// The states of current peers; departed peers are not counted.
const STATES: [Reachability; 6] = [
    Reachability::Ok,
    Reachability::Lossy,
    Reachability::UnderlaySilent,
    Reachability::OverlayDown,
    Reachability::Unreachable,
    Reachability::Unknown,
];

/// The values of the label `way`.
const PATHS: [&str; 2] = [ProbePath::Overlay.as_str(), ProbePath::Underlay.as_str()];

/// All metrics of the probes.
#[derive(Debug)]
pub(super) struct MeshMetrics {
    probing: Number,
    peers: ByLabel<Number>,
    worst: ByLabel<Gauge<f64, AtomicU64>>,
    lost: ByLabel<Counter>,
    answered: ByLabel<Histogram>,
}

impl MeshMetrics {
    pub(super) fn new(page: &mut Registry) -> MeshMetrics {
        MeshMetrics {
            probing: zero(page, "overlayd_mesh_probing", "1 while peers are probed; 0 if probing is disabled or not permitted"),
            peers: add(
                page,
                "overlayd_mesh_peers",
                "Peers by reachability; each address family counts separately",
                ByLabel::new("state", STATES.map(Reachability::as_str), Gauge::default),
            ),
            worst: add(
                page,
                "overlayd_mesh_worst_round_trip_seconds",
                "The longest mean round trip of all peers",
                ByLabel::new("way", PATHS, Gauge::default),
            ),
            lost: counters(
                page,
                "overlayd_mesh_lost_probes",
                "Probes without a reply in time, or that could not be sent",
                "way",
                PATHS,
            ),
            answered: add(
                page,
                "overlayd_mesh_round_trip_seconds",
                "Round trips of answered probes",
                ByLabel::new("way", PATHS, || Histogram::new(ROUND_TRIP_BOUNDS)),
            ),
        }
    }

    pub(super) fn answered(&self, path: ProbePath, took: Duration) {
        if let Some(round_trips) = self.answered.get(path.as_str()) {
            round_trips.observe(took.as_secs_f64());
        }
    }

    pub(super) fn lost(&self, path: ProbePath) {
        self.lost.count(path.as_str(), 1);
    }

    pub(super) fn set(&self, probing: bool, summary: &Summary) {
        self.probing.set(probing.into());
        for (state, gauge) in STATES.iter().zip(self.peers.iter().map(|(_, gauge)| gauge)) {
            gauge.set(summary.states.get(state).copied().unwrap_or_default());
        }
        for (worst, (_, gauge)) in [summary.worst_overlay, summary.worst_underlay].into_iter().zip(self.worst.iter()) {
            gauge.set(Duration::from_micros(worst).as_secs_f64());
        }
    }
}
