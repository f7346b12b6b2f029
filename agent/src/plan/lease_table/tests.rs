//! Examples of classifications, and property tests with generated stores.

use proptest::prelude::*;

use super::*;
use crate::model::{BackendData, ExpiryId, Lease, Mac, Vni};

fn network() -> NetworkConfig {
    NetworkConfig::parse(r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#)
        .expect("a configuration")
        .config
}

fn record(key: &str, revision: i64, ip: u8, mac: u8) -> StoreEntry {
    let subnet = Subnet::from_key(key).expect(key);
    let public_ip = subnet
        .families()
        .map(|family| {
            let text = if family == Family::V4 { format!("192.0.2.{ip}") } else { format!("2001:db8::{ip:x}") };
            (family, text.parse().expect("an address"))
        })
        .collect();
    let vtep = subnet.families().map(|family| (family, Mac([2, 0, 0, 0, 0, mac]))).collect();
    StoreEntry {
        key: key.to_owned(),
        value: Ok(LeaseRecord {
            subnet,
            lease: Lease { public_ip, backend: BackendData::Vxlan { vni: Vni::DEFAULT, vtep }, node: None },
            created: StorePosition(revision),
            changed: StorePosition(revision),
            expiry: Some(ExpiryId(1)),
        }),
    }
}

fn subnet(peer: &Peer) -> Subnet {
    Subnet::new(peer.remote_subnets.map(|_, remote| remote.subnet)).expect("a family")
}

fn local_host() -> LocalHost {
    LocalHost {
        subnet: Subnet::from_key("10.244.9.0-24").expect("a key"),
        public_ip: PerFamily { v4: "192.0.2.9".parse().ok(), v6: None },
        endpoints: PerFamily { v4: Some(PeerEndpoint::Vxlan(Mac([2, 0, 0, 0, 0, 9]))), v6: None },
        isolated: false,
    }
}

fn status_word(table: &LeaseTable, key: &str) -> &'static str {
    match table.classify(key, &network(), Some(&local_host())) {
        None => "absent",
        Some(Classification::Own) => "own",
        Some(Classification::Accepted(_)) => "peer",
        Some(Classification::Rejected(rejected)) => rejected.kind.as_str(),
    }
}

/// The network of flannel's own example: hosts have addresses inside the network, but outside the leasable range.
fn wide_network() -> NetworkConfig {
    NetworkConfig::parse(r#"{"Network":"10.0.0.0/8","SubnetMin":"10.10.0.0","SubnetMax":"10.99.0.0"}"#)
        .expect("a configuration")
        .config
}

fn record_at(key: &str, revision: i64, public_ip: &str) -> StoreEntry {
    let mut entry = record(key, revision, 1, u8::try_from(revision).expect("a small revision"));
    entry.value.as_mut().expect("a record").lease.public_ip.v4 = public_ip.parse().ok();
    entry
}

fn status_word_in_wide_network(table: &LeaseTable, key: &str) -> &'static str {
    match table.classify(key, &wide_network(), None) {
        Some(Classification::Accepted(_)) => "peer",
        Some(Classification::Rejected(rejected)) => rejected.kind.as_str(),
        other => panic!("{key}: {other:?}"),
    }
}

#[test]
fn public_ip_is_checked_against_leasable_range() {
    let mut table = LeaseTable::default();
    for (revision, public_ip, wanted) in [
        (1, "10.200.0.1", "peer"),
        (2, "10.9.255.255", "peer"),
        (3, "10.10.0.0", "field"),
        (4, "10.99.0.255", "field"),
        (5, "10.99.1.0", "peer"),
        (6, "192.0.2.6", "peer"),
    ] {
        let key = format!("10.20.{revision}.0-24");
        table.upsert(record_at(&key, revision, public_ip));
        assert_eq!(status_word_in_wide_network(&table, &key), wanted, "{public_ip}");
    }
    table.upsert(record_at("10.200.7.0-24", 7, "10.200.7.9"));
    assert_eq!(
        status_word_in_wide_network(&table, "10.200.7.0-24"),
        "field",
        "its own subnet, which the pool does not lease any more"
    );
}

#[test]
fn lease_covering_host_address_is_rejected() {
    let (stale, host) = ("10.200.7.0-24", "10.20.1.0-24");
    let mut table = LeaseTable::default();
    table.upsert(record_at(stale, 1, "192.0.2.1"));
    assert_eq!(status_word_in_wide_network(&table, stale), "peer");
    let affected = table.upsert(record_at(host, 2, "10.200.7.1"));
    assert!(affected.contains(stale), "classified again: {affected:?}");
    assert_eq!((status_word_in_wide_network(&table, stale), status_word_in_wide_network(&table, host)), ("covers-host", "peer"));
    let affected = table.upsert(record_at(host, 2, "192.0.2.2"));
    assert!(affected.contains(stale), "{affected:?}");
    assert_eq!(status_word_in_wide_network(&table, stale), "peer");
    table.upsert(record_at(host, 2, "10.200.7.1"));
    assert!(table.remove(host).contains(stale));
    assert_eq!(status_word_in_wide_network(&table, stale), "peer");
    let own = LocalHost { public_ip: PerFamily { v4: "10.200.7.1".parse().ok(), v6: None }, ..local_host() };
    let is_rejected = matches!(table.classify(stale, &wide_network(), Some(&own)), Some(Classification::Rejected(r)) if r.kind.as_str() == "covers-host");
    assert!(is_rejected, "this host's own address counts too");
    // Outer packets never meet the routes of an isolated network.
    let own = LocalHost { isolated: true, ..own };
    table.upsert(record_at(host, 2, "10.20.0.2"));
    for key in [stale, host] {
        let classification = table.classify(key, &wide_network(), Some(&own));
        assert!(matches!(classification, Some(Classification::Accepted(_))), "{key}: {classification:?}");
    }
}

