//! Only peers speak VXLAN to a host, and each of its own containers alone: packets made by hand come by the underlay, from a host that has no lease
//! and from peers that pretend, and each that has no right to is dropped and counted; a lease gives the right, its end takes it.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use overlay_agent::model::{Family, PerFamily, Subnet};
use overlay_tests::capture::VXLAN_PORT;
use overlay_tests::craft::{self, Mac, Wire};
use overlay_tests::story::SOON;
use overlay_tests::wait::eventually_asked;
use overlay_tests::{Must, Story, etcd, kernel};
use overlayctl::lab::Families;

/// The MAC of inner senders; nobody looks at it.
const SENDER: Mac = [2, 0, 0, 0, 0, 0x99];
/// Our VNI.
const OURS: u32 = 1;
/// Inner ports.
const PORTS: (u16, u16) = (6000, 6001);

/// Two hosts and their containers; packets go to the container of the first.
struct Scene {
    story: Story,
    tap: Wire,
    target: PerFamily<IpAddr>,
    vtep: PerFamily<Mac>,
    sent: u32,
}

/// What must become of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passes,
    Dropped,
    /// Neither: it is nobody's.
    Ignored,
}
use Verdict::{Dropped, Ignored, Passes};

impl Scene {
    async fn new(agent_args: &[&str]) -> Scene {
        let story = Story::up(|options| {
            options.hosts = 3;
            options.containers = 1;
            options.families = Families::Dual;
            options.agent_args = agent_args.iter().map(|flag| (*flag).to_owned()).collect();
        })
        .await;
        let target = addresses(&story, "h1").await;
        let subnets = story.at("h1").client().subnets().await.must("subnets").subnets;
        let own = subnets.iter().find(|entry| entry.own).must("the own lease");
        let vtep = own.vtep.iter().map(|(family, mac)| (family, mac.0)).collect();
        // So that the first packet need not wait for its neighbour.
        for (_, address) in target.iter() {
            kernel::run(&story, "h2-c1", &["ping", "-c", "1", "-W", "5", &address.to_string()]);
        }
        Scene { tap: Wire::open(&story.inside("h1-c1"), "eth0"), story, target, vtep, sent: 0 }
    }

    fn target(&self, family: Family) -> IpAddr {
        *self.target.get(family).must("its address")
    }

    /// Where the host takes VXLAN.
    fn host(&self, name: &str, family: Family) -> IpAddr {
        *self.story.at(name).layout().addresses.get(family).must("an address")
    }

    async fn count(&self) -> u64 {
        self.story.status("h1").await.data_path.dropped["tunnel"]
    }

    /// An inner frame that nobody sent before, and what it ends with.
    fn inner(&mut self, source: IpAddr) -> (Vec<u8>, Vec<u8>) {
        self.sent += 1;
        let data = format!("packet made by hand, number {:08}", self.sent).into_bytes();
        let family = Family::of(source);
        let (from, to) = (SocketAddr::new(source, PORTS.0), SocketAddr::new(self.target(family), PORTS.1));
        let mac = *self.vtep.get(family).must("a VTEP");
        (craft::ip_frame(mac, SENDER, &craft::udp(from, to, &data)), data)
    }

    /// Sends from a namespace, whose kernel makes the outer headers.
    fn tunnel(&self, from: &str, outer: Family, vni: u32, inner: &[u8]) {
        let to = SocketAddr::new(self.host("h1", outer), VXLAN_PORT);
        self.send_to(from, to, &craft::vxlan(vni, inner));
    }

    fn send_to(&self, from: &str, to: SocketAddr, payload: &[u8]) {
        let any: IpAddr = if to.is_ipv4() { [0_u8; 4].into() } else { [0_u16; 8].into() };
        let socket = self.story.inside(from).run(|| UdpSocket::bind((any, 0))).must(from).must("a socket");
        socket.send_to(payload, to).must("send");
    }

    /// What becomes of what `send` sends: it comes to the container, or it is counted, once, and does not.
    async fn becomes(&self, name: &str, verdict: Verdict, data: &[u8], send: impl FnOnce()) {
        let before = self.count().await;
        drop(self.tap.frames());
        send();
        let came = || self.tap.frames().iter().any(|frame| frame.ends_with(data));
        let wanted = before + u64::from(verdict == Dropped);
        eventually_asked(&format!("{name}: {verdict:?}"), SOON, || async {
            let now = self.count().await;
            match now == wanted && (verdict != Passes || came()) {
                true => Ok(()),
                false => Err(format!("{before} were counted before, {now} are now")),
            }
        })
        .await;
        if verdict != Passes {
            assert!(!came(), "{name}: it came to the container");
        }
        assert_eq!(self.count().await, wanted, "{name}");
    }

