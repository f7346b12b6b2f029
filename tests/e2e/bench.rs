//! Runs each `overlay-bench` command as documented docs/performance.md "How to repeat", with small numbers and one run.
//!
//! The figures say nothing at that size. Their form does: a report without rows, without a baseline, or with an exit code that
//! contradicts its goals would mislead its reader.

use std::process::Command;

use overlay_tests::doc_page::{blocks, page_text};
use overlay_tests::programs::{CommandOutput, require_program, require_root, workspace_binary};
use overlay_tests::shell;

/// Extra arguments that make a measurement small.
fn quick_arguments(measurement: &str) -> &'static [&'static str] {
    match measurement {
        "peers" | "start" => &["--peers", "20", "--runs", "1"],
        "memory" => &["--peers", "20", "--runs", "1", "--no-wakes"],
        "churn" => &["--peers", "20", "--rate", "50", "--seconds", "3", "--writers", "2"],
        "storm" => &["--peers", "5", "--routes", "50", "--links", "20", "--runs", "1"],
        "data" => &["--turns", "1", "--rules", "1", "--time", "50"],
        "join" => &["--peers", "0", "--samples", "3", "--hosts", "1"],
        "attach" => &["--samples", "3", "--endpoints", "2"],
        "networks" => &[
            "--networks",
            "1",
            "--networks",
            "2",
            "--peers",
            "5",
            "--runs",
            "1",
            "--no-wakes",
            "--samples",
            "2",
            "--turns",
            "1",
            "--time",
            "50",
        ],
        // A fleet is quiet for a minute; check only that the measurement exists.
        _ => &["--help"],
    }
}

#[test]
fn documented_measurements_run() {
    require_root();
    require_program("etcd", "etcd-server");
    let block = blocks(&page_text("docs/performance.md"))
        .expect("good markers")
        .into_iter()
        .find(|block| block.section == "How to repeat");
    let commands = shell::commands(&block.expect("a block under How to repeat").commands);
    let measurements: Vec<&Vec<String>> = commands.iter().filter(|words| words[0].ends_with("/overlay-bench")).collect();
    assert!(measurements.len() >= 5, "{commands:?}");
    // Some side by side: their figures do not count, and most of the time they wait.
    for group in measurements.chunks(3) {
        std::thread::scope(|scope| {
            for words in group {
                scope.spawn(|| run_and_check(words));
            }
        });
    }
}

/// Runs a measurement and checks its report.
fn run_and_check(words: &[String]) {
    let arguments = quick_arguments(&words[1]);
    let output = Command::new(workspace_binary("overlay-bench")).arg(&words[1]).args(arguments).arg("--json").output();
    let output = CommandOutput::from_output(words, &output.expect("it starts"));
    if arguments == ["--help"] {
        output.assert_code(0);
        return;
    }
    assert!(matches!(output.code, Some(0 | 3)), "{}: {:?}\n{}", output.command, output.code, output.stderr);
    let report: serde_json::Value = output.json();
    let rows = report["rows"].as_array().filter(|rows| !rows.is_empty());
    let rows = rows.unwrap_or_else(|| panic!("{}: no rows: {report}", output.command));
    for row in rows {
        assert_is_ordered(&row["value"], row);
        if !row["baseline"].is_null() {
            assert_is_ordered(&row["baseline_value"], row);
            assert_is_ordered(&row["ratio"], row);
        }
    }
    assert!(rows.iter().any(|row| !row["baseline"].is_null()), "{}: nothing is compared: {report}", output.command);
    let missed = rows.iter().any(|row| row["goal"]["met"] == false);
    assert_eq!(output.code, Some(if missed { 3 } else { 0 }), "{}: 3 is a missed goal: {report}", output.command);
}

/// Checks that a summary has samples, and that its figures are finite and in order. A difference to a baseline can be negative.
fn assert_is_ordered(summary: &serde_json::Value, row: &serde_json::Value) {
    let figures = ["min", "median", "p99", "max"].map(|name| summary[name].as_f64().unwrap_or(f64::NAN));
    let in_order = figures.windows(2).all(|pair| pair[0] <= pair[1]) && figures[0].is_finite() && figures[3].is_finite();
    assert!(in_order && summary["samples"].as_u64().is_some_and(|samples| samples > 0), "{figures:?} in {row}");
}
