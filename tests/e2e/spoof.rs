//! A container can use no address and no MAC but its own, is no router and no DHCP server, and cannot forge encapsulation: frames made by hand go
//! into its interface, and each that does not keep to that is dropped and counted under its reason; the same with right addresses passes.

#[path = "spoof/frames.rs"]
mod frames;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use frames::{Me, Verdict};
use overlay_agent::model::Family;
use overlay_agent::model::api::Status;
use overlay_tests::craft::{self, Mac, Wire};
use overlay_tests::story::SOON;
use overlay_tests::wait::eventually_asked;
use overlay_tests::{Must, Story, eventually, http, kernel, rules};
use overlayctl::lab::Families;

type Counts = BTreeMap<String, u64>;

async fn counts(story: &Story, host: &str) -> Counts {
    story.status(host).await.data_path.dropped
}

/// An endpoint of a host.
async fn party(story: &Story, host: &str, name: &str) -> Me {
    let endpoints = story.at(host).client().endpoints().await.must(host).endpoints;
    let endpoint = endpoints.into_iter().find(|e| e.name.as_str() == name).must(name);
    let address = |family| *endpoint.addresses().get(family).must("its address");
    let mac = endpoint.port.as_ref().must("its port").mac.0;
    Me { mac, v4: address(Family::V4), v6: address(Family::V6) }
}

fn bridge_mac(story: &Story, host: &str) -> Mac {
    let link = kernel::link(story, host, "ovb.1").must("the bridge");
    let bytes: Vec<u8> =
        kernel::text(&link, "address").split(':').map(|byte| u8::from_str_radix(byte, 16).must("a MAC")).collect();
    bytes.try_into().ok().must("six bytes")
}

/// Two hosts with two containers each, both families.
async fn lab() -> Story {
    Story::up(|options| {
        options.hosts = 2;
        options.containers = 2;
        options.families = Families::Dual;
    })
    .await
}

/// The sender's wire, the wire of who shares its bridge, and a packet that always passes: what was sent before it has been judged when it comes.
struct Scene<'a> {
    story: &'a Story,
    from: Wire,
    tap: Wire,
    me: Me,
    other: Me,
    fences: u16,
}

