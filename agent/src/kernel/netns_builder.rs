//! Changes links, addresses and routes of any network namespace, by interface name.
//!
//! The lab and the tests use it to build hosts and veth pairs. The agent changes its own links through `super::link`, as ops of a
//! batch.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use ipnetwork::IpNetwork;
use netlink_packet_route::link::InfoBridge;
use netlink_packet_route::route::RouteProtocol;
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec};

use super::netns::Netns;
use super::route_socket::KernelError;
use super::rtnl::{Rtnl, route, veth};
use crate::model::{Cidr, Mac};
use crate::plan::OpError;

/// A connection into a network namespace. Clones share it.
#[derive(Debug, Clone)]
pub struct NetnsBuilder {
    rtnl: Arc<Rtnl>,
}

impl NetnsBuilder {
    /// Connects into the namespace. Must be called inside a tokio runtime with I/O and time enabled. The connection's task runs
    /// on that runtime until the last clone is dropped.
    pub fn open(netns: &Netns) -> Result<NetnsBuilder, OpError> {
        Ok(NetnsBuilder { rtnl: Arc::new(Rtnl::open(netns)?) })
    }

    /// The interface index of a link.
    pub async fn link_index(&self, name: &str) -> Result<u32, OpError> {
        self.rtnl.link_index(name).await.map_err(|e| e.context(format!("cannot find interface {name}")))
    }

    /// Creates a bridge, down, without multicast snooping.
    pub async fn add_bridge(&self, name: &str) -> Result<(), OpError> {
        let bridge = LinkMessageBuilder::<LinkBridge>::new(name).append_info_data(InfoBridge::MulticastSnooping(false));
        self.rtnl.add_link(bridge.build()).await.map_err(|e| e.context(format!("cannot create bridge {name}")))
    }

    /// Creates a veth pair, both ends down: `name` here, `peer` in another namespace (or in this one).
    pub async fn add_veth(&self, name: &str, peer: &str, peer_netns: &Netns) -> Result<(), OpError> {
        let end = LinkUnspec::new_with_name(peer).setns_by_fd(peer_netns.as_fd().as_raw_fd());
        let made = self.rtnl.add_link(veth(name, end.build()).build()).await;
        made.map_err(|e| e.context(format!("cannot create veth pair {name} with {peer} in {}", peer_netns.path().display())))
    }

    /// Moves a link to another namespace. It arrives there down and without addresses.
    pub async fn move_to(&self, name: &str, netns: &Netns) -> Result<(), OpError> {
        let fd = netns.as_fd().as_raw_fd();
        self.change(name, |link| link.setns_by_fd(fd)).await
    }

    /// Renames a link; most kernels require it to be down.
    pub async fn rename(&self, name: &str, new: &str) -> Result<(), OpError> {
        self.change(name, |link| link.name(new)).await
    }

    /// Sets a link administratively up.
    pub async fn set_up(&self, name: &str) -> Result<(), OpError> {
        self.change(name, LinkMessageBuilder::up).await
    }

    /// Sets a link administratively down.
    pub async fn set_down(&self, name: &str) -> Result<(), OpError> {
        self.change(name, LinkMessageBuilder::down).await
    }

    /// Makes a link a port of a bridge.
    pub async fn set_master(&self, name: &str, master: &str) -> Result<(), OpError> {
        let bridge = self.link_index(master).await?;
        self.change(name, |link| link.controller(bridge)).await
    }

    /// Sets the MTU in bytes.
    pub async fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), OpError> {
        self.change(name, |link| link.mtu(mtu)).await
    }

    /// Sets the MAC.
    pub async fn set_mac(&self, name: &str, mac: Mac) -> Result<(), OpError> {
        self.change(name, |link| link.address(mac.0.to_vec())).await
    }

    /// Adds an address, for IPv6 without duplicate address detection. Succeeds if the address exists already.
    pub async fn add_address(&self, name: &str, address: IpNetwork) -> Result<(), OpError> {
        let added = async { self.rtnl.add_address(self.rtnl.link_index(name).await?, address).await };
        added.await.map_err(|e| e.context(format!("cannot add {address} to {name}")))
    }

    /// Removes an address.
    pub async fn delete_address(&self, name: &str, address: IpNetwork) -> Result<(), OpError> {
        let removed = async { self.rtnl.delete_address(self.rtnl.link_index(name).await?, address).await };
        removed.await.map_err(|e| e.context(format!("cannot remove {address} from {name}")))
    }

    /// Adds a route to the main table, or replaces the one to the same destination. `None` is the default route of the gateway's
    /// family.
    pub async fn add_route(&self, destination: Option<Cidr>, via: Option<IpAddr>, device: Option<&str>) -> Result<(), OpError> {
        let added = async {
            let index = match device {
                Some(name) => Some(self.rtnl.link_index(name).await?),
                None => None,
            };
            self.rtnl.replace_route(route(destination, via, index, RouteProtocol::Static)).await
        };
        added.await.map_err(|e: KernelError| {
            let destination = destination.map_or_else(|| "default".to_owned(), |d| d.to_string());
            let via = via.map_or_else(String::new, |v| format!(" via {v}"));
            let device = device.map_or_else(String::new, |d| format!(" dev {d}"));
            e.context(format!("cannot add route {destination}{via}{device}"))
        })
    }

    /// Removes a link. Succeeds if it does not exist.
    pub async fn delete_link(&self, name: &str) -> Result<(), OpError> {
        let deleted = async { self.rtnl.delete_link(self.rtnl.link_index(name).await?).await };
        match deleted.await {
            Err(e) if e.errno == libc::ENODEV => Ok(()),
            other => other.map_err(|e| e.context(format!("cannot delete interface {name}"))),
        }
    }

    async fn change(
        &self,
        name: &str,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), OpError> {
        let changed = async {
            let link = LinkUnspec::new_with_index(self.rtnl.link_index(name).await?);
            self.rtnl.change_link(change(link).build()).await
        };
        changed.await.map_err(|e| e.context(format!("cannot change interface {name}")))
    }
}
