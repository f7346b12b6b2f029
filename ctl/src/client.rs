//! HTTP/1 client of the agent's UNIX socket. One connection per request: the socket is local, and no state outlives a command.
//!
//! The JSON types are in `overlay_agent::model::api`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use overlay_agent::model::NetworkName;
use overlay_agent::model::api::{
    AttachRequest, AttachResponse, DetachResponse, Endpoints, ErrorBody, LogLevel, Mesh, NetworkView, Networks, Peers, Status,
    Subnets, VERSION,
};
use overlay_agent::model::endpoint::EndpointName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// Default path of the agent's socket.
pub const DEFAULT_SOCKET: &str = "/run/overlayd/overlayd.sock";

/// Timeout of one request: a little more than the agent's own limit of 30 s, so that its answer arrives.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(35);

/// Largest response, in bytes. 10,000 peers take about 3 MB.
const MAX_RESPONSE_BYTES: usize = 256 << 20;

/// Failure of a request.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket does not exist.
    #[error(
        "no agent at {}: no such socket. Is overlayd running? See `systemctl status overlayd`; for an agent with another run \
         directory use --socket PATH",
        socket.display()
    )]
    NoSocket {
        /// Path of the socket.
        socket: PathBuf,
    },
    /// No process listens on the socket.
    #[error("no agent at {}: nothing listens on the socket. Start it: systemctl start overlayd", socket.display())]
    ConnectionRefused {
        /// Path of the socket.
        socket: PathBuf,
    },
    /// The user has no permission for the socket.
    #[error(
        "permission denied for {}: become root (sudo overlayctl ...) or a member of the socket's group",
        socket.display()
    )]
    PermissionDenied {
        /// Path of the socket.
        socket: PathBuf,
    },
    /// The connection failed otherwise.
    #[error("cannot connect to {}: {source}", socket.display())]
    Connect {
        /// Path of the socket.
        socket: PathBuf,
        /// Error of the system call.
        source: std::io::Error,
    },
    /// The connection broke during the request.
    #[error("the agent at {} closed the connection during {request}: {reason}. See its log: journalctl -u overlayd", socket.display())]
    ConnectionLost {
        /// Path of the socket.
        socket: PathBuf,
        /// Method and path.
        request: String,
        /// Reason.
        reason: String,
    },
    /// No response before the timeout.
    #[error("the agent at {} did not answer {request} within {}", socket.display(), humantime::format_duration(*limit))]
    TimedOut {
        /// Path of the socket.
        socket: PathBuf,
        /// Method and path.
        request: String,
        /// Timeout.
        limit: Duration,
    },
    /// The agent rejects the request.
    #[error("{message}")]
    Problem {
        /// HTTP status.
        status: StatusCode,
        /// The agent's message.
        message: String,
    },
    /// The response cannot be parsed.
    #[error("cannot read the agent's answer to {request}: {reason}. overlayctl is {}: is overlayd the same version?", env!("CARGO_PKG_VERSION"))]
    InvalidResponse {
        /// Method and path.
        request: String,
        /// Parse error.
        reason: String,
    },
}

/// Client of one agent.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
    network: NetworkName,
}

