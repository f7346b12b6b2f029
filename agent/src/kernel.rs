//! Access to the Linux kernel: links, addresses, forwarding, neighbours, next hops, routes, sysctls, nf_tables, network
//! namespaces.
//!
//! [`Kernel`] is the data path: `reconcile` dumps it and changes it. [`PortManager`] attaches containers. [`Monitor`] reports
//! changes made by other processes. All three belong to the network namespace given to [`Kernel::open`], whichever thread uses
//! them, and share one cache (`cache`): the local entries, and what identifies events of our own changes.
//!
//! Only this module opens netlink sockets. `rtnl` changes links, addresses and single routes with `rtnetlink`'s builders;
//! `objects` reads them with `netlink-packet-route`; both use a blocking socket (`route_socket`). Entries whose number grows with
//! the peers use messages of our own (`peer_messages`, `batch`).
//!
//! The kernel processes a request before `send` returns, in the thread that sends it. So a single request is sent in place.
//! Longer work runs in `blocking`, which keeps it away from the runtime's other tasks.
//!
//! One task runs: the monitor's, run by `app`.

mod address;
mod batch;
mod cache;
mod container;
mod dump;
mod echo_filter;
mod ethtool;
mod events;
mod host_ports;
pub mod icmp;
mod inventory;
mod link;
mod monitor;
pub mod netns;
pub mod netns_builder;
pub mod nft;
mod nlmsg;
mod objects;
pub mod packet;
mod peer_messages;
mod receive_buffer;
mod route_socket;
mod rtnl;
mod shared;
mod snapshot;
mod socket_filter;
mod subscription;
mod sysctl;
pub mod trace;
mod uapi;

#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use tokio::sync::{Mutex, mpsc};

pub use container::PortManager;
pub use monitor::Monitor;
pub use snapshot::OverlaySnapshot;

use self::batch::BatchSocket;
use self::cache::{KernelCache, SharedLocal};
use self::ethtool::Ethtool;
use self::events::HostInterfaces;
use self::netns::{Netns, NetnsError};
use self::nft::{ConntrackCleaner, NatMappings, Nft, StaleFilter};
use self::peer_messages::EntryQuery;
use self::route_socket::{KernelError, RouteSocket};
use self::shared::Shared;
use self::subscription::{EventClass, EventSubscriptions, PauseGuard};
use self::sysctl::Sysctls;
use crate::blocking::blocking;
use crate::model::Family;
use crate::plan::actual::LocalState;
use crate::plan::underlay::HostInventory;
use crate::plan::{ApplyReport, Batch, DataPath, Dump, KernelEvent, Key, Op, OpError, Value};

/// Ops applied per acquisition of the shared lock, so that other waiters get it in between.
const OPS_PER_LOCK: usize = 4096;
/// From this many FDB entries or set elements in a batch, the monitor pauses their events (`subscription`).
const PAUSE_EVENTS_ABOVE: usize = 512;

/// Options of [`Kernel::open`].
#[derive(Debug, Clone)]
pub struct KernelOptions {
    /// Use classic onlink routes even if the kernel supports next-hop objects.
    pub force_classic_routes: bool,
    /// Capacity of the event channel. The monitor merges events that do not fit.
    pub event_capacity: usize,
    /// The host's network namespace, for an isolated network's; `None` if the opened namespace is the host's.
    pub host: Option<Netns>,
}

impl Default for KernelOptions {
    fn default() -> Self {
        KernelOptions { force_classic_routes: false, event_capacity: 64, host: None }
    }
}

/// The kernel's data path. It applies ops without yielding, up to 4,096 at a time. If [`DataPath::apply`] is cancelled, only
/// complete runs of that size are applied, and no report is returned. Clones share everything: a restarted reconciler continues
/// with a clone.
#[derive(Clone)]
pub struct Kernel {
    netns: Netns,
    host: Netns,
    shared: Arc<Mutex<Shared>>,
    local: SharedLocal,
    connections: Arc<ConntrackCleaner>,
    subscriptions: Arc<EventSubscriptions>,
    /// Whether the kernel supports next-hop objects. Those of an earlier run are read and removed even if `nexthop_objects` is
    /// off.
    has_nexthop_objects: bool,
    nexthop_objects: bool,
}

