//! The table as it is written down: whole in `endpoints.json`, and behind it in `endpoints.journal` what changed since, a line each.
//!
//! What a kill leaves is whole. The disk has it after the next audit: when the power is lost, so are the namespaces that the table is about, and an
//! attach would take twice as long if it waited. The whole file is written at an audit that finds changes, at the end, and where the journal
//! is long; lines that it holds already change nothing when they are read again.

use std::path::Path;
use std::sync::{Arc, Mutex};

use super::lock;
use super::table::{Change, Phase, Record, Stored, Table};
use crate::model::Endpoint;
use crate::state::{Journal, StateDir, StateError};

/// The files in the state directory.
pub(super) const FILE: &str = "endpoints.json";
pub(super) const JOURNAL: &str = "endpoints.journal";

/// What stands in the files.
#[derive(Debug)]
pub(super) struct Book {
    state: Arc<StateDir>,
    journal: Journal,
    /// The version of the table that stands in them.
    written: u64,
    /// The one that stands in the whole file, on the disk for certain.
    settled: u64,
}

impl Book {
    /// Opens it and reads what stands in it. Blocks, as everything here.
    pub(super) fn open(state: Arc<StateDir>) -> Result<(Book, Stored), StateError> {
        let journal = state.journal(JOURNAL);
        let stored: Stored = state.load(FILE)?.unwrap_or_default();
        let stored = stored.after(journal.read::<Change>()?);
        Ok((Book { state, journal, written: 0, settled: 0 }, stored))
    }

    /// Writes down what changed, where it is not by another's writing: those who wait at the same time share one.
    pub(super) fn write(&mut self, table: &Mutex<Table>, wanted: u64) -> Result<(), StateError> {
        if self.written >= wanted {
            return Ok(());
        }
        if !self.journal.has_room() || self.state.path().join(FILE).symlink_metadata().is_err() {
            return self.write_whole(table, StateDir::save_soon);
        }
        let (version, changes) = {
            let mut table = lock(table);
            (table.version, table.take_changes())
        };
        if let Err(error) = self.journal.append(changes.iter()) {
            lock(table).keep_changes(changes);
            return Err(error.into());
        }
        self.written = version;
        Ok(())
    }

    /// Whether the disk has all of it.
    pub(super) fn is_settled(&self, table: &Mutex<Table>) -> bool {
        self.settled == lock(table).version
    }

    /// Writes all of it down, and waits until the disk has it; nothing where that is so already.
    pub(super) fn settle(&mut self, table: &Mutex<Table>) -> Result<(), StateError> {
        if self.is_settled(table) {
            return Ok(());
        }
        self.write_whole(table, StateDir::save_whole)?;
        self.settled = self.written;
        Ok(())
    }

    fn write_whole(
        &mut self,
        table: &Mutex<Table>,
        save: fn(&StateDir, &str, &Stored) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        let (version, stored, changes) = {
            let mut table = lock(table);
            (table.version, table.stored(), table.take_changes())
        };
        let saved = save(&self.state, FILE, &stored).and_then(|()| Ok(self.journal.clear()?));
        if let Err(error) = saved {
            lock(table).keep_changes(changes);
            return Err(error);
        }
        self.written = version;
        Ok(())
    }
}

/// An endpoint as it is written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Whether it is attached; else it is on its way in or out.
    pub attached: bool,
}

/// What the state directory of an agent says, whether one runs or not, by name; `None` where no container was ever attached. Changes nothing.
///
/// # Errors
/// A file cannot be read, or is torn: the text names it and says why.
pub fn recorded(state_dir: &Path) -> Result<Option<Vec<Recorded>>, StateError> {
    let Some(stored) = crate::state::peek::<Stored>(&state_dir.join(FILE))? else { return Ok(None) };
    let stored = stored.after(Journal::peek::<Change>(&state_dir.join(JOURNAL))?);
    let recorded =
        |record: Record| Recorded { endpoint: Arc::unwrap_or_clone(record.endpoint), attached: record.phase == Phase::Attached };
    Ok(Some(stored.endpoints.into_iter().map(recorded).collect()))
}
