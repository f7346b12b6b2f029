//! An isolated network: its entries are in two network namespaces, each with its reconciler.

use std::sync::atomic::Ordering;

use super::*;
use crate::model::PublishedPort;
use crate::plan::Key::Element;

/// Time for a failed task to run again, and for a failed entry to be set.
const TIMEOUT: Duration = Duration::from_secs(10);

const RANGE: &str = r#""Network":"10.244.0.0/16","Isolated":true"#;

fn record(fields: &str) -> NetworkRecord {
    NetworkRecord::parse(&format!("{{{fields}}}")).expect(fields)
}

fn transit() -> Key {
    Key::Link(Device::transit(Vni::DEFAULT).name().into())
}

fn peer_link(vni: u32) -> Key {
    Key::Link(Device::peer_link(Vni::try_from(vni).unwrap()).name().into())
}

impl Fixture {
    /// Starts the isolated network blue.
    fn isolated() -> Fixture {
        let (kernel, own) = (FakeKernel::default(), FakeKernel::default());
        Fixture::start_network("blue".into(), kernel, Some(own), Duration::from_secs(3600))
    }

    /// Starts it with these peers and waits until it is ready.
    async fn isolated_ready(peers: impl IntoIterator<Item = u8>) -> Fixture {
        let mut fixture = Fixture::isolated();
        fixture.join_with(record(RANGE), peers).await;
        fixture.wait_readiness(true).await;
        fixture
    }

    async fn wait_readiness(&mut self, wanted: bool) {
        let changed = tokio::time::timeout(TIMEOUT, self.ready.wait_for(|ready| *ready == wanted)).await;
        changed.expect("readiness changes").expect("the channel outlives the task");
    }

    fn own(&self) -> &FakeKernel {
        &self.own.as_ref().expect("an isolated network").0
    }

    /// Both namespaces, the host's first.
    fn kernels(&self) -> [&FakeKernel; 2] {
        [&self.kernel, self.own()]
    }

    fn states(&self) -> [State; 2] {
        self.kernels().map(|kernel| kernel.lock().state.clone())
    }

    /// The keys that were written since the last call, by namespace.
    fn take_written(&self) -> [Vec<Key>; 2] {
        let take = |kernel: &FakeKernel| std::mem::take(&mut kernel.lock().applied_ops);
        self.kernels().map(|kernel| take(kernel).iter().map(|op| op.key().clone()).collect())
    }

    /// Number of the last applied contribution, by namespace.
    fn sequences(&self) -> Vec<u64> {
        let sequence =
            |progress: &watch::Receiver<Progress>| progress.borrow().networks.get(&self.name).map_or(0, |p| p.sequence);
        self.progress.iter().map(sequence).collect()
    }

    async fn send_record(&self, record: NetworkRecord) -> api::Status {
        self.send(StoreEvent::Config(Some(Ok(record)))).await;
        self.status().await
    }

    async fn send_others(&self, records: &[(&str, &str)]) -> api::Status {
        let records = records.iter().map(|(name, fields)| (NetworkName::from(*name), record(fields)));
        self.others.send_replace(Arc::new(records.collect()));
        self.status().await
    }
}

#[tokio::test]
async fn entries_are_divided_between_namespaces() {
    let fixture = Fixture::isolated_ready([1, 2]).await;
    let status = fixture.status().await;
    assert_eq!((status.name.as_str(), status.kind, status.data_path.peers), ("blue", api::NetworkKind::Isolated, 2));
    let [host, own] = fixture.states();
    for device in [Device::bridge(Vni::DEFAULT), Device::vxlan(Family::V4, Vni::DEFAULT)] {
        let link = Key::Link(device.name().into());
        assert!(own.contains_key(&link) && !host.contains_key(&link), "{link}");
    }
    assert!(host.contains_key(&transit()) && own.contains_key(&transit()));
    assert!([1, 2].iter().all(|n| own.contains_key(&route(*n)) && !host.contains_key(&route(*n))));
    let elements = |state: &State| state.keys().filter(|key| matches!(key, Element(_))).count();
    assert_eq!((elements(&host), elements(&own)), (2, 0), "outer packets are filtered in the host's namespace");
    assert!(host.keys().all(|key| !matches!(key, Key::Fdb(..) | Key::Nexthop(_) | Key::Unreachable(_))), "{host:?}");

    fixture.take_written();
    fixture.send(StoreEvent::Upsert(entry(3, 3))).await;
    fixture.send(StoreEvent::Remove { key: subnet(1).to_key() }).await;
    assert_eq!(fixture.status().await.data_path.peers, 2);
    let [host, own] = fixture.states();
    assert!(own.contains_key(&route(3)) && !own.contains_key(&route(1)));
    assert_eq!(elements(&host), 2);
    let [host, _] = fixture.take_written();
    assert!(host.len() == 2 && host.iter().all(|key| matches!(key, Element(_))), "{host:?}");
    let peers = fixture.queries.peers().await.unwrap().peers;
    assert!(peers.len() == 2 && peers.iter().all(|peer| peer.state == "programmed"), "{peers:?}");
}

