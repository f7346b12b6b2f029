//! `overlayctl config`: the network configuration in etcd.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use overlay_agent::model::network::{ConfigErrors, FieldError, NetworkConfig, ParsedConfig, Pool};
use overlay_agent::plan::backend;
use serde::Serialize;

use super::{CommandError, Context, Outcome};
use crate::etcd::EtcdArgs;
use crate::output::{Style, Tone, View};

/// Largest configuration file, in bytes; etcd's own limit for a request is 1.5 MiB.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Timeout of the request for the agent's etcd endpoints.
const AGENT_TIMEOUT: Duration = Duration::from_secs(3);

/// The arguments.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Default of --etcd-endpoints: the servers of this host's agent, else http://127.0.0.1:2379.")]
pub enum Args {
    /// Print the configuration
    Show {
        /// Access to etcd
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// Check a configuration and write it to etcd; an invalid one is rejected with all its errors
    Set {
        /// File with the JSON; `-` is standard input
        file: PathBuf,
        /// Access to etcd
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// Check a configuration without writing it
    Validate {
        /// File with the JSON; `-` is standard input
        file: PathBuf,
    },
}

/// Shows, sets or validates the configuration.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    match args {
        Args::Show { etcd } => show(context, &resolve_endpoints(context, etcd).await).await,
        Args::Set { file, etcd } => set(context, file, &resolve_endpoints(context, etcd).await).await,
        Args::Validate { file } => validate(context, file),
    }
}

/// Completes the etcd flags from this host's agent if they name no server. The agent does not reveal certificates and login:
/// those flags are still needed.
pub(super) async fn resolve_endpoints(context: &Context, etcd: &EtcdArgs) -> EtcdArgs {
    if etcd.is_given() {
        return etcd.clone();
    }
    match context.client.clone().with_timeout(AGENT_TIMEOUT).status().await {
        Ok(status) => EtcdArgs { endpoints: status.store.endpoints, prefix: status.store.prefix, ..etcd.clone() },
        Err(_) => etcd.clone(),
    }
}

async fn show(context: &Context, etcd: &EtcdArgs) -> Result<Outcome, CommandError> {
    let Some(stored) = etcd.read_config().await? else {
        eprintln!("overlayctl: no configuration at {}; write one: overlayctl config set FILE", etcd.config_key());
        return Ok(Outcome::Negative);
    };
    let outcome = match NetworkConfig::parse(&stored.text) {
        Ok(parsed) => {
            print_warnings(&parsed.warnings);
            Outcome::Ok
        }
        Err(errors) => {
            print_errors(&etcd.config_key(), &errors);
            Outcome::Negative
        }
    };
    match serde_json::from_str::<serde_json::Value>(&stored.text) {
        Ok(json) => context.printer.print(&Document(json))?,
        // Not JSON: prints the text unchanged, so that it can be corrected.
        Err(_) => context.printer.print_line(&stored.text)?,
    }
    Ok(outcome)
}

async fn set(context: &Context, file: &Path, etcd: &EtcdArgs) -> Result<Outcome, CommandError> {
    let text = read_file(file)?;
    let parsed = match NetworkConfig::parse(&text) {
        Ok(parsed) => parsed,
        Err(errors) => {
            print_errors(&file.display().to_string(), &errors);
            eprintln!("overlayctl: nothing was written");
            return Ok(Outcome::Negative);
        }
    };
    print_warnings(&parsed.warnings);
    let before = etcd.read_config().await?;
    if before.as_ref().is_some_and(|b| b.text == text) {
        context.printer.print(&SetView { key: etcd.config_key(), changed: false, before: None, now: summary(&parsed.config) })?;
        return Ok(Outcome::Ok);
    }
    etcd.put_config(&text, before.as_ref()).await?;
    let before = before.map(|b| b.text);
    context.printer.print(&SetView { key: etcd.config_key(), changed: true, before, now: summary(&parsed.config) })?;
    Ok(Outcome::Ok)
}

fn validate(context: &Context, file: &Path) -> Result<Outcome, CommandError> {
    let result = NetworkConfig::parse(&read_file(file)?);
    let view = match result {
        Ok(ParsedConfig { config, warnings }) => ValidateView { valid: true, errors: Vec::new(), warnings, config: Some(config) },
        Err(ConfigErrors(errors)) => ValidateView { valid: false, errors, warnings: Vec::new(), config: None },
    };
    context.printer.print(&view)?;
    if !view.valid {
        eprintln!("overlayctl: {} is not valid", file.display());
    }
    Ok(if view.valid { Outcome::Ok } else { Outcome::Negative })
}