    /// The same for a packet to the container with this inner source.
    async fn judge(&mut self, name: &str, from: &str, source: IpAddr, verdict: Verdict) {
        let (inner, data) = self.inner(source);
        self.becomes(name, verdict, &data, || self.tunnel(from, Family::of(source), OURS, &inner)).await;
    }
}

async fn addresses(story: &Story, host: &str) -> PerFamily<IpAddr> {
    let endpoints = story.at(host).client().endpoints().await.must(host).endpoints;
    endpoints.first().must("a container").addresses()
}

/// A subnet that nobody holds, and an address in it.
async fn free(story: &Story) -> (Subnet, PerFamily<IpAddr>) {
    let taken: Vec<Subnet> =
        story.at("h1").client().subnets().await.must("subnets").subnets.iter().filter_map(|entry| entry.subnet).collect();
    let at = |n: u8| -> Subnet { Subnet::from_key(&format!("10.244.{n}.0-24&fd00:10:244:{n:x}::-64")).must("a key") };
    let overlaps = |subnet: &Subnet| Family::ALL.iter().any(|f| taken.iter().any(|other| other.get(*f) == subnet.get(*f)));
    let subnet = (1..=250).map(at).find(|subnet| !overlaps(subnet)).must("a free subnet");
    (subnet, nth(&subnet, 5))
}

fn nth(subnet: &Subnet, n: u128) -> PerFamily<IpAddr> {
    subnet.iter().filter_map(|(family, range)| Some((family, range.nth(n)?))).collect()
}

