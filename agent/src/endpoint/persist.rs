//! The table as it is written down: whole in `endpoint_count.json`, and behind it in `endpoint_count.journal` what changed since, a line each.
//!
//! What a kill leaves is whole. The disk has it after the next audit: when the power is lost, so are the namespaces that the table is about, and an
//! attach would take twice as long if it waited. The whole file is written at an audit that finds changes, at the end, and where the journal
//! is long; lines that it holds already change nothing when they are read again.

use std::path::Path;
use std::sync::{Arc, Mutex};

use super::lock;
use super::table::{EndpointRecord, EndpointTable, JournalEntry, Phase, StoredTable};
use crate::model::Endpoint;
use crate::state::{Journal, StateDir, StateError};

/// The files in the state directory.
pub(super) const FILE: &str = "endpoints.json";
pub(super) const JOURNAL: &str = "endpoints.journal";

/// What stands in the files.
#[derive(Debug)]
pub(super) struct EndpointStore {
    state: Arc<StateDir>,
    journal: Journal,
    /// The version of the table that stands in them.
    written_version: u64,
    /// The one that stands in the whole file, on the disk for certain.
    synced_version: u64,
}

impl EndpointStore {
    /// Opens it and reads what stands in it. Blocks, as everything here.
    pub(super) fn open(state: Arc<StateDir>) -> Result<(EndpointStore, StoredTable), StateError> {
        let journal = state.journal(JOURNAL);
        let stored: StoredTable = state.load(FILE)?.unwrap_or_default();
        let stored = stored.replay(journal.read::<JournalEntry>()?);
        Ok((EndpointStore { state, journal, written_version: 0, synced_version: 0 }, stored))
    }

    /// Writes down what changed, where it is not by another's writing: those who wait at the same time share one.
    pub(super) fn write(&mut self, table: &Mutex<EndpointTable>, wanted: u64) -> Result<(), StateError> {
        if self.written_version >= wanted {
            return Ok(());
        }
        if !self.journal.has_room() || self.state.path().join(FILE).symlink_metadata().is_err() {
            return self.write_snapshot(table, StateDir::save_unsynced);
        }
        let (version, changes) = {
            let mut table = lock(table);
            (table.version, table.take_changes())
        };
        if let Err(error) = self.journal.append(changes.iter()) {
            lock(table).requeue_changes(changes);
            return Err(error.into());
        }
        self.written_version = version;
        Ok(())
    }

    /// Whether the disk has all of it.
    pub(super) fn is_synced(&self, table: &Mutex<EndpointTable>) -> bool {
        self.synced_version == lock(table).version
    }

    /// Writes all of it down, and waits until the disk has it; nothing where that is so already.
    pub(super) fn flush(&mut self, table: &Mutex<EndpointTable>) -> Result<(), StateError> {
        if self.is_synced(table) {
            return Ok(());
        }
        self.write_snapshot(table, StateDir::save_synced)?;
        self.synced_version = self.written_version;
        Ok(())
    }

    fn write_snapshot(
        &mut self,
        table: &Mutex<EndpointTable>,
        save: fn(&StateDir, &str, &StoredTable) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        let (version, stored, changes) = {
            let mut table = lock(table);
            (table.version, table.stored(), table.take_changes())
        };
        let saved = save(&self.state, FILE, &stored).and_then(|()| Ok(self.journal.clear()?));
        if let Err(error) = saved {
            lock(table).requeue_changes(changes);
            return Err(error);
        }
        self.written_version = version;
        Ok(())
    }
}

/// An endpoint as it is written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEndpoint {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Whether it is attached; else it is on its way in or out.
    pub attached: bool,
}

/// What the state directory of an agent says, whether one runs or not, by name; `None` where no container was ever attached. Changes nothing.
///
/// # Errors
/// A file cannot be read, or is torn: the text names it and says why.
pub fn read_stored(state_dir: &Path) -> Result<Option<Vec<StoredEndpoint>>, StateError> {
    let Some(stored) = crate::state::peek::<StoredTable>(&state_dir.join(FILE))? else { return Ok(None) };
    let stored = stored.replay(Journal::peek::<JournalEntry>(&state_dir.join(JOURNAL))?);
    let to_stored = |record: EndpointRecord| StoredEndpoint {
        endpoint: Arc::unwrap_or_clone(record.endpoint),
        attached: record.phase == Phase::Attached,
    };
    Ok(Some(stored.endpoints.into_iter().map(to_stored).collect()))
}
