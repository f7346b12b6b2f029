//! Tests the lease protocol with real agents against a real three-member cluster under random faults. Afterwards all changes
//! since revision 1 are read from etcd's history: at no revision may two hosts have overlapping entries.
//!
//! A host is identified by its public IP, which stays when it loses its identity.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use etcd_client::{EventType, WatchOptions};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::harness::*;
use super::proxy::PausableProxy;
use crate::model::Subnet;
use crate::model::event::{OwnLease, StoreEvent};
use crate::store::StoreConfig;
use crate::store::codec;
use crate::store::keys::claimed_ranges;

/// Environment variable: seed that repeats the faults of a failed run. Each run prints its seed.
const SEED_ENV: &str = "OVERLAY_HISTORY_SEED";

/// A pool with one subnet more than agents, so that agents contend for the same subnets.
const TIGHT_NETWORK: &str = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.11.0"}"#;
/// The same with two families.
const TIGHT_DUAL_NETWORK: &str = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.11.0","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56","IPv6SubnetMin":"fd00:10:244:1::","IPv6SubnetMax":"fd00:10:244:d::"}"#;
const AGENTS: u16 = 10;

/// Short TTL, so that leases expire during the test.
const TTL: Duration = Duration::from_secs(3);
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// Duration of the faults in seconds, and the environment variable that changes it.
const FAULT_SECONDS: u64 = 12;
const SECONDS_ENV: &str = "OVERLAY_HISTORY_SECONDS";

/// One host: its proxy to the cluster and its agent, if running.
struct Host {
    number: u16,
    generation: u32,
    proxy: PausableProxy,
    agent: Option<Agent>,
    /// The subnets that its agents reported as held, in order.
    held: Vec<Subnet>,
}

impl Host {
    fn start(&mut self, network: &str) {
        let mut request = lease_request(network, self.number);
        request.node.id = format!("id-{}-{}", self.number, self.generation);
        request.preferred = self.held.last().copied().filter(|_| self.generation == 0);
        let endpoints = vec![self.proxy.endpoint()];
        let config = StoreConfig { endpoints, lease_ttl: TTL, keep_alive: KEEP_ALIVE, ..StoreConfig::default() };
        self.agent = Some(Agent::start(config, Some(request)));
    }

    /// Drains the agent's events and records the reported subnets.
    fn drain_events(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        while let Ok(event) = agent.events.try_recv() {
            if let StoreEvent::Own(OwnLease::Held(lease)) = event {
                self.held.push(lease.subnet);
            }
        }
    }
}

/// Number of occurrences of each fault.
type FaultCounts = BTreeMap<&'static str, u32>;

async fn run_with_faults(network: &str) {
    let seed = std::env::var(SEED_ENV).map_or_else(|_| rand::rng().random(), |text| text.parse().expect("a seed"));
    println!("{SEED_ENV}={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let mut members = Etcd::cluster().await;
    members[0].put_config(network).await;
    let mut hosts = Vec::new();
    for number in 1..=AGENTS {
        let link = PausableProxy::connect_to(&members).await;
        let mut host = Host { number, generation: 0, proxy: link, agent: None, held: Vec::new() };
        host.start(network);
        hosts.push(host);
    }
    let mut counts = FaultCounts::new();
    let mut failed_member: Option<(usize, bool, Instant)> = None;
    let seconds = std::env::var(SECONDS_ENV).map_or(FAULT_SECONDS, |text| text.parse().expect("seconds"));
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < deadline {
        // Only one member at a time is killed or suspended, so that a majority remains.
        if let Some((member, killed, since)) = failed_member
            && since.elapsed() > Duration::from_secs(2)
        {
            if killed {
                assert!(members[member].run().await, "the member starts again")
            } else {
                members[member].set_suspended(false)
            };
            failed_member = None;
        }
        let host = random.random_range(0..hosts.len());
        let fault = inject_fault(&mut hosts[host], network, &mut random);
        *counts.entry(fault).or_default() += 1;
        if failed_member.is_none() && random.random_range(0..15) == 0 {
            let (member, kill) = (random.random_range(0..3), random.random_bool(0.5));
            if kill {
                members[member].kill()
            } else {
                members[member].set_suspended(true)
            };
            *counts.entry(if kill { "a member is killed" } else { "a member is stopped" }).or_default() += 1;
            failed_member = Some((member, kill, Instant::now()));
        }
        if random.random_range(0..2) == 0 && failed_member.is_none() {
            *counts.entry(tamper_with_store(&members[0], &mut random).await).or_default() += 1;
        }
        hosts.iter_mut().for_each(Host::drain_events);
        tokio::time::sleep(Duration::from_millis(random.random_range(80..300))).await;
    }
    if let Some((member, killed, _)) = failed_member {
        if killed {
            assert!(members[member].run().await, "the member starts again")
        } else {
            members[member].set_suspended(false)
        };
    }
    for host in &mut hosts {
        host.proxy.set_paused(false);
        if host.agent.is_none() {
            host.start(network);
        }
    }
    wait_until_settled(&members[0], &mut hosts).await;
    let (changes, holders) = verify_history(&members[0]).await;
    println!("{changes} changes, {} holders of {} subnets, faults: {counts:?}", hosts.len(), holders.len());
    assert!(changes > 2 * usize::from(AGENTS), "the test caused too few changes");
    // Each subnet that an agent reported as held must appear in the history as its own.
    for host in &hosts {
        let ip = lease_request(network, host.number).public_ip.v4.expect("IPv4");
        for subnet in &host.held {
            let all = holders.get(&subnet.to_key()).map(Vec::as_slice).unwrap_or_default();
            assert!(all.contains(&ip), "host {} reported {subnet} as held, but its holders in etcd were {all:?}", host.number);
        }
    }
}

/// Injects a random fault into a host.
fn inject_fault(host: &mut Host, network: &str, random: &mut SmallRng) -> &'static str {
    if host.agent.is_none() {
        host.start(network);
        return "starts";
    }
    if host.proxy.is_paused() {
        host.proxy.set_paused(false);
        return "is reconnected";
    }
    match random.random_range(0..6) {
        0..3 => {
            host.proxy.set_paused(true);
            "is cut off"
        }
        3 | 4 => {
            host.drain_events();
            host.agent = None;
            "crashes"
        }
        _ => {
            host.drain_events();
            host.agent = None;
            host.generation += 1;
            "crashes and loses its state"
        }
    }
}

