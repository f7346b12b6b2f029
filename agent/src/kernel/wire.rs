//! The four kinds of entry that grow with the number of peers, in netlink's byte form: FDB entries, neighbours, next hops and routes. Written
//! without allocation, read without copying. `netlink-packet-route` knows no next-hop objects, and its values cost an allocation for each message and
//! attribute: at ten thousand peers these are most of the time.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE, NetlinkHeader};

use super::message::{Message, address, attributes, mac, u16_at, u32_at};
use super::socket::Ask;
use super::uapi::*;
use crate::model::{Cidr, Device, Family, Mac};
use crate::plan::state::{PROTOCOL, UNREACHABLE_METRIC, Via};
use crate::plan::{Key, Value};

/// Length of `struct ndmsg`.
const NDMSG: usize = 12;
/// Length of `struct nhmsg`.
pub const NHMSG: usize = 8;
/// Length of `struct rtmsg`.
const RTMSG: usize = 12;
/// IPv6's metric of a route that names none (`IP6_RT_PRIO_USER` in `linux/ipv6_route.h`); IPv4's is 0.
const IPV6_METRIC: u32 = 1024;
/// A clone in the cache, no route of the table (`linux/rtnetlink.h`).
const RTM_F_CLONED: u32 = 0x200;
/// The entry is the bridge's, not the device's (`linux/neighbour.h`).
const NTF_MASTER: u8 = 0x04;

/// An entry as the kernel tells it, by interface index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// An FDB entry of a VXLAN device. A unicast MAC has one remote (`vxlan_fdb_update_existing` in the kernel appends to others only).
    Fdb {
        /// Interface index.
        index: u32,
        /// The MAC.
        mac: Mac,
        /// The underlay address; the unspecified one where the entry leads elsewhere in a way that ours never do.
        remote: Option<IpAddr>,
        /// Neither learned nor ageing.
        permanent: bool,
    },
    /// A neighbour.
    Neigh {
        /// Interface index.
        index: u32,
        /// The address that is mapped.
        address: IpAddr,
        /// To which MAC, where the entry is permanent.
        mac: Option<Mac>,
    },
    /// A next-hop object.
    Nexthop {
        /// Its id.
        id: u32,
        /// Who made it.
        protocol: u8,
        /// Interface index and gateway; `None` where it is of another form.
        hop: Option<(u32, IpAddr)>,
    },
    /// A route of the main table, without a metric of its own.
    Route {
        /// Its destination.
        destination: Cidr,
        /// Who made it.
        protocol: u8,
        /// Where it leads.
        hop: Hop,
    },
    /// A route of the main table with the metric of our unreachable ones.
    Unreachable {
        /// Its destination.
        destination: Cidr,
        /// Who made it.
        protocol: u8,
        /// Whether it is unreachable indeed.
        unreachable: bool,
    },
}

/// Where a route leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hop {
    /// To a next-hop object.
    Nexthop(u32),
    /// To a gateway on link of an interface.
    Gateway(u32, IpAddr),
    /// To this host, by an interface.
    Local(u32),
    /// Elsewhere.
    Other,
}

/// Whether entries of this kind go through this codec.
pub fn is_wire(key: &Key) -> bool {
    matches!(key, Key::Fdb(..) | Key::Neigh(..) | Key::Nexthop(_) | Key::Route(_) | Key::Unreachable(_))
}

/// The device whose index a message about the entry needs.
pub fn device(key: &Key, value: &Value) -> Option<Device> {
    match (key, value) {
        (Key::Fdb(device, _) | Key::Neigh(device, _), _)
        | (_, Value::Nexthop { device, .. } | Value::Route(Via::Gateway(device, _) | Via::Local(device))) => Some(*device),
        _ => None,
    }
}

