//! Many hosts at the same moment: each gets a subnet, no two overlap.

use std::time::{Duration, Instant};

use super::harness::*;
use crate::model::Subnet;
use crate::model::event::LeaseOrigin;

async fn race(network: &str, hosts: u16) -> Duration {
    let etcd = Etcd::start().await;
    etcd.put_config(network).await;
    let begun = Instant::now();
    let mut agents: Vec<Agent> = (0..hosts).map(|n| Agent::start(etcd.config(), Some(wish(network, n + 1)))).collect();
    let mut subnets: Vec<Subnet> = Vec::new();
    for agent in &mut agents {
        let held = agent.held().await;
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
    assert_eq!(entries.len(), usize::from(hosts), "one entry a host");
    assert!(entries.iter().all(|(_, _, etcd_lease)| *etcd_lease != 0));
    let leases = etcd.client().await.leases().await.unwrap().leases().len();
    assert_eq!(leases, usize::from(hosts), "no etcd lease dangles");
    took
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_hosts_in_a_large_pool() {
    println!("20 hosts, 255 subnets: {:?}", race(NETWORK, 20).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_hosts_in_a_pool_of_exactly_fifty() {
    let network = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.50.0"}"#;
    let took = race(network, 50).await;
    println!("50 hosts, 50 subnets: {took:?}");
    assert!(took < Duration::from_secs(15), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_hosts_with_two_families_in_a_tight_pool() {
    let network = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.20.0","EnableIPv6":true,
        "IPv6Network":"fd00:10:244::/56","IPv6SubnetMin":"fd00:10:244:1::","IPv6SubnetMax":"fd00:10:244:14::"}"#;
    let took = race(network, 20).await;
    println!("20 dual-stack hosts, 20 subnets: {took:?}");
    assert!(took < Duration::from_secs(15), "{took:?}");
}
