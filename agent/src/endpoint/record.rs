//! Records of endpoints, as stored in `endpoints.json` and `endpoints.journal`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::model::endpoint::EndpointName;
use crate::model::{Endpoint, PerFamily};

/// Phase of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Phase {
    /// Persisted; its port does not exist yet, or is incomplete.
    Attaching,
    /// Its port is complete.
    Attached,
    /// Being removed.
    Detaching,
}

/// An endpoint and its phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct EndpointRecord {
    pub(super) phase: Phase,
    #[serde(flatten)]
    pub(super) endpoint: Arc<Endpoint>,
    /// Id that distinguishes its namespace from a later one at the same path; absent if the kernel has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) netns_id: Option<String>,
}

/// The content of `endpoints.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredTable {
    /// The endpoints, by name.
    pub(super) endpoints: Vec<EndpointRecord>,
    /// Each family's allocation cursor, so that a restart does not reuse an address that was just released.
    #[serde(default)]
    pub(super) cursor: PerFamily<IpAddr>,
}

/// A change of one endpoint: a line of `endpoints.journal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct JournalEntry {
    pub(super) name: EndpointName,
    /// Its new record; absent if the endpoint was removed.
    pub(super) record: Option<EndpointRecord>,
    /// As in [`StoredTable`].
    #[serde(default)]
    pub(super) cursor: PerFamily<IpAddr>,
}

impl StoredTable {
    /// The table after the changes.
    pub(super) fn replay(self, changes: Vec<JournalEntry>) -> StoredTable {
        let mut records: BTreeMap<_, _> = self.endpoints.into_iter().map(|r| (r.endpoint.name.clone(), r)).collect();
        let mut cursor = self.cursor;
        for change in changes {
            cursor = change.cursor;
            match change.record {
                Some(record) => records.insert(change.name, record),
                None => records.remove(&change.name),
            };
        }
        StoredTable { endpoints: records.into_values().collect(), cursor }
    }
}
