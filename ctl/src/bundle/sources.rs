//! Sources of the archive's parts: commands, files, and the agent's answers. Each has a timeout, so that none blocks the archive.

use std::path::{Path, PathBuf};
use std::time::Duration;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Endpoint;
use serde::Serialize;

use super::Part;
use crate::client::{Client, ClientError};

/// Timeout of a command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(15);
/// Timeout of a request to the agent.
const AGENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of containers whose namespaces are read: enough to compare.
const MAX_CONTAINERS: usize = 32;
/// Maximum number of isolated networks whose namespaces are read.
const MAX_NETWORKS: usize = 32;

/// Paths of a host's files.
#[derive(Debug, Clone)]
pub struct HostPaths {
    /// Configuration file of the agent.
    pub config: PathBuf,
    /// State directory of the agent.
    pub state_dir: PathBuf,
    /// Run directory of the agent.
    pub run_dir: PathBuf,
    /// Log files, if the agent does not log to the journal.
    pub logs: Vec<PathBuf>,
    /// Start of the journal extract, in journalctl's syntax.
    pub since: String,
}

/// Source of one part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Output of a command.
    Command(Vec<String>),
    /// Output of a command inside a container's or an isolated network's namespace.
    NetnsCommand(PathBuf, Vec<String>),
    /// Contents of a file.
    File(PathBuf),
    /// Answer of the agent.
    Agent(AgentQuery),
}

/// Request to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentQuery {
    /// `GET /v1/status`, and so on.
    Status,
    /// Leases.
    Subnets,
    /// Peers.
    Peers,
    /// Containers.
    Endpoints,
    /// Network, with the kernel's state.
    Network,
    /// Reachability of the peers.
    Mesh,
    /// Metrics.
    Metrics,
}

/// Commands, by the name of their output. An operator would run the same commands, so readers know their output.
const COMMANDS: [(&str, &str); 22] = [
    ("versions/kernel.txt", "uname -a"),
    ("versions/tools.txt", "ip -V"),
    ("versions/nft.txt", "nft --version"),
    ("kernel/links.txt", "ip -d -s link show"),
    ("kernel/addresses.txt", "ip -d address show"),
    ("kernel/routes4.txt", "ip -4 -d route show table all"),
    ("kernel/routes6.txt", "ip -6 -d route show table all"),
    ("kernel/rules4.txt", "ip -4 rule show"),
    ("kernel/rules6.txt", "ip -6 rule show"),
    ("kernel/nexthops.txt", "ip -d nexthop show"),
    ("kernel/neighbours.txt", "ip -d -s neigh show"),
    ("kernel/fdb.txt", "bridge -d fdb show"),
    ("kernel/bridge.txt", "bridge -d link show"),
    ("kernel/nftables.txt", "nft -a list ruleset"),
    ("kernel/iptables-legacy.txt", "iptables-legacy-save"),
    ("kernel/sockets.txt", "ss -lntu"),
    (
        "kernel/sysctl-net.txt",
        "sysctl -a -r ^net\\.(ipv[46]\\.(ip_forward|conf)|bridge|netfilter\\.nf_conntrack_(count|max)|core\\.(wmem|rmem))",
    ),
    ("kernel/namespaces.txt", "ip netns list"),
    ("systemd/overlayd.service.txt", "systemctl cat overlayd.service overlayd.socket"),
    ("systemd/status.txt", "systemctl --no-pager --lines=0 status overlayd.service overlayd.socket"),
    ("kernel/modules.txt", "lsmod"),
    ("kernel/time.txt", "date -u +%FT%TZ"),
];

/// Files, by the name of their copy.
const FILES: [(&str, &str); 4] = [
    ("versions/os-release.txt", "/etc/os-release"),
    ("kernel/snmp.txt", "/proc/net/snmp"),
    ("kernel/netstat.txt", "/proc/net/netstat"),
    ("kernel/softnet.txt", "/proc/net/softnet_stat"),
];

const AGENT_QUERIES: [(&str, AgentQuery); 7] = [
    ("agent/status.json", AgentQuery::Status),
    ("agent/subnets.json", AgentQuery::Subnets),
    ("agent/peers.json", AgentQuery::Peers),
    ("agent/endpoints.json", AgentQuery::Endpoints),
    ("agent/network.json", AgentQuery::Network),
    ("agent/mesh.json", AgentQuery::Mesh),
    ("agent/metrics.txt", AgentQuery::Metrics),
];

/// Commands for the namespace of an isolated network: those of the host's about the kernel's network state.
fn is_namespace_command(name: &str) -> bool {
    let file = name.strip_prefix("kernel/").and_then(|file| file.split_once('.')).map(|(file, _)| file);
    let files = ["links", "addresses", "routes4", "routes6", "rules4", "rules6", "nexthops", "neighbours", "fdb", "bridge"];
    file.is_some_and(|file| files.contains(&file) || ["nftables", "sysctl-net"].contains(&file))
}

