//! Data of the backends: settings in the network's configuration, and what a lease carries. `plan::backend` has their behaviour.

mod vxlan;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::config_fields::FieldReader;
use super::{Family, Mac, PerFamily, RejectReason, Subnet, Vni};

pub use vxlan::VxlanConfig;

/// The backend of a network, `Backend` in its configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendConfig {
    /// VXLAN.
    Vxlan(VxlanConfig),
    /// Routes by the underlay alone: a second backend, for tests of the interface.
    #[cfg(test)]
    HostGw,
}

/// What a lease carries for its backend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum BackendData {
    /// One tunnel endpoint MAC per overlay family.
    Vxlan {
        /// The VNI that the host uses.
        vni: Vni,
        /// The VTEP's MAC in each family's device.
        vtep: PerFamily<Mac>,
    },
    /// A backend without data, or one that this agent does not know.
    Other {
        /// The `BackendType` of the lease.
        name: String,
    },
}

/// What packets to a host need besides its public IP, by backend. No two hosts have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerEndpoint {
    /// The MAC of the host's VXLAN device.
    Vxlan(Mac),
}

impl BackendConfig {
    /// Reads the fields of `Backend`; VXLAN is flannel's default.
    pub(in crate::model) fn parse(reader: &mut FieldReader) -> BackendConfig {
        let kind = reader.string("Type").unwrap_or_else(|| vxlan::NAME.to_owned());
        if kind != vxlan::NAME {
            // Its other fields are checked as VXLAN's, so that all errors are reported at once.
            reader.fail("Type", &kind, "is not supported: only vxlan is");
        }
        BackendConfig::Vxlan(VxlanConfig::parse(reader))
    }

    /// The VNI, if the backend has one.
    pub fn vni(&self) -> Option<Vni> {
        match self {
            BackendConfig::Vxlan(vxlan) => Some(vxlan.vni),
            #[cfg(test)]
            BackendConfig::HostGw => None,
        }
    }
}

impl BackendData {
    /// Reads the data of the lease of this subnet. Another backend's data is not read, and is no error.
    pub fn decode(kind: String, fields: &Map<String, Value>, subnet: &Subnet) -> Result<BackendData, RejectReason> {
        match kind.as_str() {
            vxlan::NAME => vxlan::decode(fields, subnet).map(|(vni, vtep)| BackendData::Vxlan { vni, vtep }),
            _ => Ok(BackendData::Other { name: kind }),
        }
    }

    /// A family's data in the lease: `BackendData` or `BackendV6Data`.
    pub fn encode(&self, family: Family) -> Option<Value> {
        match self {
            BackendData::Vxlan { vni, vtep } => vtep.get(family).map(|mac| vxlan::encode(*vni, *mac)),
            BackendData::Other { .. } => None,
        }
    }

    /// The `BackendType` in etcd.
    pub fn name(&self) -> &str {
        match self {
            BackendData::Vxlan { .. } => vxlan::NAME,
            BackendData::Other { name } => name,
        }
    }

    /// The endpoint in each family; none if the backend needs only the public IP.
    pub fn endpoints(&self) -> PerFamily<PeerEndpoint> {
        match self {
            BackendData::Vxlan { vtep, .. } => vtep.map(|_, mac| PeerEndpoint::Vxlan(*mac)),
            BackendData::Other { .. } => PerFamily::default(),
        }
    }

    /// The VNI, if the backend has one.
    pub fn vni(&self) -> Option<Vni> {
        match self {
            BackendData::Vxlan { vni, .. } => Some(*vni),
            BackendData::Other { .. } => None,
        }
    }
}

impl PeerEndpoint {
    /// The MAC of the host's device, if the backend has one.
    pub fn mac(self) -> Option<Mac> {
        let PeerEndpoint::Vxlan(mac) = self;
        Some(mac)
    }

    /// Why a lease with this endpoint is rejected: it is this host's own, or that of an older lease.
    pub fn conflict(self, other: Option<String>) -> RejectReason {
        let PeerEndpoint::Vxlan(mac) = self;
        match other {
            None => RejectReason::OwnMac { mac },
            Some(other) => RejectReason::DuplicateMac { mac, other },
        }
    }
}
