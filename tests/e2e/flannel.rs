//! Side by side with flannel hosts: what flannel v0.20.2 wrote is understood, its renewals are no event, and a host that changes over keeps
//! its subnet.

use std::path::Path;

use overlay_agent::model::Family;
use overlay_tests::notify::Notifications;
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, Story, etcd, kernel};
use overlayctl::lab::Families;

/// The keys and values of a recording, as `etcdctl get --prefix` printed them; the configuration is followed by an empty line.
fn recorded(name: &str) -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/flannel-v0.20.2").join(name).join("etcd.txt");
    let text = std::fs::read_to_string(&path).must(&path.display().to_string());
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    lines.chunks(2).map(|pair| (pair[0].to_owned(), pair[1].to_owned())).collect()
}

/// Writes a recording into etcd: leases by flannel's TTL of a day.
fn play(story: &Story, name: &str) -> Vec<(String, String)> {
    let all = recorded(name);
    assert_eq!(all.len(), 3, "a configuration and two leases");
    for (key, value) in &all {
        if key.ends_with("/config") {
            etcd::put(story, key, value);
        } else {
            let lease = etcd::grant(story, 86_400);
            etcd::put_leased(story, key, value, &lease);
        }
    }
    all
}

/// A lab whose host 1 is none of the recorded ones.
async fn lab(families: Families) -> Story {
    let story = Story::without_agents(3, families).await;
    etcd::delete(&story, &etcd::config_key());
    story
}

#[tokio::test(flavor = "multi_thread")]
async fn its_hosts_are_peers() {
    for (name, families, entries) in [("vxlan", Families::V4, 2), ("vxlan-dualstack", Families::Dual, 4)] {
        let story = lab(families).await;
        let all = play(&story, name);
        story.start("h3").await;
        story.settled("h3", SOON).await;
        let peers = story.at("h3").client().peers().await.must("peers").peers;
        assert_eq!(peers.len(), entries, "{name}: {peers:#?}");
        assert!(peers.iter().all(|p| p.host.is_none() && p.state == "programmed"), "{name}: {peers:#?}");
        for peer in &peers {
            let (_, value) = all.iter().find(|(_, v)| v.contains(&peer.public_ip.to_string())).must("its recording");
            assert!(value.contains(&peer.vtep.to_string()), "{name}: {peer:?}");
        }
        let table = story.ctl("h3", &["subnets"]).exits(0).out;
        assert_eq!(table.matches(" ok").count(), 2, "{name}: {table}");
        let own = story.lease_of("h3").value;
        assert!(own.contains("\"PublicIPv6\":") && own.contains("\"BackendType\":\"vxlan\""), "what flannel reads: {own}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_backends_are_listed_and_left_out() {
    let story = lab(Families::V4).await;
    let all = play(&story, "host-gw");
    // A configuration for host-gw is not served; with one for vxlan its hosts are left out.
    let host = story.at("h3");
    host.agent_start(&[]).must("start");
    let refused = |s: &overlay_agent::model::api::Status| s.store.config_errors.iter().any(|e| e.field == "Backend.Type");
    host.wait_status(SOON, "it does not refuse host-gw", refused).await.must("h3");
    etcd::put(&story, &etcd::config_key(), r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let status = host.wait_ready(READY).await.must("ready");
    assert_eq!((status.data_path.peers, status.store.refused.len()), (0, all.len() - 1), "{status:#?}");
    assert!(status.store.refused.iter().all(|r| r.to_string().contains("host-gw")), "{:?}", status.store.refused);
    assert!(story.ctl("h3", &["subnets"]).exits(0).out.contains("host-gw"));
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_and_unknown_fields_are_understood() {
    let story = lab(Families::V4).await;
    play(&story, "vxlan-directrouting");
    let status = story.start("h3").await;
    let network = status.network.must("a network");
    assert_eq!((network.vxlan.vni.get(), network.vxlan.port), (4242, 4789));
    let own = status.lease.must("a lease").subnet.get(Family::V4).must("a range");
    assert_eq!(own.length(), 26);
    let bound = |text: &str| text.parse::<std::net::IpAddr>().must(text);
    assert!((bound("10.244.10.0")..=bound("10.244.20.0")).contains(&own.base()), "{own}");
    assert_eq!(status.data_path.peers, 2);
    assert!(kernel::link(&story, "h3", "ovx.4242").is_some());
    let routes = kernel::listed(&story, "h3", "ip", &["route", "show", "proto", kernel::PROTOCOL, "type", "unicast"]);
    let mut to: Vec<String> = routes.iter().map(|r| kernel::text(r, "dst")).collect();
    to.sort();
    assert_eq!(to, ["10.244.17.128/26", "10.244.18.192/26"]);
}

/// A flannel host is upgraded: the lease with its public IP becomes ours, with its subnet.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_changes_over_keeps_its_subnet() {
    let story = lab(Families::V4).await;
    let all = play(&story, "vxlan");
    story.start("h3").await;
    let (key, _) = all.iter().find(|(_, value)| value.contains("10.99.1.1")).must("the lease of 10.99.1.1");
    let host = story.at("h1");
    host.agent_start(&[]).must("start");
    let status = host.wait_ready(std::time::Duration::from_secs(60)).await.must("ready");
    assert_eq!(etcd::lease_key(&status.lease.must("a lease").subnet.to_key()), *key);
    let ours = story.lease_of("h1");
    assert_eq!(ours.key, *key);
    assert_eq!(etcd::leases(&story).len(), 3, "no second lease of the same host");
    host.wait_status(SOON, "two peers", |s| s.data_path.peers == 2).await.must("h1");
    story.settled("h1", SOON).await;
    story.settled("h3", SOON).await;
}

/// flanneld renews by a new etcd lease and an unconditional put of the same value: an event, and nothing has changed.
#[tokio::test(flavor = "multi_thread")]
async fn its_renewal_changes_nothing() {
    let story = lab(Families::V4).await;
    let all = play(&story, "vxlan");
    story.start("h3").await;
    story.settled("h3", SOON).await;
    let notifications = Notifications::listen(&story.inside("h3"));
    notifications.settle().await;
    let before = story.status("h3").await;
    for round in 0..3 {
        for (key, value) in all.iter().filter(|(key, _)| !key.ends_with("/config")) {
            let lease = etcd::grant(&story, 86_400);
            etcd::put_leased(&story, key, value, &lease);
        }
        let revision = etcd::revision(&story);
        let seen = |s: &overlay_agent::model::api::Status| s.store.revision >= revision;
        story.at("h3").wait_status(SOON, &format!("renewal {round} is not seen"), seen).await.must("h3");
    }
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    notifications.assert_silence("three renewals of each flannel host");
    let after = story.status("h3").await;
    assert_eq!((after.data_path.drift_repairs, after.data_path.peers), (before.data_path.drift_repairs, 2));
}
