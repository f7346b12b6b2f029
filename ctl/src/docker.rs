//! dockerd's options for this host's part of the overlay, and its configuration file. Pure except [`read_config`].
//!
//! Docker attaches its containers to the agent's bridge, and assigns addresses from the part of the subnet that the agent
//! reserves for it; `docs/docker.md` explains why. The file's other keys stay unchanged; a conflicting key is rejected by name.

use std::path::{Path, PathBuf};

use overlay_agent::model::api::NetworkView;
use overlay_agent::model::endpoint::EndpointName;
use overlay_agent::model::family::address_value;
use overlay_agent::model::{Cidr, Device, DockerShare, Family, PerFamily, Role};
use serde::Serialize;
use serde_json::{Map, Value};

/// dockerd's options (dockerd(8), "Daemon configuration file"), by their names there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DockerOptions {
    /// Bridge of the overlay. Its address is the containers' gateway: Docker takes it from the bridge.
    pub bridge: String,
    /// Docker's part of the host's IPv4 subnet.
    pub fixed_cidr: Cidr,
    /// MTU of the overlay in bytes.
    pub mtu: u32,
    /// Always false: the agent masquerades packets that leave the overlay, and packets inside keep their addresses.
    pub ip_masq: bool,
    /// Whether containers also have IPv6 addresses.
    #[serde(skip_serializing_if = "is_false")]
    pub ipv6: bool,
    /// Docker's part of the host's IPv6 subnet.
    #[serde(rename = "fixed-cidr-v6", skip_serializing_if = "Option::is_none")]
    pub fixed_cidr_v6: Option<Cidr>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

/// Keys of [`DockerOptions`]: in a file with one of our bridges they are ours too.
const OWN_KEYS: [&str; 6] = ["bridge", "fixed-cidr", "mtu", "ip-masq", "ipv6", "fixed-cidr-v6"];

/// Keys that conflict with an existing bridge, with the reason.
const CONFLICTING_KEYS: [(&str, &str); 4] = [
    ("bip", "Docker accepts either an address for its own bridge or an existing bridge"),
    ("bip6", "Docker accepts either an address for its own bridge or an existing bridge"),
    ("default-gateway", "the gateway is the address of the overlay's bridge, which Docker detects"),
    ("default-gateway-v6", "the gateway is the address of the overlay's bridge, which Docker detects"),
];

/// Failure to determine the options or to write the file.
#[derive(Debug, thiserror::Error)]
pub enum DockerError {
    /// The host has no lease, or its data path is not programmed.
    #[error("the overlay is not ready on this host: `overlayctl status --wait 2m` waits for it and shows the reason")]
    NotReady,
    /// Docker's default network always needs IPv4.
    #[error("the overlay has no IPv4, which Docker's bridge needs: set Network and EnableIPv4 in the network's configuration")]
    NoIpv4,
    /// The agent assigns all addresses itself.
    #[error(
        "the agent assigns every address of {subnet}: set `docker = true` in /etc/overlayd/overlayd.toml (or OVERLAYD_DOCKER=true) \
         and restart it, so that it reserves a part of them for Docker"
    )]
    NoShare {
        /// Subnet of the host.
        subnet: Cidr,
    },
    /// The subnet is too small to share.
    #[error("subnet {subnet} is too small to share with Docker: configure subnets of /29 or larger (SubnetLen)")]
    TooSmall {
        /// Subnet of the host.
        subnet: Cidr,
    },
    /// Endpoints hold addresses of Docker's part, from a time before its reservation.
    #[error(
        "addresses of Docker's part of the subnet are in use: {}; detach and attach these endpoints again for new addresses",
        list(.holders)
    )]
    AddressesInUse {
        /// Endpoints with their addresses.
        holders: Vec<(EndpointName, std::net::IpAddr)>,
    },
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system call.
        source: std::io::Error,
    },
    /// The file is not a JSON object.
    #[error("{} is not a dockerd configuration: {reason}; correct it, or write another file", path.display())]
    Malformed {
        /// Path of the file.
        path: PathBuf,
        /// Error in the file.
        reason: String,
    },
    /// Keys of the file conflict with the options.
    #[error("{} has keys that conflict with the overlay:{}\nremove these keys, and try again; nothing was written", path.display(), lines(.conflicts))]
    Conflict {
        /// Path of the file.
        path: PathBuf,
        /// Each key with its value and the reason.
        conflicts: Vec<String>,
    },
}

fn list(holders: &[(EndpointName, std::net::IpAddr)]) -> String {
    holders.iter().map(|(name, address)| format!("{address} by {name}")).collect::<Vec<_>>().join(", ")
}

