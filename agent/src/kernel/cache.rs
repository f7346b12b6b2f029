//! What the kernel is known to hold of the few things that are ours besides the peers' entries, and which interface index is which device.
//!
//! Written by the agent's own changes, by dumps and by events. An event that says what is known already is an echo of ours and wakes nobody:
//! that way echoes are told apart where the kernel's event does not name the socket that asked (FDB entries, addresses, many link events, see
//! [`super::monitor`]).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::objects::{LinkInfo, VxlanInfo};
use crate::model::device::PORT_PREFIX;
use crate::model::{Device, Mac, Role, Vni};
use crate::plan::state::{LINK_ALIAS, LinkKind, LinkState, Value, Vxlan};
use crate::plan::{Key, Op, State};

/// The group (`ip link print group N`) that links of ours are created with. The alias can only be set in a second request: by the group a link
/// is known whose creation a crash cut in two. The number is the protocol's, twice.
pub const LINK_GROUP: u32 = 0x5656;
/// How many links that we removed are remembered.
const MAX_TOMBSTONES: usize = 4096;

/// The memory.
#[derive(Debug, Default)]
pub struct KernelCache {
    /// Our links by name, with their index.
    pub links: BTreeMap<String, (u32, LinkState)>,
    /// Our addresses.
    pub addresses: BTreeSet<(Device, IpNetwork)>,
    /// Sysctls that were read or written.
    pub sysctls: BTreeMap<String, String>,
    /// The ruleset and the accept rules in iptables' chains.
    pub rules: State,
    /// The remote that was last set, read or reported, by interface index and MAC.
    pub fdb: HashMap<(u32, Mac), IpAddr>,
    /// Neighbours that we removed: the kernel's event does not say that it was us.
    pub removed_neighbours: HashSet<(u32, IpAddr)>,
    /// Links that we removed, by index, the latest ones: their last events are still to come, or were filtered out.
    removed_links: BTreeSet<u32>,
    devices: Vec<(u32, Device)>,
}

impl KernelCache {
    /// The interface index of a device of ours; `None` where it is not there.
    pub fn index(&self, device: Device) -> Option<u32> {
        self.devices.iter().find(|(_, d)| *d == device).map(|(index, _)| *index)
    }

    /// The device of ours with that interface index.
    pub fn device(&self, index: u32) -> Option<Device> {
        self.devices.iter().find(|(i, _)| *i == index).map(|(_, device)| *device)
    }

    /// Our devices with their indices.
    pub fn devices(&self) -> &[(u32, Device)] {
        &self.devices
    }

    /// The name of our link with that index.
    pub fn link_name(&self, index: u32) -> Option<&str> {
        self.links.iter().find(|(_, (i, _))| *i == index).map(|(name, _)| name.as_str())
    }

    /// Makes room for what ops will add, so that nothing is moved about while they are applied.
    pub fn reserve(&mut self, ops: &[Op]) {
        let count = |counted: fn(&Op) -> bool| ops.iter().filter(|op| counted(op)).count();
        self.fdb.reserve(count(|op| matches!(op, Op::Set(Key::Fdb(..), _))));
        self.removed_neighbours.reserve(count(|op| matches!(op, Op::Delete(Key::Neigh(..), _))));
    }

    /// Notes a link of ours.
    pub fn insert_link(&mut self, name: &str, index: u32, state: LinkState) {
        if self.links.get(name).is_some_and(|(old, _)| *old != index) {
            self.remove_link(name);
        }
        self.devices.retain(|(i, _)| *i != index);
        if let Some(device) = Device::from_name(name)
            && !matches!(state.kind, LinkKind::Foreign { .. })
        {
            self.devices.push((index, device));
        }
        self.links.insert(name.to_owned(), (index, state));
    }

    /// Forgets a link and all that went with it; what it was.
    pub fn remove_link(&mut self, name: &str) -> Option<LinkState> {
        let (index, state) = self.links.remove(name)?;
        // Nothing else is known of a container's port.
        if let Some(device) = Device::from_name(name) {
            self.devices.retain(|(i, _)| *i != index);
            self.addresses.retain(|(d, _)| *d != device);
            self.sysctls.retain(|path, _| Key::Sysctl(path.as_str().into()).device() != Some(device));
            self.fdb.retain(|(i, _), _| *i != index);
            self.removed_neighbours.retain(|(i, _)| *i != index);
        }
        Some(state)
    }

    /// Notes that we removed the link with that index. Indices only grow: the smallest one is the oldest.
    pub fn mark_removed(&mut self, index: u32) {
        self.removed_links.insert(index);
        if self.removed_links.len() > MAX_TOMBSTONES {
            self.removed_links.pop_first();
        }
    }

    /// Takes that back: it could not be removed.
    pub fn unmark_removed(&mut self, index: u32) {
        self.removed_links.remove(&index);
    }

    /// Whether we removed the link with that index.
    pub fn is_removed(&self, index: u32) -> bool {
        self.removed_links.contains(&index)
    }

    /// What a dump begins with: nothing, but which sysctls to read.
    pub fn new_for_dump(&self) -> KernelCache {
        KernelCache { sysctls: self.sysctls.clone(), removed_links: self.removed_links.clone(), ..KernelCache::default() }
    }

    /// A link as plans see it: `None` where its name is none of ours. `tx_checksum` is asked only about VXLAN devices.
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
            (None, None) if link.kind == "veth" => Some(LinkKind::Port),
            _ => None,
        };
        Some(state(kind.unwrap_or_else(|| LinkKind::Foreign { kind: link.kind.clone() })))
    }

    /// Our links, addresses, sysctls and rules as a state.
    pub fn state(&self) -> State {
        let links =
            self.links.iter().map(|(name, (_, link))| (Key::Link(name.clone().into()), Value::Link(Box::new(link.clone()))));
        let addresses = self.addresses.iter().map(|(device, address)| (Key::Address(*device, *address), Value::Address));
        let sysctls =
            self.sysctls.iter().map(|(path, text)| (Key::Sysctl(path.clone().into()), Value::Sysctl(text.clone().into())));
        links.chain(addresses).chain(sysctls).chain(self.rules.clone()).collect()
    }
}

/// Whether a link carries our mark.
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