/// A lease for the host `world`, which has no agent.
fn lease() -> String {
    r#"{"PublicIP":"10.99.0.254","PublicIPv6":"fd99::254","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"},
        "BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:00:78"}}"#
        .to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_a_lease() {
    let mut scene = Scene::new(&[]).await;
    let (subnet, inside) = free(&scene.story).await;
    let peer = addresses(&scene.story, "h2").await;
    for family in Family::ALL {
        let of = |addresses: &PerFamily<IpAddr>| *addresses.get(family).must("an address");
        for (name, source) in [
            ("of a subnet that nobody holds", of(&inside)),
            ("of a peer's container", of(&peer)),
            ("of the sender itself", if family == Family::V4 { "10.99.0.254" } else { "fd99::254" }.parse().must("an address")),
            ("of the host that it goes to", scene.host("h1", family)),
        ] {
            scene.judge(&format!("a stranger with a source {name}"), "world", source, Dropped).await;
        }
        let target = SocketAddr::new(scene.host("h1", family), VXLAN_PORT);
        for (name, payload) in [
            ("nothing inside", craft::vxlan(OURS, &[])),
            ("half a VXLAN header", craft::vxlan(OURS, &[])[..5].to_vec()),
            ("no inner packet", craft::vxlan(OURS, &[0; 14])),
        ] {
            scene.becomes(name, Dropped, b"no frame ends so", || scene.send_to("world", target, &payload)).await;
        }
        // More than one packet of the underlay holds: what is checked is put together first.
        let (mut inner, _) = scene.inner(of(&inside));
        inner.extend([b'x'; 3000]);
        scene.becomes("in fragments", Dropped, b"xxxx", || scene.tunnel("world", family, OURS, &inner)).await;
    }
    // Others' VNIs at the same port are not ours to judge.
    let own = scene.host("h1", Family::V4);
    let add = format!(
        "ip link add other77 type vxlan id 77 local {own} dev eth0 dstport {VXLAN_PORT} nolearning; ip link set other77 up"
    );
    kernel::shell(&scene.story, "h1", &add);
    let other = Wire::open(&scene.story.inside("h1"), "other77");
    let (inner, data) = scene.inner(inside.v4.must("IPv4"));
    scene.becomes("another VNI", Ignored, &data, || scene.tunnel("world", Family::V4, 77, &inner)).await;
    overlay_tests::eventually("it comes to the device of that VNI", SOON, || {
        let came = other.frames().iter().any(|frame| frame.ends_with(&data));
        if came { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    scene.becomes("a VNI that nobody has", Ignored, &data, || scene.tunnel("world", Family::V4, 0x0001_0000, &inner)).await;

    // A lease gives the right, for its subnet.
    let key = etcd::lease_key(&subnet.to_key());
    etcd::put(&scene.story, &key, &lease());
    let knows = |peers: usize| move |s: &overlay_agent::model::api::Status| s.ready && s.data_path.peers == peers;
    scene.story.at("h1").wait_status(SOON, "the new peer", knows(3)).await.must("h1");
    for (family, source) in inside.iter() {
        scene.judge("a stranger that has a lease", "world", *source, Passes).await;
        scene.judge("its subnet's base, as hosts send", "world", subnet.get(family).must("a subnet").base(), Passes).await;
        scene.judge("with a peer's source", "world", *peer.get(family).must("an address"), Dropped).await;
        // The outer source is that of one family, the inner one of the other.
        let (inner, data) = scene.inner(*source);
        let crossed = if family == Family::V4 { Family::V6 } else { Family::V4 };
        scene.becomes("crossed families", Dropped, &data, || scene.tunnel("world", crossed, OURS, &inner)).await;
    }
    etcd::delete(&scene.story, &key);
    scene.story.at("h1").wait_status(SOON, "the peer left", knows(2)).await.must("h1");
    for (_, source) in inside.iter() {
        scene.judge("a stranger whose lease ended", "world", *source, Dropped).await;
    }

    // One of another length than the network's subnets have.
    let base = subnet.get(Family::V4).must("IPv4").base();
    etcd::put(&scene.story, &etcd::lease_key(&format!("{base}-26")), &lease().replace("PublicIPv6", "Ignored"));
    scene.story.at("h1").wait_status(SOON, "the new peer", knows(3)).await.must("h1");
    let nth = |n| nth(&subnet, n).v4.must("IPv4");
    scene.judge("the last address of a /26", "world", nth(63), Passes).await;
    scene.judge("the first behind a /26", "world", nth(64), Dropped).await;
    scene.story.assert_all_reach().await;

    // The rules stand without the agent.
    let (inner, data) = scene.inner(*peer.get(Family::V4).must("IPv4"));
    let before = scene.count().await;
    scene.story.at("h1").agent_stop(nix::sys::signal::Signal::SIGKILL).must("SIGKILL");
    drop(scene.tap.frames());
    scene.tunnel("world", Family::V4, OURS, &inner);
    scene.story.start("h1").await;
    assert_eq!(scene.count().await, before + 1);
    assert!(!scene.tap.frames().iter().any(|frame| frame.ends_with(&data)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_pretends() {
    let mut scene = Scene::new(&[]).await;
    let (h2, h3) = (addresses(&scene.story, "h2").await, addresses(&scene.story, "h3").await);
    let subnet = scene.story.status("h2").await.lease.must("a lease").subnet;
    let own = scene.story.status("h1").await.lease.must("a lease").subnet;
    let mark = scene.story.status("h1").await.data_path.dropped["tunnel"];
    assert_eq!(mark, 0, "honest traffic is not counted");
    for family in Family::ALL {
        let of = |addresses: &PerFamily<IpAddr>| *addresses.get(family).must("an address");
        let base = subnet.get(family).must("a subnet").base();
        scene.judge("a peer's container", "h2", of(&h2), Passes).await;
        scene.judge("a peer itself", "h2", base, Passes).await;
        for (name, source) in [
            ("another peer's container", of(&h3)),
            ("a container of the host that it goes to", nth(&own, 9).get(family).copied().must("an address")),
            ("the gateway of the host that it goes to", nth(&own, 1).get(family).copied().must("an address")),
            ("the world", if family == Family::V4 { "192.0.2.1" } else { "2001:db8::1" }.parse().must("an address")),
            ("its address on the underlay", scene.host("h2", family)),
        ] {
            scene.judge(&format!("a peer as {name}"), "h2", source, Dropped).await;
        }
        // What the tunnel has no use for: there is no ARP in it, no VLAN.
        let mac = *scene.vtep.get(family).must("a VTEP");
        let (whole, data) = scene.inner(of(&h2));
        let tagged = [&whole[..12], &[0x81, 0, 0, 5], &whole[12..]].concat();
        scene.becomes("a VLAN tag inside", Dropped, &data, || scene.tunnel("h2", family, OURS, &tagged)).await;
        if family == Family::V4 {
            let said = craft::arp(2, (SENDER, of(&h2)), (mac, scene.target(family)));
            let inner = craft::frame(mac, SENDER, craft::ARP, &said);
            scene.becomes("ARP inside", Dropped, &said, || scene.tunnel("h2", family, OURS, &inner)).await;
        }
    }
    scene.story.assert_all_reach().await;
    let metrics = overlay_tests::http::ask(&scene.story.at("h1").socket(), "GET", "/metrics", "").body;
    let sample = format!("overlayd_dropped_packets_total{{reason=\"tunnel\"}} {}", scene.count().await);
    assert!(metrics.lines().any(|line| line == sample), "{sample}: {metrics}");
    let said = scene.story.ctl("h1", &["status"]).exits(0).out;
    assert!(said.contains(&format!("{} tunnel", scene.count().await)), "{said}");
}

/// The limit of the check: the outer source is the underlay's word. Who may write any source address onto the underlay can speak as a peer; the
/// underlay has to keep that from happening, or VXLAN has to go through something that encrypts.
#[tokio::test(flavor = "multi_thread")]
async fn the_limit_is_what_the_underlay_lets_pass() {
    let scene = Scene::new(&[]).await;
    let mac = |host: &str| -> Mac {
        let link = kernel::link(&scene.story, host, "eth0").must("eth0");
        let bytes: Vec<u8> =
            kernel::text(&link, "address").split(':').map(|byte| u8::from_str_radix(byte, 16).must("a MAC")).collect();
        bytes.try_into().ok().must("six bytes")
    };
    let (to, from) = (mac("h1"), mac("world"));
    let h2 = addresses(&scene.story, "h2").await;
    let world = Wire::open(&scene.story.inside("world"), "eth0");
    for (family, source) in h2.iter() {
        let forged = |inner: &[u8]| {
            let outer = (SocketAddr::new(scene.host("h2", family), 5000), SocketAddr::new(scene.host("h1", family), VXLAN_PORT));
            craft::ip_frame(to, from, &craft::udp(outer.0, outer.1, &craft::vxlan(OURS, inner)))
        };
        let (inner, data) = (said_by(&scene, *source, 1), b"as a peer".to_vec());
        scene.becomes("a forged outer source", Passes, &data, || world.send(&forged(&inner))).await;
        // Even so, nothing but what that peer may say.
        let other = addresses(&scene.story, "h3").await.get(family).copied().must("an address");
        let inner = said_by(&scene, other, 2);
        scene.becomes("a forged outer source that does not fit", Dropped, &data, || world.send(&forged(&inner))).await;
    }
}

fn said_by(scene: &Scene, source: IpAddr, port: u16) -> Vec<u8> {
    let family = Family::of(source);
    let to = SocketAddr::new(scene.target(family), PORTS.1);
    let packet = craft::udp(SocketAddr::new(source, port), to, b"as a peer");
    craft::ip_frame(*scene.vtep.get(family).must("a VTEP"), SENDER, &packet)
}

/// Without masquerade, a host answers the containers of another one by its own address, through the tunnel.
#[tokio::test(flavor = "multi_thread")]
async fn without_masquerade_hosts_answer() {
    let mut scene = Scene::new(&["--ip-masq=false"]).await;
    let h2 = addresses(&scene.story, "h2").await;
    for family in Family::ALL {
        let (own, other) = (scene.host("h2", family), scene.host("h3", family));
        scene.judge("a peer's container", "h2", *h2.get(family).must("an address"), Passes).await;
        scene.judge("a peer's own address", "h2", own, Passes).await;
        scene.judge("another peer's own address", "h2", other, Dropped).await;
        scene.judge("a stranger as a peer", "world", own, Dropped).await;
        let outside = if family == Family::V4 { "192.0.2.1" } else { "2001:db8::1" };
        scene.judge("the world", "h2", outside.parse().must("an address"), Dropped).await;
        // Seen from a container: the other host answers it.
        let own = own.to_string();
        kernel::run(&scene.story, "h1-c1", &["ping", "-c", "1", "-W", "5", &own]);
    }
}
