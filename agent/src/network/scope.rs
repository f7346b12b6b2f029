//! A network's part in one network namespace: what its reconciler does not have yet, and what it reported.

use std::collections::BTreeSet;
use std::iter;
use std::sync::Arc;

use super::link::ReconcilerLink;
use crate::model::NetworkName;
use crate::plan::contribution::{Contribution, EntryChange, HostView, NetworkProgress, Progress};
use crate::plan::isolation::Scope;
use crate::plan::shared::SharedSpec;
use crate::plan::{Key, Value};

/// The scopes of a network.
#[derive(Debug)]
pub(super) struct Scopes {
    /// The host's network namespace.
    pub(super) host: ScopeState,
    /// The network's own namespace, if it is isolated.
    pub(super) own: Option<ScopeState>,
}

/// One scope of a network.
#[derive(Debug)]
pub(super) struct ScopeState {
    pub(super) scope: Scope,
    /// The network namespace as its reconciler read it.
    pub(super) view: Option<Arc<HostView>>,
    /// The reconciler was restarted: it has nothing of the network.
    pub(super) restarted: bool,
    progress: Progress,
    /// The shared input that the reconciler has, or gets with `pending`.
    shared: Option<SharedSpec>,
    shared_changed: bool,
    pending: Option<EntryChange>,
    /// Number of the last contribution.
    sequence: u64,
    /// Whether `pending` changes this host's own entries.
    host_changed: bool,
    /// The last contribution that changed them.
    host_sequence: u64,
    /// The contribution that has the endpoints.
    endpoints_sequence: u64,
}

impl Scopes {
    /// The scopes of a network of this kind.
    pub(super) fn new(isolated: bool) -> Scopes {
        Scopes { host: ScopeState::new(Scope::Host), own: isolated.then(|| ScopeState::new(Scope::Network)) }
    }

    /// The host's first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &ScopeState> {
        iter::once(&self.host).chain(&self.own)
    }

    /// As [`Scopes::iter`].
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut ScopeState> {
        iter::once(&mut self.host).chain(&mut self.own)
    }

    /// Divides the peers' entries between the scopes, in the order of [`Scopes::iter`]. A routed network has only one.
    pub(super) fn divide<T>(&self, entries: Vec<T>, scope_of: impl Fn(&T) -> Scope) -> [Vec<T>; 2] {
        if self.own.is_none() {
            return [entries, Vec::new()];
        }
        let (host, own) = entries.into_iter().partition(|entry| scope_of(entry) == Scope::Host);
        [host, own]
    }

    /// The network namespace with the network's devices, as its reconciler read it.
    pub(super) fn device_view(&self) -> Option<&Arc<HostView>> {
        self.own.as_ref().unwrap_or(&self.host).view.as_ref()
    }
}

impl ScopeState {
    fn new(scope: Scope) -> ScopeState {
        ScopeState {
            scope,
            view: None,
            restarted: false,
            progress: Progress::default(),
            shared: None,
            shared_changed: false,
            pending: None,
            sequence: 0,
            host_changed: false,
            host_sequence: 0,
            endpoints_sequence: 0,
        }
    }

    /// Folds what the reconciler sent. Returns whether the view and whether the progress is new.
    pub(super) fn fold(&mut self, link: &mut ReconcilerLink) -> (bool, bool) {
        let view = link.view.has_changed().unwrap_or(false).then(|| link.view.borrow_and_update().clone()).flatten();
        let has_view = view.is_some();
        if let Some(view) = view {
            self.restarted |= self.view.as_ref().is_some_and(|before| before.run != view.run);
            self.view = Some(view);
        }
        let mut has_progress = false;
        if link.progress.has_changed().unwrap_or(false) {
            let progress = link.progress.borrow_and_update().clone();
            has_progress = progress != self.progress;
            self.progress = progress;
        }
        (has_view, has_progress)
    }

    /// The reconciler has nothing of the network: what it gets next is all.
    pub(super) fn start_over(&mut self, shared: SharedSpec, entries: Vec<(Key, Value)>) {
        self.shared = Some(shared);
        (self.shared_changed, self.host_changed) = (true, true);
        self.pending = Some(EntryChange::Replace(entries));
    }

    /// The network has these entries only.
    pub(super) fn replace(&mut self, shared: SharedSpec, entries: Vec<(Key, Value)>) {
        self.set_shared(shared);
        self.host_changed = true;
        self.pending = Some(EntryChange::Replace(entries));
    }

    /// This host's own entries changed.
    pub(super) fn update_host(&mut self, shared: SharedSpec, removed: Vec<Key>, added: Vec<(Key, Value)>) {
        self.set_shared(shared);
        if self.shared_changed || !removed.is_empty() || !added.is_empty() {
            self.host_changed = true;
            self.update(removed, added);
        }
    }

    fn set_shared(&mut self, shared: SharedSpec) {
        if self.shared.as_ref() != Some(&shared) {
            self.shared = Some(shared);
            self.shared_changed = true;
        }
    }

    /// Entries were removed, then others added.
    pub(super) fn update(&mut self, mut removed: Vec<Key>, mut added: Vec<(Key, Value)>) {
        match &mut self.pending {
            None => self.pending = Some(EntryChange::Update { removed, added }),
            Some(EntryChange::Update { removed: removed_before, added: added_before }) => {
                removed_before.append(&mut removed);
                added_before.append(&mut added);
            }
            Some(EntryChange::Replace(entries)) => {
                let removed: BTreeSet<Key> = removed.into_iter().collect();
                entries.retain(|(key, _)| !removed.contains(key));
                entries.append(&mut added);
            }
        }
    }

    /// The change since the last call, if there is any, for the present run of the reconciler. `last` is the number of the
    /// network's last contribution to any scope.
    pub(super) fn take_contribution(&mut self, network: &NetworkName, last: &mut u64) -> Option<Contribution> {
        let change = self.pending.take()?;
        *last += 1;
        self.sequence = *last;
        if std::mem::take(&mut self.host_changed) {
            self.host_sequence = self.sequence;
        }
        let shared = if std::mem::take(&mut self.shared_changed) { self.shared.clone() } else { None };
        let run = self.view.as_ref().map_or(0, |view| view.run);
        Some(Contribution { network: network.clone(), run, sequence: self.sequence, shared, change })
    }

    /// The last contribution has the endpoints.
    pub(super) fn mark_endpoints(&mut self) {
        self.endpoints_sequence = self.sequence;
    }

    /// Whether the first contribution is applied, and no failed entry is pending.
    pub(super) fn is_in_place(&self, network: &NetworkName) -> bool {
        let applied = self.applied(network);
        applied.sequence > 0 && applied.failed == 0 && !self.progress.dump_failed
    }

    /// Whether containers can be attached with this host's present entries.
    pub(super) fn has_host_entries(&self, network: &NetworkName) -> bool {
        let applied = self.applied(network);
        applied.sequence >= self.host_sequence && !applied.base_failed
    }

    /// Whether the endpoints' entries were applied, or failed once.
    pub(super) fn has_endpoints(&self, network: &NetworkName) -> bool {
        self.applied(network).sequence >= self.endpoints_sequence
    }

    fn applied(&self, network: &NetworkName) -> NetworkProgress {
        self.progress.networks.get(network).copied().unwrap_or_default()
    }
}
