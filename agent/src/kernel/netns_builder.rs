//! Changes links, addresses and routes of any network namespace, by interface name.
//!
//! The lab and the tests use it to build hosts and veth pairs. The agent changes its own links through `super::link`, as ops of a
//! batch.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnetwork::IpNetwork;
use netlink_packet_route::link::InfoBridge;
use netlink_packet_route::route::RouteProtocol;
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec};

use super::netns::Netns;
use super::objects;
use super::route_socket::{KernelError, RouteSocket};
use super::rtnl::{route, veth};
use crate::model::{Cidr, Mac};
use crate::plan::OpError;

/// A socket in a network namespace.
#[derive(Debug)]
pub struct NetnsBuilder {
    socket: Mutex<RouteSocket>,
}

impl NetnsBuilder {
    /// Opens a socket in the namespace.
    pub fn open(netns: &Netns) -> Result<NetnsBuilder, OpError> {
        Ok(NetnsBuilder { socket: Mutex::new(netns.route_socket()?) })
    }

    /// The interface index of a link.
    pub fn link_index(&self, name: &str) -> Result<u32, OpError> {
        link_index(&mut self.socket(), name).map_err(|e| e.context(format!("cannot find interface {name}")))
    }

    /// Creates a bridge, down, without multicast snooping.
    pub fn add_bridge(&self, name: &str) -> Result<(), OpError> {
        let bridge = LinkMessageBuilder::<LinkBridge>::new(name).append_info_data(InfoBridge::MulticastSnooping(false));
        self.socket().add_link(bridge.build()).map_err(|e| e.context(format!("cannot create bridge {name}")))
    }

    /// Creates a veth pair, both ends down: `name` here, `peer` in another namespace (or in this one).
    pub fn add_veth(&self, name: &str, peer: &str, peer_netns: &Netns) -> Result<(), OpError> {
        let end = LinkUnspec::new_with_name(peer).setns_by_fd(peer_netns.as_fd().as_raw_fd());
        let made = self.socket().add_link(veth(name, end.build()).build());
        made.map_err(|e| e.context(format!("cannot create veth pair {name} with {peer} in {}", peer_netns.path().display())))
    }

    /// Moves a link to another namespace. It arrives there down and without addresses.
    pub fn move_to(&self, name: &str, netns: &Netns) -> Result<(), OpError> {
        let fd = netns.as_fd().as_raw_fd();
        self.change(name, |link| link.setns_by_fd(fd))
    }

    /// Renames a link; most kernels require it to be down.
    pub fn rename(&self, name: &str, new: &str) -> Result<(), OpError> {
        self.change(name, |link| link.name(new))
    }

    /// Sets a link administratively up.
    pub fn set_up(&self, name: &str) -> Result<(), OpError> {
        self.change(name, LinkMessageBuilder::up)
    }

    /// Sets a link administratively down.
    pub fn set_down(&self, name: &str) -> Result<(), OpError> {
        self.change(name, LinkMessageBuilder::down)
    }

    /// Makes a link a port of a bridge.
    pub fn set_master(&self, name: &str, master: &str) -> Result<(), OpError> {
        let bridge = self.link_index(master)?;
        self.change(name, |link| link.controller(bridge))
    }

    /// Sets the MTU in bytes.
    pub fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), OpError> {
        self.change(name, |link| link.mtu(mtu))
    }

    /// Sets the MAC.
    pub fn set_mac(&self, name: &str, mac: Mac) -> Result<(), OpError> {
        self.change(name, |link| link.address(mac.0.to_vec()))
    }

    /// Adds an address, for IPv6 without duplicate address detection. Succeeds if the address exists already.
    pub fn add_address(&self, name: &str, address: IpNetwork) -> Result<(), OpError> {
        self.with_link(name, |socket, index| socket.add_address(index, address))
            .map_err(|e| e.context(format!("cannot add {address} to {name}")))
    }

    /// Removes an address.
    pub fn delete_address(&self, name: &str, address: IpNetwork) -> Result<(), OpError> {
        self.with_link(name, |socket, index| socket.delete_address(index, address))
            .map_err(|e| e.context(format!("cannot remove {address} from {name}")))
    }

    /// Adds a route to the main table, or replaces the one to the same destination. `None` is the default route of the gateway's
    /// family.
    pub fn add_route(&self, destination: Option<Cidr>, via: Option<IpAddr>, device: Option<&str>) -> Result<(), OpError> {
        let mut socket = self.socket();
        let index = device.map(|name| link_index(&mut socket, name)).transpose();
        let added = index.and_then(|index| socket.replace_route(route(destination, via, index, RouteProtocol::Static)));
        added.map_err(|e| {
            let destination = destination.map_or_else(|| "default".to_owned(), |d| d.to_string());
            let via = via.map_or_else(String::new, |v| format!(" via {v}"));
            let device = device.map_or_else(String::new, |d| format!(" dev {d}"));
            e.context(format!("cannot add route {destination}{via}{device}"))
        })
    }

    /// Removes a link. Succeeds if it does not exist.
    pub fn delete_link(&self, name: &str) -> Result<(), OpError> {
        match self.with_link(name, RouteSocket::delete_link) {
            Err(e) if e.errno == libc::ENODEV => Ok(()),
            other => other.map_err(|e| e.context(format!("cannot delete interface {name}"))),
        }
    }

    fn change(
        &self,
        name: &str,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), OpError> {
        self.with_link(name, |socket, index| socket.change_link(change(LinkUnspec::new_with_index(index)).build()))
            .map_err(|e| e.context(format!("cannot change interface {name}")))
    }

    /// Runs a request about a link, by its interface index.
    fn with_link<T>(
        &self,
        name: &str,
        request: impl FnOnce(&mut RouteSocket, u32) -> Result<T, KernelError>,
    ) -> Result<T, KernelError> {
        let mut socket = self.socket();
        let index = link_index(&mut socket, name)?;
        request(&mut socket, index)
    }

    fn socket(&self) -> MutexGuard<'_, RouteSocket> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn link_index(socket: &mut RouteSocket, name: &str) -> Result<u32, KernelError> {
    Ok(objects::link(socket, name)?.index)
}
