//! The CNI network list of the default network, for container runtimes (`--cni-conflist`).
//!
//! It is written once the overlay is up and never removed. Without it a runtime would start containers without a network or on
//! another network; with it the containers wait for the agent.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::config::HostConfig;
use crate::state::{FileError, write_if_changed};

/// The network's name in runtimes: `podman run --network overlay`.
const NETWORK_NAME: &str = "overlay";

/// The version that old and new runtimes support; new ones read `cniVersions`.
const CNI_VERSION: &str = "1.0.0";

/// The key and value that mark the file as ours.
const OWNER_FIELD: (&str, &str) = ("writtenBy", "overlayd");

/// The largest file that is read, in bytes.
const MAX_FILE_SIZE: u64 = 1 << 20;

/// The list's file.
#[derive(Debug)]
pub(super) struct Conflist {
    path: PathBuf,
    text: String,
    /// Whether the warning about a foreign file was logged.
    warned: bool,
}

/// The state of the file's path.
#[derive(Debug, PartialEq, Eq)]
enum ExistingFile {
    Missing,
    Own,
    Foreign,
}

impl Conflist {
    /// The file named by the configuration, if any; `socket` is the agent's.
    pub(super) fn from_config(config: &HostConfig, socket: &Path) -> Option<Conflist> {
        let path = config.cni_conflist.clone()?;
        Some(Conflist { path, text: render(socket), warned: false })
    }

    /// Writes the file if it is missing or is an older one of ours.
    ///
    /// Errors are only logged, because containers can be attached without the file.
    pub(super) fn write(&mut self) {
        match self.try_write() {
            Ok(true) => tracing::info!(file = %self.path.display(), network = NETWORK_NAME, "CNI network list written"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "cannot write CNI network list"),
        }
    }

    fn try_write(&mut self) -> Result<bool, FileError> {
        if inspect_file(&self.path)? == ExistingFile::Foreign {
            if !std::mem::replace(&mut self.warned, true) {
                let key = OWNER_FIELD.0;
                tracing::warn!(
                    file = %self.path.display(),
                    "CNI network list is not ours (it lacks the key {key}), leaving it unchanged; remove it to have it rewritten"
                );
            }
            return Ok(false);
        }
        if let Some(parent) = self.path.parent() {
            std::fs::create_dir_all(parent).map_err(|source| FileError::new("make the directory", parent, source))?;
        }
        write_if_changed(&self.path, self.text.as_bytes(), 0o644)
    }
}

fn inspect_file(path: &Path) -> Result<ExistingFile, FileError> {
    let failed = |source| FileError::new("read", path, source);
    let metadata = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(ExistingFile::Missing),
        metadata => metadata.map_err(failed)?,
    };
    // A symbolic link points to a foreign file, which we must not replace.
    if !metadata.is_file() || metadata.len() > MAX_FILE_SIZE {
        return Ok(ExistingFile::Foreign);
    }
    let bytes = std::fs::read(path).map_err(failed)?;
    let owner =
        serde_json::from_slice::<Value>(&bytes).ok().and_then(|list| list.get(OWNER_FIELD.0)?.as_str().map(str::to_owned));
    Ok(if owner.as_deref() == Some(OWNER_FIELD.1) { ExistingFile::Own } else { ExistingFile::Foreign })
}

fn render(socket: &Path) -> String {
    let list = json!({
        "cniVersion": CNI_VERSION,
        "cniVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        "name": NETWORK_NAME,
        OWNER_FIELD.0: OWNER_FIELD.1,
        "plugins": [{
            "type": "overlay-cni",
            "socket": socket.to_string_lossy(),
            "capabilities": { "ips": true, "mac": true, "portMappings": true, "dns": true },
        }],
    });
    format!("{list:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conflist_is_rewritten_but_foreign_file_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("net.d/10-overlay.conflist");
        let list = |socket: &str| Conflist { path: path.clone(), text: render(Path::new(socket)), warned: false };
        let read = || std::fs::read_to_string(&path).expect("the file");
        assert!(list("/run/a.sock").try_write().expect("the directory is made"));
        assert!(!list("/run/a.sock").try_write().expect("nothing to do"));
        assert!(read().contains("/run/a.sock") && read().ends_with("}\n"));
        assert!(list("/run/b.sock").try_write().expect("another socket"));
        assert!(read().contains("/run/b.sock"));
        for other in ["{}", "", "not JSON", &read().replace("writtenBy", "_")] {
            std::fs::write(&path, other).expect("a file");
            assert!(!list("/run/c.sock").try_write().expect("left alone"), "{other}");
            assert_eq!(read(), *other);
        }
        std::fs::remove_file(&path).expect("removed");
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).expect("a link");
        assert!(!list("/run/c.sock").try_write().expect("left alone"));
        assert!(!dir.path().join("elsewhere").exists());
    }
}
