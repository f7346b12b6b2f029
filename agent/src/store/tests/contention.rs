//! Many hosts acquire leases at the same time: each gets a subnet, no two overlap.

use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::harness::*;
use crate::model::Subnet;
use crate::model::event::LeaseOrigin;

async fn acquire_concurrently(network: &str, hosts: u16) -> Duration {
    let etcd = Etcd::start().await;
    etcd.put_config(network).await;
    let begun = Instant::now();
    let mut agents: Vec<Agent> = (0..hosts).map(|n| Agent::start(etcd.config(), Some(lease_request(network, n + 1)))).collect();
    let mut subnets: Vec<Subnet> = Vec::new();
    for agent in &mut agents {
        let held = agent.next_held().await;
        assert_eq!(held.origin, LeaseOrigin::Acquired);
        for other in &subnets {
            assert!(!other.overlaps(&held.subnet), "{other} and {}", held.subnet);
        }
        subnets.push(held.subnet);
    }
    let took = begun.elapsed();
    for agent in agents {
        agent.stop().await;
    }
    let (entries, _) = etcd.subnets().await;
    assert_eq!(entries.len(), usize::from(hosts), "one entry per host");
    assert!(entries.iter().all(|(_, _, etcd_lease)| *etcd_lease != 0));
    let leases = etcd.client().await.leases().await.unwrap().leases().len();
    assert_eq!(leases, usize::from(hosts), "an etcd lease is not bound to an entry");
    took
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_hosts_acquire_from_large_pool() {
    println!("20 hosts, 255 subnets: {:?}", acquire_concurrently(NETWORK, 20).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_hosts_fill_pool_of_fifty() {
    let network = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.50.0"}"#;
    let took = acquire_concurrently(network, 50).await;
    println!("50 hosts, 50 subnets: {took:?}");
    assert!(took < Duration::from_secs(15), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_dual_stack_hosts_fill_tight_pool() {
    let network = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.20.0","EnableIPv6":true,
        "IPv6Network":"fd00:10:244::/56","IPv6SubnetMin":"fd00:10:244:1::","IPv6SubnetMax":"fd00:10:244:14::"}"#;
    let took = acquire_concurrently(network, 20).await;
    println!("20 dual-stack hosts, 20 subnets: {took:?}");
    assert!(took < Duration::from_secs(15), "{took:?}");
}

/// Injects random faults into agents, entries and etcd. No two entries may ever overlap, and each host must have one in the end.
async fn run_with_random_faults(network: &str, seed: u64) {
    const HOSTS: u16 = 8;
    let mut random = SmallRng::seed_from_u64(seed);
    let mut etcd = Etcd::start().await;
    etcd.put_config(network).await;
    let start = |etcd: &Etcd, host: u16| Agent::start(etcd.config(), Some(lease_request(network, host + 1)));
    let mut agents: Vec<Agent> = (0..HOSTS).map(|host| start(&etcd, host)).collect();
    for _ in 0..40 {
        for agent in &mut agents {
            while agent.events.try_recv().is_ok() {}
        }
        let host = random.random_range(0..HOSTS);
        let (entries, _) = etcd.subnets().await;
        let entry = (!entries.is_empty()).then(|| entries[random.random_range(0..entries.len())].clone());
        match (random.random_range(0..12), entry) {
            (0..4, _) => agents[usize::from(host)] = start(&etcd, host),
            (4..6, Some((key, _, _))) => drop(etcd.client().await.delete(format!("{PREFIX}/subnets/{key}"), None).await),
            (6..8, Some((_, _, lease))) => drop(etcd.client().await.lease_revoke(lease).await),
            (8, Some((key, value, lease))) => {
                // Overwrites this host's value with another host's.
                let foreign = value
                    .replace("\"Id\":\"id-", "\"Id\":\"x-")
                    .replace("192.168.0.", "192.168.7.")
                    .replace("fd99::", "fd99::7:");
                drop(etcd.client().await.put(format!("{PREFIX}/subnets/{key}"), foreign, None).await);
                tokio::time::sleep(Duration::from_millis(50)).await;
                drop(etcd.client().await.delete(format!("{PREFIX}/subnets/{key}"), None).await);
                drop(etcd.client().await.lease_revoke(lease).await);
            }
            (9, _) => {
                etcd.kill();
                assert!(etcd.run().await);
            }
            _ => tokio::time::sleep(Duration::from_millis(random.random_range(0..100))).await,
        }
        assert_disjoint(&etcd.subnets().await.0);
    }
    let settling = Instant::now();
    let deadline = settling + TEST_TIMEOUT;
    loop {
        for agent in &mut agents {
            while agent.events.try_recv().is_ok() {}
        }
        let (entries, _) = etcd.subnets().await;
        assert_disjoint(&entries);
        if (1..=HOSTS).all(|n| entries.iter().filter(|(_, value, _)| value.contains(&format!("\"id-{n}\""))).count() == 1) {
            assert_eq!(entries.len(), usize::from(HOSTS), "{entries:#?}");
            println!("seed {seed}: settled after {:?}", settling.elapsed());
            break;
        }
        assert!(Instant::now() < deadline, "seed {seed}: not every host has one entry: {entries:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for agent in agents {
        agent.stop().await;
    }
}

fn assert_disjoint(entries: &[(String, String, i64)]) {
    let subnets: Vec<Subnet> = entries.iter().map(|(key, _, _)| subnet(key)).collect();
    for (i, one) in subnets.iter().enumerate() {
        for other in &subnets[..i] {
            assert!(!one.overlaps(other), "{one} and {other}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_faults_never_cause_overlap() {
    let single = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.9.0"}"#;
    let dual = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.9.0","EnableIPv6":true,
        "IPv6Network":"fd00:10:244::/56","IPv6SubnetMin":"fd00:10:244:1::","IPv6SubnetMax":"fd00:10:244:9::"}"#;
    for seed in 1..3 {
        run_with_random_faults(single, seed).await;
        run_with_random_faults(dual, seed).await;
    }
}
