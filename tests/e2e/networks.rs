//! Named networks: isolated ones of any range, families and peers, routed ones, and containers in several of them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use overlay_agent::model::{Cidr, Family, PerFamily};
use overlay_tests::calls::Protocol::{Tcp, Udp};
use overlay_tests::calls::{self, Connection, observe_source, observe_source_within};
use overlay_tests::networks::{self, address, attach, attach_to_each, create, publishing};
use overlay_tests::prober::Prober;
use overlay_tests::wait::eventually_async;
use overlay_tests::{ExpectContext, TestLab, kernel};
use overlayctl::lab::{Families, check, layout};
use tokio::task::JoinSet;

const PORT: u16 = 7000;

/// Time without an answer that counts as unreachable.
const NO_ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Time limit for packets to pass after a change of a network's peers.
const PEERS_TIMEOUT: Duration = Duration::from_secs(10);

/// Two hosts without containers.
async fn two_hosts(families: Families) -> TestLab {
    TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.families = families;
    })
    .await
}

/// Serves both protocols in a container.
fn serve(lab: &TestLab, target: &str) -> JoinSet<()> {
    calls::serve(&lab.open_netns(target), &[(Tcp, PORT), (Udp, PORT)])
}

/// Checks that a call is answered by a server that sees this source.
async fn assert_seen(lab: &TestLab, from: &str, to: IpAddr, expected: IpAddr, why: &str) {
    for protocol in [Tcp, Udp] {
        let seen = observe_source(&lab.open_netns(from), SocketAddr::new(to, PORT), protocol).await;
        assert_eq!(seen, Ok(expected), "{why}: {from} calls {to} ({protocol:?})");
    }
}

/// Checks that a call to the world is answered, and the host's address seen. (A datagram would be answered by another address.)
async fn assert_world_sees_host(lab: &TestLab, from: &str, host: &str, family: Family) {
    let seen = observe_source(&lab.open_netns(from), SocketAddr::new(layout::outside_address(family), PORT), Tcp).await;
    assert_eq!(seen, Ok(underlay_address(lab, host, family)), "{from} calls the world ({family})");
}

/// Checks that a call is not answered.
async fn assert_unreachable(lab: &TestLab, from: &str, to: IpAddr, why: &str) {
    for protocol in [Tcp, Udp] {
        let answer = observe_source_within(&lab.open_netns(from), SocketAddr::new(to, PORT), protocol, NO_ANSWER_TIMEOUT).await;
        assert!(answer.is_err(), "{why}: {from} reaches {to} ({protocol:?}) and is seen as {answer:?}");
    }
}

fn underlay_address(lab: &TestLab, host: &str, family: Family) -> IpAddr {
    *lab.host(host).layout().addresses.get(family).expect_ok("an address")
}

/// 32 isolated networks of one range on three hosts, beside the default one.
#[tokio::test(flavor = "multi_thread")]
async fn thirty_two_networks_of_one_range_stay_apart() {
    let lab = TestLab::up(|options| {
        options.containers = 1;
        options.isolated = 32;
    })
    .await;
    let prober = Prober::start(&lab).await;
    prober.stop_after(2, "32 isolated networks and the default one on three hosts").await;
    let report = check::check(&lab).await.expect_ok("check the lab");
    let failed: Vec<_> = report.overlay.iter().chain(&report.egress).filter(|call| call.error.is_some()).collect();
    assert!(failed.is_empty(), "{failed:#?} {:?}", report.remarks);
    // Each of 33 networks: three containers call the two others, and the world.
    assert_eq!((report.overlay.len(), report.egress.len()), (33 * 3 * 2, 33 * 3));
    let isolation = report.isolation.expect_ok("several networks");
    assert_eq!((isolation.networks, isolation.sent, isolation.crossings), (33, 99 * 96, Vec::new()));
    let addresses: BTreeSet<IpAddr> = report.overlay.iter().map(|call| call.address).collect();
    assert!(addresses.len() < 99, "containers of several networks have the same address");
}

#[tokio::test(flavor = "multi_thread")]
async fn isolated_networks_work_in_both_families() {
    assert_networks_work(Families::Dual).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn isolated_networks_work_with_ipv6_only() {
    assert_networks_work(Families::V6).await;
}

async fn assert_networks_work(families: Families) {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.isolated = 2;
        options.families = families;
    })
    .await;
    let prober = Prober::start(&lab).await;
    lab.assert_full_reachability().await;
    prober.stop(&format!("two isolated networks, {families:?}")).await;
}

