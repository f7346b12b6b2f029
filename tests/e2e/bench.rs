//! Runs each `overlay-bench` command of docs/performance.md, "How to repeat", with small numbers and one run.
//!
//! The resulting figures are not meaningful.

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
    for words in measurements {
        let output = Command::new(workspace_binary("overlay-bench"))
            .arg(&words[1])
            .args(quick_arguments(&words[1]))
            .arg("--json")
            .output()
            .expect("it starts");
        let said = CommandOutput::from_output(words, &output);
        if quick_arguments(&words[1]) == ["--help"] {
            said.assert_code(0);
            continue;
        }
        // 3: a goal is missed, which does not matter here.
        assert!(matches!(said.code, Some(0 | 3)), "{}: {:?}\n{}", said.command, said.code, said.stderr);
        let report: serde_json::Value = said.json();
        assert!(report["rows"].as_array().is_some_and(|rows| !rows.is_empty()), "{}: {report}", said.command);
    }
}
