//! Connections: accepted, bounded in number and time, and ended.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::write_timeout::WriteTimeout;

/// How many connections are served at the same time; a request on a further one is answered 503. Far above what people and monitoring need.
pub const MAX_CONNECTIONS: usize = 128;

/// What clients may use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Connections that are served.
    pub(super) max_connections: usize,
    /// How long a client may take for a request's head, and how long a connection may be idle.
    pub(super) header_timeout: Duration,
    /// How long a request may take until the head of its answer is there.
    pub(super) request_timeout: Duration,
    /// How long a client may leave its answer unread.
    pub(super) write_timeout: Duration,
    /// How long running requests may go on after the stop.
    pub(super) shutdown_grace: Duration,
}

impl Limits {
    pub(super) const DEFAULT: Limits = Limits {
        max_connections: MAX_CONNECTIONS,
        header_timeout: Duration::from_secs(10),
        request_timeout: Duration::from_secs(30),
        write_timeout: Duration::from_secs(30),
        // Below the five seconds that the whole agent has for its end.
        shutdown_grace: Duration::from_secs(3),
    };
}

/// How many connections beyond [`MAX_CONNECTIONS`] are kept open to be told so; what comes above that is closed at once.
const MAX_BUSY_RESPONSES: usize = 32;

/// How long a client that is told so may take for its request.
const BUSY_RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The largest head of a request, in bytes.
const MAX_HEADER_SIZE: usize = 16 << 10;

/// How long to wait after a failed accept: what makes it fail (no free descriptors) takes a moment to pass.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Where connections come from.
pub(super) trait Listener {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// The next connection. Cancel-safe.
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

/// Listens for Prometheus.
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

/// Accepts and serves until `stop_agent`; returns when every connection has ended, or was ended at the deadline.
pub(super) async fn accept_connections<L: Listener>(listener: &L, routes: Router, limits: Limits, stop: &CancellationToken) {
    let mut connections = JoinSet::new();
    let permits = Arc::new(Semaphore::new(limits.max_connections));
    let busy = super::routes::busy_router(limits.max_connections);
    let mut failures = 0_u64;
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(end) = connections.join_next() => log_panic(end),
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
                        tracing::debug!(open = connections.len(), "closing a connection: too many are open");
                    }
                }
                Err(error) => {
                    failures += 1;
                    if failures.is_power_of_two() {
                        tracing::warn!(%error, failures, "cannot accept a connection; trying again");
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
        while let Some(end) = connections.join_next().await {
            log_panic(end);
        }
    });
    if drained.await.is_err() {
        tracing::warn!(open = connections.len(), "closing connections whose requests did not end in time");
        connections.shutdown().await;
    }
}

async fn serve_connection<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    stream: S,
    routes: Router,
    limits: Limits,
    stop: CancellationToken,
) {
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(MAX_HEADER_SIZE)
        .serve_connection(TokioIo::new(WriteTimeout::new(stream, limits.write_timeout)), TowerToHyperService::new(routes));
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

fn log_panic(end: Result<(), tokio::task::JoinError>) {
    if let Some(panic) = end.err().and_then(crate::shutdown::panic_text) {
        tracing::error!(panic, "a connection's task panicked");
    }
}
