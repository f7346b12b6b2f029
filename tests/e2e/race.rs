//! Simultaneous starts of agents: each gets its own subnet, and routes to all other hosts.

use std::collections::BTreeSet;
use std::time::Duration;

use overlay_agent::model::Subnet;
use overlay_tests::{ExpectContext, TestLab, etcd, test_lab};
use overlayctl::lab::{Families, agent};

#[tokio::test(flavor = "multi_thread")]
async fn two_hosts_get_distinct_subnets() {
    // The result of a race is random: repeat it from an empty store.
    for _ in 0..5 {
        assert_distinct_subnets(2, Families::V4, "10.244.0.0/16").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_hosts_get_distinct_subnets() {
    assert_distinct_subnets(20, Families::V4, "10.244.0.0/16").await;
}

/// As many subnets as hosts: the hosts' choices collide, and the last host has a single free subnet.
#[tokio::test(flavor = "multi_thread")]
async fn full_pool_gives_every_host_a_subnet() {
    assert_distinct_subnets(7, Families::V4, "10.200.0.0/27").await;
}

async fn assert_distinct_subnets(hosts: u16, families: Families, network: &str) {
    let lab = TestLab::up(|options| {
        options.hosts = hosts;
        options.containers = 0;
        options.families = families;
        options.agents = false;
        options.networks.v4 = network.parse().ok();
        if network.ends_with("/27") {
            options.config.insert("SubnetLen".to_owned(), 30.into());
        }
    })
    .await;
    for host in lab.hosts() {
        host.agent_start(&[]).expect_ok("start");
    }
    agent::wait_mesh(&lab, Duration::from_secs(60)).await.expect_ok("a full mesh");
    let mut subnets: Vec<Subnet> = Vec::new();
    for host in lab.hosts() {
        let status = host.client().status().await.expect_ok(host.name());
        let subnet = status.lease.expect_ok("a lease").subnet;
        assert!(!subnets.iter().any(|other| other.overlaps(&subnet)), "{} has {subnet}, like another host", host.name());
        subnets.push(subnet);
        assert!(status.problems.is_empty(), "{}: {:?}", host.name(), status.problems);
        lab.wait_converged(host.name(), test_lab::CONVERGE_TIMEOUT).await;
    }
    let keys: BTreeSet<String> = etcd::leases(&lab).into_iter().map(|entry| entry.key).collect();
    let expected_keys: BTreeSet<String> = subnets.iter().map(|subnet| etcd::lease_key(&subnet.to_key())).collect();
    assert_eq!(keys, expected_keys, "one lease per host, and none left behind by a lost race");
}
