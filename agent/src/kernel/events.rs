//! What rtnetlink's events mean to the overlay: each message is judged against what is known, and what is new is kept until it is handed on.

use std::collections::btree_map::Entry as Place;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_REPLACE, NetlinkHeader};
use netlink_packet_route::address::AddressFlags;
use netlink_packet_route::link::LinkFlags;

use super::Shared;
use super::dump::change;
use super::is_ours;
use super::known::{Known, is_marked};
use super::message::{attributes, u32_at};
use super::objects::{self, AddressInfo, LinkInfo, RouteInfo};
use super::socket::RouteSocket;
use super::sysctl;
use super::uapi::*;
use super::wire::{Entry, family_of};
use crate::model::{Device, Mac, Role};
use crate::plan::desired::sysctls;
use crate::plan::{KernelEvent, Key, LinkKind, OpError, Value};

/// Changes that are kept one by one; where more wait, a dump is cheaper.
const LIMIT: usize = 16 * 1024;

/// News that nobody has taken yet; of each entry the last.
#[derive(Debug, Default)]
pub struct Pending {
    changed: BTreeMap<Key, Change>,
    stale: Option<&'static str>,
    underlay: bool,
}

/// A change of an entry.
#[derive(Debug)]
struct Change {
    /// What was known before, where that is kept.
    before: Option<Option<Value>>,
    now: Option<Value>,
}

impl Pending {
    /// Whether there is no news.
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.stale.is_none() && !self.underlay
    }

    /// The next event.
    pub fn take(&mut self) -> Option<KernelEvent> {
        if !self.changed.is_empty() {
            let changed = std::mem::take(&mut self.changed).into_iter().map(|(key, change)| (key, change.now));
            return Some(KernelEvent::Changed(changed.collect()));
        }
        if let Some(reason) = self.stale.take() {
            return Some(KernelEvent::Stale { reason });
        }
        std::mem::take(&mut self.underlay).then_some(KernelEvent::Underlay)
    }

    /// An entry changed, and what was known of it is not kept.
    pub fn changed(&mut self, key: Key, now: Option<Value>) {
        self.put(key, None, now);
    }

    /// An entry changed from what was known of it.
    pub fn changed_from(&mut self, key: Key, before: Option<Value>, now: Option<Value>) {
        self.put(key, Some(before), now);
    }

    /// Drops what changed there and back again: one change of ours to a link is several events, the last of which says what is known.
    pub fn prune(&mut self) {
        self.changed.retain(|_, change| change.before.as_ref() != Some(&change.now));
    }

    fn put(&mut self, key: Key, before: Option<Option<Value>>, now: Option<Value>) {
        if self.changed.len() >= LIMIT {
            self.changed.clear();
            self.stale("more changed at once than is kept one by one");
        }
        match self.changed.entry(key) {
            Place::Occupied(mut change) => change.get_mut().now = now,
            Place::Vacant(place) => {
                place.insert(Change { before, now });
            }
        }
    }

    /// More changed than events say.
    pub fn stale(&mut self, reason: &'static str) {
        self.stale.get_or_insert(reason);
    }

    /// Something that is not ours changed.
    pub fn underlay(&mut self) {
        self.underlay = true;
    }
}

/// What was last told about interfaces that are not ours: events that tell the same again are no news.
#[derive(Debug, Default)]
pub struct Foreign {
    links: HashMap<u32, (String, u32, bool)>,
    addresses: HashMap<(u32, IpAddr), AddressFlags>,
}

impl Foreign {
    /// What there is to begin with.
    pub fn read(socket: &mut RouteSocket) -> Result<Foreign, OpError> {
        let links = objects::links(socket)?;
        let addresses = objects::addresses(socket, 0)?;
        Ok(Foreign {
            links: links.into_iter().map(|link| (link.index, (link.name.clone(), link.mtu, link.up()))).collect(),
            addresses: addresses.iter().map(|a| ((a.index, a.address.ip()), a.fitness())).collect(),
        })
    }

    /// The name of an interface.
    fn name(&self, index: u32) -> Option<&str> {
        self.links.get(&index).map(|(name, _, _)| name.as_str())
    }
}

