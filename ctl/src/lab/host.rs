//! One host of a lab: its namespace and its files. `agent` and `container` add what runs on it.

use std::path::PathBuf;
use std::process::Output;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::NetworkName;

use super::labs_dir::socket_path;
use super::layout::HostLayout;
use super::{Lab, LabError};
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
        socket_path(self.lab.dir(), self.name())
    }

    /// Log file of the agent.
    pub fn log(&self) -> PathBuf {
        self.dir().join("overlayd.log")
    }

    /// Client of the agent.
    pub fn client(&self) -> Client {
        Client::new(self.socket())
    }

    /// Client of the agent for one network.
    pub fn client_of(&self, network: &NetworkName) -> Client {
        self.client().of_network(network)
    }

    /// Runs a command on the host and waits for its end. Blocks.
    pub fn exec(&self, command: &[&str]) -> Result<Output, LabError> {
        self.lab.exec(self.name(), command)
    }
}

impl Lab {
    /// Hosts of the lab.
    pub fn hosts(&self) -> impl Iterator<Item = Host<'_>> {
        self.layout.hosts.iter().map(|layout| Host::new(self, layout))
    }

    /// Finds a host by name (`h1`).
    pub fn host(&self, name: &str) -> Result<Host<'_>, LabError> {
        self.hosts().find(|h| h.name() == name).ok_or_else(|| self.unknown_target(name))
    }
}
