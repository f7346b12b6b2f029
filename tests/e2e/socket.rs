//! The agent's socket as any program sees it: who may connect, what the answers look like, what is refused.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::time::Duration;

use overlay_agent::model::api::{Detached, Endpoints, Health, LogLevel, Peers, Problem, Status, Subnets};
use overlay_tests::http::{Answer, ask};
use overlay_tests::story::SOON;
use overlay_tests::{Must, Story, etcd, eventually, kernel};

async fn lab() -> Story {
    Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn shapes() {
    let story = lab().await;
    let socket = story.at("h1").socket();
    let metadata = std::fs::metadata(&socket).must("the socket");
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o660);
    let get = |path: &str| -> Answer {
        let answer = ask(&socket, "GET", path, "");
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
        let left = entry.expires_in_seconds.must("the time left");
        // flannel's TTL of a day (wire.md).
        assert!((86_000..=86_400).contains(&left) && !entry.reservation, "{entry:#?}");
    }
    let peers: Peers = get("/v1/peers").json();
    assert_eq!((peers.peers.len(), peers.peers[0].host.as_deref(), peers.peers[0].device.as_str()), (1, Some("h2"), "ovx.1"));
    let endpoints: Endpoints = get("/v1/endpoints").json();
    assert_eq!(endpoints.endpoints.len(), 1);
    assert_eq!(ask(&socket, "GET", "/healthz", "").status, 200);
    assert_eq!(ask(&socket, "GET", "/readyz", "").status, 200);
    let metrics = ask(&socket, "GET", "/metrics", "");
    for line in ["overlayd_ready 1\n", "overlayd_peers 1\n", "overlayd_leases 2\n", "overlayd_endpoints 1\n"] {
        assert!(metrics.body.contains(line), "{line} in {}", metrics.body);
    }
    // The same by overlayctl.
    let printed: Status = story.ctl("h1", &["-o", "json", "status"]).exits(0).json();
    assert_eq!((printed.node_id, printed.lease), (status.node_id, status.lease));
    let yaml = story.ctl("h1", &["-o", "yaml", "peers"]).exits(0).out;
    assert!(yaml.contains("host: h2"), "{yaml}");
    story.ctl("h1", &["status", "--brief"]).exits(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals() {
    let story = lab().await;
    let socket = story.at("h1").socket();
    for (method, path, body, status, wanted) in [
        ("GET", "/v1/nothing", "", 404, "/v1/nothing"),
        ("DELETE", "/v1/status", "", 405, "DELETE"),
        ("PUT", "/v1/endpoints/a", "{", 400, "not as expected"),
        ("PUT", "/v1/endpoints/a", r#"{"netns":"/run/netns/x","colour":"red"}"#, 400, "colour"),
        ("PUT", "/v1/endpoints/a", r#"{"netns":"relative"}"#, 400, "absolute path"),
        ("PUT", "/v1/endpoints/a", r#"{"netns":"/run/netns/none"}"#, 400, "/run/netns/none"),
        ("PUT", "/v1/endpoints/-a", r#"{"netns":"/run/netns/none"}"#, 400, "-a"),
        ("PUT", "/v1/log-level", r#"{"level":"loud=="}"#, 400, "loud"),
    ] {
        let answer = ask(&socket, method, path, body);
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
        let problem: Problem = answer.json();
        assert!(problem.error.contains(wanted), "{method} {path}: {}", problem.error);
    }
    let huge = format!(r#"{{"level":"{}"}}"#, "x".repeat(100 << 10));
    assert_eq!(ask(&socket, "PUT", "/v1/log-level", &huge).status, 413);
    // Deleting what is not there is no error.
    let answer = ask(&socket, "DELETE", "/v1/endpoints/nobody", "");
    assert_eq!((answer.status, answer.json::<Detached>().endpoint), (200, None));
    assert!(story.status("h1").await.ready, "none of it did any harm");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_level_changes_while_it_runs() {
    let story = lab().await;
    let socket = story.at("h1").socket();
    assert_eq!(ask(&socket, "GET", "/v1/log-level", "").json::<LogLevel>().level, "info");
    let debug = |log: String| log.lines().filter(|line| line.contains(" DEBUG ") || line.contains(" TRACE ")).count();
    assert_eq!(debug(story.log("h1")), 0);
    let answer = ask(&socket, "PUT", "/v1/log-level", r#"{"level":"trace"}"#);
    assert!(answer.status == 200 && answer.json::<LogLevel>().level.contains("trace"), "{answer:?}");
    // Something to tell of.
    kernel::run(&story, "h1", &["nft", "delete", "table", "inet", "overlayd"]);
    eventually("there are lines below info", SOON, || {
        let count = debug(story.log("h1"));
        if count > 0 { Ok(()) } else { Err(format!("{count} lines")) }
    })
    .await;
    ask(&socket, "PUT", "/v1/log-level", r#"{"level":"info"}"#);
    assert_eq!(ask(&socket, "GET", "/v1/log-level", "").json::<LogLevel>().level, "info");
}

#[tokio::test(flavor = "multi_thread")]
async fn subnets_are_watched() {
    let story = lab().await;
    let client = story.at("h1").client();
    let mut stream = client.watch_subnets().await.must("a stream");
    let next = async |stream: &mut overlayctl::client::SubnetsStream| {
        let next = tokio::time::timeout(SOON, stream.next()).await.must("in time").must("the stream");
        next.must("the agent goes on").subnets
    };
    assert_eq!(next(&mut stream).await.len(), 2, "the present state first");
    let key = "10.244.200.0-24";
    let value = r#"{"PublicIP":"10.99.7.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}}"#;
    etcd::put(&story, &etcd::lease_key(key), value);
    while !next(&mut stream).await.iter().any(|s| s.key == key && s.reservation && s.refused.is_none()) {}
    etcd::delete(&story, &etcd::lease_key(key));
    while next(&mut stream).await.iter().any(|s| s.key == key) {}

    // The command ends cleanly where its reader goes away: at the next change it has nobody to tell.
    let script = format!("set -o pipefail; {} subnets --watch | head -1", overlay_tests::programs::overlayctl().display());
    let netns = story.inside("h1");
    let mut command = story.command("h1", &["timeout", "10", "bash", "-c", &script]).must("a command");
    let watching = tokio::task::spawn_blocking(move || netns.run(|| command.output()).must("enter h1"));
    tokio::time::sleep(Duration::from_millis(700)).await;
    etcd::put(&story, &etcd::lease_key(key), value);
    let output = watching.await.must("the command's task").must("bash");
    let said = overlay_tests::programs::Said::of(&[&script], &output).exits(0);
    assert!(said.out.starts_with("SUBNET") && said.err.is_empty(), "{said:?}");

    // The stream ends in good order with the agent.
    story.at("h1").agent_stop(nix::sys::signal::Signal::SIGTERM).must("stop");
    let end = async {
        while let Some(subnets) = stream.next().await.must("the stream") {
            assert!(!subnets.subnets.is_empty());
        }
    };
    tokio::time::timeout(Duration::from_secs(5), end).await.must("the stream ends");
}
