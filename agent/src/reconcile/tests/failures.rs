//! Entries that the kernel rejects, and their dependent entries.

use super::*;

/// A foreign link hides the device, so the entry's retry produces no op. Its deadline must not stay in the past.
#[tokio::test]
async fn due_entry_without_op_is_rescheduled() {
    let fixture = Fixture::ready([1]).await;
    let vxlan = Device::vxlan(Family::V4, Vni::DEFAULT);
    let neighbour = Key::Neigh(vxlan, subnet(2).get(Family::V4).unwrap().base());
    fixture.kernel.lock().failing_keys.insert(neighbour.clone());
    fixture.send(StoreEvent::Upsert(entry(2, 2))).await;
    assert_eq!(fixture.status().await.data_path.failed.len(), 1);
    let (key, mut foreign) = link(&fixture, vxlan);
    foreign.kind = LinkKind::Foreign { kind: "bridge".to_owned() };
    {
        let mut kernel = fixture.kernel.lock();
        kernel.state.insert(key.clone(), Value::Link(Box::new(foreign)));
        kernel.failing_keys.insert(key);
    }
    fixture.events.send(KernelEvent::ResyncNeeded { reason: "test" }).await.unwrap();
    fixture.status().await;
    // Longer than the first pauses, so that the entry is due several times.
    let turns = fixture.wakeups_within(Duration::from_secs(1)).await;
    assert!(turns < 50, "{turns} loop iterations in a second");
    let status = fixture.status().await;
    assert!(status.problems.iter().any(|problem| problem.contains("the first: set link ovx.1")), "{:?}", status.problems);
}

#[tokio::test]
async fn wrong_deadline_causes_bounded_wakeups() {
    // With this interval each full comparison is followed by the next at once.
    let mut fixture = Fixture::start_with(FakeKernel::default(), Duration::ZERO);
    fixture.join([1]).await;
    fixture.ready.wait_for(|ready| *ready).await.unwrap();
    let turns = fixture.wakeups_within(Duration::from_secs(1)).await;
    assert!((2..100).contains(&turns), "{turns} loop iterations in a second");
}

#[tokio::test]
async fn entries_wait_for_failed_device() {
    let kernel = FakeKernel::default();
    let vxlan = Device::vxlan(Family::V4, Vni::DEFAULT);
    let device = Key::Link(vxlan.name().into());
    kernel.lock().failing_keys.insert(device.clone());
    let mut fixture = Fixture::start_with(kernel, Duration::from_secs(3600));
    fixture.join(1..=5).await;
    let status = fixture.status().await;
    let failed: Vec<&str> = status.data_path.failed.iter().map(|failed| failed.entry.as_str()).collect();
    assert!(matches!(failed[..], [only] if only.starts_with("set link ovx.1 ")), "{failed:?}");
    let problem = status.problems.iter().find(|problem| problem.contains("cannot be programmed")).expect("a problem");
    assert!(problem.starts_with("1 entry cannot be programmed: set link ovx.1 "), "{problem}");
    // Address, four sysctls, and four entries for each peer.
    assert!(problem.ends_with("; 25 more depend on it and wait"), "{problem}");
    {
        let mut kernel = fixture.kernel.lock();
        let on_device = |op: &Op| matches!(op, Op::Set(key, value) if device_of(key, value, &kernel.state) == Some(vxlan));
        assert!(!kernel.applied_ops.iter().any(on_device), "{:?}", kernel.applied_ops);
        assert!(
            kernel.state.contains_key(&Key::Link(Device::bridge(Vni::DEFAULT).name().into())),
            "the bridge is created nevertheless"
        );
        kernel.failing_keys.clear();
    }
    tokio::time::timeout(Duration::from_secs(5), fixture.ready.wait_for(|ready| *ready)).await.unwrap().unwrap();
    assert!((1..=5).all(|number| fixture.route(number).is_some()));
}

#[tokio::test]
async fn route_waits_for_failed_nexthop() {
    let mut fixture = Fixture::ready([1]).await;
    let next_hops =
        || fixture.kernel.lock().state.keys().filter(|key| matches!(key, Key::Nexthop(_))).cloned().collect::<Vec<_>>();
    let Some(Key::Nexthop(first)) = next_hops().pop() else { panic!("a next hop") };
    fixture.kernel.lock().failing_keys.extend([Key::Nexthop(first + 1), route(2)]);
    fixture.send(StoreEvent::Upsert(entry(2, 2))).await;
    let status = fixture.status().await;
    let failed: Vec<&str> = status.data_path.failed.iter().map(|failed| failed.entry.as_str()).collect();
    assert!(
        matches!(failed[..], [first, second] if first.starts_with("set nexthop") && second.starts_with("set route")),
        "{failed:?}"
    );
    let problem = status.problems.iter().find(|problem| problem.contains("cannot be programmed")).expect("a problem");
    assert!(problem.starts_with("1 entry cannot be programmed: set nexthop"), "{problem}");
    fixture.kernel.lock().failing_keys.clear();
    tokio::time::timeout(Duration::from_secs(5), fixture.ready.wait_for(|ready| *ready)).await.unwrap().unwrap();
    assert!(fixture.route(2).is_some());
}

/// The kernel deletes a device's neighbours when its MAC changes, so a neighbour that cannot be set again is missing.
#[tokio::test]
async fn neighbour_of_device_with_new_mac_is_retried() {
    let fixture = Fixture::ready([1]).await;
    let vxlan = Device::vxlan(Family::V4, Vni::DEFAULT);
    let neighbour = Key::Neigh(vxlan, subnet(1).get(Family::V4).unwrap().base());
    let (key, mut changed) = link(&fixture, vxlan);
    changed.mac = Some(Mac([2; 6]));
    let changed = Value::Link(Box::new(changed));
    {
        let mut world = fixture.kernel.lock();
        world.state.insert(key.clone(), changed.clone());
        world.failing_keys.insert(neighbour.clone());
    }
    fixture.events.send(KernelEvent::Changed(vec![(key, Some(changed))])).await.unwrap();
    fixture.wait_status("the failure", |status| status.data_path.failed.len() == 1).await;
    assert!(!fixture.kernel.lock().state.contains_key(&neighbour));
    fixture.kernel.lock().failing_keys.clear();
    fixture.wait_status("the retry", |status| status.data_path.failed.is_empty()).await;
    assert!(fixture.kernel.lock().state.contains_key(&neighbour));
}
