//! Metrics of each network, with the label `network`. Those of a stopped network are not rendered any more.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::model::{NetworkName, RejectReason};

/// The present state of a network.
#[derive(Debug, Clone, Copy, Default)]
pub struct NetworkGauges {
    /// Whether it is ready.
    pub ready: bool,
    /// Whether this host holds its lease, as far as it knows.
    pub lease_held: bool,
    /// Peers in the data path.
    pub peers: usize,
    /// Leases in the store.
    pub leases: usize,
    /// How many of them are rejected.
    pub rejected_leases: usize,
    /// Invalid fields of the configuration in the store, while the last valid configuration stays in use.
    pub config_errors: usize,
}

/// All values of a network.
#[derive(Debug, Default)]
pub(super) struct NetworkValues {
    pub(super) gauges: NetworkGauges,
    pub(super) endpoints: usize,
    /// Whether the store answers; `None` until the first answer.
    connected: Option<bool>,
    reconnects: u64,
    /// Rejected values of the store, by reason.
    rejected: BTreeMap<&'static str, u64>,
}

/// The values of all networks. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Networks(Arc<Mutex<BTreeMap<NetworkName, NetworkValues>>>);

impl Networks {
    /// The default network, with all values at zero.
    pub(super) fn new() -> Networks {
        Networks(Arc::new(Mutex::new(BTreeMap::from([(NetworkName::default(), NetworkValues::default())]))))
    }

    /// Changes the values of a network, which begin at zero.
    pub(super) fn change(&self, network: &NetworkName, change: impl FnOnce(&mut NetworkValues)) {
        let mut networks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match networks.get_mut(network) {
            Some(values) => change(values),
            None => change(networks.entry(network.clone()).or_default()),
        }
    }

    pub(super) fn remove(&self, network: &NetworkName) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(network);
    }

    pub(super) fn gauge(&self, page: &mut Registry, name: &str, help: &str, value: fn(&NetworkValues) -> u64) {
        page.register(name, help, ByNetwork { networks: self.clone(), samples: Samples::Gauge(value) });
    }

    /// Registers the counters that count events.
    pub(super) fn register_reconnects(&self, page: &mut Registry) {
        let samples = Samples::Counter(|values| values.reconnects);
        let metric = ByNetwork { networks: self.clone(), samples };
        page.register("overlayd_store_reconnects", "Reconnects to the store", metric);
    }

    pub(super) fn register_rejected(&self, page: &mut Registry) {
        let metric = ByNetwork { networks: self.clone(), samples: Samples::Rejected };
        page.register("overlayd_refused_values", "Rejected values of the store, by reason", metric);
    }
}

impl NetworkValues {
    /// Each change from no to yes except the first is a reconnect.
    pub(super) fn set_connected(&mut self, connected: bool) {
        self.reconnects += u64::from(connected && self.connected == Some(false));
        if connected || self.connected.is_some() {
            self.connected = Some(connected);
        }
    }

    pub(super) fn is_connected(&self) -> u64 {
        u64::from(self.connected == Some(true))
    }

    pub(super) fn count_rejected(&mut self, reason: &'static str) {
        *self.rejected.entry(reason).or_default() += 1;
    }
}

/// A metric with samples for each network.
#[derive(Debug)]
struct ByNetwork {
    networks: Networks,
    samples: Samples,
}

#[derive(Debug)]
enum Samples {
    Gauge(fn(&NetworkValues) -> u64),
    Counter(fn(&NetworkValues) -> u64),
    /// Counters by reason, which all exist from the start.
    Rejected,
}

impl EncodeMetric for ByNetwork {
    fn encode(&self, mut encoder: MetricEncoder) -> fmt::Result {
        let networks = self.networks.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, values) in networks.iter() {
            let name = name.to_string();
            let network = ("network", name.as_str());
            match self.samples {
                Samples::Gauge(value) => ConstGauge::new(value(values)).encode(encoder.encode_family(&[network])?)?,
                Samples::Counter(value) => ConstCounter::new(value(values)).encode(encoder.encode_family(&[network])?)?,
                Samples::Rejected => {
                    for reason in RejectReason::NAMES {
                        let count = values.rejected.get(reason).copied().unwrap_or_default();
                        ConstCounter::new(count).encode(encoder.encode_family(&[network, ("reason", reason)])?)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        match self.samples {
            Samples::Gauge(_) => MetricType::Gauge,
            Samples::Counter(_) | Samples::Rejected => MetricType::Counter,
        }
    }
}
