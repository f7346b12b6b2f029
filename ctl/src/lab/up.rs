//! Start of a lab: underlay, etcd, agents, containers.

use std::time::{Duration, Instant};

use super::layout::isolated_network;
use super::{Lab, LabError, LabOptions, LabsDir, Layout, agent, container, etcd, underlay};

/// Time for the complete data path of a lab after its agents start: a second for a few hosts, more if fifty share two processors.
const MESH_TIMEOUT: Duration = Duration::from_secs(90);

/// Reports each completed step.
#[derive(Clone, Copy)]
pub struct Progress<'a> {
    start: Instant,
    report: &'a (dyn Fn(Duration, &str) + Send + Sync),
}

impl<'a> Progress<'a> {
    /// Creates a reporter; the function gets the elapsed time and one line per step.
    pub fn new(report: &'a (dyn Fn(Duration, &str) + Send + Sync)) -> Progress<'a> {
        Progress { start: Instant::now(), report }
    }

    /// Creates a reporter without output.
    pub fn silent() -> Progress<'static> {
        Progress { start: Instant::now(), report: &|_, _| {} }
    }

    fn step(&self, text: &str) {
        (self.report)(self.start.elapsed(), text);
    }
}

impl Lab {
    /// Starts a lab. A failure removes everything that was created.
    pub async fn up(labs_dir: &LabsDir, options: &LabOptions, progress: Progress<'_>) -> Result<Lab, LabError> {
        let layout = Layout::new(options)?;
        etcd::find_program()?;
        let overlayd = if options.agents { Some(agent::find_program(options.overlayd.as_deref())?) } else { None };
        let layout = Layout { overlayd, ..layout };
        let lab = Lab { dir: labs_dir.claim(&layout)?, layout };
        match lab.build(progress).await {
            Ok(()) => Ok(lab),
            Err(error) => {
                progress.step("failed: removing the incomplete lab");
                match lab.down() {
                    Ok(_) => Err(error),
                    Err(second) => Err(LabError::RollbackFailed { error: Box::new(error), second: Box::new(second) }),
                }
            }
        }
    }

    async fn build(&self, progress: Progress<'_>) -> Result<(), LabError> {
        let layout = &self.layout;
        underlay::build(layout)?;
        progress.step(&format!("underlay: {} hosts on a switch, a world outside", layout.hosts.len()));
        if layout.etcd.is_empty() {
            etcd::start(self).await?;
            progress.step(&format!("etcd answers at {}", layout.etcd_endpoints().join(" ")));
            etcd::configure(self).await?;
            let networks: Vec<String> = layout.networks.iter().map(|(_, n)| n.to_string()).collect();
            progress.step(&format!("network {} configured", networks.join(" ")));
            if !layout.isolated.is_empty() {
                let ranges: Vec<String> = layout.families().map(|family| isolated_network(family).to_string()).collect();
                progress.step(&format!("{} isolated networks created, each with {}", layout.isolated.len(), ranges.join(" ")));
            }
        }
        if layout.overlayd.is_none() {
            return Ok(());
        }
        for host in self.hosts() {
            host.agent_start(&[])?;
        }
        agent::wait_mesh(self, MESH_TIMEOUT).await?;
        progress.step(&format!("{} agents ready, each with a subnet and routes to all others", layout.hosts.len()));
        let containers: usize = layout.hosts.iter().map(|h| h.containers.len() * (1 + layout.isolated.len())).sum();
        if containers > 0 {
            container::attach_all(self).await?;
            for network in &layout.isolated {
                agent::wait_mesh_of(self, network, MESH_TIMEOUT).await?;
            }
            progress.step(&format!("{containers} containers attached"));
        }
        Ok(())
    }
}
