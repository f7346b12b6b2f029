//! Computes the batch that turns actual state into desired state without interrupting traffic.
//!
//! The comparison covers the union of keys: it sets desired entries that differ, and deletes entries that are not desired. All
//! `Set` ops come before all `Delete` ops (make before break). `Set` ops are in the order of their stages, each stage depending
//! on earlier ones; `Delete` ops are in reverse order. The exception are entries on a device that has to be recreated: they are
//! deleted first and set with it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use super::ops::{Batch, Op};
use super::ruleset::Table;
use super::state::{Entries, Key, LinkKind, LinkState, RouteTarget, Value, device_of};
use crate::model::Device;

/// The batch that makes `actual` equal to `desired`.
pub fn diff(desired: &impl Entries, actual: &impl Entries) -> Batch {
    compare(desired, actual, union(desired, actual))
}

/// As [`diff`], but for some keys only. A device's link includes all entries on the device if it is created, recreated or
/// deleted. The run time grows with the number of keys, not with the number of entries.
pub fn diff_keys<'a>(desired: &'a impl Entries, actual: &'a impl Entries, keys: impl IntoIterator<Item = &'a Key>) -> Batch {
    let mut keys: BTreeSet<&Key> = keys.into_iter().collect();
    let mut changes = DeviceChanges::new(desired, actual);
    let changing: BTreeSet<Device> = keys
        .iter()
        .filter_map(|key| link_device(key))
        .filter(|device| !matches!(changes.get(*device), DeviceChange::Unchanged | DeviceChange::Conflict))
        .collect();
    if !changing.is_empty() {
        let is_changing = |device: Option<Device>| device.is_some_and(|device| changing.contains(&device));
        let on_changing = |(key, value): &(&Key, &Value)| is_changing(required_device(key, value, desired));
        keys.extend(desired.iter().filter(on_changing).map(|(key, _)| key));
        let on_changing = |(key, value): &(&Key, &Value)| is_changing(required_device(key, value, actual));
        keys.extend(actual.iter().filter(on_changing).map(|(key, _)| key));
    }
    compare(desired, actual, keys.into_iter().map(|key| (key, desired.get(key), actual.get(key))))
}

/// A key with its desired and its actual value.
type EntryPair<'a> = (&'a Key, Option<&'a Value>, Option<&'a Value>);

/// Merges both states in the order of the keys, in one pass and without lookups.
fn union<'a>(desired: &'a impl Entries, actual: &'a impl Entries) -> impl Iterator<Item = EntryPair<'a>> {
    let (mut desired, mut actual) = (desired.iter().peekable(), actual.iter().peekable());
    std::iter::from_fn(move || {
        let order = match (desired.peek(), actual.peek()) {
            (Some((wanted, _)), Some((found, _))) => wanted.cmp(found),
            (Some(_), None) => Ordering::Less,
            (None, _) => Ordering::Greater,
        };
        let wanted = if order.is_le() { desired.next() } else { None };
        let found = if order.is_ge() { actual.next() } else { None };
        let (key, _) = wanted.or(found)?;
        Some((key, wanted.map(|(_, value)| value), found.map(|(_, value)| value)))
    })
}

