//! The agent's socket, blocking, with one deadline for all of a verb.
//!
//! An agent that is not there, breaks off or is not ready may be one that starts again: it is asked anew until the deadline. Each request can be
//! repeated, for the agent answers the same attach with the same endpoint. HTTP/1.0, so that an answer ends with the connection.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use overlay_agent::model::api::{AttachRequest, AttachResponse, DetachResponse, Endpoints, ErrorBody, VERSION};
use overlay_agent::model::endpoint::EndpointName;
use serde::de::DeserializeOwned;

use super::error::{CniError, Code};
use super::log::Log;

/// The pause before the second try; each further one is twice as long, up to the longest.
const INITIAL_BACKOFF: Duration = Duration::from_millis(5);
const MAX_BACKOFF: Duration = Duration::from_millis(200);

/// The largest answer read, in bytes: 65,536 endpoints have some 25 MiB.
const MAX_RESPONSE_BYTES: u64 = 64 << 20;

/// The agent of this host.
#[derive(Debug)]
pub struct AgentClient<'a> {
    socket: &'a Path,
    deadline: Instant,
    log: &'a Log,
}

/// Why one try has no answer.
#[derive(Debug)]
enum Failure {
    /// Another try may have one.
    Retryable(String),
    /// The agent's word, or what no waiting heals.
    Final(CniError),
}

impl<'a> AgentClient<'a> {
    /// The agent behind a socket, asked until the deadline.
    pub fn new(socket: &'a Path, deadline: Instant, log: &'a Log) -> AgentClient<'a> {
        AgentClient { socket, deadline, log }
    }

    /// The same agent with another deadline.
    pub fn with_deadline(&self, deadline: Instant) -> AgentClient<'a> {
        AgentClient { deadline, ..*self }
    }

    /// Attaches.
    pub fn attach(&self, name: &EndpointName, request: &AttachRequest) -> Result<AttachResponse, CniError> {
        let body =
            serde_json::to_vec(request).map_err(|e| CniError::new(Code::Failed, format!("cannot write the request: {e}")))?;
        self.request("PUT", &endpoint_path(name), &body)
    }

    /// Detaches, with all that share its namespace: a runtime's word is that the container goes. One that is not there is no error.
    pub fn detach(&self, name: &EndpointName) -> Result<DetachResponse, CniError> {
        self.request("DELETE", &format!("{}?force=true", endpoint_path(name)), &[])
    }

    /// All endpoints of the host.
    pub fn endpoints(&self) -> Result<Endpoints, CniError> {
        self.request("GET", &format!("/v{VERSION}/endpoints"), &[])
    }

    /// Whether the agent is ready now; the error says what is missing. Asks once.
    pub fn check_ready(&self) -> Result<(), String> {
        match self.attempt("GET", "/readyz", &[]) {
            Ok(_) => Ok(()),
            Err(Failure::Retryable(reason)) => Err(reason),
            Err(Failure::Final(error)) => Err(error.message),
        }
    }

    fn request<T: DeserializeOwned>(&self, method: &str, path: &str, body: &[u8]) -> Result<T, CniError> {
        let mut pause = INITIAL_BACKOFF;
        let mut tries = 1_u32;
        let bytes = loop {
            let reason = match self.attempt(method, path, body) {
                Ok(bytes) => break bytes,
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Retryable(reason)) => reason,
            };
            if tries.is_power_of_two() {
                self.log.debug(format_args!("try {tries}: {reason}"));
            }
            if Instant::now() + pause >= self.deadline {
                return Err(CniError::new(Code::TryAgain, reason).with_details(format!("tried {tries} times: {method} {path}")));
            }
            sleep(pause);
            pause = (pause * 2).min(MAX_BACKOFF);
            tries += 1;
        };
        serde_json::from_slice(&bytes).map_err(|e| {
            let own = env!("CARGO_PKG_VERSION");
            let text = format!(
                "cannot read the agent's answer to {method} {path}: {e}. Are overlay-cni {own} and overlayd of one version?"
            );
            CniError::new(Code::Failed, text)
        })
    }

    /// One request over a connection of its own.
    fn attempt(&self, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>, Failure> {
        let socket = self.socket.display();
        self.log.debug(format_args!("{method} {path}"));
        let mut stream = connect(self.socket, self.time_left()?)?;
        let broken = |e: std::io::Error| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => self.deadline_exceeded(),
            _ => Failure::Retryable(format!("the agent at {socket} broke off while answering {method} {path}: {e}")),
        };
        let head = format!(
            "{method} {path} HTTP/1.0\r\nHost: overlayd\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(&[head.as_bytes(), body].concat()).map_err(broken)?;
        let mut answer = Vec::new();
        let mut piece = [0; 16 << 10];
        let (status, start) = loop {
            // What arrives piece by piece has one deadline for all of it.
            stream.set_read_timeout(Some(self.time_left()?)).map_err(broken)?;
            let read = match stream.read(&mut piece) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                read => read.map_err(broken)?,
            };
            answer.extend_from_slice(&piece[..read]);
            if answer.len() as u64 > MAX_RESPONSE_BYTES {
                return Err(broken(ErrorKind::FileTooLarge.into()));
            }
            match parse_head(&answer) {
                Some(ResponseHead { status, start, end: Some(end) }) if answer.len() >= end => {
                    answer.truncate(end);
                    break (status, start);
                }
                Some(ResponseHead { status, start, end: None }) if read == 0 => break (status, start),
                _ if read == 0 => return Err(broken(ErrorKind::UnexpectedEof.into())),
                _ => {}
            }
        };
        let body = answer.split_off(start);
        match status {
            200..=299 => Ok(body),
            status => Err(error_response(status, &body, method, path)),
        }
    }

    /// The time that is left.
    fn time_left(&self) -> Result<Duration, Failure> {
        Some(self.deadline.saturating_duration_since(Instant::now()))
            .filter(|left| !left.is_zero())
            .ok_or_else(|| self.deadline_exceeded())
    }

    fn deadline_exceeded(&self) -> Failure {
        let text =
            format!("the agent at {} did not answer in time. Its log says more: journalctl -u overlayd", self.socket.display());
        Failure::Retryable(text)
    }
}