fn lines(conflicts: &[String]) -> String {
    conflicts.iter().map(|conflict| format!("\n  {conflict}")).collect()
}

impl DockerOptions {
    /// Determines the options from the agent's description of the host's network.
    pub fn from_network(network: &NetworkView) -> Result<DockerOptions, DockerError> {
        let (Some(bridge), Some(mtu)) = (&network.bridge, network.mtu) else { return Err(DockerError::NotReady) };
        if network.ipam.is_empty() {
            return Err(DockerError::NotReady);
        }
        let ipv4 = network.ipam.get(Family::V4).ok_or(DockerError::NoIpv4)?;
        let Some(fixed_cidr) = ipv4.docker else {
            return Err(match DockerShare::from_range(ipv4.subnet) {
                Some(_) => DockerError::NoShare { subnet: ipv4.subnet },
                None => DockerError::TooSmall { subnet: ipv4.subnet },
            });
        };
        let shares: PerFamily<DockerShare> = network
            .ipam
            .iter()
            .filter_map(|(family, ipam)| ipam.docker.and(DockerShare::from_range(ipam.subnet)).map(|s| (family, s)))
            .collect();
        let mut holders = Vec::new();
        for endpoint in network.endpoints.iter().map(|view| &view.endpoint) {
            for (family, address) in endpoint.addresses().iter() {
                let is_in_share = |share: &DockerShare| {
                    network.ipam.get(family).is_some_and(|ipam| ipam.subnet.contains(*address))
                        && address_value(*address) >= address_value(share.first_address)
                };
                if shares.get(family).is_some_and(is_in_share) {
                    holders.push((endpoint.name.clone(), *address));
                }
            }
        }
        if !holders.is_empty() {
            return Err(DockerError::AddressesInUse { holders });
        }
        let fixed_cidr_v6 = shares.get(Family::V6).map(|share| share.fixed_cidr);
        let bridge = bridge.device.interface.clone();
        Ok(DockerOptions { bridge, fixed_cidr, mtu, ip_masq: false, ipv6: fixed_cidr_v6.is_some(), fixed_cidr_v6 })
    }

    /// Formats the options as keys of dockerd's configuration file.
    pub fn keys(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(keys)) => keys,
            // A struct always serialises to an object.
            _ => Map::new(),
        }
    }

    /// Formats the options as dockerd flags.
    pub fn flags(&self) -> String {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        self.keys().iter().map(|(key, value)| format!("--{key}={}", text(value))).collect::<Vec<_>>().join(" ")
    }

    /// Merges the options into the current content of dockerd's configuration file. In a file with one of the overlay's bridges,
    /// the options of an earlier lease are replaced; in any other, a different value is a conflict.
    pub fn merged(&self, path: &Path, mut config: Map<String, Value>) -> Result<Map<String, Value>, DockerError> {
        let keys = self.keys();
        let mut conflicts: Vec<String> = CONFLICTING_KEYS
            .iter()
            .filter_map(|(key, reason)| config.get(*key).map(|value| format!("\"{key}\": {value}: {reason}")))
            .collect();
        if config.get("bridge").and_then(Value::as_str).is_some_and(is_overlay_bridge) {
            config.retain(|key, _| !OWN_KEYS.contains(&key.as_str()));
        }
        for (key, value) in &keys {
            if let Some(other) = config.get(key).filter(|other| *other != value) {
                conflicts.push(format!("\"{key}\": {other}: it must be {value}"));
            }
        }
        if !conflicts.is_empty() {
            return Err(DockerError::Conflict { path: path.to_owned(), conflicts });
        }
        config.extend(keys);
        Ok(config)
    }
}

/// Whether an interface has the name of one of the agent's bridges.
fn is_overlay_bridge(interface: &str) -> bool {
    Device::from_name(interface).is_some_and(|device| device.role == Role::Bridge)
}

/// Reads dockerd's configuration file; empty if it is absent or empty.
pub fn read_config(path: &Path) -> Result<Map<String, Value>, DockerError> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(source) => return Err(DockerError::Read { path: path.to_owned(), source }),
        Ok(text) if text.trim().is_empty() => return Ok(Map::new()),
        Ok(text) => text,
    };
    let malformed = |reason: String| DockerError::Malformed { path: path.to_owned(), reason };
    match serde_json::from_str(&text) {
        Ok(Value::Object(keys)) => Ok(keys),
        Ok(other) => Err(malformed(format!("it contains {} instead of an object", json_type(&other)))),
        Err(error) => Err(malformed(error.to_string())),
    }
}

fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests;
