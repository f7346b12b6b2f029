//! The tunnel's source filter by VNI: a host may send into a network only what it leases there.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_tests::capture::VXLAN_PORT;
use overlay_tests::networks::{self, address, attach, create};
use overlay_tests::packet_builder::{self, Mac, PacketSocket};
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::wait::eventually_async;
use overlay_tests::{ExpectContext, TestLab, eventually, kernel};
use overlayctl::lab::Families;

/// The MAC of inner senders; it is not checked.
const SENDER_MAC: Mac = [2, 0, 0, 0, 0, 0x99];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Delivered,
    Dropped,
}

/// Host `h1` is in both networks, `h2` only in blue, `h3` only in green; packets go to the container of `h1` in green.
struct Guard {
    lab: TestLab,
    tap: PacketSocket,
    sent: u32,
}

impl Guard {
    async fn dropped(&self) -> u64 {
        self.lab.status("h1").await.data_path.dropped["tunnel"]
    }

    /// Sends VXLAN from a host's namespace to `h1`.
    fn send(&self, from: &str, family: Family, vni: u64, inner: &[u8]) {
        let to = SocketAddr::new(*self.lab.host("h1").layout().addresses.get(family).expect_ok("an address"), VXLAN_PORT);
        let any: IpAddr = if to.is_ipv4() { [0_u8; 4].into() } else { [0_u16; 8].into() };
        let socket = self.lab.open_netns(from).run(|| UdpSocket::bind((any, 0))).expect_ok(from).expect_ok("a socket");
        let vni = u32::try_from(vni).expect_ok("a VNI");
        socket.send_to(&packet_builder::vxlan(vni, inner), to).expect_ok("send");
    }

    /// A unique inner frame, and its last bytes.
    fn frame(&mut self, mac: Mac, source: IpAddr, target: IpAddr) -> (Vec<u8>, Vec<u8>) {
        self.sent += 1;
        let data = format!("packet made by hand, number {:08}", self.sent).into_bytes();
        let packet = packet_builder::udp(SocketAddr::new(source, 6000), SocketAddr::new(target, 6001), &data);
        (packet_builder::ip_frame(mac, SENDER_MAC, &packet), data)
    }

    /// Checks the outcome of a packet: delivered, or counted exactly once.
    async fn assert_outcome(&self, name: &str, expected: Outcome, data: &[u8], send: impl FnOnce()) {
        let before = self.dropped().await;
        drop(self.tap.frames());
        send();
        let arrived = || self.tap.frames().iter().any(|frame| frame.ends_with(data));
        let wanted = before + u64::from(expected == Outcome::Dropped);
        eventually_async(&format!("{name}: {expected:?}"), CONVERGE_TIMEOUT, || async {
            let now = self.dropped().await;
            match now == wanted && (expected == Outcome::Dropped || arrived()) {
                true => Ok(()),
                false => Err(format!("{before} were counted before, {now} are now")),
            }
        })
        .await;
        assert!(expected == Outcome::Delivered || !arrived(), "{name}: it reached the container");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn host_of_another_network_cannot_inject() {
    let lab = TestLab::up(|options| {
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    for network in ["blue", "green"] {
        create(&lab, network, &["--cidr", networks::RANGE, "--cidr", "fd00:10::/56"]);
    }
    let target = attach(&lab, "h1", "green", "green-c1").await;
    attach(&lab, "h1", "blue", "blue-c1").await;
    let stranger = attach(&lab, "h2", "blue", "blue-c1").await;
    let peer = attach(&lab, "h3", "green", "green-c1").await;
    networks::wait_ready(&lab, "green", &["h1", "h3"]).await;
    networks::wait_ready(&lab, "blue", &["h1", "h2"]).await;
    let (blue, green) = (networks::vni(&lab, "blue"), networks::vni(&lab, "green"));
    let subnets = lab.host("h1").client_of(&networks::name("green")).subnets().await.expect_ok("subnets").subnets;
    let vtep = subnets.iter().find(|entry| entry.own).expect_ok("the own lease").vtep;
    let default = lab.host("h2").client().endpoints().await.expect_ok("h2").endpoints[0].addresses();
    let tap = PacketSocket::open(&lab.open_netns("h1-green-c1"), "eth0");
    let mut guard = Guard { lab, tap, sent: 0 };
    for family in Family::ALL {
        // So that the first packet does not wait for neighbour resolution.
        let to = address(&target, family);
        kernel::run(&guard.lab, "h3-green-c1", &["ping", "-c", "1", "-W", "5", &to.to_string()]);
        let mac = vtep.get(family).expect_ok("a VTEP").0;
        let own = *guard.lab.host("h2").layout().addresses.get(family).expect_ok("an address");
        for (name, from, source, expected) in [
            ("a peer with its container's address", "h3", address(&peer, family), Outcome::Delivered),
            ("a host of blue with its container's address there", "h2", address(&stranger, family), Outcome::Dropped),
            ("a host of blue with an address of green's peer", "h2", address(&peer, family), Outcome::Dropped),
            (
                "a host of blue with its default container's address",
                "h2",
                *default.get(family).expect_ok("one"),
                Outcome::Dropped,
            ),
            ("a host of blue with its own address", "h2", own, Outcome::Dropped),
            ("a stranger with an address of green's peer", "world", address(&peer, family), Outcome::Dropped),
            ("a peer with an address of the target's subnet", "h3", address(&target, family), Outcome::Dropped),
        ] {
            let (inner, data) = guard.frame(mac, source, to);
            guard
                .assert_outcome(&format!("{name} ({family})"), expected, &data, || guard.send(from, family, green, &inner))
                .await;
        }
        // A host of blue and green as well: with the VNI of blue it reaches no container of green.
        let (inner, data) = guard.frame(mac, address(&stranger, family), to);
        guard.send("h2", family, blue, &inner);
        // Another tenant's VNI passes the filter to its device.
        let name = format!("other{}", 77 + u32::from(family == Family::V6));
        let (vni, local) = (77 + u64::from(family == Family::V6), guard.lab.host("h1").layout().addresses);
        let local = local.get(family).expect_ok("an address");
        let add = format!(
            "ip link add {name} type vxlan id {vni} local {local} dev eth0 dstport {VXLAN_PORT} nolearning; ip link set {name} up"
        );
        kernel::shell(&guard.lab, "h1", &add);
        let tenant = PacketSocket::open(&guard.lab.open_netns("h1"), &name);
        let before = guard.dropped().await;
        let (other, mark) = guard.frame(mac, address(&stranger, family), to);
        guard.send("world", family, vni, &other);
        eventually("another tenant's packet reaches its device", CONVERGE_TIMEOUT, || {
            if tenant.frames().iter().any(|frame| frame.ends_with(&mark)) { Ok(()) } else { Err("not yet".to_owned()) }
        })
        .await;
        assert_eq!(guard.dropped().await, before, "another tenant's packets are not counted");
        assert!(
            !guard.tap.frames().iter().any(|frame| frame.ends_with(&data) || frame.ends_with(&mark)),
            "nothing reached green"
        );
    }
    // The filter stays without the agent.
    let (mac, to) = (vtep.v4.expect_ok("a VTEP").0, address(&target, Family::V4));
    let (inner, data) = guard.frame(mac, address(&stranger, Family::V4), to);
    let before = guard.dropped().await;
    guard.lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    drop(guard.tap.frames());
    guard.send("h2", Family::V4, green, &inner);
    guard.lab.start_agent("h1").await;
    assert_eq!(guard.dropped().await, before + 1);
    assert!(!guard.tap.frames().iter().any(|frame| frame.ends_with(&data)));
}
