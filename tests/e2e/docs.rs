//! Compares the documentation with the code: settings, JSON shapes, metrics, dependencies and links.

#[path = "docs/commands.rs"]
mod commands;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use overlay_agent::config::{SETTINGS, SettingKind, command, load_settings};
use overlay_agent::metrics::Metrics;
use overlay_agent::model::api;
use overlay_tests::doc_page::page_paths;
use serde::Serialize;
use serde::de::DeserializeOwned;

fn repo_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(repo_root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The reference's table of settings.
fn settings_table() -> String {
    let mut table = "| flag | value | default | what it does |\n| --- | --- | --- | --- |\n".to_owned();
    for setting in SETTINGS {
        let value = match setting.kind {
            SettingKind::List => format!("{}, several", setting.value),
            SettingKind::Text | SettingKind::Boolean => setting.value.to_owned(),
        };
        let default = if setting.default.is_empty() { String::new() } else { format!("`{}`", setting.default) };
        let escape = |text: &str| text.replace('|', "\\|").replace('<', "\\<");
        table += &format!("| `--{}` | {} | {default} | {} |\n", setting.name, escape(&value), escape(setting.help));
    }
    table
}

#[test]
fn reference_documents_every_setting() {
    const PAGE: &str = "docs/configuration.md";
    let text = read(PAGE);
    let (before, rest) = text.split_once("<!-- begin settings").expect("the beginning of the table");
    let (marker, rest) = rest.split_once("-->\n").expect("the end of the marker");
    let (found, after) = rest.split_once("<!-- end settings -->").expect("the end of the table");
    let wanted = settings_table();
    if std::env::var_os("OVERLAY_REGENERATE").is_some_and(|value| value == "1") {
        let text = format!("{before}<!-- begin settings{marker}-->\n{wanted}<!-- end settings -->{after}");
        fs::write(repo_root().join(PAGE), text).expect(PAGE);
    } else {
        assert_eq!(found, wanted, "OVERLAY_REGENERATE=1 regenerates the table");
    }
}

/// The packages' commented configuration: every setting with description and default, all commented out.
fn default_configuration() -> String {
    let mut text = "# Configuration of overlayd, the overlay network's agent; overlayd(8).
#
# This file lists every setting with its default, or with the type of its value if it has no default. Each setting is also a flag of overlayd
# and an environment variable; both override this file. `systemctl reload overlayd` applies the log level, `systemctl restart overlayd` all
# settings. Neither interrupts traffic.
#
# A bare file name in an etcd setting is looked up in /etc/overlayd/credentials, which only root can read and systemd passes to the
# service: etcd-keyfile = \"client.key\"
"
    .to_owned();
    for setting in SETTINGS {
        let help = setting.help.replace("[default: ", "(default: ").replace(']', ")");
        let value = match (setting.kind, setting.default) {
            (SettingKind::List, "") => format!("[\"{}\"]", setting.value),
            (SettingKind::List, default) => format!("[\"{default}\"]"),
            (SettingKind::Text, "") => format!("\"{}\"", setting.value),
            (SettingKind::Text, default) => format!("\"{default}\""),
            (SettingKind::Boolean, default) => default.to_owned(),
        };
        text += &format!("\n# {help}\n#{} = {value}\n", setting.name);
    }
    text
}

#[test]
fn packaged_config_has_every_setting() {
    const FILE: &str = "deploy/overlayd.toml";
    let wanted = default_configuration();
    if std::env::var_os("OVERLAY_REGENERATE").is_some_and(|value| value == "1") {
        fs::write(repo_root().join(FILE), &wanted).expect(FILE);
    }
    assert_eq!(read(FILE), wanted, "OVERLAY_REGENERATE=1 regenerates the file");
    // As installed it sets nothing; with every line uncommented it sets every value with the right type.
    let set = |text: &str| {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("overlayd.toml");
        fs::write(&path, text).expect("a file");
        let raw = load_settings(&command().get_matches_from(["overlayd".as_ref(), "--config".as_ref(), path.as_os_str()]));
        SETTINGS.iter().filter(|setting| raw.is_set(setting.name)).count()
    };
    let on: String = wanted
        .lines()
        .filter_map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')))
        .fold(String::new(), |text, line| text + line + "\n");
    assert_eq!((set(&wanted), set(&on)), (0, SETTINGS.len()), "{on}");
}

/// Checks that a JSON text is a value of the type, with every field that the type serialises.
fn assert_round_trips<T: Serialize + DeserializeOwned>(json: &str) -> Result<(), String> {
    let value: serde_json::Value = serde_json::from_str(json).map_err(|e| e.to_string())?;
    let typed: T = serde_json::from_value(value.clone()).map_err(|e| e.to_string())?;
    let round_trip = serde_json::to_value(typed).map_err(|e| e.to_string())?;
    if round_trip == value { Ok(()) } else { Err(format!("the agent writes\n{round_trip:#}\nfor\n{value:#}")) }
}

#[test]
fn api_examples_match_agent_output() {
    let text = read("docs/api.md");
    let mut count = 0;
    for part in text.split("<!-- type: ").skip(1) {
        let (name, rest) = part.split_once(" -->\n```json\n").expect("a type and its example");
        let (json, _) = rest.split_once("```").expect("the end of the example");
        let result = match name {
            "Problem" => assert_round_trips::<api::ErrorBody>(json),
            "Status" => assert_round_trips::<api::Status>(json),
            "Subnets" => assert_round_trips::<api::Subnets>(json),
            "Peers" => assert_round_trips::<api::Peers>(json),
            "Endpoints" => assert_round_trips::<api::Endpoints>(json),
            "AttachRequest" => assert_round_trips::<api::AttachRequest>(json),
            "Attached" => assert_round_trips::<api::AttachResponse>(json),
            "Detached" => assert_round_trips::<api::DetachResponse>(json),
            "Networks" => assert_round_trips::<api::Networks>(json),
            "NetworkView" => assert_round_trips::<api::NetworkView>(json),
            "Mesh" => assert_round_trips::<api::Mesh>(json),
            "LogLevel" => assert_round_trips::<api::LogLevel>(json),
            other => Err(format!("no type {other}")),
        };
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
        count += 1;
    }
    assert_eq!(count, 12);
    assert!(text.contains(&format!("GET /v{}/status", api::VERSION)));
}

#[test]
fn every_metric_is_documented() {
    let text = read("docs/metrics.md");
    let page = Metrics::new().render();
    let metrics: BTreeSet<(&str, &str)> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    assert!(metrics.len() > 10);
    let documented: BTreeSet<(&str, &str)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
        .filter(|(name, _)| name.starts_with("overlayd_") || name.starts_with("process_"))
        .filter_map(|(name, rest)| Some((name, rest.split_once(" |")?.0)))
        .collect();
    assert_eq!(documented, metrics);
}

#[test]
fn every_direct_dependency_has_its_reason() {
    let mut direct = BTreeSet::new();
    for package in ["agent", "ctl", "tests"] {
        let manifest = read(&format!("{package}/Cargo.toml"));
        let mut inside = false;
        for line in manifest.lines() {
            if line.starts_with('[') {
                inside = line.ends_with("dependencies]");
            } else if inside && let Some((name, _)) = line.split_once(['.', ' ', '=']) {
                direct.insert(name.to_owned());
            }
        }
    }
    let rows: BTreeSet<String> = read("docs/dependencies.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(name, _)| name.to_owned()))
        .collect();
    assert_eq!(rows, direct);
}

/// Each promise of the page cites its tests: `FILE::TEST` for `tests/e2e/FILE.rs`, a module path for `agent/src`.
#[test]
fn cited_tests_exist() {
    let text = read("docs/reliability.md");
    let is_path = |word: &&str| {
        let is_path_char = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | ':');
        word.contains("::") && word.chars().all(is_path_char)
    };
    let cited: BTreeSet<&str> = text.split('`').skip(1).step_by(2).filter(is_path).collect();
    assert!(cited.len() > 60, "{}", cited.len());
    for path in cited {
        let (modules, test) = path.rsplit_once("::").expect("a module");
        let file = modules.replace("::", "/");
        // Tests may be in the module itself, below `mod tests`.
        let inside = file.strip_suffix("/tests").unwrap_or(&file);
        let candidates = [format!("tests/e2e/{file}.rs"), format!("agent/src/{file}.rs"), format!("agent/src/{inside}.rs")];
        let found = candidates.iter().filter_map(|path| fs::read_to_string(repo_root().join(path)).ok()).any(|text| {
            let before = text.split_once(&format!("fn {test}(")).map(|(before, _)| before.to_owned());
            // The attribute is on one of the previous lines.
            before.is_some_and(|before| before.lines().rev().take(4).any(|line| line.contains("test")))
        });
        assert!(found, "docs/reliability.md cites `{path}`, which is not a test in {candidates:?}");
    }
    // Every row cites a test.
    let rows = text.lines().filter(|line| line.starts_with("| ") && !line.contains("| --- ") && !line.contains("held by |"));
    for row in rows {
        assert!(row.split('`').skip(1).step_by(2).any(|word| is_path(&word)), "no test cited: {row}");
    }
}

#[test]
fn doc_links_resolve() {
    for page in page_paths().into_iter().chain(["CHANGELOG.md".to_owned()]) {
        let text = read(&page);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(link, _)| link)) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            if link.contains("://") {
                continue;
            }
            let target =
                if file.is_empty() { repo_root().join(&page) } else { repo_root().join(&page).with_file_name("").join(file) };
            let linked = fs::read_to_string(&target).unwrap_or_else(|e| panic!("{page}: {link}: {e}"));
            let headings: Vec<String> =
                linked.lines().filter(|line| line.starts_with('#')).map(|line| anchor(line.trim_start_matches('#'))).collect();
            assert!(
                heading.is_empty() || headings.iter().any(|h| h == heading),
                "{page}: {link} is not a heading of {headings:?}"
            );
        }
    }
}

/// The link anchor of a heading.
fn anchor(heading: &str) -> String {
    let slug = heading.trim().to_lowercase().replace(' ', "-");
    slug.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
}

#[test]
fn every_tutorial_is_run() {
    let mut sources = String::new();
    for entry in fs::read_dir(repo_root().join("tests/e2e")).expect("tests/e2e") {
        let name = entry.expect("an entry").file_name().into_string().expect("UTF-8");
        if name.starts_with("tutorial_") {
            sources += &read(&format!("tests/e2e/{name}"));
        }
    }
    let sections = overlay_tests::tutorial::sections();
    assert!(sections.len() >= 6, "{sections:?}");
    for section in sections {
        assert!(sources.contains(&format!("Tutorial::begin(\"{section}\")")), "no tests/e2e/tutorial_*.rs runs `{section}`");
    }
}
