//! `subnet.env`: the host's subnet for other tools, such as the flannel CNI plugin and Docker option scripts.

use std::fmt::Write;
use std::path::Path;

use super::{FileError, write_if_changed};
use crate::model::{Cidr, Family, PerFamily, Subnet};

/// The text of the file, with flannel's names in flannel's order. The subnet is written as the gateway's address with the
/// subnet's length. `mtu` is the overlay's in bytes: with two families the smaller one, because a container's interface has one
/// MTU for both.
pub fn subnet_env(network: &PerFamily<Cidr>, subnet: &Subnet, mtu: u32, ip_masq: bool) -> String {
    let mut text = String::new();
    for (family, range) in subnet.iter() {
        let prefix = match family {
            Family::V4 => "FLANNEL",
            Family::V6 => "FLANNEL_IPV6",
        };
        let network_range = network.get(family).copied().unwrap_or(range);
        let gateway = subnet.gateway(family).unwrap_or_else(|| range.base());
        // Writing to a String cannot fail.
        let _ = write!(text, "{prefix}_NETWORK={network_range}\n{prefix}_SUBNET={gateway}/{}\n", range.length());
    }
    let _ = write!(text, "FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={ip_masq}\n");
    text
}

/// Replaces the file atomically, with mode 0644; creates its directory if it is missing. Does not write if the text is unchanged.
/// Returns whether it wrote.
pub fn write_subnet_env(path: &Path, text: &str) -> Result<bool, FileError> {
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(|source| FileError::new("create the directory", parent, source))?;
    }
    write_if_changed(path, text.as_bytes(), 0o644)
}