fn endpoint_path(name: &EndpointName) -> String {
    // A name has no character that a path would have to hide.
    format!("/v{VERSION}/endpoints/{name}")
}

/// Connects. A server whose queue is full lets a connection wait, so that has a limit too.
fn connect(path: &Path, timeout: Duration) -> Result<UnixStream, Failure> {
    let shown = path.display();
    let failed = |errno: nix::Error| match errno {
        nix::Error::ENOENT => Failure::Retryable(format!(
            "no agent at {shown}: there is no such socket. Is overlayd running? systemctl status overlayd"
        )),
        nix::Error::ECONNREFUSED => Failure::Retryable(format!(
            "no agent answers at {shown}: the socket is left over from one that has ended. systemctl start overlayd"
        )),
        nix::Error::EAGAIN | nix::Error::EINTR => Failure::Retryable(format!("the agent at {shown} does not accept connections")),
        nix::Error::EACCES | nix::Error::EPERM => {
            let text = format!("permission to use {shown} is denied: the runtime has to run overlay-cni as root");
            Failure::Final(CniError::new(Code::Io, text))
        }
        _ => Failure::Final(CniError::new(Code::Io, format!("cannot connect to {shown}: {}", errno.desc()))),
    };
    let address = UnixAddr::new(path).map_err(failed)?;
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).map_err(failed)?;
    // 0 would be no limit.
    let limit = TimeVal::microseconds(i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX).max(1));
    socket::setsockopt(&fd, sockopt::SendTimeout, &limit).map_err(failed)?;
    socket::connect(fd.as_raw_fd(), &address).map_err(failed)?;
    Ok(UnixStream::from(fd))
}

/// The head of an answer.
struct ResponseHead {
    status: u16,
    /// Where the body begins.
    start: usize,
    /// Where it ends, where the head says so.
    end: Option<usize>,
}

/// The head, once it is there.
fn parse_head(bytes: &[u8]) -> Option<ResponseHead> {
    let start = bytes.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&bytes[..start]);
    let mut lines = head.lines();
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let length = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    Some(ResponseHead { status, start, end: length.and_then(|length| start.checked_add(length)) })
}

/// The agent's no (`docs/api.md`, "Errors").
fn error_response(status: u16, body: &[u8], method: &str, path: &str) -> Failure {
    let message = match serde_json::from_slice::<ErrorBody>(body) {
        Ok(problem) => problem.error,
        Err(_) => format!("the agent answers {method} {path} with status {status}"),
    };
    match status {
        503 | 504 => Failure::Retryable(message),
        409 => Failure::Final(CniError::new(Code::Conflict, message)),
        400..=499 => Failure::Final(CniError::new(Code::Refused, message)),
        _ => Failure::Final(CniError::new(Code::Failed, message)),
    }
}
