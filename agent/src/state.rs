//! What the agent keeps on disk: the state directory (`--state-lab_dir`), the locks that keep a second agent out, and `local_subnet.env`.
//!
//! All functions block on the file system; asynchronous callers use `tokio::task::spawn_blocking`. No tasks of its own. Files are
//! written whole by [`write_whole`], so that a reader or a crash sees the old text or the new one and nothing between.

mod file;
mod journal;
mod lock;
mod subnet_env;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::model::{Device, Mac, PerFamily, Role, Subnet};

pub use file::{FileError, write_atomic, write_if_changed};
pub use journal::Journal;
pub use lock::{DirLock, LockError};
pub use subnet_env::{subnet_env, write_subnet_env};

/// The version of the files' shapes. A file of a later version is refused, not set aside: a newer agent wrote it.
const VERSION: u32 = 1;

/// Mode of the state directory: its files say how containers are wired, which is nobody else's business.
const DIRECTORY_MODE: u32 = 0o700;

/// Mode of the files in it.
const FILE_MODE: u32 = 0o600;

/// The state directory, held by a lock for as long as this value lives.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: DirLock,
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another agent holds the directory.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The file was written by a later version.
    #[error(
        "{path} has version {found}, this overlayd knows {VERSION}: a newer overlayd wrote it; run that one, or move the file away"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The version in it.
        found: u32,
    },
}

/// What this host remembers of itself (`state.json`), so that a restart or reboot changes nothing for its peers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostState {
    /// The MAC of each device of ours, by the device's name, which says VNI and family.
    #[serde(default)]
    macs: BTreeMap<String, Mac>,
    /// The subnet held last.
    #[serde(default)]
    pub subnet: Option<Subnet>,
    /// The underlay addresses published last.
    #[serde(default)]
    pub public_ip: PerFamily<IpAddr>,
    /// The values of sysctls before the agent first changed them, by path below `/proc/sys/net`; `overlayd_command run_cleanup` puts them back.
    #[serde(default)]
    pub sysctls: BTreeMap<String, String>,
}

impl HostState {
    /// The MAC of a device: the one remembered, else the one found on the device (whose peers know it), else a new one. A bridge of another VNI
    /// has that of the one before it: containers hold it as their gateway's, and would send to nobody until they ask again, a minute later.
    /// Returns whether it has to be saved.
    pub fn device_mac(&mut self, device: Device, found: Option<Mac>) -> (Mac, bool) {
        let gateway = (device.role == Role::Bridge).then(|| self.gateway_mac()).flatten();
        let mut new = false;
        let mac = *self.macs.entry(device.name()).or_insert_with(|| {
            new = true;
            found.filter(|mac| mac.is_unicast()).or(gateway).unwrap_or_else(|| Mac::local(rand::random()))
        });
        (mac, new)
    }

    /// The MAC of a bridge, whatever its VNI.
    fn gateway_mac(&self) -> Option<Mac> {
        let bridges = self.macs.iter().filter(|(name, _)| Device::from_name(name).is_some_and(|d| d.role == Role::Bridge));
        bridges.map(|(_, mac)| *mac).next()
    }
}

/// A file's content behind its version.
#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    content: T,
}

/// The version alone, read first so that a later shape is not taken for a torn file.
#[derive(Serialize, Deserialize)]
struct VersionHeader {
    version: u32,
}

