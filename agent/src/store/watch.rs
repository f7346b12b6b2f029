//! Watches the store: a snapshot at one revision, then all later changes in etcd's order.
//!
//! Runs inside the task of [`NetworkStore::run`](super::NetworkStore::run), over the stream of all networks. The resume revision
//! survives a lost connection. It advances only after all events of a response were sent: dropping the future at any await
//! repeats events and never loses one.

use std::time::Instant;

use etcd_client::{EventType, WatchResponse};
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use super::connect::{ClusterState, Session};
use super::keys::KeyKind;
use super::read::{RawConfig, RawEntry};
use super::watch_stream::{NetworkWatch, WatchRequest, WatchedKeys, cancel_error};
use super::{StoreError, codec};
use crate::model::event::{Connection, StoreEntry, StoreEvent};
use crate::model::{NetworkRecord, StorePosition};

/// Maximum number of immediate retries of a read whose revision was compacted meanwhile.
const MAX_READ_RETRIES: u32 = 5;

/// State shared between the watch and the lease keeper. Both run in one task; each side reads only the latest state.
#[derive(Debug)]
pub(super) struct WatchState {
    /// The entry that the keeper holds or is about to write, by the last part of its key.
    pub(super) held_key: watch::Sender<Option<String>>,
    /// This host's identity: an entry that names it under another key is also this host's.
    pub(super) node_id: watch::Sender<Option<String>>,
    /// Progress of the watch.
    pub(super) progress: watch::Sender<WatchProgress>,
}

/// Progress of the watch, for the lease keeper.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct WatchProgress {
    /// All changes up to this revision were seen.
    pub(super) revision: i64,
    /// The revision of the last change of the held entry or of another entry of this host.
    pub(super) held_revision: i64,
    /// The revision of the last removal.
    pub(super) removal_revision: i64,
}

impl WatchState {
    pub(super) fn new() -> WatchState {
        WatchState {
            held_key: watch::Sender::new(None),
            node_id: watch::Sender::new(None),
            progress: watch::Sender::new(WatchProgress::default()),
        }
    }
}

impl WatchState {
    /// Whether this host wrote an entry, under any key. A write whose response was lost may arrive when another entry is already
    /// held.
    fn is_own_entry(&self, entry: &StoreEntry) -> bool {
        let node = entry.value.as_ref().ok().and_then(|record| record.lease.node.as_ref());
        node.is_some_and(|node| self.node_id.borrow().as_ref() == Some(&node.id))
    }
}

/// Watches the store across connections.
#[derive(Debug)]
pub(super) struct Watcher {
    /// The first undelivered revision and the server's cluster state; `None` until the first snapshot.
    resume_from: Option<(i64, ClusterState)>,
    /// The configuration delivered last; `None` before the first delivery.
    delivered_config: Option<Option<RawConfig>>,
    connected: bool,
}

impl Watcher {
    pub(super) fn new() -> Watcher {
        Watcher { resume_from: None, delivered_config: None, connected: false }
    }

    /// Prepares for another connection. With `reread`, reads a snapshot: the responses since the resume revision are too large.
    pub(super) fn begin_session(&mut self, session: &Session, reread: bool) {
        if reread {
            self.resume_from = None;
        }
        if let Some((next, last_state)) = self.resume_from
            && !session.cluster_state.is_continuation_of(&last_state, next - 1)
        {
            warn!(
                seen = next - 1,
                revision = session.cluster_state.revision,
                "etcd is behind the last seen revision; it was restored or replaced"
            );
            self.resume_from = None;
        }
    }

    /// Sends store events until an error. `watches` leads to the shared stream.
    pub(super) async fn run(
        &mut self,
        session: &Session,
        watches: &mpsc::Sender<WatchRequest>,
        watch_state: &WatchState,
        events: &mpsc::Sender<StoreEvent>,
    ) -> StoreError {
        match self.watch_changes(session, watches, watch_state, events).await {
            Err(error) => error,
            Ok(never) => match never {},
        }
    }

    /// Reports the store as down, once per reason.
    pub(super) async fn report_down(
        &mut self,
        error: String,
        last_reported: &mut Option<Connection>,
        events: &mpsc::Sender<StoreEvent>,
    ) -> Result<(), StoreError> {
        self.connected = false;
        let event = Connection::Down { error };
        if last_reported.as_ref() == Some(&event) {
            return Ok(());
        }
        *last_reported = Some(event.clone());
        send_event(events, StoreEvent::Connection(event)).await
    }

    async fn report_up(&mut self, revision: i64, events: &mpsc::Sender<StoreEvent>) -> Result<(), StoreError> {
        if !self.connected {
            self.connected = true;
            send_event(events, StoreEvent::Connection(Connection::Up { position: StorePosition(revision) })).await?;
        }
        Ok(())
    }

    /// Whether the current connection has been reported as up.
    pub(super) fn is_connected(&self) -> bool {
        self.connected
    }

