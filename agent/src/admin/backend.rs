//! The agent as the socket sees it: a directory of networks, and each network.

use std::sync::Arc;

use tokio::sync::watch as channel;

use crate::model::NetworkName;
use crate::model::api::{
    AttachRequest, AttachResponse, DetachResponse, Endpoints, Mesh, NetworkView, Networks, Peers, Status, Subnets,
};
use crate::model::endpoint::EndpointName;

/// The error of a request. The text names the value, the place and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Determines the status code.
    pub kind: ErrorKind,
    /// Human-readable text.
    pub message: String,
}

/// The kind of an [`ApiError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// 400: the request is invalid.
    BadValue,
    /// 404: the named object does not exist.
    NotFound,
    /// 409: the request is valid but conflicts with existing state.
    Conflict,
    /// 503: the request may succeed later.
    NotReady,
    /// 500: an operation of the host failed.
    Internal,
}

impl ApiError {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, message: impl ToString) -> ApiError {
        ApiError { kind, message: message.to_string() }
    }
}

/// The networks that this host is in.
pub trait Directory: Send + Sync + 'static {
    /// One of them.
    type Network: Backend;

    /// The default network, which every host is in. It also answers for the whole agent: mesh, health, readiness, metrics, and
    /// the log filter.
    fn default_network(&self) -> Arc<Self::Network>;

    /// The network of that name; `None` if this host is not in it.
    fn network(&self, name: &NetworkName) -> Option<Arc<Self::Network>>;

    /// All of them: the default network, then the others by name.
    fn list(&self) -> impl Future<Output = Networks> + Send;

    /// The network of that name, which this host joins if it is not in it. Fails if it does not exist.
    fn join(&self, name: &NetworkName) -> impl Future<Output = Result<Arc<Self::Network>, ApiError>> + Send;
}

/// One network of the agent as seen by the socket. Futures may be dropped at any await: the implementation must protect work that
/// has to complete.
pub trait Backend: Send + Sync + 'static {
    /// The agent's health.
    fn status(&self) -> impl Future<Output = Result<Status, ApiError>> + Send;

    /// All leases.
    fn subnets(&self) -> impl Future<Output = Result<Subnets, ApiError>> + Send;

    /// The peers with their kernel entries.
    fn peers(&self) -> impl Future<Output = Result<Peers, ApiError>> + Send;

    /// The reachability of each peer, from this host's probes.
    fn mesh(&self) -> Mesh;

    /// The containers of this host.
    fn endpoints(&self) -> impl Future<Output = Result<Endpoints, ApiError>> + Send;

    /// The network on this host.
    fn network(&self) -> impl Future<Output = Result<NetworkView, ApiError>> + Send;

    /// Attaches a container.
    fn attach(&self, name: EndpointName, request: AttachRequest)
    -> impl Future<Output = Result<AttachResponse, ApiError>> + Send;

    /// Detaches a container; with `force` also one whose namespace other containers share.
    fn detach(&self, name: EndpointName, force: bool) -> impl Future<Output = Result<DetachResponse, ApiError>> + Send;

    /// Whether the agent makes progress; the reason if not.
    fn alive(&self) -> impl Future<Output = Result<(), String>> + Send;

    /// Whether the agent is ready; the reasons if not.
    fn ready(&self) -> impl Future<Output = Result<(), Vec<String>>> + Send;

    /// A number that changes whenever the result of [`Backend::subnets`] may have changed.
    fn changes(&self) -> channel::Receiver<u64>;

    /// The Prometheus page.
    fn metrics(&self) -> impl Future<Output = String> + Send;

    /// The current log filter.
    fn log_level(&self) -> String;

    /// Changes the log filter.
    fn set_log_level(&self, level: &str) -> Result<(), ApiError>;
}
