//! Encodes and decodes the four entry kinds whose number grows with the peers: FDB entries, neighbours, next hops, routes.
//!
//! Messages are written without allocation and read without copying. `netlink-packet-route` lacks next-hop objects, and it
//! allocates for each message and attribute: at ten thousand peers that is most of the time.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE, NetlinkHeader};

use super::nlmsg::{Message, address, attributes, mac, u16_at, u32_at};
use super::route_socket::Request;
use super::uapi::*;
use crate::model::{Cidr, Device, Family, Mac};
use crate::plan::state::{PROTOCOL, RouteTarget, UNREACHABLE_METRIC};
use crate::plan::{Key, Value};

/// Length of `struct ndmsg`.
pub const NDMSG_LEN: usize = 12;
/// Length of `struct nhmsg`.
pub const NHMSG_LEN: usize = 8;
/// Length of `struct rtmsg`.
const RTMSG_LEN: usize = 12;
/// IPv6's metric of a route without one (`IP6_RT_PRIO_USER` in `linux/ipv6_route.h`); IPv4's is 0.
const IP6_RT_PRIO_USER: u32 = 1024;
/// The route is a cached clone, not an entry of the table (`linux/rtnetlink.h`).
const RTM_F_CLONED: u32 = 0x200;
/// The entry is the bridge's, not the device's (`linux/neighbour.h`).
const NTF_MASTER: u8 = 0x04;

/// An entry as the kernel reports it, by interface index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelEntry {
    /// An FDB entry of a VXLAN device. A unicast MAC has one remote (`vxlan_fdb_update_existing` in the kernel appends remotes
    /// only to other MACs).
    Fdb {
        /// Interface index.
        index: u32,
        /// The MAC.
        mac: Mac,
        /// The underlay address; unspecified if the entry has its own port, VNI or interface, which ours never have.
        remote: Option<IpAddr>,
        /// Whether the entry is permanent: neither learned nor ageing.
        permanent: bool,
    },
    /// A neighbour.
    Neigh {
        /// Interface index.
        index: u32,
        /// The IP address.
        address: IpAddr,
        /// Its MAC, if the entry is permanent.
        mac: Option<Mac>,
    },
    /// A next-hop object.
    Nexthop {
        /// Its id.
        id: u32,
        /// Protocol number of its creator.
        protocol: u8,
        /// Interface index and gateway; `None` for any other form.
        hop: Option<(u32, IpAddr)>,
    },
    /// A route of the main table, without a metric of its own.
    Route {
        /// Its destination.
        destination: Cidr,
        /// Protocol number of its creator.
        protocol: u8,
        /// Its target.
        hop: KernelRouteTarget,
    },
    /// A route of the main table with the metric of our unreachable ones.
    Unreachable {
        /// Its destination.
        destination: Cidr,
        /// Protocol number of its creator.
        protocol: u8,
        /// Whether its type is unreachable.
        unreachable: bool,
    },
}

/// The target of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelRouteTarget {
    /// A next-hop object.
    Nexthop(u32),
    /// An onlink gateway on an interface.
    Gateway(u32, IpAddr),
    /// A gateway that another route leads to.
    Via(IpAddr),
    /// This host, on an interface.
    Local(u32),
    /// Any other target.
    Other,
}

/// The device whose index a message about the entry needs.
pub fn entry_device(key: &Key, value: &Value) -> Option<Device> {
    match (key, value) {
        (Key::Fdb(device, _) | Key::Neigh(device, _), _)
        | (_, Value::Nexthop { device, .. } | Value::Route(RouteTarget::Gateway(device, _) | RouteTarget::Local(device))) => {
            Some(*device)
        }
        _ => None,
    }
}

