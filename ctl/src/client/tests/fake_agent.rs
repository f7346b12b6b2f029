//! An agent that answers each request by a function, for tests of its clients.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::client::Client;

/// A running fake agent; ends with this value.
#[derive(Debug)]
pub struct FakeAgent {
    directory: tempfile::TempDir,
    requests: Arc<Mutex<Vec<(String, String)>>>,
    thread: Option<JoinHandle<()>>,
}

impl FakeAgent {
    /// Starts an agent. The function gets `METHOD PATH` and returns status and body.
    pub fn start(answer: impl Fn(&str) -> (u16, String) + Send + 'static) -> FakeAgent {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let listener = UnixListener::bind(directory.path().join("overlayd.sock")).expect("a socket");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("a connection");
                // A connection without a request ends the agent.
                let Some((request, body)) = read_request(&stream) else { return };
                let (status, text) = answer(&request);
                seen.lock().unwrap_or_else(PoisonError::into_inner).push((request, body));
                let head = format!("HTTP/1.1 {status} x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", text.len());
                // A client that has gone misses nothing.
                let _ignored = stream.write_all((head + &text).as_bytes());
            }
        });
        FakeAgent { directory, requests, thread: Some(thread) }
    }

    /// Path of its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("overlayd.sock")
    }

    /// A client of it.
    pub fn client(&self) -> Client {
        Client::new(self.socket())
    }

    /// The requests since the last call: `METHOD PATH`.
    pub fn take_requests(&self) -> Vec<String> {
        self.take_bodies().into_iter().map(|(request, _)| request).collect()
    }

    /// The requests since the last call with their bodies.
    pub fn take_bodies(&self) -> Vec<(String, String)> {
        std::mem::take(&mut *self.requests.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        drop(UnixStream::connect(self.socket()));
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

fn read_request(stream: &UnixStream) -> Option<(String, String)> {
    let mut lines = BufReader::new(stream);
    let mut first = String::new();
    lines.read_line(&mut first).ok().filter(|length| *length > 0)?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        lines.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    lines.read_exact(&mut body).ok()?;
    let (request, _version) = first.rsplit_once(' ')?;
    Some((request.to_owned(), String::from_utf8(body).ok()?))
}
