//! Tests of several networks over one store: one connection, one watch stream, one etcd lease, and no effect on each other.

use std::slice;
use std::time::{Duration, Instant};

use etcd_client::{CompactionOptions, PutOptions};

use super::harness::*;
use super::proxy::PausableProxy;
use crate::model::event::{Connection, LeaseOrigin, OwnLease, StoreEvent};
use crate::model::{ExpiryId, NetworkName};
use crate::store::codec;
use crate::store::lease::{HeldLease, lease_value};
use crate::store::{NetworkError, StoreConfig, StoreError, release};

const VALUE: &str = r#"{"PublicIP":"10.99.1.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"4a:de:38:28:a5:6b"}}"#;

/// Takes a lease in each network, and stops.
async fn take_leases(config: &StoreConfig, names: &[&str]) -> Vec<HeldLease> {
    let (store, _guard) = start_store(config.clone());
    let mut agents: Vec<Agent> = names.iter().map(|name| start(&store, name)).collect();
    let mut held = Vec::new();
    for agent in &mut agents {
        held.push(agent.next_held().await);
    }
    for agent in agents {
        agent.stop().await;
    }
    held
}

async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + TEST_TIMEOUT;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hundred_networks_share_connection_stream_and_etcd_lease() {
    let names: Vec<String> = (0..100).map(|n| if n == 0 { "default".to_owned() } else { format!("net{n}") }).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let etcd = Etcd::with_networks(&names).await;
    let proxy = PausableProxy::connect_to(slice::from_ref(&etcd)).await;
    let config = StoreConfig { endpoints: vec![proxy.endpoint()], keep_alive: Duration::from_secs(1), ..etcd.config() };
    let (store, _guard) = start_store(config);
    let begun = Instant::now();
    let mut agents: Vec<Agent> = names.iter().map(|name| start(&store, name)).collect();
    let mut etcd_leases = Vec::new();
    for agent in &mut agents {
        etcd_leases.push(agent.next_held().await.etcd_lease.unwrap());
    }
    println!("100 networks hold their leases after {:?}", begun.elapsed());
    etcd_leases.dedup();
    assert_eq!(etcd.leases().await, etcd_leases, "one etcd lease");
    assert_eq!(proxy.connection_count(), 1);
    let watchers = async || etcd.metric(&["etcd_debugging_mvcc_watcher_total"]).await == 200;
    eventually("each network has two watches", watchers).await;
    println!("100 networks are watched after {:?}", begun.elapsed());
    assert_eq!(etcd.metric(&["etcd_debugging_mvcc_watch_stream_total"]).await, 1);
    settle(&mut agents).await;

    let before = (etcd.request_count("LeaseKeepAlive").await, etcd.request_count("Range").await);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let after = (etcd.request_count("LeaseKeepAlive").await, etcd.request_count("Range").await);
    assert!((3..=7).contains(&(after.0 - before.0)), "{} renewals in 5 s", after.0 - before.0);
    assert_eq!(after.1, before.1, "no reads at rest");
    let ttls = store.remaining_ttls(etcd_leases.iter().map(|id| ExpiryId(*id)).collect()).await.unwrap();
    assert_eq!((ttls.len(), proxy.connection_count()), (1, 1));
    for (name, agent) in names.iter().zip(agents) {
        agent.stop().await;
        assert_eq!(etcd.subnets_of(name).await.0.len(), 1, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn network_that_starts_or_stops_touches_no_other() {
    let etcd = Etcd::with_networks(&["default", "blue"]).await;
    let proxy = PausableProxy::connect_to(slice::from_ref(&etcd)).await;
    let (store, _guard) = start_store(StoreConfig { endpoints: vec![proxy.endpoint()], ..etcd.config() });
    let mut default = start(&store, "default");
    let held = default.next_held().await;
    settle(slice::from_mut(&mut default)).await;
    let (before, renewals) = (etcd.subnets().await.0, etcd.request_count("LeaseKeepAlive").await);

    for _ in 0..2 {
        let mut blue = start(&store, "blue");
        assert_eq!(blue.next_held().await.etcd_lease, held.etcd_lease);
        etcd.put("networks/blue/subnets/10.244.250.0-24", VALUE, None).await;
        blue.find(|event| matches!(event, StoreEvent::Upsert(e) if e.key == "10.244.250.0-24").then_some(())).await;
        blue.stop().await;
        eventually("blue's watches are not cancelled", async || etcd.metric(&["etcd_debugging_mvcc_watcher_total"]).await == 2)
            .await;
        assert_eq!(etcd.subnets_of("blue").await.0.len(), 2, "a stopped network keeps its lease");
    }
    let messages = async || etcd.metric(&["grpc_server_msg_sent_total", "grpc_method=\"Watch\""]).await;
    let sent = messages().await;
    let done = store.network(&"blue".into()).release("id-7").await.unwrap();
    assert_eq!((done.released.len(), etcd.subnets_of("blue").await.0.len()), (1, 1));
    default.assert_quiet(Duration::from_secs(1)).await;
    assert_eq!(messages().await, sent, "nothing watches a network that this host is not in");
    assert_eq!(etcd.subnets().await.0, before);
    assert_eq!(etcd.leases().await, [held.etcd_lease.unwrap()]);
    assert_eq!(etcd.request_count("LeaseKeepAlive").await, renewals, "no renewal before its time");
    assert_eq!(proxy.connection_count(), 1);

    default.stop().await;
    store.network(&NetworkName::default()).release("id-7").await.unwrap();
    assert_eq!((etcd.leases().await, etcd.subnets().await.0.len()), (vec![], 0), "the last network revokes it");
}

#[tokio::test(flavor = "multi_thread")]
async fn outage_ends_and_resumes_each_network() {
    let names = ["default", "blue", "green"];
    let etcd = Etcd::with_networks(&names).await;
    let proxy = PausableProxy::connect_to(slice::from_ref(&etcd)).await;
    let (store, _guard) = start_store(StoreConfig { endpoints: vec![proxy.endpoint()], ..etcd.config() });
    let mut agents = names.map(|name| start(&store, name));
    for agent in &mut agents {
        agent.next_held().await;
    }
    settle(&mut agents).await;
    proxy.set_closed(true);
    for agent in &mut agents {
        let StoreEvent::Connection(Connection::Down { .. }) = agent.next().await else { panic!("down") };
    }
    for name in names {
        etcd.client().await.put(key(name, "subnets/10.244.250.0-24"), VALUE, None).await.unwrap();
        etcd.client().await.put(key(name, "config"), r#"{"Network":"10.244.0.0/15"}"#, None).await.unwrap();
    }
    let error = store.read_network(&"blue".into()).await.unwrap_err();
    assert!(matches!(error, NetworkError::Store(StoreError::NotConnected { .. })), "{error}");
    proxy.set_closed(false);
    for agent in &mut agents {
        agent
            .find(|event| match event {
                StoreEvent::Connection(connection) => matches!(connection, Connection::Up { .. }).then_some(()),
                event => panic!("{event:?}"),
            })
            .await;
        assert!(matches!(agent.next().await, StoreEvent::Config(Some(Ok(_)))), "what was missed");
        assert!(matches!(agent.next().await, StoreEvent::Upsert(e) if e.key == "10.244.250.0-24"), "what was missed");
        agent.assert_quiet(Duration::from_millis(500)).await;
    }
    assert_eq!(proxy.connection_count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_during_outage_rereads_each_network() {
    let names = ["default", "blue"];
    let etcd = Etcd::with_networks(&names).await;
    let proxy = PausableProxy::connect_to(slice::from_ref(&etcd)).await;
    let (store, _guard) = start_store(StoreConfig { endpoints: vec![proxy.endpoint()], ..etcd.config() });
    let mut agents = names.map(|name| start(&store, name));
    let mut held = Vec::new();
    for agent in &mut agents {
        held.push(agent.next_held().await);
    }
    settle(&mut agents).await;
    proxy.set_closed(true);
    let mut client = etcd.client().await;
    for name in names {
        for n in 0..4 {
            client.put(key(name, "subnets/10.244.250.0-24"), VALUE.replace("1.1", &format!("1.{n}")), None).await.unwrap();
        }
        client.put(key(name, "config"), r#"{"Network":"10.244.0.0/15"}"#, None).await.unwrap();
    }
    let revision = etcd.subnets().await.1;
    client.compact(revision, Some(CompactionOptions::new().with_physical())).await.unwrap();
    proxy.set_closed(false);
    for (agent, held) in agents.iter_mut().zip(&held) {
        agent.find(|event| matches!(event, StoreEvent::Config(Some(Ok(_)))).then_some(())).await;
        let keys = |event: &StoreEvent| match event {
            StoreEvent::Snapshot(all) => Some(all.iter().map(|entry| entry.key.clone()).collect::<Vec<_>>()),
            StoreEvent::Own(own) => panic!("{own:?}"),
            _ => None,
        };
        let mut wanted = [held.subnet.to_key(), "10.244.250.0-24".to_owned()];
        wanted.sort();
        assert_eq!(agent.find(keys).await, wanted);
    }
}

/// The responses of the shared stream have a size limit, and which network exceeds it is unknown.
#[tokio::test(flavor = "multi_thread")]
async fn too_large_response_rereads_each_network() {
    let names = ["default", "blue"];
    let etcd = Etcd::with_networks(&names).await;
    let proxy = PausableProxy::connect_to(slice::from_ref(&etcd)).await;
    let (store, _guard) = start_store(StoreConfig { endpoints: vec![proxy.endpoint()], ..etcd.config() });
    let mut agents = names.map(|name| start(&store, name));
    for agent in &mut agents {
        agent.next_held().await;
    }
    settle(&mut agents).await;
    proxy.set_closed(true);
    let large = "x".repeat(1_400_000);
    for n in 0..30 {
        // One key, so that a snapshot is small.
        etcd.put("networks/blue/subnets/10.244.250.0-24", &large[n..], None).await;
    }
    proxy.set_closed(false);
    for agent in &mut agents {
        agent.find(|event| matches!(event, StoreEvent::Snapshot(_)).then_some(())).await;
    }
    etcd.put_subnet("10.244.250.0-24", VALUE, None).await;
    agents[0].find(|event| matches!(event, StoreEvent::Upsert(_)).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_etcd_lease_is_replaced_by_one_for_all_networks() {
    let names: Vec<String> = (0..20).map(|n| format!("net{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let etcd = Etcd::with_networks(&names).await;
    // Not even the default network's record is needed.
    let (store, _guard) = start_store(etcd.config());
    let mut agents: Vec<Agent> = names.iter().map(|name| start(&store, name)).collect();
    let mut first = Vec::new();
    for agent in &mut agents {
        first.push(agent.next_held().await);
    }
    etcd.client().await.lease_revoke(first[0].etcd_lease.unwrap()).await.unwrap();
    let mut second = Vec::new();
    for agent in &mut agents {
        agent.next_not_held().await;
        second.push(agent.next_held().await);
    }
    let etcd_lease = second[0].etcd_lease;
    assert_ne!(etcd_lease, first[0].etcd_lease);
    for (first, second) in first.iter().zip(&second) {
        assert_eq!((second.subnet, second.etcd_lease, second.origin), (first.subnet, etcd_lease, LeaseOrigin::Acquired));
    }
    assert_eq!(etcd.leases().await, [etcd_lease.unwrap()]);
}

/// Writes the entry of host 7 that an earlier agent left, with an etcd lease of its own.
async fn put_earlier_entry(etcd: &Etcd, network: &str, subnet: &str) -> i64 {
    let id = etcd.grant(4).await;
    let value = codec::encode(&lease_value(&lease_request(NETWORK, 7))).unwrap();
    let options = Some(PutOptions::new().with_lease(id));
    etcd.client().await.put(key(network, &format!("subnets/{subnet}")), value, options).await.unwrap();
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn earlier_etcd_leases_are_renewed_until_the_entry_changes() {
    let etcd = Etcd::with_networks(&["default", "blue", "green"]).await;
    let (store, _guard) = start_store(etcd.config());
    let first = put_earlier_entry(&etcd, "default", "10.244.7.0-24").await;
    let mut default = start(&store, "default");
    assert_eq!(default.next_held().await.etcd_lease, Some(first));
    let second = put_earlier_entry(&etcd, "blue", "10.244.8.0-24").await;
    let mut blue = start(&store, "blue");
    assert_eq!(blue.next_held().await.etcd_lease, Some(second));
    let mut green = start(&store, "green");
    assert_eq!(green.next_held().await.etcd_lease, Some(first), "a new entry has the first one");
    // The TTL is 4 s: without renewals both would expire.
    tokio::time::sleep(Duration::from_secs(7)).await;
    let mut kept = [first, second];
    kept.sort_unstable();
    let mut leases = etcd.leases().await;
    leases.sort_unstable();
    assert_eq!(leases, kept);

    let mut changed = lease_request(NETWORK, 8);
    changed.node = lease_request(NETWORK, 7).node;
    blue.lease_request.send(Some(changed)).unwrap();
    let held = blue.next_held().await;
    assert_eq!((held.subnet, held.etcd_lease), (subnet("10.244.8.0-24"), Some(first)));
    eventually("the replaced etcd lease stays", async || etcd.leases().await == [first]).await;
    let own = |event: &StoreEvent| matches!(event, StoreEvent::Own(OwnLease::NotHeld { .. }));
    for agent in [&mut default, &mut blue, &mut green] {
        while let Ok(event) = agent.events.try_recv() {
            assert!(!own(&event), "{event:?}");
        }
    }
}

/// After an address change, each network must recognise its entry as this host's, although another network renews its etcd lease.
#[tokio::test(flavor = "multi_thread")]
async fn restart_with_another_address_keeps_each_lease() {
    let names = ["default", "blue"];
    let etcd = Etcd::with_networks(&names).await;
    let config = StoreConfig { keep_alive: Duration::from_secs(1), ..etcd.config() };
    let before = take_leases(&config, &names).await;
    let (store, _guard) = start_store(config);
    let mut request = lease_request(NETWORK, 8);
    request.node = lease_request(NETWORK, 7).node;
    let mut running = Vec::new();
    for (name, before) in names.iter().zip(&before) {
        let mut agent = Agent::in_network(&store, name, Some(request.clone()));
        let held = agent.next_held().await;
        assert_eq!((held.subnet, held.etcd_lease), (before.subnet, before.etcd_lease), "{name}");
        running.push(agent);
    }
}

/// An etcd lease that another network's entry is bound to must not be revoked, even if that network does not run.
#[tokio::test(flavor = "multi_thread")]
async fn release_keeps_etcd_lease_of_other_networks() {
    let etcd = Etcd::with_networks(&["default", "blue"]).await;
    take_leases(&etcd.config(), &["default", "blue"]).await;
    let (blue, etcd_leases) = (etcd.subnets_of("blue").await.0, etcd.leases().await);
    assert_eq!((blue.len(), etcd_leases.len()), (1, 1));
    // As `overlayd cleanup` does.
    assert_eq!(release(&etcd.config(), "id-7").await.unwrap().released.len(), 1);
    assert_eq!((etcd.subnets_of("blue").await.0, etcd.leases().await), (blue.clone(), etcd_leases.clone()));
    // A second entry of this host is released, while blue does not run.
    let value = codec::encode(&lease_value(&lease_request(NETWORK, 7))).unwrap();
    for key in ["10.244.5.0-24", "10.244.6.0-24"] {
        etcd.put_subnet(key, &value, Some(etcd_leases[0])).await;
    }
    etcd.put_subnet("10.244.5.0-24", &value, None).await;
    let (store, _guard) = start_store(etcd.config());
    let mut default = start(&store, "default");
    assert_eq!(default.next_held().await.etcd_lease, None, "the reservation comes first");
    assert_eq!(etcd.subnets().await.0.len(), 1);
    assert_eq!((etcd.subnets_of("blue").await.0, etcd.leases().await), (blue, etcd_leases));
    let config = etcd.config().of_network(&"blue".into()).unwrap();
    assert_eq!(release(&config, "id-7").await.unwrap().released.len(), 1);
    assert_eq!(etcd.leases().await, Vec::<i64>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn network_that_handles_no_events_delays_no_other() {
    let etcd = Etcd::with_networks(&["default", "blue"]).await;
    let (store, _guard) = start_store(etcd.config());
    let mut blue = start(&store, "blue");
    let mut default = start(&store, "default");
    default.next_held().await;
    blue.next_held().await;
    let mut client = etcd.client().await;
    for n in 0..300 {
        let value = VALUE.replace("1.1\"", &format!("{}.{}\"", n / 100, n % 100));
        client.put(key("blue", &format!("subnets/10.244.{}.0-24", n % 200)), value, None).await.unwrap();
    }
    etcd.put_subnet("10.244.250.0-24", VALUE, None).await;
    let begun = Instant::now();
    default.find(|event| matches!(event, StoreEvent::Upsert(e) if e.key == "10.244.250.0-24").then_some(())).await;
    println!("event delayed by {:?}", begun.elapsed());
    // Then it handles them. None is lost, also of those that came while nobody watched for it.
    let mut seen = std::collections::BTreeMap::new();
    let last = format!("10.244.{}.0-24", 299 % 200);
    blue.find(|event| {
        if let StoreEvent::Upsert(entry) = event {
            seen.insert(entry.key.clone(), entry.value.clone().unwrap().lease.public_ip.v4.unwrap().to_string());
        }
        (seen.get(&last).map(String::as_str) == Some("10.99.2.99")).then_some(())
    })
    .await;
    for n in 100..300 {
        let address = format!("10.99.{}.{}", n / 100, n % 100);
        assert_eq!(seen.get(&format!("10.244.{}.0-24", n % 200)), Some(&address));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn record_is_read_or_named_as_missing() {
    let etcd = Etcd::with_networks(&["default", "blue", "green"]).await;
    let (store, _guard) = start_store(etcd.config());
    etcd.put("networks/blue/config", r#"{"Network":"10.0.0.0/16","Isolated":true}"#, None).await;
    etcd.put("networks/green/config", "{", None).await;
    etcd.put("networks/red/subnets/10.244.1.0-24", VALUE, None).await;
    assert!(store.read_network(&"blue".into()).await.unwrap().isolated);
    assert!(!store.read_network(&NetworkName::default()).await.unwrap().isolated);
    for (name, wanted) in [
        ("pink", "no network pink; present: blue, default, green, red"),
        ("green", "network green: "),
        ("red", "network red: config: "),
    ] {
        let error = store.read_network(&name.into()).await.unwrap_err().to_string();
        assert!(error.starts_with(wanted), "{error}");
    }
}