/// Writes the request that creates or replaces an entry. `index` is that of [`entry_device`]. Returns false and writes nothing if
/// key and value do not match.
pub fn write_set(buffer: &mut Vec<u8>, sequence: u32, index: u32, key: &Key, value: &Value) -> bool {
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    match (key, value) {
        (Key::Fdb(_, mac), Value::Fdb(remote)) => {
            write_fdb(Message::begin(buffer, libc::RTM_NEWNEIGH, flags, sequence), index, *mac, Some(*remote));
        }
        (Key::Neigh(_, address), Value::Neigh(mac)) => {
            let mut m = Message::begin(buffer, libc::RTM_NEWNEIGH, flags, sequence);
            put_ndmsg(&mut m, family_number(Family::of(*address)), index, 0);
            m.put_address(NDA_DST, *address).put(NDA_LLADDR, &mac.0).put(NDA_PROTOCOL, &[PROTOCOL]);
        }
        (Key::Nexthop(id), Value::Nexthop { gateway, .. }) => {
            let mut m = Message::begin(buffer, RTM_NEWNEXTHOP, flags, sequence);
            m.body(&[family_number(Family::of(*gateway)), 0, PROTOCOL, 0]).body(&RTNH_F_ONLINK.to_ne_bytes());
            m.put_u32(NHA_ID, *id).put_address(NHA_GATEWAY, *gateway).put_u32(NHA_OIF, index);
        }
        (
            Key::Route(destination),
            Value::Route(
                via @ (RouteTarget::Nexthop(_) | RouteTarget::Gateway(..) | RouteTarget::Via(_) | RouteTarget::Local(_)),
            ),
        ) => {
            let mut m = Message::begin(buffer, libc::RTM_NEWROUTE, flags, sequence);
            match via {
                RouteTarget::Gateway(_, gateway) => {
                    put_rtmsg(&mut m, *destination, RT_SCOPE_UNIVERSE, RTN_UNICAST, RTNH_F_ONLINK);
                    m.put_address(RTA_GATEWAY, *gateway).put_u32(RTA_OIF, index);
                }
                RouteTarget::Via(gateway) => {
                    put_rtmsg(&mut m, *destination, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0);
                    m.put_address(RTA_GATEWAY, *gateway);
                }
                RouteTarget::Nexthop(id) => {
                    put_rtmsg(&mut m, *destination, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0);
                    m.put_u32(RTA_NH_ID, *id);
                }
                RouteTarget::Local(_) => {
                    put_rtmsg(&mut m, *destination, RT_SCOPE_HOST, RTN_LOCAL, 0);
                    m.put_u32(RTA_OIF, index);
                }
                RouteTarget::Foreign => {}
            }
        }
        (Key::Unreachable(destination), Value::Unreachable) => {
            let mut m = Message::begin(buffer, libc::RTM_NEWROUTE, flags, sequence);
            put_rtmsg(&mut m, *destination, RT_SCOPE_UNIVERSE, RTN_UNREACHABLE, 0);
            m.put_u32(RTA_PRIORITY, UNREACHABLE_METRIC);
        }
        _ => return false,
    }
    true
}

/// Writes the request that removes an entry. Returns whether the key is one of the four kinds.
pub fn write_delete(buffer: &mut Vec<u8>, sequence: u32, index: u32, key: &Key) -> bool {
    match key {
        Key::Fdb(_, mac) => write_fdb(Message::begin(buffer, libc::RTM_DELNEIGH, 0, sequence), index, *mac, None),
        Key::Neigh(_, address) => {
            let mut m = Message::begin(buffer, libc::RTM_DELNEIGH, 0, sequence);
            put_ndmsg(&mut m, family_number(Family::of(*address)), index, 0);
            m.put_address(NDA_DST, *address);
        }
        Key::Nexthop(id) => {
            let mut m = Message::begin(buffer, RTM_DELNEXTHOP, 0, sequence);
            m.body(&[0; NHMSG_LEN]).put_u32(NHA_ID, *id);
        }
        // The kernel compares the protocol number, so a foreign route to the same destination stays. Our two routes to a
        // destination differ by metric. For the kernel metric 0 is any, so IPv4's request names the type, which IPv6 does not
        // compare.
        Key::Route(destination) => {
            let mut m = Message::begin(buffer, libc::RTM_DELROUTE, 0, sequence);
            match destination.family() {
                Family::V4 => put_rtmsg(&mut m, *destination, RT_SCOPE_NOWHERE, RTN_UNICAST, 0),
                Family::V6 => {
                    put_rtmsg(&mut m, *destination, RT_SCOPE_NOWHERE, 0, 0);
                    m.put_u32(RTA_PRIORITY, IP6_RT_PRIO_USER);
                }
            }
        }
        Key::Unreachable(destination) => {
            let mut m = Message::begin(buffer, libc::RTM_DELROUTE, 0, sequence);
            put_rtmsg(&mut m, *destination, RT_SCOPE_NOWHERE, RTN_UNREACHABLE, 0);
            m.put_u32(RTA_PRIORITY, UNREACHABLE_METRIC);
        }
        _ => return false,
    }
    true
}

