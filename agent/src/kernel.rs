//! The Linux kernel: links, addresses, forwarding, neighbour, next-hop and route entries, sysctls, nftables, network namespaces.
//!
//! [`SimulatedKernel`] is the data path that `reconcile` dumps and changes, [`PortManager`] wires containers, [`Monitor`] follows what others change.
//! They belong to the network namespace of the thread that calls [`SimulatedKernel::open_sockets`] and share what is known of it (`known`).
//!
//! Only here are netlink sockets opened. Links, addresses and single routes are changed by `rtnetlink` (`rtnl`) and read by `netlink-packet-route`
//! (`read_objects`) over a blocking socket (`socket`); what grows with the number of peers goes through messages of our own (`wire`, `apply_time`). The
//! kernel works a request through before `send` returns, whoever makes it: a single one is made where it is needed, what takes longer is kept away
//! from the runtime's other tasks (`blocking`).
//!
//! Two tasks: the connection's of `rtnetlink`, which `rtnl` owns, and the monitor's, which `app` runs and which ends when the other one does.

pub mod abstract_socket;
mod address;
mod batch;
mod cache;
mod container;
mod dump;
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
mod peer_messages;
mod route_socket;
mod rtnl;
mod snapshot;
mod subscription;
mod sysctl;
pub mod trace;
mod uapi;

#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::{Mutex, mpsc};

pub use container::PortManager;
pub use monitor::Monitor;
pub use snapshot::OverlaySnapshot;

use self::batch::BatchSocket;
use self::cache::KernelCache;
use self::ethtool::Ethtool;
use self::events::HostInterfaces;
use self::link::Links;
use self::nft::{ConntrackCleaner, NatMappings, Nft, StaleFilter};
use self::peer_messages::EntryQuery;
use self::route_socket::{KernelError, RouteSocket};
use self::rtnl::Rtnl;
use self::subscription::{EventClass, EventSubscriptions, PauseGuard};
use self::sysctl::Ipv6ConfDir;
use crate::blocking::blocking;
use crate::plan::state::{LinkState, PROTOCOL, State};
use crate::plan::underlay::HostInventory;
use crate::plan::{ApplyReport, Batch, DataPath, KernelEvent, Key, Op, OpError, Value};

/// Ops that are applied before others who want the shared state get their turn.
const OPS_PER_LOCK: usize = 4096;
/// FDB entries or elements of a batch from which on the monitor does not listen to their events (`ears`).
const PAUSE_EVENTS_ABOVE: usize = 512;
/// Elements of sets from which on they are written beside the peers' entries that follow them, on another processor.
const PARALLEL_ABOVE: usize = 512;
/// How many of those entries, for each element: the kernel takes some three times as long for an element.
const PARALLEL_ENTRIES_PER_ELEMENT: usize = 3;

/// How to use the kernel.
#[derive(Debug, Clone)]
pub struct KernelOptions {
    /// Use classic onlink routes also where the kernel has next-hop objects.
    pub force_classic_routes: bool,
    /// Room for events that nobody has taken yet; what does not fit is kept together in the monitor.
    pub event_capacity: usize,
}

impl Default for KernelOptions {
    fn default() -> Self {
        KernelOptions { force_classic_routes: false, event_capacity: 64 }
    }
}

/// What the data path, the plugger and the monitor share, each holding it while it works: an event is judged either before or after a change
/// of ours, never in its middle.
struct Shared {
    rtnl: Rtnl,
    socket: RouteSocket,
    ethtool: Ethtool,
    nft: Nft,
    ipv6_conf_dir: Ipv6ConfDir,
    cache: KernelCache,
}

impl Shared {
    fn links(&mut self) -> Links<'_> {
        Links { rtnl: &self.rtnl, socket: &mut self.socket, ethtool: &self.ethtool, known: &mut self.cache }
    }
}

