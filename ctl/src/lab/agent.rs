//! Agents of a lab: their program, start and stop, and waiting for the full mesh.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use nix::sys::signal::Signal;
use overlay_agent::model::NetworkName;
use overlay_agent::model::api::Status;

use super::process::{ProcessId, TERM_GRACE, ended_error, log_tail, start, terminate_all};
use super::{Host, Lab, LabError, etcd};
use crate::client::{Client, ClientError};

/// Name of the agent's program.
const PROGRAM: &str = "overlayd";

/// Interval between status requests to an agent that is not ready.
const POLL_INTERVAL: Duration = Duration::from_millis(25);

/// Maximum number of concurrent requests to agents.
const MAX_CONCURRENT: usize = 16;

/// Finds the agent's program: the given path, `$OVERLAYD_BIN`, the one next to this program (for a test: one directory up), PATH.
pub fn find_program(given: Option<&Path>) -> Result<PathBuf, LabError> {
    let configured =
        given.map(Path::to_owned).or_else(|| std::env::var_os("OVERLAYD_BIN").filter(|v| !v.is_empty()).map(PathBuf::from));
    if let Some(path) = configured {
        let error = |source| LabError::File { action: "find the agent", path: path.clone(), source };
        let absolute = std::path::absolute(&path).map_err(error)?;
        return if absolute.is_file() { Ok(absolute) } else { Err(error(std::io::ErrorKind::NotFound.into())) };
    }
    let own = std::env::current_exe().ok();
    let sibling = own.iter().flat_map(|p| p.ancestors().skip(1).take(2)).map(|dir| dir.join(PROGRAM)).find(|p| p.is_file());
    sibling.or_else(|| etcd::find_in_path(PROGRAM)).ok_or_else(|| LabError::Program {
        program: PROGRAM.to_owned(),
        remedy: "build it (cargo build -p overlay-agent), or set its path: --overlayd PATH or OVERLAYD_BIN".to_owned(),
    })
}

/// PID file of a host's agent.
pub fn pid_file(lab_dir: &Path, host: &str) -> PathBuf {
    lab_dir.join(host).join("overlayd.pid")
}

/// Builds the command line of a host's agent.
fn command(host: &Host<'_>, program: &Path, extra_args: &[&str]) -> Command {
    let layout = host.lab().layout();
    let mut command = Command::new(program);
    // The settings of the caller's own agent must not reach the lab's.
    for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("OVERLAYD_")) {
        command.env_remove(name);
    }
    // Nor the machine's configuration file.
    command.args(["--config", "/dev/null"]);
    command.arg("--run-dir").arg(host.run_dir()).arg("--state-dir").arg(host.state_dir());
    command.args(["--node-name", host.name(), "--etcd-endpoints", &layout.etcd_endpoints().join(",")]);
    command.args(["--etcd-prefix", super::layout::ETCD_PREFIX]);
    // All hosts of the lab share /run/netns. A variable, which an earlier version of the agent ignores.
    command.env("OVERLAYD_NETNS_PREFIX", format!("{}.", layout.namespace(host.name())));
    command.args(&layout.agent_args).args(extra_args);
    command
}

