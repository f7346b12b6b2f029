//! Atomic file replacement, and file system errors with a remedy.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Maximum size of a file to read, in bytes: 65,536 endpoints take some 20 MiB; a larger file is not ours.
const MAX_FILE_SIZE: u64 = 64 << 20;

/// A file system error.
#[derive(Debug)]
pub struct FileError {
    /// The failed action, as a verb: `write`.
    pub action: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// The system's error.
    pub source: io::Error,
}

impl FileError {
    /// An error of an action on a path.
    pub fn new(action: &'static str, path: &Path, source: io::Error) -> FileError {
        FileError { action, path: path.to_owned(), source }
    }

    /// Remedy for the error; `None` if there is only the system's text.
    fn remedy(&self) -> Option<&'static str> {
        match self.source.raw_os_error()? {
            libc::ENOSPC => Some("the file system is full: free space on it (`df -h`, and `df -i` for inodes)"),
            libc::EDQUOT => Some("the quota is used up: free space or raise it"),
            libc::EROFS => Some("the file system is read-only: remount it writable, or choose another directory"),
            libc::EACCES | libc::EPERM => {
                Some("overlayd runs as root and needs to own this path; check its owner, mode and attributes")
            }
            libc::EIO => Some("the disk reports an error: see `dmesg`"),
            libc::ENOTDIR => Some("a part of the path is a file where a directory is needed: remove it"),
            libc::EISDIR => Some("there is a directory where a file is needed: remove it"),
            libc::ENOENT => Some("the directory does not exist: create it, or choose another path"),
            libc::EMFILE | libc::ENFILE => Some("too many open files: raise the limit (`LimitNOFILE=` in the unit)"),
            libc::ENAMETOOLONG => Some("choose a shorter path"),
            _ => None,
        }
    }
}

impl std::fmt::Display for FileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot {} {}: {}", self.action, self.path.display(), self.source)?;
        self.remedy().map_or(Ok(()), |remedy| write!(f, "; {remedy}"))
    }
}

impl std::error::Error for FileError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Replaces a file atomically: temporary file in the same directory, fsync, rename, fsync of the directory. After an error the
/// old file is unchanged. The mode does not depend on the umask.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    replace(path, bytes, mode, File::sync_all)?;
    sync_directory(path)
}

/// As [`write_atomic`], but without a sync. Even if this process is killed, a reader sees either the old text or the new one. A
/// power failure may leave either of them, or a corrupt file.
pub fn write_atomic_unsynced(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    replace(path, bytes, mode, |_| Ok(()))
}

fn replace(path: &Path, bytes: &[u8], mode: u32, sync: impl Fn(&File) -> io::Result<()>) -> Result<(), FileError> {
    let name = path.file_name().ok_or_else(|| FileError::new("write", path, io::Error::from(io::ErrorKind::IsADirectory)))?;
    let mut temporary_name = std::ffi::OsString::from(".");
    temporary_name.push(name);
    temporary_name.push(".tmp");
    let temporary = path.with_file_name(temporary_name);
    let written = write_new(&temporary, bytes, mode)
        .and_then(|file| sync(&file))
        .map_err(|source| FileError::new("write", &temporary, source))
        .and_then(|()| std::fs::rename(&temporary, path).map_err(|source| FileError::new("replace", path, source)));
    if let Err(error) = written {
        // Only the first error is worth reporting; the next write replaces a leftover temporary file.
        let _ = std::fs::remove_file(&temporary);
        return Err(error);
    }
    Ok(())
}

/// As [`write_atomic`], but only if content or mode differ. Returns whether it wrote.
pub fn write_if_changed(path: &Path, bytes: &[u8], mode: u32) -> Result<bool, FileError> {
    if content_matches(path, bytes, mode).unwrap_or(false) {
        return Ok(false);
    }
    write_atomic(path, bytes, mode).map(|()| true)
}

fn content_matches(path: &Path, bytes: &[u8], mode: u32) -> io::Result<bool> {
    let metadata = std::fs::symlink_metadata(path)?;
    let same_shape = metadata.is_file() && metadata.mode() & 0o7777 == mode && metadata.len() == bytes.len() as u64;
    Ok(same_shape && std::fs::read(path)? == bytes)
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<File> {
    // A leftover of a crash. A symbolic link at this path is not followed, because the file is created anew.
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    Ok(file)
}

fn sync_directory(path: &Path) -> Result<(), FileError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory).and_then(|d| d.sync_all()).map_err(|source| FileError::new("sync the directory", directory, source))
}

/// Reads a file; `None` if it does not exist, or if it was unreadable and has been quarantined.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    let unreadable = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::EIO | libc::EISDIR | libc::ELOOP));
    let mut bytes = Vec::new();
    let outcome = File::open(path).and_then(|file| file.take(MAX_FILE_SIZE + 1).read_to_end(&mut bytes));
    match outcome {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) if unreadable(&e) => quarantine(path, &e.to_string()).map(|()| None),
        Err(e) => Err(FileError::new("read", path, e)),
        Ok(_) if bytes.len() as u64 > MAX_FILE_SIZE => quarantine(path, "it is larger than 64 MiB").map(|()| None),
        Ok(_) => Ok(Some(bytes)),
    }
}

/// Reads and decodes a file that an agent may be using; `None` if it does not exist. Changes nothing.
pub(super) fn peek<T, E>(path: &Path, decode: impl FnOnce(&[u8]) -> Result<T, E>) -> Result<Option<T>, FileError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(FileError::new("read", path, source)),
    };
    let invalid_data = |reason: E| FileError::new("read", path, io::Error::new(io::ErrorKind::InvalidData, reason));
    decode(&bytes).map(Some).map_err(invalid_data)
}

/// Renames an unusable file to `NAME.torn-<unix time>` and logs that.
pub(super) fn quarantine(path: &Path, reason: &str) -> Result<(), FileError> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let candidate = |attempt: u32| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".torn-{seconds}"));
        if attempt > 0 {
            name.push(format!("-{attempt}"));
        }
        PathBuf::from(name)
    };
    // Maximum number of such files per second; beyond it the last one is overwritten.
    let quarantine_path = (0..100).map(candidate).find(|p| !p.exists()).unwrap_or_else(|| candidate(100));
    std::fs::rename(path, &quarantine_path).map_err(|source| FileError::new("set aside", path, source))?;
    sync_directory(path)?;
    tracing::warn!(
        path = %path.display(), aside = %quarantine_path.display(), reason,
        "unusable state file set aside, starting without its content"
    );
    Ok(())
}