/// The data path in the kernel. Its calls are worked through without a pause, up to 4,096 ops at a time: whoever abandons
/// [`DataPath::apply`] has whole turns applied and no report.
pub struct Kernel {
    shared: Arc<Mutex<Shared>>,
    connections: Arc<ConntrackCleaner>,
    batch: BatchSocket,
    subscriptions: Arc<EventSubscriptions>,
    /// Whether the kernel has them: those of an earlier run are seen, and removed, also where they are not to be used.
    has_nexthop_objects: bool,
    nexthop_objects: bool,
}

impl Kernel {
    /// Opens the calling thread's network namespace: the data path, the events of others' changes from now on, and the task that reads them
    /// (run [`Monitor::run`] and notice its end). Must be called inside a tokio runtime with I/O.
    ///
    /// # Errors
    /// A socket cannot be opened (no file descriptors left, no netlink, no permission).
    pub fn open(options: &KernelOptions) -> Result<(Kernel, mpsc::Receiver<KernelEvent>, Monitor), OpError> {
        let mut shared = Shared {
            rtnl: Rtnl::open()?,
            socket: RouteSocket::open()?,
            ethtool: Ethtool::open()?,
            nft: Nft::open()?,
            ipv6_conf_dir: Ipv6ConfDir::open(),
            cache: KernelCache::default(),
        };
        let batch = BatchSocket::open()?;
        let read = |e: std::io::Error| KernelError::from(e).context("cannot examine an rtnetlink socket");
        let own_ports = [shared.rtnl.port_id(), batch.port_id(), shared.socket.port_id().map_err(read)?];
        let nft_port = shared.nft.port_id();
        let has_nexthop_objects = has_nexthop_objects(&mut shared.socket)?;
        let host_interfaces = HostInterfaces::read(&mut shared.socket)?;
        let shared = Arc::new(Mutex::new(shared));
        let (sender, events) = mpsc::channel(options.event_capacity.max(1));
        let monitor = Monitor::open(Arc::clone(&shared), own_ports, nft_port, host_interfaces, sender)?;
        let subscriptions = monitor.subscriptions()?;
        let nexthop_objects = has_nexthop_objects && !options.force_classic_routes;
        let connections = Arc::default();
        Ok((Kernel { shared, connections, batch, subscriptions, has_nexthop_objects, nexthop_objects }, events, monitor))
    }

    /// Whether routes lead to next-hop objects; else each has its gateway itself.
    pub fn nexthop_objects(&self) -> bool {
        self.nexthop_objects
    }

    /// What wires containers; clones share its socket.
    pub fn port_manager(&self) -> PortManager {
        PortManager::new(Arc::clone(&self.shared), Arc::clone(&self.connections))
    }

    /// Has the monitor not listen to what a large batch writes, until the answer is dropped.
    async fn pause_for(&self, batch: &Batch) -> Option<PauseGuard> {
        if batch.len() < PAUSE_EVENTS_ABOVE {
            return None;
        }
        let count = |counted: fn(&Op) -> bool| batch.iter().filter(|op| counted(op)).count();
        let fdb = count(|op| matches!(op.key(), Key::Fdb(..)));
        // Neighbours and FDB entries may go with their device; routes go one by one.
        let removed_routes = count(|op| matches!(op, Op::Delete(Key::Route(_), _)));
        let elements = count(|op| matches!(op.key(), Key::Element(_)));
        let mut classes = Vec::new();
        let mut shared = self.shared.lock().await;
        let present = shared.cache.fdb.len();
        // Reading all afterwards is cheaper than to hear of each entry that goes only where few are left.
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
    async fn abort_connection(&self) {
        self.shared.lock().await.rtnl.abort();
    }

    #[cfg(test)]
    fn batch_socket(&self) -> &BatchSocket {
        &self.batch
    }
}

impl DataPath for Kernel {
    async fn dump(&mut self) -> Result<State, OpError> {
        let mut shared = self.shared.lock().await;
        blocking(|| dump::read_state(&mut shared, self.has_nexthop_objects))
    }

