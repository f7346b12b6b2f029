//! All of ours that the kernel holds, read at one go. The kernel filters by device, table and protocol (`NETLINK_GET_STRICT_CHK`); on a kernel that
//! does not, the same is filtered here.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use super::known::Known;
use super::objects;
use super::sysctl;
use super::wire::{Entry, Hop, Query};
use super::{Shared, is_ours};
use crate::model::{Family, Mac, Role};
use crate::plan::desired::sysctls;
use crate::plan::state::{NEXTHOP_IDS, Via};
use crate::plan::{Key, OpError, State, Value};

/// Reads everything, and makes it what is known.
pub fn state(shared: &mut Shared, nexthop_objects: bool) -> Result<State, OpError> {
    let fresh = shared.known.fresh();
    let before = std::mem::replace(&mut shared.known, fresh);
    let state = read_all(shared, nexthop_objects);
    if state.is_err() {
        shared.known = before;
    }
    state
}

fn read_all(shared: &mut Shared, nexthop_objects: bool) -> Result<State, OpError> {
    links(shared)?;
    addresses(shared)?;
    read_sysctls(&mut shared.known)?;
    shared.known.rules = shared.nft.dump()?.into_entries();
    let mut state = shared.known.state();
    let mut queries: Vec<Query> = Vec::new();
    for (index, device) in shared.known.devices() {
        if let Role::Vxlan(_) = device.role {
            queries.push(Query::Fdb(*index));
            queries.extend(Family::ALL.map(|family| Query::Neigh(*index, family)));
        }
    }
    if nexthop_objects {
        queries.push(Query::Nexthops);
    }
    queries.extend(Family::ALL.map(|family| Query::Routes(family, crate::plan::state::PROTOCOL)));
    for query in queries {
        let entries = read(shared, query)?;
        for entry in entries {
            insert(&mut state, &mut shared.known, entry);
        }
    }
    Ok(state)
}

/// Where each permanent FDB entry of our VXLAN devices leads.
pub fn fdb(shared: &mut Shared) -> Result<HashMap<(u32, Mac), IpAddr>, OpError> {
    let vxlan = shared.known.devices().iter().filter(|(_, device)| matches!(device.role, Role::Vxlan(_)));
    let mut found = HashMap::with_capacity(shared.known.fdb.len());
    for query in vxlan.map(|(index, _)| Query::Fdb(*index)).collect::<Vec<_>>() {
        found.extend(read(shared, query)?.iter().filter_map(remote));
    }
    Ok(found)
}

/// A permanent FDB entry with a remote.
fn remote(entry: &Entry) -> Option<((u32, Mac), IpAddr)> {
    match *entry {
        Entry::Fdb { index, mac, remote, permanent: true } => remote.map(|remote| ((index, mac), remote)),
        _ => None,
    }
}

fn read(shared: &mut Shared, query: Query) -> Result<Vec<Entry>, OpError> {
    let read = shared.socket.dump(&query, Vec::new, |all, header, body| {
        all.extend(Entry::read(header, body));
    });
    match read {
        Ok(entries) => Ok(entries),
        Err(e) if e.is_without_family() => Ok(Vec::new()),
        Err(e) => Err(e.during(format!("cannot list the kernel's entries ({query:?})"))),
    }
}

/// Takes an entry into a dumped state, if it is ours.
fn insert(state: &mut State, known: &mut Known, entry: Entry) {
    known.fdb.extend(remote(&entry));
    if matches!(entry, Entry::Route { protocol, .. } | Entry::Unreachable { protocol, .. } if !is_ours(protocol)) {
        return;
    }
    if let Some((key, Some(value))) = change(known, &entry, true) {
        state.insert(key, value);
    }
}

