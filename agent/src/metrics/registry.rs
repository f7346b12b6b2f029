//! Creates metrics in a `prometheus-client` registry. The registry renders them in the order of their creation.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::{Metric, Registry};

/// A count of existing things, or 0 and 1 for no and yes.
pub(super) type Number = Gauge<u64, AtomicU64>;

/// Registers a metric. The registry appends the full stop to the help, and `_total` to a counter's name.
pub(super) fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

/// Registers a metric at zero.
pub(super) fn zero<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    add(registry, name, help, M::default())
}

/// Registers one counter per value of a label.
pub(super) fn counters(
    registry: &mut Registry,
    name: &str,
    help: &str,
    label: &'static str,
    values: impl IntoIterator<Item = &'static str>,
) -> ByLabel<Counter> {
    add(registry, name, help, ByLabel::new(label, values, Counter::default))
}

/// One metric per value of a label.
///
/// All values exist from the start, because Prometheus would not see the first increase of a new series. They are rendered in
/// their order here; the library's `Family` would shuffle them.
#[derive(Debug, Clone)]
pub(super) struct ByLabel<M> {
    label: &'static str,
    metrics: Arc<[(&'static str, M)]>,
}

impl<M> ByLabel<M> {
    pub(super) fn new(label: &'static str, values: impl IntoIterator<Item = &'static str>, metric: impl Fn() -> M) -> ByLabel<M> {
        ByLabel { label, metrics: values.into_iter().map(|value| (value, metric())).collect() }
    }

    /// The metric of this value.
    pub(super) fn get(&self, value: &str) -> Option<&M> {
        self.iter().find(|(known, _)| *known == value).map(|(_, metric)| metric)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &(&'static str, M)> {
        self.metrics.iter()
    }
}

impl ByLabel<Counter> {
    /// Adds to the counter of this value.
    pub(super) fn count(&self, value: &str, by: u64) {
        if let Some(counter) = self.get(value) {
            counter.inc_by(by);
        }
    }
}

impl<M: EncodeMetric + TypedMetric> EncodeMetric for ByLabel<M> {
    fn encode(&self, mut encoder: MetricEncoder) -> std::fmt::Result {
        self.iter().try_for_each(|(value, metric)| metric.encode(encoder.encode_family(&[(self.label, *value)])?))
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }
}