/// The other one gets nothing again.
#[tokio::test]
async fn each_reconciler_restarts_alone() {
    let restarted = ["reconciler of the host's namespace", "reconciler of the namespace of network blue"];
    for (failing, unit) in restarted.into_iter().enumerate() {
        let mut fixture = Fixture::isolated_ready([1, 2]).await;
        let (states, before) = (fixture.states(), fixture.sequences());
        fixture.take_written();
        let deleted = states[failing].keys().find(|key| matches!(key, Element(_) | Key::Route(_))).cloned().expect("an entry");
        let events = [&fixture.events, &fixture.own.as_ref().unwrap().1][failing].clone();
        {
            let mut kernel = fixture.kernels()[failing].lock();
            kernel.panics = true;
            kernel.state.remove(&deleted);
        }
        events.send(KernelEvent::Changed(vec![(deleted.clone(), None)])).await.unwrap();
        fixture.wait_readiness(false).await;
        let problems = fixture.status().await.problems;
        assert!(problems.iter().any(|problem| problem.starts_with(&format!("{unit} was restarted"))), "{problems:?}");
        fixture.wait_readiness(true).await;
        assert_eq!(fixture.states(), states);
        let written = fixture.take_written();
        assert_eq!((&written[failing], &written[1 - failing]), (&vec![deleted], &Vec::new()));
        let after = fixture.sequences();
        assert!(after[failing] > before[failing] && after[1 - failing] == before[1 - failing], "{before:?}, {after:?}");

        // Changes go on in both, from what each has.
        fixture.send(StoreEvent::Upsert(entry(3, 3))).await;
        fixture.wait_status("a new peer", |status| status.ready && status.data_path.peers == 3).await;
        let state = fixture.states();
        assert!((0..2).all(|n| states[n].iter().all(|(key, value)| state[n].get(key) == Some(value))), "nothing was lost");
        assert!(state[1].contains_key(&route(3)) && state[0].len() == states[0].len() + 1);
    }
}

#[tokio::test]
async fn restarted_isolated_network_writes_nothing() {
    let mut fixture = Fixture::isolated_ready([1, 2]).await;
    let states = fixture.states();
    fixture.take_written();
    fixture.state_store.panics.store(true, Ordering::Relaxed);
    fixture.endpoints.send_replace(Vec::new());
    fixture.wait_readiness(false).await;
    fixture.join_with(record(RANGE), [1, 2]).await;
    fixture.wait_readiness(true).await;
    assert_eq!((fixture.states(), fixture.take_written()), (states, [Vec::new(), Vec::new()]));
}

#[tokio::test]
async fn adopting_both_namespaces_writes_nothing() {
    let states = Fixture::isolated_ready([1, 2]).await.states();
    let [kernel, own] = states.clone().map(|state| {
        let kernel = FakeKernel::default();
        kernel.lock().state = state;
        kernel
    });
    let mut fixture = Fixture::start_network("blue".into(), kernel, Some(own), Duration::from_secs(3600));
    fixture.join_with(record(RANGE), [1, 2]).await;
    fixture.wait_readiness(true).await;
    assert_eq!((fixture.states(), fixture.take_written()), (states, [Vec::new(), Vec::new()]));
    // The devices that it looks for are in its own namespace.
    let found = fixture.state_store.found_macs.lock().unwrap().clone();
    assert!(found.len() == 2 && found.values().all(Option::is_some), "{found:?}");
}

