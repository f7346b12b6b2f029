//! Only peers may send VXLAN to a host, and each only with its own containers' addresses.
//!
//! The tests send handmade packets over the underlay, from a host without a lease and from spoofing peers. Each unauthorised
//! packet is dropped and counted; a lease authorises, its end revokes.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use overlay_agent::model::{Family, PerFamily, Subnet};
use overlay_tests::capture::VXLAN_PORT;
use overlay_tests::packet_builder::{self, Mac, PacketSocket};
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::wait::eventually_async;
use overlay_tests::{ExpectContext, TestLab, etcd, kernel};
use overlayctl::lab::Families;

/// The MAC of inner senders; it is not checked.
const SENDER_MAC: Mac = [2, 0, 0, 0, 0, 0x99];
/// Our VNI.
const OWN_VNI: u32 = 1;
/// Inner ports.
const INNER_PORTS: (u16, u16) = (6000, 6001);

/// Two hosts and their containers; packets go to the first host's container.
struct UnderlayFixture {
    lab: TestLab,
    container_socket: PacketSocket,
    target_addresses: PerFamily<IpAddr>,
    vtep: PerFamily<Mac>,
    sent: u32,
}

/// The expected outcome of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ExpectedOutcome {
    Delivered,
    Dropped,
    /// Neither delivered nor counted.
    Ignored,
}
use ExpectedOutcome::{Delivered, Dropped, Ignored};

impl UnderlayFixture {
    async fn new(agent_args: &[&str]) -> UnderlayFixture {
        let lab = TestLab::up(|options| {
            options.hosts = 3;
            options.containers = 1;
            options.families = Families::Dual;
            options.agent_args = agent_args.iter().map(|flag| (*flag).to_owned()).collect();
        })
        .await;
        let target = addresses(&lab, "h1").await;
        let subnets = lab.host("h1").client().subnets().await.expect_ok("subnets").subnets;
        let own = subnets.iter().find(|entry| entry.own).expect_ok("the own lease");
        let vtep = own.vtep.iter().map(|(family, mac)| (family, mac.0)).collect();
        // So that the first packet does not wait for neighbour resolution.
        for (_, address) in target.iter() {
            kernel::run(&lab, "h2-c1", &["ping", "-c", "1", "-W", "5", &address.to_string()]);
        }
        UnderlayFixture {
            container_socket: PacketSocket::open(&lab.open_netns("h1-c1"), "eth0"),
            lab,
            target_addresses: target,
            vtep,
            sent: 0,
        }
    }

    fn target_address(&self, family: Family) -> IpAddr {
        *self.target_addresses.get(family).expect_ok("its address")
    }

    /// A host's VXLAN destination address.
    fn host_address(&self, name: &str, family: Family) -> IpAddr {
        *self.lab.host(name).layout().addresses.get(family).expect_ok("an address")
    }

    async fn dropped_count(&self) -> u64 {
        self.lab.status("h1").await.data_path.dropped["tunnel"]
    }

    /// A unique inner frame, and its last bytes.
    fn build_inner_frame(&mut self, source: IpAddr) -> (Vec<u8>, Vec<u8>) {
        self.sent += 1;
        let data = format!("packet made by hand, number {:08}", self.sent).into_bytes();
        let family = Family::of(source);
        let (from, to) = (SocketAddr::new(source, INNER_PORTS.0), SocketAddr::new(self.target_address(family), INNER_PORTS.1));
        let mac = *self.vtep.get(family).expect_ok("a VTEP");
        (packet_builder::ip_frame(mac, SENDER_MAC, &packet_builder::udp(from, to, &data)), data)
    }

    /// Sends from a namespace, whose kernel adds the outer headers.
    fn send_vxlan(&self, from: &str, outer: Family, vni: u32, inner: &[u8]) {
        let to = SocketAddr::new(self.host_address("h1", outer), VXLAN_PORT);
        self.send_to(from, to, &packet_builder::vxlan(vni, inner));
    }

