//! Files of labs: one directory per lab below a directory of the user.

use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use nix::unistd::geteuid;

use super::LabError;
use super::layout::{LabName, Layout};

/// Variable with the directory of the labs. A rootless lab sets it inside, where the user appears as root.
pub const DIR_VARIABLE: &str = "OVERLAY_LAB_DIR";

/// Variable of a command that runs inside a supervisor's namespaces (`rootless`).
pub(super) const INSIDE_VARIABLE: &str = "OVERLAY_LAB_INSIDE";

/// Space that a lab's directory needs, in bytes: etcd writes two log segments of 64 MB each at once, and some more.
const REQUIRED_FREE_BYTES: u64 = 160 << 20;

/// Layout file in a lab's directory.
const LAYOUT_FILE: &str = "lab.json";

/// Directory of a user's labs.
#[derive(Debug, Clone)]
pub struct LabsDir {
    base: PathBuf,
}

impl LabsDir {
    /// Directory of this user: `$OVERLAY_LAB_DIR`, for root /run/overlay-lab, else `$XDG_RUNTIME_DIR/overlay-lab` or
    /// /tmp/overlay-lab-UID.
    pub fn for_user() -> LabsDir {
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let base = match set(DIR_VARIABLE) {
            Some(dir) => dir,
            None if geteuid().is_root() => PathBuf::from("/run/overlay-lab"),
            None => match set("XDG_RUNTIME_DIR") {
                Some(dir) => dir.join("overlay-lab"),
                None => PathBuf::from(format!("/tmp/overlay-lab-{}", geteuid())),
            },
        };
        LabsDir { base }
    }

    /// Uses another directory.
    pub fn at(base: impl Into<PathBuf>) -> LabsDir {
        LabsDir { base: base.into() }
    }

    /// Path of the directory.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// Path of a lab's directory, existing or not.
    pub fn lab_dir(&self, name: &LabName) -> PathBuf {
        self.base.join(name.to_string())
    }

    /// Lists the labs that have a directory.
    pub fn labs(&self) -> Result<Vec<LabName>, LabError> {
        let entries = match fs::read_dir(&self.base) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(LabError::File { action: "read", path: self.base.clone(), source }),
        };
        let mut names: Vec<LabName> = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        names.sort();
        Ok(names)
    }

    /// Creates a lab's directory, accessible to this user only.
    pub fn create_lab_dir(&self, name: &LabName) -> Result<PathBuf, LabError> {
        let dir = self.lab_dir(name);
        for path in [&self.base, &dir] {
            let result = DirBuilder::new().recursive(true).mode(0o700).create(path);
            result.map_err(|source| LabError::File { action: "make", path: path.clone(), source })?;
            // In /tmp another user can have created it first.
            let found =
                fs::symlink_metadata(path).map_err(|source| LabError::File { action: "examine", path: path.clone(), source })?;
            if !found.is_dir() || found.uid() != geteuid().as_raw() {
                return Err(LabError::File {
                    action: "use",
                    path: path.clone(),
                    source: std::io::Error::other("it is not a directory of this user: remove it, or set OVERLAY_LAB_DIR"),
                });
            }
        }
        Ok(dir)
    }

    /// Claims a lab's name: writes its layout file atomically, unless one exists.
    pub fn claim(&self, layout: &Layout) -> Result<PathBuf, LabError> {
        let dir = self.create_lab_dir(&layout.name)?;
        let longest = socket_path(&dir, layout.hosts.last().map_or("", |h| h.name.as_str()));
        // sockaddr_un's sun_path with its final zero (unix(7)).
        if longest.as_os_str().len() >= 108 {
            let message = format!("{} is too long for a socket: set {DIR_VARIABLE} to a shorter directory", longest.display());
            return Err(LabError::Options { message });
        }
        let free =
            statvfs(&dir).map_err(|errno| LabError::File { action: "examine", path: dir.clone(), source: errno.into() })?;
        let free = free.blocks_available().saturating_mul(free.fragment_size());
        if free < REQUIRED_FREE_BYTES {
            let message = format!(
                "{} has {} MiB free, a lab needs {} for its etcd: make room, or set {DIR_VARIABLE} to another directory",
                dir.display(),
                free >> 20,
                REQUIRED_FREE_BYTES >> 20
            );
            return Err(LabError::Options { message });
        }
        let path = dir.join(LAYOUT_FILE);
        let temporary = dir.join(format!("{LAYOUT_FILE}.{}", std::process::id()));
        let text =
            serde_json::to_string_pretty(layout).map_err(|e| LabError::Damaged { path: path.clone(), reason: e.to_string() })?;
        let file = |action, path: &Path| {
            let path = path.to_owned();
            move |source| LabError::File { action, path, source }
        };
        File::create(&temporary)
            .and_then(|mut f| f.write_all(text.as_bytes()).and_then(|()| f.sync_all()))
            .map_err(file("write", &temporary))?;
        // link(2) fails if the target exists, unlike rename(2): of two concurrent starts only one gets the name.
        let linked = fs::hard_link(&temporary, &path);
        fs::remove_file(&temporary).map_err(file("remove", &temporary))?;
        match linked {
            Ok(()) => Ok(dir),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                Err(LabError::Exists { name: layout.name.to_string(), dir })
            }
            Err(source) => Err(LabError::File { action: "write", path, source }),
        }
    }

    /// Reads a lab's layout.
    pub fn read_layout(&self, name: &LabName) -> Result<Layout, LabError> {
        let path = self.lab_dir(name).join(LAYOUT_FILE);
        match fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text).map_err(|e| LabError::Damaged { path, reason: e.to_string() }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let known = self.labs()?.iter().map(ToString::to_string).collect();
                Err(LabError::Missing { name: name.to_string(), known })
            }
            Err(source) => Err(LabError::File { action: "read", path, source }),
        }
    }
}

/// Socket of a host's agent.
pub fn socket_path(lab_dir: &Path, host: &str) -> PathBuf {
    lab_dir.join(host).join("run/overlayd.sock")
}

/// Whether this process is inside a supervisor's namespaces.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE_VARIABLE).is_some()
}

#[cfg(test)]
mod tests {
    use super::super::LabOptions;
    use super::*;

    #[test]
    fn lab_name_is_claimed_once() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let labs_dir = LabsDir::at(dir.path().join("labs"));
        let layout = Layout::new(&LabOptions::new("one".parse().expect("a name"))).expect("a layout");
        labs_dir.claim(&layout).expect("free");
        assert!(matches!(labs_dir.claim(&layout), Err(LabError::Exists { .. })));
        assert_eq!(labs_dir.read_layout(&layout.name).expect("there"), layout);
        assert_eq!(labs_dir.labs().expect("a list"), vec![layout.name.clone()]);
        let missing = labs_dir.read_layout(&"two".parse().expect("a name")).expect_err("none").to_string();
        assert!(missing.contains("existing: one"), "{missing}");
        let names: Vec<_> =
            fs::read_dir(labs_dir.lab_dir(&layout.name)).expect("a directory").flatten().map(|e| e.file_name()).collect();
        assert_eq!(names, ["lab.json"]);
    }

    #[test]
    fn damaged_layout_file_is_reported() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let labs_dir = LabsDir::at(dir.path());
        let name: LabName = "one".parse().expect("a name");
        fs::write(labs_dir.create_lab_dir(&name).expect("a directory").join(LAYOUT_FILE), "{").expect("writable");
        assert!(matches!(labs_dir.read_layout(&name), Err(LabError::Damaged { .. })));
    }
}
