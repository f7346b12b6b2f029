//! Lock of a directory against a second agent: an flock on a file in it, for the lifetime of the process.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::FileError;

/// Lock file of a run directory.
const RUN_LOCK: &str = "overlayd.lock";

/// Lock file of a state directory; its name differs, so that one directory can be both.
pub(super) const STATE_LOCK: &str = "state.lock";

/// A held lock. The kernel releases it when the process ends, also after a crash. The file is not removed, since that would race
/// with the next agent.
#[derive(Debug)]
pub struct DirLock {
    _file: File,
}

/// Why the lock could not be acquired.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent uses the directory.
    #[error(
        "{directory} is in use by another overlayd ({holder}): stop that one, or start this one with its own --run-dir and --state-dir"
    )]
    Held {
        /// The directory.
        directory: PathBuf,
        /// `pid 123`, or a text if the pid is unknown.
        holder: String,
    },
    /// The lock file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
}

impl DirLock {
    /// Locks a run directory, without waiting; creates it with mode 0755 if it is missing.
    pub fn acquire(directory: &Path) -> Result<DirLock, LockError> {
        DirLock::acquire_named(directory, RUN_LOCK)
    }

    pub(super) fn acquire_named(directory: &Path, name: &str) -> Result<DirLock, LockError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(|source| FileError::new("create the directory", directory, source))?;
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
        // The pid is only for the error message of another agent, so a failed write (disk full) does not affect the lock.
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
        _ => "pid unknown".to_owned(),
    }
}