    fn send_to(&self, from: &str, to: SocketAddr, payload: &[u8]) {
        let any: IpAddr = if to.is_ipv4() { [0_u8; 4].into() } else { [0_u16; 8].into() };
        let socket = self.lab.open_netns(from).run(|| UdpSocket::bind((any, 0))).expect_ok(from).expect_ok("a socket");
        socket.send_to(payload, to).expect_ok("send");
    }

    /// Checks the outcome of the packet that `send` sends. It is delivered, or counted exactly once and not delivered.
    async fn assert_outcome(&self, name: &str, expected: ExpectedOutcome, data: &[u8], send: impl FnOnce()) {
        let before = self.dropped_count().await;
        drop(self.container_socket.frames());
        send();
        let arrived = || self.container_socket.frames().iter().any(|frame| frame.ends_with(data));
        let expected_count = before + u64::from(expected == Dropped);
        eventually_async(&format!("{name}: {expected:?}"), CONVERGE_TIMEOUT, || async {
            let now = self.dropped_count().await;
            match now == expected_count && (expected != Delivered || arrived()) {
                true => Ok(()),
                false => Err(format!("{before} were counted before, {now} are now")),
            }
        })
        .await;
        if expected != Delivered {
            assert!(!arrived(), "{name}: it reached the container");
        }
        assert_eq!(self.dropped_count().await, expected_count, "{name}");
    }

    /// The same for a packet to the container with this inner source.
    async fn assert_packet_outcome(&mut self, name: &str, from: &str, source: IpAddr, expected: ExpectedOutcome) {
        let (inner, data) = self.build_inner_frame(source);
        self.assert_outcome(name, expected, &data, || self.send_vxlan(from, Family::of(source), OWN_VNI, &inner)).await;
    }
}

async fn addresses(lab: &TestLab, host: &str) -> PerFamily<IpAddr> {
    let endpoints = lab.host(host).client().endpoints().await.expect_ok(host).endpoints;
    endpoints.first().expect_ok("a container").addresses()
}

/// A free subnet, and an address in it.
async fn free_subnet(lab: &TestLab) -> (Subnet, PerFamily<IpAddr>) {
    let taken: Vec<Subnet> =
        lab.host("h1").client().subnets().await.expect_ok("subnets").subnets.iter().filter_map(|entry| entry.subnet).collect();
    let at = |n: u8| -> Subnet { Subnet::from_key(&format!("10.244.{n}.0-24&fd00:10:244:{n:x}::-64")).expect_ok("a key") };
    let overlaps = |subnet: &Subnet| Family::ALL.iter().any(|f| taken.iter().any(|other| other.get(*f) == subnet.get(*f)));
    let subnet = (1..=250).map(at).find(|subnet| !overlaps(subnet)).expect_ok("a free subnet");
    (subnet, nth_addresses(&subnet, 5))
}

fn nth_addresses(subnet: &Subnet, n: u128) -> PerFamily<IpAddr> {
    subnet.iter().filter_map(|(family, range)| Some((family, range.nth(n)?))).collect()
}

