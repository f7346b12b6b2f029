//! HTTP/1.1 and JSON API over a UNIX socket; optional metrics and health over TCP.
//!
//! Owns the socket file. Independent of the agent's other parts: it queries a [`Backend`], which `app` implements.
//!
//! Tasks: [`serve()`] and [`serve_metrics`] each run as one task of the caller, with one child task per connection (at most
//! [`MAX_CONNECTIONS`]), which ends with it.

mod routes;
mod serve;
mod socket;
mod watch;
mod write_timeout;

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::watch as channel;
use tokio_util::sync::CancellationToken;

use crate::model::api::{AttachRequest, AttachResponse, DetachResponse, Endpoints, Mesh, NetworkView, Peers, Status, Subnets};
use crate::model::endpoint::EndpointName;

pub use serve::{MAX_CONNECTIONS, bind_tcp};
pub use socket::{AdminSocket, SocketError};

use serve::Limits;

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

/// The agent as seen by the socket. Futures may be dropped at any await: the implementation must protect work that has to
/// complete.
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

/// Serves the complete API on the socket until `stop`.
///
/// Then running requests may complete until a deadline, and the socket file is removed. A failed connection is logged and affects
/// no other connection.
pub async fn serve<B: Backend>(socket: AdminSocket, backend: Arc<B>, stop: CancellationToken) {
    serve_with_limits(socket, backend, Limits::DEFAULT, stop).await;
}

async fn serve_with_limits<B: Backend>(socket: AdminSocket, backend: Arc<B>, limits: Limits, stop: CancellationToken) {
    let routes = routes::api_router(backend, limits, stop.clone());
    serve::accept_connections(socket.listener(), routes, limits, &stop).await;
}

/// Serves `/metrics`, `/healthz`, `/readyz` and `/mesh` over TCP until `stop`.
pub async fn serve_metrics<B: Backend>(listener: TcpListener, backend: Arc<B>, stop: CancellationToken) {
    serve::accept_connections(&listener, routes::metrics_router(backend, Limits::DEFAULT), Limits::DEFAULT, &stop).await;
}

#[cfg(test)]
mod tests;
