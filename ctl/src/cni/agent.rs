//! Blocking client of the agent's socket, with one deadline per verb.
//!
//! An agent that is absent, closes the connection or is not ready may be restarting: the client retries until the deadline. Each
//! request is idempotent, because the agent answers the same attach with the same endpoint.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use overlay_agent::http::{self, Response};
use overlay_agent::model::NetworkName;
use overlay_agent::model::api::{AttachRequest, AttachResponse, DetachResponse, Endpoints, ErrorBody, Networks, VERSION};
use overlay_agent::model::endpoint::EndpointName;
use serde::de::DeserializeOwned;

use super::error::{CniError, Code};
use super::log::Log;

/// Pause before the second try. Each further pause doubles, up to `MAX_BACKOFF`.
const INITIAL_BACKOFF: Duration = Duration::from_millis(5);
const MAX_BACKOFF: Duration = Duration::from_millis(200);

/// Largest response, in bytes: 65,536 endpoints take some 25 MiB.
const MAX_RESPONSE_BYTES: u64 = 64 << 20;

/// Client of this host's agent, for one network.
#[derive(Debug)]
pub struct AgentClient<'a> {
    socket: &'a Path,
    network: &'a NetworkName,
    deadline: Instant,
    log: &'a Log,
}

/// Failure of one try.
#[derive(Debug)]
enum Failure {
    /// Another try may succeed.
    Retryable(String),
    /// The agent's error, or an error that no retry resolves.
    Final(CniError),
}

impl<'a> AgentClient<'a> {
    /// Creates a client that retries until the deadline.
    pub fn new(socket: &'a Path, network: &'a NetworkName, deadline: Instant, log: &'a Log) -> AgentClient<'a> {
        AgentClient { socket, network, deadline, log }
    }

    /// Copies the client with another deadline.
    pub fn with_deadline(&self, deadline: Instant) -> AgentClient<'a> {
        AgentClient { deadline, ..*self }
    }

    /// Attaches an endpoint.
    pub fn attach(&self, name: &EndpointName, request: &AttachRequest) -> Result<AttachResponse, CniError> {
        let body =
            serde_json::to_vec(request).map_err(|e| CniError::new(Code::Failed, format!("cannot write the request: {e}")))?;
        self.request("PUT", &self.endpoint_path(name), &body)
    }

    /// Detaches an endpoint and all that share its namespace: the runtime deletes the container. An unknown endpoint is no error.
    pub fn detach(&self, name: &EndpointName) -> Result<DetachResponse, CniError> {
        self.request("DELETE", &format!("{}?force=true", self.endpoint_path(name)), &[])
    }

    /// Lists the network's endpoints on this host.
    pub fn endpoints(&self) -> Result<Endpoints, CniError> {
        // A host leaves a network some time after its last endpoint.
        if !self.network.is_default() {
            let joined: Networks = self.request("GET", &format!("/v{VERSION}/networks"), &[])?;
            if !joined.networks.iter().any(|entry| entry.name == *self.network) {
                return Ok(Endpoints { endpoints: Vec::new() });
            }
        }
        self.request("GET", &self.endpoints_path(), &[])
    }

    fn endpoints_path(&self) -> String {
        if self.network.is_default() {
            format!("/v{VERSION}/endpoints")
        } else {
            format!("/v{VERSION}/networks/{}/endpoints", self.network)
        }
    }

    fn endpoint_path(&self, name: &EndpointName) -> String {
        // A name contains no character that needs percent-encoding.
        format!("{}/{name}", self.endpoints_path())
    }

    /// Checks once whether the agent is ready; the error is its reason.
    pub fn check_ready(&self) -> Result<(), String> {
        match self.attempt("GET", "/readyz", &[]) {
            Ok(_) => Ok(()),
            Err(Failure::Retryable(reason)) => Err(reason),
            Err(Failure::Final(error)) => Err(error.message),
        }
    }

