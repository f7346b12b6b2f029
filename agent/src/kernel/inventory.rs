//! Reads the inputs for choosing the external interface: foreign links, their addresses, default routes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use netlink_packet_route::address::AddressFlags;
use netlink_packet_route::link::LinkFlags;
use netlink_packet_route::route::{RouteProtocol, RouteType};

use super::nlmsg::{attributes, u32_at};
use super::objects::{self, RouteInfo};
use super::peer_messages::{EntryQuery, NHMSG_LEN, family_of};
use super::route_socket::{KernelError, RouteSocket};
use super::uapi::NHA_OIF;
use super::{Shared, cache};
use crate::model::device::PORT_PREFIX;
use crate::model::{Device, Family};
use crate::plan::OpError;
use crate::plan::underlay::{DefaultRoute, Flaw, ForeignLink, HostAddress, HostInventory, nameservers};

/// Reads the inventory.
pub fn inventory(shared: &mut Shared) -> Result<HostInventory, OpError> {
    let links = objects::links(&mut shared.socket)?;
    let mut addresses = objects::addresses(&mut shared.socket, 0)?;
    addresses.retain(objects::AddressInfo::is_global);
    let vrfs: Vec<u32> = links.iter().filter(|link| link.kind == "vrf").map(|link| link.index).collect();
    let has_own_name = |name: &str| Device::from_name(name).is_some() || name.starts_with(PORT_PREFIX);
    let links = links
        .into_iter()
        .filter(|link| !(has_own_name(&link.name) && cache::is_own_link(link)))
        .map(|link| ForeignLink {
            index: link.index,
            mtu: link.mtu,
            up: link.up(),
            loopback: link.flags.contains(LinkFlags::Loopback),
            // Members of a VRF keep their own addresses, so they do not count as ports.
            is_port: link.master.is_some_and(|master| !vrfs.contains(&master)),
            kind: link.kind,
            ipv6: link.ipv6,
            addresses: addresses.iter().filter(|a| a.index == link.index).map(host_address).collect(),
            name: link.name,
        })
        .collect();
    let mut defaults = Vec::new();
    for family in Family::ALL {
        defaults.extend(default_routes(&mut shared.socket, family)?);
    }
    Ok(HostInventory { links, default_routes: defaults, forward_drops: shared.nft.dump()?.forward_drops, resolvers: resolvers() })
}

/// The name servers of resolv.conf(5) and the upstream servers of systemd-resolved. Both files are read, because resolv.conf may
/// name only the stub of systemd-resolved.
fn resolvers() -> BTreeSet<IpAddr> {
    let files =
        ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"].map(|path| std::fs::read_to_string(path).unwrap_or_default());
    files.iter().flat_map(|text| nameservers(text)).collect()
}

fn host_address(info: &objects::AddressInfo) -> HostAddress {
    let (address, has) = (info.address.ip(), |flag| info.flags.contains(flag));
    // `IFA_F_SECONDARY` and `IFA_F_TEMPORARY` are the same bit (linux/if_addr.h).
    let (secondary, temporary) = match Family::of(address) {
        Family::V4 => (has(AddressFlags::Secondary), false),
        Family::V6 => (false, has(AddressFlags::Secondary)),
    };
    let flaws = [
        (temporary, Flaw::Temporary),
        (has(AddressFlags::Deprecated), Flaw::Deprecated),
        // An optimistic address is usable while it is tentative (RFC 4429).
        (has(AddressFlags::Tentative) && !has(AddressFlags::Optimistic), Flaw::Tentative),
        (has(AddressFlags::Dadfailed), Flaw::Duplicate),
        (matches!(address, IpAddr::V4(v4) if v4.is_link_local()), Flaw::LinkLocal),
    ];
    let flaw = flaws.into_iter().filter(|(is, _)| *is).map(|(_, flaw)| flaw).max();
    HostAddress { address, length: info.address.prefix(), secondary, flaw }
}

fn default_routes(socket: &mut RouteSocket, family: Family) -> Result<Vec<DefaultRoute>, OpError> {
    let read = socket.dump(&EntryQuery::Routes(family, 0), Vec::new, |all, header, body| {
        // A kernel without IPv6 answers with the routes of all families.
        if header.message_type == libc::RTM_NEWROUTE && body.first().copied().and_then(family_of) == Some(family) {
            all.extend(RouteInfo::read_default(body));
        }
    });
    let mut routes = match read {
        Ok(routes) => routes,
        Err(e) if e.is_unsupported_family() => Vec::new(),
        Err(e) => return Err(e.context(format!("cannot list the {family} routes"))),
    };
    routes.sort_by_key(|route| route.metric);
    let mut found = Vec::new();
    for route in routes {
        let interface = match (route.interface, route.nexthop) {
            (Some(index), _) => Some(index),
            // With net.ipv4.nexthop_compat_mode=0 the route names only its next-hop object.
            (None, Some(id)) => nexthop_interface(socket, id),
            (None, None) => None,
        };
        found.extend(interface.map(|interface| DefaultRoute {
            family,
            interface,
            source: route.source,
            gateway: route.gateway,
            from_router_advertisement: route.protocol == RouteProtocol::Ra,
        }));
    }
    Ok(found)
}

fn nexthop_interface(socket: &mut RouteSocket, id: u32) -> Option<u32> {
    let read =
        |body: &[u8]| attributes(body, NHMSG_LEN).find(|(kind, _)| *kind == NHA_OIF).and_then(|(_, value)| u32_at(value, 0));
    socket.get(&EntryQuery::Nexthop(id), read).ok()
}

/// The interface through which the kernel would send to an address.
pub fn route_to(socket: &mut RouteSocket, address: IpAddr) -> Result<Option<u32>, OpError> {
    // If an address is unreachable, IPv6 replies with an unreachable route, IPv4 with an error.
    let is_reachable = |route: &RouteInfo| matches!(route.kind, RouteType::Unicast | RouteType::Local);
    let read = |body: &[u8]| RouteInfo::read(body).filter(is_reachable)?.interface;
    match socket.get(&objects::route_request(address), read) {
        Ok(index) => Ok(Some(index)),
        Err(KernelError {
            errno: libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ESRCH | libc::EACCES | libc::EINVAL | libc::EPROTO,
            ..
        }) => Ok(None),
        Err(e) => Err(e.context(format!("cannot ask for the route to {address}"))),
    }
}
