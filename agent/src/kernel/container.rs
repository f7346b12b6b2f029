//! Attaches containers to the bridge through veth pairs.
//!
//! The inner end is created in the container's namespace under its final name. The outer end becomes a port of the bridge.
//! Attaching is all or nothing: if a step fails, the pair is removed, which takes both ends and all their settings.
//!
//! The planned elements are in the source filter's sets before the port joins the bridge. So the filter checks each packet by the
//! same rules and does not drop the first one. Each step is in the local entries at once, so the reconciler finds nothing to do.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkFlags;
use rtnetlink::LinkUnspec;
use tokio::sync::Mutex;

use super::cache::{LINK_GROUP, is_own_link};
use super::link::{alias_error, alias_message, delete_links, foreign_link_error};
use super::netns::{LOOPBACK_IFINDEX, Netns, NetnsError, set_loopback_up};
use super::nft::{ConntrackCleaner, StaleFilter};
use super::objects::{self, LinkInfo, RouteInfo};
use super::peer_messages::EntryQuery;
use super::route_socket::{KernelError, RouteSocket};
use super::rtnl::{arp_notify, new_address, route, veth};
use super::snapshot::{self, OverlaySnapshot};
use super::sysctl::{self, Sysctls};
use super::{Shared, blocking, host_ports};
use crate::model::device::bridge_full_message;
use crate::model::{Cidr, Device, Family, PerFamily, PublishedPort};
use crate::plan::ruleset::{Counter, Element, SetName, Table};
use crate::plan::state::PROTOCOL;
use crate::plan::{HostPorts, Key, Op, OpError, PortDriver, PortSpec, SourceFilter, Value};

/// Number and interval of polls until a new interface is running: 50 ms in total. The kernel's own task takes less than 1 ms.
const MAX_RUNNING_POLLS: u32 = 100;
const RUNNING_POLL_INTERVAL: Duration = Duration::from_micros(500);

/// Attaches and detaches container ports. Cheap to clone.
#[derive(Clone)]
pub struct PortManager {
    netns: Netns,
    host: Netns,
    shared: Arc<Mutex<Shared>>,
    connections: Arc<ConntrackCleaner>,
}

impl PortManager {
    pub(super) fn new(netns: Netns, host: Netns, shared: Arc<Mutex<Shared>>, connections: Arc<ConntrackCleaner>) -> PortManager {
        PortManager { netns, host, shared, connections }
    }

    /// Reads the current state of the bridge, its ports and the VXLAN devices. Does not wait for running changes; blocks.
    pub fn snapshot(&self, bridge: Device) -> Result<OverlaySnapshot, OpError> {
        snapshot::read_overlay(&self.netns, bridge)
    }

    /// Reads how many packets our filters have dropped since their tables were created. Waits only for a running nf_tables
    /// transaction; blocks.
    pub fn dropped_packets(&self) -> Result<BTreeMap<Counter, u64>, OpError> {
        snapshot::dropped_packets(&self.netns)
    }
}

impl PortDriver for PortManager {
    async fn attach_port(&self, spec: &PortSpec) -> Result<SourceFilter, OpError> {
        let mut shared = self.shared.lock().await;
        attach_port(&mut shared, spec)
    }

    fn check_port(&self, spec: &PortSpec) -> Result<Option<String>, OpError> {
        let mut socket = self.netns.route_socket()?;
        let found = objects::link(&mut socket, &spec.bridge.name()).and_then(|bridge| {
            let link = objects::link(&mut socket, &spec.host_interface)?;
            Ok((bridge.index, link))
        });
        let (bridge, link) = match found {
            Ok(found) => found,
            Err(e) if e.errno == libc::ENODEV => {
                return Ok(Some(format!("{} or the bridge does not exist", spec.host_interface)));
            }
            Err(e) => return Err(e.context(format!("cannot examine interface {}", spec.host_interface))),
        };
        if let Some(difference) = outer_difference(spec, &link, bridge) {
            return Ok(Some(difference));
        }
        let netns = Netns::open(&spec.netns).map_err(|e| OpError::from(&e))?;
        netns.run(|| inner_difference(spec, link.index)).map_err(|e| OpError::from(&e))?
    }

