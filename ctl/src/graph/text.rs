//! The graph as text.

use super::Graph;

/// Writes hosts with their containers as a tree, and the links below them.
pub fn text(graph: &Graph) -> String {
    let mut lines = vec![graph.title.clone()];
    let width = |of: fn(&super::HostNode) -> &str| graph.hosts.iter().map(|host| of(host).chars().count()).max().unwrap_or(0);
    let (name, subnet, address) = (width(|host| &host.name), width(|host| &host.subnet), width(|host| &host.public_ip));
    for host in &graph.hosts {
        lines.push(String::new());
        lines.push(format!("{:name$}  {:subnet$}  {:address$}  {}", host.name, host.subnet, host.public_ip, host.state));
        match &host.containers {
            None => {}
            Some(all) if all.is_empty() => lines.push("└─ no containers".to_owned()),
            Some(all) => {
                let widest = all.iter().map(|container| container.name.chars().count()).max().unwrap_or(0);
                for (n, container) in all.iter().enumerate() {
                    let branch = if n + 1 == all.len() { "└─" } else { "├─" };
                    lines.push(format!("{branch} {:widest$}  {}", container.name, container.address));
                }
            }
        }
    }
    if !graph.links.is_empty() {
        lines.push(String::new());
    }
    for link in &graph.links {
        let [from, to] = [link.from, link.to].map(|at| graph.hosts.get(at).map_or("?", |host| &host.name));
        lines.push(format!("{from} {} {to}  {}", if link.well { "───" } else { "─x─" }, link.state));
    }
    lines.join("\n")
}
