//! The agent's socket for any client: access, response format, rejected requests.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::process::Stdio;
use std::time::Duration;

use overlay_agent::model::api::{DetachResponse, Endpoints, ErrorBody, Health, LogLevel, Peers, Status, Subnets};
use overlay_tests::http::{Response, request};
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::{ExpectContext, TestLab, etcd, eventually, kernel};

async fn start_lab() -> TestLab {
    TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn api_responses_have_expected_fields() {
    let lab = start_lab().await;
    let socket = lab.host("h1").socket();
    let metadata = std::fs::metadata(&socket).expect_ok("the socket");
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o660);
    let get = |path: &str| -> Response {
        let answer = request(&socket, "GET", path, "");
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        assert!(answer.headers.iter().any(|h| h.starts_with("content-type: application/json")), "{path}: {:?}", answer.headers);
        answer
    };
    let status: Status = get("/v1/status").json();
    assert!(status.ready && status.health == Health::Ok && status.node == "h1" && status.store.connected, "{status:#?}");
    assert_eq!((status.store.leases, status.data_path.peers, status.endpoints), (2, 1, 1));
    assert_eq!(status.store.prefix, "/coreos.com/network");
    let subnets: Subnets = get("/v1/subnets").json();
    assert_eq!(subnets.subnets.iter().filter(|s| s.own).count(), 1);
    for entry in &subnets.subnets {
        let left = entry.expires_in_seconds.expect_ok("the time left");
        // flannel's TTL of a day (wire.md).
        assert!((86_000..=86_400).contains(&left) && !entry.reservation, "{entry:#?}");
    }
    let peers: Peers = get("/v1/peers").json();
    assert_eq!((peers.peers.len(), peers.peers[0].host.as_deref(), peers.peers[0].device.as_str()), (1, Some("h2"), "ovx.1"));
    let endpoints: Endpoints = get("/v1/endpoints").json();
    assert_eq!(endpoints.endpoints.len(), 1);
    assert_eq!(request(&socket, "GET", "/healthz", "").status, 200);
    assert_eq!(request(&socket, "GET", "/readyz", "").status, 200);
    let metrics = request(&socket, "GET", "/metrics", "");
    for (name, value) in [("ready", 1), ("peers", 1), ("leases", 2), ("endpoints", 1)] {
        let line = &format!("overlayd_{name}{{network=\"default\"}} {value}\n");
        assert!(metrics.body.contains(line), "{line} in {}", metrics.body);
    }
    // The same from overlayctl.
    let printed: Status = lab.ctl("h1", &["-o", "json", "status"]).assert_code(0).json();
    assert_eq!((printed.node_id, printed.lease), (status.node_id, status.lease));
    let yaml = lab.ctl("h1", &["-o", "yaml", "peers"]).assert_code(0).stdout;
    assert!(yaml.contains("host: h2"), "{yaml}");
    lab.ctl("h1", &["status", "--brief"]).assert_code(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_requests_are_refused() {
    let lab = start_lab().await;
    let socket = lab.host("h1").socket();
    for (method, path, body, status, wanted) in [
        ("GET", "/v1/nothing", "", 404, "/v1/nothing"),
        ("DELETE", "/v1/status", "", 405, "DELETE"),
        ("PUT", "/v1/endpoints/a", "{", 400, "body is invalid"),
        ("PUT", "/v1/endpoints/a", r#"{"netns":"/run/netns/x","colour":"red"}"#, 400, "colour"),
        ("PUT", "/v1/endpoints/a", r#"{"netns":"relative"}"#, 400, "absolute path"),
        ("PUT", "/v1/endpoints/a", r#"{"netns":"/run/netns/none"}"#, 400, "/run/netns/none"),
        ("PUT", "/v1/endpoints/-a", r#"{"netns":"/run/netns/none"}"#, 400, "-a"),
        ("PUT", "/v1/log-level", r#"{"level":"loud=="}"#, 400, "loud"),
    ] {
        let answer = request(&socket, method, path, body);
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
        let problem: ErrorBody = answer.json();
        assert!(problem.error.contains(wanted), "{method} {path}: {}", problem.error);
    }
    let huge = format!(r#"{{"level":"{}"}}"#, "x".repeat(100 << 10));
    assert_eq!(request(&socket, "PUT", "/v1/log-level", &huge).status, 413);
    // Deleting an endpoint that does not exist is not an error.
    let answer = request(&socket, "DELETE", "/v1/endpoints/nobody", "");
    assert_eq!((answer.status, answer.json::<DetachResponse>().endpoint), (200, None));
    assert!(lab.status("h1").await.ready, "the agent is unaffected");
}

#[tokio::test(flavor = "multi_thread")]
async fn log_level_changes_at_runtime() {
    let lab = start_lab().await;
    let socket = lab.host("h1").socket();
    assert_eq!(request(&socket, "GET", "/v1/log-level", "").json::<LogLevel>().level, "info");
    let debug = |log: String| log.lines().filter(|line| line.contains(" DEBUG ") || line.contains(" TRACE ")).count();
    assert_eq!(debug(lab.log("h1")), 0);
    let answer = request(&socket, "PUT", "/v1/log-level", r#"{"level":"trace"}"#);
    assert!(answer.status == 200 && answer.json::<LogLevel>().level.contains("trace"), "{answer:?}");
    // An event to log.
    kernel::run(&lab, "h1", &["nft", "delete", "table", "inet", "overlayd"]);
    eventually("the log has debug lines", CONVERGE_TIMEOUT, || {
        let count = debug(lab.log("h1"));
        if count > 0 { Ok(()) } else { Err(format!("{count} lines")) }
    })
    .await;
    request(&socket, "PUT", "/v1/log-level", r#"{"level":"info"}"#);
    assert_eq!(request(&socket, "GET", "/v1/log-level", "").json::<LogLevel>().level, "info");
}

#[tokio::test(flavor = "multi_thread")]
async fn subnet_watch_streams_changes() {
    let lab = start_lab().await;
    let client = lab.host("h1").client();
    let mut stream = client.watch_subnets().await.expect_ok("a stream");
    let next = async |stream: &mut overlayctl::client::SubnetsStream| {
        let next = tokio::time::timeout(CONVERGE_TIMEOUT, stream.next()).await.expect_ok("in time").expect_ok("the stream");
        next.expect_ok("the stream continues").subnets
    };
    assert_eq!(next(&mut stream).await.len(), 2, "the present state first");
    let key = &format!("{}-24", etcd::free_subnet(&lab));
    let value = r#"{"PublicIP":"10.99.7.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}}"#;
    etcd::put(&lab, &etcd::lease_key(key), value);
    while !next(&mut stream).await.iter().any(|s| s.key == *key && s.reservation && s.refused.is_none()) {}
    etcd::delete(&lab, &etcd::lease_key(key));
    while next(&mut stream).await.iter().any(|s| s.key == *key) {}

    // The command exits cleanly when its reader is gone: it notices at the next change.
    let overlayctl = overlay_tests::programs::overlayctl().display().to_string();
    let mut command = lab.command("h1", &["timeout", "10", &overlayctl, "subnets", "--watch"]).expect_ok("a command");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut watch = lab.open_netns("h1").run(|| command.spawn()).expect_ok("enter h1").expect_ok("timeout");
    let mut heading = String::new();
    BufReader::new(watch.stdout.take().expect_ok("its output")).read_line(&mut heading).expect_ok("a line");
    etcd::put(&lab, &etcd::lease_key(key), value);
    let output = watch.wait_with_output().expect_ok("its end");
    assert!(heading.starts_with("SUBNET") && output.status.success() && output.stderr.is_empty(), "{heading}{output:?}");

    // The stream ends regularly with the agent.
    lab.host("h1").agent_stop(nix::sys::signal::Signal::SIGTERM).expect_ok("stop");
    let end = async {
        while let Some(subnets) = stream.next().await.expect_ok("the stream") {
            assert!(!subnets.subnets.is_empty());
        }
    };
    tokio::time::timeout(Duration::from_secs(5), end).await.expect_ok("the stream ends");
}