fn compare<'a>(desired: &impl Entries, actual: &impl Entries, pairs: impl Iterator<Item = EntryPair<'a>>) -> Batch {
    let mut changes = DeviceChanges::new(desired, actual);
    let any_device_changes = changes.any_changes();
    let is_removed = |table: &Table| actual.contains_key(&Key::Ruleset(*table)) && !desired.contains_key(&Key::Ruleset(*table));
    let removed_tables: Vec<Table> = Table::ALL.into_iter().filter(is_removed).collect();
    let mut teardown = Vec::new();
    let mut sets = Vec::new();
    let mut deletions = Vec::new();
    for (key, wanted, mut found) in pairs {
        let wanted_device = wanted.filter(|_| any_device_changes).and_then(|value| required_device(key, value, desired));
        let found_device = found.filter(|_| any_device_changes).and_then(|value| required_device(key, value, actual));
        let (wanted_change, found_change) =
            (wanted_device.map(|device| changes.get(device)), found_device.map(|device| changes.get(device)));
        if wanted_change == Some(DeviceChange::Conflict)
            || (key.device().is_some() && found_change == Some(DeviceChange::Conflict))
        {
            // The link is foreign: the op on the link itself fails with a remedy in its error, and its entries get no ops.
            continue;
        }
        if let Some(value) = found
            && let Some(change) = found_change
            && change.removes(key)
        {
            // Deleted explicitly, because otherwise the kernel walks the whole routing table for each next hop of a deleted
            // device.
            if change == DeviceChange::Recreate && matches!(key, Key::Route(_) | Key::Nexthop(_)) {
                teardown.push(Op::Delete(key.clone(), value.clone()));
            }
            found = None;
        }
        match (wanted, found) {
            (Some(wanted), Some(found)) if is_satisfied(wanted, found) => {}
            (Some(wanted), found) => {
                if let Some(found) = found
                    && needs_recreate(wanted, found)
                {
                    teardown.push(Op::Delete(key.clone(), found.clone()));
                }
                sets.push(Op::Set(key.clone(), wanted.clone()));
            }
            (None, Some(found)) if is_managed(key, found, desired, actual) => {
                // The kernel deletes entries with their device, and elements with their table.
                let removed_implicitly = match key {
                    Key::Element(element) => removed_tables.contains(&element.set().table()),
                    key => key.device().is_some() && found_change == Some(DeviceChange::Delete),
                };
                if !removed_implicitly {
                    deletions.push(Op::Delete(key.clone(), found.clone()));
                }
            }
            (None, _) => {}
        }
    }
    teardown.sort_by_key(|op| std::cmp::Reverse(stage(op.key())));
    sets.sort_by_key(|op| stage(op.key()));
    deletions.sort_by_key(|op| std::cmp::Reverse(stage(op.key())));
    teardown.append(&mut sets);
    teardown.append(&mut deletions);
    teardown
}

/// Change of a device, which also affects the entries on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeviceChange {
    /// It is unchanged, or changes in a way that its entries survive.
    Unchanged,
    /// It gets another MAC: the kernel then deletes its neighbours, including permanent ones (`neigh_changeaddr` in
    /// `net/core/neighbour.c`).
    MacChanged,
    /// It does not exist yet.
    Create,
    /// It is deleted and created again.
    Recreate,
    /// It is deleted.
    Delete,
    /// A foreign link has its name.
    Conflict,
}

impl DeviceChange {
    /// Whether the change removes the entry, or detaches a port from its bridge.
    fn removes(self, key: &Key) -> bool {
        match self {
            DeviceChange::Create | DeviceChange::Recreate => true,
            DeviceChange::MacChanged => matches!(key, Key::Neigh(..)),
            DeviceChange::Unchanged | DeviceChange::Delete | DeviceChange::Conflict => false,
        }
    }
}

/// Cache of the changes of devices.
struct DeviceChanges<'a, D, A> {
    desired: &'a D,
    actual: &'a A,
    cache: BTreeMap<Device, DeviceChange>,
}

impl<'a, D: Entries, A: Entries> DeviceChanges<'a, D, A> {
    fn new(desired: &'a D, actual: &'a A) -> DeviceChanges<'a, D, A> {
        DeviceChanges { desired, actual, cache: BTreeMap::new() }
    }

    /// Whether any device changes. Usually none does, and then the devices of entries need not be looked up.
    fn any_changes(&mut self) -> bool {
        // Most links are ports, which are not devices.
        let devices: BTreeSet<Device> = (self.desired.links().chain(self.actual.links()))
            .filter(|(_, link)| link.kind != LinkKind::Port)
            .filter_map(|(key, _)| link_device(key))
            .collect();
        devices.into_iter().any(|device| self.get(device) != DeviceChange::Unchanged)
    }

    fn get(&mut self, device: Device) -> DeviceChange {
        let DeviceChanges { desired, actual, cache } = self;
        *cache.entry(device).or_insert_with(|| {
            let key = Key::Link(device.name().into());
            match (desired.get(&key), actual.get(&key)) {
                (_, Some(Value::Link(found))) if matches!(found.kind, LinkKind::Foreign { .. }) => DeviceChange::Conflict,
                (Some(wanted), Some(found)) if needs_recreate(wanted, found) => DeviceChange::Recreate,
                (Some(Value::Link(wanted)), Some(Value::Link(found))) if wanted.mac.is_some_and(|mac| found.mac != Some(mac)) => {
                    DeviceChange::MacChanged
                }
                (Some(_), None) => DeviceChange::Create,
                (None, Some(_)) => DeviceChange::Delete,
                _ => DeviceChange::Unchanged,
            }
        })
    }
}

/// The device that an entry requires: the one that it is on, or for a port its bridge.
fn required_device(key: &Key, value: &Value, state: &impl Entries) -> Option<Device> {
    match value {
        Value::Link(link) => link.master,
        _ => device_of(key, value, state),
    }
}

