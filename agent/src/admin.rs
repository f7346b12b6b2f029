//! How people and programs see and steer the agent: HTTP/1.1 with JSON over a UNIX socket, and on wish metrics and health over TCP.
//!
//! Owns the socket file. Knows nothing of the parts of the agent: [`Backend`] is what it asks, and `app` implements it.
//!
//! Tasks: [`run_web_server`] and [`serve_metrics`] are each one task that the caller runs, with one task for each connection (at most
//! [`MAX_CONNECTIONS`]) that ends with it.

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

/// Why a request is not answered as asked. The text names the value, the place and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Decides the status code.
    pub kind: ErrorKind,
    /// Fit for a person.
    pub message: String,
}

/// What kind of error it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// 400: the request cannot be right.
    BadValue,
    /// 404: what it names is not there.
    NotFound,
    /// 409: right, but not beside what is there.
    Conflict,
    /// 503: can be right later.
    NotReady,
    /// 500: the host failed.
    Internal,
}

impl ApiError {
    /// An error of that kind.
    pub fn new(kind: ErrorKind, message: impl ToString) -> ApiError {
        ApiError { kind, message: message.to_string() }
    }
}

/// What the socket answers from. Futures may be dropped at any await: work that has to come to its end sees to that itself.
pub trait Backend: Send + Sync + 'static {
    /// The agent's health.
    fn status(&self) -> impl Future<Output = Result<Status, ApiError>> + Send;

    /// Every lease.
    fn subnets(&self) -> impl Future<Output = Result<Subnets, ApiError>> + Send;

    /// How each peer is reached.
    fn peers(&self) -> impl Future<Output = Result<Peers, ApiError>> + Send;

    /// How this host reaches each peer, by its probes.
    fn mesh(&self) -> Mesh;

    /// The containers of this host.
    fn endpoints(&self) -> impl Future<Output = Result<Endpoints, ApiError>> + Send;

    /// The network as this host has it.
    fn network(&self) -> impl Future<Output = Result<NetworkView, ApiError>> + Send;

    /// Attaches a container.
    fn attach(&self, name: EndpointName, request: AttachRequest)
    -> impl Future<Output = Result<AttachResponse, ApiError>> + Send;

    /// Detaches a container; where `force` is given also one whose namespace others share.
    fn detach(&self, name: EndpointName, force: bool) -> impl Future<Output = Result<DetachResponse, ApiError>> + Send;

    /// Whether the agent makes progress; the reason where it does not.
    fn alive(&self) -> impl Future<Output = Result<(), String>> + Send;

    /// Whether the agent is ready; the reasons where it is not.
    fn ready(&self) -> impl Future<Output = Result<(), Vec<String>>> + Send;

    /// A number that changes whenever the answer of [`Backend::subnets`] may have changed.
    fn changes(&self) -> channel::Receiver<u64>;

    /// The page for Prometheus.
    fn metrics(&self) -> impl Future<Output = String> + Send;

    /// The log's filter in force.
    fn log_level(&self) -> String;

    /// Puts another filter in force.
    fn set_log_level(&self, level: &str) -> Result<(), ApiError>;
}

/// Serves the whole interface on the socket until `stop_agent`; then lets running requests end within a deadline and removes the socket file.
/// Failures of single connections are logged and end only these.
pub async fn serve<B: Backend>(socket: AdminSocket, backend: Arc<B>, stop: CancellationToken) {
    serve_with_limits(socket, backend, Limits::DEFAULT, stop).await;
}

async fn serve_with_limits<B: Backend>(socket: AdminSocket, backend: Arc<B>, limits: Limits, stop: CancellationToken) {
    let routes = routes::api_router(backend, limits, stop.clone());
    serve::accept_connections(socket.listener(), routes, limits, &stop).await;
}

/// Serves `/metrics`, `/healthz`, `/readyz` and `/mesh` over TCP until `stop_agent`.
pub async fn serve_metrics<B: Backend>(listener: TcpListener, backend: Arc<B>, stop: CancellationToken) {
    serve::accept_connections(&listener, routes::metrics_router(backend, Limits::DEFAULT), Limits::DEFAULT, &stop).await;
}

#[cfg(test)]
mod tests;