impl<'a> Scene<'a> {
    async fn new(story: &'a Story, sender: &str) -> Scene<'a> {
        let (me, other) = (party(story, "h1", sender).await, party(story, "h1", "c2").await);
        let from = Wire::open(&story.inside(&format!("h1-{sender}")), "eth0");
        Scene { story, from, tap: Wire::open(&story.inside("h1-c2"), "eth0"), me, other, fences: 0 }
    }

    /// A datagram to the other, which has a number.
    fn fence(&mut self) -> Vec<u8> {
        self.fences += 1;
        let packet = craft::udp(
            SocketAddr::new(self.me.v4, 4000),
            SocketAddr::new(self.other.v4, 4001),
            &[b"fence".as_slice(), &self.fences.to_be_bytes()].concat(),
        );
        craft::ip_frame(self.other.mac, self.me.mac, &packet)
    }

    /// Sends a frame and checks what becomes of it: it comes to the other, or it is counted under its reason and does not. No other counter moves.
    async fn send(&mut self, name: &str, frame: &[u8], verdict: Verdict) {
        let before = counts(self.story, "h1").await;
        let mut wanted = before.clone();
        if let Verdict::Dropped(reason) = verdict {
            *wanted.get_mut(reason).must(reason) += 1;
        }
        drop(self.tap.frames());
        self.from.send(frame);
        let fence = self.fence();
        self.from.send(&fence);
        let mut seen: Vec<Vec<u8>> = Vec::new();
        eventually(&format!("{name}: what was sent is judged"), SOON, || {
            seen.extend(self.tap.frames());
            let has = |frame: &[u8]| seen.iter().any(|s| s == frame);
            match (has(&fence), has(frame) || verdict != Verdict::Passes) {
                (true, true) => Ok(()),
                (fence, frame) => Err(format!("the frame has come: {frame}, the one behind it: {fence}")),
            }
        })
        .await;
        let story = self.story;
        eventually_asked(&format!("{name}: {verdict:?}"), SOON, || async {
            let now = counts(story, "h1").await;
            if now == wanted { Ok(()) } else { Err(format!("it was {before:?}, is {now:?}")) }
        })
        .await;
        seen.extend(self.tap.frames());
        let came = seen.iter().any(|s| s == frame);
        assert_eq!(came, verdict == Verdict::Passes, "{name}: whether it came; {verdict:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_macs_and_roles_of_others() {
    let story = lab().await;
    let far = party(&story, "h2", "c1").await;
    let gateway = Me {
        mac: bridge_mac(&story, "h1"),
        v4: story.status("h1").await.lease.must("a lease").subnet.gateway(Family::V4).must("IPv4"),
        v6: story.status("h1").await.lease.must("a lease").subnet.gateway(Family::V6).must("IPv6"),
    };
    let mut scene = Scene::new(&story, "c1").await;
    let (me, other) = (scene.me, scene.other);
    for (name, frame, verdict) in frames::checked(me, other, far, gateway) {
        scene.send(&name, &frame, verdict).await;
    }
    let noticed = counts(&story, "h1").await;
    for reason in ["source", "router", "dhcp"] {
        assert!(noticed[reason] > 0, "{noticed:?}");
    }

    // The same numbers for people and for Prometheus.
    let said = story.ctl("h1", &["status"]).exits(0).out;
    let line = said.lines().find(|line| line.contains("dropped")).must(&said);
    assert!(line.contains(&format!("{} source", noticed["source"])) && !line.contains("tunnel"), "{line}");
    let metrics = http::ask(&story.at("h1").socket(), "GET", "/metrics", "").body;
    for (reason, packets) in &noticed {
        let sample = format!("overlayd_dropped_packets_total{{reason=\"{reason}\"}} {packets}");
        assert!(metrics.lines().any(|line| line == sample), "{sample} is not in\n{metrics}");
    }

    // One that is not checked: a router, or one with virtual addresses.
    story.ctl("h1", &["attach", "router", "--no-source-check"]).exits(0);
    let mut scene = Scene::new(&story, "router").await;
    for (name, frame, verdict) in frames::unchecked(scene.me, scene.other, far) {
        scene.send(&format!("unchecked, {name}"), &frame, verdict).await;
    }

    // The counters outlive the agent, and the guard does not need it.
    let before = counts(&story, "h1").await;
    story.at("h1").agent_stop(nix::sys::signal::Signal::SIGKILL).must("SIGKILL");
    let mut scene = Scene { from: Wire::open(&story.inside("h1-c1"), "eth0"), me, other, ..scene };
    drop(scene.tap.frames());
    let forged = craft::udp(SocketAddr::new(other.v4, 9), SocketAddr::new(other.v4, 9), b"forged");
    scene.from.send(&craft::ip_frame(other.mac, me.mac, &forged));
    let fence = scene.fence();
    scene.from.send(&fence);
    eventually("the frame behind it comes", SOON, || {
        let seen = scene.tap.frames();
        assert!(!seen.iter().any(|frame| frame.ends_with(b"forged")), "forged while there is no agent");
        if seen.contains(&fence) { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    story.start("h1").await;
    assert_eq!(counts(&story, "h1").await["source"], before["source"] + 1);
    story.assert_all_reach().await;
}

/// Encapsulation that a container forges: to its own host, which would take it for a peer's, and to others, where it would come from this host.
#[tokio::test(flavor = "multi_thread")]
async fn forged_encapsulation() {
    let story = lab().await;
    let far = party(&story, "h2", "c1").await;
    let mut scene = Scene::new(&story, "c1").await;
    let (me, other, gateway) = (scene.me, scene.other, bridge_mac(&story, "h1"));
    let subnets = story.at("h1").client().subnets().await.must("subnets").subnets;
    let vtep =
        |own: bool, family| subnets.iter().find(|s| s.own == own).and_then(|s| s.vtep.get(family).copied()).must("a VTEP").0;
    let far_tap = Wire::open(&story.inside("h2-c1"), "eth0");
    let comes = |frames: Vec<Vec<u8>>| frames.iter().any(|frame| frame.ends_with(b"smuggled"));
    for family in Family::ALL {
        let own = |party: Me| if family == Family::V4 { party.v4 } else { party.v6 };
        let underlay = |host: &str| *story.at(host).layout().addresses.get(family).must("an address");
        let subnet = story.status("h1").await.lease.must("a lease").subnet;
        let bridge: IpAddr = subnet.gateway(family).must("a gateway");
        // As if the other host's container wrote to ours, and ours to the other host's.
        let inner = |from: Me, to: Me, mac: Mac| {
            let packet = craft::udp(SocketAddr::new(own(from), 5000), SocketAddr::new(own(to), 5001), b"smuggled");
            craft::vxlan(1, &craft::ip_frame(mac, [2, 0, 0, 0, 0, 1], &packet))
        };
        let outer = |to: IpAddr, port: u16, data: &[u8]| {
            let packet = craft::udp(SocketAddr::new(own(me), 5000), SocketAddr::new(to, port), data);
            craft::ip_frame(gateway, me.mac, &packet)
        };
        for (name, to, data) in [
            ("the own host", underlay("h1"), inner(far, other, vtep(true, family))),
            ("the own host by the bridge", bridge, inner(far, other, vtep(true, family))),
            ("another host", underlay("h2"), inner(other, far, vtep(false, family))),
            ("another VNI", underlay("h1"), craft::vxlan(77, b"whatever")),
            ("nothing inside", underlay("h2"), Vec::new()),
        ] {
            let forged = outer(to, craft_port(), &data);
            scene.send(&format!("encapsulation to {name} ({family})"), &forged, Verdict::Dropped("encapsulation")).await;
            assert!(!comes(scene.tap.frames()) && !comes(far_tap.frames()), "what was encapsulated came out: {name}");
        }
        // It is the port alone that is closed.
        for host in ["h1", "h2"] {
            let address = SocketAddr::new(underlay(host), craft_port() + 1);
            let server = story.inside(host).run(|| UdpSocket::bind(address)).must(host).must("a socket");
            server.set_read_timeout(Some(SOON)).must("a limit");
            scene.from.send(&outer(address.ip(), address.port(), b"plain"));
            let mut buffer = [0; 64];
            let (length, _) = server.recv_from(&mut buffer).must(&format!("a datagram to {address}"));
            assert_eq!(&buffer[..length], b"plain");
        }
    }
    // Addresses of the loopback device are on no wire, even while ports of 127.0.0.1 are published.
    story.ctl("h1", &["attach", "web", "--publish", "127.0.0.1:8080:80"]).exits(0);
    let packet = craft::udp(SocketAddr::new(me.v4, 5000), "127.0.0.1:8080".parse().must("an address"), b"inside");
    scene.send("to 127.0.0.1", &craft::ip_frame(gateway, me.mac, &packet), Verdict::Dropped("loopback")).await;
    story.ctl("h1", &["attach", "router", "--no-source-check"]).exits(0);
    let mut scene = Scene::new(&story, "router").await;
    let packet = craft::udp("127.0.0.1:5000".parse().must("an address"), SocketAddr::new(far.v4, 5001), b"inside");
    scene.send("from 127.0.0.1", &craft::ip_frame(gateway, scene.me.mac, &packet), Verdict::Dropped("loopback")).await;
    let to_own = SocketAddr::new(*story.at("h1").layout().addresses.get(Family::V4).must("IPv4"), craft_port());
    let packet = craft::udp(SocketAddr::new(scene.me.v4, 5000), to_own, b"inside");
    let name = "encapsulation of one that is not checked";
    scene.send(name, &craft::ip_frame(gateway, scene.me.mac, &packet), Verdict::Dropped("encapsulation")).await;
    story.assert_all_reach().await;
}

fn craft_port() -> u16 {
    overlay_tests::capture::VXLAN_PORT
}

/// The host takes no router advertisement from the bridge, whoever is at it: also from an interface that somebody else plugged in, which no guard
/// judges. The same advertisement works where they are taken.
#[tokio::test(flavor = "multi_thread")]
async fn the_host_takes_no_router() {
    let story = lab().await;
    let pair = |name: &str| {
        kernel::shell(
            &story,
            "h1",
            &format!(
                "ip link add {name}a type veth peer name {name}b; echo 0 >/proc/sys/net/ipv6/conf/{name}b/accept_dad
                 echo 0 >/proc/sys/net/ipv6/conf/{name}a/accept_dad; echo 2 >/proc/sys/net/ipv6/conf/{name}a/accept_ra"
            ),
        );
    };
    pair("tame");
    pair("wild");
    kernel::shell(&story, "h1", "ip link set wilda master ovb.1; for d in tamea tameb wilda wildb; do ip link set $d up; done");
    let advertisement = craft::router_advertisement([2, 0, 0, 0, 0xba, 0xd0], "2001:db8:bad::".parse().must("a prefix"));
    let has = |device: &str| {
        let addresses = kernel::run(&story, "h1", &["ip", "-6", "address", "show", "dev", device]);
        let routes = kernel::run(&story, "h1", &["ip", "-6", "route", "show", "dev", device]);
        addresses.contains("2001:db8:bad:") || routes.contains("2001:db8:bad:") || routes.contains("default")
    };
    let send = |device: &str| Wire::open(&story.inside("h1"), device).send(&advertisement);
    eventually("an advertisement works where it is taken", SOON, || {
        send("tameb");
        if has("tamea") { Ok(()) } else { Err("no address came of it".to_owned()) }
    })
    .await;
    let tap = Wire::open(&story.inside("h1-c2"), "eth0");
    eventually("it comes through the bridge", SOON, || {
        send("wildb");
        if tap.frames().contains(&advertisement) { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    // What the bridge itself has taken it has taken before it handed it on to the last of its ports, or a moment later.
    let end = std::time::Instant::now() + Duration::from_secs(1);
    while std::time::Instant::now() < end {
        send("wildb");
        for device in ["ovb.1", "wilda"] {
            assert!(!has(device), "{device} took a router's word");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for container in ["h1-c1", "h1-c2"] {
        let routes = kernel::run(&story, container, &["ip", "-6", "address"]);
        assert!(!routes.contains("2001:db8:bad:"), "{container}: {routes}");
    }
}

/// Containers that do nothing wrong are not counted: neither while their interfaces come up nor later, with and without IPv6.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_counted_for_nothing() {
    for families in [Families::V4, Families::Dual] {
        let story = Story::up(|options| {
            options.hosts = 1;
            options.families = families;
        })
        .await;
        story.assert_all_reach().await;
        // A kernel announces its groups and addresses within two seconds (RFC 3810 section 9.11, RFC 4862 section 5.4).
        tokio::time::sleep(Duration::from_secs(3)).await;
        let counted = counts(&story, "h1").await;
        assert_eq!(counted.len(), 6, "{counted:?}");
        assert!(counted.values().all(|packets| *packets == 0), "{families:?}: {counted:?}");
        assert!(!story.ctl("h1", &["status"]).exits(0).out.contains("dropped"));
    }
    // Where the network has no IPv6, a container has none: not even a link-local address would be let through.
    let story = Story::up(|options| options.hosts = 1).await;
    let status: Status = story.status("h1").await;
    assert_eq!(status.data_path.dropped["source"], 0);
    let endpoints = story.at("h1").client().endpoints().await.must("h1").endpoints;
    let mac = endpoints[0].port.as_ref().must("a port").mac.0;
    let from = Wire::open(&story.inside(&format!("h1-{}", endpoints[0].name)), "eth0");
    let local = rules::link_local(mac);
    let packet = craft::udp(SocketAddr::new(local, 9), "[ff02::1]:9".parse().must("an address"), b"IPv6");
    from.send(&craft::ip_frame(craft::ALL_NODES, mac, &packet));
    eventually_asked("IPv6 in a network without it is counted", SOON, || async {
        match counts(&story, "h1").await["source"] {
            1 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .await;
}
