//! Tests of one host's lease: acquiring, keeping, losing and changing it.

use std::time::{Duration, Instant};

use super::harness::*;
use crate::model::event::{LeaseOrigin, OwnLease, StoreEvent};
use crate::model::{PeerEndpoint, PerFamily};
use crate::store::host_lease::HostLease;
use crate::store::lease::HeldLease;
use crate::store::{connect, release};

const FLANNEL: &str =
    r#"{"PublicIP":"192.168.0.7","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"4a:de:38:28:a5:6b"}}"#;

async fn start_etcd(network: &str) -> Etcd {
    let etcd = Etcd::start().await;
    etcd.put_config(network).await;
    etcd
}

#[tokio::test(flavor = "multi_thread")]
async fn restart_reuses_lease_without_write() {
    for network in [NETWORK, DUAL, r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#] {
        let etcd = start_etcd(network).await;
        let mut agent = Agent::start(etcd.config(), Some(lease_request(network, 7)));
        let held = agent.next_held().await;
        assert_eq!(held.origin, LeaseOrigin::Acquired);
        assert!(lease_request(network, 7).network.allows_subnet(&held.subnet), "{}", held.subnet);
        agent.stop().await;
        let (entries, revision) = etcd.subnets().await;
        assert_eq!((entries.len(), entries[0].0.as_str()), (1, held.subnet.to_key().as_str()));
        assert_eq!(Some(entries[0].2), held.etcd_lease);
        let mut agent = Agent::start(etcd.config(), Some(lease_request(network, 7)));
        assert_eq!(agent.next_held().await, HeldLease { origin: LeaseOrigin::Reused, ..held });
        agent.stop().await;
        assert_eq!(etcd.subnets().await, (entries, revision), "nothing was written");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn remembered_subnet_is_preferred() {
    let etcd = start_etcd(NETWORK).await;
    let mut request = lease_request(NETWORK, 7);
    request.preferred = Some(subnet("10.244.77.0-24"));
    let mut agent = Agent::start(etcd.config(), Some(request.clone()));
    assert_eq!(agent.next_held().await.subnet, subnet("10.244.77.0-24"));
    agent.stop().await;
    release(&etcd.config(), "id-7").await.unwrap();
    // The subnet is taken, even though the value is invalid: the agent chooses another one.
    etcd.put_subnet("10.244.77.9-24", "rubbish", None).await;
    let mut agent = Agent::start(etcd.config(), Some(request));
    assert_ne!(agent.next_held().await.subnet, subnet("10.244.77.0-24"));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_request_is_written_with_same_etcd_lease() {
    let etcd = start_etcd(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 7)));
    let held = agent.next_held().await;
    let mut changed = lease_request(NETWORK, 8);
    changed.node = lease_request(NETWORK, 7).node;
    let begun = Instant::now();
    agent.lease_request.send(Some(changed.clone())).unwrap();
    agent
        .find(|event| {
            matches!(event, StoreEvent::Upsert(e) if e.value.as_ref().unwrap().lease.public_ip == changed.public_ip).then_some(())
        })
        .await;
    assert!(begun.elapsed() < Duration::from_secs(1), "an entry that this process holds needs no liveness check");
    let (entries, _) = etcd.subnets().await;
    assert_eq!((entries.len(), Some(entries[0].2)), (1, held.etcd_lease));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn renewal_emits_no_event() {
    let etcd = start_etcd(NETWORK).await;
    let mut config = etcd.config();
    config.lease_ttl = Duration::from_secs(3);
    let mut agent = Agent::start(config, Some(lease_request(NETWORK, 7)));
    let held = agent.next_held().await;
    while tokio::time::timeout(Duration::from_millis(500), agent.events.recv()).await.is_ok() {}
    let (_, before) = etcd.subnets().await;
    let quiet = tokio::time::timeout(Duration::from_secs(6), agent.events.recv()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    let (entries, after) = etcd.subnets().await;
    assert_eq!((before, entries.len(), Some(entries[0].2)), (after, 1, held.etcd_lease));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reservation_is_kept_across_restart() {
    let etcd = start_etcd(NETWORK).await;
    // A reservation made by hand with only the address, one that flannel wrote, and one with only the identity.
    for value in [r#"{"PublicIP":"192.168.0.7"}"#, FLANNEL, r#"{"Node":{"Name":"x","Id":"id-7"}}"#] {
        etcd.put_subnet("10.244.55.0-24", value, None).await;
        let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 7)));
        let held = agent.next_held().await;
        assert_eq!((held.subnet, held.etcd_lease), (subnet("10.244.55.0-24"), None));
        let mut changed = lease_request(NETWORK, 7);
        changed.backend = lease_request(NETWORK, 9).backend;
        agent.lease_request.send(Some(changed.clone())).unwrap();
        let mac = changed.backend.endpoints().v4.and_then(PeerEndpoint::mac).unwrap().to_string();
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
async fn lease_can_become_reservation() {
    let etcd = start_etcd(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 7)));
    let held = agent.next_held().await;
    let (entries, _) = etcd.subnets().await;
    etcd.put_subnet(&entries[0].0, &entries[0].1, None).await;
    assert_eq!(agent.next_held().await, HeldLease { etcd_lease: None, ..held });
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_lease_is_reacquired() {
    let etcd = start_etcd(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 7)));
    let first = agent.next_held().await;
    etcd.client().await.lease_revoke(first.etcd_lease.unwrap()).await.unwrap();
    assert!(agent.next_not_held().await.contains("is gone"));
    let second = agent.next_held().await;
    assert_eq!((second.subnet, second.origin), (first.subnet, LeaseOrigin::Acquired));
    assert_ne!(second.etcd_lease, first.etcd_lease);
    etcd.client().await.delete(format!("{PREFIX}/subnets/{}", first.subnet.to_key()), None).await.unwrap();
    assert!(agent.next_not_held().await.contains("is gone"));
    let third = agent.next_held().await;
    assert_eq!(third.subnet, first.subnet);
    let leases: Vec<i64> = etcd.client().await.leases().await.unwrap().leases().iter().map(|lease| lease.id()).collect();
    assert_eq!(leases, [third.etcd_lease.unwrap()], "only the held etcd lease remains");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lease_expired_during_outage_is_reacquired() {
    let mut etcd = start_etcd(NETWORK).await;
    let mut config = etcd.config();
    config.lease_ttl = Duration::from_secs(3);
    let mut agent = Agent::start(config, Some(lease_request(NETWORK, 7)));
    let first = agent.next_held().await;
    etcd.kill();
    assert!(etcd.run().await);
    // An operator deletes the entries before the agent has reconnected.
    etcd.client().await.lease_revoke(first.etcd_lease.unwrap()).await.unwrap();
    assert_eq!(agent.next_held().await.subnet, first.subnet);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn overwritten_lease_is_not_contested() {
    let etcd = start_etcd(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 7)));
    let first = agent.next_held().await;
    let lease = etcd.grant(60).await;
    let foreign = FLANNEL.replace("192.168.0.7", "192.168.9.9").replace("}}", r#"},"Node":{"Name":"other","Id":"other"}}"#);
    etcd.put_subnet(&first.subnet.to_key(), &foreign, Some(lease)).await;
    assert!(agent.next_not_held().await.contains("overwritten by host other (identity other, public IP 192.168.9.9)"));
    let second = agent.next_held().await;
    assert_ne!(second.subnet, first.subnet);
    assert!(etcd.subnets().await.0.iter().any(|(key, value, id)| (key, value, id) == (&first.subnet.to_key(), &foreign, &lease)));
    // An altered entry that still names this host is restored.
    let (entries, _) = etcd.subnets().await;
    let ours = entries.into_iter().find(|(key, _, _)| *key == second.subnet.to_key()).unwrap();
    etcd.put_subnet(&ours.0, &ours.1.replace("\"VNI\":1", "\"VNI\":9"), Some(ours.2)).await;
    agent
        .find(|event| {
            matches!(event, StoreEvent::Upsert(e) if e.value.as_ref().is_ok_and(|r| r.lease.backend.name() == "vxlan"))
                .then_some(())
        })
        .await;
    let deadline = Instant::now() + TEST_TIMEOUT;
    while !etcd.subnets().await.0.contains(&ours) {
        assert!(Instant::now() < deadline, "the entry is not restored");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    agent.stop().await;
}

/// A hung server executes a write after its host has repeated it through another server.
#[tokio::test(flavor = "multi_thread")]
async fn late_second_lease_is_released() {
    let etcd = start_etcd(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 7)));
    let held = agent.next_held().await;
    let (entries, _) = etcd.subnets().await;
    let late = if held.subnet == subnet("10.244.5.0-24") { "10.244.6.0-24" } else { "10.244.5.0-24" };
    // Both entries are bound to the same etcd lease, so it must not be revoked: the next round needs it. A round begins while the
    // keeper may still handle the one before. The events of all fit into the channel.
    for _ in 0..25 {
        etcd.put_subnet(late, &entries[0].1, held.etcd_lease).await;
        let deadline = Instant::now() + TEST_TIMEOUT;
        while etcd.subnets().await.0 != entries {
            assert!(Instant::now() < deadline, "the second lease is not released: {:?}", etcd.subnets().await.0);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn own_flannel_lease_is_taken_over() {
    let etcd = start_etcd(NETWORK).await;
    let flannel = etcd.grant(3600).await;
    etcd.put_subnet("10.244.38.0-24", FLANNEL, Some(flannel)).await;
    let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 7)));
    let held = agent.next_held().await;
    assert_eq!((held.subnet, held.origin), (subnet("10.244.38.0-24"), LeaseOrigin::TakenOver));
    let (entries, _) = etcd.subnets().await;
    assert_eq!((entries.len(), Some(entries[0].2)), (1, held.etcd_lease));
    assert_ne!(held.etcd_lease, Some(flannel));
    agent.stop().await;
}

