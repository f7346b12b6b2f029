//! Creates, changes and removes our links.
//!
//! VXLAN devices and bridges are created, changed in place and removed; veth ports are only changed and removed. A foreign link
//! with one of our names is never touched.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    BridgeBooleanOptionFlags, BridgeBooleanOptions, BridgeStpState, InfoBridge, InfoBridgePort, InfoKind, LinkMessage,
};
use rtnetlink::{LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVxlan};

use super::cache::{KernelCache, LINK_GROUP, is_own_link};
use super::ethtool::Ethtool;
use super::objects::{self, LinkInfo};
use super::route_socket::{KernelError, RouteSocket};
use super::rtnl::{Rtnl, no_link_local};
use super::sysctl;
use crate::model::network::IPV6_MIN_MTU;
use crate::plan::OpError;
use crate::plan::state::{LINK_ALIAS, LinkKind, LinkState, Vxlan};

/// TTL of outer packets. The kernel's default is 1 for multicast and the route's for unicast; a fixed value is independent of the
/// host's setting. 64 is the recommended default (RFC 1700).
const TTL: u8 = 64;

/// `BR_BOOLOPT_NO_LL_LEARN`.
const NO_LL_LEARN: BridgeBooleanOptionFlags = BridgeBooleanOptionFlags::NoLinkLocalLearn;

/// The sockets and the cache that link changes need.
pub struct Links<'a> {
    /// Changes links.
    pub rtnl: &'a Rtnl,
    /// Reads links.
    pub socket: &'a mut RouteSocket,
    /// Reads and changes offload settings.
    pub ethtool: &'a Ethtool,
    /// The cache; updated with each change.
    pub cache: &'a mut KernelCache,
}

