//! The rtnetlink requests for links, addresses and single routes, over any [`RouteSocket`]: what [`super::setup`], the agent's links and the
//! containers' attachments share.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnetwork::IpNetwork;

use super::message::{Message, attributes, flag, mac, text, u16_at, u32_at};
use super::socket::{Refusal, RouteSocket};
use super::uapi::*;
use crate::model::{Cidr, Family, Mac};

/// Length of `struct ifinfomsg`.
pub const IFINFOMSG: usize = 16;
/// Length of `struct ifaddrmsg`.
pub const IFADDRMSG: usize = 8;
/// Administratively up; `linux/if.h`.
pub const IFF_UP: u32 = 1;
/// The loopback device; `linux/if.h`.
pub const IFF_LOOPBACK: u32 = 8;
/// Flags of a request that makes something new.
pub const CREATE: u16 = flag(libc::NLM_F_CREATE) | flag(libc::NLM_F_EXCL);
/// Flags of a request that makes or replaces.
pub const REPLACE: u16 = flag(libc::NLM_F_CREATE) | flag(libc::NLM_F_REPLACE);

/// The kernel's number of a family.
#[expect(clippy::cast_possible_truncation, reason = "AF_INET is 2 and AF_INET6 is 10")]
pub const fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

/// The family of the kernel's number.
pub fn family_of(number: u8) -> Option<Family> {
    Family::ALL.into_iter().find(|f| family_number(*f) == number)
}

/// What the kernel tells about a link, as far as it is needed here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkInfo {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// `IFF_...`.
    pub flags: u32,
    /// Which of the flags the message announces as changed.
    pub changed: u32,
    /// `vxlan`, `bridge`, `veth`; empty for hardware.
    pub kind: String,
    /// `ifalias`.
    pub alias: String,
    /// MAC.
    pub mac: Option<Mac>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Interface group; 0 unless one was given.
    pub group: u32,
    /// Interface index of the bridge.
    pub master: Option<u32>,
    /// Interface index of a veth pair's other end.
    pub peer: Option<u32>,
    /// The VXLAN settings.
    pub vxlan: Option<VxlanInfo>,
}

/// A VXLAN device's settings as the kernel tells them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VxlanInfo {
    /// VNI.
    pub id: u32,
    /// UDP destination port.
    pub port: u16,
    /// Source of outer packets.
    pub local: Option<IpAddr>,
    /// Underlay interface index; 0 where there is none.
    pub link: u32,
    /// Whether it learns from traffic.
    pub learning: bool,
}

impl LinkInfo {
    /// Reads a link message's body; `None` where it is none, or one of a bridge about its port (family `AF_BRIDGE`), which says less.
    pub fn read(body: &[u8]) -> Option<LinkInfo> {
        if *body.first()? != 0 {
            return None;
        }
        let mut link =
            LinkInfo { index: u32_at(body, 4)?, flags: u32_at(body, 8)?, changed: u32_at(body, 12)?, ..LinkInfo::default() };
        for (kind, value) in attributes(body, IFINFOMSG) {
            match kind {
                IFLA_IFNAME => link.name = text(value),
                IFLA_IFALIAS => link.alias = text(value),
                IFLA_ADDRESS => link.mac = mac(value),
                IFLA_MTU => link.mtu = u32_at(value, 0)?,
                IFLA_GROUP => link.group = u32_at(value, 0)?,
                IFLA_MASTER => link.master = u32_at(value, 0),
                IFLA_LINK => link.peer = u32_at(value, 0),
                IFLA_LINKINFO => link.read_info(value),
                _ => {}
            }
        }
        (!link.name.is_empty()).then_some(link)
    }

    fn read_info(&mut self, value: &[u8]) {
        let mut data: &[u8] = &[];
        for (kind, value) in attributes(value, 0) {
            match kind {
                IFLA_INFO_KIND => self.kind = text(value),
                IFLA_INFO_DATA => data = value,
                _ => {}
            }
        }
        if self.kind == "vxlan" {
            let mut vxlan = VxlanInfo::default();
            for (kind, value) in attributes(data, 0) {
                match kind {
                    IFLA_VXLAN_ID => vxlan.id = u32_at(value, 0).unwrap_or_default(),
                    IFLA_VXLAN_LINK => vxlan.link = u32_at(value, 0).unwrap_or_default(),
                    IFLA_VXLAN_LOCAL | IFLA_VXLAN_LOCAL6 => vxlan.local = super::message::address(value),
                    IFLA_VXLAN_LEARNING => vxlan.learning = value.first() == Some(&1),
                    IFLA_VXLAN_PORT => vxlan.port = u16_at(value, 0).map_or(0, u16::from_be),
                    _ => {}
                }
            }
            self.vxlan = Some(vxlan);
        }
    }

    /// Administratively up.
    pub fn up(&self) -> bool {
        self.flags & IFF_UP != 0
    }
}

/// Writes the body of a link message.
pub fn link_body(m: &mut Message<'_>, index: u32, flags: u32, mask: u32) {
    m.body(&[0; 4]).body(&index.to_ne_bytes()).body(&flags.to_ne_bytes()).body(&mask.to_ne_bytes());
}

