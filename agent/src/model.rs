//! Pure types of the overlay: network, subnet, lease, peer, endpoint. No I/O, no clock, no kernel.

pub mod api;
pub mod backend;
mod config_fields;
pub mod device;
pub mod docker;
pub mod endpoint;
pub mod event;
pub mod family;
pub mod lease;
pub mod lease_fields;
pub mod mac;
pub mod network;
pub mod network_name;
pub mod peer;
pub mod publish;
pub mod rejection;
pub mod subnet;
pub mod text;
pub mod vni;

pub use backend::{BackendConfig, BackendData, PeerEndpoint};
pub use device::{Device, Role};
pub use docker::DockerShare;
pub use endpoint::{Endpoint, Mode, Port};
pub use family::{Cidr, Family, PerFamily};
pub use lease::{ExpiryId, Lease, LeaseRecord, Node, StorePosition};
pub use mac::Mac;
pub use network::NetworkConfig;
pub use network_name::{NamespaceName, NetworkName};
pub use peer::Peer;
pub use publish::{PublishedPort, Transport};
pub use rejection::{RejectReason, RejectedLease};
pub use subnet::Subnet;
pub use vni::Vni;
