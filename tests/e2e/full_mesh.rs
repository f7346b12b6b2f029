//! Three hosts with two containers each: every container reaches every other by its own address, the world sees the host's, and each
//! kernel holds exactly what the design says.

use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;

use overlay_agent::model::{Family, Subnet};
use overlay_tests::capture::{Capture, VXLAN_PORT};
use overlay_tests::{Must, Story, kernel, story};
use overlayctl::lab::{Families, check, layout};

#[tokio::test(flavor = "multi_thread")]
async fn with_ipv4() {
    full_mesh(Families::V4, 1450).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_ipv6() {
    full_mesh(Families::V6, 1430).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_both() {
    full_mesh(Families::Dual, 1430).await;
}

async fn full_mesh(families: Families, mtu: u64) {
    let story = Story::up(|options| options.families = families).await;
    let capture = Capture::start(&story, "h1", "eth0");
    let report = check::check(&story).await.must("check");
    let packets = capture.stop();
    let count = families.list().len();
    assert!(report.ok, "{report:#?}");
    assert_eq!(
        (report.overlay.len(), report.egress.len()),
        (30 * count, 6 * count),
        "every container to every other one and out"
    );
    only_the_tunnel_between_hosts(&story, &packets).await;

    for host in story.hosts() {
        story.settled(host.name(), story::SOON).await;
        bridge_and_ports(&story, host.name(), mtu).await;
        subnet_env(&story, host.name(), mtu).await;
        let status = story.status(host.name()).await;
        assert!(status.ready && status.problems.is_empty(), "{status:#?}");
        assert_eq!((status.data_path.peers, status.endpoints, status.data_path.drift_repairs), (2, 2, 0));
    }
    containers(&story, mtu).await;
}

/// On the underlay: nothing between hosts but the tunnel, nothing of the overlay outside of it, no broadcast inside of it.
async fn only_the_tunnel_between_hosts(story: &Story, packets: &[overlay_tests::capture::Packet]) {
    let hosts: Vec<IpAddr> =
        story.hosts().flat_map(|h| h.layout().addresses.iter().map(|(_, a)| *a).collect::<Vec<_>>()).collect();
    let networks = story.layout().networks;
    let in_overlay = |address: IpAddr| networks.get(Family::of(address)).is_some_and(|network| network.contains(address));
    let mut subnets: Vec<(IpAddr, Subnet)> = Vec::new();
    for host in story.hosts() {
        let subnet = story.status(host.name()).await.lease.must("a lease").subnet;
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
            "a container is asked for on the underlay: {packet:?}"
        );
        if hosts.contains(&from) && hosts.contains(&to) && !packet.is_neighbour_discovery() {
            let Some((vni, inner)) = &packet.vxlan else { panic!("between hosts, and not the tunnel: {packet:?}") };
            assert_eq!((*vni, packet.port), (1, Some(VXLAN_PORT)));
            assert!(!inner.is_group() && !inner.is_neighbour_discovery(), "broadcast through the tunnel: {packet:?}");
            let (inner_from, inner_to) = inner.addresses.must("an inner IP packet");
            assert!(holds(from, inner_from) && holds(to, inner_to), "outer H1 to H2, inner C1 to C2: {packet:?}");
            tunnelled += 1;
        } else {
            assert!(packet.vxlan.is_none(), "the tunnel leads elsewhere: {packet:?}");
        }
    }
    assert!(tunnelled > 20, "the calls went through the tunnel: {tunnelled} packets of {}", packets.len());
}

/// The bridge has a fixed MAC and the overlay's MTU; its ports have no address.
async fn bridge_and_ports(story: &Story, host: &str, mtu: u64) {
    let bridge = kernel::link(story, host, "ovb.1").must("the bridge");
    let endpoints = story.at(host).client().endpoints().await.must(host).endpoints;
    for endpoint in endpoints {
        let host_end = &endpoint.port.as_ref().must("a port").host_interface;
        let port = kernel::link(story, host, host_end).must("the host's end");
        // One that is not set is the lowest of the ports', and changes as they come and go.
        assert_ne!(kernel::text(&port, "address"), kernel::text(&bridge, "address"));
        assert_eq!((kernel::text(&port, "master").as_str(), kernel::number(&port, "mtu")), ("ovb.1", mtu), "{port}");
        let addresses = kernel::listed(story, host, "ip", &["address", "show", "dev", host_end]);
        assert_eq!(addresses[0]["addr_info"], serde_json::json!([]), "no address on veths");
    }
}

/// `subnet.env` has flannel's names in flannel's order.
async fn subnet_env(story: &Story, host: &str, mtu: u64) {
    let path = story.at(host).run_dir().join("subnet.env");
    let subnet = story.status(host).await.lease.must("a lease").subnet;
    let mut wanted = String::new();
    for (family, range) in subnet.iter() {
        let name = if family == Family::V4 { "FLANNEL" } else { "FLANNEL_IPV6" };
        let network = story.layout().networks.get(family).copied().must("the network");
        let gateway = subnet.gateway(family).must("a gateway");
        wanted += &format!("{name}_NETWORK={network}\n{name}_SUBNET={gateway}/{}\n", range.length());
    }
    wanted += &format!("FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n");
    assert_eq!(std::fs::read_to_string(&path).must("subnet.env"), wanted);
    assert_eq!(std::fs::metadata(&path).must("subnet.env").permissions().mode() & 0o7777, 0o644);
}

/// A container has its address with the subnet's length, the bridge as default gateway, and an MTU that fits: the largest packet goes through
/// whole, a larger one is refused before it is sent.
async fn containers(story: &Story, mtu: u64) {
    let to = story.at("h2").client().endpoints().await.must("h2").endpoints;
    let subnet = story.status("h1").await.lease.must("a lease").subnet;
    let link = kernel::link(story, "h1-c1", "eth0").must("eth0");
    assert_eq!(kernel::number(&link, "mtu"), mtu);
    for (family, address) in to[0].addresses().iter() {
        let (option, headers, length) = if family == Family::V4 { ("-4", 28, 24) } else { ("-6", 48, 64) };
        let gateway = subnet.gateway(family).must("a gateway").to_string();
        let routes = kernel::listed(story, "h1-c1", "ip", &[option, "route", "show", "default"]);
        assert_eq!((routes.len(), kernel::text(&routes[0], "gateway")), (1, gateway));
        assert_eq!(subnet.get(family).must("a range").length(), length);
        let size = |size: u64| (size - headers).to_string();
        let ping = |bytes: String| {
            let address = address.to_string();
            let command = ["ping", option, "-c", "1", "-W", "2", "-M", "do", "-s", &bytes, &address];
            kernel::attempt(story, "h1-c1", &command)
        };
        overlay_tests::programs::needs("ping", "iputils-ping");
        ping(size(mtu)).exits(0);
        assert_ne!(ping(size(mtu + 1)).code, Some(0), "a packet of {} bytes does not fit", mtu + 1);
    }
}

/// The lab's addresses are where the stories think they are.
#[test]
fn the_underlay_is_apart_from_the_overlay() {
    for family in Family::ALL {
        assert!(layout::underlay(family).contains(layout::etcd_address(family)));
        assert!(!layout::underlay(family).contains(layout::outside_address(family)));
    }
}
