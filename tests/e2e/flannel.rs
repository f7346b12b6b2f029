//! Coexistence with flannel hosts: leases of flannel v0.20.2 are parsed, its renewals are ignored, and a migrated host keeps its
//! subnet.

use std::path::Path;

use overlay_agent::model::{Family, Vni};
use overlay_agent::plan::backend;
use overlay_tests::notify::{self, Notifications};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, etcd, kernel};
use overlayctl::lab::Families;

/// The keys and values of a recording of `etcdctl get --prefix`; an empty line follows the configuration.
fn read_recording(name: &str) -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/flannel-v0.20.2").join(name).join("etcd.txt");
    let text = std::fs::read_to_string(&path).expect_ok(&path.display().to_string());
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    lines.chunks(2).map(|pair| (pair[0].to_owned(), pair[1].to_owned())).collect()
}

/// Writes a recording into etcd, with flannel's TTL of a day for leases.
fn replay_recording(lab: &TestLab, name: &str) -> Vec<(String, String)> {
    let all = read_recording(name);
    assert_eq!(all.len(), 3, "a configuration and two leases");
    for (key, value) in &all {
        if key.ends_with("/config") {
            etcd::put(lab, key, value);
        } else {
            let lease = etcd::grant(lab, 86_400);
            etcd::put_leased(lab, key, value, &lease);
        }
    }
    all
}

/// A lab whose host 1 is not one of the recorded hosts.
async fn start_lab(families: Families) -> TestLab {
    let lab = TestLab::without_agents(3, families).await;
    etcd::delete(&lab, &etcd::config_key());
    lab
}

