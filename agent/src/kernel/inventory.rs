//! What the external interface is chosen from: links that are not ours, their addresses, default routes.

use std::net::IpAddr;

use super::dump::all_addresses;
use super::message::{Message, attributes, u32_at};
use super::request::{self, IFF_LOOPBACK, family_number, family_of};
use super::socket::{Refusal, RouteSocket};
use super::uapi::*;
use super::wire::Query;
use super::{Shared, known};
use crate::model::{Device, Family};
use crate::plan::OpError;
use crate::plan::underlay::{DefaultRoute, ForeignLink, Inventory};

/// Length of `struct rtmsg`.
const RTMSG: usize = 12;
/// Offset of the interface index in `struct rtnexthop`, the first part of a route over several gateways.
const RTNEXTHOP_INDEX: usize = 4;

/// Reads it.
pub fn inventory(shared: &mut Shared) -> Result<Inventory, OpError> {
    let links = request::links(&mut shared.socket).map_err(|e| e.during("cannot list the links"))?;
    let mut addresses = all_addresses(&mut shared.socket, 0)?;
    addresses.retain(|a| a.scope == RT_SCOPE_UNIVERSE);
    // Stable: what the kernel lists first stays first among equals.
    addresses.sort_by_key(|a| (a.flags & IFA_F_DEPRECATED != 0, a.flags & IFA_F_PERMANENT == 0));
    let named_ours = |name: &str| Device::from_name(name).is_some() || name.starts_with(known::PORT_PREFIX);
    let links = links
        .into_iter()
        .filter(|link| !(named_ours(&link.name) && known::is_marked(link)))
        .map(|link| ForeignLink {
            index: link.index,
            mtu: link.mtu,
            up: link.up(),
            loopback: link.flags & IFF_LOOPBACK != 0,
            addresses: addresses.iter().filter(|a| a.index == link.index).map(|a| a.address.ip()).collect(),
            name: link.name,
        })
        .collect();
    let mut defaults = Vec::new();
    for family in Family::ALL {
        defaults.extend(default_routes(&mut shared.socket, family)?);
    }
    Ok(Inventory { links, defaults, forward_drops: shared.nft.dump()?.forward_drops })
}

/// A default route of the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Default {
    metric: u32,
    protocol: u8,
    interface: Option<u32>,
    nexthop: Option<u32>,
}

/// Whether a route message's body is about a default route of the main table.
pub fn is_default(body: &[u8]) -> bool {
    body.get(1) == Some(&0) && body.get(4) == Some(&RT_TABLE_MAIN) && body.get(7) == Some(&RTN_UNICAST)
}

impl Default {
    fn read(body: &[u8]) -> Option<Default> {
        if !is_default(body) {
            return None;
        }
        let mut route = Default { metric: 0, protocol: *body.get(5)?, interface: None, nexthop: None };
        for (kind, value) in attributes(body, RTMSG) {
            match kind {
                RTA_PRIORITY => route.metric = u32_at(value, 0)?,
                RTA_OIF => route.interface = u32_at(value, 0),
                RTA_MULTIPATH => route.interface = u32_at(value, RTNEXTHOP_INDEX),
                RTA_NH_ID => route.nexthop = u32_at(value, 0),
                _ => {}
            }
        }
        Some(route)
    }
}

fn default_routes(socket: &mut RouteSocket, family: Family) -> Result<Vec<DefaultRoute>, OpError> {
    let query = Query::Routes(family, 0);
    let read = socket.dump(
        query.kind(),
        |m| query.write(m),
        Vec::new,
        |all, header, body| {
            if header.kind == libc::RTM_NEWROUTE && body.first().copied().and_then(family_of) == Some(family) {
                all.extend(Default::read(body));
            }
        },
    );
    let mut routes = match read {
        Ok(routes) => routes,
        Err(e) if matches!(e.errno, libc::EAFNOSUPPORT | libc::EOPNOTSUPP) => Vec::new(),
        Err(e) => return Err(e.during(format!("cannot list the {family} routes"))),
    };
    routes.sort_by_key(|route| route.metric);
    let mut found = Vec::new();
    for route in routes {
        let interface = match (route.interface, route.nexthop) {
            (Some(index), _) => Some(index),
            // With net.ipv4.nexthop_compat_mode=0 the route names only its next hop.
            (None, Some(id)) => nexthop_interface(socket, id),
            (None, None) => None,
        };
        found.extend(interface.map(|interface| DefaultRoute {
            family,
            interface,
            from_router_advertisement: route.protocol == RTPROT_RA,
        }));
    }
    Ok(found)
}

fn nexthop_interface(socket: &mut RouteSocket, id: u32) -> Option<u32> {
    let build = |m: &mut Message<'_>| {
        m.body(&[0; 8]).put_u32(NHA_ID, id);
    };
    let read = |body: &[u8]| attributes(body, 8).find(|(kind, _)| *kind == NHA_OIF).and_then(|(_, value)| u32_at(value, 0));
    socket.get(RTM_GETNEXTHOP, build, read).ok()
}

/// The interface by which the kernel would send to an address.
pub fn route_to(socket: &mut RouteSocket, address: IpAddr) -> Result<Option<u32>, OpError> {
    let family = Family::of(address);
    let build = |m: &mut Message<'_>| {
        m.body(&[family_number(family), family.bits(), 0, 0, 0, 0, 0, 0]).body(&[0; 4]).put_address(RTA_DST, address);
    };
    let read = |body: &[u8]| {
        // IPv6 answers with an unreachable route where IPv4 answers with an error.
        let leads = matches!(*body.get(7)?, RTN_UNICAST | RTN_LOCAL);
        let index = attributes(body, RTMSG).find(|(kind, _)| *kind == RTA_OIF).and_then(|(_, value)| u32_at(value, 0));
        index.filter(|_| leads)
    };
    match socket.get(libc::RTM_GETROUTE, build, read) {
        Ok(index) => Ok(Some(index)),
        Err(Refusal {
            errno: libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ESRCH | libc::EACCES | libc::EINVAL | libc::EPROTO,
            ..
        }) => Ok(None),
        Err(e) => Err(e.during(format!("cannot ask for the route to {address}"))),
    }
}
