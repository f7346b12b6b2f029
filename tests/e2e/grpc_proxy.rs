//! `etcd grpc-proxy` between the agents and the cluster: leases are acquired, renewed and watched through it. A killed proxy is
//! like a killed server.

use std::collections::BTreeMap;
use std::time::Duration;

use overlay_agent::model::Family;
use overlay_agent::model::api::{Health, Status};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::wait::eventually_async;
use overlay_tests::{ExpectContext, TestLab, churn, cluster, etcd, eventually, proxy};
use overlayctl::lab::LabOptions;
use serde_json::Value;

/// Time limit for the agents to notice that the proxies are gone or back.
const DETECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Time limit for a renewal, which is due every 20 s.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(60);

fn three_hosts(options: &mut LabOptions) {
    options.hosts = 3;
    options.containers = 1;
}

fn is_healthy(status: &Status) -> bool {
    status.store.connected && status.ready && status.health == Health::Ok
}

async fn wait_all_status(lab: &TestLab, what: &str, condition: impl Fn(&Status) -> bool + Copy) {
    for host in lab.hosts() {
        host.wait_status(DETECT_TIMEOUT, what, condition).await.expect_ok(host.name());
    }
}

/// Writes a lease directly to the cluster.
fn put_foreign(lab: &TestLab, key: &str, number: u8) {
    cluster::etcdctl_at_member(lab, 1, &["put", "--", key, &churn::lease(number, 1)]).assert_code(0);
}

/// Remaining seconds of an etcd lease, according to the cluster.
fn remaining_ttl(lab: &TestLab, lease: i64) -> i64 {
    let output = cluster::etcdctl_at_member(lab, 2, &["lease", "timetolive", &format!("{lease:x}"), "-w", "json"]).assert_code(0);
    let answer: Value = output.json();
    answer["ttl"].as_i64().expect_ok("a time to live")
}

