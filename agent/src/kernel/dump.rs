//! Reads all our state from the kernel in one pass.
//!
//! The kernel filters by device, table and protocol (`NETLINK_GET_STRICT_CHK`). For kernels that do not, this module filters too.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use super::cache::KernelCache;
use super::objects;
use super::peer_messages::{EntryQuery, KernelEntry, KernelRouteTarget};
use super::shared::Shared;
use super::sysctl;
use crate::model::{Device, Family, Mac, Role};
use crate::plan::state::{NEXTHOP_IDS, PROTOCOL, RouteTarget};
use crate::plan::sysctls;
use crate::plan::{Dump, Key, OpError, State, Value};

/// Reads all our state and replaces the cache with it. If a read fails, the cache stays unchanged.
pub fn read_state(shared: &mut Shared, nexthop_objects: bool) -> Result<Dump, OpError> {
    let fresh = shared.cache.new_for_dump();
    let before = std::mem::replace(&mut shared.cache, fresh);
    match read_all(shared, nexthop_objects) {
        Ok(peers) => Ok(Dump { peers, local_before: shared.cache.publish_dump(before) }),
        Err(error) => {
            shared.cache = before;
            Err(error)
        }
    }
}

/// Reads the local entries into the cache; returns the peers' entries.
fn read_all(shared: &mut Shared, nexthop_objects: bool) -> Result<State, OpError> {
    read_links(shared)?;
    read_addresses(shared)?;
    read_sysctls(shared)?;
    shared.cache.local().rules = shared.nft.dump()?.into_entries();
    let mut state = State::new();
    let mut queries: Vec<EntryQuery> = Vec::new();
    for (index, device) in shared.cache.devices() {
        if let Role::Vxlan(_) = device.role {
            queries.push(EntryQuery::Fdb(*index));
        }
        if has_neighbours(*device) {
            queries.extend(Family::ALL.map(|family| EntryQuery::Neigh(*index, family)));
        }
    }
    if nexthop_objects {
        queries.push(EntryQuery::Nexthops);
    }
    queries.extend(Family::ALL.map(|family| EntryQuery::Routes(family, PROTOCOL)));
    for query in queries {
        let entries = read_entries(shared, query)?;
        for entry in entries {
            insert(&mut state, &mut shared.cache, entry);
        }
    }
    Ok(state)
}

/// Whether we write permanent neighbour entries for a device.
fn has_neighbours(device: Device) -> bool {
    matches!(device.role, Role::Vxlan(_) | Role::PeerLink)
}

/// Reads the remotes of our VXLAN devices' permanent FDB entries.
pub fn read_fdb(shared: &mut Shared) -> Result<HashMap<(u32, Mac), IpAddr>, OpError> {
    let vxlan = shared.cache.devices().iter().filter(|(_, device)| matches!(device.role, Role::Vxlan(_)));
    let mut found = HashMap::with_capacity(shared.cache.fdb.len());
    for query in vxlan.map(|(index, _)| EntryQuery::Fdb(*index)).collect::<Vec<_>>() {
        found.extend(read_entries(shared, query)?.iter().filter_map(fdb_remote));
    }
    Ok(found)
}

/// The cache key and remote of a permanent FDB entry; `None` for any other entry.
fn fdb_remote(entry: &KernelEntry) -> Option<((u32, Mac), IpAddr)> {
    match *entry {
        KernelEntry::Fdb { index, mac, remote, permanent: true } => remote.map(|remote| ((index, mac), remote)),
        _ => None,
    }
}

fn read_entries(shared: &mut Shared, query: EntryQuery) -> Result<Vec<KernelEntry>, OpError> {
    let read = shared.socket.dump(&query, Vec::new, |all, header, body| {
        all.extend(KernelEntry::read(header, body));
    });
    match read {
        Ok(entries) => Ok(entries),
        Err(e) if e.is_unsupported_family() => Ok(Vec::new()),
        Err(e) => Err(e.context(format!("cannot list the kernel's entries ({query:?})"))),
    }
}

/// Adds an entry to a dumped state if it is ours.
fn insert(state: &mut State, cache: &mut KernelCache, entry: KernelEntry) {
    cache.fdb.extend(fdb_remote(&entry));
    if matches!(entry, KernelEntry::Route { protocol, .. } | KernelEntry::Unreachable { protocol, .. } if !is_own_protocol(protocol))
    {
        return;
    }
    if let Some((key, Some(value))) = state_change(cache, &entry, true) {
        state.insert(key, value);
    }
}

