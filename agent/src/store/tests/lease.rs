use super::*;
use crate::model::{Mac, Node};

const NETWORK: &str = r#"{"Network":"10.244.0.0/16"}"#;
const IP: &str = "192.168.0.7";

fn wish(network: &str) -> LeaseWish {
    let network = NetworkConfig::parse(network).unwrap().config;
    LeaseWish {
        node: Node { name: "h7".to_owned(), id: "id7".to_owned() },
        public_ip: [(crate::model::Family::V4, IP.parse().unwrap())].into_iter().collect(),
        vtep: [(crate::model::Family::V4, Mac::local([2, 0, 0, 0, 0, 7]))].into_iter().collect(),
        network,
        preferred: None,
    }
}

/// A value as a host of this identity and address writes it.
fn value(id: &str, ip: &str) -> String {
    let mut wish = wish(NETWORK);
    wish.node.id = id.to_owned();
    wish.public_ip.v4 = Some(ip.parse().unwrap());
    codec::encode(&wished(&wish)).unwrap()
}

fn look(entries: &[(&str, String, Option<i64>)]) -> Look {
    let entries = entries.iter().zip(10..).map(|((key, value, etcd_lease), revision)| RawEntry {
        key: (*key).to_owned(),
        value: value.clone().into_bytes(),
        create_revision: revision,
        mod_revision: revision,
        etcd_lease: *etcd_lease,
    });
    let config = Some(RawConfig { text: NETWORK.to_owned(), mod_revision: 2 });
    Look::of(Listing { revision: 100, config, entries: entries.collect() }, "id7")
}

fn held(key: &str, mod_revision: i64, etcd_lease: Option<i64>, origin: LeaseOrigin) -> Held {
    let subnet = Subnet::from_key(key).unwrap();
    Held { key: key.to_owned(), mod_revision, lease: HeldLease { subnet, etcd_lease, origin } }
}

const A: &str = "10.244.5.0-24";
const B: &str = "10.244.6.0-24";

#[test]
fn an_empty_store_gives_a_free_subnet_guarded_by_its_key_alone() {
    let Step::Acquire { subnet, whole } = decide(&look(&[]), &wish(NETWORK), &Memory::default()) else { panic!("acquire") };
    assert!(wish(NETWORK).network.leases(&subnet) && !whole);
    // The same host, the same subnet; another attempt, another one.
    let again = decide(&look(&[]), &wish(NETWORK), &Memory::default());
    assert_eq!(again, Step::Acquire { subnet, whole });
    let other = decide(&look(&[]), &wish(NETWORK), &Memory { attempt: 1, ..Memory::default() });
    assert_ne!(other, again);
}

#[test]
fn host_without_an_ipv6_address_leases_ipv4_alone() {
    let dual = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#;
    let mut look = look(&[]);
    look.config = Some(RawConfig { text: dual.to_owned(), mod_revision: 2 });
    let Step::Acquire { subnet, .. } = decide(&look, &wish(dual), &Memory::default()) else { panic!("acquire") };
    assert!(wish(NETWORK).network.leases(&subnet), "{subnet}");
}

