//! Changes links, addresses and single routes through `rtnetlink`'s handle.
//!
//! One task: the connection's, which moves messages between the handle and its socket. The [`Rtnl`] that started it aborts it
//! when dropped. If the task ends earlier, each later request fails and [`Rtnl::closed`] completes.

use std::io;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoData, InfoVeth, LinkAttribute, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket, TokioSocket};
use rtnetlink::{AddressMessageBuilder, Error, Handle, LinkMessageBuilder, LinkVeth};
use tokio::runtime;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::netns::Netns;
use super::objects::{address_family, check_interface_name};
use super::route_socket::{ANSWER_TIMEOUT, KernelError, ext_ack_message};
use crate::model::{Cidr, Family};
use crate::plan::OpError;

/// A connection to rtnetlink in one network namespace.
#[derive(Debug)]
pub struct Rtnl {
    handle: Handle,
    port_id: u32,
    task: JoinHandle<()>,
    closed: CancellationToken,
}

impl Drop for Rtnl {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Rtnl {
    /// Connects in a network namespace. Must be called inside a tokio runtime with I/O and time enabled.
    pub fn open(netns: &Netns) -> Result<Rtnl, OpError> {
        let runtime = runtime::Handle::try_current().map_err(|e| open_error(io::Error::other(e)))?;
        netns.run_in_place(|| Rtnl::connect(&runtime)).map_err(|e| OpError::from(&e))?.map_err(open_error)
    }

    fn connect(runtime: &runtime::Handle) -> io::Result<Rtnl> {
        let mut listener = TokioSocket::new(NETLINK_ROUTE)?;
        let socket = listener.socket_mut();
        let port_id = socket.bind_auto()?.port_number();
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        let (mut connection, handle, _) = rtnetlink::from_socket(listener);
        // Otherwise a request that waits for its acknowledgement takes the connection's end for success: see `expect_ack`.
        connection.set_forward_ack(true);
        let closed = CancellationToken::new();
        let guard = closed.clone().drop_guard();
        let task = runtime.spawn(async move {
            let _guard = guard;
            connection.await;
        });
        Ok(Rtnl { handle, port_id, task, closed })
    }

    /// The port id that identifies this connection in the kernel's events.
    pub fn port_id(&self) -> u32 {
        self.port_id
    }

    /// Completes when the connection ends; nothing can be changed afterwards.
    pub fn closed(&self) -> WaitForCancellationFutureOwned {
        self.closed.clone().cancelled_owned()
    }

    /// Ends the connection, as a socket failure would.
    #[cfg(test)]
    pub fn abort(&self) {
        self.task.abort();
    }

    /// The interface index of the link with that name.
    pub async fn link_index(&self, name: &str) -> Result<u32, KernelError> {
        use futures_util::TryStreamExt;
        let mut replies = std::pin::pin!(self.handle.link().get().match_name(check_interface_name(name)?).execute());
        match with_timeout(replies.try_next()).await? {
            Ok(Some(link)) => Ok(link.header.index),
            Ok(None) => Err(connection_closed()),
            Err(error) => Err(error.into()),
        }
    }

    /// Creates a link. Fails with `EEXIST` if the name is taken.
    pub async fn add_link(&self, link: LinkMessage) -> Result<(), KernelError> {
        expect_ack(self.handle.link().add(link).execute()).await
    }

    /// Changes the link whose index is in the message.
    pub async fn change_link(&self, link: LinkMessage) -> Result<(), KernelError> {
        expect_ack(self.handle.link().change(link).execute()).await
    }

    /// Removes a link.
    pub async fn delete_link(&self, index: u32) -> Result<(), KernelError> {
        expect_ack(self.handle.link().del(index).execute()).await
    }

    /// Adds an address, without duplicate address detection. Succeeds if the address exists already.
    pub async fn add_address(&self, index: u32, address: IpNetwork) -> Result<(), KernelError> {
        let mut request = self.handle.address().add(index, address.ip(), address.prefix()).replace();
        *request.message_mut() = new_address(index, address);
        expect_ack(request.execute()).await
    }

    /// Removes an address.
    pub async fn delete_address(&self, index: u32, address: IpNetwork) -> Result<(), KernelError> {
        expect_ack(self.handle.address().del(address_message(index, address)).execute()).await
    }

    /// Adds a route, or replaces the one to that destination.
    pub async fn replace_route(&self, route: RouteMessage) -> Result<(), KernelError> {
        expect_ack(self.handle.route().add(route).replace().execute()).await
    }
}

/// Limits a request to `ANSWER_TIMEOUT`.
async fn with_timeout<T>(request: impl Future<Output = T>) -> Result<T, KernelError> {
    let timed_out = |_| KernelError { errno: libc::ETIMEDOUT, detail: "no readable reply".to_owned() };
    timeout(ANSWER_TIMEOUT, request).await.map_err(timed_out)
}

/// Awaits the acknowledgement of a request. `rtnetlink` delivers it as an error without a number; without one, the connection
/// ended first.
async fn expect_ack(request: impl Future<Output = Result<(), Error>>) -> Result<(), KernelError> {
    match with_timeout(request).await? {
        Err(Error::NetlinkError(message)) if message.code.is_none() => Ok(()),
        Err(error) => Err(error.into()),
        Ok(()) => Err(connection_closed()),
    }
}

fn connection_closed() -> KernelError {
    KernelError { errno: libc::EPIPE, detail: "the rtnetlink connection has ended: restart the agent".to_owned() }
}

fn open_error(error: io::Error) -> OpError {
    KernelError::from(error).context("cannot open an rtnetlink connection")
}

impl From<Error> for KernelError {
    fn from(error: Error) -> KernelError {
        match error {
            Error::NetlinkError(message) => {
                KernelError { errno: message.raw_code().saturating_neg(), detail: ext_ack_message(&message.header) }
            }
            Error::RequestFailed => connection_closed(),
            other => KernelError { errno: libc::EPROTO, detail: other.to_string() },
        }
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
