//! A container can use only its own addresses and MAC, is neither router nor DHCP server, and cannot forge encapsulation.
//!
//! Handmade frames are sent from its interface. Each violation is dropped and counted under its reason; frames with correct
//! addresses pass.

#[path = "spoof/frames.rs"]
mod frames;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use frames::{ExpectedOutcome, Station};
use overlay_agent::model::Family;
use overlay_tests::packet_builder::{self, Mac, PacketSocket};
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::wait::eventually_async;
use overlay_tests::{ExpectContext, TestLab, eventually, http, kernel, rules};
use overlayctl::lab::Families;

type DropCounts = BTreeMap<String, u64>;

async fn drop_counts(lab: &TestLab, host: &str) -> DropCounts {
    lab.status(host).await.data_path.dropped
}

/// An endpoint of a host.
async fn find_station(lab: &TestLab, host: &str, name: &str) -> Station {
    let endpoints = lab.host(host).client().endpoints().await.expect_ok(host).endpoints;
    let endpoint = endpoints.into_iter().find(|e| e.name.as_str() == name).expect_ok(name);
    let address = |family| *endpoint.addresses().get(family).expect_ok("its address");
    let mac = endpoint.port.as_ref().expect_ok("its port").mac.0;
    Station { mac, v4: address(Family::V4), v6: address(Family::V6) }
}

fn bridge_mac(lab: &TestLab, host: &str) -> Mac {
    let link = kernel::link(lab, host, "ovb.1").expect_ok("the bridge");
    let bytes: Vec<u8> =
        kernel::text(&link, "address").split(':').map(|byte| u8::from_str_radix(byte, 16).expect_ok("a MAC")).collect();
    bytes.try_into().ok().expect_ok("six bytes")
}

/// Two hosts with two containers each, in both families.
async fn start_lab() -> TestLab {
    TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 2;
        options.families = Families::Dual;
    })
    .await
}

/// Sockets of the sender and of a receiver on the same bridge, and a frame that always passes. Its arrival shows that earlier
/// frames have been filtered.
struct SpoofFixture<'a> {
    lab: &'a TestLab,
    sender_socket: PacketSocket,
    receiver_socket: PacketSocket,
    sender: Station,
    receiver: Station,
    marker_count: u16,
}