/// Lists all sources, in order. `endpoints` are the known containers of the host, `networks` the names and namespaces of its
/// isolated networks.
pub fn all(paths: &HostPaths, endpoints: &[Endpoint], networks: &[(String, PathBuf)]) -> Vec<(String, Source)> {
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mut all: Vec<(String, Source)> = Vec::new();
    all.extend(AGENT_QUERIES.map(|(name, query)| (name.to_owned(), Source::Agent(query))));
    all.push(("config/overlayd.toml".to_owned(), Source::File(paths.config.clone())));
    for name in ["state.json", "endpoints.json", "endpoints.journal", "node-id"] {
        all.push((format!("state/{name}"), Source::File(paths.state_dir.join(name))));
    }
    all.push(("run/subnet.env".to_owned(), Source::File(paths.run_dir.join("subnet.env"))));
    let journal =
        ["journalctl", "--no-pager", "-u", "overlayd", "-o", "short-iso-precise", "-n", "50000", "--since", &paths.since];
    all.push(("logs/journal.txt".to_owned(), Source::Command(journal.map(str::to_owned).to_vec())));
    for (number, log) in paths.logs.iter().enumerate() {
        all.push((format!("logs/{}.txt", number + 1), Source::File(log.clone())));
    }
    all.extend(FILES.map(|(name, path)| (name.to_owned(), Source::File(PathBuf::from(path)))));
    all.extend(COMMANDS.map(|(name, line)| (name.to_owned(), Source::Command(words(line)))));
    for (network, netns) in networks.iter().take(MAX_NETWORKS) {
        for (name, line) in COMMANDS.iter().filter(|(name, _)| is_namespace_command(name)) {
            let name = format!("networks/{network}/{}", name.trim_start_matches("kernel/"));
            all.push((name, Source::NetnsCommand(netns.clone(), words(line))));
        }
    }
    for endpoint in endpoints.iter().filter(|endpoint| endpoint.port.is_some()).take(MAX_CONTAINERS) {
        for (what, line) in
            [("address", "ip -d -s address show"), ("route", "ip route show table all"), ("neigh", "ip neigh show")]
        {
            let name = format!("containers/{}/{what}.txt", endpoint.name);
            all.push((name, Source::NetnsCommand(endpoint.netns.clone(), words(line))));
        }
    }
    all
}

/// Collects one part.
pub async fn collect(name: String, source: &Source, client: &Client) -> Part {
    let (from, content) = match source {
        Source::Command(words) => (words.join(" "), run_command(words, None).await),
        Source::NetnsCommand(netns, words) => {
            (format!("{} inside {}", words.join(" "), netns.display()), run_command(words, Some(netns)).await)
        }
        Source::File(path) => {
            let read = std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            (path.display().to_string(), read.map_err(|error| error.to_string()))
        }
        Source::Agent(query) => (format!("the agent at {}", client.socket().display()), query_agent(*query, client).await),
    };
    Part { name, from, content }
}

async fn query_agent(query: AgentQuery, client: &Client) -> Result<String, String> {
    fn text<T: Serialize>(response: Result<T, ClientError>) -> Result<String, String> {
        let response = response.map_err(|error| error.to_string())?;
        serde_json::to_string_pretty(&response).map_err(|error| error.to_string())
    }
    let client = client.clone().with_timeout(AGENT_TIMEOUT);
    match query {
        AgentQuery::Status => text(client.status().await),
        AgentQuery::Subnets => text(client.subnets().await),
        AgentQuery::Peers => text(client.peers().await),
        AgentQuery::Endpoints => text(client.endpoints().await),
        AgentQuery::Network => text(client.network().await),
        AgentQuery::Mesh => text(client.mesh().await),
        AgentQuery::Metrics => client.metrics().await.map_err(|error| error.to_string()),
    }
}

/// Runs a command. Returns its output, followed by its standard error.
async fn run_command(words: &[String], netns: Option<&Path>) -> Result<String, String> {
    let (program, arguments) = words.split_first().ok_or_else(|| "no command".to_owned())?;
    let mut command = std::process::Command::new(program);
    command.args(arguments).env("LC_ALL", "C").stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut command = tokio::process::Command::from(command);
    command.kill_on_drop(true);
    let child = match netns {
        None => command.spawn(),
        Some(path) => {
            let netns = Netns::open(path).map_err(|error| error.to_string())?;
            // A thread inside another namespace uses this thread's runtime.
            let runtime = tokio::runtime::Handle::current();
            netns
                .run(|| {
                    let _inside = runtime.enter();
                    command.spawn()
                })
                .map_err(|error| error.to_string())?
        }
    };
    let child = child.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => format!("{program} is not installed"),
        _ => error.to_string(),
    })?;
    let output = match tokio::time::timeout(COMMAND_TIMEOUT, child.wait_with_output()).await {
        Ok(output) => output.map_err(|error| error.to_string())?,
        Err(_) => return Err(format!("not finished within {} s", COMMAND_TIMEOUT.as_secs())),
    };
    let lossy_text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if !output.status.success() && output.stdout.is_empty() {
        let words = lossy_text(&output.stderr);
        return Err(format!("{}: {}", output.status, words.lines().next().unwrap_or("no error output")));
    }
    let mut text = lossy_text(&output.stdout);
    if !output.stderr.is_empty() {
        text.push_str("\n--- standard error\n");
        text.push_str(&lossy_text(&output.stderr));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_network_has_its_kernel_state() {
        let dir = PathBuf::from("/x");
        let paths =
            HostPaths { config: dir.clone(), state_dir: dir.clone(), run_dir: dir, logs: Vec::new(), since: String::new() };
        let netns = PathBuf::from("/run/netns/ov-blue");
        let all = all(&paths, &[], &[("blue".to_owned(), netns.clone())]);
        let of_network: Vec<&(String, Source)> = all.iter().filter(|(name, _)| name.starts_with("networks/blue/")).collect();
        assert_eq!(of_network.len(), 12);
        let words = ["nft", "-a", "list", "ruleset"].map(str::to_owned).to_vec();
        assert!(of_network.contains(&&("networks/blue/nftables.txt".to_owned(), Source::NetnsCommand(netns, words))));
    }
}
