//! The JSON of the agent's socket, version 1. Fields are only ever added; `overlayctl -o json` prints the same shapes.

mod mesh;
mod view;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::endpoint::{EndpointName, Mode};
use super::network::FieldError;
use super::{Backend, Cidr, Endpoint, LeaseRecord, Mac, NetworkConfig, PerFamily, PublishedPort, RejectedLease, Subnet, Vni};

pub use mesh::{Mesh, MeshEntry, PathView, Reachability};
pub use view::{BridgeView, Counters, DeviceView, EndpointView, IpamView, NetworkView, PortView};

/// The version of these shapes, the first part of each path: `/v1/...`.
pub const VERSION: u32 = 1;

/// How well a part or the whole is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// All is well.
    Ok,
    /// Works, but something needs a look.
    Degraded,
    /// Not working yet, or no longer.
    Waiting,
}

/// `GET /v1/map_status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The agent's version.
    pub version: String,
    /// The host's name.
    pub node: String,
    /// The host's identity.
    pub node_id: String,
    /// Seconds since the agent started.
    pub uptime_seconds: u64,
    /// Snapshot seen, own lease held, nothing failed pending.
    pub ready: bool,
    /// The worst of the parts.
    pub health: Health,
    /// What is not well, each fit for a person and with the remedy.
    pub problems: Vec<String>,
    /// The store.
    pub store: StoreStatus,
    /// The network's configuration; absent until it is there.
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

/// The store's part of the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Whether it answers.
    pub connected: bool,
    /// The endpoints in use.
    pub endpoints: Vec<String>,
    /// The key prefix.
    pub prefix: String,
    /// The last revision seen.
    pub revision: i64,
    /// The last error while it does not answer.
    pub error: Option<String>,
    /// Mistakes in the configuration that stands in etcd, while the last good one is used.
    pub config_errors: Vec<FieldError>,
    /// Leases seen, this host's included.
    pub leases: usize,
    /// Leases that are left out, and why.
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
    /// The addresses of the interface that the tunnels send from: others than `public_ip` behind NAT.
    #[serde(default)]
    pub local: PerFamily<IpAddr>,
    /// Why they were chosen.
    #[serde(default)]
    pub reasons: PerFamily<String>,
}

/// The data path's part of the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataPathStatus {
    /// Peers in the data path.
    pub peers: usize,
    /// Entries that could not be programmed, with the kernel's answer; they are tried again.
    pub failed: Vec<FailedOp>,
    /// Entries that were put back after others changed them, since the agent started.
    pub drift_repairs: u64,
    /// The last repair.
    pub last_drift: Option<Drift>,
    /// MTU of the overlay in bytes.
    pub mtu: Option<u32>,
    /// Whether routes use next-hop objects.
    pub nexthop_objects: bool,
    /// Packets that the guards dropped, by reason; empty where the tables are not there yet.
    #[serde(default)]
    pub dropped: BTreeMap<String, u64>,
}

/// An entry that could not be programmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedOp {
    /// The entry, as `ip` would print it.
    pub entry: String,
    /// The kernel's answer and what to do about it.
    pub error: String,
    /// How often it was tried.
    pub attempts: u32,
}

/// An entry that differed through no act of the agent.
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
    /// Every lease, ordered by subnet; those left out behind them.
    pub subnets: Vec<SubnetEntry>,
}

/// One lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetEntry {
    /// The key below `<prefix>/subnets/`.
    pub key: String,
    /// The subnet; absent where the key names none.
    pub subnet: Option<Subnet>,
    /// The host's name; absent for a flannel host.
    pub host: Option<String>,
    /// The host's identity; absent for a flannel host.
    pub node_id: Option<String>,
    /// The host's underlay addresses.
    pub public_ip: PerFamily<IpAddr>,
    /// The backend, `vxlan_chain` for those in the data path.
    pub backend: Option<String>,
    /// The VNI.
    pub vni: Option<Vni>,
    /// The VTEP's MAC in each family.
    pub vtep: PerFamily<Mac>,
    /// Seconds until the lease ends unless it is renewed; absent for a reservation and where it was not asked for.
    pub expires_in_seconds: Option<i64>,
    /// Whether it never expires.
    pub reservation: bool,
    /// Whether it is this host's.
    pub own: bool,
    /// Why it is left out of the data path; absent where it is in it.
    pub refused: Option<String>,
}