impl Kernel {
    /// Opens the data path of a network namespace. Also returns the events of other processes' changes from
    /// now on, and the monitor that produces them: run [`Monitor::run`] and watch for its end. Must be called inside a tokio
    /// runtime with I/O enabled.
    ///
    /// # Errors
    /// A socket cannot be opened: no file descriptors left, no netlink, or no permission.
    pub fn open(netns: &Netns, options: &KernelOptions) -> Result<(Kernel, mpsc::Receiver<KernelEvent>, Monitor), OpError> {
        netns.run_in_place(|| Kernel::open_inside(netns, options)).map_err(|e| OpError::from(&e))?
    }

    fn open_inside(netns: &Netns, options: &KernelOptions) -> Result<(Kernel, mpsc::Receiver<KernelEvent>, Monitor), OpError> {
        let mut shared = Shared {
            socket: RouteSocket::open()?,
            batch: BatchSocket::open()?,
            ethtool: Ethtool::open()?,
            nft: Nft::open()?,
            sysctls: Sysctls::open(&Family::ALL),
            netns: netns.clone(),
            host: options.host.clone(),
            cache: KernelCache::default(),
        };
        let read = |e: std::io::Error| KernelError::from(e).context("cannot examine an rtnetlink socket");
        let own_ports = [shared.batch.port_id(), shared.socket.port_id().map_err(read)?];
        let nft_port = shared.nft.port_id();
        let has_nexthop_objects = has_nexthop_objects(&mut shared.socket)?;
        let host_interfaces = HostInterfaces::read(&mut shared.socket)?;
        let local = shared.cache.share_local();
        let shared = Arc::new(Mutex::new(shared));
        let (sender, events) = mpsc::channel(options.event_capacity.max(1));
        let receive_buffers =
            if options.host.is_none() { monitor::HOST_RECEIVE_BUFFERS } else { monitor::NETWORK_RECEIVE_BUFFERS };
        let monitor = Monitor::open(Arc::clone(&shared), own_ports, nft_port, host_interfaces, sender, receive_buffers)?;
        let subscriptions = monitor.subscriptions()?;
        let nexthop_objects = has_nexthop_objects && !options.force_classic_routes;
        let connections = Arc::new(ConntrackCleaner::new(netns.clone()));
        Ok((
            Kernel {
                netns: netns.clone(),
                host: options.host.clone().unwrap_or_else(|| netns.clone()),
                shared,
                local,
                connections,
                subscriptions,
                has_nexthop_objects,
                nexthop_objects,
            },
            events,
            monitor,
        ))
    }

    /// Whether routes use next-hop objects; otherwise each route has its own gateway.
    pub fn nexthop_objects(&self) -> bool {
        self.nexthop_objects
    }

    /// Returns the manager of container ports. Clones share its socket.
    pub fn port_manager(&self) -> PortManager {
        PortManager::new(self.netns.clone(), self.host.clone(), Arc::clone(&self.shared), Arc::clone(&self.connections))
    }

    /// Pauses the monitor's events for a large batch, until the returned guard is dropped.
    async fn pause_for(&self, batch: &Batch) -> Option<PauseGuard> {
        if batch.len() < PAUSE_EVENTS_ABOVE {
            return None;
        }
        let count = |counted: fn(&Op) -> bool| batch.iter().filter(|op| counted(op)).count();
        let fdb = count(|op| matches!(op.key(), Key::Fdb(..)));
        // Routes measure a removal of peers: they are removed one by one, while neighbours and FDB entries may be removed with
        // their device.
        let removed_routes = count(|op| matches!(op, Op::Delete(Key::Route(_), _)));
        let elements = count(|op| matches!(op.key(), Key::Element(_)));
        let mut classes = Vec::new();
        let mut shared = self.shared.lock().await;
        let present = shared.cache.fdb.len();
        // A full read afterwards is cheaper than an event per removed entry only if few entries are left.
        if removed_routes >= PAUSE_EVENTS_ABOVE && 2 * removed_routes >= present.max(fdb) {
            classes.push(EventClass::PeerEntries);
        } else if fdb >= PAUSE_EVENTS_ABOVE {
            classes.push(EventClass::Fdb);
        }
        if elements >= PAUSE_EVENTS_ABOVE {
            classes.extend(shared.nft.foreign_generation().ok().map(EventClass::Rules));
        }
        (!classes.is_empty()).then(|| self.subscriptions.pause(classes))
    }

