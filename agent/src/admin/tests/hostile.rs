//! Misbehaving clients must not affect other clients.

use super::*;

const SHORT_LIMITS: Limits = Limits {
    max_connections: 128,
    header_timeout: Duration::from_millis(1500),
    request_timeout: Duration::from_millis(700),
    write_timeout: Duration::from_millis(700),
    shutdown_grace: Duration::from_millis(700),
};

#[tokio::test]
async fn oversized_body_is_rejected() {
    let agent = Agent::start();
    for head in ["content-length: 99999999999", "transfer-encoding: chunked"] {
        let mut stream = agent.connect().await;
        stream.write_all(format!("PUT /v1/endpoints/a HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n").as_bytes()).await.unwrap();
        // The agent closes the connection long before the last chunk.
        let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
        for _ in 0..64 {
            if stream.write_all(chunk.as_bytes()).await.is_err() {
                break;
            }
        }
        let answer = read_all(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("has more than 65536 bytes"), "{head}: {answer}");
    }
    let fits = format!(r#"{{"netns":"/{}"}}"#, "x".repeat((64 << 10) - 13));
    assert_eq!((agent.request("PUT", "/v1/endpoints/a", &fits).await.0, fits.len()), (200, 64 << 10));
    assert_eq!(agent.request("PUT", "/v1/endpoints/a", &format!("{fits} ")).await.0, 413);
    agent.shut_down().await;
}

#[tokio::test]
async fn garbage_is_rejected_and_agent_keeps_serving() {
    let agent = Agent::start_with_limits(SHORT_LIMITS);
    let long_head = [b"GET / HTTP/1.1\r\nx: ".as_slice(), &b"y".repeat(1 << 20)].concat();
    let garbage: [&[u8]; 8] = [
        b"\0\0\0\0\r\n\r\n",
        &[0xff; 4096],
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"PUT /v1/log-level HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        &long_head,
    ];
    for bytes in garbage {
        let mut stream = agent.connect().await;
        // The agent may close before all bytes are written.
        let _ = stream.write_all(bytes).await;
        let answer = read_all(&mut stream).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
        assert_eq!(agent.get("/healthz").await.0, 200);
    }
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_are_bounded_and_time_out() {
    let agent = Agent::start_with_limits(SHORT_LIMITS);
    let mut idle = Vec::new();
    for _ in 0..1000 {
        idle.push(agent.connect().await);
    }
    // Connections above the limit get a 503 or are closed; the others stay silent.
    let mut closed = 0;
    for stream in &mut idle {
        let mut byte = [0; 1];
        let read = tokio::time::timeout(Duration::from_millis(if closed == 0 { 2 } else { 50 }), stream.read(&mut byte)).await;
        closed += usize::from(read.is_ok());
    }
    assert!(closed >= 700, "{closed} closed");
    // After the idle timeout the agent serves again, although the idle clients still exist.
    let began = Instant::now();
    loop {
        let mut stream = agent.connect().await;
        // The agent may have closed already.
        let _ = stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").await;
        match split_response(&read_all(&mut stream).await) {
            (200, _) => break,
            (status, body) => {
                assert!(status == 0 || (status == 503 && body.contains("128 connections are open")), "{status} {body}")
            }
        }
        assert!(began.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(idle);
    agent.shut_down().await;
}

#[tokio::test]
async fn slow_clients_time_out_without_blocking_others() {
    let agent = Agent::start_with_limits(SHORT_LIMITS);
    // Four slow clients: a trickled head, a trickled body, a hanging handler, an unread large response.
    let mut head = agent.connect().await;
    head.write_all(b"GET /v1/st").await.unwrap();
    let mut body = agent.connect().await;
    body.write_all(b"PUT /v1/endpoints/a HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{").await.unwrap();
    let mut hangs = agent.connect().await;
    let text = "PUT /v1/endpoints/slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 14\r\n\r\n{\"netns\":\"/a\"}";
    hangs.write_all(text.as_bytes()).await.unwrap();
    for i in 0..20_000 {
        agent.backend.add_subnet(&format!("10.{}.{}.0-24", i / 256, i % 256));
    }
    let mut unread = agent.connect().await;
    unread.write_all(b"GET /v1/subnets HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let began = Instant::now();
    assert_eq!(agent.get("/healthz").await.0, 200);
    // Less than the slow clients' timeouts: this request did not wait for them.
    assert!(began.elapsed() < SHORT_LIMITS.header_timeout);

    let (status, text) = split_response(&read_all(&mut hangs).await);
    assert!(status == 504 && text.contains("it may still complete"), "{status} {text}");
    assert!(read_all(&mut body).await.starts_with("HTTP/1.1 504"));
    assert_eq!(split_response(&read_all(&mut head).await).0, 0, "closed without an answer, or with a refusal");
    wait_closed(&unread).await;
    let answer = read_all(&mut unread).await;
    assert!(answer.starts_with("HTTP/1.1 200") && !answer.ends_with("]}"), "the answer was cut off");
    agent.shut_down().await;
}

/// Waits until the agent has closed a connection with unread data.
async fn wait_closed(stream: &UnixStream) {
    let closed = async {
        while !stream.ready(tokio::io::Interest::READABLE).await.unwrap().is_read_closed() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), closed).await.expect("the agent closes the connection");
}

#[tokio::test]
async fn shutdown_waits_for_requests_up_to_deadline() {
    let agent = Agent::start_with_limits(Limits { request_timeout: Duration::from_secs(60), ..SHORT_LIMITS });
    let mut hangs = agent.connect().await;
    let text = "PUT /v1/endpoints/slow HTTP/1.1\r\nhost: x\r\ncontent-length: 14\r\n\r\n{\"netns\":\"/a\"}";
    hangs.write_all(text.as_bytes()).await.unwrap();
    // This answer proves that the connection before was accepted.
    assert_eq!(agent.get("/healthz").await.0, 200);
    let began = Instant::now();
    agent.shut_down().await;
    assert!((Duration::from_millis(600)..Duration::from_secs(5)).contains(&began.elapsed()), "{:?}", began.elapsed());
}
