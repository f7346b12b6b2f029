//! The small types through which the store, the kernel and the endpoints meet in `reconcile`.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::lease::Node;
use super::network::ConfigErrors;
use super::{LeaseRecord, Mac, NetworkConfig, PerFamily, RejectedLease, Subnet};

/// One entry below `<prefix>/subnets/`: its key's last part, and what it decodes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreEntry {
    /// The part of the key behind `<prefix>/subnets/`, as it stands in the store.
    pub key: String,
    /// The lease, or why it is none.
    pub value: Result<LeaseRecord, RejectedLease>,
}

/// What the store hands on, in the order of etcd's revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreEvent {
    /// The network's configuration: `None` while the key is not there. Comes before the first snapshot and at each change.
    Config(Option<Result<NetworkConfig, ConfigErrors>>),
    /// Every entry at one revision: what it lacks is gone.
    Snapshot(Vec<StoreEntry>),
    /// An entry was made or changed.
    Upsert(StoreEntry),
    /// An entry is gone.
    Remove {
        /// The part of the key behind `<prefix>/subnets/`.
        key: String,
    },
    /// This host's own lease.
    Own(OwnLease),
    /// Whether the store answers.
    Connection(Connection),
    /// The addresses of the store's servers: those that its endpoints stood for at any time since the start.
    Servers(BTreeSet<IpAddr>),
}

/// The store's availability.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// Requests are answered.
    Up {
        /// The revision of the last answer.
        revision: i64,
    },
    /// They are not; the data path stays as it is.
    Down {
        /// The last error, fit for a person.
        error: String,
    },
}

/// What the host wants to hold. Whenever it changes, the lease follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRequest {
    /// The network.
    pub network: NetworkConfig,
    /// Who we are.
    pub node: Node,
    /// This host's underlay addresses; one for each family of the network.
    pub public_ip: PerFamily<IpAddr>,
    /// The MACs of this host's VXLAN devices; one for each family of the network.
    pub vtep: PerFamily<Mac>,
    /// The subnet that the state file remembers.
    pub preferred: Option<Subnet>,
}

/// The state of this host's own lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnLease {
    /// Not held, and why; the next try follows by itself.
    NotHeld {
        /// What stands in the way, fit for a person.
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
    /// The etcd lease; `None` for a reservation.
    pub etcd_lease: Option<i64>,
    /// How it was got.
    pub origin: LeaseOrigin,
}

/// How a lease was got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseOrigin {
    /// It named this host already.
    Reused,
    /// It had this host's public IP and its holder is gone.
    TakenOver,
    /// It was free.
    Acquired,
}
