//! All policy rules and routes of a namespace, its numbers for other namespaces, and what redirects packets past them.

use std::net::IpAddr;

use super::*;
use crate::kernel::nlmsg::text;

/// `linux/net_namespace.h` and `linux/rtnetlink.h`.
const RTM_GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
/// Length of `struct rtgenmsg`, padded.
const RTGENMSG_LEN: usize = 4;
/// `linux/fib_rules.h`.
const FRA_DST: u16 = 1;
const FRA_SRC: u16 = 2;
const FRA_IIFNAME: u16 = 3;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_FWMASK: u16 = 16;
const FRA_SUPPRESS_IFGROUP: u16 = 13;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_TABLE: u16 = 15;
const FRA_PAD: u16 = 18;
const FRA_PROTOCOL: u16 = 21;
/// Action of a rule: look up a table.
const FR_ACT_TO_TBL: u8 = 1;
/// The rule matches all other packets (`linux/fib_rules.h`).
const FIB_RULE_INVERT: u32 = 2;
/// `linux/rtnetlink.h`: the route changes the packet, for example by encapsulation.
const RTA_ENCAP: u16 = 22;
/// Length of `struct rtnexthop`.
const RTNEXTHOP_LEN: usize = 8;
/// Parent of a qdisc that sees packets before the kernel does (`linux/pkt_sched.h`): `ingress` and `clsact` have it.
const TC_H_INGRESS: u32 = 0xffff_fff1;
/// Length of `struct tcmsg`.
const TCMSG_LEN: usize = 20;

/// A rule that chooses a routing table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyRule {
    /// Its family.
    pub family: Family,
    /// Rules are tried in ascending order of it.
    pub priority: u32,
    /// The table; `None` if the rule rejects packets or jumps.
    pub table: Option<u32>,
    /// Source addresses.
    pub from: Option<Cidr>,
    /// Destination addresses.
    pub to: Option<Cidr>,
    /// Input interface.
    pub input: Option<String>,
    /// Whether it also matches something else than addresses and interfaces: a mark, a port, a user.
    pub conditional: bool,
}

/// A route of any table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteEntry {
    /// The table.
    pub table: u32,
    /// `unicast`, `local`, `blackhole`, ...
    pub kind: String,
    /// Destination addresses.
    pub destination: Cidr,
    /// Output interfaces; several of a multipath route.
    pub interfaces: Vec<u32>,
    /// The gateway, of a single path.
    pub gateway: Option<IpAddr>,
    /// Whether the path of a packet cannot be predicted: several paths, or encapsulation.
    pub unpredictable: bool,
}

/// A dump of policy rules, routes or qdiscs, of a family or of all.
struct TableRequest {
    kind: u16,
    family: u8,
    length: usize,
}

impl Request for TableRequest {
    fn write(&self, buffer: &mut Vec<u8>, flags: u16, sequence: u32) {
        let mut m = Message::begin(buffer, self.kind, flags, sequence);
        m.body(&[self.family]).body(&vec![0; self.length - 1]);
    }
}

/// A request for the number of an open namespace.
struct NetnsIdRequest(u32);

impl Request for NetnsIdRequest {
    fn write(&self, buffer: &mut Vec<u8>, flags: u16, sequence: u32) {
        let mut m = Message::begin(buffer, RTM_GETNSID, flags, sequence);
        m.body(&[0; RTGENMSG_LEN]).put_u32(NETNSA_FD, self.0);
    }
}

