//! etcd client: watches the configuration and the leases of each network, and keeps this host's leases. Only this module uses
//! `etcd-client`.
//!
//! All networks share one connection to one server, with one gRPC stream for their watches, and one etcd lease.
//! [`Store::run_connection`] is the task of that shared part. [`NetworkStore::run`] is one task for each network. It runs the
//! watch (`watch`) and the lease keeper (`lease_keeper`) concurrently; an error that concerns its keys only is retried there. If
//! the connection fails, all networks continue over a new one.
//!
//! ```text
//!                                         Link
//!   network --LeaseRequest--> lease_keeper --> connection --> etcd
//!      ^                          ^               |
//!      |                      WatchState     watch_stream
//!      |                          |               |
//!      +---StoreEvent (bounded)-- watch <---------+
//! ```
//!
//! | file | contents |
//! | --- | --- |
//! | `connection` | the shared part; `watch_stream`: the watches of all networks; `host_lease`: their etcd lease |
//! | `client` | the handle of the store; `network`: a network's part |
//! | `connect` | settings, endpoints, TLS, login, timeouts; `discovery`: endpoints by DNS; `certificate`: expiry dates |
//! | `keys`, `codec` | keys and values of the flannel v3 schema |
//! | `read`, `watch` | a paged snapshot at one revision; then every change after it |
//! | `lease`, `pick` | decisions about this host's lease, as pure functions |
//! | `lease_keeper`, `write`, `renew` | their execution: transactions, renewal, liveness checks of another lease's holder |
//! | `networks` | the networks' records: read at one revision, written and removed in one transaction each |
//! | `oneshot` | single requests for programs without an agent; `clock` reads an etcd server's clock |

mod certificate;
mod client;
mod clock;
mod codec;
mod connect;
mod connection;
mod discovery;
mod error;
mod host_lease;
mod keys;
mod lease;
mod lease_keeper;
mod network;
mod networks;
mod oneshot;
mod pick;
mod read;
mod renew;
mod watch;
mod watch_stream;
mod write;

pub use client::Store;
pub use clock::server_clock;
pub use codec::{MAX_NODE_ID, MAX_NODE_NAME, MAX_VALUE, read_entry};
pub use connect::StoreConfig;
pub use error::StoreError;
pub use keys::{DEFAULT_PREFIX, Keys};
pub use network::NetworkStore;
pub use networks::{NetworkError, Networks, WriteKind, WrittenNetwork, read_networks, remove_network, write_network};
pub use oneshot::{
    ConfigText, MemberStatus, ReleaseReport, ReplaceCondition, Snapshot, get_config, member_status, put_config, read_all,
    release, remaining_ttls,
};

#[cfg(test)]
mod tests;
