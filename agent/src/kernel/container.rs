//! Wires containers: a veth pair whose inner end is made in the container's namespace under its final name, and whose outer end is a port of the
//! bridge. All or nothing: where a step fails the pair is removed, which takes both ends and all that was set on them.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::Mutex;

use super::known::{LINK_GROUP, is_marked};
use super::link::{foreign, mark};
use super::message::{Message, attributes};
use super::netns::{Netns, NetnsError};
use super::request::{self, CREATE, IFF_UP, LinkInfo, family_number, link_set};
use super::socket::{Refusal, RouteSocket};
use super::uapi::*;
use super::wire::Query;
use super::{Shared, blocking, dump, sysctl};
use crate::model::Family;
use crate::plan::state::PROTOCOL;
use crate::plan::{ContainerPath, OpError, Plug};

/// Length of `struct rtmsg`.
const RTMSG: usize = 12;

/// The maker of containers' wires. Cheap to clone.
#[derive(Clone)]
pub struct Plugger {
    shared: Arc<Mutex<Shared>>,
}

impl Plugger {
    pub(super) fn new(shared: Arc<Mutex<Shared>>) -> Plugger {
        Plugger { shared }
    }
}

impl ContainerPath for Plugger {
    async fn plug(&self, wanted: &Plug) -> Result<(), OpError> {
        let mut shared = self.shared.lock().await;
        blocking(|| plug(&mut shared, wanted))
    }

    async fn unplug(&self, host_interface: &str) -> Result<(), OpError> {
        let mut shared = self.shared.lock().await;
        blocking(|| shared.links().delete(host_interface))
    }

    fn netns_alive(&self, netns: &Path) -> bool {
        Netns::open(netns).is_ok()
    }
}

fn plug(shared: &mut Shared, wanted: &Plug) -> Result<(), OpError> {
    let netns = Netns::open(&wanted.netns).map_err(|e| inside_error(&e))?;
    let bridge = wanted.bridge;
    let name = bridge.name();
    let bridge = request::link(&mut shared.socket, &name)
        .map_err(|e| e.during(format!("cannot plug {}: the overlay's bridge {name} is not there", wanted.host_interface)))?;
    match request::link(&mut shared.socket, &wanted.host_interface) {
        Err(e) if e.errno == libc::ENODEV => {}
        Err(e) => return Err(e.during(format!("cannot examine interface {}", wanted.host_interface))),
        Ok(link) if !is_marked(&link) => return Err(foreign(&link)),
        Ok(link) => {
            let outer = link.master == Some(bridge.index) && link.mtu == wanted.mtu && link.up();
            if outer && in_netns(&netns, || is_plugged(wanted, link.index))?? {
                return Ok(());
            }
            // Half of a pair that a crash left, or one with other settings.
            shared.links().delete(&wanted.host_interface)?;
        }
    }
    let result = build(shared, wanted, &netns, bridge.index).and_then(|()| shared.links().note(&wanted.host_interface));
    if result.is_err()
        && let Err(error) = shared.links().delete(&wanted.host_interface)
    {
        tracing::warn!(%error, interface = wanted.host_interface, "half of a container's wire stays behind");
    }
    result
}

fn build(shared: &mut Shared, wanted: &Plug, netns: &Netns, bridge: u32) -> Result<(), OpError> {
    let host = &wanted.host_interface;
    let socket = &mut shared.socket;
    let outer = |m: &mut Message<'_>| {
        m.put_u32(IFLA_GROUP, LINK_GROUP).put_u32(IFLA_MTU, wanted.mtu);
    };
    let inner = |m: &mut Message<'_>| {
        request::veth_peer(m, &wanted.interface, netns.as_fd(), |m| {
            m.put(IFLA_ADDRESS, &wanted.mac.0).put_u32(IFLA_MTU, wanted.mtu);
        });
    };
    request::link_add(socket, host, "veth", outer, inner).map_err(|e| {
        let mut error = e.during(format!("cannot make {host} with {} in {}", wanted.interface, wanted.netns.display()));
        if e.errno == libc::EEXIST {
            error.message.push_str("; the namespace has an interface of that name already: choose another one");
        }
        error
    })?;
    let index = request::link(socket, host).map_err(|e| e.during(format!("cannot find {host} just made")))?.index;
    mark(socket, index, host)?;
    sysctl::write_if_there(&sysctl::accept_ra(host), "0")?;
    in_netns(netns, || configure(wanted))??;
    link_set(socket, index, IFF_UP, IFF_UP, |m| {
        m.put_u32(IFLA_MASTER, bridge);
    })
    .map_err(|e| e.during(format!("cannot make {host} a port of {}", wanted.bridge)))
}

