//! The containers of this host: what the agent says, what its state directory holds, and what the kernel has, must agree.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use overlay_agent::kernel::netns::{DIRECTORY, Netns};
use overlay_agent::model::Endpoint;
use overlay_agent::model::api::NetworkView;
use serde::Deserialize;
use serde_json::Value;

use super::facts::{json, not_looked_at};
use super::{Facts, Findings};

/// The file of the state directory, as far as it is looked at.
#[derive(Debug, Deserialize)]
struct Stored {
    endpoints: Vec<Record>,
}

#[derive(Debug, Deserialize)]
struct Record {
    phase: String,
    #[serde(flatten)]
    endpoint: Endpoint,
}

pub(super) async fn check(facts: &Facts, findings: &mut Findings) {
    let stored = stored(facts, findings);
    if let Some(network) = &facts.network {
        known(network, findings);
        ports(network, findings);
        if let Some(stored) = &stored {
            compare(network, stored, findings);
        }
        leaked(network, findings).await;
    } else if let Some(stored) = &stored {
        for record in stored {
            look_inside(&record.endpoint, findings).await;
        }
    }
    if let Some(network) = &facts.network {
        for view in network.endpoints.iter().filter(|view| view.state == "in place") {
            look_inside(&view.endpoint, findings).await;
        }
    }
}

/// What the state directory holds; nothing where it is another one, or not to be read.
fn stored(facts: &Facts, findings: &mut Findings) -> Option<Vec<Record>> {
    let path = facts.settings.state_dir.join("endpoints.json");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        // No container was ever attached, or the agent has another directory.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            let evidence = vec![format!("{}: {error}", path.display())];
            findings.info("the state directory was not looked at", evidence, "run this as root, with the agent's --state-dir");
            return None;
        }
    };
    match serde_json::from_str::<Stored>(&text) {
        Ok(stored) => Some(stored.endpoints),
        Err(error) => {
            findings.error(
                "the table of containers in the state directory cannot be read",
                vec![format!("{}: {error}", path.display())],
                "restart the agent: it sets a torn file aside and says so in its log; then attach the containers anew",
            );
            None
        }
    }
}

/// Endpoints that the agent itself finds not in place.
fn known(network: &NetworkView, findings: &mut Findings) {
    for view in network.endpoints.iter().filter(|view| view.state != "in place") {
        let name = &view.endpoint.name;
        let gone = !view.endpoint.netns.exists();
        findings.warning(
            format!("the container {name} is not as it should be"),
            vec![view.state.clone(), format!("namespace {}", view.endpoint.netns.display())],
            match gone {
                true => format!("its namespace is gone: overlayctl detach {name} gives its addresses back (the agent does so itself after two looks)"),
                false => format!("overlayctl detach {name}, then attach it again"),
            },
        );
    }
}

/// Ports of our bridge that are no endpoint's.
fn ports(network: &NetworkView, findings: &mut Findings) {
    let bridge = network.bridge.iter();
    let strange = bridge.flat_map(|bridge| &bridge.ports).filter(|port| port.endpoint.is_none());
    let (ours, foreign): (Vec<_>, Vec<_>) = strange.partition(|port| port.interface.starts_with("ove"));
    for port in ours {
        findings.warning(
            format!("{} is a port of the bridge, but no container's", port.interface),
            vec![format!("port {} of the bridge, {}", port.number, port.state)],
            format!("it leaked: ip link delete {}", port.interface),
        );
    }
    for port in foreign {
        findings.info(
            format!("{} is a port of the bridge that the agent did not make", port.interface),
            vec![format!("port {} of the bridge, {}", port.number, port.state)],
            "nothing, where another runtime (Docker, a virtual machine) attached it on purpose",
        );
    }
}

/// The agent's table beside the file.
fn compare(network: &NetworkView, stored: &[Record], findings: &mut Findings) {
    let file: BTreeMap<String, &Record> = stored.iter().map(|record| (record.endpoint.name.to_string(), record)).collect();
    let agent: BTreeMap<String, &Endpoint> =
        network.endpoints.iter().map(|view| (view.endpoint.name.to_string(), &view.endpoint)).collect();
    let half: Vec<String> =
        file.iter().filter(|(name, record)| record.phase != "attached" && !agent.contains_key(*name)).map(|(n, _)| n.clone()).collect();
    let differ = |name: &&String| match (file.get(*name), agent.get(*name)) {
        (Some(record), Some(endpoint)) => record.endpoint.addresses() != endpoint.addresses(),
        (Some(record), None) => record.phase == "attached",
        (None, _) => true,
    };
    let names: BTreeSet<&String> = file.keys().chain(agent.keys()).collect();
    let differing: Vec<String> = names.into_iter().filter(differ).cloned().collect();
    if !differing.is_empty() {
        findings.warning(
            "the agent and its state directory do not agree on containers",
            vec![differing.join(", ")],
            "somebody wrote to the state directory while the agent ran, or --state-dir names another agent's: systemctl restart overlayd reads it anew",
        );
    }
    if !half.is_empty() {
        let remedy = "wait some seconds and look again; what stays is cleared by the agent's next audit";
        findings.info("containers are being attached or detached", vec![half.join(", ")], remedy);
    }
}