impl Links<'_> {
    /// Creates the link or changes it to this state. A VXLAN device is recreated if its fixed settings differ.
    pub async fn set(&mut self, name: &str, wanted: &LinkState) -> Result<(), OpError> {
        let result = self.set_steps(name, wanted).await;
        // Cache the reached state even if a step failed: the events so far are our own.
        let refreshed = self.refresh(name);
        result.and(refreshed)
    }

    async fn set_steps(&mut self, name: &str, wanted: &LinkState) -> Result<(), OpError> {
        if let LinkKind::Foreign { .. } = wanted.kind {
            return Err(error(libc::EINVAL, format!("internal error: interface {name} cannot be created as a foreign link")));
        }
        let existing = match self.find(name)? {
            Some(link) => self.reuse_or_delete(link, wanted).await?,
            None => None,
        };
        let link = match existing {
            Some(link) => link,
            None => self.create(name, wanted).await?,
        };
        self.ensure_alias(&link).await?;
        if let LinkKind::Vxlan(vxlan) = &wanted.kind {
            self.change_vxlan(&link, vxlan).await?;
        }
        self.change(&link, wanted).await?;
        self.change_hairpin(&link, wanted).await
    }

    /// Removes a link of ours. Succeeds if it does not exist.
    pub async fn delete(&mut self, name: &str) -> Result<(), OpError> {
        self.delete_all(&[name]).await.pop().unwrap_or(Ok(()))
    }

    /// Removes links of ours in parallel; returns the result of each.
    pub async fn delete_all(&mut self, names: &[&str]) -> Vec<Result<(), OpError>> {
        let begin = |name: &&str| match self.find(name)? {
            Some(link) if !is_own_link(&link) => Err(foreign_link_error(&link)),
            Some(link) => Ok(Some((link.index, delete_by_index(link.index)))),
            None => Ok(None),
        };
        let removals: Vec<Result<_, OpError>> = names.iter().map(begin).collect();
        let mut results = Vec::with_capacity(names.len());
        for (name, task) in names.iter().zip(removals) {
            let removed = match task {
                Ok(Some((index, removal))) => removal
                    .await
                    .map(|()| self.cache.mark_removed(index))
                    .map_err(|e| e.context(format!("cannot delete interface {name}"))),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            if removed.is_ok() {
                self.cache.remove_link(name);
            }
            results.push(removed);
        }
        results
    }

    /// Reads a link and updates the cache.
    pub fn refresh(&mut self, name: &str) -> Result<(), OpError> {
        match self.find(name)? {
            None => self.cache.remove_link(name),
            Some(link) => {
                let ethtool = self.ethtool;
                if let Some(state) = self.cache.link_state(&link, |name| ethtool.tx_checksum(name)) {
                    self.cache.insert_link(name, link.index, state);
                }
            }
        }
        Ok(())
    }

    fn find(&mut self, name: &str) -> Result<Option<LinkInfo>, OpError> {
        match objects::link(self.socket, name) {
            Ok(link) => Ok(Some(link)),
            Err(e) if e.errno == libc::ENODEV => Ok(None),
            Err(e) => Err(e.context(format!("cannot examine interface {name}"))),
        }
    }

    /// Returns the existing link if it can be changed to the wanted state; otherwise removes it. A foreign link is an error.
    async fn reuse_or_delete(&mut self, link: LinkInfo, wanted: &LinkState) -> Result<Option<LinkInfo>, OpError> {
        if !is_own_link(&link) {
            return Err(foreign_link_error(&link));
        }
        let ethtool = self.ethtool;
        let current = self.cache.link_state(&link, |name| ethtool.tx_checksum(name));
        let keep = match (current.map(|c| c.kind), &wanted.kind) {
            (Some(LinkKind::Vxlan(is)), LinkKind::Vxlan(wanted)) => is.changes_in_place(wanted),
            (Some(LinkKind::Bridge), LinkKind::Bridge) | (Some(LinkKind::Port), LinkKind::Port) => true,
            _ => false,
        };
        if keep {
            return Ok(Some(link));
        }
        self.delete(&link.name).await?;
        Ok(None)
    }

    async fn create(&mut self, name: &str, wanted: &LinkState) -> Result<LinkInfo, OpError> {
        let link = match &wanted.kind {
            LinkKind::Vxlan(vxlan) => {
                let link = LinkVxlan::new(name, vxlan.vni.get()).port(vxlan.port).learning(vxlan.learning).ttl(TTL);
                build_with_defaults(with_underlay(link, vxlan), wanted)
            }
            LinkKind::Bridge => {
                let link = LinkMessageBuilder::<LinkBridge>::new(name)
                    .append_info_data(InfoBridge::StpState(BridgeStpState::Disabled))
                    .append_info_data(InfoBridge::MulticastSnooping(false))
                    // Frames to the bridge's own group addresses (such as LLDP) bypass all rules (`br_handle_frame` in
                    // net/bridge/br_input.c). The bridge must not learn from them, or a container could attract another
                    // container's frames.
                    .append_info_data(InfoBridge::MultiBoolOpt(BridgeBooleanOptions { value: NO_LL_LEARN, mask: NO_LL_LEARN }));
                build_with_defaults(link, wanted)
            }
            LinkKind::Port | LinkKind::Foreign { .. } => {
                return Err(error(
                    libc::ENODEV,
                    format!("interface {name} is gone: attach its container again to create a new pair"),
                ));
            }
        };
        match (self.rtnl.add_link(link).await, &wanted.kind) {
            (Ok(()), _) => {}
            (Err(e), LinkKind::Vxlan(vxlan)) => return Err(self.vxlan_error(name, vxlan, &e)),
            (Err(e), _) => return Err(e.context(format!("cannot create bridge {name}"))),
        }
        let link =
            objects::link(self.socket, name).map_err(|e| e.context(format!("cannot find interface {name} after creating it")))?;
        // Set before the link comes up for the first time.
        sysctl::write_if_exists(&sysctl::accept_ra(name), "0")?;
        Ok(link)
    }

    /// Gives a link our alias and disables IPv6's automatic configuration, unless it has the alias.
    async fn ensure_alias(&mut self, link: &LinkInfo) -> Result<(), OpError> {
        if link.alias == LINK_ALIAS { Ok(()) } else { self.set_alias(link).await }
    }

    /// Like [`Links::ensure_alias`], but regardless of the current alias.
    async fn set_alias(&mut self, link: &LinkInfo) -> Result<(), OpError> {
        let ipv6 = sysctl::read(&sysctl::accept_ra(&link.name))?.is_some();
        let change = alias_message(link.index, ipv6);
        self.rtnl.change_link(change).await.map_err(|e| alias_error(&link.name, &e))
    }

    async fn change_vxlan(&mut self, link: &LinkInfo, wanted: &Vxlan) -> Result<(), OpError> {
        let current = link.vxlan.clone().unwrap_or_default();
        if current.local != Some(wanted.local) || current.link != wanted.underlay {
            let change = LinkMessageBuilder::<LinkVxlan>::new_with_info_kind(InfoKind::Vxlan).index(link.index);
            let changed = self.rtnl.change_link(with_underlay(change, wanted).build()).await;
            changed.map_err(|e| self.vxlan_error(&link.name, wanted, &e))?;
        }
        if self.ethtool.tx_checksum(&link.name) != wanted.tx_checksum {
            self.ethtool.set_tx_checksum(&link.name, wanted.tx_checksum)?;
        }
        Ok(())
    }

    /// Changes MAC, MTU, bridge and up state, as far as they differ.
    async fn change(&mut self, link: &LinkInfo, wanted: &LinkState) -> Result<(), OpError> {
        let name = &link.name;
        let master = wanted.master.map_or(Ok(0), |bridge| {
            let no_bridge =
                || error(libc::ENODEV, format!("cannot make {name} a port of {bridge}: the bridge does not exist yet"));
            self.cache.index(bridge).ok_or_else(no_bridge)
        })?;
        let mac = wanted.mac.filter(|mac| link.mac != Some(*mac));
        let new_mtu = (link.mtu != wanted.mtu).then_some(wanted.mtu);
        let new_master = (link.master.unwrap_or(0) != master).then_some(master);
        let new_up = link.up() != wanted.up;
        if mac.is_none() && new_mtu.is_none() && new_master.is_none() && !new_up {
            return Ok(());
        }
        let mut change = LinkUnspec::new_with_index(link.index);
        if let Some(mac) = mac {
            change = change.address(mac.0.to_vec());
        }
        if let Some(mtu) = new_mtu {
            change = change.mtu(mtu);
        }
        if let Some(master) = new_master {
            change = change.controller(master);
        }
        if new_up {
            change = if wanted.up { change.up() } else { change.down() };
        }
        let changed = self.rtnl.change_link(change.build()).await;
        changed.map_err(|e| change_error(name, wanted, &e))?;
        if link.mtu < IPV6_MIN_MTU && wanted.mtu >= IPV6_MIN_MTU {
            self.disable_ipv6_autoconf(link).await?;
        }
        Ok(())
    }

    /// Undoes IPv6's automatic configuration on a link where the kernel has just started IPv6. A link-local address exists by
    /// then.
    async fn disable_ipv6_autoconf(&mut self, link: &LinkInfo) -> Result<(), OpError> {
        sysctl::write_if_exists(&sysctl::accept_ra(&link.name), "0")?;
        self.set_alias(link).await?;
        let switch = sysctl::disable_ipv6(&link.name);
        if sysctl::read(&switch)?.as_deref() == Some(sysctl::OFF) {
            // IPv6 has only just started, so no other address is lost.
            sysctl::write(&switch, "1")?;
            sysctl::write(&switch, sysctl::OFF)?;
        }
        Ok(())
    }

    /// Sets whether frames may leave through the port by which they arrived. A port that joins another bridge starts with that
    /// off.
    async fn change_hairpin(&mut self, link: &LinkInfo, wanted: &LinkState) -> Result<(), OpError> {
        let joins = wanted.master.and_then(|bridge| self.cache.index(bridge)) != link.master;
        if wanted.master.is_none() || wanted.hairpin == (link.hairpin && !joins) {
            return Ok(());
        }
        let port = LinkBridgePort::new(link.index).append_info_data(InfoBridgePort::HairpinMode(wanted.hairpin));
        let changed = self.rtnl.change_link(port.build()).await;
        changed.map_err(|e| change_error(&link.name, wanted, &e))
    }

    /// The error of a VXLAN device; names the conflicting device if there is one.
    fn vxlan_error(&mut self, name: &str, wanted: &Vxlan, cause: &KernelError) -> OpError {
        let mut e = cause.context(format!("cannot create VXLAN device {name}"));
        let remedy = match cause.errno {
            libc::EEXIST => {
                let conflict = objects::links(self.socket).unwrap_or_default().into_iter().find(|l| {
                    l.name != name && l.vxlan.as_ref().is_some_and(|v| v.id == wanted.vni.get() && v.port == wanted.port)
                });
                let conflict = conflict.map_or_else(|| "another device".to_owned(), |l| format!("interface {}", l.name));
                format!(
                    "; VNI {} on UDP port {} is in use by {conflict}: stop the program that created it (flanneld creates flannel.{}) and delete it, or choose another VNI or port",
                    wanted.vni, wanted.port, wanted.vni
                )
            }
            libc::EOPNOTSUPP => "; the kernel may lack VXLAN: try modprobe vxlan".to_owned(),
            libc::EAFNOSUPPORT => "; IPv6 is switched off in the kernel: switch it on or use IPv4".to_owned(),
            libc::ENODEV => format!("; the external interface (index {}) is gone", wanted.underlay),
            _ => String::new(),
        };
        e.message.push_str(&remedy);
        e
    }
}

