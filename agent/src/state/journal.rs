//! Changes to what a file holds, behind it in a file of their own: a line of JSON each, appended, until the first one is written whole again.
//!
//! To replace a file costs the file system several hundred microseconds (ext4 begins to write the new data out when it takes the place of
//! another's, `auto_da_alloc` in ext4(5)) and grows with the file; to append a line costs some ten.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::file::{self, FileError};
use super::{FILE_MODE, StateError, VERSION, VersionHeader};

/// Bytes from which on the file behind which it stands is to be written whole again.
const MAX_LENGTH: u64 = 256 << 10;

/// A journal. After a failed append it is as it was before.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    /// Its length in bytes, as far as this process wrote it.
    length: u64,
}

impl Journal {
    /// The journal at a path; nothing is opened.
    pub(super) fn at(path: PathBuf) -> Journal {
        Journal { path, length: 0 }
    }

    /// The changes in it, in their order. A last line that a kill cut off is no change; what cannot be read beyond that is set aside with the rest.
    pub fn read<C: DeserializeOwned>(&self) -> Result<Vec<C>, StateError> {
        let Some(bytes) = file::read(&self.path)? else { return Ok(Vec::new()) };
        match parse(&bytes) {
            Ok(changes) => Ok(changes),
            Err(ParseError { version: Some(found), .. }) => Err(StateError::Version { path: self.path.clone(), found }),
            Err(ParseError { entries: before, reason, .. }) => {
                file::quarantine(&self.path, &reason)?;
                Ok(before)
            }
        }
    }

    /// The same of a journal that another agent may hold: changes nothing.
    pub fn peek<C: DeserializeOwned>(path: &Path) -> Result<Vec<C>, FileError> {
        Ok(file::peek(path, |bytes| parse(bytes).map_err(|torn| torn.reason))?.unwrap_or_default())
    }

    /// Adds changes, all or none, to one that has room. It is left to the kernel when they reach the disk.
    pub fn append<C: Serialize>(&mut self, changes: impl Iterator<Item = C>) -> Result<(), FileError> {
        let fail = |source| FileError::new("write", &self.path, source);
        let mut lines = Vec::new();
        if self.length == 0 {
            append_line(&mut lines, &VersionHeader { version: VERSION }).map_err(fail)?;
        }
        for change in changes {
            append_line(&mut lines, &change).map_err(fail)?;
        }
        // Opened each time: a file system that became read-only says so.
        let opened = OpenOptions::new().create_new(self.length == 0).append(true).mode(FILE_MODE).open(&self.path);
        let mut file = opened.map_err(fail)?;
        if let Err(error) = file.write_all(&lines) {
            // What part of it was written would make the next line unreadable; where it cannot be taken back, its length says so.
            let _ = file.set_len(self.length);
            return Err(fail(error));
        }
        self.length += lines.len() as u64;
        Ok(())
    }

    /// Whether it can take more: it is not too long, and it is what this process wrote: nobody took it away, and no line in it is half a one.
    pub fn has_room(&self) -> bool {
        let found = self.path.symlink_metadata().map(|m| m.len());
        self.length < MAX_LENGTH && found.map_or(self.length == 0, |found| found == self.length && found > 0)
    }

    /// Removes it: all of it stands in the other file now.
    pub fn clear(&mut self) -> Result<(), FileError> {
        self.length = 0;
        match std::fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(FileError::new("remove", &self.path, source)),
            _ => Ok(()),
        }
    }
}

/// Where a journal cannot be read any further.
struct ParseError<C> {
    entries: Vec<C>,
    /// The version of one that a newer agent wrote.
    version: Option<u32>,
    reason: String,
}

fn parse<C: DeserializeOwned>(bytes: &[u8]) -> Result<Vec<C>, ParseError<C>> {
    // What stands behind the last line's end was never finished.
    let complete_length = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
    let mut lines = bytes[..complete_length].split_inclusive(|b| *b == b'\n');
    let mut before = Vec::new();
    let Some(head) = lines.next() else { return Ok(before) };
    let torn = |before, error: serde_json::Error| ParseError { entries: before, version: None, reason: error.to_string() };
    match serde_json::from_slice::<VersionHeader>(head) {
        Ok(head) if head.version > VERSION => {
            let reason = format!("it has version {}", head.version);
            return Err(ParseError { entries: before, version: Some(head.version), reason });
        }
        Ok(_) => {}
        Err(error) => return Err(torn(before, error)),
    }
    for line in lines {
        match serde_json::from_slice(line) {
            Ok(change) => before.push(change),
            Err(error) => return Err(torn(before, error)),
        }
    }
    Ok(before)
}

fn append_line(lines: &mut Vec<u8>, content: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *lines, content).map_err(io::Error::other)?;
    lines.push(b'\n');
    Ok(())
}