/// Judges one message.
pub fn note(header: NetlinkHeader, body: &[u8], shared: &mut Shared, foreign: &mut Foreign, pending: &mut Pending) {
    match header.message_type {
        libc::RTM_NEWLINK | libc::RTM_DELLINK => {
            if let Some(link) = LinkInfo::read(body) {
                note_link(header.message_type == libc::RTM_NEWLINK, &link, shared, foreign, pending);
            }
        }
        libc::RTM_NEWADDR | libc::RTM_DELADDR => {
            if let Some(address) = AddressInfo::read(body) {
                note_address(header.message_type == libc::RTM_NEWADDR, &address, &mut shared.known, foreign, pending);
            }
        }
        RTM_NEWNETCONF => note_netconf(body, &mut shared.known, foreign, pending),
        _ => {
            if let Some(entry) = Entry::read(header, body) {
                note_entry(header, &entry, &mut shared.known, pending);
            }
            let about_route = matches!(header.message_type, libc::RTM_NEWROUTE | libc::RTM_DELROUTE);
            let default = if about_route { RouteInfo::read_default(body) } else { None };
            if default.is_some_and(|route| !is_ours(route.protocol.into())) {
                pending.underlay();
            }
        }
    }
}

/// Judges what was told of a link: that it is there, or that it went away. What the kernel tells by itself may be older than the last change of ours,
/// whose own event is not heard: who is told looks at the link before it does anything about it.
fn note_link(present: bool, link: &LinkInfo, shared: &mut Shared, foreign: &mut Foreign, pending: &mut Pending) {
    let known = &mut shared.known;
    // We removed it: what it went through on its way out is no news.
    if known.is_removed(link.index) {
        return;
    }
    // A link of ours that has another name now is gone under its own.
    let ours = known.link_name(link.index).map(str::to_owned);
    if let Some(old) = &ours
        && (*old != link.name || !present)
    {
        let before = known.drop_link(old).map(|state| Value::Link(Box::new(state)));
        pending.changed_from(Key::Link(old.clone().into()), before, None);
        pending.stale("a link of ours went away, and what was on it");
    }
    if !present {
        foreign.links.remove(&link.index);
        if ours.is_none() {
            pending.underlay();
            // A change of ours came in between, found nothing, and forgot the link: others do not know yet.
            if is_marked(link) && !known.links.contains_key(&link.name) {
                pending.changed(Key::Link(link.name.clone().into()), None);
            }
        }
        return;
    }
    let state = known.link_state(link, |name| shared.ethtool.tx_checksum(name));
    if !state.as_ref().is_some_and(|s| !matches!(s.kind, LinkKind::Foreign { .. })) {
        let now = (link.name.clone(), link.mtu, link.up());
        if foreign.links.get(&link.index) != Some(&now) {
            foreign.links.insert(link.index, now);
            pending.underlay();
        }
    }
    let Some(state) = state else { return };
    // All bits: the announcement of a new link. Other changes than of flags announce no bits.
    let went_down = !link.up() && link.changed.contains(LinkFlags::Up) && link.changed.bits() != u32::MAX;
    let before = known.links.get(&link.name).map(|(index, old)| (*index, old.clone()));
    match &before {
        Some((index, _)) if *index != link.index => pending.stale("a link of ours was made again by others"),
        // IPv4 routes, next hops and neighbours of a device that goes down are removed without an event of their own.
        Some((_, old)) if went_down && old.up && Device::from_name(&link.name).is_some() => {
            pending.stale("a device of ours went down, and routes with it");
        }
        Some((_, old)) if *old == state => return,
        _ => {}
    }
    known.put_link(&link.name, link.index, state.clone());
    let value = |state| Value::Link(Box::new(state));
    pending.changed_from(Key::Link(link.name.clone().into()), before.map(|(_, old)| value(old)), Some(value(state)));
}

fn note_address(present: bool, info: &AddressInfo, known: &mut Known, foreign: &mut Foreign, pending: &mut Pending) {
    if let Some(device) = known.device(info.index) {
        let Some(key) = info.on(device) else { return };
        let address = (device, info.address);
        let news = if present { known.addresses.insert(address) } else { known.addresses.remove(&address) };
        if news {
            let (absent, there) = (None, Some(Value::Address));
            let (before, now) = if present { (absent, there) } else { (there, absent) };
            pending.changed_from(key, before, now);
            if !present && info.address.is_ipv6() {
                note_ipv6_off(device, known, pending);
            }
        }
    } else if info.is_global() && !known.is_removed(info.index) {
        let key = (info.index, info.address.ip());
        let fitness = info.fitness();
        let news = if present {
            foreign.addresses.insert(key, fitness) != Some(fitness)
        } else {
            foreign.addresses.remove(&key);
            true
        };
        if news {
            pending.underlay();
        }
    }
}

