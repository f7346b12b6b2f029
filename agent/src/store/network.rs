//! A network's part of the store: its watch and its lease, over the connection that all networks share.

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{ReleaseReport, Store, StoreError, release};
use crate::model::NetworkName;
use crate::model::event::{LeaseRequest, StoreEvent};

/// The etcd client of one network. [`Store::run_connection`] must run; clones share the connection.
#[derive(Debug, Clone)]
pub struct NetworkStore {
    store: Store,
    name: NetworkName,
}

impl NetworkStore {
    pub(super) fn new(store: Store, name: NetworkName) -> NetworkStore {
        NetworkStore { store, name }
    }

    /// Sends the network's events and keeps the requested lease until the token is cancelled. An unreachable etcd is not an
    /// error: it is reported as [`Connection::Down`](crate::model::event::Connection::Down) and retried, whatever its answer was.
    ///
    /// The lease is kept on return: the data path continues, and the next start reuses the lease. [`Self::release`] gives it back.
    ///
    /// # Errors
    /// Invalid settings, which no retry can fix (see [`StoreConfig::validate`](super::StoreConfig::validate)), or
    /// [`StoreError::ReceiverClosed`].
    pub async fn run(
        &self,
        events: mpsc::Sender<StoreEvent>,
        lease_request: watch::Receiver<Option<LeaseRequest>>,
        shutdown: CancellationToken,
    ) -> Result<(), StoreError> {
        let config = self.store.config.of_network(&self.name)?;
        Store { config, ..self.store.clone() }.run(events, lease_request, shutdown).await
    }

    /// Leaves the network after [`Self::run`] has ended: deletes the entries of the host with this identity. Reservations stay.
    /// The etcd lease stays for other networks; without another entry it is revoked. Touches no other network.
    ///
    /// # Errors
    /// Any error of a request, or [`StoreError::NotConnected`]. The caller repeats it until it succeeds, because the entries of
    /// the shared etcd lease do not expire while this host is in another network.
    pub async fn release(&self, node_id: &str) -> Result<ReleaseReport, StoreError> {
        release(&self.store.config.of_network(&self.name)?, node_id).await
    }
}
