//! Commands about several networks against a fake agent.

use clap::Parser;
use overlay_agent::model::api::{AttachRequest, DataPathStatus, Health, NetworkKind, Status, StoreStatus};
use serde_json::json;

use super::*;
use crate::client::tests::fake_agent::FakeAgent;
use crate::cmd::{Cli, CommandError, Context, Outcome, attach, detach, network};
use crate::etcd::EtcdArgs;
use crate::output::{Format, Printer};

const NOT_FOUND: (u16, &str) = (404, r#"{"error":"this host is not in it"}"#);

fn name(text: &str) -> EndpointName {
    text.parse().expect("an endpoint name")
}

fn network_name(text: &str) -> NetworkName {
    text.parse().expect("a network name")
}

fn endpoint(network: &str, name: &str) -> serde_json::Value {
    let netns = format!("/run/netns/{name}");
    json!({"name": name, "network": network, "mode": "none", "netns": netns, "attached_at": 0})
}

fn attached(network: &str, name: &str) -> String {
    json!({"endpoint": endpoint(network, name), "prefix_length": {}, "gateway": {}, "mtu": null}).to_string()
}

fn list(names: &[&str]) -> String {
    let entry = |name| json!({"name": name, "kind": "routed", "subnet": null, "ready": true, "endpoints": 0, "problems": 0});
    json!({"networks": names.iter().map(entry).collect::<Vec<_>>()}).to_string()
}

/// An agent in the networks default, blue and red, each with the container `web-of-test`; it leaves red. Others it refuses.
fn fake_agent() -> FakeAgent {
    FakeAgent::start(|request| {
        let (method, path) = request.split_once(' ').expect("a method");
        let network = path.strip_prefix("/v1/networks/").and_then(|rest| rest.split('/').next()).unwrap_or("default");
        let (status, text) = match (method, network) {
            ("GET", _) if path == "/v1/networks" => (200, list(&["default", "blue", "red"])),
            (_, "red") | ("GET", "green") => (NOT_FOUND.0, NOT_FOUND.1.to_owned()),
            ("GET", network) => (200, json!({"endpoints": [endpoint(network, "web-of-test")]}).to_string()),
            ("PUT", "green") => (409, r#"{"error":"subnet 10.9.1.0/24 is full"}"#.to_owned()),
            ("PUT", network) => (200, attached(network, "web-of-test")),
            ("DELETE", _) => (200, r#"{"endpoint":"web-of-test","sharers":[]}"#.to_owned()),
            other => panic!("{other:?}"),
        };
        (status, text)
    })
}

async fn ask(client: &Client) -> Result<Vec<Endpoint>, ClientError> {
    Ok(client.endpoints().await?.endpoints)
}

#[tokio::test]
async fn list_asks_each_network_of_the_host() {
    let agent = fake_agent();
    let client = agent.client();
    let all = ask_each(&client, None, ask).await.expect("answers");
    let names: Vec<&str> = all.iter().map(|(network, _)| network.as_str()).collect();
    // It has left red between the two requests.
    assert_eq!(names, ["default", "blue"]);
    assert_eq!(
        agent.take_requests(),
        ["GET /v1/endpoints", "GET /v1/networks", "GET /v1/networks/blue/endpoints", "GET /v1/networks/red/endpoints"]
    );
    let one = ask_each(&client, Some(&network_name("blue")), ask).await.expect("an answer");
    assert_eq!((one.len(), agent.take_requests()), (1, vec!["GET /v1/networks/blue/endpoints".to_owned()]));
    let error = ask_each(&client, Some(&network_name("red")), ask).await.expect_err("not in it");
    assert_eq!(error.to_string(), "this host is not in it");
}

#[tokio::test]
async fn agent_without_networks_is_in_the_default_one() {
    let agent = FakeAgent::start(|request| match request {
        "GET /v1/endpoints" => (200, json!({"endpoints": []}).to_string()),
        other => (404, json!({"error": format!("there is no {other}")}).to_string()),
    });
    let all = ask_each(&agent.client(), None, async |client| client.endpoints().await).await.expect("answers");
    assert_eq!(all.len(), 1);
    assert!(endpoints_named(&agent.client(), &name("web")).await.expect("answers").is_empty());
}

#[tokio::test]
async fn failed_attach_leaves_what_was_attached_before() {
    let agent = fake_agent();
    let request = |network: &str| (network_name(network), AttachRequest::default());
    let requests = ["default", "blue", "white", "green"].map(request);
    let existing = [network_name("blue")];
    let error =
        attach::attach_to_each(&agent.client(), &name("web-of-test"), &requests, &existing).await.expect_err("green is full");
    assert_eq!(error.to_string(), "subnet 10.9.1.0/24 is full");
    assert_eq!(
        agent.take_requests(),
        [
            "PUT /v1/endpoints/web-of-test",
            "PUT /v1/networks/blue/endpoints/web-of-test",
            "PUT /v1/networks/white/endpoints/web-of-test",
            "PUT /v1/networks/green/endpoints/web-of-test",
            "DELETE /v1/networks/white/endpoints/web-of-test",
            "DELETE /v1/endpoints/web-of-test",
        ]
    );
    let all = attach::attach_to_each(&agent.client(), &name("web-of-test"), &requests[..3], &[]).await.expect("responses");
    assert_eq!(all.iter().map(|response| response.endpoint.network.as_str()).collect::<Vec<_>>(), ["default", "blue", "white"]);
}

async fn run_command(agent: &FakeAgent, line: &str) -> Result<Outcome, CommandError> {
    let context = Context { client: agent.client(), printer: Printer::new(Format::Json) };
    let words = ["overlayctl"].into_iter().chain(line.split(' '));
    match Cli::try_parse_from(words).expect(line).command {
        crate::cmd::Command::Attach(args) => attach::run(&context, &args).await,
        crate::cmd::Command::Detach(args) => detach::run(&context, &args).await,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn detach_is_from_all_networks_of_the_name() {
    let agent = fake_agent();
    let deletes = || agent.take_requests().into_iter().filter(|request| request.starts_with("DELETE")).collect::<Vec<_>>();
    run_command(&agent, "detach web-of-test").await.expect("a detach");
    assert_eq!(deletes(), ["DELETE /v1/endpoints/web-of-test", "DELETE /v1/networks/blue/endpoints/web-of-test"]);
    run_command(&agent, "detach web-of-test --network blue").await.expect("a detach");
    assert_eq!(deletes(), ["DELETE /v1/networks/blue/endpoints/web-of-test"]);
    run_command(&agent, "detach unknown-of-test --force").await.expect("a detach");
    assert_eq!(deletes(), ["DELETE /v1/endpoints/unknown-of-test?force=true"]);
}

#[tokio::test]
async fn attach_gives_each_network_its_interface() {
    let agent = fake_agent();
    let line = "attach web-of-test --netns /proc/self/ns/net --network blue --network white --publish 80:80";
    run_command(&agent, line).await.expect("an attach");
    let puts: Vec<(String, AttachRequest)> = agent
        .take_bodies()
        .into_iter()
        .filter(|(request, _)| request.starts_with("PUT"))
        .map(|(request, body)| (request, serde_json::from_str(&body).expect("a request")))
        .collect();
    let shown = puts.iter().map(|(request, r)| (request.as_str(), r.interface.as_deref(), r.default_route, r.publish.len()));
    assert_eq!(
        shown.collect::<Vec<_>>(),
        [
            ("PUT /v1/networks/blue/endpoints/web-of-test", Some("eth0"), None, 1),
            ("PUT /v1/networks/white/endpoints/web-of-test", Some("eth1"), Some(false), 0),
        ]
    );
    assert!(puts.iter().all(|(_, request)| request.netns.as_deref().is_some_and(|netns| netns.ends_with("ns/net"))));
    // One network's attach is one request, as ever.
    run_command(&agent, "attach web-of-test --netns /proc/self/ns/net").await.expect("an attach");
    assert_eq!(agent.take_requests(), ["PUT /v1/endpoints/web-of-test"]);
}

fn status(servers: &[&str]) -> String {
    let store = StoreStatus {
        connected: true,
        endpoints: servers.iter().map(|server| (*server).to_owned()).collect(),
        prefix: "/p".to_owned(),
        revision: 1,
        error: None,
        config_errors: Vec::new(),
        leases: 0,
        refused: Vec::new(),
    };
    let status = Status {
        name: NetworkName::default().to_string(),
        kind: NetworkKind::Routed,
        version: String::new(),
        node: String::new(),
        node_id: String::new(),
        uptime_seconds: 0,
        ready: true,
        health: Health::Ok,
        problems: Vec::new(),
        store,
        network: None,
        lease: None,
        underlay: None,
        data_path: DataPathStatus::default(),
        endpoints: 0,
    };
    serde_json::to_string(&status).expect("JSON")
}

#[tokio::test]
async fn network_with_endpoints_on_this_host_is_not_removed() {
    let agent = FakeAgent::start(|request| match request {
        "GET /v1/status" => (200, status(&["http://a:2379"])),
        "GET /v1/networks/blue/endpoints" => (200, json!({"endpoints": [endpoint("blue", "web")]}).to_string()),
        _ => (NOT_FOUND.0, NOT_FOUND.1.to_owned()),
    });
    let context = Context { client: agent.client(), printer: Printer::new(Format::Json) };
    let check = async |server: &str, prefix: &str, name: &str| {
        let etcd = EtcdArgs::without_tls(vec![server.to_owned()], prefix);
        network::refuse_own_endpoints(&context, &etcd, &network_name(name)).await.map_err(|error| error.to_string())
    };
    let refused = "network blue has endpoints on this host: web; `overlayctl detach NAME --network blue` each of them first";
    assert_eq!(check("http://a:2379", "/p/", "blue").await, Err(refused.to_owned()));
    assert_eq!(check("http://a:2379", "/p", "red").await, Ok(()));
    assert_eq!(check("http://b:2379", "/p", "blue").await, Ok(()), "another etcd");
    assert_eq!(check("http://a:2379", "/q", "blue").await, Ok(()), "another overlay");
}
