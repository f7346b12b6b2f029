//! What rtnetlink's events mean to the overlay: each message is judged against what is known, and what is new is kept until it is handed on.

use std::collections::btree_map::Entry as Place;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_REPLACE, NetlinkHeader};
use netlink_packet_route::address::AddressFlags;
use netlink_packet_route::link::LinkFlags;

use super::Shared;
use super::cache::{KernelCache, is_own_link};
use super::dump::state_change;
use super::is_own_protocol;
use super::nlmsg::{attributes, u32_at};
use super::objects::{self, AddressInfo, LinkInfo, RouteInfo};
use super::peer_messages::{KernelEntry, family_of};
use super::route_socket::RouteSocket;
use super::sysctl;
use super::uapi::*;
use crate::model::{Device, Mac, Role};
use crate::plan::desired::sysctls;
use crate::plan::{KernelEvent, Key, LinkKind, OpError, Value};

/// Changes that are kept one by one; where more wait, a dump is cheaper.
const MAX_PENDING_CHANGES: usize = 16 * 1024;

/// News that nobody has taken yet; of each entry the last.
#[derive(Debug, Default)]
pub struct PendingEvents {
    changes: BTreeMap<Key, PendingChange>,
    resync_reason: Option<&'static str>,
    host_network_changed: bool,
}

/// A change of an entry.
#[derive(Debug)]
struct PendingChange {
    /// What was known before, where that is kept.
    before: Option<Option<Value>>,
    now: Option<Value>,
}

impl PendingEvents {
    /// Whether there is no news.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.resync_reason.is_none() && !self.host_network_changed
    }

    /// The next event.
    pub fn next_event(&mut self) -> Option<KernelEvent> {
        if !self.changes.is_empty() {
            let changed = std::mem::take(&mut self.changes).into_iter().map(|(key, change)| (key, change.now));
            return Some(KernelEvent::Changed(changed.collect()));
        }
        if let Some(reason) = self.resync_reason.take() {
            return Some(KernelEvent::ResyncNeeded { reason });
        }
        std::mem::take(&mut self.host_network_changed).then_some(KernelEvent::HostNetworkChanged)
    }

    /// An entry changed, and what was known of it is not kept.
    pub fn record(&mut self, key: Key, now: Option<Value>) {
        self.insert(key, None, now);
    }

    /// An entry changed from what was known of it.
    pub fn record_change(&mut self, key: Key, before: Option<Value>, now: Option<Value>) {
        self.insert(key, Some(before), now);
    }

    /// Drops what changed there and back again: one change of ours to a link is several events, the last of which says what is known.
    pub fn drop_reverted(&mut self) {
        self.changes.retain(|_, change| change.before.as_ref() != Some(&change.now));
    }

    fn insert(&mut self, key: Key, before: Option<Option<Value>>, now: Option<Value>) {
        if self.changes.len() >= MAX_PENDING_CHANGES {
            self.changes.clear();
            self.require_resync("more changed at once than is kept one by one");
        }
        match self.changes.entry(key) {
            Place::Occupied(mut change) => change.get_mut().now = now,
            Place::Vacant(place) => {
                place.insert(PendingChange { before, now });
            }
        }
    }

    /// More changed than events say.
    pub fn require_resync(&mut self, reason: &'static str) {
        self.resync_reason.get_or_insert(reason);
    }

    /// Something that is not ours changed.
    pub fn host_network_changed(&mut self) {
        self.host_network_changed = true;
    }
}

/// What was last told about interfaces that are not ours: events that tell the same again are no news.
#[derive(Debug, Default)]
pub struct HostInterfaces {
    links: HashMap<u32, (String, u32, bool)>,
    addresses: HashMap<(u32, IpAddr), AddressFlags>,
}

impl HostInterfaces {
    /// What there is to begin with.
    pub fn read(socket: &mut RouteSocket) -> Result<HostInterfaces, OpError> {
        let links = objects::links(socket)?;
        let addresses = objects::addresses(socket, 0)?;
        Ok(HostInterfaces {
            links: links.into_iter().map(|link| (link.index, (link.name.clone(), link.mtu, link.up()))).collect(),
            addresses: addresses.iter().map(|a| ((a.index, a.address.ip()), a.source_selection_flags())).collect(),
        })
    }

    /// The name of an interface.
    fn name(&self, index: u32) -> Option<&str> {
        self.links.get(&index).map(|(name, _, _)| name.as_str())
    }
}