/// Runs inside the namespace.
fn configure(wanted: &Plug) -> Result<(), OpError> {
    let inner = &wanted.interface;
    let step = |what: &str, refusal: Refusal| refusal.during(format!("cannot {what} in {}", wanted.netns.display()));
    let mut socket = RouteSocket::open()?;
    let lo = request::link(&mut socket, "lo").map_err(|e| step("find lo", e))?;
    if !lo.up() {
        link_set(&mut socket, lo.index, IFF_UP, IFF_UP, |_| ()).map_err(|e| step("set lo up", e))?;
    }
    let link = request::link(&mut socket, inner).map_err(|e| step(&format!("find {inner}"), e))?;
    sysctl::write_if_there(&sysctl::accept_ra(inner), "0")?;
    for address in &wanted.addresses {
        request::address_add(&mut socket, link.index, *address)
            .map_err(|e| step(&format!("add address {address} to {inner}"), e))?;
    }
    link_set(&mut socket, link.index, IFF_UP, IFF_UP, |_| ()).map_err(|e| step(&format!("set {inner} up"), e))?;
    for gateway in &wanted.gateways {
        default_route(&mut socket, link.index, *gateway).map_err(|e| {
            let mut error = step(&format!("add the default route via {gateway}"), e);
            if error.errno == libc::EEXIST {
                error.message.push_str("; it has a default route already: remove it, or attach without this family");
            }
            error
        })?;
    }
    Ok(())
}

fn default_route(socket: &mut RouteSocket, index: u32, gateway: IpAddr) -> Result<(), Refusal> {
    socket.request(libc::RTM_NEWROUTE, CREATE, |m| {
        let family = family_number(Family::of(gateway));
        m.body(&[family, 0, 0, 0, RT_TABLE_MAIN, PROTOCOL, RT_SCOPE_UNIVERSE, RTN_UNICAST]).body(&[0; 4]);
        m.put_address(RTA_GATEWAY, gateway).put_u32(RTA_OIF, index);
    })
}

/// Runs inside the namespace: whether all of it is in place, as the other end of the host's interface with that index.
fn is_plugged(wanted: &Plug, host_index: u32) -> Result<bool, OpError> {
    let mut socket = RouteSocket::open()?;
    let link: LinkInfo = match request::link(&mut socket, &wanted.interface) {
        Ok(link) => link,
        Err(e) if e.errno == libc::ENODEV => return Ok(false),
        Err(e) => return Err(e.during(format!("cannot examine {} in {}", wanted.interface, wanted.netns.display()))),
    };
    if link.peer != Some(host_index) || link.mac != Some(wanted.mac) || link.mtu != wanted.mtu || !link.up() {
        return Ok(false);
    }
    let addresses = dump::all_addresses(&mut socket, link.index)?;
    let has_addresses = wanted.addresses.iter().all(|a| addresses.iter().any(|b| b.index == link.index && b.address == *a));
    for gateway in &wanted.gateways {
        if !has_default(&mut socket, *gateway)? {
            return Ok(false);
        }
    }
    Ok(has_addresses)
}

fn has_default(socket: &mut RouteSocket, gateway: IpAddr) -> Result<bool, OpError> {
    let query = Query::Routes(Family::of(gateway), PROTOCOL);
    let found = socket.dump(
        query.kind(),
        |m| query.write(m),
        || false,
        |found, _, body| {
            let via =
                attributes(body, RTMSG).find(|(kind, _)| *kind == RTA_GATEWAY).and_then(|(_, v)| super::message::address(v));
            *found |= super::inventory::is_default(body) && via == Some(gateway);
        },
    );
    found.map_err(|e| e.during("cannot list the container's routes"))
}

fn in_netns<T: Send>(netns: &Netns, work: impl FnOnce() -> T + Send) -> Result<T, OpError> {
    netns.run(work).map_err(|e| inside_error(&e))
}

fn inside_error(error: &NetnsError) -> OpError {
    let errno = match error {
        NetnsError::System { source, .. } => source.raw_os_error().unwrap_or_default(),
        NetnsError::Missing { .. } => libc::ENOENT,
        NetnsError::NotNetns { .. } => libc::EINVAL,
        _ => 0,
    };
    OpError { errno, message: error.to_string() }
}
