//! Entries that the kernel refuses, and those that depend on them.

use super::*;

/// A foreign link hides the device: the entry's retry gives no op, and its deadline must not stay in the past.
#[tokio::test]
async fn due_entry_without_op_gets_another_pause() {
    let fixture = Fixture::ready([1]).await;
    let vxlan = Device::vxlan(Family::V4, Vni::DEFAULT);
    let neighbour = Key::Neigh(vxlan, subnet(2).get(Family::V4).unwrap().base());
    fixture.kernel.world().refuse.insert(neighbour.clone());
    fixture.send(StoreEvent::Upsert(entry(2, 2))).await;
    assert_eq!(fixture.status().await.data_path.failed.len(), 1);
    let (key, mut foreign) = link(&fixture, vxlan);
    foreign.kind = LinkKind::Foreign { kind: "bridge".to_owned() };
    {
        let mut world = fixture.kernel.world();
        world.state.insert(key.clone(), Value::Link(Box::new(foreign)));
        world.refuse.insert(key);
    }
    fixture.events.send(KernelEvent::Stale { reason: "test" }).await.unwrap();
    fixture.status().await;
    // Longer than the first pauses, so that the entry is due several times.
    let turns = fixture.turns_within(Duration::from_secs(1)).await;
    assert!(turns < 50, "{turns} turns of the loop in a second");
    let status = fixture.status().await;
    assert!(status.problems.iter().any(|problem| problem.contains("the first: set link ovx.1")), "{:?}", status.problems);
}

#[tokio::test]
async fn wrong_deadline_costs_a_bounded_number_of_turns() {
    // Each full comparison is followed by the next at once.
    let mut fixture = Fixture::start_with(FakeKernel::default(), Duration::ZERO);
    fixture.join([1]).await;
    fixture.ready.wait_for(|ready| *ready).await.unwrap();
    let turns = fixture.turns_within(Duration::from_secs(1)).await;
    assert!((2..100).contains(&turns), "{turns} turns of the loop in a second");
}

#[tokio::test]
async fn entries_on_a_failed_device_are_not_tried_and_come_with_it() {
    let kernel = FakeKernel::default();
    let vxlan = Device::vxlan(Family::V4, Vni::DEFAULT);
    let device = Key::Link(vxlan.name().into());
    kernel.world().refuse.insert(device.clone());
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
        let mut world = fixture.kernel.world();
        let on_device = |op: &Op| matches!(op, Op::Set(key, value) if device_of(key, value, &world.state) == Some(vxlan));
        assert!(!world.applied.iter().any(on_device), "{:?}", world.applied);
        assert!(
            world.state.contains_key(&Key::Link(Device::bridge(Vni::DEFAULT).name().into())),
            "the bridge is made all the same"
        );
        world.refuse.clear();
    }
    tokio::time::timeout(Duration::from_secs(5), fixture.ready.wait_for(|ready| *ready)).await.unwrap().unwrap();
    assert!((1..=5).all(|number| fixture.route(number).is_some()));
}

#[tokio::test]
async fn route_waits_for_its_failed_next_hop_and_comes_with_it() {
    let mut fixture = Fixture::ready([1]).await;
    let next_hops =
        || fixture.kernel.world().state.keys().filter(|key| matches!(key, Key::Nexthop(_))).cloned().collect::<Vec<_>>();
    let Some(Key::Nexthop(first)) = next_hops().pop() else { panic!("a next hop") };
    fixture.kernel.world().refuse.extend([Key::Nexthop(first + 1), route(2)]);
    fixture.send(StoreEvent::Upsert(entry(2, 2))).await;
    let status = fixture.status().await;
    let failed: Vec<&str> = status.data_path.failed.iter().map(|failed| failed.entry.as_str()).collect();
    assert!(
        matches!(failed[..], [first, second] if first.starts_with("set nexthop") && second.starts_with("set route")),
        "{failed:?}"
    );
    let problem = status.problems.iter().find(|problem| problem.contains("cannot be programmed")).expect("a problem");
    assert!(problem.starts_with("1 entry cannot be programmed: set nexthop"), "{problem}");
    fixture.kernel.world().refuse.clear();
    tokio::time::timeout(Duration::from_secs(5), fixture.ready.wait_for(|ready| *ready)).await.unwrap().unwrap();
    assert!(fixture.route(2).is_some());
}
