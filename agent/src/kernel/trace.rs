//! Kernel queries for a packet trace in one network namespace.
//!
//! Queries return the route of a packet and the verdict of the rules. They also return the next hop, neighbour and FDB entry of a
//! route. Live captures report the interfaces and rules that packets of a flow pass.
//!
//! Queries change nothing. A live trace creates one table that marks packets ([`TraceMonitor`]); it disappears with its socket.
//! All calls block. They apply to the network namespace that was given, or to the calling thread's.

mod capture;
mod neighbours;
mod tables;

use std::net::IpAddr;

use netlink_packet_core::ParseableParametrized;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoBridgePort, InfoPortData, LinkAttribute, LinkInfo as Info, LinkMessage, State};
use serde::{Deserialize, Serialize};

use super::cache::LINK_GROUP;
use super::netns::Netns;
use super::nft::{Nft, NftState};
use super::nlmsg::{Message, address, attributes, mac, u16_at, u32_at};
use super::objects::{self, LinkInfo, raw_attributes};
use super::peer_messages::{AF_BRIDGE, EntryQuery, KernelEntry, NDMSG_LEN, NHMSG_LEN, family_of};
use super::route_socket::{Request, RouteSocket};
use super::uapi::*;
use crate::model::{Cidr, Device, Family, Mac, PerFamily, Role};
use crate::plan::OpError;
use crate::plan::ruleset::{Expr, Field, OVERLAY_CHAIN, Table};
use crate::plan::state::PROTOCOL;

pub use super::nft::{
    EvalResult, PossibleTranslation, RuleRef, RulesetSnapshot, TraceEvent, TraceMonitor, TraceRead, Translation, legacy_tables,
};
pub use super::packet;
pub use capture::{Capture, CaptureFilter, CapturedPacket};
pub use neighbours::Neighbour;
pub use tables::{PolicyRule, RouteEntry};

/// Length of `struct ifinfomsg`.
const IFINFOMSG_LEN: usize = 16;
/// Length of `struct rtmsg`.
const RTMSG_LEN: usize = 12;
/// `linux/rtnetlink.h`: return the matching route entry instead of the lookup result.
const RTM_F_FIB_MATCH: u32 = 0x2000;
/// `linux/if_link.h`.
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
/// `linux/rtnetlink.h`.
const RTA_SRC: u16 = 2;
const RTA_IIF: u16 = 3;
const RTA_PREFSRC: u16 = 7;

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// `vxlan`, `bridge`, `veth`; empty for hardware.
    pub kind: String,
    /// Administratively up.
    pub up: bool,
    /// Whether it has a carrier, according to the driver.
    pub running: bool,
    /// MAC.
    pub mac: Option<Mac>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Interface group; 0 by default.
    #[serde(default)]
    pub group: u32,
    /// Interface index of its bridge.
    pub master: Option<u32>,
    /// Interface index of a veth pair's other end, or of the device below.
    pub peer: Option<u32>,
    /// The kernel's number for the other end's network namespace, if that is another one.
    #[serde(default)]
    pub peer_netns: Option<u32>,
    /// Whether an XDP program handles its packets before the kernel does.
    #[serde(default)]
    pub xdp: bool,
    /// The bridge port state: `forwarding`, `disabled`, ...
    pub port_state: Option<String>,
    /// VXLAN settings: VNI, UDP port, local address and underlay interface.
    pub vxlan: Option<Vxlan>,
}

/// A VXLAN device's settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vxlan {
    /// VNI.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Source of outer packets.
    pub local: Option<IpAddr>,
    /// Underlay interface index; 0 if none.
    pub link: u32,
}

/// The result of a route lookup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The matching entry; absent if the kernel does not report it.
    pub destination: Option<Cidr>,
    /// `unicast`, `local`, `blackhole`, ...
    pub kind: String,
    /// The routing protocol number (`RTPROT_*`), which names its creator.
    pub protocol: u8,
    /// Interface index.
    pub interface: Option<u32>,
    /// The gateway.
    pub gateway: Option<IpAddr>,
    /// The preferred source address.
    pub source: Option<IpAddr>,
    /// Id of the next-hop object.
    pub nexthop: Option<u32>,
}

/// A next-hop object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nexthop {
    /// Its id.
    pub id: u32,
    /// Interface index.
    pub interface: Option<u32>,
    /// The gateway.
    pub gateway: Option<IpAddr>,
    /// Drops packets (`blackhole`).
    pub blackhole: bool,
}

/// The overlay's address ranges, as the rules of the host define them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OverlayRanges {
    /// The first and last leased address per family. Empty if the table `inet overlayd` does not exist.
    pub ranges: PerFamily<(IpAddr, IpAddr)>,
}

/// The parameters of a route lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteLookup {
    /// Destination address.
    pub destination: IpAddr,
    /// Source address.
    pub source: Option<IpAddr>,
    /// Index of the input interface; `None` for packets of the host itself.
    pub input: Option<u32>,
}

struct RouteRequest(RouteLookup, bool);

