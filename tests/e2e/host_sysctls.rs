//! Interface sysctls that would block the overlay's traffic, set before the agent starts and while it runs.

use std::net::IpAddr;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_agent::model::api::{Health, Status};
use overlay_tests::packet_builder::{self, PacketSocket};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, REPAIR_DEADLINE};
use overlay_tests::traffic::Traffic;
use overlay_tests::{ExpectContext, TestLab, eventually, eventually_true, kernel};
use overlayctl::lab::Families;

/// Writes a value below `/proc/sys/net` of h1.
fn write_sysctl(lab: &TestLab, path: &str, value: &str) {
    kernel::shell(lab, "h1", &format!("echo {value} >/proc/sys/net/{path}"));
}

fn read_sysctl(lab: &TestLab, path: &str) -> String {
    kernel::sysctl(lab, "h1", path)
}

/// Runs `overlayd cleanup` on h1.
fn run_cleanup(lab: &TestLab) {
    let mut cleanup = lab.overlayd_command("h1", lab.host("h1").run_dir(), lab.host("h1").state_dir());
    cleanup.arg("cleanup");
    lab.run_to_exit("h1", cleanup).assert_code(0);
}

/// Starts both agents, with a container on each host.
async fn start_agents(lab: &TestLab) {
    for host in ["h1", "h2"] {
        lab.start_agent(host).await;
    }
    lab.wait_full_mesh().await;
    for host in ["h1", "h2"] {
        lab.host(host).attach("c1").await.expect_ok("attach");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forwarding_is_enabled_on_new_interfaces() {
    let lab = TestLab::without_agents(2, Families::V4).await;
    add_second_interface(&lab);
    kernel::shell(&lab, "h1", "ip address add 10.98.0.1/24 dev eth1; ip route add default via 10.98.0.254 metric 9999");
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
    before.into_iter().for_each(|(path, value)| write_sysctl(&lab, path, value));
    start_agents(&lab).await;
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    lab.assert_full_reachability().await;

    // While it runs: changes with a netlink notification are repaired at once.
    for (path, right, wrong) in [
        ("ipv4/conf/ovb.1/forwarding", "1", "0"),
        ("ipv4/conf/ovx.1/forwarding", "1", "0"),
        ("ipv4/conf/eth0/forwarding", "1", "0"),
        ("ipv4/conf/eth1/forwarding", "1", "0"),
        ("ipv4/conf/ovx.1/rp_filter", "2", "1"),
        ("ipv4/conf/ovb.1/proxy_arp", "0", "1"),
    ] {
        write_sysctl(&lab, path, wrong);
        eventually_true(path, REPAIR_DEADLINE, || read_sysctl(&lab, path) == right).await;
    }
    lab.ctl("h1", &["check", "kernel"]).assert_code(0);
    lab.assert_full_reachability().await;

    // Without the agent they stay wrong, and `overlayctl check` names them.
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    for (path, wrong, words) in [
        ("ipv4/conf/ovx.1/forwarding", "0", ["net.ipv4/conf/ovx.1/forwarding = 0", "sysctl -w net/ipv4/conf/ovx.1/forwarding=1"]),
        ("ipv4/conf/ovb.1/rp_filter", "0", ["net.ipv4/conf/ovb.1/rp_filter = 0", "sysctl -w net/ipv4/conf/ovb.1/rp_filter=2"]),
        ("ipv4/conf/all/arp_ignore", "8", ["net.ipv4.conf.all.arp_ignore = 8", "answers no ARP request"]),
    ] {
        let was = read_sysctl(&lab, path);
        write_sysctl(&lab, path, wrong);
        let output = lab.ctl("h1", &["check", "kernel"]).assert_code(1).stdout;
        assert!(words.iter().all(|word| output.contains(word)), "{output}");
        write_sysctl(&lab, path, &was);
    }

    run_cleanup(&lab);
    for (path, value) in before {
        assert_eq!(read_sysctl(&lab, path), value, "{path} is unchanged");
    }
}

/// IPv6 disabled for new devices, as on hardened hosts.
#[tokio::test(flavor = "multi_thread")]
async fn ipv6_is_enabled_on_new_interfaces() {
    let lab = TestLab::without_agents(2, Families::Dual).await;
    write_sysctl(&lab, "ipv6/conf/default/disable_ipv6", "1");
    start_agents(&lab).await;
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    lab.assert_full_reachability().await;
    // A namespace whose new interfaces have IPv6 disabled, as Docker creates them.
    let netns = lab.layout().namespace("h1-other");
    kernel::run(&lab, "net", &["ip", "netns", "add", &netns]);
    kernel::shell(&lab, "h1-other", "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6");
    lab.ctl("h1", &["attach", "other", "--netns", &format!("/run/netns/{netns}")]).assert_code(0);
    assert_eq!(kernel::sysctl(&lab, "h1-other", "ipv6/conf/eth0/disable_ipv6"), "0");

    // Disabled on a device while the agent runs: its addresses come back with IPv6.
    for device in ["ovb.1", "ovx6.1"] {
        let path = format!("ipv6/conf/{device}/disable_ipv6");
        write_sysctl(&lab, &path, "1");
        eventually_true(&path, REPAIR_DEADLINE, || read_sysctl(&lab, &path) == "0").await;
        lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    }
    lab.assert_full_reachability().await;
}

/// Sends a router advertisement into a host's interface, and waits for its default route on h1.
async fn send_router_advertisement(lab: &TestLab, from: (&str, &str), device: &str, mac: packet_builder::Mac) {
    let packet_socket = PacketSocket::open(&lab.open_netns(from.0), from.1);
    let advertisement = packet_builder::router_advertisement(mac, "2001:db8:7::".parse().expect_ok("a prefix"));
    eventually(&format!("a router advertisement is accepted on {device}"), CONVERGE_TIMEOUT, || {
        packet_socket.send(&advertisement);
        if default_routers(lab, device).is_empty() { Err("no route".to_owned()) } else { Ok(()) }
    })
    .await;
}

/// The default routes from router advertisements on an interface of h1.
fn default_routers(lab: &TestLab, device: &str) -> String {
    kernel::run(lab, "h1", &["ip", "-6", "route", "show", "default", "proto", "ra", "dev", device])
}

fn accept_ra(lab: &TestLab, device: &str) -> String {
    read_sysctl(lab, &format!("ipv6/conf/{device}/accept_ra"))
}

/// Adds a second interface `eth1` to h1, whose veth peer is in `wall`.
fn add_second_interface(lab: &TestLab) {
    kernel::shell(
        lab,
        "h1",
        "ip link add eth1 type veth peer name wall; echo 0 >/proc/sys/net/ipv6/conf/eth1/accept_dad; ip link set wall up; ip link set eth1 up",
    );
}

const FIRST_ROUTER: packet_builder::Mac = [2, 0, 0, 0, 0x17, 1];
const SECOND_ROUTER: packet_builder::Mac = [2, 0, 0, 0, 0x17, 2];

/// Deletes the default routes from router advertisements on an interface of h1.
fn delete_default_routers(lab: &TestLab, device: &str) {
    kernel::run(lab, "h1", &["ip", "-6", "route", "flush", "default", "proto", "ra", "dev", device]);
}

#[tokio::test(flavor = "multi_thread")]
async fn enabling_forwarding_keeps_router_advertisements() {
    let lab = TestLab::without_agents(2, Families::Dual).await;
    add_second_interface(&lab);
    // A bridge and a container's interface with the kernel's default `accept_ra`.
    kernel::shell(&lab, "h1", "ip link add other0 type bridge; ip link add pod0 type veth peer name pod1");
    send_router_advertisement(&lab, ("h1", "wall"), "eth1", FIRST_ROUTER).await;
    let before = default_routers(&lab, "eth1");
    assert_eq!(read_sysctl(&lab, "ipv6/conf/all/forwarding"), "0");
    let status = lab.start_agent("h1").await;
    assert!(status.problems.is_empty(), "{:?}", status.problems);
    assert_eq!(read_sysctl(&lab, "ipv6/conf/all/forwarding"), "1");
    let expires = |text: &str| text.split(" expires").next().unwrap_or_default().to_owned();
    assert_eq!(expires(&default_routers(&lab, "eth1")), expires(&before), "the route stays");
    delete_default_routers(&lab, "eth1");
    send_router_advertisement(&lab, ("h1", "wall"), "eth1", SECOND_ROUTER).await;
    // The external interface, which had no router yet.
    assert_eq!(default_routers(&lab, "eth0"), "");
    send_router_advertisement(&lab, ("h2", "eth0"), "eth0", FIRST_ROUTER).await;

    // A later interface; container interfaces and interfaces with `accept_ra` 0 stay unchanged.
    kernel::shell(
        &lab,
        "h1",
        "ip link add link eth1 name late0 type macvlan; ip link set late0 up; ip link add late1 type bridge
         echo 0 >/proc/sys/net/ipv6/conf/default/accept_ra; ip link add link eth1 name late2 type macvlan",
    );
    eventually_true("late0 accepts router advertisements", REPAIR_DEADLINE, || accept_ra(&lab, "late0") == "2").await;
    for (device, value) in [("other0", "1"), ("pod0", "1"), ("late1", "1"), ("late2", "0")] {
        assert_eq!(accept_ra(&lab, device), value, "{device}");
    }

    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    lab.start_agent("h1").await;
    assert!(!default_routers(&lab, "eth0").is_empty() && !default_routers(&lab, "eth1").is_empty());
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    kernel::shell(&lab, "h1", "ip link delete late0");
    run_cleanup(&lab);
    for device in ["eth0", "eth1"] {
        assert_eq!(accept_ra(&lab, device), "1", "{device} is unchanged");
    }
    assert_eq!(read_sysctl(&lab, "ipv6/conf/all/forwarding"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn ignored_router_advertisements_stay_ignored() {
    let lab = TestLab::without_agents(1, Families::Dual).await;
    add_second_interface(&lab);
    write_sysctl(&lab, "ipv6/conf/all/forwarding", "1");
    lab.start_agent("h1").await;
    kernel::shell(&lab, "h1", "ip link add link eth1 name late0 type macvlan; ip link set late0 up");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    let advertisement = packet_builder::router_advertisement(FIRST_ROUTER, "2001:db8:7::".parse().expect_ok("a prefix"));
    let packet_socket = PacketSocket::open(&lab.open_netns("h1"), "wall");
    for _ in 0..10 {
        packet_socket.send(&advertisement);
        tokio::time::sleep(REPAIR_DEADLINE / 10).await;
    }
    assert_eq!(default_routers(&lab, "eth1"), "");
    for device in ["eth0", "eth1", "late0"] {
        assert_eq!(accept_ra(&lab, device), "1", "{device}");
    }
    // The same frame works once the interface accepts it: the earlier ones were processed and ignored.
    write_sysctl(&lab, "ipv6/conf/eth1/accept_ra", "2");
    packet_socket.send(&advertisement);
    eventually_true("the advertisement is accepted", CONVERGE_TIMEOUT, || !default_routers(&lab, "eth1").is_empty()).await;
}

/// Checks that a container reaches an address, with one packet or a few.
async fn assert_reaches(lab: &TestLab, from: &str, address: IpAddr) {
    let address = address.to_string();
    let ping = || kernel::attempt(lab, from, &["ping", "-c1", "-W1", &address]);
    eventually(&format!("{from} reaches {address}"), CONVERGE_TIMEOUT, || match ping() {
        output if output.code == Some(0) => Ok(()),
        output => Err(output.stdout),
    })
    .await;
}

/// Whether a status has a problem with these words.
fn has_problem(status: &Status, words: &[&str]) -> bool {
    status.problems.iter().any(|problem| words.iter().all(|word| problem.contains(word)))
}

/// The words for [`has_problem`] if IPv6 is disabled on the external interface.
const IPV6_OFF: [&str; 3] = ["IPv6 is switched off", "eth0", "sysctl -w net/ipv6/conf/eth0/disable_ipv6=0"];

#[tokio::test(flavor = "multi_thread")]
async fn host_without_ipv6_serves_ipv4() {
    let lab = TestLab::without_agents(2, Families::Dual).await;
    let address = kernel::run(&lab, "h1", &["ip", "-6", "-o", "address", "show", "dev", "eth0", "scope", "global"]);
    let address = address.split_whitespace().nth(3).expect_ok("an address").to_owned();
    write_sysctl(&lab, "ipv6/conf/all/disable_ipv6", "1");
    let status = lab.start_agent("h1").await;
    assert!(has_problem(&status, &IPV6_OFF) && status.health == Health::Degraded, "{:?}", status.problems);
    lab.start_agent("h2").await;
    let mut addresses = Vec::new();
    for host in ["h1", "h2"] {
        lab.host(host).attach("c1").await.expect_ok("attach");
        addresses.push(lab.endpoints(host)[0].addresses());
    }
    assert_eq!(addresses[0].families().collect::<Vec<_>>(), [Family::V4], "this host has only IPv4");
    assert_reaches(&lab, "h1-c1", addresses[1].v4.expect_ok("an address")).await;
    assert_reaches(&lab, "h2-c1", addresses[0].v4.expect_ok("an address")).await;
    let lease = lab.lease_of("h1");
    assert!(!lease.key.contains('&') && !lease.value.contains("PublicIPv6\":\""), "{lease:?}");

    // Enabled again: the containers stay unchanged until the agent restarts.
    kernel::shell(
        &lab,
        "h1",
        &format!("echo 0 >/proc/sys/net/ipv6/conf/all/disable_ipv6; ip address add {address} dev eth0 nodad"),
    );
    let back = |status: &Status| has_problem(status, &["IPv6 is enabled again", "restart overlayd"]);
    lab.host("h1").wait_status(CONVERGE_TIMEOUT, "IPv6 is not reported as back on", back).await.expect_ok("h1");
    assert_eq!(lab.lease_of("h1"), lease);
    assert_reaches(&lab, "h1-c1", addresses[1].v4.expect_ok("an address")).await;
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    let status = lab.start_agent("h1").await;
    assert!(lab.lease_of("h1").key.contains('&') && status.lease.is_some(), "both families");
}

/// The data path stays, also over a restart: IPv4 continues, and IPv6 recovers when it is enabled again.
#[tokio::test(flavor = "multi_thread")]
async fn ipv6_disabled_at_runtime_keeps_ipv4() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    let lease = lab.lease_of("h1");
    let routes = kernel::run(&lab, "h1", &["ip", "-6", "-o", "address", "show", "dev", "eth0", "scope", "global"]);
    let address = routes.split_whitespace().nth(3).expect_ok("an address").to_owned();
    let default = kernel::run(&lab, "h1", &["ip", "-6", "route", "show", "default"]);
    let traffic = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    write_sysctl(&lab, "ipv6/conf/all/disable_ipv6", "1");
    let off = |status: &Status| has_problem(status, &IPV6_OFF);
    lab.host("h1").wait_status(CONVERGE_TIMEOUT, "IPv6 is not reported as off", off).await.expect_ok("h1");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    lab.host("h1").attach("c2").await.expect_ok("attach");
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    let status = lab.start_agent("h1").await;
    assert!(off(&status) && status.ready, "{status:?}");
    assert_eq!(lab.lease_of("h1"), lease);
    let line = default.lines().next().expect_ok("a default route");
    kernel::shell(
        &lab,
        "h1",
        &format!(
            "echo 0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip address add {address} dev eth0 nodad; ip -6 route replace {line}"
        ),
    );
    lab.host("h1")
        .wait_status(CONVERGE_TIMEOUT, "not ready with IPv6 back", |s| s.ready && s.problems.is_empty())
        .await
        .expect_ok("h1");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    traffic.stop().await.assert_no_loss("IPv6 off and on");
    lab.assert_full_reachability().await;
}
