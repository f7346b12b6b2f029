//! Wires containers: a veth pair whose inner end is made in the container's namespace under its final name, and whose outer end is a port of the
//! bridge. All or nothing: where a step fails the pair is removed, which takes both ends and all that was set on them.
//!
//! What the container may send is in the sets of the guard before its port joins the bridge: not one packet of it is judged by another measure, and
//! the first one is not lost.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use rtnetlink::LinkUnspec;
use tokio::sync::Mutex;

use super::known::{LINK_GROUP, is_marked};
use super::link::{foreign, marked, not_marked, remove};
use super::netns::{LOOPBACK, Netns, NetnsError, loopback_up};
use super::nft::{Connections, Stale};
use super::objects::{self, LinkInfo, RouteInfo};
use super::rtnl::{arp_notify, new_address, route, veth};
use super::socket::{Refusal, RouteSocket};
use super::view::{self, OverlayView};
use super::wire::Query;
use super::{Shared, blocking, sockets, sysctl};
use crate::model::device::{PORT_PREFIX, bridge_full};
use crate::model::{Cidr, Device, Family, Mac, PerFamily, Publish};
use crate::plan::desired::may_send;
use crate::plan::ruleset::{Counter, Element, Table};
use crate::plan::state::PROTOCOL;
use crate::plan::{ContainerPath, Guard, HostPorts, Key, Op, OpError, Plug, Value};

/// How often, and how long in between, a new interface is looked at until it runs: 50 ms, where the kernel's own task takes less than one.
const RUNNING_TRIES: u32 = 100;
const RUNNING_PAUSE: Duration = Duration::from_micros(500);

/// The maker of containers' wires. Cheap to clone.
#[derive(Clone)]
pub struct Plugger {
    shared: Arc<Mutex<Shared>>,
    connections: Arc<Connections>,
}

impl Plugger {
    pub(super) fn new(shared: Arc<Mutex<Shared>>, connections: Arc<Connections>) -> Plugger {
        Plugger { shared, connections }
    }

    /// The bridge, its ports and the tunnel's devices as they are now. Waits for nothing that is being changed; blocks.
    pub fn view(&self, bridge: Device) -> Result<OverlayView, OpError> {
        view::overlay(bridge)
    }

    /// What the guards have dropped since their tables were made, in packets. Waits for nothing that is being changed but a transaction of
    /// nf_tables; blocks.
    pub fn dropped(&self) -> Result<BTreeMap<Counter, u64>, OpError> {
        view::dropped()
    }
}

impl ContainerPath for Plugger {
    async fn plug(&self, wanted: &Plug) -> Result<Guard, OpError> {
        let mut shared = self.shared.lock().await;
        plug(&mut shared, wanted).await
    }

    fn difference(&self, wanted: &Plug) -> Result<Option<String>, OpError> {
        let mut socket = RouteSocket::open()?;
        let found = objects::link(&mut socket, &wanted.bridge.name()).and_then(|bridge| {
            let link = objects::link(&mut socket, &wanted.host_interface)?;
            Ok((bridge.index, link))
        });
        let (bridge, link) = match found {
            Ok(found) => found,
            Err(e) if e.errno == libc::ENODEV => {
                return Ok(Some(format!("{} or the bridge is not there", wanted.host_interface)));
            }
            Err(e) => return Err(e.during(format!("cannot examine interface {}", wanted.host_interface))),
        };
        if let Some(difference) = outer_difference(wanted, &link, bridge) {
            return Ok(Some(difference));
        }
        let netns = Netns::open(&wanted.netns).map_err(|e| OpError::from(&e))?;
        netns.run(|| inner_difference(wanted, link.index)).map_err(|e| OpError::from(&e))?
    }

    async fn unplug(&self, host_interface: &str) -> Result<(), OpError> {
        let index = {
            let mut shared = self.shared.lock().await;
            let link = match objects::link(&mut shared.socket, host_interface) {
                Err(e) if e.errno == libc::ENODEV => None,
                Err(e) => return Err(e.during(format!("cannot examine interface {host_interface}"))),
                Ok(link) if !is_marked(&link) => return Err(foreign(&link)),
                Ok(link) => Some(link.index),
            };
            shared.known.drop_link(host_interface);
            let Some(index) = link else { return dismiss(&mut shared, host_interface) };
            shared.known.removed_link(index);
            index
        };
        let removed = remove(index).await;
        let mut shared = self.shared.lock().await;
        let Err(error) = removed else { return dismiss(&mut shared, host_interface) };
        shared.known.kept_link(index);
        shared.links().note(host_interface)?;
        Err(error.during(format!("cannot delete interface {host_interface}")))
    }

