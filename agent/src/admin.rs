//! HTTP/1.1 and JSON API over a UNIX socket; optional metrics and health over TCP.
//!
//! Owns the socket file. Independent of the agent's other parts: it queries a [`Directory`] of networks and their [`Backend`]s,
//! which `app` implements.
//!
//! Tasks: [`serve()`] and [`serve_metrics`] each run as one task of the caller, with one child task per connection (at most
//! [`MAX_CONNECTIONS`]), which ends with it.

mod backend;
mod connection;
mod routes;
mod serve;
mod socket;
mod watch;
mod write_timeout;

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use backend::{ApiError, Backend, Directory, ErrorKind};
pub use serve::{MAX_CONNECTIONS, bind_tcp};
pub use socket::{AdminSocket, SocketError};

use serve::Limits;

/// Serves the complete API on the socket until `stop`.
///
/// Then running requests may complete until a deadline, and the socket file is removed. A failed connection is logged and affects
/// no other connection.
pub async fn serve<D: Directory>(socket: AdminSocket, directory: Arc<D>, stop: CancellationToken) {
    serve_with_limits(socket, directory, Limits::DEFAULT, stop).await;
}

async fn serve_with_limits<D: Directory>(socket: AdminSocket, directory: Arc<D>, limits: Limits, stop: CancellationToken) {
    let routes = routes::api_router(directory, limits.request_timeout, stop.clone());
    serve::accept_connections(socket.listener(), routes, limits, &stop).await;
}

/// Serves `/metrics`, `/healthz`, `/readyz` and `/mesh` over TCP until `stop`.
pub async fn serve_metrics<B: Backend>(listener: TcpListener, backend: Arc<B>, stop: CancellationToken) {
    let limits = Limits::DEFAULT;
    serve::accept_connections(&listener, routes::metrics_router(backend, limits.request_timeout), limits, &stop).await;
}

#[cfg(test)]
mod tests;
