//! Named network namespaces that `overlayctl attach` creates for containers without one, and `detach` removes.
//!
//! Only namespaces created by `attach` may be removed: a marker file `netns/NAME` in the directory of the agent's socket holds
//! the namespace's inode. Like the namespaces, it lasts until the next boot.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use overlay_agent::kernel::netns::{Netns, NetnsError};
use overlay_agent::model::endpoint::EndpointName;

/// Directory of named namespaces (`ip-netns(8)`).
pub const NETNS_DIR: &str = "/run/netns";

/// Prefix of the namespaces' names. Hosts of a lab share one machine's names; the prefix keeps them apart.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct PrefixArg {
    /// Prefix for the name of a created namespace
    #[arg(long, value_name = "TEXT", env = "OVERLAYCTL_NETNS_PREFIX", default_value = "", hide = true)]
    pub netns_prefix: String,
}

/// Failure to create or remove a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The namespace exists and is not managed.
    #[error(
        "the network namespace {} exists and was not created by `overlayctl attach`: to attach it, use --netns {}; to remove \
         it: ip netns delete {name}",
        path.display(),
        path.display()
    )]
    Exists {
        /// Path of the namespace.
        path: PathBuf,
        /// Name of the namespace.
        name: String,
    },
    /// The process does not exist.
    #[error("no process {pid}, or it ended while its network namespace was attached")]
    NoProcess {
        /// PID.
        pid: i32,
    },
    /// Error of the kernel.
    #[error(transparent)]
    Kernel(#[from] NetnsError),
    /// The marker file cannot be written.
    #[error("cannot write the marker file {}: {source}", path.display())]
    Marker {
        /// Path of the marker file.
        path: PathBuf,
        /// Error of the system call.
        source: std::io::Error,
    },
}

/// Named namespaces of one agent's endpoints.
#[derive(Debug)]
pub struct NamedNamespaces {
    marker_dir: PathBuf,
    prefix: String,
}

/// A new namespace; removed on drop, unless kept.
#[derive(Debug)]
pub struct CreatedNamespace<'a> {
    owner: &'a NamedNamespaces,
    name: EndpointName,
    kept: bool,
}

impl NamedNamespaces {
    /// Namespaces of the agent with this socket.
    pub fn for_socket(socket: &Path, prefix: &PrefixArg) -> NamedNamespaces {
        let marker_dir = socket.parent().unwrap_or_else(|| Path::new("/")).join("netns");
        NamedNamespaces { marker_dir, prefix: prefix.netns_prefix.clone() }
    }

    /// Path of an endpoint's namespace.
    pub fn path(&self, name: &EndpointName) -> PathBuf {
        Path::new(NETNS_DIR).join(self.full_name(name))
    }

    /// Creates the namespace of an endpoint.
    pub fn create(&self, name: &EndpointName) -> Result<CreatedNamespace<'_>, NamespaceError> {
        let path = self.path(name);
        if path.exists() {
            if !self.is_managed(name) {
                return Err(NamespaceError::Exists { path, name: self.full_name(name) });
            }
            // Left by a killed attach, or from before the agent lost its state.
            self.remove(name)?;
        }
        Netns::create(&self.full_name(name))?;
        let created = CreatedNamespace { owner: self, name: name.clone(), kept: false };
        let inode = std::fs::metadata(&path).map_err(|source| NamespaceError::Marker { path: path.clone(), source })?.ino();
        let marker = self.marker_path(name);
        std::fs::create_dir_all(&self.marker_dir)
            .and_then(|()| std::fs::write(&marker, inode.to_string()))
            .map_err(|source| NamespaceError::Marker { path: marker, source })?;
        Ok(created)
    }

    /// Removes the namespace of an endpoint if [`NamedNamespaces::create`] created it. Returns whether it did.
    pub fn remove(&self, name: &EndpointName) -> Result<bool, NamespaceError> {
        let is_managed = self.is_managed(name);
        if is_managed {
            Netns::delete(&self.full_name(name))?;
        }
        let marker = self.marker_path(name);
        match std::fs::remove_file(&marker) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(NamespaceError::Marker { path: marker, source }),
        }
        Ok(is_managed)
    }

    fn full_name(&self, name: &EndpointName) -> String {
        format!("{}{name}", self.prefix)
    }

    fn marker_path(&self, name: &EndpointName) -> PathBuf {
        self.marker_dir.join(self.full_name(name))
    }

    /// Whether the namespace of that name matches its marker file.
    fn is_managed(&self, name: &EndpointName) -> bool {
        let recorded_inode =
            std::fs::read_to_string(self.marker_path(name)).ok().and_then(|text| text.trim().parse::<u64>().ok());
        let inode = std::fs::metadata(self.path(name)).ok().map(|m| m.ino());
        recorded_inode.is_some() && recorded_inode == inode
    }
}

impl CreatedNamespace<'_> {
    /// Keeps the namespace.
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
            eprintln!("overlayctl: cannot remove the namespace {name}: {error}. Remove it: ip netns delete {name}");
        }
        // A marker without its namespace is meaningless.
        let _ignored = std::fs::remove_file(self.owner.marker_path(&self.name));
    }
}
