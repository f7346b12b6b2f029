//! Restarts: the failure of a network or of a reconciler changes nothing in the kernel and ends no other task.

use std::sync::atomic::Ordering;

use super::*;
use crate::plan::contribution::{Contribution, EntryChange};
use crate::plan::state::RouteTarget;

/// Time within which a failed task runs again.
const RESTART_TIMEOUT: Duration = Duration::from_secs(10);

impl Fixture {
    async fn wait_ready(&mut self, wanted: bool) {
        let changed = tokio::time::timeout(RESTART_TIMEOUT, self.ready.wait_for(|ready| *ready == wanted)).await;
        changed.expect("readiness changes").expect("the channel outlives the task");
    }

    /// Makes the network plan its own entries again.
    fn replan(&self) {
        self.endpoints.send_replace(Vec::new());
    }

    async fn assert_restarted(&self, unit: &str, cause: &str) {
        let problems = self.status().await.problems;
        let names = |problem: &String| problem.starts_with(&format!("{unit} was restarted")) && problem.contains(cause);
        assert!(problems.first().is_some_and(names), "{problems:?}");
    }
}

#[tokio::test]
async fn network_panic_leaves_data_path_and_reconciler() {
    let mut fixture = Fixture::ready([1, 2]).await;
    let state = fixture.kernel.lock().state.clone();
    fixture.kernel.lock().applied_ops.clear();
    let store = fixture.store.borrow().clone().expect("a store");

    fixture.state_store.panics.store(true, Ordering::Relaxed);
    fixture.replan();
    fixture.wait_ready(false).await;
    fixture.assert_restarted("network default", "task network panicked: a defect of the network").await;
    assert!(store.is_closed(), "a restarted network takes a new snapshot");

    // The network has no snapshot yet, so only the reconciler can repair this.
    fixture.delete(route(1)).await;
    let status = fixture.wait_status("drift is repaired", |status| status.data_path.drift_repairs == 1).await;
    assert!(!status.ready && status.data_path.peers == 0);
    assert_eq!(fixture.kernel.lock().state, state);

    fixture.join([1, 2]).await;
    fixture.wait_ready(true).await;
    assert_eq!(fixture.status().await.data_path.peers, 2);
    assert_eq!(fixture.kernel.lock().state, state);
    let written: Vec<Key> = fixture.kernel.lock().applied_ops.iter().map(|op| op.key().clone()).collect();
    assert_eq!(written, [route(1)], "nothing but the repair was written");
    // Changes of the present run's leases are planned as before.
    fixture.send(StoreEvent::Upsert(entry(3, 3))).await;
    fixture.wait_status("a new peer", |status| status.ready && status.data_path.peers == 3).await;
    assert!(fixture.route(3).is_some());
}

#[tokio::test]
async fn reconciler_panic_leaves_data_path_and_network() {
    let mut fixture = Fixture::ready([1, 2]).await;
    let state = fixture.kernel.lock().state.clone();
    fixture.kernel.lock().applied_ops.clear();
    let store = fixture.store.borrow().clone().expect("a store");

    fixture.kernel.lock().panics = true;
    fixture.delete(route(1)).await;
    fixture.wait_ready(false).await;
    fixture.assert_restarted("reconciler of the host's namespace", "task reconcile panicked: a defect of the data path").await;
    // What the failed run did not get, the next one gets.
    fixture.send(StoreEvent::Upsert(entry(3, 3))).await;
    fixture.wait_ready(true).await;
    fixture.wait_status("all is in sync", |status| status.ready && status.data_path.peers == 3).await;
    assert!(!store.is_closed(), "the network goes on");
    let kernel = fixture.kernel.lock();
    assert!(state.iter().all(|(key, value)| kernel.state.get(key) == Some(value)), "nothing was lost");
    let of_peer_3 = |key: &Key| !state.contains_key(key);
    let written = kernel.applied_ops.iter().map(Op::key).filter(|key| !of_peer_3(key)).collect::<Vec<_>>();
    assert_eq!(written, [&route(1)], "nothing but the repair was written");
}

/// The reconciler's next run continues neither with a part of a network nor without its shared entries.
#[tokio::test]
async fn contribution_for_earlier_run_is_ignored() {
    let mut fixture = Fixture::ready([1, 2]).await;
    let state = fixture.kernel.lock().state.clone();
    for number in [3, 4] {
        fixture.kernel.lock().panics = true;
        // The network sends changes while the reconciler fails, is down, and starts.
        fixture.send(StoreEvent::Upsert(entry(number, number))).await;
        fixture.wait_ready(false).await;
        fixture.send(StoreEvent::Remove { key: subnet(number).to_key() }).await;
        fixture.wait_status("the reconciler is back", |status| status.ready && status.data_path.peers == 2).await;
    }
    let deleted = |op: &Op| matches!(op, Op::Delete(key, _) if state.contains_key(key));
    assert!(!fixture.kernel.lock().applied_ops.iter().any(deleted));
    assert_eq!(fixture.kernel.lock().state, state);
}