    async fn detach_port(&self, host_interface: &str) -> Result<(), OpError> {
        let index = {
            let mut shared = self.shared.lock().await;
            let link = match objects::link(&mut shared.socket, host_interface) {
                Err(e) if e.errno == libc::ENODEV => None,
                Err(e) => return Err(e.context(format!("cannot examine interface {host_interface}"))),
                Ok(link) if !is_own_link(&link) => return Err(foreign_link_error(&link)),
                Ok(link) => Some(link.index),
            };
            let Some(index) = link else {
                shared.cache.remove_link(host_interface);
                return revoke_sources(&mut shared, host_interface);
            };
            // First: the container sends nothing any more, and what the kernel does later for the rules overlaps with its wait for
            // the link.
            revoke_sources(&mut shared, host_interface)?;
            shared.cache.mark_removed(index);
            index
        };
        let removed = delete_links(&self.netns, &[index]).into_iter().collect::<Result<(), _>>();
        let mut shared = self.shared.lock().await;
        let Err(error) = removed else {
            shared.cache.remove_link(host_interface);
            // The reconciler may have added them again since, because it learns of the detach later. While the link exists, it does
            // not remove them.
            return revoke_sources(&mut shared, host_interface);
        };
        shared.cache.unmark_removed(index);
        shared.links().refresh(host_interface)?;
        Err(error.context(format!("cannot delete interface {host_interface}")))
    }

    fn flush_connections(&self, addresses: &PerFamily<IpAddr>) {
        let stale = addresses.iter().map(|(_, address)| StaleFilter::Address(*address)).collect();
        super::delete_stale_connections(&self.connections, stale);
    }

    fn netns_exists(&self, netns: &Path) -> bool {
        Netns::open(netns).is_ok()
    }

    fn netns_id(&self, netns: &Path) -> Option<String> {
        match Netns::open(netns).and_then(|netns| netns.id()) {
            Ok(id) => Some(id),
            Err(error) => {
                tracing::debug!(%error, "cannot identify network namespace");
                None
            }
        }
    }

    fn is_host_netns(&self, netns: &Path) -> bool {
        let is_own = |netns: Netns| [&self.host, &self.netns].iter().any(|own| netns.is_same(own).unwrap_or(false));
        Netns::open(netns).is_ok_and(is_own)
    }

    fn host_netns(&self) -> PathBuf {
        // For users the host's namespace is that of process 1; name it if the agent runs there.
        let first = Path::new("/proc/1/ns/net");
        let is_host = Netns::open(first).is_ok_and(|first| first.is_same(&self.host).unwrap_or(false));
        if is_host { first.to_owned() } else { format!("/proc/{}/ns/net", std::process::id()).into() }
    }

    async fn set_loopback_up(&self, netns: &Path) -> Result<(), OpError> {
        let up = || {
            let netns = Netns::open(netns)?;
            netns.run(set_loopback_up)?.map_err(|source| NetnsError::Loopback { path: netns.path().to_owned(), source })
        };
        blocking(up).map_err(|e| OpError::from(&e))
    }

    fn host_ports(&self, wanted: &[PublishedPort]) -> Result<HostPorts, OpError> {
        self.host.run_in_place(|| host_ports::query(wanted)).map_err(|e| OpError::from(&e))?
    }
}

fn attach_port(shared: &mut Shared, spec: &PortSpec) -> Result<SourceFilter, OpError> {
    let netns = Netns::open(&spec.netns).map_err(|e| OpError::from(&e))?;
    let bridge = spec.bridge;
    let name = bridge.name();
    let bridge = objects::link(&mut shared.socket, &name)
        .map_err(|e| e.context(format!("cannot attach {}: the overlay's bridge {name} does not exist", spec.host_interface)))?;
    match objects::link(&mut shared.socket, &spec.host_interface) {
        Err(e) if e.errno == libc::ENODEV => {}
        Err(e) => return Err(e.context(format!("cannot examine interface {}", spec.host_interface))),
        Ok(link) if !is_own_link(&link) => return Err(foreign_link_error(&link)),
        Ok(link) => {
            let outer = outer_difference(spec, &link, bridge.index);
            if outer.is_none() {
                set_inner_mtu(spec, &netns, link.index)?;
            }
            let inner = || run_in_netns(&netns, || inner_difference(spec, link.index));
            match outer.map_or_else(inner, |difference| Ok(Some(difference)))? {
                None => return allow_sources(shared, spec),
                Some(difference) => {
                    tracing::info!(interface = spec.host_interface, difference, "recreating veth pair");
                }
            }
            // A pair left incomplete by a crash, or one with other settings.
            shared.links().delete(&spec.host_interface)?;
        }
    }
    let built = create_port(shared, spec, &netns, bridge.index);
    let result = built.and_then(|source_filter| shared.links().refresh(&spec.host_interface).map(|()| source_filter));
    if result.is_err()
        && let Err(error) = shared.links().delete(&spec.host_interface)
    {
        tracing::warn!(%error, interface = spec.host_interface, "cannot remove incomplete veth pair");
    }
    result
}

