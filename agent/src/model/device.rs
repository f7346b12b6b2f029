//! The network devices that the agent creates, by role. The name is a function of role and VNI, so it is never stored.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Family, Vni};

/// Name prefix of the host's ends of the endpoints' veth pairs.
pub const PORT_PREFIX: &str = "ove";

/// The start of a bridge's name.
pub const BRIDGE_PREFIX: &str = "ovb.";

/// The start of a transit's name, at both ends.
pub const TRANSIT_PREFIX: &str = "ovt.";

/// The starts of the names of VXLAN devices.
pub const VXLAN_PREFIXES: [&str; 2] = ["ovx.", "ovx6."];

/// Maximum number of ports of a bridge in the kernel (`BR_MAX_PORTS` in `net/bridge/br_private.h`, minus number 0).
pub const MAX_BRIDGE_PORTS: usize = 1023;

/// Error message for a bridge without a free port.
pub fn bridge_full_message() -> String {
    format!(
        "this host's bridge uses all {MAX_BRIDGE_PORTS} ports that the kernel allows: detach containers, or attach this one on another host"
    )
}

/// Role of a device of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The VXLAN tunnel endpoint of one underlay and overlay family.
    Vxlan(Family),
    /// The bridge to which the host's containers are attached.
    Bridge,
    /// An end of the veth pair between an isolated network's namespace and the host's.
    Transit,
    /// An end of the veth pair between the namespaces of two networks. The VNI is that of the network at the other end.
    PeerLink,
}

/// A device of the agent: its role in the overlay network with this VNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Device {
    /// Its role.
    pub role: Role,
    /// The overlay network it belongs to.
    pub vni: Vni,
}

impl Device {
    /// The VXLAN device of a family.
    pub const fn vxlan(family: Family, vni: Vni) -> Device {
        Device { role: Role::Vxlan(family), vni }
    }

    /// The bridge.
    pub const fn bridge(vni: Vni) -> Device {
        Device { role: Role::Bridge, vni }
    }

    /// An end of the veth pair between an isolated network's namespace and the host's.
    pub const fn transit(vni: Vni) -> Device {
        Device { role: Role::Transit, vni }
    }

    /// The end of a peer link that leads to the network with this VNI.
    pub const fn peer_link(to: Vni) -> Device {
        Device { role: Role::PeerLink, vni: to }
    }

    /// The interface name: `ovx.<VNI>`, `ovx6.<VNI>`, `ovb.<VNI>`, `ovt.<VNI>` or `ovr.<VNI>`; at most 13 characters, of the kernel's 15.
    pub fn name(self) -> String {
        self.to_string()
    }

    /// The device with this interface name; `None` if the name does not have our format.
    pub fn from_name(name: &str) -> Option<Device> {
        let (prefix, number) = name.split_once('.')?;
        let vni = Vni::try_from(number.parse::<u32>().ok()?).ok()?;
        let role = match prefix {
            "ovx" => Role::Vxlan(Family::V4),
            "ovx6" => Role::Vxlan(Family::V6),
            "ovb" => Role::Bridge,
            "ovt" => Role::Transit,
            "ovr" => Role::PeerLink,
            _ => return None,
        };
        let device = Device { role, vni };
        (device.name() == name).then_some(device)
    }

    /// Whether the device carries a family's traffic; only a VXLAN device does not carry both.
    pub fn carries(self, family: Family) -> bool {
        match self.role {
            Role::Vxlan(f) => f == family,
            Role::Bridge | Role::Transit | Role::PeerLink => true,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = match self.role {
            Role::Vxlan(Family::V4) => "ovx",
            Role::Vxlan(Family::V6) => "ovx6",
            Role::Bridge => "ovb",
            Role::Transit => "ovt",
            Role::PeerLink => "ovr",
        };
        write!(f, "{prefix}.{}", self.vni)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_fit_the_kernel() {
        let largest = Vni::try_from((1 << 24) - 1).expect("a VNI");
        for vni in [Vni::DEFAULT, largest] {
            let [v4, v6] = Family::ALL.map(|family| Device::vxlan(family, vni));
            for (device, prefix) in [
                (v4, VXLAN_PREFIXES[0]),
                (v6, VXLAN_PREFIXES[1]),
                (Device::bridge(vni), BRIDGE_PREFIX),
                (Device::transit(vni), TRANSIT_PREFIX),
                (Device::peer_link(vni), "ovr."),
            ] {
                assert!(device.name().starts_with(prefix));
                assert!(device.name().len() <= 15);
                assert_eq!(Device::from_name(&device.name()), Some(device));
            }
        }
        for name in ["ovx", "ovx.", "ovx.01", "ovx.0", "ovx.16777216", "eth0", "ovb.+1", "ovy.1"] {
            assert_eq!(Device::from_name(name), None, "{name}");
        }
    }
}
