//! Requests about links, addresses and single routes: `rtnetlink`'s builders over the blocking socket.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoData, InfoVeth, LinkAttribute, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::{AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, LinkVeth};

use super::objects::address_family;
use super::route_socket::{KernelError, RouteSocket};
use crate::model::{Cidr, Family};

impl RouteSocket {
    /// Creates a link. Fails with `EEXIST` if the name is taken.
    pub fn add_link(&mut self, link: LinkMessage) -> Result<(), KernelError> {
        self.create(&RouteNetlinkMessage::NewLink(link))
    }

    /// Changes the link whose index is in the message.
    pub fn change_link(&mut self, link: LinkMessage) -> Result<(), KernelError> {
        self.change(&RouteNetlinkMessage::NewLink(link), 0)
    }

    /// Removes a link. The kernel takes some 15 ms: see `link::delete_links`.
    pub fn delete_link(&mut self, index: u32) -> Result<(), KernelError> {
        self.change(&RouteNetlinkMessage::DelLink(LinkUnspec::new_with_index(index).build()), 0)
    }

    /// Adds an address, without duplicate address detection. Succeeds if the address exists already.
    pub fn add_address(&mut self, index: u32, address: IpNetwork) -> Result<(), KernelError> {
        self.change(&RouteNetlinkMessage::NewAddress(new_address(index, address)), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Removes an address.
    pub fn delete_address(&mut self, index: u32, address: IpNetwork) -> Result<(), KernelError> {
        self.change(&RouteNetlinkMessage::DelAddress(address_message(index, address)), 0)
    }

    /// Adds a route, or replaces the one to that destination.
    pub fn replace_route(&mut self, route: RouteMessage) -> Result<(), KernelError> {
        self.change(&RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_REPLACE)
    }
}

/// The message that adds an address, without duplicate address detection.
pub fn new_address(index: u32, address: IpNetwork) -> AddressMessage {
    let mut message = address_message(index, address);
    if address.is_ipv6() {
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

/// The message for an address. For IPv4 `rtnetlink`'s builder adds a broadcast address, which the overlay does not use.
fn address_message(index: u32, address: IpNetwork) -> AddressMessage {
    let mut message = match address {
        IpNetwork::V4(a) => AddressMessageBuilder::<std::net::Ipv4Addr>::new().index(index).address(a.ip(), a.prefix()).build(),
        IpNetwork::V6(a) => AddressMessageBuilder::<std::net::Ipv6Addr>::new().index(index).address(a.ip(), a.prefix()).build(),
    };
    message.attributes.retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
    message
}

/// Builds a veth pair from this end's name and the other end's message. The caller may add attributes to this end.
///
/// Each end has one queue; by default the kernel uses no more. It would create one for each processor (`veth_get_num_queues` in
/// drivers/net/veth.c), which takes a fifth of the time that a pair takes here, and more with more processors.
pub fn veth(name: &str, peer: LinkMessage) -> LinkMessageBuilder<LinkVeth> {
    // The builder sets only the other end's name; the full message replaces it.
    let one_queue = [LinkAttribute::NumTxQueues(1), LinkAttribute::NumRxQueues(1)];
    let mut peer = peer;
    peer.attributes.extend(one_queue.clone());
    let pair = LinkMessageBuilder::<LinkVeth>::new(name, "").set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
    one_queue.into_iter().fold(pair, LinkMessageBuilder::append_extra_attribute)
}

/// The attribute that keeps IPv6 from creating a link-local address, and with it router solicitations and multicast reports.
pub fn no_link_local() -> LinkAttribute {
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)])])
}

/// The attribute that sets an interface's `arp_notify`. In a request that is sent anyway it costs less than the sysctl's file.
pub fn arp_notify() -> LinkAttribute {
    let mut settings = InetDevConf::default();
    settings.arp_notify = 1;
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(settings)])])
}

/// Builds a route of the main table; without a destination it is the default route. The family is the gateway's or the
/// destination's, or IPv4 without either.
pub fn route(destination: Option<Cidr>, via: Option<IpAddr>, device: Option<u32>, protocol: RouteProtocol) -> RouteMessage {
    let family = via.map(Family::of).or(destination.map(Cidr::family)).unwrap_or(Family::V4);
    let mut route = RouteMessage::default();
    route.header.address_family = address_family(family);
    route.header.destination_prefix_length = destination.map_or(0, Cidr::length);
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = protocol;
    route.header.kind = RouteType::Unicast;
    let on_link = via.is_none() && family == Family::V4;
    route.header.scope = if on_link { RouteScope::Link } else { RouteScope::Universe };
    let destination = destination.filter(|d| d.length() > 0).map(|d| RouteAttribute::Destination(d.base().into()));
    let via = via.map(|via| RouteAttribute::Gateway(RouteAddress::from(via)));
    route.attributes = [destination, via, device.map(RouteAttribute::Oif)].into_iter().flatten().collect();
    route
}
