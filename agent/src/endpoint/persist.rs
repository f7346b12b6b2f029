//! Persistence of the endpoint table: a snapshot in `endpoints.json`, and a line per later change in `endpoints.journal`.
//!
//! The files are consistent after a kill. They are synced to disk at the next audit only: a power failure also removes the
//! table's namespaces, and a sync per attach would double its duration. The snapshot is written at an audit that finds changes,
//! at shutdown, and when the journal is full. Replaying journal lines that the snapshot already contains changes nothing.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::record::{EndpointRecord, JournalEntry, Phase, StoredTable};
use super::table::EndpointTable;
use crate::model::Endpoint;
use crate::state::{Journal, StateDir, StateError};

/// File names in the state directory.
pub(super) const FILE: &str = "endpoints.json";
pub(super) const JOURNAL: &str = "endpoints.journal";

/// State of the files.
#[derive(Debug)]
pub(super) struct EndpointStore {
    state: Arc<StateDir>,
    journal: Journal,
    /// Version of the table in the files.
    written_version: u64,
    /// Version of the table in the snapshot that was synced to disk.
    synced_version: u64,
}

impl EndpointStore {
    /// Opens the files and reads the stored table. Blocks, as all methods here do.
    pub(super) fn open(state: Arc<StateDir>) -> Result<(EndpointStore, StoredTable), StateError> {
        let journal = state.journal(JOURNAL);
        let stored: StoredTable = state.load(FILE)?.unwrap_or_default();
        let stored = stored.replay(journal.read::<JournalEntry>()?);
        Ok((EndpointStore { state, journal, written_version: 0, synced_version: 0 }, stored))
    }

    /// Writes the changes up to version `wanted`, unless a concurrent call wrote them: callers that wait at the same time share
    /// one write.
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

    /// Whether the whole table is synced to disk.
    pub(super) fn is_synced(&self, table: &Mutex<EndpointTable>) -> bool {
        self.synced_version == lock(table).version
    }

    /// Writes a snapshot and syncs it to disk, unless that is already done.
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

/// A stored endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEndpoint {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Whether it is attached; otherwise its attach or detach is incomplete.
    pub attached: bool,
}

/// Reads the endpoints from an agent's state directory, by name; `None` if no container was ever attached. Changes nothing, and
/// works whether or not the agent runs.
///
/// # Errors
/// A file cannot be read, or is corrupt: the text names the file and the reason.
pub fn read_stored(state_dir: &Path) -> Result<Option<Vec<StoredEndpoint>>, StateError> {
    let Some(stored) = crate::state::peek::<StoredTable>(&state_dir.join(FILE))? else { return Ok(None) };
    let stored = stored.replay(Journal::peek::<JournalEntry>(&state_dir.join(JOURNAL))?);
    let to_stored = |record: EndpointRecord| StoredEndpoint {
        endpoint: Arc::unwrap_or_clone(record.endpoint),
        attached: record.phase == Phase::Attached,
    };
    Ok(Some(stored.endpoints.into_iter().map(to_stored).collect()))
}

/// Locks a mutex and ignores poisoning. Each change of the data is atomic, so it is consistent after a panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