/// Deletes a key or revokes an etcd lease, like an operator.
async fn tamper_with_store(member: &Etcd, random: &mut SmallRng) -> &'static str {
    let (entries, _) = member.subnets().await;
    let Some((key, _, lease)) = entries.get(random.random_range(0..entries.len().max(1))) else { return "nothing to delete" };
    let mut client = member.client().await;
    if random.random_bool(0.5) {
        client.delete(format!("{PREFIX}/subnets/{key}"), None).await.expect("a deletion");
        "a key is deleted"
    } else {
        // The lease may have expired already.
        let _gone = client.lease_revoke(*lease).await;
        "an etcd lease is revoked"
    }
}

/// Waits until each host holds exactly one entry and no other entry exists.
async fn wait_until_settled(member: &Etcd, hosts: &mut [Host]) {
    let deadline = Instant::now() + 2 * TEST_TIMEOUT;
    loop {
        hosts.iter_mut().for_each(Host::drain_events);
        let (entries, _) = member.subnets().await;
        let mut owners: Vec<IpAddr> = entries.iter().filter_map(|(_, value, _)| ip(value)).collect();
        owners.sort_unstable();
        let doubled = owners.windows(2).any(|pair| pair[0] == pair[1]);
        if owners.len() == hosts.len() && entries.len() == hosts.len() && !doubled {
            return;
        }
        assert!(Instant::now() < deadline, "the hosts do not settle: {entries:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn ip(value: &str) -> Option<IpAddr> {
    codec::owner(value.as_bytes()).public_ip.v4
}

/// Reads all changes since revision 1, and asserts that no two hosts' entries overlap at any revision. Returns the number of
/// changes and all holders of each key.
async fn verify_history(member: &Etcd) -> (usize, BTreeMap<String, Vec<IpAddr>>) {
    let (_, revision) = member.subnets().await;
    let mut client = member.client().await;
    let prefix = format!("{PREFIX}/subnets/");
    let options = WatchOptions::new().with_prefix().with_start_revision(1);
    let mut stream = client.watch(prefix.clone(), Some(options)).await.expect("a watch from the beginning");
    // This key marks the end of the history.
    client.put(format!("{prefix}end"), "", None).await.expect("the end of the history");
    let mut entries: BTreeMap<String, IpAddr> = BTreeMap::new();
    let mut holders: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    let mut changes = 0;
    loop {
        let message = tokio::time::timeout(TEST_TIMEOUT, stream.message()).await.expect("history in time");
        let message = message.expect("history").expect("more history");
        assert_eq!(message.compact_revision(), 0, "the history is compacted");
        for event in message.events() {
            let kv = event.kv().expect("a key");
            let key = kv.key_str().expect("text").strip_prefix(&prefix).expect("the prefix").to_owned();
            let at = kv.mod_revision();
            if key == "end" {
                assert!(at > revision);
                return (changes, holders);
            }
            changes += 1;
            if event.event_type() == EventType::Delete {
                entries.remove(&key);
                continue;
            }
            let owner = ip(kv.value_str().expect("text")).expect("an owner");
            let ranges = claimed_ranges(&key);
            for (other, other_owner) in entries.iter().filter(|(other, other_owner)| **other != key && **other_owner != owner) {
                let overlap = claimed_ranges(other).iter().any(|o| ranges.iter().any(|r| o.overlaps(*r)));
                assert!(!overlap, "at revision {at} {owner} has {key} and {other_owner} has {other}");
            }
            // An entry must be deleted before another host may create it.
            let before = entries.insert(key.clone(), owner);
            assert!(before.is_none_or(|before| before == owner), "at revision {at} {owner} takes {key} from {before:?}");
            holders.entry(key).or_default().push(owner);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn single_stack_history_has_no_overlaps() {
    run_with_faults(TIGHT_NETWORK).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dual_stack_history_has_no_overlaps() {
    run_with_faults(TIGHT_DUAL_NETWORK).await;
}
