//! The client against a server that answers recorded bytes.

pub mod fake_agent;

use std::os::unix::fs::PermissionsExt;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::*;

/// Answers one connection with these bytes and returns the request.
fn serve_once(dir: &Path, response: &'static str) -> (Client, tokio::task::JoinHandle<String>) {
    let socket = dir.join("overlayd.sock");
    let listener = UnixListener::bind(&socket).expect("a socket in a temporary directory");
    let task = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("the client connects");
        let mut request = vec![0; 4096];
        let length = stream.read(&mut request).await.expect("a request");
        stream.write_all(response.as_bytes()).await.expect("the client reads");
        String::from_utf8_lossy(&request[..length]).into_owned()
    });
    (Client::new(socket), task)
}

fn name(text: &str) -> EndpointName {
    text.parse().expect("an endpoint name")
}

#[tokio::test]
async fn successful_response_is_decoded() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (client, task) = serve_once(dir.path(), "HTTP/1.1 200 OK\r\ncontent-length: 18\r\n\r\n{\"endpoint\":\"web\"}");
    let answer = client.detach(&name("web")).await.expect("a detach");
    assert_eq!(answer.endpoint, Some(name("web")));
    assert!(task.await.expect("the server").starts_with("DELETE /v1/endpoints/web HTTP/1.1\r\n"));
}

#[tokio::test]
async fn problem_response_keeps_agent_message() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (client, _task) = serve_once(dir.path(), "HTTP/1.1 409 Conflict\r\ncontent-length: 22\r\n\r\n{\"error\":\"it is held\"}");
    let error = client.detach(&name("web")).await.expect_err("a problem");
    assert_eq!(error.to_string(), "it is held");
    assert!(matches!(error, ClientError::Problem { status: StatusCode::CONFLICT, .. }));
}

#[tokio::test]
async fn unexpected_response_is_reported() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (client, _task) = serve_once(dir.path(), "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]");
    let message = client.status().await.expect_err("no status").to_string();
    assert!(message.contains("GET /v1/status") && message.contains("same version"), "{message}");
}

#[tokio::test]
async fn lost_connection_is_reported() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (client, _task) = serve_once(dir.path(), "HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n{\"endp");
    assert!(matches!(client.detach(&name("web")).await, Err(ClientError::ConnectionLost { .. })));
}

#[tokio::test]
async fn missing_stale_and_silent_sockets_are_distinguished() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let missing = Client::new(dir.path().join("none.sock")).peers().await.expect_err("no agent");
    assert!(missing.to_string().contains("systemctl status overlayd"), "{missing}");

    let stale = dir.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).expect("a socket"));
    assert!(matches!(Client::new(stale).peers().await, Err(ClientError::ConnectionRefused { .. })));

    let silent = dir.path().join("silent.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&silent).expect("a socket");
    std::fs::set_permissions(&silent, std::fs::Permissions::from_mode(0o600)).expect("own socket");
    let client = Client::new(silent).with_timeout(Duration::from_millis(50));
    assert!(matches!(client.peers().await, Err(ClientError::TimedOut { .. })));
}

#[tokio::test]
async fn watch_yields_one_value_per_line() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (client, task) = serve_once(
        dir.path(),
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\n{\"subnets\r\n8\r\n\":[]}\n\n\n\r\ne\r\n{\"subnets\":[]}\r\n1\r\n\n\r\n0\r\n\r\n",
    );
    let mut stream = client.watch_subnets().await.expect("a stream");
    for _ in 0..2 {
        assert_eq!(stream.next().await.expect("a line"), Some(Subnets { subnets: Vec::new() }));
    }
    assert_eq!(stream.next().await.expect("a clean end"), None);
    assert!(task.await.expect("the server").starts_with("GET /v1/subnets?watch=true HTTP/1.1\r\n"));
}
