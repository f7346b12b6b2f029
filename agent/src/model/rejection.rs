//! Why a lease in etcd is excluded from the data path.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Cidr, Mac, Subnet, Vni};

/// A lease that is excluded from the data path, and the reason. Other leases are not affected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("lease `{key}` is ignored: {kind}")]
pub struct RejectedLease {
    /// The key below `<prefix>/subnets/`, cut to 80 characters and with control characters replaced.
    pub key: String,
    /// The reason.
    pub kind: RejectReason,
}

/// The reasons for ignoring a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum RejectReason {
    /// The key is not a subnet.
    #[error("its key is no subnet: {detail}")]
    Key {
        /// The cause.
        detail: String,
    },
    /// The value exceeds the size limit.
    #[error("its value has {size} bytes, more than the {limit} allowed")]
    TooLarge {
        /// Bytes found.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The value is not JSON, or not a lease.
    #[error("its value is not a lease: {detail}")]
    Malformed {
        /// The cause.
        detail: String,
    },
    /// A field has an invalid value.
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
    /// The network does not use this family.
    #[error("{subnet} is of a family that the network does not use")]
    FamilyNotUsed {
        /// The offending range.
        subnet: Cidr,
    },
    /// The subnet is larger than one host may hold.
    #[error("{subnet} is more than a quarter of the network {network}")]
    TooWide {
        /// The offending range.
        subnet: Cidr,
        /// The configured network.
        network: Cidr,
    },
    /// The range overlaps this host's own subnet.
    #[error("{subnet} overlaps this host's own subnet {own}")]
    OverlapsOwn {
        /// The offending subnet.
        subnet: Subnet,
        /// This host's subnet.
        own: Subnet,
    },
    /// The range, which the network no longer leases, contains the underlay address of a host.
    #[error("{subnet} contains the underlay address {address} of a host")]
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
    /// The host uses another VNI, so none of its packets would arrive.
    #[error("it uses VNI {theirs}, the network uses {ours}")]
    OtherVni {
        /// The peer's VNI.
        theirs: Vni,
        /// The network's VNI.
        ours: Vni,
    },
    /// The host uses another backend.
    #[error("its backend is `{name}`, which is not the network's")]
    OtherBackend {
        /// The `BackendType`.
        name: String,
    },
}

impl RejectReason {
    /// All values of [`RejectReason::as_str`].
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

    /// A short stable name for metrics and JSON.
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
