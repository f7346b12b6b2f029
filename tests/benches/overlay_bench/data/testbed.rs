//! The testbed: two hosts with two containers each and frozen agents, and a bridge without an agent.

use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::netns_builder::NetnsBuilder;
use overlay_agent::model::Family;
use overlayctl::lab::process::ProcessId;
use overlayctl::lab::{Families, Lab, LabGuard, LabName, LabOptions, LabsDir, Progress, container};

use super::super::netns_guard::{NetnsGuard, UNDERLAY};
use super::path::TrafficPath;

/// Time limit for an agent to program the other host.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Two overlay hosts.
pub struct OverlayHosts {
    // Agents continue before their lab is taken down: fields are dropped in this order.
    _paused: Vec<PausedAgent>,
    lab: LabGuard,
    family: Family,
}

/// A frozen agent, so that it does not repair removed entries.
struct PausedAgent(ProcessId);

impl PausedAgent {
    fn new(agent: ProcessId) -> anyhow::Result<PausedAgent> {
        agent.signal(Signal::SIGSTOP).context("cannot hold an agent")?;
        Ok(PausedAgent(agent))
    }
}

impl Drop for PausedAgent {
    fn drop(&mut self) {
        if let Err(error) = self.0.signal(Signal::SIGCONT) {
            eprintln!("overlay-bench: an agent stays frozen: {error}");
        }
    }
}

impl OverlayHosts {
    /// Brings them up completely, and freezes the agents.
    pub async fn new(family: Family) -> anyhow::Result<OverlayHosts> {
        let families = match family {
            Family::V4 => Families::V4,
            Family::V6 => Families::V6,
        };
        let options = LabOptions { hosts: 2, containers: 2, families, ..LabOptions::new(LabName::unique()) };
        let lab = Lab::up(&LabsDir::for_user(), &options, Progress::silent()).await?.guarded();
        let mut paused = Vec::new();
        for host in lab.hosts() {
            let status = host.wait_ready(READY_TIMEOUT).await?;
            ensure!(status.data_path.failed.is_empty(), "{}: {:?}", host.name(), status.data_path.failed);
            paused.push(PausedAgent::new(host.agent().context("the agent has ended")?)?);
        }
        Ok(OverlayHosts { _paused: paused, lab, family })
    }

    /// The hosts' namespaces.
    pub fn namespaces(&self) -> anyhow::Result<Vec<Netns>> {
        Ok(self.lab.hosts().map(|host| host.netns()).collect::<Result<_, _>>()?)
    }

    /// The path from one host to the other.
    pub fn underlay(&self) -> anyhow::Result<TrafficPath> {
        let (from, to) = (self.lab.host("h1")?, self.lab.host("h2")?);
        let address = *to.layout().addresses.get(self.family).context("a host has no address")?;
        Ok(TrafficPath { from: from.netns()?, to: to.netns()?, address })
    }

    /// The path from a container of one host to one of the other.
    pub fn overlay(&self) -> anyhow::Result<TrafficPath> {
        self.containers(("h1", "c1"), ("h2", "c1"))
    }

    /// The path from a container to another one of the same host.
    pub fn bridge(&self) -> anyhow::Result<TrafficPath> {
        self.containers(("h1", "c1"), ("h1", "c2"))
    }

    fn containers(&self, from: (&str, &str), to: (&str, &str)) -> anyhow::Result<TrafficPath> {
        let find = |(host, name): (&str, &str)| -> anyhow::Result<container::AttachedContainer> {
            let mut all = container::list_attached(&self.lab.host(host)?)?.into_iter();
            all.find(|found| found.name == name).with_context(|| format!("{host} has no container {name}"))
        };
        let (from, to) = (find(from)?, find(to)?);
        let address = *to.addresses.get(self.family).context("a container has no address")?;
        Ok(TrafficPath { from: from.netns, to: to.netns, address })
    }
}

/// Two containers on a bridge without rules, with the overlay's MTU.
pub struct PlainBridge {
    containers: Vec<Netns>,
    names: Vec<String>,
    // The bridge is dropped last.
    _netns_guard: NetnsGuard,
}

impl PlainBridge {
    /// Creates it.
    pub fn new(family: Family, mtu: u32) -> anyhow::Result<PlainBridge> {
        let netns_guard = NetnsGuard::new()?;
        let host = NetnsBuilder::open(netns_guard.netns())?;
        let mut bridge = PlainBridge { containers: Vec::new(), names: Vec::new(), _netns_guard: netns_guard };
        for number in 2..4 {
            let name = format!("ovbench-{}-plain{number}", std::process::id());
            let container = Netns::create(&name)?;
            bridge.names.push(name);
            let port = format!("port{number}");
            host.add_veth(&port, "eth0", &container)?;
            host.set_master(&port, UNDERLAY)?;
            host.set_mtu(&port, mtu)?;
            host.set_up(&port)?;
            let container_links = NetnsBuilder::open(&container)?;
            container_links.set_mtu("eth0", mtu)?;
            container_links.add_address("eth0", address(family, number, true).parse()?)?;
            container_links.set_up("eth0")?;
            bridge.containers.push(container);
        }
        Ok(bridge)
    }

    /// The path from one container to the other.
    pub fn path(&self, family: Family) -> anyhow::Result<TrafficPath> {
        let [from, to] = self.containers.as_slice() else { anyhow::bail!("there are no two containers") };
        Ok(TrafficPath { from: from.clone(), to: to.clone(), address: address(family, 3, false).parse()? })
    }
}

impl Drop for PlainBridge {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(error) = Netns::delete(name) {
                eprintln!("overlay-bench: {error}");
            }
        }
    }
}

/// An address of the bridge's network (`NetnsGuard::new`), with its prefix length on request.
fn address(family: Family, number: u32, with_length: bool) -> String {
    let (address, length) = match family {
        Family::V4 => (format!("10.99.0.{number}"), 16),
        Family::V6 => (format!("fd99::{number}"), 64),
    };
    if with_length { format!("{address}/{length}") } else { address }
}