/// Writes the request that makes or replaces an entry. `index` is that of [`device`]. Returns whether key and value fit; where they do not,
/// nothing is written.
pub fn write_set(buffer: &mut Vec<u8>, sequence: u32, index: u32, key: &Key, value: &Value) -> bool {
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    match (key, value) {
        (Key::Fdb(_, mac), Value::Fdb(remote)) => {
            write_fdb(Message::begin(buffer, libc::RTM_NEWNEIGH, flags, sequence), index, *mac, Some(*remote));
        }
        (Key::Neigh(_, address), Value::Neigh(mac)) => {
            let mut m = Message::begin(buffer, libc::RTM_NEWNEIGH, flags, sequence);
            ndmsg(&mut m, family_number(Family::of(*address)), index, 0);
            m.put_address(NDA_DST, *address).put(NDA_LLADDR, &mac.0).put(NDA_PROTOCOL, &[PROTOCOL]);
        }
        (Key::Nexthop(id), Value::Nexthop { gateway, .. }) => {
            let mut m = Message::begin(buffer, RTM_NEWNEXTHOP, flags, sequence);
            m.body(&[family_number(Family::of(*gateway)), 0, PROTOCOL, 0]).body(&RTNH_F_ONLINK.to_ne_bytes());
            m.put_u32(NHA_ID, *id).put_address(NHA_GATEWAY, *gateway).put_u32(NHA_OIF, index);
        }
        (Key::Route(destination), Value::Route(via @ (Via::Nexthop(_) | Via::Gateway(..) | Via::Local(_)))) => {
            let mut m = Message::begin(buffer, libc::RTM_NEWROUTE, flags, sequence);
            match via {
                Via::Gateway(_, gateway) => {
                    rtmsg(&mut m, *destination, RT_SCOPE_UNIVERSE, RTN_UNICAST, RTNH_F_ONLINK);
                    m.put_address(RTA_GATEWAY, *gateway).put_u32(RTA_OIF, index);
                }
                Via::Nexthop(id) => {
                    rtmsg(&mut m, *destination, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0);
                    m.put_u32(RTA_NH_ID, *id);
                }
                Via::Local(_) => {
                    rtmsg(&mut m, *destination, RT_SCOPE_HOST, RTN_LOCAL, 0);
                    m.put_u32(RTA_OIF, index);
                }
                Via::Foreign => {}
            }
        }
        (Key::Unreachable(destination), Value::Unreachable) => {
            let mut m = Message::begin(buffer, libc::RTM_NEWROUTE, flags, sequence);
            rtmsg(&mut m, *destination, RT_SCOPE_UNIVERSE, RTN_UNREACHABLE, 0);
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
            ndmsg(&mut m, family_number(Family::of(*address)), index, 0);
            m.put_address(NDA_DST, *address);
        }
        Key::Nexthop(id) => {
            let mut m = Message::begin(buffer, RTM_DELNEXTHOP, 0, sequence);
            m.body(&[0; NHMSG]).put_u32(NHA_ID, *id);
        }
        // The protocol number is compared by the kernel: somebody else's route to the same destination stays. Of ours the metric tells which is meant; 0 is
        // any for the kernel, so IPv4 goes by the type, which IPv6 does not compare.
        Key::Route(destination) => {
            let mut m = Message::begin(buffer, libc::RTM_DELROUTE, 0, sequence);
            match destination.family() {
                Family::V4 => rtmsg(&mut m, *destination, RT_SCOPE_NOWHERE, RTN_UNICAST, 0),
                Family::V6 => {
                    rtmsg(&mut m, *destination, RT_SCOPE_NOWHERE, 0, 0);
                    m.put_u32(RTA_PRIORITY, IPV6_METRIC);
                }
            }
        }
        Key::Unreachable(destination) => {
            let mut m = Message::begin(buffer, libc::RTM_DELROUTE, 0, sequence);
            rtmsg(&mut m, *destination, RT_SCOPE_NOWHERE, RTN_UNREACHABLE, 0);
            m.put_u32(RTA_PRIORITY, UNREACHABLE_METRIC);
        }
        _ => return false,
    }
    true
}