/// The entry that has to exist before this one can be set; `None` if there is none.
pub fn prerequisite(key: &Key, value: &Value, state: &impl Entries) -> Option<Key> {
    match (key, value) {
        (Key::Element(element), _) => Some(Key::Ruleset(element.set().table())),
        (_, Value::Route(RouteTarget::Nexthop(id))) => Some(Key::Nexthop(*id)),
        _ => required_device(key, value, state).map(|device| Key::Link(device.name().into())),
    }
}

/// The device of a link's key; `None` for ports and for other entries.
fn link_device(key: &Key) -> Option<Device> {
    match key {
        Key::Link(name) => Device::from_name(name),
        _ => None,
    }
}

/// Whether the found value satisfies the wanted one.
pub fn is_satisfied(wanted: &Value, found: &Value) -> bool {
    match (wanted, found) {
        (Value::Link(wanted), Value::Link(found)) => {
            let LinkState { kind, mac, mtu, up, master, hairpin } = &**wanted;
            // The kernel does not report where a pair's other end is.
            let is_same_kind = *kind == found.kind || matches!((kind, &found.kind), (LinkKind::Pair(_), LinkKind::Pair(_)));
            is_same_kind
                && mac.is_none_or(|mac| found.mac == Some(mac))
                && *mtu == found.mtu
                && *up == found.up
                && *master == found.master
                && *hairpin == found.hairpin
        }
        _ => wanted == found,
    }
}

/// Whether a link has to be deleted and created again to get the wanted value.
fn needs_recreate(wanted: &Value, found: &Value) -> bool {
    match (wanted, found) {
        (Value::Link(wanted), Value::Link(found)) => match (&wanted.kind, &found.kind) {
            (LinkKind::Vxlan(wanted), LinkKind::Vxlan(found)) => !found.changes_in_place(wanted),
            // A foreign link is never changed: setting it fails with a remedy in the error.
            _ => false,
        },
        _ => false,
    }
}

/// Whether an entry may be deleted: sysctls cannot be deleted, foreign entries are not ours, and the endpoints own their links.
/// While an endpoint is attached or detached, its port exists but is not desired: the port keeps its elements of the source
/// filter.
fn is_managed(key: &Key, found: &Value, desired: &impl Entries, actual: &impl Entries) -> bool {
    match (key, found) {
        (Key::Sysctl(_), _) | (_, Value::Route(RouteTarget::Foreign)) => false,
        (Key::Element(element), _) => element.interface().is_none_or(|interface| {
            let link = Key::Link(interface.into());
            desired.contains_key(&link) || !matches!(actual.get(&link), Some(Value::Link(link)) if link.kind == LinkKind::Port)
        }),
        (_, Value::Link(link)) => !matches!(link.kind, LinkKind::Foreign { .. } | LinkKind::Port),
        _ => true,
    }
}

/// Whether a comparison finds nothing to do for an entry.
pub fn is_in_sync(key: &Key, desired: &impl Entries, actual: &impl Entries) -> bool {
    match (desired.get(key), actual.get(key)) {
        (Some(wanted), Some(found)) => is_satisfied(wanted, found),
        (Some(_), None) => false,
        (None, found) => found.is_none_or(|found| !is_managed(key, found, desired, actual)),
    }
}

/// Stage of an entry, for the order in which entries are set: an entry depends on those of earlier stages only.
///
/// `accept_ra` is set before forwarding is enabled, because at that moment the kernel drops default routes from router
/// advertisements (`rt6_purge_dflt_routers` in `net/ipv6/route.c`). The FDB entry precedes the neighbour, so that no neighbour
/// has a MAC without a destination. The route comes last, because it attracts the traffic. The elements that accept a peer's
/// packets precede its route.
pub fn stage(key: &Key) -> u8 {
    match key {
        // Ports need their bridge.
        Key::Link(name) => u8::from(Device::from_name(name).is_none()),
        Key::Sysctl(path) if path.ends_with("accept_ra") => 2,
        // This lets 127.0.0.0/8 leave the host, so the rules that restrict it come first.
        Key::Sysctl(path) if path.ends_with("route_localnet") => 8,
        Key::Sysctl(_) => 3,
        Key::Address(..) => 4,
        Key::ForwardAccept(_) => 5,
        Key::Ruleset(_) => 6,
        Key::Element(_) => 7,
        Key::Fdb(..) => 9,
        Key::Neigh(..) => 10,
        Key::Nexthop(_) => 11,
        Key::Route(_) => 12,
        // Last, so that no packet for a peer's subnet is rejected before the peer's route exists.
        Key::Unreachable(_) => 13,
    }
}

#[cfg(test)]
mod tests;