fn write_fdb(mut m: Message<'_>, index: u32, mac: Mac, remote: Option<IpAddr>) {
    put_ndmsg(&mut m, AF_BRIDGE, index, NTF_SELF);
    m.put(NDA_LLADDR, &mac.0);
    if let Some(remote) = remote {
        m.put_address(NDA_DST, remote);
    }
}

/// The kernel's number of a family.
#[expect(clippy::cast_possible_truncation, reason = "AF_INET is 2 and AF_INET6 is 10")]
const fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

/// The family of the kernel's number.
pub fn family_of(number: u8) -> Option<Family> {
    Family::ALL.into_iter().find(|f| family_number(*f) == number)
}

/// The family of FDB entries.
#[expect(clippy::cast_possible_truncation, reason = "AF_BRIDGE is 7")]
pub const AF_BRIDGE: u8 = libc::AF_BRIDGE as u8;

fn put_ndmsg(m: &mut Message<'_>, family: u8, index: u32, flags: u8) {
    m.body(&[family, 0, 0, 0]).body(&index.to_ne_bytes()).body(&NUD_PERMANENT.to_ne_bytes()).body(&[flags, 0]);
}

fn put_rtmsg(m: &mut Message<'_>, destination: Cidr, scope: u8, kind: u8, flags: u32) {
    let family = family_number(destination.family());
    m.body(&[family, destination.length(), 0, 0, RT_TABLE_MAIN, PROTOCOL, scope, kind]).body(&flags.to_ne_bytes());
    m.put_address(RTA_DST, destination.base());
}

/// A dump request for entries of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryQuery {
    /// The FDB of an interface.
    Fdb(u32),
    /// The neighbours of an interface.
    Neigh(u32, Family),
    /// All next hops.
    Nexthops,
    /// The next hop with that id.
    Nexthop(u32),
    /// The main table's routes of a protocol number; 0 asks for all.
    Routes(Family, u8),
}

impl EntryQuery {
    fn kind(self) -> u16 {
        match self {
            EntryQuery::Fdb(_) | EntryQuery::Neigh(..) => libc::RTM_GETNEIGH,
            EntryQuery::Nexthops | EntryQuery::Nexthop(_) => RTM_GETNEXTHOP,
            EntryQuery::Routes(..) => libc::RTM_GETROUTE,
        }
    }
}

impl Request for EntryQuery {
    /// The kernel filters only on a socket with `NETLINK_GET_STRICT_CHK`.
    fn write(&self, buffer: &mut Vec<u8>, flags: u16, sequence: u32) {
        let mut m = Message::begin(buffer, self.kind(), flags, sequence);
        match *self {
            EntryQuery::Fdb(index) => m.body(&[AF_BRIDGE]).body(&[0; NDMSG_LEN - 1]).put_u32(NDA_IFINDEX, index),
            EntryQuery::Neigh(index, family) => {
                m.body(&[family_number(family)]).body(&[0; NDMSG_LEN - 1]).put_u32(NDA_IFINDEX, index)
            }
            EntryQuery::Nexthops => m.body(&[0; NHMSG_LEN]),
            EntryQuery::Nexthop(id) => m.body(&[0; NHMSG_LEN]).put_u32(NHA_ID, id),
            EntryQuery::Routes(family, protocol) => {
                m.body(&[family_number(family), 0, 0, 0, RT_TABLE_MAIN, protocol, 0, 0, 0, 0, 0, 0])
            }
        };
    }
}

impl KernelEntry {
    /// Decodes a message about a new or removed entry. Returns `None` for any other kind, and for a form that is neither ours nor
    /// in conflict with ours.
    pub fn read(header: NetlinkHeader, body: &[u8]) -> Option<KernelEntry> {
        match header.message_type {
            libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => read_neigh(body),
            RTM_NEWNEXTHOP | RTM_DELNEXTHOP => read_nexthop(body),
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => read_route(body),
            _ => None,
        }
    }
}

