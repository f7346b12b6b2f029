//! Tests of the loop with a fake kernel, for faults that a real kernel shows only by chance. `tests/e2e` uses real kernels.

mod backend;
mod failures;
mod fake_kernel;
mod isolated;
mod liveness;
mod local_entries;
mod pairs;
mod restarts;
mod store_events;

use self::fake_kernel::{FakeKernel, FakeStateStore, advance_clock, clock};
use super::*;
use crate::app::queries::Queries;
use crate::app::supervisor::{Failures, Supervisor};
use crate::app::wiring;
use crate::model::event::{Connection, HeldLease, LeaseOrigin, LeaseRequest, OwnLease, StoreEntry, StoreEvent};
use crate::model::{
    BackendData, Endpoint, ExpiryId, Family, Lease, LeaseRecord, Mac, NetworkConfig, NetworkRecord, Node, PerFamily,
    RejectReason, RejectedLease, StorePosition, Subnet, Vni, api,
};
use crate::network::{self, Network};
use crate::plan::state::{LinkState, device_of};
use crate::plan::underlay::UnderlaySelector;
use crate::plan::{LinkKind, Op, Value};

/// TTL of the lease while the store does not answer.
const LEASE_TTL: Duration = Duration::from_millis(500);

/// A running network with its reconcilers, and the other ends of their channels.
struct Fixture {
    name: NetworkName,
    /// The host's network namespace.
    kernel: FakeKernel,
    /// An isolated network's own one.
    own: Option<(FakeKernel, mpsc::Sender<KernelEvent>)>,
    state_store: FakeStateStore,
    /// To the network's present run.
    store: watch::Receiver<Option<mpsc::Sender<StoreEvent>>>,
    events: mpsc::Sender<KernelEvent>,
    queries: Queries,
    ready: watch::Receiver<bool>,
    overlay: watch::Receiver<Option<network::Overlay>>,
    /// What is applied, by scope.
    progress: Vec<watch::Receiver<Progress>>,
    record: watch::Receiver<Option<NetworkRecord>>,
    others: watch::Sender<Arc<BTreeMap<NetworkName, NetworkRecord>>>,
    heartbeat: watch::Receiver<u64>,
    lease_request: watch::Receiver<Option<LeaseRequest>>,
    stop: CancellationToken,
    endpoints: watch::Sender<Vec<Arc<Endpoint>>>,
    applied_endpoints: watch::Receiver<Vec<Arc<Endpoint>>>,
    supervisor: Supervisor,
    fail_store: Arc<tokio::sync::Notify>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn network() -> NetworkRecord {
    NetworkRecord::parse(r#"{"Network":"10.244.0.0/16"}"#).unwrap()
}

fn subnet(number: u8) -> Subnet {
    Subnet::from_key(&format!("10.244.{number}.0-24")).unwrap()
}

fn entry(number: u8, ip: u8) -> StoreEntry {
    let subnet = subnet(number);
    let lease = Lease {
        public_ip: PerFamily { v4: Some(format!("192.0.2.{ip}").parse().unwrap()), v6: None },
        backend: BackendData::Vxlan { vni: Vni::DEFAULT, vtep: PerFamily { v4: Some(Mac([2, 0, 0, 0, 0, ip])), v6: None } },
        node: None,
    };
    let record = LeaseRecord {
        subnet,
        lease,
        created: StorePosition(number.into()),
        changed: StorePosition(1),
        expiry: Some(ExpiryId(1)),
    };
    StoreEntry { key: subnet.to_key(), value: Ok(record) }
}

impl Fixture {
    fn start() -> Fixture {
        Fixture::start_with(FakeKernel::default(), Duration::from_secs(3600))
    }

    fn start_with(kernel: FakeKernel, resync: Duration) -> Fixture {
        Fixture::start_network(NetworkName::default(), kernel, None, resync)
    }

    fn start_network(name: NetworkName, kernel: FakeKernel, own_kernel: Option<FakeKernel>, resync: Duration) -> Fixture {
        let (stores, store) = watch::channel(None);
        let fail_store = Arc::new(tokio::sync::Notify::new());
        let store_fails = Arc::clone(&fail_store);
        let (events, kernel_events) = mpsc::channel(64);
        let (endpoints, endpoints_out) = watch::channel(Vec::new());
        let (applied, applied_endpoints) = watch::channel(Vec::new());
        let (others, others_out) = watch::channel(Arc::default());
        let changes = watch::Sender::new(0);
        let host_ends = wiring::reconciler(kernel_events, changes.clone());
        let own_ends = own_kernel.map(|kernel| {
            let (events, kernel_events) = mpsc::channel(64);
            (kernel, events, wiring::reconciler(kernel_events, changes.clone()))
        });
        let own_link = own_ends.as_ref().map(|(_, _, ends)| ends.link.clone());
        let progress =
            [Some(&host_ends.link), own_link.as_ref()].into_iter().flatten().map(|link| link.progress.clone()).collect();
        let inputs = wiring::NetworkInputs { endpoints: endpoints_out, applied_endpoints: applied, others: others_out, changes };
        let network_ends = wiring::network(inputs, host_ends.link, own_link);
        let queries = Queries {
            network: network_ends.queries,
            host: host_ends.queries,
            own: own_ends.as_ref().map(|(_, _, ends)| ends.queries.clone()),
            failures: Failures::default(),
        };
        let stop = CancellationToken::new();
        let metrics = Arc::new(Metrics::new());
        let settings = network::Settings {
            name: name.clone(),
            isolated: own_ends.is_some(),
            netns_prefix: "ov-".to_owned(),
            node: Node { name: "h".to_owned(), id: "id".to_owned() },
            selection: UnderlaySelector::default(),
            masquerade: true,
            tx_checksum: true,
            docker: false,
            lease_ttl: LEASE_TTL,
            store_endpoints: Vec::new(),
            store_prefix: "/test".to_owned(),
        };
        let supervisor = Supervisor::new(queries.failures.clone(), Arc::clone(&metrics), stop.clone());
        let state_store = FakeStateStore::default();
        let (network_state, network_metrics) = (state_store.clone(), Arc::clone(&metrics));
        let network =
            move || Network::new(settings.clone(), network_state.clone(), Arc::clone(&network_metrics)).with_clock(clock);
        supervisor.start_network(name.clone(), network_ends.channels, network, move |store, stop| {
            let (stores, fail) = (stores.clone(), Arc::clone(&store_fails));
            async move {
                stores.send_replace(Some(store));
                tokio::select! {
                    () = stop.cancelled() => Ok(()),
                    () = fail.notified() => Err("a defect of the store"),
                }
            }
        });
        let start_reconciler = |namespace: NamespaceName, kernel: &FakeKernel, channels| {
            let settings = Settings { namespace: namespace.clone(), nexthop_objects: true, resync, probe_address: None };
            let (data_path, sysctls, metrics) = (kernel.clone(), state_store.clone(), Arc::clone(&metrics));
            let make = move || Reconciler::new(settings.clone(), data_path.clone(), sysctls.clone(), Arc::clone(&metrics));
            supervisor.start_reconciler(namespace, channels, move || make().with_clock(clock));
        };
        start_reconciler(NamespaceName::Host, &kernel, host_ends.channels);
        let own = own_ends.map(|(kernel, events, ends)| {
            start_reconciler(NamespaceName::Network(name.clone()), &kernel, ends.channels);
            (kernel, events)
        });
        Fixture {
            name,
            kernel,
            own,
            state_store,
            store,
            events,
            queries,
            ready: network_ends.ready,
            overlay: network_ends.overlay,
            progress,
            record: network_ends.record,
            others,
            heartbeat: host_ends.heartbeat,
            lease_request: network_ends.lease_request,
            stop,
            endpoints,
            applied_endpoints,
            supervisor,
            fail_store,
        }
    }

    /// Starts a reconciler with these peers and waits until it is ready.
    async fn ready(peers: impl IntoIterator<Item = u8>) -> Fixture {
        let mut fixture = Fixture::start();
        fixture.join(peers).await;
        fixture.ready.wait_for(|ready| *ready).await.unwrap();
        fixture
    }

    /// Sends the store events that a host needs to become ready, with these peers.
    async fn join(&self, peers: impl IntoIterator<Item = u8>) {
        self.join_with(network(), peers).await;
    }

    async fn join_with(&self, record: NetworkRecord, peers: impl IntoIterator<Item = u8>) {
        self.send(StoreEvent::Connection(Connection::Up { position: StorePosition(1) })).await;
        self.send(StoreEvent::Config(Some(Ok(record)))).await;
        self.send(StoreEvent::Snapshot(peers.into_iter().map(|n| entry(n, n)).collect())).await;
        self.send(held_lease(100)).await;
    }

    /// Number of loop iterations within `time`.
    async fn wakeups_within(&self, time: Duration) -> u64 {
        let before = *self.heartbeat.borrow();
        tokio::time::sleep(time).await;
        *self.heartbeat.borrow() - before
    }

    async fn send(&self, event: StoreEvent) {
        let mut store = self.store.clone();
        let is_open = |store: &Option<mpsc::Sender<_>>| store.as_ref().is_some_and(|store| !store.is_closed());
        let store = store.wait_for(is_open).await.unwrap().clone().unwrap();
        store.send(event).await.unwrap();
    }

    /// The status after all events sent before are folded and applied.
    async fn status(&self) -> api::Status {
        // Each answer includes what was sent to its task before. The first query makes the network send its contribution, the
        // reconciler reports progress to the network, which the last query includes.
        self.queries.status().await.unwrap();
        self.queries.status().await.unwrap()
    }

    /// Waits until a status is as wanted.
    async fn wait_status(&self, what: &str, wanted: impl Fn(&api::Status) -> bool) -> api::Status {
        for _ in 0..1000 {
            let status = self.status().await;
            if wanted(&status) {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{what}: {:?}", self.status().await)
    }

    fn route(&self, number: u8) -> Option<Value> {
        self.kernel.lock().state.get(&route(number)).cloned()
    }

    /// Deletes an entry as another process would.
    async fn delete(&self, key: Key) {
        self.kernel.lock().state.remove(&key);
        self.events.send(KernelEvent::Changed(vec![(key, None)])).await.unwrap();
    }
}

/// A device of ours in the kernel.
fn link(fixture: &Fixture, device: Device) -> (Key, LinkState) {
    let key = Key::Link(device.name().into());
    match fixture.kernel.lock().state.get(&key) {
        Some(Value::Link(link)) => (key, (**link).clone()),
        other => panic!("no link: {other:?}"),
    }
}

fn route(number: u8) -> Key {
    Key::Route(subnet(number).get(Family::V4).unwrap())
}

fn held_lease(number: u8) -> StoreEvent {
    StoreEvent::Own(OwnLease::Held(HeldLease {
        subnet: subnet(number),
        expiry: Some(ExpiryId(7)),
        origin: LeaseOrigin::Acquired,
    }))
}

#[tokio::test]
async fn kernel_is_untouched_before_lease_is_held() {
    let fixture = Fixture::start();
    fixture.send(StoreEvent::Config(Some(Ok(network())))).await;
    fixture.send(StoreEvent::Snapshot(vec![entry(1, 1)])).await;
    let status = fixture.status().await;
    assert!(!status.ready && fixture.kernel.lock().applied_ops.is_empty());
    let request = fixture.lease_request.borrow().clone().expect("the lease is asked for");
    assert_eq!(request.public_ip.v4, "192.0.2.100".parse().ok());
    fixture.send(held_lease(100)).await;
    assert!(fixture.status().await.ready);
    assert!(fixture.route(1).is_some());
}

#[tokio::test]
async fn snapshot_replaces_known_leases() {
    let fixture = Fixture::ready([1, 2, 3]).await;
    fixture.kernel.lock().applied_ops.clear();
    // 1 left, 2 moved to another address, 3 is as it was, 4 is new.
    fixture.send(StoreEvent::Snapshot(vec![entry(2, 22), entry(3, 3), entry(4, 4)])).await;
    assert_eq!(fixture.status().await.data_path.peers, 3);
    assert!(fixture.route(1).is_none() && fixture.route(4).is_some());
    let vxlan = Device::vxlan(Family::V4, Vni::DEFAULT);
    let kernel = fixture.kernel.lock();
    assert!(!kernel.state.contains_key(&Key::Fdb(vxlan, Mac([2, 0, 0, 0, 0, 2]))), "the old MAC is gone");
    assert!(kernel.state.contains_key(&Key::Fdb(vxlan, Mac([2, 0, 0, 0, 0, 22]))));
    assert!(kernel.applied_ops.iter().all(|op| *op.key() != route(3)), "an unchanged entry is not written");
}

/// Such a snapshot causes a full classification; unchanged entries are not written again.
#[tokio::test]
async fn snapshot_without_most_leases_removes_them() {
    let fixture = Fixture::ready(1..=6).await;
    fixture.send(StoreEvent::Upsert(entry(7, 100))).await;
    let status = fixture.status().await;
    assert_eq!((status.data_path.peers, status.store.refused.len()), (6, 1), "the last has our address");
    fixture.kernel.lock().applied_ops.clear();
    fixture.send(StoreEvent::Snapshot(vec![entry(2, 2)])).await;
    let status = fixture.status().await;
    assert_eq!((status.data_path.peers, status.store.refused.len(), status.data_path.drift_repairs), (1, 0, 0));
    assert!([1, 3, 4, 5, 6].iter().all(|n| fixture.route(*n).is_none()) && fixture.route(2).is_some());
    let kernel = fixture.kernel.lock();
    assert!(
        kernel.applied_ops.iter().all(|op| matches!(op, Op::Delete(..)) && *op.key() != route(2)),
        "{:?}",
        kernel.applied_ops
    );
}

/// The foreign device is deleted, and the next retry creates ours before the kernel's event of the deletion is read. No other
/// event reports that all entries on the device are missing.
#[tokio::test]
async fn recreated_device_gets_its_entries_back() {
    let mut fixture = Fixture::ready([1]).await;
    let vxlan = Device::vxlan(Family::V4, Vni::DEFAULT);
    let link = Key::Link(vxlan.name().into());
    let complete = fixture.kernel.lock().state.clone();
    {
        let mut kernel = fixture.kernel.lock();
        let on_it: Vec<Key> = complete
            .iter()
            .filter(|(key, value)| device_of(key, value, &complete) == Some(vxlan))
            .map(|(key, _)| key.clone())
            .collect();
        assert!(on_it.len() > 3, "{on_it:?}");
        for key in on_it {
            kernel.state.remove(&key);
        }
        let Some(Value::Link(mut foreign)) = complete.get(&link).cloned() else { panic!("a link") };
        foreign.kind = LinkKind::Foreign { kind: "bridge".to_owned() };
        kernel.state.insert(link.clone(), Value::Link(foreign));
        kernel.failing_keys.insert(link.clone());
    }
    fixture.events.send(KernelEvent::ResyncNeeded { reason: "test" }).await.unwrap();
    fixture.ready.wait_for(|ready| !*ready).await.unwrap();
    {
        let mut kernel = fixture.kernel.lock();
        kernel.state.remove(&link);
        kernel.failing_keys.clear();
    }
    fixture.ready.wait_for(|ready| *ready).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), async {
        while fixture.kernel.lock().state != complete {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("all entries on the device are back");
}

#[tokio::test]
async fn renewal_writes_nothing() {
    let fixture = Fixture::ready([1, 2]).await;
    fixture.kernel.lock().applied_ops.clear();
    let mut renewed = entry(1, 1);
    if let Ok(record) = &mut renewed.value {
        (record.changed, record.expiry) = (StorePosition(50), Some(ExpiryId(9)));
    }
    fixture.send(StoreEvent::Upsert(renewed)).await;
    fixture.send(StoreEvent::Snapshot(vec![entry(1, 1), entry(2, 2)])).await;
    fixture.status().await;
    assert!(fixture.kernel.lock().applied_ops.is_empty());
}

#[tokio::test]
async fn failing_peer_is_retried_without_delaying_others() {
    let mut fixture = Fixture::ready([1]).await;
    fixture.kernel.lock().failing_keys.insert(route(2));
    for number in 2..40 {
        fixture.send(StoreEvent::Upsert(entry(number, number))).await;
    }
    let status = fixture.status().await;
    assert!(!status.ready);
    assert_eq!(status.data_path.failed.len(), 1, "{:?}", status.data_path.failed);
    assert!(status.data_path.failed[0].error.contains("cannot allocate memory"));
    assert!((3..40).all(|number| fixture.route(number).is_some()));
    assert!(fixture.route(2).is_none());
    fixture.kernel.lock().failing_keys.clear();
    tokio::time::timeout(Duration::from_secs(5), fixture.ready.wait_for(|ready| *ready)).await.unwrap().unwrap();
    assert!(fixture.route(2).is_some());
}

#[tokio::test]
async fn drift_is_repaired_and_counted() {
    let fixture = Fixture::ready([1, 2]).await;
    fixture.delete(route(1)).await;
    let status = fixture.status().await;
    assert!(fixture.route(1).is_some());
    assert_eq!(status.data_path.drift_repairs, 1);
    assert_eq!(status.data_path.last_drift.map(|drift| drift.entry), Some("route 10.244.1.0/24".to_owned()));
    // A foreign entry on our device, and a lost event.
    let extra = Key::Neigh(Device::vxlan(Family::V4, Vni::DEFAULT), "10.244.99.0".parse().unwrap());
    {
        let mut kernel = fixture.kernel.lock();
        kernel.state.insert(extra.clone(), Value::Neigh(Mac([2; 6])));
        kernel.state.remove(&route(2));
    }
    fixture.events.send(KernelEvent::ResyncNeeded { reason: "test" }).await.unwrap();
    fixture.wait_status("the dump finds both", |status| status.data_path.drift_repairs == 3).await;
    assert!(fixture.route(2).is_some());
    assert!(!fixture.kernel.lock().state.contains_key(&extra));
}

#[tokio::test]
async fn contended_entry_is_repaired_at_bounded_rate() {
    let fixture = Fixture::ready([1]).await;
    fixture.kernel.lock().applied_ops.clear();
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
    assert!(status.problems.iter().any(|problem| problem.contains("changed by another process")), "{:?}", status.problems);
}

#[tokio::test]
async fn adopting_existing_state_writes_nothing() {
    let first = Fixture::ready([1, 2, 3]).await;
    let state = first.kernel.lock().state.clone();
    let kernel = FakeKernel::default();
    kernel.lock().state = state.clone();
    let second = Fixture::start_with(kernel, Duration::from_secs(3600));
    second.send(StoreEvent::Config(Some(Ok(network())))).await;
    second.send(StoreEvent::Snapshot([3, 1, 2].map(|n| entry(n, n)).into())).await;
    second.send(held_lease(100)).await;
    assert!(second.status().await.ready);
    assert_eq!(second.kernel.lock().applied_ops, []);
    assert_eq!(second.kernel.lock().state, state);
    assert_eq!(second.status().await.data_path.drift_repairs, 0);
}
