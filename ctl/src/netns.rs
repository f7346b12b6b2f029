//! The named network namespaces that `attach_filter` makes for containers that have none, and `detach` removes.
//!
//! Only what `attach_filter` made may go: a file `path/NAME` beside the agent's socket, with the namespace's inode, says so. It lives, as the
//! namespaces do, until the next boot.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use overlay_agent::kernel::netns::{Netns, NetnsError};
use overlay_agent::model::endpoint::EndpointName;

/// Where named namespaces are kept (`ip-path(8)`).
pub const NETNS_DIR: &str = "/run/netns";

/// What stands before the names of namespaces, so that hosts of a lab, which share one machine's names, do not take each other's.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct PrefixArg {
    /// Put before the name of a namespace that is made
    #[arg(long, value_name = "TEXT", env = "OVERLAYCTL_NETNS_PREFIX", default_value = "", hide = true)]
    pub netns_prefix: String,
}

/// Why a namespace was not made or removed.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// It is there, and not by us.
    #[error(
        "the network namespace {} exists already and was not made by `overlayctl attach`: to attach it, say --netns {}; to be rid of \
         it: ip netns delete {name}",
        path.display(),
        path.display()
    )]
    Exists {
        /// Its path.
        path: PathBuf,
        /// Its name.
        name: String,
    },
    /// There is no such process.
    #[error("there is no process {pid}, or it ended while its network namespace was attached")]
    NoProcess {
        /// Its number.
        pid: i32,
    },
    /// The kernel refuses.
    #[error(transparent)]
    Kernel(#[from] NetnsError),
    /// The note of what was made cannot be kept.
    #[error("cannot keep a note of the namespace in {}: {source}", path.display())]
    Marker {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
}

/// The named namespaces of one agent's endpoints.
#[derive(Debug)]
pub struct NamedNamespaces {
    marker_dir: PathBuf,
    prefix: String,
}

/// A namespace that was just made; removed again when dropped, unless kept.
#[derive(Debug)]
pub struct CreatedNamespace<'a> {
    owner: &'a NamedNamespaces,
    name: EndpointName,
    kept: bool,
}

impl NamedNamespaces {
    /// Those of the agent with this socket.
    pub fn for_socket(socket: &Path, prefix: &PrefixArg) -> NamedNamespaces {
        let marker_dir = socket.parent().unwrap_or_else(|| Path::new("/")).join("netns");
        NamedNamespaces { marker_dir, prefix: prefix.netns_prefix.clone() }
    }

    /// The path of the namespace of an endpoint.
    pub fn path(&self, name: &EndpointName) -> PathBuf {
        Path::new(NETNS_DIR).join(self.full_name(name))
    }

    /// Makes the namespace of an endpoint.
    pub fn create(&self, name: &EndpointName) -> Result<CreatedNamespace<'_>, NamespaceError> {
        let path = self.path(name);
        if path.exists() {
            if !self.is_managed(name) {
                return Err(NamespaceError::Exists { path, name: self.full_name(name) });
            }
            // Left over from an attach that was killed half way, or from before the agent lost its state.
            self.remove(name)?;
        }
        Netns::create(&self.full_name(name))?;
        let created = CreatedNamespace { owner: self, name: name.clone(), kept: false };
        let inode = std::fs::metadata(&path).map_err(|source| NamespaceError::Marker { path: path.clone(), source })?.ino();
        let note = self.marker_path(name);
        std::fs::create_dir_all(&self.marker_dir)
            .and_then(|()| std::fs::write(&note, inode.to_string()))
            .map_err(|source| NamespaceError::Marker { path: note, source })?;
        Ok(created)
    }

    /// Removes the namespace of an endpoint where [`NamedNamespaces::create`] had made it; whether it had.
    pub fn remove(&self, name: &EndpointName) -> Result<bool, NamespaceError> {
        let ours = self.is_managed(name);
        if ours {
            Netns::delete(&self.full_name(name))?;
        }
        let note = self.marker_path(name);
        match std::fs::remove_file(&note) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(NamespaceError::Marker { path: note, source }),
        }
        Ok(ours)
    }

    fn full_name(&self, name: &EndpointName) -> String {
        format!("{}{name}", self.prefix)
    }

    fn marker_path(&self, name: &EndpointName) -> PathBuf {
        self.marker_dir.join(self.full_name(name))
    }

    /// Whether the namespace of that name is the one that was noted.
    fn is_managed(&self, name: &EndpointName) -> bool {
        let noted = std::fs::read_to_string(self.marker_path(name)).ok().and_then(|text| text.trim().parse::<u64>().ok());
        let found = std::fs::metadata(self.path(name)).ok().map(|m| m.ino());
        noted.is_some() && noted == found
    }
}

impl CreatedNamespace<'_> {
    /// Lets the namespace be.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for CreatedNamespace<'_> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let name = self.owner.full_name(&self.name);
        if let Err(error) = Netns::delete(&name) {
            eprintln!("overlayctl: the namespace {name} is left over: {error}. Remove it: ip netns delete {name}");
        }
        // A note without its namespace means nothing.
        let _gone = std::fs::remove_file(self.owner.marker_path(&self.name));
    }
}
