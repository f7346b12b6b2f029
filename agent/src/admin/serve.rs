//! Accepts connections, limits their number and duration, and closes them at shutdown.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::write_timeout::WriteTimeout;

/// Maximum number of connections served at the same time; a request on a further one is answered 503. Users and monitoring need
/// far fewer.
pub const MAX_CONNECTIONS: usize = 128;

/// Resource limits of clients.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Maximum number of served connections.
    pub(super) max_connections: usize,
    /// Time limit for a request's head, and for an idle connection.
    pub(super) header_timeout: Duration,
    /// Time limit from the request to the head of its response.
    pub(super) request_timeout: Duration,
    /// How long a client may stop reading the response.
    pub(super) write_timeout: Duration,
    /// Time limit for running requests after the stop signal.
    pub(super) shutdown_grace: Duration,
}

impl Limits {
    pub(super) const DEFAULT: Limits = Limits {
        max_connections: MAX_CONNECTIONS,
        header_timeout: Duration::from_secs(10),
        request_timeout: Duration::from_secs(30),
        write_timeout: Duration::from_secs(30),
        // Below the agent's shutdown deadline of five seconds.
        shutdown_grace: Duration::from_secs(3),
    };
}

/// How many connections above [`MAX_CONNECTIONS`] get a 503 response; further ones are closed at once.
const MAX_BUSY_RESPONSES: usize = 32;

/// Time limit for the request on a connection that gets the 503 response.
const BUSY_RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The largest request head, in bytes.
const MAX_HEADER_SIZE: usize = 16 << 10;

/// Delay after a failed accept: its cause (no free descriptors) takes a moment to pass.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// A source of connections.
pub(super) trait Listener {
    /// The connection type.
    type Stream: AsyncRead + AsyncWrite + AsRawFd + Send + Unpin + 'static;

    /// Accepts the next connection. Cancel-safe.
    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

/// Binds the TCP listener for metrics and health.
pub async fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|e| {
        let remedy = match e.kind() {
            io::ErrorKind::AddrInUse => "; another program listens there: choose another port",
            io::ErrorKind::AddrNotAvailable => "; no interface has this address: choose one of this host's, or 127.0.0.1",
            _ => "",
        };
        io::Error::new(e.kind(), format!("cannot listen on {address} (--metrics-listen): {e}{remedy}"))
    })
}

/// Accepts and serves connections until `stop`; returns when all connections have ended or were closed at the deadline.
pub(super) async fn accept_connections<L: Listener>(listener: &L, routes: Router, limits: Limits, stop: &CancellationToken) {
    let mut connections = JoinSet::new();
    let permits = Arc::new(Semaphore::new(limits.max_connections));
    let busy = super::routes::busy_router(limits.max_connections);
    let mut failures = 0_u64;
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(result) = connections.join_next() => log_panic(result),
            accepted = listener.next() => match accepted {
                Ok(stream) => {
                    failures = 0;
                    let stop = stop.clone();
                    if let Ok(permit) = Arc::clone(&permits).try_acquire_owned() {
                        let serving = serve_connection(stream, routes.clone(), limits, stop);
                        connections.spawn(async move {
                            serving.await;
                            drop(permit);
                        });
                    } else if connections.len() < limits.max_connections + MAX_BUSY_RESPONSES {
                        let limits = Limits { header_timeout: BUSY_RESPONSE_TIMEOUT, write_timeout: BUSY_RESPONSE_TIMEOUT, ..limits };
                        connections.spawn(serve_connection(stream, busy.clone(), limits, stop));
                    } else {
                        tracing::debug!(open = connections.len(), "closing connection: too many are open");
                    }
                }
                Err(error) => {
                    failures += 1;
                    if failures.is_power_of_two() {
                        tracing::warn!(%error, failures, "cannot accept connection; retrying");
                    }
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(ACCEPT_RETRY_DELAY) => {}
                    }
                }
            },
        }
    }
    let drained = tokio::time::timeout(limits.shutdown_grace, async {
        while let Some(result) = connections.join_next().await {
            log_panic(result);
        }
    });
    if drained.await.is_err() {
        tracing::warn!(open = connections.len(), "closing connections with unfinished requests");
        connections.shutdown().await;
    }
}

async fn serve_connection<S: AsyncRead + AsyncWrite + AsRawFd + Send + Unpin + 'static>(
    stream: S,
    routes: Router,
    limits: Limits,
    stop: CancellationToken,
) {
    let connection = Connection(stream.as_raw_fd());
    let routes = TowerToHyperService::new(routes);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(connection);
        routes.call(request)
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(MAX_HEADER_SIZE)
        .serve_connection(TokioIo::new(WriteTimeout::new(stream, limits.write_timeout)), service);
    tokio::pin!(serving);
    let outcome = tokio::select! {
        outcome = &mut serving => outcome,
        () = stop.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "connection ended early");
    }
}

fn log_panic(result: Result<(), tokio::task::JoinError>) {
    if let Some(panic) = result.err().and_then(crate::shutdown::panic_text) {
        tracing::error!(panic, "connection task panicked");
    }
}