impl Client {
    /// Creates a client of the agent that listens at `socket`, for its default network. Opens no connection.
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client { socket: socket.into(), timeout: REQUEST_TIMEOUT, network: NetworkName::default() }
    }

    /// The same client for another network; `None` keeps it.
    pub fn of_network<'a>(&self, network: impl Into<Option<&'a NetworkName>>) -> Client {
        Client { network: network.into().unwrap_or(&self.network).clone(), ..self.clone() }
    }

    /// Its network.
    pub fn network_name(&self) -> &NetworkName {
        &self.network
    }

    /// Sets the timeout of each request.
    pub fn with_timeout(mut self, timeout: Duration) -> Client {
        self.timeout = timeout;
        self
    }

    /// Path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Reads the networks that the host is in. An agent of a version without named networks is in the default one only.
    pub async fn networks(&self) -> Result<Networks, ClientError> {
        match self.request_json(Method::GET, "networks", None::<&()>).await {
            Err(ClientError::Problem { status: StatusCode::NOT_FOUND, .. }) => Ok(Networks { networks: Vec::new() }),
            answer => answer,
        }
    }

    /// Reads the network's status, which has that of the agent.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.request_json(Method::GET, &self.path("status"), None::<&()>).await
    }

    /// Reads all leases that the agent knows.
    pub async fn subnets(&self) -> Result<Subnets, ClientError> {
        self.request_json(Method::GET, &self.path("subnets"), None::<&()>).await
    }

    /// Streams all leases, now and on each change, until the agent ends.
    pub async fn watch_subnets(&self) -> Result<SubnetsStream, ClientError> {
        let path = self.path("subnets?watch=true");
        let request = format!("GET /v{VERSION}/{path}");
        let (body, driver) = self.within_timeout(&request, self.send(Method::GET, &path, None::<&()>)).await?;
        Ok(SubnetsStream { socket: self.socket.clone(), request, body, pending: BytesMut::new(), _driver: driver })
    }

    /// Reads the peers and their data-path state.
    pub async fn peers(&self) -> Result<Peers, ClientError> {
        self.request_json(Method::GET, &self.path("peers"), None::<&()>).await
    }

    /// Reads the peers' reachability from the agent's probes.
    pub async fn mesh(&self) -> Result<Mesh, ClientError> {
        self.request_json(Method::GET, "mesh", None::<&()>).await
    }

    /// Reads the network's endpoints on this host.
    pub async fn endpoints(&self) -> Result<Endpoints, ClientError> {
        self.request_json(Method::GET, &self.path("endpoints"), None::<&()>).await
    }

    /// Reads the network on this host, including its endpoints.
    pub async fn network(&self) -> Result<NetworkView, ClientError> {
        self.request_json(Method::GET, &self.path("network"), None::<&()>).await
    }

    /// Reads the metrics, in Prometheus' text format.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let request = "GET /metrics";
        let bytes = self
            .within_timeout(request, async {
                let (body, _driver) = self.send(Method::GET, "/metrics", None::<&()>).await?;
                read_body(body).await.map_err(|reason| self.connection_lost(request, reason))
            })
            .await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Attaches a container.
    pub async fn attach(&self, name: &EndpointName, request: &AttachRequest) -> Result<AttachResponse, ClientError> {
        self.request_json(Method::PUT, &self.path(&format!("endpoints/{name}")), Some(request)).await
    }

    /// Detaches a container. An unknown container is no error.
    pub async fn detach(&self, name: &EndpointName) -> Result<DetachResponse, ClientError> {
        self.detach_with(name, false).await
    }

    /// Detaches a container. With `force` it also detaches endpoints that share its namespace.
    pub async fn detach_with(&self, name: &EndpointName, force: bool) -> Result<DetachResponse, ClientError> {
        let query = if force { "?force=true" } else { "" };
        self.request_json(Method::DELETE, &self.path(&format!("endpoints/{name}{query}")), None::<&()>).await
    }

    /// Reads the agent's log filter.
    pub async fn log_level(&self) -> Result<LogLevel, ClientError> {
        self.request_json(Method::GET, "log-level", None::<&()>).await
    }

    /// Sets the agent's log filter.
    pub async fn set_log_level(&self, level: &LogLevel) -> Result<LogLevel, ClientError> {
        self.request_json(Method::PUT, "log-level", Some(level)).await
    }

    /// A path of the network's part of the API.
    fn path(&self, path: &str) -> String {
        if self.network.is_default() { path.to_owned() } else { format!("networks/{}/{path}", self.network) }
    }

    async fn request_json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let request = format!("{method} /v{VERSION}/{path}");
        let bytes = self
            .within_timeout(&request, async {
                let (body, _driver) = self.send(method, path, body).await?;
                read_body(body).await.map_err(|reason| self.connection_lost(&request, reason))
            })
            .await?;
        serde_json::from_slice(&bytes).map_err(|e| ClientError::InvalidResponse { request, reason: e.to_string() })
    }

    /// Sends a request and returns the body of a successful response. The connection lives as long as the driver.
    async fn send(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<(Incoming, Driver), ClientError> {
        // Unversioned paths are given in full.
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/v{VERSION}/{path}") };
        let name = format!("{method} {path}");
        let stream = UnixStream::connect(&self.socket).await.map_err(|source| self.connect_error(source))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.connection_lost(&name, e.to_string()))?;
        let mut driver = Driver(tokio::task::JoinSet::new());
        driver.0.spawn(async move {
            // The reader of the body sees the end of the connection.
            let _ended = connection.await;
        });
        let mut builder = Request::builder().method(method).uri(&path).header("host", "overlayd");
        let bytes = match body {
            Some(body) => {
                builder = builder.header("content-type", "application/json");
                serde_json::to_vec(body)
                    .map_err(|e| ClientError::InvalidResponse { request: name.clone(), reason: e.to_string() })?
            }
            None => Vec::new(),
        };
        let request = builder.body(Full::new(Bytes::from(bytes))).map_err(|e| self.connection_lost(&name, e.to_string()))?;
        let response = sender.send_request(request).await.map_err(|e| self.connection_lost(&name, e.to_string()))?;
        let status = response.status();
        if status.is_success() {
            return Ok((response.into_body(), driver));
        }
        let bytes = read_body(response.into_body()).await.map_err(|reason| self.connection_lost(&name, reason))?;
        let message = match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(problem) => problem.error,
            Err(_) => format!("the agent answered {name} with {status}"),
        };
        Err(ClientError::Problem { status, message })
    }

    async fn within_timeout<T>(
        &self,
        request: &str,
        work: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        tokio::time::timeout(self.timeout, work).await.unwrap_or_else(|_| {
            Err(ClientError::TimedOut { socket: self.socket.clone(), request: request.to_owned(), limit: self.timeout })
        })
    }

    fn connection_lost(&self, request: &str, reason: String) -> ClientError {
        ClientError::ConnectionLost { socket: self.socket.clone(), request: request.to_owned(), reason }
    }

    fn connect_error(&self, source: std::io::Error) -> ClientError {
        let socket = self.socket.clone();
        match source.kind() {
            std::io::ErrorKind::NotFound => ClientError::NoSocket { socket },
            std::io::ErrorKind::ConnectionRefused => ClientError::ConnectionRefused { socket },
            std::io::ErrorKind::PermissionDenied => ClientError::PermissionDenied { socket },
            _ => ClientError::Connect { socket, source },
        }
    }
}

