//! Holds the local entries, and maps interface indices to our devices.
//!
//! Of the peers' entries it keeps only FDB remotes and removed neighbours; the reconciler holds the entries themselves.
//!
//! The agent's own changes, dumps and events update it. An event that matches the cache is an echo of our own change and
//! is not reported. This identifies echoes if the kernel's event does not name the requesting socket (FDB entries, addresses,
//! many link events, see [`super::monitor`]).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::objects::{LinkInfo, VxlanInfo};
use crate::model::device::PORT_PREFIX;
use crate::model::{Device, Mac, Role, Vni};
use crate::plan::actual::LocalState;
use crate::plan::ops::remove_device_entries;
use crate::plan::state::{LINK_ALIAS, LinkKind, LinkState, Value, Vxlan};
use crate::plan::{Key, Op};

/// The group (`ip link show group N`) of links that we create. The alias needs a second request: the group identifies a link
/// whose creation was interrupted by a crash. The number is our protocol number, twice.
pub const LINK_GROUP: u32 = 0x5656;
/// Maximum number of removed links to remember.
const MAX_TOMBSTONES: usize = 4096;

/// The local entries, for readers that do not lock the kernel layer.
pub type SharedLocal = Arc<Mutex<LocalState>>;

/// Our state in one network namespace, as last written, read or reported.
#[derive(Debug, Default)]
pub struct KernelCache {
    /// The local entries. Changed only while the kernel layer is locked ([`super::Shared`]); the reconciler reads them without
    /// that lock.
    local: SharedLocal,
    /// The indices of our links, by name.
    links: BTreeMap<String, u32>,
    /// The remote last set, read or reported, by interface index and MAC.
    pub fdb: HashMap<(u32, Mac), IpAddr>,
    /// Neighbours that we removed: the kernel's event does not name our socket.
    pub removed_neighbours: HashSet<(u32, IpAddr)>,
    /// Indices of the latest links that we removed: their last events may still arrive, or were filtered out.
    removed_links: BTreeSet<u32>,
    devices: Vec<(u32, Device)>,
}

