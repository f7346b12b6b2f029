//! [`Directory`] of the socket: the default network alone.

use std::sync::Arc;

use super::backend::AgentBackend;
use crate::admin::{ApiError, Backend, Directory, ErrorKind};
use crate::model::NetworkName;
use crate::model::api::{NetworkEntry, NetworkKind, Networks};

/// The default network.
pub(super) struct DefaultNetwork(pub(super) Arc<AgentBackend>);

impl Directory for DefaultNetwork {
    type Network = AgentBackend;

    fn default_network(&self) -> Arc<AgentBackend> {
        Arc::clone(&self.0)
    }

    fn network(&self, name: &NetworkName) -> Option<Arc<AgentBackend>> {
        name.is_default().then(|| self.default_network())
    }

    async fn list(&self) -> Networks {
        let entry = self.0.status().await.map(|status| NetworkEntry {
            name: NetworkName::default(),
            kind: NetworkKind::Routed,
            subnet: status.lease.map(|lease| lease.subnet),
            ready: status.ready,
            endpoints: status.endpoints,
            problems: status.problems.len(),
        });
        Networks { networks: entry.into_iter().collect() }
    }

    async fn join(&self, name: &NetworkName) -> Result<Arc<AgentBackend>, ApiError> {
        let unknown = || ApiError::new(ErrorKind::NotFound, format!("there is no network {name}: see `overlayctl network ls`"));
        self.network(name).ok_or_else(unknown)
    }
}
