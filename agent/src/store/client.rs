//! The store's handle: the shared connection, the networks, and requests over that connection.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::connect::StoreConfig;
use super::connection::Shared;
use super::network::NetworkStore;
use super::{NetworkError, StoreError, oneshot};
use crate::metrics::Metrics;
use crate::model::event::{LeaseRequest, StoreEvent};
use crate::model::{ExpiryId, NetworkName, NetworkRecord};

/// The agent's etcd client. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

impl Store {
    /// Creates a store with these settings. Does not connect.
    pub fn new(config: StoreConfig) -> Store {
        Store { shared: Arc::new(Shared::new(config, None)) }
    }

    /// A store with the same settings that records the duration and result of each request in `metrics`.
    pub fn with_metrics(self, metrics: Arc<Metrics>) -> Store {
        Store { shared: Arc::new(Shared::new(self.shared.config.clone(), Some(metrics))) }
    }

    /// The part that all networks share: connects, reconnects, and renews this host's etcd lease until the token is cancelled.
    /// Exactly one task runs this. Networks can start and stop meanwhile.
    ///
    /// # Errors
    /// Invalid settings, which no retry can fix (see [`StoreConfig::validate`]).
    pub async fn run_connection(&self, shutdown: CancellationToken) -> Result<(), StoreError> {
        self.shared.run(shutdown).await
    }

    /// Reads a network's record over the shared connection.
    ///
    /// # Errors
    /// [`NetworkError::Missing`] with the names of the present networks, [`NetworkError::Invalid`], or any error of a request.
    pub async fn read_network(&self, name: &NetworkName) -> Result<NetworkRecord, NetworkError> {
        self.shared.session().await?.session.network(name).await
    }

    /// Reads the remaining TTLs of these etcd leases over the shared connection. The etcd lease of a host is the same in all of
    /// its networks. An expired one is missing from the result.
    ///
    /// # Errors
    /// Any error of a request.
    pub async fn remaining_ttls(&self, ids: Vec<ExpiryId>) -> Result<BTreeMap<ExpiryId, Duration>, StoreError> {
        let shared = self.shared.session().await?;
        oneshot::request_remaining_ttls(&shared.session, ids.into_iter().map(|id| id.0)).await
    }

    /// A network's part of the store. It uses the connection of [`Self::run_connection`].
    pub fn network(&self, name: &NetworkName) -> NetworkStore {
        NetworkStore::new(Arc::clone(&self.shared), name.clone())
    }

    /// Runs the default network alone, with its connection, as [`NetworkStore::run`].
    ///
    /// # Errors
    /// As [`NetworkStore::run`].
    pub async fn run(
        &self,
        events: mpsc::Sender<StoreEvent>,
        lease_request: watch::Receiver<Option<LeaseRequest>>,
        shutdown: CancellationToken,
    ) -> Result<(), StoreError> {
        let network = self.network(&NetworkName::default());
        tokio::select! {
            result = network.run(events, lease_request, shutdown) => result,
            result = self.run_connection(CancellationToken::new()) => result,
        }
    }

    /// Sends the default network's events until the token is cancelled, without a lease.
    ///
    /// # Errors
    /// As [`NetworkStore::run`].
    pub async fn watch(&self, events: mpsc::Sender<StoreEvent>, shutdown: CancellationToken) -> Result<(), StoreError> {
        let (_sender, lease_request) = watch::channel(None);
        self.run(events, lease_request, shutdown).await
    }
}
