//! A lab whose etcd is full of leases before its agents start.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, ensure};
use overlay_agent::model::{Family, PerFamily};
use overlayctl::lab::layout::{ETCD_PORT, ETCD_PREFIX, etcd_address};
use overlayctl::lab::{Families, Home, Host, Lab, LabGuard, LabName, LabOptions, Progress};

use super::member::{Member, SUBNET_LENGTH, members, network};
use overlay_tests::gateway::Gateway;

/// How long the agents may take to have every peer in the data path.
const LIMIT: Duration = Duration::from_secs(120);

/// The family of the labs.
pub const FAMILY: Family = Family::V4;

/// A lab that is taken down when dropped.
pub struct Stage {
    /// The lab.
    pub lab: LabGuard,
    /// The peers that are not hosts of the lab.
    pub fleet: Vec<Member>,
}

impl Stage {
    /// Brings up hosts, etcd with so many leases beside the hosts' own, and the agents, and waits until all of it is in each kernel.
    pub async fn new(hosts: u16, peers: u32) -> anyhow::Result<Stage> {
        Stage::with_agents(hosts, peers, &[]).await
    }

    /// The same with flags for the agents.
    pub async fn with_agents(hosts: u16, peers: u32, flags: &[&str]) -> anyhow::Result<Stage> {
        Stage::prepared(hosts, peers).await?.started(flags).await
    }

    /// Hosts with room for 250 containers each, without peers, and the agents.
    pub async fn for_containers(hosts: u16) -> anyhow::Result<Stage> {
        Stage::of_subnets(24, hosts, 0).await?.started(&[]).await
    }

    async fn started(self, flags: &[&str]) -> anyhow::Result<Stage> {
        for host in self.lab.hosts() {
            host.agent_start(&[&["--log-level", "warn"], flags].concat())?;
        }
        for host in self.lab.hosts() {
            self.settled(&host).await?;
        }
        Ok(self)
    }

    /// The same without agents.
    pub async fn prepared(hosts: u16, peers: u32) -> anyhow::Result<Stage> {
        Stage::of_subnets(SUBNET_LENGTH, hosts, peers).await
    }

    async fn of_subnets(length: u8, hosts: u16, peers: u32) -> anyhow::Result<Stage> {
        let fleet = if peers == 0 { Vec::new() } else { members(FAMILY, 1..=peers)? };
        let networks: PerFamily<_> = std::iter::once((FAMILY, network(FAMILY).parse()?)).collect();
        let options = LabOptions {
            hosts,
            containers: 0,
            families: Families::V4,
            networks,
            agents: false,
            config: std::iter::once(("SubnetLen".to_owned(), length.into())).collect(),
            ..LabOptions::new(LabName::unique())
        };
        let lab = Lab::up(&Home::of_user(), &options, Progress::silent()).await?.guarded();
        let stage = Stage { lab, fleet };
        let leases = stage.fleet.iter().map(|m| Ok((key(m)?, m.value()))).collect::<anyhow::Result<Vec<_>>>()?;
        stage.in_etcds_namespace(|mut gateway| gateway.put_all(&leases))?;
        Ok(stage)
    }

    /// Waits until a host has a way to each peer.
    pub async fn settled(&self, host: &Host<'_>) -> anyhow::Result<()> {
        let peers = self.fleet.len() + self.lab.hosts().count() - 1;
        let what = format!("{} has no way to each of {peers} peers", host.name());
        let whole = |status: &overlay_agent::model::api::Status| status.ready && status.data_path.peers == peers;
        let status = host.wait_status(LIMIT, &what, whole).await?;
        ensure!(status.data_path.failed.is_empty(), "{}: {:?}", host.name(), status.data_path.failed);
        Ok(())
    }

    /// Peers that are neither in the store nor hosts of the lab.
    pub async fn newcomers(&self, count: usize) -> anyhow::Result<Vec<Member>> {
        let mut taken = Vec::new();
        for host in self.lab.hosts() {
            let status = host.client().status().await?;
            taken.push(status.lease.and_then(|lease| lease.subnet.get(FAMILY)).context("a host has no subnet")?);
        }
        let first = u32::try_from(self.fleet.len())? + 1;
        let last = first + u32::try_from(count + taken.len())?;
        let free = members(FAMILY, first..=last)?.into_iter().filter(|member| !taken.contains(&member.subnet));
        Ok(free.take(count).collect())
    }

    /// Runs a conversation with etcd inside the namespace of its switch.
    pub fn in_etcds_namespace<T: Send>(&self, work: impl FnOnce(Gateway) -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        self.lab.netns("net")?.run(|| work(Gateway::connect(etcd())?))?
    }
}

/// A member's key in etcd.
pub fn key(member: &Member) -> anyhow::Result<String> {
    Ok(format!("{ETCD_PREFIX}/subnets/{}", member.key()?))
}

/// Where etcd answers, inside the lab.
pub fn etcd() -> SocketAddr {
    let address: IpAddr = etcd_address(FAMILY);
    SocketAddr::new(address, ETCD_PORT)
}
