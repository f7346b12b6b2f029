//! Selection of the external interface (default route, name, address, regular expression, reachability), and the published
//! address.

use overlay_agent::model::api::Status;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, kernel};
use overlayctl::lab::Families;

/// Hosts with a second interface, `eth1`, with 10.98.0.N/24 and a route to 10.97.0.0/16.
async fn start_lab_with_two_interfaces(hosts: u16) -> TestLab {
    let lab = TestLab::without_agents(hosts, Families::V4).await;
    for number in 1..=hosts {
        kernel::shell(
            &lab,
            &format!("h{number}"),
            &format!(
                "ip link add eth1 type veth peer name wall; ip link set wall up; ip link set eth1 up
                 ip address add 10.98.0.{number}/24 dev eth1; ip route add 10.97.0.0/16 via 10.98.0.254"
            ),
        );
    }
    lab
}

#[tokio::test(flavor = "multi_thread")]
async fn selection_flags_choose_interface() {
    // Each on its own host: a host that returns with another address first has to prove that it is not a copy.
    let ways = [
        ("", "eth0", "10.99.1.1", "10.99.1.1"),
        ("--iface=eth1", "eth1", "10.98.0.2", "10.98.0.2"),
        ("--iface=eth7,eth1", "eth1", "10.98.0.3", "10.98.0.3"),
        ("--iface=10.99.1.4", "eth0", "10.99.1.4", "10.99.1.4"),
        ("--iface-regex=^eth1$", "eth1", "10.98.0.5", "10.98.0.5"),
        (r"--iface-regex=^10\.98\.", "eth1", "10.98.0.6", "10.98.0.6"),
        ("--iface-can-reach=10.97.3.4", "eth1", "10.98.0.7", "10.98.0.7"),
        ("--iface-can-reach=203.0.113.1", "eth0", "10.99.1.8", "10.99.1.8"),
        ("--public-ip=198.51.100.7", "eth0", "198.51.100.7", "10.99.1.9"),
    ];
    let lab = start_lab_with_two_interfaces(9).await;
    for (number, (flag, interface, public_ip, local)) in (1..).zip(ways) {
        let name = format!("h{number}");
        let host = lab.host(&name);
        let flags: Vec<&str> = std::iter::once(flag).filter(|f| !f.is_empty()).collect();
        host.agent_start(&flags).expect_ok("start");
        let underlay =
            host.wait_ready(READY_TIMEOUT).await.expect_ok(&format!("ready with {flags:?}")).underlay.expect_ok("an underlay");
        let device = kernel::link(&lab, &name, "ovx.1").expect_ok("ovx.1");
        let data = &device["linkinfo"]["info_data"];
        let published = underlay.public_ip.v4.expect_ok("an address").to_string();
        let found = (underlay.interface.as_str(), published.as_str(), kernel::text(data, "local"));
        assert_eq!(found, (interface, public_ip, local.to_owned()), "{flags:?}");
        assert_eq!(kernel::text(data, "link"), interface);
        let lease = lab.lease_of(&name).value;
        assert!(lease.contains(&format!("\"PublicIP\":\"{public_ip}\"")), "the lease has the same address: {lease}");
    }
    // A peer sends to the published address.
    let entries = kernel::list_json(&lab, "h1", "bridge", &["fdb", "show", "dev", "ovx.1"]);
    assert!(entries.iter().any(|fdb| kernel::text(fdb, "dst") == "198.51.100.7"), "{entries:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_interface_error_lists_candidates() {
    let lab = start_lab_with_two_interfaces(1).await;
    let candidates = ["eth0 (10.99.1.1)", "eth1 (10.98.0.1)"];
    for (flag, wanted) in [
        ("--iface=wlan9", "--iface: this host has no interface wlan9"),
        ("--iface-regex=^wlan", "--iface-regex: `^wlan` matches no interface"),
        ("--iface=lo", "--iface: this host has no interface lo"),
    ] {
        let host = lab.host("h1");
        host.agent_start(&[flag]).expect_ok("start");
        let named = |s: &Status| !s.ready && s.problems.iter().any(|p| p.contains(wanted));
        let status = host.wait_status(CONVERGE_TIMEOUT, wanted, named).await.expect_ok(flag);
        let problem = status.problems.iter().find(|p| p.contains(wanted)).expect_ok(wanted);
        assert!(candidates.iter().all(|c| problem.contains(c)), "{problem}");
        assert!(kernel::link(&lab, "h1", "ovx.1").is_none() && overlay_tests::etcd::leases(&lab).is_empty());
        lab.wait_for_log("h1", &[wanted]).await;
        host.agent_stop(nix::sys::signal::Signal::SIGTERM).expect_ok("stop");
    }
}

/// As in flannel's own example: the hosts' addresses are in the network, but outside the leasable range.
#[tokio::test(flavor = "multi_thread")]
async fn underlay_inside_network_outside_pool_works() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.networks.v4 = "10.0.0.0/8".parse().ok();
        let bounds = [("SubnetMin", "10.10.0.0"), ("SubnetMax", "10.90.0.0")];
        options.config.extend(bounds.map(|(field, address)| (field.to_owned(), address.into())));
    })
    .await;
    lab.assert_full_reachability().await;
    for (host, other) in [("h1", "10.99.1.2"), ("h2", "10.99.1.1")] {
        lab.wait_converged(host, CONVERGE_TIMEOUT).await;
        let status = lab.status(host).await;
        assert!(status.ready && status.problems.is_empty(), "{:?}", status.problems);
        // A host reaches a container of another host only via that host's address.
        let container = format!("{host}-c1");
        kernel::shell(&lab, &container, &format!("ping -c 1 -W 5 {other}"));
        let remote = if host == "h1" { "h2" } else { "h1" };
        let address = lab.endpoints(remote)[0].addresses().v4.expect_ok("an address");
        kernel::shell(&lab, host, &format!("ping -c 1 -W 5 {address}"));
        let state = lab.host(host).state_dir();
        lab.ctl(host, &["check", "--state-dir", &state.to_string_lossy()]).assert_code(0);
        let traced = lab.ctl(host, &["trace", "c1", other]).assert_code(0);
        assert!(!traced.stdout.contains("in the overlay"), "{}", traced.stdout);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn public_ip_inside_leased_subnet_is_reported() {
    let lab = TestLab::without_agents(2, Families::V4).await;
    for (host, flags) in [("h1", &["--public-ip=10.244.9.9"][..]), ("h2", &[])] {
        lab.host(host).agent_start(flags).expect_ok("start");
        lab.host(host).wait_ready(READY_TIMEOUT).await.expect_ok(host);
    }
    for (host, words) in
        [("h1", "this host's address 10.244.9.9 lies among"), ("h2", "PublicIP is 10.244.9.9: must not lie among")]
    {
        let named = |s: &Status| s.problems.iter().any(|problem| problem.contains(words));
        lab.host(host).wait_status(CONVERGE_TIMEOUT, words, named).await.expect_ok(host);
    }
}

/// The interface appears after the agent's start: no restart is needed.
#[tokio::test(flavor = "multi_thread")]
async fn agent_waits_for_late_interface() {
    let lab = TestLab::without_agents(1, Families::V4).await;
    let host = lab.host("h1");
    host.agent_start(&["--iface=late0"]).expect_ok("start");
    host.wait_status(CONVERGE_TIMEOUT, "it does not wait", |s| s.problems.iter().any(|p| p.contains("late0")))
        .await
        .expect_ok("h1");
    kernel::shell(
        &lab,
        "h1",
        "ip link add late0 type veth peer name wall; ip link set wall up; ip link set late0 up
         ip address add 10.98.0.1/24 dev late0",
    );
    let status = host.wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    assert_eq!(status.underlay.expect_ok("an underlay").interface, "late0");
}

/// A change of the underlay's MTU changes the overlay's MTU, including new container interfaces.
#[tokio::test(flavor = "multi_thread")]
async fn overlay_mtu_follows_underlay_mtu() {
    let lab = TestLab::up(|options| {
        options.hosts = 1;
        options.containers = 1;
    })
    .await;
    kernel::run(&lab, "h1", &["ip", "link", "set", "eth0", "mtu", "1400"]);
    lab.host("h1").wait_status(CONVERGE_TIMEOUT, "MTU 1350", |s| s.data_path.mtu == Some(1350) && s.ready).await.expect_ok("h1");
    lab.wait_converged("h1", CONVERGE_TIMEOUT).await;
    let attached = lab.host("h1").attach("late").await.expect_ok("attach");
    assert_eq!(attached.mtu, Some(1350));
    let env = std::fs::read_to_string(lab.host("h1").run_dir().join("subnet.env")).expect_ok("subnet.env");
    assert!(env.contains("FLANNEL_MTU=1350\n"), "{env}");
}
