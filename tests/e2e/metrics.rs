//! Metrics and health: promtool accepts them, alerts and dashboard use existing metrics, and readiness follows the state.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::metrics::Metrics;
use overlay_tests::faults::Fault;
use overlay_tests::programs::{CommandOutput, require_program};
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::{ExpectContext, TestLab, etcd, eventually, http, kernel};
use overlayctl::lab::Families;
use serde_json::Value;

/// Time limit for an agent to notice that etcd answers again.
const DETECT_TIMEOUT: Duration = Duration::from_secs(20);

fn repo_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(repo_root().join(path)).expect_ok(path)
}

#[track_caller]
fn promtool(arguments: &[&str], input: &str) -> CommandOutput {
    require_program("promtool", "prometheus");
    let file = tempfile::NamedTempFile::new().expect_ok("a file");
    fs::write(file.path(), input).expect_ok("a file");
    let stdin = fs::File::open(file.path()).expect_ok("a file");
    let output = Command::new("promtool").args(arguments).stdin(stdin).current_dir(repo_root()).output().expect_ok("promtool");
    let command: Vec<&str> = std::iter::once("promtool").chain(arguments.iter().copied()).collect();
    CommandOutput::from_output(&command, &output)
}

/// The metric families of a page.
fn metric_families(page: &str) -> BTreeSet<String> {
    page.lines().filter_map(|line| Some(line.strip_prefix("# TYPE ")?.split_once(' ')?.0.to_owned())).collect()
}

