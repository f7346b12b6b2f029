//! Errors of attach and detach.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use super::id::EndpointId;
use super::ipam::IpamError;
use crate::model::device::bridge_full_message;
use crate::model::endpoint::EndpointName;
use crate::model::publish::PublishError;
use crate::model::{Endpoint, Family, Mac, Mode, NetworkName, PublishedPort, Subnet};
use crate::plan::OpError;
use crate::state::StateError;

/// Remedy for a missing namespace. Under systemd the agent sees other users' processes only with the capability for it.
fn remedy(netns: &Path) -> &'static str {
    if netns.starts_with("/proc") {
        "has the process ended? The agent's unit sees processes only with CAP_SYS_PTRACE (proc-netns.conf, docs/install.md)"
    } else {
        "create it first (`ip netns add NAME` creates /run/netns/NAME)"
    }
}

/// Error of an attach or a detach. Each text names the value and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The namespace's path is not absolute.
    #[error("network namespace `{netns}` is not an absolute path: expected one such as /run/netns/NAME or /proc/PID/ns/net")]
    NetnsPath {
        /// The refused path.
        netns: String,
    },
    /// No network namespace exists at the path.
    #[error("there is no network namespace at {netns}: {}", remedy(netns))]
    NetnsNotFound {
        /// The path.
        netns: PathBuf,
    },
    /// The namespace is the host's own.
    #[error("{netns} is the host's own network namespace: attach with mode host, or name another one")]
    HostNetns {
        /// The path.
        netns: PathBuf,
    },
    /// The mode does not support an option of the request.
    #[error("mode {mode} does not support {what}: omit it, or use mode overlay")]
    UnsupportedInMode {
        /// The unsupported option.
        what: &'static str,
        /// The mode.
        mode: Mode,
    },
    /// A named network does not support the mode.
    #[error("network {network} does not support mode {mode}: omit the network, or use mode overlay")]
    UnsupportedInNetwork {
        /// The mode.
        mode: Mode,
        /// The network.
        network: NetworkName,
    },
    /// The owner is not printable text of valid length.
    #[error("invalid owner `{owner}`: expected 1 to 256 bytes of text without control characters")]
    Owner {
        /// The refused text.
        owner: String,
    },
    /// A published port is invalid.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Two published ports of one request map the same host port to different container ports.
    #[error("{one} and {other} map the same host port to different container ports: omit one of them")]
    PublishConflict {
        /// The first one.
        one: PublishedPort,
        /// The second one.
        other: PublishedPort,
    },
    /// Another endpoint has published the port.
    #[error(
        "{wanted} cannot be published: endpoint {holder} has {held}; choose another port, or `{}` first",
        holder.detach_command()
    )]
    PublishInUse {
        /// The requested port.
        wanted: PublishedPort,
        /// The other endpoint.
        holder: EndpointId,
        /// The other endpoint's published port.
        held: PublishedPort,
    },
    /// A socket of the host listens on the port.
    #[error("{wanted} cannot be published: {holder} listens on {socket}; stop it, or choose another port or address")]
    PublishListener {
        /// The requested port.
        wanted: PublishedPort,
        /// The socket's address and port.
        socket: SocketAddr,
        /// The process that owns it.
        holder: String,
    },
    /// The host does not have the address.
    #[error(
        "{wanted} cannot be published: the host has no address {address} (`ip address`); omit it to publish on all addresses"
    )]
    PublishAddress {
        /// The requested port.
        wanted: PublishedPort,
        /// The address.
        address: IpAddr,
    },
    /// The host's subnet does not have the address's family.
    #[error(
        "{wanted} cannot be published: this host's subnet {subnet} has no {family}, so no container could reply; use an address of a family that it has, or none"
    )]
    PublishFamily {
        /// The requested port.
        wanted: PublishedPort,
        /// The address's family.
        family: Family,
        /// The host's subnet.
        subnet: Subnet,
    },
    /// The requested MAC is not a unicast address.
    #[error("MAC {mac} cannot be assigned: it is a group address or all zeros; use one such as 02:00:5e:10:00:01")]
    MacNotUnicast {
        /// The requested MAC.
        mac: Mac,
    },
    /// Another endpoint has the requested MAC.
    #[error("MAC {mac} is in use by endpoint {holder}: choose another one, or `{}` first", holder.detach_command())]
    MacInUse {
        /// The requested MAC.
        mac: Mac,
        /// The other endpoint.
        holder: EndpointId,
    },
    /// The endpoint whose namespace is to be shared does not exist.
    #[error("there is no endpoint {target} whose network namespace could be shared: list endpoints with `overlayctl endpoints`")]
    TargetNotFound {
        /// The name.
        target: EndpointName,
    },
    /// Other endpoints share its namespace.
    #[error(
        "endpoint {name} shares its network namespace with {}: detach these first, or all of them by `overlayctl detach --force {name}`",
        names(sharers)
    )]
    NetnsShared {
        /// The endpoint.
        name: EndpointName,
        /// The endpoints that share it.
        sharers: Vec<EndpointName>,
    },
    /// The endpoint whose namespace was to be shared was detached meanwhile.
    #[error("endpoint {name}: endpoint {target} was detached at the same time: attach that one again first")]
    TargetDetached {
        /// The endpoint.
        name: EndpointName,
        /// The owner of the namespace.
        target: EndpointName,
    },
    /// Another endpoint uses the namespace exclusively.
    #[error(
        "{netns} belongs to endpoint {holder} in mode {mode}: {}`{}` first",
        share_remedy(holder),
        holder.detach_command()
    )]
    NetnsInUse {
        /// The namespace.
        netns: PathBuf,
        /// The other endpoint.
        holder: EndpointId,
        /// The other endpoint's mode.
        mode: Mode,
    },
    /// The kernel would reject the interface name.
    #[error(
        "invalid interface name `{interface}`: expected 1 to 15 visible ASCII characters without / : %, and not `lo`, `.` or `..`"
    )]
    InterfaceName {
        /// The refused name.
        interface: String,
    },
    /// A requested address is given for the other family.
    #[error("address {address} was requested as the {family} address, but is of the other family")]
    FamilyMismatch {
        /// The requested address.
        address: IpAddr,
        /// The family for which it was given.
        family: Family,
    },
    /// The host's subnet does not have a requested address's family.
    #[error("address {address} cannot be assigned: this host's subnet {subnet} has no {family}")]
    FamilyNotAvailable {
        /// The requested address.
        address: IpAddr,
        /// Its family.
        family: Family,
        /// The host's subnet.
        subnet: Subnet,
    },
    /// No address is free, or the requested one is not available.
    #[error(transparent)]
    Address(#[from] IpamError),
    /// The bridge has no free port.
    #[error("{}", bridge_full_message())]
    BridgeFull,
    /// Another endpoint has the requested address.
    #[error("address {address} is in use by endpoint {holder}: choose another one, or `{}` first", holder.detach_command())]
    AddressInUse {
        /// The requested address.
        address: IpAddr,
        /// The other endpoint.
        holder: EndpointId,
    },
    /// The name is attached with other values than the requested ones.
    #[error("endpoint {name} is attached with {held}, not {asked}: `{}` first, or choose another name", name.detach_command())]
    NameInUse {
        /// The endpoint.
        name: EndpointId,
        /// The present value, such as `network namespace /run/netns/a`.
        held: String,
        /// The requested value.
        asked: String,
    },
    /// Another endpoint has the interface of that namespace.
    #[error(
        "interface {interface} in {netns} belongs to endpoint {holder}: choose another interface, or `{}` first",
        holder.detach_command()
    )]
    InterfaceInUse {
        /// The interface.
        interface: String,
        /// The namespace.
        netns: PathBuf,
        /// The other endpoint.
        holder: EndpointId,
    },
    /// The endpoint's address is outside the present subnet.
    #[error(
        "endpoint {name} has {address}, outside the present subnet {subnet}: `{}`, then attach it again",
        name.detach_command()
    )]
    Stale {
        /// The endpoint.
        name: EndpointId,
        /// The address.
        address: IpAddr,
        /// The host's subnet.
        subnet: Subnet,
    },
    /// This host has no subnet yet.
    #[error(
        "no subnet is leased yet, or the overlay's devices are not in place: wait until the agent is ready (`overlayctl status --wait 30s`); `overlayctl status` says what is missing"
    )]
    NoSubnet,
    /// The agent is shutting down.
    #[error("the agent is shutting down: retry once it is running again")]
    ShuttingDown,
    /// The state directory cannot be written.
    #[error("endpoint {name}: {source}")]
    State {
        /// The endpoint.
        name: EndpointName,
        /// The file system's error.
        source: StateError,
    },
    /// The kernel rejected a change; the attach was rolled back.
    #[error("endpoint {name}: {source}")]
    Kernel {
        /// The endpoint.
        name: EndpointName,
        /// The kernel's error.
        source: OpError,
    },
    /// A bug in the agent.
    #[error("endpoint {name}: internal error of the agent: {text}; please report this bug")]
    Internal {
        /// The endpoint.
        name: EndpointName,
        /// The panic's text.
        text: String,
    },
}

