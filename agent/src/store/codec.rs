//! Converts lease values between JSON and [`Lease`]. Pure. The format is in `docs/wire.md`, recorded from a real flanneld.
//!
//! Checks only rules that need nothing but the entry. `plan` checks rules that depend on the network or on other leases.

use std::net::IpAddr;

use serde::Serialize;
use serde_json::{Map, Value};

use super::read::RawEntry;
use crate::model::event::StoreEntry;
use crate::model::lease_fields::{field_error, get, text};
use crate::model::text::printable;
use crate::model::{
    BackendData, ExpiryId, Family, Lease, LeaseRecord, Node, PerFamily, RejectReason, RejectedLease, StorePosition, Subnet,
};

/// Maximum size of a value, in bytes. This agent's leases take some 300.
pub const MAX_VALUE: usize = 16 * 1024;
/// Maximum length of a host name, in bytes (RFC 1035 section 2.3.4, without the root's length byte and dots at either end).
pub const MAX_NODE_NAME: usize = 253;
/// Maximum length of a host identity, in bytes.
pub const MAX_NODE_ID: usize = 64;
/// Maximum length of a backend name, in bytes.
const MAX_BACKEND_NAME: usize = 32;

/// An entry's holder. Decoded leniently, because reservations made by hand often contain nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Owner {
    /// The underlay addresses.
    pub(super) public_ip: PerFamily<IpAddr>,
    /// The host.
    pub(super) node: Option<Node>,
}

/// Decodes an entry from the last part of its key and its value, as the watch does. Public for tests of foreign values.
pub fn read_entry(key: &str, value: &[u8], create_revision: i64) -> StoreEntry {
    let (key, value) = (key.to_owned(), value.to_vec());
    decode(&RawEntry { key, value, create_revision, mod_revision: create_revision, etcd_lease: None })
}

/// Decodes an entry; an invalid value becomes a [`RejectedLease`].
pub(super) fn decode(entry: &RawEntry) -> StoreEntry {
    let value = decode_record(entry).map_err(|kind| RejectedLease { key: printable(&entry.key), kind });
    StoreEntry { key: entry.key.clone(), value }
}

fn decode_record(entry: &RawEntry) -> Result<LeaseRecord, RejectReason> {
    let subnet = Subnet::from_key(&entry.key).map_err(|e| RejectReason::Key { detail: printable(&e.to_string()) })?;
    Ok(LeaseRecord {
        subnet,
        lease: decode_value(&subnet, &entry.value)?,
        created: StorePosition(entry.create_revision),
        changed: StorePosition(entry.mod_revision),
        expiry: entry.etcd_lease.map(ExpiryId),
    })
}

/// Decodes the value of this subnet's lease.
pub(super) fn decode_value(subnet: &Subnet, value: &[u8]) -> Result<Lease, RejectReason> {
    if value.len() > MAX_VALUE {
        return Err(RejectReason::TooLarge { size: value.len(), limit: MAX_VALUE });
    }
    let fields = object(value)?;
    let mut public_ip = PerFamily::default();
    for family in subnet.families() {
        *public_ip.slot(family) = Some(address(&fields, family)?);
    }
    let kind = text(&fields, "BackendType", "")?;
    if kind.is_empty() || kind.len() > MAX_BACKEND_NAME || !kind.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(field_error("BackendType", &kind, "must be a word of at most 32 printable characters"));
    }
    let backend = BackendData::decode(kind, &fields, subnet)?;
    let node = match get(&fields, "Node") {
        None => None,
        Some(Value::Object(node)) => Some(decode_node(node)?),
        Some(other) => return Err(field_error("Node", &other.to_string(), "must be an object with Name and Id")),
    };
    Ok(Lease { public_ip, backend, node })
}

/// Encodes a lease in flannel's format, with our field `Node`.
pub(super) fn encode(lease: &Lease) -> Result<String, serde_json::Error> {
    serde_json::to_string(&LeaseValue {
        public_ip: lease.public_ip.v4,
        public_ipv6: lease.public_ip.v6,
        backend_type: lease.backend.name(),
        backend_data: lease.backend.encode(Family::V4),
        backend_v6_data: lease.backend.encode(Family::V6),
        node: lease.node.as_ref().map(|node| NodeValue { name: &node.name, id: &node.id }),
    })
}

