//! VXLAN's settings, and its data in a lease.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::model::config_fields::FieldReader;
use crate::model::lease_fields::{field_error, get, text};
use crate::model::{Family, Mac, PerFamily, RejectReason, Subnet, Vni};

/// The `BackendType`.
pub(super) const NAME: &str = "vxlan";

/// flannel's default VXLAN port. It is Linux's default from before RFC 7348, which assigns 4789.
const DEFAULT_PORT: u16 = 8472;

/// Settings of the VXLAN backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VxlanConfig {
    /// The VXLAN network identifier; default 1.
    pub vni: Vni,
    /// The UDP destination port; default 8472.
    pub port: u16,
    /// The underlay's MTU in bytes; default: the external interface's MTU.
    pub mtu: Option<u32>,
}

impl VxlanConfig {
    pub(super) fn parse(reader: &mut FieldReader) -> VxlanConfig {
        // As in flannel, 0 means the default.
        let vni = reader.number("VNI", 0, (1 << 24) - 1).filter(|v| *v != 0);
        let port = reader.number("Port", 0, u64::from(u16::MAX)).filter(|p| *p != 0);
        let mtu = reader.number("MTU", 0, 65_535).filter(|m| *m != 0);
        if let Some(mtu) = mtu.filter(|m| *m < 1350) {
            // IPV6_MIN_MTU plus the VXLAN overhead over IPv6.
            reader.fail("MTU", &mtu.to_string(), "is below 1350 bytes: IPv6 needs 1280, and VXLAN takes up to 70");
        }
        for (name, why) in [
            ("GBP", "is not supported: group policy tags are not set"),
            ("Learning", "is not supported: forwarding entries come from leases only"),
            ("DirectRouting", "is not supported: all peers are reached by VXLAN, which also works on a shared link"),
        ] {
            if reader.boolean(name) == Some(true) {
                reader.warn(name, why);
            }
        }
        VxlanConfig {
            vni: vni.and_then(|v| u32::try_from(v).ok()).and_then(|v| Vni::try_from(v).ok()).unwrap_or(Vni::DEFAULT),
            port: port.and_then(|p| u16::try_from(p).ok()).unwrap_or(DEFAULT_PORT),
            mtu: mtu.and_then(|m| u32::try_from(m).ok()),
        }
    }
}

pub(super) fn encode(vni: Vni, mac: Mac) -> Value {
    json!({ "VNI": vni, "VtepMAC": mac })
}

/// The VNI and the VTEP's MAC in each family.
pub(super) fn decode(fields: &Map<String, Value>, subnet: &Subnet) -> Result<(Vni, PerFamily<Mac>), RejectReason> {
    let mut vtep = PerFamily::default();
    let mut vni: Option<Vni> = None;
    for family in subnet.families() {
        let name = match family {
            Family::V4 => "BackendData",
            Family::V6 => "BackendV6Data",
        };
        let data = match get(fields, name) {
            Some(Value::Object(data)) => data,
            Some(other) => return Err(field_error(name, &other.to_string(), "must be an object with VNI and VtepMAC")),
            None => return Err(field_error(name, "", "a vxlan lease must have its VNI and VTEP MAC here")),
        };
        let path = format!("{name}.");
        let number = get(data, "VNI").map(ToString::to_string).unwrap_or_default();
        let family_vni = number.parse::<u32>().ok().and_then(|n| Vni::try_from(n).ok());
        let family_vni =
            family_vni.ok_or_else(|| field_error(&format!("{path}VNI"), &number, "must be a whole number from 1 to 16777215"))?;
        if vni.is_some_and(|other| other != family_vni) {
            return Err(field_error(&format!("{path}VNI"), &number, "must be the same VNI for both families of a host"));
        }
        vni = Some(family_vni);
        let mac = text(data, "VtepMAC", &path)?;
        let parsed = mac.parse::<Mac>().ok().filter(|mac| mac.is_unicast());
        let parsed = parsed.ok_or_else(|| {
            field_error(&format!("{path}VtepMAC"), &mac, "must be a unicast MAC address, six bytes as in 02:00:5e:10:00:01")
        })?;
        *vtep.slot(family) = Some(parsed);
    }
    // A subnet has at least one family.
    Ok((vni.unwrap_or(Vni::DEFAULT), vtep))
}