impl SubnetEntry {
    /// The lease as it stands in the store; whose it is and whether it counts is for the caller to add.
    pub fn from_record(key: &str, record: &LeaseRecord) -> SubnetEntry {
        let lease = &record.lease;
        let (vni, vtep) = match &lease.backend {
            Backend::Vxlan { vni, vtep } => (Some(*vni), *vtep),
            Backend::Other { .. } => (None, PerFamily::default()),
        };
        SubnetEntry {
            key: key.to_owned(),
            subnet: Some(record.subnet),
            host: lease.node.as_ref().map(|node| node.name.clone()),
            node_id: lease.node.as_ref().map(|node| node.id.clone()),
            public_ip: lease.public_ip,
            backend: Some(lease.backend.name().to_owned()),
            vni,
            vtep,
            expires_in_seconds: None,
            reservation: record.etcd_lease.is_none(),
            own: false,
            refused: None,
        }
    }

    /// An entry that is no lease.
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

/// `GET /v1/synthetic_leases`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peers {
    /// Every peer in the data path, one element a family, ordered by subnet.
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
    /// The MAC of the peer's VXLAN device.
    pub vtep: Mac,
    /// Our device towards it.
    pub device: String,
    /// The next-hop object's id; absent with classic routes.
    pub nexthop_id: Option<u32>,
    /// `programmed`, or what is missing.
    pub state: String,
    /// Seconds since the epoch of the last drift repair.
    pub last_repair: Option<u64>,
}

/// `GET /v1/endpoint_count`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    /// Every endpoint of this host, by name.
    pub endpoints: Vec<Endpoint>,
}

/// `PUT /v1/endpoint_count/NAME`: attaches a container. The same request again answers the same endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// What the container gets; `overlay` where absent.
    #[serde(default)]
    pub mode: Mode,
    /// Absolute path of the network namespace; needed in modes overlay and none, absent in the others.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// The interface to make in it; `eth0` where absent.
    #[serde(default)]
    pub interface: Option<String>,
    /// Wished addresses; the others are chosen.
    #[serde(default)]
    pub addresses: PerFamily<IpAddr>,
    /// The wished MAC of the interface, of one station; only in mode overlay.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// Ports of the host that shall lead to it; only in mode overlay.
    #[serde(default)]
    pub publish: Vec<PublishedPort>,
    /// Whether packets with an address or MAC of another are dropped; yes where absent.
    #[serde(default)]
    pub source_check: Option<bool>,
    /// Whether the container's default route leads over the overlay; yes where absent. Without it, a route to the overlay network
    /// does. Absent from the text where it is not asked for: an agent of an older version does not know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_route: Option<bool>,
    /// What asks for it, where that is no person: printable text of at most 256 bytes.
    #[serde(default)]
    pub owner: Option<String>,
}

/// The answer to an attach: the endpoint and what a container needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachResponse {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The address with the subnet's length, per family, as `ip addr` has it.
    pub prefix_length: PerFamily<u8>,
    /// The gateway on the bridge.
    pub gateway: PerFamily<IpAddr>,
    /// What leads over the gateway, per family: everything, or without a default route the overlay network.
    #[serde(default)]
    pub routes: PerFamily<Cidr>,
    /// MTU of the interface in bytes; absent where there is none.
    pub mtu: Option<u32>,
}

/// The answer to a detach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetachResponse {
    /// The endpoint that was there; absent where there was none, which is no error.
    pub endpoint: Option<EndpointName>,
    /// The endpoints that shared its namespace and were detached with it.
    #[serde(default)]
    pub sharers: Vec<EndpointName>,
}

/// `GET` and `PUT /v1/log_file-level`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    /// A filter of the `tracing` crate: `info`, `debug`, `overlay_agent::inject_store_fault=debug`.
    pub level: String,
}

/// The body of every answer that is no success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What is wrong, with the value, the place and the remedy.
    pub error: String,
}