    async fn apply(&mut self, batch: &Batch) -> ApplyReport {
        let mut report = ApplyReport::default();
        let _pause_guard = self.pause_for(batch).await;
        let mut begin = 0;
        while begin < batch.len() {
            let mut end = batch.len().min(begin + OPS_PER_LOCK);
            // A table and the elements of its sets are one transaction.
            end += batch[end..].iter().take_while(|op| nft::is_ruleset_key(op.key())).count();
            let rules = batch[begin..end].iter().rev().take_while(|op| nft::is_ruleset_key(op.key())).count();
            if rules >= PARALLEL_ABOVE {
                end += batch[end..]
                    .iter()
                    .take(PARALLEL_ENTRIES_PER_ELEMENT * rules)
                    .take_while(|op| peer_messages::is_peer_entry(op.key()))
                    .count();
            }
            let mut shared = self.shared.lock().await;
            let translations = NatMappings::capture(&batch[begin..end], &shared.cache.rules);
            apply(&mut shared, &mut self.batch, &batch[begin..end], begin, &mut report).await;
            let stale = translations.stale_filters(&shared.cache.rules);
            // Who waits for the shared state has it next. Nothing else makes way: another processor would begin with cold caches.
            drop(shared);
            delete_stale_connections(&self.connections, stale);
            begin = end;
        }
        report
    }

    async fn watch_sysctls(&mut self, paths: Vec<String>) -> Result<State, OpError> {
        let mut shared = self.shared.lock().await;
        blocking(|| dump::track_sysctls(&mut shared.cache, paths.iter().cloned()))?;
        let found = |path: String| Some((shared.cache.sysctls.get(&path)?.as_str().into(), path));
        let found = paths.into_iter().filter_map(found);
        Ok(found.map(|(value, path)| (Key::Sysctl(path.into()), Value::Sysctl(value))).collect())
    }

