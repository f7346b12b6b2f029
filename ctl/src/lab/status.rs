//! Status of a lab: each host's agent, subnet and containers.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use overlay_agent::model::{NetworkName, PerFamily, Subnet};
use serde::{Deserialize, Serialize};

use super::{Host, Lab, container};

/// Timeout of a status request to an agent.
const STATUS_TIMEOUT: Duration = Duration::from_secs(3);

/// Maximum number of concurrent requests to agents.
const MAX_CONCURRENT: usize = 16;

/// Status of a lab.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabStatus {
    /// Name.
    pub name: String,
    /// Directory.
    pub directory: std::path::PathBuf,
    /// URLs of etcd, inside the lab.
    pub etcd: Vec<String>,
    /// Whether etcd runs.
    pub etcd_running: bool,
    /// Hosts.
    pub hosts: Vec<HostStatus>,
}

/// Status of a host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostStatus {
    /// Name.
    pub name: String,
    /// PID of the agent, if it runs.
    pub agent_pid: Option<i32>,
    /// `ready`, `degraded`, `waiting`, `silent` (runs and does not answer) or `stopped`.
    pub agent: String,
    /// Problems that the agent reports.
    pub problems: Vec<String>,
    /// Subnet of the host.
    pub subnet: Option<Subnet>,
    /// Addresses on the underlay.
    pub addresses: PerFamily<IpAddr>,
    /// Containers, from the kernel's state.
    pub containers: Vec<ContainerStatus>,
}

/// A container of a host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Name on the host.
    pub name: String,
    /// Its network; absent if it is the default one.
    #[serde(default, skip_serializing_if = "NetworkName::is_default")]
    pub network: NetworkName,
    /// Addresses.
    pub addresses: PerFamily<IpAddr>,
}

/// Queries every agent. A failed query sets the agent's state and is no error.
pub async fn status(lab: &Lab) -> LabStatus {
    let hosts =
        stream::iter(lab.hosts()).map(|host| async move { host_status(&host).await }).buffered(MAX_CONCURRENT).collect().await;
    let etcd = super::process::ProcessId::from_pid_file(&super::etcd::pid_file(lab.dir()));
    LabStatus {
        name: lab.layout().name.to_string(),
        directory: lab.dir().to_owned(),
        etcd: lab.layout().etcd_endpoints(),
        etcd_running: etcd.is_some_and(|id| id.is_alive()),
        hosts,
    }
}

async fn host_status(host: &Host<'_>) -> HostStatus {
    let mut found = HostStatus {
        name: host.name().to_owned(),
        agent_pid: host.agent().map(|id| id.pid),
        agent: "stopped".to_owned(),
        problems: Vec::new(),
        subnet: None,
        addresses: host.layout().addresses,
        containers: Vec::new(),
    };
    match container::list_attached(host) {
        Ok(all) => {
            found.containers =
                all.into_iter().map(|f| ContainerStatus { name: f.name, network: f.network, addresses: f.addresses }).collect()
        }
        Err(error) => found.problems.push(error.to_string()),
    }
    if found.agent_pid.is_none() {
        return found;
    }
    let client = host.client().with_timeout(STATUS_TIMEOUT);
    match client.status().await {
        Err(error) => {
            found.agent = "silent".to_owned();
            found.problems.push(error.to_string());
        }
        Ok(status) => {
            found.agent = match (status.ready, status.problems.is_empty()) {
                (true, true) => "ready",
                (true, false) => "degraded",
                (false, _) => "waiting",
            }
            .to_owned();
            found.problems.extend(status.problems);
            found.subnet = status.lease.map(|lease| lease.subnet);
            let joined = client.networks().await.map(|all| all.networks).unwrap_or_default();
            let waiting = joined.iter().filter(|network| !network.ready && !network.name.is_default());
            found.problems.extend(waiting.map(|network| format!("network {} is not ready", network.name)));
        }
    }
    found
}