/// Class of an error, for the response's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// The request is invalid.
    InvalidRequest,
    /// An object that the request names does not exist.
    NotFound,
    /// The request is valid, but conflicts with present state.
    Conflict,
    /// The request may succeed later.
    NotReady,
    /// The agent or the host failed.
    Internal,
}

fn names(names: &[EndpointName]) -> String {
    names.iter().map(EndpointName::as_str).collect::<Vec<_>>().join(", ")
}

/// How to use the namespace of another endpoint. Only the default network has mode container.
fn share_remedy(holder: &EndpointId) -> String {
    if holder.network.is_default() { format!("attach with mode container:{}, or ", holder.name) } else { String::new() }
}

impl EndpointError {
    /// The endpoint that holds the requested resource.
    pub(super) fn holder(&self) -> Option<&EndpointId> {
        match self {
            EndpointError::PublishInUse { holder, .. }
            | EndpointError::MacInUse { holder, .. }
            | EndpointError::NetnsInUse { holder, .. }
            | EndpointError::AddressInUse { holder, .. }
            | EndpointError::InterfaceInUse { holder, .. } => Some(holder),
            _ => None,
        }
    }

    /// Whether the endpoint holds the requested resource now; for a full subnet or bridge, whether it is in it.
    pub(super) fn is_caused_by(&self, endpoint: &Endpoint) -> bool {
        let is_holder = self.holder() == Some(&EndpointId::of(endpoint));
        match self {
            EndpointError::Address(IpamError::Full { range, .. }) => {
                endpoint.addresses().iter().any(|(_, address)| range.contains(*address))
            }
            EndpointError::BridgeFull => endpoint.port.is_some(),
            EndpointError::PublishInUse { held, .. } => is_holder && endpoint.published.contains(held),
            EndpointError::MacInUse { mac, .. } => is_holder && endpoint.port.as_ref().is_some_and(|port| port.mac == *mac),
            EndpointError::AddressInUse { address, .. } => {
                is_holder && endpoint.addresses().iter().any(|(_, held)| held == address)
            }
            EndpointError::NetnsInUse { netns, .. } | EndpointError::InterfaceInUse { netns, .. } => {
                is_holder && endpoint.netns == *netns
            }
            _ => is_holder,
        }
    }