/// Drives a connection; dropping it ends the connection's task.
#[derive(Debug)]
struct Driver(tokio::task::JoinSet<()>);

async fn read_body(body: Incoming) -> Result<Bytes, String> {
    Limited::new(body, MAX_RESPONSE_BYTES).collect().await.map(|all| all.to_bytes()).map_err(|e| e.to_string())
}

/// Stream of the subnets, one item per change.
#[derive(Debug)]
pub struct SubnetsStream {
    socket: PathBuf,
    request: String,
    body: Incoming,
    pending: BytesMut,
    _driver: Driver,
}

impl SubnetsStream {
    /// Reads the next item; `None` if the agent ended the stream cleanly. Cancel-safe: data already read is kept.
    pub async fn next(&mut self) -> Result<Option<Subnets>, ClientError> {
        loop {
            if let Some(end) = self.pending.iter().position(|b| *b == b'\n') {
                let line = self.pending.split_to(end + 1);
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let value = serde_json::from_slice(&line)
                    .map_err(|e| ClientError::InvalidResponse { request: self.request.clone(), reason: e.to_string() })?;
                return Ok(Some(value));
            }
            let broken = |reason: String| ClientError::ConnectionLost {
                socket: self.socket.clone(),
                request: self.request.clone(),
                reason,
            };
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(e)) => return Err(broken(e.to_string())),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        if self.pending.len() + data.len() > MAX_RESPONSE_BYTES {
                            return Err(broken(format!("a line of more than {MAX_RESPONSE_BYTES} bytes")));
                        }
                        self.pending.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
pub mod tests;
