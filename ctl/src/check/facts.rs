//! Input of the checks: the agent's answers, the kernel's tables as iproute2 prints them, files. No evaluation here.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use overlay_agent::model::api::{NetworkView, PeerEntry, Status};
use overlay_agent::model::network::Pool;
use overlay_agent::model::{Family, PerFamily};
use overlay_agent::plan::backend::{self, Backend, Tunnel};
use serde_json::Value;

use super::Findings;
use crate::client::Client;
use crate::etcd::EtcdArgs;

/// Timeout of an external program.
const TOOL_TIMEOUT: Duration = Duration::from_secs(20);

/// Settings of a diagnosis.
#[derive(Debug)]
pub struct Settings {
    /// Client of the agent.
    pub client: Client,
    /// Access to etcd, if it differs from the agent's.
    pub etcd: EtcdArgs,
    /// State directory of the agent.
    pub state_dir: PathBuf,
    /// Directory that contains `/run` and `/etc`: `/`, except in tests.
    pub root: PathBuf,
    /// Maximum number of peers to probe.
    pub peers: usize,
}

/// State of this host.
#[derive(Debug)]
pub struct Facts {
    pub(super) settings: Settings,
    pub(super) status: Result<Status, String>,
    pub(super) peers: Vec<PeerEntry>,
    pub(super) network: Option<NetworkView>,
    /// Output of `ip -j -d link`; `None` if it cannot be read.
    pub(super) links: Option<Vec<Value>>,
}

/// Failure of an external program.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum ToolError {
    /// The program is not installed.
    #[error("{0} is not installed")]
    Missing(String),
    /// The program failed.
    #[error("`{command}` failed: {reason}")]
    Failed { command: String, reason: String },
}

impl Facts {
    /// Reads the agent's answers and the kernel's links.
    pub async fn gather(settings: Settings) -> Facts {
        let client = settings.client.clone().with_timeout(TOOL_TIMEOUT);
        let status = client.status().await.map_err(|error| error.to_string());
        let (peers, network) = match &status {
            Ok(_) => (client.peers().await.map(|all| all.peers).unwrap_or_default(), client.network().await.ok()),
            Err(_) => (Vec::new(), None),
        };
        let links = run_tool_json(&["ip", "-j", "-d", "link", "show"]).await.ok();
        Facts { settings, status, peers, network, links }
    }

    /// The agent's status, if it answered.
    pub(super) fn status(&self) -> Option<&Status> {
        self.status.as_ref().ok()
    }

    /// Overlay pool of each family.
    pub(super) fn pools(&self) -> PerFamily<Pool> {
        self.status().and_then(|status| status.network.as_ref()).map(|network| network.pools).unwrap_or_default()
    }

    /// The network's backend.
    pub(super) fn backend(&self) -> Option<&dyn Backend> {
        Some(backend::of(self.status()?.network.as_ref()?))
    }

    /// The tunnel between hosts.
    pub(super) fn tunnel(&self) -> Option<Tunnel> {
        self.backend()?.tunnel()
    }

    /// Names of the links that match the predicate.
    pub(super) fn link_names(&self, predicate: impl Fn(&str) -> bool) -> Vec<String> {
        let names = self.links.iter().flatten().filter_map(|link| link["ifname"].as_str());
        names.filter(|name| predicate(name)).map(str::to_owned).collect()
    }

    /// Finds a link by name.
    pub(super) fn link(&self, name: &str) -> Option<&Value> {
        self.links.iter().flatten().find(|link| link["ifname"] == name)
    }

    /// Path of a system file below the root.
    pub(super) fn path(&self, absolute: &str) -> PathBuf {
        self.settings.root.join(absolute.trim_start_matches('/'))
    }

    /// Families that have a tunnel device of the agent.
    pub(super) fn families(&self) -> Vec<Family> {
        let has = |prefix: &str| !self.link_names(|name| is_tunnel(name) && name.starts_with(prefix)).is_empty();
        [(Family::V4, "ovx."), (Family::V6, "ovx6.")].into_iter().filter(|(_, p)| has(p)).map(|(family, _)| family).collect()
    }
}

