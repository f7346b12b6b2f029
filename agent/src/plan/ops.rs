//! Kernel changes, batches of them and their results, and the traits that apply them.

use std::fmt;
use std::ops::Deref;

use serde::{Deserialize, Serialize};

use super::actual::LocalState;
use super::ruleset::Element;
use super::state::{Key, LinkKind, RouteTarget, State, Value, device_of};
use crate::model::Device;

/// One change of the kernel. `Set` is idempotent: it replaces an entry with another value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Create the entry, or give it this value.
    Set(Key, Value),
    /// Remove the entry; a missing entry is success. The value is the present one, parts of which the kernel requires.
    Delete(Key, Value),
}

/// Ops in the order in which they are applied.
pub type Batch = Vec<Op>;

impl Op {
    /// The changed entry.
    pub fn key(&self) -> &Key {
        match self {
            Op::Set(key, _) | Op::Delete(key, _) => key,
        }
    }

    /// Applies the op to `state` with the kernel's side effects. Deleting a device removes its entries, deleting a next hop its
    /// routes, and deleting a table its elements. A new MAC of a device removes its neighbours (`neigh_changeaddr` in
    /// `net/core/neighbour.c`).
    pub fn apply_to(&self, state: &mut State) {
        match self {
            Op::Set(key, value) => {
                let mut value = value.clone();
                if let Value::Link(new) = &mut value
                    && let LinkKind::Pair(target) = &mut new.kind
                {
                    // The kernel does not report the other end.
                    *target = None;
                }
                if let Value::Link(new) = &mut value
                    && let Some(Value::Link(old)) = state.get(key)
                {
                    let old_mac = old.mac;
                    new.mac = new.mac.or(old_mac);
                    if new.mac != old_mac {
                        remove_device_entries(state, key, |key| matches!(key, Key::Neigh(..)));
                    }
                }
                state.insert(key.clone(), value);
            }
            Op::Delete(key, _) => {
                match key {
                    Key::Link(_) => remove_device_entries(state, key, |_| true),
                    Key::Ruleset(table) => {
                        state.retain(|key, _| !matches!(key, Key::Element(element) if element.set().table() == *table));
                    }
                    Key::Nexthop(id) => state.retain(|_, value| *value != Value::Route(RouteTarget::Nexthop(*id))),
                    _ => {}
                }
                state.remove(key);
            }
        }
    }
}

/// Removes matching entries of the device `link`. Its ports lose their master.
pub fn remove_device_entries(state: &mut State, link: &Key, kind: impl Fn(&Key) -> bool) {
    let Key::Link(name) = link else { return };
    let Some(device) = Device::from_name(name) else { return };
    let mut removed = Vec::new();
    for (key, value) in &*state {
        if kind(key) && device_of(key, value, state) == Some(device) {
            removed.push(key.clone());
        }
    }
    for key in removed {
        state.remove(&key);
    }
    for (key, value) in state.iter_mut() {
        if let Value::Link(port) = value
            && kind(key)
            && port.master == Some(device)
        {
            port.master = None;
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Set(key, value) => write!(f, "set {key} {value}"),
            Op::Delete(key, value) => write!(f, "delete {key} {value}"),
        }
    }
}

/// Error of a failed op.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct OpError {
    /// The kernel's error number (positive); 0 if the error is not the kernel's.
    pub errno: i32,
    /// The kernel's text (the extended acknowledgement if there is one), and the remedy if one is known.
    pub message: String,
}

/// Result of a batch: all ops that are not listed were applied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ApplyReport {
    /// Indices into the batch, ascending, with the error of each.
    pub failed: Vec<(usize, OpError)>,
}

/// Result of [`DataPath::dump`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dump {
    /// The peers' entries.
    pub peers: State,
    /// The local entries as they were known before the dump.
    pub local_before: LocalState,
}

/// Interface of `reconcile` to the data path; `kernel` implements it.
pub trait DataPath: Send {
    /// Reads all of our entries from the kernel. Errors are readable for an operator.
    fn dump(&mut self) -> impl Future<Output = Result<Dump, OpError>> + Send;

    /// The local entries, with every change so far: by batches, by [`PortDriver`], and by other processes.
    fn local(&self) -> impl Deref<Target = LocalState>;

    /// Applies a batch in order. A failed op does not stop the others.
    fn apply(&mut self, batch: &Batch) -> impl Future<Output = ApplyReport> + Send;

    /// Adds the existing ones of these sysctls to the local entries. From now on dumps include them, and changes of them cause
    /// events.
    fn watch_sysctls(&mut self, paths: Vec<String>) -> impl Future<Output = Result<(), OpError>> + Send;

