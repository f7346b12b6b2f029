//! HTTP over the agent's socket with nothing between: what any program sees that is not our client.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::Must;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(10);

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The header lines, in lower case.
    pub headers: Vec<String>,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body as JSON of a shape.
    #[track_caller]
    pub fn json<T: DeserializeOwned>(&self) -> T {
        match serde_json::from_str(&self.body) {
            Ok(value) => value,
            Err(error) => panic!("{error}, with status {}, in: {}", self.status, self.body),
        }
    }
}

/// Asks the socket. HTTP/1.0: the answer ends with the connection.
#[track_caller]
pub fn ask(socket: &Path, method: &str, path: &str, body: &str) -> Answer {
    let mut stream = UnixStream::connect(socket).must(&socket.display().to_string());
    stream.set_read_timeout(Some(LIMIT)).must("a limit");
    let request = format!(
        "{method} {path} HTTP/1.0\r\nHost: overlayd\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).must(path);
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        // The agent may answer before it has read all of a request that it refuses, and close then.
        Err(error) if bytes.is_empty() || error.kind() != ErrorKind::ConnectionReset => panic!("{path}: {error}"),
        _ => {}
    }
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").must(&format!("a body in {text}"));
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).must(&format!("a status in {head}"));
    Answer { status, headers: lines.map(str::to_lowercase).collect(), body: body.to_owned() }
}
