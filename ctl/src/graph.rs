//! The overlay as a picture: hosts with their subnets and containers, and the links between them with their state.
//!
//! Made of what agents answer, drawn by `text`, `dot` (Graphviz) or `svg`. The same answers give the same picture, byte for byte.

mod dot;
mod svg;
#[cfg(test)]
mod tests;
mod text;

use std::collections::BTreeMap;

use overlay_agent::model::api::{Endpoints, PeerEntry, Peers, Status, Subnets};
use serde::{Deserialize, Serialize};

pub use dot::dot;
pub use svg::svg;
pub use text::text;

/// What is drawn of one agent's answers.
#[derive(Debug, Clone)]
pub struct AgentSnapshot {
    /// Its status.
    pub status: Status,
    /// Every lease.
    pub subnets: Subnets,
    /// Its peers.
    pub peers: Peers,
    /// Its containers.
    pub endpoints: Endpoints,
}

/// The picture's content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Graph {
    /// What the overlay is: its ranges, VNI, port.
    pub title: String,
    /// Every host, by its first address.
    pub hosts: Vec<HostNode>,
    /// The ways between hosts that are known, by the hosts' order.
    pub links: Vec<Link>,
}

/// A host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNode {
    /// Its name, or its subnet where it has none.
    pub name: String,
    /// Its subnet.
    pub subnet: String,
    /// Its underlay addresses.
    pub public_ip: String,
    /// `ready`, `not ready`, `known method its lease`, or why its lease is left out.
    pub state: String,
    /// Whether all is well, as far as it is known.
    pub well: bool,
    /// Its containers; absent where its own agent was not asked.
    pub containers: Option<Vec<ContainerNode>>,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerNode {
    /// Its name.
    pub name: String,
    /// Its addresses, or its mode where it has none.
    pub address: String,
}

/// The way between two hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// One host, by its place in [`Graph::start_lab_without_agents`].
    pub from: usize,
    /// The other.
    pub to: usize,
    /// `programmed`, or what is missing, at which end.
    pub state: String,
    /// Whether it is whole.
    pub well: bool,
}

impl Graph {
    /// The picture of what one agent or several of one overlay answer. The first one's leases count.
    pub fn from_snapshots(all: &[AgentSnapshot]) -> Graph {
        let Some(first) = all.first() else { return Graph::default() };
        let mut graph = Graph { title: title(&first.status), ..Graph::default() };
        let mut keys = Vec::new();
        for entry in &first.subnets.subnets {
            let subnet = entry.subnet.map_or_else(|| entry.key.clone(), |subnet| subnet.to_string());
            let asked = all
                .iter()
                .find(|one| one.status.lease.as_ref().map(|lease| lease.subnet) == entry.subnet && entry.subnet.is_some());
            let (state, well) = match (&entry.refused, asked) {
                (Some(reason), _) => (format!("left out: {reason}"), false),
                (None, Some(one)) if one.status.ready => ("ready".to_owned(), true),
                (None, Some(_)) => ("not ready".to_owned(), false),
                (None, None) => ("known by its lease".to_owned(), true),
            };
            keys.push(entry.subnet);
            graph.hosts.push(HostNode {
                name: entry.host.clone().unwrap_or_else(|| subnet.clone()),
                subnet,
                public_ip: joined(entry.public_ip.iter().map(|(_, address)| address)),
                state,
                well,
                containers: asked.map(|one| containers(&one.endpoints)),
            });
        }
        let mut links: BTreeMap<(usize, usize), Vec<String>> = BTreeMap::new();
        for one in all {
            let own = one.status.lease.as_ref().map(|lease| lease.subnet);
            let Some(from) = keys.iter().position(|key| key.is_some() && *key == own) else { continue };
            for peer in &one.peers.peers {
                let held = |key: &Option<_>| {
                    key.is_some_and(|subnet: overlay_agent::model::Subnet| subnet.get(peer.subnet.family()) == Some(peer.subnet))
                };
                let Some(to) = keys.iter().position(held) else { continue };
                let faults = links.entry((from.min(to), from.max(to))).or_default();
                if !is_programmed(peer) {
                    faults.push(format!("{}: {}", one.status.node, peer.state));
                }
            }
        }
        graph.links = links
            .into_iter()
            .map(|((from, to), faults)| {
                let well = faults.is_empty();
                Link { from, to, state: if well { "programmed".to_owned() } else { faults.join("; ") }, well }
            })
            .collect();
        graph
    }

    /// The picture of the first hosts only, and how many were left off.
    fn truncated(&self, max_hosts: usize) -> (Graph, usize) {
        let left = self.hosts.len().saturating_sub(max_hosts);
        let mut graph = self.clone();
        graph.hosts.truncate(max_hosts);
        graph.links.retain(|link| link.from < max_hosts && link.to < max_hosts);
        (graph, left)
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
            format!("overlay {pools}, VXLAN VNI {}, UDP port {}", network.vxlan.vni, network.vxlan.port)
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