    #[cfg(test)]
    async fn set_batch_receive_buffer(&self, bytes: usize) {
        self.shared.lock().await.batch.set_receive_buffer(bytes);
    }
}

impl DataPath for Kernel {
    async fn dump(&mut self) -> Result<Dump, OpError> {
        let mut shared = self.shared.lock().await;
        blocking(|| dump::read_state(&mut shared, self.has_nexthop_objects))
    }

    fn local(&self) -> impl Deref<Target = LocalState> {
        cache::lock(&self.local)
    }

    async fn apply(&mut self, batch: &Batch) -> ApplyReport {
        let mut report = ApplyReport::default();
        let _pause_guard = self.pause_for(batch).await;
        let mut begin = 0;
        while begin < batch.len() {
            let mut end = batch.len().min(begin + OPS_PER_LOCK);
            // A table and the elements of its sets form one transaction.
            end += batch[end..].iter().take_while(|op| nft::is_ruleset_key(op.key())).count();
            let mut shared = self.shared.lock().await;
            let translations = NatMappings::capture(&batch[begin..end], &shared.cache.local().rules);
            apply(&mut shared, &batch[begin..end], begin, &mut report);
            let stale = translations.stale_filters(&shared.cache.local().rules);
            // The next waiter gets the lock here. Nothing else yields: on another processor the work would continue with cold
            // caches.
            drop(shared);
            delete_stale_connections(&self.connections, stale);
            begin = end;
        }
        report
    }

    async fn watch_sysctls(&mut self, paths: Vec<String>) -> Result<(), OpError> {
        let shared = self.shared.lock().await;
        blocking(|| dump::track_sysctls(&shared, paths))
    }

    async fn inventory(&mut self) -> Result<HostInventory, OpError> {
        let mut shared = self.shared.lock().await;
        blocking(|| inventory::inventory(&mut shared))
    }

    async fn route_to(&mut self, address: IpAddr) -> Result<Option<u32>, OpError> {
        let mut shared = self.shared.lock().await;
        blocking(|| inventory::route_to(&mut shared.socket, address))
    }
}

/// Applies ops in order. Runs of peers' entries go through the batch socket, ruleset ops form transactions, link deletions run in
/// parallel, and all other ops are applied one by one.
fn apply(shared: &mut Shared, ops: &[Op], first: usize, report: &mut ApplyReport) {
    let mut rest = ops;
    while let Some(op) = rest.first() {
        let at = first + (ops.len() - rest.len());
        let run = rest.iter().take_while(|op| op.key().is_peer_entry()).count();
        let rules = rest.iter().take_while(|op| nft::is_ruleset_key(op.key())).count();
        let links = rest.iter().take_while(|op| matches!(op, Op::Delete(Key::Link(_), _))).count();
        if run > 0 {
            blocking(|| shared.batch.apply(&rest[..run], at, &mut shared.cache, report));
            rest = &rest[run..];
        } else if rules > 0 {
            let Shared { nft, cache, .. } = shared;
            let failed = blocking(|| nft.apply(&rest[..rules], &mut cache.local().rules));
            report.failed.extend(failed.into_iter().map(|(index, error)| (at + index, error)));
            rest = &rest[rules..];
        } else if links > 0 {
            let names = rest[..links].iter().filter_map(|op| if let Key::Link(name) = op.key() { Some(&**name) } else { None });
            let names: Vec<&str> = names.collect();
            let results = shared.links().delete_all(&names).into_iter().enumerate();
            report.failed.extend(results.filter_map(|(i, result)| result.err().map(|error| (at + i, error))));
            rest = &rest[links..];
        } else {
            if let Err(error) = apply_one(shared, op) {
                report.failed.push((at, error));
            }
            rest = &rest[1..];
        }
    }
}