    fn forget(&self, addresses: &PerFamily<IpAddr>) {
        let stale = addresses.iter().map(|(_, address)| Stale::Address(*address)).collect();
        super::forget(&self.connections, stale);
    }

    fn netns_alive(&self, netns: &Path) -> bool {
        Netns::open(netns).is_ok()
    }

    fn netns_id(&self, netns: &Path) -> Option<String> {
        match Netns::open(netns).and_then(|netns| netns.id()) {
            Ok(id) => Some(id),
            Err(error) => {
                tracing::debug!(%error, "a network namespace cannot be told from others");
                None
            }
        }
    }

    fn is_own_netns(&self, netns: &Path) -> bool {
        Netns::open(netns).and_then(|netns| netns.is_same(&Netns::current()?)).unwrap_or(false)
    }

    fn own_netns(&self) -> PathBuf {
        // The host's in the sense of a person: the first process's, where that is where the agent runs.
        let first = Path::new("/proc/1/ns/net");
        if self.is_own_netns(first) { first.to_owned() } else { format!("/proc/{}/ns/net", std::process::id()).into() }
    }

    async fn loopback(&self, netns: &Path) -> Result<(), OpError> {
        let up = || {
            let netns = Netns::open(netns)?;
            netns.run(loopback_up)?.map_err(|source| NetnsError::Loopback { path: netns.path().to_owned(), source })
        };
        blocking(up).map_err(|e| OpError::from(&e))
    }

    fn host_ports(&self, wanted: &[Publish]) -> Result<HostPorts, OpError> {
        sockets::host_ports(wanted)
    }

    fn ports(&self) -> Result<Vec<String>, OpError> {
        let links = objects::links(&mut RouteSocket::open()?)?;
        let port = |link: &LinkInfo| link.kind == "veth" && link.name.starts_with(PORT_PREFIX) && is_marked(link);
        Ok(links.into_iter().filter(port).map(|link| link.name).collect())
    }
}

async fn plug(shared: &mut Shared, wanted: &Plug) -> Result<Guard, OpError> {
    let netns = Netns::open(&wanted.netns).map_err(|e| OpError::from(&e))?;
    let bridge = wanted.bridge;
    let name = bridge.name();
    let bridge = objects::link(&mut shared.socket, &name)
        .map_err(|e| e.during(format!("cannot plug {}: the overlay's bridge {name} is not there", wanted.host_interface)))?;
    match objects::link(&mut shared.socket, &wanted.host_interface) {
        Err(e) if e.errno == libc::ENODEV => {}
        Err(e) => return Err(e.during(format!("cannot examine interface {}", wanted.host_interface))),
        Ok(link) if !is_marked(&link) => return Err(foreign(&link)),
        Ok(link) => {
            let outer = outer_difference(wanted, &link, bridge.index);
            if outer.is_none() {
                resize(wanted, &netns, link.index)?;
            }
            let inner = || in_netns(&netns, || inner_difference(wanted, link.index));
            match outer.map_or_else(inner, |difference| Ok(Some(difference)))? {
                None => return admit(shared, wanted),
                Some(difference) => {
                    tracing::info!(interface = wanted.host_interface, difference, "a container's wire is made anew");
                }
            }
            // Half of a pair that a crash left, or one with other settings.
            shared.links().delete(&wanted.host_interface).await?;
        }
    }
    let built = build(shared, wanted, &netns, bridge.index);
    let result = built.and_then(|guard| shared.links().note(&wanted.host_interface).map(|()| guard));
    if result.is_err()
        && let Err(error) = shared.links().delete(&wanted.host_interface).await
    {
        tracing::warn!(%error, interface = wanted.host_interface, "half of a container's wire stays behind");
    }
    result
}

