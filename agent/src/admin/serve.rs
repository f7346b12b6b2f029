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

use super::stall::Stall;

/// How many connections are served at the same time; a request on a further one is answered 503. Far above what people and monitoring need.
pub const MOST_CONNECTIONS: usize = 128;

/// What clients may use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Connections that are served.
    pub(super) connections: usize,
    /// How long a client may take for a request's head, and how long a connection may be idle.
    pub(super) head: Duration,
    /// How long a request may take until the head of its answer is there.
    pub(super) request: Duration,
    /// How long a client may leave its answer unread.
    pub(super) stall: Duration,
    /// How long running requests may go on after the stop.
    pub(super) end: Duration,
}

impl Limits {
    pub(super) const DEFAULT: Limits = Limits {
        connections: MOST_CONNECTIONS,
        head: Duration::from_secs(10),
        request: Duration::from_secs(30),
        stall: Duration::from_secs(30),
        // Below the five seconds that the whole agent has for its end.
        end: Duration::from_secs(3),
    };
}

/// How many connections beyond [`MOST_CONNECTIONS`] are kept open to be told so; what comes above that is closed at once.
const SPARE_CONNECTIONS: usize = 32;

/// How long a client that is told so may take for its request.
const SPARE_TIMEOUT: Duration = Duration::from_secs(1);

/// The largest head of a request, in bytes.
const LARGEST_HEAD: usize = 16 << 10;

/// How long to wait after a failed accept: what makes it fail (no free descriptors) takes a moment to pass.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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

/// Accepts and serves until `stop`; returns when every connection has ended, or was ended at the deadline.
pub(super) async fn accept<L: Listener>(listener: &L, routes: Router, limits: Limits, stop: &CancellationToken) {
    let mut connections = JoinSet::new();
    let free = Arc::new(Semaphore::new(limits.connections));
    let busy = super::routes::busy(limits.connections);
    let mut failures = 0_u64;
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(end) = connections.join_next() => report(end),
            accepted = listener.next() => match accepted {
                Ok(stream) => {
                    failures = 0;
                    let stop = stop.clone();
                    if let Ok(permit) = Arc::clone(&free).try_acquire_owned() {
                        let serving = connection(stream, routes.clone(), limits, stop);
                        connections.spawn(async move {
                            serving.await;
                            drop(permit);
                        });
                    } else if connections.len() < limits.connections + SPARE_CONNECTIONS {
                        let limits = Limits { head: SPARE_TIMEOUT, stall: SPARE_TIMEOUT, ..limits };
                        connections.spawn(connection(stream, busy.clone(), limits, stop));
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
                        () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                    }
                }
            },
        }
    }
    let drained = tokio::time::timeout(limits.end, async {
        while let Some(end) = connections.join_next().await {
            report(end);
        }
    });
    if drained.await.is_err() {
        tracing::warn!(open = connections.len(), "closing connections whose requests did not end in time");
        connections.shutdown().await;
    }
}

async fn connection<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    stream: S,
    routes: Router,
    limits: Limits,
    stop: CancellationToken,
) {
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_buf_size(LARGEST_HEAD)
        .serve_connection(TokioIo::new(Stall::new(stream, limits.stall)), TowerToHyperService::new(routes));
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

fn report(end: Result<(), tokio::task::JoinError>) {
    if let Some(panic) = end.err().and_then(crate::shutdown::panic_text) {
        tracing::error!(panic, "a connection's task panicked");
    }
}