/// The interfaces and addresses inside a namespace, as `ip` prints them.
async fn inside(netns: &std::path::Path) -> Option<Vec<Value>> {
    let flag = format!("--net={}", netns.display());
    json(&["nsenter", &flag, "ip", "-j", "address", "show"]).await.ok()
}

fn addresses(link: &Value) -> Vec<IpAddr> {
    let all = link["addr_info"].as_array().into_iter().flatten();
    all.filter_map(|address| address["local"].as_str()?.parse().ok()).collect()
}

/// The container's interface has its addresses.
async fn look_inside(endpoint: &Endpoint, findings: &mut Findings) {
    let Some(port) = &endpoint.port else { return };
    if Netns::open(&endpoint.netns).is_err() {
        return findings.warning(
            format!("the namespace of the container {} is gone", endpoint.name),
            vec![endpoint.netns.display().to_string()],
            format!("overlayctl detach {} gives its addresses back", endpoint.name),
        );
    }
    let Some(links) = inside(&endpoint.netns).await else { return };
    let link = links.iter().find(|link| link["ifname"] == port.interface.as_str());
    let have = link.map(addresses).unwrap_or_default();
    let missing: Vec<String> = port.addresses.iter().filter(|(_, a)| !have.contains(a)).map(|(_, a)| a.to_string()).collect();
    if !missing.is_empty() {
        let found = if link.is_some() { "is there without them" } else { "is not there" };
        findings.warning(
            format!("the container {} lacks addresses that are its own", endpoint.name),
            vec![format!("{} in {} {found}: {}", port.interface, endpoint.netns.display(), missing.join(", "))],
            format!("something inside took them away: overlayctl detach {}, then attach it again", endpoint.name),
        );
    }
}

/// Named namespaces with an address of this host's subnet that the agent does not know of.
async fn leaked(network: &NetworkView, findings: &mut Findings) {
    let Ok(names) = Netns::list() else { return };
    let ours: Vec<_> = network.endpoints.iter().filter_map(|view| Netns::open(&view.endpoint.netns).ok()).collect();
    let known: BTreeSet<IpAddr> =
        network.endpoints.iter().flat_map(|view| view.endpoint.addresses().iter().map(|(_, a)| *a).collect::<Vec<_>>()).collect();
    let gateways: Vec<IpAddr> = network.ipam.iter().map(|(_, ipam)| ipam.gateway).collect();
    let own = Netns::current().ok();
    for name in names {
        let path = std::path::Path::new(DIRECTORY).join(&name);
        let Ok(netns) = Netns::open(&path) else { continue };
        if ours.iter().chain(&own).any(|other| other.is_same(&netns).unwrap_or(true)) {
            continue;
        }
        let links = match json(&["nsenter", &format!("--net={}", path.display()), "ip", "-j", "address", "show"]).await {
            Ok(links) => links,
            Err(error) => return not_looked_at(findings, "which namespaces have addresses of the overlay", &error),
        };
        // A namespace with our bridge is another host's of a lab, or another agent's.
        if links.iter().any(|link| link["ifname"].as_str().is_some_and(|name| name.starts_with("ovb."))) {
            continue;
        }
        for address in links.iter().flat_map(addresses) {
            let in_subnet = network.ipam.iter().any(|(_, ipam)| ipam.subnet.contains(address) && ipam.docker.is_none());
            if in_subnet && !known.contains(&address) && !gateways.contains(&address) {
                findings.warning(
                    format!("the namespace {name} has an address of this host's subnet that it was not given"),
                    vec![address.to_string(), format!("ip netns exec {name} ip address")],
                    format!("it leaked, or was set by hand: another container may get it. ip netns delete {name}, or attach it: overlayctl attach"),
                );
            }
        }
    }
}