fn read_neigh(body: &[u8]) -> Option<KernelEntry> {
    let family = *body.first()?;
    let index = u32_at(body, 4)?;
    let permanent = u16_at(body, 8)? & NUD_PERMANENT != 0;
    let flags = *body.get(10)?;
    let (mut target, mut lladdr, mut has_override) = (None, None, false);
    for (kind, value) in attributes(body, NDMSG_LEN) {
        match kind {
            NDA_DST => target = address(value),
            NDA_LLADDR => lladdr = mac(value),
            NDA_PORT | NDA_VNI | NDA_IFINDEX => has_override = true,
            _ => {}
        }
    }
    if family != AF_BRIDGE {
        family_of(family)?;
        return Some(KernelEntry::Neigh { index, address: target?, mac: lladdr.filter(|_| permanent) });
    }
    if flags & NTF_MASTER != 0 {
        return None;
    }
    let remote = if has_override { target.map(|t| Family::of(t).unspecified()) } else { target };
    Some(KernelEntry::Fdb { index, mac: lladdr?, remote, permanent })
}

fn read_nexthop(body: &[u8]) -> Option<KernelEntry> {
    let protocol = *body.get(2)?;
    let onlink = u32_at(body, 4)? & RTNH_F_ONLINK != 0;
    let (mut id, mut gateway, mut index) = (None, None, None);
    for (kind, value) in attributes(body, NHMSG_LEN) {
        match kind {
            NHA_ID => id = u32_at(value, 0),
            NHA_GATEWAY => gateway = address(value),
            NHA_OIF => index = u32_at(value, 0),
            _ => {}
        }
    }
    Some(KernelEntry::Nexthop { id: id?, protocol, hop: index.zip(gateway).filter(|_| onlink) })
}