/// Networks with fewer families than the hosts.
#[tokio::test(flavor = "multi_thread")]
async fn isolated_network_has_only_its_families() {
    let lab = two_hosts(Families::Dual).await;
    create(&lab, "four", &["--cidr", networks::RANGE]);
    create(&lab, "six", &["--cidr", "fd00:10::/56"]);
    for (network, family, other) in [("four", Family::V4, Family::V6), ("six", Family::V6, Family::V4)] {
        let attached = attach_to_each(&lab, network, &["h1", "h2"]).await;
        let [near, far] = [&attached[0], &attached[1]].map(|container| address(container, family));
        assert_eq!(attached[0].endpoint.addresses().get(other), None, "{network} has no {other}");
        let _servers = serve(&lab, &format!("h2-{network}-c1"));
        assert_seen(&lab, &format!("h1-{network}-c1"), far, near, network).await;
        let _world = serve(&lab, "world");
        assert_world_sees_host(&lab, &format!("h1-{network}-c1"), "h1", family).await;
        let link = if family == Family::V4 { "ovx6" } else { "ovx" };
        let vni = networks::vni(&lab, network);
        assert!(kernel::link(&lab, &format!("h1.{network}"), &format!("{link}.{vni}")).is_none(), "{network} has no {link}");
    }
}

/// An internal network has no way out and publishes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn internal_network_has_no_way_out() {
    let lab = two_hosts(Families::Dual).await;
    create(&lab, "closed", &["--cidr", networks::RANGE, "--cidr", "fd00:10::/56", "--internal"]);
    let attached = attach_to_each(&lab, "closed", &["h1", "h2"]).await;
    let _servers = (serve(&lab, "h2-closed-c1"), serve(&lab, "world"), serve(&lab, "h1"));
    for family in Family::ALL {
        let (near, far) = (address(&attached[0], family), address(&attached[1], family));
        assert_seen(&lab, "h1-closed-c1", far, near, "within the network").await;
        for to in [layout::outside_address(family), underlay_address(&lab, "h1", family), underlay_address(&lab, "h2", family)] {
            assert_unreachable(&lab, "h1-closed-c1", to, "an internal network").await;
        }
    }
    let transit = format!("ovt.{}", networks::vni(&lab, "closed"));
    for target in ["h1", "h1.closed"] {
        assert!(kernel::link(&lab, target, &transit).is_none(), "{target} has no {transit}");
    }
    let refused = lab.host("h1").attach_in(&networks::name("closed"), "closed-c2", publishing(&["8080:80"])).await;
    let error = refused.expect_err("a published port").to_string();
    assert!(error.contains("closed") && error.contains("internal") && error.contains("8080"), "{error}");
    assert!(lab.netns("h1-closed-c2").is_err(), "no namespace is left behind");
}

/// Containers of two networks with the same address call the same server from the same port at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn equal_addresses_are_masqueraded_apart() {
    let lab = TestLab::one_host(Families::Dual).await;
    let mut containers = Vec::new();
    for network in ["blue", "green"] {
        // One subnet in each family, so that both networks have the same.
        create(&lab, network, &["--cidr", "10.0.0.0/23", "--cidr", "fd00:10::/63"]);
        containers.push(attach(&lab, "h1", network, &format!("{network}-c1")).await);
    }
    assert_eq!(containers[0].endpoint.addresses(), containers[1].endpoint.addresses(), "the same addresses");
    let _world = serve(&lab, "world");
    for family in Family::ALL {
        let host = underlay_address(&lab, "h1", family);
        let world = SocketAddr::new(layout::outside_address(family), PORT);
        let mut connections = Vec::new();
        // Different in the families, because the first family's port is in TIME_WAIT.
        let port = if family == Family::V4 { 40_004 } else { 40_006 };
        for target in ["h1-blue-c1", "h1-green-c1"] {
            connections.push(Connection::open_from(&lab.open_netns(target), port, world).await.expect_ok(target));
        }
        for round in 0..3 {
            for connection in &mut connections {
                assert_eq!(connection.ask().await, Ok(host), "{family}, round {round}");
            }
        }
        for target in ["h1-blue-c1", "h1-green-c1"] {
            assert_world_sees_host(&lab, target, "h1", family).await;
        }
    }
}