/// All steps in a row over blocking sockets: to hand each request to another task costs as much as the kernel takes for it. Nor is another thread
/// of the runtime told to go on in the place of this one: all of it takes less than two milliseconds.
fn build(shared: &mut Shared, wanted: &Plug, netns: &Netns, bridge: u32) -> Result<Guard, OpError> {
    let host = &wanted.host_interface;
    let inner = LinkUnspec::new_with_name(&wanted.interface)
        .setns_by_fd(netns.as_fd().as_raw_fd())
        .address(wanted.mac.0.to_vec())
        .mtu(wanted.mtu);
    let pair = veth(host, inner.build()).link_group(LINK_GROUP).mtu(wanted.mtu);
    shared.socket.create(&RouteNetlinkMessage::NewLink(pair.build())).map_err(|e| {
        let mut error = e.during(format!("cannot make {host} with {} in {}", wanted.interface, wanted.netns.display()));
        if e.errno == libc::EEXIST {
            error.message.push_str("; the namespace has an interface of that name already: choose another one");
        }
        error
    })?;
    let index = objects::link(&mut shared.socket, host).map_err(|e| e.during(format!("cannot find {host} just made")))?.index;
    let ipv6 = shared.interfaces.refuse_ra(host)?;
    change_link(&mut shared.socket, marked(index, ipv6)).map_err(|e| not_marked(host, &e))?;
    let (mut inside, inner) = netns.visit(|| configure(wanted)).map_err(|e| OpError::from(&e))??;
    let guard = admit(shared, wanted)?;
    let port = LinkUnspec::new_with_index(index).controller(bridge).up();
    let joined = change_link(&mut shared.socket, port.build());
    joined.map_err(|e| {
        let mut error = e.during(format!("cannot make {host} a port of {}", wanted.bridge));
        if e.errno == libc::EXFULL {
            error.message.push_str("; ");
            error.message.push_str(&bridge_full());
        }
        error
    })?;
    let announced = running(&mut shared.socket, host).and_then(|()| announce(&mut inside, inner, wanted));
    announced.map_err(|e| e.during(format!("cannot announce {} in {}", wanted.interface, wanted.netns.display())))?;
    // The last step, for it is the only one that does not go with the pair.
    let loopback = change_link(&mut inside, LinkUnspec::new_with_index(LOOPBACK).up().build());
    loopback.map_err(|e| e.during(format!("cannot set lo up in {}", wanted.netns.display())))?;
    Ok(guard)
}

/// Has the kernel announce the inner end's addresses, which it does where the MAC is set, also to the same one (`inetdev_event` in
/// net/ipv4/devinet.c, `ndisc_netdev_event` in net/ipv6/ndisc.c): neighbours replace the MAC of the addresses' last owner.
fn announce(inside: &mut RouteSocket, index: u32, wanted: &Plug) -> Result<(), Refusal> {
    running(inside, &wanted.interface)?;
    change_link(inside, LinkUnspec::new_with_index(index).address(wanted.mac.0.to_vec()).build())
}

/// Waits until an interface that is up sends and, as a port, forwards: the kernel gets to that in a task of its own (`linkwatch_do_dev` in
/// net/core/link_watch.c), since Linux 6.8 at once where the interface is asked for.
fn running(socket: &mut RouteSocket, name: &str) -> Result<(), Refusal> {
    for _ in 0..RUNNING_TRIES {
        if objects::link(socket, name)?.flags.contains(LinkFlags::Running) {
            return Ok(());
        }
        std::thread::sleep(RUNNING_PAUSE);
    }
    tracing::warn!(interface = name, "not running yet; neighbours may keep the MAC of an address's last owner for half a minute");
    Ok(())
}

fn change_link(socket: &mut RouteSocket, change: LinkMessage) -> Result<(), Refusal> {
    socket.change(&RouteNetlinkMessage::NewLink(change))
}

/// Lets the container send with its own addresses, or any where its source is not checked, and with nothing that another had behind that interface.
/// Where the table is not there yet, it comes with all elements.
fn admit(shared: &mut Shared, wanted: &Plug) -> Result<Guard, OpError> {
    if !shared.known.rules.contains_key(&Key::Ruleset(Table::Bridge)) {
        return Ok(Guard::ToCome);
    }
    let own = wanted.addresses.iter().map(|address| address.ip());
    let wanted_now: Vec<Element> = may_send(&wanted.host_interface, wanted.mac, own, wanted.source_check).collect();
    let mut ops = deletions(shared, &wanted.host_interface, |element| !wanted_now.contains(element));
    ops.extend(wanted_now.iter().map(|element| Op::Set(Key::Element(element.clone()), Value::Element(None))));
    change(shared, &ops, "cannot say what the container may send").map(|()| Guard::Told)
}

