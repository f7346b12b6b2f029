//! Valid and hostile requests over a real socket to a fake backend.

mod backend;
mod hostile;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::*;
use crate::model::api::{AttachResponse, Networks, Subnets};
use backend::{FakeBackend, FakeDirectory};

struct Agent {
    path: std::path::PathBuf,
    backend: Arc<FakeBackend>,
    directory: Arc<FakeDirectory>,
    stop: CancellationToken,
    task: JoinHandle<()>,
    _temporary: tempfile::TempDir,
}

impl Agent {
    fn start() -> Agent {
        Agent::start_with_limits(Limits::DEFAULT)
    }

    fn start_with_limits(limits: Limits) -> Agent {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("overlayd.sock");
        let (networks, stop) = (Arc::new(FakeDirectory::default()), CancellationToken::new());
        let socket = AdminSocket::bind(&path).unwrap();
        let task = tokio::spawn(serve_with_limits(socket, Arc::clone(&networks), limits, stop.clone()));
        Agent { path, backend: networks.default_network(), directory: networks, stop, task, _temporary: directory }
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).await.unwrap()
    }

    /// Sends raw bytes and reads until the end of the stream.
    async fn send_raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.unwrap();
        read_all(&mut stream).await
    }

    async fn request(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let length = body.len();
        let text = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}");
        split_response(&self.send_raw(text.as_bytes()).await)
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let (status, body) = self.request("GET", path, "").await;
        (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
    }

    async fn shut_down(self) {
        self.stop.cancel();
        tokio::time::timeout(Duration::from_secs(20), self.task).await.expect("an end in time").unwrap();
        assert!(!self.path.exists());
    }
}

async fn read_all(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    // A reset after the last byte also ends the stream.
    let _ = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes)).await.expect("an end in time");
    String::from_utf8_lossy(&bytes).into_owned()
}