/// Starts a second host with the same identity or public IP, and asserts that it waits.
async fn assert_duplicate_host_waits(
    second: impl Fn(&mut crate::model::event::LeaseRequest),
    expected_text: &str,
    origin: LeaseOrigin,
) {
    let etcd = start_etcd(NETWORK).await;
    let mut config = etcd.config();
    config.keep_alive = Duration::from_secs(1);
    let mut first = Agent::start(config.clone(), Some(lease_request(NETWORK, 7)));
    let held = first.next_held().await;
    let mut copy = lease_request(NETWORK, 8);
    second(&mut copy);
    let mut duplicate = Agent::start(config, Some(copy));
    let reason = duplicate.next_not_held().await;
    assert!(reason.contains(expected_text) && reason.contains("host7"), "{reason}");
    // The second report comes once the liveness is certain. The first host keeps its lease.
    let second_reason = duplicate.next_not_held().await;
    assert!(second_reason.contains(expected_text) && !second_reason.contains("checking"), "{second_reason}");
    assert_eq!(etcd.subnets().await.0.len(), 1);
    first.stop().await;
    let acquired = duplicate.next_held().await;
    assert_eq!((acquired.subnet, acquired.origin), (held.subnet, origin));
    duplicate.stop().await;
    assert_eq!(etcd.subnets().await.0.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn copied_host_waits_until_original_stops() {
    let same_id = |copy: &mut crate::model::event::LeaseRequest| copy.node.id = "id-7".to_owned();
    assert_duplicate_host_waits(same_id, "<state-dir>/node-id", LeaseOrigin::Reused).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn duplicate_public_ip_waits_until_first_stops() {
    let same_ip = |copy: &mut crate::model::event::LeaseRequest| copy.public_ip = lease_request(NETWORK, 7).public_ip;
    assert_duplicate_host_waits(same_ip, "public IP 192.168.0.7 is in use by host host7", LeaseOrigin::TakenOver).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exhausted_pool_is_reported_and_retried() {
    let network = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.1.0"}"#;
    let etcd = start_etcd(network).await;
    let mut first = Agent::start(etcd.config(), Some(lease_request(network, 1)));
    first.next_held().await;
    let mut second = Agent::start(etcd.config(), Some(lease_request(network, 2)));
    let reason = second.next_not_held().await;
    assert!(reason.contains("no free subnet: all 1 of 10.244.0.0/16 (/24) are leased"), "{reason}");
    first.stop().await;
    let begun = Instant::now();
    assert_eq!(release(&etcd.config(), "id-1").await.unwrap().released, ["10.244.1.0-24"]);
    second.next_held().await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_network_moves_host_subnet() {
    let etcd = start_etcd(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 7)));
    let old = agent.next_held().await;
    let network = r#"{"Network":"10.77.0.0/16"}"#;
    etcd.put_config(network).await;
    agent.lease_request.send(Some(lease_request(network, 7))).unwrap();
    assert!(agent.next_not_held().await.contains("is not a subnet of the network 10.77.0.0/16 (/24)"));
    let new = agent.next_held().await;
    assert!(lease_request(network, 7).network.allows_subnet(&new.subnet) && new.subnet != old.subnet);
    assert_eq!(etcd.subnets().await.0.len(), 1, "the old one is gone");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn misfit_reservation_is_reported_and_kept() {
    let etcd = start_etcd(NETWORK).await;
    etcd.put_subnet("10.9.0.0-24", r#"{"Node":{"Name":"x","Id":"id-7"}}"#, None).await;
    let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 7)));
    let reason = agent.next_not_held().await;
    assert!(
        reason.contains("the reservation 10.9.0.0/24 is not a subnet of the network") && reason.contains("`10.9.0.0-24`"),
        "{reason}"
    );
    assert_eq!(etcd.subnets().await.0.len(), 1);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_entries_do_not_block_acquisition() {
    let etcd = start_etcd(NETWORK).await;
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
    let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 9)));
    let (snapshot, own) = agent.snapshot_and_own().await;
    let refused = snapshot.iter().filter(|entry| entry.value.is_err()).count();
    assert_eq!(refused, 7, "the store accepts the default route's key; only the plan rejects it");
    assert!(matches!(own, OwnLease::Held(_)), "{own:?}");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn value_rejected_by_peers_is_not_written() {
    let etcd = start_etcd(NETWORK).await;
    let mut request = lease_request(NETWORK, 7);
    request.node.name = "two words".to_owned();
    let mut agent = Agent::start(etcd.config(), Some(request));
    let reason = agent.next_not_held().await;
    assert!(reason.contains("Node.Name is `two words`"), "{reason}");
    assert!(etcd.subnets().await.0.is_empty());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lease_state_is_unchanged_during_outage() {
    let mut etcd = start_etcd(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 7)));
    let held = agent.next_held().await;
    etcd.kill();
    agent.find(|event| matches!(event, StoreEvent::Connection(_)).then_some(())).await;
    assert!(etcd.run().await);
    let deadline = Instant::now() + Duration::from_secs(3);
    while let Ok(event) = tokio::time::timeout_at(deadline.into(), agent.events.recv()).await {
        assert!(!matches!(event, Some(StoreEvent::Own(OwnLease::NotHeld { .. }) | StoreEvent::Snapshot(_))), "{event:?}");
    }
    assert_eq!(etcd.subnets().await.0[0].2, held.etcd_lease.unwrap());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn held_lease_causes_no_extra_requests() {
    let etcd = start_etcd(NETWORK).await;
    // The lease is found again after other hosts' changes and after a new connection. The keeper must settle each time.
    for _ in 0..2 {
        let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 7)));
        agent.next_held().await;
        for n in 100..103 {
            etcd.put_subnet(&format!("10.244.{n}.0-24"), FLANNEL.replace("0.7", "9.9").as_str(), None).await;
        }
        while tokio::time::timeout(Duration::from_millis(500), agent.events.recv()).await.is_ok() {}
        let before = (etcd.request_count("Range").await, etcd.request_count("LeaseKeepAlive").await);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!((etcd.request_count("Range").await, etcd.request_count("LeaseKeepAlive").await), before);
        etcd.subnets().await;
        assert!(etcd.request_count("Range").await > before.0, "etcd counts reads");
        agent.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unseen_configuration_delays_acquisition() {
    let etcd = start_etcd(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), Some(lease_request(NETWORK, 7)));
    let held = agent.next_held().await;
    etcd.put_config(r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0"}"#).await;
    let (entries, _) = etcd.subnets().await;
    // The entry changes while the request still has the old network: the keeper reads one snapshot and does not loop.
    etcd.put_config(r#"{"Network":"10.244.0.0/15"}"#).await;
    etcd.put_subnet(&entries[0].0, &entries[0].1, Some(entries[0].2)).await;
    while tokio::time::timeout(Duration::from_millis(500), agent.events.recv()).await.is_ok() {}
    let before = etcd.request_count("Range").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(etcd.request_count("Range").await, before);
    etcd.subnets().await;
    assert!(etcd.request_count("Range").await > before, "etcd counts reads");
    let mut request = lease_request(r#"{"Network":"10.244.0.0/15"}"#, 7);
    request.backend = vxlan(PerFamily { v4: Some(crate::model::Mac::local([2, 9, 9, 9, 9, 9])), v6: None });
    agent.lease_request.send(Some(request)).unwrap();
    agent.find(|event| matches!(event, StoreEvent::Upsert(e) if e.key == held.subnet.to_key()).then_some(())).await;
    agent.stop().await;
}

/// A network that stops and starts again at once uses its etcd lease by another value. It does not wait for the renewal that is
/// due for the first one.
#[tokio::test]
async fn lease_that_is_used_again_is_renewed_at_once() {
    let etcd = Etcd::start().await;
    let session = connect::connect(&etcd.config()).await.unwrap();
    let (leases, id) = (HostLease::new(&etcd.config()), etcd.grant(3600).await);
    let first = leases.use_lease(id);
    let used_again = async {
        first.renewed().await.unwrap();
        drop(first);
        tokio::time::timeout(Duration::from_secs(10), leases.use_lease(id).renewed()).await
    };
    tokio::select! {
        renewed = used_again => renewed.expect("renewed at once").unwrap(),
        error = leases.renew(&session) => panic!("{error}"),
    }
}
