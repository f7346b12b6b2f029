//! Files of the agent: the state directory (`--state-dir`), lock files against a second agent, and `subnet.env`.
//!
//! The default network's state is in the directory itself, with the host's; that of network NAME is below `networks/NAME`.
//!
//! All functions block on the file system; asynchronous callers use `tokio::task::spawn_blocking`. The module has no tasks.
//! [`write_atomic`] replaces files atomically, so that a reader or a crash sees either the old text or the new one.

mod file;
mod journal;
mod lock;
mod subnet_env;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::model::{Device, Mac, NetworkName, PerFamily, Role, Subnet};

pub use file::{FileError, write_atomic, write_if_changed};
pub use journal::Journal;
pub use lock::{DirLock, LockError};
pub use subnet_env::{subnet_env, write_subnet_env};

/// Version of the file formats. A file of a later version is an error and not quarantined, because a newer agent wrote it.
const VERSION: u32 = 1;

/// Mode of the state directory: no other user may read how containers are connected.
const DIRECTORY_MODE: u32 = 0o700;

/// Mode of the files in it.
const FILE_MODE: u32 = 0o600;

/// Name of the directory with those of the named networks.
const NETWORKS: &str = "networks";

/// The state directory, or that of a named network in it; locked while one of these values exists.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    lock: Arc<DirLock>,
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file system error.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another agent has locked the directory.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The file was written by a later version.
    #[error(
        "{path} has version {found}, but this overlayd supports {VERSION}: a newer overlayd wrote it; run that one, or move the file away"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The version in it.
        found: u32,
    },
}

/// Persistent state of this host in a network (`state.json`), so that a restart or reboot changes nothing for its peers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostState {
    /// The MAC of each device of ours, by device name, which contains VNI and family.
    #[serde(default)]
    macs: BTreeMap<String, Mac>,
    /// The last subnet.
    #[serde(default)]
    pub subnet: Option<Subnet>,
    /// The last published underlay addresses.
    #[serde(default)]
    pub public_ip: PerFamily<IpAddr>,
    /// Values of sysctls from before the agent's first change, by path below `/proc/sys/net`; `overlayd cleanup` restores them.
    #[serde(default)]
    pub sysctls: BTreeMap<String, String>,
    /// JSON text of a named network's last record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<String>,
    /// Whether a named network runs as an isolated one; the record may have changed since it started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolated: Option<bool>,
    /// Number of an isolated network's transit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transit: Option<u16>,
}

impl HostState {
    /// The MAC of a device: the stored one, else the one found on the device (which peers know), else a new one. A bridge of a
    /// new VNI gets the MAC of the previous bridge: containers have it cached as their gateway's MAC, and would lose their
    /// packets until they resolve it again, a minute later. Returns whether the state has to be saved.
    pub fn device_mac(&mut self, device: Device, found: Option<Mac>) -> (Mac, bool) {
        let gateway = (device.role == Role::Bridge).then(|| self.gateway_mac()).flatten();
        let mut new = false;
        let mac = *self.macs.entry(device.name()).or_insert_with(|| {
            new = true;
            found.filter(|mac| mac.is_unicast()).or(gateway).unwrap_or_else(|| Mac::local(rand::random()))
        });
        (mac, new)
    }

    /// The stored MAC of any bridge.
    fn gateway_mac(&self) -> Option<Mac> {
        let bridges = self.macs.iter().filter(|(name, _)| Device::from_name(name).is_some_and(|d| d.role == Role::Bridge));
        bridges.map(|(_, mac)| *mac).next()
    }
}

/// A file's version and content.
#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    content: T,
}

/// Only the version, decoded first, so that a later format is not treated as a corrupt file.
#[derive(Serialize, Deserialize)]
struct VersionHeader {
    version: u32,
}

impl StateDir {
    /// Opens and locks the directory; creates it with mode 0700 if it is missing. Fails if another agent has locked it.
    pub fn open(path: &Path) -> Result<StateDir, StateError> {
        create_directory(path)?;
        let lock = DirLock::acquire_named(path, lock::STATE_LOCK)?;
        Ok(StateDir { path: path.to_owned(), lock: Arc::new(lock) })
    }

    /// The directory of a named network, under the same lock; creates it with mode 0700 if it is missing.
    pub fn network(&self, name: &NetworkName) -> Result<StateDir, StateError> {
        let path = self.path.join(NETWORKS).join(name.to_string());
        create_directory(&path)?;
        Ok(StateDir { path, lock: Arc::clone(&self.lock) })
    }

