//! A lost lease, an outage of the store, and invalid values in it: the data path stays.

use super::*;

#[tokio::test]
async fn lost_lease_keeps_data_path() {
    let fixture = Fixture::ready([1, 2]).await;
    fixture.kernel.lock().applied_ops.clear();
    fixture.send(StoreEvent::Own(OwnLease::NotHeld { reason: "it expired".to_owned() })).await;
    fixture.send(StoreEvent::Connection(Connection::Down { error: "no route to host".to_owned() })).await;
    let status = fixture.status().await;
    assert!(!status.ready && status.health == api::Health::Degraded, "{status:?}");
    assert!(status.problems.iter().any(|problem| problem.contains("it expired")), "{:?}", status.problems);
    assert!(fixture.kernel.lock().applied_ops.is_empty());
    assert_eq!(fixture.lease_request.borrow().as_ref().and_then(|request| request.preferred), Some(subnet(100)));
    // Drift is still repaired.
    fixture.delete(route(1)).await;
    fixture.status().await;
    assert!(fixture.route(1).is_some());
}

#[tokio::test]
async fn store_outage_beyond_lease_ttl_clears_readiness() {
    let mut fixture = Fixture::ready([1]).await;
    fixture.kernel.lock().applied_ops.clear();
    let down = || StoreEvent::Connection(Connection::Down { error: "no route to host".to_owned() });
    let begun = Instant::now();
    fixture.send(down()).await;
    // A second event with another error must not extend the lease's time.
    fixture.send(StoreEvent::Connection(Connection::Down { error: "connection refused".to_owned() })).await;
    fixture.ready.wait_for(|ready| !*ready).await.unwrap();
    assert!(begun.elapsed() >= LEASE_TTL, "ready until the lease expires");
    let status = fixture.status().await;
    assert!(status.problems.iter().any(|problem| problem.contains("another host may get its subnet")), "{:?}", status.problems);
    assert_eq!(fixture.kernel.lock().applied_ops, [], "the data path is unchanged");
    fixture.send(StoreEvent::Connection(Connection::Up { position: StorePosition(9) })).await;
    fixture.ready.wait_for(|ready| *ready).await.unwrap();
    // A reservation does not expire.
    let reservation = HeldLease { subnet: subnet(100), expiry: None, origin: LeaseOrigin::Reused };
    fixture.send(StoreEvent::Own(OwnLease::Held(reservation))).await;
    fixture.send(down()).await;
    fixture.status().await;
    advance_clock(2 * LEASE_TTL);
    assert!(fixture.status().await.ready);
    // A lease that expires does, in the same outage.
    fixture.send(held_lease(100)).await;
    fixture.ready.wait_for(|ready| !*ready).await.unwrap();
}

#[tokio::test]
async fn invalid_config_keeps_last_valid_one() {
    let fixture = Fixture::ready([1]).await;
    fixture.kernel.lock().applied_ops.clear();
    let errors = NetworkConfig::parse(r#"{"Network":"10.244.0.1/16"}"#).unwrap_err();
    fixture.send(StoreEvent::Config(Some(Err(errors)))).await;
    let status = fixture.status().await;
    assert!(status.ready && status.health == api::Health::Degraded);
    assert_eq!(status.store.config_errors[0].field, "Network");
    assert!(fixture.kernel.lock().applied_ops.is_empty());
}

#[tokio::test]
async fn invalid_leases_are_reported_and_ignored() {
    let fixture = Fixture::ready([1]).await;
    let key = "10.244.7.0-24".to_owned();
    let kind = RejectReason::Malformed { detail: "expected value at line 1".to_owned() };
    fixture.send(StoreEvent::Upsert(StoreEntry { key: key.clone(), value: Err(RejectedLease { key: key.clone(), kind }) })).await;
    let mut own_address = entry(8, 100);
    if let Ok(record) = &mut own_address.value {
        record.lease.backend = BackendData::Vxlan { vni: Vni::DEFAULT, vtep: PerFamily { v4: Some(Mac([2; 6])), v6: None } };
    }
    fixture.send(StoreEvent::Upsert(own_address)).await;
    let status = fixture.status().await;
    assert!(status.ready && status.health == api::Health::Degraded);
    let words: Vec<_> = status.store.refused.iter().map(|refusal| refusal.kind.as_str()).collect();
    assert_eq!(words, ["malformed", "own-address"]);
    assert!(fixture.route(7).is_none() && fixture.route(8).is_none() && fixture.route(1).is_some());
    fixture.send(StoreEvent::Remove { key }).await;
    assert_eq!(fixture.status().await.store.refused.len(), 1);
}