/// Judges one message.
pub fn apply_event(
    header: NetlinkHeader,
    body: &[u8],
    shared: &mut Shared,
    host_interfaces: &mut HostInterfaces,
    pending: &mut PendingEvents,
) {
    match header.message_type {
        libc::RTM_NEWLINK | libc::RTM_DELLINK => {
            if let Some(link) = LinkInfo::read(body) {
                on_link(header.message_type == libc::RTM_NEWLINK, &link, shared, host_interfaces, pending);
            }
        }
        libc::RTM_NEWADDR | libc::RTM_DELADDR => {
            if let Some(address) = AddressInfo::read(body) {
                on_address(header.message_type == libc::RTM_NEWADDR, &address, &mut shared.cache, host_interfaces, pending);
            }
        }
        RTM_NEWNETCONF => on_netconf(body, &mut shared.cache, host_interfaces, pending),
        _ => {
            if let Some(entry) = KernelEntry::read(header, body) {
                on_entry(header, &entry, &mut shared.cache, pending);
            }
            let about_route = matches!(header.message_type, libc::RTM_NEWROUTE | libc::RTM_DELROUTE);
            let default = if about_route { RouteInfo::read_default(body) } else { None };
            if default.is_some_and(|route| !is_own_protocol(route.protocol.into())) {
                pending.host_network_changed();
            }
        }
    }
}

/// Judges what was told of a link: that it is there, or that it went away. What the kernel tells by itself may be older than the last change of ours,
/// whose own event is not heard: who is told looks at the link before it does anything about it.
fn on_link(
    present: bool,
    link: &LinkInfo,
    shared: &mut Shared,
    host_interfaces: &mut HostInterfaces,
    pending: &mut PendingEvents,
) {
    let cache = &mut shared.cache;
    // We removed it: what it went through on its way out is no news.
    if cache.is_removed(link.index) {
        return;
    }
    // A link of ours that has another name now is gone under its own.
    let own_name = cache.link_name(link.index).map(str::to_owned);
    if let Some(old) = &own_name
        && (*old != link.name || !present)
    {
        let before = cache.remove_link(old).map(|state| Value::Link(Box::new(state)));
        pending.record_change(Key::Link(old.clone().into()), before, None);
        pending.require_resync("a link of ours went away, and what was on it");
    }
    if !present {
        host_interfaces.links.remove(&link.index);
        if own_name.is_none() {
            pending.host_network_changed();
            // A change of ours came in between, found nothing, and forgot the link: others do not know yet.
            if is_own_link(link) && !cache.links.contains_key(&link.name) {
                pending.record(Key::Link(link.name.clone().into()), None);
            }
        }
        return;
    }
    let state = cache.link_state(link, |name| shared.ethtool.tx_checksum(name));
    if state.as_ref().is_none_or(|state| matches!(state.kind, LinkKind::Foreign { .. })) {
        let now = (link.name.clone(), link.mtu, link.up());
        if host_interfaces.links.get(&link.index) != Some(&now) {
            host_interfaces.links.insert(link.index, now);
            pending.host_network_changed();
        }
    }
    let Some(state) = state else { return };
    // All bits: the announcement of a new link. Other changes than of flags announce no bits.
    let went_down = !link.up() && link.change_mask.contains(LinkFlags::Up) && link.change_mask.bits() != u32::MAX;
    let before = cache.links.get(&link.name).map(|(index, old)| (*index, old.clone()));
    match &before {
        Some((index, _)) if *index != link.index => pending.require_resync("a link of ours was made again by others"),
        // IPv4 routes, next hops and neighbours of a device that goes down are removed without an event of their own.
        Some((_, old)) if went_down && old.up && Device::from_name(&link.name).is_some() => {
            pending.require_resync("a device of ours went down, and routes with it");
        }
        Some((_, old)) if *old == state => return,
        _ => {}
    }
    cache.insert_link(&link.name, link.index, state.clone());
    let value = |state| Value::Link(Box::new(state));
    pending.record_change(Key::Link(link.name.clone().into()), before.map(|(_, old)| value(old)), Some(value(state)));
}

fn on_address(
    present: bool,
    info: &AddressInfo,
    cache: &mut KernelCache,
    host_interfaces: &mut HostInterfaces,
    pending: &mut PendingEvents,
) {
    if let Some(device) = cache.device(info.index) {
        let Some(key) = info.address_key(device) else { return };
        let address = (device, info.address);
        let is_new = if present { cache.addresses.insert(address) } else { cache.addresses.remove(&address) };
        if is_new {
            let (absent, there) = (None, Some(Value::Address));
            let (before, now) = if present { (absent, there) } else { (there, absent) };
            pending.record_change(key, before, now);
            if !present && info.address.is_ipv6() {
                on_ipv6_disabled(device, cache, pending);
            }
        }
    } else if info.is_global() && !cache.is_removed(info.index) {
        let key = (info.index, info.address.ip());
        let flags = info.source_selection_flags();
        let is_new = if present {
            host_interfaces.addresses.insert(key, flags) != Some(flags)
        } else {
            host_interfaces.addresses.remove(&key);
            true
        };
        if is_new {
            pending.host_network_changed();
        }
    }
}

