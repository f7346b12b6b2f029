//! The Linux kernel: links, addresses, forwarding, neighbour, next-hop and route entries, sysctls, nftables, network namespaces.
//!
//! [`Kernel`] is the data path that `reconcile` dumps and changes, [`Plugger`] wires containers, [`Monitor`] follows what others change.
//! They belong to the network namespace of the thread that calls [`Kernel::open`] and share what is known of it (`known`).
//!
//! Only here are netlink sockets opened. Links, addresses and single routes are changed by `rtnetlink` (`rtnl`) and read by `netlink-packet-route`
//! (`objects`) over a blocking socket (`socket`); what grows with the number of peers goes through messages of our own (`wire`, `batch`). The
//! kernel works a request through before `send` returns, whoever makes it: a single one is made where it is needed, what takes longer is kept away
//! from the runtime's other tasks (`blocking`).
//!
//! Two tasks: the connection's of `rtnetlink`, which `rtnl` owns, and the monitor's, which `app` runs and which ends when the other one does.

mod address;
mod batch;
mod container;
mod dump;
mod ears;
pub mod echo;
mod ethtool;
mod events;
mod inventory;
mod known;
mod link;
mod message;
mod monitor;
pub mod names;
pub mod netns;
pub mod nft;
mod objects;
mod rtnl;
pub mod setup;
mod socket;
mod sockets;
mod sysctl;
pub mod trace;
mod uapi;
mod view;
mod wire;

#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::{Mutex, mpsc};

pub use container::Plugger;
pub use monitor::Monitor;
pub use view::OverlayView;

use self::batch::BatchSocket;
use self::ears::{Covered, Ears, Out};
use self::ethtool::Ethtool;
use self::events::Foreign;
use self::known::Known;
use self::link::Links;
use self::nft::{Connections, Nft, Stale, Translations};
use self::rtnl::Rtnl;
use self::socket::{Refusal, RouteSocket};
use self::sysctl::Interfaces;
use self::wire::Query;
use crate::blocking::blocking;
use crate::plan::state::{LinkState, PROTOCOL, State};
use crate::plan::underlay::Inventory;
use crate::plan::{ApplyReport, Batch, DataPath, KernelEvent, Key, Op, OpError, Value};

/// Ops that are applied before others who want the shared state get their turn.
const TURN: usize = 4096;
/// FDB entries or elements of a batch from which on the monitor does not listen to their events (`ears`).
const UNHEARD: usize = 512;
/// Elements of sets from which on they are written beside the peers' entries that follow them, on another processor.
const BESIDE: usize = 512;
/// How many of those entries, for each element: the kernel takes some three times as long for an element.
const BESIDE_EACH: usize = 3;

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
    interfaces: Interfaces,
    known: Known,
}

impl Shared {
    fn links(&mut self) -> Links<'_> {
        Links { rtnl: &self.rtnl, socket: &mut self.socket, ethtool: &self.ethtool, known: &mut self.known }
    }
}

