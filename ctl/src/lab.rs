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
//!   ov-NAME-h1.net1 a host's part of the isolated network net1, made by its overlayd; the containers are ov-NAME-h1-net1-c1..
//! ```
//!
//! `lab.json` describes the whole lab. It is written before anything is created, so that [`Lab::down`] removes what a crash left
//! behind.

pub mod agent;
pub mod check;
pub mod container;
pub mod crossing;
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
pub mod up;

use std::path::{Path, PathBuf};

use overlay_agent::kernel::netns::Netns;

pub use down::LabGuard;
pub use error::LabError;
pub use host::Host;
pub use labs_dir::LabsDir;
pub use layout::{Families, LabName, LabOptions, Layout};
pub use process::ProcessId;
pub use up::Progress;

/// A lab. It ran when it was opened.
#[derive(Debug, Clone)]
pub struct Lab {
    dir: PathBuf,
    layout: Layout,
}

impl Lab {
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

    /// Opens the namespace of a target: `net`, `world`, `h1`, `h1-c1`, a host's isolated network, `h1.net1`, or a container that
    /// was attached manually, `h1-NAME`.
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
        if self.layout.hosts.iter().any(|host| host.name == target) {
            prepared.env("OVERLAYD_SOCKET", labs_dir::socket_path(&self.dir, target));
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

    fn unknown_target(&self, target: &str) -> LabError {
        let mut known: Vec<String> = vec!["net".to_owned(), "world".to_owned()];
        for host in &self.layout.hosts {
            known.push(host.name.clone());
            known.extend(host.containers.iter().map(|c| format!("{}-{c}", host.name)));
        }
        LabError::UnknownTarget { target: target.to_owned(), lab: self.layout.name.to_string(), known }
    }
}
