//! The overlay's boundary: its addresses do not leave by the underlay, and outside traffic enters through any host.

use std::net::IpAddr;

use nix::sys::signal::Signal;
use overlay_agent::model::api::Subnets;
use overlay_agent::model::{Family, NetworkConfig};
use overlay_tests::capture::{Capture, Packet};
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::{ExpectContext, TestLab, etcd, eventually, eventually_true, kernel};
use overlayctl::lab::Families;
use overlayctl::lab::layout::{etcd_address, gateway_address, outside_address};
use overlayctl::trace::{Trace, TraceOutcome};

async fn start_lab(agent_args: &[&str]) -> TestLab {
    TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
        options.agent_args = agent_args.iter().map(ToString::to_string).collect();
    })
    .await
}

/// The address of the container of a host.
async fn container_address(lab: &TestLab, host: &str, family: Family) -> IpAddr {
    let endpoints = lab.host(host).client().endpoints().await.expect_ok(host).endpoints;
    *endpoints.first().expect_ok("a container").addresses().get(family).expect_ok("the container's address")
}

/// This host's address in the overlay, on its VXLAN device.
async fn overlay_address(lab: &TestLab, host: &str, family: Family) -> IpAddr {
    let Subnets { subnets } = lab.host(host).client().subnets().await.expect_ok("subnets");
    let own = subnets.into_iter().find(|entry| entry.own).and_then(|entry| entry.subnet).expect_ok("the own subnet");
    own.get(family).expect_ok("the own range").base()
}

/// An overlay address outside every host's subnet.
async fn unassigned_address(lab: &TestLab, family: Family) -> IpAddr {
    let Subnets { subnets } = lab.host("h1").client().subnets().await.expect_ok("subnets");
    let config = NetworkConfig::parse(&lab.layout().config).expect_ok("the configuration").config;
    let pool = *config.pools.get(family).expect_ok("a pool");
    let used: Vec<_> = subnets.iter().filter_map(|entry| entry.subnet?.get(family)).collect();
    let free =
        (0..pool.count()).filter_map(|index| pool.nth(index)).find(|range| used.iter().all(|other| !other.overlaps(*range)));
    free.and_then(|range| range.nth(9)).expect_ok("a free subnet")
}

/// The destinations of the packets and of their inner packets.
fn destinations(packets: &[Packet]) -> Vec<IpAddr> {
    let inner = packets.iter().filter_map(|packet| packet.vxlan.as_ref()).map(|(_, inner)| &**inner);
    packets.iter().chain(inner).filter_map(|packet| packet.addresses).map(|(_, destination)| destination).collect()
}

#[track_caller]
fn trace(lab: &TestLab, host: &str, from: &str, to: &str) -> Trace {
    let output = lab.ctl(host, &["-o", "json", "trace", from, to]);
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {} {}", output.stdout, output.stderr))
}

/// A ping from a target fails at once, and none of its packets leaves by the host's underlay interface.
async fn assert_ping_is_refused_locally(lab: &TestLab, target: &str, address: IpAddr, what: &str) {
    let capture = Capture::start(lab, "h1", "eth0");
    let output = kernel::attempt(lab, target, &["ping", "-n", "-c", "1", "-W", "5", &address.to_string()]);
    let text = format!("{}{}", output.stdout, output.stderr).to_lowercase();
    assert_ne!(output.code, Some(0), "{what}: {text}");
    assert!(["unreachable", "no route to host"].iter().any(|word| text.contains(word)), "{what}: unreachable at once: {text}");
    let sent = destinations(&capture.stop());
    assert!(!sent.contains(&address), "{what}: a packet to {address} left by the underlay");
}

#[tokio::test(flavor = "multi_thread")]
async fn unassigned_address_is_unreachable() {
    let lab = start_lab(&[]).await;
    let [far4, far6] = [container_address(&lab, "h2", Family::V4).await, container_address(&lab, "h2", Family::V6).await];
    for family in Family::ALL {
        let address = unassigned_address(&lab, family).await;
        for target in ["h1-c1", "h1"] {
            assert_ping_is_refused_locally(&lab, target, address, &format!("{target}, a subnet that was never leased")).await;
        }
        let found = trace(&lab, "h1", "c1", &address.to_string());
        let last = found.hops.last().expect_ok("a hop");
        assert_eq!((found.outcome, last.step.as_str()), (TraceOutcome::Stop, "route"), "{found:#?}");
        assert!(last.answer.contains("is unreachable") && last.answer.contains("no host holds a subnet with it"), "{last:?}");
    }
    lab.assert_full_reachability().await;
    // A host loses its lease: traffic to its containers must not leave unencapsulated.
    lab.host("h2").agent_stop(Signal::SIGKILL).expect_ok("stop the agent");
    etcd::delete(&lab, &lab.lease_of("h2").key);
    for address in [far4, far6] {
        let gone = || kernel::attempt(&lab, "h1", &["ip", "route", "get", &address.to_string()]).code != Some(0);
        eventually_true("the route to h2 is gone", CONVERGE_TIMEOUT, gone).await;
        assert_ping_is_refused_locally(&lab, "h1-c1", address, "a container of a host that lost its lease").await;
    }
}

