//! The drawing of three hosts, one of them with a fault; and the drawings in the documentation.

use std::path::Path;

use super::{AgentSnapshot, Graph, dot, svg, text};

/// Answers of the agent on host `n` of three; `worker-2` lacks a route to `worker-3`.
fn snapshot(n: usize) -> AgentSnapshot {
    let subnets: Vec<serde_json::Value> = (1..=3)
        .map(|m| {
            serde_json::json!({"key": format!("10.244.{m}.0-24"), "subnet": {"v4": format!("10.244.{m}.0/24")}, "host": format!("worker-{m}"),
                "node_id": "0", "public_ip": {"v4": format!("192.0.2.{m}")}, "backend": "vxlan", "vni": 1, "vtep": {}, "expires_in_seconds": null,
                "reservation": false, "own": m == n, "refused": null})
        })
        .collect();
    let peers: Vec<serde_json::Value> = (1..=3)
        .filter(|m| *m != n)
        .map(|m| {
            let state = if (n, m) == (2, 3) { "missing route: Permission denied" } else { "programmed" };
            serde_json::json!({"subnet": format!("10.244.{m}.0/24"), "host": format!("worker-{m}"), "public_ip": format!("192.0.2.{m}"),
                "vtep": "02:00:00:00:00:01", "device": "ovx.1", "nexthop_id": 1, "state": state, "last_repair": null})
        })
        .collect();
    let names: &[&str] = [["web", "cache"].as_slice(), &["db"], &["batch", "mail"]][n - 1];
    let endpoints: Vec<serde_json::Value> = names
        .iter()
        .enumerate()
        .map(|(c, name)| {
            serde_json::json!({"name": name, "netns": "/run/netns/x", "interface": "eth0", "host_interface": "ove0", "mac": "02:00:00:00:00:01",
                "addresses": {"v4": format!("10.244.{n}.{}", c + 2)}, "attached_at": 0})
        })
        .collect();
    let status = serde_json::json!({"version": "0.1.0", "node": format!("worker-{n}"), "node_id": "0", "uptime_seconds": 1, "ready": n != 2,
        "health": "ok", "problems": [], "store": {"connected": true, "endpoints": [], "prefix": "/x", "revision": 1, "error": null,
        "config_errors": [], "leases": 3, "refused": []}, "network": {"pools": {"v4": {"network": "10.244.0.0/16", "subnet_length": 24,
        "min": "10.244.1.0/24", "max": "10.244.255.0/24"}}, "vxlan": {"vni": 1, "port": 8472, "mtu": null}},
        "lease": {"subnet": {"v4": format!("10.244.{n}.0/24")}, "reservation": false}, "underlay": null,
        "data_path": {"peers": 2, "failed": [], "drift_repairs": 0, "last_drift": null, "mtu": 1450, "nexthop_objects": true}, "endpoints": 2});
    let value = |value| serde_json::from_value(value).expect("a status");
    AgentSnapshot {
        status: value(status),
        subnets: serde_json::from_value(serde_json::json!({"subnets": subnets})).expect("subnets"),
        peers: serde_json::from_value(serde_json::json!({"peers": peers})).expect("peers"),
        endpoints: serde_json::from_value(serde_json::json!({"endpoints": endpoints})).expect("endpoints"),
    }
}

/// Checks that every tag is closed, in order, and every value quoted; returns the texts.
fn well_formed(document: &str) -> Vec<String> {
    let mut open: Vec<String> = Vec::new();
    let mut texts = Vec::new();
    let mut rest = document.trim();
    while let Some(at) = rest.find('<') {
        let text = rest[..at].trim();
        assert!(!text.contains('>') && text.split('&').skip(1).all(|part| part.contains(';')), "{text}");
        if !text.is_empty() {
            texts.push(text.to_owned());
        }
        let end = at + rest[at..].find('>').expect("the end of a tag");
        let tag = &rest[at + 1..end];
        assert!(!tag.contains('<') && tag.matches('"').count().is_multiple_of(2), "{tag}");
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop().as_deref(), Some(name), "closes another tag"),
            None if tag.ends_with('/') => {}
            None => open.push(tag.split(' ').next().unwrap_or_default().to_owned()),
        }
        rest = &rest[end + 1..];
        assert!(rest.is_empty() || !open.is_empty(), "content after the root element");
    }
    assert!(open.is_empty(), "left open: {open:?}");
    texts
}

#[test]
fn every_host_and_container_is_drawn() {
    let graph = Graph::from_snapshots(&[snapshot(1), snapshot(2), snapshot(3)]);
    let image = svg(&graph);
    let texts = well_formed(&image);
    for wanted in
        ["worker-1", "worker-2", "worker-3", "web", "cache", "db", "batch", "mail", "10.244.3.3", "192.0.2.2", "not ready"]
    {
        assert!(texts.iter().any(|text| text == wanted), "{wanted} in {texts:?}");
        assert!(text(&graph).contains(wanted) && dot(&graph).contains(wanted), "{wanted}");
    }
    let faults: Vec<(usize, usize, &str)> =
        graph.links.iter().filter(|link| !link.well).map(|link| (link.from, link.to, link.state.as_str())).collect();
    assert_eq!(faults, [(1, 2, "worker-2: missing route: Permission denied")]);
    assert_eq!(graph.links.len(), 3);
    assert_eq!(image.matches("class=\"link bad\"").count(), 1);
}

#[test]
fn single_agent_draws_only_own_containers() {
    let graph = Graph::from_snapshots(&[snapshot(1)]);
    let has_containers: Vec<bool> = graph.hosts.iter().map(|host| host.containers.is_some()).collect();
    assert_eq!((has_containers, graph.links.len()), (vec![true, false, false], 2));
    assert!(text(&graph).contains("known by its lease"));
}

#[test]
fn hostile_names_are_escaped() {
    let mut graph = Graph::from_snapshots(&[snapshot(1)]);
    graph.hosts[1].name = "<script>\"&\u{1b}".repeat(9);
    graph.hosts[2].state = "]]>\\\"".to_owned();
    well_formed(&svg(&graph));
    assert!(dot(&graph).lines().all(|line| line.replace("\\\\", "").replace("\\\"", "").matches('"').count().is_multiple_of(2)));
    graph.hosts = (0..100).map(|_| graph.hosts[0].clone()).collect();
    graph.links.clear();
    let texts = well_formed(&svg(&graph));
    assert!(texts.iter().any(|text| text == "and 76 hosts more"), "{texts:?}");
    well_formed(&svg(&Graph::default()));
}

/// `docs/graph.svg` and the text in `docs/graph.md` are the drawings of these hosts.
#[test]
fn documentation_matches_drawing() {
    let graph = Graph::from_snapshots(&[snapshot(1), snapshot(2), snapshot(3)]);
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let (picture, page) = (docs.join("graph.svg"), docs.join("graph.md"));
    if std::env::var_os("OVERLAY_REGENERATE").is_some_and(|value| value == "1") {
        std::fs::write(&picture, svg(&graph)).expect("docs/graph.svg");
    }
    assert_eq!(std::fs::read_to_string(picture).expect("docs/graph.svg"), svg(&graph), "OVERLAY_REGENERATE=1 draws it anew");
    let example = std::fs::read_to_string(page).expect("docs/graph.md");
    assert!(example.contains(&format!("```text\n{}\n```", text(&graph))), "docs/graph.md should show:\n{}", text(&graph));
}