impl StateDir {
    /// Opens the directory, made with mode 0700 where it is missing, and locks it. Two agents cannot share one: the second is refused.
    pub fn open(path: &Path) -> Result<StateDir, StateError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(DIRECTORY_MODE)
            .create(path)
            .map_err(|source| FileError::new("make the directory", path, source))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(DIRECTORY_MODE))
            .map_err(|source| FileError::new("set the mode of", path, source))?;
        let lock = DirLock::acquire_named(path, lock::STATE_LOCK)?;
        Ok(StateDir { path: path.to_owned(), _lock: lock })
    }

    /// Removes everything that the agent keeps, and the directory where nothing else is in it.
    pub fn remove(self) -> Result<(), StateError> {
        let removed = ["endpoints.json", "endpoints.journal", "state.json", "node-id", lock::STATE_LOCK].iter().map(|name| {
            let path = self.path.join(name);
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(FileError::new("remove", &path, source)),
                _ => Ok(()),
            }
        });
        removed.collect::<Result<(), FileError>>()?;
        match std::fs::remove_dir(&self.path) {
            // Files that were set aside as torn are for a person to look at, and a mount point is not ours to remove.
            Err(source) if !matches!(source.kind(), std::io::ErrorKind::DirectoryNotEmpty | std::io::ErrorKind::ResourceBusy) => {
                Err(FileError::new("remove the directory", &self.path, source).into())
            }
            _ => Ok(()),
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The host's identity (`node-id`): 32 hex digits, made at the first start. With a new one the MACs that are remembered are forgotten: whoever
    /// removes the file of a copied host wants another host, and what devices of this one are there keep theirs.
    pub fn node_id(&self) -> Result<String, StateError> {
        let path = self.path.join("node-id");
        if let Some(text) = file::read(&path)? {
            let id = String::from_utf8_lossy(&text).trim_end().to_owned();
            if id.len() == 32 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                return Ok(id);
            }
            file::quarantine(&path, "it is not 32 hex digits")?;
        }
        let mut host = self.load_host()?;
        if !host.macs.is_empty() {
            host.macs.clear();
            self.save_host(&host)?;
        }
        let id = format!("{:032x}", rand::random::<u128>());
        write_atomic(&path, format!("{id}\n").as_bytes(), FILE_MODE)?;
        tracing::info!(node_id = id, path = %path.display(), "made this host's identity");
        Ok(id)
    }

    /// What the host remembers (`state.json`); nothing at the first start and where the file was torn.
    pub fn load_host(&self) -> Result<HostState, StateError> {
        Ok(self.load("state.json")?.unwrap_or_default())
    }

    /// Keeps what the host is to remember; without a write where it stands there already.
    pub fn save_host(&self, state: &HostState) -> Result<(), StateError> {
        self.save("state.json", state)
    }

    /// The content of a JSON file in the directory; `None` where it is not there, or was torn and has been set aside.
    pub fn load<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        let path = self.path.join(name);
        let Some(bytes) = file::read(&path)? else { return Ok(None) };
        let version = match serde_json::from_slice::<VersionHeader>(&bytes) {
            Ok(head) => head.version,
            Err(e) => {
                file::quarantine(&path, &e.to_string())?;
                return Ok(None);
            }
        };
        if version > VERSION {
            return Err(StateError::Version { path, found: version });
        }
        match serde_json::from_slice::<Versioned<T>>(&bytes) {
            Ok(file) => Ok(Some(file.content)),
            Err(e) => {
                file::quarantine(&path, &e.to_string())?;
                Ok(None)
            }
        }
    }

    /// Writes a JSON file of the directory whole; not at all where the same text stands there.
    pub fn save<T: Serialize>(&self, name: &str, content: &T) -> Result<(), StateError> {
        let path = self.path.join(name);
        write_if_changed(&path, &encode(&path, content)?, FILE_MODE)?;
        Ok(())
    }

    /// The same, written in any case: afterwards the disk has it for certain, whoever wrote the same text before.
    pub fn save_synced<T: Serialize>(&self, name: &str, content: &T) -> Result<(), StateError> {
        let path = self.path.join(name);
        write_atomic(&path, &encode(&path, content)?, FILE_MODE)?;
        Ok(())
    }

    /// The same without waiting for the disk, which takes milliseconds: for what is worth nothing after a loss of power, because what it is about
    /// is gone as well.
    pub fn save_unsynced<T: Serialize>(&self, name: &str, content: &T) -> Result<(), StateError> {
        let path = self.path.join(name);
        file::write_atomic_unsynced(&path, &encode(&path, content)?, FILE_MODE)?;
        Ok(())
    }

    /// The journal of changes to a file of the directory.
    pub fn journal(&self, name: &str) -> Journal {
        Journal::at(self.path.join(name))
    }
}

/// The content of a JSON file of a state directory that another agent may hold; `None` where it is not there. Changes nothing.
pub fn peek<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, FileError> {
    file::peek(path, |bytes| serde_json::from_slice(bytes))
}

fn encode<T: Serialize>(path: &Path, content: &T) -> Result<Vec<u8>, StateError> {
    let mut bytes = serde_json::to_vec_pretty(&Versioned { version: VERSION, content })
        .map_err(|e| FileError::new("encode", path, std::io::Error::other(e)))?;
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
mod tests;