/// The value of a sample.
fn sample(page: &str, name: &str) -> Option<f64> {
    page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// The agent's metrics in an expression.
fn metric_names(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let agent_metrics = words.filter(|word| word.starts_with("overlayd_") || word.starts_with("process_"));
    agent_metrics
        .map(|word| ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word).to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_pass_promtool() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let socket = lab.host("h1").socket();
    let page = || http::request(&socket, "GET", "/metrics", "").body;
    // A rejected value, drift of two kinds, and an etcd outage, so that every family has a sample.
    etcd::put(&lab, &etcd::lease_key(&format!("{}-24", etcd::free_subnet(&lab))), "{");
    kernel::shell(&lab, "h1", "ip route delete $(ip route show proto 86 type unicast | cut -d' ' -f1 | head -1) proto 86");
    kernel::shell(&lab, "h1", "echo 0 >/proc/sys/net/ipv4/conf/ovb.1/forwarding");
    etcd::kill(&lab);
    eventually("the loss of etcd is noticed", DETECT_TIMEOUT, || {
        let page = page();
        match (
            sample(&page, "overlayd_store_connected{network=\"default\"}"),
            sample(&page, "overlayd_store_request_failures_total"),
        ) {
            (Some(0.0), Some(failures)) if failures >= 1.0 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    etcd::start(&lab).await;
    let seen = eventually("everything is counted", DETECT_TIMEOUT, || {
        let page = page();
        let wanted = [
            ("overlayd_store_reconnects_total{network=\"default\"}", 1.0),
            ("overlayd_drift_repairs_total{kind=\"route\"}", 1.0),
            ("overlayd_drift_repairs_total{kind=\"sysctl\"}", 1.0),
            ("overlayd_refused_values_total{network=\"default\",reason=\"malformed\"}", 1.0),
            ("overlayd_refused_leases{network=\"default\"}", 1.0),
            ("overlayd_ready{network=\"default\"}", 1.0),
            ("overlayd_lease_held{network=\"default\"}", 1.0),
            ("overlayd_store_connected{network=\"default\"}", 1.0),
            ("overlayd_peers{network=\"default\"}", 1.0),
            ("overlayd_leases{network=\"default\"}", 3.0),
            ("overlayd_endpoints{network=\"default\"}", 1.0),
            ("overlayd_failed_entries", 0.0),
        ];
        let wrong: Vec<String> = wanted
            .into_iter()
            .filter(|(name, value)| sample(&page, name) != Some(*value))
            .map(|(name, value)| format!("{name} is {:?}, not {value}", sample(&page, name)))
            .collect();
        if wrong.is_empty() { Ok(page) } else { Err(wrong.join(", ")) }
    })
    .await;
    for counted in
        ["overlayd_store_request_duration_seconds_count", "overlayd_batch_ops_count", "overlayd_batch_duration_seconds_sum"]
    {
        assert!(sample(&seen, counted).is_some_and(|value| value > 0.0), "{counted} in {seen}");
    }
    let output = promtool(&["check", "metrics"], &seen).assert_code(0);
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("", ""), "nothing to remark");
    assert_eq!(metric_families(&seen), metric_families(&Metrics::new().render()), "every family exists from the start");
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_follows_agent_state() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let socket = lab.host("h1").socket();
    let get = |path: &str| http::request(&socket, "GET", path, "");
    assert_eq!((get("/healthz").status, get("/readyz").status), (200, 200));
    // A foreign device under our device's name: nothing can be built on it, and we must not delete it. The agent is frozen
    // meanwhile, because it would be faster than the second command.
    let hang = Fault::AgentFrozen("h1");
    hang.begin(&lab).await;
    kernel::shell(&lab, "h1", "ip link delete ovx.1; ip link add ovx.1 type bridge");
    hang.end(&lab).await;
    let broken = eventually("the broken data path takes readiness away", CONVERGE_TIMEOUT, || match get("/readyz") {
        answer if answer.status == 503 => Ok(answer.body),
        answer => Err(format!("{} {}", answer.status, answer.body)),
    })
    .await;
    assert!(broken.contains("ovx.1"), "the reason is given: {broken}");
    assert_eq!(get("/healthz").status, 200, "the agent lives");
    kernel::shell(&lab, "h1", "ip link delete ovx.1");
    let ready = |lab: &TestLab| http::request(&lab.host("h1").socket(), "GET", "/readyz", "");
    eventually("it is ready again", DETECT_TIMEOUT, || match ready(&lab) {
        answer if answer.status == 200 => Ok(()),
        answer => Err(answer.body),
    })
    .await;
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    lab.assert_full_reachability().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_over_tcp_follows_the_agent() {
    let lab = TestLab::without_agents(1, Families::V4).await;
    let host = lab.host("h1");
    host.agent_start(&["--metrics-listen", "127.0.0.1:9476"]).expect_ok("start");
    host.wait_ready(overlay_tests::test_lab::READY_TIMEOUT).await.expect_ok("ready");
    let status = |path: &str| {
        let script = format!(
            "exec 3<>/dev/tcp/127.0.0.1/9476; printf 'GET {path} HTTP/1.0\\r\\nHost: x\\r\\n\\r\\n' >&3; head -1 <&3 | cut -d' ' -f2"
        );
        kernel::attempt(&lab, "h1", &["bash", "-c", &script]).stdout.trim().to_owned()
    };
    assert_eq!(["/healthz", "/readyz", "/metrics", "/v1/status"].map(status), ["200", "200", "200", "404"]);
    host.agent_stop(Signal::SIGTERM).expect_ok("stop");
    assert_eq!(status("/healthz"), "", "no answer");
}

#[test]
fn alert_rules_pass_promtool() {
    const RULES: &str = "deploy/monitoring/alerts.yaml";
    const CASES: &str = "tests/fixtures/monitoring/alerts.test.yaml";
    promtool(&["check", "rules", RULES], "").assert_code(0);
    promtool(&["test", "rules", CASES], "").assert_code(0);
    let (rules, cases, page) = (read(RULES), read(CASES), read("docs/metrics.md"));
    let known = metric_families(&Metrics::new().render());
    let mut alerts = 0;
    for rule in rules.split("      - alert: ").skip(1) {
        let name = rule.lines().next().unwrap_or_default();
        for part in
            ["        expr: ", "          severity: ", "          summary: '", "          meaning: '", "          remedy: '"]
        {
            assert!(rule.contains(part), "{name} has no {part}");
        }
        assert!(cases.contains(&format!("- name: {name}\n")), "{name} has no case in {CASES}");
        assert!(page.contains(&format!("| `{name}` |")), "{name} is not in docs/metrics.md");
        let expression = rule.lines().find_map(|line| line.strip_prefix("        expr: ")).unwrap_or_default();
        let unknown: Vec<String> = metric_names(expression).difference(&known).cloned().collect();
        assert!(unknown.is_empty(), "{name} uses unknown metrics: {unknown:?}");
        alerts += 1;
    }
    assert!(alerts > 10, "{alerts} alerts");
}

#[test]
fn dashboard_uses_known_metrics() {
    let dashboard: Value = serde_json::from_str(&read("deploy/monitoring/grafana.json")).expect_ok("the dashboard");
    let known = metric_families(&Metrics::new().render());
    let panels = dashboard["panels"].as_array().expect_ok("panels");
    // As recording rules the expressions can be checked by Prometheus' own parser.
    let mut rules = "groups:\n  - name: dashboard\n    rules:\n".to_owned();
    let mut charted = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().expect_ok("a title");
        assert!(panel["description"].as_str().is_some_and(|text| text.len() > 10), "{title} has no description");
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title} has no unit");
        let targets = panel["targets"].as_array().expect_ok(title);
        assert!(!targets.is_empty(), "{title}");
        for target in targets {
            let expression = target["expr"].as_str().expect_ok(title);
            let unknown: Vec<String> = metric_names(expression).difference(&known).cloned().collect();
            assert!(unknown.is_empty(), "{title} uses unknown metrics: {unknown:?}");
            charted.extend(metric_names(expression));
            let plain = expression.replace("$__rate_interval", "5m").replace("$host", ".*");
            rules += &format!("      - record: dashboard:{}:expression\n        expr: '{plain}'\n", charted.len());
        }
    }
    let file = tempfile::NamedTempFile::with_suffix(".yaml").expect_ok("a file");
    fs::write(file.path(), rules).expect_ok("a file");
    promtool(&["check", "rules", "--lint=none", &file.path().to_string_lossy()], "").assert_code(0);
    let unused: Vec<&String> = known.difference(&charted).collect();
    assert!(unused.is_empty(), "the dashboard does not show {unused:?}");
}