#[test]
fn leases_are_classified() {
    let mut table = LeaseTable::default();
    for (key, revision, ip, mac, wanted) in [
        ("10.244.1.0-24", 10, 1, 1, "peer"),
        ("10.244.9.0-24", 11, 9, 9, "own"),
        ("10.244.2.0-24", 12, 9, 2, "own-address"),
        ("10.244.3.0-24", 13, 3, 9, "own-mac"),
        ("10.244.4.0-24", 14, 4, 1, "duplicate-mac"),
        ("10.244.9.128-25", 15, 5, 5, "overlaps-own"),
        ("10.245.0.0-24", 16, 6, 6, "outside-network"),
        ("0.0.0.0-0", 3, 7, 7, "outside-network"),
        ("10.244.0.0-16", 2, 8, 8, "too-wide"),
        ("10.244.1.0-25", 1, 10, 10, "overlap"),
        ("10.244.128.0-18", 1, 11, 11, "peer"),
        ("fd00:10:244:5::-64", 17, 12, 12, "peer"),
        ("10.244.6.0-24&fd00:10:244:5::-64", 18, 13, 13, "overlap"),
    ] {
        table.upsert(record(key, revision, ip, mac));
        assert_eq!(status_word(&table, key), wanted, "{key}");
    }
    assert_eq!(status_word(&table, "10.244.1.0-24"), "peer", "the valid peer stays");
}

#[test]
fn stale_lease_of_same_host_does_not_conflict() {
    let mut table = LeaseTable::default();
    table.upsert(record("10.244.1.0-24", 1, 1, 1));
    table.upsert(record("10.244.2.0-24", 2, 1, 1));
    assert_eq!((status_word(&table, "10.244.1.0-24"), status_word(&table, "10.244.2.0-24")), ("peer", "peer"));
}

#[test]
fn renewal_affects_no_lease() {
    let mut table = LeaseTable::default();
    table.upsert(record("10.244.1.0-24", 1, 1, 1));
    let mut renewed = record("10.244.1.0-24", 1, 1, 1);
    if let Ok(record) = &mut renewed.value {
        record.changed = StorePosition(99);
    }
    assert!(table.upsert(renewed).is_empty());
    assert_eq!(table.upsert(record("10.244.1.0-24", 1, 2, 1)).len(), 1);
}

fn any_entry() -> impl Strategy<Value = StoreEntry> {
    let key = prop_oneof![
        (0u8..4, 24u8..27).prop_map(|(i, len)| {
            let cidr = Cidr::containing(format!("10.244.{i}.64").parse().expect("an address"), len).expect("a CIDR");
            format!("{}-{}", cidr.base(), cidr.length())
        }),
        (0u8..4, 0u8..4).prop_map(|(i, j)| format!("10.244.{i}.0-24&fd00:10:244:{:x}::-64", j + 1)),
        (0u8..4).prop_map(|j| format!("fd00:10:244:{:x}::-64", j + 1)),
    ];
    (key, 1i64..9, 1u8..6, 1u8..6).prop_map(|(key, revision, ip, mac)| record(&key, revision, ip, mac))
}

proptest! {
    /// The result of `upsert` and `remove` contains every key whose classification changes, and incremental classifications equal
    /// those of a new table.
    #[test]
    fn incremental_update_equals_full_rebuild(steps in prop::collection::vec((any_entry(), any::<bool>()), 1..24)) {
        let mut table = LeaseTable::default();
        for (entry, add) in steps {
            let keys: BTreeSet<LeaseKey> = table.iter().map(|(key, _)| key.clone()).collect();
            let before: Vec<_> = keys.iter().map(|key| table.classify(key, &network(), Some(&local_host()))).collect();
            let affected = if add { table.upsert(entry) } else { table.remove(&entry.key) };
            for (key, old) in keys.iter().zip(before) {
                let new = table.classify(key, &network(), Some(&local_host()));
                prop_assert!(old == new || affected.contains(key), "{key} changed unnoticed: {old:?} -> {new:?}");
            }
            let mut fresh = LeaseTable::default();
            fresh.replace(table.iter().map(|(key, value)| StoreEntry { key: key.to_string(), value: value.clone() }).collect());
            for (key, _) in table.iter() {
                prop_assert_eq!(
                    table.classify(key, &network(), Some(&local_host())),
                    fresh.classify(key, &network(), Some(&local_host()))
                );
            }
        }
    }

    /// No two peers overlap, whatever the store contains.
    #[test]
    fn peers_never_overlap(entries in prop::collection::vec(any_entry(), 1..16)) {
        let mut table = LeaseTable::default();
        table.replace(entries);
        let peers: Vec<Peer> = table
            .iter()
            .filter_map(|(key, _)| match table.classify(key, &network(), Some(&local_host())) {
                Some(Classification::Accepted(peer)) => Some(peer),
                _ => None,
            })
            .collect();
        for (i, a) in peers.iter().enumerate() {
            for b in &peers[i + 1..] {
                prop_assert!(!subnet(a).overlaps(&subnet(b)), "{a:?} and {b:?}");
            }
            prop_assert!(!subnet(a).overlaps(&local_host().subnet));
        }
    }
}
