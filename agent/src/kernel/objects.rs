//! Decodes links, addresses and routes from rtnetlink's replies and events.
//!
//! `netlink-packet-route` decodes them attribute by attribute. An attribute that cannot be decoded is logged and skipped; the
//! rest of the message still counts. Drivers and newer kernels send attributes that no library knows, and an interface's alias
//! need not be UTF-8.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{DecodeError, NlaBuffer, NlasIterator, Parseable, ParseableParametrized};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeader, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    BridgePortState, InfoBridgePort, InfoData, InfoPortData, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkHeader,
    LinkInfo as Info, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteLwEnCapType, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::nlmsg::{attributes, text, u32_at};
use super::route_socket::{KernelError, RouteSocket};
use super::uapi::{DEVCONF_ACCEPT_RA, DEVCONF_DISABLE_IPV6, DEVCONF_FORWARDING, IFLA_INET6_CONF};
use crate::model::{Cidr, Device, Family, Mac, Role};
use crate::plan::underlay::Ipv6Settings;
use crate::plan::{Key, OpError};

/// Length of `struct ifinfomsg`.
const IFINFOMSG_LEN: usize = 16;
/// Length of `struct ifaddrmsg`.
const IFADDRMSG_LEN: usize = 8;
/// Length of `struct rtmsg`.
const RTMSG_LEN: usize = 12;

/// A link as the kernel reports it, with the attributes that the agent needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkInfo {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// `IFF_...`.
    pub flags: LinkFlags,
    /// The flags that the message announces as changed.
    pub change_mask: LinkFlags,
    /// `vxlan`, `bridge`, `veth`; empty for hardware.
    pub kind: String,
    /// `ifalias`.
    pub alias: String,
    /// MAC.
    pub mac: Option<Mac>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Interface group; 0 by default.
    pub group: u32,
    /// Interface index of the bridge.
    pub master: Option<u32>,
    /// As a bridge port: frames may leave through the port by which they arrived.
    pub hairpin: bool,
    /// Interface index of a veth pair's other end.
    pub peer: Option<u32>,
    /// The VXLAN settings.
    pub vxlan: Option<VxlanInfo>,
    /// The IPv6 settings, if the link has IPv6.
    pub ipv6: Option<Ipv6Settings>,
}

/// A VXLAN device's settings as the kernel reports them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VxlanInfo {
    /// VNI.
    pub id: u32,
    /// UDP destination port.
    pub port: u16,
    /// Source of outer packets.
    pub local: Option<IpAddr>,
    /// Underlay interface index; 0 if none.
    pub link: u32,
    /// Whether it learns from traffic.
    pub learning: bool,
}

impl LinkInfo {
    /// Decodes a link message's body. Returns `None` for other messages and for a bridge's message about its port (family
    /// `AF_BRIDGE`), which has fewer attributes.
    pub fn read(body: &[u8]) -> Option<LinkInfo> {
        let header = LinkHeader::parse(body).ok()?;
        if header.interface_family != AddressFamily::Unspec {
            return None;
        }
        let mut link =
            LinkInfo { index: header.index, flags: header.flags, change_mask: header.change_mask, ..LinkInfo::default() };
        for attribute in raw_attributes(body, IFINFOMSG_LEN) {
            if attribute.kind() == libc::IFLA_AF_SPEC {
                link.ipv6 = ipv6_settings(attribute.value());
                continue;
            }
            match LinkAttribute::parse_with_param(&attribute, header.interface_family) {
                Ok(LinkAttribute::IfName(name)) => link.name = name,
                Ok(LinkAttribute::IfAlias(alias)) => link.alias = alias,
                Ok(LinkAttribute::Address(address)) => link.mac = address.try_into().ok().map(Mac),
                Ok(LinkAttribute::Mtu(mtu)) => link.mtu = mtu,
                Ok(LinkAttribute::Group(group)) => link.group = group,
                Ok(LinkAttribute::Controller(master)) => link.master = Some(master),
                Ok(LinkAttribute::Link(peer)) => link.peer = Some(peer),
                Ok(LinkAttribute::LinkInfo(infos)) => link.apply_link_info(infos),
                Ok(_) => {}
                // A link whose name is not UTF-8 still counts.
                Err(_) if attribute.kind() == libc::IFLA_IFNAME => link.name = text(attribute.value()),
                Err(error) => log_undecoded("link", header.index, attribute.kind(), &error),
            }
        }
        (!link.name.is_empty()).then_some(link)
    }

