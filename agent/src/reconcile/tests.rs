//! The loop against a kernel made of a map, for faults that a real kernel shows only by luck. Real kernels are in `tests/e2e`.

mod failures;
mod fake;

use self::fake::FakeKernel;
use super::*;
use crate::model::event::{HeldLease, LeaseOrigin, StoreEntry};
use crate::model::{Backend, Family, Lease, Record, RefusalKind, Vni};
use crate::plan::state::{LinkState, device_of};
use crate::plan::{LinkKind, Op, Value};

/// How long the lease lasts without the store.
const LEASE_LASTS: Duration = Duration::from_millis(500);

struct FakeMemory;

impl Memory for FakeMemory {
    fn mac(&mut self, device: Device, _: Option<Mac>) -> Mac {
        Mac([2, 0, 0, 0, 0, if device == Device::bridge(Vni::DEFAULT) { 0xb0 } else { 0x64 }])
    }
    fn preferred(&self) -> Option<Subnet> {
        None
    }
    fn published(&self) -> PerFamily<IpAddr> {
        PerFamily::default()
    }
    fn sysctl_was(&mut self, _: &str, _: &str) {}
    fn sysctl_before(&self, _: &str) -> Option<String> {
        None
    }
}

/// A running reconciler and the other ends of its channels.
struct Fixture {
    kernel: FakeKernel,
    store: mpsc::Sender<StoreEvent>,
    events: mpsc::Sender<KernelEvent>,
    queries: mpsc::Sender<Query>,
    ready: watch::Receiver<bool>,
    beats: watch::Receiver<u64>,
    wish: watch::Receiver<Option<LeaseWish>>,
    stop: CancellationToken,
    endpoints: watch::Sender<Vec<Arc<Endpoint>>>,
    programmed: watch::Receiver<Vec<Arc<Endpoint>>>,
    _task: tokio::task::JoinHandle<()>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn network() -> NetworkConfig {
    NetworkConfig::parse(r#"{"Network":"10.244.0.0/16"}"#).unwrap().config
}

fn subnet(number: u8) -> Subnet {
    Subnet::from_key(&format!("10.244.{number}.0-24")).unwrap()
}

fn entry(number: u8, ip: u8) -> StoreEntry {
    let subnet = subnet(number);
    let lease = Lease {
        public_ip: PerFamily { v4: Some(format!("192.0.2.{ip}").parse().unwrap()), v6: None },
        backend: Backend::Vxlan { vni: Vni::DEFAULT, vtep: PerFamily { v4: Some(Mac([2, 0, 0, 0, 0, ip])), v6: None } },
        node: None,
    };
    let record = Record { subnet, lease, create_revision: i64::from(number), mod_revision: 1, etcd_lease: Some(1) };
    StoreEntry { key: subnet.to_key(), value: Ok(record) }
}

impl Fixture {
    fn start() -> Fixture {
        Fixture::start_with(FakeKernel::default(), Duration::from_secs(3600))
    }

    fn start_with(kernel: FakeKernel, resync: Duration) -> Fixture {
        let settings = Settings {
            node: Node { name: "h".to_owned(), id: "id".to_owned() },
            selection: Selection::default(),
            masquerade: true,
            tx_checksum: true,
            docker: false,
            nexthop_objects: true,
            resync,
            lease_lasts: LEASE_LASTS,
            store_endpoints: Vec::new(),
            store_prefix: "/test".to_owned(),
        };
        let (store, store_events) = mpsc::channel(64);
        let (events, kernel_events) = mpsc::channel(64);
        let (queries, query_events) = mpsc::channel(8);
        let (endpoints, plugged) = watch::channel(Vec::new());
        let (programmed_in, programmed) = watch::channel(Vec::new());
        let (wish_in, wish) = watch::channel(None);
        let (ready_in, ready) = watch::channel(false);
        let (beat, beats) = watch::channel(0);
        let channels = Channels {
            store: store_events,
            kernel: kernel_events,
            queries: query_events,
            endpoints: plugged,
            programmed: programmed_in,
            wish: wish_in,
            overlay: watch::channel(None).0,
            changes: watch::channel(0).0,
            ready: ready_in,
            ports_lost: watch::channel(0).0,
            beat,
        };
        let stop = CancellationToken::new();
        let reconciler = Reconciler::new(settings, kernel.clone(), FakeMemory, Arc::new(Metrics::new()));
        let task = tokio::spawn(reconciler.run(channels, stop.clone()));
        Fixture { kernel, store, events, queries, ready, beats, wish, stop, endpoints, programmed, _task: task }
    }

    /// Ready, with these peers.
    async fn ready(peers: impl IntoIterator<Item = u8>) -> Fixture {
        let mut fixture = Fixture::start();
        fixture.join(peers).await;
        fixture.ready.wait_for(|ready| *ready).await.unwrap();
        fixture
    }

    /// Hands over all that a host needs, with these peers.
    async fn join(&self, peers: impl IntoIterator<Item = u8>) {
        self.send(StoreEvent::Connection(Connection::Up { revision: 1 })).await;
        self.send(StoreEvent::Config(Some(Ok(network())))).await;
        self.send(StoreEvent::Snapshot(peers.into_iter().map(|n| entry(n, n)).collect())).await;
        self.send(held(100)).await;
    }

    /// How many turns the loop takes in that time.
    async fn turns_within(&self, time: Duration) -> u64 {
        let before = *self.beats.borrow();
        tokio::time::sleep(time).await;
        *self.beats.borrow() - before
    }

    async fn send(&self, event: StoreEvent) {
        self.store.send(event).await.unwrap();
    }

    /// The answer comes after all that was sent before is folded and applied.
    async fn status(&self) -> api::Status {
        // Two rounds: the first may be the one that folds the events.
        for _ in 0..2 {
            let (reply, answer) = oneshot::channel();
            self.queries.send(Query::Status(reply)).await.unwrap();
            answer.await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let (reply, answer) = oneshot::channel();
        self.queries.send(Query::Status(reply)).await.unwrap();
        answer.await.unwrap()
    }

    fn route(&self, number: u8) -> Option<Value> {
        self.kernel.world().state.get(&route(number)).cloned()
    }

    /// Others delete an entry.
    async fn delete(&self, key: Key) {
        self.kernel.world().state.remove(&key);
        self.events.send(KernelEvent::Changed(vec![(key, None)])).await.unwrap();
    }
}

/// A device of ours in the kernel.
fn link(fixture: &Fixture, device: Device) -> (Key, LinkState) {
    let key = Key::Link(device.name().into());
    match fixture.kernel.world().state.get(&key) {
        Some(Value::Link(link)) => (key, (**link).clone()),
        other => panic!("no link: {other:?}"),
    }
}

fn route(number: u8) -> Key {
    Key::Route(subnet(number).get(Family::V4).unwrap())
}

fn held(number: u8) -> StoreEvent {
    StoreEvent::Own(OwnLease::Held(HeldLease { subnet: subnet(number), etcd_lease: Some(7), origin: LeaseOrigin::Acquired }))
}

#[tokio::test]
async fn nothing_is_written_before_the_lease_is_held() {
    let fixture = Fixture::start();
    fixture.send(StoreEvent::Config(Some(Ok(network())))).await;
    fixture.send(StoreEvent::Snapshot(vec![entry(1, 1)])).await;
    let status = fixture.status().await;
    assert!(!status.ready && fixture.kernel.world().applied.is_empty());
    let wish = fixture.wish.borrow().clone().expect("the lease is asked for");
    assert_eq!(wish.public_ip.v4, "192.0.2.100".parse().ok());
    fixture.send(held(100)).await;
    assert!(fixture.status().await.ready);
    assert!(fixture.route(1).is_some());
}

#[tokio::test]
async fn a_snapshot_replaces_what_was_known() {
    let fixture = Fixture::ready([1, 2, 3]).await;
    fixture.kernel.world().applied.clear();
    // 1 left, 2 moved to another address, 3 is as it was, 4 is new.
    fixture.send(StoreEvent::Snapshot(vec![entry(2, 22), entry(3, 3), entry(4, 4)])).await;
    assert_eq!(fixture.status().await.data_path.peers, 3);
    assert!(fixture.route(1).is_none() && fixture.route(4).is_some());
    let vxlan = Device::vxlan(Family::V4, Vni::DEFAULT);
    let world = fixture.kernel.world();
    assert!(!world.state.contains_key(&Key::Fdb(vxlan, Mac([2, 0, 0, 0, 0, 2]))), "the old MAC is gone");
    assert!(world.state.contains_key(&Key::Fdb(vxlan, Mac([2, 0, 0, 0, 0, 22]))));
    assert!(world.applied.iter().all(|op| *op.key() != route(3)), "what is as it was is not written");
}

/// All is judged anew then, and what stays is as it was.
#[tokio::test]
async fn a_snapshot_lacks_most_of_what_was_known() {
    let fixture = Fixture::ready(1..=6).await;
    fixture.send(StoreEvent::Upsert(entry(7, 100))).await;
    let status = fixture.status().await;
    assert_eq!((status.data_path.peers, status.store.refused.len()), (6, 1), "the last has our address");
    fixture.kernel.world().applied.clear();
    fixture.send(StoreEvent::Snapshot(vec![entry(2, 2)])).await;
    let status = fixture.status().await;
    assert_eq!((status.data_path.peers, status.store.refused.len(), status.data_path.drift_repairs), (1, 0, 0));
    assert!([1, 3, 4, 5, 6].iter().all(|n| fixture.route(*n).is_none()) && fixture.route(2).is_some());
    let world = fixture.kernel.world();
    assert!(world.applied.iter().all(|op| matches!(op, Op::Delete(..)) && *op.key() != route(2)), "{:?}", world.applied);
}

/// The other's device goes, and the next try makes ours before the kernel's event of that is read: nothing else says that all which lives on it is missing.
#[tokio::test]
async fn what_lives_on_a_device_comes_back_with_it() {
    let mut fixture = Fixture::ready([1]).await;
    let vxlan = Device::vxlan(Family::V4, Vni::DEFAULT);
    let link = Key::Link(vxlan.name().into());
    let whole = fixture.kernel.world().state.clone();
    {
        let mut world = fixture.kernel.world();
        let on_it: Vec<Key> = whole
            .iter()
            .filter(|(key, value)| device_of(key, value, &whole) == Some(vxlan))
            .map(|(key, _)| key.clone())
            .collect();
        assert!(on_it.len() > 3, "{on_it:?}");
        for key in on_it {
            world.state.remove(&key);
        }
        let Some(Value::Link(mut foreign)) = whole.get(&link).cloned() else { panic!("a link") };
        foreign.kind = LinkKind::Foreign { kind: "bridge".to_owned() };
        world.state.insert(link.clone(), Value::Link(foreign));
        world.refuse.insert(link.clone());
    }
    fixture.events.send(KernelEvent::Stale { reason: "test" }).await.unwrap();
    fixture.ready.wait_for(|ready| !*ready).await.unwrap();
    {
        let mut world = fixture.kernel.world();
        world.state.remove(&link);
        world.refuse.clear();
    }
    fixture.ready.wait_for(|ready| *ready).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), async {
        while fixture.kernel.world().state != whole {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("all that lived on the device is back");
}

#[tokio::test]
async fn a_renewal_writes_nothing() {
    let fixture = Fixture::ready([1, 2]).await;
    fixture.kernel.world().applied.clear();
    let mut renewed = entry(1, 1);
    if let Ok(record) = &mut renewed.value {
        (record.mod_revision, record.etcd_lease) = (50, Some(9));
    }
    fixture.send(StoreEvent::Upsert(renewed)).await;
    fixture.send(StoreEvent::Snapshot(vec![entry(1, 1), entry(2, 2)])).await;
    fixture.status().await;
    assert!(fixture.kernel.world().applied.is_empty());
}

#[tokio::test]
async fn one_failing_peer_delays_no_other_and_is_tried_again() {
    let mut fixture = Fixture::ready([1]).await;
    fixture.kernel.world().refuse.insert(route(2));
    for number in 2..40 {
        fixture.send(StoreEvent::Upsert(entry(number, number))).await;
    }
    let status = fixture.status().await;
    assert!(!status.ready);
    assert_eq!(status.data_path.failed.len(), 1, "{:?}", status.data_path.failed);
    assert!(status.data_path.failed[0].error.contains("cannot allocate memory"));
    assert!((3..40).all(|number| fixture.route(number).is_some()));
    assert!(fixture.route(2).is_none());
    fixture.kernel.world().refuse.clear();
    tokio::time::timeout(Duration::from_secs(5), fixture.ready.wait_for(|ready| *ready)).await.unwrap().unwrap();
    assert!(fixture.route(2).is_some());
}

#[tokio::test]
async fn drift_is_repaired_as_it_happens_and_counted() {
    let fixture = Fixture::ready([1, 2]).await;
    fixture.delete(route(1)).await;
    let status = fixture.status().await;
    assert!(fixture.route(1).is_some());
    assert_eq!(status.data_path.drift_repairs, 1);
    assert_eq!(status.data_path.last_drift.map(|drift| drift.entry), Some("route 10.244.1.0/24".to_owned()));
    // A foreign entry on our device, and an event that was lost.
    let extra = Key::Neigh(Device::vxlan(Family::V4, Vni::DEFAULT), "10.244.99.0".parse().unwrap());
    {
        let mut world = fixture.kernel.world();
        world.state.insert(extra.clone(), Value::Neigh(Mac([2; 6])));
        world.state.remove(&route(2));
    }
    fixture.events.send(KernelEvent::Stale { reason: "test" }).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(fixture.status().await.data_path.drift_repairs, 3);
    assert!(fixture.route(2).is_some());
    assert!(!fixture.kernel.world().state.contains_key(&extra));
}

#[tokio::test]
async fn a_fight_is_fought_at_a_bounded_rate() {
    let fixture = Fixture::ready([1]).await;
    fixture.kernel.world().applied.clear();
    let mut deletions = 0;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(600) {
        if fixture.route(1).is_some() {
            fixture.delete(route(1)).await;
            deletions += 1;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!((10..20).contains(&deletions), "{deletions} repairs in 600 ms");
    let status = fixture.status().await;
    assert!(status.problems.iter().any(|problem| problem.contains("changed by others")), "{:?}", status.problems);
}

#[tokio::test]
async fn a_lost_lease_leaves_the_data_path_as_it_is() {
    let fixture = Fixture::ready([1, 2]).await;
    fixture.kernel.world().applied.clear();
    fixture.send(StoreEvent::Own(OwnLease::Wanted { reason: "it expired".to_owned() })).await;
    fixture.send(StoreEvent::Connection(Connection::Down { error: "no route to host".to_owned() })).await;
    let status = fixture.status().await;
    assert!(!status.ready && status.health == api::Health::Degraded, "{status:?}");
    assert!(status.problems.iter().any(|problem| problem.contains("it expired")), "{:?}", status.problems);
    assert!(fixture.kernel.world().applied.is_empty());
    assert_eq!(fixture.wish.borrow().as_ref().and_then(|wish| wish.preferred), Some(subnet(100)));
    // What drifts meanwhile is repaired all the same.
    fixture.delete(route(1)).await;
    fixture.status().await;
    assert!(fixture.route(1).is_some());
}

#[tokio::test]
async fn a_store_that_is_lost_for_longer_than_the_lease_lasts_takes_readiness_away() {
    let mut fixture = Fixture::ready([1]).await;
    fixture.kernel.world().applied.clear();
    let down = || StoreEvent::Connection(Connection::Down { error: "no route to host".to_owned() });
    let begun = Instant::now();
    fixture.send(down()).await;
    // Told again for another reason: the lease has not become longer by that.
    fixture.send(StoreEvent::Connection(Connection::Down { error: "connection refused".to_owned() })).await;
    fixture.ready.wait_for(|ready| !*ready).await.unwrap();
    assert!(begun.elapsed() >= LEASE_LASTS, "ready as long as the lease lasts");
    let status = fixture.status().await;
    assert!(status.problems.iter().any(|problem| problem.contains("another host may get its subnet")), "{:?}", status.problems);
    assert_eq!(fixture.kernel.world().applied, [], "the data path is as it was");
    fixture.send(StoreEvent::Connection(Connection::Up { revision: 9 })).await;
    fixture.ready.wait_for(|ready| *ready).await.unwrap();
    // A reservation has no end.
    let reservation = HeldLease { subnet: subnet(100), etcd_lease: None, origin: LeaseOrigin::Reused };
    fixture.send(StoreEvent::Own(OwnLease::Held(reservation))).await;
    fixture.send(down()).await;
    tokio::time::sleep(2 * LEASE_LASTS).await;
    assert!(fixture.status().await.ready);
}

#[tokio::test]
async fn a_bad_configuration_leaves_the_last_good_one_in_force() {
    let fixture = Fixture::ready([1]).await;
    fixture.kernel.world().applied.clear();
    let errors = NetworkConfig::parse(r#"{"Network":"10.244.0.1/16"}"#).unwrap_err();
    fixture.send(StoreEvent::Config(Some(Err(errors)))).await;
    let status = fixture.status().await;
    assert!(status.ready && status.health == api::Health::Degraded);
    assert_eq!(status.store.config_errors[0].field, "Network");
    assert!(fixture.kernel.world().applied.is_empty());
}

#[tokio::test]
async fn bad_leases_are_named_and_left_out() {
    let fixture = Fixture::ready([1]).await;
    let key = "10.244.7.0-24".to_owned();
    let kind = RefusalKind::Malformed { detail: "expected value at line 1".to_owned() };
    fixture.send(StoreEvent::Upsert(StoreEntry { key: key.clone(), value: Err(Refusal { key: key.clone(), kind }) })).await;
    let mut own_address = entry(8, 100);
    if let Ok(record) = &mut own_address.value {
        record.lease.backend = Backend::Vxlan { vni: Vni::DEFAULT, vtep: PerFamily { v4: Some(Mac([2; 6])), v6: None } };
    }
    fixture.send(StoreEvent::Upsert(own_address)).await;
    let status = fixture.status().await;
    assert!(status.ready && status.health == api::Health::Degraded);
    let words: Vec<_> = status.store.refused.iter().map(|refusal| refusal.kind.word()).collect();
    assert_eq!(words, ["malformed", "own-address"]);
    assert!(fixture.route(7).is_none() && fixture.route(8).is_none() && fixture.route(1).is_some());
    fixture.send(StoreEvent::Remove { key }).await;
    assert_eq!(fixture.status().await.store.refused.len(), 1);
}

/// An event may wait behind a change of ours: what it tells is over.
#[tokio::test]
async fn what_is_told_of_a_link_is_looked_at() {
    let fixture = Fixture::ready([1]).await;
    let (key, bridge) = link(&fixture, Device::bridge(Vni::DEFAULT));
    fixture.kernel.world().applied.clear();
    let told = |mtu| Some(Value::Link(Box::new(LinkState { mtu, ..bridge.clone() })));
    fixture.events.send(KernelEvent::Changed(vec![(key.clone(), told(1300))])).await.unwrap();
    let status = fixture.status().await;
    assert_eq!((status.data_path.drift_repairs, fixture.kernel.world().applied.len()), (0, 0), "it is as it should be");

    // And what has come since counts, whatever was told.
    fixture.kernel.world().state.insert(key.clone(), told(1200).unwrap());
    fixture.events.send(KernelEvent::Changed(vec![(key.clone(), told(1300))])).await.unwrap();
    assert_eq!(fixture.status().await.data_path.drift_repairs, 1);
    assert_eq!(link(&fixture, Device::bridge(Vni::DEFAULT)), (key, bridge));
}

#[tokio::test]
async fn adoption_writes_nothing() {
    let first = Fixture::ready([1, 2, 3]).await;
    let state = first.kernel.world().state.clone();
    let second = Fixture::start();
    second.kernel.world().state = state.clone();
    second.events.send(KernelEvent::Stale { reason: "test" }).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    second.send(StoreEvent::Config(Some(Ok(network())))).await;
    second.send(StoreEvent::Snapshot([3, 1, 2].map(|n| entry(n, n)).into())).await;
    second.send(held(100)).await;
    assert!(second.status().await.ready);
    assert_eq!(second.kernel.world().applied, []);
    assert_eq!(second.kernel.world().state, state);
    assert_eq!(second.status().await.data_path.drift_repairs, 0);
}

#[tokio::test]
async fn who_waits_for_an_endpoint_is_told_when_all_is_done_for_it() {
    let mut fixture = Fixture::ready([]).await;
    let endpoint: Endpoint = serde_json::from_value(serde_json::json!({
        "name": "a", "netns": "/run/netns/a", "interface": "eth0", "host_interface": "ove0", "mac": "02:00:00:00:00:01",
        "addresses": {"v4": "10.244.100.2"}, "attached_at": 0
    }))
    .unwrap();
    let endpoint = Arc::new(endpoint);
    fixture.endpoints.send_replace(vec![Arc::clone(&endpoint)]);
    fixture.programmed.wait_for(|all| all.first() == Some(&endpoint)).await.unwrap();
    fixture.endpoints.send_replace(Vec::new());
    fixture.programmed.wait_for(Vec::is_empty).await.unwrap();
}

#[tokio::test]
async fn the_loop_beats_while_it_turns_and_not_while_it_is_stuck() {
    /// Long enough for a turn on a busy machine.
    const LONG: Duration = Duration::from_secs(5);
    let mut fixture = Fixture::ready([1]).await;
    for _ in 0..2 {
        fixture.beats.mark_unchanged();
        fixture.status().await;
        tokio::time::timeout(LONG, fixture.beats.changed()).await.expect("a beat at a question").unwrap();
    }
    fixture.kernel.world().stuck = true;
    fixture.delete(route(1)).await;
    // The turns until the repair begins may still beat; after it none does, whoever asks.
    for _ in 0..10 {
        fixture.beats.mark_unchanged();
        let (reply, _answer) = oneshot::channel();
        fixture.queries.try_send(Query::Status(reply)).expect("room for a question");
        if tokio::time::timeout(Duration::from_secs(1), fixture.beats.changed()).await.is_err() {
            return;
        }
    }
    panic!("a loop that is stuck beats on");
}

#[tokio::test]
async fn with_nothing_to_do_the_loop_does_not_turn() {
    let mut fixture = Fixture::ready([1]).await;
    tokio::time::sleep(HEAP_REST * 2).await; // Once after the start memory is given back.
    fixture.beats.mark_unchanged();
    let turned = tokio::time::timeout(HEAP_REST * 3, fixture.beats.changed()).await;
    assert!(turned.is_err(), "a turn, though nothing happens");
}
