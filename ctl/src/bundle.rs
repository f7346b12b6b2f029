//! Support archive of `overlayctl support-bundle`: the agent's state, its log, the kernel's state, versions and configuration,
//! without secrets.
//!
//! Works without a running agent: the list of contents names each missing part with the reason. [`sources`] defines the parts,
//! [`redact`] removes secrets. No tasks.

pub mod redact;
pub mod sources;

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};

use redact::Redactor;

/// Largest part that is kept complete, in bytes. Of a longer one the end is kept, which is the most recent.
const MAX_PART_BYTES: usize = 16 << 20;

/// A collected part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Path in the archive.
    pub name: String,
    /// Source: a command, a file, a request.
    pub from: String,
    /// Text, or the reason for its absence.
    pub content: Result<String, String>,
}

/// One line of the list of contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Path in the archive.
    pub name: String,
    /// Source.
    pub from: String,
    /// Size in bytes, without secrets.
    pub bytes: usize,
    /// Number of removed secrets.
    pub removed: usize,
    /// Reason for its absence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing: Option<String>,
}

/// A finished archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    /// Path of the file.
    pub file: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// Contents, including missing parts.
    pub entries: Vec<Entry>,
}

/// Failure to write the archive.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Write error of the file.
    #[error("cannot write {}: {source}; choose another path with --out FILE", path.display())]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system call.
        source: std::io::Error,
    },
}

/// An archive in progress, in a temporary file next to its path. It gets its name when it is complete; only its owner can read
/// it.
pub struct Archive {
    path: PathBuf,
    partial: PathBuf,
    /// First directory of each path inside: the archive unpacks to it.
    top: String,
    tar: tar::Builder<GzEncoder<std::fs::File>>,
    redactor: Redactor,
    entries: Vec<Entry>,
    mtime: u64,
}

impl Archive {
    /// Starts an archive. An existing file is not overwritten.
    pub fn create(path: &Path, top: &str, mtime: u64, redactor: Redactor) -> Result<Archive, BundleError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| BundleError::Write { path, source }
        };
        if path.exists() {
            return Err(failed(path)(std::io::ErrorKind::AlreadyExists.into()));
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&partial);
        let file = file.map_err(failed(&partial))?;
        let tar = tar::Builder::new(GzEncoder::new(file, Compression::default()));
        Ok(Archive { path: path.to_owned(), partial, top: top.to_owned(), tar, redactor, entries: Vec::new(), mtime })
    }

    /// Adds a part without its secrets.
    pub fn add(&mut self, part: Part) -> Result<(), BundleError> {
        let Part { name, from, content } = part;
        match content {
            Err(missing) => {
                let missing = self.redactor.redact(&missing).0;
                self.entries.push(Entry { name, from, bytes: 0, removed: 0, missing: Some(missing) });
            }
            Ok(text) => {
                let (text, removed) = self.redactor.redact(tail(&text));
                self.entries.push(Entry { name: name.clone(), from, bytes: text.len(), removed, missing: None });
                self.append(&name, text.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Adds the list of contents and renames the archive to its path.
    pub fn finish(mut self) -> Result<Bundle, BundleError> {
        let list = contents(&self.entries);
        self.append("CONTENTS.txt", list.as_bytes())?;
        let (path, partial) = (self.path.clone(), self.partial.clone());
        let entries = std::mem::take(&mut self.entries);
        let failed = |source| BundleError::Write { path: path.clone(), source };
        // Replaces the builder: dropping the archive would remove the file.
        let empty = tar::Builder::new(GzEncoder::new(std::fs::File::open("/dev/null").map_err(failed)?, Compression::none()));
        let tar = std::mem::replace(&mut self.tar, empty);
        let mut file = tar.into_inner().and_then(GzEncoder::finish).map_err(failed)?;
        file.flush().and_then(|()| file.sync_all()).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        std::fs::rename(&partial, &path).map_err(failed)?;
        Ok(Bundle { file: path.clone(), bytes, entries })
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), BundleError> {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.mtime);
        let archive_path = format!("{}/{name}", self.top);
        let partial = self.partial.clone();
        self.tar.append_data(&mut header, archive_path, bytes).map_err(|source| BundleError::Write { path: partial, source })
    }
}

impl Drop for Archive {
    // An incomplete archive is removed; a finished one has been renamed.
    fn drop(&mut self) {
        let _ignored = std::fs::remove_file(&self.partial);
    }
}

/// End of a text that is too long, from the start of a line.
fn tail(text: &str) -> &str {
    let Some(mut start) = text.len().checked_sub(MAX_PART_BYTES) else { return text };
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].split_once('\n').map_or(&text[start..], |(_, rest)| rest)
}

/// Formats the list of contents.
pub fn contents(entries: &[Entry]) -> String {
    let mut text = "Contents, with size, removed secrets and source.\n\n".to_owned();
    for entry in entries.iter().filter(|entry| entry.missing.is_none()) {
        let removed = if entry.removed > 0 { format!(", {} secrets removed", entry.removed) } else { String::new() };
        text.push_str(&format!("{}  ({} bytes{removed})  {}\n", entry.name, entry.bytes, entry.from));
    }
    let missing: Vec<&Entry> = entries.iter().filter(|entry| entry.missing.is_some()).collect();
    if !missing.is_empty() {
        text.push_str("\nMissing:\n\n");
    }
    for entry in missing {
        text.push_str(&format!("{}  {}: {}\n", entry.name, entry.from, entry.missing.as_deref().unwrap_or_default()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfinished_archive_leaves_no_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x.tar.gz");
        let mut archive = Archive::create(&path, "x", 0, Redactor::new(Vec::new())).expect("begun");
        archive.add(Part { name: "a".to_owned(), from: "b".to_owned(), content: Ok("c".to_owned()) }).expect("added");
        drop(archive);
        assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 0);
    }

    #[test]
    fn long_text_keeps_its_tail() {
        let text = format!("{}\nlast line\n", "äöü\n".repeat(MAX_PART_BYTES / 6));
        let kept = tail(&text);
        assert!(kept.len() <= MAX_PART_BYTES && kept.ends_with("last line\n") && kept.starts_with('ä'));
        assert_eq!(tail("short"), "short");
    }
}