    fn apply_link_info(&mut self, infos: Vec<Info>) {
        for info in infos {
            match info {
                Info::Kind(kind) => self.kind = kind.to_string(),
                Info::Data(InfoData::Vxlan(settings)) => self.vxlan = Some(VxlanInfo::from(settings)),
                Info::PortData(InfoPortData::BridgePort(settings)) => {
                    self.hairpin = settings.contains(&InfoBridgePort::HairpinMode(true));
                }
                _ => {}
            }
        }
    }

    /// Whether the link is administratively up.
    pub fn up(&self) -> bool {
        self.flags.contains(LinkFlags::Up)
    }
}

/// Decodes a link's IPv6 settings. The array grows with the kernel version, and `netlink-packet-route` needs its full length.
fn ipv6_settings(families: &[u8]) -> Option<Ipv6Settings> {
    let nested = |bytes, wanted| attributes(bytes, 0).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let family = nested(families, u16::from(u8::from(AddressFamily::Inet6)))?;
    let settings = nested(family, IFLA_INET6_CONF)?;
    let setting = |number: usize| u32_at(settings, 4 * number);
    Some(Ipv6Settings {
        forwarding: setting(DEVCONF_FORWARDING)? != 0,
        accept_ra: setting(DEVCONF_ACCEPT_RA)?,
        disabled: setting(DEVCONF_DISABLE_IPV6)? != 0,
    })
}

impl From<Vec<InfoVxlan>> for VxlanInfo {
    fn from(settings: Vec<InfoVxlan>) -> VxlanInfo {
        let mut vxlan = VxlanInfo::default();
        for setting in settings {
            match setting {
                InfoVxlan::Id(id) => vxlan.id = id,
                InfoVxlan::Link(link) => vxlan.link = link,
                InfoVxlan::Local(local) => vxlan.local = Some(local.into()),
                InfoVxlan::Local6(local) => vxlan.local = Some(local.into()),
                InfoVxlan::Learning(learning) => vxlan.learning = learning,
                InfoVxlan::Port(port) => vxlan.port = port,
                _ => {}
            }
        }
        vxlan
    }
}

/// Reads the link with that name.
pub fn link(socket: &mut RouteSocket, name: &str) -> Result<LinkInfo, KernelError> {
    let mut request = link_request();
    request.attributes.push(LinkAttribute::IfName(check_interface_name(name)?.to_owned()));
    socket.get(&RouteNetlinkMessage::GetLink(request), LinkInfo::read)
}

/// Checks the length of an interface name. The kernel's error would be about the length, not about the interface.
pub fn check_interface_name(name: &str) -> Result<&str, KernelError> {
    if name.is_empty() || name.len() > 15 {
        return Err(KernelError { errno: libc::ENODEV, detail: "interface names have 1 to 15 bytes".to_owned() });
    }
    Ok(name)
}

/// Lists all links.
pub fn links(socket: &mut RouteSocket) -> Result<Vec<LinkInfo>, OpError> {
    let read = socket.dump(&RouteNetlinkMessage::GetLink(link_request()), Vec::new, |all, header, body| {
        if header.message_type == libc::RTM_NEWLINK {
            all.extend(LinkInfo::read(body));
        }
    });
    read.map_err(|e| e.context("cannot list the links"))
}

/// A request without the counters, which make up most of a reply.
fn link_request() -> LinkMessage {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    request
}

/// An address as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressInfo {
    /// Interface index.
    pub index: u32,
    /// The address with its prefix length.
    pub address: IpNetwork,
    /// `RT_SCOPE_...`.
    pub scope: AddressScope,
    /// `IFA_F_...`.
    pub flags: AddressFlags,
}

impl AddressInfo {
    /// Decodes the body of an address message.
    pub fn read(body: &[u8]) -> Option<AddressInfo> {
        let header = AddressHeader::parse(body).ok()?;
        let (mut local, mut address) = (None, None);
        let mut flags = AddressFlags::from_bits_retain(u32::from(header.flags.bits()));
        for attribute in raw_attributes(body, IFADDRMSG_LEN) {
            match AddressAttribute::parse(&attribute) {
                // On a point-to-point link IFA_ADDRESS is the other end; IPv6 without a peer has only IFA_ADDRESS.
                Ok(AddressAttribute::Local(ip)) => local = Some(ip),
                Ok(AddressAttribute::Address(ip)) => address = Some(ip),
                Ok(AddressAttribute::Flags(all)) => flags = all,
                Ok(_) => {}
                Err(error) => log_undecoded("address", header.index, attribute.kind(), &error),
            }
        }
        let address = IpNetwork::new(local.or(address)?, header.prefix_len).ok()?;
        Some(AddressInfo { index: header.index, address, scope: header.scope, flags })
    }