fn write_fdb(mut m: Message<'_>, index: u32, mac: Mac, remote: Option<IpAddr>) {
    ndmsg(&mut m, AF_BRIDGE, index, NTF_SELF);
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

fn ndmsg(m: &mut Message<'_>, family: u8, index: u32, flags: u8) {
    m.body(&[family, 0, 0, 0]).body(&index.to_ne_bytes()).body(&NUD_PERMANENT.to_ne_bytes()).body(&[flags, 0]);
}

fn rtmsg(m: &mut Message<'_>, destination: Cidr, scope: u8, kind: u8, flags: u32) {
    let family = family_number(destination.family());
    m.body(&[family, destination.length(), 0, 0, RT_TABLE_MAIN, PROTOCOL, scope, kind]).body(&flags.to_ne_bytes());
    m.put_address(RTA_DST, destination.base());
}

/// The entries of a kind that a dump asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Query {
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

impl Query {
    fn kind(self) -> u16 {
        match self {
            Query::Fdb(_) | Query::Neigh(..) => libc::RTM_GETNEIGH,
            Query::Nexthops | Query::Nexthop(_) => RTM_GETNEXTHOP,
            Query::Routes(..) => libc::RTM_GETROUTE,
        }
    }
}

impl Ask for Query {
    /// Needs `NETLINK_GET_STRICT_CHK` for the kernel to filter.
    fn write(&self, buffer: &mut Vec<u8>, flags: u16, sequence: u32) {
        let mut m = Message::begin(buffer, self.kind(), flags, sequence);
        match *self {
            Query::Fdb(index) => m.body(&[AF_BRIDGE]).body(&[0; NDMSG - 1]).put_u32(NDA_IFINDEX, index),
            Query::Neigh(index, family) => m.body(&[family_number(family)]).body(&[0; NDMSG - 1]).put_u32(NDA_IFINDEX, index),
            Query::Nexthops => m.body(&[0; NHMSG]),
            Query::Nexthop(id) => m.body(&[0; NHMSG]).put_u32(NHA_ID, id),
            Query::Routes(family, protocol) => {
                m.body(&[family_number(family), 0, 0, 0, RT_TABLE_MAIN, protocol, 0, 0, 0, 0, 0, 0])
            }
        };
    }
}

impl Entry {
    /// Reads a message about an entry, be it there or gone; `None` for what is none of the four kinds, or of no form that ours can have or
    /// stand in the way of.
    pub fn read(header: NetlinkHeader, body: &[u8]) -> Option<Entry> {
        match header.message_type {
            libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => read_neigh(body),
            RTM_NEWNEXTHOP | RTM_DELNEXTHOP => read_nexthop(body),
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => read_route(body),
            _ => None,
        }
    }
}

fn read_neigh(body: &[u8]) -> Option<Entry> {
    let family = *body.first()?;
    let index = u32_at(body, 4)?;
    let permanent = u16_at(body, 8)? & NUD_PERMANENT != 0;
    let flags = *body.get(10)?;
    let (mut target, mut lladdr, mut elsewhere) = (None, None, false);
    for (kind, value) in attributes(body, NDMSG) {
        match kind {
            NDA_DST => target = address(value),
            NDA_LLADDR => lladdr = mac(value),
            NDA_PORT | NDA_VNI | NDA_IFINDEX => elsewhere = true,
            _ => {}
        }
    }
    if family != AF_BRIDGE {
        family_of(family)?;
        return Some(Entry::Neigh { index, address: target?, mac: lladdr.filter(|_| permanent) });
    }
    if flags & NTF_MASTER != 0 {
        return None;
    }
    let remote = if elsewhere { target.map(|t| Family::of(t).unspecified()) } else { target };
    Some(Entry::Fdb { index, mac: lladdr?, remote, permanent })
}

fn read_nexthop(body: &[u8]) -> Option<Entry> {
    let protocol = *body.get(2)?;
    let onlink = u32_at(body, 4)? & RTNH_F_ONLINK != 0;
    let (mut id, mut gateway, mut index) = (None, None, None);
    for (kind, value) in attributes(body, NHMSG) {
        match kind {
            NHA_ID => id = u32_at(value, 0),
            NHA_GATEWAY => gateway = address(value),
            NHA_OIF => index = u32_at(value, 0),
            _ => {}
        }
    }
    Some(Entry::Nexthop { id: id?, protocol, hop: index.zip(gateway).filter(|_| onlink) })
}

fn read_route(body: &[u8]) -> Option<Entry> {
    let family = family_of(*body.first()?)?;
    let (&length, &tos, &table, &protocol) = (body.get(1)?, body.get(3)?, body.get(4)?, body.get(5)?);
    let kind = *body.get(7)?;
    let unicast = kind == RTN_UNICAST;
    let flags = u32_at(body, 8)?;
    let (mut base, mut metric, mut gateway, mut index, mut nexthop, mut several) =
        (family.unspecified(), 0, None, None, None, false);
    let mut whole_table = u32::from(table);
    for (kind, value) in attributes(body, RTMSG) {
        match kind {
            RTA_DST => base = address(value)?,
            RTA_TABLE => whole_table = u32_at(value, 0)?,
            RTA_PRIORITY => metric = u32_at(value, 0)?,
            RTA_GATEWAY => gateway = address(value),
            RTA_OIF => index = u32_at(value, 0),
            RTA_NH_ID => nexthop = u32_at(value, 0),
            RTA_MULTIPATH => several = true,
            _ => {}
        }
    }
    let ours = if family == Family::V4 { 0 } else { IPV6_METRIC };
    if whole_table != u32::from(RT_TABLE_MAIN) || tos != 0 || flags & RTM_F_CLONED != 0 {
        return None;
    }
    let destination = Cidr::containing(base, length)?;
    if metric == UNREACHABLE_METRIC {
        return Some(Entry::Unreachable { destination, protocol, unreachable: kind == RTN_UNREACHABLE });
    }
    if metric != ours {
        return None;
    }
    let hop = match (nexthop, gateway, index) {
        (Some(id), ..) if unicast => Hop::Nexthop(id),
        (None, Some(gateway), Some(index)) if unicast && !several && flags & RTNH_F_ONLINK != 0 => Hop::Gateway(index, gateway),
        (None, None, Some(index)) if kind == RTN_LOCAL && !several => Hop::Local(index),
        _ => Hop::Other,
    };
    Some(Entry::Route { destination, protocol, hop })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::message::messages;
    use crate::model::Vni;

    fn round_trip(key: &Key, value: &Value) -> Entry {
        let mut buffer = Vec::new();
        assert!(write_set(&mut buffer, 9, 7, key, value), "{key} {value}");
        let mut all = messages(&buffer);
        let (header, body) = all.next().expect("a message");
        assert!(all.next().is_none());
        assert_eq!(header.sequence_number, 9);
        Entry::read(header, body).expect("an entry")
    }

    #[test]
    fn what_is_set_is_read_in_both_families() {
        let mac = Mac([2, 0, 0, 0, 0, 9]);
        for (family, base, public, subnet) in
            [(Family::V4, "10.244.3.0", "10.99.0.3", "10.244.3.0/24"), (Family::V6, "fd00:3::", "fd99::3", "fd00:3::/64")]
        {
            let device = Device::vxlan(family, Vni::DEFAULT);
            let (base, public): (IpAddr, IpAddr) = (base.parse().expect("ip"), public.parse().expect("ip"));
            let subnet: Cidr = subnet.parse().expect("cidr");
            assert_eq!(
                round_trip(&Key::Fdb(device, mac), &Value::Fdb(public)),
                Entry::Fdb { index: 7, mac, remote: Some(public), permanent: true }
            );
            assert_eq!(
                round_trip(&Key::Neigh(device, base), &Value::Neigh(mac)),
                Entry::Neigh { index: 7, address: base, mac: Some(mac) }
            );
            assert_eq!(
                round_trip(&Key::Nexthop(0x5600_0001), &Value::Nexthop { device, gateway: base }),
                Entry::Nexthop { id: 0x5600_0001, protocol: PROTOCOL, hop: Some((7, base)) }
            );
            for (via, hop) in [
                (Via::Nexthop(5), Hop::Nexthop(5)),
                (Via::Gateway(device, base), Hop::Gateway(7, base)),
                (Via::Local(device), Hop::Local(7)),
            ] {
                let mut buffer = Vec::new();
                write_set(&mut buffer, 1, 7, &Key::Route(subnet), &Value::Route(via));
                if family == Family::V6 {
                    // The kernel fills in its metric; here we do.
                    append_metric(&mut buffer);
                }
                let (header, body) = messages(&buffer).next().expect("a message");
                let read = Entry::read(header, body);
                assert_eq!(read, Some(Entry::Route { destination: subnet, protocol: PROTOCOL, hop }));
            }
            assert_eq!(
                round_trip(&Key::Unreachable(subnet), &Value::Unreachable),
                Entry::Unreachable { destination: subnet, protocol: PROTOCOL, unreachable: true }
            );
        }
    }

    fn append_metric(buffer: &mut Vec<u8>) {
        buffer.extend_from_slice(&8u16.to_ne_bytes());
        buffer.extend_from_slice(&RTA_PRIORITY.to_ne_bytes());
        buffer.extend_from_slice(&IPV6_METRIC.to_ne_bytes());
        let length = u32::try_from(buffer.len()).expect("short");
        buffer[..4].copy_from_slice(&length.to_ne_bytes());
    }

    #[test]
    fn what_does_not_fit_is_not_written() {
        let device = Device::vxlan(Family::V4, Vni::DEFAULT);
        let mut buffer = Vec::new();
        assert!(!write_set(&mut buffer, 1, 7, &Key::Nexthop(1), &Value::Address));
        let route = Key::Route("10.0.0.0/8".parse().expect("cidr"));
        assert!(!write_set(&mut buffer, 1, 7, &route, &Value::Route(Via::Foreign)));
        assert!(!write_delete(&mut buffer, 1, 7, &Key::Link(device.name().into())));
        assert!(buffer.is_empty());
    }

    #[test]
    fn bytes_of_any_length_are_read_without_panic() {
        let key = Key::Route("10.0.0.0/8".parse().expect("cidr"));
        let mut buffer = Vec::new();
        write_set(&mut buffer, 1, 7, &key, &Value::Route(Via::Nexthop(3)));
        let (mut header, body) = messages(&buffer).next().expect("a message");
        for kind in [libc::RTM_NEWNEIGH, RTM_NEWNEXTHOP, libc::RTM_NEWROUTE, 0] {
            header.message_type = kind;
            for end in 0..=body.len() {
                let _ = Entry::read(header, &body[..end]);
            }
        }
    }
}