    /// Reads the host's links, addresses and default routes that are not ours, for the selection of the external interface.
    fn inventory(&mut self) -> impl Future<Output = Result<super::underlay::HostInventory, OpError>> + Send;

    /// The interface of the kernel's route to an address; `None` without a route.
    fn route_to(&mut self, address: std::net::IpAddr) -> impl Future<Output = Result<Option<u32>, OpError>> + Send;
}

/// Changes in the kernel by other processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelEvent {
    /// Entries changed: the new value, or `None` if the entry was deleted. [`DataPath::local`] has the changes of local entries
    /// already.
    Changed(Vec<(Key, Option<Value>)>),
    /// A dump is needed: events were lost, or a device went down or vanished together with its entries.
    ResyncNeeded {
        /// The reason, for the log.
        reason: &'static str,
    },
    /// Foreign links, addresses or default routes changed.
    HostNetworkChanged,
}

/// Specification of a container's port: a veth pair with its addresses and routes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSpec {
    /// Path of the container's network namespace.
    pub netns: std::path::PathBuf,
    /// The interface in that namespace.
    pub interface: String,
    /// The host end of the veth pair.
    pub host_interface: String,
    /// The bridge of the host end.
    pub bridge: crate::model::Device,
    /// The inner interface's MAC.
    pub mac: crate::model::Mac,
    /// MTU of both ends in bytes.
    pub mtu: u32,
    /// The inner interface's addresses, with the subnet's prefix length.
    pub addresses: Vec<ipnetwork::IpNetwork>,
    /// Routes with their gateway, the bridge's address: a default route in each family, or routes to the overlay network.
    pub routes: Vec<(crate::model::Cidr, std::net::IpAddr)>,
    /// The source filter's elements that it needs before it joins the bridge ([`super::desired::source_elements`]).
    pub sources: Vec<Element>,
}

/// Interface of `endpoint` for containers' ports; `kernel` implements it.
pub trait PortDriver: Send + Sync {
    /// Creates the veth pair, its addresses and routes, and brings loopback up; all or nothing. If the same port exists, it
    /// changes nothing.
    fn attach_port(&self, spec: &PortSpec) -> impl Future<Output = Result<SourceFilter, OpError>> + Send;

    /// Compares a port with the kernel. Returns the first difference as a text for the operator; `None` if there is none. Blocks.
    fn check_port(&self, spec: &PortSpec) -> Result<Option<String>, OpError>;

    /// Removes the veth pair by its host end; a missing pair is success.
    fn detach_port(&self, host_interface: &str) -> impl Future<Output = Result<(), OpError>> + Send;

    /// Deletes the connections of released addresses, so that the next owner of an address does not receive packets for the last
    /// one. Blocks.
    fn flush_connections(&self, addresses: &crate::model::PerFamily<std::net::IpAddr>);

    /// Whether the namespace exists, for the audit of leaked endpoints.
    fn netns_exists(&self, netns: &std::path::Path) -> bool;

    /// Unique id of the namespace at a path, also over time; `None` if there is no namespace, or if the kernel is too old for
    /// ids.
    fn netns_id(&self, netns: &std::path::Path) -> Option<String>;

    /// Whether the path is that of the host's own namespace, or of the ports' isolated network.
    fn is_host_netns(&self, netns: &std::path::Path) -> bool;

    /// A path of the host's own namespace, valid while the agent runs.
    fn host_netns(&self) -> std::path::PathBuf;

    /// Brings up the loopback device of a namespace.
    fn set_loopback_up(&self, netns: &std::path::Path) -> impl Future<Output = Result<(), OpError>> + Send;

    /// The host's addresses, and its sockets that listen on these ports.
    fn host_ports(&self, wanted: &[crate::model::PublishedPort]) -> Result<HostPorts, OpError>;
}

/// Whether the source filter has a container's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SourceFilter {
    /// They were added before the container's port joined the bridge.
    Applied,
    /// The filter's table does not exist yet; it will be created with the elements.
    #[default]
    Pending,
}

/// The host's own addresses and sockets, to check published ports against.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostPorts {
    /// Every address of the host.
    pub addresses: std::collections::BTreeSet<std::net::IpAddr>,
    /// Sockets that listen on a requested port.
    pub sockets: Vec<HostSocket>,
}

/// A listening socket of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSocket {
    /// The requested port that it conflicts with.
    pub wanted: crate::model::PublishedPort,
    /// Its address; unspecified if it listens on all addresses.
    pub address: std::net::IpAddr,
    /// Its port.
    pub port: u16,
    /// Its process, for messages: `nginx (process 812)`.
    pub holder: String,
}
