//! Manual deletions and changes of the agent's kernel state: repaired within a second, counted, and traffic recovers.

use std::time::{Duration, Instant};

use overlay_agent::model::Family;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, REPAIR_DEADLINE};
use overlay_tests::{ExpectContext, TestLab, kernel, kernel_fault};
use overlayctl::lab::Families;

async fn start_lab() -> TestLab {
    let lab = TestLab::up(|options| {
        options.hosts = 3;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    lab
}

/// Waits until a host's kernel state is as before; returns the time.
async fn wait_repaired(lab: &TestLab, what: &str, before: &std::collections::BTreeSet<String>) -> Duration {
    let start = Instant::now();
    overlay_tests::eventually(what, REPAIR_DEADLINE, || {
        let difference = kernel::difference(&kernel::actual_state(lab, "h1"), before);
        let ports = port_faults(lab);
        match (difference.is_empty(), ports.is_empty()) {
            (true, true) => Ok(()),
            _ => Err(format!("\n{difference}{}", ports.join("\n"))),
        }
    })
    .await;
    start.elapsed()
}

/// Faults of the bridge's ports.
fn port_faults(lab: &TestLab) -> Vec<String> {
    let links = kernel::list_json(lab, "h1", "ip", &["link", "show"]);
    let ports: Vec<_> = links.iter().filter(|link| kernel::text(link, "ifname").starts_with("ove")).collect();
    let bad = ports.iter().filter(|port| {
        let up = port["flags"].as_array().is_some_and(|flags| flags.iter().any(|f| f == "UP"));
        kernel::text(port, "master") != "ovb.1" || !up
    });
    let mut wrong: Vec<String> = bad.map(|port| format!("  {}: {} {}", port["ifname"], port["master"], port["flags"])).collect();
    if ports.is_empty() {
        wrong.push("  no port".to_owned());
    }
    wrong
}

/// A container of h1 reaches one of h2 in both families, each within a second.
async fn assert_traffic_flows(lab: &TestLab, what: &str) {
    let ping = |family| lab.start_ping("h1-c1", "h2-c1", family);
    let (v4, v6) = tokio::join!(ping(Family::V4), ping(Family::V6));
    let (v4, v6) = tokio::join!(v4.stop(), v6.stop());
    v4.assert_no_loss(&format!("IPv4 after: {what}"));
    v6.assert_no_loss(&format!("IPv6 after: {what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_drift_is_repaired() {
    let lab = start_lab().await;
    let before = kernel::actual_state(&lab, "h1");
    for fault in kernel_fault::ALL {
        let what = fault.name;
        let repairs = lab.status("h1").await.data_path.drift_repairs;
        fault.inject(&lab, "h1");
        let took = wait_repaired(&lab, what, &before).await;
        let status = lab.host("h1").wait_status(REPAIR_DEADLINE, "ready", |s| s.ready).await.expect_ok(what);
        assert!(status.data_path.drift_repairs > repairs, "{what}: the repairs are counted: {:#?}", status.data_path);
        assert!(status.data_path.last_drift.is_some() && status.data_path.failed.is_empty(), "{what}: {:#?}", status.data_path);
        println!("{what}: back after at most {} ms", took.as_millis());
        assert_traffic_flows(&lab, what).await;
    }
    let peers = lab.host("h1").client().peers().await.expect_ok("peers").peers;
    assert!(peers.iter().all(|p| p.state == "programmed" && p.last_repair.is_some()), "{peers:#?}");
    lab.assert_full_reachability().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn simultaneous_drift_is_repaired() {
    let lab = start_lab().await;
    let before = kernel::actual_state(&lab, "h1");
    let chosen = ["routes deleted", "next hops deleted", "neighbours deleted", "forwarding entries deleted", "all rules deleted"];
    let more = ["forwarding off", "IPv6 forwarding off", "addresses of the tunnel deleted", "addresses of the bridge deleted"];
    let script: Vec<&str> = kernel_fault::ALL
        .iter()
        .filter(|d| chosen.contains(&d.name) || more.contains(&d.name))
        .map(kernel_fault::KernelFault::script)
        .collect();
    assert_eq!(script.len(), 9, "each change is in the list");
    kernel_fault::shell(&lab, "h1", &script.join("\n"));
    wait_repaired(&lab, "all entries", &before).await;
    assert_traffic_flows(&lab, "all entries").await;

    kernel_fault::shell(&lab, "h1", "ip link delete ovx.1; ip link delete ovx6.1; ip link delete ovb.1; nft flush ruleset");
    wait_repaired(&lab, "all devices", &before).await;
    assert_traffic_flows(&lab, "all devices").await;
    lab.assert_full_reachability().await;
}

/// A container's host interface is deleted: the agent recreates it, with the container's address.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_container_interface_is_recreated() {
    let lab = start_lab().await;
    let endpoint = |lab: &TestLab| {
        let client = lab.host("h1").client();
        async move { client.endpoints().await.expect_ok("endpoints").endpoints.remove(0) }
    };
    let before = endpoint(&lab).await;
    kernel::run(&lab, "h1", &["ip", "link", "delete", &before.port.as_ref().expect_ok("a port").host_interface]);
    let has_route = || !kernel::run(&lab, "h1-c1", &["ip", "route", "show", "default"]).is_empty();
    overlay_tests::eventually_true("the interface is back with its route", CONVERGE_TIMEOUT, has_route).await;
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    assert_eq!(endpoint(&lab).await.addresses(), before.addresses());
    assert_traffic_flows(&lab, "a container's interface").await;
}

/// The kernel sends no notification when a device begins to accept router advertisements: the periodic resync finds it.
#[tokio::test(flavor = "multi_thread")]
async fn resync_repairs_silent_drift() {
    let lab = TestLab::up(|options| {
        options.hosts = 1;
        options.containers = 0;
        options.agent_args = vec!["--resync-interval=1s".to_owned()];
    })
    .await;
    for device in ["ovx.1", "ovb.1"] {
        let path = format!("ipv6/conf/{device}/accept_ra");
        kernel::shell(&lab, "h1", &format!("echo 1 >/proc/sys/net/{path}"));
        overlay_tests::eventually_true(&path, 2 * REPAIR_DEADLINE, || kernel::sysctl(&lab, "h1", &path) == "0").await;
    }
    assert!(lab.status("h1").await.data_path.drift_repairs >= 2);
}
