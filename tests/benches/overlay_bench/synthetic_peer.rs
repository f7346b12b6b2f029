//! Synthetic peers, in three forms: the store's entries, leases in etcd, and kernel entries for the raw limit.

use std::net::IpAddr;

use anyhow::Context;
use overlay_agent::model::event::StoreEntry;
use overlay_agent::model::{
    BackendData, Cidr, ExpiryId, Family, Lease, LeaseRecord, Mac, NetworkConfig, Node, StorePosition, Subnet, Vni,
};

/// One peer in one family.
#[derive(Debug, Clone, Copy)]
pub struct SyntheticPeer {
    /// Its number in the fleet, from 1.
    pub number: u32,
    /// Its subnet.
    pub subnet: Cidr,
    /// Its underlay address.
    pub public_ip: IpAddr,
    /// Its VTEP's MAC.
    pub mac: Mac,
}

/// The overlay network, separate from the lab's underlay.
pub fn network_cidr(family: Family) -> &'static str {
    match family {
        Family::V4 => "10.128.0.0/9",
        Family::V6 => "fd10::/40",
    }
}

/// The prefix length of an IPv4 peer's subnet: room for 131,000 of them.
pub const SUBNET_LENGTH: u8 = 26;

/// The network configuration for these families, as in etcd.
pub fn network_config(families: &[Family]) -> String {
    let mut config =
        serde_json::json!({ "EnableIPv4": families.contains(&Family::V4), "EnableIPv6": families.contains(&Family::V6) });
    for family in families {
        match family {
            Family::V4 => {
                config["Network"] = network_cidr(*family).into();
                config["SubnetLen"] = SUBNET_LENGTH.into();
            }
            Family::V6 => config["IPv6Network"] = network_cidr(*family).into(),
        }
    }
    config.to_string()
}

/// The peers with these numbers.
pub fn synthetic_peers(family: Family, numbers: std::ops::RangeInclusive<u32>) -> anyhow::Result<Vec<SyntheticPeer>> {
    let network = NetworkConfig::parse(&network_config(&[family]))?.config;
    let pool = network.pools.get(family).context("the network lacks its family")?;
    numbers
        .map(|number| {
            let subnet = pool.nth(number.into()).with_context(|| format!("{} has no room for peer {number}", pool.network))?;
            let [_, a, b, c] = number.to_be_bytes();
            let public_ip = match family {
                Family::V4 => IpAddr::from([172, 16 | a, b, c]),
                Family::V6 => IpAddr::from([0xfd98, 0, 0, 0, 0, 0, a.into(), u16::from_be_bytes([b, c])]),
            };
            Ok(SyntheticPeer { number, subnet, public_ip, mac: Mac([0x02, 0xaa, 0x00, a, b, c]) })
        })
        .collect()
}

impl SyntheticPeer {
    /// The subnet as a key of the store.
    pub fn store_key(&self) -> anyhow::Result<String> {
        Ok(Subnet::new(std::iter::once((self.subnet.family(), self.subnet)).collect())?.to_key())
    }

    /// The lease's value in etcd (`docs/wire.md`), in the default network.
    pub fn lease_value(&self) -> String {
        self.lease_value_in(Vni::DEFAULT)
    }

    /// The lease's value in a network with this VNI.
    pub fn lease_value_in(&self, vni: Vni) -> String {
        let node = serde_json::json!({ "Name": format!("n{}", self.number), "Id": format!("{:032x}", self.number) });
        let backend = serde_json::json!({ "VNI": vni, "VtepMAC": self.mac.to_string() });
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

/// A peer as an entry of the store: one family, or both families of the same number.
pub fn store_entry(peer: &[SyntheticPeer]) -> anyhow::Result<StoreEntry> {
    let number = peer.first().context("a peer without a family")?.number;
    let subnet = Subnet::new(peer.iter().map(|entry| (entry.subnet.family(), entry.subnet)).collect())?;
    let vtep = peer.iter().map(|entry| (entry.subnet.family(), entry.mac)).collect();
    let lease = Lease {
        public_ip: peer.iter().map(|entry| (entry.subnet.family(), entry.public_ip)).collect(),
        backend: BackendData::Vxlan { vni: Vni::DEFAULT, vtep },
        node: Some(Node { name: format!("n{number}"), id: format!("{number:032x}") }),
    };
    let revision = i64::from(number);
    let record = LeaseRecord {
        subnet,
        lease,
        created: StorePosition(revision),
        changed: StorePosition(revision),
        expiry: Some(ExpiryId(revision)),
    };
    Ok(StoreEntry { key: subnet.to_key(), value: Ok(record) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn synthetic_peers_are_distinct_and_in_network() {
        for family in Family::ALL {
            let network = NetworkConfig::parse(&network_config(&[family])).expect("a network").config;
            let all = synthetic_peers(family, 1..=10_000).expect("room");
            let distinct = |f: fn(&SyntheticPeer) -> String| all.iter().map(f).collect::<std::collections::BTreeSet<_>>().len();
            assert_eq!(distinct(|m| m.subnet.to_string()), all.len());
            assert_eq!(distinct(|m| m.public_ip.to_string()), all.len());
            assert_eq!(distinct(|m| m.mac.to_string()), all.len());
            for synthetic in &all {
                assert!(!network.pools.get(family).expect("a pool").network.contains(synthetic.public_ip));
                let entry = store_entry(&[*synthetic]).expect("an entry");
                assert_eq!(entry.key, synthetic.store_key().expect("a key"));
            }
        }
        assert!(synthetic_peers(Family::V4, 1..=140_000).is_err());
    }

    #[test]
    fn dual_stack_peer_is_one_entry() {
        let network = NetworkConfig::parse(&network_config(&Family::ALL)).expect("a network").config;
        assert!(Family::ALL.into_iter().all(|family| network.pools.get(family).is_some()));
        let peer = Family::ALL.map(|family| synthetic_peers(family, 7..=7).expect("room")[0]);
        let record = store_entry(&peer).expect("an entry").value.expect("a record");
        assert_eq!(Family::ALL.map(|family| record.subnet.get(family)), peer.map(|entry| Some(entry.subnet)));
        assert_eq!(
            Family::ALL.map(|family| record.lease.public_ip.get(family).copied()),
            peer.map(|entry| Some(entry.public_ip))
        );
    }
}
