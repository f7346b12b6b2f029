//! Results (`SPEC.md`, "ADD Success"): read in any version that is served, written in the one that is asked for.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::error::{CniError, Code};
use super::version::Version;

/// What all plugins of a chain have made: the fields of every version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CniResult {
    /// Interfaces, on the host and in the container.
    pub interfaces: Vec<Interface>,
    /// Addresses.
    pub ips: Vec<Address>,
    /// Routes in the container.
    pub routes: Vec<Route>,
    /// The resolver.
    pub dns: Dns,
}

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC; empty where it is not known.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// From 1.1.0 on: its MTU in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The path of its namespace; empty for one of the host.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    /// From 1.1.0 on: the path of a socket that stands for it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub socket_path: String,
    /// From 1.1.0 on: its PCI address.
    #[serde(rename = "pciID", skip_serializing_if = "String::is_empty")]
    pub pci_id: String,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// Before 1.0.0: `4` or `6`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Where the interface stands in the list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
    /// The address with its prefix length.
    pub address: IpNetwork,
    /// The gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
}

/// A route in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The destination.
    pub dst: IpNetwork,
    /// The gateway; absent for one that is on the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// From 1.1.0 on: MTU, MSS, priority, table and scope, as another plugin set them.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, Value>,
}

/// The resolver.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Servers, in the order in which they are asked.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Domains to search.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Options of the resolver.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl CniResult {
    /// Reads a `prevResult`. Lists that are null are empty ones, as Go writes them.
    pub fn parse(value: Value) -> Result<CniResult, CniError> {
        let Value::Object(mut fields) = value else {
            return Err(CniError::new(Code::Decode, "prevResult is no JSON object"));
        };
        fields.retain(|_, value| !value.is_null());
        if fields.contains_key("ip4") || fields.contains_key("ip6") {
            let text = "prevResult has ip4 or ip6: it is of a version before 0.3.0, which is not served";
            return Err(CniError::new(Code::IncompatibleVersion, text));
        }
        serde_json::from_value(Value::Object(fields))
            .map_err(|e| CniError::new(Code::Decode, format!("prevResult is not as expected: {e}")))
    }

    /// The result as that version has it. Lists are there where they are empty, too: some runtimes look into them.
    pub fn to_json(&self, version: Version) -> Value {
        let mut converted = self.clone();
        for address in &mut converted.ips {
            let digit = if address.address.is_ipv4() { "4" } else { "6" };
            address.version = (version < Version::V1_0_0).then(|| digit.to_owned());
        }
        if version < Version::V1_1_0 {
            for interface in &mut converted.interfaces {
                let Interface { name, mac, sandbox, .. } = std::mem::take(interface);
                *interface = Interface { name, mac, sandbox, ..Interface::default() };
            }
            for route in &mut converted.routes {
                route.extra.clear();
            }
        }
        let CniResult { interfaces, ips, routes, dns } = converted;
        json!({ "cniVersion": version.as_str(), "interfaces": interfaces, "ips": ips, "routes": routes, "dns": dns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample_result() -> CniResult {
        CniResult::parse(json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                { "name": "ove1" },
                { "name": "eth0", "mac": "02:00:00:00:00:01", "mtu": 1450, "sandbox": "/run/netns/a", "socketPath": "/s", "pciID": "0000:1" },
            ],
            "ips": [
                { "address": "10.0.0.2/24", "gateway": "10.0.0.1", "interface": 1 },
                { "address": "fd00::2/64", "gateway": "fd00::1", "interface": 1 },
            ],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "10.0.0.1", "mtu": 1400, "table": 7 }],
            "dns": { "nameservers": ["10.0.0.10"] },
        }))
        .expect("a result")
    }

    #[test]
    fn result_shape_follows_version() {
        let all = sample_result();
        let newest = all.to_json(Version::V1_1_0);
        assert_eq!(newest["interfaces"][1]["mtu"], 1450);
        assert_eq!(newest["routes"][0]["table"], 7);
        assert!(newest["ips"][0].get("version").is_none());
        let one = all.to_json(Version::V1_0_0);
        for gone in ["mtu", "socketPath", "pciID"] {
            assert!(one["interfaces"][1].get(gone).is_none(), "{gone}");
        }
        assert_eq!(one["routes"][0], json!({ "dst": "0.0.0.0/0", "gw": "10.0.0.1" }));
        assert!(one["ips"][0].get("version").is_none());
        for old in [Version::V0_3_1, Version::V0_4_0] {
            let value = all.to_json(old);
            assert_eq!(value["cniVersion"], old.as_str());
            assert_eq!((&value["ips"][0]["version"], &value["ips"][1]["version"]), (&json!("4"), &json!("6")));
            assert_eq!(CniResult::parse(value.clone()).expect("read again").to_json(old), value);
        }
        assert_eq!(CniResult::parse(newest.clone()).expect("read again"), all);
    }

    #[test]
    fn foreign_results_are_parsed_or_refused() {
        let nothing = CniResult::parse(json!({ "interfaces": null, "ips": null, "dns": {} })).expect("nulls");
        assert_eq!(nothing, CniResult::default());
        assert_eq!(nothing.to_json(Version::V1_0_0)["ips"], json!([]));
        let code = |value| CniResult::parse(value).expect_err("refused").code;
        assert_eq!(code(json!({ "ip4": { "ip": "10.0.0.2/24" } })), Code::IncompatibleVersion);
        assert_eq!(code(json!({ "ips": [{ "address": "10.0.0.300/24" }] })), Code::Decode);
        assert_eq!(code(json!([])), Code::Decode);
        assert_eq!(code(json!("x")), Code::Decode);
    }
}
