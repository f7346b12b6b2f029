//! Three hosts with two containers each. Every container reaches every other one by its own address, the outside sees the host's
//! address, and each kernel state is exactly the expected one.

use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;

use overlay_agent::model::{Family, Subnet};
use overlay_tests::capture::{Capture, VXLAN_PORT};
use overlay_tests::{ExpectContext, TestLab, kernel, test_lab};
use overlayctl::lab::{Families, check, layout};

/// `IPPROTO_ICMPV6` in `linux/in6.h`.
const ICMPV6: u8 = 58;

#[tokio::test(flavor = "multi_thread")]
async fn ipv4_full_mesh_works() {
    assert_full_mesh(Families::V4, 1450).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_full_mesh_works() {
    assert_full_mesh(Families::V6, 1430).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dual_stack_full_mesh_works() {
    assert_full_mesh(Families::Dual, 1430).await;
}

async fn assert_full_mesh(families: Families, mtu: u64) {
    let lab = TestLab::up(|options| options.families = families).await;
    let capture = Capture::start(&lab, "h1", "eth0");
    let report = check::check(&lab).await.expect_ok("check");
    let packets = capture.stop();
    let count = families.list().len();
    assert!(report.ok, "{report:#?}");
    assert_eq!(
        (report.overlay.len(), report.egress.len()),
        (30 * count, 6 * count),
        "every container to every other one and out"
    );
    assert_only_tunnel_between_hosts(&lab, &packets).await;

    for host in lab.hosts() {
        lab.wait_converged(host.name(), test_lab::CONVERGE_TIMEOUT).await;
        assert_bridge_and_ports(&lab, host.name(), mtu).await;
        assert_subnet_env(&lab, host.name(), mtu).await;
        let status = lab.status(host.name()).await;
        assert!(status.ready && status.problems.is_empty(), "{status:#?}");
        assert_eq!((status.data_path.peers, status.endpoints, status.data_path.drift_repairs), (2, 2, 0));
    }
    assert_containers(&lab, mtu).await;
}

/// Checks the underlay: only tunnel packets and ICMPv6 between hosts, no overlay addresses outside the tunnel, no broadcast inside it.
async fn assert_only_tunnel_between_hosts(lab: &TestLab, packets: &[overlay_tests::capture::Packet]) {
    let hosts: Vec<IpAddr> = lab.hosts().flat_map(|h| h.layout().addresses.iter().map(|(_, a)| *a).collect::<Vec<_>>()).collect();
    let networks = lab.layout().networks;
    let in_overlay = |address: IpAddr| networks.get(Family::of(address)).is_some_and(|network| network.contains(address));
    let mut subnets: Vec<(IpAddr, Subnet)> = Vec::new();
    for host in lab.hosts() {
        let subnet = lab.status(host.name()).await.lease.expect_ok("a lease").subnet;
        subnets.extend(host.layout().addresses.iter().map(|(_, address)| (*address, subnet)));
    }
    let holds = |host: IpAddr, container: IpAddr| {
        subnets.iter().any(|(a, s)| *a == host && s.get(Family::of(container)).is_some_and(|range| range.contains(container)))
    };
    let mut tunnelled = 0;
    for packet in packets {
        let Some((from, to)) = packet.addresses else { continue };
        assert!(!in_overlay(from) && !in_overlay(to), "an overlay address on the underlay: {packet:?}");
        assert!(
            packet.neighbour.is_none_or(|target| !in_overlay(target)),
            "neighbour discovery for a container on the underlay: {packet:?}"
        );
        // An agent probes the path MTU to each peer over IPv6, some seconds after it appeared.
        let is_icmpv6 = packet.protocol == ICMPV6 && packet.vxlan.is_none();
        if hosts.contains(&from) && hosts.contains(&to) && !packet.is_neighbour_discovery() && !is_icmpv6 {
            let Some((vni, inner)) = &packet.vxlan else { panic!("a packet between hosts outside the tunnel: {packet:?}") };
            assert_eq!((*vni, packet.port), (1, Some(VXLAN_PORT)));
            assert!(!inner.is_multicast() && !inner.is_neighbour_discovery(), "broadcast through the tunnel: {packet:?}");
            let (inner_from, inner_to) = inner.addresses.expect_ok("an inner IP packet");
            assert!(holds(from, inner_from) && holds(to, inner_to), "outer H1 to H2, inner C1 to C2: {packet:?}");
            tunnelled += 1;
        } else {
            assert!(packet.vxlan.is_none(), "a tunnel packet to a wrong destination: {packet:?}");
        }
    }
    assert!(tunnelled > 20, "the calls use the tunnel: {tunnelled} packets of {}", packets.len());
}

/// Checks that the bridge has a fixed MAC and the overlay's MTU, and that its ports have no address.
async fn assert_bridge_and_ports(lab: &TestLab, host: &str, mtu: u64) {
    let bridge = kernel::link(lab, host, "ovb.1").expect_ok("the bridge");
    let endpoints = lab.host(host).client().endpoints().await.expect_ok(host).endpoints;
    for endpoint in endpoints {
        let host_end = &endpoint.port.as_ref().expect_ok("a port").host_interface;
        let port = kernel::link(lab, host, host_end).expect_ok("the host interface");
        // An unset MAC of a bridge is the lowest of its ports', and changes with them.
        assert_ne!(kernel::text(&port, "address"), kernel::text(&bridge, "address"));
        assert_eq!((kernel::text(&port, "master").as_str(), kernel::number(&port, "mtu")), ("ovb.1", mtu), "{port}");
        let addresses = kernel::list_json(lab, host, "ip", &["address", "show", "dev", host_end]);
        assert_eq!(addresses[0]["addr_info"], serde_json::json!([]), "no address on veths");
    }
}

/// `subnet.env` has flannel's names in flannel's order.
async fn assert_subnet_env(lab: &TestLab, host: &str, mtu: u64) {
    let path = lab.host(host).run_dir().join("subnet.env");
    let subnet = lab.status(host).await.lease.expect_ok("a lease").subnet;
    let mut wanted = String::new();
    for (family, range) in subnet.iter() {
        let name = if family == Family::V4 { "FLANNEL" } else { "FLANNEL_IPV6" };
        let network = lab.layout().networks.get(family).copied().expect_ok("the network");
        let gateway = subnet.gateway(family).expect_ok("a gateway");
        wanted += &format!("{name}_NETWORK={network}\n{name}_SUBNET={gateway}/{}\n", range.length());
    }
    wanted += &format!("FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n");
    assert_eq!(std::fs::read_to_string(&path).expect_ok("subnet.env"), wanted);
    assert_eq!(std::fs::metadata(&path).expect_ok("subnet.env").permissions().mode() & 0o7777, 0o644);
}

/// Checks a container's address and prefix length, its default gateway, and its MTU: the largest packet passes unfragmented, a
/// larger one fails at the sender.
async fn assert_containers(lab: &TestLab, mtu: u64) {
    let to = lab.host("h2").client().endpoints().await.expect_ok("h2").endpoints;
    let subnet = lab.status("h1").await.lease.expect_ok("a lease").subnet;
    let link = kernel::link(lab, "h1-c1", "eth0").expect_ok("eth0");
    assert_eq!(kernel::number(&link, "mtu"), mtu);
    for (family, address) in to[0].addresses().iter() {
        let (option, headers, length) = if family == Family::V4 { ("-4", 28, 24) } else { ("-6", 48, 64) };
        let gateway = subnet.gateway(family).expect_ok("a gateway").to_string();
        let routes = kernel::list_json(lab, "h1-c1", "ip", &[option, "route", "show", "default"]);
        assert_eq!((routes.len(), kernel::text(&routes[0], "gateway")), (1, gateway));
        assert_eq!(subnet.get(family).expect_ok("a range").length(), length);
        let size = |size: u64| (size - headers).to_string();
        let ping = |bytes: String| {
            let address = address.to_string();
            let command = ["ping", option, "-c", "1", "-W", "2", "-M", "do", "-s", &bytes, &address];
            kernel::attempt(lab, "h1-c1", &command)
        };
        overlay_tests::programs::require_program("ping", "iputils-ping");
        ping(size(mtu)).assert_code(0);
        assert_ne!(ping(size(mtu + 1)).code, Some(0), "a packet of {} bytes does not fit", mtu + 1);
    }
}

/// The lab's addresses agree with the tests' assumptions.
#[test]
fn underlay_and_overlay_are_disjoint() {
    for family in Family::ALL {
        assert!(layout::underlay(family).contains(layout::etcd_address(family)));
        assert!(!layout::underlay(family).contains(layout::outside_address(family)));
    }
}
