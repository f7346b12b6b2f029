//! Settings of the host's interfaces under which the kernel would not carry the overlay's traffic, made before the agent starts and while it runs.

use std::net::IpAddr;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_agent::model::api::{Health, Status};
use overlay_tests::craft::{self, Wire};
use overlay_tests::story::{SECOND, SOON};
use overlay_tests::traffic::Traffic;
use overlay_tests::{Must, Story, eventually, kernel, within};
use overlayctl::lab::Families;

/// Writes a value below `/proc/sys/net` of h1.
fn write(story: &Story, path: &str, value: &str) {
    kernel::shell(story, "h1", &format!("echo {value} >/proc/sys/net/{path}"));
}

fn read(story: &Story, path: &str) -> String {
    kernel::sysctl(story, "h1", path)
}

/// Runs `overlayd cleanup` on h1.
fn cleaned(story: &Story) {
    let mut cleanup = story.overlayd("h1", story.at("h1").run_dir(), story.at("h1").state_dir());
    cleanup.arg("cleanup");
    story.ends("h1", cleanup).exits(0);
}

/// Starts both agents, with a container on each host.
async fn started(story: &Story) {
    for host in ["h1", "h2"] {
        story.start(host).await;
    }
    story.mesh().await;
    for host in ["h1", "h2"] {
        story.at(host).attach("c1").await.must("attach");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn new_interfaces_that_do_not_forward_are_made_to() {
    let story = Story::without_agents(2, Families::V4).await;
    second_card(&story);
    kernel::shell(&story, "h1", "ip address add 10.98.0.1/24 dev eth1; ip route add default via 10.98.0.254 metric 9999");
    let before = [
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/default/forwarding", "0"),
        ("ipv4/conf/eth0/forwarding", "0"),
        ("ipv4/conf/eth1/forwarding", "0"),
        ("ipv4/conf/default/rp_filter", "1"),
        ("ipv4/conf/all/rp_filter", "1"),
        ("ipv4/conf/default/arp_ignore", "8"),
        ("ipv4/conf/default/arp_filter", "1"),
        ("ipv4/conf/default/proxy_arp", "1"),
    ];
    before.into_iter().for_each(|(path, value)| write(&story, path, value));
    started(&story).await;
    story.settled("h1", SOON).await;
    story.assert_all_reach().await;

    // While it runs: what the kernel tells of is back at once.
    for (path, right, wrong) in [
        ("ipv4/conf/ovb.1/forwarding", "1", "0"),
        ("ipv4/conf/ovx.1/forwarding", "1", "0"),
        ("ipv4/conf/eth0/forwarding", "1", "0"),
        ("ipv4/conf/eth1/forwarding", "1", "0"),
        ("ipv4/conf/ovx.1/rp_filter", "2", "1"),
        ("ipv4/conf/ovb.1/proxy_arp", "0", "1"),
    ] {
        write(&story, path, wrong);
        within(path, SECOND, || read(&story, path) == right).await;
    }
    story.ctl("h1", &["check", "kernel"]).exits(0);
    story.assert_all_reach().await;

    // Without the agent they stay wrong, and are named.
    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    for (path, wrong, words) in [
        ("ipv4/conf/ovx.1/forwarding", "0", ["net.ipv4/conf/ovx.1/forwarding = 0", "sysctl -w net/ipv4/conf/ovx.1/forwarding=1"]),
        ("ipv4/conf/ovb.1/rp_filter", "0", ["net.ipv4/conf/ovb.1/rp_filter = 0", "sysctl -w net/ipv4/conf/ovb.1/rp_filter=2"]),
        ("ipv4/conf/all/arp_ignore", "8", ["net.ipv4.conf.all.arp_ignore = 8", "answers no ARP request"]),
    ] {
        let was = read(&story, path);
        write(&story, path, wrong);
        let said = story.ctl("h1", &["check", "kernel"]).exits(1).out;
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        write(&story, path, &was);
    }

    cleaned(&story);
    for (path, value) in before {
        assert_eq!(read(&story, path), value, "{path} is as it was");
    }
}

/// IPv6 switched off for devices to come, as hardened hosts have it.
#[tokio::test(flavor = "multi_thread")]
async fn new_interfaces_without_ipv6_get_it() {
    let story = Story::without_agents(2, Families::Dual).await;
    write(&story, "ipv6/conf/default/disable_ipv6", "1");
    started(&story).await;
    story.settled("h1", SOON).await;
    story.assert_all_reach().await;
    // A namespace whose interfaces come without, as Docker makes them.
    let netns = story.layout().namespace("h1-other");
    kernel::run(&story, "net", &["ip", "netns", "add", &netns]);
    kernel::shell(&story, "h1-other", "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6");
    story.ctl("h1", &["attach", "other", "--netns", &format!("/run/netns/{netns}")]).exits(0);
    assert_eq!(kernel::sysctl(&story, "h1-other", "ipv6/conf/eth0/disable_ipv6"), "0");

    // Switched off on a device while the agent runs: its addresses come back with it.
    for device in ["ovb.1", "ovx6.1"] {
        let path = format!("ipv6/conf/{device}/disable_ipv6");
        write(&story, &path, "1");
        within(&path, SECOND, || read(&story, &path) == "0").await;
        story.settled("h1", SOON).await;
    }
    story.assert_all_reach().await;
}

/// Sends a router's advertisement into an interface of a host, and waits for the default route that comes of it on h1.
async fn advertised(story: &Story, from: (&str, &str), device: &str, mac: craft::Mac) {
    let wire = Wire::open(&story.inside(from.0), from.1);
    let advertisement = craft::router_advertisement(mac, "2001:db8:7::".parse().must("a prefix"));
    eventually(&format!("a router is taken on {device}"), SOON, || {
        wire.send(&advertisement);
        if routers(story, device).is_empty() { Err("no route".to_owned()) } else { Ok(()) }
    })
    .await;
}

/// The default routes of an interface of h1 that came from router advertisements.
fn routers(story: &Story, device: &str) -> String {
    kernel::run(story, "h1", &["ip", "-6", "route", "show", "default", "proto", "ra", "dev", device])
}

fn accept_ra(story: &Story, device: &str) -> String {
    read(story, &format!("ipv6/conf/{device}/accept_ra"))
}

/// Gives h1 a second card `eth1`, whose wire ends in `wall`.
fn second_card(story: &Story) {
    kernel::shell(
        story,
        "h1",
        "ip link add eth1 type veth peer name wall; echo 0 >/proc/sys/net/ipv6/conf/eth1/accept_dad; ip link set wall up; ip link set eth1 up",
    );
}

const FIRST_ROUTER: craft::Mac = [2, 0, 0, 0, 0x17, 1];
const SECOND_ROUTER: craft::Mac = [2, 0, 0, 0, 0x17, 2];

/// Takes the default routes of router advertisements from an interface of h1.
fn drop_routers(story: &Story, device: &str) {
    kernel::run(story, "h1", &["ip", "-6", "route", "flush", "default", "proto", "ra", "dev", device]);
}

#[tokio::test(flavor = "multi_thread")]
async fn interfaces_keep_their_routers_when_forwarding_is_switched_on() {
    let story = Story::without_agents(2, Families::Dual).await;
    second_card(&story);
    // A bridge and a container's interface that take what comes as the kernel's default has it.
    kernel::shell(&story, "h1", "ip link add other0 type bridge; ip link add pod0 type veth peer name pod1");
    advertised(&story, ("h1", "wall"), "eth1", FIRST_ROUTER).await;
    let before = routers(&story, "eth1");
    assert_eq!(read(&story, "ipv6/conf/all/forwarding"), "0");
    let status = story.start("h1").await;
    assert!(status.problems.is_empty(), "{:?}", status.problems);
    assert_eq!(read(&story, "ipv6/conf/all/forwarding"), "1");
    let expires = |text: &str| text.split(" expires").next().unwrap_or_default().to_owned();
    assert_eq!(expires(&routers(&story, "eth1")), expires(&before), "the route stays");
    drop_routers(&story, "eth1");
    advertised(&story, ("h1", "wall"), "eth1", SECOND_ROUTER).await;
    // The external card, which had no router yet.
    assert_eq!(routers(&story, "eth0"), "");
    advertised(&story, ("h2", "eth0"), "eth0", FIRST_ROUTER).await;

    // A card that comes later; what containers are at stays as it is, and what takes none.
    kernel::shell(
        &story,
        "h1",
        "ip link add link eth1 name late0 type macvlan; ip link set late0 up; ip link add late1 type bridge
         echo 0 >/proc/sys/net/ipv6/conf/default/accept_ra; ip link add link eth1 name late2 type macvlan",
    );
    within("late0 takes routers", SECOND, || accept_ra(&story, "late0") == "2").await;
    for (device, value) in [("other0", "1"), ("pod0", "1"), ("late1", "1"), ("late2", "0")] {
        assert_eq!(accept_ra(&story, device), value, "{device}");
    }

    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    story.start("h1").await;
    assert!(!routers(&story, "eth0").is_empty() && !routers(&story, "eth1").is_empty());
    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    kernel::shell(&story, "h1", "ip link delete late0");
    cleaned(&story);
    for device in ["eth0", "eth1"] {
        assert_eq!(accept_ra(&story, device), "1", "{device} is as it was");
    }
    assert_eq!(read(&story, "ipv6/conf/all/forwarding"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interface_that_ignored_advertisements_before_stays_as_it_is() {
    let story = Story::without_agents(1, Families::Dual).await;
    second_card(&story);
    write(&story, "ipv6/conf/all/forwarding", "1");
    story.start("h1").await;
    kernel::shell(&story, "h1", "ip link add link eth1 name late0 type macvlan; ip link set late0 up");
    story.settled("h1", SOON).await;
    let advertisement = craft::router_advertisement(FIRST_ROUTER, "2001:db8:7::".parse().must("a prefix"));
    let wire = Wire::open(&story.inside("h1"), "wall");
    for _ in 0..10 {
        wire.send(&advertisement);
        tokio::time::sleep(SECOND / 10).await;
    }
    assert_eq!(routers(&story, "eth1"), "");
    for device in ["eth0", "eth1", "late0"] {
        assert_eq!(accept_ra(&story, device), "1", "{device}");
    }
}

/// Whether a container reaches an address, with one packet or a few.
async fn reaches(story: &Story, from: &str, address: IpAddr) {
    let address = address.to_string();
    let ping = || kernel::attempt(story, from, &["ping", "-c1", "-W1", &address]);
    eventually(&format!("{from} reaches {address}"), SOON, || match ping() {
        said if said.code == Some(0) => Ok(()),
        said => Err(said.out),
    })
    .await;
}

/// A status with a problem that has these words.
fn has_problem(status: &Status, words: &[&str]) -> bool {
    status.problems.iter().any(|problem| words.iter().all(|word| problem.contains(word)))
}

/// The words of [`has_problem`] where IPv6 is switched off on the external interface.
const IPV6_OFF: [&str; 3] = ["IPv6 is switched off", "eth0", "sysctl -w net/ipv6/conf/eth0/disable_ipv6=0"];

#[tokio::test(flavor = "multi_thread")]
async fn host_without_ipv6_serves_ipv4() {
    let story = Story::without_agents(2, Families::Dual).await;
    let address = kernel::run(&story, "h1", &["ip", "-6", "-o", "address", "show", "dev", "eth0", "scope", "global"]);
    let address = address.split_whitespace().nth(3).must("an address").to_owned();
    write(&story, "ipv6/conf/all/disable_ipv6", "1");
    let status = story.start("h1").await;
    assert!(has_problem(&status, &IPV6_OFF) && status.health == Health::Degraded, "{:?}", status.problems);
    story.start("h2").await;
    let mut addresses = Vec::new();
    for host in ["h1", "h2"] {
        story.at(host).attach("c1").await.must("attach");
        addresses.push(story.endpoints(host)[0].addresses());
    }
    assert_eq!(addresses[0].families().collect::<Vec<_>>(), [Family::V4], "IPv4 is all that this host has");
    reaches(&story, "h1-c1", addresses[1].v4.must("an address")).await;
    reaches(&story, "h2-c1", addresses[0].v4.must("an address")).await;
    let lease = story.lease_of("h1");
    assert!(!lease.key.contains('&') && !lease.value.contains("PublicIPv6\":\""), "{lease:?}");

    // Back on: nothing changes for the containers until the agent starts again.
    kernel::shell(
        &story,
        "h1",
        &format!("echo 0 >/proc/sys/net/ipv6/conf/all/disable_ipv6; ip address add {address} dev eth0 nodad"),
    );
    let back = |status: &Status| has_problem(status, &["IPv6 is on again", "restart overlayd"]);
    story.at("h1").wait_status(SOON, "that it is on again", back).await.must("h1");
    assert_eq!(story.lease_of("h1"), lease);
    reaches(&story, "h1-c1", addresses[1].v4.must("an address")).await;
    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    let status = story.start("h1").await;
    assert!(story.lease_of("h1").key.contains('&') && status.lease.is_some(), "both families");
}

/// All that was built stays, over a restart too: IPv4 works on, and IPv6 does again when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn ipv6_switched_off_under_the_agent_costs_no_ipv4() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    let lease = story.lease_of("h1");
    let routes = kernel::run(&story, "h1", &["ip", "-6", "-o", "address", "show", "dev", "eth0", "scope", "global"]);
    let address = routes.split_whitespace().nth(3).must("an address").to_owned();
    let default = kernel::run(&story, "h1", &["ip", "-6", "route", "show", "default"]);
    let traffic = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    write(&story, "ipv6/conf/all/disable_ipv6", "1");
    let off = |status: &Status| has_problem(status, &IPV6_OFF);
    story.at("h1").wait_status(SOON, "that IPv6 is off", off).await.must("h1");
    story.settled("h1", SOON).await;
    story.at("h1").attach("c2").await.must("attach");
    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    let status = story.start("h1").await;
    assert!(off(&status) && status.ready, "{status:?}");
    assert_eq!(story.lease_of("h1"), lease);
    let line = default.lines().next().must("a default route");
    kernel::shell(
        &story,
        "h1",
        &format!(
            "echo 0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip address add {address} dev eth0 nodad; ip -6 route replace {line}"
        ),
    );
    story.at("h1").wait_status(SOON, "that it is back", |s| s.ready && s.problems.is_empty()).await.must("h1");
    story.settled("h1", SOON).await;
    traffic.stop().await.assert_none("IPv6 off and on");
    story.assert_all_reach().await;
}
