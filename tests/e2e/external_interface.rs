//! Which interface is the external one: by default route, name, address, regular expression, reachability; and which address peers are told.

use overlay_agent::model::api::Status;
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, Story, kernel};
use overlayctl::lab::Families;

/// Hosts with a second interface, `eth1`, with 10.98.0.N/24, behind which 10.97.0.0/16 is reached.
async fn two_interfaces(hosts: u16) -> Story {
    let story = Story::without_agents(hosts, Families::V4).await;
    for number in 1..=hosts {
        kernel::shell(
            &story,
            &format!("h{number}"),
            &format!(
                "ip link add eth1 type veth peer name wall; ip link set wall up; ip link set eth1 up
                 ip address add 10.98.0.{number}/24 dev eth1; ip route add 10.97.0.0/16 via 10.98.0.254"
            ),
        );
    }
    story
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_choose() {
    // Each on a host of its own: a host that comes back with another address first has to show that it is no copy.
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
    let story = two_interfaces(9).await;
    for (number, (flag, interface, public_ip, local)) in (1..).zip(ways) {
        let name = format!("h{number}");
        let host = story.at(&name);
        let flags: Vec<&str> = std::iter::once(flag).filter(|f| !f.is_empty()).collect();
        host.agent_start(&flags).must("start");
        let underlay = host.wait_ready(READY).await.must(&format!("ready with {flags:?}")).underlay.must("an underlay");
        let device = kernel::link(&story, &name, "ovx.1").must("ovx.1");
        let data = &device["linkinfo"]["info_data"];
        let told = underlay.public_ip.v4.must("an address").to_string();
        let found = (underlay.interface.as_str(), told.as_str(), kernel::text(data, "local"));
        assert_eq!(found, (interface, public_ip, local.to_owned()), "{flags:?}");
        assert_eq!(kernel::text(data, "link"), interface);
        let lease = story.lease_of(&name).value;
        assert!(lease.contains(&format!("\"PublicIP\":\"{public_ip}\"")), "the lease says so, too: {lease}");
    }
    // A peer sends to the address that it is told.
    let behind = kernel::listed(&story, "h1", "bridge", &["fdb", "show", "dev", "ovx.1"]);
    assert!(behind.iter().any(|fdb| kernel::text(fdb, "dst") == "198.51.100.7"), "{behind:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_named_with_the_candidates() {
    let story = two_interfaces(1).await;
    let candidates = ["eth0 (10.99.1.1)", "eth1 (10.98.0.1)"];
    for (flag, wanted) in [
        ("--iface=wlan9", "--iface: this host has no interface wlan9"),
        ("--iface-regex=^wlan", "--iface-regex: `^wlan` matches no interface"),
        ("--iface=lo", "--iface: this host has no interface lo"),
    ] {
        let host = story.at("h1");
        host.agent_start(&[flag]).must("start");
        let named = |s: &Status| !s.ready && s.problems.iter().any(|p| p.contains(wanted));
        let status = host.wait_status(SOON, wanted, named).await.must(flag);
        let problem = status.problems.iter().find(|p| p.contains(wanted)).must(wanted);
        assert!(candidates.iter().all(|c| problem.contains(c)), "{problem}");
        assert!(kernel::link(&story, "h1", "ovx.1").is_none() && overlay_tests::etcd::leases(&story).is_empty());
        story.logged("h1", &[wanted]).await;
        host.agent_stop(nix::sys::signal::Signal::SIGTERM).must("stop");
    }
}

/// As in flannel's own example: the hosts' addresses lie in the network, outside the range that is leased.
#[tokio::test(flavor = "multi_thread")]
async fn underlay_in_the_network_but_outside_the_pool_works() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.networks.v4 = "10.0.0.0/8".parse().ok();
        let bounds = [("SubnetMin", "10.10.0.0"), ("SubnetMax", "10.90.0.0")];
        options.config.extend(bounds.map(|(field, address)| (field.to_owned(), address.into())));
    })
    .await;
    story.assert_all_reach().await;
    for (host, other) in [("h1", "10.99.1.2"), ("h2", "10.99.1.1")] {
        story.settled(host, SOON).await;
        let status = story.status(host).await;
        assert!(status.ready && status.problems.is_empty(), "{:?}", status.problems);
        // A host has no way back to a container of another one but by the address of the container's host.
        let container = format!("{host}-c1");
        kernel::shell(&story, &container, &format!("ping -c 1 -W 5 {other}"));
        let remote = if host == "h1" { "h2" } else { "h1" };
        let address = story.endpoints(remote)[0].addresses().v4.must("an address");
        kernel::shell(&story, host, &format!("ping -c 1 -W 5 {address}"));
        let state = story.at(host).state_dir();
        story.ctl(host, &["check", "--state-dir", &state.to_string_lossy()]).exits(0);
        let traced = story.ctl(host, &["trace", "c1", other]).exits(0);
        assert!(!traced.out.contains("in the overlay"), "{}", traced.out);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn public_ip_among_the_leased_subnets_is_named_on_both_hosts() {
    let story = Story::without_agents(2, Families::V4).await;
    for (host, flags) in [("h1", &["--public-ip=10.244.9.9"][..]), ("h2", &[])] {
        story.at(host).agent_start(flags).must("start");
        story.at(host).wait_ready(READY).await.must(host);
    }
    for (host, words) in
        [("h1", "this host's address 10.244.9.9 lies among"), ("h2", "PublicIP is 10.244.9.9: must not lie among")]
    {
        let named = |s: &Status| s.problems.iter().any(|problem| problem.contains(words));
        story.at(host).wait_status(SOON, words, named).await.must(host);
    }
}

/// The interface comes later than the agent: no restart is needed.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_comes_late() {
    let story = Story::without_agents(1, Families::V4).await;
    let host = story.at("h1");
    host.agent_start(&["--iface=late0"]).must("start");
    host.wait_status(SOON, "it does not wait", |s| s.problems.iter().any(|p| p.contains("late0"))).await.must("h1");
    kernel::shell(
        &story,
        "h1",
        "ip link add late0 type veth peer name wall; ip link set wall up; ip link set late0 up
         ip address add 10.98.0.1/24 dev late0",
    );
    let status = host.wait_ready(READY).await.must("ready");
    assert_eq!(status.underlay.must("an underlay").interface, "late0");
}

/// Its MTU changes: so does the overlay's, the containers' new interfaces included.
#[tokio::test(flavor = "multi_thread")]
async fn its_mtu_changes() {
    let story = Story::up(|options| {
        options.hosts = 1;
        options.containers = 1;
    })
    .await;
    kernel::run(&story, "h1", &["ip", "link", "set", "eth0", "mtu", "1400"]);
    story.at("h1").wait_status(SOON, "MTU 1350", |s| s.data_path.mtu == Some(1350) && s.ready).await.must("h1");
    story.settled("h1", SOON).await;
    let attached = story.at("h1").attach("late").await.must("attach");
    assert_eq!(attached.mtu, Some(1350));
    let env = std::fs::read_to_string(story.at("h1").run_dir().join("subnet.env")).must("subnet.env");
    assert!(env.contains("FLANNEL_MTU=1350\n"), "{env}");
}
