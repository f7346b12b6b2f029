//! One host of a lab: its namespace, its agent, its containers.

use std::fs;
use std::path::PathBuf;
use std::process::Output;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::api::{AttachResponse, Status};

use super::layout::HostLayout;
use super::process::{self, ProcessId, TERM_GRACE};
use super::{Lab, LabError, agent, container};
use crate::client::Client;

/// A host of a lab.
#[derive(Debug, Clone, Copy)]
pub struct Host<'a> {
    lab: &'a Lab,
    layout: &'a HostLayout,
}

impl<'a> Host<'a> {
    pub(super) fn new(lab: &'a Lab, layout: &'a HostLayout) -> Host<'a> {
        Host { lab, layout }
    }

    /// Name of the host: `h1`.
    pub fn name(&self) -> &'a str {
        &self.layout.name
    }

    /// Addresses and containers of the host.
    pub fn layout(&self) -> &'a HostLayout {
        self.layout
    }

    /// The host's lab.
    pub fn lab(&self) -> &'a Lab {
        self.lab
    }

    /// Opens the host's namespace.
    pub fn netns(&self) -> Result<Netns, LabError> {
        self.lab.netns(self.name())
    }

    /// Directory of the host's files.
    pub fn dir(&self) -> PathBuf {
        self.lab.dir().join(self.name())
    }

    /// Run directory of the agent.
    pub fn run_dir(&self) -> PathBuf {
        self.dir().join("run")
    }

    /// State directory of the agent.
    pub fn state_dir(&self) -> PathBuf {
        self.dir().join("state")
    }

    /// Socket of the agent.
    pub fn socket(&self) -> PathBuf {
        agent::socket_path(self.lab.dir(), self.name())
    }

    /// Log file of the agent.
    pub fn log(&self) -> PathBuf {
        self.dir().join("overlayd.log")
    }

    /// Client of the agent.
    pub fn client(&self) -> Client {
        Client::new(self.socket())
    }

    /// Runs a command on the host and waits for its end. Blocks.
    pub fn exec(&self, command: &[&str]) -> Result<Output, LabError> {
        self.lab.exec(self.name(), command)
    }

    /// Process of the agent, if it runs.
    pub fn agent(&self) -> Option<ProcessId> {
        agent::running_process(self)
    }

    /// Starts the agent, with flags in addition to the lab's. An agent that runs already is left unchanged. Does not wait until
    /// it is ready.
    pub fn agent_start(&self, flags: &[&str]) -> Result<ProcessId, LabError> {
        if let Some(running) = self.agent() {
            return Ok(running);
        }
        let program = match &self.lab.layout().overlayd {
            Some(program) => program.clone(),
            None => agent::find_program(None)?,
        };
        for dir in [self.run_dir(), self.state_dir()] {
            fs::create_dir_all(&dir).map_err(|source| LabError::File { action: "make", path: dir, source })?;
        }
        let command = agent::command(self, &program, flags);
        process::start(command, Some(&self.netns()?), &self.log(), &agent::pid_file(self.lab.dir(), self.name()))
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
        let tail = process::log_tail(&self.log());
        let failures = process::terminate_all(&[running], Duration::ZERO);
        Err(timed_out(format!(
            "killed{}; the end of its log:\n{tail}",
            failures.iter().map(|l| format!(", {l}")).collect::<String>()
        )))
    }

    /// Waits until the agent is ready.
    pub async fn wait_ready(&self, limit: Duration) -> Result<Status, LabError> {
        let context = format!("{} is not ready", self.name());
        agent::wait_status(self, |status| status.ready, Instant::now() + limit, limit, &context).await
    }

    /// Waits until the agent's status fulfils a condition; `what` names the unmet condition in the error.
    pub async fn wait_status(
        &self,
        limit: Duration,
        context: &str,
        predicate: impl Fn(&Status) -> bool,
    ) -> Result<Status, LabError> {
        agent::wait_status(self, predicate, Instant::now() + limit, limit, context).await
    }

    /// Creates a container's namespace and attaches it; the lab's target is then `HOST-NAME`.
    pub async fn attach(&self, name: &str) -> Result<AttachResponse, LabError> {
        container::attach(self, name).await
    }
}