/// With IPv6 the host would get another subnet.
#[tokio::test]
async fn restarted_network_keeps_using_ipv4_only() {
    let fixture = Fixture::start();
    let text = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#;
    let config = || StoreEvent::Config(Some(Ok(NetworkRecord::parse(text).unwrap())));
    let requests_ipv4_only = || fixture.lease_request.borrow().as_ref().is_some_and(|request| request.public_ip.v6.is_none());
    let ipv6_is_back = |status: &api::Status| status.problems.iter().any(|problem| problem.contains("IPv6 is enabled again"));
    fixture.send(config()).await;
    fixture.status().await;
    advance_clock(Duration::from_secs(10));
    fixture.wait_status("IPv6 is not waited for", |_| requests_ipv4_only()).await;
    fixture.kernel.lock().addresses.push(fake_kernel::address("2001:db8::100", 64));
    fixture.events.send(KernelEvent::HostNetworkChanged).await.expect("a reconciler");
    fixture.wait_status("IPv6 is back", ipv6_is_back).await;

    fixture.state_store.panics.store(true, Ordering::Relaxed);
    fixture.replan();
    fixture.wait_status("a restart", |status| status.problems.iter().any(|p| p.contains("a defect of the network"))).await;
    fixture.send(config()).await;
    fixture.wait_status("IPv6 stays unused", ipv6_is_back).await;
    assert!(requests_ipv4_only());
}

#[tokio::test]
async fn aborted_store_restarts_network() {
    let mut fixture = Fixture::ready([1]).await;
    let state = fixture.kernel.lock().state.clone();
    // A network whose store has ended is of no use.
    fixture.fail_store.notify_one();
    fixture.wait_ready(false).await;
    fixture.assert_restarted("network default", "task store failed: a defect of the store").await;
    fixture.join([1]).await;
    fixture.wait_ready(true).await;
    assert_eq!(fixture.kernel.lock().state, state);
}

#[tokio::test]
async fn stopped_network_leaves_its_entries_unless_withdrawn() {
    for withdraw in [false, true] {
        let fixture = Fixture::ready([1, 2]).await;
        let state = fixture.kernel.lock().state.clone();
        fixture.supervisor.stop_network(&NetworkName::default(), withdraw).await;
        let is_ours = |key: &Key| !matches!(key, Key::Sysctl(_));
        tokio::time::timeout(RESTART_TIMEOUT, async {
            while withdraw && fixture.kernel.lock().state.keys().any(is_ours) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("entries are left: {:?}", fixture.kernel.lock().state));
        assert!(withdraw || fixture.kernel.lock().state == state);
    }
}

/// One network's contribution says nothing about the other one's entries.
#[tokio::test]
async fn restarted_reconciler_deletes_nothing_before_all_networks_contribute() {
    let (_events, kernel_events) = mpsc::channel(1);
    let (_endpoints, endpoints) = watch::channel(Vec::new());
    let inputs = wiring::Inputs { kernel: kernel_events, endpoints, applied_endpoints: watch::channel(Vec::new()).0 };
    let (network_channels, channels, outputs) = wiring::connect(inputs);
    let (kernel, metrics, stop) = (FakeKernel::default(), Arc::new(Metrics::new()), CancellationToken::new());
    let supervisor = Supervisor::new(outputs.queries.failures.clone(), Arc::clone(&metrics), stop.clone());
    let _stops = stop.drop_guard();
    let resync = Duration::from_secs(3600);
    let settings = Settings { namespace: NamespaceName::Host, nexthop_objects: false, resync, probe_address: None };
    let data_path = kernel.clone();
    supervisor.start_reconciler(NamespaceName::Host, channels, move || {
        Reconciler::new(settings.clone(), data_path.clone(), FakeStateStore::default(), Arc::clone(&metrics))
    });
    let mut host = network_channels.host.view.clone();
    let mut progress = outputs.progress.clone();
    let mut contribute = async |name: &str, run: u64, sequence: u64, routes: &[u8]| {
        let in_run = |view: &Option<Arc<HostView>>| view.as_ref().is_some_and(|view| view.run == run);
        tokio::time::timeout(RESTART_TIMEOUT, host.wait_for(in_run)).await.expect("the run").expect("a view");
        let device = Device::vxlan(Family::V4, Vni::DEFAULT);
        let entry = |n: &u8| (route(*n), Value::Route(RouteTarget::Gateway(device, subnet(*n).get(Family::V4).unwrap().base())));
        let change = EntryChange::Replace(routes.iter().map(entry).collect());
        let network = NetworkName::from(name);
        let contribution = Contribution { network: network.clone(), run, sequence, shared: None, change };
        network_channels.host.input.send(ReconcilerInput::Contribution(Box::new(contribution))).await.expect("a reconciler");
        let applied = |progress: &Progress| progress.networks.get(&network).is_some_and(|p| p.sequence == sequence);
        tokio::time::timeout(RESTART_TIMEOUT, progress.wait_for(applied)).await.expect("it is applied").expect("a reconciler");
    };
    let has = |numbers: &[u8]| numbers.iter().all(|n| kernel.lock().state.contains_key(&route(*n)));
    contribute("one", 1, 1, &[1, 2]).await;
    contribute("two", 1, 1, &[3, 4]).await;
    assert!(has(&[1, 2, 3, 4]));
    // The removal of route 2 panics, and the next run gets it first.
    kernel.lock().panics = true;
    assert!(tokio::time::timeout(Duration::from_millis(50), contribute("one", 1, 2, &[1])).await.is_err());
    contribute("one", 2, 3, &[1, 5]).await;
    assert!(has(&[1, 2, 3, 4, 5]), "{:?}", kernel.lock().state);
    contribute("two", 2, 2, &[3]).await;
    assert!(has(&[1, 3, 5]) && !has(&[2]) && !has(&[4]), "{:?}", kernel.lock().state);
}
