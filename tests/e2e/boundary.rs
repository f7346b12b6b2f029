//! The edge of the overlay: its addresses do not leave by the underlay, and what comes from outside enters it by way of any host.

use std::net::IpAddr;

use nix::sys::signal::Signal;
use overlay_agent::model::api::Subnets;
use overlay_agent::model::{Family, NetworkConfig};
use overlay_tests::capture::{Capture, Packet};
use overlay_tests::story::SOON;
use overlay_tests::{Must, Story, etcd, eventually, kernel, within};
use overlayctl::lab::Families;
use overlayctl::lab::layout::{etcd_address, gateway_address, outside_address};
use overlayctl::trace::{Outcome, Trace};

async fn lab(agent_args: &[&str]) -> Story {
    Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
        options.agent_args = agent_args.iter().map(ToString::to_string).collect();
    })
    .await
}

/// The address of the container of a host.
async fn container(story: &Story, host: &str, family: Family) -> IpAddr {
    let endpoints = story.at(host).client().endpoints().await.must(host).endpoints;
    *endpoints.first().must("a container").addresses().get(family).must("its address")
}

/// This host's address in the overlay, which its VXLAN device has.
async fn overlay_address(story: &Story, host: &str, family: Family) -> IpAddr {
    let Subnets { subnets } = story.at(host).client().subnets().await.must("subnets");
    let own = subnets.into_iter().find(|entry| entry.own).and_then(|entry| entry.subnet).must("the own subnet");
    own.get(family).must("the own range").base()
}

/// An address of the overlay that no host's subnet has.
async fn unheld(story: &Story, family: Family) -> IpAddr {
    let Subnets { subnets } = story.at("h1").client().subnets().await.must("subnets");
    let config = NetworkConfig::parse(&story.layout().config).must("the configuration").config;
    let pool = *config.pools.get(family).must("a pool");
    let held: Vec<_> = subnets.iter().filter_map(|entry| entry.subnet?.get(family)).collect();
    let free =
        (0..pool.count()).filter_map(|index| pool.nth(index)).find(|range| held.iter().all(|other| !other.overlaps(*range)));
    free.and_then(|range| range.nth(9)).must("a free subnet")
}

/// The hosts that the packets and what is inside them go to.
fn destinations(packets: &[Packet]) -> Vec<IpAddr> {
    let inner = packets.iter().filter_map(|packet| packet.vxlan.as_ref()).map(|(_, inner)| &**inner);
    packets.iter().chain(inner).filter_map(|packet| packet.addresses).map(|(_, destination)| destination).collect()
}

#[track_caller]
fn trace(story: &Story, host: &str, from: &str, to: &str) -> Trace {
    let said = story.ctl(host, &["-o", "json", "trace", from, to]);
    serde_json::from_str(&said.out).unwrap_or_else(|error| panic!("{error}: {} {}", said.out, said.err))
}

/// A ping from a target is refused at once, and nothing of it goes out by the host's wire.
async fn stays_in(story: &Story, target: &str, address: IpAddr, what: &str) {
    let capture = Capture::start(story, "h1", "eth0");
    let said = kernel::attempt(story, target, &["ping", "-n", "-c", "1", "-W", "5", &address.to_string()]);
    let text = format!("{}{}", said.out, said.err).to_lowercase();
    assert_ne!(said.code, Some(0), "{what}: {text}");
    assert!(["unreachable", "no route to host"].iter().any(|word| text.contains(word)), "{what}: it is told at once: {text}");
    let sent = destinations(&capture.stop());
    assert!(!sent.contains(&address), "{what}: a packet to {address} left by the underlay");
}

#[tokio::test(flavor = "multi_thread")]
async fn address_that_nobody_holds_is_unreachable() {
    let story = lab(&[]).await;
    let [far4, far6] = [container(&story, "h2", Family::V4).await, container(&story, "h2", Family::V6).await];
    for family in Family::ALL {
        let address = unheld(&story, family).await;
        for target in ["h1-c1", "h1"] {
            stays_in(&story, target, address, &format!("{target}, a subnet that was never leased")).await;
        }
        let found = trace(&story, "h1", "c1", &address.to_string());
        let last = found.hops.last().must("a hop");
        assert_eq!((found.outcome, last.step.as_str()), (Outcome::Stop, "route"), "{found:#?}");
        assert!(last.answer.contains("is unreachable") && last.answer.contains("no host holds a subnet with it"), "{last:?}");
    }
    story.assert_all_reach().await;
    // The lease of a host is lost: its containers are not talked to in clear.
    story.at("h2").agent_stop(Signal::SIGKILL).must("stop the agent");
    etcd::delete(&story, &story.lease_of("h2").key);
    for address in [far4, far6] {
        let gone = || kernel::attempt(&story, "h1", &["ip", "route", "get", &address.to_string()]).code != Some(0);
        within("the way to h2 is gone", SOON, gone).await;
        stays_in(&story, "h1-c1", address, "a container of a host that lost its lease").await;
    }
}

