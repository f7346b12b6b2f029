//! The graph for Graphviz (`overlayctl graph --format dot | dot -Tpng`).

use super::Graph;

/// Writes an undirected graph with one cluster per host.
pub fn dot(graph: &Graph) -> String {
    let mut lines = vec![
        "graph overlay {".to_owned(),
        format!("  label={};", quoted(&graph.title)),
        "  labelloc=t; compound=true; fontname=\"sans-serif\";".to_owned(),
        "  node [shape=box, style=rounded, fontname=\"sans-serif\"]; edge [fontname=\"sans-serif\"];".to_owned(),
    ];
    for (n, host) in graph.hosts.iter().enumerate() {
        let colour = if host.well { "black" } else { "red" };
        lines.push(format!("  subgraph cluster_{n} {{"));
        lines.push(format!("    label={}; color={colour};", quoted(&format!("{}\n{}", host.name, host.state))));
        lines.push(format!("    host_{n} [label={}];", quoted(&format!("{}\n{}", host.subnet, host.public_ip))));
        for (c, container) in host.containers.iter().flatten().enumerate() {
            lines.push(format!("    host_{n}_{c} [label={}];", quoted(&format!("{}\n{}", container.name, container.address))));
            lines.push(format!("    host_{n} -- host_{n}_{c};"));
        }
        lines.push("  }".to_owned());
    }
    for link in &graph.links {
        let style = if link.well {
            "color=darkgreen".to_owned()
        } else {
            format!("color=red, style=dashed, label={}", quoted(&link.state))
        };
        lines.push(format!("  host_{} -- host_{} [{style}];", link.from, link.to));
    }
    lines.push("}".to_owned());
    lines.join("\n")
}

/// Quotes a string of the DOT language; a line end becomes `\n`.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}