    async fn watch_changes(
        &mut self,
        session: &Session,
        watches: &mpsc::Sender<WatchRequest>,
        watch_state: &WatchState,
        events: &mpsc::Sender<StoreEvent>,
    ) -> Result<std::convert::Infallible, StoreError> {
        loop {
            let mut unseen_config = None;
            let (next, config_next) = match self.resume_from {
                // The configuration changes rarely, so that the revision of its last change may be compacted: it is read again.
                Some((next, _)) => {
                    let (config, state) = session.get_config().await?;
                    unseen_config = Some(config);
                    (next, state.revision + 1)
                }
                None => {
                    let next = self.deliver_snapshot(session, watch_state, events).await?;
                    (next, next)
                }
            };
            self.resume_from = Some((next, session.cluster_state));
            let mut watch = NetworkWatch::open(session, watches, config_next, next).await?;
            self.report_up(session.cluster_state.revision, events).await?;
            if let Some(config) = unseen_config {
                self.deliver_config(session, config, events).await?;
            }
            debug!(from = next, endpoint = session.context.endpoint, "watching");
            while let Some((keys, response)) = watch.next().await {
                if response.compact_revision() > 0 {
                    info!(from = next, compacted = response.compact_revision(), "revisions compacted; rereading all leases");
                    self.resume_from = None;
                    break;
                }
                if response.canceled() {
                    return Err(cancel_error(session, response.cancel_reason()));
                }
                self.deliver(session, watch_state, events, keys, &response).await?;
            }
        }
    }

    /// Reads and sends a snapshot; returns the revision to watch from.
    async fn deliver_snapshot(
        &mut self,
        session: &Session,
        watch_state: &WatchState,
        events: &mpsc::Sender<StoreEvent>,
    ) -> Result<i64, StoreError> {
        let mut tries = 0;
        let listing = loop {
            match session.list().await {
                Err(StoreError::Compacted { .. }) if tries < MAX_READ_RETRIES => tries += 1,
                other => break other?,
            }
        };
        self.report_up(listing.revision, events).await?;
        self.deliver_config(session, listing.config, events).await?;
        let begun = Instant::now();
        let entries: Vec<_> = listing.entries.iter().map(codec::decode).collect();
        debug!(leases = entries.len(), ms = begun.elapsed().as_secs_f64() * 1e3, "leases decoded");
        drop(listing.entries);
        info!(revision = listing.revision, leases = entries.len(), "read all leases");
        send_event(events, StoreEvent::Snapshot(entries)).await?;
        watch_state.progress.send_modify(|progress| {
            progress.revision = listing.revision;
            // Changes since the last watch are unknown: wakes the lease keeper, which reads its own snapshot.
            progress.held_revision = listing.revision;
            progress.removal_revision = listing.revision;
        });
        Ok(listing.revision + 1)
    }

    async fn deliver(
        &mut self,
        session: &Session,
        watch_state: &WatchState,
        events: &mpsc::Sender<StoreEvent>,
        keys: WatchedKeys,
        response: &WatchResponse,
    ) -> Result<(), StoreError> {
        let mut last = None;
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            let revision = kv.mod_revision();
            last = Some(revision);
            let deleted = event.event_type() == EventType::Delete;
            match session.keys.kind_of(kv.key()) {
                KeyKind::Config => self.deliver_config(session, (!deleted).then(|| RawConfig::from_kv(kv)), events).await?,
                KeyKind::Subnet(key) => {
                    let entry = (!deleted).then(|| codec::decode(&RawEntry::from_kv(key.clone(), kv)));
                    let is_own = watch_state.held_key.borrow().as_ref() == Some(&key)
                        || entry.as_ref().is_some_and(|e| watch_state.is_own_entry(e));
                    watch_state.progress.send_if_modified(|progress| {
                        progress.held_revision = if is_own { revision } else { progress.held_revision };
                        progress.removal_revision = if deleted { revision } else { progress.removal_revision };
                        is_own || deleted
                    });
                    let event = match entry {
                        None => StoreEvent::Remove { key },
                        Some(entry) => StoreEvent::Upsert(entry),
                    };
                    send_event(events, event).await?;
                }
                KeyKind::Other => {}
            }
        }
        // The watch of the leases is the one that is resumed. The header revision of a response with events can be ahead of the
        // events. Only that of a progress notification is safe to resume from.
        let progress = response.header().map(|header| header.revision());
        if let (WatchedKeys::Subnets, Some(revision)) = (keys, last.or(progress)) {
            let next = self.resume_from.map_or(0, |(next, _)| next).max(revision + 1);
            self.resume_from = Some((next, session.cluster_state));
            watch_state.progress.send_if_modified(|progress| {
                progress.revision = progress.revision.max(revision);
                false
            });
        }
        Ok(())
    }

    /// Sends the configuration if its text changed.
    async fn deliver_config(
        &mut self,
        session: &Session,
        config: Option<RawConfig>,
        events: &mpsc::Sender<StoreEvent>,
    ) -> Result<(), StoreError> {
        if self
            .delivered_config
            .as_ref()
            .is_some_and(|delivered| delivered.as_ref().map(|c| &c.text) == config.as_ref().map(|c| &c.text))
        {
            return Ok(());
        }
        let key = session.keys.config();
        let parsed = config.as_ref().map(|config| NetworkRecord::parse(&config.text));
        match &parsed {
            None => info!(key, "waiting for the network's configuration: `overlayctl config set FILE` writes it"),
            Some(Err(errors)) => warn!(key, %errors, "invalid network configuration"),
            Some(Ok(record)) => {
                for warning in &record.warnings {
                    warn!(key, %warning, "network configuration");
                }
                info!(key, "network configuration read");
            }
        }
        send_event(events, StoreEvent::Config(parsed)).await?;
        self.delivered_config = Some(config);
        Ok(())
    }
}

/// Sends an event; waits while the channel is full.
pub(super) async fn send_event(events: &mpsc::Sender<StoreEvent>, event: StoreEvent) -> Result<(), StoreError> {
    events.send(event).await.map_err(|_| StoreError::ReceiverClosed)
}