impl KernelQuery {
    /// The rules that choose a routing table, in order.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn policy_rules(&mut self, family: Family) -> Result<Vec<PolicyRule>, OpError> {
        let request = TableRequest { kind: libc::RTM_GETRULE, family: family_number(family), length: RTMSG_LEN };
        let read = self.socket.dump(&request, Vec::new, |all, header, body| {
            if header.message_type == libc::RTM_NEWRULE {
                all.extend(read_policy_rule(family, body));
            }
        });
        match read {
            Err(error) if error.is_unsupported_family() => Ok(Vec::new()),
            other => other.map_err(|e| e.context(format!("cannot list the {family} policy rules"))),
        }
    }

    /// The routes of all tables.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn routes(&mut self, family: Family) -> Result<Vec<RouteEntry>, OpError> {
        let request = TableRequest { kind: libc::RTM_GETROUTE, family: family_number(family), length: RTMSG_LEN };
        let read = self.socket.dump(&request, Vec::new, |all, header, body| {
            if header.message_type == libc::RTM_NEWROUTE {
                all.extend(read_route_entry(family, body));
            }
        });
        match read {
            Err(error) if error.is_unsupported_family() => Ok(Vec::new()),
            other => other.map_err(|e| e.context(format!("cannot list the {family} routes"))),
        }
    }

    /// The number by which this namespace's links name another one; `None` if no link does.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn netns_id(&mut self, other: &Netns) -> Result<Option<u32>, OpError> {
        use std::os::fd::{AsFd, AsRawFd};
        let request = NetnsIdRequest(other.as_fd().as_raw_fd().cast_unsigned());
        let id = |body: &[u8]| {
            let id = attributes(body, RTGENMSG_LEN).find(|(kind, _)| *kind == NETNSA_NSID);
            id.and_then(|(_, value)| u32_at(value, 0))
        };
        let found = self.socket.get(&request, id);
        let found = found.map_err(|e| e.context(format!("cannot identify network namespace {}", other.path().display())))?;
        // NETNSA_NSID_NOT_ASSIGNED is -1.
        Ok((found != u32::MAX).then_some(found))
    }

    /// The interfaces at which traffic control may redirect packets before the kernel routes them.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn ingress_qdiscs(&mut self) -> Result<Vec<u32>, OpError> {
        let request = TableRequest { kind: libc::RTM_GETQDISC, family: 0, length: TCMSG_LEN };
        let read = self.socket.dump(&request, Vec::new, |all, header, body| {
            if header.message_type == libc::RTM_NEWQDISC && u32_at(body, 12) == Some(TC_H_INGRESS) {
                all.extend(u32_at(body, 4));
            }
        });
        read.map_err(|e| e.context("cannot list the queueing disciplines"))
    }

    /// The VNIs other than its own to which a VXLAN device sends, by FDB entries.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn fdb_vnis(&mut self, interface: u32) -> Result<Vec<u32>, OpError> {
        let read = self.socket.dump(&EntryQuery::Fdb(interface), Vec::new, |all: &mut Vec<u32>, _, body| {
            let vni = attributes(body, NDMSG_LEN).find(|(kind, _)| *kind == NDA_VNI).and_then(|(_, value)| u32_at(value, 0));
            all.extend(vni.filter(|vni| u32_at(body, 4) == Some(interface) && !all.contains(vni)));
        });
        read.map_err(|e| e.context("cannot list the FDB entries"))
    }
}

fn family_number(family: Family) -> u8 {
    let number = if family == Family::V4 { libc::AF_INET } else { libc::AF_INET6 };
    u8::try_from(number).unwrap_or_default()
}

fn read_policy_rule(family: Family, body: &[u8]) -> Option<PolicyRule> {
    let (to_length, from_length, tos) = (*body.get(1)?, *body.get(2)?, *body.get(3)?);
    let (table, action, flags) = (*body.get(4)?, *body.get(7)?, u32_at(body, 8)?);
    let cidr = |value: &[u8], length| address(value).and_then(|base| Cidr::containing(base, length));
    let mut rule = PolicyRule {
        family,
        priority: 0,
        table: (action == FR_ACT_TO_TBL).then_some(u32::from(table)),
        from: None,
        to: None,
        input: None,
        conditional: tos != 0 || flags & FIB_RULE_INVERT != 0,
    };
    for (kind, value) in attributes(body, RTMSG_LEN) {
        match kind {
            FRA_DST => rule.to = cidr(value, to_length),
            FRA_SRC => rule.from = cidr(value, from_length),
            FRA_IIFNAME => rule.input = Some(text(value)),
            FRA_PRIORITY => rule.priority = u32_at(value, 0)?,
            FRA_TABLE => rule.table = u32_at(value, 0).filter(|_| action == FR_ACT_TO_TBL),
            FRA_FWMARK | FRA_FWMASK => rule.conditional |= u32_at(value, 0) != Some(0),
            // A lookup by the kernel respects these.
            FRA_SUPPRESS_PREFIXLEN | FRA_SUPPRESS_IFGROUP | FRA_PAD | FRA_PROTOCOL => {}
            _ => rule.conditional = true,
        }
    }
    Some(rule)
}

fn read_route_entry(family: Family, body: &[u8]) -> Option<RouteEntry> {
    let (length, table, kind) = (*body.get(1)?, *body.get(4)?, *body.get(7)?);
    let mut base = family.unspecified();
    let mut route = RouteEntry {
        table: u32::from(table),
        kind: route_type_name(kind).to_owned(),
        destination: Cidr::all(family),
        interfaces: Vec::new(),
        gateway: None,
        unpredictable: false,
    };
    let mut nexthop = false;
    for (kind, value) in attributes(body, RTMSG_LEN) {
        match kind {
            RTA_DST => base = address(value)?,
            RTA_OIF => route.interfaces.extend(u32_at(value, 0)),
            RTA_GATEWAY => route.gateway = address(value),
            RTA_TABLE => route.table = u32_at(value, 0)?,
            RTA_NH_ID => nexthop = true,
            RTA_ENCAP => route.unpredictable = true,
            RTA_MULTIPATH => {
                route.unpredictable = true;
                let mut hops = value;
                while let (Some(length), Some(index)) = (u16_at(hops, 0), u32_at(hops, 4)) {
                    route.interfaces.push(index);
                    hops = hops.get(usize::from(length).max(RTNEXTHOP_LEN).next_multiple_of(4)..).unwrap_or_default();
                }
            }
            _ => {}
        }
    }
    // The kernel leaves out the paths of a next-hop group if `net.ipv4.nexthop_compat_mode` is 0.
    route.unpredictable |= nexthop && route.interfaces.is_empty();
    route.destination = Cidr::containing(base, length)?;
    Some(route)
}