/// The link of that name.
pub fn link(socket: &mut RouteSocket, name: &str) -> Result<LinkInfo, Refusal> {
    if name.is_empty() || name.len() > 15 {
        return Err(Refusal { errno: libc::ENODEV, detail: "interface names have 1 to 15 bytes".to_owned() });
    }
    let build = |m: &mut Message<'_>| {
        link_body(m, 0, 0, 0);
        m.put_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS).put_text(IFLA_IFNAME, name);
    };
    socket.get(libc::RTM_GETLINK, build, LinkInfo::read)
}

/// All links.
pub fn links(socket: &mut RouteSocket) -> Result<Vec<LinkInfo>, Refusal> {
    let build = |m: &mut Message<'_>| {
        link_body(m, 0, 0, 0);
        m.put_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    };
    socket.dump(libc::RTM_GETLINK, build, Vec::new, |all, header, body| {
        if header.kind == libc::RTM_NEWLINK {
            all.extend(LinkInfo::read(body));
        }
    })
}

/// Makes a link of a kind; `rest` writes attributes of the link, `data` those of the kind. Fails with `EEXIST` where the name is taken.
pub fn link_add(
    socket: &mut RouteSocket,
    name: &str,
    kind: &str,
    rest: impl FnOnce(&mut Message<'_>),
    data: impl FnOnce(&mut Message<'_>),
) -> Result<(), Refusal> {
    socket.request(libc::RTM_NEWLINK, CREATE, |m| {
        link_body(m, 0, 0, 0);
        m.put_text(IFLA_IFNAME, name);
        rest(m);
        m.nest(IFLA_LINKINFO, |m| {
            m.put_text(IFLA_INFO_KIND, kind).nest(IFLA_INFO_DATA, data);
        });
    })
}

/// The other end of a veth pair, in the data of `link_add`: its name, where it is made, and more attributes of it.
pub fn veth_peer(m: &mut Message<'_>, name: &str, netns: BorrowedFd<'_>, rest: impl FnOnce(&mut Message<'_>)) {
    m.nest(VETH_INFO_PEER, |m| {
        link_body(m, 0, 0, 0);
        m.put_text(IFLA_IFNAME, name).put_u32(IFLA_NET_NS_FD, netns.as_raw_fd().cast_unsigned());
        rest(m);
    });
}

/// Changes a link: flags under a mask, and attributes.
pub fn link_set(
    socket: &mut RouteSocket,
    index: u32,
    flags: u32,
    mask: u32,
    rest: impl FnOnce(&mut Message<'_>),
) -> Result<(), Refusal> {
    socket.request(libc::RTM_SETLINK, 0, |m| {
        link_body(m, index, flags, mask);
        rest(m);
    })
}

/// The attribute that keeps IPv6 from making a link-local address, and with it router solicitations and multicast reports.
pub fn no_link_local(m: &mut Message<'_>) {
    m.nest(IFLA_AF_SPEC, |m| {
        m.nest(u16::from(family_number(Family::V6)), |m| {
            m.put(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
        });
    });
}

/// Removes a link.
pub fn link_delete(socket: &mut RouteSocket, index: u32) -> Result<(), Refusal> {
    socket.request(libc::RTM_DELLINK, 0, |m| link_body(m, index, 0, 0))
}

/// Adds an address, without duplicate address detection; that it is there already is success.
pub fn address_add(socket: &mut RouteSocket, index: u32, address: IpNetwork) -> Result<(), Refusal> {
    socket.request(libc::RTM_NEWADDR, REPLACE, |m| {
        address_body(m, index, address);
        if address.is_ipv6() {
            m.put_u32(IFA_FLAGS, IFA_F_NODAD);
        }
    })
}

/// Removes an address.
pub fn address_delete(socket: &mut RouteSocket, index: u32, address: IpNetwork) -> Result<(), Refusal> {
    socket.request(libc::RTM_DELADDR, 0, |m| address_body(m, index, address))
}

fn address_body(m: &mut Message<'_>, index: u32, address: IpNetwork) {
    m.body(&[family_number(Family::of(address.ip())), address.prefix(), 0, RT_SCOPE_UNIVERSE]).body(&index.to_ne_bytes());
    m.put_address(IFA_LOCAL, address.ip()).put_address(IFA_ADDRESS, address.ip());
}

/// Adds a route to the main table; replaces one to the same destination. The default route where there is no destination; the family is
/// the gateway's or the destination's, IPv4 without either.
pub fn route_add(
    socket: &mut RouteSocket,
    destination: Option<Cidr>,
    via: Option<IpAddr>,
    device: Option<u32>,
) -> Result<(), Refusal> {
    let family = via.map(Family::of).or(destination.map(Cidr::family)).unwrap_or(Family::V4);
    socket.request(libc::RTM_NEWROUTE, REPLACE, |m| {
        let length = destination.map_or(0, Cidr::length);
        let scope = if via.is_none() && family == Family::V4 { RT_SCOPE_LINK } else { RT_SCOPE_UNIVERSE };
        m.body(&[family_number(family), length, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST]).body(&[0; 4]);
        if let Some(destination) = destination.filter(|d| d.length() > 0) {
            m.put_address(RTA_DST, destination.base());
        }
        if let Some(via) = via {
            m.put_address(RTA_GATEWAY, via);
        }
        if let Some(device) = device {
            m.put_u32(RTA_OIF, device);
        }
    })
}
