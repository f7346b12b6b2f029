//! What is collected: commands, files, and the agent's answers. None of them may hold the archive up: each has its time.

use std::path::{Path, PathBuf};
use std::time::Duration;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Endpoint;
use serde::Serialize;

use super::Part;
use crate::client::{Client, ClientError};

/// How long one command may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the agent may take for one answer.
const AGENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Containers whose namespaces are looked into: enough to compare, and not a thousand.
const MAX_CONTAINERS: usize = 32;

/// Where a host's things are.
#[derive(Debug, Clone)]
pub struct HostPaths {
    /// The agent's configuration file.
    pub config: PathBuf,
    /// Its state directory.
    pub state_dir: PathBuf,
    /// Its run directory.
    pub run_dir: PathBuf,
    /// Logs that are files, where the agent is not under systemd.
    pub logs: Vec<PathBuf>,
    /// How far back the journal is read, as journalctl has it.
    pub since: String,
}

/// One thing to collect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A command's output.
    Command(Vec<String>),
    /// The same inside a container's namespace.
    NetnsCommand(PathBuf, Vec<String>),
    /// A file.
    File(PathBuf),
    /// An answer of the agent.
    Agent(AgentQuery),
}

/// Which answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentQuery {
    /// `GET /v1/map_status`, and so on.
    Status,
    /// Every lease.
    Subnets,
    /// How each peer is reached.
    Peers,
    /// Containers.
    Endpoints,
    /// The network with what the kernel holds.
    Network,
    /// How peers are reached.
    Mesh,
    /// The numbers.
    Metrics,
}

/// Commands, by the name of their output. The kernel is asked as an operator would ask it: whoever reads the archive knows these by heart.
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

/// All that is collected, in this order. `endpoint_count` are the host's containers, as far as they are known.
pub fn all(paths: &HostPaths, endpoints: &[Endpoint]) -> Vec<(String, Source)> {
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mut all: Vec<(String, Source)> = Vec::new();
    all.extend(AGENT_QUERIES.map(|(name, answer)| (name.to_owned(), Source::Agent(answer))));
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

/// Collects one.
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
        Source::Agent(answer) => (format!("the agent at {}", client.socket().display()), query_agent(*answer, client).await),
    };
    Part { name, from, content }
}

async fn query_agent(answer: AgentQuery, client: &Client) -> Result<String, String> {
    fn text<T: Serialize>(answer: Result<T, ClientError>) -> Result<String, String> {
        let answer = answer.map_err(|error| error.to_string())?;
        serde_json::to_string_pretty(&answer).map_err(|error| error.to_string())
    }
    let client = client.clone().with_timeout(AGENT_TIMEOUT);
    match answer {
        AgentQuery::Status => text(client.status().await),
        AgentQuery::Subnets => text(client.subnets().await),
        AgentQuery::Peers => text(client.peers().await),
        AgentQuery::Endpoints => text(client.endpoints().await),
        AgentQuery::Network => text(client.network().await),
        AgentQuery::Mesh => text(client.mesh().await),
        AgentQuery::Metrics => client.metrics().await.map_err(|error| error.to_string()),
    }
}

/// A command's output, what it says on standard error behind it.
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
            // The runtime is that of this thread; a thread of another namespace borrows it.
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
        Err(_) => return Err(format!("not within {} s", COMMAND_TIMEOUT.as_secs())),
    };
    let lossy_text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if !output.status.success() && output.stdout.is_empty() {
        let words = lossy_text(&output.stderr);
        return Err(format!("{}: {}", output.status, words.lines().next().unwrap_or("nothing said")));
    }
    let mut text = lossy_text(&output.stdout);
    if !output.stderr.is_empty() {
        text.push_str("\n--- standard error\n");
        text.push_str(&lossy_text(&output.stderr));
    }
    Ok(text)
}