/// etcd has an address that the pool may lease, and only the default route leads there.
#[tokio::test(flavor = "multi_thread")]
async fn etcd_inside_the_pool_is_reached_by_the_default_route() {
    let story = Story::without_agents(1, Families::V4).await;
    etcd::put(&story, &etcd::config_key(), r#"{"Network":"10.96.0.0/12"}"#);
    let (etcd, gateway) = (etcd_address(Family::V4), gateway_address(Family::V4));
    kernel::shell(&story, "world", "echo 1 >/proc/sys/net/ipv4/ip_forward");
    kernel::shell(
        &story,
        "h1",
        &format!("ip route replace default via {gateway} dev eth0 onlink; ip route delete 10.99.0.0/16 dev eth0"),
    );
    story.start("h1").await;
    let route = |address: &str| kernel::attempt(&story, "h1", &["ip", "route", "get", address]);
    eventually("what nobody holds is unreachable", SOON, || match route("10.100.0.9").code {
        Some(0) => Err(route("10.100.0.9").out),
        _ => Ok(()),
    })
    .await;
    assert!(route(&etcd.to_string()).exits(0).out.contains(&format!("via {gateway}")));
    // Another server of the same range is not etcd's.
    assert_ne!(route("10.99.7.7").code, Some(0));
    // With all of this in place, the next agent finds etcd as well.
    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    story.start("h1").await;
    let found = story.ctl("h1", &["check", "addresses"]);
    assert!(found.out.contains("etcd lies inside the overlay network"), "{}{}", found.out, found.err);
}

/// The world knows one host's address as the way to the overlay, and that host is not the container's.
#[tokio::test(flavor = "multi_thread")]
async fn client_outside_reaches_a_container_by_way_of_another_host() {
    let story = lab(&[]).await;
    for family in Family::ALL {
        let far = container(&story, "h2", family).await;
        lead_into_overlay(&story, family);
        let own = *story.at("h1").layout().addresses.get(family).must("its address");
        for (target, source) in [("world", outside_address(family)), ("world", gateway_address(family)), ("h1", own)] {
            ping(&story, target, source, far).exits(0);
        }
        // The packet as it comes to the other host: from this host's own subnet.
        let masqueraded = overlay_address(&story, "h1", family).await;
        let here = trace(&story, "h1", &outside_address(family).to_string(), &far.to_string());
        assert_eq!(here.outcome, Outcome::Ok, "{here:#?}");
        let told =
            |hop: &overlayctl::trace::Hop| hop.step == "translation" && hop.answer.contains(&format!("becomes {masqueraded} "));
        assert!(here.hops.iter().any(told) && here.end.contains(&format!("trace {masqueraded} {far}")), "{here:#?}");
        let there = trace(&story, "h2", &masqueraded.to_string(), &far.to_string());
        assert_eq!(there.outcome, Outcome::Ok, "{there:#?}");
    }
    // Inside the overlay everybody is seen by his own address.
    story.assert_all_reach().await;
    // Another bridge's container on the same host.
    let far = container(&story, "h2", Family::V4).await;
    let guest = story.inside("h1-c1");
    let name = guest.path().file_name().and_then(|name| name.to_str()).must("a name").to_owned();
    kernel::shell(
        &story,
        "h1",
        &format!(
            "ip link add guest type veth peer name out netns {name}; ip address add 192.168.77.1/24 dev guest; ip link set guest up"
        ),
    );
    kernel::shell(
        &story,
        "h1-c1",
        &format!("ip address add 192.168.77.2/24 dev out; ip link set out up; ip route add {far} via 192.168.77.1"),
    );
    ping(&story, "h1-c1", "192.168.77.2".parse().must("an address"), far).exits(0);
    assert_eq!(story.status("h2").await.data_path.dropped["tunnel"], 0);
}

/// Where hosts do not masquerade, what enters from outside keeps its source, and the peer takes from a host its own subnet only.
#[tokio::test(flavor = "multi_thread")]
async fn client_outside_is_dropped_at_the_peer_without_masquerade() {
    let story = lab(&["--ip-masq=false"]).await;
    for family in Family::ALL {
        let far = container(&story, "h2", family).await;
        lead_into_overlay(&story, family);
        let outside = outside_address(family);
        let before = story.status("h2").await.data_path.dropped["tunnel"];
        assert_ne!(ping(&story, "world", outside, far).code, Some(0), "{family}");
        assert!(story.status("h2").await.data_path.dropped["tunnel"] > before, "{family}: the drop is counted");
        let here = trace(&story, "h1", &outside.to_string(), &far.to_string());
        let hop = here.hops.iter().find(|hop| hop.step == "peer's guard").must("the peer's guard");
        assert!(here.outcome == Outcome::Unsure && hop.answer.contains("h2") && hop.answer.contains("drops it"), "{here:#?}");
        let there = trace(&story, "h2", &outside.to_string(), &far.to_string());
        let note = |note: &String| note.contains("by way of another host, h1") && note.contains("chain inet overlayd vxlan");
        assert!(there.notes.iter().any(note), "{there:#?}");
    }
}

/// The world has the overlay behind host one.
fn lead_into_overlay(story: &Story, family: Family) {
    let network = *story.layout().networks.get(family).must("a network");
    let via = *story.at("h1").layout().addresses.get(family).must("its address");
    kernel::run(story, "world", &["ip", "route", "replace", &network.to_string(), "via", &via.to_string()]);
}

fn ping(story: &Story, target: &str, source: IpAddr, to: IpAddr) -> overlay_tests::programs::Said {
    kernel::attempt(story, target, &["ping", "-n", "-c", "1", "-W", "3", "-I", &source.to_string(), &to.to_string()])
}
