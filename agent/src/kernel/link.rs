//! Creates, changes and removes our links.
//!
//! VXLAN devices, bridges and the pairs between namespaces (`pair`) are created, changed in place and removed; veth ports are only
//! changed and removed. A foreign link with one of our names is never touched.

mod pair;

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::panic::resume_unwind;

use netlink_packet_route::link::{
    BridgeBooleanOptionFlags, BridgeBooleanOptions, BridgeStpState, InfoBridge, InfoBridgePort, InfoKind, LinkAttribute,
    LinkMessage,
};
use rtnetlink::{LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVxlan};

use super::blocking;
use super::cache::{KernelCache, LINK_GROUP, is_own_link};
use super::ethtool::Ethtool;
use super::netns::Netns;
use super::objects::{self, LinkInfo};
use super::route_socket::{KernelError, RouteSocket};
use super::rtnl::no_link_local;
use super::sysctl::{self, Sysctls};
use crate::model::network::IPV6_MIN_MTU;
use crate::plan::OpError;
use crate::plan::state::{LINK_ALIAS, LinkKind, LinkState, Vxlan};

/// TTL of outer packets. The kernel's default is 1 for multicast and the route's for unicast; a fixed value is independent of the
/// host's setting. 64 is the recommended default (RFC 1700).
const TTL: u8 = 64;

/// Maximum number of threads that remove links. 200 veth pairs take 0.4 s with 32 threads or with 200, and 1.1 s with 8.
const MAX_DELETE_THREADS: usize = 32;

/// `BR_BOOLOPT_NO_LL_LEARN`.
const NO_LL_LEARN: BridgeBooleanOptionFlags = BridgeBooleanOptionFlags::NoLinkLocalLearn;

/// The sockets and the cache that link changes need.
pub struct Links<'a> {
    /// Reads and changes links.
    pub socket: &'a mut RouteSocket,
    /// Reads and changes offload settings.
    pub ethtool: &'a Ethtool,
    /// Reads and changes sysctls.
    pub sysctls: &'a Sysctls,
    /// The namespace of all of them.
    pub netns: &'a Netns,
    /// The host's namespace, if `netns` is a network's.
    pub host: Option<&'a Netns>,
    /// The cache; updated with each change.
    pub cache: &'a mut KernelCache,
}