/// Locks the local entries; each change of them is complete, so a panic leaves them consistent.
pub fn lock(local: &Mutex<LocalState>) -> MutexGuard<'_, LocalState> {
    local.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KernelCache {
    /// The local entries.
    pub fn local(&self) -> MutexGuard<'_, LocalState> {
        lock(&self.local)
    }

    /// A handle to the local entries, for reading.
    pub fn share_local(&self) -> SharedLocal {
        Arc::clone(&self.local)
    }

    /// Sets a local entry, or removes it. Returns whether it was different before.
    pub fn set(&self, key: Key, value: Option<Value>) -> bool {
        self.local().set(key, value)
    }

    /// The interface index of one of our devices; `None` if it does not exist.
    pub fn index(&self, device: Device) -> Option<u32> {
        self.devices.iter().find(|(_, d)| *d == device).map(|(index, _)| *index)
    }

    /// Our device with that interface index.
    pub fn device(&self, index: u32) -> Option<Device> {
        self.devices.iter().find(|(i, _)| *i == index).map(|(_, device)| *device)
    }

    /// Our devices with their indices.
    pub fn devices(&self) -> &[(u32, Device)] {
        &self.devices
    }

    /// The name of our link with that index.
    pub fn link_name(&self, index: u32) -> Option<&str> {
        self.links.iter().find(|(_, i)| **i == index).map(|(name, _)| name.as_str())
    }

    /// The index and state of our link with that name.
    pub fn link(&self, name: &str) -> Option<(u32, LinkState)> {
        Some((*self.links.get(name)?, self.local().link(name)?.clone()))
    }

    /// Reserves capacity for ops, so that no table is reallocated while they are applied.
    pub fn reserve(&mut self, ops: &[Op]) {
        let count = |counted: fn(&Op) -> bool| ops.iter().filter(|op| counted(op)).count();
        self.fdb.reserve(count(|op| matches!(op, Op::Set(Key::Fdb(..), _))));
        self.removed_neighbours.reserve(count(|op| matches!(op, Op::Delete(Key::Neigh(..), _))));
    }

    /// Records a link of ours.
    pub fn insert_link(&mut self, name: &str, index: u32, state: LinkState) {
        if self.links.get(name).is_some_and(|old| *old != index) {
            self.remove_link(name);
        }
        self.devices.retain(|(i, _)| *i != index);
        if let Some(device) = Device::from_name(name)
            && !matches!(state.kind, LinkKind::Foreign { .. })
        {
            self.devices.push((index, device));
        }
        self.links.insert(name.to_owned(), index);
        self.set(Key::Link(name.into()), Some(Value::Link(Box::new(state))));
    }

    /// Removes a link and everything cached about it.
    pub fn remove_link(&mut self, name: &str) {
        let Some(index) = self.links.remove(name) else { return };
        let key = Key::Link(name.into());
        // For a container's port nothing else is cached.
        if Device::from_name(name).is_some() {
            self.devices.retain(|(i, _)| *i != index);
            self.fdb.retain(|(i, _), _| *i != index);
            self.removed_neighbours.retain(|(i, _)| *i != index);
            remove_device_entries(&mut self.local().entries, &key, |_| true);
        }
        self.set(key, None);
    }

    /// Records that we removed the link with that index. Indices only grow: the smallest one is the oldest.
    pub fn mark_removed(&mut self, index: u32) {
        self.removed_links.insert(index);
        if self.removed_links.len() > MAX_TOMBSTONES {
            self.removed_links.pop_first();
        }
    }

    /// Undoes [`KernelCache::mark_removed`] if the link could not be removed.
    pub fn unmark_removed(&mut self, index: u32) {
        self.removed_links.remove(&index);
    }

    /// Whether we removed the link with that index.
    pub fn is_removed(&self, index: u32) -> bool {
        self.removed_links.contains(&index)
    }

    /// The cache at the start of a dump: empty except for the sysctls to read and the removed links.
    pub fn new_for_dump(&self) -> KernelCache {
        let is_sysctl = |(key, _): &(&Key, &Value)| matches!(key, Key::Sysctl(_));
        let sysctls =
            self.local().entries.iter().take_while(is_sysctl).map(|(key, value)| (key.clone(), value.clone())).collect();
        let local = Arc::new(Mutex::new(LocalState { entries: sysctls, ..LocalState::default() }));
        KernelCache { local, removed_links: self.removed_links.clone(), ..KernelCache::default() }
    }

    /// Gives the local entries of a dump to the readers of `before`. Returns those that they had.
    pub fn publish_dump(&mut self, before: KernelCache) -> LocalState {
        let dumped = std::mem::take(&mut *self.local());
        self.local = before.local;
        std::mem::replace(&mut *self.local(), dumped)
    }

    /// Converts a link to the form that plans use. `None` if its name is not one of ours. `tx_checksum` is called only for VXLAN
    /// devices.
    pub fn link_state(&self, link: &LinkInfo, tx_checksum: impl FnOnce(&str) -> bool) -> Option<LinkState> {
        let device = Device::from_name(&link.name);
        if device.is_none() && !link.name.starts_with(PORT_PREFIX) {
            return None;
        }
        let state = |kind| LinkState {
            kind,
            mac: link.mac,
            mtu: link.mtu,
            up: link.up(),
            master: link.master.and_then(|index| self.device(index)),
            hairpin: link.hairpin,
        };
        let kind = match (device.map(|d| d.role), &link.vxlan) {
            _ if !is_own_link(link) => None,
            (Some(Role::Vxlan(family)), Some(vxlan)) => {
                let unspecified = family.unspecified();
                read_vxlan(vxlan, unspecified, || tx_checksum(&link.name)).map(LinkKind::Vxlan)
            }
            (Some(Role::Bridge), None) if link.kind == "bridge" => Some(LinkKind::Bridge),
            (Some(Role::Transit | Role::PeerLink), None) if link.kind == "veth" => Some(LinkKind::Pair(None)),
            (None, None) if link.kind == "veth" => Some(LinkKind::Port),
            _ => None,
        };
        Some(state(kind.unwrap_or_else(|| LinkKind::Foreign { kind: link.kind.clone() })))
    }
}

/// Whether a link is ours: by its alias, or by its group if it has no alias.
pub fn is_own_link(link: &LinkInfo) -> bool {
    link.alias == LINK_ALIAS || (link.alias.is_empty() && link.group == LINK_GROUP)
}

fn read_vxlan(info: &VxlanInfo, unspecified: IpAddr, tx_checksum: impl FnOnce() -> bool) -> Option<Vxlan> {
    Some(Vxlan {
        vni: Vni::try_from(info.id).ok()?,
        port: info.port,
        local: info.local.unwrap_or(unspecified),
        underlay: info.link,
        learning: info.learning,
        tx_checksum: tx_checksum(),
    })
}
