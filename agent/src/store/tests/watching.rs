//! Tests of the watch: snapshot, changes, lost connections, compaction.

use std::time::Instant;

use etcd_client::CompactionOptions;
use tokio::sync::mpsc;

use super::harness::*;
use crate::model::event::{Connection, StoreEvent};
use crate::model::{ExpiryId, StorePosition};
use crate::store::StoreError;
use crate::store::connect::{Session, connect};
use crate::store::watch::{WatchState, Watcher};
use crate::store::watch_stream;

const VALUE: &str =
    r#"{"PublicIP":"10.99.1.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"4a:de:38:28:a5:6b"}}"#;

fn snapshot_keys(event: &StoreEvent) -> Option<Vec<String>> {
    match event {
        StoreEvent::Snapshot(entries) => Some(entries.iter().map(|entry| entry.key.clone()).collect()),
        _ => None,
    }
}

fn upsert_key(event: &StoreEvent) -> Option<String> {
    match event {
        StoreEvent::Upsert(entry) => Some(entry.key.clone()),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshot_is_followed_by_every_change() {
    let etcd = Etcd::start().await;
    etcd.put_config(NETWORK).await;
    etcd.put_subnet("10.244.1.0-24", VALUE, None).await;
    let mut agent = Agent::start(etcd.config(), None);
    assert!(matches!(agent.next().await, StoreEvent::Connection(Connection::Up { position }) if position >= StorePosition(3)));
    assert!(matches!(agent.next().await, StoreEvent::Config(Some(Ok(_)))));
    let StoreEvent::Snapshot(entries) = agent.next().await else { panic!("a snapshot") };
    let record = entries[0].value.clone().unwrap();
    assert_eq!((record.subnet, record.expiry), (subnet("10.244.1.0-24"), None));

    let lease = etcd.grant(60).await;
    etcd.put_subnet("10.244.2.0-24", VALUE, Some(lease)).await;
    let StoreEvent::Upsert(entry) = agent.next().await else { panic!("an upsert") };
    let record = entry.value.unwrap();
    assert_eq!((record.expiry, record.created), (Some(ExpiryId(lease)), record.changed));
    etcd.client().await.put(format!("{PREFIX}/other/x"), "not ours", None).await.unwrap();
    etcd.client().await.lease_revoke(lease).await.unwrap();
    assert_eq!(agent.next().await, StoreEvent::Remove { key: "10.244.2.0-24".to_owned() });
    etcd.put_subnet("$(reboot)", "x", None).await;
    assert!(matches!(agent.next().await, StoreEvent::Upsert(entry) if entry.value.is_err()));
    etcd.put_config("{").await;
    assert!(matches!(agent.next().await, StoreEvent::Config(Some(Err(_)))));
    etcd.client().await.delete(format!("{PREFIX}/config"), None).await.unwrap();
    assert_eq!(agent.next().await, StoreEvent::Config(None));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn late_configuration_is_delivered() {
    let etcd = Etcd::start().await;
    let mut agent = Agent::start(etcd.config(), None);
    agent.find(|e| (*e == StoreEvent::Config(None)).then_some(())).await;
    assert_eq!(agent.find(snapshot_keys).await, Vec::<String>::new());
    etcd.put_config(NETWORK).await;
    assert!(matches!(agent.next().await, StoreEvent::Config(Some(Ok(_)))));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_restart_resumes_without_snapshot() {
    let mut etcd = Etcd::start().await;
    etcd.put_config(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), None);
    agent.find(snapshot_keys).await;
    etcd.put_subnet("10.244.1.0-24", VALUE, None).await;
    assert_eq!(agent.find(upsert_key).await, "10.244.1.0-24");
    etcd.kill();
    let StoreEvent::Connection(Connection::Down { error }) = agent.next().await else { panic!("down") };
    assert!(error.contains(&etcd.endpoint()), "{error}");
    assert!(etcd.run().await);
    // The agent must not miss a write from before it reconnects.
    etcd.put_subnet("10.244.2.0-24", VALUE, None).await;
    let started = Instant::now();
    agent
        .find(|event| match event {
            StoreEvent::Connection(Connection::Up { .. }) => Some(()),
            StoreEvent::Connection(Connection::Down { .. }) => None,
            other => panic!("{other:?}"),
        })
        .await;
    assert_eq!(agent.next().await, StoreEvent::Upsert(entry_of(&etcd, "10.244.2.0-24").await), "no snapshot in between");
    println!("back after {:?}", started.elapsed());
    agent.stop().await;
}

async fn entry_of(etcd: &Etcd, key: &str) -> crate::model::event::StoreEntry {
    let snapshot = crate::store::read_all(&etcd.config(), false).await.unwrap();
    snapshot.entries.into_iter().find(|entry| entry.key == key).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn replaced_etcd_data_triggers_new_snapshot() {
    let mut etcd = Etcd::start().await;
    etcd.put_config(NETWORK).await;
    for n in 1..5 {
        etcd.put_subnet(&format!("10.244.{n}.0-24"), VALUE, None).await;
    }
    let mut agent = Agent::start(etcd.config(), None);
    assert_eq!(agent.find(snapshot_keys).await.len(), 4);
    etcd.kill();
    etcd.delete_data();
    assert!(etcd.run().await);
    etcd.put_subnet("10.244.9.0-24", VALUE, None).await;
    // Depending on timing, the entry is part of the snapshot or follows it.
    agent.find(|event| (event == &StoreEvent::Config(None)).then_some(())).await;
    let keys = agent.find(snapshot_keys).await;
    if keys.is_empty() {
        assert_eq!(agent.find(upsert_key).await, "10.244.9.0-24");
    } else {
        assert_eq!(keys, ["10.244.9.0-24"]);
    }
    agent.stop().await;
}

/// Runs a watcher over a stream of its own.
async fn run_watcher(
    watcher: &mut Watcher,
    session: &Session,
    state: &WatchState,
    events: &mpsc::Sender<StoreEvent>,
) -> StoreError {
    let (watches, requests) = mpsc::channel(1);
    watcher.begin_session(session, false);
    tokio::select! {
        error = watch_stream::run(session, requests) => error,
        error = watcher.run(session, &watches, state, events) => error,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_triggers_new_snapshot() {
    let etcd = Etcd::start().await;
    etcd.put_config(NETWORK).await;
    etcd.put_subnet("10.244.1.0-24", VALUE, None).await;
    let session = connect(&etcd.config()).await.unwrap();
    let (sender, mut events) = mpsc::channel(64);
    let (mut watcher, state) = (Watcher::new(), WatchState::new());
    let first = async {
        loop {
            if let Some(StoreEvent::Snapshot(entries)) = events.recv().await {
                return entries.len();
            }
        }
    };
    tokio::select! {
        error = run_watcher(&mut watcher, &session, &state, &sender) => panic!("{error}"),
        entries = first => assert_eq!(entries, 1),
    }
    // The store changes and is compacted while no watch is connected.
    etcd.client().await.delete(format!("{PREFIX}/subnets/10.244.1.0-24"), None).await.unwrap();
    for n in 2..6 {
        etcd.put_subnet(&format!("10.244.{n}.0-24"), VALUE, None).await;
    }
    let (_, revision) = etcd.subnets().await;
    etcd.client().await.compact(revision, Some(CompactionOptions::new().with_physical())).await.unwrap();
    let session = connect(&etcd.config()).await.unwrap();
    let again = async {
        loop {
            match events.recv().await.unwrap() {
                StoreEvent::Snapshot(entries) => return entries.len(),
                StoreEvent::Connection(Connection::Up { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::select! {
        error = run_watcher(&mut watcher, &session, &state, &sender) => panic!("{error}"),
        entries = again => assert_eq!(entries, 4),
    }
    etcd.put_subnet("10.244.7.0-24", VALUE, None).await;
    let session = connect(&etcd.config()).await.unwrap();
    tokio::select! {
        error = run_watcher(&mut watcher, &session, &state, &sender) => panic!("{error}"),
        event = events.recv() => assert!(matches!(event, Some(StoreEvent::Upsert(e)) if e.key == "10.244.7.0-24")),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_etcd_is_retried_until_available() {
    let mut etcd = Etcd::start().await;
    // An etcd that is killed before its first leader election never elects a leader.
    etcd.client().await;
    etcd.kill();
    let mut agent = Agent::start(etcd.config(), None);
    let StoreEvent::Connection(Connection::Down { error }) = agent.next().await else { panic!("down") };
    assert!(error.contains("cannot be reached") && error.contains("refused"), "{error}");
    assert!(etcd.run().await);
    agent.find(snapshot_keys).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_endpoint_falls_back_to_next() {
    let etcd = Etcd::start().await;
    let mut config = etcd.config();
    config.endpoints.extend(["http://127.0.0.1:1".to_owned(), "http://127.0.0.2:1".to_owned()]);
    for _ in 0..5 {
        let session = connect(&config).await.unwrap();
        assert_eq!(session.context.endpoint, etcd.endpoint());
    }
    config.endpoints.remove(0);
    let Err(error) = connect(&config).await else { panic!("no server listens") };
    let error = error.to_string();
    assert!(error.contains("127.0.0.1:1 cannot be reached") && error.contains("127.0.0.2:1 cannot be reached"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn put_reaches_watcher_quickly() {
    let etcd = Etcd::start().await;
    etcd.put_config(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), None);
    agent.find(snapshot_keys).await;
    let mut client = etcd.client().await;
    let key = format!("{PREFIX}/subnets/10.244.1.0-24");
    // A plain watch of the same key is the baseline: a busy machine delays both.
    let mut plain = client.watch(key.as_str(), None).await.unwrap();
    let mut delays = Vec::new();
    for n in 0..200 {
        let value = VALUE.replace("10.99.1.1", &format!("10.99.1.{}", n + 1));
        client.put(key.as_str(), value, None).await.unwrap();
        let answered = Instant::now();
        let (baseline, event) = tokio::join!(async { plain.message().await.map(|_| answered.elapsed()).unwrap() }, async {
            agent.find(upsert_key).await;
            answered.elapsed()
        });
        delays.push(event.saturating_sub(baseline));
    }
    delays.sort_unstable();
    println!("from the message of a plain watch to the event: median {:?}, 99th of 100 {:?}", delays[100], delays[198]);
    assert!(delays[100].as_millis() < 50, "{:?}", delays[100]);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_server_is_detected() {
    let etcd = Etcd::start().await;
    etcd.put_config(NETWORK).await;
    let mut agent = Agent::start(etcd.config(), None);
    agent.find(snapshot_keys).await;
    // A change that arrives proves that the watch is established: from here on only the ping can detect the failure.
    etcd.put_subnet("10.244.1.0-24", VALUE, None).await;
    agent.find(upsert_key).await;
    etcd.set_suspended(true);
    let begun = Instant::now();
    agent.find(|event| matches!(event, StoreEvent::Connection(Connection::Down { .. })).then_some(())).await;
    println!("hung server detected after {:?}", begun.elapsed());
    assert!(begun.elapsed().as_secs() < 15, "{:?}", begun.elapsed());
    etcd.set_suspended(false);
    agent.find(|event| matches!(event, StoreEvent::Connection(Connection::Up { .. })).then_some(())).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn member_or_leader_loss_is_survived() {
    let mut members = Etcd::cluster().await;
    members[0].put_config(NETWORK).await;
    let mut config = members[0].config();
    config.endpoints = members.iter().map(Etcd::endpoint).collect();
    let mut agent = Agent::start(config, Some(lease_request(NETWORK, 7)));
    let held = agent.next_held().await;
    // A majority remains: another server takes over, whichever was used.
    members[0].kill();
    members[1].put_subnet("10.244.9.0-24", VALUE, None).await;
    agent.find(|event| (upsert_key(event)? == "10.244.9.0-24").then_some(())).await;
    // Without a majority the remaining server has no leader and reports that.
    members[1].kill();
    agent.find(|event| matches!(event, StoreEvent::Connection(Connection::Down { .. })).then_some(())).await;
    assert!(members[0].run().await && members[1].run().await);
    members[0].put_subnet("10.244.10.0-24", VALUE, None).await;
    let only = |event: &StoreEvent| match event {
        StoreEvent::Snapshot(_) | StoreEvent::Own(_) => panic!("{event:?}"),
        event => (upsert_key(event)? == "10.244.10.0-24").then_some(()),
    };
    agent.find(only).await;
    let all = crate::store::read_all(&members[2].config(), true).await.unwrap();
    assert!(all.entries.iter().any(|entry| entry.key == held.subnet.to_key()));
    agent.stop().await;
}
