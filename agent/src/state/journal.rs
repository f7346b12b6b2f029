//! Append-only journal of changes to a snapshot file: one JSON line per change, until the next snapshot.
//!
//! Replacing a file takes several hundred microseconds, and longer for larger files (ext4 starts writing the new data on a rename
//! over an existing file, `auto_da_alloc` in ext4(5)). Appending a line takes some ten microseconds.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::file::{self, FileError};
use super::{FILE_MODE, StateError, VERSION, VersionHeader};

/// Length in bytes at which a new snapshot has to be written.
const MAX_LENGTH: u64 = 256 << 10;

/// A journal. A failed append leaves it unchanged.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    /// Number of bytes written by this process.
    length: u64,
}

impl Journal {
    /// The journal at a path; does not open it.
    pub(super) fn new(path: PathBuf) -> Journal {
        Journal { path, length: 0 }
    }

    /// Reads its changes in order. An incomplete last line, as a kill leaves it, is ignored. At any other unreadable line the
    /// file is quarantined, and the changes before that line are returned.
    pub fn read<C: DeserializeOwned>(&self) -> Result<Vec<C>, StateError> {
        let Some(bytes) = file::read(&self.path)? else { return Ok(Vec::new()) };
        match parse(&bytes) {
            Ok(changes) => Ok(changes),
            Err(ParseError { version: Some(found), .. }) => Err(StateError::Version { path: self.path.clone(), found }),
            Err(ParseError { entries, reason, .. }) => {
                file::quarantine(&self.path, &reason)?;
                Ok(entries)
            }
        }
    }

    /// As [`Journal::read`], but changes nothing, so that it works while an agent uses the journal.
    pub fn peek<C: DeserializeOwned>(path: &Path) -> Result<Vec<C>, FileError> {
        Ok(file::peek(path, |bytes| parse(bytes).map_err(|error| error.reason))?.unwrap_or_default())
    }

    /// Appends changes, all or none, without a sync. The journal must have room.
    pub fn append<C: Serialize>(&mut self, changes: impl Iterator<Item = C>) -> Result<(), FileError> {
        let fail = |source| FileError::new("write", &self.path, source);
        let mut lines = Vec::new();
        if self.length == 0 {
            append_line(&mut lines, &VersionHeader { version: VERSION }).map_err(fail)?;
        }
        for change in changes {
            append_line(&mut lines, &change).map_err(fail)?;
        }
        // Opened each time, so that a file system that became read-only causes an error.
        let opened = OpenOptions::new().create_new(self.length == 0).append(true).mode(FILE_MODE).open(&self.path);
        let mut file = opened.map_err(fail)?;
        if let Err(error) = file.write_all(&lines) {
            // A partial write would make the next line unreadable. If the truncation fails too, `has_room` detects the wrong
            // length.
            let _ = file.set_len(self.length);
            return Err(fail(error));
        }
        self.length += lines.len() as u64;
        Ok(())
    }

    /// Whether changes can be appended: it is not too long, and its length is what this process wrote. Otherwise it was removed,
    /// or has a partial line.
    pub fn has_room(&self) -> bool {
        let found = self.path.symlink_metadata().map(|m| m.len());
        self.length < MAX_LENGTH && found.map_or(self.length == 0, |found| found == self.length && found > 0)
    }

    /// Removes it, once the snapshot contains all its changes.
    pub fn clear(&mut self) -> Result<(), FileError> {
        self.length = 0;
        match std::fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(FileError::new("remove", &self.path, source)),
            _ => Ok(()),
        }
    }
}

/// An unreadable line of a journal, and the changes before it.
struct ParseError<C> {
    entries: Vec<C>,
    /// The journal's version, if a newer agent wrote it.
    version: Option<u32>,
    reason: String,
}

fn parse<C: DeserializeOwned>(bytes: &[u8]) -> Result<Vec<C>, ParseError<C>> {
    // Bytes after the last line end are an incomplete append.
    let complete_length = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
    let mut lines = bytes[..complete_length].split_inclusive(|b| *b == b'\n');
    let mut entries = Vec::new();
    let Some(head) = lines.next() else { return Ok(entries) };
    let parse_error = |entries, error: serde_json::Error| ParseError { entries, version: None, reason: error.to_string() };
    match serde_json::from_slice::<VersionHeader>(head) {
        Ok(head) if head.version > VERSION => {
            let reason = format!("it has version {}", head.version);
            return Err(ParseError { entries, version: Some(head.version), reason });
        }
        Ok(_) => {}
        Err(error) => return Err(parse_error(entries, error)),
    }
    for line in lines {
        match serde_json::from_slice(line) {
            Ok(change) => entries.push(change),
            Err(error) => return Err(parse_error(entries, error)),
        }
    }
    Ok(entries)
}

fn append_line(lines: &mut Vec<u8>, content: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *lines, content).map_err(io::Error::other)?;
    lines.push(b'\n');
    Ok(())
}