/// A routed network beside the default one: the host reaches it, and so do the default network's containers.
#[tokio::test(flavor = "multi_thread")]
async fn routed_network_works_beside_default_one() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    create(&lab, "flat", &["--routed", "--cidr", "10.60.0.0/16", "--cidr", "fd00:60::/56"]);
    let flat = attach_to_each(&lab, "flat", &["h1", "h2"]).await;
    assert!(!networks::has_namespace(&lab, "h1", "flat"), "a routed network has no namespace");
    let vni = networks::vni(&lab, "flat");
    assert!(vni != 1 && kernel::link(&lab, "h1", &format!("ovx.{vni}")).is_some(), "it has VNI {vni} of its own");
    let default = default_addresses(&lab).await;
    let targets = ["h1-c1", "h2-c1", "h1-flat-c1", "h2-flat-c1"];
    let _servers: Vec<_> = targets.iter().chain(&["world"]).map(|target| serve(&lab, target)).collect();
    for family in Family::ALL {
        let of = |container: usize| address(&flat[container], family);
        let default = |host: usize| *default[host].get(family).expect_ok("an address");
        assert_seen(&lab, "h1-flat-c1", of(1), of(0), "across hosts").await;
        assert_seen(&lab, "h2-flat-c1", of(0), of(1), "across hosts, back").await;
        // Packets that leave a network get the host's address, here that in the network that they enter.
        for (from, to, entered) in [
            ("h1-c1", of(0), of(0)),
            ("h1-flat-c1", default(0), default(0)),
            ("h1-c1", of(1), of(0)),
            ("h1-flat-c1", default(1), default(0)),
        ] {
            let seen = observe_source(&lab.open_netns(from), SocketAddr::new(to, PORT), Tcp).await.expect_ok(from);
            assert!(subnet_of(entered).contains(seen), "{from} calls {to} and is seen as {seen}");
        }
        let gateway = *flat[0].gateway.get(family).expect_ok("a gateway");
        assert_seen(&lab, "h1", of(0), gateway, "from the host").await;
        assert_world_sees_host(&lab, "h1-flat-c1", "h1", family).await;
    }
}

/// The host's subnet that an address is in.
fn subnet_of(address: IpAddr) -> Cidr {
    Cidr::containing(address, if address.is_ipv4() { 24 } else { 64 }).expect_ok("a subnet")
}

/// The addresses of the hosts' first container in the default network.
async fn default_addresses(lab: &TestLab) -> Vec<PerFamily<IpAddr>> {
    let mut all = Vec::new();
    for host in lab.hosts() {
        let endpoints = host.client().endpoints().await.expect_ok("endpoints").endpoints;
        all.push(endpoints.first().expect_ok("a container").addresses());
    }
    all
}

/// Two networks that name each other are routed to each other on every host; a third one stays apart.
#[tokio::test(flavor = "multi_thread")]
async fn peer_networks_reach_each_other_and_no_other() {
    let lab = two_hosts(Families::Dual).await;
    create(&lab, "blue", &["--cidr", "10.1.0.0/16", "--cidr", "fd01::/56"]);
    create(&lab, "green", &["--cidr", "10.2.0.0/16", "--cidr", "fd02::/56", "--peer", "blue"]);
    create(&lab, "red", &["--cidr", "10.3.0.0/16", "--cidr", "fd03::/56"]);
    let hosts = ["h1", "h2"];
    let blue = attach_to_each(&lab, "blue", &hosts).await;
    let green = attach_to_each(&lab, "green", &hosts).await;
    attach_to_each(&lab, "red", &hosts).await;
    let _servers: Vec<_> = hosts.iter().flat_map(|h| ["blue", "green"].map(|n| serve(&lab, &format!("{h}-{n}-c1")))).collect();
    // Only one of the two names the other.
    let prober = Prober::start(&lab).await;
    assert_unreachable(&lab, "h1-blue-c1", address(&green[1], Family::V4), "named by one side only").await;
    prober.stop("named by one side only").await;

    networks::network_command(&lab, &["set", "blue", "--peer", "green"]).assert_code(0);
    for family in Family::ALL {
        wait_reachable(&lab, "h1-blue-c1", address(&green[1], family)).await;
        wait_reachable(&lab, "h2-green-c1", address(&blue[0], family)).await;
    }
    let prober = Prober::start_except(&lab, &[&["blue", "green"]]).await;
    for family in Family::ALL {
        for (from_host, to_host) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let why = format!("{family}, {} to {}", hosts[from_host], hosts[to_host]);
            let [from_blue, from_green] = ["blue", "green"].map(|network| format!("{}-{network}-c1", hosts[from_host]));
            assert_seen(&lab, &from_blue, address(&green[to_host], family), address(&blue[from_host], family), &why).await;
            assert_seen(&lab, &from_green, address(&blue[to_host], family), address(&green[from_host], family), &why).await;
        }
    }
    prober.stop("two peers and a third network").await;

    networks::network_command(&lab, &["set", "green", "--remove-peer", "blue"]).assert_code(0);
    let to = SocketAddr::new(address(&green[1], Family::V4), PORT);
    eventually_async("blue no longer reaches green", PEERS_TIMEOUT, || async {
        let answer = observe_source_within(&lab.open_netns("h1-blue-c1"), to, Udp, Duration::from_millis(500)).await;
        answer.map_or(Ok(()), |seen| Err(format!("seen as {seen}")))
    })
    .await;
    let prober = Prober::start(&lab).await;
    prober.stop("after the end of the peering").await;
}