/// What an entry means to the overlay: the key, and the value if it is of a form that ours have. `None` where it is no business of ours.
pub fn change(known: &Known, entry: &Entry, present: bool) -> Option<(Key, Option<Value>)> {
    let vxlan = |index: u32| known.device(index).filter(|d| matches!(d.role, Role::Vxlan(_)));
    match *entry {
        Entry::Fdb { index, mac, remote, permanent } => {
            let value = remote.filter(|_| present && permanent).map(Value::Fdb);
            Some((Key::Fdb(vxlan(index)?, mac), value))
        }
        Entry::Neigh { index, address, mac } => {
            Some((Key::Neigh(vxlan(index)?, address), mac.filter(|_| present).map(Value::Neigh)))
        }
        Entry::Nexthop { id, protocol, hop } => {
            let ours = is_ours(protocol);
            if !ours && !NEXTHOP_IDS.contains(&id) {
                return None;
            }
            let value = hop
                .filter(|_| ours && present)
                .and_then(|(index, gateway)| known.device(index).map(|device| Value::Nexthop { device, gateway }));
            Some((Key::Nexthop(id), value))
        }
        Entry::Route { destination, protocol, hop } => {
            if !is_ours(protocol) {
                return Some((Key::Route(destination), present.then_some(Value::Route(Via::Foreign))));
            }
            let via = match hop {
                Hop::Nexthop(id) => Via::Nexthop(id),
                Hop::Gateway(index, gateway) => known.device(index).map_or(Via::Foreign, |device| Via::Gateway(device, gateway)),
                Hop::Local(index) => known.device(index).map_or(Via::Foreign, Via::Local),
                Hop::Other => Via::Foreign,
            };
            Some((Key::Route(destination), present.then_some(Value::Route(via))))
        }
        // One of others in its place counts as none: ours replaces it.
        Entry::Unreachable { destination, protocol, unreachable } => {
            let right = present && unreachable && is_ours(protocol);
            Some((Key::Unreachable(destination), right.then_some(Value::Unreachable)))
        }
    }
}

fn links(shared: &mut Shared) -> Result<(), OpError> {
    let mut links = objects::links(&mut shared.socket)?;
    // Bridges first: a port's state names its bridge.
    links.sort_by_key(|link| link.kind != "bridge");
    // One that is on its way out takes some milliseconds to go.
    links.retain(|link| !shared.known.is_removed(link.index));
    for link in links {
        if let Some(state) = shared.known.link_state(&link, |name| shared.ethtool.tx_checksum(name)) {
            shared.known.put_link(&link.name, link.index, state);
        }
    }
    Ok(())
}

fn addresses(shared: &mut Shared) -> Result<(), OpError> {
    for (index, device) in shared.known.devices().to_vec() {
        for address in objects::addresses(&mut shared.socket, index)? {
            if address.index == index && address.on(device).is_some() {
                shared.known.addresses.insert((device, address.address));
            }
        }
    }
    Ok(())
}

/// Reads sysctls: they are known from now on, and what others make of them is told. One that is not there is left out.
pub fn follow(known: &mut Known, paths: impl IntoIterator<Item = String>) -> Result<(), OpError> {
    for path in paths {
        let found = sysctl::read(&path)?.or_else(|| sysctl::is_moot(&path).then(|| sysctl::OFF.to_owned()));
        if let Some(text) = found {
            known.sysctls.insert(path, text);
        }
    }
    Ok(())
}

/// Reads the sysctls of always, those of our devices, and those that were ever read or written.
fn read_sysctls(known: &mut Known) -> Result<(), OpError> {
    let mut paths: BTreeSet<String> = known.sysctls.keys().cloned().collect();
    paths.extend(Family::ALL.map(|family| sysctls::forwarding(family).to_owned()));
    for (_, device) in known.devices() {
        let name = device.name();
        paths.insert(sysctl::accept_ra(&name));
        if device.role == Role::Bridge {
            paths.insert(sysctl::route_localnet(&name));
        }
        let carried = Family::ALL.into_iter().filter(|family| device.carries(*family));
        paths.extend(carried.flat_map(|family| sysctls::of_device(*device, family)).map(|(path, _)| path));
    }
    known.sysctls.clear();
    follow(known, paths)
}