/// Takes what was behind an interface out of the guard's sets.
fn dismiss(shared: &mut Shared, host_interface: &str) -> Result<(), OpError> {
    let ops = deletions(shared, host_interface, |_| true);
    change(shared, &ops, "cannot take back what the container might send")
}

/// The ops that remove an interface's elements.
fn deletions(shared: &Shared, interface: &str, chosen: impl Fn(&Element) -> bool) -> Vec<Op> {
    let first = Element::Source(Box::new((interface.to_owned(), Mac([0; 6]), Family::V4.unspecified())));
    let rules = &shared.known.rules;
    let sources = rules.range(Key::Element(first)..).map_while(|(key, _)| match key {
        Key::Element(element @ Element::Source(_)) if element.interface() == Some(interface) => Some(element),
        _ => None,
    });
    let unchecked = Element::Unchecked(interface.into());
    let is_unchecked = rules.contains_key(&Key::Element(unchecked.clone()));
    let all = sources.cloned().chain(is_unchecked.then_some(unchecked));
    all.filter(chosen).map(|element| Op::Delete(Key::Element(element), Value::Element(None))).collect()
}

fn change(shared: &mut Shared, ops: &[Op], what: &str) -> Result<(), OpError> {
    let Shared { nft, known, .. } = shared;
    match nft.apply(ops, &mut known.rules).into_iter().next() {
        Some((_, OpError { errno, message })) => Err(OpError { errno, message: format!("{what}: {message}") }),
        None => Ok(()),
    }
}

/// Configures the inner end. Runs inside the namespace; the answer is a socket for what is left to be done there, and the inner end's index.
fn configure(wanted: &Plug) -> Result<(RouteSocket, u32), OpError> {
    let inner = &wanted.interface;
    let step = |what: &str, refusal: Refusal| refusal.during(format!("cannot {what} in {}", wanted.netns.display()));
    let mut socket = RouteSocket::open()?;
    let index = objects::link(&mut socket, inner).map_err(|e| step(&format!("find {inner}"), e))?.index;
    sysctl::write_if_there(&sysctl::accept_ra(inner), "0")?;
    sysctl::write_if_there(&sysctl::ndisc_notify(inner), "1")?;
    if wanted.source_check && !wanted.addresses.iter().any(IpNetwork::is_ipv6) {
        // Without an IPv6 address of the overlay it may send no IPv6 at all: each interface that comes up would be counted as a forger for the
        // link-local address that the kernel makes and announces unasked.
        sysctl::write_if_there(&sysctl::addr_gen_mode(inner), "1")?;
    }
    if wanted.addresses.iter().any(IpNetwork::is_ipv6) {
        // The namespace may make its interfaces without (`conf/default/disable_ipv6`): the kernel would refuse the address.
        sysctl::write_if_there(&sysctl::disable_ipv6(inner), sysctl::OFF)?;
    }
    for address in &wanted.addresses {
        let added = socket.create(&RouteNetlinkMessage::NewAddress(new_address(index, *address)));
        added.map_err(|e| step(&format!("add address {address} to {inner}"), e))?;
    }
    let up = LinkUnspec::new_with_index(index).append_extra_attribute(arp_notify()).up().build();
    let up = change_link(&mut socket, up);
    up.map_err(|e| step(&format!("set {inner} up"), e))?;
    for (destination, gateway) in &wanted.routes {
        let made = route(Some(*destination), Some(*gateway), Some(index), PROTOCOL.into());
        socket.create(&RouteNetlinkMessage::NewRoute(made)).map_err(|e| {
            let mut error = step(&format!("add {} via {gateway}", shown(*destination)), e);
            if error.errno == libc::EEXIST {
                error.message.push_str(if destination.length() == 0 {
                    "; it has a default route already: keep that one with --no-default-route (in a CNI network \"isDefaultGateway\": false), or \
                     remove it"
                } else {
                    "; it has such a route already: one interface on the overlay is enough for a container, or remove that route"
                });
            }
            error
        })?;
    }
    Ok((socket, index))
}

