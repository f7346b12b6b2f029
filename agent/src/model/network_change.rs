//! A change of a network's record, or a new record. Fields that it does not name keep their values.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::network_record::WIREGUARD;
use super::{Cidr, Family, NetworkName, PerFamily, Vni};

/// Fields to set; `None` keeps a field.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkChange {
    /// The address space; the network then has exactly these families. No element keeps it.
    pub cidrs: PerFamily<Cidr>,
    /// Prefix length of each host's subnet.
    pub subnet_lengths: PerFamily<u8>,
    /// The VNI.
    pub vni: Option<Vni>,
    /// The UDP port.
    pub port: Option<u16>,
    /// The underlay's MTU in bytes.
    pub mtu: Option<u32>,
    /// Whether it lives in a network namespace of its own.
    pub isolated: Option<bool>,
    /// Whether it has no way out.
    pub internal: Option<bool>,
    /// Peers to add.
    pub add_peers: BTreeSet<NetworkName>,
    /// Peers to remove.
    pub remove_peers: BTreeSet<NetworkName>,
    /// Whether packets between hosts are encrypted.
    pub encrypted: Option<bool>,
    /// The domain of its endpoints' names.
    pub domain: Option<String>,
}

impl NetworkChange {
    /// Applies the change to a record's JSON text; an empty one gives a new record. A text that is no JSON object is replaced: no field of it can be kept.
    pub fn apply(&self, text: &str) -> String {
        let mut fields = serde_json::from_str::<Map<String, Value>>(text).unwrap_or_default();
        if !self.cidrs.is_empty() {
            for family in Family::ALL {
                self.set_address_space(&mut fields, family);
            }
        }
        for (family, length) in self.subnet_lengths.iter() {
            set(&mut fields, &family.field_name("SubnetLen"), json!(length));
        }
        let numbers = [("VNI", self.vni.map(Vni::get)), ("Port", self.port.map(u32::from)), ("MTU", self.mtu)];
        if text.is_empty() || numbers.iter().any(|(_, value)| value.is_some()) {
            let mut backend = match take(&mut fields, "Backend") {
                Some(Value::Object(backend)) => backend,
                _ => Map::from_iter([("Type".to_owned(), json!("vxlan"))]),
            };
            for (name, value) in numbers {
                if let Some(value) = value {
                    set(&mut backend, name, json!(value));
                }
            }
            fields.insert("Backend".to_owned(), Value::Object(backend));
        }
        for (name, value) in [("Isolated", self.isolated), ("Internal", self.internal)] {
            if let Some(value) = value {
                set(&mut fields, name, json!(value));
            }
        }
        if let Some(encrypted) = self.encrypted {
            set(&mut fields, "Encryption", if encrypted { json!(WIREGUARD) } else { Value::Null });
        }
        if let Some(domain) = &self.domain {
            set(&mut fields, "Domain", json!(domain));
        }
        self.set_peers(&mut fields);
        Value::Object(fields).to_string()
    }

    /// Sets the range of a family, or disables it. The bounds of the leasable subnets lie in the old range, so they go.
    fn set_address_space(&self, fields: &mut Map<String, Value>, family: Family) {
        let cidr = self.cidrs.get(family);
        let enabled = format!("Enable{family}");
        // IPv4 is enabled by default, IPv6 is not.
        let default = family == Family::V4;
        set(fields, &enabled, if cidr.is_some() == default { Value::Null } else { json!(cidr.is_some()) });
        let network = family.field_name("Network");
        if take(fields, &network).as_ref().and_then(Value::as_str) != cidr.map(ToString::to_string).as_deref() {
            for bound in ["SubnetMin", "SubnetMax"] {
                take(fields, &family.field_name(bound));
            }
        }
        match cidr {
            Some(cidr) => set(fields, &network, json!(cidr)),
            None => drop(take(fields, &family.field_name("SubnetLen"))),
        }
    }

    fn set_peers(&self, fields: &mut Map<String, Value>) {
        if self.add_peers.is_empty() && self.remove_peers.is_empty() {
            return;
        }
        let mut peers: BTreeSet<String> = match take(fields, "Peers") {
            Some(Value::Array(peers)) => peers.iter().filter_map(|peer| peer.as_str().map(str::to_owned)).collect(),
            _ => BTreeSet::new(),
        };
        peers.extend(self.add_peers.iter().map(ToString::to_string));
        peers.retain(|peer| !self.remove_peers.iter().any(|removed| removed.to_string() == *peer));
        set(fields, "Peers", if peers.is_empty() { Value::Null } else { json!(peers) });
    }
}

/// Takes a field in any spelling; of several the last counts, as in Go.
fn take(fields: &mut Map<String, Value>, name: &str) -> Option<Value> {
    let spellings: Vec<String> = fields.keys().filter(|key| key.eq_ignore_ascii_case(name)).cloned().collect();
    spellings.iter().filter_map(|key| fields.remove(key)).last()
}

/// Sets a field instead of its other spellings; `null` removes it.
fn set(fields: &mut Map<String, Value>, name: &str, value: Value) {
    take(fields, name);
    if !value.is_null() {
        fields.insert(name.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidrs(texts: &[&str]) -> PerFamily<Cidr> {
        texts.iter().map(|text| text.parse::<Cidr>().expect(text)).map(|cidr| (cidr.family(), cidr)).collect()
    }

    #[test]
    fn new_record_has_only_given_fields() {
        let change = NetworkChange { cidrs: cidrs(&["10.244.0.0/16"]), ..NetworkChange::default() };
        assert_eq!(change.apply(""), r#"{"Backend":{"Type":"vxlan"},"Network":"10.244.0.0/16"}"#);
        let change = NetworkChange {
            cidrs: cidrs(&["fd00::/56"]),
            subnet_lengths: PerFamily { v4: None, v6: Some(64) },
            vni: Vni::try_from(7).ok(),
            isolated: Some(true),
            add_peers: [NetworkName::from("green")].into(),
            encrypted: Some(true),
            ..NetworkChange::default()
        };
        assert_eq!(
            change.apply(""),
            r#"{"Backend":{"Type":"vxlan","VNI":7},"EnableIPv4":false,"EnableIPv6":true,"Encryption":"wireguard","IPv6Network":"fd00::/56","IPv6SubnetLen":64,"Isolated":true,"Peers":["green"]}"#
        );
    }

    #[test]
    fn other_fields_are_kept() {
        let before =
            r#"{"network":"10.1.0.0/16","SubnetMin":"10.1.9.0","backend":{"vni":3,"Port":4789},"peers":["a","b"],"X":1}"#;
        let change = NetworkChange {
            vni: Vni::try_from(9).ok(),
            remove_peers: [NetworkName::from("a")].into(),
            ..NetworkChange::default()
        };
        assert_eq!(
            change.apply(before),
            r#"{"Backend":{"Port":4789,"VNI":9},"Peers":["b"],"SubnetMin":"10.1.9.0","X":1,"network":"10.1.0.0/16"}"#
        );
    }

    #[test]
    fn new_range_drops_bounds_of_old_range() {
        let before = r#"{"Network":"10.1.0.0/16","SubnetMin":"10.1.9.0","SubnetLen":26,"EnableIPv6":true,"IPv6Network":"fd00::/56","IPv6SubnetLen":64}"#;
        let with = |texts: &[&str]| NetworkChange { cidrs: cidrs(texts), ..NetworkChange::default() }.apply(before);
        assert_eq!(with(&["10.2.0.0/16"]), r#"{"Network":"10.2.0.0/16","SubnetLen":26}"#);
        assert!(with(&["10.1.0.0/16"]).contains("SubnetMin"));
    }
}
