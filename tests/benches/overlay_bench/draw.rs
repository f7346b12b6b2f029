//! `draw`: charts from reports of `--json`: growth with the number of peers and agents, and distributions of latencies.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;
use serde::Deserialize;

use super::chart::{Axes, Curve, svg};
use super::stats::Summary;

/// Options of `draw`.
#[derive(Debug, Args)]
pub struct DrawArguments {
    /// Reports: the output of the other sub-commands with --json
    #[arg(required = true, value_name = "REPORT")]
    reports: Vec<PathBuf>,
    /// Directory of the charts
    #[arg(long, value_name = "DIRECTORY", default_value = "docs/performance")]
    to: PathBuf,
}

/// The drawn fields of a report.
#[derive(Debug, Deserialize)]
struct PlotInput {
    rows: Vec<Row>,
}

#[derive(Debug, Clone, Deserialize)]
struct Row {
    measurement: String,
    conditions: String,
    what: String,
    value: Summary,
    baseline: Option<String>,
    baseline_value: Option<Summary>,
}

/// The chart of a measurement.
struct Plot {
    measurement: &'static str,
    /// The drawn quantities, each a curve for each of the conditions.
    what: &'static [&'static str],
    title: &'static str,
    shape: PlotKind,
    unit: &'static str,
    /// Whether the baseline is a curve of its own; otherwise it is another point of the same curve.
    with_baseline: bool,
}

enum PlotKind {
    /// The median against the number before this word in the conditions.
    MedianBy(&'static str),
    /// The cumulative share of samples.
    Distribution,
}

const PLOTS: [Plot; 5] = [
    Plot {
        measurement: "peers",
        what: &["snapshot to last route"],
        title: "One snapshot of all peers, until the last route",
        shape: PlotKind::MedianBy("peers"),
        unit: "ms",
        with_baseline: true,
    },
    Plot {
        measurement: "start",
        what: &["process begun to overlay in place"],
        title: "From the start of the process to the overlay in place",
        shape: PlotKind::MedianBy("peers"),
        unit: "ms",
        with_baseline: true,
    },
    Plot {
        measurement: "memory",
        what: &["resident (VmRSS)"],
        title: "Resident memory of an agent",
        shape: PlotKind::MedianBy("peers"),
        unit: "MiB",
        with_baseline: false,
    },
    Plot {
        measurement: "fleet",
        what: &["all started: processor time of an agent, the mean", "one joins: processor time of another agent"],
        title: "Processor time of an agent in a fleet",
        shape: PlotKind::MedianBy("agents"),
        unit: "ms",
        with_baseline: false,
    },
    Plot {
        measurement: "join",
        what: &["put sent to route on every host"],
        title: "A lease put into etcd, until it is a route on every host",
        shape: PlotKind::Distribution,
        unit: "ms",
        with_baseline: true,
    },
];

/// Draws all possible charts, and returns the names of the files.
pub fn draw(arguments: &DrawArguments) -> anyhow::Result<String> {
    let mut rows = Vec::new();
    for path in &arguments.reports {
        let file = path.display();
        let text = fs::read(path).with_context(|| format!("cannot read {file}"))?;
        let report: PlotInput = serde_json::from_slice(&text)
            .with_context(|| format!("{file} is not a report: make one with  overlay-bench --json peers >{file}"))?;
        rows.extend(report.rows);
    }
    fs::create_dir_all(&arguments.to).with_context(|| format!("cannot make {}", arguments.to.display()))?;
    let mut written_files = String::new();
    for plot in &PLOTS {
        let curves = plot.curves(&rows);
        if curves.is_empty() {
            continue;
        }
        let path = arguments.to.join(format!("{}.svg", plot.measurement));
        fs::write(&path, svg(&plot.axes(), &curves)).with_context(|| format!("cannot write {}", path.display()))?;
        written_files.push_str(&format!("{}\n", path.display()));
    }
    ensure!(!written_files.is_empty(), "none of the reports has anything to draw: peers, start, memory, fleet and join have");
    Ok(written_files)
}

impl Plot {
    fn axes(&self) -> Axes {
        let (x, y) = match self.shape {
            PlotKind::MedianBy(word) => (word.to_owned(), self.unit.to_owned()),
            PlotKind::Distribution => (self.unit.to_owned(), "% of the samples".to_owned()),
        };
        Axes { title: self.title.to_owned(), x, y, logarithmic: matches!(self.shape, PlotKind::Distribution) }
    }