/// Gives the inner end the wished MTU, where it is the other end of that interface and only its MTU may be wrong: a pair that is made anew
/// loses packets.
fn resize(wanted: &Plug, netns: &Netns, host_index: u32) -> Result<(), OpError> {
    let inner = &wanted.interface;
    in_netns(netns, || {
        let mut socket = RouteSocket::open()?;
        let index = match objects::link(&mut socket, inner) {
            Ok(link) if link.peer == Some(host_index) && link.mtu != wanted.mtu => link.index,
            _ => return Ok(()),
        };
        let resized = change_link(&mut socket, LinkUnspec::new_with_index(index).mtu(wanted.mtu).build());
        resized.map_err(|e| e.during(format!("cannot set the MTU of {inner} in {} to {}", wanted.netns.display(), wanted.mtu)))
    })
}

/// What of the host's end is not as wanted.
fn outer_difference(wanted: &Plug, link: &LinkInfo, bridge: u32) -> Option<String> {
    let name = &wanted.host_interface;
    let wrong = [
        (!is_marked(link), format!("{name} is not ours")),
        (link.master != Some(bridge), format!("{name} is no port of {}", wanted.bridge)),
        (link.mtu != wanted.mtu, format!("{name} has MTU {}, not {}", link.mtu, wanted.mtu)),
        (!link.up(), format!("{name} is down")),
    ];
    wrong.into_iter().find(|(is_wrong, _)| *is_wrong).map(|(_, what)| what)
}

/// Runs inside the namespace: what of it is not in place, as the other end of the host's interface with that index.
fn inner_difference(wanted: &Plug, host_index: u32) -> Result<Option<String>, OpError> {
    let mut socket = RouteSocket::open()?;
    let name = &wanted.interface;
    let link: LinkInfo = match objects::link(&mut socket, name) {
        Ok(link) => link,
        Err(e) if e.errno == libc::ENODEV => return Ok(Some(format!("{name} is not there"))),
        Err(e) => return Err(e.during(format!("cannot examine {name} in {}", wanted.netns.display()))),
    };
    let mac = link.mac.map(|mac| mac.to_string()).unwrap_or_default();
    let wrong = [
        (link.peer != Some(host_index), format!("{name} is not the other end of {}", wanted.host_interface)),
        (link.mac != Some(wanted.mac), format!("{name} has MAC {mac}, not {}", wanted.mac)),
        (link.mtu != wanted.mtu, format!("{name} has MTU {}, not {}", link.mtu, wanted.mtu)),
        (!link.up(), format!("{name} is down")),
    ];
    if let Some((_, what)) = wrong.into_iter().find(|(is_wrong, _)| *is_wrong) {
        return Ok(Some(what));
    }
    let addresses = objects::addresses(&mut socket, link.index)?;
    let has = |wanted: &IpNetwork| addresses.iter().any(|found| found.index == link.index && found.address == *wanted);
    if let Some(missing) = wanted.addresses.iter().find(|address| !has(address)) {
        return Ok(Some(format!("{name} lacks {missing}")));
    }
    for (destination, gateway) in &wanted.routes {
        if !has_route(&mut socket, *destination, *gateway, link.index)? {
            return Ok(Some(format!("{} via {gateway} is not there", shown(*destination))));
        }
    }
    Ok(None)
}

/// A route for a person.
fn shown(destination: Cidr) -> String {
    if destination.length() == 0 { "the default route".to_owned() } else { format!("the route to {destination}") }
}

fn has_route(socket: &mut RouteSocket, destination: Cidr, gateway: IpAddr, interface: u32) -> Result<bool, OpError> {
    let query = Query::Routes(destination.family(), PROTOCOL);
    let is_it = |route: RouteInfo| route.gateway == Some(gateway) && route.interface == Some(interface);
    let read = |found: &mut bool, _, body: &[u8]| *found |= RouteInfo::read_to(body, destination).is_some_and(is_it);
    let found = socket.dump(&query, || false, read);
    found.map_err(|e| e.during("cannot list the container's routes"))
}

fn in_netns<T: Send>(netns: &Netns, work: impl FnOnce() -> Result<T, OpError> + Send) -> Result<T, OpError> {
    blocking(|| netns.run(work)).map_err(|e| OpError::from(&e))?
}
