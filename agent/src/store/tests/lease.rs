//! Tests of the lease decisions.

use super::*;
use crate::model::{BackendData, Mac, Node, Vni};

const NETWORK: &str = r#"{"Network":"10.244.0.0/16"}"#;
const IP: &str = "192.168.0.7";

fn lease_request(network: &str) -> LeaseRequest {
    let network = NetworkConfig::parse(network).unwrap().config;
    LeaseRequest {
        node: Node { name: "h7".to_owned(), id: "id7".to_owned() },
        public_ip: [(crate::model::Family::V4, IP.parse().unwrap())].into_iter().collect(),
        backend: BackendData::Vxlan { vni: Vni::DEFAULT, vtep: PerFamily { v4: Some(Mac::local([2, 0, 0, 0, 0, 7])), v6: None } },
        network,
        preferred: None,
    }
}

/// The value that a host with this identity and address writes.
fn value(id: &str, ip: &str) -> String {
    let mut request = lease_request(NETWORK);
    request.node.id = id.to_owned();
    request.public_ip.v4 = Some(ip.parse().unwrap());
    codec::encode(&lease_value(&request)).unwrap()
}

fn snapshot(entries: &[(&str, String, Option<i64>)]) -> LeaseSnapshot {
    let entries = entries.iter().zip(10..).map(|((key, value, etcd_lease), revision)| RawEntry {
        key: (*key).to_owned(),
        value: value.clone().into_bytes(),
        create_revision: revision,
        mod_revision: revision,
        etcd_lease: *etcd_lease,
    });
    let config = Some(RawConfig { text: NETWORK.to_owned(), mod_revision: 2 });
    LeaseSnapshot::from_listing(Listing { revision: 100, config, entries: entries.collect() }, "id7")
}

fn held_entry(key: &str, mod_revision: i64, etcd_lease: Option<i64>, origin: LeaseOrigin) -> HeldEntry {
    let subnet = Subnet::from_key(key).unwrap();
    HeldEntry { key: key.to_owned(), mod_revision, lease: HeldLease { subnet, etcd_lease, origin } }
}

const A: &str = "10.244.5.0-24";
const B: &str = "10.244.6.0-24";

#[test]
fn empty_store_acquires_with_key_precondition_only() {
    let Action::Acquire { subnet, compare_all } = decide(&snapshot(&[]), &lease_request(NETWORK), &HolderState::default()) else {
        panic!("acquire")
    };
    assert!(lease_request(NETWORK).network.allows_subnet(&subnet) && !compare_all);
    // The same host chooses the same subnet; another attempt chooses another one.
    let repeated = decide(&snapshot(&[]), &lease_request(NETWORK), &HolderState::default());
    assert_eq!(repeated, Action::Acquire { subnet, compare_all });
    let other = decide(&snapshot(&[]), &lease_request(NETWORK), &HolderState { attempt: 1, ..HolderState::default() });
    assert_ne!(other, repeated);
}

#[test]
fn host_without_ipv6_address_leases_ipv4_only() {
    let dual = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#;
    let mut current = snapshot(&[]);
    current.config = Some(RawConfig { text: dual.to_owned(), mod_revision: 2 });
    let Action::Acquire { subnet, .. } = decide(&current, &lease_request(dual), &HolderState::default()) else {
        panic!("acquire")
    };
    assert!(lease_request(NETWORK).network.allows_subnet(&subnet), "{subnet}");
}

