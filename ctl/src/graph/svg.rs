//! The graph as SVG: hosts as boxes in a row, their links as arcs above them. No script, only the reader's own fonts; readable on
//! white and on black.

use std::fmt::Write;

use super::{Graph, HostNode};

/// Maximum number of drawn hosts; a line of text counts the rest.
const MAX_HOSTS: usize = 24;
/// Sizes in pixels: a box and the gap between two, its lines, the margin, and the arc's height per spanned host.
const BOX: usize = 210;
const GAP: usize = 30;
const LINE: usize = 20;
const MARGIN: usize = 24;
const ARC_RISE: usize = 26;
/// Characters of 12 pixels that fit into a box.
const MAX_LABEL_CHARS: usize = 28;

const STYLE: &str = "text{font:12px sans-serif;fill:#223}.name{font-weight:bold;font-size:14px}.quiet{fill:#667}.bad{fill:#b3261e}.label{paint-order:stroke;stroke:#fff;stroke-width:4px}\
                     .host{fill:#f4f7fb;stroke:#5b7aa6}.host.bad{stroke:#b3261e}.container{fill:#fff;stroke:#9db3d1}\
                     .link{fill:none;stroke:#2e7d32;stroke-width:2}.link.bad{stroke:#b3261e;stroke-dasharray:6 4}.page{fill:#fff}";

/// Writes the complete document.
pub fn svg(graph: &Graph) -> String {
    let (graph, omitted) = graph.truncated(MAX_HOSTS);
    let span = graph.links.iter().map(|link| link.to - link.from).max().unwrap_or(0);
    let top = MARGIN + 2 * LINE + span * ARC_RISE + LINE;
    let tallest = graph.hosts.iter().map(height).max().unwrap_or(0);
    let row = graph.hosts.len() * BOX + graph.hosts.len().saturating_sub(1) * GAP;
    // The title may be wider than the boxes.
    let width = 2 * MARGIN + row.max(graph.title.chars().count() * 8);
    let bottom = top + tallest + MARGIN;
    let page_height = bottom + if omitted > 0 { LINE } else { 0 };
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{page_height}\" viewBox=\"0 0 {width} {page_height}\" role=\"img\">\n<title>{0}</title>\n\
         <style>{STYLE}</style>\n<rect class=\"page\" width=\"{width}\" height=\"{page_height}\"/>\n<text class=\"name\" x=\"{MARGIN}\" y=\"{1}\">{0}</text>",
        escape(&graph.title),
        MARGIN + LINE / 2,
    );
    for link in &graph.links {
        let [from, to] = [link.from, link.to].map(|at| x(at) + BOX / 2);
        let peak = top - (link.to - link.from) * ARC_RISE;
        // A quadratic curve reaches half way to its control point, which may lie above the page.
        let rise = 2 * (top - peak);
        let control = if rise <= top { (top - rise).to_string() } else { format!("-{}", rise - top) };
        let class_suffix = if link.well { "" } else { " bad" };
        let _ = writeln!(
            out,
            "<path class=\"link{class_suffix}\" d=\"M {from} {top} Q {} {control} {to} {top}\"><title>{}</title></path>",
            (from + to) / 2,
            escape(&format!("{} - {}: {}", graph.hosts[link.from].name, graph.hosts[link.to].name, link.state)),
        );
    }
    // After all arcs, so that none crosses a text.
    for link in graph.links.iter().filter(|link| !link.well) {
        let _ = writeln!(
            out,
            "<text class=\"bad label\" text-anchor=\"middle\" x=\"{}\" y=\"{}\">{}</text>",
            (x(link.from) + x(link.to) + BOX) / 2,
            top - (link.to - link.from) * ARC_RISE - 4,
            escape(&ellipsize(&link.state, 60))
        );
    }
    for (n, host) in graph.hosts.iter().enumerate() {
        draw(&mut out, host, x(n), top);
    }
    if omitted > 0 {
        let _ = writeln!(out, "<text class=\"quiet\" x=\"{MARGIN}\" y=\"{bottom}\">and {omitted} hosts more</text>");
    }
    out.push_str("</svg>\n");
    out
}

fn x(index: usize) -> usize {
    MARGIN + index * (BOX + GAP)
}

fn height(host: &HostNode) -> usize {
    let containers = host.containers.as_ref().map_or(0, Vec::len);
    LINE / 2 + 4 * LINE + containers * 2 * (LINE + 3) + LINE / 2
}

fn draw(out: &mut String, host: &HostNode, x: usize, y: usize) {
    let class_suffix = if host.well { "" } else { " bad" };
    let _ = writeln!(
        out,
        "<g><title>{}</title><rect class=\"host{class_suffix}\" x=\"{x}\" y=\"{y}\" width=\"{BOX}\" height=\"{}\" rx=\"8\"/>",
        escape(&format!("{}: {}", host.name, host.state)),
        height(host)
    );
    let mut line = y + LINE / 2;
    let left = x + 12;
    for (class, text) in [("name", &host.name), ("", &host.subnet), ("quiet", &host.public_ip), ("quiet", &host.state)] {
        line += LINE;
        let class = if class == "quiet" && !host.well && text == &host.state { "bad" } else { class };
        let _ = writeln!(
            out,
            "<text class=\"{class}\" x=\"{left}\" y=\"{}\">{}</text>",
            line - 5,
            escape(&ellipsize(text, MAX_LABEL_CHARS))
        );
    }
    for container in host.containers.iter().flatten() {
        let (frame, inner, first, second) = (line + 4, left + 8, line + LINE, line + 2 * LINE - 2);
        let (name, address) = (
            escape(&ellipsize(&container.name, MAX_LABEL_CHARS - 3)),
            escape(&ellipsize(&container.address, MAX_LABEL_CHARS - 3)),
        );
        let (box_width, box_height) = (BOX - 24, 2 * LINE);
        let _ = writeln!(
            out,
            "<rect class=\"container\" x=\"{left}\" y=\"{frame}\" width=\"{box_width}\" height=\"{box_height}\" rx=\"5\"/>\
             <text x=\"{inner}\" y=\"{first}\">{name}</text><text class=\"quiet\" x=\"{inner}\" y=\"{second}\">{address}</text>",
        );
        line += 2 * (LINE + 3);
    }
    out.push_str("</g>\n");
}

/// Truncates text to its space, with dots at its end.
fn ellipsize(text: &str, max: usize) -> String {
    if text.chars().count() <= max { text.to_owned() } else { text.chars().take(max - 1).chain(['…']).collect() }
}

/// Escapes text for XML; control characters, which XML cannot represent, are replaced.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}