impl Links<'_> {
    /// Creates the link or changes it to this state. A VXLAN device is recreated if its fixed settings differ.
    pub fn set(&mut self, name: &str, wanted: &LinkState) -> Result<(), OpError> {
        let result = self.set_steps(name, wanted);
        // Cache the reached state even if a step failed: the events so far are our own.
        let refreshed = self.refresh(name);
        result.and(refreshed)
    }

    fn set_steps(&mut self, name: &str, wanted: &LinkState) -> Result<(), OpError> {
        if let LinkKind::Foreign { .. } = wanted.kind {
            return Err(error(libc::EINVAL, format!("internal error: interface {name} cannot be created as a foreign link")));
        }
        let existing = match self.find_own(name)? {
            Some(link) => self.reuse_or_delete(link, wanted)?,
            None => None,
        };
        let link = match existing {
            Some(link) => link,
            None => {
                self.create(name, wanted)?;
                let created = objects::link(self.socket, name);
                created.map_err(|e| e.context(format!("cannot find interface {name} after creating it")))?
            }
        };
        self.ensure_alias(&link)?;
        if let LinkKind::Vxlan(vxlan) = &wanted.kind {
            self.change_vxlan(&link, vxlan)?;
        }
        self.change(&link, wanted)?;
        self.change_hairpin(&link, wanted)
    }

    /// Removes a link of ours. Succeeds if it does not exist.
    pub fn delete(&mut self, name: &str) -> Result<(), OpError> {
        self.delete_all(&[name]).pop().unwrap_or(Ok(()))
    }

    /// Removes links of ours in parallel; returns the result of each.
    pub fn delete_all(&mut self, names: &[&str]) -> Vec<Result<(), OpError>> {
        let found: Vec<_> = names.iter().map(|name| self.find_own(name)).collect();
        let indexes: Vec<u32> = found.iter().flatten().flatten().map(|link| link.index).collect();
        let mut deleted = delete_links(self.netns, &indexes).into_iter();
        let mut results = Vec::with_capacity(names.len());
        for (name, link) in names.iter().zip(found) {
            let result = link.and_then(|link| match link.and_then(|link| Some((link.index, deleted.next()?))) {
                Some((index, Ok(()))) => {
                    self.cache.mark_removed(index);
                    Ok(())
                }
                Some((_, Err(e))) => Err(e.context(format!("cannot delete interface {name}"))),
                None => Ok(()),
            });
            if result.is_ok() {
                self.cache.remove_link(name);
            }
            results.push(result);
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

    /// Like [`Links::find`]; a foreign link is an error.
    fn find_own(&mut self, name: &str) -> Result<Option<LinkInfo>, OpError> {
        match self.find(name)? {
            Some(link) if !is_own_link(&link) => Err(foreign_link_error(&link)),
            link => Ok(link),
        }
    }

    /// Returns the existing link if it can be changed to the wanted state; otherwise removes it.
    fn reuse_or_delete(&mut self, link: LinkInfo, wanted: &LinkState) -> Result<Option<LinkInfo>, OpError> {
        let ethtool = self.ethtool;
        let current = self.cache.link_state(&link, |name| ethtool.tx_checksum(name));
        let keep = match (current.map(|c| c.kind), &wanted.kind) {
            (Some(LinkKind::Vxlan(is)), LinkKind::Vxlan(wanted)) => is.changes_in_place(wanted),
            (Some(LinkKind::Bridge), LinkKind::Bridge)
            | (Some(LinkKind::Port), LinkKind::Port)
            | (Some(LinkKind::Pair(_)), LinkKind::Pair(None)) => true,
            (Some(LinkKind::Pair(_)), LinkKind::Pair(Some(target))) => self.leads_to(&link, target)?,
            _ => false,
        };
        if keep {
            return Ok(Some(link));
        }
        self.delete(&link.name)?;
        Ok(None)
    }

    fn create(&mut self, name: &str, wanted: &LinkState) -> Result<(), OpError> {
        match &wanted.kind {
            LinkKind::Vxlan(vxlan) => {
                let link = LinkVxlan::new(name, vxlan.vni.get()).port(vxlan.port).learning(vxlan.learning).ttl(TTL);
                let created = self.add_vxlan(build_with_defaults(with_underlay(link, vxlan), wanted));
                created.map_err(|e| self.vxlan_error(name, vxlan, &e))
            }
            LinkKind::Bridge => {
                let link = LinkMessageBuilder::<LinkBridge>::new(name)
                    .append_info_data(InfoBridge::StpState(BridgeStpState::Disabled))
                    .append_info_data(InfoBridge::MulticastSnooping(false))
                    // Frames to the bridge's own group addresses (such as LLDP) bypass all rules (`br_handle_frame` in
                    // net/bridge/br_input.c). The bridge must not learn from them, or a container could attract another
                    // container's frames.
                    .append_info_data(InfoBridge::MultiBoolOpt(BridgeBooleanOptions { value: NO_LL_LEARN, mask: NO_LL_LEARN }));
                let created = self.socket.add_link(build_with_defaults(link, wanted));
                created.map_err(|e| e.context(format!("cannot create bridge {name}")))
            }
            LinkKind::Pair(Some(target)) => self.create_pair(name, target, wanted),
            LinkKind::Pair(None) => Err(error(
                libc::ENODEV,
                format!("interface {name} does not exist yet: the network namespace of its other end creates the pair"),
            )),
            LinkKind::Port | LinkKind::Foreign { .. } => {
                Err(error(libc::ENODEV, format!("interface {name} is gone: attach its container again to create a new pair")))
            }
        }
    }

    /// Creates a VXLAN device. That of an isolated network is created in the host's namespace and moved by the same request: it
    /// keeps the UDP socket, the external interface and the routes of the namespace in which it was created (`vxlan_newlink` in
    /// the kernel's `drivers/net/vxlan/vxlan_core.c`). All later requests about it go to its own namespace; the index of the
    /// external interface is then still one of the host's namespace.
    fn add_vxlan(&mut self, mut link: LinkMessage) -> Result<(), KernelError> {
        let Some(host) = self.host else { return self.socket.add_link(link) };
        link.attributes.push(LinkAttribute::NetNsFd(self.netns.as_fd().as_raw_fd()));
        open_socket(host)?.add_link(link)
    }

    /// Gives a link our alias and disables IPv6's automatic configuration, unless it has the alias: before it comes up for the
    /// first time.
    fn ensure_alias(&mut self, link: &LinkInfo) -> Result<(), OpError> {
        if link.alias == LINK_ALIAS { Ok(()) } else { self.set_alias(link) }
    }

    /// Like [`Links::ensure_alias`], but regardless of the current alias.
    fn set_alias(&mut self, link: &LinkInfo) -> Result<(), OpError> {
        let ipv6 = self.sysctls.write_if_exists(&sysctl::accept_ra(&link.name), sysctl::OFF)?;
        let change = alias_message(link.index, ipv6);
        self.socket.change_link(change).map_err(|e| alias_error(&link.name, &e))
    }

    fn change_vxlan(&mut self, link: &LinkInfo, wanted: &Vxlan) -> Result<(), OpError> {
        let current = link.vxlan.clone().unwrap_or_default();
        if current.local != Some(wanted.local) || current.link != wanted.underlay {
            let change = LinkMessageBuilder::<LinkVxlan>::new_with_info_kind(InfoKind::Vxlan).index(link.index);
            let changed = self.socket.change_link(with_underlay(change, wanted).build());
            changed.map_err(|e| self.vxlan_error(&link.name, wanted, &e))?;
        }
        if self.ethtool.tx_checksum(&link.name) != wanted.tx_checksum {
            self.ethtool.set_tx_checksum(&link.name, wanted.tx_checksum)?;
        }
        Ok(())
    }

    /// Changes MAC, MTU, bridge and up state, as far as they differ.
    fn change(&mut self, link: &LinkInfo, wanted: &LinkState) -> Result<(), OpError> {
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
        let changed = self.socket.change_link(change.build());
        changed.map_err(|e| change_error(name, wanted, &e))?;
        if link.mtu < IPV6_MIN_MTU && wanted.mtu >= IPV6_MIN_MTU {
            self.disable_ipv6_autoconf(link)?;
        }
        Ok(())
    }

    /// Undoes IPv6's automatic configuration on a link where the kernel has just started IPv6. A link-local address exists by
    /// then.
    fn disable_ipv6_autoconf(&mut self, link: &LinkInfo) -> Result<(), OpError> {
        self.set_alias(link)?;
        let switch = sysctl::disable_ipv6(&link.name);
        if self.sysctls.read(&switch)?.as_deref() == Some(sysctl::OFF) {
            // IPv6 has only just started, so no other address is lost.
            self.sysctls.write(&switch, "1")?;
            self.sysctls.write(&switch, sysctl::OFF)?;
        }
        Ok(())
    }

    /// Sets whether frames may leave through the port by which they arrived. A port that joins another bridge starts with that
    /// off.
    fn change_hairpin(&mut self, link: &LinkInfo, wanted: &LinkState) -> Result<(), OpError> {
        let joins = wanted.master.and_then(|bridge| self.cache.index(bridge)) != link.master;
        if wanted.master.is_none() || wanted.hairpin == (link.hairpin && !joins) {
            return Ok(());
        }
        let port = LinkBridgePort::new(link.index).append_info_data(InfoBridgePort::HairpinMode(wanted.hairpin));
        let changed = self.socket.change_link(port.build());
        changed.map_err(|e| change_error(&link.name, wanted, &e))
    }

    /// The error of a VXLAN device; names the conflicting device if there is one.
    fn vxlan_error(&mut self, name: &str, wanted: &Vxlan, cause: &KernelError) -> OpError {
        let mut e = cause.context(format!("cannot create VXLAN device {name}"));
        let remedy = match cause.errno {
            libc::EEXIST => {
                // The kernel keeps VNIs apart in each namespace in which devices are created.
                let links = match self.host {
                    None => objects::links(self.socket),
                    Some(host) => host.route_socket().and_then(|mut socket| objects::links(&mut socket)),
                };
                let conflict = links.unwrap_or_default().into_iter().find(|l| {
                    l.name != name && l.vxlan.as_ref().is_some_and(|v| v.id == wanted.vni.get() && v.port == wanted.port)
                });
                let hidden = match self.host {
                    None => "another device",
                    Some(_) => "a device in another network namespace, or in one that was deleted a moment ago",
                };
                let conflict = conflict.map_or_else(|| hidden.to_owned(), |l| format!("interface {}", l.name));
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

/// Removes links in parallel; a link that does not exist counts as removed. Blocks, but not the runtime's other tasks.
///
/// The kernel takes some 15 ms for a link, mostly waiting until no processor can see it any more (`netdev_run_todo` in
/// `net/core/dev.c`), but hardly longer for several links at once. So threads share the links, each with its own socket. The port
/// ids of these sockets are not filtered from the events: record the links as removed before their events are processed.
pub fn delete_links(netns: &Netns, indexes: &[u32]) -> Vec<Result<(), KernelError>> {
    let delete = |indexes: &[u32]| -> Vec<_> { indexes.iter().map(|index| delete_link(netns, *index)).collect() };
    if indexes.len() < 2 {
        return blocking(|| delete(indexes));
    }
    blocking(|| {
        std::thread::scope(|scope| {
            let share = indexes.len().div_ceil(MAX_DELETE_THREADS);
            let threads: Vec<_> = indexes.chunks(share).map(|share| scope.spawn(move || delete(share))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        })
    })
}

fn delete_link(netns: &Netns, index: u32) -> Result<(), KernelError> {
    match open_socket(netns)?.delete_link(index) {
        Err(e) if e.errno != libc::ENODEV => Err(e),
        _ => Ok(()),
    }
}

fn open_socket(netns: &Netns) -> Result<RouteSocket, KernelError> {
    netns.route_socket().map_err(|e| KernelError { errno: e.errno, detail: e.message })
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
