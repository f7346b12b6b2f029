//! Somebody deletes or changes by hand what the agent made: it is back within a second, counted, and traffic flows again.

use std::time::{Duration, Instant};

use overlay_agent::model::Family;
use overlay_tests::story::{SECOND, SOON};
use overlay_tests::{Must, Story, damage, kernel};
use overlayctl::lab::Families;

async fn lab() -> Story {
    let story = Story::up(|options| {
        options.hosts = 3;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    story.settled("h1", SOON).await;
    story
}

/// Waits until a host's kernel is as it was; how long that took.
async fn healed(story: &Story, what: &str, before: &std::collections::BTreeSet<String>) -> Duration {
    let start = Instant::now();
    overlay_tests::eventually(what, SECOND, || {
        let difference = kernel::difference(&kernel::actual(story, "h1"), before);
        let ports = ports(story);
        match (difference.is_empty(), ports.is_empty()) {
            (true, true) => Ok(()),
            _ => Err(format!("\n{difference}{}", ports.join("\n"))),
        }
    })
    .await;
    start.elapsed()
}

/// What is wrong with the ports of the bridge.
fn ports(story: &Story) -> Vec<String> {
    let links = kernel::listed(story, "h1", "ip", &["link", "show"]);
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

/// Both families of a container of h1 reach one of h2, each within a second.
async fn flows_again(story: &Story, what: &str) {
    for family in Family::ALL {
        let flow = story.flow("h1-c1", "h2-c1", family).await;
        flow.go_on(Duration::from_millis(250)).await;
        flow.stop().await.assert_no_loss(&format!("{family} after: {what}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_by_itself() {
    let story = lab().await;
    let before = kernel::actual(&story, "h1");
    for damage in damage::ALL {
        let what = damage.name;
        let repairs = story.status("h1").await.data_path.drift_repairs;
        damage.on(&story, "h1");
        let took = healed(&story, what, &before).await;
        let status = story.at("h1").wait_status(SECOND, "ready", |s| s.ready).await.must(what);
        assert!(status.data_path.drift_repairs > repairs, "{what}: the repairs are counted: {:#?}", status.data_path);
        assert!(status.data_path.last_drift.is_some() && status.data_path.failed.is_empty(), "{what}: {:#?}", status.data_path);
        println!("{what}: back after at most {} ms", took.as_millis());
        flows_again(&story, what).await;
    }
    let peers = story.at("h1").client().peers().await.must("peers").peers;
    assert!(peers.iter().all(|p| p.state == "programmed" && p.last_repair.is_some()), "{peers:#?}");
    story.assert_all_reach().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_at_once() {
    let story = lab().await;
    let before = kernel::actual(&story, "h1");
    let chosen = ["routes deleted", "next hops deleted", "neighbours deleted", "forwarding entries deleted", "all rules deleted"];
    let more = ["forwarding off", "IPv6 forwarding off", "addresses of the tunnel deleted", "addresses of the bridge deleted"];
    let script: Vec<&str> =
        damage::ALL.iter().filter(|d| chosen.contains(&d.name) || more.contains(&d.name)).map(damage::Damage::script).collect();
    assert_eq!(script.len(), 9, "each is in the list");
    damage::shell(&story, "h1", &script.join("\n"));
    healed(&story, "all entries", &before).await;
    flows_again(&story, "all entries").await;

    damage::shell(&story, "h1", "ip link delete ovx.1; ip link delete ovx6.1; ip link delete ovb.1; nft flush ruleset");
    healed(&story, "all devices", &before).await;
    flows_again(&story, "all devices").await;
    story.assert_all_reach().await;
}

/// The interface of a container is deleted on the host's side: it is made anew, with its address.
#[tokio::test(flavor = "multi_thread")]
async fn a_containers_interface() {
    let story = lab().await;
    let endpoint = |story: &Story| {
        let client = story.at("h1").client();
        async move { client.endpoints().await.must("endpoints").endpoints.remove(0) }
    };
    let before = endpoint(&story).await;
    kernel::run(&story, "h1", &["ip", "link", "delete", &before.port.as_ref().must("a port").host_interface]);
    let has_route = || !kernel::run(&story, "h1-c1", &["ip", "route", "show", "default"]).is_empty();
    overlay_tests::within("the interface is back with its route", SOON, has_route).await;
    story.settled("h1", SOON).await;
    assert_eq!(endpoint(&story).await.addresses(), before.addresses());
    flows_again(&story, "a container's interface").await;
}

/// The kernel tells nobody when a device begins to take router advertisements: the full comparison finds it.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_tells_nobody() {
    let story = Story::up(|options| {
        options.hosts = 1;
        options.containers = 0;
        options.agent_args = vec!["--resync-interval=1s".to_owned()];
    })
    .await;
    for device in ["ovx.1", "ovb.1"] {
        let path = format!("ipv6/conf/{device}/accept_ra");
        kernel::shell(&story, "h1", &format!("echo 1 >/proc/sys/net/{path}"));
        overlay_tests::within(&path, 2 * SECOND, || kernel::sysctl(&story, "h1", &path) == "0").await;
    }
    assert!(story.status("h1").await.data_path.drift_repairs >= 2);
}