/// The data path in the kernel. Its calls are worked through without a pause, up to 4,096 ops at a time: whoever abandons
/// [`DataPath::apply`] has whole turns applied and no report.
pub struct Kernel {
    shared: Arc<Mutex<Shared>>,
    connections: Arc<Connections>,
    batch: BatchSocket,
    ears: Arc<Ears>,
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
            interfaces: Interfaces::open(),
            known: Known::default(),
        };
        let batch = BatchSocket::open()?;
        let read = |e: std::io::Error| Refusal::from(e).during("cannot examine an rtnetlink socket");
        let own = [shared.rtnl.port(), batch.port(), shared.socket.port().map_err(read)?];
        let nft_port = shared.nft.port_id();
        let has_nexthop_objects = has_nexthop_objects(&mut shared.socket)?;
        let foreign = Foreign::read(&mut shared.socket)?;
        let shared = Arc::new(Mutex::new(shared));
        let (sender, events) = mpsc::channel(options.event_capacity.max(1));
        let monitor = Monitor::open(Arc::clone(&shared), own, nft_port, foreign, sender)?;
        let ears = monitor.ears()?;
        let nexthop_objects = has_nexthop_objects && !options.force_classic_routes;
        let connections = Arc::default();
        Ok((Kernel { shared, connections, batch, ears, has_nexthop_objects, nexthop_objects }, events, monitor))
    }

    /// Whether routes lead to next-hop objects; else each has its gateway itself.
    pub fn nexthop_objects(&self) -> bool {
        self.nexthop_objects
    }

    /// What wires containers; clones share its socket.
    pub fn plugger(&self) -> Plugger {
        Plugger::new(Arc::clone(&self.shared), Arc::clone(&self.connections))
    }

    /// Has the monitor not listen to what a large batch writes, until the answer is dropped.
    async fn cover(&self, batch: &Batch) -> Option<Covered> {
        if batch.len() < UNHEARD {
            return None;
        }
        let count = |counted: fn(&Op) -> bool| batch.iter().filter(|op| counted(op)).count();
        let fdb = count(|op| matches!(op.key(), Key::Fdb(..)));
        // Neighbours and FDB entries may go with their device; routes go one by one.
        let gone = count(|op| matches!(op, Op::Delete(Key::Route(_), _)));
        let elements = count(|op| matches!(op.key(), Key::Element(_)));
        let mut out = Vec::new();
        let mut shared = self.shared.lock().await;
        let present = shared.known.fdb.len();
        // Reading all afterwards is cheaper than to hear of each entry that goes only where few are left.
        if gone >= UNHEARD && 2 * gone >= present.max(fdb) {
            out.push(Out::Entries);
        } else if fdb >= UNHEARD {
            out.push(Out::Fdb);
        }
        if elements >= UNHEARD {
            out.extend(shared.nft.others().ok().map(Out::Rules));
        }
        (!out.is_empty()).then(|| self.ears.without(out))
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
        blocking(|| dump::state(&mut shared, self.has_nexthop_objects))
    }

    async fn apply(&mut self, batch: &Batch) -> ApplyReport {
        let mut report = ApplyReport::default();
        let _covered = self.cover(batch).await;
        let mut begin = 0;
        while begin < batch.len() {
            let mut end = batch.len().min(begin + TURN);
            // A table and the elements of its sets are one transaction.
            end += batch[end..].iter().take_while(|op| nft::is_rules(op.key())).count();
            let rules = batch[begin..end].iter().rev().take_while(|op| nft::is_rules(op.key())).count();
            if rules >= BESIDE {
                end += batch[end..].iter().take(BESIDE_EACH * rules).take_while(|op| wire::is_wire(op.key())).count();
            }
            let mut shared = self.shared.lock().await;
            let translations = Translations::before(&batch[begin..end], &shared.known.rules);
            apply(&mut shared, &mut self.batch, &batch[begin..end], begin, &mut report).await;
            let stale = translations.changed(&shared.known.rules);
            // Who waits for the shared state has it next. Nothing else makes way: another processor would begin with cold caches.
            drop(shared);
            forget(&self.connections, stale);
            begin = end;
        }
        report
    }

    async fn follow(&mut self, paths: Vec<String>) -> Result<State, OpError> {
        let mut shared = self.shared.lock().await;
        blocking(|| dump::follow(&mut shared.known, paths.iter().cloned()))?;
        let found = |path: String| Some((shared.known.sysctls.get(&path)?.as_str().into(), path));
        let found = paths.into_iter().filter_map(found);
        Ok(found.map(|(value, path)| (Key::Sysctl(path.into()), Value::Sysctl(value))).collect())
    }

    async fn link(&mut self, name: &str) -> Result<Option<LinkState>, OpError> {
        let mut shared = self.shared.lock().await;
        blocking(|| shared.links().note(name))?;
        Ok(shared.known.links.get(name).map(|(_, link)| link.clone()))
    }

    async fn inventory(&mut self) -> Result<Inventory, OpError> {
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
        let run = rest.iter().take_while(|op| wire::is_wire(op.key())).count();
        let rules = rest.iter().take_while(|op| nft::is_rules(op.key())).count();
        let links = rest.iter().take_while(|op| matches!(op, Op::Delete(Key::Link(_), _))).count();
        if run > 0 {
            blocking(|| batch.apply(&rest[..run], at, &mut shared.known, report));
            rest = &rest[run..];
        } else if rules > 0 {
            let (rules, beside) = rest.split_at(rules);
            // What may come in does not stand on where to send, nor the other way round.
            let sets = |op: &Op| matches!(op, Op::Set(..));
            let elements_go = |op: &Op| matches!(op, Op::Delete(Key::Element(_), _));
            let alike = rules.iter().all(sets) || rules.iter().all(elements_go);
            let beside = if rules.len() >= BESIDE && alike { beside } else { &[] };
            let run = beside.iter().take_while(|op| wire::is_wire(op.key())).count();
            apply_beside(shared, batch, rules, &beside[..run], at, report);
            rest = &rest[rules.len() + run..];
        } else if links > 0 {
            let names = rest[..links].iter().filter_map(|op| if let Key::Link(name) = op.key() { Some(&**name) } else { None });
            let names: Vec<&str> = names.collect();
            let ended = shared.links().delete_all(&names).await.into_iter().enumerate();
            report.failed.extend(ended.filter_map(|(i, result)| result.err().map(|error| (at + i, error))));
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
fn forget(connections: &Connections, stale: Vec<Stale>) {
    if stale.is_empty() {
        return;
    }
    match blocking(|| connections.delete(stale)) {
        Ok(deleted) => tracing::debug!(deleted, "stale connections deleted"),
        Err(error) => tracing::warn!(%error, "flows of before keep their translation while they go on"),
    }
}

/// Applies rules, and the peers' entries that follow them at the same time.
fn apply_beside(shared: &mut Shared, batch: &mut BatchSocket, rules: &[Op], run: &[Op], at: usize, report: &mut ApplyReport) {
    let Shared { nft, known, .. } = shared;
    let mut found = std::mem::take(&mut known.rules);
    let mut of_run = ApplyReport::default();
    let failed = if run.is_empty() {
        blocking(|| nft.apply(rules, &mut found))
    } else {
        std::thread::scope(|scope| {
            // Begun before the runtime goes on elsewhere, while the other processor is idle: the scheduler puts a new thread where nothing runs.
            let other = scope.spawn(|| nft.apply(rules, &mut found));
            blocking(|| {
                batch.apply(run, at + rules.len(), known, &mut of_run);
                other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })
    };
    known.rules = found;
    report.failed.extend(failed.into_iter().map(|(index, error)| (at + index, error)));
    report.failed.extend(of_run.failed);
}

async fn apply_one(shared: &mut Shared, op: &Op) -> Result<(), OpError> {
    match op {
        Op::Set(Key::Sysctl(path), Value::Sysctl(text)) => {
            sysctl::write(path, text)?;
            shared.known.sysctls.insert(path.to_string(), text.to_string());
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
            shared.known.rules.insert(Key::ForwardAccept(*family), Value::ForwardAccept(*network));
            Ok(())
        }
        Op::Delete(Key::ForwardAccept(family), _) => {
            blocking(|| shared.nft.delete_forward_accept(*family))?;
            shared.known.rules.remove(&Key::ForwardAccept(*family));
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
    match socket.dump(&Query::Nexthops, || (), |(), _, _| ()) {
        Ok(()) => Ok(true),
        Err(e) if e.errno == libc::EOPNOTSUPP => Ok(false),
        Err(e) => Err(e.during("cannot list next-hop objects")),
    }
}

/// Whether a protocol number is ours.
const fn is_ours(protocol: u8) -> bool {
    protocol == PROTOCOL
}
