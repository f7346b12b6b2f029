//! Messages between the networks, which plan, and the reconciler of a network namespace, which applies.

use std::collections::BTreeMap;

use super::shared::SharedSpec;
use super::state::{Key, LinkState, Value};
use super::underlay::HostInventory;
use crate::model::{Device, NetworkName};

/// Input of a reconciler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReconcilerInput {
    /// A network's desired entries changed.
    Contribution(Box<Contribution>),
    /// A network needs a [`HostView`] that is read after this message.
    RefreshHost {
        /// The network.
        network: NetworkName,
        /// Number of this request, from 1; [`HostView::refreshes`] repeats it.
        number: u64,
    },
    /// A network leaves the network namespace: its entries are removed.
    Withdraw(NetworkName),
}

/// A change of a network's desired entries in one network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contribution {
    /// The network.
    pub network: NetworkName,
    /// [`HostView::run`] of the reconciler that it continues. Any other one lacks the contributions before it, and ignores it.
    pub run: u64,
    /// Number of this contribution, from 1; [`NetworkProgress::sequence`] repeats it.
    pub sequence: u64,
    /// The network's new input to the shared entries; `None` if it did not change.
    pub shared: Option<SharedSpec>,
    /// The change of its own entries.
    pub change: EntryChange,
}

/// A change of desired entries. Routes have gateways; the reconciler uses next-hop objects where the kernel has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryChange {
    /// The network has these entries only.
    Replace(Vec<(Key, Value)>),
    /// Entries were removed, then others added. An entry in both lists is added.
    Update {
        /// Removed entries.
        removed: Vec<Key>,
        /// Added entries.
        added: Vec<(Key, Value)>,
    },
}

/// What a network plans from, besides the store: the host as the reconciler of its network namespace read it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostView {
    /// Number of the reconciler's run, from 1. A new run has nothing of the networks: each sends all its entries again.
    pub run: u64,
    /// The host's interfaces, addresses and default routes.
    pub inventory: HostInventory,
    /// Our devices at the last dump.
    pub devices: BTreeMap<Device, LinkState>,
    /// Index of the interface with the route to the address that the external interface has to reach.
    pub probe_route: Option<u32>,
    /// The last served [`ReconcilerInput::RefreshHost`] of each network.
    pub refreshes: BTreeMap<NetworkName, u64>,
    /// Why the interfaces could not be read; the rest is that of the last successful read then.
    pub error: Option<String>,
}

/// What a reconciler applied, for the networks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// By network.
    pub networks: BTreeMap<NetworkName, NetworkProgress>,
    /// Whether kernel state could be dumped.
    pub dump_failed: bool,
}

/// What a reconciler applied of one network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetworkProgress {
    /// The last contribution whose entries were applied, or failed and wait for a retry.
    pub sequence: u64,
    /// Number of entries that wait for a retry: the network's own and the shared ones.
    pub failed: usize,
    /// Whether one of these is an entry without which containers cannot be attached: a device, an address, a sysctl or the rules.
    pub base_failed: bool,
}