/// The number of watches on the members.
fn watcher_count(lab: &TestLab) -> u32 {
    let of_member = |member: &u8| {
        let url = format!("{}/metrics", cluster::url(*member, 2379));
        let page = lab.exec("net", &["curl", "--silent", "--fail", "--max-time", "10", &url]).expect_ok("curl");
        let page = String::from_utf8_lossy(&page.stdout).into_owned();
        let line = page.lines().find_map(|line| line.strip_prefix("etcd_debugging_mvcc_watcher_total "));
        line.and_then(|count| count.parse::<u32>().ok()).expect_ok("the number of watches")
    };
    cluster::MEMBERS.iter().map(of_member).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_work_through_proxies() {
    let lab = proxy::up(|options| {
        options.hosts = 6;
        options.containers = 1;
    })
    .await;
    lab.assert_full_reachability().await;
    let leases = etcd::leases(&lab);
    assert_eq!(leases.len(), 6, "{leases:?}");
    assert!(leases.iter().all(|entry| entry.lease != 0), "each is bound to an etcd lease: {leases:?}");

    // A write directly to the cluster arrives.
    let [first, second, _] = etcd::free_keys(&lab);
    put_foreign(&lab, &first, 1);
    wait_all_status(&lab, "the foreign lease does not arrive", |s| s.data_path.peers == 6).await;
    cluster::etcdctl_at_member(&lab, 3, &["del", "--", &first]).assert_code(0);
    wait_all_status(&lab, "the foreign lease does not go", |s| s.data_path.peers == 5).await;

    // A proxy merges equal watches, of the leases and of the record, once a change has brought them to the same revision. It has
    // two more of its own.
    let proxies = u32::try_from(proxy::PROXIES.len()).expect_ok("a few");
    let mut round = 0;
    eventually("the members serve two watches for each proxy", CONVERGE_TIMEOUT, || {
        round += 1;
        if round % 2 == 0 {
            put_foreign(&lab, &first, 1)
        } else {
            put_foreign(&lab, &second, 2)
        }
        let count = watcher_count(&lab);
        if count <= 4 * proxies { Ok(()) } else { Err(format!("{count} watches for six agents behind {proxies} proxies")) }
    })
    .await;

    // Each lease is renewed: the remaining time decreases, and increases again.
    let mut lowest: BTreeMap<i64, i64> = leases.iter().map(|entry| (entry.lease, i64::MAX)).collect();
    eventually("each lease is renewed", RENEWAL_TIMEOUT, || {
        lowest.retain(|lease, lowest| {
            let now = remaining_ttl(&lab, *lease);
            now <= std::mem::replace(lowest, now.min(*lowest))
        });
        if lowest.is_empty() { Ok(()) } else { Err(format!("not yet, with the seconds left: {lowest:?}")) }
    })
    .await;
    let own: Vec<_> = etcd::leases(&lab).into_iter().filter(|entry| entry.lease != 0).collect();
    assert_eq!(own, leases, "a renewal writes no key");
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_recover_from_killed_proxies() {
    let lab = proxy::up(three_hosts).await;
    let leases = etcd::leases(&lab);
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V4).await;

    // One of two proxies: its agents move to the other one.
    let [first, second, _] = etcd::free_keys(&lab);
    proxy::kill(&lab, 1);
    put_foreign(&lab, &first, 1);
    wait_all_status(&lab, "it does not reconnect to the other proxy", |s| is_healthy(s) && s.data_path.peers == 3).await;

    // Both: the data path stays, and missed changes arrive later.
    proxy::kill(&lab, 2);
    wait_all_status(&lab, "it does not notice", |s| !s.store.connected && s.health == Health::Degraded).await;
    put_foreign(&lab, &second, 2);
    cluster::etcdctl_at_member(&lab, 1, &["del", "--", &first]).assert_code(0);
    cluster::etcdctl_at_member(&lab, 1, &["get", "no-such-key"]).assert_code(0);
    wait_all_status(&lab, "the data path changes without a store", |s| s.data_path.peers == 3).await;
    for number in proxy::PROXIES {
        proxy::start(&lab, number).await;
    }
    wait_all_status(&lab, "it does not come back", |s| is_healthy(s) && s.data_path.peers == 3).await;
    // The same number of leases, with different keys.
    for host in lab.hosts() {
        eventually_async(&format!("{} has the missed changes", host.name()), CONVERGE_TIMEOUT, async || {
            let peers = host.client().peers().await.map_err(|error| error.to_string())?.peers;
            let subnets: Vec<String> = peers.iter().map(|peer| peer.subnet.to_string()).collect();
            let has = |key: &str| subnets.iter().any(|subnet| etcd::lease_key(&subnet.replace('/', "-")) == key);
            if has(&second) && !has(&first) { Ok(()) } else { Err(format!("{subnets:?}")) }
        })
        .await;
    }
    flow.stop().await.assert_no_loss("without proxies");
    let now = etcd::leases(&lab);
    let own: Vec<_> = now.into_iter().filter(|entry| entry.lease != 0).collect();
    assert_eq!(own, leases, "each host has kept its subnet");
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_starts_through_proxy_after_compaction() {
    let lab = proxy::up(|options| {
        three_hosts(options);
        options.agents = false;
    })
    .await;
    for (key, number) in etcd::free_keys(&lab).iter().zip(1..) {
        put_foreign(&lab, key, number);
    }
    let revision = etcd::revision(&lab);
    cluster::etcdctl_at_member(&lab, 1, &["compact", "--physical", &revision.to_string()]).assert_code(0);
    for host in lab.hosts() {
        host.agent_start(&[]).expect_ok("start");
        host.wait_ready(READY_TIMEOUT).await.expect_ok(host.name());
    }
    let complete = |s: &Status| is_healthy(s) && s.data_path.peers == 5;
    for host in lab.hosts() {
        host.wait_status(CONVERGE_TIMEOUT, "not all peers", complete).await.expect_ok(host.name());
    }
    assert_eq!(etcd::leases(&lab).len(), 6);
}
