//! Backends: how packets travel between hosts. Everything that differs by backend is behind [`Backend`].
//!
//! The configuration of a network selects the implementation. Data that leases and settings carry is in
//! [`model::backend`](crate::model::backend). `docs/decisions/0035-backend.md` has the reasons.

#[cfg(test)]
mod host_gw;
pub mod vxlan;

use super::host_spec::HostSpec;
pub use super::ruleset::Tunnel;
use super::state::{Key, LinkState, Value};
use crate::model::peer::RemoteSubnet;
use crate::model::{BackendConfig, BackendData, Device, Family, LeaseRecord, Mac, NetworkConfig, RejectReason};

/// Pure functions of a backend with the settings of one network.
pub trait Backend: Sync {
    /// The `BackendType` of its leases.
    fn name(&self) -> &'static str;

    /// The backend for people, with what tells its networks apart: `VXLAN VNI 1`.
    fn label(&self) -> String;

    /// The bridge of this host's containers, whose name has to be unique on a host.
    fn bridge(&self) -> Device;

    /// This host's device towards a family's peers; `None` if packets take the external interface.
    fn device(&self, family: Family) -> Option<Device>;

    /// The UDP packets between hosts; `None` if packets are not encapsulated in UDP.
    fn tunnel(&self) -> Option<Tunnel>;

    /// Bytes in front of an inner packet.
    fn overhead(&self, family: Family) -> u32;

    /// The underlay's MTU in bytes, if it is configured.
    fn underlay_mtu(&self) -> Option<u32>;

    /// What this host's lease carries. `mac` returns the MAC of a device of ours, the same at each start.
    fn lease_data(&self, network: &NetworkConfig, mac: &mut dyn FnMut(Device) -> Mac) -> BackendData;

    /// Checks what a lease carries, without regard to other leases.
    fn check_lease(&self, record: &LeaseRecord) -> Result<(), RejectReason>;

    /// The link of a family's [`Backend::device`]; `None` if an input is missing.
    fn link(&self, host: &HostSpec, family: Family) -> Option<LinkState>;

    /// Adds the entries of a peer in one family. The route comes last.
    fn peer_entries(&self, host: &HostSpec, family: Family, remote: &RemoteSubnet, entries: &mut Vec<(Key, Value)>);
}

/// The backend of a network.
pub fn of(network: &NetworkConfig) -> &dyn Backend {
    match &network.backend {
        BackendConfig::Vxlan(vxlan) => vxlan,
        #[cfg(test)]
        BackendConfig::HostGw => &host_gw::HostGw,
    }
}
