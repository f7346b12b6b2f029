//! Links, addresses and routes of any network namespace, by name: what the lab and the tests build hosts and wires with. The agent's own links
//! go another way (`super::link`): they are ops of a batch.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use ipnetwork::IpNetwork;

use super::blocking;
use super::message::Message;
use super::netns::Netns;
use super::request::{self, IFF_UP};
use super::socket::{Refusal, RouteSocket};
use super::uapi::{IFLA_ADDRESS, IFLA_BR_MCAST_SNOOPING, IFLA_IFNAME, IFLA_MASTER, IFLA_MTU, IFLA_NET_NS_FD};
use crate::model::{Cidr, Mac};
use crate::plan::OpError;

/// A socket in a namespace and what can be asked through it. Clones share the socket. Requests are answered at once; on a runtime of several
/// threads they do not hold up other tasks.
#[derive(Debug, Clone)]
pub struct Setup {
    socket: Arc<Mutex<RouteSocket>>,
}

impl Setup {
    /// Opens a socket in the namespace.
    pub fn open(netns: &Netns) -> Result<Setup, OpError> {
        let socket = netns.run(RouteSocket::open).map_err(|e| OpError { errno: 0, message: e.to_string() })??;
        Ok(Setup { socket: Arc::new(Mutex::new(socket)) })
    }

    /// The interface index of a link.
    pub async fn link_index(&self, name: &str) -> Result<u32, OpError> {
        self.on(|s| request::link(s, name).map(|l| l.index), || format!("cannot find interface {name}"))
    }

    /// Makes a bridge, down, without multicast snooping.
    pub async fn add_bridge(&self, name: &str) -> Result<(), OpError> {
        let data = |m: &mut Message<'_>| {
            m.put(IFLA_BR_MCAST_SNOOPING, &[0]);
        };
        self.on(|s| request::link_add(s, name, "bridge", |_| (), data), || format!("cannot make bridge {name}"))
    }

    /// Makes a veth pair, both ends down: `name` here, `peer` in another namespace (or in this one).
    pub async fn add_veth(&self, name: &str, peer: &str, peer_netns: &Netns) -> Result<(), OpError> {
        let data = |m: &mut Message<'_>| request::veth_peer(m, peer, peer_netns.as_fd(), |_| ());
        self.on(
            |s| request::link_add(s, name, "veth", |_| (), data),
            || format!("cannot make veth pair {name} with {peer} in {}", peer_netns.path().display()),
        )
    }

    /// Moves a link to another namespace, where it is down and without addresses.
    pub async fn move_to(&self, name: &str, netns: &Netns) -> Result<(), OpError> {
        use std::os::fd::AsRawFd;
        let fd = netns.as_fd().as_raw_fd().cast_unsigned();
        self.change(name, 0, 0, move |m| {
            m.put_u32(IFLA_NET_NS_FD, fd);
        })
    }

    /// Gives a link another name; on most kernels it has to be down.
    pub async fn rename(&self, name: &str, new: &str) -> Result<(), OpError> {
        self.change(name, 0, 0, |m| {
            m.put_text(IFLA_IFNAME, new);
        })
    }

    /// Sets a link administratively up.
    pub async fn set_up(&self, name: &str) -> Result<(), OpError> {
        self.change(name, IFF_UP, IFF_UP, |_| ())
    }

    /// Sets a link administratively down.
    pub async fn set_down(&self, name: &str) -> Result<(), OpError> {
        self.change(name, 0, IFF_UP, |_| ())
    }

    /// Makes a link a port of a bridge.
    pub async fn set_master(&self, name: &str, master: &str) -> Result<(), OpError> {
        let bridge = self.link_index(master).await?;
        self.change(name, 0, 0, |m| {
            m.put_u32(IFLA_MASTER, bridge);
        })
    }

    /// Sets the MTU in bytes.
    pub async fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), OpError> {
        self.change(name, 0, 0, |m| {
            m.put_u32(IFLA_MTU, mtu);
        })
    }

    /// Sets the MAC.
    pub async fn set_mac(&self, name: &str, mac: Mac) -> Result<(), OpError> {
        self.change(name, 0, 0, |m| {
            m.put(IFLA_ADDRESS, &mac.0);
        })
    }

    /// Adds an address, IPv6 without duplicate address detection. That it is there already is success.
    pub async fn add_address(&self, name: &str, address: IpNetwork) -> Result<(), OpError> {
        self.on(
            |s| {
                let index = request::link(s, name)?.index;
                request::address_add(s, index, address)
            },
            || format!("cannot add {address} to {name}"),
        )
    }

    /// Removes an address.
    pub async fn del_address(&self, name: &str, address: IpNetwork) -> Result<(), OpError> {
        self.on(
            |s| {
                let index = request::link(s, name)?.index;
                request::address_delete(s, index, address)
            },
            || format!("cannot remove {address} from {name}"),
        )
    }

    /// Adds a route to the main table or replaces the one to the same destination; `None` is the default route, of the gateway's family.
    pub async fn add_route(&self, destination: Option<Cidr>, via: Option<IpAddr>, device: Option<&str>) -> Result<(), OpError> {
        self.on(
            |s| {
                let device = device.map(|name| request::link(s, name)).transpose()?.map(|l| l.index);
                request::route_add(s, destination, via, device)
            },
            || {
                let destination = destination.map_or_else(|| "default".to_owned(), |d| d.to_string());
                let via = via.map_or_else(String::new, |v| format!(" via {v}"));
                let device = device.map_or_else(String::new, |d| format!(" dev {d}"));
                format!("cannot add route {destination}{via}{device}")
            },
        )
    }

    /// Removes a link. That it is gone already is success.
    pub async fn delete_link(&self, name: &str) -> Result<(), OpError> {
        self.on(
            |s| match request::link(s, name).and_then(|link| request::link_delete(s, link.index)) {
                Err(e) if e.errno == libc::ENODEV => Ok(()),
                other => other,
            },
            || format!("cannot delete interface {name}"),
        )
    }

    fn change(&self, name: &str, flags: u32, mask: u32, rest: impl FnOnce(&mut Message<'_>)) -> Result<(), OpError> {
        self.on(
            |s| {
                let index = request::link(s, name)?.index;
                request::link_set(s, index, flags, mask, rest)
            },
            || format!("cannot change interface {name}"),
        )
    }

    fn on<T>(
        &self,
        work: impl FnOnce(&mut RouteSocket) -> Result<T, Refusal>,
        what: impl FnOnce() -> String,
    ) -> Result<T, OpError> {
        blocking(|| {
            let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
            work(&mut socket).map_err(|e| e.during(what()))
        })
    }
}
