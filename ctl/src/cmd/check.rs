//! `overlayctl check`: diagnoses this host, with evidence and a remedy for each finding.

use std::path::PathBuf;

use serde::Serialize;

use super::{CommandError, Context, Outcome};
use crate::check::{self, Finding, Report, Settings, Severity};
use crate::etcd::EtcdArgs;
use crate::output::{Style, Tone, View};

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "Run it as root: a check without permission reports information only. It changes nothing.\n\
                        Exit codes: 0 no finding above information, 3 warnings, 1 errors.")]
pub struct Args {
    /// Run only these checks: agent, kernel, store, addresses, firewall, paths, neighbours, endpoints,
    /// networks
    #[arg(value_name = "CHECK", value_parser = clap::builder::PossibleValuesParser::new(check::names()))]
    only: Vec<String>,
    /// Maximum number of peers to probe
    #[arg(long, value_name = "NUMBER", default_value_t = 32)]
    peers: usize,
    /// State directory of the agent
    #[arg(long, value_name = "DIRECTORY", env = "OVERLAYD_STATE_DIR", default_value = "/var/lib/overlayd")]
    state_dir: PathBuf,
    #[command(flatten)]
    etcd: EtcdArgs,
    /// Directory that contains /run and /etc
    #[arg(long, value_name = "DIRECTORY", default_value = "/", hide = true)]
    root: PathBuf,
}

/// Runs the checks and prints the report.
pub async fn run(context: &Context, args: Args) -> Result<Outcome, CommandError> {
    let Args { only, peers, state_dir, etcd, root } = args;
    let settings = Settings { client: context.client.clone(), etcd, state_dir, root, peers };
    let report = check::run(settings, &only).await;
    context.printer.print(&ReportView(&report))?;
    Ok(match report.worst {
        None | Some(Severity::Info) => Outcome::Ok,
        Some(Severity::Warning) => Outcome::Degraded,
        Some(Severity::Error) => Outcome::Negative,
    })
}

#[derive(Serialize)]
#[serde(transparent)]
struct ReportView<'a>(&'a Report);

fn severity_label(severity: Option<Severity>) -> (Tone, &'static str) {
    match severity {
        None => (Tone::Good, "ok"),
        Some(Severity::Info) => (Tone::Quiet, "info"),
        Some(Severity::Warning) => (Tone::Warning, "warning"),
        Some(Severity::Error) => (Tone::Bad, "error"),
    }
}

impl View for ReportView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        let mut lines = Vec::new();
        for checked in &self.0.checks {
            let (tone, text) = severity_label(checked.worst);
            let duration = if wide { format!(" ({} ms)", checked.milliseconds) } else { String::new() };
            lines.push(format!("{}  {:<11} {}{duration}", style.paint(tone, &format!("{text:<7}")), checked.name, checked.about));
        }
        for finding in &self.0.findings {
            lines.push(String::new());
            lines.extend(render_finding(finding, style));
        }
        lines.join("\n")
    }
}

fn render_finding(finding: &Finding, style: Style) -> Vec<String> {
    let (tone, text) = severity_label(Some(finding.severity));
    let mut lines = vec![format!("{} {}: {}", style.paint(tone, text), finding.check, finding.summary)];
    lines.extend(finding.evidence.iter().map(|line| format!("  {}  {line}", style.paint(Tone::Quiet, "seen"))));
    if !finding.remedy.is_empty() {
        lines.push(format!("  {}    {}", style.paint(Tone::Quiet, "do"), finding.remedy));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::CheckResult;

    #[test]
    fn documentation_example_is_a_valid_report() {
        let page = include_str!("../../../docs/check.md");
        let example = page.split_once("```json\n").and_then(|(_, rest)| rest.split_once("```")).expect("an example").0;
        let documented: serde_json::Value = serde_json::from_str(example).expect("JSON");
        let report: Report = serde_json::from_value(documented.clone()).expect("a report");
        assert_eq!((serde_json::to_value(&report).expect("JSON"), report.version), (documented, check::VERSION));
        for name in check::names() {
            assert!(page.contains(&format!("| `{name}` |")), "{name} is not in docs/check.md");
        }
    }

    #[test]
    fn report_lists_checks_then_findings() {
        let finding = Finding {
            check: "firewall".to_owned(),
            severity: Severity::Error,
            summary: "the tunnel's packets are dropped".to_owned(),
            evidence: vec!["udp dport 8472 drop".to_owned()],
            remedy: "ufw allow 8472/udp".to_owned(),
        };
        let checked =
            |name: &str, worst| CheckResult { name: name.to_owned(), about: "rules".to_owned(), worst, milliseconds: 7 };
        let checks = vec![checked("agent", None), checked("firewall", Some(Severity::Error))];
        let report = Report { version: check::VERSION, worst: Some(Severity::Error), checks, findings: vec![finding] };
        assert_eq!(
            ReportView(&report).text(Style::PLAIN, false),
            "ok       agent       rules\nerror    firewall    rules\n\nerror firewall: the tunnel's packets are dropped\n  seen  udp dport 8472 \
             drop\n  do    ufw allow 8472/udp"
        );
        assert_eq!(serde_json::to_value(ReportView(&report)).expect("JSON")["findings"][0]["severity"], "error");
    }
}