    /// The named networks with a directory.
    pub fn networks(&self) -> Result<Vec<NetworkName>, StateError> {
        let path = self.path.join(NETWORKS);
        let failed = |source| FileError::new("read the directory", &path, source);
        let entries = match std::fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(failed(source).into()),
        };
        let mut names = Vec::new();
        for entry in entries {
            // Whatever else is there is not ours.
            names.extend(entry.map_err(failed)?.file_name().to_str().and_then(|name| name.parse().ok()));
        }
        names.sort();
        Ok(names)
    }

    /// Removes the agent's files, those of named networks too, and each directory that is empty then.
    pub fn remove(self) -> Result<(), StateError> {
        for network in self.networks()? {
            self.network(&network)?.remove()?;
        }
        let removed = ["endpoints.json", "endpoints.journal", "state.json", "node-id", lock::STATE_LOCK].iter().map(|name| {
            let path = self.path.join(name);
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(FileError::new("remove", &path, source)),
                _ => Ok(()),
            }
        });
        removed.collect::<Result<(), FileError>>()?;
        remove_directory(&self.path.join(NETWORKS))?;
        remove_directory(&self.path)?;
        Ok(())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The host's identity (`node-id`): 32 hex digits, created at the first start. A new identity clears the stored MACs, because
    /// removing the file is how a copied host becomes another host. Existing devices keep their MACs.
    pub fn node_id(&self) -> Result<String, StateError> {
        let path = self.path.join("node-id");
        if let Some(text) = file::read(&path)? {
            let id = String::from_utf8_lossy(&text).trim_end().to_owned();
            if id.len() == 32 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                return Ok(id);
            }
            file::quarantine(&path, "it is not 32 hex digits")?;
        }
        self.clear_macs()?;
        for network in self.networks()? {
            self.network(&network)?.clear_macs()?;
        }
        let id = format!("{:032x}", rand::random::<u128>());
        write_atomic(&path, format!("{id}\n").as_bytes(), FILE_MODE)?;
        tracing::info!(node_id = id, path = %path.display(), "created node id");
        Ok(id)
    }

    fn clear_macs(&self) -> Result<(), StateError> {
        let mut host = self.load_host()?;
        if !host.macs.is_empty() {
            host.macs.clear();
            self.save_host(&host)?;
        }
        Ok(())
    }

    /// Reads the host's state (`state.json`); the default at the first start, or if the file was corrupt.
    pub fn load_host(&self) -> Result<HostState, StateError> {
        Ok(self.load("state.json")?.unwrap_or_default())
    }

    /// Saves the host's state; does not write if it is unchanged.
    pub fn save_host(&self, state: &HostState) -> Result<(), StateError> {
        self.save("state.json", state)
    }

    /// Reads a JSON file of the directory; `None` if it is missing, or was corrupt and has been quarantined.
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

    /// Replaces a JSON file of the directory; does not write if the text is unchanged.
    pub fn save<T: Serialize>(&self, name: &str, content: &T) -> Result<(), StateError> {
        let path = self.path.join(name);
        write_if_changed(&path, &encode(&path, content)?, FILE_MODE)?;
        Ok(())
    }

    /// As [`StateDir::save`], but always writes, so that the text is synced to disk even if an unsynced write stored the same
    /// text before.
    pub fn save_synced<T: Serialize>(&self, name: &str, content: &T) -> Result<(), StateError> {
        let path = self.path.join(name);
        write_atomic(&path, &encode(&path, content)?, FILE_MODE)?;
        Ok(())
    }

    /// As [`StateDir::save_synced`], but without a sync, which takes milliseconds. For state that is useless after a power
    /// failure, because the objects that it describes are gone too.
    pub fn save_unsynced<T: Serialize>(&self, name: &str, content: &T) -> Result<(), StateError> {
        let path = self.path.join(name);
        file::write_atomic_unsynced(&path, &encode(&path, content)?, FILE_MODE)?;
        Ok(())
    }

    /// A journal in the directory.
    pub fn journal(&self, name: &str) -> Journal {
        Journal::new(self.path.join(name))
    }
}

/// Reads a JSON file of a state directory that an agent may have locked; `None` if it is missing. Changes nothing.
pub fn peek<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, FileError> {
    file::peek(path, |bytes| serde_json::from_slice(bytes))
}

/// Creates a directory with its parents; sets its mode if it exists.
fn create_directory(path: &Path) -> Result<(), FileError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(path)
        .map_err(|source| FileError::new("create the directory", path, source))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(DIRECTORY_MODE))
        .map_err(|source| FileError::new("set the mode of", path, source))
}

/// Removes a directory if it is empty. Quarantined files are left for the operator, and a mount point is not ours to remove.
fn remove_directory(path: &Path) -> Result<(), FileError> {
    use std::io::ErrorKind::{DirectoryNotEmpty, NotFound, ResourceBusy};
    match std::fs::remove_dir(path) {
        Err(source) if !matches!(source.kind(), DirectoryNotEmpty | NotFound | ResourceBusy) => {
            Err(FileError::new("remove the directory", path, source))
        }
        _ => Ok(()),
    }
}

fn encode<T: Serialize>(path: &Path, content: &T) -> Result<Vec<u8>, StateError> {
    let mut bytes = serde_json::to_vec_pretty(&Versioned { version: VERSION, content })
        .map_err(|e| FileError::new("encode", path, std::io::Error::other(e)))?;
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
mod tests;
