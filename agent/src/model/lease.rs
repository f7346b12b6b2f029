//! A lease in etcd: the holder of a subnet, and how to reach it.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{BackendData, PerFamily, Subnet};

/// The host that wrote a lease. This is our extension, which flannel ignores; a lease without it belongs to a flannel host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// The display name.
    pub name: String,
    /// The host's identity, generated at first start and kept in the state directory.
    pub id: String,
}

/// The value of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The host's underlay addresses, by overlay family: the IPv4 overlay runs over the IPv4 underlay, IPv6 over IPv6.
    pub public_ip: PerFamily<IpAddr>,
    /// How the host is reached.
    pub backend: BackendData,
    /// The host that wrote it.
    pub node: Option<Node>,
}

/// Position in the store's history: of two changes, the later one has the greater position.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StorePosition(pub i64);

/// Handle of an entry's expiry, by which the store tells the remaining time. Only the store interprets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpiryId(pub i64);

/// A lease with its key and the store's metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRecord {
    /// The subnet, from the key.
    pub subnet: Subnet,
    /// The decoded value.
    pub lease: Lease,
    /// When the entry was created. Of two conflicting leases the older one wins.
    pub created: StorePosition,
    /// When it was changed last.
    pub changed: StorePosition,
    /// Its expiry. `None` for a reservation, which never expires.
    pub expiry: Option<ExpiryId>,
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
