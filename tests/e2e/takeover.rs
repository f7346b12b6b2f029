//! Hosts of earlier releases: the agent takes over their state directory, lease and kernel state under traffic.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_tests::notify::{Notifications, OBSERVATION_PERIOD};
use overlay_tests::recorded_host::{CONTAINERS, HOST, PEER, rebuild};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, etcd, kernel, ping::PingFlow};
use overlayctl::lab::Families;

/// A host in the state of an earlier release, with flows through it.
struct TakeOver {
    lab: TestLab,
    flows: Vec<(Family, PingFlow)>,
    notifications: Notifications,
    revision: i64,
}

impl TakeOver {
    /// Rebuilds the host; its containers reach another host before the present agent starts.
    async fn begin(release: &str) -> TakeOver {
        let lab = TestLab::without_agents(2, Families::Dual).await;
        rebuild(&lab, release);
        lab.start_agent(PEER).await;
        lab.host(PEER).attach("c1").await.expect_ok("attach a container to the peer");
        let mut flows = Vec::new();
        for family in Family::ALL {
            flows.push((family, lab.start_ping(&format!("{HOST}-c1"), &format!("{PEER}-c1"), family).await));
        }
        let notifications = Notifications::subscribe(&lab.open_netns(HOST));
        notifications.wait_quiet().await;
        let revision = etcd::revision(&lab);
        TakeOver { lab, flows, notifications, revision }
    }

    /// Starts the present agent. Returns the kernel's notifications until it has been idle for a while.
    async fn start(&self) -> Vec<String> {
        self.lab.host(HOST).agent_start(&[]).expect_ok("start the agent");
        let status = self.lab.host(HOST).wait_ready(READY_TIMEOUT).await.expect_ok("ready");
        assert_eq!(status.data_path.peers, 1, "{:?}", status.data_path);
        tokio::time::sleep(OBSERVATION_PERIOD).await;
        self.notifications.drain()
    }

    /// Checks the taken-over host.
    async fn check(&self, release: &str) {
        let names: Vec<String> = self.lab.endpoints(HOST).iter().map(|endpoint| endpoint.name.to_string()).collect();
        assert_eq!(names, CONTAINERS, "the endpoints of {release}");
        assert_eq!(etcd::revision(&self.lab), self.revision, "etcd's revision: nothing was written");
        self.lab.wait_converged(HOST, CONVERGE_TIMEOUT).await;
    }

    /// Lets the host join an isolated network, and checks that no entry of the default network changes.
    async fn join_isolated_network(&self) {
        let links = kernel::list_json(&self.lab, HOST, "ip", &["link", "show"]);
        let ours = links.iter().filter(|link| kernel::text(link, "ifalias") == "overlayd");
        let ours: BTreeSet<u64> = ours.map(|link| kernel::number(link, "ifindex")).collect();
        let guard = || kernel::run(&self.lab, HOST, &["nft", "-s", "-a", "list", "table", "bridge", "overlayd"]);
        let guard_before = guard();
        self.lab.ctl(HOST, &["network", "create", "blue", "--cidr", "10.0.0.0/16"]).assert_code(0);
        self.lab.ctl(HOST, &["attach", "first", "--network", "blue"]).assert_code(0);
        tokio::time::sleep(OBSERVATION_PERIOD).await;
        let notifications = self.notifications.drain();
        // The table `inet overlayd` and the sysctls have parts of every network; the kernel adds the routes of an address.
        let is_of_new_network = |line: &String| {
            let interface = line.split_once("interface ").and_then(|(_, rest)| rest.split(',').next()?.parse().ok());
            // The kernel reports the external interface when another VXLAN device uses it.
            let is_other_interface = interface.is_some_and(|index| !ours.contains(&index));
            is_other_interface || line.starts_with("nftables ") || line.starts_with("netconf: ") || line.contains("proto 2, ")
        };
        let others: Vec<&String> = notifications.iter().filter(|line| !is_of_new_network(line)).collect();
        assert!(!notifications.is_empty() && others.is_empty(), "entries of the default network changed: {others:#?}");
        assert_eq!(guard(), guard_before, "the rules of the default network's containers");
    }

    /// Checks that no packet was lost.
    async fn end(self, release: &str) {
        for (family, flow) in self.flows {
            flow.stop().await.assert_no_loss(&format!("{family} while a host of {release} was taken over"));
        }
    }
}

/// The last release before named networks: its state is today's.
#[tokio::test(flavor = "multi_thread")]
async fn last_release_is_taken_over_without_a_write() {
    let host = TakeOver::begin("d10706e").await;
    let notifications = host.start().await;
    assert!(notifications.is_empty(), "the kernel reports changes:\n  {}", notifications.join("\n  "));
    host.check("d10706e").await;
    host.join_isolated_network().await;
    host.end("d10706e").await;
}

/// An earlier release had no unreachable routes, fewer sysctls and another table `inet overlayd`: only these are written.
#[tokio::test(flavor = "multi_thread")]
async fn earlier_release_is_taken_over_with_its_differences() {
    let host = TakeOver::begin("c1e2695").await;
    let notifications = host.start().await;
    let is_expected = |line: &String| ["new route: ", "netconf: ", "nftables "].iter().any(|kind| line.starts_with(kind));
    let others: Vec<&String> = notifications.iter().filter(|line| !is_expected(line)).collect();
    assert!(!notifications.is_empty() && others.is_empty(), "other entries changed: {others:#?}");
    // Afterwards nothing differs any more.
    host.lab.host(HOST).agent_stop(Signal::SIGTERM).expect_ok("stop the agent");
    let notifications = host.start().await;
    assert!(notifications.is_empty(), "the second start changes the kernel:\n  {}", notifications.join("\n  "));
    host.check("c1e2695").await;
    host.end("c1e2695").await;
}
