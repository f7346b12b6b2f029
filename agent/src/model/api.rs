//! JSON types of the agent's API, version 1. Fields are only ever added. `overlayctl -o json` prints the same types.

mod mesh;
mod view;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::config_fields::FieldError;
use super::endpoint::{EndpointName, Mode};
use super::{Cidr, Endpoint, LeaseRecord, Mac, NetworkConfig, NetworkName, PerFamily, PublishedPort, RejectedLease, Subnet, Vni};

pub use mesh::{Mesh, MeshEntry, PathView, Reachability};
pub use view::{BridgeView, Counters, DeviceView, EndpointView, IpamView, NetworkView, PortView};

/// The version of these types, the first part of each path: `/v1/...`.
pub const VERSION: u32 = 1;

/// Health of a part or of the whole agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// No problem.
    Ok,
    /// Works, but needs attention.
    Degraded,
    /// Not working yet, or not working any more.
    Waiting,
}

/// Where a network lives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkKind {
    /// In the host's network namespace.
    #[default]
    Routed,
    /// In a network namespace of its own.
    Isolated,
}

/// `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The network's name.
    #[serde(default = "default_network")]
    pub name: String,
    /// The network's kind.
    #[serde(default)]
    pub kind: NetworkKind,
    /// The agent's version.
    pub version: String,
    /// The host's name.
    pub node: String,
    /// The host's identity.
    pub node_id: String,
    /// Seconds since the agent started.
    pub uptime_seconds: u64,
    /// The snapshot was read, the own lease is held, and no failed operation is pending.
    pub ready: bool,
    /// The worst health of all parts.
    pub health: Health,
    /// Problems, human-readable, each with the remedy.
    pub problems: Vec<String>,
    /// The store.
    pub store: StoreStatus,
    /// The network's configuration; absent until it exists.
    pub network: Option<NetworkConfig>,
    /// This host's lease; absent until it is held.
    pub lease: Option<LeaseStatus>,
    /// The external interface; absent until one is chosen.
    pub underlay: Option<UnderlayStatus>,
    /// The data path.
    pub data_path: DataPathStatus,
    /// Number of endpoints on this host.
    pub endpoints: usize,
}

/// The name in the status of agents that know no other network.
fn default_network() -> String {
    NetworkName::default().to_string()
}

/// The store's part of the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Whether etcd answers.
    pub connected: bool,
    /// The endpoints in use.
    pub endpoints: Vec<String>,
    /// The key prefix.
    pub prefix: String,
    /// The last revision seen.
    pub revision: i64,
    /// The last error while etcd does not answer.
    pub error: Option<String>,
    /// Errors of the configuration in etcd, while the last valid one stays in use.
    pub config_errors: Vec<FieldError>,
    /// Number of leases seen, including this host's.
    pub leases: usize,
    /// Ignored leases, with the reason.
    pub refused: Vec<RejectedLease>,
}

/// The own lease's part of the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// The subnet.
    pub subnet: Subnet,
    /// Whether it never expires.
    pub reservation: bool,
}

/// The underlay's part of the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnderlayStatus {
    /// The external interface.
    pub interface: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// This host's underlay addresses.
    pub public_ip: PerFamily<IpAddr>,
    /// The interface's addresses that the tunnels send from. They differ from `public_ip` behind NAT.
    #[serde(default)]
    pub local: PerFamily<IpAddr>,
    /// Why these addresses were chosen.
    #[serde(default)]
    pub reasons: PerFamily<String>,
}

/// The data path's part of the status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataPathStatus {
    /// Number of peers in the data path.
    pub peers: usize,
    /// Entries that could not be programmed, with the kernel's error; they are retried.
    pub failed: Vec<FailedOp>,
    /// Number of entries restored since the agent started, after another program changed them.
    pub drift_repairs: u64,
    /// The last repair.
    pub last_drift: Option<Drift>,
    /// MTU of the overlay in bytes.
    pub mtu: Option<u32>,
    /// Whether routes use next-hop objects.
    pub nexthop_objects: bool,
    /// Packets dropped by the source filters, by reason; empty until the tables exist.
    #[serde(default)]
    pub dropped: BTreeMap<String, u64>,
}

/// An entry that could not be programmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedOp {
    /// The entry, in the format of `ip`.
    pub entry: String,
    /// The kernel's error, and the remedy.
    pub error: String,
    /// Number of attempts.
    pub attempts: u32,
}

/// An entry that another program changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drift {
    /// The entry.
    pub entry: String,
    /// Seconds since the epoch.
    pub at: u64,
}

/// `GET /v1/subnets`, and each line of `GET /v1/subnets?watch=true`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnets {
    /// All leases, ordered by subnet; ignored ones last.
    pub subnets: Vec<SubnetEntry>,
}

/// One lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetEntry {
    /// The key below `<prefix>/subnets/`.
    pub key: String,
    /// The subnet; absent if the key is not a subnet.
    pub subnet: Option<Subnet>,
    /// The host's name; absent for a flannel host.
    pub host: Option<String>,
    /// The host's identity; absent for a flannel host.
    pub node_id: Option<String>,
    /// The host's underlay addresses.
    pub public_ip: PerFamily<IpAddr>,
    /// The backend; `vxlan` for leases in the data path.
    pub backend: Option<String>,
    /// The VNI.
    pub vni: Option<Vni>,
    /// The VTEP's MAC in each family.
    pub vtep: PerFamily<Mac>,
    /// Seconds until the lease expires unless renewed; absent for a reservation, and if not requested.
    pub expires_in_seconds: Option<i64>,
    /// Whether it never expires.
    pub reservation: bool,
    /// Whether it is this host's lease.
    pub own: bool,
    /// Why the lease is ignored; absent for a lease in the data path.
    pub refused: Option<String>,
}