/// Runs all steps in a row over blocking sockets: handing each request to another task costs as much as the kernel needs for it.
/// The runtime's other tasks are not moved to another thread either, because all steps together take less than two milliseconds.
fn create_port(shared: &mut Shared, spec: &PortSpec, netns: &Netns, bridge: u32) -> Result<SourceFilter, OpError> {
    let host = &spec.host_interface;
    let inner = LinkUnspec::new_with_name(&spec.interface)
        .setns_by_fd(netns.as_fd().as_raw_fd())
        .address(spec.mac.0.to_vec())
        .mtu(spec.mtu);
    let pair = veth(host, inner.build()).link_group(LINK_GROUP).mtu(spec.mtu);
    shared.socket.create(&RouteNetlinkMessage::NewLink(pair.build())).map_err(|e| {
        let mut error = e.context(format!("cannot create veth pair {host} with {} in {}", spec.interface, spec.netns.display()));
        if e.errno == libc::EEXIST {
            error.message.push_str("; the namespace has an interface of that name already: choose another one");
        }
        error
    })?;
    let link = objects::link(&mut shared.socket, host).map_err(|e| e.context(format!("cannot find {host} after creating it")))?;
    let index = link.index;
    // Known before its elements, which no comparison may remove meanwhile.
    if let Some(state) = shared.cache.link_state(&link, |_| false) {
        shared.cache.insert_link(host, index, state);
    }
    let ipv6 = shared.sysctls.write_if_exists(&sysctl::accept_ra(host), sysctl::OFF)?;
    shared.socket.change_link(alias_message(index, ipv6)).map_err(|e| alias_error(host, &e))?;
    let (mut netns_socket, inner) = netns.run_in_place(|| configure_inner(spec)).map_err(|e| OpError::from(&e))??;
    let source_filter = allow_sources(shared, spec)?;
    let port = LinkUnspec::new_with_index(index).controller(bridge).up();
    let joined = shared.socket.change_link(port.build());
    joined.map_err(|e| {
        let mut error = e.context(format!("cannot make {host} a port of {}", spec.bridge));
        if e.errno == libc::EXFULL {
            error.message.push_str("; ");
            error.message.push_str(&bridge_full_message());
        }
        error
    })?;
    let announced =
        wait_until_running(&mut shared.socket, host).and_then(|()| announce_addresses(&mut netns_socket, inner, spec));
    announced.map_err(|e| e.context(format!("cannot announce {} in {}", spec.interface, spec.netns.display())))?;
    // The last step, because removing the pair does not undo it.
    let loopback = netns_socket.change_link(LinkUnspec::new_with_index(LOOPBACK_IFINDEX).up().build());
    loopback.map_err(|e| e.context(format!("cannot set lo up in {}", spec.netns.display())))?;
    Ok(source_filter)
}

/// Makes the kernel announce the inner end's addresses. It does so whenever the MAC is set, even to the same value
/// (`inetdev_event` in net/ipv4/devinet.c, `ndisc_netdev_event` in net/ipv6/ndisc.c). Neighbours then replace the MAC of the
/// addresses' last owner.
fn announce_addresses(socket: &mut RouteSocket, index: u32, spec: &PortSpec) -> Result<(), KernelError> {
    wait_until_running(socket, &spec.interface)?;
    socket.change_link(LinkUnspec::new_with_index(index).address(spec.mac.0.to_vec()).build())
}

/// Waits until an interface that is up is running: it sends and, as a bridge port, forwards. The kernel sets that state in a task
/// of its own (`linkwatch_do_dev` in net/core/link_watch.c); since Linux 6.8 a query of the interface sets it at once.
fn wait_until_running(socket: &mut RouteSocket, name: &str) -> Result<(), KernelError> {
    for _ in 0..MAX_RUNNING_POLLS {
        if objects::link(socket, name)?.flags.contains(LinkFlags::Running) {
            return Ok(());
        }
        std::thread::sleep(RUNNING_POLL_INTERVAL);
    }
    tracing::warn!(interface = name, "interface not running yet; neighbours may keep stale MACs for half a minute");
    Ok(())
}

