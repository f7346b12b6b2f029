//! Deletes conntrack entries whose translation our current rules no longer give.
//!
//! The kernel evaluates NAT rules only for the first packet of a flow (`nf_nat_inet_fn` in net/netfilter/nf_nat_core.c). The
//! result stays in the flow's entry, and each packet renews the entry. Without deletion, a client that keeps sending would never
//! reach a port that moved to another container, or that was published after its first datagram. So entries that a change
//! invalidates are deleted, and the next packet creates an entry from the present rules.
//!
//! Only affected entries are deleted: those of a published port with its former container, those of a container's address, and
//! those that predate a masquerade rule. Entries of a conntrack zone are never ours. This module spawns no tasks; the calls block
//! while the kernel walks its table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};

use super::codec::{self, Object, Writer};
use super::nfnl_socket::NfnlSocket;
use crate::kernel::host_ports::query;
use crate::kernel::netns::Netns;
use crate::model::{Family, Transport};
use crate::plan::ruleset::{Element, Expr, Field, Rule, Table};
use crate::plan::{Key, Op, OpError, State, Value};

/// Constants of `linux/netfilter/nfnetlink_conntrack.h` and `linux/netfilter/nf_conntrack_common.h`, under their names there.
const IPCTNL_MSG_CT_GET: u8 = 1;
const IPCTNL_MSG_CT_DELETE: u8 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_TUPLE_ZONE: u16 = 3;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const IPS_SEEN_REPLY: u32 = 2;

/// Selects stale entries by the change that invalidated them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StaleFilter {
    /// The target of a published port changed.
    Port {
        /// [`Element::Port`] or [`Element::Bound`].
        element: Element,
        /// The former target; `None` if the port was not published.
        old_target: Option<SocketAddr>,
        /// The present target; `None` if the port is no longer published.
        new_target: Option<SocketAddr>,
    },
    /// A container's address is no longer in use.
    Address(IpAddr),
    /// Traffic from this address range is now masqueraded; before, it was not.
    Masqueraded(RangeInclusive<IpAddr>),
}

/// The NAT mappings of our rules that a batch of ops may change.
#[derive(Debug)]
pub struct NatMappings {
    port_targets: BTreeMap<Element, Option<SocketAddr>>,
    /// `None` if the ruleset does not change.
    masqueraded_ranges: Option<Vec<RangeInclusive<IpAddr>>>,
}

impl NatMappings {
    /// Captures the mappings before the ops, from the rules in force.
    pub fn capture(ops: &[Op], rules: &State) -> NatMappings {
        let replaced = ops.iter().any(|op| *op.key() == Key::Ruleset(Table::Inet));
        // A deleted table takes its elements with it.
        let of_table = replaced.then(|| rules.keys()).into_iter().flatten();
        let published = ops.iter().map(Op::key).chain(of_table).filter_map(|key| match key {
            Key::Element(element @ (Element::Port(..) | Element::Bound(..))) => Some(element),
            _ => None,
        });
        let port_targets = published.map(|element| (element.clone(), target(element, rules))).collect();
        NatMappings { port_targets, masqueraded_ranges: replaced.then(|| masqueraded_ranges(rules)) }
    }

    /// Compares the captured mappings with the rules now in force.
    pub fn stale_filters(self, rules: &State) -> Vec<StaleFilter> {
        let changed = self.port_targets.into_iter().filter_map(|(element, old_target)| {
            let new_target = target(&element, rules);
            // If the port was not published before, only UDP has entries that stay.
            let is_udp = matches!(element, Element::Port(_, Transport::Udp, _) | Element::Bound(_, Transport::Udp, _));
            (old_target != new_target && (old_target.is_some() || is_udp)).then_some(StaleFilter::Port {
                element,
                old_target,
                new_target,
            })
        });
        let mut stale: Vec<StaleFilter> = changed.collect();
        if let Some(old_ranges) = self.masqueraded_ranges {
            stale.extend(
                masqueraded_ranges(rules).into_iter().filter(|range| !old_ranges.contains(range)).map(StaleFilter::Masqueraded),
            );
        }
        stale
    }
}