/// A lease for the host `world`, which has no agent.
fn lease() -> String {
    r#"{"PublicIP":"10.99.0.254","PublicIPv6":"fd99::254","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"},
        "BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:00:78"}}"#
        .to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn vxlan_without_lease_is_dropped() {
    let mut fixture = UnderlayFixture::new(&[]).await;
    let (subnet, inside) = free_subnet(&fixture.lab).await;
    let peer = addresses(&fixture.lab, "h2").await;
    for family in Family::ALL {
        let of = |addresses: &PerFamily<IpAddr>| *addresses.get(family).expect_ok("an address");
        for (name, source) in [
            ("of a free subnet", of(&inside)),
            ("of a peer's container", of(&peer)),
            (
                "of the sender itself",
                if family == Family::V4 { "10.99.0.254" } else { "fd99::254" }.parse().expect_ok("an address"),
            ),
            ("of the destination host", fixture.host_address("h1", family)),
        ] {
            fixture.assert_packet_outcome(&format!("a stranger with a source {name}"), "world", source, Dropped).await;
        }
        let target = SocketAddr::new(fixture.host_address("h1", family), VXLAN_PORT);
        for (name, payload) in [
            ("nothing inside", packet_builder::vxlan(OWN_VNI, &[])),
            ("half a VXLAN header", packet_builder::vxlan(OWN_VNI, &[])[..5].to_vec()),
            ("no inner packet", packet_builder::vxlan(OWN_VNI, &[0; 14])),
        ] {
            fixture.assert_outcome(name, Dropped, b"no frame ends so", || fixture.send_to("world", target, &payload)).await;
        }
        // More than one underlay packet: it is reassembled before the check.
        let (mut inner, _) = fixture.build_inner_frame(of(&inside));
        inner.extend([b'x'; 3000]);
        fixture.assert_outcome("in fragments", Dropped, b"xxxx", || fixture.send_vxlan("world", family, OWN_VNI, &inner)).await;
    }
    // Other VNIs at the same port are not filtered by us.
    let own = fixture.host_address("h1", Family::V4);
    let add = format!(
        "ip link add other77 type vxlan id 77 local {own} dev eth0 dstport {VXLAN_PORT} nolearning; ip link set other77 up"
    );
    kernel::shell(&fixture.lab, "h1", &add);
    let other = PacketSocket::open(&fixture.lab.open_netns("h1"), "other77");
    let (inner, data) = fixture.build_inner_frame(inside.v4.expect_ok("IPv4"));
    fixture.assert_outcome("another VNI", Ignored, &data, || fixture.send_vxlan("world", Family::V4, 77, &inner)).await;
    overlay_tests::eventually("it reaches the device of that VNI", CONVERGE_TIMEOUT, || {
        let came = other.frames().iter().any(|frame| frame.ends_with(&data));
        if came { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    fixture
        .assert_outcome("a VNI without a device", Ignored, &data, || fixture.send_vxlan("world", Family::V4, 0x0001_0000, &inner))
        .await;

    // A lease authorises its subnet.
    let key = etcd::lease_key(&subnet.to_key());
    etcd::put(&fixture.lab, &key, &lease());
    let knows = |peers: usize| move |s: &overlay_agent::model::api::Status| s.ready && s.data_path.peers == peers;
    fixture.lab.host("h1").wait_status(CONVERGE_TIMEOUT, "the new peer", knows(3)).await.expect_ok("h1");
    for (family, source) in inside.iter() {
        fixture.assert_packet_outcome("a stranger that has a lease", "world", *source, Delivered).await;
        fixture
            .assert_packet_outcome(
                "its subnet's base, as hosts send",
                "world",
                subnet.get(family).expect_ok("a subnet").base(),
                Delivered,
            )
            .await;
        fixture.assert_packet_outcome("with a peer's source", "world", *peer.get(family).expect_ok("an address"), Dropped).await;
        // The outer source of one family, the inner one of the other.
        let (inner, data) = fixture.build_inner_frame(*source);
        let crossed = if family == Family::V4 { Family::V6 } else { Family::V4 };
        fixture
            .assert_outcome("crossed families", Dropped, &data, || fixture.send_vxlan("world", crossed, OWN_VNI, &inner))
            .await;
    }
    etcd::delete(&fixture.lab, &key);
    fixture.lab.host("h1").wait_status(CONVERGE_TIMEOUT, "the peer left", knows(2)).await.expect_ok("h1");
    for (_, source) in inside.iter() {
        fixture.assert_packet_outcome("a stranger whose lease ended", "world", *source, Dropped).await;
    }

    // A lease with another length than the network's subnets.
    let base = subnet.get(Family::V4).expect_ok("IPv4").base();
    etcd::put(&fixture.lab, &etcd::lease_key(&format!("{base}-26")), &lease().replace("PublicIPv6", "Ignored"));
    fixture.lab.host("h1").wait_status(CONVERGE_TIMEOUT, "the new peer", knows(3)).await.expect_ok("h1");
    let nth = |n| nth_addresses(&subnet, n).v4.expect_ok("IPv4");
    fixture.assert_packet_outcome("the last address of a /26", "world", nth(63), Delivered).await;
    fixture.assert_packet_outcome("the first after a /26", "world", nth(64), Dropped).await;
    fixture.lab.assert_full_reachability().await;

    // The rules stay without the agent.
    let (inner, data) = fixture.build_inner_frame(*peer.get(Family::V4).expect_ok("IPv4"));
    let before = fixture.dropped_count().await;
    fixture.lab.host("h1").agent_stop(nix::sys::signal::Signal::SIGKILL).expect_ok("SIGKILL");
    drop(fixture.container_socket.frames());
    fixture.send_vxlan("world", Family::V4, OWN_VNI, &inner);
    fixture.lab.start_agent("h1").await;
    assert_eq!(fixture.dropped_count().await, before + 1);
    assert!(!fixture.container_socket.frames().iter().any(|frame| frame.ends_with(&data)));
}

#[tokio::test(flavor = "multi_thread")]
async fn spoofed_inner_source_is_dropped() {
    let mut fixture = UnderlayFixture::new(&[]).await;
    let (h2, h3) = (addresses(&fixture.lab, "h2").await, addresses(&fixture.lab, "h3").await);
    let subnet = fixture.lab.status("h2").await.lease.expect_ok("a lease").subnet;
    let own = fixture.lab.status("h1").await.lease.expect_ok("a lease").subnet;
    let mark = fixture.lab.status("h1").await.data_path.dropped["tunnel"];
    assert_eq!(mark, 0, "legitimate traffic is not counted");
    for family in Family::ALL {
        let of = |addresses: &PerFamily<IpAddr>| *addresses.get(family).expect_ok("an address");
        let base = subnet.get(family).expect_ok("a subnet").base();
        fixture.assert_packet_outcome("a peer's container", "h2", of(&h2), Delivered).await;
        fixture.assert_packet_outcome("a peer itself", "h2", base, Delivered).await;
        for (name, source) in [
            ("another peer's container", of(&h3)),
            ("a container of the destination host", nth_addresses(&own, 9).get(family).copied().expect_ok("an address")),
            ("the gateway of the destination host", nth_addresses(&own, 1).get(family).copied().expect_ok("an address")),
            ("the world", if family == Family::V4 { "192.0.2.1" } else { "2001:db8::1" }.parse().expect_ok("an address")),
            ("its address on the underlay", fixture.host_address("h2", family)),
        ] {
            fixture.assert_packet_outcome(&format!("a peer as {name}"), "h2", source, Dropped).await;
        }
        // Frame types that the tunnel does not use: ARP and VLAN.
        let mac = *fixture.vtep.get(family).expect_ok("a VTEP");
        let (frame, data) = fixture.build_inner_frame(of(&h2));
        let tagged = [&frame[..12], &[0x81, 0, 0, 5], &frame[12..]].concat();
        fixture.assert_outcome("a VLAN tag inside", Dropped, &data, || fixture.send_vxlan("h2", family, OWN_VNI, &tagged)).await;
        if family == Family::V4 {
            let output = packet_builder::arp(2, (SENDER_MAC, of(&h2)), (mac, fixture.target_address(family)));
            let inner = packet_builder::frame(mac, SENDER_MAC, packet_builder::ARP, &output);
            fixture.assert_outcome("ARP inside", Dropped, &output, || fixture.send_vxlan("h2", family, OWN_VNI, &inner)).await;
        }
    }
    fixture.lab.assert_full_reachability().await;
    let metrics = overlay_tests::http::request(&fixture.lab.host("h1").socket(), "GET", "/metrics", "").body;
    let sample = format!("overlayd_dropped_packets_total{{reason=\"tunnel\"}} {}", fixture.dropped_count().await);
    assert!(metrics.lines().any(|line| line == sample), "{sample}: {metrics}");
    let output = fixture.lab.ctl("h1", &["status"]).assert_code(0).stdout;
    assert!(output.contains(&format!("{} tunnel", fixture.dropped_count().await)), "{output}");
}

/// The limit of the check: the underlay's outer source address is trusted. A sender that can spoof it can act as a peer; the
/// underlay must prevent this, or VXLAN must run over an encrypted transport.
#[tokio::test(flavor = "multi_thread")]
async fn spoofed_outer_source_passes_as_peer() {
    let fixture = UnderlayFixture::new(&[]).await;
    let mac = |host: &str| -> Mac {
        let link = kernel::link(&fixture.lab, host, "eth0").expect_ok("eth0");
        let bytes: Vec<u8> =
            kernel::text(&link, "address").split(':').map(|byte| u8::from_str_radix(byte, 16).expect_ok("a MAC")).collect();
        bytes.try_into().ok().expect_ok("six bytes")
    };
    let (to, from) = (mac("h1"), mac("world"));
    let h2 = addresses(&fixture.lab, "h2").await;
    let world = PacketSocket::open(&fixture.lab.open_netns("world"), "eth0");
    for (family, source) in h2.iter() {
        let forged = |inner: &[u8]| {
            let outer = (
                SocketAddr::new(fixture.host_address("h2", family), 5000),
                SocketAddr::new(fixture.host_address("h1", family), VXLAN_PORT),
            );
            packet_builder::ip_frame(to, from, &packet_builder::udp(outer.0, outer.1, &packet_builder::vxlan(OWN_VNI, inner)))
        };
        let (inner, data) = (inner_frame_from(&fixture, *source, 1), b"as a peer".to_vec());
        fixture.assert_outcome("a forged outer source", Delivered, &data, || world.send(&forged(&inner))).await;
        // Even so, only with the inner addresses of that peer.
        let other = addresses(&fixture.lab, "h3").await.get(family).copied().expect_ok("an address");
        let inner = inner_frame_from(&fixture, other, 2);
        fixture.assert_outcome("a forged outer source that does not fit", Dropped, &data, || world.send(&forged(&inner))).await;
    }
}

fn inner_frame_from(fixture: &UnderlayFixture, source: IpAddr, port: u16) -> Vec<u8> {
    let family = Family::of(source);
    let to = SocketAddr::new(fixture.target_address(family), INNER_PORTS.1);
    let packet = packet_builder::udp(SocketAddr::new(source, port), to, b"as a peer");
    packet_builder::ip_frame(*fixture.vtep.get(family).expect_ok("a VTEP"), SENDER_MAC, &packet)
}

/// Without masquerade, a host answers another host's containers with its own address, through the tunnel.
#[tokio::test(flavor = "multi_thread")]
async fn host_addresses_pass_without_masquerade() {
    let mut fixture = UnderlayFixture::new(&["--ip-masq=false"]).await;
    let h2 = addresses(&fixture.lab, "h2").await;
    for family in Family::ALL {
        let (own, other) = (fixture.host_address("h2", family), fixture.host_address("h3", family));
        fixture.assert_packet_outcome("a peer's container", "h2", *h2.get(family).expect_ok("an address"), Delivered).await;
        fixture.assert_packet_outcome("a peer's own address", "h2", own, Delivered).await;
        fixture.assert_packet_outcome("another peer's own address", "h2", other, Dropped).await;
        fixture.assert_packet_outcome("a stranger as a peer", "world", own, Dropped).await;
        let outside = if family == Family::V4 { "192.0.2.1" } else { "2001:db8::1" };
        fixture.assert_packet_outcome("the world", "h2", outside.parse().expect_ok("an address"), Dropped).await;
        // From a container's view: the other host answers it.
        let own = own.to_string();
        kernel::run(&fixture.lab, "h1-c1", &["ping", "-c", "1", "-W", "5", &own]);
    }
}
