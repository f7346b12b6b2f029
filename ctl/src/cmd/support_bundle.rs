//! `overlayctl support-bundle`: one archive with the data that support needs, without secrets.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use overlay_agent::kernel::netns::Netns;
use serde::Serialize;

use super::{CommandError, Context, Outcome};
use crate::bundle::redact::{Redactor, known_secrets};
use crate::bundle::sources::{self, HostPaths};
use crate::bundle::{Archive, Bundle, Part, contents};
use crate::output::{Style, Tone, View};
use crate::trace::TraceError;
use crate::trace::namespace_view::NamespaceView;
use crate::trace::targets::Inventory;

/// Timeout of the request for the agent's containers.
const AGENT_TIMEOUT: Duration = Duration::from_secs(3);
/// Directory of the service's secrets.
const CREDENTIALS_DIR: &str = "credentials";
/// Width of the progress bar, in cells.
const BAR_WIDTH: usize = 30;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// New archive file [default: overlay-support-HOST-TIME.tar.gz in the working directory]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Configuration file of the agent
    #[arg(long, value_name = "FILE", env = "OVERLAYD_CONFIG", default_value = "/etc/overlayd/overlayd.toml")]
    config: PathBuf,
    /// State directory of the agent
    #[arg(long, value_name = "DIR", env = "OVERLAYD_STATE_DIR", default_value = "/var/lib/overlayd")]
    state_dir: PathBuf,
    /// Log file to include, if the agent does not log to the journal; repeatable
    #[arg(long, value_name = "FILE")]
    log: Vec<PathBuf>,
    /// Start of the journal extract, in journalctl's syntax
    #[arg(long, value_name = "TIME", default_value = "-24h")]
    since: String,
}

/// Writes the archive and prints its contents.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let now = SystemTime::now();
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "host".to_owned());
    let stamp: String = humantime::format_rfc3339_seconds(now).to_string().chars().filter(|c| !matches!(c, '-' | ':')).collect();
    let top = format!("overlay-support-{host}-{stamp}");
    let path = args.out.clone().unwrap_or_else(|| PathBuf::from(format!("{top}.tar.gz")));
    let run_dir = context.client.socket().parent().unwrap_or(Path::new("/run/overlayd")).to_owned();
    let paths = HostPaths {
        config: args.config.clone(),
        state_dir: args.state_dir.clone(),
        run_dir,
        logs: args.log.clone(),
        since: args.since.clone(),
    };
    let endpoints = match context.client.clone().with_timeout(AGENT_TIMEOUT).endpoints().await {
        Ok(answer) => answer.endpoints,
        Err(_) => Inventory::from_state(&args.state_dir).endpoints,
    };
    let at = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let mut archive = Archive::create(&path, &top, at, Redactor::new(secrets(&args.config)))?;
    let version = format!("overlayctl {}\nmade {}\n", env!("CARGO_PKG_VERSION"), humantime::format_rfc3339_seconds(now));
    archive.add(Part { name: "versions/overlayctl.txt".to_owned(), from: "this program".to_owned(), content: Ok(version) })?;
    let networks = Netns::current().map_err(TraceError::from).and_then(|host| NamespaceView::of_networks(&host));
    let networks = networks.unwrap_or_default().into_iter();
    let networks: Vec<(String, PathBuf)> = networks.map(|network| (network.network, network.netns.path().to_owned())).collect();
    let all = sources::all(&paths, &endpoints, &networks);
    let progress = Progress::new(all.len());
    for (number, (name, source)) in all.iter().enumerate() {
        progress.show(number, name);
        archive.add(sources::collect(name.clone(), source, &context.client).await)?;
    }
    progress.clear();
    let bundle = archive.finish()?;
    context.printer.print(&BundleView(&bundle))?;
    Ok(Outcome::Ok)
}

/// Reads the known secrets: the password file that the configuration or the environment names, and the service's credentials.
fn secrets(config: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(config).unwrap_or_default();
    let credentials = config.parent().unwrap_or(Path::new("/etc/overlayd")).join(CREDENTIALS_DIR);
    let line = text.lines().map(str::trim).find_map(|line| line.strip_prefix("etcd-password-file"));
    let value = line.and_then(|rest| Some(rest.trim_start().strip_prefix('=')?.trim().trim_matches(['"', '\''])));
    let mut files: Vec<PathBuf> = value.map(|name| credentials.join(name)).into_iter().collect();
    files.extend(std::env::var_os("OVERLAYD_ETCD_PASSWORD_FILE").map(PathBuf::from));
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let mut all = known_secrets(&files, &credentials);
    all.extend(
        std::env::vars()
            .filter(|(name, _)| name.to_ascii_uppercase().contains("PASSWORD") && !name.ends_with("FILE"))
            .map(|(_, v)| v),
    );
    all
}

/// Progress bar on standard error, if that is a terminal.
struct Progress {
    total: usize,
    is_terminal: bool,
}

impl Progress {
    fn new(total: usize) -> Progress {
        Progress { total, is_terminal: std::io::stderr().is_terminal() }
    }

    fn show(&self, done: usize, label: &str) {
        if self.is_terminal {
            // A closed standard error must not stop the command.
            let _ = write!(std::io::stderr(), "\r\u{1b}[K{}", bar(done, self.total, label));
        }
    }

    fn clear(&self) {
        if self.is_terminal {
            let _ = write!(std::io::stderr(), "\r\u{1b}[K");
        }
    }
}

fn bar(done: usize, total: usize, label: &str) -> String {
    let filled = (BAR_WIDTH * done).checked_div(total).unwrap_or(BAR_WIDTH);
    format!("[{}{}] {done}/{total} {label}", "#".repeat(filled), ".".repeat(BAR_WIDTH - filled))
}

#[derive(Serialize)]
#[serde(transparent)]
struct BundleView<'a>(&'a Bundle);

impl View for BundleView<'_> {
    fn text(&self, style: Style, _wide: bool) -> String {
        let bundle = self.0;
        let removed: usize = bundle.entries.iter().map(|entry| entry.removed).sum();
        let head = format!("{}: {} bytes, {removed} secrets removed", bundle.file.display(), bundle.bytes);
        let advice = "Review it before you share it: it contains addresses, names and log lines of this host.";
        format!("{}\n\n{}\n{advice}", contents(&bundle.entries), style.paint(Tone::Good, &head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_bar_fills() {
        assert_eq!(bar(0, 4, "x"), format!("[{}] 0/4 x", ".".repeat(BAR_WIDTH)));
        assert_eq!(bar(4, 4, "x"), format!("[{}] 4/4 x", "#".repeat(BAR_WIDTH)));
        assert_eq!(bar(0, 0, "x").len(), bar(4, 4, "x").len());
    }

    #[test]
    fn secret_files_are_collected() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = dir.path().join("overlayd.toml");
        std::fs::create_dir(dir.path().join(CREDENTIALS_DIR)).expect("made");
        std::fs::write(dir.path().join(CREDENTIALS_DIR).join("other"), "in-credentials\n").expect("written");
        std::fs::write(dir.path().join("pw"), "by-its-path\n").expect("written");
        std::fs::write(&config, format!("etcd-password-file = \"{}\"\n", dir.path().join("pw").display())).expect("written");
        let found = secrets(&config);
        assert!(found.contains(&"by-its-path".to_owned()) && found.contains(&"in-credentials".to_owned()), "{found:?}");
    }
}
