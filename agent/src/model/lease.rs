//! What a lease in etcd says: who holds a subnet, and how its host is reached.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Cidr, Mac, PerFamily, Subnet, Vni};

/// How a host's subnet is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Backend {
    /// By VXLAN: one tunnel endpoint MAC per overlay family.
    Vxlan {
        /// The VNI that the host uses.
        vni: Vni,
        /// The VTEP's MAC in each family's device.
        vtep: PerFamily<Mac>,
    },
    /// By a backend that this agent has not; such a peer is listed and left out of the data path.
    Other {
        /// The `BackendType` of the lease.
        name: String,
    },
}

impl Backend {
    /// The `BackendType` in etcd.
    pub fn name(&self) -> &str {
        match self {
            Backend::Vxlan { .. } => "vxlan",
            Backend::Other { name } => name,
        }
    }
}

/// Who wrote a lease: an addition of ours, which flannel ignores. A lease without it is a flannel host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// The name that people see.
    pub name: String,
    /// The host's identity: made at first start and kept in the state directory.
    pub id: String,
}

/// The value of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The host's underlay addresses, by overlay family: the IPv4 overlay runs over the IPv4 underlay, IPv6 over IPv6.
    pub public_ip: PerFamily<IpAddr>,
    /// How the host is reached.
    pub backend: Backend,
    /// Who wrote it.
    pub node: Option<Node>,
}

/// A lease as it stands in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRecord {
    /// The subnet, from the key.
    pub subnet: Subnet,
    /// The decoded value.
    pub lease: Lease,
    /// The etcd revision at which the key was created: the older of two conflicting leases is the one that counts.
    pub create_revision: i64,
    /// The etcd revision of the last change.
    pub mod_revision: i64,
    /// The etcd lease that the key is bound to; `None` is a reservation, which never expires.
    pub etcd_lease: Option<i64>,
}

/// A value in the store that is left out of the data path, and why. The others still work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("lease `{key}` is left out: {kind}")]
pub struct RejectedLease {
    /// The key below `<prefix>/subnets/`, cut to 80 characters and with control characters replaced.
    pub key: String,
    /// The reason.
    pub kind: RejectReason,
}

/// The reasons to leave a lease out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum RejectReason {
    /// The key names no subnet.
    #[error("its key is no subnet: {detail}")]
    Key {
        /// What is wrong.
        detail: String,
    },
    /// The value is larger than a lease can be.
    #[error("its value has {size} bytes, more than the {limit} allowed")]
    TooLarge {
        /// Bytes found.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The value is no JSON, or no lease.
    #[error("its value is no lease: {detail}")]
    Malformed {
        /// What is wrong.
        detail: String,
    },
    /// A field has a value that cannot be.
    #[error("{field} is {value}: {rule}")]
    Field {
        /// The field, as in the JSON.
        field: String,
        /// The value found.
        value: String,
        /// What is allowed.
        rule: String,
    },
    /// The subnet is not part of the network.
    #[error("{subnet} is not inside the network {network}")]
    OutsideNetwork {
        /// The offending range.
        subnet: Cidr,
        /// The configured network.
        network: Cidr,
    },
    /// The network has no such family.
    #[error("{subnet} is of a family that the network does not use")]
    FamilyNotUsed {
        /// The offending range.
        subnet: Cidr,
    },
    /// The subnet is more of the network than one host can hold.
    #[error("{subnet} is more than a quarter of the network {network}")]
    TooWide {
        /// The offending range.
        subnet: Cidr,
        /// The configured network.
        network: Cidr,
    },
    /// The range is part of this host's own subnet, or holds it.
    #[error("{subnet} overlaps this host's own subnet {own}")]
    OverlapsOwn {
        /// The offending subnet.
        subnet: Subnet,
        /// This host's.
        own: Subnet,
    },
    /// The range, which the network does not lease any more, holds the underlay address of a host.
    #[error("{subnet} holds {address}, which is the address of a host")]
    CoversHost {
        /// The offending range.
        subnet: Cidr,
        /// The host's address.
        address: IpAddr,
    },
    /// An older lease has an overlapping range.
    #[error("it overlaps the older lease {other}")]
    Overlap {
        /// The key of the older lease.
        other: String,
    },
    /// The public IP is this host's.
    #[error("its public IP {address} is this host's own")]
    OwnAddress {
        /// The address.
        address: IpAddr,
    },
    /// The MAC is this host's.
    #[error("its VTEP MAC {mac} is this host's own")]
    OwnMac {
        /// The MAC.
        mac: Mac,
    },
    /// An older lease has the same VTEP MAC.
    #[error("its VTEP MAC {mac} is that of the older lease {other}")]
    DuplicateMac {
        /// The MAC.
        mac: Mac,
        /// The key of the older lease.
        other: String,
    },
    /// The host uses another VNI, so no packet of it would arrive.
    #[error("it uses VNI {theirs}, the network's is {ours}")]
    OtherVni {
        /// The peer's.
        theirs: Vni,
        /// The network's.
        ours: Vni,
    },
    /// The host uses another backend.
    #[error("its backend is `{name}`, only vxlan is served")]
    OtherBackend {
        /// The `BackendType`.
        name: String,
    },
}

impl RejectReason {
    /// Every word of [`RejectReason::word`].
    pub const NAMES: [&str; 15] = [
        "key",
        "too-large",
        "malformed",
        "field",
        "outside-network",
        "too-wide",
        "family-not-used",
        "overlaps-own",
        "covers-host",
        "overlap",
        "own-address",
        "own-mac",
        "duplicate-mac",
        "other-vni",
        "other-backend",
    ];

    /// A short stable word for metrics and JSON.
    pub fn as_str(&self) -> &'static str {
        match self {
            RejectReason::Key { .. } => "key",
            RejectReason::TooLarge { .. } => "too-large",
            RejectReason::Malformed { .. } => "malformed",
            RejectReason::Field { .. } => "field",
            RejectReason::OutsideNetwork { .. } => "outside-network",
            RejectReason::TooWide { .. } => "too-wide",
            RejectReason::FamilyNotUsed { .. } => "family-not-used",
            RejectReason::OverlapsOwn { .. } => "overlaps-own",
            RejectReason::CoversHost { .. } => "covers-host",
            RejectReason::Overlap { .. } => "overlap",
            RejectReason::OwnAddress { .. } => "own-address",
            RejectReason::OwnMac { .. } => "own-mac",
            RejectReason::DuplicateMac { .. } => "duplicate-mac",
            RejectReason::OtherVni { .. } => "other-vni",
            RejectReason::OtherBackend { .. } => "other-backend",
        }
    }
}

/// Text from the store made fit for a log line or a terminal: control characters replaced, at most 80 characters.
pub fn printable(text: &str) -> String {
    text.chars().take(80).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
