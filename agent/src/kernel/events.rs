//! Applies rtnetlink events to the cache, and collects changes to report.
//!
//! Each message is compared with the cache. New changes are kept until the monitor delivers them.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_REPLACE, NetlinkHeader};
use netlink_packet_route::address::AddressFlags;
use netlink_packet_route::link::LinkFlags;

use super::Shared;
use super::cache::{KernelCache, is_own_link};
use super::dump::{is_own_protocol, state_change};
use super::nlmsg::{attributes, u32_at};
use super::objects::{self, AddressInfo, LinkInfo, RouteInfo};
use super::peer_messages::{KernelEntry, family_of};
use super::route_socket::RouteSocket;
use super::sysctl::{self, Sysctls};
use super::uapi::*;
use crate::model::{Device, Mac, Role};
use crate::plan::sysctls;
use crate::plan::{KernelEvent, Key, LinkKind, OpError, Value};

/// Maximum number of pending changes; beyond it a dump is cheaper.
const MAX_PENDING_CHANGES: usize = 16 * 1024;

/// Changes that are not delivered yet; for each entry the last one.
#[derive(Debug, Default)]
pub struct PendingEvents {
    changes: BTreeMap<Key, PendingChange>,
    /// Links whose last event differs from the cache.
    unread_links: BTreeSet<String>,
    resync_reason: Option<&'static str>,
    host_network_changed: bool,
}

/// A pending change of an entry.
#[derive(Debug)]
struct PendingChange {
    /// The value before the change; `None` if it is not known.
    before: Option<Option<Value>>,
    now: Option<Value>,
}

impl PendingEvents {
    /// Whether nothing is pending.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.resync_reason.is_none() && !self.host_network_changed
    }

    /// Takes the next event.
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

    /// Records a change of an entry whose previous value is not known.
    pub fn record(&mut self, key: Key, now: Option<Value>) {
        self.insert(key, None, now);
    }

    /// Records a change of an entry from its previous value.
    pub fn record_change(&mut self, key: Key, before: Option<Value>, now: Option<Value>) {
        self.insert(key, Some(before), now);
    }

    /// Drops changes that ended at their old value: successive changes of ours to an entry cause as many events, and the last one
    /// matches the cache.
    pub fn drop_reverted(&mut self) {
        self.changes.retain(|_, change| change.before.as_ref() != Some(&change.now));
    }

    fn insert(&mut self, key: Key, before: Option<Option<Value>>, now: Option<Value>) {
        if self.changes.len() >= MAX_PENDING_CHANGES {
            self.changes.clear();
            self.require_resync("too many changes are pending");
        }
        match self.changes.entry(key) {
            Entry::Occupied(mut change) => change.get_mut().now = now,
            Entry::Vacant(entry) => {
                entry.insert(PendingChange { before, now });
            }
        }
    }

    /// Reads the links that events named, and records those that differ from the cache. An event that the kernel sends by itself
    /// may be older than our last change, whose own event is filtered out.
    pub fn read_links(&mut self, shared: &mut Shared) {
        for name in std::mem::take(&mut self.unread_links) {
            let before = shared.cache.link(&name);
            if let Err(error) = shared.links().refresh(&name) {
                tracing::warn!(%error, "cannot read a link of ours");
                self.require_resync("a link could not be read");
            }
            let now = shared.cache.link(&name);
            if before != now {
                self.record(Key::Link(name.into()), now.map(|(_, state)| Value::Link(Box::new(state))));
            }
        }
    }

    /// Requests a full dump, because more changed than the events say.
    pub fn require_resync(&mut self, reason: &'static str) {
        self.resync_reason.get_or_insert(reason);
    }

    /// Records a change of the host's network outside our control.
    pub fn host_network_changed(&mut self) {
        self.host_network_changed = true;
    }
}

/// The last reported state of interfaces that are not ours; an event that repeats it is not reported.
#[derive(Debug, Default)]
pub struct HostInterfaces {
    links: HashMap<u32, (String, u32, bool)>,
    addresses: HashMap<(u32, IpAddr), AddressFlags>,
}