/// Deletes stale conntrack entries. If that fails, existing flows keep their NAT mapping for as long as they send.
fn delete_stale_connections(connections: &ConntrackCleaner, stale: Vec<StaleFilter>) {
    if stale.is_empty() {
        return;
    }
    match blocking(|| connections.delete(stale)) {
        Ok(deleted) => tracing::debug!(deleted, "deleted stale conntrack entries"),
        Err(error) => tracing::warn!(%error, "cannot delete stale conntrack entries; existing flows keep their NAT mapping"),
    }
}

fn apply_one(shared: &mut Shared, op: &Op) -> Result<(), OpError> {
    match op {
        Op::Set(Key::Sysctl(path), Value::Sysctl(text)) => {
            shared.sysctls.write(path, text)?;
            shared.cache.set(op.key().clone(), Some(Value::Sysctl(text.clone())));
            Ok(())
        }
        // A sysctl cannot be removed, and its previous value is not known.
        Op::Delete(Key::Sysctl(_), _) => Ok(()),
        Op::Set(Key::Link(name), Value::Link(link)) => shared.links().set(name, link),
        Op::Set(Key::Address(device, address), Value::Address) => address::set(&mut shared.links(), *device, *address, true),
        Op::Delete(Key::Address(device, address), _) => address::set(&mut shared.links(), *device, *address, false),
        Op::Set(key @ Key::ForwardAccept(family), value @ Value::ForwardAccept(ranges)) => {
            blocking(|| shared.nft.set_forward_accept(*family, ranges))?;
            shared.cache.set(key.clone(), Some(value.clone()));
            Ok(())
        }
        Op::Delete(Key::ForwardAccept(family), _) => {
            blocking(|| shared.nft.delete_forward_accept(*family))?;
            shared.cache.set(Key::ForwardAccept(*family), None);
            Ok(())
        }
        Op::Set(key, value) => {
            Err(OpError { errno: libc::EINVAL, message: format!("internal error: {key} cannot hold `{value}`") })
        }
        Op::Delete(key, _) => {
            Err(OpError { errno: libc::EINVAL, message: format!("internal error: {key} must be deleted in a batch") })
        }
    }
}

/// Deletes a network's namespace: its links first, then its name. Its data path must have ended.
///
/// The links would live as long as any process or open file in the namespace, and some time longer: the kernel frees a namespace
/// asynchronously (`cleanup_net` in net/core/net_namespace.c), and refuses a second VXLAN device with the same VNI until then.
///
/// # Errors
/// The name stays if a link could not be deleted.
pub fn delete_network_netns(name: &str) -> Result<(), OpError> {
    let to_error = |e: NetnsError| OpError::from(&e);
    match Netns::named(name) {
        Ok(netns) => {
            let links = objects::links(&mut netns.route_socket()?)?;
            // The kernel gives hardware back to the host.
            let ours: Vec<u32> = links.iter().filter(|link| !link.kind.is_empty()).map(|link| link.index).collect();
            let deleted: Result<(), KernelError> = link::delete_links(&netns, &ours).into_iter().collect();
            deleted.map_err(|e| e.context(format!("cannot delete an interface in network namespace {name}")))?;
        }
        Err(NetnsError::NotFound { .. } | NetnsError::NotNetns { .. }) => {}
        Err(error) => return Err(to_error(error)),
    }
    Netns::delete(name).map_err(to_error)
}

/// Whether the kernel supports next-hop objects (since Linux 5.3).
fn has_nexthop_objects(socket: &mut RouteSocket) -> Result<bool, OpError> {
    match socket.dump(&EntryQuery::Nexthops, || (), |(), _, _| ()) {
        Ok(()) => Ok(true),
        Err(e) if e.errno == libc::EOPNOTSUPP => Ok(false),
        Err(e) => Err(e.context("cannot list next-hop objects")),
    }
}
