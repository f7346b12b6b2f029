//! The peers of a measurement: the same ones as the store's entries, as leases in etcd, and for the raw limit.

use std::net::IpAddr;

use anyhow::Context;
use overlay_agent::model::event::StoreEntry;
use overlay_agent::model::{Backend, Cidr, Family, Lease, Mac, NetworkConfig, Node, PerFamily, Record, Subnet, Vni};

/// One peer in one family.
#[derive(Debug, Clone, Copy)]
pub struct Member {
    /// Its place in the fleet, from 1 on.
    pub number: u32,
    /// Its part of the overlay.
    pub subnet: Cidr,
    /// Its underlay address.
    pub public_ip: IpAddr,
    /// Its VTEP's MAC.
    pub mac: Mac,
}

/// The overlay network, apart from the lab's underlay.
pub fn network(family: Family) -> &'static str {
    match family {
        Family::V4 => "10.128.0.0/9",
        Family::V6 => "fd10::/40",
    }
}

/// The length of an IPv4 peer's subnet: room for 131,000 of them.
pub const SUBNET_LENGTH: u8 = 26;

/// The configuration of a network of one family, as it stands in etcd.
pub fn config(family: Family) -> String {
    match family {
        Family::V4 => format!(r#"{{"Network":"{}","SubnetLen":{SUBNET_LENGTH}}}"#, network(family)),
        Family::V6 => format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{}"}}"#, network(family)),
    }
}

/// The members of these numbers.
pub fn members(family: Family, numbers: std::ops::RangeInclusive<u32>) -> anyhow::Result<Vec<Member>> {
    let network = NetworkConfig::parse(&config(family))?.config;
    let pool = network.pools.get(family).context("the network lacks its family")?;
    numbers
        .map(|number| {
            let subnet = pool.nth(number.into()).with_context(|| format!("{} has no room for peer {number}", pool.network))?;
            let [_, a, b, c] = number.to_be_bytes();
            let public_ip = match family {
                Family::V4 => IpAddr::from([172, 16 | a, b, c]),
                Family::V6 => IpAddr::from([0xfd98, 0, 0, 0, 0, 0, a.into(), u16::from_be_bytes([b, c])]),
            };
            Ok(Member { number, subnet, public_ip, mac: Mac([0x02, 0xaa, 0x00, a, b, c]) })
        })
        .collect()
}

impl Member {
    /// The subnet as a key of the store.
    pub fn key(&self) -> anyhow::Result<String> {
        Ok(self.as_subnet()?.to_key())
    }

    fn as_subnet(&self) -> anyhow::Result<Subnet> {
        Ok(Subnet::new(std::iter::once((self.subnet.family(), self.subnet)).collect())?)
    }

    /// As the store hands it on.
    pub fn entry(&self) -> anyhow::Result<StoreEntry> {
        let family = self.subnet.family();
        let subnet = self.as_subnet()?;
        let only = |mac| std::iter::once((family, mac)).collect::<PerFamily<Mac>>();
        let lease = Lease {
            public_ip: std::iter::once((family, self.public_ip)).collect(),
            backend: Backend::Vxlan { vni: Vni::DEFAULT, vtep: only(self.mac) },
            node: Some(Node { name: format!("n{}", self.number), id: format!("{:032x}", self.number) }),
        };
        let revision = i64::from(self.number);
        let record = Record { subnet, lease, create_revision: revision, mod_revision: revision, etcd_lease: Some(revision) };
        Ok(StoreEntry { key: subnet.to_key(), value: Ok(record) })
    }

    /// The lease's value in etcd (`docs/wire.md`).
    pub fn value(&self) -> String {
        let node = serde_json::json!({ "Name": format!("n{}", self.number), "Id": format!("{:032x}", self.number) });
        let backend = serde_json::json!({ "VNI": 1, "VtepMAC": self.mac.to_string() });
        let lease = match self.subnet.family() {
            Family::V4 => serde_json::json!({
                "PublicIP": self.public_ip, "PublicIPv6": null, "BackendType": "vxlan", "BackendData": backend, "Node": node
            }),
            Family::V6 => serde_json::json!({
                "PublicIP": null, "PublicIPv6": self.public_ip, "BackendType": "vxlan", "BackendV6Data": backend, "Node": node
            }),
        };
        lease.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_apart_and_leases_of_the_network() {
        for family in Family::ALL {
            let network = NetworkConfig::parse(&config(family)).expect("a network").config;
            let all = members(family, 1..=10_000).expect("room");
            let distinct = |f: fn(&Member) -> String| all.iter().map(f).collect::<std::collections::BTreeSet<_>>().len();
            assert_eq!(distinct(|m| m.subnet.to_string()), all.len());
            assert_eq!(distinct(|m| m.public_ip.to_string()), all.len());
            assert_eq!(distinct(|m| m.mac.to_string()), all.len());
            for member in &all {
                assert!(!network.pools.get(family).expect("a pool").network.contains(member.public_ip));
                let entry = member.entry().expect("an entry");
                assert_eq!(entry.key, member.key().expect("a key"));
            }
        }
        assert!(members(Family::V4, 1..=140_000).is_err());
    }
}