/// Starts to remove a link; succeeds if it does not exist.
///
/// The kernel takes some 15 ms, mostly waiting until no processor can see the link any more (`netdev_run_todo` in
/// `net/core/dev.c`), but hardly longer for several links at once. So each removal has its own thread and socket. The port id of
/// that socket is not filtered from the events: record the link as removed before its events are processed.
pub fn delete_by_index(index: u32) -> impl Future<Output = Result<(), KernelError>> {
    let removed = tokio::task::spawn_blocking(move || {
        let mut socket = RouteSocket::open().map_err(|e| KernelError { errno: e.errno, detail: e.message })?;
        let request = RouteNetlinkMessage::DelLink(LinkUnspec::new_with_index(index).build());
        match socket.change(&request) {
            Err(e) if e.errno != libc::ENODEV => Err(e),
            _ => Ok(()),
        }
    });
    // The join fails only while the runtime shuts down.
    async { removed.await.unwrap_or_else(|e| Err(KernelError { errno: libc::ECANCELED, detail: e.to_string() })) }
}

/// The change that gives a link our alias. If the link has IPv6, it also disables what the kernel would do by itself: a
/// link-local address, router solicitations. Without IPv6 on the link (switched off, or an MTU below 1280) the kernel refuses
/// that part.
pub fn alias_message(index: u32, ipv6: bool) -> LinkMessage {
    let change = LinkUnspec::new_with_index(index).alias(LINK_ALIAS);
    let change = if ipv6 { change.append_extra_attribute(no_link_local()) } else { change };
    change.build()
}

