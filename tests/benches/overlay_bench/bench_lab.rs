//! A lab with many leases in etcd before its agents start.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, ensure};
use overlay_agent::model::{Family, PerFamily};
use overlayctl::lab::layout::{ETCD_PORT, ETCD_PREFIX, etcd_address};
use overlayctl::lab::{Families, Host, Lab, LabGuard, LabName, LabOptions, LabsDir, Progress};

use super::synthetic_peer::{SUBNET_LENGTH, SyntheticPeer, network_cidr, synthetic_peers};
use overlay_tests::etcd_gateway::EtcdGateway;

/// Time limit for the agents to program every peer.
const CONVERGE_TIMEOUT: Duration = Duration::from_secs(120);

/// The family of the labs.
pub const FAMILY: Family = Family::V4;

/// A lab, taken down on drop.
pub struct BenchLab {
    /// The lab.
    pub lab: LabGuard,
    /// The peers without a host in the lab.
    pub peers: Vec<SyntheticPeer>,
}

impl BenchLab {
    /// Brings up hosts, etcd with this many additional leases, and the agents, and waits until each kernel has all entries.
    pub async fn new(hosts: u16, peers: u32) -> anyhow::Result<BenchLab> {
        BenchLab::with_agent_flags(hosts, peers, &[]).await
    }

    /// The same with flags for the agents.
    pub async fn with_agent_flags(hosts: u16, peers: u32, flags: &[&str]) -> anyhow::Result<BenchLab> {
        BenchLab::without_agents(hosts, peers).await?.start_agents(flags).await
    }

    /// Brings up hosts with room for 250 containers each, without peers, and the agents.
    pub async fn for_containers(hosts: u16) -> anyhow::Result<BenchLab> {
        BenchLab::with_subnet_length(24, hosts, 0).await?.start_agents(&[]).await
    }

    async fn start_agents(self, flags: &[&str]) -> anyhow::Result<BenchLab> {
        for host in self.lab.hosts() {
            host.agent_start(&[&["--log-level", "warn"], flags].concat())?;
        }
        for host in self.lab.hosts() {
            self.wait_converged(&host).await?;
        }
        Ok(self)
    }

    /// The same without agents.
    pub async fn without_agents(hosts: u16, peers: u32) -> anyhow::Result<BenchLab> {
        BenchLab::with_subnet_length(SUBNET_LENGTH, hosts, peers).await
    }

    async fn with_subnet_length(length: u8, hosts: u16, peers: u32) -> anyhow::Result<BenchLab> {
        let fleet = if peers == 0 { Vec::new() } else { synthetic_peers(FAMILY, 1..=peers)? };
        let networks: PerFamily<_> = std::iter::once((FAMILY, network_cidr(FAMILY).parse()?)).collect();
        let options = LabOptions {
            hosts,
            containers: 0,
            families: Families::V4,
            networks,
            agents: false,
            config: std::iter::once(("SubnetLen".to_owned(), length.into())).collect(),
            ..LabOptions::new(LabName::unique())
        };
        let lab = Lab::up(&LabsDir::for_user(), &options, Progress::silent()).await?.guarded();
        let bench = BenchLab { lab, peers: fleet };
        let leases = bench.peers.iter().map(|m| Ok((etcd_key(m)?, m.lease_value()))).collect::<anyhow::Result<Vec<_>>>()?;
        bench.with_etcd_gateway(|mut gateway| gateway.put_all(&leases))?;
        Ok(bench)
    }

    /// Waits until a host has routes to each peer.
    pub async fn wait_converged(&self, host: &Host<'_>) -> anyhow::Result<()> {
        let peers = self.peers.len() + self.lab.hosts().count() - 1;
        let context = format!("{} does not reach each of {peers} peers", host.name());
        let is_converged = |status: &overlay_agent::model::api::Status| status.ready && status.data_path.peers == peers;
        let status = host.wait_status(CONVERGE_TIMEOUT, &context, is_converged).await?;
        ensure!(status.data_path.failed.is_empty(), "{}: {:?}", host.name(), status.data_path.failed);
        Ok(())
    }

    /// Peers outside the store that are no hosts of the lab.
    pub async fn unused_peers(&self, count: usize) -> anyhow::Result<Vec<SyntheticPeer>> {
        let mut used_subnets = Vec::new();
        for host in self.lab.hosts() {
            let status = host.client().status().await?;
            used_subnets.push(status.lease.and_then(|lease| lease.subnet.get(FAMILY)).context("a host has no subnet")?);
        }
        let first = u32::try_from(self.peers.len())? + 1;
        let last = first + u32::try_from(count + used_subnets.len())?;
        let free = synthetic_peers(FAMILY, first..=last)?.into_iter().filter(|peer| !used_subnets.contains(&peer.subnet));
        Ok(free.take(count).collect())
    }

    /// Runs a function with a connection to etcd, inside the switch's namespace.
    pub fn with_etcd_gateway<T: Send>(&self, work: impl FnOnce(EtcdGateway) -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        self.lab.netns("net")?.run(|| work(EtcdGateway::connect(etcd_socket_addr())?))?
    }
}

/// A peer's key in etcd.
pub fn etcd_key(peer: &SyntheticPeer) -> anyhow::Result<String> {
    Ok(format!("{ETCD_PREFIX}/subnets/{}", peer.store_key()?))
}

/// etcd's address inside the lab.
pub fn etcd_socket_addr() -> SocketAddr {
    let address: IpAddr = etcd_address(FAMILY);
    SocketAddr::new(address, ETCD_PORT)
}
