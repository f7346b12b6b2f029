//! Messages between the store and `reconcile`.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::lease::Node;
use super::network::ConfigErrors;
use super::{BackendData, ExpiryId, LeaseRecord, NetworkConfig, NetworkRecord, PerFamily, RejectedLease, StorePosition, Subnet};

/// One entry below `<prefix>/subnets/`: the last part of its key, and its decoded value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreEntry {
    /// The part of the key after `<prefix>/subnets/`, unchanged.
    pub key: String,
    /// The lease, or the reason for rejection.
    pub value: Result<LeaseRecord, RejectedLease>,
}

/// Event of the store, in the order of the store's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreEvent {
    /// The network's record; `None` while the key does not exist. Sent before the first snapshot and at each change.
    Config(Option<Result<NetworkRecord, ConfigErrors>>),
    /// All entries at one position. Any entry that is missing here was removed.
    Snapshot(Vec<StoreEntry>),
    /// An entry was created or changed.
    Upsert(StoreEntry),
    /// An entry was removed.
    Remove {
        /// The part of the key after `<prefix>/subnets/`.
        key: String,
    },
    /// The state of this host's own lease.
    Own(OwnLease),
    /// The store's availability.
    Connection(Connection),
    /// All addresses that the store's endpoints resolved to since the start.
    Servers(BTreeSet<IpAddr>),
}

/// The store's availability.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// Requests are answered.
    Up {
        /// The position of the last response.
        position: StorePosition,
    },
    /// Requests fail; the data path stays unchanged.
    Down {
        /// The last error, human-readable.
        error: String,
    },
}

/// The lease that this host requests. The lease keeper updates the lease whenever the request changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRequest {
    /// The network.
    pub network: NetworkConfig,
    /// This host's name and identity.
    pub node: Node,
    /// This host's underlay addresses; one for each family of the network.
    pub public_ip: PerFamily<IpAddr>,
    /// What the lease carries for the network's backend.
    pub backend: BackendData,
    /// The subnet in the state file.
    pub preferred: Option<Subnet>,
}

/// The state of this host's own lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnLease {
    /// Not held; retried automatically.
    NotHeld {
        /// The reason, human-readable.
        reason: String,
    },
    /// Held.
    Held(HeldLease),
}

/// A lease that this host holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldLease {
    /// The subnet.
    pub subnet: Subnet,
    /// Its expiry; `None` for a reservation, which never expires.
    pub expiry: Option<ExpiryId>,
    /// How it was obtained.
    pub origin: LeaseOrigin,
}

/// How a lease was obtained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseOrigin {
    /// It already named this host.
    Reused,
    /// It had this host's public IP, and its holder is dead.
    TakenOver,
    /// Its subnet was free.
    Acquired,
}