#[tokio::test]
async fn failure_in_one_namespace_leaves_the_other() {
    let mut fixture = Fixture::isolated_ready([1]).await;
    let rules = Key::Ruleset(Table::Inet);
    for (failing, key) in [(0, rules.clone()), (1, route(2))] {
        fixture.kernels()[failing].lock().failing_keys.insert(key);
    }
    fixture.kernel.lock().state.remove(&rules);
    fixture.events.send(KernelEvent::Changed(vec![(rules.clone(), None)])).await.unwrap();
    fixture.send(StoreEvent::Upsert(entry(2, 2))).await;
    fixture.send(StoreEvent::Upsert(entry(3, 3))).await;
    let status = fixture.wait_status("both fail", |status| status.data_path.failed.len() == 2).await;
    assert!(!status.ready, "{status:?}");
    assert!(
        status.problems.iter().any(|problem| problem.starts_with("network blue: 1 entry cannot be")),
        "{:?}",
        status.problems
    );
    assert!(fixture.own().lock().state.contains_key(&route(3)));
    fixture.own().lock().failing_keys.clear();
    fixture.wait_status("one is repaired", |status| status.data_path.failed.len() == 1).await;
    assert!(!*fixture.ready.borrow());
    fixture.kernel.lock().failing_keys.clear();
    fixture.wait_readiness(true).await;
}

/// Without the host's rules or without the bridge, no container can be attached.
#[tokio::test]
async fn overlay_is_in_place_once_both_namespaces_are() {
    let keys = [Key::Ruleset(Table::Inet), Key::Link(Device::bridge(Vni::DEFAULT).name().into())];
    for (failing, key) in keys.into_iter().enumerate() {
        let mut fixture = Fixture::isolated();
        fixture.kernels()[failing].lock().failing_keys.insert(key);
        fixture.join_with(record(RANGE), [1]).await;
        fixture.wait_status("it fails", |status| !status.data_path.failed.is_empty()).await;
        assert!(fixture.overlay.borrow().is_none() && !*fixture.ready.borrow());
        fixture.kernels()[failing].lock().failing_keys.clear();
        tokio::time::timeout(TIMEOUT, fixture.overlay.wait_for(Option::is_some)).await.expect("in time").expect("a network");
    }
}

/// A published port has entries in both namespaces, an endpoint without one only in the network's.
#[tokio::test]
async fn endpoint_is_applied_in_each_namespace_that_it_needs() {
    let mut fixture = Fixture::isolated_ready([]).await;
    let endpoint = |publish: &[&str]| {
        let published: Vec<PublishedPort> = publish.iter().map(|text| text.parse().expect(text)).collect();
        Arc::new(Endpoint { published, ..(*local_entries::endpoint()).clone() })
    };
    fixture.kernel.lock().stuck = true;
    let quiet = endpoint(&[]);
    fixture.endpoints.send_replace(vec![Arc::clone(&quiet)]);
    let applied = |all: &Vec<Arc<Endpoint>>| all.first() == Some(&quiet);
    tokio::time::timeout(TIMEOUT, fixture.applied_endpoints.wait_for(applied)).await.expect("the host has no part").unwrap();
    let published = endpoint(&["8080:80"]);
    fixture.endpoints.send_replace(vec![Arc::clone(&published)]);
    let applied = |all: &Vec<Arc<Endpoint>>| all.first() == Some(&published);
    let early = tokio::time::timeout(Duration::from_millis(300), fixture.applied_endpoints.wait_for(applied)).await;
    assert!(early.is_err(), "the host's part is not applied yet");
}

