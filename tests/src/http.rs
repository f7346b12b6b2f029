//! Raw HTTP over the agent's socket, without our client.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::ExpectContext;

/// Time limit of a response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// A response.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The header lines, in lower case.
    pub headers: Vec<String>,
    /// The body.
    pub body: String,
}

impl Response {
    /// Parses the body as JSON.
    #[track_caller]
    pub fn json<T: DeserializeOwned>(&self) -> T {
        match serde_json::from_str(&self.body) {
            Ok(value) => value,
            Err(error) => panic!("{error}, with status {}, in: {}", self.status, self.body),
        }
    }
}

/// Sends a request to the socket. HTTP/1.0: the response ends with the connection.
#[track_caller]
pub fn request(socket: &Path, method: &str, path: &str, body: &str) -> Response {
    let mut stream = UnixStream::connect(socket).expect_ok(&socket.display().to_string());
    stream.set_read_timeout(Some(RESPONSE_TIMEOUT)).expect_ok("a limit");
    let request = format!(
        "{method} {path} HTTP/1.0\r\nHost: overlayd\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).expect_ok(path);
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        // The agent may answer and close the connection before it has read all of a rejected request.
        Err(error) if bytes.is_empty() || error.kind() != ErrorKind::ConnectionReset => panic!("{path}: {error}"),
        _ => {}
    }
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").expect_ok(&format!("a body in {text}"));
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).expect_ok(&format!("a status in {head}"));
    Response { status, headers: lines.map(str::to_lowercase).collect(), body: body.to_owned() }
}