/// Reads a column of a file below `/proc/net/stat`: one value per processor. Empty if the file is absent: only the initial
/// network namespace shows it, with the values of all.
pub(crate) fn read_net_stat(file: &str, column: &str) -> Vec<u64> {
    let text = std::fs::read_to_string(Path::new("/proc/net/stat").join(file)).unwrap_or_default();
    let mut lines = text.lines();
    let column_index = lines.next().and_then(|header| header.split_ascii_whitespace().position(|name| name == column));
    let value = |line: &str| u64::from_str_radix(line.split_ascii_whitespace().nth(column_index?)?, 16).ok();
    lines.filter_map(value).collect()
}

/// Whether the name is that of one of the agent's VXLAN devices.
pub(super) fn is_tunnel(name: &str) -> bool {
    name.starts_with("ovx.") || name.starts_with("ovx6.")
}

/// Whether the name is that of one of the agent's links.
pub(super) fn is_overlay_link(name: &str) -> bool {
    is_tunnel(name) || name.starts_with("ovb.") || name.starts_with("ove")
}

/// Runs a program and returns its output.
pub(super) async fn run_tool(command: &[&str]) -> Result<String, ToolError> {
    run_tool_with_timeout(command, TOOL_TIMEOUT).await
}

/// Runs a program with another timeout.
pub(super) async fn run_tool_with_timeout(command: &[&str], limit: Duration) -> Result<String, ToolError> {
    let Some((program, arguments)) = command.split_first() else { return Ok(String::new()) };
    let failed = |reason: String| ToolError::Failed { command: command.join(" "), reason };
    let mut child = tokio::process::Command::new(program);
    child.args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
    // The PATH of an unprivileged shell lacks the sbin directories.
    let path = std::env::var("PATH").unwrap_or_default();
    child.env("PATH", format!("{path}:/usr/sbin:/sbin:/usr/bin:/bin"));
    match tokio::time::timeout(limit, child.output()).await {
        Err(_) => Err(failed(format!("not finished within {} s", limit.as_secs()))),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => Err(ToolError::Missing((*program).to_owned())),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Ok(Ok(output)) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(Ok(output)) => {
            let stream = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
            let text = String::from_utf8_lossy(stream);
            Err(failed(text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no error output").trim().to_owned()))
        }
    }
}

/// Runs a program and parses its output as a JSON list; empty for empty output.
pub(super) async fn run_tool_json(command: &[&str]) -> Result<Vec<Value>, ToolError> {
    let text = run_tool(command).await?;
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let reason = |error: serde_json::Error| ToolError::Failed { command: command.join(" "), reason: error.to_string() };
    serde_json::from_str(&text).map_err(reason)
}

/// Adds information about a check that could not run.
pub(super) fn report_unchecked(findings: &mut Findings, unchecked: &str, error: &ToolError) {
    let remedy = match error {
        ToolError::Missing(program) => match debian_package(program) {
            Some(package) => format!("install it, then repeat the check: apt-get install {package}"),
            None => "install it, then repeat the check".to_owned(),
        },
        ToolError::Failed { .. } => "run this as root".to_owned(),
    };
    findings.info(format!("not checked: {unchecked}"), vec![error.to_string()], remedy);
}

/// Debian package of a program.
fn debian_package(program: &str) -> Option<&'static str> {
    Some(match program {
        "ip" | "bridge" => "iproute2",
        "nft" => "nftables",
        "ping" => "iputils-ping",
        "unshare" => "util-linux",
        name if name.starts_with("iptables") || name.starts_with("ip6tables") => "iptables",
        _ => return None,
    })
}

/// Reads a file's first line, trimmed.
pub(super) fn first_line(path: &Path) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.lines().next()?.trim().to_owned())
}

/// Reads a sysctl below `/proc/sys/net` of this namespace.
pub(super) fn sysctl(path: &str) -> Option<String> {
    first_line(&Path::new("/proc/sys/net").join(path))
}