    fn request<T: DeserializeOwned>(&self, method: &str, path: &str, body: &[u8]) -> Result<T, CniError> {
        let mut pause = INITIAL_BACKOFF;
        let mut attempts = 1_u32;
        let bytes = loop {
            let reason = match self.attempt(method, path, body) {
                Ok(bytes) => break bytes,
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Retryable(reason)) => reason,
            };
            if attempts.is_power_of_two() {
                self.log.debug(format_args!("try {attempts}: {reason}"));
            }
            if Instant::now() + pause >= self.deadline {
                return Err(
                    CniError::new(Code::TryAgain, reason).with_details(format!("tried {attempts} times: {method} {path}"))
                );
            }
            sleep(pause);
            pause = (pause * 2).min(MAX_BACKOFF);
            attempts += 1;
        };
        serde_json::from_slice(&bytes).map_err(|e| {
            let own = env!("CARGO_PKG_VERSION");
            let text = format!(
                "cannot read the agent's answer to {method} {path}: {e}. overlay-cni is {own}: is overlayd the same version?"
            );
            CniError::new(Code::Failed, text)
        })
    }

    /// Sends one request over its own connection.
    fn attempt(&self, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>, Failure> {
        let socket = self.socket.display();
        self.log.debug(format_args!("{method} {path}"));
        let mut stream = connect(self.socket, self.time_left()?)?;
        let exchange = || {
            stream.write_all(&http::request(method, path, "overlayd", body))?;
            let mut bytes = Vec::new();
            DeadlineReader { stream, client: self }.take(MAX_RESPONSE_BYTES).read_to_end(&mut bytes)?;
            Response::parse(bytes)
        };
        let response = exchange().map_err(|e: io::Error| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => self.deadline_exceeded(),
            _ => Failure::Retryable(format!("the agent at {socket} closed the connection during {method} {path}: {e}")),
        })?;
        match response.status {
            200..=299 => Ok(response.body),
            status => Err(error_response(status, &response.body, method, path)),
        }
    }

    /// Time until the deadline.
    fn time_left(&self) -> Result<Duration, Failure> {
        Some(self.deadline.saturating_duration_since(Instant::now()))
            .filter(|remaining| !remaining.is_zero())
            .ok_or_else(|| self.deadline_exceeded())
    }

    fn deadline_exceeded(&self) -> Failure {
        let text = format!("the agent at {} did not answer in time. See its log: journalctl -u overlayd", self.socket.display());
        Failure::Retryable(text)
    }
}

/// Connects. The timeout covers a server with a full backlog too.
fn connect(path: &Path, timeout: Duration) -> Result<UnixStream, Failure> {
    let path_text = path.display();
    let failed = |errno: nix::Error| match errno {
        nix::Error::ENOENT => {
            Failure::Retryable(format!("no agent at {path_text}: no such socket. Is overlayd running? systemctl status overlayd"))
        }
        nix::Error::ECONNREFUSED => Failure::Retryable(format!(
            "no agent at {path_text}: nothing listens on the socket. Start it: systemctl start overlayd"
        )),
        nix::Error::EAGAIN | nix::Error::EINTR => {
            Failure::Retryable(format!("the agent at {path_text} does not accept connections"))
        }
        nix::Error::EACCES | nix::Error::EPERM => {
            let text = format!("permission denied for {path_text}: the runtime must run overlay-cni as root");
            Failure::Final(CniError::new(Code::Io, text))
        }
        _ => Failure::Final(CniError::new(Code::Io, format!("cannot connect to {path_text}: {}", errno.desc()))),
    };
    let address = UnixAddr::new(path).map_err(failed)?;
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).map_err(failed)?;
    // 0 means no timeout.
    let limit = TimeVal::microseconds(i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX).max(1));
    socket::setsockopt(&fd, sockopt::SendTimeout, &limit).map_err(failed)?;
    socket::connect(fd.as_raw_fd(), &address).map_err(failed)?;
    Ok(UnixStream::from(fd))
}

/// Reads until the client's deadline, which covers all reads of a response.
struct DeadlineReader<'a> {
    stream: UnixStream,
    client: &'a AgentClient<'a>,
}

impl Read for DeadlineReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.client.time_left().map_err(|_| ErrorKind::TimedOut)?;
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}

/// Parses the agent's error response (`docs/api.md`, "Errors").
fn error_response(status: u16, body: &[u8], method: &str, path: &str) -> Failure {
    let message = match serde_json::from_slice::<ErrorBody>(body) {
        Ok(problem) => problem.error,
        Err(_) => format!("the agent answered {method} {path} with status {status}"),
    };
    match status {
        503 | 504 => Failure::Retryable(message),
        409 => Failure::Final(CniError::new(Code::Conflict, message)),
        400..=499 => Failure::Final(CniError::new(Code::Refused, message)),
        _ => Failure::Final(CniError::new(Code::Failed, message)),
    }
}
