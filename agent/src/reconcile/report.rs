//! Answers queries about the data path.

use tokio::time::Instant;

use super::{Reconciler, ReconcilerQuery, SysctlStore};
use crate::model::api::{Drift, FailedOp};
use crate::plan::state::{Entries, RouteTarget, Value};
use crate::plan::{DataPath, Key};

/// Maximum number of failed entries that the report lists; the count is complete.
const MAX_LISTED: usize = 100;

/// State of a network namespace's data path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataPathReport {
    /// Entries that could not be programmed, with the kernel's error; they are retried.
    pub failed: Vec<FailedOp>,
    /// Number of entries restored since the agent started, after another program changed them.
    pub drift_repairs: u64,
    /// The last repair.
    pub last_drift: Option<Drift>,
    /// Whether routes use next-hop objects.
    pub nexthop_objects: bool,
    /// Problems, in the order in which they have to be solved.
    pub problems: Vec<String>,
}

/// State of a peer's entries in one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerState {
    /// Id of its next-hop object.
    pub nexthop_id: Option<u32>,
    /// `programmed`, or the missing entries.
    pub state: String,
    /// Time of the last repair of one of its entries, in seconds since the epoch.
    pub last_repair: Option<u64>,
}

impl<D: DataPath, S: SysctlStore> Reconciler<D, S> {
    pub(super) fn answer_query(&self, query: ReconcilerQuery) {
        // A client that has gone away is no error.
        match query {
            ReconcilerQuery::Status(reply) => drop(reply.send(self.report((self.now)()))),
            ReconcilerQuery::Peers(peers, reply) => {
                let states = peers.iter().map(|entries| self.peer_state(entries.clone())).collect();
                drop(reply.send(states));
            }
        }
    }

    fn report(&self, now: Instant) -> DataPathReport {
        DataPathReport {
            failed: self.retries.list_failures(MAX_LISTED),
            drift_repairs: self.drift.count(),
            last_drift: self.drift.last().cloned(),
            nexthop_objects: self.settings.nexthop_objects,
            problems: self.problems(now),
        }
    }

    fn problems(&self, now: Instant) -> Vec<String> {
        let mut problems = Vec::new();
        problems.extend(self.dump_error.as_ref().map(|error| format!("cannot dump kernel state: {error}")));
        if let Some(first) = self.retries.list_failures(1).first() {
            let (failed, pronoun) = match self.retries.root_failure_count() {
                1 => ("1 entry cannot be programmed".to_owned(), "it"),
                causes => (format!("{causes} entries cannot be programmed, the first"), "them"),
            };
            let dependents = match self.blocked_count() {
                0 => String::new(),
                blocked => format!("; {blocked} more depend on {pronoun} and wait"),
            };
            problems.push(format!("{failed}: {}: {}{dependents}", first.entry, first.error));
        }
        if let Some((key, repairs)) = self.drift.contended(now).next() {
            problems.push(format!(
                "another process keeps changing {} entries, the first: {key}, changed by another process {repairs} times within seconds: \
                 find it with `ip monitor` and `nft monitor`",
                self.drift.contended(now).count()
            ));
        }
        problems
    }

    /// Number of entries that depend on a failed entry.
    fn blocked_count(&self) -> usize {
        let blocked = |(key, value): &(&Key, &Value)| self.blocked_by(key, value).is_some();
        self.desired.iter().filter(blocked).count()
    }

    /// State of a peer with these entries, of which the route is the last.
    fn peer_state(&self, mut keys: Vec<Key>) -> PeerState {
        let nexthop_id = match keys.last().and_then(|route| self.desired.get(route)) {
            Some(Value::Route(RouteTarget::Nexthop(id))) => Some(*id),
            _ => None,
        };
        keys.extend(nexthop_id.map(Key::Nexthop));
        keys.sort();
        let is_set = |key: &Key| self.desired.get(key) == self.peers.get(key);
        let missing: Vec<String> = keys
            .iter()
            .filter(|key| !is_set(key))
            .map(|key| match (self.desired.get(key).and_then(|value| self.blocked_by(key, value)), self.retries.error_of(key)) {
                (Some(cause), _) => format!("{}: waits for {cause}", key.kind()),
                (None, Some(error)) => format!("{}: {error}", key.kind()),
                (None, None) => key.kind().to_owned(),
            })
            .collect();
        PeerState {
            nexthop_id,
            state: if missing.is_empty() { "programmed".to_owned() } else { format!("missing {}", missing.join(", ")) },
            last_repair: keys.iter().filter_map(|key| self.drift.last_repair_of(key)).max(),
        }
    }
}