async fn wait_reachable(lab: &TestLab, from: &str, to: IpAddr) {
    let (netns, at) = (lab.open_netns(from), SocketAddr::new(to, PORT));
    eventually_async(&format!("{from} reaches {to}"), PEERS_TIMEOUT, || async {
        observe_source_within(&netns, at, Udp, NO_ANSWER_TIMEOUT).await.map(|_| ())
    })
    .await;
}

/// A host that joins a network joins its peers, so that its containers reach those of the peer on other hosts.
#[tokio::test(flavor = "multi_thread")]
async fn host_joins_peers_of_its_network() {
    let lab = two_hosts(Families::V4).await;
    create(&lab, "blue", &["--cidr", "10.1.0.0/16"]);
    create(&lab, "green", &["--cidr", "10.2.0.0/16", "--peer", "blue"]);
    networks::network_command(&lab, &["set", "blue", "--peer", "green"]).assert_code(0);
    let near = attach(&lab, "h1", "blue", "blue-c1").await;
    let far = attach(&lab, "h2", "green", "green-c1").await;
    let _servers = (serve(&lab, "h1-blue-c1"), serve(&lab, "h2-green-c1"));
    wait_reachable(&lab, "h1-blue-c1", address(&far, Family::V4)).await;
    assert_seen(&lab, "h1-blue-c1", address(&far, Family::V4), address(&near, Family::V4), "across hosts").await;
    assert_seen(&lab, "h2-green-c1", address(&near, Family::V4), address(&far, Family::V4), "across hosts, back").await;
    for (host, network) in [("h1", "green"), ("h2", "blue")] {
        assert!(networks::has_namespace(&lab, host, network), "{host} has joined {network}");
    }
}

/// The first network gives the default route, the second one a route to itself.
#[tokio::test(flavor = "multi_thread")]
async fn container_in_two_networks_has_one_default_route() {
    let lab = two_hosts(Families::Dual).await;
    create(&lab, "blue", &["--cidr", "10.1.0.0/16", "--cidr", "fd01::/56"]);
    create(&lab, "green", &["--cidr", "10.2.0.0/16", "--cidr", "fd02::/56"]);
    let blue = attach(&lab, "h2", "blue", "blue-c1").await;
    let green = attach(&lab, "h2", "green", "green-c1").await;
    lab.ctl("h1", &["attach", "both", "--network", "blue", "--network", "green"]).assert_code(0);
    networks::wait_ready(&lab, "blue", &["h1", "h2"]).await;
    networks::wait_ready(&lab, "green", &["h1", "h2"]).await;
    let _servers = (serve(&lab, "h2-blue-c1"), serve(&lab, "h2-green-c1"), serve(&lab, "world"));
    for (family, flag) in [(Family::V4, "-4"), (Family::V6, "-6")] {
        let route_devices = |destination: &str| -> Vec<String> {
            let routes = kernel::list_json(&lab, "h1-both", "ip", &[flag, "route", "show", destination]);
            routes.iter().map(|route| kernel::text(route, "dev")).collect()
        };
        let green_range = if family == Family::V4 { "10.2.0.0/16" } else { "fd02::/56" };
        assert_eq!((route_devices("default"), route_devices(green_range)), (vec!["eth0".into()], vec!["eth1".into()]));
        let own = |interface: &str| own_address(&lab, "h1-both", interface, family);
        assert_seen(&lab, "h1-both", address(&blue, family), own("eth0"), "the first network").await;
        assert_seen(&lab, "h1-both", address(&green, family), own("eth1"), "the second network").await;
        assert_world_sees_host(&lab, "h1-both", "h1", family).await;
    }
    lab.ctl("h1", &["detach", "both"]).assert_code(0);
    for network in ["blue", "green"] {
        let left = lab.host("h1").client_of(&networks::name(network)).endpoints().await.expect_ok(network).endpoints;
        assert!(left.is_empty(), "detached from {network}: {left:?}");
    }
}

fn own_address(lab: &TestLab, target: &str, interface: &str, family: Family) -> IpAddr {
    let flag = if family == Family::V4 { "-4" } else { "-6" };
    let links = kernel::list_json(lab, target, "ip", &[flag, "address", "show", "dev", interface, "scope", "global"]);
    let address = links.iter().find_map(|link| link["addr_info"].as_array()?.iter().find_map(|a| a["local"].as_str()));
    address.and_then(|text| text.parse().ok()).expect_ok(interface)
}
