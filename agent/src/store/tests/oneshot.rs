//! Tests of single requests, and of many leases.

use std::time::{Duration, Instant};

use etcd_client::{PutOptions, Txn, TxnOp};

use super::harness::*;
use crate::model::event::OwnLease;
use crate::store::{ReplaceCondition, StoreError, get_config, put_config, read_all, release};

#[tokio::test(flavor = "multi_thread")]
async fn config_is_replaced_only_at_expected_revision() {
    let etcd = Etcd::start().await;
    let config = etcd.config();
    etcd.client().await;
    assert_eq!(get_config(&config).await.unwrap().text, None);
    let first = put_config(&config, NETWORK, ReplaceCondition::Revision(0)).await.unwrap();
    let known = get_config(&config).await.unwrap();
    assert_eq!((known.text.as_deref(), known.mod_revision), (Some(NETWORK), first));
    let error = put_config(&config, DUAL, ReplaceCondition::Revision(0)).await.unwrap_err();
    assert!(matches!(error, StoreError::Conflict { expected: 0, found } if found == first), "{error}");
    let second = put_config(&config, DUAL, ReplaceCondition::Revision(first)).await.unwrap();
    assert!(second > first);
    put_config(&config, NETWORK, ReplaceCondition::Any).await.unwrap();
    assert_eq!(get_config(&config).await.unwrap().text.as_deref(), Some(NETWORK));
}

#[tokio::test(flavor = "multi_thread")]
async fn release_deletes_entries_and_revokes_leases() {
    let etcd = Etcd::start().await;
    etcd.put_config(NETWORK).await;
    let mut agents: Vec<Agent> = (1..4).map(|n| Agent::start(etcd.config(), Some(lease_request(NETWORK, n)))).collect();
    for agent in &mut agents {
        agent.next_held().await;
    }
    for agent in agents {
        agent.stop().await;
    }
    etcd.put_subnet("10.244.200.0-24", r#"{"PublicIP":"192.168.0.99"}"#, None).await;
    let all = read_all(&etcd.config(), true).await.unwrap();
    assert_eq!((all.entries.len(), all.remaining_ttls.len()), (4, 3));
    let day = Duration::from_secs(24 * 60 * 60);
    assert!(
        all.remaining_ttls.values().all(|left| *left <= day && *left > day - Duration::from_secs(60)),
        "{:?}",
        all.remaining_ttls
    );
    let done = release(&etcd.config(), "id-2").await.unwrap();
    assert_eq!((done.released.len(), done.reservations.len()), (1, 0));
    assert_eq!(read_all(&etcd.config(), true).await.unwrap().remaining_ttls.len(), 2);
    assert_eq!(etcd.client().await.leases().await.unwrap().leases().len(), 2, "its etcd lease is revoked");
    assert_eq!(release(&etcd.config(), "id-2").await.unwrap(), crate::store::ReleaseReport::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_leases_are_paginated() {
    let etcd = Etcd::start().await;
    let network = r#"{"Network":"10.0.0.0/8"}"#;
    etcd.put_config(network).await;
    let mut client = etcd.client().await;
    let lease = etcd.grant(3600).await;
    for chunk in (0..10_000_u32).collect::<Vec<_>>().chunks(100) {
        let put = |n: &u32| {
            let [_, _, high, low] = n.to_be_bytes();
            let value = format!(
                r#"{{"PublicIP":"172.16.{high}.{low}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:{high:02x}:{low:02x}"}},"Node":{{"Name":"h{n}","Id":"{n:032x}"}}}}"#
            );
            TxnOp::put(format!("{PREFIX}/subnets/10.{}.{low}.0-24", high + 1), value, Some(PutOptions::new().with_lease(lease)))
        };
        client.txn(Txn::new().and_then(chunk.iter().map(put).collect::<Vec<_>>())).await.unwrap();
    }
    let begun = Instant::now();
    let all = read_all(&etcd.config(), false).await.unwrap();
    println!("10,000 leases read and decoded in {:?}", begun.elapsed());
    assert_eq!(all.entries.len(), 10_000);
    assert!(all.entries.iter().all(|entry| entry.value.is_ok()));
    let begun = Instant::now();
    let mut agent = Agent::start(etcd.config(), Some(lease_request(network, 0xffff)));
    let (snapshot, own) = agent.snapshot_and_own().await;
    println!("10,000 leases delivered and an own one held {:?} after start", begun.elapsed());
    let OwnLease::Held(held) = own else { panic!("{own:?}") };
    // The snapshot may have the own lease already.
    let others = snapshot.iter().filter(|entry| entry.key != held.subnet.to_key()).count();
    assert_eq!(others, 10_000);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_response_shrinks_page_size() {
    let etcd = Etcd::start().await;
    etcd.put_config(NETWORK).await;
    let large = "x".repeat(1_400_000);
    for n in 1..31 {
        etcd.put_subnet(&format!("10.244.{n}.0-24"), &large, None).await;
    }
    let all = read_all(&etcd.config(), false).await.unwrap();
    assert_eq!(all.entries.len(), 30);
    assert!(all.entries.iter().all(|entry| entry.value.is_err()));
}