    /// The error's class.
    pub fn class(&self) -> ErrorClass {
        match self {
            EndpointError::NetnsPath { .. }
            | EndpointError::NetnsNotFound { .. }
            | EndpointError::HostNetns { .. }
            | EndpointError::UnsupportedInMode { .. }
            | EndpointError::UnsupportedInNetwork { .. }
            | EndpointError::Owner { .. }
            | EndpointError::Publish(_)
            | EndpointError::PublishConflict { .. }
            | EndpointError::PublishAddress { .. }
            | EndpointError::PublishFamily { .. }
            | EndpointError::InterfaceName { .. }
            | EndpointError::FamilyMismatch { .. }
            | EndpointError::FamilyNotAvailable { .. }
            | EndpointError::MacNotUnicast { .. }
            | EndpointError::Address(IpamError::Outside { .. } | IpamError::Reserved { .. } | IpamError::Docker { .. }) => {
                ErrorClass::InvalidRequest
            }
            EndpointError::TargetNotFound { .. } => ErrorClass::NotFound,
            EndpointError::Address(IpamError::Full { .. } | IpamError::InUse { .. })
            | EndpointError::BridgeFull
            | EndpointError::AddressInUse { .. }
            | EndpointError::MacInUse { .. }
            | EndpointError::NameInUse { .. }
            | EndpointError::InterfaceInUse { .. }
            | EndpointError::NetnsInUse { .. }
            | EndpointError::PublishInUse { .. }
            | EndpointError::PublishListener { .. }
            | EndpointError::NetnsShared { .. }
            | EndpointError::TargetDetached { .. }
            | EndpointError::Stale { .. } => ErrorClass::Conflict,
            EndpointError::NoSubnet | EndpointError::ShuttingDown => ErrorClass::NotReady,
            EndpointError::State { .. } | EndpointError::Kernel { .. } | EndpointError::Internal { .. } => ErrorClass::Internal,
        }
    }
}
