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

    /// Its name: `h1`.
    pub fn name(&self) -> &'a str {
        &self.layout.name
    }

    /// Its addresses and containers.
    pub fn layout(&self) -> &'a HostLayout {
        self.layout
    }

    /// The lab that it is part of.
    pub fn lab(&self) -> &'a Lab {
        self.lab
    }

    /// Its namespace.
    pub fn netns(&self) -> Result<Netns, LabError> {
        self.lab.netns(self.name())
    }

    /// The directory of its files.
    pub fn dir(&self) -> PathBuf {
        self.lab.dir().join(self.name())
    }

    /// The agent's run directory.
    pub fn run_dir(&self) -> PathBuf {
        self.dir().join("run")
    }

    /// The agent's state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.dir().join("state")
    }

    /// The agent's socket.
    pub fn socket(&self) -> PathBuf {
        agent::socket_path(self.lab.dir(), self.name())
    }

    /// The agent's log.
    pub fn log(&self) -> PathBuf {
        self.dir().join("overlayd.log")
    }

    /// A client of the agent.
    pub fn client(&self) -> Client {
        Client::new(self.socket())
    }

    /// Runs a command on the host and waits for it. Blocks.
    pub fn exec(&self, command: &[&str]) -> Result<Output, LabError> {
        self.lab.exec(self.name(), command)
    }

    /// The agent's process, where it runs.
    pub fn agent(&self) -> Option<ProcessId> {
        agent::running_process(self)
    }

    /// Starts the agent, with flags beside the lab's own. Where one runs already, it is left as it is. Does not wait until it is ready.
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

    /// Sends the agent a signal and waits until it has ended; one that does not within five seconds is killed, which is an error. Blocks.
    pub fn agent_stop(&self, signal: Signal) -> Result<(), LabError> {
        let Some(running) = self.agent() else { return Ok(()) };
        let refused = |detail: String| LabError::TimedOut {
            what: format!("overlayd of {} does not end on {signal}", self.name()),
            limit: TERM_GRACE,
            detail,
        };
        running.signal(signal).map_err(|errno| refused(errno.desc().to_owned()))?;
        if running.wait(TERM_GRACE) {
            return Ok(());
        }
        let tail = process::log_tail(&self.log());
        let left = process::terminate_all(&[running], Duration::ZERO);
        Err(refused(format!("killed{}; the end of its log:\n{tail}", left.iter().map(|l| format!(", {l}")).collect::<String>())))
    }

    /// Waits until the agent is ready.
    pub async fn wait_ready(&self, limit: Duration) -> Result<Status, LabError> {
        let what = format!("{} is not ready", self.name());
        agent::wait_status(self, |status| status.ready, Instant::now() + limit, limit, &what).await
    }

    /// Waits until the agent's status is as wished; `what` says in the error what is not the case.
    pub async fn wait_status(
        &self,
        limit: Duration,
        what: &str,
        predicate: impl Fn(&Status) -> bool,
    ) -> Result<Status, LabError> {
        agent::wait_status(self, predicate, Instant::now() + limit, limit, what).await
    }

    /// Makes a container's namespace and attaches it; the container is the lab's target `HOST-NAME`.
    pub async fn attach(&self, name: &str) -> Result<AttachResponse, LabError> {
        container::attach(self, name).await
    }
}
