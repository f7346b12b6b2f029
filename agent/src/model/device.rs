//! The network devices that the agent makes, by what they are for. The name is a function of role and VNI, so it is never stored.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Family, Vni};

/// What the names of the host's ends of endpoints' veth pairs begin with.
pub const PORT_PREFIX: &str = "ove";

/// The most ports that the kernel gives one bridge (`BR_MAX_PORTS` in `net/bridge_name/br_private.h`, less number 0).
pub const MAX_BRIDGE_PORTS: usize = 1023;

/// What to tell where a bridge has no port left.
pub fn bridge_full_message() -> String {
    format!(
        "this host's bridge has all of the {MAX_BRIDGE_PORTS} ports that the kernel gives it: detach containers, or attach this one on another host"
    )
}

/// What a device of ours does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The VXLAN tunnel endpoint of one underlay and overlay family.
    Vxlan(Family),
    /// The bridge to which the host's containers are attached.
    Bridge,
}

/// A device of ours: its role in the overlay network of that VNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Device {
    /// What it does.
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

    /// The interface name: `ovx.<VNI_FIELD>`, `ovx6.<VNI_FIELD>` or `ovb.<VNI_FIELD>`; 13 characters at the most, of the kernel's
    /// 15.
    pub fn name(self) -> String {
        self.to_string()
    }

    /// The device that has this interface name; `None` for a name that is not of our form.
    pub fn from_name(name: &str) -> Option<Device> {
        let (prefix, number) = name.split_once('.')?;
        let vni = Vni::try_from(number.parse::<u32>().ok()?).ok()?;
        let role = match prefix {
            "ovx" => Role::Vxlan(Family::V4),
            "ovx6" => Role::Vxlan(Family::V6),
            "ovb" => Role::Bridge,
            _ => return None,
        };
        let device = Device { role, vni };
        (device.name() == name).then_some(device)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = match self.role {
            Role::Vxlan(Family::V4) => "ovx",
            Role::Vxlan(Family::V6) => "ovx6",
            Role::Bridge => "ovb",
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
            for device in [Device::vxlan(Family::V4, vni), Device::vxlan(Family::V6, vni), Device::bridge(vni)] {
                assert!(device.name().len() <= 15);
                assert_eq!(Device::from_name(&device.name()), Some(device));
            }
        }
        for name in ["ovx", "ovx.", "ovx.01", "ovx.0", "ovx.16777216", "eth0", "ovb.+1", "ovy.1"] {
            assert_eq!(Device::from_name(name), None, "{name}");
        }
    }
}
