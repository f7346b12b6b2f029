//! One agent a directory: an flock on a file in it, for as long as the process lives.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::FileError;

/// The lock file of a run directory.
const RUN_LOCK: &str = "overlayd.lock";

/// The lock file of a state directory; another name, so that one directory may be both.
pub(super) const STATE_LOCK: &str = "state.lock";

/// A held lock. The kernel lets go of it when the process ends, however it ends. The file stays: removing it would race with the next
/// agent.
#[derive(Debug)]
pub struct DirLock {
    _file: File,
}

/// Why the lock is not held.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent uses the directory.
    #[error(
        "{directory} is in use by another overlayd ({holder}): stop that one, or start this one with its own --run-dir and --state-dir"
    )]
    Held {
        /// The directory.
        directory: PathBuf,
        /// `pid 123`, or that it is not known.
        holder: String,
    },
    /// The lock file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
}

impl DirLock {
    /// Locks a run directory, made with mode 0755 where it is missing. Does not wait.
    pub fn acquire(directory: &Path) -> Result<DirLock, LockError> {
        DirLock::acquire_named(directory, RUN_LOCK)
    }

    pub(super) fn acquire_named(directory: &Path, name: &str) -> Result<DirLock, LockError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(|source| FileError::new("make the directory", directory, source))?;
        let path = directory.join(name);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(|source| FileError::new("open", &path, source))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LockError::Held { directory: directory.to_owned(), holder: holder(&mut file) });
            }
            Err(TryLockError::Error(source)) => return Err(FileError::new("lock", &path, source).into()),
        }
        // The pid is for the other agent's message only: without it (disk full) the lock is as good.
        let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "cannot write the pid into the lock file");
        }
        Ok(DirLock { _file: file })
    }
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.take(32).read_to_string(&mut text);
    match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(pid)) => format!("pid {pid}"),
        _ => "its pid is not known".to_owned(),
    }
}