fn target(element: &Element, rules: &State) -> Option<SocketAddr> {
    match rules.get(&Key::Element(element.clone())) {
        Some(Value::Element(target)) => target.as_deref().copied(),
        _ => None,
    }
}

/// The source ranges whose traffic out of the overlay is masqueraded.
fn masqueraded_ranges(rules: &State) -> Vec<RangeInclusive<IpAddr>> {
    let Some(Value::Ruleset(ruleset)) = rules.get(&Key::Ruleset(Table::Inet)) else { return Vec::new() };
    let rules = ruleset.chains.iter().flat_map(|chain| &chain.rules);
    let range = |rule: &Rule| {
        let is_masqueraded = |source_range: &RangeInclusive<IpAddr>| {
            let excludes_range = |expr: &Expr| matches!(expr, Expr::Range { field: Field::Destination(_), first, last, negate: true } if (*first..=*last) == *source_range);
            rule.exprs.iter().any(excludes_range) && rule.exprs.contains(&Expr::Masquerade)
        };
        let source_range = rule.exprs.iter().find_map(|expr| match expr {
            Expr::Range { field: Field::Source(_), first, last, negate: false } => Some(*first..=*last),
            _ => None,
        });
        source_range.filter(is_masqueraded)
    };
    rules.filter_map(range).collect()
}

/// Deletes stale entries. Concurrent callers share one dump.
#[derive(Debug)]
pub struct ConntrackCleaner {
    netns: Netns,
    queue: Mutex<Vec<StaleFilter>>,
    delete_lock: Mutex<()>,
}

impl ConntrackCleaner {
    /// A cleaner for a network namespace.
    pub fn new(netns: Netns) -> ConntrackCleaner {
        ConntrackCleaner { netns, queue: Mutex::default(), delete_lock: Mutex::default() }
    }

    /// Deletes stale entries; blocks. Returns their number, those of concurrent callers
    /// included.
    ///
    /// # Errors
    /// The kernel has no ctnetlink, or refused.
    pub fn delete(&self, stale: Vec<StaleFilter>) -> Result<usize, OpError> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).extend(stale);
        let _guard = self.delete_lock.lock().unwrap_or_else(PoisonError::into_inner);
        // Empty if another caller handled these filters: its dump began after they were queued.
        let queued = std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner));
        delete_matching(&self.netns, &queued)
    }
}

fn delete_matching(netns: &Netns, stale: &[StaleFilter]) -> Result<usize, OpError> {
    if stale.is_empty() {
        return Ok(0);
    }
    let failed = |error: OpError| OpError { message: format!("cannot delete conntrack entries: {error}"), ..error };
    let opened = netns.run_in_place(|| -> Result<_, OpError> {
        let has_local = stale.iter().any(|stale| matches!(stale, StaleFilter::Port { new_target: Some(_), .. }));
        let local_addresses = if has_local { query(&[])?.addresses } else { BTreeSet::new() };
        Ok((NfnlSocket::open(codec::NFNL_SUBSYS_CTNETLINK)?, local_addresses))
    });
    let (mut socket, local_addresses) = opened.unwrap_or_else(|e| Err(OpError::from(&e))).map_err(failed)?;
    let mut found = Vec::new();
    let mut read = |object: Object<'_>| {
        let Some(entry) = ConntrackEntry::read(object.attributes) else { return };
        if stale.iter().any(|stale| stale.matches(&entry, |address| address.is_loopback() || local_addresses.contains(&address)))
        {
            found.push((object.family, identifying_attributes(object.attributes)));
        }
    };
    // Dumps all entries once. The kernel locks each bucket of its table in turn, which takes as long as writing some ten thousand
    // entries. A filter (`CTA_FILTER`, since Linux 5.8) holds one value of a kind, so two addresses would take two dumps.
    socket.dump(IPCTNL_MSG_CT_GET, codec::NFPROTO_UNSPEC, |_| (), &mut read).map_err(failed)?;
    for (family, names) in &found {
        let body = |w: &mut Writer| names.iter().for_each(|(kind, value)| w.bytes(*kind, value));
        // An entry that expired meanwhile needs no deletion.
        socket.get(IPCTNL_MSG_CT_DELETE, *family, body, |_| ()).map_err(failed)?;
    }
    Ok(found.len())
}

