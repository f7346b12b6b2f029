//! Why an endpoint is not attached or detached.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::ipam::IpamError;
use crate::model::endpoint::EndpointName;
use crate::model::{Family, Subnet};
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
    NetnsGone {
        /// The path.
        netns: PathBuf,
    },
    /// The kernel would not take the interface name.
    #[error("`{interface}` is no interface name: 1 to 15 visible ASCII characters without / : %, and not `lo`, `.` or `..`")]
    InterfaceName {
        /// The refused name.
        interface: String,
    },
    /// A wished address stands in the other family's place.
    #[error("{address} was asked for as {family} address")]
    WishFamily {
        /// The wished address.
        address: IpAddr,
        /// The family it was given for.
        family: Family,
    },
    /// A wished address is of a family that the host's subnet has not.
    #[error("address {address} cannot be given: this host's subnet {subnet} has no {family}")]
    NoFamily {
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
    /// The wished address is another endpoint's.
    #[error("address {address} is in use by endpoint {holder}: choose another one, or `overlayctl detach {holder}` first")]
    AddressHeld {
        /// The wished address.
        address: IpAddr,
        /// Who has it.
        holder: EndpointName,
    },
    /// The name is attached, with something else than what is asked for.
    #[error("endpoint {name} is attached with {held}, not {asked}: `overlayctl detach {name}` first, or choose another name")]
    NameHeld {
        /// The name.
        name: EndpointName,
        /// What it has: `network namespace /run/netns/a`.
        held: String,
        /// What was asked for.
        asked: String,
    },
    /// The interface of that namespace belongs to another endpoint.
    #[error(
        "interface {interface} in {netns} belongs to endpoint {holder}: choose another interface, or `overlayctl detach {holder}` first"
    )]
    InterfaceHeld {
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
        "no subnet is leased yet: wait until the agent is ready (`overlayctl status --wait 30s`); `overlayctl status` says what is missing"
    )]
    NoSubnet,
    /// The agent is ending.
    #[error("the agent is ending: try again when it has started again")]
    Ending,
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
    Defect {
        /// The endpoint.
        name: EndpointName,
        /// The panic's text.
        text: String,
    },
}

/// What kind of error it is, for the answer's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The request cannot be right.
    BadValue,
    /// The request is right, but not beside what is there.
    Conflict,
    /// The request can be right later.
    NotReady,
    /// The host failed.
    Internal,
}

impl EndpointError {
    /// The error's kind.
    pub fn class(&self) -> Class {
        match self {
            EndpointError::NetnsPath { .. }
            | EndpointError::NetnsGone { .. }
            | EndpointError::InterfaceName { .. }
            | EndpointError::WishFamily { .. }
            | EndpointError::NoFamily { .. }
            | EndpointError::Address(IpamError::Outside { .. } | IpamError::Reserved { .. }) => Class::BadValue,
            EndpointError::Address(IpamError::Full { .. } | IpamError::InUse { .. })
            | EndpointError::AddressHeld { .. }
            | EndpointError::NameHeld { .. }
            | EndpointError::InterfaceHeld { .. }
            | EndpointError::Stale { .. } => Class::Conflict,
            EndpointError::NoSubnet | EndpointError::Ending => Class::NotReady,
            EndpointError::State { .. } | EndpointError::Kernel { .. } | EndpointError::Defect { .. } => Class::Internal,
        }
    }
}