impl Host<'_> {
    /// Process of the agent, if it runs.
    pub fn agent(&self) -> Option<ProcessId> {
        ProcessId::from_pid_file(&pid_file(self.lab().dir(), self.name())).filter(ProcessId::is_alive)
    }

    /// Starts the agent, with flags in addition to the lab's. An agent that runs already is left unchanged. Does not wait until
    /// it is ready.
    pub fn agent_start(&self, flags: &[&str]) -> Result<ProcessId, LabError> {
        if let Some(running) = self.agent() {
            return Ok(running);
        }
        let program = match &self.lab().layout().overlayd {
            Some(program) => program.clone(),
            None => find_program(None)?,
        };
        for dir in [self.run_dir(), self.state_dir()] {
            fs::create_dir_all(&dir).map_err(|source| LabError::File { action: "make", path: dir, source })?;
        }
        let command = command(self, &program, flags);
        start(command, Some(&self.netns()?), &self.log(), &pid_file(self.lab().dir(), self.name()))
    }

    /// Sends the agent a signal and waits for its end. After five seconds it kills the agent, and returns an error. Blocks.
    pub fn agent_stop(&self, signal: Signal) -> Result<(), LabError> {
        let Some(running) = self.agent() else { return Ok(()) };
        let timed_out = |detail: String| LabError::TimedOut {
            what: format!("overlayd of {} does not end on {signal}", self.name()),
            limit: TERM_GRACE,
            detail,
        };
        running.signal(signal).map_err(|errno| timed_out(errno.desc().to_owned()))?;
        if running.wait(TERM_GRACE) {
            return Ok(());
        }
        let tail = log_tail(&self.log());
        let failures = terminate_all(&[running], Duration::ZERO);
        Err(timed_out(format!(
            "killed{}; the end of its log:\n{tail}",
            failures.iter().map(|l| format!(", {l}")).collect::<String>()
        )))
    }

    /// Waits until the agent is ready.
    pub async fn wait_ready(&self, limit: Duration) -> Result<Status, LabError> {
        let context = format!("{} is not ready", self.name());
        wait_status(self, &self.client(), |status| status.ready, Instant::now() + limit, limit, &context).await
    }

    /// Waits until the host is ready in a network, with that number of peers.
    pub async fn wait_ready_in(&self, network: &NetworkName, peers: usize, limit: Duration) -> Result<Status, LabError> {
        let context = format!("{} is not ready with {peers} peers in network {network}", self.name());
        let is_ready = |status: &Status| status.ready && status.data_path.peers == peers;
        wait_status(self, &self.client_of(network), is_ready, Instant::now() + limit, limit, &context).await
    }

    /// Waits until the agent's status fulfils a condition; `what` names the unmet condition in the error.
    pub async fn wait_status(
        &self,
        limit: Duration,
        context: &str,
        predicate: impl Fn(&Status) -> bool,
    ) -> Result<Status, LabError> {
        wait_status(self, &self.client(), predicate, Instant::now() + limit, limit, context).await
    }
}

/// Waits until every agent is ready and has routes to all others.
pub async fn wait_mesh(lab: &Lab, limit: Duration) -> Result<(), LabError> {
    wait_mesh_of(lab, &NetworkName::default(), limit).await
}

/// Waits until every host is ready in a network and has routes to all others.
pub async fn wait_mesh_of(lab: &Lab, network: &NetworkName, limit: Duration) -> Result<(), LabError> {
    let families = lab.layout().families().count();
    let peers = lab.layout().hosts.len() - 1;
    let end = Instant::now() + limit;
    // A peer counts once, or once per family.
    let is_meshed =
        |status: &Status| status.ready && (status.data_path.peers == peers || status.data_path.peers == peers * families);
    let place = if network.is_default() { String::new() } else { format!(" in network {network}") };
    let waits = stream::iter(lab.hosts()).map(|host| {
        let context = format!("{} has not all {peers} peers{place}", host.name());
        async move { wait_status(&host, &host.client_of(network), is_meshed, end, limit, &context).await }
    });
    waits.buffer_unordered(MAX_CONCURRENT).try_collect::<Vec<_>>().await?;
    Ok(())
}

/// Waits until the agent's status, as a client reads it, fulfils a condition.
async fn wait_status(
    host: &Host<'_>,
    client: &Client,
    predicate: impl Fn(&Status) -> bool,
    end: Instant,
    limit: Duration,
    context: &str,
) -> Result<Status, LabError> {
    let client = client.clone().with_timeout(Duration::from_secs(5));
    loop {
        let response = client.status().await;
        let detail = match response {
            Ok(status) if predicate(&status) => return Ok(status),
            Ok(status) => describe(&status),
            Err(
                error @ (ClientError::NoSocket { .. }
                | ClientError::ConnectionRefused { .. }
                | ClientError::ConnectionLost { .. }
                | ClientError::TimedOut { .. }),
            ) => error.to_string(),
            Err(source) => return Err(LabError::Agent { host: host.name().to_owned(), source }),
        };
        if host.agent().is_none() {
            return Err(ended_error(&format!("{PROGRAM} of {}", host.name()), &host.log()));
        }
        if Instant::now() >= end {
            let detail = format!("{detail}; the end of its log ({}):\n{}", host.log().display(), log_tail(&host.log()));
            return Err(LabError::TimedOut { what: context.to_owned(), limit, detail });
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

fn describe(status: &Status) -> String {
    let state = if status.ready { "ready" } else { "not ready" };
    format!("{state}, {} leases seen, {} peers; {}", status.store.leases, status.data_path.peers, status.problems.join("; "))
}