/// An address went. The kernel tells nobody that IPv6 was switched off on a device, only that its addresses go; its routes and neighbours go untold.
fn on_ipv6_disabled(device: Device, cache: &mut KernelCache, pending: &mut PendingEvents) {
    let path = sysctl::disable_ipv6(&device.name());
    if let Ok(Some(text)) = sysctl::read(&path)
        && text != sysctl::OFF
        && cache.sysctls.get(&path).is_some_and(|before| *before != text)
    {
        on_sysctl(path, text, cache, pending);
        pending.require_resync("IPv6 was switched off on a device of ours, and what it had went");
    }
}

/// A setting of an interface, or of the whole namespace, was changed: forwarding, the reverse path filter, proxy ARP. The kernel tells of no others.
/// (`netlink-packet-route` has no netconf messages.)
fn on_netconf(body: &[u8], cache: &mut KernelCache, host_interfaces: &HostInterfaces, pending: &mut PendingEvents) {
    let Some(family) = body.first().copied().and_then(family_of) else { return };
    let index = attributes(body, 1).find(|(kind, _)| *kind == NETCONFA_IFINDEX).and_then(|(_, value)| u32_at(value, 0));
    let device = index.and_then(|index| cache.device(index)).map(|device| device.name());
    let interface = device.as_deref().or_else(|| host_interfaces.name(index?));
    for (kind, value) in attributes(body, 1) {
        let setting = match kind {
            NETCONFA_FORWARDING => "forwarding",
            NETCONFA_RP_FILTER => "rp_filter",
            NETCONFA_PROXY_NEIGH => "proxy_arp",
            _ => continue,
        };
        let path = match interface {
            Some(interface) => sysctls::interface_path(interface, family, setting),
            None if index == Some(NETCONFA_IFINDEX_ALL) && kind == NETCONFA_FORWARDING => sysctls::forwarding(family).to_owned(),
            None => continue,
        };
        if let Some(value) = u32_at(value, 0) {
            on_sysctl(path, value.to_string(), cache, pending);
        }
    }
}

/// A sysctl has this value now. Only what was read or written counts.
fn on_sysctl(path: String, text: String, cache: &mut KernelCache, pending: &mut PendingEvents) {
    let Some(value) = cache.sysctls.get_mut(&path) else { return };
    if *value != text {
        let before = std::mem::replace(value, text.clone());
        pending.record_change(Key::Sysctl(path.into()), Some(Value::Sysctl(before.into())), Some(Value::Sysctl(text.into())));
    }
}

fn on_entry(header: NetlinkHeader, entry: &KernelEntry, cache: &mut KernelCache, pending: &mut PendingEvents) {
    let present = matches!(header.message_type, libc::RTM_NEWNEIGH | RTM_NEWNEXTHOP | libc::RTM_NEWROUTE);
    match *entry {
        // Before Linux 6.13 the kernel's core tells of each entry that is set or removed once more, behind the device's own event, and without
        // where it leads (`rtnl_fdb_notify` in `net/core/rtnetlink.c`). A VXLAN device's own event always says it (`vxlan_fdb_info`).
        KernelEntry::Fdb { remote: None, .. } => return,
        KernelEntry::Fdb { index, mac, remote, permanent } => {
            if let Some(device) = cache.device(index).filter(|d| matches!(d.role, Role::Vxlan(_))) {
                let before = cache.fdb.get(&(index, mac)).copied();
                if update_fdb(cache, index, mac, remote.filter(|_| permanent || !present), present) {
                    let now = cache.fdb.get(&(index, mac)).copied();
                    pending.record_change(Key::Fdb(device, mac), before.map(Value::Fdb), now.map(Value::Fdb));
                }
            }
            return;
        }
        KernelEntry::Neigh { index, address, .. } => {
            if !present && cache.removed_neighbours.remove(&(index, address)) {
                return;
            }
        }
        KernelEntry::Nexthop { protocol, .. } => {
            if !present && is_own_protocol(protocol) {
                pending.require_resync("a next hop of ours was removed, and its routes with it");
            }
        }
        // A route of others matters only where it took the place of one that was there.
        KernelEntry::Route { protocol, .. } | KernelEntry::Unreachable { protocol, .. } => {
            let replaces = present && header.flags & NLM_F_REPLACE != 0;
            if !is_own_protocol(protocol) && !replaces {
                return;
            }
        }
    }
    if let Some((key, value)) = state_change(cache, entry, present) {
        pending.record(key, value);
    }
}

/// Follows an FDB entry; whether it is news. Its events never name the socket that asked, so ours are known by what they say.
fn update_fdb(cache: &mut KernelCache, index: u32, mac: Mac, remote: Option<IpAddr>, present: bool) -> bool {
    let at = (index, mac);
    let before = cache.fdb.get(&at).copied();
    match (present, remote) {
        (true, Some(remote)) if before == Some(remote) => false,
        (true, Some(remote)) => {
            cache.fdb.insert(at, remote);
            true
        }
        _ => cache.fdb.remove(&at).is_some(),
    }
}