/// The attributes that identify an entry for deletion. Its id prevents deletion of a later entry of the same flow.
fn identifying_attributes(attributes: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let identifying = codec::attributes(attributes).filter(|(kind, _)| matches!(*kind, CTA_TUPLE_ORIG | CTA_ID));
    let nested = |kind| if kind == CTA_TUPLE_ORIG { kind | codec::NLA_F_NESTED } else { kind };
    identifying.map(|(kind, value)| (nested(kind), value.to_vec())).collect()
}

/// A conntrack entry, with the tuples of both directions.
#[derive(Debug, Clone, Copy)]
struct ConntrackEntry {
    protocol: u8,
    original: Tuple,
    reply: Tuple,
    seen_reply: bool,
}

/// Source and destination; port 0 if the protocol has no ports.
#[derive(Debug, Clone, Copy)]
struct Tuple {
    source: SocketAddr,
    destination: SocketAddr,
}

impl ConntrackEntry {
    /// `None` for entries of a zone, which our rules never create, and for non-IP protocols.
    fn read(attributes: &[u8]) -> Option<ConntrackEntry> {
        let [original, reply] = [CTA_TUPLE_ORIG, CTA_TUPLE_REPLY].map(|kind| codec::attribute(attributes, kind));
        let (original, reply) = (original?, reply?);
        let in_zone = codec::attribute(attributes, CTA_ZONE).is_some()
            || [original, reply].iter().any(|tuple| codec::attribute(tuple, CTA_TUPLE_ZONE).is_some());
        if in_zone {
            return None;
        }
        let protocol = codec::attribute(codec::attribute(original, CTA_TUPLE_PROTO)?, CTA_PROTO_NUM)?.first()?;
        let seen_reply = codec::attribute_u32(attributes, CTA_STATUS).is_some_and(|status| status & IPS_SEEN_REPLY != 0);
        Some(ConntrackEntry { protocol: *protocol, original: Tuple::read(original)?, reply: Tuple::read(reply)?, seen_reply })
    }
}

impl Tuple {
    fn read(tuple: &[u8]) -> Option<Tuple> {
        let (ip, protocol) = (codec::attribute(tuple, CTA_TUPLE_IP)?, codec::attribute(tuple, CTA_TUPLE_PROTO)?);
        let address = |v4, v6| match codec::attribute(ip, v4) {
            Some(bytes) => Some(IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?))),
            None => Some(IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(codec::attribute(ip, v6)?).ok()?))),
        };
        let port = |kind| codec::attribute(protocol, kind).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_be_bytes);
        Some(Tuple {
            source: SocketAddr::new(address(CTA_IP_V4_SRC, CTA_IP_V6_SRC)?, port(CTA_PROTO_SRC_PORT)),
            destination: SocketAddr::new(address(CTA_IP_V4_DST, CTA_IP_V6_DST)?, port(CTA_PROTO_DST_PORT)),
        })
    }
}

