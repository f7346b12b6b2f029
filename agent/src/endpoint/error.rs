//! Why an endpoint is not attached or detached.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use super::ipam::IpamError;
use crate::model::device::bridge_full_message;
use crate::model::endpoint::EndpointName;
use crate::model::publish::PublishError;
use crate::model::{Family, Mac, Mode, PublishedPort, Subnet};
use crate::plan::OpError;
use crate::state::StateError;

/// What to do where a namespace is not there: under systemd the agent sees other users' processes only where it is allowed to.
fn remedy(netns: &Path) -> &'static str {
    if netns.starts_with("/proc") {
        "has the process ended? The agent's unit sees processes only with CAP_SYS_PTRACE (proc-netns.conf, docs/install.md)"
    } else {
        "make it first (`ip netns add NAME` makes /run/netns/NAME)"
    }
}

/// Why an endpoint is not attached or detached. Each text names the value and what to do.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The namespace's path is no absolute path.
    #[error("network namespace `{netns}` is not an absolute path: expected one such as /run/netns/NAME or /proc/PID/ns/net")]
    NetnsPath {
        /// The refused path.
        netns: String,
    },
    /// There is no network namespace at the path.
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
    /// The mode has no such thing.
    #[error("mode {mode} has no place for {what}: leave it out, or use mode overlay")]
    UnsupportedInMode {
        /// What was asked for.
        what: &'static str,
        /// The mode.
        mode: Mode,
    },
    /// The owner is no text for a person.
    #[error("`{owner}` is no owner: 1 to 256 bytes of text without control characters")]
    Owner {
        /// The refused text.
        owner: String,
    },
    /// A port that cannot be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Two of one request lead the same port of the host to different ports.
    #[error("{one} and {other} lead the same port of the host to different ports: leave one out")]
    PublishConflict {
        /// One.
        one: PublishedPort,
        /// The other.
        other: PublishedPort,
    },
    /// Another endpoint has the port.
    #[error(
        "{wanted} cannot be published: endpoint {holder} has {held}; choose another port, or `overlayctl detach {holder}` first"
    )]
    PublishInUse {
        /// What was asked for.
        wanted: PublishedPort,
        /// Who has it.
        holder: EndpointName,
        /// As what.
        held: PublishedPort,
    },
    /// A socket of the host has the port.
    #[error("{wanted} cannot be published: {holder} listens on {socket}; stop it, or choose another port or address")]
    PublishListener {
        /// What was asked for.
        wanted: PublishedPort,
        /// The socket's address and port.
        socket: SocketAddr,
        /// Whose it is.
        holder: String,
    },
    /// The address is not the host's.
    #[error("{wanted} cannot be published: the host has no address {address} (`ip address`); leave it out for all that it has")]
    PublishAddress {
        /// What was asked for.
        wanted: PublishedPort,
        /// The address.
        address: IpAddr,
    },
    /// The address is of a family that containers have not.
    #[error(
        "{wanted} cannot be published: this host's subnet {subnet} has no {family}, so no container could answer; name an address of its family, or none"
    )]
    PublishFamily {
        /// What was asked for.
        wanted: PublishedPort,
        /// The address's family.
        family: Family,
        /// The host's subnet.
        subnet: Subnet,
    },
    /// The wished MAC is no address of one station.
    #[error("MAC {mac} cannot be given: it is a group's or all zeros; one such as 02:00:5e:10:00:01 can")]
    MacNotUnicast {
        /// The wished MAC.
        mac: Mac,
    },
    /// The wished MAC is another endpoint's.
    #[error("MAC {mac} is in use by endpoint {holder}: choose another one, or `overlayctl detach {holder}` first")]
    MacInUse {
        /// The wished MAC.
        mac: Mac,
        /// Who has it.
        holder: EndpointName,
    },
    /// There is no endpoint to share with.
    #[error("there is no endpoint {target} to share the network namespace of: `overlayctl endpoints` lists them")]
    TargetNotFound {
        /// The name.
        target: EndpointName,
    },
    /// Others share its namespace.
    #[error(
        "endpoint {name} shares its network namespace with {}: detach these first, or all of them by `overlayctl detach --force {name}`",
        names(sharers)
    )]
    NetnsShared {
        /// The endpoint.
        name: EndpointName,
        /// Who shares it.
        sharers: Vec<EndpointName>,
    },
    /// The endpoint whose namespace was to be shared went away meanwhile.
    #[error("endpoint {name}: endpoint {target} was detached at the same time: attach that one again first")]
    TargetDetached {
        /// The endpoint.
        name: EndpointName,
        /// Who it was to share with.
        target: EndpointName,
    },
    /// The namespace is another endpoint's, and cannot be both's.
    #[error(
        "{netns} belongs to endpoint {holder} in mode {mode}: attach with mode container:{holder}, or `overlayctl detach {holder}` first"
    )]
    NetnsInUse {
        /// The namespace.
        netns: PathBuf,
        /// Who has it.
        holder: EndpointName,
        /// In which mode.
        mode: Mode,
    },
    /// The kernel would not take the interface name.
    #[error("`{interface}` is no interface name: 1 to 15 visible ASCII characters without / : %, and not `lo`, `.` or `..`")]
    InterfaceName {
        /// The refused name.
        interface: String,
    },
    /// A wished address stands in the other family's place.
    #[error("{address} was asked for as {family} address")]
    FamilyMismatch {
        /// The wished address.
        address: IpAddr,
        /// The family it was given for.
        family: Family,
    },
    /// A wished address is of a family that the host's subnet has not.
    #[error("address {address} cannot be given: this host's subnet {subnet} has no {family}")]
    FamilyNotAvailable {
        /// The wished address.
        address: IpAddr,
        /// Its family.
        family: Family,
        /// The host's subnet.
        subnet: Subnet,
    },
    /// No address, or not the wished one.
    #[error(transparent)]
    Address(#[from] IpamError),
    /// The bridge has no port left.
    #[error("{}", bridge_full_message())]
    BridgeFull,
    /// The wished address is another endpoint's.
    #[error("address {address} is in use by endpoint {holder}: choose another one, or `overlayctl detach {holder}` first")]
    AddressInUse {
        /// The wished address.
        address: IpAddr,
        /// Who has it.
        holder: EndpointName,
    },
    /// The name is attached, with something else than what is asked for.
    #[error("endpoint {name} is attached with {held}, not {asked}: `overlayctl detach {name}` first, or choose another name")]
    NameInUse {
        /// The name.
        name: EndpointName,
        /// What it has: `network namespace_name /run/path/a`.
        held: String,
        /// What was asked for.
        asked: String,
    },
    /// The interface of that namespace belongs to another endpoint.
    #[error(
        "interface {interface} in {netns} belongs to endpoint {holder}: choose another interface, or `overlayctl detach {holder}` first"
    )]
    InterfaceInUse {
        /// The interface.
        interface: String,
        /// The namespace.
        netns: PathBuf,
        /// Who has it.
        holder: EndpointName,
    },
    /// The endpoint's address is not of the present subnet.
    #[error(
        "endpoint {name} has {address}, outside the present subnet {subnet}: `overlayctl detach {name}`, then attach it again"
    )]
    Stale {
        /// The name.
        name: EndpointName,
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
    /// The agent is ending.
    #[error("the agent is ending: try again when it has started again")]
    ShuttingDown,
    /// The state directory cannot be written, so nothing was done.
    #[error("endpoint {name}: {source}")]
    State {
        /// The endpoint.
        name: EndpointName,
        /// The file system's error.
        source: StateError,
    },
    /// The kernel refused; what had been done is undone.
    #[error("endpoint {name}: {source}")]
    Kernel {
        /// The endpoint.
        name: EndpointName,
        /// The kernel's error.
        source: OpError,
    },
    /// A defect of the agent.
    #[error("endpoint {name}: the agent failed while it worked on it: {text}; this is a defect, please report it")]
    Internal {
        /// The endpoint.
        name: EndpointName,
        /// The panic's text.
        text: String,
    },
}

/// What kind of error it is, for the answer's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// The request cannot be right.
    InvalidRequest,
    /// What the request names is not there.
    NotFound,
    /// The request is right, but not beside what is there.
    Conflict,
    /// The request can be right later.
    NotReady,
    /// The host failed.
    Internal,
}

fn names(names: &[EndpointName]) -> String {
    names.iter().map(EndpointName::as_str).collect::<Vec<_>>().join(", ")
}

impl EndpointError {
    /// The endpoint that holds what was asked for.
    pub(super) fn holder(&self) -> Option<&EndpointName> {
        match self {
            EndpointError::PublishInUse { holder, .. }
            | EndpointError::MacInUse { holder, .. }
            | EndpointError::NetnsInUse { holder, .. }
            | EndpointError::AddressInUse { holder, .. }
            | EndpointError::InterfaceInUse { holder, .. } => Some(holder),
            _ => None,
        }
    }

    /// The error's kind.
    pub fn class(&self) -> ErrorClass {
        match self {
            EndpointError::NetnsPath { .. }
            | EndpointError::NetnsNotFound { .. }
            | EndpointError::HostNetns { .. }
            | EndpointError::UnsupportedInMode { .. }
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