#[tokio::test]
async fn withdrawn_network_leaves_neither_namespace_an_entry() {
    let fixture = Fixture::isolated_ready([1]).await;
    fixture.supervisor.stop_network(&"blue".into(), true).await;
    let is_ours = |key: &Key| !matches!(key, Key::Sysctl(_));
    tokio::time::timeout(TIMEOUT, async {
        while fixture.states().iter().any(|state| state.keys().any(is_ours)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("entries are left: {:?}", fixture.states()));
}

#[tokio::test]
async fn internal_network_has_no_transit() {
    let mut fixture = Fixture::isolated();
    fixture.join_with(record(&format!(r#"{RANGE},"Internal":true"#)), [1]).await;
    fixture.wait_readiness(true).await;
    assert!(fixture.states().iter().all(|state| !state.contains_key(&transit())));
    // It becomes reachable, and internal again.
    for has_way_out in [true, false] {
        let status = fixture.send_record(record(&format!(r#"{RANGE},"Internal":{}"#, !has_way_out))).await;
        assert!(status.ready && fixture.states().iter().all(|state| state.contains_key(&transit()) == has_way_out));
    }
}

#[tokio::test]
async fn networks_that_name_each_other_are_linked() {
    let mut fixture = Fixture::isolated();
    let green = r#""Network":"10.9.0.0/16","Isolated":true,"Backend":{"VNI":7}"#;
    let names_blue = format!(r#"{green},"Peers":["blue"]"#);
    fixture.join_with(record(&format!(r#"{RANGE},"Peers":["green","red"]"#)), [1]).await;
    fixture.wait_readiness(true).await;
    let linked = |fixture: &Fixture, vni| fixture.own().lock().state.contains_key(&peer_link(vni));
    let problems = fixture.status().await.problems;
    assert!(problems.iter().filter(|p| p.starts_with("network blue: its peer") && p.contains("not on this host")).count() == 2);

    let red = r#""Network":"10.9.4.0/22","Isolated":true,"Backend":{"VNI":8},"Peers":["blue"]"#;
    let routed = r#""Network":"10.9.0.0/16","Backend":{"VNI":8}"#;
    let own_range = r#""Network":"10.244.4.0/22","Isolated":true,"Backend":{"VNI":8},"Peers":["blue"]"#;
    let apart = r#""Network":"10.8.0.0/16","Isolated":true,"Backend":{"VNI":8},"Peers":["blue"]"#;
    for (green, red, links, problem) in [
        (
            green,
            apart,
            (false, true),
            Some(
                "its peer green does not name it, so nothing is routed between them: `overlayctl network set green --peer blue`",
            ),
        ),
        (&names_blue, routed, (true, false), Some("its peer red is routed, and only isolated networks")),
        (&names_blue, own_range, (true, false), Some("the range 10.244.4.0/22 of its peer red overlaps its own 10.244.0.0/16")),
        (
            &names_blue,
            red,
            (true, false),
            Some("the range 10.9.4.0/22 of its peer red overlaps that of its peer green 10.9.0.0/16"),
        ),
        (&names_blue, apart, (true, true), None),
    ] {
        let status = fixture.send_others(&[("blue", RANGE), ("green", green), ("red", red)]).await;
        assert_eq!((linked(&fixture, 7), linked(&fixture, 8)), links, "{problem:?}");
        match problem {
            Some(problem) => assert!(matches!(&status.problems[..], [only] if only.contains(problem)), "{:?}", status.problems),
            None => assert_eq!(status.problems, Vec::<String>::new()),
        }
    }
    // This network itself no longer names one of them.
    fixture.send_record(record(&format!(r#"{RANGE},"Peers":["red"]"#))).await;
    assert!(!linked(&fixture, 7) && linked(&fixture, 8));
    assert_eq!(fixture.record.borrow().as_ref().map(|record| record.peers.len()), Some(1));
}

/// Its namespace has containers, so that it cannot move.
#[tokio::test]
async fn network_of_another_kind_plans_nothing() {
    let mut fixture = Fixture::isolated_ready([1]).await;
    let states = fixture.states();
    let routed = record(r#""Network":"10.244.0.0/16""#);
    let status = fixture.send_record(routed.clone()).await;
    let wanted = "network blue: its configuration says routed now, but it stays isolated and unchanged on this host: detach its \
                  containers, or set it back with `overlayctl network set blue --routed=false`";
    assert_eq!(status.problems, [wanted]);
    assert!(status.ready && status.health == api::Health::Degraded && status.kind == api::NetworkKind::Isolated);
    // The agent learns of it, to start it anew without containers.
    assert_eq!(fixture.record.borrow_and_update().as_ref(), Some(&routed));
    assert_eq!(fixture.state_store.record.lock().unwrap().as_ref(), Some(&routed));
    fixture.send(StoreEvent::Upsert(entry(2, 2))).await;
    fixture.endpoints.send_replace(vec![local_entries::endpoint()]);
    fixture.status().await;
    assert_eq!(fixture.states(), states);
    // Drift is still repaired, and a reconciler that restarts has all entries again.
    fixture.own().lock().panics = true;
    fixture.own().lock().state.remove(&route(1));
    let events = fixture.own.as_ref().unwrap().1.clone();
    events.send(KernelEvent::Changed(vec![(route(1), None)])).await.unwrap();
    fixture.wait_readiness(false).await;
    fixture.wait_readiness(true).await;
    assert_eq!(fixture.states(), states);
    // Set back, it goes on with what happened meanwhile.
    let status = fixture.send_record(record(RANGE)).await;
    let problems: Vec<_> = status.problems.iter().filter(|problem| !problem.contains("was restarted")).collect();
    assert_eq!((problems, status.data_path.peers), (Vec::new(), 2));
    let port = Key::Link("ove0".into());
    assert!(fixture.own().lock().state.contains_key(&route(2)) && fixture.applied_endpoints.borrow().len() == 1, "{port}");
}

/// Outer packets never meet the routes of the network.
#[tokio::test]
async fn hosts_may_have_addresses_in_the_range() {
    let mut fixture = Fixture::isolated();
    let range = r#""Network":"192.0.0.0/8","SubnetLen":24,"Isolated":true"#;
    let key = |n: u8| format!("192.{n}.2.0-24");
    let peer = |n: u8| {
        let mut entry = entry(n, n);
        entry.key = key(n);
        entry.value.as_mut().unwrap().subnet = Subnet::from_key(&key(n)).unwrap();
        entry
    };
    fixture.send(StoreEvent::Connection(Connection::Up { position: StorePosition(1) })).await;
    fixture.send(StoreEvent::Config(Some(Ok(record(range))))).await;
    fixture.send(StoreEvent::Snapshot(vec![peer(1), peer(0)])).await;
    let held = HeldLease { subnet: Subnet::from_key(&key(9)).unwrap(), expiry: None, origin: LeaseOrigin::Acquired };
    fixture.send(StoreEvent::Own(OwnLease::Held(held))).await;
    fixture.wait_readiness(true).await;
    let status = fixture.status().await;
    assert_eq!((status.problems, status.data_path.peers), (Vec::new(), 2));
    let request = fixture.lease_request.borrow().clone().expect("a request");
    assert_eq!(request.public_ip.v4, "192.0.2.100".parse().ok());
}

#[tokio::test]
async fn default_network_cannot_be_isolated() {
    let fixture = Fixture::ready([1]).await;
    fixture.kernel.lock().applied_ops.clear();
    let status = fixture.send_record(record(RANGE)).await;
    assert_eq!(status.store.config_errors[0].field, "Isolated");
    assert!(status.ready && status.problems[0].contains("flannel's hosts share it"), "{:?}", status.problems);
    assert!(fixture.kernel.lock().applied_ops.is_empty());
}

/// What the operator reads names the network.
#[tokio::test]
async fn removed_record_of_named_network_keeps_data_path() {
    let mut fixture = Fixture::isolated();
    fixture.send(StoreEvent::Config(None)).await;
    let problems = fixture.status().await.problems;
    assert!(problems.iter().any(|problem| {
        problem.starts_with("network blue: waiting for the network's configuration")
            && problem.contains("`overlayctl network create blue`")
    }));
    fixture.join_with(record(RANGE), [1]).await;
    fixture.wait_readiness(true).await;
    let states = fixture.states();
    fixture.send(StoreEvent::Config(None)).await;
    let status = fixture.status().await;
    assert!(status.ready && matches!(&status.problems[..], [only] if only.contains("was deleted; the last one stays in use")));
    assert_eq!(fixture.states(), states);
}
