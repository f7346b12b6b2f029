//! The lab: several hosts on one machine, each a network namespace with its own agent, and a private etcd. `overlayctl lab` runs
//! it for people, and the end-to-end tests build on it.
//!
//! All objects are in namespaces named `ov-NAME-*` and in one directory; the machine's own namespace gets no link, address or
//! rule.
//!
//! ```text
//!   ov-NAME-net    the underlay switch (a bridge) and etcd
//!   ov-NAME-world  every host's default gateway, with addresses outside the overlay and no route into it
//!   ov-NAME-h1..   hosts: eth0 on the switch, overlayd
//!   ov-NAME-h1-c1.. containers, attached by the host's overlayd
//! ```
//!
//! `lab.json` describes the whole lab. It is written before anything is created, so that [`Lab::down`] removes what a crash left
//! behind.

pub mod agent;
pub mod check;
pub mod container;
pub mod down;
pub mod error;
pub mod etcd;
pub mod host;
pub mod labs_dir;
pub mod layout;
pub mod process;
pub mod rootless;
pub mod status;
pub mod underlay;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use overlay_agent::kernel::netns::Netns;

pub use error::LabError;
pub use host::Host;
pub use labs_dir::LabsDir;
pub use layout::{Families, LabName, LabOptions, Layout};
pub use process::ProcessId;

/// Time for the complete data path of a lab after its agents start: a second for a few hosts, more if fifty share two processors.
const MESH_TIMEOUT: Duration = Duration::from_secs(90);

/// A lab. It ran when it was opened.
#[derive(Debug, Clone)]
pub struct Lab {
    dir: PathBuf,
    layout: Layout,
}

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
        }
        if layout.overlayd.is_none() {
            return Ok(());
        }
        for host in self.hosts() {
            host.agent_start(&[])?;
        }
        agent::wait_mesh(self, MESH_TIMEOUT).await?;
        progress.step(&format!("{} agents ready, each with a subnet and routes to all others", layout.hosts.len()));
        let containers: usize = layout.hosts.iter().map(|h| h.containers.len()).sum();
        if containers > 0 {
            container::attach_all(self).await?;
            progress.step(&format!("{containers} containers attached"));
        }
        Ok(())
    }

    /// Opens the lab of that name.
    pub fn open(labs_dir: &LabsDir, name: &LabName) -> Result<Lab, LabError> {
        Ok(Lab { dir: labs_dir.lab_dir(name), layout: labs_dir.read_layout(name)? })
    }

    /// Layout of the lab.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Directory of the lab.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Hosts of the lab.
    pub fn hosts(&self) -> impl Iterator<Item = Host<'_>> {
        self.layout.hosts.iter().map(|layout| Host::new(self, layout))
    }

    /// Finds a host by name (`h1`).
    pub fn host(&self, name: &str) -> Result<Host<'_>, LabError> {
        self.hosts().find(|h| h.name() == name).ok_or_else(|| self.unknown_target(name))
    }

    /// Opens the namespace of a target: `net`, `world`, `h1`, `h1-c1`, or a container that was attached manually, `h1-NAME`.
    pub fn netns(&self, target: &str) -> Result<Netns, LabError> {
        let namespace = self.layout.namespace(target);
        if target.contains('/') || !Netns::list()?.contains(&namespace) {
            return Err(self.unknown_target(target));
        }
        Ok(Netns::named(&namespace)?)
    }

    /// Runs a command inside a target and waits for its end. Blocks.
    pub fn exec(&self, target: &str, command: &[&str]) -> Result<std::process::Output, LabError> {
        let netns = self.netns(target)?;
        let mut prepared = self.command(target, command)?;
        let program = command.first().copied().unwrap_or_default().to_owned();
        netns.run(|| prepared.output())?.map_err(|source| LabError::Spawn { program, source })
    }

    /// Builds a command with a target's environment: the socket of the host's agent, and this program's directory first in PATH.
    pub fn command(&self, target: &str, command: &[impl AsRef<std::ffi::OsStr>]) -> Result<std::process::Command, LabError> {
        let Some((program, arguments)) = command.split_first() else {
            return Err(LabError::Options { message: "no command to run".to_owned() });
        };
        let mut prepared = std::process::Command::new(program);
        prepared.args(arguments);
        if let Ok(host) = self.host(target) {
            prepared.env("OVERLAYD_SOCKET", host.socket());
            prepared.env("OVERLAYCTL_NETNS_PREFIX", self.layout.namespace(&format!("{target}-")));
        }
        prepared.env("OVERLAYD_ETCD_PREFIX", layout::ETCD_PREFIX);
        if let Some(own) = std::env::current_exe().ok().as_deref().and_then(Path::parent) {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let all = std::iter::once(own.to_owned()).chain(std::env::split_paths(&path));
            if let Ok(joined) = std::env::join_paths(all) {
                prepared.env("PATH", joined);
            }
        }
        Ok(prepared)
    }

    /// Removes the lab: processes, namespaces, directory. Blocks for a few seconds at most. Continues after errors and reports
    /// all.
    pub fn down(&self) -> Result<down::TeardownSummary, LabError> {
        down::down(&self.dir, &self.layout.name)
    }

    /// Wraps the lab in a guard that removes it on drop, for tests.
    pub fn guarded(self) -> LabGuard {
        LabGuard { lab: self }
    }

    fn unknown_target(&self, target: &str) -> LabError {
        let mut known: Vec<String> = vec!["net".to_owned(), "world".to_owned()];
        for host in &self.layout.hosts {
            known.push(host.name.clone());
            known.extend(host.containers.iter().map(|c| format!("{}-{c}", host.name)));
        }
        LabError::UnknownTarget { target: target.to_owned(), lab: self.layout.name.to_string(), known }
    }
}

/// Guard that removes its lab on drop.
#[derive(Debug)]
pub struct LabGuard {
    lab: Lab,
}

impl std::ops::Deref for LabGuard {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl Drop for LabGuard {
    fn drop(&mut self) {
        if let Err(error) = self.lab.down() {
            eprintln!("lab {}: {error}", self.lab.layout.name);
        }
    }
}