impl HostInterfaces {
    /// Reads the initial state.
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

/// Applies one message to the cache and records new changes.
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
                on_address(header.message_type == libc::RTM_NEWADDR, &address, shared, host_interfaces, pending);
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

/// Applies a link event: `present` means that the link exists, otherwise it was removed. An event that differs from the cache is
/// left to [`PendingEvents::read_links`].
fn on_link(
    present: bool,
    link: &LinkInfo,
    shared: &mut Shared,
    host_interfaces: &mut HostInterfaces,
    pending: &mut PendingEvents,
) {
    let cache = &mut shared.cache;
    // We removed this link: the events of its removal are not reported.
    if cache.is_removed(link.index) {
        return;
    }
    // A renamed link of ours counts as removed under its old name.
    let own_name = cache.link_name(link.index).map(str::to_owned);
    if let Some(old) = &own_name
        && (*old != link.name || !present)
    {
        cache.remove_link(old);
        pending.record(Key::Link(old.clone().into()), None);
        pending.require_resync("a link of ours was removed, with its addresses and routes");
    }
    if !present {
        host_interfaces.links.remove(&link.index);
        if own_name.is_none() {
            pending.host_network_changed();
            // Our own change ran in between, found no link and removed it from the cache: that is not reported yet.
            if is_own_link(link) && cache.link(&link.name).is_none() {
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
    // A mask of all bits announces a new link. Changes other than of flags announce no bits.
    let went_down = !link.up() && link.change_mask.contains(LinkFlags::Up) && link.change_mask.bits() != u32::MAX;
    match cache.link(&link.name) {
        Some((index, _)) if index != link.index => pending.require_resync("another process recreated a link of ours"),
        // IPv4 routes, next hops and neighbours of a device that goes down are removed without an event of their own.
        Some((_, old)) if went_down && old.up && Device::from_name(&link.name).is_some() => {
            pending.require_resync("a device of ours went down, with its routes");
        }
        Some((_, old)) if old == state => return,
        _ => {}
    }
    pending.unread_links.insert(link.name.clone());
}

fn on_address(
    present: bool,
    info: &AddressInfo,
    shared: &mut Shared,
    host_interfaces: &mut HostInterfaces,
    pending: &mut PendingEvents,
) {
    let Shared { sysctls, cache, .. } = shared;
    if let Some(device) = cache.device(info.index) {
        let Some(key) = info.address_key(device) else { return };
        let value = |present: bool| present.then_some(Value::Address);
        if cache.set(key.clone(), value(present)) {
            pending.record_change(key, value(!present), value(present));
            if !present && info.address.is_ipv6() {
                on_ipv6_disabled(device, sysctls, cache, pending);
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

/// Detects that IPv6 was switched off, after an address was removed. The kernel reports only the removal of the addresses; it
/// sends no event for the switch, nor for the device's routes and neighbours.
fn on_ipv6_disabled(device: Device, sysctls: &Sysctls, cache: &mut KernelCache, pending: &mut PendingEvents) {
    let path = sysctl::disable_ipv6(&device.name());
    if let Ok(Some(text)) = sysctls.read(&path)
        && text != sysctl::OFF
        && on_sysctl(path, text, cache, pending)
    {
        pending.require_resync("IPv6 was switched off on a device of ours, which removed its entries");
    }
}

/// Applies a netconf event: forwarding, the reverse path filter or proxy ARP of an interface or of the whole namespace. The
/// kernel sends none for other settings. (`netlink-packet-route` has no netconf messages.)
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

/// Records the new value of a sysctl; returns whether it is new. Only sysctls that were read or written are tracked.
fn on_sysctl(path: String, text: String, cache: &KernelCache, pending: &mut PendingEvents) -> bool {
    let (key, value) = (Key::Sysctl(path.into()), Some(Value::Sysctl(text.into())));
    let mut local = cache.local();
    let before = local.get(&key).cloned();
    let is_new = before.is_some() && local.set(key.clone(), value.clone());
    if is_new {
        pending.record_change(key, before, value);
    }
    is_new
}

fn on_entry(header: NetlinkHeader, entry: &KernelEntry, cache: &mut KernelCache, pending: &mut PendingEvents) {
    let present = matches!(header.message_type, libc::RTM_NEWNEIGH | RTM_NEWNEXTHOP | libc::RTM_NEWROUTE);
    match *entry {
        // Before Linux 6.13 rtnetlink's core reports each set or removed entry once more, after the device's own event and
        // without the remote (`rtnl_fdb_notify` in `net/core/rtnetlink.c`). A VXLAN device's own event always has it
        // (`vxlan_fdb_info`).
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
                pending.require_resync("a next hop of ours was removed, with its routes");
            }
        }
        // A foreign route matters only if it replaced an existing one.
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

/// Updates the cache from an FDB event; returns whether the event is new. Its events never name the requesting socket, so our own
/// are recognised by their content.
fn update_fdb(cache: &mut KernelCache, index: u32, mac: Mac, remote: Option<IpAddr>, present: bool) -> bool {
    let key = (index, mac);
    let before = cache.fdb.get(&key).copied();
    match (present, remote) {
        (true, Some(remote)) if before == Some(remote) => false,
        (true, Some(remote)) => {
            cache.fdb.insert(key, remote);
            true
        }
        _ => cache.fdb.remove(&key).is_some(),
    }
}
