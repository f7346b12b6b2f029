//! One host's lease: getting, keeping, losing, changing.

use std::time::{Duration, Instant};

use super::harness::*;
use crate::model::event::{HeldLease, LeaseOrigin, OwnLease, StoreEvent};
use crate::store::release;

const FLANNEL: &str =
    r#"{"PublicIP":"192.168.0.7","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"4a:de:38:28:a5:6b"}}"#;

async fn started(network: &str) -> Etcd {
    let etcd = Etcd::start().await;
    etcd.put_config(network).await;
    etcd
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_acquired_and_found_again_without_a_write() {
    for network in [NETWORK, DUAL, r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#] {
        let etcd = started(network).await;
        let mut agent = Agent::start(etcd.config(), Some(wish(network, 7)));
        let held = agent.held().await;
        assert_eq!(held.origin, LeaseOrigin::Acquired);
        assert!(wish(network, 7).network.leases(&held.subnet), "{}", held.subnet);
        agent.stop().await;
        let (entries, revision) = etcd.subnets().await;
        assert_eq!((entries.len(), entries[0].0.as_str()), (1, held.subnet.to_key().as_str()));
        assert_eq!(Some(entries[0].2), held.etcd_lease);
        let mut agent = Agent::start(etcd.config(), Some(wish(network, 7)));
        assert_eq!(agent.held().await, HeldLease { origin: LeaseOrigin::Reused, ..held });
        agent.stop().await;
        assert_eq!(etcd.subnets().await, (entries, revision), "nothing was written");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_remembered_subnet_is_preferred() {
    let etcd = started(NETWORK).await;
    let mut wish = wish(NETWORK, 7);
    wish.preferred = Some(subnet("10.244.77.0-24"));
    let mut agent = Agent::start(etcd.config(), Some(wish.clone()));
    assert_eq!(agent.held().await.subnet, subnet("10.244.77.0-24"));
    agent.stop().await;
    release(&etcd.config(), "id-7").await.unwrap();
    // Taken, even if by rubbish: another one.
    etcd.put_subnet("10.244.77.9-24", "rubbish", None).await;
    let mut agent = Agent::start(etcd.config(), Some(wish));
    assert_ne!(agent.held().await.subnet, subnet("10.244.77.0-24"));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_wish_is_written_at_once_with_the_same_etcd_lease() {
    let etcd = started(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 7)));
    let held = agent.held().await;
    let mut changed = wish(NETWORK, 8);
    changed.node = wish(NETWORK, 7).node;
    let begun = Instant::now();
    agent.wish.send(Some(changed.clone())).unwrap();
    agent
        .find(|event| {
            matches!(event, StoreEvent::Upsert(e) if e.value.as_ref().unwrap().lease.public_ip == changed.public_ip).then_some(())
        })
        .await;
    assert!(begun.elapsed() < Duration::from_secs(1), "no proof of life is needed for what this process holds");
    let (entries, _) = etcd.subnets().await;
    assert_eq!((entries.len(), Some(entries[0].2)), (1, held.etcd_lease));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn renewing_is_no_event() {
    let etcd = started(NETWORK).await;
    let mut config = etcd.config();
    config.lease_ttl = Duration::from_secs(3);
    let mut agent = Agent::start(config, Some(wish(NETWORK, 7)));
    let held = agent.held().await;
    while tokio::time::timeout(Duration::from_millis(500), agent.events.recv()).await.is_ok() {}
    let (_, before) = etcd.subnets().await;
    let quiet = tokio::time::timeout(Duration::from_secs(6), agent.events.recv()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    let (entries, after) = etcd.subnets().await;
    assert_eq!((before, entries.len(), Some(entries[0].2)), (after, 1, held.etcd_lease));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_stays_one() {
    let etcd = started(NETWORK).await;
    // Made by hand with no more than the address, and one that flannel wrote.
    for value in [r#"{"PublicIP":"192.168.0.7"}"#, FLANNEL, r#"{"Node":{"Name":"x","Id":"id-7"}}"#] {
        etcd.put_subnet("10.244.55.0-24", value, None).await;
        let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 7)));
        let held = agent.held().await;
        assert_eq!((held.subnet, held.etcd_lease), (subnet("10.244.55.0-24"), None));
        let mut changed = wish(NETWORK, 7);
        changed.vtep = wish(NETWORK, 9).vtep;
        agent.wish.send(Some(changed.clone())).unwrap();
        let mac = changed.vtep.v4.unwrap().to_string();
        while !etcd.subnets().await.0[0].1.contains(&mac) {
            agent.next().await;
        }
        agent.stop().await;
        assert_eq!(release(&etcd.config(), "id-7").await.unwrap().reservations, ["10.244.55.0-24"]);
        let (entries, _) = etcd.subnets().await;
        assert_eq!((entries.len(), entries[0].2), (1, 0), "no etcd lease was attached");
        assert!(entries[0].1.contains(r#""Node":{"Name":"host7","Id":"id-7"}"#), "{}", entries[0].1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_makes_a_lease_a_reservation() {
    let etcd = started(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 7)));
    let held = agent.held().await;
    let (entries, _) = etcd.subnets().await;
    etcd.put_subnet(&entries[0].0, &entries[0].1, None).await;
    assert_eq!(agent.held().await, HeldLease { etcd_lease: None, ..held });
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_vanished_is_taken_again() {
    let etcd = started(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 7)));
    let first = agent.held().await;
    etcd.client().await.lease_revoke(first.etcd_lease.unwrap()).await.unwrap();
    assert!(agent.wanted().await.contains("is gone"));
    let second = agent.held().await;
    assert_eq!((second.subnet, second.origin), (first.subnet, LeaseOrigin::Acquired));
    assert_ne!(second.etcd_lease, first.etcd_lease);
    etcd.client().await.delete(format!("{PREFIX}/subnets/{}", first.subnet.to_key()), None).await.unwrap();
    assert!(agent.wanted().await.contains("is gone"));
    let third = agent.held().await;
    assert_eq!(third.subnet, first.subnet);
    let leases: Vec<i64> = etcd.client().await.leases().await.unwrap().leases().iter().map(|lease| lease.id()).collect();
    assert_eq!(leases, [third.etcd_lease.unwrap()], "nothing dangles");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_expired_while_etcd_was_away_is_taken_again() {
    let mut etcd = started(NETWORK).await;
    let mut config = etcd.config();
    config.lease_ttl = Duration::from_secs(3);
    let mut agent = Agent::start(config, Some(wish(NETWORK, 7)));
    let first = agent.held().await;
    etcd.kill();
    assert!(etcd.run().await);
    // As an operator who empties it before the agent is back.
    etcd.client().await.lease_revoke(first.etcd_lease.unwrap()).await.unwrap();
    assert_eq!(agent.held().await.subnet, first.subnet);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overwritten_lease_is_not_fought_over() {
    let etcd = started(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 7)));
    let first = agent.held().await;
    let lease = etcd.grant(60).await;
    let theirs = FLANNEL.replace("192.168.0.7", "192.168.9.9").replace("}}", r#"},"Node":{"Name":"other","Id":"other"}}"#);
    etcd.put_subnet(&first.subnet.to_key(), &theirs, Some(lease)).await;
    assert!(agent.wanted().await.contains("overwritten by host other (identity other, public IP 192.168.9.9)"));
    let second = agent.held().await;
    assert_ne!(second.subnet, first.subnet);
    assert!(etcd.subnets().await.0.iter().any(|(key, value, id)| (key, value, id) == (&first.subnet.to_key(), &theirs, &lease)));
    // Altered but still ours: put back.
    let (entries, _) = etcd.subnets().await;
    let ours = entries.into_iter().find(|(key, _, _)| *key == second.subnet.to_key()).unwrap();
    etcd.put_subnet(&ours.0, &ours.1.replace("\"VNI\":1", "\"VNI\":9"), Some(ours.2)).await;
    agent
        .find(|event| {
            matches!(event, StoreEvent::Upsert(e) if e.value.as_ref().is_ok_and(|r| r.lease.backend.name() == "vxlan"))
                .then_some(())
        })
        .await;
    let deadline = Instant::now() + LIMIT;
    while !etcd.subnets().await.0.contains(&ours) {
        assert!(Instant::now() < deadline, "put back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    agent.stop().await;
}

/// A server that hung carries out a write that its host has long repeated elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_lease_that_appears_late_is_given_up() {
    let etcd = started(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 7)));
    let held = agent.held().await;
    let (entries, _) = etcd.subnets().await;
    let late = if held.subnet == subnet("10.244.5.0-24") { "10.244.6.0-24" } else { "10.244.5.0-24" };
    etcd.put_subnet(late, &entries[0].1, held.etcd_lease).await;
    let deadline = Instant::now() + LIMIT;
    while etcd.subnets().await.0 != entries {
        assert!(Instant::now() < deadline, "only the lease that is held stays: {:?}", etcd.subnets().await.0);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The etcd lease is that of the entry that stays.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(etcd.subnets().await.0, entries);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flannel_lease_of_this_host_is_taken_over() {
    let etcd = started(NETWORK).await;
    let flannel = etcd.grant(3600).await;
    etcd.put_subnet("10.244.38.0-24", FLANNEL, Some(flannel)).await;
    let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 7)));
    let held = agent.held().await;
    assert_eq!((held.subnet, held.origin), (subnet("10.244.38.0-24"), LeaseOrigin::TakenOver));
    let (entries, _) = etcd.subnets().await;
    assert_eq!((entries.len(), Some(entries[0].2)), (1, held.etcd_lease));
    assert_ne!(held.etcd_lease, Some(flannel));
    agent.stop().await;
}

/// Two hosts that are one: same identity, or same public IP.
async fn doubles(second: impl Fn(&mut crate::model::event::LeaseWish), words: &str, origin: LeaseOrigin) {
    let etcd = started(NETWORK).await;
    let mut config = etcd.config();
    config.keep_alive = Duration::from_secs(1);
    let mut first = Agent::start(config.clone(), Some(wish(NETWORK, 7)));
    let held = first.held().await;
    let mut copy = wish(NETWORK, 8);
    second(&mut copy);
    let mut double = Agent::start(config, Some(copy));
    let reason = double.wanted().await;
    assert!(reason.contains(words) && reason.contains("host7"), "{reason}");
    // Told once it is certain, and the first host keeps what it has.
    let certain = double.wanted().await;
    assert!(certain.contains(words) && !certain.contains("waiting"), "{certain}");
    assert_eq!(etcd.subnets().await.0.len(), 1);
    first.stop().await;
    let taken = double.held().await;
    assert_eq!((taken.subnet, taken.origin), (held.subnet, origin));
    double.stop().await;
    assert_eq!(etcd.subnets().await.0.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_host_is_refused_until_the_other_is_gone() {
    let same_id = |copy: &mut crate::model::event::LeaseWish| copy.node.id = "id-7".to_owned();
    doubles(same_id, "<state-dir>/node-id", LeaseOrigin::Reused).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_public_ip_in_use_is_refused_until_the_other_is_gone() {
    let same_ip = |copy: &mut crate::model::event::LeaseWish| copy.public_ip = wish(NETWORK, 7).public_ip;
    doubles(same_ip, "public IP 192.168.0.7 is in use by host host7", LeaseOrigin::TakenOver).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exhausted_pool_is_named_and_waited_for() {
    let network = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.1.0"}"#;
    let etcd = started(network).await;
    let mut first = Agent::start(etcd.config(), Some(wish(network, 1)));
    first.held().await;
    let mut second = Agent::start(etcd.config(), Some(wish(network, 2)));
    let reason = second.wanted().await;
    assert!(reason.contains("no free subnet: all 1 of 10.244.0.0/16 (/24) are leased"), "{reason}");
    first.stop().await;
    let begun = Instant::now();
    assert_eq!(release(&etcd.config(), "id-1").await.unwrap().released, ["10.244.1.0-24"]);
    second.held().await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_network_moves_the_host() {
    let etcd = started(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 7)));
    let old = agent.held().await;
    let network = r#"{"Network":"10.77.0.0/16"}"#;
    etcd.put_config(network).await;
    agent.wish.send(Some(wish(network, 7))).unwrap();
    assert!(agent.wanted().await.contains("is no subnet of the network 10.77.0.0/16 (/24) any more"));
    let new = agent.held().await;
    assert!(wish(network, 7).network.leases(&new.subnet) && new.subnet != old.subnet);
    assert_eq!(etcd.subnets().await.0.len(), 1, "the old one is gone");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_that_no_longer_fits_is_named_and_kept() {
    let etcd = started(NETWORK).await;
    etcd.put_subnet("10.9.0.0-24", r#"{"Node":{"Name":"x","Id":"id-7"}}"#, None).await;
    let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 7)));
    let reason = agent.wanted().await;
    assert!(
        reason.contains("the reservation 10.9.0.0/24 is no subnet of the network") && reason.contains("`10.9.0.0-24`"),
        "{reason}"
    );
    assert_eq!(etcd.subnets().await.0.len(), 1);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_entries_do_not_keep_a_host_out() {
    let etcd = started(NETWORK).await;
    let megabyte = "x".repeat(1 << 20);
    for (key, value) in [
        ("0.0.0.0-0", FLANNEL),
        ("10.244.0.0-16", "{}"),
        ("$(reboot)", "`reboot`"),
        ("10.244.3.0-24", &megabyte),
        ("", "[]"),
        ("10.244.4.0-24", "null"),
        ("10.244.5.0-24", &"[".repeat(9999)),
        ("a/b", "{}"),
    ] {
        etcd.put_subnet(key, value, None).await;
    }
    let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 9)));
    let refused = agent
        .find(|event| match event {
            StoreEvent::Snapshot(entries) => Some(entries.iter().filter(|entry| entry.value.is_err()).count()),
            _ => None,
        })
        .await;
    assert_eq!(refused, 7, "the default route is a key like any other here; the plan leaves it out");
    agent.held().await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_others_would_refuse_is_not_written() {
    let etcd = started(NETWORK).await;
    let mut wish = wish(NETWORK, 7);
    wish.node.name = "two words".to_owned();
    let mut agent = Agent::start(etcd.config(), Some(wish));
    let reason = agent.wanted().await;
    assert!(reason.contains("Node.Name is `two words`"), "{reason}");
    assert!(etcd.subnets().await.0.is_empty());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_changes_while_etcd_is_away() {
    let mut etcd = started(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 7)));
    let held = agent.held().await;
    etcd.kill();
    agent.find(|event| matches!(event, StoreEvent::Connection(_)).then_some(())).await;
    assert!(etcd.run().await);
    let deadline = Instant::now() + Duration::from_secs(3);
    while let Ok(event) = tokio::time::timeout_at(deadline.into(), agent.events.recv()).await {
        assert!(!matches!(event, Some(StoreEvent::Own(OwnLease::Wanted { .. }) | StoreEvent::Snapshot(_))), "{event:?}");
    }
    assert_eq!(etcd.subnets().await.0[0].2, held.etcd_lease.unwrap());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_holds_its_lease_asks_for_nothing() {
    let etcd = started(NETWORK).await;
    // Found again behind other hosts' changes, and after a new connection: each must come to rest.
    for _ in 0..2 {
        let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 7)));
        agent.held().await;
        for n in 100..103 {
            etcd.put_subnet(&format!("10.244.{n}.0-24"), FLANNEL.replace("0.7", "9.9").as_str(), None).await;
        }
        while tokio::time::timeout(Duration::from_millis(500), agent.events.recv()).await.is_ok() {}
        let before = (etcd.requests("Range").await, etcd.requests("LeaseKeepAlive").await);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!((etcd.requests("Range").await, etcd.requests("LeaseKeepAlive").await), before);
        agent.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_the_agent_has_not_seen_is_waited_for() {
    let etcd = started(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(wish(NETWORK, 7)));
    let held = agent.held().await;
    etcd.put_config(r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0"}"#).await;
    let (entries, _) = etcd.subnets().await;
    // Touched while the wish is still the old one: looked at once, not again and again.
    etcd.put_config(r#"{"Network":"10.244.0.0/15"}"#).await;
    etcd.put_subnet(&entries[0].0, &entries[0].1, Some(entries[0].2)).await;
    while tokio::time::timeout(Duration::from_millis(500), agent.events.recv()).await.is_ok() {}
    let before = etcd.requests("Range").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(etcd.requests("Range").await, before);
    let mut wish = wish(r#"{"Network":"10.244.0.0/15"}"#, 7);
    wish.vtep.v4 = Some(crate::model::Mac::local([2, 9, 9, 9, 9, 9]));
    agent.wish.send(Some(wish)).unwrap();
    agent.find(|event| matches!(event, StoreEvent::Upsert(e) if e.key == held.subnet.to_key()).then_some(())).await;
    agent.stop().await;
}
