//! Formats rows as a table and as JSON.

use std::time::Instant;

use overlayctl::output::{Style, Table, Tone, cell, toned};
use serde::Serialize;

use super::stats::Summary;

/// The version of the JSON: within a version, fields are only added.
const JSON_VERSION: u32 = 1;

/// All results of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    version: u32,
    machine: Machine,
    rows: Vec<Row>,
    #[serde(skip)]
    started: Instant,
}

/// The machine of the run.
#[derive(Debug, Serialize)]
struct Machine {
    kernel: String,
    processors: usize,
    /// The load average of the last minute, at the begin and at the end of the run.
    load_before: f64,
    load_after: f64,
    /// The duration of the run in seconds.
    seconds: f64,
}

/// One figure with its baseline.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The sub-command.
    pub measurement: &'static str,
    /// The conditions: `IPv4, 10000 peers`.
    pub conditions: String,
    /// The measured quantity.
    pub what: String,
    /// The unit of all values of the row except the ratio.
    pub unit: &'static str,
    /// The figure.
    pub value: Summary,
    /// The name of the baseline; absent if the row has none.
    pub baseline: Option<&'static str>,
    /// The baseline's figure from the same run.
    pub baseline_value: Option<Summary>,
    /// Figure to baseline, sample by sample.
    pub ratio: Option<Summary>,
    /// The goal of the figure.
    pub goal: Option<Goal>,
}

/// A limit, and whether it is met.
#[derive(Debug, Clone, Serialize)]
pub struct Goal {
    /// `median <= 2 ms`.
    pub text: String,
    /// Whether it is met.
    pub met: bool,
}

impl Row {
    /// A row without a baseline or goal; `None` without samples.
    pub fn new(
        measurement: &'static str,
        conditions: &str,
        what: impl Into<String>,
        unit: &'static str,
        samples: &[f64],
    ) -> Option<Row> {
        let value = Summary::of(samples)?;
        let row = Row {
            measurement,
            conditions: conditions.to_owned(),
            what: what.into(),
            unit,
            value,
            baseline: None,
            baseline_value: None,
            ratio: None,
            goal: None,
        };
        Some(row)
    }

    /// Adds a baseline: one sample for each of the row's.
    pub fn with_baseline(mut self, baseline: &'static str, samples: &[f64], baseline_samples: &[f64]) -> Row {
        self.baseline = Some(baseline);
        self.baseline_value = Summary::of(baseline_samples);
        self.ratio = Summary::of_ratios(samples, baseline_samples);
        self
    }

    /// Sets a maximum of the median ratio.
    pub fn ratio_goal(mut self, limit: f64) -> Row {
        let met = self.ratio.is_some_and(|ratio| ratio.median <= limit);
        self.goal = Some(Goal { text: format!("ratio <= {limit}"), met });
        self
    }

    /// Sets a minimum of the median ratio.
    pub fn ratio_floor(mut self, limit: f64) -> Row {
        let met = self.ratio.is_some_and(|ratio| ratio.median >= limit);
        self.goal = Some(Goal { text: format!("ratio >= {limit}"), met });
        self
    }

    /// Sets maxima of the median and the 99th percentile, in the row's unit.
    pub fn latency_goal(mut self, median: f64, p99: f64) -> Row {
        let text = format!("median <= {median} {}, p99 <= {p99} {}", self.unit, self.unit);
        self.goal = Some(Goal { text, met: self.value.median <= median && self.value.p99 <= p99 });
        self
    }

    /// Sets a maximum of the median, in the row's unit.
    pub fn median_goal(mut self, limit: f64) -> Row {
        self.goal = Some(Goal { text: format!("median <= {limit} {}", self.unit), met: self.value.median <= limit });
        self
    }
}

impl Report {
    /// An empty report of a run that begins now.
    pub fn new() -> Report {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let load = load_average();
        let machine = Machine { kernel, processors, load_before: load, load_after: load, seconds: 0.0 };
        Report { version: JSON_VERSION, machine, rows: Vec::new(), started: Instant::now() }
    }

    /// Adds a row, if it has samples.
    pub fn add(&mut self, row: Option<Row>) {
        self.rows.extend(row);
    }

    /// Records the end of the run.
    pub fn finish(&mut self) {
        self.machine.load_after = load_average();
        self.machine.seconds = self.started.elapsed().as_secs_f64();
    }

    /// Whether all rows meet their goals.
    pub fn goals_met(&self) -> bool {
        self.rows.iter().all(|row| row.goal.as_ref().is_none_or(|goal| goal.met))
    }

    /// The report as JSON.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// The report as a table.
    pub fn table(&self) -> String {
        let header = [
            "conditions",
            "what",
            "unit",
            "median",
            "min..max",
            "p99",
            "baseline",
            "median",
            "min..max",
            "ratio",
            "min..max",
            "goal",
        ];
        let mut table = Table::new(Style::for_stream(&std::io::stdout()), &header);
        for row in &self.rows {
            let spread = |s: &Summary| format!("{}..{}", format_number(s.min), format_number(s.max));
            let goal = match &row.goal {
                Some(goal) if goal.met => toned(Tone::Good, format!("{}: yes", goal.text)),
                Some(goal) => toned(Tone::Bad, format!("{}: NO", goal.text)),
                None => cell(None::<&str>),
            };
            let p99 = (row.value.samples >= 100).then(|| format_number(row.value.p99));
            table.row(vec![
                cell(Some(&row.conditions)),
                cell(Some(&row.what)),
                cell(Some(row.unit)),
                cell(Some(format_number(row.value.median))),
                cell(Some(spread(&row.value))),
                cell(p99),
                cell(row.baseline),
                cell(row.baseline_value.map(|b| format_number(b.median))),
                cell(row.baseline_value.as_ref().map(spread)),
                cell(row.ratio.map(|r| format!("{:.2}", r.median))),
                cell(row.ratio.map(|r| format!("{:.2}..{:.2}", r.min, r.max))),
                goal,
            ]);
        }
        let Machine { kernel, processors, load_before, load_after, seconds } = &self.machine;
        format!(
            "{}\n\nLinux {kernel}, {processors} processors, load {load_before:.1} before and {load_after:.1} after, {seconds:.0} s",
            table.text()
        )
    }
}

/// Three significant digits.
fn format_number(value: f64) -> String {
    match value.abs() {
        v if v < 10.0 => format!("{value:.2}"),
        v if v < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_goal_is_marked() {
        let row = Row::new("peers", "IPv4", "route", "ms", &[3.0, 4.0]).expect("samples");
        let row = row.with_baseline("raw", &[3.0, 4.0], &[2.0, 2.0]).ratio_goal(1.5);
        let mut report = Report::new();
        report.add(Some(row.clone()));
        assert!(!report.goals_met());
        assert!(report.table().contains("ratio <= 1.5: NO"), "{}", report.table());
        let json: serde_json::Value = serde_json::from_str(&report.json().expect("JSON")).expect("JSON");
        assert_eq!(json["rows"][0]["ratio"]["median"], 1.75);
        assert!(row.clone().median_goal(3.5).goal.expect("a goal").met);
        assert!(row.clone().latency_goal(3.5, 4.0).goal.expect("a goal").met);
        assert!(row.clone().ratio_floor(1.75).goal.expect("a goal").met);
        assert!(!row.clone().ratio_floor(1.76).goal.expect("a goal").met);
        assert!(!row.latency_goal(3.5, 3.9).goal.expect("a goal").met);
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([0.0123, 9.876, 98.76, 987.6].map(format_number), ["0.01", "9.88", "98.8", "988"]);
    }
}