fn read_file(file: &Path) -> Result<String, CommandError> {
    let error = |source| CommandError::Read { path: file.to_owned(), source };
    let mut text = String::new();
    let length = if file == Path::new("-") {
        std::io::stdin().lock().take(MAX_FILE_BYTES + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).map_err(error)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)
    };
    let length = length.map_err(error)?;
    if u64::try_from(length).unwrap_or(u64::MAX) > MAX_FILE_BYTES {
        return Err(error(std::io::Error::other(format!("larger than the limit of {MAX_FILE_BYTES} bytes"))));
    }
    Ok(text)
}

pub(super) fn print_warnings(warnings: &[FieldError]) {
    let style = Style::for_stream(&std::io::stderr());
    for warning in warnings {
        eprintln!("{} {} {}", style.paint(Tone::Warning, "warning:"), warning.field, warning.rule);
    }
}

pub(super) fn print_errors(location: &str, errors: &ConfigErrors) {
    let style = Style::for_stream(&std::io::stderr());
    for error in &errors.0 {
        eprintln!("{} {location}: {error}", style.paint(Tone::Bad, "error:"));
    }
}

/// Describes a pool on one line.
fn pool_line(pool: &Pool) -> String {
    format!("{}: {} subnets of /{}, {} to {}", pool.network, pool.count(), pool.subnet_length, pool.min.base(), pool.max.base())
}

pub(super) fn summary(config: &NetworkConfig) -> Vec<String> {
    let mut lines: Vec<String> = config.pools.iter().map(|(_, pool)| pool_line(pool)).collect();
    let backend = backend::of(config);
    let port = backend.tunnel().map(|tunnel| format!(", UDP port {}", tunnel.port));
    let mtu = backend.underlay_mtu().map(|mtu| format!(", underlay MTU {mtu}"));
    lines.push([Some(backend.label()), port, mtu].into_iter().flatten().collect());
    lines
}

#[derive(Serialize)]
#[serde(transparent)]
struct Document(serde_json::Value);

impl View for Document {
    fn text(&self, _style: Style, _wide: bool) -> String {
        serde_json::to_string_pretty(&self.0).unwrap_or_default()
    }
}

#[derive(Serialize)]
pub(super) struct SetView {
    pub(super) key: String,
    pub(super) changed: bool,
    pub(super) before: Option<String>,
    pub(super) now: Vec<String>,
}

impl View for SetView {
    fn text(&self, style: Style, _wide: bool) -> String {
        let mut lines = match (self.changed, &self.before) {
            (false, _) => vec![format!("{}: nothing to change", self.key)],
            (true, None) => vec![format!("{}: written; there was none before", self.key)],
            (true, Some(before)) => {
                let mut lines = vec![format!("{}: written; before it was", self.key)];
                lines.extend(before.trim_end().lines().map(|l| format!("  {}", style.paint(Tone::Quiet, l))));
                lines
            }
        };
        lines.extend(self.now.iter().map(|l| format!("  {l}")));
        lines.join("\n")
    }
}

#[derive(Serialize)]
struct ValidateView {
    valid: bool,
    errors: Vec<FieldError>,
    warnings: Vec<FieldError>,
    config: Option<NetworkConfig>,
}

impl View for ValidateView {
    fn text(&self, style: Style, _wide: bool) -> String {
        let mut lines: Vec<String> = Vec::new();
        lines.extend(self.errors.iter().map(|e| format!("{} {e}", style.paint(Tone::Bad, "error:"))));
        lines.extend(self.warnings.iter().map(|w| format!("{} {} {}", style.paint(Tone::Warning, "warning:"), w.field, w.rule)));
        if let Some(config) = &self.config {
            lines.push(style.paint(Tone::Good, "valid"));
            lines.extend(summary(config).iter().map(|l| format!("  {l}")));
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(json: &str) -> String {
        let view = match NetworkConfig::parse(json) {
            Ok(ParsedConfig { config, warnings }) => {
                ValidateView { valid: true, errors: Vec::new(), warnings, config: Some(config) }
            }
            Err(ConfigErrors(errors)) => ValidateView { valid: false, errors, warnings: Vec::new(), config: None },
        };
        view.text(Style::PLAIN, false)
    }

    #[test]
    fn every_error_is_listed() {
        let all = text(r#"{"Network":"10.0.0.1/16","Backend":{"VNI":"x"}}"#);
        assert_eq!(all.lines().count(), 2, "{all}");
        assert!(all.contains("the network of that length is 10.0.0.0/16"), "{all}");
    }

    #[test]
    fn valid_configuration_is_summarised() {
        assert_eq!(
            text(r#"{"Network":"10.244.0.0/16","Netwrk":1}"#),
            "warning: Netwrk is an unknown field, ignored\nvalid\n  10.244.0.0/16: 255 subnets of /24, 10.244.1.0 to 10.244.255.0\n  VXLAN VNI 1, UDP port 8472"
        );
    }
}