impl<'a> SpoofFixture<'a> {
    async fn new(lab: &'a TestLab, sender: &str) -> SpoofFixture<'a> {
        let (own_station, peer_station) = (find_station(lab, "h1", sender).await, find_station(lab, "h1", "c2").await);
        let from = PacketSocket::open(&lab.open_netns(&format!("h1-{sender}")), "eth0");
        SpoofFixture {
            lab,
            sender_socket: from,
            receiver_socket: PacketSocket::open(&lab.open_netns("h1-c2"), "eth0"),
            sender: own_station,
            receiver: peer_station,
            marker_count: 0,
        }
    }

    /// A numbered datagram to the receiver.
    fn marker_frame(&mut self) -> Vec<u8> {
        self.marker_count += 1;
        let packet = packet_builder::udp(
            SocketAddr::new(self.sender.v4, 4000),
            SocketAddr::new(self.receiver.v4, 4001),
            &[b"fence".as_slice(), &self.marker_count.to_be_bytes()].concat(),
        );
        packet_builder::ip_frame(self.receiver.mac, self.sender.mac, &packet)
    }

    /// Sends a frame and checks its outcome: delivered, or counted under its reason and not delivered. No other counter changes.
    async fn assert_outcome(&mut self, name: &str, frame: &[u8], expected: ExpectedOutcome) {
        let before = drop_counts(self.lab, "h1").await;
        let mut expected_counts = before.clone();
        if let ExpectedOutcome::Dropped(reason) = expected {
            *expected_counts.get_mut(reason).expect_ok(reason) += 1;
        }
        drop(self.receiver_socket.frames());
        self.sender_socket.send(frame);
        let marker = self.marker_frame();
        self.sender_socket.send(&marker);
        let mut received: Vec<Vec<u8>> = Vec::new();
        eventually(&format!("{name}: the frame has been filtered"), CONVERGE_TIMEOUT, || {
            received.extend(self.receiver_socket.frames());
            let has = |frame: &[u8]| received.iter().any(|s| s == frame);
            match (has(&marker), has(frame) || expected != ExpectedOutcome::Delivered) {
                (true, true) => Ok(()),
                (marker_arrived, frame_arrived) => {
                    Err(format!("the frame has arrived: {frame_arrived}, the next one: {marker_arrived}"))
                }
            }
        })
        .await;
        let lab = self.lab;
        eventually_async(&format!("{name}: {expected:?}"), CONVERGE_TIMEOUT, || async {
            let now = drop_counts(lab, "h1").await;
            if now == expected_counts { Ok(()) } else { Err(format!("it was {before:?}, is {now:?}")) }
        })
        .await;
        received.extend(self.receiver_socket.frames());
        let arrived = received.iter().any(|s| s == frame);
        assert_eq!(arrived, expected == ExpectedOutcome::Delivered, "{name}: arrival; {expected:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spoofed_addresses_macs_and_roles_are_dropped() {
    let lab = start_lab().await;
    let far = find_station(&lab, "h2", "c1").await;
    let gateway = Station {
        mac: bridge_mac(&lab, "h1"),
        v4: lab.status("h1").await.lease.expect_ok("a lease").subnet.gateway(Family::V4).expect_ok("IPv4"),
        v6: lab.status("h1").await.lease.expect_ok("a lease").subnet.gateway(Family::V6).expect_ok("IPv6"),
    };
    let mut fixture = SpoofFixture::new(&lab, "c1").await;
    let (me, other) = (fixture.sender, fixture.receiver);
    for (name, frame, verdict) in frames::frames_with_source_check(me, other, far, gateway) {
        fixture.assert_outcome(&name, &frame, verdict).await;
    }
    let noticed = drop_counts(&lab, "h1").await;
    for reason in ["source", "router", "dhcp"] {
        assert!(noticed[reason] > 0, "{noticed:?}");
    }

    // The same numbers in the status and in the metrics.
    let output = lab.ctl("h1", &["status"]).assert_code(0).stdout;
    let line = output.lines().find(|line| line.contains("dropped")).expect_ok(&output);
    assert!(line.contains(&format!("{} source", noticed["source"])) && !line.contains("tunnel"), "{line}");
    let metrics = http::request(&lab.host("h1").socket(), "GET", "/metrics", "").body;
    for (reason, packets) in &noticed {
        let sample = format!("overlayd_dropped_packets_total{{reason=\"{reason}\"}} {packets}");
        assert!(metrics.lines().any(|line| line == sample), "{sample} is not in\n{metrics}");
    }

    // An endpoint without source check: a router, or one with virtual addresses.
    lab.ctl("h1", &["attach", "router", "--no-source-check"]).assert_code(0);
    let mut fixture = SpoofFixture::new(&lab, "router").await;
    for (name, frame, verdict) in frames::frames_without_source_check(fixture.sender, fixture.receiver, far) {
        fixture.assert_outcome(&format!("unchecked, {name}"), &frame, verdict).await;
    }

    // The counters survive the agent, and the source filter works without it.
    let before = drop_counts(&lab, "h1").await;
    lab.host("h1").agent_stop(nix::sys::signal::Signal::SIGKILL).expect_ok("SIGKILL");
    let mut fixture = SpoofFixture {
        sender_socket: PacketSocket::open(&lab.open_netns("h1-c1"), "eth0"),
        sender: me,
        receiver: other,
        ..fixture
    };
    drop(fixture.receiver_socket.frames());
    let forged = packet_builder::udp(SocketAddr::new(other.v4, 9), SocketAddr::new(other.v4, 9), b"forged");
    fixture.sender_socket.send(&packet_builder::ip_frame(other.mac, me.mac, &forged));
    let fence = fixture.marker_frame();
    fixture.sender_socket.send(&fence);
    eventually("the next frame arrives", CONVERGE_TIMEOUT, || {
        let seen = fixture.receiver_socket.frames();
        assert!(!seen.iter().any(|frame| frame.ends_with(b"forged")), "a forged frame passes without an agent");
        if seen.contains(&fence) { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    lab.start_agent("h1").await;
    assert_eq!(drop_counts(&lab, "h1").await["source"], before["source"] + 1);
    lab.assert_full_reachability().await;
}

/// Encapsulation forged by a container. Its own host would accept it as a peer's, and other hosts as this host's.
#[tokio::test(flavor = "multi_thread")]
async fn forged_encapsulation_is_dropped() {
    let lab = start_lab().await;
    let far = find_station(&lab, "h2", "c1").await;
    let mut fixture = SpoofFixture::new(&lab, "c1").await;
    let (me, other, gateway) = (fixture.sender, fixture.receiver, bridge_mac(&lab, "h1"));
    let subnets = lab.host("h1").client().subnets().await.expect_ok("subnets").subnets;
    let vtep =
        |own: bool, family| subnets.iter().find(|s| s.own == own).and_then(|s| s.vtep.get(family).copied()).expect_ok("a VTEP").0;
    let far_tap = PacketSocket::open(&lab.open_netns("h2-c1"), "eth0");
    let comes = |frames: Vec<Vec<u8>>| frames.iter().any(|frame| frame.ends_with(b"smuggled"));
    for family in Family::ALL {
        let own = |party: Station| if family == Family::V4 { party.v4 } else { party.v6 };
        let underlay = |host: &str| *lab.host(host).layout().addresses.get(family).expect_ok("an address");
        let subnet = lab.status("h1").await.lease.expect_ok("a lease").subnet;
        let bridge: IpAddr = subnet.gateway(family).expect_ok("a gateway");
        // As if the other host's container sent to ours, and the reverse.
        let inner = |from: Station, to: Station, mac: Mac| {
            let packet = packet_builder::udp(SocketAddr::new(own(from), 5000), SocketAddr::new(own(to), 5001), b"smuggled");
            packet_builder::vxlan(1, &packet_builder::ip_frame(mac, [2, 0, 0, 0, 0, 1], &packet))
        };
        let outer = |to: IpAddr, port: u16, data: &[u8]| {
            let packet = packet_builder::udp(SocketAddr::new(own(me), 5000), SocketAddr::new(to, port), data);
            packet_builder::ip_frame(gateway, me.mac, &packet)
        };
        for (name, to, data) in [
            ("the own host", underlay("h1"), inner(far, other, vtep(true, family))),
            ("the own host by the bridge", bridge, inner(far, other, vtep(true, family))),
            ("another host", underlay("h2"), inner(other, far, vtep(false, family))),
            ("another VNI", underlay("h1"), packet_builder::vxlan(77, b"whatever")),
            ("nothing inside", underlay("h2"), Vec::new()),
        ] {
            let forged = outer(to, vxlan_port(), &data);
            fixture
                .assert_outcome(
                    &format!("encapsulation to {name} ({family})"),
                    &forged,
                    ExpectedOutcome::Dropped("encapsulation"),
                )
                .await;
            assert!(
                !comes(fixture.receiver_socket.frames()) && !comes(far_tap.frames()),
                "the inner packet was delivered: {name}"
            );
        }
        // Only this port is blocked.
        for host in ["h1", "h2"] {
            let address = SocketAddr::new(underlay(host), vxlan_port() + 1);
            let server = lab.open_netns(host).run(|| UdpSocket::bind(address)).expect_ok(host).expect_ok("a socket");
            server.set_read_timeout(Some(CONVERGE_TIMEOUT)).expect_ok("a limit");
            fixture.sender_socket.send(&outer(address.ip(), address.port(), b"plain"));
            let mut buffer = [0; 64];
            let (length, _) = server.recv_from(&mut buffer).expect_ok(&format!("a datagram to {address}"));
            assert_eq!(&buffer[..length], b"plain");
        }
    }
    // Loopback addresses are never on the wire, even while ports of 127.0.0.1 are published.
    lab.ctl("h1", &["attach", "web", "--publish", "127.0.0.1:8080:80"]).assert_code(0);
    let packet = packet_builder::udp(SocketAddr::new(me.v4, 5000), "127.0.0.1:8080".parse().expect_ok("an address"), b"inside");
    fixture
        .assert_outcome("to 127.0.0.1", &packet_builder::ip_frame(gateway, me.mac, &packet), ExpectedOutcome::Dropped("loopback"))
        .await;
    lab.ctl("h1", &["attach", "router", "--no-source-check"]).assert_code(0);
    let mut fixture = SpoofFixture::new(&lab, "router").await;
    let packet = packet_builder::udp("127.0.0.1:5000".parse().expect_ok("an address"), SocketAddr::new(far.v4, 5001), b"inside");
    fixture
        .assert_outcome(
            "from 127.0.0.1",
            &packet_builder::ip_frame(gateway, fixture.sender.mac, &packet),
            ExpectedOutcome::Dropped("loopback"),
        )
        .await;
    let to_own = SocketAddr::new(*lab.host("h1").layout().addresses.get(Family::V4).expect_ok("IPv4"), vxlan_port());
    let packet = packet_builder::udp(SocketAddr::new(fixture.sender.v4, 5000), to_own, b"inside");
    let name = "encapsulation of one that is not checked";
    fixture
        .assert_outcome(
            name,
            &packet_builder::ip_frame(gateway, fixture.sender.mac, &packet),
            ExpectedOutcome::Dropped("encapsulation"),
        )
        .await;
    lab.assert_full_reachability().await;
}

fn vxlan_port() -> u16 {
    overlay_tests::capture::VXLAN_PORT
}

/// The host accepts no router advertisement from the bridge, not even from an interface that another program added, which has no
/// source filter. The same advertisement works on an interface that accepts it.
#[tokio::test(flavor = "multi_thread")]
async fn host_ignores_router_advertisements() {
    let lab = start_lab().await;
    let pair = |name: &str| {
        kernel::shell(
            &lab,
            "h1",
            &format!(
                "ip link add {name}a type veth peer name {name}b; echo 0 >/proc/sys/net/ipv6/conf/{name}b/accept_dad
                 echo 0 >/proc/sys/net/ipv6/conf/{name}a/accept_dad; echo 2 >/proc/sys/net/ipv6/conf/{name}a/accept_ra"
            ),
        );
    };
    pair("tame");
    pair("wild");
    kernel::shell(&lab, "h1", "ip link set wilda master ovb.1; for d in tamea tameb wilda wildb; do ip link set $d up; done");
    let advertisement =
        packet_builder::router_advertisement([2, 0, 0, 0, 0xba, 0xd0], "2001:db8:bad::".parse().expect_ok("a prefix"));
    let has = |device: &str| {
        let addresses = kernel::run(&lab, "h1", &["ip", "-6", "address", "show", "dev", device]);
        let routes = kernel::run(&lab, "h1", &["ip", "-6", "route", "show", "dev", device]);
        addresses.contains("2001:db8:bad:") || routes.contains("2001:db8:bad:") || routes.contains("default")
    };
    let send = |device: &str| PacketSocket::open(&lab.open_netns("h1"), device).send(&advertisement);
    eventually("an advertisement works on an accepting interface", CONVERGE_TIMEOUT, || {
        send("tameb");
        if has("tamea") { Ok(()) } else { Err("no address was generated".to_owned()) }
    })
    .await;
    let tap = PacketSocket::open(&lab.open_netns("h1-c2"), "eth0");
    eventually("it passes the bridge", CONVERGE_TIMEOUT, || {
        send("wildb");
        if tap.frames().contains(&advertisement) { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    // The bridge itself has processed it before it forwarded it to its last port, or a moment later.
    let end = std::time::Instant::now() + Duration::from_secs(1);
    while std::time::Instant::now() < end {
        send("wildb");
        for device in ["ovb.1", "wilda"] {
            assert!(!has(device), "{device} accepted a router advertisement");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Off the bridge, the same interface accepts the same frame: the earlier ones were processed and ignored.
    kernel::shell(&lab, "h1", "ip link set wilda nomaster");
    eventually("it works off the bridge", CONVERGE_TIMEOUT, || {
        send("wildb");
        if has("wilda") { Ok(()) } else { Err("no address was generated".to_owned()) }
    })
    .await;
    assert!(!has("ovb.1"), "the bridge accepted a router advertisement");
    for container in ["h1-c1", "h1-c2"] {
        let routes = kernel::run(&lab, container, &["ip", "-6", "address"]);
        assert!(!routes.contains("2001:db8:bad:"), "{container}: {routes}");
    }
}

/// Legitimate containers are not counted: neither while their interfaces come up nor later, with and without IPv6.
#[tokio::test(flavor = "multi_thread")]
async fn legitimate_traffic_is_not_counted() {
    for families in [Families::V4, Families::Dual] {
        let lab = TestLab::up(|options| {
            options.hosts = 1;
            options.families = families;
        })
        .await;
        lab.assert_full_reachability().await;
        // A kernel announces its groups and addresses within two seconds (RFC 3810 section 9.11, RFC 4862 section 5.4).
        tokio::time::sleep(Duration::from_secs(3)).await;
        let counted = drop_counts(&lab, "h1").await;
        assert_eq!(counted.len(), 6, "{counted:?}");
        assert!(counted.values().all(|packets| *packets == 0), "{families:?}: {counted:?}");
        assert!(!lab.ctl("h1", &["status"]).assert_code(0).stdout.contains("dropped"));

        // One illegitimate packet is counted. In a network without IPv6 even a link-local address is one.
        let endpoints = lab.host("h1").client().endpoints().await.expect_ok("h1").endpoints;
        let mac = endpoints[0].port.as_ref().expect_ok("a port").mac.0;
        let from = PacketSocket::open(&lab.open_netns(&format!("h1-{}", endpoints[0].name)), "eth0");
        let source = match families {
            Families::V4 => rules::link_local(mac),
            _ => "2001:db8::bad".parse().expect_ok("an address"),
        };
        let packet = packet_builder::udp(SocketAddr::new(source, 9), "[ff02::1]:9".parse().expect_ok("an address"), b"IPv6");
        from.send(&packet_builder::ip_frame(packet_builder::ALL_NODES, mac, &packet));
        eventually_async(&format!("{families:?}: it is counted, and nothing else"), CONVERGE_TIMEOUT, || async {
            let counted = drop_counts(&lab, "h1").await;
            if counted["source"] == 1 && counted.values().sum::<u64>() == 1 { Ok(()) } else { Err(format!("{counted:?}")) }
        })
        .await;
    }
}
