//! `etcd grpc-proxy` stands between the agents and the cluster: leases are taken, kept alive and followed through it, and a proxy that is killed is as
//! a server that is.

use std::time::Duration;

use overlay_agent::model::Family;
use overlay_agent::model::api::{Health, Status};
use overlay_tests::story::{READY, SOON};
use overlay_tests::wait::eventually_asked;
use overlay_tests::{Must, Story, churn, cluster, etcd, eventually, proxy};
use overlayctl::lab::LabOptions;
use serde_json::Value;

/// How long the agents may take to notice that nobody answers, or that somebody does again.
const NOTICED: Duration = Duration::from_secs(30);
/// How long a renewal may take to come: it is due every 20 s.
const RENEWED: Duration = Duration::from_secs(60);

fn three_hosts(options: &mut LabOptions) {
    options.hosts = 3;
    options.containers = 1;
}

fn well(status: &Status) -> bool {
    status.store.connected && status.ready && status.health == Health::Ok
}

async fn all(story: &Story, what: &str, wished: impl Fn(&Status) -> bool + Copy) {
    for host in story.hosts() {
        host.wait_status(NOTICED, what, wished).await.must(host.name());
    }
}

/// Subnets that no host has, as keys of leases.
fn free_keys(story: &Story) -> [String; 3] {
    let taken = etcd::leases(story);
    let keys = (1..=254).rev().map(|third| etcd::lease_key(&format!("10.244.{third}.0-24")));
    let free: Vec<String> = keys.filter(|key| taken.iter().all(|entry| entry.key != *key)).take(3).collect();
    free.try_into().ok().must("three free subnets")
}

/// A lease that somebody else writes at the cluster itself.
fn put_foreign(story: &Story, key: &str, number: u8) {
    cluster::at(story, 1, &["put", "--", key, &churn::lease(number, 1)]).exits(0);
}

/// Seconds that an etcd lease has left, as the cluster says.
fn left(story: &Story, lease: i64) -> i64 {
    let said = cluster::at(story, 2, &["lease", "timetolive", &format!("{lease:x}"), "-w", "json"]).exits(0);
    let answer: Value = said.json();
    answer["ttl"].as_i64().must("a time to live")
}

/// Watches that the members serve.
fn watchers(story: &Story) -> u32 {
    let of_member = |member: &u8| {
        let url = format!("{}/metrics", cluster::url(*member, 2379));
        let page = story.exec("net", &["curl", "--silent", "--fail", "--max-time", "10", &url]).must("curl");
        let page = String::from_utf8_lossy(&page.stdout).into_owned();
        let line = page.lines().find_map(|line| line.strip_prefix("etcd_debugging_mvcc_watcher_total "));
        line.and_then(|count| count.parse::<u32>().ok()).must("the number of watches")
    };
    cluster::MEMBERS.iter().map(of_member).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_are_taken_followed_and_kept_alive_through_proxies() {
    let story = proxy::up(|options| {
        options.hosts = 6;
        options.containers = 1;
    })
    .await;
    story.assert_all_reach().await;
    let leases = etcd::leases(&story);
    assert_eq!(leases.len(), 6, "{leases:?}");
    assert!(leases.iter().all(|entry| entry.lease != 0), "each is bound to an etcd lease: {leases:?}");

    // What is written at the cluster itself arrives.
    let [first, second, _] = free_keys(&story);
    put_foreign(&story, &first, 1);
    all(&story, "the foreign lease does not arrive", |s| s.data_path.peers == 6).await;
    cluster::at(&story, 3, &["del", "--", &first]).exits(0);
    all(&story, "the foreign lease does not go", |s| s.data_path.peers == 5).await;

    // A proxy asks the cluster once for all who ask it the same, once a change has brought them to the same revision. Two more it has of its own.
    let proxies = u32::try_from(proxy::PROXIES.len()).must("a few");
    let mut round = 0;
    eventually("the members serve one watch for each proxy", SOON, || {
        round += 1;
        if round % 2 == 0 {
            put_foreign(&story, &first, 1)
        } else {
            put_foreign(&story, &second, 2)
        }
        let count = watchers(&story);
        if count <= 3 * proxies { Ok(()) } else { Err(format!("{count} watches for six agents behind {proxies} proxies")) }
    })
    .await;

    // Each is renewed: the time left goes down, and up again.
    for entry in &leases {
        let mut lowest = i64::MAX;
        eventually(&format!("{} is renewed", entry.key), RENEWED, || {
            let now = left(&story, entry.lease);
            if now > lowest {
                return Ok(());
            }
            lowest = now;
            Err(format!("{now} s left"))
        })
        .await;
    }
    let own: Vec<_> = etcd::leases(&story).into_iter().filter(|entry| entry.lease != 0).collect();
    assert_eq!(own, leases, "a renewal writes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_are_killed_and_come_back() {
    let story = proxy::up(three_hosts).await;
    let leases = etcd::leases(&story);
    let flow = story.flow("h1-c1", "h2-c1", Family::V4).await;

    // One of two: who was behind it goes to the other one.
    let [first, second, _] = free_keys(&story);
    proxy::kill(&story, 1);
    put_foreign(&story, &first, 1);
    all(&story, "it does not follow by the other proxy", |s| well(s) && s.data_path.peers == 3).await;

    // Both: the data path stays, and what is missed meanwhile arrives afterwards.
    proxy::kill(&story, 2);
    all(&story, "it does not notice", |s| !s.store.connected && s.health == Health::Degraded).await;
    put_foreign(&story, &second, 2);
    cluster::at(&story, 1, &["del", "--", &first]).exits(0);
    cluster::at(&story, 1, &["get", "no-such-key"]).exits(0);
    all(&story, "the data path changes without a store", |s| s.data_path.peers == 3).await;
    for number in proxy::PROXIES {
        proxy::start(&story, number).await;
    }
    all(&story, "it does not come back", |s| well(s) && s.data_path.peers == 3).await;
    // As many leases as before, but others.
    for host in story.hosts() {
        eventually_asked(&format!("{} has what it missed", host.name()), SOON, async || {
            let peers = host.client().peers().await.map_err(|error| error.to_string())?.peers;
            let subnets: Vec<String> = peers.iter().map(|peer| peer.subnet.to_string()).collect();
            let has = |key: &str| subnets.iter().any(|subnet| etcd::lease_key(&subnet.replace('/', "-")) == key);
            if has(&second) && !has(&first) { Ok(()) } else { Err(format!("{subnets:?}")) }
        })
        .await;
    }
    flow.stop().await.assert_no_loss("while both proxies were gone");
    let now = etcd::leases(&story);
    let own: Vec<_> = now.into_iter().filter(|entry| entry.lease != 0).collect();
    assert_eq!(own, leases, "each host has kept its subnet");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_starts_and_takes_a_lease_through_a_proxy_after_a_compaction() {
    let story = proxy::up(|options| {
        three_hosts(options);
        options.agents = false;
    })
    .await;
    for (key, number) in free_keys(&story).iter().zip(1..) {
        put_foreign(&story, key, number);
    }
    let revision = etcd::revision(&story);
    cluster::at(&story, 1, &["compact", "--physical", &revision.to_string()]).exits(0);
    for host in story.hosts() {
        host.agent_start(&[]).must("start");
        host.wait_ready(READY).await.must(host.name());
    }
    let whole = |s: &Status| well(s) && s.data_path.peers == 5;
    for host in story.hosts() {
        host.wait_status(SOON, "it has not all peers", whole).await.must(host.name());
    }
    assert_eq!(etcd::leases(&story).len(), 6);
}