fn read_route(body: &[u8]) -> Option<KernelEntry> {
    let family = family_of(*body.first()?)?;
    let (&length, &tos, &table, &protocol) = (body.get(1)?, body.get(3)?, body.get(4)?, body.get(5)?);
    let kind = *body.get(7)?;
    let unicast = kind == RTN_UNICAST;
    let flags = u32_at(body, 8)?;
    let (mut base, mut metric, mut gateway, mut index, mut nexthop, mut multipath) =
        (family.unspecified(), 0, None, None, None, false);
    let mut table_id = u32::from(table);
    for (kind, value) in attributes(body, RTMSG_LEN) {
        match kind {
            RTA_DST => base = address(value)?,
            RTA_TABLE => table_id = u32_at(value, 0)?,
            RTA_PRIORITY => metric = u32_at(value, 0)?,
            RTA_GATEWAY => gateway = address(value),
            RTA_OIF => index = u32_at(value, 0),
            RTA_NH_ID => nexthop = u32_at(value, 0),
            RTA_MULTIPATH => multipath = true,
            _ => {}
        }
    }
    let default_metric = if family == Family::V4 { 0 } else { IP6_RT_PRIO_USER };
    if table_id != u32::from(RT_TABLE_MAIN) || tos != 0 || flags & RTM_F_CLONED != 0 {
        return None;
    }
    let destination = Cidr::containing(base, length)?;
    if metric == UNREACHABLE_METRIC {
        return Some(KernelEntry::Unreachable { destination, protocol, unreachable: kind == RTN_UNREACHABLE });
    }
    if metric != default_metric {
        return None;
    }
    let hop = match (nexthop, gateway, index) {
        (Some(id), ..) if unicast => KernelRouteTarget::Nexthop(id),
        (None, Some(gateway), Some(index)) if unicast && !multipath && flags & RTNH_F_ONLINK != 0 => {
            KernelRouteTarget::Gateway(index, gateway)
        }
        (None, Some(gateway), _) if unicast && !multipath => KernelRouteTarget::Via(gateway),
        (None, None, Some(index)) if kind == RTN_LOCAL && !multipath => KernelRouteTarget::Local(index),
        _ => KernelRouteTarget::Other,
    };
    Some(KernelEntry::Route { destination, protocol, hop })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::nlmsg::messages;
    use crate::model::Vni;

    fn round_trip(key: &Key, value: &Value) -> KernelEntry {
        let mut buffer = Vec::new();
        assert!(write_set(&mut buffer, 9, 7, key, value), "{key} {value}");
        let mut all = messages(&buffer);
        let (header, body) = all.next().expect("a message");
        assert!(all.next().is_none());
        assert_eq!(header.sequence_number, 9);
        KernelEntry::read(header, body).expect("an entry")
    }

    #[test]
    fn entries_round_trip_in_both_families() {
        let mac = Mac([2, 0, 0, 0, 0, 9]);
        for (family, base, public, subnet) in
            [(Family::V4, "10.244.3.0", "10.99.0.3", "10.244.3.0/24"), (Family::V6, "fd00:3::", "fd99::3", "fd00:3::/64")]
        {
            let device = Device::vxlan(family, Vni::DEFAULT);
            let (base, public): (IpAddr, IpAddr) = (base.parse().expect("ip"), public.parse().expect("ip"));
            let subnet: Cidr = subnet.parse().expect("cidr");
            assert_eq!(
                round_trip(&Key::Fdb(device, mac), &Value::Fdb(public)),
                KernelEntry::Fdb { index: 7, mac, remote: Some(public), permanent: true }
            );
            assert_eq!(
                round_trip(&Key::Neigh(device, base), &Value::Neigh(mac)),
                KernelEntry::Neigh { index: 7, address: base, mac: Some(mac) }
            );
            assert_eq!(
                round_trip(&Key::Nexthop(0x5600_0001), &Value::Nexthop { device, gateway: base }),
                KernelEntry::Nexthop { id: 0x5600_0001, protocol: PROTOCOL, hop: Some((7, base)) }
            );
            for (via, hop) in [
                (RouteTarget::Nexthop(5), KernelRouteTarget::Nexthop(5)),
                (RouteTarget::Gateway(device, base), KernelRouteTarget::Gateway(7, base)),
                (RouteTarget::Via(public), KernelRouteTarget::Via(public)),
                (RouteTarget::Local(device), KernelRouteTarget::Local(7)),
            ] {
                let mut buffer = Vec::new();
                write_set(&mut buffer, 1, 7, &Key::Route(subnet), &Value::Route(via));
                if family == Family::V6 {
                    // The kernel fills in IPv6's default metric; here the test does it.
                    append_metric(&mut buffer);
                }
                let (header, body) = messages(&buffer).next().expect("a message");
                let read = KernelEntry::read(header, body);
                assert_eq!(read, Some(KernelEntry::Route { destination: subnet, protocol: PROTOCOL, hop }));
            }
            assert_eq!(
                round_trip(&Key::Unreachable(subnet), &Value::Unreachable),
                KernelEntry::Unreachable { destination: subnet, protocol: PROTOCOL, unreachable: true }
            );
        }
    }

    fn append_metric(buffer: &mut Vec<u8>) {
        buffer.extend_from_slice(&8u16.to_ne_bytes());
        buffer.extend_from_slice(&RTA_PRIORITY.to_ne_bytes());
        buffer.extend_from_slice(&IP6_RT_PRIO_USER.to_ne_bytes());
        let length = u32::try_from(buffer.len()).expect("short");
        buffer[..4].copy_from_slice(&length.to_ne_bytes());
    }

    #[test]
    fn mismatched_key_and_value_are_not_written() {
        let device = Device::vxlan(Family::V4, Vni::DEFAULT);
        let mut buffer = Vec::new();
        assert!(!write_set(&mut buffer, 1, 7, &Key::Nexthop(1), &Value::Address));
        let route = Key::Route("10.0.0.0/8".parse().expect("cidr"));
        assert!(!write_set(&mut buffer, 1, 7, &route, &Value::Route(RouteTarget::Foreign)));
        assert!(!write_delete(&mut buffer, 1, 7, &Key::Link(device.name().into())));
        assert!(buffer.is_empty());
    }

    #[test]
    fn truncated_messages_do_not_panic() {
        let key = Key::Route("10.0.0.0/8".parse().expect("cidr"));
        let mut buffer = Vec::new();
        write_set(&mut buffer, 1, 7, &key, &Value::Route(RouteTarget::Nexthop(3)));
        let (mut header, body) = messages(&buffer).next().expect("a message");
        for kind in [libc::RTM_NEWNEIGH, RTM_NEWNEXTHOP, libc::RTM_NEWROUTE, 0] {
            header.message_type = kind;
            for end in 0..=body.len() {
                let _ = KernelEntry::read(header, &body[..end]);
            }
        }
    }
}