/// The error of a refused alias.
pub fn alias_error(name: &str, cause: &KernelError) -> OpError {
    cause.context(format!("cannot set the alias of interface {name}"))
}

/// The error for a foreign link with one of our names.
pub fn foreign_link_error(link: &LinkInfo) -> OpError {
    let LinkInfo { name, kind, .. } = link;
    let kind = if kind.is_empty() { "hardware" } else { kind };
    error(
        libc::EEXIST,
        format!(
            "interface {name} exists and is not managed by overlayd (kind {kind}, no alias `{LINK_ALIAS}`): remove or rename it: ip link delete {name}"
        ),
    )
}

fn change_error(name: &str, wanted: &LinkState, cause: &KernelError) -> OpError {
    let mut e = cause.context(format!("cannot change interface {name}"));
    let remedy = match (cause.errno, &wanted.kind) {
        (libc::EADDRINUSE, LinkKind::Vxlan(v)) => {
            format!(
                "; UDP port {} is taken by another program (ss -ulnp shows it): stop it, or choose another Backend.Port for the network, which all hosts share",
                v.port
            )
        }
        (libc::EINVAL, LinkKind::Vxlan(_)) => format!(
            "; MTU {} may be more than the external interface's MTU allows: VXLAN needs 50 bytes over IPv4 and 70 over IPv6",
            wanted.mtu
        ),
        (libc::EADDRNOTAVAIL, _) => "; the MAC is not a unicast address".to_owned(),
        _ => String::new(),
    };
    e.message.push_str(&remedy);
    e
}

fn error(errno: i32, message: String) -> OpError {
    OpError { errno, message }
}

/// Builds a link with the settings that all our links share.
fn build_with_defaults<T>(link: LinkMessageBuilder<T>, wanted: &LinkState) -> LinkMessage {
    let link = link.link_group(LINK_GROUP);
    match wanted.mac {
        Some(mac) => link.address(mac.0.to_vec()).build(),
        None => link.build(),
    }
}

/// Adds the underlay settings of outer packets, which can be changed in place.
fn with_underlay(link: LinkMessageBuilder<LinkVxlan>, vxlan: &Vxlan) -> LinkMessageBuilder<LinkVxlan> {
    let link = link.dev(vxlan.underlay);
    match vxlan.local {
        IpAddr::V4(local) => link.local(local),
        IpAddr::V6(local) => link.local6(local),
    }
}
