//! The testbed: two hosts with two containers each and frozen agents, and a bridge without an agent.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::netns_builder::NetnsBuilder;
use overlay_agent::model::Family;
use overlay_agent::model::api::Status;
use overlayctl::lab::layout::outside_address;
use overlayctl::lab::process::ProcessId;
use overlayctl::lab::{Families, Lab, LabGuard, LabName, LabOptions, LabsDir, Progress, container};

use super::super::netns_guard::{NetnsGuard, UNDERLAY};
use super::super::networks::{network_status, run_overlayctl};
use super::path::TrafficPath;

/// Time limit for an agent to program the other host.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval of polling an agent.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Two overlay hosts.
pub struct OverlayHosts {
    // Agents continue before their lab is taken down: fields are dropped in this order.
    paused: Vec<PausedAgent>,
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
        let mut hosts = OverlayHosts::up(family).await?;
        hosts.pause_agents()?;
        Ok(hosts)
    }

    /// The same with a container NETWORK-c1 on each host in a new isolated network.
    pub async fn with_isolated_network(family: Family, network: &str) -> anyhow::Result<OverlayHosts> {
        let mut hosts = OverlayHosts::up(family).await?;
        let name = format!("{network}-c1");
        for host in hosts.lab.hosts() {
            if host.name() == "h1" {
                run_overlayctl(&host, &["network", "create", network, "--cidr", isolated_range(family)])?;
            }
            let netns = Netns::create(&hosts.lab.layout().namespace(&format!("{}-{name}", host.name())))?;
            let path = netns.path().to_string_lossy().into_owned();
            run_overlayctl(&host, &["attach", &name, "--network", network, "--netns", &path])?;
        }
        for host in hosts.lab.hosts() {
            let end = Instant::now() + READY_TIMEOUT;
            let is_complete = |status: Status| status.ready && status.data_path.peers == 1;
            while !network_status(&host, network).is_ok_and(is_complete) {
                ensure!(Instant::now() < end, "{} has no peer in {network}", host.name());
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        }
        hosts.pause_agents()?;
        Ok(hosts)
    }

    async fn up(family: Family) -> anyhow::Result<OverlayHosts> {
        let families = match family {
            Family::V4 => Families::V4,
            Family::V6 => Families::V6,
        };
        let options = LabOptions { hosts: 2, containers: 2, families, ..LabOptions::new(LabName::unique()) };
        let lab = Lab::up(&LabsDir::for_user(), &options, Progress::silent()).await?.guarded();
        for host in lab.hosts() {
            let status = host.wait_ready(READY_TIMEOUT).await?;
            ensure!(status.data_path.failed.is_empty(), "{}: {:?}", host.name(), status.data_path.failed);
        }
        Ok(OverlayHosts { paused: Vec::new(), lab, family })
    }

    fn pause_agents(&mut self) -> anyhow::Result<()> {
        for host in self.lab.hosts() {
            self.paused.push(PausedAgent::new(host.agent().context("the agent has ended")?)?);
        }
        Ok(())
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

    /// The path from a container, given by host and name, to another one.
    pub fn containers(&self, from: (&str, &str), to: (&str, &str)) -> anyhow::Result<TrafficPath> {
        let (from, to) = (self.container(from)?, self.container(to)?);
        let address = *to.addresses.get(self.family).context("a container has no address")?;
        Ok(TrafficPath { from: from.netns, to: to.netns, address })
    }

    /// The path from a container to the address outside underlay and overlay.
    pub fn outside(&self, from: (&str, &str)) -> anyhow::Result<TrafficPath> {
        let (from, to) = (self.container(from)?, self.lab.netns("world")?);
        Ok(TrafficPath { from: from.netns, to, address: outside_address(self.family) })
    }

    fn container(&self, (host, name): (&str, &str)) -> anyhow::Result<container::AttachedContainer> {
        let mut all = container::list_attached(&self.lab.host(host)?)?.into_iter();
        all.find(|found| found.name == name).with_context(|| format!("{host} has no container {name}"))
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

/// The range of an isolated network, apart from the lab's networks so that a wrong path is not a working one.
const fn isolated_range(family: Family) -> &'static str {
    match family {
        Family::V4 => "10.0.0.0/16",
        Family::V6 => "fd0b::/56",
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
