//! dockerd's options for this host's part of the overlay, and its configuration file. Pure but for [`read`].
//!
//! Docker puts its containers on the bridge that the agent keeps, and hands out addresses of the part of the subnet that the agent leaves
//! to it; `docs/docker_share.md` says why. The file has keys of others as well: they stay, and one that contradicts ours is refused by its name.

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
    /// The bridge of the overlay. Its address is the containers' gateway: Docker takes it from the bridge.
    pub bridge: String,
    /// Docker's part of the host's IPv4 subnet.
    pub fixed_cidr: Cidr,
    /// The overlay's MTU in bytes.
    pub mtu: u32,
    /// Never: the agent masquerades what leaves the overlay, and what stays in it keeps its addresses.
    pub ip_masq: bool,
    /// Whether containers have IPv6 addresses as well.
    #[serde(skip_serializing_if = "is_false")]
    pub ipv6: bool,
    /// Where they come from.
    #[serde(rename = "fixed-cidr-v6", skip_serializing_if = "Option::is_none")]
    pub fixed_cidr_v6: Option<Cidr>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

/// The keys of [`DockerOptions`]: in a file whose bridge is one of ours they are ours, too.
const OWN_KEYS: [&str; 6] = ["bridge", "fixed-cidr", "mtu", "ip-masq", "ipv6", "fixed-cidr-v6"];

/// Keys that do not go with a bridge that is there already, each with the reason.
const CONFLICTING_KEYS: [(&str, &str); 4] = [
    ("bip", "Docker takes either an address for a bridge of its own or a bridge that is there"),
    ("bip6", "Docker takes either an address for a bridge of its own or a bridge that is there"),
    ("default-gateway", "the gateway is the address of the overlay's bridge, which Docker finds itself"),
    ("default-gateway-v6", "the gateway is the address of the overlay's bridge, which Docker finds itself"),
];

/// Why there are no options, or why they are not in the file.
#[derive(Debug, thiserror::Error)]
pub enum DockerError {
    /// Nothing is leased, or not in place yet.
    #[error("the overlay is not in place on this host yet: `overlayctl status --wait 2m` waits for it, and says what is missing")]
    NotReady,
    /// Docker's default network has IPv4, whatever else it has.
    #[error("the overlay has no IPv4, which Docker's bridge needs: set Network and EnableIPv4 in the network's configuration")]
    NoIpv4,
    /// All addresses are the agent's.
    #[error(
        "the agent hands out every address of {subnet}: set `docker = true` in /etc/overlayd/overlayd.toml (or OVERLAYD_DOCKER=true) \
         and restart it, so that it leaves a part of them to Docker"
    )]
    NoShare {
        /// The host's subnet.
        subnet: Cidr,
    },
    /// The subnet is too small for two.
    #[error("subnet {subnet} is too small to be shared with Docker: give the hosts subnets of /29 or larger (SubnetLen)")]
    TooSmall {
        /// The host's subnet.
        subnet: Cidr,
    },
    /// Endpoints from a time when all addresses were the agent's.
    #[error(
        "of Docker's part of the subnet, addresses are in use: {}; detach and attach them again, they get others",
        list(.holders)
    )]
    AddressesInUse {
        /// Who has which.
        holders: Vec<(EndpointName, std::net::IpAddr)>,
    },
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is no JSON object.
    #[error("{} is not what dockerd reads: {reason}; correct it, or write another file", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Keys of the file contradict the options.
    #[error("{} has what does not go with the overlay:{}\nremove these keys, and try again; nothing was written", path.display(), lines(.conflicts))]
    Conflict {
        /// The file.
        path: PathBuf,
        /// Each key with its value and what is wrong with it.
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
    /// The options for a host's network as the agent describes it.
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
                let held = |share: &DockerShare| {
                    network.ipam.get(family).is_some_and(|ipam| ipam.subnet.contains(*address))
                        && address_value(*address) >= address_value(share.first_address)
                };
                if shares.get(family).is_some_and(held) {
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

    /// The options as keys of dockerd's configuration file.
    pub fn keys(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(keys)) => keys,
            // A struct of texts, numbers and booleans is an object.
            _ => Map::new(),
        }
    }

    /// The options as flags of dockerd.
    pub fn flags(&self) -> String {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        self.keys().iter().map(|(key, value)| format!("--{key}={}", text(value))).collect::<Vec<_>>().join(" ")
    }

    /// The content of dockerd's configuration file with the options in it. `present` is what it holds now. In a file whose bridge is one of
    /// the overlay's, the options of an earlier lease are replaced; in any other, one that differs is a conflict.
    pub fn merged(&self, path: &Path, mut present: Map<String, Value>) -> Result<Map<String, Value>, DockerError> {
        let keys = self.keys();
        let mut conflicts: Vec<String> = CONFLICTING_KEYS
            .iter()
            .filter_map(|(key, reason)| present.get(*key).map(|value| format!("\"{key}\": {value}: {reason}")))
            .collect();
        if present.get("bridge").and_then(Value::as_str).is_some_and(is_overlay_bridge) {
            present.retain(|key, _| !OWN_KEYS.contains(&key.as_str()));
        }
        for (key, value) in &keys {
            if let Some(other) = present.get(key).filter(|other| *other != value) {
                conflicts.push(format!("\"{key}\": {other}: it has to be {value}"));
            }
        }
        if !conflicts.is_empty() {
            return Err(DockerError::Conflict { path: path.to_owned(), conflicts });
        }
        present.extend(keys);
        Ok(present)
    }
}

/// Whether an interface is named as the agent names its bridges.
fn is_overlay_bridge(interface: &str) -> bool {
    Device::from_name(interface).is_some_and(|device| device.role == Role::Bridge)
}

/// What dockerd's configuration file holds; nothing where it is not there or empty.
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
        Ok(other) => Err(malformed(format!("it holds {} where an object is needed", json_type(&other)))),
        Err(error) => Err(malformed(error.to_string())),
    }
}

fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests;
