//! Results (`SPEC.md`, "ADD Success"): parsed from any supported version, written in the requested one.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::error::{CniError, Code};
use super::version::Version;

/// The result of all plugins of a chain so far, with the fields of every version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CniResult {
    /// Interfaces, on the host and in the container.
    pub interfaces: Vec<Interface>,
    /// Addresses.
    pub ips: Vec<Address>,
    /// Routes in the container.
    pub routes: Vec<Route>,
    /// Resolver settings.
    pub dns: Dns,
}

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// MAC; empty if unknown.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// MTU in bytes, since 1.1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Path of its namespace; empty for an interface of the host.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    /// Path of the socket that represents the interface, since 1.1.0.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub socket_path: String,
    /// PCI address, since 1.1.0.
    #[serde(rename = "pciID", skip_serializing_if = "String::is_empty")]
    pub pci_id: String,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// `4` or `6`, before 1.0.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Index of the interface in the list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
    /// Address with its prefix length.
    pub address: IpNetwork,
    /// Gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
}

/// A route in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination.
    pub dst: IpNetwork,
    /// Gateway; absent for an on-link route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// MTU, MSS, priority, table and scope, as another plugin set them; since 1.1.0.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, Value>,
}

/// Resolver settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Servers, in query order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// Local domain.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search domains.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl CniResult {
    /// Parses a `prevResult`. Null lists count as empty: Go writes those.
    pub fn parse(value: Value) -> Result<CniResult, CniError> {
        let Value::Object(mut fields) = value else {
            return Err(CniError::new(Code::Decode, "prevResult is not a JSON object"));
        };
        fields.retain(|_, value| !value.is_null());
        if fields.contains_key("ip4") || fields.contains_key("ip6") {
            let text = "prevResult has ip4 or ip6: its version is before 0.3.0, which is not supported";
            return Err(CniError::new(Code::IncompatibleVersion, text));
        }
        serde_json::from_value(Value::Object(fields))
            .map_err(|e| CniError::new(Code::Decode, format!("prevResult is invalid: {e}")))
    }

    /// Formats the result for a version. Empty lists are written too: some runtimes read them unconditionally.
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