/// Adds the planned elements to the source filter, and removes those of an earlier user of the interface. If the table does not
/// exist yet, its creation adds all elements.
fn allow_sources(shared: &mut Shared, spec: &PortSpec) -> Result<SourceFilter, OpError> {
    if shared.cache.local().get(&Key::Ruleset(Table::Bridge)).is_none() {
        return Ok(SourceFilter::Pending);
    }
    set_sources(shared, &spec.host_interface, &spec.sources, "cannot add the container's addresses to the source filter")?;
    Ok(SourceFilter::Applied)
}

/// Removes the interface's elements from the source filter.
fn revoke_sources(shared: &mut Shared, host_interface: &str) -> Result<(), OpError> {
    set_sources(shared, host_interface, &[], "cannot remove the container's addresses from the source filter")
}

/// Makes these elements the interface's only ones in the source filter.
fn set_sources(shared: &mut Shared, interface: &str, wanted: &[Element], what: &str) -> Result<(), OpError> {
    let Shared { nft, cache, .. } = shared;
    let mut local = cache.local();
    let obsolete = local.source_elements(interface).filter(|element| !wanted.contains(element));
    let mut ops: Vec<Op> = obsolete.map(|element| Op::Delete(Key::Element(element), Value::Element(None))).collect();
    ops.extend(wanted.iter().map(|element| Op::Set(Key::Element(element.clone()), Value::Element(None))));
    match nft.apply(&ops, &mut local.rules).into_iter().next() {
        Some((_, OpError { errno, message })) => Err(OpError { errno, message: format!("{what}: {message}") }),
        None => Ok(()),
    }
}

/// Configures the inner end; runs inside the namespace. Returns a socket for the remaining steps there, and the inner end's
/// index.
fn configure_inner(spec: &PortSpec) -> Result<(RouteSocket, u32), OpError> {
    let inner = &spec.interface;
    let step = |what: &str, error: KernelError| error.context(format!("cannot {what} in {}", spec.netns.display()));
    let mut socket = RouteSocket::open()?;
    let index = objects::link(&mut socket, inner).map_err(|e| step(&format!("find {inner}"), e))?.index;
    let sysctls = Sysctls::open(&[Family::V6]);
    sysctls.write_if_exists(&sysctl::accept_ra(inner), "0")?;
    sysctls.write_if_exists(&sysctl::ndisc_notify(inner), "1")?;
    if !spec.sources.iter().any(|element| matches!(element.set(), SetName::Source(Family::V6) | SetName::Unchecked)) {
        // The container may send no IPv6. But the kernel creates and announces a link-local address for each interface that
        // comes up, which the source filter would count as spoofed.
        sysctls.write_if_exists(&sysctl::addr_gen_mode(inner), "1")?;
    }
    if spec.addresses.iter().any(IpNetwork::is_ipv6) {
        // New interfaces in the namespace may have IPv6 disabled (`conf/default/disable_ipv6`): the kernel would refuse the
        // address.
        sysctls.write_if_exists(&sysctl::disable_ipv6(inner), sysctl::OFF)?;
    }
    for address in &spec.addresses {
        let added = socket.create(&RouteNetlinkMessage::NewAddress(new_address(index, *address)));
        added.map_err(|e| step(&format!("add address {address} to {inner}"), e))?;
    }
    let up = LinkUnspec::new_with_index(index).append_extra_attribute(arp_notify()).up().build();
    let up = socket.change_link(up);
    up.map_err(|e| step(&format!("set {inner} up"), e))?;
    for (destination, gateway) in &spec.routes {
        let message = route(Some(*destination), Some(*gateway), Some(index), PROTOCOL.into());
        socket.create(&RouteNetlinkMessage::NewRoute(message)).map_err(|e| {
            let mut error = step(&format!("add {} via {gateway}", route_name(*destination)), e);
            if error.errno == libc::EEXIST {
                error.message.push_str(if destination.length() == 0 {
                    "; the namespace has a default route already: keep it with --no-default-route (in a CNI network \"isDefaultGateway\": false), or \
                     remove it"
                } else {
                    "; the namespace has this route already: one interface on the overlay is enough for a container; else remove the route"
                });
            }
            error
        })?;
    }
    Ok((socket, index))
}