impl StaleFilter {
    /// Whether the rules would now translate the entry's first packet differently. `is_local` tells whether an address belongs to
    /// the host.
    fn matches(&self, entry: &ConntrackEntry, is_local: impl Fn(IpAddr) -> bool) -> bool {
        let ConntrackEntry { protocol, original, reply, seen_reply } = entry;
        let (destination, reply_source) = (original.destination, reply.source);
        match self {
            StaleFilter::Port { element, old_target, new_target } => {
                let matches_port = match element {
                    Element::Port(family, transport, port) => {
                        Family::of(destination.ip()) == *family && transport.number() == *protocol && *port == destination.port()
                    }
                    Element::Bound(address, transport, port) => {
                        SocketAddr::new(*address, *port) == destination && transport.number() == *protocol
                    }
                    _ => false,
                };
                // A TCP connection that predates the publication belongs to the host and stays. UDP has no new connection: its
                // datagrams keep the old entry alive.
                let is_untranslated = new_target.is_some() && *protocol == Transport::Udp.number() && reply_source == destination;
                matches_port
                    && ((*old_target == Some(reply_source) && reply_source != destination)
                        || (is_untranslated && is_local(destination.ip())))
            }
            StaleFilter::Address(address) => original.source.ip() == *address || reply_source.ip() == *address,
            StaleFilter::Masqueraded(range) => {
                let leaves_overlay = range.contains(&original.source.ip())
                    && !range.contains(&destination.ip())
                    && !destination.ip().is_multicast();
                // An answered flow works without translation.
                leaves_overlay && reply.destination == original.source && !seen_reply
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NetworkConfig, PerFamily, Subnet};
    use crate::plan::isolation::Scope;
    use crate::plan::ruleset::{InetTableSpec, inet_table};

    fn socket_address(text: &str) -> SocketAddr {
        text.parse().expect(text)
    }

    /// A flow from outside to the host's port, translated to `reached`.
    fn flow(destination: &str, reply_source: &str) -> ConntrackEntry {
        let client = socket_address("192.0.2.9:4000");
        ConntrackEntry {
            protocol: Transport::Udp.number(),
            original: Tuple { source: client, destination: socket_address(destination) },
            reply: Tuple { source: socket_address(reply_source), destination: client },
            seen_reply: true,
        }
    }

    fn port_filter(old_target: Option<&str>, new_target: Option<&str>) -> StaleFilter {
        StaleFilter::Port {
            element: Element::Port(Family::V4, Transport::Udp, 53),
            old_target: old_target.map(socket_address),
            new_target: new_target.map(socket_address),
        }
    }

    const HOST: &str = "192.0.2.1:53";
    const FIRST: &str = "10.244.0.2:53";
    const SECOND: &str = "10.244.0.3:53";

    fn is_stale(stale: &StaleFilter, entry: &ConntrackEntry) -> bool {
        stale.matches(entry, |address| address == socket_address(HOST).ip())
    }

    #[test]
    fn flow_to_old_target_is_stale() {
        for new_target in [Some(SECOND), None] {
            let stale = port_filter(Some(FIRST), new_target);
            assert!(is_stale(&stale, &flow(HOST, FIRST)));
            // Translated by foreign rules, to another port, with another protocol, and directly to the container.
            assert!(!is_stale(&stale, &flow(HOST, "10.0.0.7:53")));
            assert!(!is_stale(&stale, &flow("192.0.2.1:54", FIRST)));
            assert!(!is_stale(&stale, &ConntrackEntry { protocol: Transport::Tcp.number(), ..flow(HOST, FIRST) }));
            assert!(!is_stale(&stale, &flow(FIRST, FIRST)));
        }
    }

    #[test]
    fn untranslated_udp_flow_to_published_port_is_stale() {
        let stale = port_filter(None, Some(FIRST));
        assert!(is_stale(&stale, &flow(HOST, HOST)));
        assert!(!is_stale(&stale, &flow("198.51.100.1:53", "198.51.100.1:53")), "forwarded, not to this host");
        let tcp = StaleFilter::Port {
            element: Element::Port(Family::V4, Transport::Tcp, 53),
            old_target: None,
            new_target: Some(socket_address(FIRST)),
        };
        assert!(
            !is_stale(&tcp, &ConntrackEntry { protocol: Transport::Tcp.number(), ..flow(HOST, HOST) }),
            "a connection of the host"
        );
        assert!(!is_stale(&port_filter(Some(FIRST), None), &flow(HOST, HOST)), "no longer published");
    }

    #[test]
    fn port_of_one_address_leaves_other_addresses_alone() {
        let bound = Element::Bound(socket_address(HOST).ip(), Transport::Udp, 53);
        let stale = StaleFilter::Port { element: bound, old_target: Some(socket_address(FIRST)), new_target: None };
        assert!(is_stale(&stale, &flow(HOST, FIRST)));
        assert!(!is_stale(&stale, &flow("192.0.2.2:53", FIRST)));
    }

    #[test]
    fn flow_of_filtered_address_is_stale() {
        let stale = StaleFilter::Address(socket_address(FIRST).ip());
        assert!(is_stale(&stale, &flow(HOST, FIRST)));
        let outgoing = Tuple { source: socket_address(FIRST), destination: socket_address("198.51.100.1:53") };
        assert!(is_stale(&stale, &ConntrackEntry { original: outgoing, ..flow(HOST, HOST) }));
        assert!(!is_stale(&stale, &flow(HOST, SECOND)));
    }

    #[test]
    fn unanswered_flow_without_masquerade_is_stale() {
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        let stale = StaleFilter::Masqueraded(address("10.244.0.0")..=address("10.244.255.255"));
        let flow_to = |destination: &str| ConntrackEntry {
            original: Tuple { source: socket_address(FIRST), destination: socket_address(destination) },
            reply: Tuple { source: socket_address(destination), destination: socket_address(FIRST) },
            seen_reply: false,
            ..flow(HOST, HOST)
        };
        assert!(is_stale(&stale, &flow_to("198.51.100.1:53")));
        assert!(!is_stale(&stale, &ConntrackEntry { seen_reply: true, ..flow_to("198.51.100.1:53") }));
        assert!(!is_stale(&stale, &flow_to("10.244.9.9:53")), "inside the overlay");
        assert!(!is_stale(&stale, &flow_to("224.0.0.251:53")), "multicast");
        let masqueraded = Tuple { source: socket_address("198.51.100.1:53"), destination: socket_address("192.0.2.1:9") };
        assert!(!is_stale(&stale, &ConntrackEntry { reply: masqueraded, ..flow_to("198.51.100.1:53") }));
    }

    #[test]
    fn masqueraded_ranges_are_read_from_own_rules() {
        let text = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#;
        let network = NetworkConfig::parse(text).expect("a configuration").config;
        let subnet = Subnet::from_key("10.244.7.0-24&fd00:10:244:7::-64").expect("a subnet");
        let ranges = |masquerade| {
            let rules = InetTableSpec {
                network: network.clone(),
                bridge: crate::plan::backend::of(&network).bridge(),
                devices: PerFamily::default(),
                tunnel: None,
                subnet,
                local: PerFamily::default(),
                masquerade,
                publishes: true,
                numbered_sets: false,
                scope: Scope::Host,
                isolation: None,
            };
            let table = (Key::Ruleset(Table::Inet), Value::Ruleset(Box::new(inet_table(&[&rules]))));
            masqueraded_ranges(&State::from([table])).into_iter().map(|range| format!("{range:?}")).collect::<Vec<_>>()
        };
        let all = ["10.244.1.0..=10.244.255.255", "fd00:10:244:1::..=fd00:10:244:ff:ffff:ffff:ffff:ffff"];
        assert_eq!((ranges(true), ranges(false)), (all.map(str::to_owned).to_vec(), Vec::new()));
    }

    #[test]
    fn changed_targets_are_found() {
        let element = |port| Key::Element(Element::Port(Family::V4, Transport::Udp, port));
        let element_value = |target: &str| Value::Element(Some(Box::new(socket_address(target))));
        let mut rules = State::from([
            (element(1), element_value(FIRST)),
            (element(2), element_value(FIRST)),
            (element(3), element_value(FIRST)),
        ]);
        let ops = [
            Op::Set(element(1), element_value(SECOND)),
            Op::Delete(element(2), element_value(FIRST)),
            Op::Set(element(3), element_value(FIRST)),
            Op::Set(element(4), element_value(SECOND)),
            Op::Set(Key::Element(Element::Port(Family::V4, Transport::Tcp, 5)), element_value(SECOND)),
        ];
        let translations = NatMappings::capture(&ops, &rules);
        for op in &ops {
            op.apply_to(&mut rules);
        }
        let stale = |port, old: Option<&str>, new: Option<&str>| StaleFilter::Port {
            element: Element::Port(Family::V4, Transport::Udp, port),
            old_target: old.map(socket_address),
            new_target: new.map(socket_address),
        };
        let expected = [stale(1, Some(FIRST), Some(SECOND)), stale(2, Some(FIRST), None), stale(4, None, Some(SECOND))];
        assert_eq!(translations.stale_filters(&rules), expected);

        // Deleting the table deletes its elements.
        let table = Key::Ruleset(Table::Inet);
        rules.insert(table.clone(), Value::Ruleset(Box::default()));
        let ops = [Op::Delete(table, Value::Ruleset(Box::default()))];
        let translations = NatMappings::capture(&ops, &rules);
        for op in &ops {
            op.apply_to(&mut rules);
        }
        assert_eq!(translations.stale_filters(&rules).len(), 4);
    }
}