/// An address went. The kernel tells nobody that IPv6 was switched off on a device, only that its addresses go; its routes and neighbours go untold.
fn note_ipv6_off(device: Device, known: &mut Known, pending: &mut Pending) {
    let path = sysctl::disable_ipv6(&device.name());
    if let Ok(Some(text)) = sysctl::read(&path)
        && text != sysctl::OFF
        && known.sysctls.get(&path).is_some_and(|before| *before != text)
    {
        note_sysctl(path, text, known, pending);
        pending.stale("IPv6 was switched off on a device of ours, and what it had went");
    }
}

/// A setting of an interface, or of the whole namespace, was changed: forwarding, the reverse path filter, proxy ARP. The kernel tells of no others.
/// (`netlink-packet-route` has no netconf messages.)
fn note_netconf(body: &[u8], known: &mut Known, foreign: &Foreign, pending: &mut Pending) {
    let Some(family) = body.first().copied().and_then(family_of) else { return };
    let index = attributes(body, 1).find(|(kind, _)| *kind == NETCONFA_IFINDEX).and_then(|(_, value)| u32_at(value, 0));
    let device = index.and_then(|index| known.device(index)).map(|device| device.name());
    let interface = device.as_deref().or_else(|| foreign.name(index?));
    for (kind, value) in attributes(body, 1) {
        let setting = match kind {
            NETCONFA_FORWARDING => "forwarding",
            NETCONFA_RP_FILTER => "rp_filter",
            NETCONFA_PROXY_NEIGH => "proxy_arp",
            _ => continue,
        };
        let path = match interface {
            Some(interface) => sysctls::of(interface, family, setting),
            None if index == Some(NETCONFA_IFINDEX_ALL) && kind == NETCONFA_FORWARDING => sysctls::forwarding(family).to_owned(),
            None => continue,
        };
        if let Some(value) = u32_at(value, 0) {
            note_sysctl(path, value.to_string(), known, pending);
        }
    }
}

/// A sysctl has this value now. Only what was read or written counts.
fn note_sysctl(path: String, text: String, known: &mut Known, pending: &mut Pending) {
    let Some(value) = known.sysctls.get_mut(&path) else { return };
    if *value != text {
        let before = std::mem::replace(value, text.clone());
        pending.changed_from(Key::Sysctl(path.into()), Some(Value::Sysctl(before.into())), Some(Value::Sysctl(text.into())));
    }
}

fn note_entry(header: NetlinkHeader, entry: &Entry, known: &mut Known, pending: &mut Pending) {
    let present = matches!(header.message_type, libc::RTM_NEWNEIGH | RTM_NEWNEXTHOP | libc::RTM_NEWROUTE);
    match *entry {
        // Before Linux 6.13 the kernel's core tells of each entry that is set or removed once more, behind the device's own event, and without
        // where it leads (`rtnl_fdb_notify` in `net/core/rtnetlink.c`). A VXLAN device's own event always says it (`vxlan_fdb_info`).
        Entry::Fdb { remote: None, .. } => return,
        Entry::Fdb { index, mac, remote, permanent } => {
            if let Some(device) = known.device(index).filter(|d| matches!(d.role, Role::Vxlan(_))) {
                let before = known.fdb.get(&(index, mac)).copied();
                if note_fdb(known, index, mac, remote.filter(|_| permanent || !present), present) {
                    let now = known.fdb.get(&(index, mac)).copied();
                    pending.changed_from(Key::Fdb(device, mac), before.map(Value::Fdb), now.map(Value::Fdb));
                }
            }
            return;
        }
        Entry::Neigh { index, address, .. } => {
            if !present && known.removed_neighbours.remove(&(index, address)) {
                return;
            }
        }
        Entry::Nexthop { protocol, .. } => {
            if !present && is_ours(protocol) {
                pending.stale("a next hop of ours was removed, and its routes with it");
            }
        }
        // A route of others matters only where it took the place of one that was there.
        Entry::Route { protocol, .. } | Entry::Unreachable { protocol, .. } => {
            let replaces = present && header.flags & NLM_F_REPLACE != 0;
            if !is_ours(protocol) && !replaces {
                return;
            }
        }
    }
    if let Some((key, value)) = change(known, entry, present) {
        pending.changed(key, value);
    }
}

/// Follows an FDB entry; whether it is news. Its events never name the socket that asked, so ours are known by what they say.
fn note_fdb(known: &mut Known, index: u32, mac: Mac, remote: Option<IpAddr>, present: bool) -> bool {
    let at = (index, mac);
    let before = known.fdb.get(&at).copied();
    match (present, remote) {
        (true, Some(remote)) if before == Some(remote) => false,
        (true, Some(remote)) => {
            known.fdb.insert(at, remote);
            true
        }
        _ => known.fdb.remove(&at).is_some(),
    }
}
