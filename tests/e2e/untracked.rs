//! Conntrack ignores the tunnel's own packets: they neither fill its table nor cost a connection's processing.
//!
//! It does track containers' traffic, and VXLAN that the host only forwards and translates.

use std::net::{SocketAddr, UdpSocket};

use overlay_agent::model::Family;
use overlay_tests::capture::VXLAN_PORT;
use overlay_tests::tcp_stream::Transfer;
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::{ExpectContext, TestLab, eventually, eventually_true, kernel};
use overlayctl::lab::Families;
use overlayctl::lab::layout::gateway_address;

/// A firewall with connection tracking on input, output and forward.
const CONNTRACK_FIREWALL: &str = "nft 'table inet firewall {
    chain i { type filter hook input priority 0; ct state invalid drop; }
    chain f { type filter hook forward priority 0; ct state invalid drop; }
    chain o { type filter hook output priority 0; ct state invalid drop; }; }'";

/// A firewall that accepts only tracked connections, neighbour discovery and the tunnel.
const STATEFUL_FIREWALL: &str = "nft 'table inet firewall { chain i {
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    ct state invalid counter drop
    iif lo accept
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, nd-router-advert } accept
    udp dport 8472 accept; }; }'";

/// Prefixes of the lab's networks in the conntrack table's format.
const NETWORK_PREFIXES: [&str; 2] = ["10.244.", "fd00:0010:0244:"];

async fn start_lab() -> TestLab {
    TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn vxlan_packets_are_not_tracked() {
    let lab = start_lab().await;
    for host in ["h1", "h2"] {
        kernel::shell(&lab, host, CONNTRACK_FIREWALL);
    }
    lab.assert_full_reachability().await;
    for host in ["h1", "h2"] {
        let table = kernel::run(&lab, host, &["cat", "/proc/net/nf_conntrack"]);
        let port = format!("dport={VXLAN_PORT} ");
        let tunnel: Vec<&str> = table.lines().filter(|line| line.contains(&port)).collect();
        assert!(tunnel.is_empty(), "{host} tracks the tunnel: {tunnel:#?}");
        // The containers' own connections are tracked.
        for network in NETWORK_PREFIXES {
            let inside = |line: &str| line.contains(&format!("src={network}")) && line.contains(&format!("dst={network}"));
            assert!(table.lines().any(inside), "{host} does not track connections of {network}: {table}");
        }
    }
}

/// A router with a smaller MTU is between the hosts, and their firewalls accept only its related ICMP messages.
#[tokio::test(flavor = "multi_thread")]
async fn large_packets_pass_router_with_smaller_mtu() {
    let lab = TestLab::without_agents(2, Families::Dual).await;
    kernel::shell(
        &lab,
        "world",
        "cd /proc/sys/net; echo 1 >ipv4/ip_forward; echo 1 >ipv6/conf/all/forwarding; for f in ipv4/conf/*/send_redirects; do echo 0 >$f; done",
    );
    for (host, other) in [("h1", "h2"), ("h2", "h1")] {
        kernel::shell(&lab, host, STATEFUL_FIREWALL);
        for (family, address) in lab.host(other).layout().addresses.iter() {
            kernel::run(&lab, host, &["ip", "route", "add", &address.to_string(), "via", &gateway_address(family).to_string()]);
            let narrow = ["ip", "route", "add", &address.to_string(), "dev", "eth0", "mtu", "lock", "1400"];
            kernel::run(&lab, "world", &narrow);
        }
    }
    for host in ["h1", "h2"] {
        lab.start_agent(host).await;
        lab.host(host).attach("c1").await.expect_ok("attach");
    }
    lab.wait_full_mesh().await;
    let path = *lab.host("h2").layout().addresses.get(Family::V6).expect_ok("its address");
    eventually("the kernel knows the path's MTU", CONVERGE_TIMEOUT, || {
        let route = kernel::run(&lab, "h1", &["ip", "route", "get", &path.to_string()]);
        if route.contains("mtu 1400") { Ok(()) } else { Err(route) }
    })
    .await;
    for family in Family::ALL {
        let endpoints = lab.host("h2").client().endpoints().await.expect_ok("h2").endpoints;
        let address = *endpoints.first().expect_ok("a container").addresses().get(family).expect_ok("its address");
        kernel::run(&lab, "h1-c1", &["ping", "-n", "-c", "1", "-W", "5", &address.to_string()]);
        let transfer = Transfer::start(&lab.open_netns("h1-c1"), &lab.open_netns("h2-c1"), address).await;
        eventually_true(&format!("{family}: 400 kB arrive"), 2 * CONVERGE_TIMEOUT, || transfer.received() >= 400_000).await;
        transfer.stop().await.assert_complete(&format!("{family}"), CONVERGE_TIMEOUT);
    }
    kernel::run(&lab, "h2", &["nft", "add", "rule", "inet", "firewall", "i", "meta", "l4proto", "{ icmp, ipv6-icmp }", "accept"]);
    let found = lab.ctl("h1", &["check", "paths"]);
    assert!(
        found.stdout.contains("bytes: senders learn the path MTU") && found.stdout.contains("mtu 1400"),
        "{}{}",
        found.stdout,
        found.stderr
    );
}

/// A guest of a host, behind the host's address, has its own overlay on the same port.
#[tokio::test(flavor = "multi_thread")]
async fn forwarded_vxlan_is_masqueraded() {
    let lab = start_lab().await;
    let guest = lab.open_netns("h1-c1");
    let name = guest.path().file_name().and_then(|name| name.to_str()).expect_ok("a name").to_owned();
    let world = gateway_address(Family::V4);
    kernel::shell(
        &lab,
        "h1",
        &format!(
            "ip link add guest type veth peer name out netns {name}; ip address add 192.168.77.1/24 dev guest; ip link set guest up
             nft 'table ip guests {{ chain p {{ type nat hook postrouting priority 100; ip saddr 192.168.77.0/24 masquerade; }}; }}'"
        ),
    );
    kernel::shell(
        &lab,
        "h1-c1",
        &format!("ip address add 192.168.77.2/24 dev out; ip link set out up; ip route add {world} via 192.168.77.1"),
    );
    let bind = |address: SocketAddr| move || UdpSocket::bind(address);
    let server = lab.open_netns("world").run(bind(SocketAddr::new(world, VXLAN_PORT))).expect_ok("world").expect_ok("a socket");
    server.set_read_timeout(Some(CONVERGE_TIMEOUT)).expect_ok("a limit");
    let from = guest.run(bind(([192, 168, 77, 2], 0).into())).expect_ok("h1-c1").expect_ok("a socket");
    from.send_to(b"a guest's own tunnel", SocketAddr::new(world, VXLAN_PORT)).expect_ok("sending");
    let mut buffer = [0; 64];
    let (_, source) = server.recv_from(&mut buffer).expect_ok("the guest's datagram");
    let host = *lab.host("h1").layout().addresses.get(Family::V4).expect_ok("its address");
    assert_eq!(source.ip(), host, "the guest's packet is masqueraded");
}
