//! Output of `overlayctl lab`.

use overlay_agent::model::Family;
use serde::Serialize;

use crate::lab::check::{Isolation, Probe, Report};
use crate::lab::crossing::Crossing;
use crate::lab::down::TeardownSummary;
use crate::lab::status::{ContainerStatus, HostStatus, LabStatus};
use crate::output::{Style, Table, Tone, View, cell, joined, toned};

/// Most containers in the matrix: a larger one does not fit a terminal.
const MAX_MATRIX_CONTAINERS: usize = 12;

/// Most containers listed per host; the rest is counted.
const MAX_CONTAINERS_SHOWN: usize = 6;

/// Most failures listed; the rest is counted.
const MAX_FAILURES_SHOWN: usize = 20;

/// Output of `lab status`.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct StatusView<'a>(pub(super) &'a LabStatus);

impl View for StatusView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        let lab = self.0;
        let mut table = Table::new(style, &["HOST", "AGENT", "SUBNET", "UNDERLAY", "CONTAINERS"]);
        for host in &lab.hosts {
            table.row(vec![
                cell(Some(&host.name)),
                agent(host),
                cell(host.subnet),
                cell(Some(joined(host.addresses.iter().map(|(_, a)| a)))),
                cell(Some(containers(host, wide))),
            ]);
        }
        let mut lines = vec![table.text()];
        if !lab.etcd_running {
            lines.push(style.paint(Tone::Bad, "etcd is not running"));
        }
        for host in &lab.hosts {
            lines.extend(host.problems.iter().map(|p| format!("{} {}: {p}", style.paint(Tone::Bad, "!"), host.name)));
        }
        if wide {
            lines.push(
                style.paint(Tone::Quiet, &format!("etcd {} in `net`; files in {}", lab.etcd.join(" "), lab.directory.display())),
            );
        }
        lines.join("\n")
    }
}

fn agent(host: &HostStatus) -> comfy_table::Cell {
    let tone = match host.agent.as_str() {
        "ready" => Tone::Good,
        "stopped" => Tone::Quiet,
        "silent" => Tone::Bad,
        _ => Tone::Warning,
    };
    let pid = host.agent_pid.map_or_else(String::new, |pid| format!(" ({pid})"));
    toned(tone, format!("{}{pid}", host.agent))
}

/// Lists one container per line.
fn containers(host: &HostStatus, wide: bool) -> String {
    let limit = if wide { usize::MAX } else { MAX_CONTAINERS_SHOWN };
    let describe = |e: &ContainerStatus| format!("{} {}", e.name, joined(e.addresses.iter().map(|(_, a)| a)));
    let mut lines: Vec<String> = host.containers.iter().take(limit).map(describe).collect();
    if host.containers.len() > limit {
        lines.push(format!("and {} more: -o wide", host.containers.len() - limit));
    }
    if lines.is_empty() { "-".to_owned() } else { lines.join("\n") }
}

/// Output of `lab down`.
#[derive(Serialize)]
pub(super) struct DownView {
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) removed: TeardownSummary,
}

impl View for DownView {
    fn text(&self, _style: Style, _wide: bool) -> String {
        let TeardownSummary { processes, namespaces, .. } = self.removed;
        if self.removed.is_empty() {
            return format!("no lab {}: nothing to do", self.name);
        }
        // A rootless lab's namespaces have no names to delete: they end with their processes.
        let with = if namespaces == 0 { String::new() } else { format!(" and {namespaces} namespaces") };
        format!("lab {} is down: {processes} processes{with} removed", self.name)
    }
}

/// Output of `lab check`.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct CheckView<'a>(pub(super) &'a Report);

impl View for CheckView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        let report = self.0;
        let mut lines = Vec::new();
        if report.containers.len() <= MAX_MATRIX_CONTAINERS || wide {
            lines.push(matrix(report, style));
            lines.push(String::new());
        }
        lines.push(summary(&report.overlay, style, "overlay", "each seen with its own address: no NAT inside the overlay"));
        lines.push(summary(&report.egress, style, "egress", "each seen with its host's address: masqueraded on egress"));
        if let Some(isolation) = &report.isolation {
            lines.push(isolation_summary(isolation, style));
            lines.extend(isolation.crossings.iter().take(MAX_FAILURES_SHOWN).map(|crossing| {
                let Crossing { from, from_network, to, to_network } = crossing;
                format!("{} {from} of network {from_network} reaches {to} of network {to_network}", style.paint(Tone::Bad, "!"))
            }));
        }
        let failed: Vec<&Probe> = report.overlay.iter().chain(&report.egress).filter(|c| c.error.is_some()).collect();
        for call in failed.iter().take(MAX_FAILURES_SHOWN) {
            let reason = call.error.as_deref().unwrap_or_default();
            lines.push(format!("{} {} -> {} ({}): {reason}", style.paint(Tone::Bad, "!"), call.from, call.to, call.address));
        }
        if failed.len() > MAX_FAILURES_SHOWN {
            lines.push(format!("  and {} more: -o json lists all", failed.len() - MAX_FAILURES_SHOWN));
        }
        lines.extend(report.remarks.iter().cloned());
        lines.join("\n")
    }
}

