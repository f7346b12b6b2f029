//! Hosts of earlier releases: the agent takes over their state directory, lease and kernel state under traffic.

use overlay_agent::model::Family;
use overlay_tests::notify::{Notifications, OBSERVATION_PERIOD};
use overlay_tests::recorded_host::{CONTAINERS, HOST, PEER, rebuild};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, etcd, ping::PingFlow};
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

    /// Checks the taken-over host, and that no packet was lost.
    async fn end(self, release: &str) {
        let names: Vec<String> = self.lab.endpoints(HOST).iter().map(|endpoint| endpoint.name.to_string()).collect();
        assert_eq!(names, CONTAINERS, "the endpoints of {release}");
        assert_eq!(etcd::revision(&self.lab), self.revision, "etcd's revision: nothing was written");
        self.lab.wait_converged(HOST, CONVERGE_TIMEOUT).await;
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
    host.lab.host(HOST).agent_stop(nix::sys::signal::Signal::SIGTERM).expect_ok("stop the agent");
    let notifications = host.start().await;
    assert!(notifications.is_empty(), "the second start changes the kernel:\n  {}", notifications.join("\n  "));
    host.end("c1e2695").await;
}