/// Sets the inner end's MTU in place if it is the other end of the host's interface and its MTU differs. Recreating the pair
/// would lose packets.
fn set_inner_mtu(spec: &PortSpec, netns: &Netns, host_index: u32) -> Result<(), OpError> {
    let inner = &spec.interface;
    run_in_netns(netns, || {
        let mut socket = RouteSocket::open()?;
        let index = match objects::link(&mut socket, inner) {
            Ok(link) if link.peer == Some(host_index) && link.mtu != spec.mtu => link.index,
            _ => return Ok(()),
        };
        let resized = socket.change_link(LinkUnspec::new_with_index(index).mtu(spec.mtu).build());
        resized.map_err(|e| e.context(format!("cannot set the MTU of {inner} in {} to {}", spec.netns.display(), spec.mtu)))
    })
}

/// The first setting of the host's end that differs from `spec`.
fn outer_difference(spec: &PortSpec, link: &LinkInfo, bridge: u32) -> Option<String> {
    let name = &spec.host_interface;
    let checks = [
        (!is_own_link(link), format!("{name} is not managed by overlayd")),
        (link.master != Some(bridge), format!("{name} is not a port of {}", spec.bridge)),
        (link.mtu != spec.mtu, format!("{name} has MTU {}, not {}", link.mtu, spec.mtu)),
        (!link.up(), format!("{name} is down")),
    ];
    checks.into_iter().find(|(is_wrong, _)| *is_wrong).map(|(_, difference)| difference)
}

/// The first setting inside the namespace that differs from `spec`. Runs inside it; `host_index` is the index of the host's end.
fn inner_difference(spec: &PortSpec, host_index: u32) -> Result<Option<String>, OpError> {
    let mut socket = RouteSocket::open()?;
    let name = &spec.interface;
    let link: LinkInfo = match objects::link(&mut socket, name) {
        Ok(link) => link,
        Err(e) if e.errno == libc::ENODEV => return Ok(Some(format!("{name} does not exist"))),
        Err(e) => return Err(e.context(format!("cannot examine {name} in {}", spec.netns.display()))),
    };
    let mac = link.mac.map(|mac| mac.to_string()).unwrap_or_default();
    let checks = [
        (link.peer != Some(host_index), format!("{name} is not the other end of {}", spec.host_interface)),
        (link.mac != Some(spec.mac), format!("{name} has MAC {mac}, not {}", spec.mac)),
        (link.mtu != spec.mtu, format!("{name} has MTU {}, not {}", link.mtu, spec.mtu)),
        (!link.up(), format!("{name} is down")),
    ];
    if let Some((_, difference)) = checks.into_iter().find(|(is_wrong, _)| *is_wrong) {
        return Ok(Some(difference));
    }
    let addresses = objects::addresses(&mut socket, link.index)?;
    let has = |wanted: &IpNetwork| addresses.iter().any(|found| found.index == link.index && found.address == *wanted);
    if let Some(missing) = spec.addresses.iter().find(|address| !has(address)) {
        return Ok(Some(format!("{name} lacks {missing}")));
    }
    for (destination, gateway) in &spec.routes {
        if !has_route(&mut socket, *destination, *gateway, link.index)? {
            return Ok(Some(format!("{} via {gateway} is missing", route_name(*destination))));
        }
    }
    Ok(None)
}

/// Describes a route in messages.
fn route_name(destination: Cidr) -> String {
    if destination.length() == 0 { "the default route".to_owned() } else { format!("the route to {destination}") }
}

fn has_route(socket: &mut RouteSocket, destination: Cidr, gateway: IpAddr, interface: u32) -> Result<bool, OpError> {
    let query = EntryQuery::Routes(destination.family(), PROTOCOL);
    let matches = |route: RouteInfo| route.gateway == Some(gateway) && route.interface == Some(interface);
    let read = |found: &mut bool, _, body: &[u8]| *found |= RouteInfo::read_to(body, destination).is_some_and(matches);
    let found = socket.dump(&query, || false, read);
    found.map_err(|e| e.context("cannot list the container's routes"))
}

fn run_in_netns<T: Send>(netns: &Netns, work: impl FnOnce() -> Result<T, OpError> + Send) -> Result<T, OpError> {
    blocking(|| netns.run(work)).map_err(|e| OpError::from(&e))?
}
