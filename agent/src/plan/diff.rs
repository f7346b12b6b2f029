//! What has to change so that actual state becomes desired state, in an order in which nothing that carries traffic breaks.
//!
//! The comparison goes over the union of keys: what is desired and differs is set, what is there and not desired is deleted. All settings come
//! before all deletions (make before break); settings in the order of their stages, each standing on those before, deletions in reverse.

use std::collections::BTreeSet;

use super::ops::{Batch, Op};
use super::state::{Key, LinkKind, LinkState, State, Value, Via, device_of};
use crate::model::Device;

/// The batch that makes all of `actual` equal to `desired`.
pub fn diff(desired: &State, actual: &State) -> Batch {
    diff_keys(desired, actual, desired.keys().chain(actual.keys().filter(|key| !desired.contains_key(key))))
}

/// The same for some keys only. Costs in time grow with their number, not with that of the entries.
pub fn diff_keys<'a>(desired: &State, actual: &State, keys: impl IntoIterator<Item = &'a Key>) -> Batch {
    let mut sets = Vec::new();
    let mut deletions = Vec::new();
    let mut made_again = BTreeSet::new();
    let mut removed = BTreeSet::new();
    for key in keys {
        match (desired.get(key), actual.get(key)) {
            (Some(wanted), Some(found)) if satisfied(wanted, found) => {}
            (Some(wanted), found) => {
                if let Some(found) = found
                    && must_be_made_again(wanted, found)
                {
                    sets.push(Op::Delete(key.clone(), found.clone()));
                    made_again.extend(device(key));
                }
                sets.push(Op::Set(key.clone(), wanted.clone()));
            }
            (None, Some(found)) if ours(key, found) => {
                if let Key::Link(_) = key {
                    removed.extend(device(key));
                }
                deletions.push(Op::Delete(key.clone(), found.clone()));
            }
            (None, _) => {}
        }
    }
    if !made_again.is_empty() {
        // Everything on a device that is made again went with it, also what equals desired state now.
        let named: BTreeSet<Key> = sets.iter().map(|op| op.key().clone()).collect();
        for (key, wanted) in desired {
            if device_of(key, wanted, desired).is_some_and(|device| made_again.contains(&device)) && !named.contains(key) {
                sets.push(Op::Set(key.clone(), wanted.clone()));
            }
        }
    }
    // The kernel takes these away with their device. Routes and next hops go one by one all the same: left to the kernel, each next hop
    // that goes walks the whole routing table.
    deletions.retain(|op| op.key().device().is_none_or(|device| !removed.contains(&device)));
    sets.sort_by_key(|op| stage(op.key()));
    deletions.sort_by_key(|op| std::cmp::Reverse(stage(op.key())));
    sets.append(&mut deletions);
    sets
}

/// Whether what is found is as good as what is wanted.
pub fn satisfied(wanted: &Value, found: &Value) -> bool {
    match (wanted, found) {
        (Value::Link(wanted), Value::Link(found)) => {
            let LinkState { kind, mac, mtu, up, master } = &**wanted;
            *kind == found.kind
                && mac.is_none_or(|mac| found.mac == Some(mac))
                && *mtu == found.mtu
                && *up == found.up
                && *master == found.master
        }
        _ => wanted == found,
    }
}

/// Whether a link has to be deleted before it can be as wanted.
fn must_be_made_again(wanted: &Value, found: &Value) -> bool {
    match (wanted, found) {
        (Value::Link(wanted), Value::Link(found)) => match (&wanted.kind, &found.kind) {
            (LinkKind::Vxlan(wanted), LinkKind::Vxlan(found)) => !found.changes_in_place(wanted),
            // A foreign link is never touched: setting it fails with advice.
            _ => false,
        },
        _ => false,
    }
}

/// Whether an entry may be deleted: sysctls have no absence, foreign things are not ours, and endpoints own their links.
fn ours(key: &Key, found: &Value) -> bool {
    match (key, found) {
        (Key::Sysctl(_), _) | (_, Value::Route(Via::Foreign)) => false,
        (_, Value::Link(link)) => !matches!(link.kind, LinkKind::Foreign { .. } | LinkKind::Port),
        _ => true,
    }
}

fn device(key: &Key) -> Option<Device> {
    match key {
        Key::Link(name) => Device::from_name(name),
        _ => None,
    }
}

/// The order in which entries are made: each stands on those of earlier stages.
///
/// Router advertisements are settled before forwarding is switched on, because the kernel drops default routes that came from them at that
/// moment (`rt6_purge_dflt_routers` in `net/ipv6/route.c`). The FDB entry comes before the neighbour, so that no neighbour points to a MAC
/// without a destination; the route comes last, because it draws the traffic.
fn stage(key: &Key) -> u8 {
    match key {
        // Ports need their bridge.
        Key::Link(name) => u8::from(Device::from_name(name).is_none()),
        Key::Sysctl(path) if path.ends_with("accept_ra") => 2,
        Key::Sysctl(_) => 3,
        Key::Address(..) => 4,
        Key::Ruleset | Key::ForwardAccept(_) => 5,
        Key::Fdb(..) => 6,
        Key::Neigh(..) => 7,
        Key::Nexthop(_) => 8,
        Key::Route(_) => 9,
    }
}