    /// Curves of rows that differ only in the number, in the order of their first appearance.
    fn curves(&self, rows: &[Row]) -> Vec<Curve> {
        let mut curves: Vec<Curve> = Vec::new();
        let mut add = |name: String, points: &[(f64, f64)]| match curves.iter_mut().find(|curve| curve.name == name) {
            Some(curve) => curve.points.extend(points),
            None => curves.push(Curve { name, points: points.to_vec() }),
        };
        let is_in_plot = |row: &&Row| row.measurement == self.measurement && self.what.contains(&row.what.as_str());
        for row in rows.iter().filter(is_in_plot) {
            let what = if self.what.len() > 1 { row.what.as_str() } else { "overlayd" };
            let baseline = row.baseline.as_deref().zip(row.baseline_value.as_ref()).filter(|_| self.with_baseline);
            match self.shape {
                PlotKind::MedianBy(word) => {
                    let Some((number, rest)) = number_before(&row.conditions, word) else { continue };
                    let curve_name = |what: &str| if rest.is_empty() { what.to_owned() } else { format!("{what}, {rest}") };
                    add(curve_name(what), &[(number, row.value.median)]);
                    if let Some((baseline, value)) = baseline {
                        add(curve_name(baseline), &[(number, value.median)]);
                    }
                }
                PlotKind::Distribution => {
                    add(format!("{what}, {}", row.conditions), &cumulative_shares(&row.value));
                    if let Some((baseline, value)) = baseline {
                        add(format!("{baseline}, {}", row.conditions), &cumulative_shares(value));
                    }
                }
            }
        }
        for curve in &mut curves {
            curve.points.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        }
        curves
    }
}

/// The values with the share of samples that are not greater.
fn cumulative_shares(summary: &Summary) -> Vec<(f64, f64)> {
    let steps = f64::from(u32::try_from(summary.distribution.len() - 1).unwrap_or(u32::MAX));
    (0_u32..).map(f64::from).zip(summary.distribution).map(|(n, value)| (value, 100.0 * n / steps)).collect()
}

/// The number before a word, and the conditions without both: for `IPv4, 10000 peers`, 10,000 and `IPv4`.
fn number_before(conditions: &str, word: &str) -> Option<(f64, String)> {
    let mut number = None;
    let rest: Vec<&str> = conditions
        .split(", ")
        .filter(|part| match part.split_once(' ') {
            Some((digits, of)) if of == word && number.is_none() => {
                number = digits.parse::<f64>().ok();
                number.is_none()
            }
            _ => true,
        })
        .collect();
    Some((number?, rest.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Report, Row as Made};

    #[test]
    fn rows_of_one_kind_become_one_curve_with_its_baseline() {
        let mut report = Report::new();
        for (peers, took) in [("10000", 140.0), ("1000", 15.0)] {
            for family in ["IPv4", "IPv6"] {
                let conditions = format!("{family}, {peers} peers");
                let row = Made::new("peers", &conditions, "snapshot to last route", "ms", &[took]);
                report.add(row.map(|row| row.with_baseline("raw netlink", &[took], &[took / 2.0])));
            }
        }
        let samples: Vec<f64> = (1..=1000).map(f64::from).collect();
        report.add(Made::new("join", "3 agents, 0 peers", "put sent to route on every host", "ms", &samples));
        let drawn: PlotInput = serde_json::from_str(&report.json().expect("JSON")).expect("a report");
        let curves = PLOTS[0].curves(&drawn.rows);
        let names: Vec<&str> = curves.iter().map(|curve| curve.name.as_str()).collect();
        assert_eq!(names, ["overlayd, IPv4", "raw netlink, IPv4", "overlayd, IPv6", "raw netlink, IPv6"]);
        assert_eq!(curves[1].points, [(1000.0, 7.5), (10_000.0, 70.0)]);
        let latency = PLOTS[4].curves(&drawn.rows);
        assert_eq!(latency.len(), 1);
        assert_eq!(latency[0].points.first(), Some(&(1.0, 0.0)));
        assert_eq!(latency[0].points.last(), Some(&(1000.0, 100.0)));
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("report.json");
        fs::write(&file, report.json().expect("JSON")).expect("written");
        let to = dir.path().join("pictures");
        let written_files = draw(&DrawArguments { reports: vec![file.clone()], to: to.clone() }).expect("drawn");
        assert_eq!(written_files.lines().count(), 2, "{written_files}");
        assert!(fs::read_to_string(to.join("peers.svg")).expect("a picture").contains("raw netlink, IPv6"));
        fs::write(&file, "{}").expect("written");
        let error = draw(&DrawArguments { reports: vec![file], to }).expect_err("no report");
        assert!(format!("{error:#}").contains("is not a report"), "{error:#}");
    }
}
