//! Graph of the overlay: hosts with their subnets and containers, and the links between them with their state.
//!
//! Built from agents' answers, drawn by `text`, `dot` (Graphviz) or `svg`. The same answers give the same drawing, byte for byte.

mod dot;
mod svg;
#[cfg(test)]
mod tests;
mod text;

use std::collections::BTreeMap;

use overlay_agent::model::api::{Endpoints, PeerEntry, Peers, Status, Subnets};
use overlay_agent::plan::backend;
use serde::{Deserialize, Serialize};

pub use dot::dot;
pub use svg::svg;
pub use text::text;

/// One agent's answers, as input of the graph.
#[derive(Debug, Clone)]
pub struct AgentSnapshot {
    /// Status.
    pub status: Status,
    /// Leases.
    pub subnets: Subnets,
    /// Peers.
    pub peers: Peers,
    /// Containers.
    pub endpoints: Endpoints,
}

/// Contents of the drawing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Graph {
    /// Title: the overlay's ranges, VNI, port.
    pub title: String,
    /// Hosts, ordered by their first address.
    pub hosts: Vec<HostNode>,
    /// Known links between hosts, in the hosts' order.
    pub links: Vec<Link>,
}

/// A host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNode {
    /// Name, or the subnet if it has none.
    pub name: String,
    /// Subnet.
    pub subnet: String,
    /// Underlay addresses.
    pub public_ip: String,
    /// `ready`, `not ready`, `known by its lease`, or the reason why its lease is ignored.
    pub state: String,
    /// Whether the host is healthy, as far as known.
    pub well: bool,
    /// Containers; absent without an answer of its own agent.
    pub containers: Option<Vec<ContainerNode>>,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerNode {
    /// Name.
    pub name: String,
    /// Addresses, or the mode of a container without any.
    pub address: String,
}

/// Link between two hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// First host, as an index into [`Graph::hosts`].
    pub from: usize,
    /// Second host.
    pub to: usize,
    /// `programmed`, or the missing entry and its host.
    pub state: String,
    /// Whether both directions are programmed.
    pub well: bool,
}

impl Graph {
    /// Builds the graph from the answers of one or more agents of an overlay. The leases are those of the first.
    pub fn from_snapshots(all: &[AgentSnapshot]) -> Graph {
        let Some(first) = all.first() else { return Graph::default() };
        let mut graph = Graph { title: title(&first.status), ..Graph::default() };
        let mut keys = Vec::new();
        for entry in &first.subnets.subnets {
            let subnet = entry.subnet.map_or_else(|| entry.key.clone(), |subnet| subnet.to_string());
            let snapshot = all.iter().find(|snapshot| {
                snapshot.status.lease.as_ref().map(|lease| lease.subnet) == entry.subnet && entry.subnet.is_some()
            });
            let (state, healthy) = match (&entry.refused, snapshot) {
                (Some(reason), _) => (format!("ignored: {reason}"), false),
                (None, Some(snapshot)) if snapshot.status.ready => ("ready".to_owned(), true),
                (None, Some(_)) => ("not ready".to_owned(), false),
                (None, None) => ("known by its lease".to_owned(), true),
            };
            keys.push(entry.subnet);
            graph.hosts.push(HostNode {
                name: entry.host.clone().unwrap_or_else(|| subnet.clone()),
                subnet,
                public_ip: joined(entry.public_ip.iter().map(|(_, address)| address)),
                state,
                well: healthy,
                containers: snapshot.map(|snapshot| containers(&snapshot.endpoints)),
            });
        }
        let mut links: BTreeMap<(usize, usize), Vec<String>> = BTreeMap::new();
        for snapshot in all {
            let own = snapshot.status.lease.as_ref().map(|lease| lease.subnet);
            let Some(from) = keys.iter().position(|key| key.is_some() && *key == own) else { continue };
            for peer in &snapshot.peers.peers {
                let is_peer_subnet = |key: &Option<_>| {
                    key.is_some_and(|subnet: overlay_agent::model::Subnet| subnet.get(peer.subnet.family()) == Some(peer.subnet))
                };
                let Some(to) = keys.iter().position(is_peer_subnet) else { continue };
                let problems = links.entry((from.min(to), from.max(to))).or_default();
                if !is_programmed(peer) {
                    problems.push(format!("{}: {}", snapshot.status.node, peer.state));
                }
            }
        }
        graph.links = links
            .into_iter()
            .map(|((from, to), problems)| {
                let healthy = problems.is_empty();
                Link { from, to, state: if healthy { "programmed".to_owned() } else { problems.join("; ") }, well: healthy }
            })
            .collect();
        graph
    }

    /// Returns the graph of the first hosts, and the number of omitted ones.
    fn truncated(&self, max_hosts: usize) -> (Graph, usize) {
        let omitted = self.hosts.len().saturating_sub(max_hosts);
        let mut graph = self.clone();
        graph.hosts.truncate(max_hosts);
        graph.links.retain(|link| link.from < max_hosts && link.to < max_hosts);
        (graph, omitted)
    }
}

fn is_programmed(peer: &PeerEntry) -> bool {
    peer.state == "programmed"
}

fn title(status: &Status) -> String {
    match &status.network {
        None => "overlay network, not configured yet".to_owned(),
        Some(network) => {
            let pools = joined(network.pools.iter().map(|(_, pool)| pool.network));
            let backend = backend::of(network);
            let port = backend.tunnel().map_or_else(String::new, |tunnel| format!(", UDP port {}", tunnel.port));
            format!("overlay {pools}, {}{port}", backend.label())
        }
    }
}

fn containers(endpoints: &Endpoints) -> Vec<ContainerNode> {
    let node = |endpoint: &overlay_agent::model::Endpoint| {
        let addresses = joined(endpoint.addresses().iter().map(|(_, address)| address));
        let address = if addresses.is_empty() { format!("mode {}", endpoint.mode) } else { addresses };
        ContainerNode { name: endpoint.name.to_string(), address }
    };
    endpoints.endpoints.iter().map(node).collect()
}

fn joined<T: ToString>(values: impl IntoIterator<Item = T>) -> String {
    values.into_iter().map(|value| value.to_string()).collect::<Vec<_>>().join(" ")
}
