//! Published ports of isolated networks: the host translates them to the network, and the network to the container.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_tests::calls::Protocol::{self, Tcp, Udp};
use overlay_tests::calls::{self, observe_source, observe_source_within};
use overlay_tests::networks::{self, address, attach, attach_with, create, publishing};
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::wait::eventually_async;
use overlay_tests::{ExpectContext, TestLab, kernel};
use overlayctl::lab::{Families, layout};
use tokio::task::JoinSet;

/// Time without an answer that counts as unreachable.
const NO_ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

const SERVED: [(Protocol, u16); 2] = [(Tcp, 80), (Udp, 80)];

/// Two hosts, and a network `blue` of both families.
async fn start_lab() -> TestLab {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    create(&lab, "blue", &["--cidr", networks::RANGE, "--cidr", "fd00:10::/56"]);
    lab
}

fn serve(lab: &TestLab, target: &str) -> JoinSet<()> {
    calls::serve(&lab.open_netns(target), &SERVED)
}

fn host_address(lab: &TestLab, host: &str, family: Family) -> IpAddr {
    *lab.host(host).layout().addresses.get(family).expect_ok("an address")
}

fn loopback(family: Family) -> IpAddr {
    if family == Family::V4 { [127, 0, 0, 1].into() } else { [0, 0, 0, 0, 0, 0, 0, 1].into() }
}

/// The source address that the server sees; the call must succeed.
async fn seen(lab: &TestLab, from: &str, to: IpAddr, port: u16, protocol: Protocol) -> IpAddr {
    let answer = observe_source(&lab.open_netns(from), SocketAddr::new(to, port), protocol).await;
    answer.expect_ok(&format!("{from} calls {to} port {port} ({protocol:?})"))
}

async fn assert_unreachable(lab: &TestLab, from: &str, to: IpAddr, port: u16) {
    for protocol in [Tcp, Udp] {
        let netns = lab.open_netns(from);
        let answer = observe_source_within(&netns, SocketAddr::new(to, port), protocol, NO_ANSWER_TIMEOUT).await;
        assert!(answer.is_err(), "{from} reaches {to} port {port} ({protocol:?}) and is seen as {answer:?}");
    }
}

/// From outside with the client's address, from the host, from every container of the network and of others.
#[tokio::test(flavor = "multi_thread")]
async fn published_port_is_reachable_from_everywhere() {
    let lab = start_lab().await;
    create(&lab, "green", &["--cidr", networks::RANGE, "--cidr", "fd00:10::/56"]);
    let web = attach_with(&lab, "h1", "blue", "web", publishing(&["8080:80", "8080:80/udp"])).await;
    attach(&lab, "h1", "blue", "near").await;
    attach(&lab, "h2", "blue", "far").await;
    attach(&lab, "h1", "green", "other").await;
    networks::wait_ready(&lab, "blue", &["h1", "h2"]).await;
    let _servers = serve(&lab, "h1-web");
    for family in Family::ALL {
        let host = host_address(&lab, "h1", family);
        for protocol in [Tcp, Udp] {
            let client = layout::gateway_address(family);
            assert_eq!(seen(&lab, "world", host, 8080, protocol).await, client, "from outside ({family}, {protocol:?})");
            let client = host_address(&lab, "h2", family);
            assert_eq!(seen(&lab, "h2", host, 8080, protocol).await, client, "from another host ({family}, {protocol:?})");
            assert_eq!(seen(&lab, "h2-far", host, 8080, protocol).await, client, "from the network's container on another host");
            // The answers of these would take another way: their source is translated.
            for from in ["h1", "h1-web", "h1-near", "h1-other", "h1-c1"] {
                seen(&lab, from, host, 8080, protocol).await;
            }
            seen(&lab, "h1", loopback(family), 8080, protocol).await;
        }
        assert_unreachable(&lab, "world", host, 80).await;
        // Past the published port, only the network's own containers reach it.
        let direct = address(&web, family);
        for protocol in [Tcp, Udp] {
            seen(&lab, "h1-near", direct, 80, protocol).await;
            seen(&lab, "h2-far", direct, 80, protocol).await;
        }
        for from in ["h1", "h1-c1", "h1-other", "world"] {
            assert_unreachable(&lab, from, direct, 80).await;
        }
    }
    // The end of the endpoint ends its ports.
    networks::detach(&lab, "h1", "blue", "web").await;
    for family in Family::ALL {
        assert_unreachable(&lab, "world", host_address(&lab, "h1", family), 8080).await;
    }
}