/// etcd's address is inside the leasable pool, and only the default route leads to it.
#[tokio::test(flavor = "multi_thread")]
async fn etcd_inside_pool_uses_default_route() {
    let lab = TestLab::without_agents(1, Families::V4).await;
    etcd::put(&lab, &etcd::config_key(), r#"{"Network":"10.96.0.0/12"}"#);
    let (etcd, gateway) = (etcd_address(Family::V4), gateway_address(Family::V4));
    // Without redirects, which would show h1 the direct path.
    kernel::shell(
        &lab,
        "world",
        "echo 1 >/proc/sys/net/ipv4/ip_forward; for f in /proc/sys/net/ipv4/conf/*/send_redirects; do echo 0 >$f; done",
    );
    kernel::shell(
        &lab,
        "h1",
        &format!("ip route replace default via {gateway} dev eth0 onlink; ip route delete 10.99.0.0/16 dev eth0"),
    );
    lab.start_agent("h1").await;
    let route = |address: &str| kernel::attempt(&lab, "h1", &["ip", "route", "get", address]);
    eventually("an unassigned address is unreachable", CONVERGE_TIMEOUT, || match route("10.100.0.9").code {
        Some(0) => Err(route("10.100.0.9").stdout),
        _ => Ok(()),
    })
    .await;
    assert!(route(&etcd.to_string()).assert_code(0).stdout.contains(&format!("via {gateway}")));
    // Only etcd's address is exempt, not another one of the same range.
    assert_ne!(route("10.99.7.7").code, Some(0));
    // The next agent reaches etcd with these routes in place.
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    lab.start_agent("h1").await;
    let found = lab.ctl("h1", &["check", "addresses"]);
    assert!(found.stdout.contains("etcd lies inside the overlay network"), "{}{}", found.stdout, found.stderr);
}

/// The outside client routes the overlay via one host, which is not the container's host.
#[tokio::test(flavor = "multi_thread")]
async fn outside_client_reaches_container_via_other_host() {
    let lab = start_lab(&[]).await;
    for family in Family::ALL {
        let far = container_address(&lab, "h2", family).await;
        route_overlay_via_h1(&lab, family);
        let own = *lab.host("h1").layout().addresses.get(family).expect_ok("the host's address");
        for (target, source) in [("world", outside_address(family)), ("world", gateway_address(family)), ("h1", own)] {
            ping(&lab, target, source, far).assert_code(0);
        }
        // The packet's source on the other host is this host's own subnet.
        let masqueraded = overlay_address(&lab, "h1", family).await;
        let here = trace(&lab, "h1", &outside_address(family).to_string(), &far.to_string());
        assert_eq!(here.outcome, TraceOutcome::Ok, "{here:#?}");
        let is_masqueraded =
            |hop: &overlayctl::trace::Hop| hop.step == "translation" && hop.answer.contains(&format!("becomes {masqueraded} "));
        assert!(here.hops.iter().any(is_masqueraded) && here.end.contains(&format!("trace {masqueraded} {far}")), "{here:#?}");
        let there = trace(&lab, "h2", &masqueraded.to_string(), &far.to_string());
        assert_eq!(there.outcome, TraceOutcome::Ok, "{there:#?}");
    }
    // Inside the overlay every source address is preserved.
    lab.assert_full_reachability().await;
    // A container of another bridge on the same host.
    let far = container_address(&lab, "h2", Family::V4).await;
    let guest = lab.open_netns("h1-c1");
    let name = guest.path().file_name().and_then(|name| name.to_str()).expect_ok("a name").to_owned();
    kernel::shell(
        &lab,
        "h1",
        &format!(
            "ip link add guest type veth peer name out netns {name}; ip address add 192.168.77.1/24 dev guest; ip link set guest up"
        ),
    );
    kernel::shell(
        &lab,
        "h1-c1",
        &format!("ip address add 192.168.77.2/24 dev out; ip link set out up; ip route add {far} via 192.168.77.1"),
    );
    ping(&lab, "h1-c1", "192.168.77.2".parse().expect_ok("an address"), far).assert_code(0);
    assert_eq!(lab.status("h2").await.data_path.dropped["tunnel"], 0);
}

/// Without masquerade, outside traffic keeps its source, and the peer accepts only this host's subnet from it.
#[tokio::test(flavor = "multi_thread")]
async fn outside_client_is_dropped_without_masquerade() {
    let lab = start_lab(&["--ip-masq=false"]).await;
    for family in Family::ALL {
        let far = container_address(&lab, "h2", family).await;
        route_overlay_via_h1(&lab, family);
        let outside = outside_address(family);
        let before = lab.status("h2").await.data_path.dropped["tunnel"];
        assert_ne!(ping(&lab, "world", outside, far).code, Some(0), "{family}");
        assert!(lab.status("h2").await.data_path.dropped["tunnel"] > before, "{family}: the drop is counted");
        let here = trace(&lab, "h1", &outside.to_string(), &far.to_string());
        let hop = here.hops.iter().find(|hop| hop.step == "peer's guard").expect_ok("the peer's guard");
        assert!(
            here.outcome == TraceOutcome::Unsure && hop.answer.contains("h2") && hop.answer.contains("drops it"),
            "{here:#?}"
        );
        let there = trace(&lab, "h2", &outside.to_string(), &far.to_string());
        let note = |note: &String| note.contains("another host such as h1") && note.contains("chain inet overlayd vxlan");
        assert!(there.notes.iter().any(note), "{there:#?}");
    }
}

/// Routes the overlay via h1 in `world`.
fn route_overlay_via_h1(lab: &TestLab, family: Family) {
    let network = *lab.layout().networks.get(family).expect_ok("a network");
    let via = *lab.host("h1").layout().addresses.get(family).expect_ok("the host's address");
    kernel::run(lab, "world", &["ip", "route", "replace", &network.to_string(), "via", &via.to_string()]);
}

fn ping(lab: &TestLab, target: &str, source: IpAddr, to: IpAddr) -> overlay_tests::programs::CommandOutput {
    kernel::attempt(lab, target, &["ping", "-n", "-c", "1", "-W", "3", "-I", &source.to_string(), &to.to_string()])
}