fn split_response(answer: &str) -> (u16, String) {
    let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    (status, answer.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
}

#[tokio::test]
async fn every_path_responds() {
    let agent = Agent::start();
    let (status, body) = agent.get("/v1/status").await;
    assert_eq!((status, &body["node"], &body["health"]), (200, &json!("h1"), &json!("ok")));
    assert_eq!(agent.get("/v1/subnets").await, (200, json!({"subnets": []})));
    assert_eq!(agent.get("/v1/peers").await, (200, json!({"peers": []})));
    assert_eq!(agent.get("/v1/endpoints").await, (200, json!({"endpoints": []})));
    let (status, body) = agent.get("/v1/network").await;
    assert_eq!((status, &body["name"], &body["vni"], &body["bridge"]), (200, &json!("default"), &json!(1), &json!(null)));
    assert_eq!(agent.get("/healthz").await, (200, json!("ok\n")));
    assert_eq!(agent.get("/readyz").await, (200, json!("ready\n")));
    let (status, page) = agent.request("GET", "/metrics", "").await;
    assert!(status == 200 && page.starts_with("# HELP"), "{page}");
    let head = agent.send_raw(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");

    let (status, body) =
        agent.request("PUT", "/v1/endpoints/c1", r#"{"netns":"/run/netns/c1","addresses":{"v4":"10.244.1.7"}}"#).await;
    let attached: AttachResponse = serde_json::from_str(&body).expect(&body);
    assert_eq!((status, attached.endpoint.name.as_str()), (200, "c1"));
    assert_eq!(attached.endpoint.addresses().v4.map(|a| a.to_string()).as_deref(), Some("10.244.1.7"));
    assert_eq!(agent.request("DELETE", "/v1/endpoints/c1", "").await, (200, r#"{"endpoint":"c1","sharers":[]}"#.to_owned()));
    let forced = agent.request("DELETE", "/v1/endpoints/c1?force=true", "").await;
    assert_eq!(forced, (200, r#"{"endpoint":"c1","sharers":["sharer"]}"#.to_owned()));

    assert_eq!(agent.get("/v1/log-level").await, (200, json!({"level": "info"})));
    assert_eq!(agent.request("PUT", "/v1/log-level", r#"{"level":"debug"}"#).await, (200, r#"{"level":"debug"}"#.to_owned()));
    assert_eq!(agent.get("/v1/log-level").await, (200, json!({"level": "debug"})));
    agent.shut_down().await;
}

#[tokio::test]
async fn each_network_has_its_paths() {
    let agent = Agent::start();
    agent.backend.add_subnet("10.244.1.0-24");
    let blue = agent.directory.network(&"blue".into()).unwrap();
    blue.add_subnet("10.9.1.0-24");
    for (path, name, key) in [
        ("/v1", "default", "10.244.1.0-24"),
        ("/v1/networks/default", "default", "10.244.1.0-24"),
        ("/v1/networks/blue", "blue", "10.9.1.0-24"),
    ] {
        let (status, body) = agent.get(&format!("{path}/network")).await;
        assert_eq!((status, &body["name"]), (200, &json!(name)), "{path}");
        assert_eq!(agent.get(&format!("{path}/subnets")).await.1["subnets"][0]["key"], json!(key), "{path}");
        assert_eq!(agent.get(&format!("{path}/peers")).await, (200, json!({"peers": []})));
        assert_eq!(agent.get(&format!("{path}/status")).await.0, 200);
        assert_eq!(agent.get(&format!("{path}/endpoints")).await.0, 200);
    }
    let mut lines = open_watch_of(&agent, "/v1/networks/blue/subnets").await;
    assert_eq!(next_keys(&mut lines).await, ["10.9.1.0-24"]);

    let names = async |agent: &Agent| {
        let (_, body) = agent.get("/v1/networks").await;
        let networks: Networks = serde_json::from_value(body).expect("networks");
        networks.networks.into_iter().map(|entry| entry.name.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names(&agent).await, ["default", "blue"]);
    // An attach joins a network, and no other request does.
    let expected = "this host is not in network green, only in default, blue: `overlayctl network ls`";
    let (status, body) = agent.get("/v1/networks/green/endpoints").await;
    assert!(status == 404 && body["error"].as_str().is_some_and(|e| e.starts_with(expected)), "{body}");
    assert_eq!(agent.request("DELETE", "/v1/networks/green/endpoints/c1", "").await.0, 200);
    assert_eq!(names(&agent).await, ["default", "blue"]);
    let (status, body) = agent.request("PUT", "/v1/networks/green/endpoints/c1", r#"{"netns":"/run/netns/c1"}"#).await;
    let attached: AttachResponse = serde_json::from_str(&body).expect(&body);
    assert_eq!((status, attached.endpoint.network.as_str()), (200, "green"));
    assert_eq!(names(&agent).await, ["default", "blue", "green"]);
    // The default network's answers have no new field.
    let (_, body) = agent.request("PUT", "/v1/endpoints/c1", r#"{"netns":"/run/netns/c1"}"#).await;
    assert!(!body.contains(r#""network""#), "{body}");
    for (method, path, status, expected) in [
        ("PUT", "/v1/networks/red/endpoints/c1", 404, "there is no network red"),
        ("GET", "/v1/networks/Blue/status", 400, "`Blue` is not a DNS label"),
        ("GET", "/v1/networks/%ff/status", 400, "UTF-8"),
        ("GET", "/v1/networks/blue/mesh", 404, "there is no /v1/networks/blue/mesh"),
        ("GET", "/v1/networks/blue/endpoints/c1", 405, "/v1/networks/blue/endpoints/c1 does not support GET"),
    ] {
        let (got, text) = agent.request(method, path, r#"{"netns":"/a"}"#).await;
        assert!(got == status && text.contains(expected), "{path}: {got} {text}");
    }
    agent.shut_down().await;
}

#[tokio::test]
async fn errors_have_matching_status_and_body() {
    let agent = Agent::start();
    let attach = |name: &'static str, body: &'static str| ("PUT", format!("/v1/endpoints/{name}"), body);
    let get = |path: &str| ("GET", path.to_owned(), "");
    let good = r#"{"netns":"/run/netns/c1"}"#;
    for ((method, path, body), status, expected) in [
        (get("/"), 404, "there is no /"),
        (get("/v2/status"), 404, "there is no /v2/status"),
        (get("/v1/endpoints/c1"), 405, "/v1/endpoints/c1 does not support GET"),
        (("POST", "/v1/status".to_owned(), ""), 405, "/v1/status does not support POST"),
        (("BREW", "/v1/status".to_owned(), ""), 405, "does not support BREW"),
        (get("/v1/subnets?watch=maybe"), 400, "the only parameter is watch=true"),
        (get("/v1/subnets?wach=true"), 400, "wach"),
        (("DELETE", "/v1/endpoints/c1?force=perhaps".to_owned(), ""), 400, "the only parameter is force=true"),
        (attach("c1", ""), 400, "EOF while parsing"),
        (attach("c1", "{"), 400, "the request's body is invalid"),
        (attach("c1", r#"{"netns":"/a","ip":"10.0.0.1"}"#), 400, "unknown field `ip`"),
        (attach("c1", r#"{"netns":"/a","addresses":{"v4":"10.0.0"}}"#), 400, "the request's body is invalid"),
        (attach("-c1", good), 400, "`-c1` is no endpoint name"),
        (attach("a%2Fb", good), 400, "`a/b` is no endpoint name"),
        (attach("%1b%5b31m", good), 400, "is no endpoint name"),
        (attach("%ff", good), 400, "UTF-8"),
        (attach("bad", good), 400, "bad value"),
        (attach("conflict", good), 409, "conflict"),
        (attach("early", good), 503, "not yet"),
        (attach("broken", good), 500, "disk"),
        (attach("missing", good), 404, "no such"),
        (attach("panics", good), 500, "failed because of a bug in the agent"),
        (("DELETE", "/v1/endpoints/%20".to_owned(), ""), 400, "is no endpoint name"),
        (("PUT", "/v1/log-level".to_owned(), r#"{"level":"inof"}"#), 400, "inof"),
        (("PUT", "/v1/log-level".to_owned(), r#"{"level":3}"#), 400, "invalid type"),
    ] {
        let (got, text) = agent.request(method, &path, body).await;
        let problem: crate::model::api::ErrorBody =
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{method} {path}: {e}: {text}"));
        assert!(problem.error.contains(expected) && !problem.error.contains('\u{1b}'), "{method} {path}: {}", problem.error);
        assert_eq!(got, status, "{method} {path}: {}", problem.error);
    }
    agent.backend.not_ready(&["no snapshot seen", "no lease held"]);
    assert_eq!(agent.get("/readyz").await, (503, json!({"error": "no snapshot seen; no lease held"})));
    assert_eq!(agent.get("/healthz").await.0, 200);
    agent.backend.not_ready(&["the loop is stuck"]);
    assert_eq!(agent.get("/healthz").await, (503, json!({"error": "the loop is stuck"})));
    agent.shut_down().await;
}

#[tokio::test]
async fn connection_is_kept_alive_between_requests() {
    let agent = Agent::start();
    let mut stream = agent.connect().await;
    for _ in 0..3 {
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut bytes = [0; 512];
        let read = stream.read(&mut bytes).await.unwrap();
        assert!(bytes[..read].ends_with(b"ok\n"));
    }
    // An idle connection does not delay the shutdown.
    let began = Instant::now();
    agent.shut_down().await;
    assert!(began.elapsed() < Duration::from_secs(3));
}

async fn open_watch(agent: &Agent) -> tokio::io::Lines<BufReader<UnixStream>> {
    open_watch_of(agent, "/v1/subnets").await
}

async fn open_watch_of(agent: &Agent, path: &str) -> tokio::io::Lines<BufReader<UnixStream>> {
    let mut stream = agent.connect().await;
    stream.write_all(format!("GET {path}?watch=true HTTP/1.0\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut lines = BufReader::new(stream).lines();
    while !lines.next_line().await.unwrap().expect("a head").is_empty() {}
    lines
}

async fn next_keys(lines: &mut tokio::io::Lines<BufReader<UnixStream>>) -> Vec<String> {
    let line = tokio::time::timeout(Duration::from_secs(10), lines.next_line()).await.expect("a line in time");
    let subnets: Subnets = serde_json::from_str(&line.unwrap().expect("a line")).unwrap();
    subnets.subnets.into_iter().map(|s| s.key).collect()
}

#[tokio::test]
async fn watch_streams_changes_until_stop() {
    let agent = Agent::start();
    let mut lines = open_watch(&agent).await;
    assert!(next_keys(&mut lines).await.is_empty());
    // An unrelated change sends no line: the next line has the next subnet.
    agent.backend.notify_change();
    tokio::time::sleep(Duration::from_millis(60)).await;
    agent.backend.add_subnet("10.245.0.0-24");
    assert_eq!(next_keys(&mut lines).await, ["10.245.0.0-24"]);
    // Simultaneous changes send one line with the last state.
    for i in 0..100 {
        agent.backend.add_subnet(&format!("10.244.{i}.0-24"));
    }
    let mut line_count = 1;
    while next_keys(&mut lines).await.len() < 101 {
        line_count += 1;
    }
    assert!(line_count < 10, "{line_count} lines for 100 changes at once");
    let began = Instant::now();
    agent.shut_down().await;
    assert!(began.elapsed() < Duration::from_secs(3));
    assert_eq!(lines.next_line().await.unwrap(), None);
}

#[tokio::test]
async fn watch_ends_when_client_disconnects() {
    let agent = Agent::start_with_limits(Limits { max_connections: 1, ..Limits::DEFAULT });
    let mut lines = open_watch(&agent).await;
    assert!(next_keys(&mut lines).await.is_empty());
    assert_eq!(agent.get("/healthz").await.0, 503);
    drop(lines);
    let began = Instant::now();
    while agent.get("/healthz").await.0 != 200 {
        assert!(began.elapsed() < Duration::from_secs(5), "the watch's connection is still open");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    agent.shut_down().await;
}

#[tokio::test]
async fn attach_of_lost_client_is_not_begun() {
    let agent = Agent::start();
    let body = r#"{"netns":"/run/netns/c1"}"#;
    let request = format!("PUT /v1/endpoints/c1 HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    for _ in 0..20 {
        let mut stream = agent.connect().await;
        // Sent and closed before the server's task runs again.
        stream.write_all(request.as_bytes()).await.unwrap();
    }
    assert_eq!(agent.get("/healthz").await.0, 200);
    assert_eq!(agent.backend.attach_requests.load(std::sync::atomic::Ordering::Relaxed), 0);
    assert_eq!(agent.request("PUT", "/v1/endpoints/c1", body).await.0, 200);
    agent.shut_down().await;
}

#[tokio::test]
async fn tcp_listener_serves_only_metrics_and_health() {
    let listener = bind_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let taken = bind_tcp(address).await.unwrap_err().to_string();
    assert!(taken.contains(&address.to_string()) && taken.contains("choose another port"), "{taken}");
    let stop = CancellationToken::new();
    let task = tokio::spawn(serve_metrics(listener, FakeDirectory::default().default_network(), stop.clone()));
    for (path, expected) in [("/metrics", 200), ("/healthz", 200), ("/readyz", 200), ("/v1/status", 404), ("/v1/log-level", 404)]
    {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(split_response(&text).0, expected, "{path}");
    }
    stop.cancel();
    task.await.unwrap();
}