/// Builds the matrix: one row per caller, one column per callee; a cell covers every family.
fn matrix(report: &Report, style: Style) -> String {
    let mut columns: Vec<&str> = report.containers.iter().map(String::as_str).collect();
    columns.push("world");
    let header: Vec<&str> = std::iter::once("FROM \\ TO").chain(columns.iter().copied()).collect();
    let mut table = Table::new(style, &header);
    for from in &report.containers {
        let mut row = vec![cell(Some(from))];
        for to in &columns {
            let calls = report.overlay.iter().chain(&report.egress).filter(|c| c.from == *from && c.to == *to);
            let failed: Vec<Option<Family>> = calls.map(|c| c.error.as_ref().map(|_| c.family)).collect();
            row.push(match failed.as_slice() {
                [] => toned(Tone::Quiet, "."),
                all if all.iter().all(Option::is_none) => toned(Tone::Good, "ok"),
                some => toned(Tone::Bad, joined(some.iter().flatten())),
            });
        }
        table.row(row);
    }
    table.text()
}

fn isolation_summary(isolation: &Isolation, style: Style) -> String {
    let Isolation { networks, sent, crossings } = isolation;
    let (tone, count) = match crossings.len() {
        0 => (Tone::Good, "none".to_owned()),
        count => (Tone::Bad, count.to_string()),
    };
    format!("isolation {sent} datagrams between {networks} networks: {} arrived", style.paint(tone, &count))
}

fn summary(calls: &[Probe], style: Style, label: &str, ok_note: &str) -> String {
    let ok_count = calls.iter().filter(|c| c.error.is_none()).count();
    let mut times: Vec<u64> = calls.iter().filter_map(|c| c.micros).collect();
    times.sort_unstable();
    let median =
        times.get(times.len() / 2).map_or_else(String::new, |us| format!(", median {}.{:02} ms", us / 1000, us % 1000 / 10));
    let all = ok_count == calls.len();
    let count = format!("{ok_count} of {}", calls.len());
    let count = style.paint(if all { Tone::Good } else { Tone::Bad }, &count);
    let note = if all { format!("; {ok_note}") } else { String::new() };
    format!("{label:<8} {count} calls ok{median}{note}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(from: &str, to: &str, family: Family, error: Option<&str>) -> Probe {
        let address = family.unspecified();
        Probe {
            from: from.to_owned(),
            to: to.to_owned(),
            family,
            address,
            expected: address,
            seen: None,
            micros: Some(1_250),
            error: error.map(str::to_owned),
        }
    }

    #[test]
    fn failed_probe_is_shown_in_matrix() {
        let report = Report {
            ok: false,
            containers: vec!["h1-c1".to_owned(), "h2-c1".to_owned()],
            overlay: vec![
                probe("h1-c1", "h2-c1", Family::V4, None),
                probe("h1-c1", "h2-c1", Family::V6, None),
                probe("h2-c1", "h1-c1", Family::V4, None),
                probe("h2-c1", "h1-c1", Family::V6, Some("no answer within 5s")),
            ],
            egress: vec![probe("h1-c1", "world", Family::V4, None), probe("h2-c1", "world", Family::V4, None)],
            isolation: None,
            remarks: vec!["a remark".to_owned()],
        };
        assert_eq!(
            CheckView(&report).text(Style::PLAIN, false),
            "FROM \\ TO  h1-c1  h2-c1  world\n\
             h1-c1      .      ok     ok\n\
             h2-c1      IPv6   .      ok\n\
             \n\
             overlay  3 of 4 calls ok, median 1.25 ms\n\
             egress   2 of 2 calls ok, median 1.25 ms; each seen with its host's address: masqueraded on egress\n\
             ! h2-c1 -> h1-c1 (::): no answer within 5s\na remark"
        );
    }

    #[test]
    fn crossing_is_shown() {
        let crossing = Crossing {
            from: "h1-net1-c1".to_owned(),
            from_network: "net1".to_owned(),
            to: "h1-net2-c1".to_owned(),
            to_network: "net2".to_owned(),
        };
        let mut isolation = Isolation { networks: 2, sent: 8, crossings: Vec::new() };
        let text = |isolation: &Isolation| {
            let isolation = Some(isolation.clone());
            let report = Report {
                ok: false,
                containers: Vec::new(),
                overlay: Vec::new(),
                egress: Vec::new(),
                isolation,
                remarks: Vec::new(),
            };
            CheckView(&report).text(Style::PLAIN, false)
        };
        assert!(text(&isolation).ends_with("\nisolation 8 datagrams between 2 networks: none arrived"), "{}", text(&isolation));
        isolation.crossings.push(crossing);
        let shown = "networks: 1 arrived\n! h1-net1-c1 of network net1 reaches h1-net2-c1 of network net2";
        assert!(text(&isolation).ends_with(shown), "{}", text(&isolation));
    }
}
