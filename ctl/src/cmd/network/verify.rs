//! `overlayctl network verify`: whether isolated networks reach each other on this host.

use overlay_agent::model::NetworkName;
use serde::Serialize;

use crate::cmd::{CommandError, Context, Outcome};
use crate::output::{Style, Tone, View};
use crate::trace::TraceError;
use crate::verify::{Pair, Report, Verdict, Way, verify};

/// Examines all isolated networks, or two. Exit code 1 if there is a way that is not by design, 3 if that is unknown.
pub async fn run(context: &Context, names: &[NetworkName]) -> Result<Outcome, CommandError> {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let work = move || match names.as_slice() {
        [a, b] => verify(Some((a, b))),
        _ => verify(None),
    };
    let report = tokio::task::spawn_blocking(work).await;
    let report = report.map_err(|e| TraceError::Target { message: format!("verification failed: {e}") })??;
    context.printer.print(&ReportView(&report))?;
    Ok(match report.pairs.iter().map(|pair| pair.verdict).max() {
        Some(Verdict::Reachable) => Outcome::Negative,
        Some(Verdict::Unknown) => Outcome::Degraded,
        Some(Verdict::Isolated | Verdict::ByDesign) | None => Outcome::Ok,
    })
}

#[derive(Serialize)]
#[serde(transparent)]
struct ReportView<'a>(&'a Report);

impl View for ReportView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        let Report { networks, pairs } = self.0;
        if networks.is_empty() {
            return "this host has no isolated network".to_owned();
        }
        if pairs.is_empty() {
            return format!("this host has one isolated network, {}: there is nothing that it could reach", networks[0]);
        }
        let title = |pair: &Pair| format!("{} -> {}", pair.from, pair.to);
        let width = pairs.iter().map(|pair| title(pair).chars().count()).max().unwrap_or_default();
        let mut lines = Vec::new();
        for pair in pairs {
            lines.push(format!("{:<width$}  {}", title(pair), verdict_text(pair, style)));
            let shown = pair.ways.iter().filter(|way| wide || !way.by_design);
            lines.extend(shown.flat_map(|way| way_lines(way, style)));
            lines.extend(pair.unknown.iter().map(|reason| format!("  {}  {reason}", style.paint(Tone::Quiet, "unknown"))));
        }
        lines.join("\n")
    }
}

fn verdict_text(pair: &Pair, style: Style) -> String {
    let ways = |by_design| {
        let ways = pair.ways.iter().filter(|way| way.by_design == by_design).map(|way| format!("by {}", way.by));
        ways.collect::<Vec<_>>().join(", ")
    };
    match pair.verdict {
        Verdict::Isolated => style.paint(Tone::Good, "isolated"),
        Verdict::ByDesign => style.paint(Tone::Good, &ways(true)),
        Verdict::Unknown => style.paint(Tone::Warning, "UNKNOWN"),
        Verdict::Reachable => format!("{} {}", style.paint(Tone::Bad, "REACHABLE"), ways(false)),
    }
}

fn way_lines(way: &Way, style: Style) -> Vec<String> {
    let packet = way.packet.as_ref().map(|packet| format!("  {}   {packet}", style.paint(Tone::Quiet, "packet")));
    let hop = |hop: &crate::verify::WayHop| format!("  {}      {}: {}", style.paint(Tone::Quiet, "hop"), hop.namespace, hop.what);
    packet.into_iter().chain(way.hops.iter().map(hop)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::WayHop;

    #[test]
    fn table_names_each_hop_of_a_way() {
        let pair =
            |from: &str, to: &str, verdict, ways, unknown| Pair { from: from.into(), to: to.into(), verdict, ways, unknown };
        let hop = |namespace: &str, device: &str, what: &str| WayHop {
            namespace: namespace.into(),
            device: Some(device.into()),
            what: what.into(),
        };
        let way = |by: &str, by_design| Way {
            by: by.to_owned(),
            by_design,
            packet: Some("icmp from 10.1.7.2 to 10.2.7.2".to_owned()),
            hops: vec![
                hop("host", "ovt.12", "route 10.2.0.0/16 dev ovt.12"),
                hop("ov-red", "ovb.12", "route 10.2.7.0/24 dev ovb.12"),
            ],
        };
        let pairs = vec![
            pair("blue", "green", Verdict::Isolated, Vec::new(), Vec::new()),
            pair("green", "blue", Verdict::ByDesign, vec![way("published port 8080/tcp", true), way("Peers", true)], Vec::new()),
            pair("blue", "red", Verdict::Reachable, vec![way("route 10.2.0.0/16 dev ovt.12 in host", false)], Vec::new()),
            pair("red", "blue", Verdict::Unknown, Vec::new(), vec!["host: traffic control".to_owned()]),
        ];
        let report = Report { networks: ["blue", "green", "red"].map(str::to_owned).to_vec(), pairs };
        assert_eq!(
            ReportView(&report).text(Style::PLAIN, false),
            "blue -> green  isolated\n\
             green -> blue  by published port 8080/tcp, by Peers\n\
             blue -> red    REACHABLE by route 10.2.0.0/16 dev ovt.12 in host\n  packet   icmp from 10.1.7.2 to 10.2.7.2\n  hop      host: route \
             10.2.0.0/16 dev ovt.12\n  hop      ov-red: route 10.2.7.0/24 dev ovb.12\n\
             red -> blue    UNKNOWN\n  unknown  host: traffic control"
        );
        let json = serde_json::to_value(ReportView(&report)).expect("JSON");
        assert_eq!(
            (&json["pairs"][1]["verdict"], &json["pairs"][2]["ways"][0]["hops"][0]["namespace"]),
            (&"by-design".into(), &"host".into())
        );
    }
}
