//! One kernel change, an ordered list of them, and what became of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::state::{Key, LinkState, RouteTarget, State, Value, device_of};
use crate::model::Device;

/// One change of the kernel. Setting is idempotent: what is there with another value is replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Make the entry, or give it this value.
    Set(Key, Value),
    /// Take the entry away. That it is gone already is success. The value is what stands there now: the kernel wants part of it.
    Delete(Key, Value),
}

/// Ops in the order in which they are applied.
pub type Batch = Vec<Op>;

impl Op {
    /// The entry that changes.
    pub fn key(&self) -> &Key {
        match self {
            Op::Set(key, _) | Op::Delete(key, _) => key,
        }
    }

    /// Follows in `state` what the kernel does when it has applied the op: a device takes along what lives on it, a next hop the routes
    /// that use it, a table its elements, and a device with a new MAC forgets its neighbours (`neigh_changeaddr` in `net/core/set_neighbour.c`).
    pub fn apply_to(&self, state: &mut State) {
        match self {
            Op::Set(key, value) => {
                let mut value = value.clone();
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

/// Removes the entries of one kind from the device that `link` is; a bridge's ports lose their master.
fn remove_device_entries(state: &mut State, link: &Key, kind: impl Fn(&Key) -> bool) {
    let Key::Link(name) = link else { return };
    let Some(device) = Device::from_name(name) else { return };
    let mut gone = Vec::new();
    for (key, value) in &*state {
        if kind(key) && device_of(key, value, state) == Some(device) {
            gone.push(key.clone());
        }
    }
    for key in gone {
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

/// Why the kernel refused an op.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct OpError {
    /// The kernel's error number (positive); 0 where it did not come from the kernel.
    pub errno: i32,
    /// What it said (extended acknowledgement where there is one), and the remedy where one is known.
    pub message: String,
}

/// What became of a batch: every op that is not named here was applied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ApplyReport {
    /// Indices into the batch, ascending, with the error of each.
    pub failed: Vec<(usize, OpError)>,
}

/// The data path as `reconcile` sees it; `fake_kernel` implements it.
pub trait DataPath: Send {
    /// Everything of ours that the kernel holds. Errors are fit for a person.
    fn dump(&mut self) -> impl Future<Output = Result<State, OpError>> + Send;

    /// Applies a batch in its order. An op that fails stops no other.
    fn apply(&mut self, batch: &Batch) -> impl Future<Output = ApplyReport> + Send;

    /// Sysctls by their paths, those that are there; from now on dumps have them, and changes of them are told.
    fn watch_sysctls(&mut self, paths: Vec<String>) -> impl Future<Output = Result<State, OpError>> + Send;

    /// A link by its name, as it is at this moment; `None` where it is not there.
    fn get_link(&mut self, name: &str) -> impl Future<Output = Result<Option<LinkState>, OpError>> + Send;

    /// Links, addresses and default routes of the host that are not ours: what the external interface is chosen from.
    fn inventory(&mut self) -> impl Future<Output = Result<super::underlay::HostInventory, OpError>> + Send;

    /// The interface by which the kernel would send to an address; `None` where there is no route.
    fn route_to(&mut self, address: std::net::IpAddr) -> impl Future<Output = Result<Option<u32>, OpError>> + Send;
}

/// What happened in the kernel through others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelEvent {
    /// Entries changed: the value now, or `None` where the entry is gone. Of a link it may be older than the last change of ours, and is a hint to look
    /// at it ([`DataPath::link`]).
    Changed(Vec<(Key, Option<Value>)>),
    /// More changed than the event says (a device went down or away and took entries with it, events were lost): dump again.
    ResyncNeeded {
        /// What happened, for the log.
        reason: &'static str,
    },
    /// Links, addresses or default routes that are not ours changed.
    HostNetworkChanged,
}

/// What a container's attachment needs in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSpec {
    /// Path of the container's network namespace.
    pub netns: std::path::PathBuf,
    /// The interface to make in it.
    pub interface: String,
    /// The host's end of the veth pair.
    pub host_interface: String,
    /// The bridge that the host's end becomes a port of.
    pub bridge: crate::model::Device,
    /// The inner interface's MAC.
    pub mac: crate::model::Mac,
    /// MTU of both ends in bytes.
    pub mtu: u32,
    /// The inner interface's addresses, with the subnet's prefix length.
    pub addresses: Vec<ipnetwork::IpNetwork>,
    /// Routes, each with its gateway, the bridge's address: the default route in each family, or those to the overlay network.
    pub routes: Vec<(crate::model::Cidr, std::net::IpAddr)>,
    /// Whether it may send with its own MAC and addresses only.
    pub source_check: bool,
}

/// How `endpoint` has containers wired; `fake_kernel` implements it.
pub trait PortDriver: Send + Sync {
    /// Makes the veth pair, its addresses, routes and loopback; all or nothing. Where the very same plug is in place it succeeds
    /// without a change.
    fn attach_port(&self, spec: &PortSpec) -> impl Future<Output = Result<SourceFilter, OpError>> + Send;

    /// What of a plug is not in place, for a person; `None` where all is. Blocks.
    fn check_port(&self, spec: &PortSpec) -> Result<Option<String>, OpError>;

    /// Removes the pair by its host end. That it is gone already is success.
    fn detach_port(&self, host_interface: &str) -> impl Future<Output = Result<(), OpError>> + Send;

    /// Ends the connections of addresses that are nobody's any more: who gets one next is not to get what was meant for the last. Blocks.
    fn flush_connections(&self, addresses: &crate::model::PerFamily<std::net::IpAddr>);

    /// Whether the namespace is still there, for the audit of leaked endpoints.
    fn netns_exists(&self, netns: &std::path::Path) -> bool;

    /// What tells the namespace at a path from every other one, now and later; `None` where there is none, or the kernel is too old to say.
    fn netns_id(&self, netns: &std::path::Path) -> Option<String>;

    /// Whether the path leads to the host's own namespace.
    fn is_host_netns(&self, netns: &std::path::Path) -> bool;

    /// A path of the host's own namespace, good until the agent ends.
    fn host_netns(&self) -> std::path::PathBuf;

    /// Brings up the loopback device of a namespace.
    fn set_loopback_up(&self, netns: &std::path::Path) -> impl Future<Output = Result<(), OpError>> + Send;

    /// The host's addresses, and which of these ports its own sockets hold.
    fn host_ports(&self, wanted: &[crate::model::PublishedPort]) -> Result<HostPorts, OpError>;

    /// The host's ends of all veth pairs of ours, whether an endpoint is known for them or not.
    fn list_host_interfaces(&self) -> Result<Vec<String>, OpError>;
}

/// Whether the guard has what a container may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SourceFilter {
    /// It was told before the container's port joined the bridge.
    Applied,
    /// Its table is not there yet: what is plugged comes with it.
    #[default]
    Pending,
}

/// What of the host's own stands beside published ports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostPorts {
    /// Every address of the host.
    pub addresses: std::collections::BTreeSet<std::net::IpAddr>,
    /// Sockets that wait on a wanted port.
    pub sockets: Vec<HostSocket>,
}

/// A socket of the host that waits on a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSocket {
    /// The wanted port that it has.
    pub wanted: crate::model::PublishedPort,
    /// Its address; unspecified where it waits on every one.
    pub address: std::net::IpAddr,
    /// Its port.
    pub port: u16,
    /// Whose it is, for a person: `nginx (process 812)`.
    pub holder: String,
}
