//! Changes of links, addresses and single routes, by `rtnetlink`'s handle.
//!
//! One task: the connection's, which moves messages between the handle and its socket. It belongs to the [`Rtnl`] that started it and is aborted with
//! it; that it ended before is an error of each later request, and wakes [`Rtnl::ended`].

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
    /// Connects in the calling thread's network namespace. Must be called inside a tokio runtime with I/O and time.
    pub fn open() -> Result<Rtnl, OpError> {
        let runtime = runtime::Handle::try_current().map_err(io::Error::other);
        runtime.and_then(|runtime| Rtnl::connect(&runtime)).map_err(open_error)
    }

    /// Connects in another network namespace; under the same condition.
    pub fn open_in(netns: &Netns) -> Result<Rtnl, OpError> {
        let runtime = runtime::Handle::try_current().map_err(|e| open_error(io::Error::other(e)))?;
        let connected = netns.run(|| {
            // The thread that enters the namespace is none of the runtime's.
            let _entered = runtime.enter();
            Rtnl::connect(&runtime)
        });
        connected.map_err(|e| OpError::from(&e))?.map_err(open_error)
    }

    fn connect(runtime: &runtime::Handle) -> io::Result<Rtnl> {
        let mut listener = TokioSocket::new(NETLINK_ROUTE)?;
        let socket = listener.socket_mut();
        let port_id = socket.bind_auto()?.port_number();
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        let (mut connection, handle, _) = rtnetlink::from_socket(listener);
        // Else a connection that ended looks like success to a request that waits for its acknowledgement: see `acknowledged`.
        connection.set_forward_ack(true);
        let closed = CancellationToken::new();
        let guard = closed.clone().drop_guard();
        let task = runtime.spawn(async move {
            let _guard = guard;
            connection.await;
        });
        Ok(Rtnl { handle, port_id, task, closed })
    }

    /// The port id by which the kernel names this connection in events.
    pub fn port_id(&self) -> u32 {
        self.port_id
    }

    /// Comes to its end with the connection: then nothing can be changed any more.
    pub fn closed(&self) -> WaitForCancellationFutureOwned {
        self.closed.clone().cancelled_owned()
    }

    /// Ends the connection, as a failure of its socket would.
    #[cfg(test)]
    pub fn abort(&self) {
        self.task.abort();
    }

    /// The interface index of the link of that name.
    pub async fn link_index(&self, name: &str) -> Result<u32, KernelError> {
        use futures_util::TryStreamExt;
        let mut answers = std::pin::pin!(self.handle.link().get().match_name(check_interface_name(name)?).execute());
        match with_timeout(answers.try_next()).await? {
            Ok(Some(link)) => Ok(link.header.index),
            Ok(None) => Err(connection_closed()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a link. Fails with `EEXIST` where the name is taken.
    pub async fn add_link(&self, link: LinkMessage) -> Result<(), KernelError> {
        expect_ack(self.handle.link().add(link).execute()).await
    }

    /// Changes the link whose index the message has.
    pub async fn change_link(&self, link: LinkMessage) -> Result<(), KernelError> {
        expect_ack(self.handle.link().change(link).execute()).await
    }

    /// Removes a link.
    pub async fn delete_link(&self, index: u32) -> Result<(), KernelError> {
        expect_ack(self.handle.link().del(index).execute()).await
    }

    /// Adds an address, without duplicate address detection; that it is there already is success.
    pub async fn add_address(&self, index: u32, address: IpNetwork) -> Result<(), KernelError> {
        let mut request = self.handle.address().add(index, address.ip(), address.prefix()).replace();
        *request.message_mut() = new_address(index, address);
        expect_ack(request.execute()).await
    }

    /// Removes an address.
    pub async fn delete_address(&self, index: u32, address: IpNetwork) -> Result<(), KernelError> {
        expect_ack(self.handle.address().del(address_message(index, address)).execute()).await
    }

    /// Adds a route, in place of the one to that destination.
    pub async fn replace_route(&self, route: RouteMessage) -> Result<(), KernelError> {
        expect_ack(self.handle.route().add(route).replace().execute()).await
    }
}

/// Gives the request a bound in time.
async fn with_timeout<T>(request: impl Future<Output = T>) -> Result<T, KernelError> {
    let late = |_| KernelError { errno: libc::ETIMEDOUT, detail: "no answer that could be read".to_owned() };
    timeout(ANSWER_TIMEOUT, request).await.map_err(late)
}

/// The outcome of a request that is acknowledged. The acknowledgement itself is handed on as an error without a number; where nothing came, the
/// connection ended before.
async fn expect_ack(request: impl Future<Output = Result<(), Error>>) -> Result<(), KernelError> {
    match with_timeout(request).await? {
        Err(Error::NetlinkError(answer)) if answer.code.is_none() => Ok(()),
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
            Error::NetlinkError(answer) => {
                KernelError { errno: answer.raw_code().saturating_neg(), detail: ext_ack_message(&answer.header) }
            }
            Error::RequestFailed => connection_closed(),
            other => KernelError { errno: libc::EPROTO, detail: other.to_string() },
        }
    }
}

/// An address to be added, without duplicate address detection.
pub fn new_address(index: u32, address: IpNetwork) -> AddressMessage {
    let mut message = address_message(index, address);
    if address.is_ipv6() {
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

/// `rtnetlink`'s builders add a broadcast address to IPv4's, of which the overlay has none.
fn address_message(index: u32, address: IpNetwork) -> AddressMessage {
    let mut message = match address {
        IpNetwork::V4(a) => AddressMessageBuilder::<std::net::Ipv4Addr>::new().index(index).address(a.ip(), a.prefix()).build(),
        IpNetwork::V6(a) => AddressMessageBuilder::<std::net::Ipv6Addr>::new().index(index).address(a.ip(), a.prefix()).build(),
    };
    message.attributes.retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
    message
}

/// A veth pair: this end's name, the other end as it is to be. More can be said of this end before it is built.
///
/// Each end has one queue, as many as the kernel uses of them unless told otherwise: one for each processor is what it would make (`veth_get_num_queues`
/// in drivers/net/veth.c), at the cost of a fifth of the time that a pair takes here, and more with more processors.
pub fn veth(name: &str, peer: LinkMessage) -> LinkMessageBuilder<LinkVeth> {
    // The builder knows no more of the other end than its name, which the whole message takes the place of.
    let one_queue = [LinkAttribute::NumTxQueues(1), LinkAttribute::NumRxQueues(1)];
    let mut peer = peer;
    peer.attributes.extend(one_queue.clone());
    let pair = LinkMessageBuilder::<LinkVeth>::new(name, "").set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
    one_queue.into_iter().fold(pair, LinkMessageBuilder::append_extra_attribute)
}

/// The attribute that keeps IPv6 from making a link-local address, and with it router solicitations and multicast reports.
pub fn no_link_local() -> LinkAttribute {
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)])])
}

/// The attribute that sets an interface's `arp_notify`: in a request that is made anyway it costs less than the file of the sysctl.
pub fn arp_notify() -> LinkAttribute {
    let mut settings = InetDevConf::default();
    settings.arp_notify = 1;
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(settings)])])
}

/// A route of the main table: the default route where there is no destination. The family is the gateway's or the destination's, IPv4 without
/// either.
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