impl Request for RouteRequest {
    fn write(&self, buffer: &mut Vec<u8>, flags: u16, sequence: u32) {
        let RouteRequest(lookup, fib_match) = self;
        let family = Family::of(lookup.destination);
        let number = if family == Family::V4 { libc::AF_INET } else { libc::AF_INET6 };
        let source_length = if lookup.source.is_some() { family.bits() } else { 0 };
        let route_flags: u32 = if *fib_match { RTM_F_FIB_MATCH } else { 0 };
        let mut m = Message::begin(buffer, libc::RTM_GETROUTE, flags, sequence);
        m.body(&[u8::try_from(number).unwrap_or_default(), family.bits(), source_length, 0, 0, 0, 0, 0]);
        m.body(&route_flags.to_ne_bytes()).put_address(RTA_DST, lookup.destination);
        if let Some(source) = lookup.source {
            m.put_address(RTA_SRC, source);
        }
        if let Some(input) = lookup.input {
            m.put_u32(RTA_IIF, input);
        }
    }
}

/// A connection for kernel queries.
pub struct KernelQuery {
    netns: Netns,
    socket: RouteSocket,
}

impl KernelQuery {
    /// Opens the calling thread's namespace.
    ///
    /// # Errors
    /// No file descriptors left, or no netlink.
    pub fn open() -> Result<KernelQuery, OpError> {
        KernelQuery::open_in(&Netns::current().map_err(|e| OpError::from(&e))?)
    }

    /// Opens a namespace.
    ///
    /// # Errors
    /// As [`KernelQuery::open`], or the namespace cannot be entered.
    pub fn open_in(netns: &Netns) -> Result<KernelQuery, OpError> {
        Ok(KernelQuery { netns: netns.clone(), socket: netns.route_socket()? })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn links(&mut self) -> Result<Vec<Link>, OpError> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let read = self.socket.dump(&request, Vec::new, |all, header, body| {
            if header.message_type == libc::RTM_NEWLINK {
                all.extend(read_link(body));
            }
        });
        read.map_err(|e| e.context("cannot list the links"))
    }

    /// The addresses of an interface.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn addresses(&mut self, interface: u32) -> Result<Vec<IpAddr>, OpError> {
        let all = objects::addresses(&mut self.socket, interface)?;
        Ok(all.into_iter().filter(|a| interface == 0 || a.index == interface).map(|a| a.address.ip()).collect())
    }

    /// Looks up the route of a packet. The inner error is the kernel's reason for no route.
    ///
    /// # Errors
    /// The query itself failed.
    pub fn route(&mut self, lookup: RouteLookup) -> Result<Result<Route, String>, OpError> {
        let reply = self.socket.get(&RouteRequest(lookup, false), read_route);
        let mut route = match reply {
            Ok(route) => route,
            Err(error) if error.errno == libc::EPERM => {
                return Err(error.context(format!("cannot look up the route to {}", lookup.destination)));
            }
            Err(error) => {
                let reason = std::io::Error::from_raw_os_error(error.errno).to_string();
                return Ok(Err(reason.split(" (os error").next().unwrap_or(&reason).to_owned()));
            }
        };
        // A plain lookup does not name the matching entry, so ask for it.
        if let Ok(entry) = self.socket.get(&RouteRequest(lookup, true), read_route) {
            route.destination = entry.destination;
            route.nexthop = entry.nexthop;
            route.protocol = entry.protocol;
        } else {
            route.destination = None;
        }
        match route.kind.as_str() {
            "unicast" | "local" => Ok(Ok(route)),
            // IPv6 returns such a route; IPv4 returns an error.
            kind => Ok(Err(format!("the route is {kind}"))),
        }
    }

    /// Our unreachable route that covers an address; `None` if absent.
    pub fn unreachable_route(&mut self, destination_address: IpAddr) -> Option<Cidr> {
        let own_routes = EntryQuery::Routes(Family::of(destination_address), PROTOCOL);
        let read = self.socket.dump(
            &own_routes,
            || None,
            |found, header, body| {
                if let Some(KernelEntry::Unreachable { destination, protocol: PROTOCOL, unreachable: true }) =
                    KernelEntry::read(header, body)
                    && destination.contains(destination_address)
                {
                    *found = Some(destination);
                }
            },
        );
        read.ok().flatten()
    }

    /// A next-hop object by id; `None` if absent.
    pub fn nexthop(&mut self, id: u32) -> Option<Nexthop> {
        self.socket.get(&EntryQuery::Nexthop(id), read_nexthop).ok()
    }

    /// The next-hop objects with this gateway.
    pub fn nexthops_to(&mut self, gateway: IpAddr) -> Vec<Nexthop> {
        let read = self.socket.dump(&EntryQuery::Nexthops, Vec::new, |all: &mut Vec<Nexthop>, header, body| {
            if header.message_type == RTM_NEWNEXTHOP {
                all.extend(read_nexthop(body).filter(|hop| hop.gateway == Some(gateway)));
            }
        });
        read.unwrap_or_default()
    }

    /// The overlay's address ranges, from the table `inet overlayd`.
    ///
    /// # Errors
    /// No permission, or no nf_tables.
    pub fn overlay_ranges(&mut self) -> Result<OverlayRanges, OpError> {
        let open = self.netns.run_in_place(Nft::open).map_err(|e| OpError::from(&e))?;
        let state: NftState = open?.dump()?;
        let mut overlay = OverlayRanges::default();
        let chains = state.ruleset(Table::Inet).map(|ruleset| ruleset.chains.as_slice()).unwrap_or_default();
        for rule in chains.iter().filter(|chain| chain.name == OVERLAY_CHAIN).flat_map(|chain| &chain.rules) {
            if let [Expr::Range { field: Field::Source(family), first, last, negate: false }, Expr::Accept] =
                rule.exprs.as_slice()
            {
                *overlay.ranges.slot(*family) = Some((*first, *last));
            }
        }
        Ok(overlay)
    }
}