impl SubnetEntry {
    /// Converts a stored lease. The caller adds `own` and `refused`.
    pub fn from_record(key: &str, record: &LeaseRecord) -> SubnetEntry {
        let lease = &record.lease;
        SubnetEntry {
            key: key.to_owned(),
            subnet: Some(record.subnet),
            host: lease.node.as_ref().map(|node| node.name.clone()),
            node_id: lease.node.as_ref().map(|node| node.id.clone()),
            public_ip: lease.public_ip,
            backend: Some(lease.backend.name().to_owned()),
            vni: lease.backend.vni(),
            vtep: lease.backend.endpoints().iter().filter_map(|(family, end)| Some((family, end.mac()?))).collect(),
            expires_in_seconds: None,
            reservation: record.expiry.is_none(),
            own: false,
            refused: None,
        }
    }

    /// Converts a rejected entry.
    pub fn from_rejected(rejected: &RejectedLease) -> SubnetEntry {
        SubnetEntry {
            key: rejected.key.clone(),
            subnet: Subnet::from_key(&rejected.key).ok(),
            host: None,
            node_id: None,
            public_ip: PerFamily::default(),
            backend: None,
            vni: None,
            vtep: PerFamily::default(),
            expires_in_seconds: None,
            reservation: false,
            own: false,
            refused: Some(rejected.kind.to_string()),
        }
    }
}

/// `GET /v1/peers`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peers {
    /// All peers in the data path, one element per family, ordered by subnet.
    pub peers: Vec<PeerEntry>,
}

/// How one family of a peer's subnet is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerEntry {
    /// The peer's range.
    pub subnet: Cidr,
    /// The host's name; absent for a flannel host.
    pub host: Option<String>,
    /// The peer's underlay address.
    pub public_ip: IpAddr,
    /// The MAC of the peer's VXLAN device; absent with other backends.
    pub vtep: Option<Mac>,
    /// Our device towards it.
    pub device: String,
    /// The next-hop object's ID; absent with classic routes.
    pub nexthop_id: Option<u32>,
    /// `programmed`, or what is missing.
    pub state: String,
    /// Seconds since the epoch of the last drift repair.
    pub last_repair: Option<u64>,
}

/// `GET /v1/networks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Networks {
    /// The networks that this host is in: the default one, then the others by name.
    pub networks: Vec<NetworkEntry>,
}

/// A network on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkEntry {
    /// Its name.
    pub name: NetworkName,
    /// Its kind.
    pub kind: NetworkKind,
    /// This host's subnet; absent until it is leased.
    pub subnet: Option<Subnet>,
    /// As in [`Status`].
    pub ready: bool,
    /// Number of its endpoints on this host.
    pub endpoints: usize,
    /// Number of its problems, which its status has.
    pub problems: usize,
}

/// `GET /v1/endpoints`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    /// All endpoints of this host, by name.
    pub endpoints: Vec<Endpoint>,
}

/// `PUT /v1/endpoints/NAME`: attaches a container. Idempotent: the same request returns the same endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// The container's network mode; default `overlay`.
    #[serde(default)]
    pub mode: Mode,
    /// Absolute path of the network namespace; required in modes overlay and none, absent in the other modes.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// The interface to create in it; default `eth0`.
    #[serde(default)]
    pub interface: Option<String>,
    /// Requested addresses; the agent allocates the missing ones.
    #[serde(default)]
    pub addresses: PerFamily<IpAddr>,
    /// The requested unicast MAC of the interface; only in mode overlay.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// Host ports to forward to it; only in mode overlay.
    #[serde(default)]
    pub publish: Vec<PublishedPort>,
    /// Whether packets with a foreign source address or MAC are dropped; default true.
    #[serde(default)]
    pub source_check: Option<bool>,
    /// Whether the container's default route uses the overlay; default true. If false, only a route to the overlay network does.
    /// Omitted from the JSON if not set, because older agents do not know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_route: Option<bool>,
    /// The program that attaches it, if any: printable text of at most 256 bytes.
    #[serde(default)]
    pub owner: Option<String>,
}

/// Response to an attach: the endpoint and the container's network settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachResponse {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The prefix length of the address, per family, as in `ip addr`.
    pub prefix_length: PerFamily<u8>,
    /// The gateway on the bridge.
    pub gateway: PerFamily<IpAddr>,
    /// The route's destination via the gateway, per family: all addresses, or without a default route the overlay network.
    #[serde(default)]
    pub routes: PerFamily<Cidr>,
    /// MTU of the interface in bytes; absent without an interface.
    pub mtu: Option<u32>,
}

/// Response to a detach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetachResponse {
    /// The detached endpoint; absent if it did not exist, which is not an error.
    pub endpoint: Option<EndpointName>,
    /// Endpoints in the same namespace, which were detached with it.
    #[serde(default)]
    pub sharers: Vec<EndpointName>,
}

/// `GET` and `PUT /v1/log-level`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    /// A filter of the `tracing` crate: `info`, `debug`, `overlay_agent::store=debug`.
    pub level: String,
}

/// The body of every error response.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error, with value, place and remedy.
    pub error: String,
}