#[test]
fn entries_of_another_form_make_the_whole_range_a_guard() {
    let whole = |entry: (&str, String)| match decide(&look(&[(entry.0, entry.1, Some(1))]), &wish(NETWORK), &Memory::default()) {
        Step::Acquire { whole, .. } => whole,
        other => panic!("{other:?}"),
    };
    let other = value("x", "192.168.0.9");
    assert!(!whole((A, other.clone())));
    assert!(whole(("10.244.5.0-25", other.clone())), "another length");
    assert!(whole(("10.244.5.0-24&fd00::-64", other.clone())), "another family");
    assert!(whole(("nonsense", other)), "no subnet");
    assert!(whole((A, r#"{"PublicIP":"192.168.0.9","BackendType":"vxlan"}"#.to_owned())), "a flannel host");
}

#[test]
fn what_was_held_comes_before_what_is_remembered() {
    let mut wish = wish(NETWORK);
    let subnet = |step: Step| match step {
        Step::Acquire { subnet, .. } => subnet.to_key(),
        other => panic!("{other:?}"),
    };
    wish.preferred = Some(Subnet::from_key(A).unwrap());
    let mut memory = Memory::default();
    assert_eq!(subnet(decide(&look(&[]), &wish, &memory)), A);
    memory.last = Some(Subnet::from_key(B).unwrap());
    assert_eq!(subnet(decide(&look(&[]), &wish, &memory)), B);
    memory.attempt = 3;
    assert_eq!(subnet(decide(&look(&[]), &wish, &memory)), B, "a lost race is no reason to move while it is free");
    let taken = look(&[(B, value("x", "192.168.0.9"), Some(1))]);
    assert_eq!(subnet(decide(&taken, &wish, &memory)), A);
    wish.preferred = Some(Subnet::from_key("10.9.0.0-24").unwrap());
    memory.last = None;
    assert_ne!(subnet(decide(&look(&[]), &wish, &memory)), "10.9.0.0-24", "not of the network");
}

#[test]
fn our_entry_is_kept_where_it_is_right_and_written_where_it_is_not() {
    let right = look(&[(A, value("id7", IP), Some(5))]);
    assert_eq!(decide(&right, &wish(NETWORK), &Memory::default()), Step::Keep(held(A, 10, Some(5), LeaseOrigin::Reused)));
    let spaced = look(&[(A, value("id7", IP).replace(',', " , "), None)]);
    assert_eq!(decide(&spaced, &wish(NETWORK), &Memory::default()), Step::Keep(held(A, 10, None, LeaseOrigin::Reused)));
    let altered = look(&[(A, value("id7", IP).replace("\"VNI\":1", "\"VNI\":3"), Some(5))]);
    assert_eq!(decide(&altered, &wish(NETWORK), &Memory::default()), Step::Write(held(A, 10, Some(5), LeaseOrigin::Reused)));
    let bare = look(&[(A, r#"{"Node":{"Name":"h","Id":"id7"}}"#.to_owned(), None)]);
    assert_eq!(decide(&bare, &wish(NETWORK), &Memory::default()), Step::Write(held(A, 10, None, LeaseOrigin::Reused)));
}

#[test]
fn the_best_of_several_entries_of_ours_is_kept() {
    let both = look(&[(A, value("id7", IP), Some(5)), (B, value("id7", IP), None)]);
    let Step::Release { key, mod_revision: 10, etcd_lease: Some(5), .. } = decide(&both, &wish(NETWORK), &Memory::default())
    else {
        panic!("the reservation is kept")
    };
    assert_eq!(key, A);
    let fits = look(&[("10.9.0.0-24", value("id7", IP), Some(5)), (B, value("id7", IP), Some(6))]);
    assert!(matches!(decide(&fits, &wish(NETWORK), &Memory::default()), Step::Release { key, .. } if key == "10.9.0.0-24"));
}

#[test]
fn an_entry_of_ours_with_a_foreign_address_needs_proof() {
    let entries = look(&[(A, value("id7", "192.168.0.99"), Some(5))]);
    let mut memory = Memory::default();
    let Step::Prove { key, mod_revision: 10, etcd_lease: 5, reason } = decide(&entries, &wish(NETWORK), &memory) else {
        panic!("prove")
    };
    assert!(key == A && reason.contains("h7") && reason.contains("192.168.0.99") && reason.contains("node-id"), "{reason}");
    memory.dead = Some((A.to_owned(), 9));
    assert!(matches!(decide(&entries, &wish(NETWORK), &memory), Step::Prove { .. }), "the proof is of another revision");
    memory.dead = Some((A.to_owned(), 10));
    assert_eq!(decide(&entries, &wish(NETWORK), &memory), Step::Write(held(A, 10, Some(5), LeaseOrigin::Reused)));
    // What this process wrote itself needs none: its own address has changed.
    let memory = Memory { held: Some(held(A, 10, Some(5), LeaseOrigin::Acquired)), ..Memory::default() };
    assert_eq!(decide(&entries, &wish(NETWORK), &memory), Step::Write(held(A, 10, Some(5), LeaseOrigin::Acquired)));
}

#[test]
fn an_entry_with_our_address_is_taken_over_or_needs_proof() {
    let flannel = look(&[(A, value("x", IP).replace(r#","Node":{"Name":"h7","Id":"x"}"#, ""), Some(5))]);
    assert_eq!(
        decide(&flannel, &wish(NETWORK), &Memory::default()),
        Step::TakeOver(held(A, 10, Some(5), LeaseOrigin::TakenOver))
    );
    let other = look(&[(A, value("x", IP), Some(5))]);
    assert!(matches!(decide(&other, &wish(NETWORK), &Memory::default()), Step::Prove { etcd_lease: 5, .. }));
    let memory = Memory { dead: Some((A.to_owned(), 10)), ..Memory::default() };
    assert_eq!(decide(&other, &wish(NETWORK), &memory), Step::TakeOver(held(A, 10, Some(5), LeaseOrigin::TakenOver)));
    let reserved = look(&[(A, value("x", IP), None)]);
    assert_eq!(decide(&reserved, &wish(NETWORK), &Memory::default()), Step::TakeOver(held(A, 10, None, LeaseOrigin::TakenOver)));
    let misfit = look(&[("10.9.0.0-24", value("x", IP), None)]);
    assert!(matches!(decide(&misfit, &wish(NETWORK), &Memory::default()), Step::Acquire { .. }));
}

#[test]
fn a_loss_is_noticed_with_its_reason() {
    let notice = |entries: &[(&str, String, Option<i64>)]| {
        let mut memory = Memory { held: Some(held(A, 3, Some(5), LeaseOrigin::Acquired)), ..Memory::default() };
        let loss = memory.notice_loss(&look(entries), &wish(NETWORK));
        assert_eq!(loss.is_none(), memory.held.is_some());
        assert_eq!(loss.is_some(), memory.last.is_some());
        loss.map(|(_, reason)| (reason, memory))
    };
    assert!(notice(&[]).unwrap().0.contains("deleted or has expired"));
    assert!(
        notice(&[(A, value("x", "192.168.0.9"), Some(6))])
            .unwrap()
            .0
            .contains("overwritten by host h7 (identity x, public IP 192.168.0.9)")
    );
    assert!(notice(&[(A, "rubbish".to_owned(), None)]).unwrap().0.contains("overwritten by a flannel host (no public IP)"));
    assert!(notice(&[(A, value("id7", IP), Some(6))]).is_none());
    // A copy of this host took it: it is not written back, and a reservation not followed.
    let (_, memory) = notice(&[(A, value("id7", "192.168.0.99"), None)]).unwrap();
    assert!(matches!(decide(&look(&[(A, value("id7", "192.168.0.99"), None)]), &wish(NETWORK), &memory), Step::Wait { .. }));
}

#[test]
fn a_wish_from_an_older_configuration_is_not_followed() {
    let wish = wish(r#"{"Network":"10.99.0.0/16"}"#);
    assert_eq!(decide(&look(&[]), &wish, &Memory::default()), Step::Stay);
    // Broken or gone: the last good one still counts.
    let mut look = look(&[]);
    look.config = Some(RawConfig { text: "{".to_owned(), mod_revision: 50 });
    assert!(matches!(decide(&look, &wish, &Memory::default()), Step::Acquire { whole: false, .. }));
    look.config = None;
    assert!(matches!(decide(&look, &wish, &Memory::default()), Step::Acquire { whole: true, .. }));
}