    /// Its key as an address of one of our devices: of global scope, or link-local on the bridge or a transit.
    pub fn address_key(&self, device: Device) -> Option<Key> {
        let has_link_local = matches!(device.role, Role::Bridge | Role::Transit);
        let is_relevant = self.is_global() || (has_link_local && self.scope == AddressScope::Link);
        is_relevant.then_some(Key::Address(device, self.address))
    }

    /// Whether it has global scope.
    pub fn is_global(&self) -> bool {
        self.scope == AddressScope::Universe
    }

    /// The flags that matter for source address selection.
    pub fn source_selection_flags(&self) -> AddressFlags {
        self.flags
            & (AddressFlags::Secondary
                | AddressFlags::Deprecated
                | AddressFlags::Tentative
                | AddressFlags::Optimistic
                | AddressFlags::Dadfailed)
    }
}

/// Lists the addresses of all interfaces (index 0), or of one.
pub fn addresses(socket: &mut RouteSocket, index: u32) -> Result<Vec<AddressInfo>, OpError> {
    let mut all = Vec::new();
    for family in Family::ALL {
        let mut request = AddressMessage::default();
        request.header.family = address_family(family);
        request.header.index = index;
        let read = socket.dump(&RouteNetlinkMessage::GetAddress(request), Vec::new, |all, header, body| {
            if header.message_type == libc::RTM_NEWADDR {
                all.extend(AddressInfo::read(body));
            }
        });
        match read {
            Ok(addresses) => all.extend(addresses),
            Err(e) if e.is_unsupported_family() => {}
            Err(e) => return Err(e.context(format!("cannot list the {family} addresses"))),
        }
    }
    Ok(all)
}

/// A route as the kernel reports it, with the attributes that the agent needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteInfo {
    /// Protocol number of its creator.
    pub protocol: RouteProtocol,
    /// Unicast, local, unreachable.
    pub kind: RouteType,
    /// Among routes to one destination, the lowest metric wins.
    pub metric: u32,
    /// The gateway, of the route's own family.
    pub gateway: Option<IpAddr>,
    /// The preferred source.
    pub source: Option<IpAddr>,
    /// Interface index; for a multipath route that of the first gateway.
    pub interface: Option<u32>,
    /// Id of the next-hop object.
    pub nexthop: Option<u32>,
}

impl RouteInfo {
    /// Decodes the body of a route message.
    pub fn read(body: &[u8]) -> Option<RouteInfo> {
        let header = RouteHeader::parse(body).ok()?;
        let (family, kind) = (header.address_family, header.kind);
        let mut route =
            RouteInfo { protocol: header.protocol, kind, metric: 0, gateway: None, source: None, interface: None, nexthop: None };
        for attribute in raw_attributes(body, RTMSG_LEN) {
            match RouteAttribute::parse_with_param(&attribute, (family, kind, RouteLwEnCapType::None)) {
                Ok(RouteAttribute::Priority(metric)) => route.metric = metric,
                Ok(RouteAttribute::Gateway(RouteAddress::Inet(ip))) => route.gateway = Some(ip.into()),
                Ok(RouteAttribute::Gateway(RouteAddress::Inet6(ip))) => route.gateway = Some(ip.into()),
                Ok(RouteAttribute::PrefSource(RouteAddress::Inet(ip))) => route.source = Some(ip.into()),
                Ok(RouteAttribute::PrefSource(RouteAddress::Inet6(ip))) => route.source = Some(ip.into()),
                Ok(RouteAttribute::Oif(index)) => route.interface = Some(index),
                Ok(RouteAttribute::MultiPath(hops)) => route.interface = hops.first().map(|hop| hop.interface_index),
                Ok(RouteAttribute::NhId(id)) => route.nexthop = Some(id),
                Ok(_) => {}
                Err(error) => log_undecoded("route", 0, attribute.kind(), &error),
            }
        }
        Some(route)
    }

    /// Decodes a default route of the main table. Returns `None` for any other route without decoding it: there may be ten
    /// thousand.
    pub fn read_default(body: &[u8]) -> Option<RouteInfo> {
        RouteInfo::read_main_table(body, 0)
    }

    /// Decodes a route of the main table to that destination; `None` for any other route.
    pub fn read_to(body: &[u8], destination: Cidr) -> Option<RouteInfo> {
        let base = match destination.base() {
            IpAddr::V4(base) => base.octets().to_vec(),
            IpAddr::V6(base) => base.octets().to_vec(),
        };
        // A default route has no destination attribute.
        let to = raw_attributes(body, RTMSG_LEN).find(|attribute| attribute.kind() == libc::RTA_DST);
        let destination_matches = to.map_or(destination.length() == 0, |to| to.value() == base);
        RouteInfo::read_main_table(body, destination.length()).filter(|_| destination_matches)
    }