/// The holder of an entry; empty fields if its value does not contain them.
pub(super) fn owner(value: &[u8]) -> Owner {
    if value.len() > MAX_VALUE {
        return Owner::default();
    }
    let Ok(fields) = object(value) else { return Owner::default() };
    let public_ip = Family::ALL.into_iter().filter_map(|family| Some((family, address(&fields, family).ok()?))).collect();
    let node = match get(&fields, "Node") {
        Some(Value::Object(node)) => decode_node(node).ok(),
        _ => None,
    };
    Owner { public_ip, node }
}

#[derive(Serialize)]
struct LeaseValue<'a> {
    #[serde(rename = "PublicIP")]
    public_ip: Option<IpAddr>,
    #[serde(rename = "PublicIPv6")]
    public_ipv6: Option<IpAddr>,
    #[serde(rename = "BackendType")]
    backend_type: &'a str,
    #[serde(rename = "BackendData", skip_serializing_if = "Option::is_none")]
    backend_data: Option<Value>,
    #[serde(rename = "BackendV6Data", skip_serializing_if = "Option::is_none")]
    backend_v6_data: Option<Value>,
    #[serde(rename = "Node", skip_serializing_if = "Option::is_none")]
    node: Option<NodeValue<'a>>,
}

#[derive(Serialize)]
struct NodeValue<'a> {
    #[serde(rename = "Name")]
    name: &'a str,
    #[serde(rename = "Id")]
    id: &'a str,
}

fn object(value: &[u8]) -> Result<Map<String, Value>, RejectReason> {
    match serde_json::from_slice(value) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(RejectReason::Malformed { detail: "it is not a JSON object".to_owned() }),
        Err(e) => Err(RejectReason::Malformed { detail: format!("it is not JSON: {}", printable(&e.to_string())) }),
    }
}

fn address(fields: &Map<String, Value>, family: Family) -> Result<IpAddr, RejectReason> {
    let name = match family {
        Family::V4 => "PublicIP",
        Family::V6 => "PublicIPv6",
    };
    let value = text(fields, name, "")?;
    let address = match value.parse::<IpAddr>() {
        Ok(address) if Family::of(address) == family => address,
        _ => return Err(field_error(name, &value, &format!("must be an {family} address"))),
    };
    match unusable_reason(address) {
        Some(what) => Err(field_error(name, &value, &format!("{what} cannot be a host's underlay address"))),
        None => Ok(address),
    }
}

/// Why an address cannot be a tunnel endpoint.
fn unusable_reason(address: IpAddr) -> Option<&'static str> {
    if address.is_unspecified() {
        Some("the unspecified address")
    } else if address.is_loopback() {
        Some("a loopback address")
    } else if address.is_multicast() {
        Some("a multicast address")
    } else {
        match address {
            IpAddr::V4(a) if a.is_broadcast() => Some("the broadcast address"),
            IpAddr::V4(a) if a.is_link_local() => Some("a link-local address"),
            IpAddr::V4(a) if a.octets()[0] == 0 => Some("an address of `this network` (RFC 1122)"),
            IpAddr::V6(a) if a.is_unicast_link_local() => Some("a link-local address"),
            IpAddr::V6(a) if a.to_ipv4_mapped().is_some() => Some("an IPv4-mapped address"),
            _ => None,
        }
    }
}

fn decode_node(fields: &Map<String, Value>) -> Result<Node, RejectReason> {
    let checked_name = |name: &str, limit: usize| {
        let value = text(fields, name, "Node.")?;
        let is_allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if value.is_empty() || value.len() > limit || !value.bytes().all(is_allowed) {
            let rule = format!("must be 1 to {limit} letters, digits, `.`, `_` or `-`");
            return Err(field_error(&format!("Node.{name}"), &value, &rule));
        }
        Ok(value)
    };
    Ok(Node { name: checked_name("Name", MAX_NODE_NAME)?, id: checked_name("Id", MAX_NODE_ID)? })
}

#[cfg(test)]
#[path = "tests/codec.rs"]
mod tests;