/// Converts an entry to its key and value in [`State`]. The value is `None` if the entry is gone or has a form that ours never
/// have. Returns `None` if the entry is not managed by us.
pub fn state_change(cache: &KernelCache, entry: &KernelEntry, present: bool) -> Option<(Key, Option<Value>)> {
    let vxlan = |index: u32| cache.device(index).filter(|d| matches!(d.role, Role::Vxlan(_)));
    match *entry {
        KernelEntry::Fdb { index, mac, remote, permanent } => {
            let value = remote.filter(|_| present && permanent).map(Value::Fdb);
            Some((Key::Fdb(vxlan(index)?, mac), value))
        }
        KernelEntry::Neigh { index, address, mac } => {
            let device = cache.device(index).filter(|device| has_neighbours(*device))?;
            Some((Key::Neigh(device, address), mac.filter(|_| present).map(Value::Neigh)))
        }
        KernelEntry::Nexthop { id, protocol, hop } => {
            let ours = is_own_protocol(protocol);
            if !ours && !NEXTHOP_IDS.contains(&id) {
                return None;
            }
            let value = hop
                .filter(|_| ours && present)
                .and_then(|(index, gateway)| cache.device(index).map(|device| Value::Nexthop { device, gateway }));
            Some((Key::Nexthop(id), value))
        }
        KernelEntry::Route { destination, protocol, hop } => {
            if !is_own_protocol(protocol) {
                return Some((Key::Route(destination), present.then_some(Value::Route(RouteTarget::Foreign))));
            }
            let via = match hop {
                KernelRouteTarget::Nexthop(id) => RouteTarget::Nexthop(id),
                KernelRouteTarget::Gateway(index, gateway) => {
                    cache.device(index).map_or(RouteTarget::Foreign, |device| RouteTarget::Gateway(device, gateway))
                }
                KernelRouteTarget::Via(gateway) => RouteTarget::Via(gateway),
                KernelRouteTarget::Local(index) => cache.device(index).map_or(RouteTarget::Foreign, RouteTarget::Local),
                KernelRouteTarget::Other => RouteTarget::Foreign,
            };
            Some((Key::Route(destination), present.then_some(Value::Route(via))))
        }
        // A foreign route in its place counts as missing: ours replaces it.
        KernelEntry::Unreachable { destination, protocol, unreachable } => {
            let valid = present && unreachable && is_own_protocol(protocol);
            Some((Key::Unreachable(destination), valid.then_some(Value::Unreachable)))
        }
    }
}

fn read_links(shared: &mut Shared) -> Result<(), OpError> {
    let mut links = objects::links(&mut shared.socket)?;
    // Bridges first: a port's state names its bridge.
    links.sort_by_key(|link| link.kind != "bridge");
    // A link that we removed stays visible for some milliseconds.
    links.retain(|link| !shared.cache.is_removed(link.index));
    for link in links {
        if let Some(state) = shared.cache.link_state(&link, |name| shared.ethtool.tx_checksum(name)) {
            shared.cache.insert_link(&link.name, link.index, state);
        }
    }
    Ok(())
}

fn read_addresses(shared: &mut Shared) -> Result<(), OpError> {
    for (index, device) in shared.cache.devices().to_vec() {
        for address in objects::addresses(&mut shared.socket, index)? {
            if let Some(key) = address.address_key(device).filter(|_| address.index == index) {
                shared.cache.set(key, Some(Value::Address));
            }
        }
    }
    Ok(())
}

/// Reads sysctls and tracks them: from now on the monitor reports changes by other processes. Missing sysctls are left out.
pub fn track_sysctls(shared: &Shared, paths: impl IntoIterator<Item = String>) -> Result<(), OpError> {
    let Shared { sysctls, cache, .. } = shared;
    for path in paths {
        let found = sysctls.read(&path)?.or_else(|| sysctls.is_implicitly_off(&path).then(|| sysctl::OFF.to_owned()));
        if let Some(text) = found {
            cache.set(Key::Sysctl(path.into()), Some(Value::Sysctl(text.into())));
        }
    }
    Ok(())
}

/// Reads the fixed sysctls, those of our devices, and all that were read or written before.
fn read_sysctls(shared: &Shared) -> Result<(), OpError> {
    let cache = &shared.cache;
    let path = |key: Key| if let Key::Sysctl(path) = key { Some(path.into_string()) } else { None };
    let mut local = cache.local();
    let others = local.entries.split_off(&Key::Link(Box::default()));
    let mut paths: BTreeSet<String> = std::mem::replace(&mut local.entries, others).into_keys().filter_map(path).collect();
    drop(local);
    paths.extend(Family::ALL.map(|family| sysctls::forwarding(family).to_owned()));
    for (_, device) in cache.devices() {
        let name = device.name();
        paths.insert(sysctl::accept_ra(&name));
        if matches!(device.role, Role::Bridge | Role::Transit) {
            paths.insert(sysctl::route_localnet(&name));
        }
        let families = Family::ALL.into_iter().filter(|family| device.carries(*family));
        paths.extend(families.flat_map(|family| sysctls::device_settings(*device, family)).map(|(path, _)| path));
    }
    track_sysctls(shared, paths)
}

/// Whether a protocol number is ours.
pub const fn is_own_protocol(protocol: u8) -> bool {
    protocol == PROTOCOL
}