impl Link {
    /// The link as one of our devices; `None` if its name is not ours.
    pub fn device(&self) -> Option<Device> {
        Device::from_name(&self.name)
    }

    /// Whether it has the group of the agent's links.
    pub fn is_marked(&self) -> bool {
        self.group == LINK_GROUP
    }

    /// Whether it is the VXLAN device of a family.
    pub fn is_tunnel(&self, family: Family) -> bool {
        self.device().is_some_and(|device| device.role == Role::Vxlan(family))
    }
}

fn read_link(body: &[u8]) -> Option<Link> {
    let info = LinkInfo::read(body)?;
    let (mut running, mut port_state, mut peer_netns, mut xdp) = (info.up(), None, None, false);
    for attribute in raw_attributes(body, IFINFOMSG_LEN) {
        match attribute.kind() {
            IFLA_LINK_NETNSID => peer_netns = u32_at(attribute.value(), 0),
            IFLA_XDP => {
                xdp = attributes(attribute.value(), 0).any(|(kind, value)| kind == IFLA_XDP_ATTACHED && value != [0]);
            }
            _ => {}
        }
        match LinkAttribute::parse_with_param(&attribute, netlink_packet_route::AddressFamily::Unspec) {
            // Some drivers do not report a state. UNKNOWN counts as up, as in the kernel.
            Ok(LinkAttribute::OperState(state)) => {
                running = !matches!(state, State::Down | State::LowerLayerDown | State::NotPresent);
            }
            Ok(LinkAttribute::LinkInfo(infos)) => {
                for info in infos {
                    if let Info::PortData(InfoPortData::BridgePort(settings)) = info {
                        port_state = settings.iter().find_map(|setting| match setting {
                            InfoBridgePort::State(state) => Some(objects::port_state_name(*state)),
                            _ => None,
                        });
                    }
                }
            }
            _ => {}
        }
    }
    let up = info.up();
    Some(Link {
        index: info.index,
        name: info.name,
        kind: info.kind,
        up,
        running,
        mac: info.mac,
        mtu: info.mtu,
        group: info.group,
        master: info.master,
        peer: info.peer,
        peer_netns,
        xdp,
        port_state: port_state.map(str::to_owned),
        vxlan: info.vxlan.map(|v| Vxlan { vni: v.id, port: v.port, local: v.local, link: v.link }),
    })
}

fn read_route(body: &[u8]) -> Option<Route> {
    let family = family_of(*body.first()?)?;
    let (length, protocol, kind) = (*body.get(1)?, *body.get(5)?, *body.get(7)?);
    let mut route = Route {
        destination: None,
        kind: route_type_name(kind).to_owned(),
        protocol,
        interface: None,
        gateway: None,
        source: None,
        nexthop: None,
    };
    let mut base = family.unspecified();
    for (kind, value) in attributes(body, RTMSG_LEN) {
        match kind {
            RTA_DST => base = address(value)?,
            RTA_OIF => route.interface = u32_at(value, 0),
            RTA_GATEWAY => route.gateway = address(value),
            RTA_PREFSRC => route.source = address(value),
            RTA_NH_ID => route.nexthop = u32_at(value, 0),
            _ => {}
        }
    }
    route.destination = Cidr::containing(base, length);
    Some(route)
}

fn read_nexthop(body: &[u8]) -> Option<Nexthop> {
    const NHA_BLACKHOLE: u16 = 4;
    let mut hop = Nexthop { id: 0, interface: None, gateway: None, blackhole: false };
    for (kind, value) in attributes(body, NHMSG_LEN) {
        match kind {
            NHA_ID => hop.id = u32_at(value, 0)?,
            NHA_BLACKHOLE => hop.blackhole = true,
            NHA_OIF => hop.interface = u32_at(value, 0),
            NHA_GATEWAY => hop.gateway = address(value),
            _ => {}
        }
    }
    Some(hop)
}

/// `RTN_...` in `linux/rtnetlink.h`, with the names of `ip route`.
fn route_type_name(kind: u8) -> &'static str {
    match kind {
        1 => "unicast",
        2 => "local",
        3 => "broadcast",
        5 => "multicast",
        6 => "blackhole",
        7 => "unreachable",
        8 => "prohibit",
        _ => "of unknown type",
    }
}
