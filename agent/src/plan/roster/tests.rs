//! Verdicts by example, and their properties over made-up stores.

use proptest::prelude::*;

use super::*;
use crate::model::{Lease, Vni};

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
        value: Ok(Record {
            subnet,
            lease: Lease { public_ip, backend: Backend::Vxlan { vni: Vni::DEFAULT, vtep }, node: None },
            create_revision: revision,
            mod_revision: revision,
            etcd_lease: Some(1),
        }),
    }
}

fn subnet(peer: &Peer) -> Subnet {
    Subnet::new(peer.reach.map(|_, reach| reach.subnet)).expect("a family")
}

fn own() -> OwnHost {
    OwnHost {
        subnet: Subnet::from_key("10.244.9.0-24").expect("a key"),
        public_ip: PerFamily { v4: "192.0.2.9".parse().ok(), v6: None },
        vtep: PerFamily { v4: Some(Mac([2, 0, 0, 0, 0, 9])), v6: None },
    }
}

fn word(roster: &Roster, key: &str) -> &'static str {
    match roster.standing(key, &network(), Some(&own())) {
        None => "absent",
        Some(Standing::Own) => "own",
        Some(Standing::Peer(_)) => "peer",
        Some(Standing::Refused(refusal)) => refusal.kind.word(),
    }
}

#[test]
fn verdicts() {
    let mut roster = Roster::default();
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
        roster.upsert(record(key, revision, ip, mac));
        assert_eq!(word(&roster, key), wanted, "{key}");
    }
    assert_eq!(word(&roster, "10.244.1.0-24"), "peer", "the good peer stays");
}

#[test]
fn a_lease_left_behind_by_the_same_host_is_no_contradiction() {
    let mut roster = Roster::default();
    roster.upsert(record("10.244.1.0-24", 1, 1, 1));
    roster.upsert(record("10.244.2.0-24", 2, 1, 1));
    assert_eq!((word(&roster, "10.244.1.0-24"), word(&roster, "10.244.2.0-24")), ("peer", "peer"));
}

#[test]
fn renewals_affect_nobody() {
    let mut roster = Roster::default();
    roster.upsert(record("10.244.1.0-24", 1, 1, 1));
    let mut renewed = record("10.244.1.0-24", 1, 1, 1);
    if let Ok(record) = &mut renewed.value {
        record.mod_revision = 99;
    }
    assert!(roster.upsert(renewed).is_empty());
    assert_eq!(roster.upsert(record("10.244.1.0-24", 1, 2, 1)).len(), 1);
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
    /// The incremental answer of `upsert` and `remove` names every key whose verdict changes, and equals that of a fresh roster.
    #[test]
    fn incremental_equals_fresh(steps in prop::collection::vec((any_entry(), any::<bool>()), 1..24)) {
        let mut roster = Roster::default();
        for (entry, add) in steps {
            let keys: BTreeSet<LeaseKey> = roster.iter().map(|(key, _)| key.clone()).collect();
            let before: Vec<_> = keys.iter().map(|key| roster.standing(key, &network(), Some(&own()))).collect();
            let affected = if add { roster.upsert(entry) } else { roster.remove(&entry.key) };
            for (key, old) in keys.iter().zip(before) {
                let new = roster.standing(key, &network(), Some(&own()));
                prop_assert!(old == new || affected.contains(key), "{key} changed unnoticed: {old:?} -> {new:?}");
            }
            let mut fresh = Roster::default();
            fresh.replace(roster.iter().map(|(key, value)| StoreEntry { key: key.to_string(), value: value.clone() }).collect());
            for (key, _) in roster.iter() {
                prop_assert_eq!(
                    roster.standing(key, &network(), Some(&own())),
                    fresh.standing(key, &network(), Some(&own()))
                );
            }
        }
    }

    /// No two peers ever overlap, whatever stands in the store.
    #[test]
    fn peers_never_overlap(entries in prop::collection::vec(any_entry(), 1..16)) {
        let mut roster = Roster::default();
        roster.replace(entries);
        let peers: Vec<Peer> = roster
            .iter()
            .filter_map(|(key, _)| match roster.standing(key, &network(), Some(&own())) {
                Some(Standing::Peer(peer)) => Some(peer),
                _ => None,
            })
            .collect();
        for (i, a) in peers.iter().enumerate() {
            for b in &peers[i + 1..] {
                prop_assert!(!subnet(a).overlaps(&subnet(b)), "{a:?} and {b:?}");
            }
            prop_assert!(!subnet(a).overlaps(&own().subnet));
        }
    }
}