    async fn get_link(&mut self, name: &str) -> Result<Option<LinkState>, OpError> {
        let mut shared = self.shared.lock().await;
        blocking(|| shared.links().refresh(name))?;
        Ok(shared.cache.links.get(name).map(|(_, link)| link.clone()))
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

/// Applies ops in their order: runs of peers' entries through the batch socket, the others one by one.
async fn apply(shared: &mut Shared, batch: &mut BatchSocket, ops: &[Op], first: usize, report: &mut ApplyReport) {
    let mut rest = ops;
    while let Some(op) = rest.first() {
        let at = first + (ops.len() - rest.len());
        let run = rest.iter().take_while(|op| peer_messages::is_peer_entry(op.key())).count();
        let rules = rest.iter().take_while(|op| nft::is_ruleset_key(op.key())).count();
        let links = rest.iter().take_while(|op| matches!(op, Op::Delete(Key::Link(_), _))).count();
        if run > 0 {
            blocking(|| batch.apply(&rest[..run], at, &mut shared.cache, report));
            rest = &rest[run..];
        } else if rules > 0 {
            let (rules, following) = rest.split_at(rules);
            // What may come in does not stand on where to send, nor the other way round.
            let sets = |op: &Op| matches!(op, Op::Set(..));
            let deletes_elements = |op: &Op| matches!(op, Op::Delete(Key::Element(_), _));
            let same_kind = rules.iter().all(sets) || rules.iter().all(deletes_elements);
            let parallel = if rules.len() >= PARALLEL_ABOVE && same_kind { following } else { &[] };
            let run = parallel.iter().take_while(|op| peer_messages::is_peer_entry(op.key())).count();
            apply_parallel(shared, batch, rules, &parallel[..run], at, report);
            rest = &rest[rules.len() + run..];
        } else if links > 0 {
            let names = rest[..links].iter().filter_map(|op| if let Key::Link(name) = op.key() { Some(&**name) } else { None });
            let names: Vec<&str> = names.collect();
            let results = shared.links().delete_all(&names).await.into_iter().enumerate();
            report.failed.extend(results.filter_map(|(i, result)| result.err().map(|error| (at + i, error))));
            rest = &rest[links..];
        } else {
            if let Err(error) = apply_one(shared, op).await {
                report.failed.push((at, error));
            }
            rest = &rest[1..];
        }
    }
}

/// Deletes what conntrack holds of what is no longer so. Where that fails, flows of before keep their translation for as long as they send.
fn delete_stale_connections(connections: &ConntrackCleaner, stale: Vec<StaleFilter>) {
    if stale.is_empty() {
        return;
    }
    match blocking(|| connections.delete(stale)) {
        Ok(deleted) => tracing::debug!(deleted, "stale connections deleted"),
        Err(error) => tracing::warn!(%error, "flows of before keep their translation while they go on"),
    }
}

/// Applies rules, and the peers' entries that follow them at the same time.
fn apply_parallel(
    shared: &mut Shared,
    batch: &mut BatchSocket,
    rules: &[Op],
    entries: &[Op],
    at: usize,
    report: &mut ApplyReport,
) {
    let Shared { nft, cache, .. } = shared;
    let mut cached_rules = std::mem::take(&mut cache.rules);
    let mut entries_report = ApplyReport::default();
    let failed = if entries.is_empty() {
        blocking(|| nft.apply(rules, &mut cached_rules))
    } else {
        std::thread::scope(|scope| {
            // Begun before the runtime goes on elsewhere, while the other processor is idle: the scheduler puts a new thread where nothing runs.
            let other = scope.spawn(|| nft.apply(rules, &mut cached_rules));
            blocking(|| {
                batch.apply(entries, at + rules.len(), cache, &mut entries_report);
                other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })
    };
    cache.rules = cached_rules;
    report.failed.extend(failed.into_iter().map(|(index, error)| (at + index, error)));
    report.failed.extend(entries_report.failed);
}

async fn apply_one(shared: &mut Shared, op: &Op) -> Result<(), OpError> {
    match op {
        Op::Set(Key::Sysctl(path), Value::Sysctl(text)) => {
            sysctl::write(path, text)?;
            shared.cache.sysctls.insert(path.to_string(), text.to_string());
            Ok(())
        }
        // A sysctl is always there; what it was before is not known.
        Op::Delete(Key::Sysctl(_), _) => Ok(()),
        Op::Set(Key::Link(name), Value::Link(link)) => shared.links().set(name, link).await,
        Op::Set(Key::Address(device, address), Value::Address) => {
            address::set(&mut shared.links(), *device, *address, true).await
        }
        Op::Delete(Key::Address(device, address), _) => address::set(&mut shared.links(), *device, *address, false).await,
        Op::Set(Key::ForwardAccept(family), Value::ForwardAccept(network)) => {
            blocking(|| shared.nft.set_forward_accept(*family, *network))?;
            shared.cache.rules.insert(Key::ForwardAccept(*family), Value::ForwardAccept(*network));
            Ok(())
        }
        Op::Delete(Key::ForwardAccept(family), _) => {
            blocking(|| shared.nft.delete_forward_accept(*family))?;
            shared.cache.rules.remove(&Key::ForwardAccept(*family));
            Ok(())
        }
        Op::Set(key, value) => {
            Err(OpError { errno: libc::EINVAL, message: format!("{key} cannot hold `{value}`: the plan is wrong") })
        }
        Op::Delete(key, _) => Err(OpError { errno: libc::EINVAL, message: format!("{key} goes through the batch socket") }),
    }
}

/// Whether the kernel knows next-hop objects (since Linux 5.3).
fn has_nexthop_objects(socket: &mut RouteSocket) -> Result<bool, OpError> {
    match socket.dump(&EntryQuery::Nexthops, || (), |(), _, _| ()) {
        Ok(()) => Ok(true),
        Err(e) if e.errno == libc::EOPNOTSUPP => Ok(false),
        Err(e) => Err(e.context("cannot list next-hop objects")),
    }
}

/// Whether a protocol number is ours.
const fn is_own_protocol(protocol: u8) -> bool {
    protocol == PROTOCOL
}
