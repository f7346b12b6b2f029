//! Joining, leaving and deleting a network touches no other one: not one kernel notification, not one packet.

use overlay_agent::model::Family;
use overlay_tests::networks::{self, attach_to_each};
use overlay_tests::notify::{Notifications, OBSERVATION_PERIOD};
use overlay_tests::ping::PingFlow;
use overlay_tests::prober::Prober;
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::wait::eventually_async;
use overlay_tests::{ExpectContext, TestLab, kernel};

/// The hosts of the networks.
const HOSTS: [&str; 2] = ["h1", "h2"];

/// The notifications of a host's namespace that concern other networks than the named one: all but those of the given interfaces
/// and of the rules.
fn foreign(notifications: &Notifications, interfaces: &[u64]) -> Vec<String> {
    let of_interface = |line: &String| interfaces.iter().any(|index| line.contains(&format!("interface {index},")));
    let of_rules_or_kernel =
        |line: &String| line.starts_with("nftables") || line.contains("proto 2,") || line.starts_with("netconf");
    notifications.drain().into_iter().filter(|line| !of_interface(line) && !of_rules_or_kernel(line)).collect()
}

/// Three hosts; the first two are in blue, and ping each other there.
struct Fixture {
    lab: TestLab,
    flow: PingFlow,
    /// In these nothing may change at all: the namespaces of blue, and a host that is in neither network.
    untouched: Vec<(String, Notifications)>,
    host: Notifications,
}

impl Fixture {
    async fn new() -> Fixture {
        let lab = TestLab::up(|options| {
            options.containers = 1;
            options.agent_args.push(networks::LEAVE_AFTER.to_owned());
        })
        .await;
        networks::create_all(&lab, &["blue", "green"]);
        let blue = attach_to_each(&lab, "blue", &HOSTS).await;
        let flow = networks::ping(&lab, "h1-blue-c1", "h2-blue-c1", &blue[1], Family::V4).await;
        let subscribe = |target: &str| Notifications::subscribe(&lab.open_netns(target));
        let untouched = ["h1.blue", "h2.blue", "h3"].map(|target| (target.to_owned(), subscribe(target)));
        let host = subscribe("h1");
        for (_, notifications) in &untouched {
            notifications.wait_quiet().await;
        }
        host.wait_quiet().await;
        Fixture { lab, flow, untouched: untouched.into(), host }
    }

    /// Checks that nothing else changed than the rules of the hosts and interfaces with these indexes.
    async fn assert_untouched(&self, interfaces: &[u64], context: &str) {
        tokio::time::sleep(OBSERVATION_PERIOD).await;
        networks::assert_quiet(&self.untouched, context);
        let changes = foreign(&self.host, interfaces);
        assert!(changes.is_empty(), "{context}: entries of other networks changed: {changes:#?}");
    }

    /// The indexes of the transit of green, and of the external interface: the kernel reports it as well when a VXLAN device is
    /// created on it (`netdev_upper_dev_link`).
    fn interfaces(&self) -> [u64; 2] {
        let transit = format!("ovt.{}", networks::vni(&self.lab, "green"));
        ["eth0", &transit].map(|name| kernel::number(&kernel::link(&self.lab, "h1", name).expect_ok(name), "ifindex"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn join_touches_no_other_network() {
    let fixture = Fixture::new().await;
    let default = fixture.lab.start_ping("h1-c1", "h3-c1", Family::V4).await;
    let prober = Prober::start(&fixture.lab).await;
    attach_to_each(&fixture.lab, "green", &HOSTS).await;
    let interfaces = fixture.interfaces();
    fixture.assert_untouched(&interfaces, "two hosts joined another network").await;
    networks::attach(&fixture.lab, "h1", "green", "green-c2").await;
    for container in ["green-c2", "green-c1"] {
        networks::detach(&fixture.lab, "h1", "green", container).await;
    }
    fixture.assert_untouched(&interfaces, "containers came and went there").await;
    prober.stop("a join").await;
    fixture.flow.stop().await.assert_no_loss("the other isolated network");
    default.stop().await.assert_no_loss("the default network");
}

/// Some minutes after its last container. The network's record can then be removed.
#[tokio::test(flavor = "multi_thread")]
async fn leave_and_removal_touch_no_other_network() {
    let fixture = Fixture::new().await;
    let lab = &fixture.lab;
    attach_to_each(lab, "green", &HOSTS).await;
    let interfaces = fixture.interfaces();
    for host in HOSTS {
        networks::detach(lab, host, "green", "green-c1").await;
    }
    networks::network_command(lab, &["rm", "green"]).assert_code(1).assert_stderr_contains(&[
        "green is in use by",
        "h1 (",
        "h2 (",
    ]);
    for host in HOSTS {
        networks::wait_left(lab, host, "green").await;
    }
    fixture.assert_untouched(&interfaces, "two hosts left another network").await;
    networks::network_command(lab, &["rm", "green"]).assert_code(0);
    fixture.assert_untouched(&interfaces, "it was removed").await;
    fixture.flow.stop().await.assert_no_loss("the other isolated network");
}

/// A network of the setting `networks` is joined once it exists. Until then the status says why not.
#[tokio::test(flavor = "multi_thread")]
async fn network_of_the_settings_is_joined_once_it_exists() {
    let lab = TestLab::up(|options| {
        options.hosts = 1;
        options.agent_args.push("--networks=red".to_owned());
    })
    .await;
    eventually_async("the missing network is a problem", CONVERGE_TIMEOUT, || async {
        let problems = lab.status("h1").await.problems.join("; ");
        if problems.contains("cannot join network red: no network red") { Ok(()) } else { Err(problems) }
    })
    .await;
    networks::create_all(&lab, &["red"]);
    // Not the namespace, which the agent makes before it lists the network.
    eventually_async("h1 has joined red", CONVERGE_TIMEOUT, || async {
        let listed = lab.host("h1").client().networks().await.expect_ok("networks");
        if listed.networks.iter().any(|entry| entry.name == networks::name("red")) { Ok(()) } else { Err(format!("{listed:?}")) }
    })
    .await;
    networks::wait_ready(&lab, "red", &["h1"]).await;
    assert_eq!(lab.status("h1").await.problems, Vec::<String>::new());
}
