//! [`Directory`] of the socket: the networks of this host.

use std::sync::Arc;

use super::backend::AgentBackend;
use super::networks::{HostNetworks, JoinError};
use crate::admin::{ApiError, Backend, Directory, ErrorKind};
use crate::model::NetworkName;
use crate::model::api::{NetworkEntry, Networks};
use crate::store::NetworkError;

impl Directory for HostNetworks {
    type Network = AgentBackend;

    fn default_network(&self) -> Arc<AgentBackend> {
        Arc::clone(&self.default)
    }

    fn network(&self, name: &NetworkName) -> Option<Arc<AgentBackend>> {
        self.get(name)
    }

    async fn list(&self) -> Networks {
        let mut networks = Vec::new();
        for backend in self.all() {
            if let Ok(status) = backend.status().await {
                networks.push(NetworkEntry {
                    name: backend.name.clone(),
                    kind: status.kind,
                    subnet: status.lease.map(|lease| lease.subnet),
                    ready: status.ready,
                    endpoints: status.endpoints,
                    problems: status.problems.len(),
                });
            }
        }
        networks.sort_by_key(|entry| !entry.name.is_default());
        Networks { networks }
    }

    async fn join(&self, name: &NetworkName) -> Result<Arc<AgentBackend>, ApiError> {
        HostNetworks::join(self, name).await.map_err(|error| {
            let kind = match &error {
                JoinError::Record(NetworkError::Missing { .. }) => ErrorKind::NotFound,
                JoinError::Record(_) => ErrorKind::NotReady,
                JoinError::Start { .. } => ErrorKind::Internal,
            };
            ApiError::new(kind, error)
        })
    }
}
