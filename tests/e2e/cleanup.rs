//! `overlayd cleanup` restores the host to its state before the agent's first run.

use nix::sys::signal::Signal;
use overlay_tests::dump::NetnsDump;
use overlay_tests::programs::CommandOutput;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, REPAIR_DEADLINE};
use overlay_tests::{ExpectContext, TestLab, etcd, eventually_true, kernel};
use overlayctl::lab::Families;

fn run_cleanup(lab: &TestLab, host: &str) -> CommandOutput {
    let mut command = lab.overlayd_command(host, lab.host(host).run_dir(), lab.host(host).state_dir());
    command.arg("cleanup");
    lab.run_to_exit(host, command)
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_restores_host_state() {
    let lab = TestLab::without_agents(2, Families::Dual).await;
    // The host's own configuration, which must not change.
    kernel::shell(
        &lab,
        "h1",
        "ip route add 10.50.0.0/16 via 10.99.0.254; ip route add 10.51.0.0/16 via 10.99.0.254 proto static table 77
         ip rule add from 10.51.0.0/16 table 77; ip nexthop add id 5 via 10.99.0.254 dev eth0; ip route add 10.52.0.0/16 nhid 5
         ip link add own type bridge; ip link set own up; ip address add 10.53.0.1/24 dev own
         ip neigh add 10.53.0.9 lladdr 02:00:00:00:00:09 dev own nud permanent
         nft add table inet own; nft 'add chain inet own c { type filter hook forward priority 0; }'; nft add rule inet own c counter accept
         echo 1 >/proc/sys/net/ipv4/ip_forward",
    );
    // Duplicate address detection changes flags for a second or two.
    overlay_tests::notify::Notifications::subscribe(&lab.open_netns("h1")).wait_quiet().await;
    let before = [NetnsDump::of(&lab.open_netns("h1")), NetnsDump::of(&lab.open_netns("h2"))];
    lab.start_agent("h1").await;
    lab.start_agent("h2").await;
    lab.wait_full_mesh().await;
    for host in ["h1", "h2"] {
        for container in ["c1", "c2"] {
            lab.host(host).attach(container).await.expect_ok("attach");
        }
    }
    lab.assert_full_reachability().await;
    assert_eq!(etcd::leases(&lab).len(), 2);

    for (number, host) in ["h1", "h2"].into_iter().enumerate() {
        assert!(!NetnsDump::of(&lab.open_netns(host)).changes_since(&before[number]).is_empty(), "the agent changed the host");
        lab.host(host).agent_stop(Signal::SIGTERM).expect_ok("stop");
        let (run_dir, state_dir) = (lab.host(host).run_dir(), lab.host(host).state_dir());
        run_cleanup(&lab, host).assert_code(0);
        let changes = NetnsDump::of(&lab.open_netns(host)).changes_since(&before[number]);
        assert!(changes.is_empty(), "{host} has changed:\n{changes}");
        assert_eq!(etcd::leases(&lab).len(), 1 - number, "the lease of {host} is gone");
        assert!(!run_dir.exists(), "{} is gone", run_dir.display());
        assert!(!state_dir.exists(), "{} is gone", state_dir.display());
        let inside = kernel::list_json(&lab, &format!("{host}-c1"), "ip", &["link", "show"]);
        assert_eq!(inside.len(), 1, "the containers keep only their loopback device: {inside:#?}");
        // A second run has nothing to do.
        run_cleanup(&lab, host).assert_code(0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_keeps_reservation() {
    let lab = TestLab::without_agents(1, Families::V4).await;
    lab.start_agent("h1").await;
    let lease = lab.lease_of("h1");
    // The operator turns it into a reservation: a key without an etcd lease.
    etcd::put(&lab, &lease.key, &lease.value);
    lab.host("h1")
        .wait_status(CONVERGE_TIMEOUT, "the reservation is not noticed", |s| {
            s.ready && s.lease.as_ref().is_some_and(|l| l.reservation)
        })
        .await
        .expect_ok("status");
    let kept = lab.lease_of("h1");
    assert_eq!((&kept.key, kept.lease), (&lease.key, 0), "it never becomes a lease again");
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    run_cleanup(&lab, "h1").assert_code(0);
    assert_eq!(etcd::leases(&lab), [kept], "only its owner deletes it");
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_is_refused_while_agent_runs() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let before = kernel::actual_state(&lab, "h1");
    run_cleanup(&lab, "h1").assert_code(1).assert_stderr_contains(&["cleanup needs the agent stopped"]);
    // With other directories it is still the same namespace.
    let mut elsewhere = lab.overlayd_command("h1", lab.dir().join("other/run"), lab.dir().join("other/state"));
    elsewhere.arg("cleanup");
    lab.run_to_exit("h1", elsewhere).assert_code(1).assert_stderr_contains(&["stop"]);
    assert_eq!(kernel::difference(&kernel::actual_state(&lab, "h1"), &before), "", "nothing was touched");
    assert_eq!(etcd::leases(&lab).len(), 2);
    lab.assert_full_reachability().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_withdraws_lease_and_works_without_etcd() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 0;
    })
    .await;
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    run_cleanup(&lab, "h1").assert_code(0);
    let routes = |host: &str| {
        kernel::list_json(&lab, host, "ip", &["route", "show", "proto", kernel::ROUTE_PROTOCOL, "type", "unicast"]).len()
    };
    eventually_true("h2 has no route to h1", REPAIR_DEADLINE, || routes("h2") == 0).await;

    lab.host("h2").agent_stop(Signal::SIGTERM).expect_ok("stop");
    etcd::kill(&lab);
    let output = run_cleanup(&lab, "h2").assert_code(1).assert_stderr_contains(&["lease in etcd is not released"]);
    assert!(kernel::link(&lab, "h2", "ovx.1").is_none(), "the kernel is cleaned all the same: {}", output.stderr);
    etcd::start(&lab).await;
    run_cleanup(&lab, "h2").assert_code(0);
    assert_eq!(etcd::leases(&lab), [], "a second run deletes the lease");
}
