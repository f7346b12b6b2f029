//! Endpoints for the API: each record, and its state in the kernel.

use std::sync::Arc;

use super::record::{EndpointRecord, Phase};
use super::{Endpoints, lock};
use crate::model::PerFamily;
use crate::model::api::{EndpointView, IpamView};
use crate::model::network::NetworkConfig;
use crate::plan::PortDriver;

/// State text of an endpoint that matches the kernel.
const IN_PLACE: &str = "in place";

impl<C: PortDriver + 'static> Endpoints<C> {
    /// Every endpoint, compared with the kernel: namespace, interface, MAC, addresses, routes. Changes nothing. The caller adds
    /// bridge ports and counters.
    pub async fn views(&self) -> Vec<EndpointView> {
        let endpoints = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            let records: Vec<EndpointRecord> =
                lock(&endpoints.0.table).records().filter(|r| r.phase == Phase::Attached).cloned().collect();
            records.into_iter().map(|record| endpoints.view(record)).collect()
        });
        // Fails only while the Tokio runtime shuts down.
        task.await.unwrap_or_default()
    }

    fn view(&self, record: EndpointRecord) -> EndpointView {
        let inner = Arc::clone(&self.0);
        let wanted = lock(&inner.table).port_spec(&record.endpoint);
        let state = match wanted {
            _ if !inner.is_alive(&record) => "its network namespace is gone".to_owned(),
            Ok((Some(spec), _)) => match inner.driver.check_port(&spec) {
                Ok(None) => IN_PLACE.to_owned(),
                Ok(Some(difference)) => difference,
                Err(error) => error.to_string(),
            },
            Ok((None, _)) => IN_PLACE.to_owned(),
            Err(error) => error.to_string(),
        };
        let shared_by = lock(&inner.table).sharers(&record.endpoint.name);
        EndpointView { endpoint: Arc::unwrap_or_clone(record.endpoint), state, bridge_port: None, shared_by, counters: None }
    }

    /// Use of the addresses in this host's subnet, by family; empty without a subnet.
    pub fn ipam(&self, network: &NetworkConfig) -> PerFamily<IpamView> {
        let table = lock(&self.0.table);
        let mut all = PerFamily::default();
        for (family, pool) in table.pools().iter() {
            let range = pool.range();
            let (Some(network_pool), Some(gateway)) = (network.pools.get(family), range.nth(1)) else { continue };
            let free = pool.capacity().saturating_sub(pool.in_use() as u128);
            *all.slot(family) = Some(IpamView {
                network: network_pool.network,
                subnet: range,
                gateway,
                docker: pool.docker_share().map(|share| share.fixed_cidr),
                first: pool.first(),
                last: pool.last(),
                in_use: pool.in_use(),
                free: free.to_string(),
            });
        }
        all
    }
}
