//! A packet's path: the tutorial's output, and a capture of both hosts' interfaces meanwhile.

use std::net::IpAddr;

use overlay_tests::ExpectContext;
use overlay_tests::capture::{Capture, Packet, VXLAN_PORT};
use overlay_tests::tutorial::Tutorial;
use overlayctl::lab::Lab;

const UDP: u8 = 17;
const ICMP: u8 = 1;
const ARP: u16 = 0x0806;

/// The hosts' underlay addresses.
const HOST_ADDRESSES: [&str; 2] = ["10.99.1.1", "10.99.1.2"];

fn parse_address(text: &str) -> IpAddr {
    text.parse().expect_ok(text)
}

async fn container_address(lab: &Lab, host: &str, name: &str) -> IpAddr {
    let endpoints = lab.host(host).expect_ok(host).client().endpoints().await.expect_ok(host).endpoints;
    let endpoint = endpoints.into_iter().find(|e| e.name.as_str() == name).expect_ok(name);
    endpoint.addresses().v4.expect_ok("IPv4")
}

/// Whether a packet or its inner packet is ARP or neighbour discovery with an overlay address.
fn is_overlay_neighbour_discovery(packet: &Packet) -> bool {
    let overlay = |address: IpAddr| matches!(address, IpAddr::V4(a) if a.octets()[..2] == [10, 244]);
    let own = packet.is_neighbour_discovery() && packet.addresses.is_some_and(|(from, to)| overlay(from) || overlay(to));
    own || packet.vxlan.as_ref().is_some_and(|(_, inner)| inner.is_neighbour_discovery() || inner.is_multicast())
}

#[tokio::test(flavor = "multi_thread")]
async fn packet_path_section_matches_captures() {
    let mut tutorial = Tutorial::begin("The way of a packet").await;
    tutorial.run_until("ping -c 1").await;
    let lab = tutorial.lab();
    let (c3, c5) = (container_address(&lab, "h1", "c3").await, container_address(&lab, "h2", "c5").await);
    let [h1, h2] = HOST_ADDRESSES.map(parse_address);
    let interfaces = [("h1", "eth0"), ("h2", "eth0"), ("h1", "ovb.1"), ("h2", "ovb.1")];
    let captures = interfaces.map(|(host, interface)| Capture::start(&lab, host, interface));
    tutorial.run_block().await;
    let [wire1, wire2, bridge1, bridge2] = captures.map(Capture::stop);

    for (name, packets) in [("h1", &wire1), ("h2", &wire2)] {
        let tunnelled: Vec<&Packet> = packets.iter().filter(|p| p.protocol == UDP && p.port == Some(VXLAN_PORT)).collect();
        let packets_inside: Vec<_> = tunnelled
            .iter()
            .map(|outer| {
                let (vni, inner) = outer.vxlan.as_ref().expect_ok("a packet inside");
                (outer.addresses, *vni, inner.protocol, inner.addresses)
            })
            .collect();
        let wanted = [(Some((h1, h2)), 1, ICMP, Some((c3, c5))), (Some((h2, h1)), 1, ICMP, Some((c5, c3)))];
        assert_eq!(packets_inside, wanted, "the underlay of {name}: request and answer, outer, VNI and inner");
        let discovery: Vec<&Packet> = packets.iter().filter(|p| is_overlay_neighbour_discovery(p)).collect();
        assert!(discovery.is_empty(), "no neighbour discovery for containers on the underlay of {name}: {discovery:?}");
        let bare: Vec<&Packet> = packets.iter().filter(|p| p.protocol == ICMP).collect();
        assert!(bare.is_empty(), "no packet outside the tunnel: {bare:?}");
    }
    for (name, packets) in [("h1", &bridge1), ("h2", &bridge2)] {
        let pings: Vec<_> = packets.iter().filter(|p| p.protocol == ICMP).map(|p| p.addresses).collect();
        assert_eq!(pings, [Some((c3, c5)), Some((c5, c3))], "the bridge of {name}");
        assert!(packets.iter().all(|p| p.vxlan.is_none()), "no tunnel on the bridge of {name}");
    }
    // A container's neighbours are resolved on the bridge.
    assert!(bridge1.iter().any(|p| p.ether_type == ARP && p.addresses.is_some_and(|(from, _)| from == c3)), "{bridge1:?}");
    tutorial.run_to_end().await;
}