/// A port bound to one address is reachable only there; two containers may have it on different addresses.
#[tokio::test(flavor = "multi_thread")]
async fn same_port_on_two_addresses_reaches_two_containers() {
    let lab = start_lab().await;
    kernel::shell(&lab, "h1", "ip address add 10.99.77.1/16 dev eth0; ip address add fd99::77:1/64 dev eth0 nodad");
    let second: [IpAddr; 2] = ["10.99.77.1", "fd99::77:1"].map(|text| text.parse().expect_ok("an address"));
    let first = Family::ALL.map(|family| host_address(&lab, "h1", family));
    let binding = |addresses: &[IpAddr]| -> Vec<String> {
        let both = |address: &IpAddr| ["80", "80/udp"].map(|port| format!("{}:{port}", SocketAddr::new(*address, 8080)));
        addresses.iter().flat_map(both).collect()
    };
    let mut containers = Vec::new();
    let mut servers = Vec::new();
    for (name, addresses) in [("one", &first), ("two", &second)] {
        let ports = binding(addresses);
        let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
        containers.push(attach_with(&lab, "h1", "blue", name, publishing(&ports)).await);
        servers.push(serve(&lab, &format!("h1-{name}")));
    }
    let loopback_only = attach_with(&lab, "h1", "blue", "local", publishing(&["127.0.0.1:8081:80", "[::1]:8081:80"])).await;
    let _local = serve(&lab, "h1-local");
    for (index, family) in Family::ALL.into_iter().enumerate() {
        let client = layout::gateway_address(family);
        for protocol in [Tcp, Udp] {
            for to in [first[index], second[index]] {
                assert_eq!(seen(&lab, "world", to, 8080, protocol).await, client, "{to} ({protocol:?})");
            }
        }
        seen(&lab, "h1", loopback(family), 8081, Tcp).await;
        for from in ["world", "h1"] {
            assert_unreachable(&lab, from, first[index], 8081).await;
        }
        assert_unreachable(&lab, "h1", loopback(family), 8080).await;
        assert_ne!(address(&containers[0], family), address(&loopback_only, family));
    }
    // Each address leads to its own container: without its server there is no answer.
    drop(servers.remove(0));
    for (index, _) in Family::ALL.into_iter().enumerate() {
        assert_unreachable(&lab, "world", first[index], 8080).await;
        seen(&lab, "world", second[index], 8080, Tcp).await;
    }
}

/// A port is the host's: a container of another network cannot publish it, too. The error names the holder.
#[tokio::test(flavor = "multi_thread")]
async fn port_of_another_network_is_refused() {
    let lab = start_lab().await;
    create(&lab, "green", &["--cidr", networks::RANGE]);
    attach_with(&lab, "h1", "blue", "web", publishing(&["8080:80"])).await;
    for network in ["green", "default"] {
        let refused = lab.host("h1").attach_in(&networks::name(network), "late", publishing(&["8080:81"])).await;
        let error = refused.expect_err(network).to_string();
        assert!(error.contains("8080") && error.contains("web") && error.contains("blue"), "{error}");
        assert!(lab.netns("h1-late").is_err(), "no namespace is left behind");
    }
}

/// Ports outlive the agent and flushed rules, also connections through both translations.
#[tokio::test(flavor = "multi_thread")]
async fn published_port_survives_agent_and_flushed_rules() {
    let lab = start_lab().await;
    attach_with(&lab, "h1", "blue", "web", publishing(&["8080:80", "8080:80/udp"])).await;
    let _servers = serve(&lab, "h1-web");
    let kernels = networks::subscribe(&lab, "h1").await;
    let world = lab.open_netns("world");
    let to = |family| SocketAddr::new(host_address(&lab, "h1", family), 8080);
    let mut connections = Vec::new();
    for family in Family::ALL {
        connections.push(calls::Connection::open(&world, to(family)).await.expect_ok("a connection"));
    }
    lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    for family in Family::ALL {
        assert_eq!(seen(&lab, "world", to(family).ip(), 8080, Udp).await, layout::gateway_address(family));
    }
    lab.start_agent("h1").await;
    networks::wait_ready(&lab, "blue", &["h1"]).await;
    for connection in &mut connections {
        connection.ask().await.expect_ok("a connection that was there before");
    }
    networks::assert_quiet(&kernels, "a killed agent and the next one");
    let before = networks::host_state(&lab, "h1");
    for target in ["h1", "h1.blue"] {
        kernel::run(&lab, target, &["nft", "flush", "ruleset"]);
        networks::wait_state(&lab, "h1", &before, &format!("after the rules of {target} were flushed")).await;
        for family in Family::ALL {
            for protocol in [Tcp, Udp] {
                let call = || observe_source(&world, to(family), protocol);
                eventually_async(&format!("the port is reached again ({family}, {protocol:?})"), CONVERGE_TIMEOUT, || async {
                    let source = call().await?;
                    if source == layout::gateway_address(family) { Ok(()) } else { Err(format!("seen as {source}")) }
                })
                .await;
            }
        }
    }
}