    fn read_main_table(body: &[u8], length: u8) -> Option<RouteInfo> {
        let header = RouteHeader::parse(body).ok()?;
        let is_match = header.destination_prefix_length == length
            && header.table == RouteHeader::RT_TABLE_MAIN
            && header.kind == RouteType::Unicast;
        if is_match { RouteInfo::read(body) } else { None }
    }
}

/// A request for the route to an address.
pub fn route_request(address: IpAddr) -> RouteNetlinkMessage {
    let family = Family::of(address);
    let mut request = RouteMessage::default();
    request.header.address_family = address_family(family);
    request.header.destination_prefix_length = family.bits();
    request.attributes.push(RouteAttribute::Destination(address.into()));
    RouteNetlinkMessage::GetRoute(request)
}

/// Converts a family to the type of `netlink-packet-route`.
pub fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

pub fn raw_attributes(body: &[u8], skip: usize) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(body.get(skip..).unwrap_or_default()).map_while(Result::ok)
}

fn log_undecoded(what: &str, index: u32, attribute: u16, error: &DecodeError) {
    tracing::debug!(what, index, attribute, %error, "skipping netlink attribute that cannot be decoded");
}

/// Name of a bridge port's state, as `ip` prints it.
pub fn port_state_name(state: BridgePortState) -> &'static str {
    match state {
        BridgePortState::Disabled => "disabled",
        BridgePortState::Listening => "listening",
        BridgePortState::Learning => "learning",
        BridgePortState::Forwarding => "forwarding",
        BridgePortState::Blocking => "blocking",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::Emitable;
    use netlink_packet_route::link::InfoKind;

    fn bytes(message: &impl Emitable) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    fn link() -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = 7;
        link.header.flags = LinkFlags::Up;
        let settings = vec![InfoVxlan::Id(5), InfoVxlan::Port(8472), InfoVxlan::Learning(true), InfoVxlan::Link(2)];
        link.attributes = vec![
            LinkAttribute::IfName("ovx.5".to_owned()),
            LinkAttribute::Mtu(1450),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 9]),
            LinkAttribute::LinkInfo(vec![Info::Kind(InfoKind::Vxlan), Info::Data(InfoData::Vxlan(settings))]),
        ];
        link
    }

    #[test]
    fn undecodable_attributes_are_skipped() {
        let mut body = bytes(&link());
        let valid = LinkInfo::read(&body).expect("a link");
        assert_eq!((valid.index, valid.mtu, valid.up(), valid.kind.as_str()), (7, 1450, true, "vxlan"));
        assert_eq!(valid.vxlan, Some(VxlanInfo { id: 5, port: 8472, local: None, link: 2, learning: true }));
        // An alias that is not UTF-8, an MTU of one byte, an unknown attribute, and a truncated attribute.
        let mut junk = Vec::new();
        junk.extend_from_slice(&[6, 0, 20, 0, 0xff, 0xfe, 0, 0]);
        junk.extend_from_slice(&[5, 0, 4, 0, 1, 0, 0, 0]);
        junk.extend_from_slice(&[8, 0, 0xff, 0x0f, 1, 2, 3, 4]);
        junk.extend_from_slice(&[40, 0, 4, 0]);
        body.extend_from_slice(&junk);
        assert_eq!(LinkInfo::read(&body), Some(valid));
        for end in 0..body.len() {
            let _ = LinkInfo::read(&body[..end]);
            let _ = AddressInfo::read(&body[..end]);
            let _ = RouteInfo::read(&body[..end]);
        }
    }

    #[test]
    fn non_utf8_link_name_is_read_lossily() {
        let mut body = bytes(&LinkMessage::default());
        body.extend_from_slice(&[7, 0, 3, 0, b'a', 0xff, 0, 0]);
        assert_eq!(LinkInfo::read(&body).expect("a link").name, "a\u{fffd}");
    }

    #[test]
    fn flags_attribute_overrides_header_flags() {
        let mut address = AddressMessage::default();
        address.header.prefix_len = 64;
        address.attributes = vec![
            AddressAttribute::Address("fd00::1".parse().expect("an address")),
            AddressAttribute::Flags(AddressFlags::Deprecated | AddressFlags::Noprefixroute),
        ];
        let read = AddressInfo::read(&bytes(&address)).expect("an address");
        assert!(read.source_selection_flags() == AddressFlags::Deprecated && read.is_global());
        assert_eq!(read.address.to_string(), "fd00::1/64");
    }
}