#[test]
fn unusual_entries_require_whole_range_precondition() {
    let compares_all = |entry: (&str, String)| match decide(
        &snapshot(&[(entry.0, entry.1, Some(1))]),
        &lease_request(NETWORK),
        &HolderState::default(),
    ) {
        Action::Acquire { compare_all, .. } => compare_all,
        other => panic!("{other:?}"),
    };
    let other = value("x", "192.168.0.9");
    assert!(!compares_all((A, other.clone())));
    assert!(compares_all(("10.244.5.0-25", other.clone())), "another length");
    assert!(compares_all(("10.244.5.0-24&fd00::-64", other.clone())), "another family");
    assert!(compares_all(("nonsense", other)), "no subnet");
    assert!(compares_all((A, r#"{"PublicIP":"192.168.0.9","BackendType":"vxlan"}"#.to_owned())), "a flannel host");
}

#[test]
fn last_held_subnet_precedes_preferred_one() {
    let mut request = lease_request(NETWORK);
    let subnet = |action: Action| match action {
        Action::Acquire { subnet, .. } => subnet.to_key(),
        other => panic!("{other:?}"),
    };
    request.preferred = Some(Subnet::from_key(A).unwrap());
    let mut state = HolderState::default();
    assert_eq!(subnet(decide(&snapshot(&[]), &request, &state)), A);
    state.last_subnet = Some(Subnet::from_key(B).unwrap());
    assert_eq!(subnet(decide(&snapshot(&[]), &request, &state)), B);
    state.attempt = 3;
    assert_eq!(
        subnet(decide(&snapshot(&[]), &request, &state)),
        B,
        "the preferred subnet is kept after a lost race while it is free"
    );
    let occupied = snapshot(&[(B, value("x", "192.168.0.9"), Some(1))]);
    assert_eq!(subnet(decide(&occupied, &request, &state)), A);
    request.preferred = Some(Subnet::from_key("10.9.0.0-24").unwrap());
    state.last_subnet = None;
    assert_ne!(subnet(decide(&snapshot(&[]), &request, &state)), "10.9.0.0-24", "the subnet is outside the network");
}

#[test]
fn own_entry_is_kept_or_rewritten() {
    let matching = snapshot(&[(A, value("id7", IP), Some(5))]);
    assert_eq!(
        decide(&matching, &lease_request(NETWORK), &HolderState::default()),
        Action::Keep(held_entry(A, 10, Some(5), LeaseOrigin::Reused))
    );
    let reformatted = snapshot(&[(A, value("id7", IP).replace(',', " , "), None)]);
    assert_eq!(
        decide(&reformatted, &lease_request(NETWORK), &HolderState::default()),
        Action::Keep(held_entry(A, 10, None, LeaseOrigin::Reused))
    );
    let altered = snapshot(&[(A, value("id7", IP).replace("\"VNI\":1", "\"VNI\":3"), Some(5))]);
    assert_eq!(
        decide(&altered, &lease_request(NETWORK), &HolderState::default()),
        Action::Write(held_entry(A, 10, Some(5), LeaseOrigin::Reused))
    );
    let without_address = snapshot(&[(A, r#"{"Node":{"Name":"h","Id":"id7"}}"#.to_owned(), None)]);
    assert_eq!(
        decide(&without_address, &lease_request(NETWORK), &HolderState::default()),
        Action::Write(held_entry(A, 10, None, LeaseOrigin::Reused))
    );
}

#[test]
fn best_of_several_own_entries_is_kept() {
    let both = snapshot(&[(A, value("id7", IP), Some(5)), (B, value("id7", IP), None)]);
    let Action::Release { key, mod_revision: 10, etcd_lease: Some(5), .. } =
        decide(&both, &lease_request(NETWORK), &HolderState::default())
    else {
        panic!("the reservation is not kept")
    };
    assert_eq!(key, A);
    let one_outside_network = snapshot(&[("10.9.0.0-24", value("id7", IP), Some(5)), (B, value("id7", IP), Some(6))]);
    assert!(
        matches!(decide(&one_outside_network, &lease_request(NETWORK), &HolderState::default()), Action::Release { key, .. } if key == "10.9.0.0-24")
    );
}

#[test]
fn own_entry_with_foreign_address_needs_liveness_check() {
    let entries = snapshot(&[(A, value("id7", "192.168.0.99"), Some(5))]);
    let mut state = HolderState::default();
    let Action::VerifyLiveness { key, mod_revision: 10, etcd_lease: 5, reason } =
        decide(&entries, &lease_request(NETWORK), &state)
    else {
        panic!("no liveness check")
    };
    assert!(key == A && reason.contains("h7") && reason.contains("192.168.0.99") && reason.contains("node-id"), "{reason}");
    state.dead_entry = Some((A.to_owned(), 9));
    assert!(
        matches!(decide(&entries, &lease_request(NETWORK), &state), Action::VerifyLiveness { .. }),
        "the liveness check was of another revision"
    );
    state.dead_entry = Some((A.to_owned(), 10));
    assert_eq!(decide(&entries, &lease_request(NETWORK), &state), Action::Write(held_entry(A, 10, Some(5), LeaseOrigin::Reused)));
    // An entry that this process wrote needs no liveness check: only its own address has changed.
    let state = HolderState { held: Some(held_entry(A, 10, Some(5), LeaseOrigin::Acquired)), ..HolderState::default() };
    assert_eq!(
        decide(&entries, &lease_request(NETWORK), &state),
        Action::Write(held_entry(A, 10, Some(5), LeaseOrigin::Acquired))
    );
}

#[test]
fn entry_with_own_address_is_taken_over_or_checked() {
    let flannel = snapshot(&[(A, value("x", IP).replace(r#","Node":{"Name":"h7","Id":"x"}"#, ""), Some(5))]);
    assert_eq!(
        decide(&flannel, &lease_request(NETWORK), &HolderState::default()),
        Action::TakeOver(held_entry(A, 10, Some(5), LeaseOrigin::TakenOver))
    );
    let other = snapshot(&[(A, value("x", IP), Some(5))]);
    assert!(matches!(
        decide(&other, &lease_request(NETWORK), &HolderState::default()),
        Action::VerifyLiveness { etcd_lease: 5, .. }
    ));
    let state = HolderState { dead_entry: Some((A.to_owned(), 10)), ..HolderState::default() };
    assert_eq!(
        decide(&other, &lease_request(NETWORK), &state),
        Action::TakeOver(held_entry(A, 10, Some(5), LeaseOrigin::TakenOver))
    );
    let reserved = snapshot(&[(A, value("x", IP), None)]);
    assert_eq!(
        decide(&reserved, &lease_request(NETWORK), &HolderState::default()),
        Action::TakeOver(held_entry(A, 10, None, LeaseOrigin::TakenOver))
    );
    let outside_network = snapshot(&[("10.9.0.0-24", value("x", IP), None)]);
    assert!(matches!(decide(&outside_network, &lease_request(NETWORK), &HolderState::default()), Action::Acquire { .. }));
}

#[test]
fn lease_loss_is_detected_with_reason() {
    let detect = |entries: &[(&str, String, Option<i64>)]| {
        let mut state = HolderState { held: Some(held_entry(A, 3, Some(5), LeaseOrigin::Acquired)), ..HolderState::default() };
        let loss = state.detect_loss(&snapshot(entries), &lease_request(NETWORK));
        assert_eq!(loss.is_none(), state.held.is_some());
        assert_eq!(loss.is_some(), state.last_subnet.is_some());
        loss.map(|(_, reason)| (reason, state))
    };
    assert!(detect(&[]).unwrap().0.contains("deleted or has expired"));
    assert!(
        detect(&[(A, value("x", "192.168.0.9"), Some(6))])
            .unwrap()
            .0
            .contains("overwritten by host h7 (identity x, public IP 192.168.0.9)")
    );
    assert!(detect(&[(A, "rubbish".to_owned(), None)]).unwrap().0.contains("overwritten by a flannel host (no public IP)"));
    assert!(detect(&[(A, value("id7", IP), Some(6))]).is_none());
    // A copy of this host took the entry: it is not overwritten, and a reservation is not used.
    let (_, state) = detect(&[(A, value("id7", "192.168.0.99"), None)]).unwrap();
    assert!(matches!(
        decide(&snapshot(&[(A, value("id7", "192.168.0.99"), None)]), &lease_request(NETWORK), &state),
        Action::RetryLater { .. }
    ));
}

#[test]
fn outdated_request_is_ignored() {
    let request = lease_request(r#"{"Network":"10.99.0.0/16"}"#);
    assert_eq!(decide(&snapshot(&[]), &request, &HolderState::default()), Action::Idle);
    // With a broken or missing configuration the last valid one stays in use.
    let mut current = snapshot(&[]);
    current.config = Some(RawConfig { text: "{".to_owned(), mod_revision: 50 });
    assert!(matches!(decide(&current, &request, &HolderState::default()), Action::Acquire { compare_all: false, .. }));
    current.config = None;
    assert!(matches!(decide(&current, &request, &HolderState::default()), Action::Acquire { compare_all: true, .. }));
}