#[tokio::test(flavor = "multi_thread")]
async fn flannel_hosts_become_peers() {
    for (name, families, entries) in [("vxlan", Families::V4, 2), ("vxlan-dualstack", Families::Dual, 4)] {
        let lab = start_lab(families).await;
        let all = replay_recording(&lab, name);
        lab.start_agent("h3").await;
        lab.wait_converged("h3", CONVERGE_TIMEOUT).await;
        let peers = lab.host("h3").client().peers().await.expect_ok("peers").peers;
        assert_eq!(peers.len(), entries, "{name}: {peers:#?}");
        assert!(peers.iter().all(|p| p.host.is_none() && p.state == "programmed"), "{name}: {peers:#?}");
        for peer in &peers {
            let (_, value) = all.iter().find(|(_, v)| v.contains(&peer.public_ip.to_string())).expect_ok("its recording");
            assert!(value.contains(&peer.vtep.expect_ok("its MAC").to_string()), "{name}: {peer:?}");
        }
        let table = lab.ctl("h3", &["subnets"]).assert_code(0).stdout;
        assert_eq!(table.matches(" ok").count(), 2, "{name}: {table}");
        let own = lab.lease_of("h3").value;
        assert!(
            own.contains("\"PublicIPv6\":") && own.contains("\"BackendType\":\"vxlan\""),
            "the fields that flannel reads: {own}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_backends_are_listed_and_ignored() {
    let lab = start_lab(Families::V4).await;
    let all = replay_recording(&lab, "host-gw");
    // A configuration for host-gw is not supported; with one for vxlan, host-gw hosts are ignored.
    let host = lab.host("h3");
    host.agent_start(&[]).expect_ok("start");
    let refused = |s: &overlay_agent::model::api::Status| s.store.config_errors.iter().any(|e| e.field == "Backend.Type");
    host.wait_status(CONVERGE_TIMEOUT, "it does not refuse host-gw", refused).await.expect_ok("h3");
    etcd::put(&lab, &etcd::config_key(), r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let status = host.wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    assert_eq!((status.data_path.peers, status.store.refused.len()), (0, all.len() - 1), "{status:#?}");
    assert!(status.store.refused.iter().all(|r| r.to_string().contains("host-gw")), "{:?}", status.store.refused);
    assert!(lab.ctl("h3", &["subnets"]).assert_code(0).stdout.contains("host-gw"));
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_and_unknown_fields_are_understood() {
    let lab = start_lab(Families::V4).await;
    replay_recording(&lab, "vxlan-directrouting");
    let status = lab.start_agent("h3").await;
    let network = status.network.expect_ok("a network");
    let tunnel = backend::of(&network).tunnel().expect_ok("a tunnel");
    assert_eq!((tunnel.vni.map(Vni::get), tunnel.port), (Some(4242), 4789));
    let own = status.lease.expect_ok("a lease").subnet.get(Family::V4).expect_ok("a range");
    assert_eq!(own.length(), 26);
    let bound = |text: &str| text.parse::<std::net::IpAddr>().expect_ok(text);
    assert!((bound("10.244.10.0")..=bound("10.244.20.0")).contains(&own.base()), "{own}");
    assert_eq!(status.data_path.peers, 2);
    assert!(kernel::link(&lab, "h3", "ovx.4242").is_some());
    let routes = kernel::list_json(&lab, "h3", "ip", &["route", "show", "proto", kernel::ROUTE_PROTOCOL, "type", "unicast"]);
    let mut to: Vec<String> = routes.iter().map(|r| kernel::text(r, "dst")).collect();
    to.sort();
    assert_eq!(to, ["10.244.17.128/26", "10.244.18.192/26"]);
}

/// A flannel host is migrated: the lease with its public IP becomes ours, with its subnet.
#[tokio::test(flavor = "multi_thread")]
async fn migrated_host_keeps_subnet() {
    let lab = start_lab(Families::V4).await;
    let all = replay_recording(&lab, "vxlan");
    lab.start_agent("h3").await;
    let (key, _) = all.iter().find(|(_, value)| value.contains("10.99.1.1")).expect_ok("the lease of 10.99.1.1");
    let host = lab.host("h1");
    host.agent_start(&[]).expect_ok("start");
    let status = host.wait_ready(std::time::Duration::from_secs(60)).await.expect_ok("ready");
    assert_eq!(etcd::lease_key(&status.lease.expect_ok("a lease").subnet.to_key()), *key);
    let ours = lab.lease_of("h1");
    assert_eq!(ours.key, *key);
    assert_eq!(etcd::leases(&lab).len(), 3, "no second lease of the same host");
    host.wait_status(CONVERGE_TIMEOUT, "two peers", |s| s.data_path.peers == 2).await.expect_ok("h1");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    lab.wait_converged("h3", CONVERGE_TIMEOUT).await;
}

/// flanneld renews with a new etcd lease and an unconditional put of the same value. This is a watch event without a change.
#[tokio::test(flavor = "multi_thread")]
async fn flannel_renewal_changes_nothing() {
    let lab = start_lab(Families::V4).await;
    let all = replay_recording(&lab, "vxlan");
    lab.start_agent("h3").await;
    lab.wait_converged("h3", CONVERGE_TIMEOUT).await;
    let kernels = [("h3", Notifications::subscribe(&lab.open_netns("h3")))];
    kernels[0].1.wait_quiet().await;
    let before = lab.status("h3").await;
    for round in 0..3 {
        for (key, value) in all.iter().filter(|(key, _)| !key.ends_with("/config")) {
            let lease = etcd::grant(&lab, 86_400);
            etcd::put_leased(&lab, key, value, &lease);
        }
        let revision = etcd::revision(&lab);
        let seen = |s: &overlay_agent::model::api::Status| s.store.revision >= revision;
        lab.host("h3").wait_status(CONVERGE_TIMEOUT, &format!("renewal {round} is not noticed"), seen).await.expect_ok("h3");
    }
    let after = lab.status("h3").await;
    assert_eq!((after.data_path.drift_repairs, after.data_path.peers), (before.data_path.drift_repairs, 2));
    notify::assert_only_new_peer(&lab, &kernels, "three renewals of each flannel host").await;
}
