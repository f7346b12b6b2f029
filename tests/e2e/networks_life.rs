//! Faults in the life of isolated networks. Isolation holds during each: a prober sends between all networks meanwhile, and any
//! packet that crosses fails the test.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Family;
use overlay_agent::model::api::AttachResponse;
use overlay_tests::dump::NetnsDump;
use overlay_tests::networks;
use overlay_tests::notify::{Notifications, OBSERVATION_PERIOD};
use overlay_tests::ping::{PingFlow, PingStats};
use overlay_tests::prober::Prober;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, etcd, eventually, eventually_true, kernel};
use overlayctl::lab::{Lab, LabOptions, underlay};

const HOSTS: [&str; 2] = ["h1", "h2"];
const NETWORKS: [&str; 2] = ["blue", "green"];

/// Time limit for the name of a namespace to return.
const NAME_TIMEOUT: Duration = Duration::from_secs(90);

/// Pings that may be lost while a repair takes milliseconds, at 100 per second.
const REPAIR_LOSS: usize = 30;

/// Two hosts with two isolated networks of one range. Pings go from each network's container on the first host to that on the
/// second one.
struct Story {
    lab: TestLab,
    containers: BTreeMap<(&'static str, &'static str), AttachResponse>,
    flows: BTreeMap<&'static str, PingFlow>,
    prober: Prober,
    /// The hosts' entries at the start.
    states: BTreeMap<&'static str, BTreeSet<String>>,
}

impl Story {
    async fn begin() -> Story {
        Story::begin_with(|_| {}).await
    }

    async fn begin_with(configure: impl FnOnce(&mut LabOptions)) -> Story {
        let lab = TestLab::up(|options| {
            options.hosts = 2;
            options.containers = 0;
            configure(options);
        })
        .await;
        networks::create_all(&lab, &NETWORKS);
        let mut containers = BTreeMap::new();
        for network in NETWORKS {
            let attached = networks::attach_to_each(&lab, network, &HOSTS).await;
            containers.extend(HOSTS.into_iter().map(|host| (host, network)).zip(attached));
        }
        let mut flows = BTreeMap::new();
        for network in NETWORKS {
            flows.insert(network, start_flow(&lab, network, &containers[&("h2", network)]).await);
        }
        let prober = Prober::start(&lab).await;
        let states = HOSTS.into_iter().map(|host| (host, networks::host_state(&lab, host))).collect();
        Story { lab, containers, flows, prober, states }
    }

    /// Subscriptions in both hosts and their networks.
    async fn subscribe(&self) -> Vec<(String, Notifications)> {
        let mut kernels = Vec::new();
        for host in HOSTS {
            kernels.extend(networks::subscribe(&self.lab, host).await);
        }
        kernels
    }

    /// Lets the flows get some replies.
    async fn run_for_replies(&self) {
        for flow in self.flows.values() {
            flow.run_for_replies(10).await;
        }
    }

    /// Waits until a host has the entries of the start, and all networks' pings are answered.
    async fn wait_repaired(&self, host: &str, context: &str) {
        networks::wait_state(&self.lab, host, &self.states[host], context).await;
        self.run_for_replies().await;
        self.prober.assert_isolated(context);
    }

    /// Replaces the flow of a network whose containers were cut off; the losses of the old one do not count.
    async fn restart_flow(&mut self, network: &'static str) {
        let old = self.flows.remove(network).expect_ok(network);
        old.stop().await;
        self.flows.insert(network, start_flow(&self.lab, network, &self.containers[&("h2", network)]).await);
    }

    /// Ends the story. Checks that nothing crossed and that containers reach each other and the world; returns the flows.
    async fn end(self, context: &str) -> BTreeMap<&'static str, PingStats> {
        self.prober.stop(context).await;
        self.lab.assert_full_reachability().await;
        let mut all = BTreeMap::new();
        for (network, flow) in self.flows {
            let stats = flow.stop().await;
            println!("{context}, {network}: {} of {} pings lost", stats.lost.len(), stats.sent);
            all.insert(network, stats);
        }
        all
    }

    async fn end_without_loss(self, context: &str) {
        for (network, stats) in self.end(context).await {
            stats.assert_no_loss(&format!("{context}, {network}"));
        }
    }

    async fn end_with_loss(self, limit: usize, context: &str) {
        for (network, stats) in self.end(context).await {
            assert!(stats.lost.len() <= limit, "{context}, {network}: {} pings lost, {limit} are allowed", stats.lost.len());
        }
    }

    fn restart(&self, host: &str, signal: Signal) {
        self.lab.host(host).agent_stop(signal).expect_ok("stop the agent");
    }

    async fn start(&self, host: &str) {
        self.lab.start_agent(host).await;
        for network in NETWORKS {
            networks::wait_ready(&self.lab, network, &HOSTS).await;
        }
    }
}

async fn start_flow(lab: &TestLab, network: &str, to: &AttachResponse) -> PingFlow {
    networks::ping(lab, &format!("h1-{network}-c1"), &format!("h2-{network}-c1"), to, Family::V4).await
}

/// The prober detects a way between two networks that was opened by hand.
#[tokio::test(flavor = "multi_thread")]
async fn prober_detects_opened_ways() {
    let story = Story::begin().await;
    let Story { lab, prober, .. } = &story;
    let green = networks::namespace_name(lab, "h1", "green");
    let [blue_bridge, green_bridge] = NETWORKS.map(|network| format!("ovb.{}", networks::vni(lab, network)));
    kernel::shell(
        lab,
        "h1.blue",
        &format!(
            "ip link add way type veth peer name way netns {green}; ip link set way master {blue_bridge}; ip link set way up
             ip netns exec {green} ip link set way master {green_bridge}; ip netns exec {green} ip link set way up"
        ),
    );
    eventually("a link between the bridges is a way", CONVERGE_TIMEOUT, || {
        let found = prober.crossings();
        let is_found =
            |from: &str, to: &str| found.iter().any(|crossing| crossing.from_network == from && crossing.to_network == to);
        if is_found("blue", "green") && is_found("green", "blue") { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
}

/// Killed, stopped, and replaced by another binary: nothing is written and no packet is lost.
#[tokio::test(flavor = "multi_thread")]
async fn agent_restart_and_upgrade_write_nothing() {
    let dir = tempfile::tempdir().expect_ok("a directory");
    let binary = dir.path().join("overlayd");
    std::fs::copy(overlay_tests::programs::overlayd(), &binary).expect_ok("a copy of the agent");
    let installed = binary.clone();
    let story = Story::begin_with(|options| options.overlayd = Some(installed)).await;
    let kernels = story.subscribe().await;
    let revision = etcd::revision(&story.lab);
    for (host, signal) in [("h1", Signal::SIGKILL), ("h2", Signal::SIGTERM), ("h1", Signal::SIGTERM)] {
        story.restart(host, signal);
        story.run_for_replies().await;
        if signal == Signal::SIGTERM {
            // As a package manager does: another file of that name.
            let new = dir.path().join("overlayd.new");
            std::fs::copy(&binary, &new).expect_ok("another copy");
            std::fs::rename(&new, &binary).expect_ok("replace the agent");
        }
        story.start(host).await;
        tokio::time::sleep(OBSERVATION_PERIOD).await;
        networks::assert_quiet(&kernels, &format!("after {signal} and the start of the agent of {host}"));
        for network in NETWORKS {
            let status = story.lab.host(host).client_of(&networks::name(network)).status().await.expect_ok(network);
            assert_eq!(status.data_path.drift_repairs, 0, "{host}, {network}: nothing had to be repaired");
        }
    }
    assert_eq!(etcd::revision(&story.lab), revision, "etcd's revision: nothing was written");
    story.end_without_loss("restarts and an upgrade").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_outage_changes_nothing() {
    let story = Story::begin().await;
    let kernels = story.subscribe().await;
    let before = NETWORKS.map(|network| networks::leases(&story.lab, network));
    etcd::kill(&story.lab);
    story.run_for_replies().await;
    // A start without etcd knows its networks from the state directory.
    story.restart("h1", Signal::SIGKILL);
    story.lab.host("h1").agent_start(&[]).expect_ok("start");
    tokio::time::sleep(Duration::from_secs(3)).await;
    networks::assert_quiet(&kernels, "while etcd is away");
    etcd::start(&story.lab).await;
    for network in NETWORKS {
        networks::wait_ready(&story.lab, network, &HOSTS).await;
    }
    tokio::time::sleep(OBSERVATION_PERIOD).await;
    networks::assert_quiet(&kernels, "after etcd's return");
    assert_eq!(NETWORKS.map(|network| networks::leases(&story.lab, network)), before, "the leases");
    story.end_without_loss("an outage of etcd").await;
}

/// `ip netns delete` of a network's namespace while the agent runs: only the name is gone, and it returns.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_namespace_name_returns() {
    let story = Story::begin().await;
    let kernels = story.subscribe().await;
    let before = story.lab.open_netns("h1.blue").id().expect_ok("its id");
    Netns::delete(&networks::namespace_name(&story.lab, "h1", "blue")).expect_ok("delete the name");
    // The agent looks for it once a minute.
    eventually_true("the name is back", NAME_TIMEOUT, || networks::has_namespace(&story.lab, "h1", "blue")).await;
    assert_eq!(story.lab.open_netns("h1.blue").id().expect_ok("its id"), before, "it is the same namespace");
    story.run_for_replies().await;
    networks::assert_quiet(&kernels, "after the name was deleted");
    story.end_without_loss("a deleted name").await;
}

/// The same while the agent is stopped: the namespace is gone with all its devices. The next start rebuilds it with its endpoints.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_namespace_is_rebuilt_at_start() {
    let mut story = Story::begin().await;
    let green = networks::subscribe(&story.lab, "h1").await;
    let green: Vec<_> = green.into_iter().filter(|(target, _)| target == "h1.green").collect();
    story.restart("h1", Signal::SIGKILL);
    Netns::delete(&networks::namespace_name(&story.lab, "h1", "blue")).expect_ok("delete the namespace");
    eventually_true("the kernel has destroyed it", CONVERGE_TIMEOUT, || kernel::link(&story.lab, "h1-blue-c1", "eth0").is_none())
        .await;
    story.start("h1").await;
    networks::wait_state(&story.lab, "h1", &story.states["h1"], "after the start").await;
    story.restart_flow("blue").await;
    networks::assert_quiet(&green, "while the other network was rebuilt");
    let stats = story.end("a namespace that was deleted without an agent").await;
    stats["green"].assert_no_loss("the other network");
    stats["blue"].assert_no_loss("the rebuilt network");
}

/// All rules of the host and of a network are deleted. Nothing crosses, also before they are back.
#[tokio::test(flavor = "multi_thread")]
async fn flushed_rules_open_no_way() {
    let story = Story::begin().await;
    for target in ["h1", "h1.blue", "h1.green", "h2", "h2.green"] {
        // With the agents' repair, and for a second without it.
        for frozen in [false, true] {
            let host = target.split('.').next().expect_ok("a host");
            let agent = story.lab.host(host).agent().expect_ok("an agent");
            if frozen {
                agent.signal(Signal::SIGSTOP).expect_ok("SIGSTOP");
            }
            kernel::run(&story.lab, target, &["nft", "flush", "ruleset"]);
            if frozen {
                tokio::time::sleep(Duration::from_secs(1)).await;
                story.prober.assert_isolated(&format!("{target} without rules"));
                agent.signal(Signal::SIGCONT).expect_ok("SIGCONT");
            }
            story.wait_repaired(host, &format!("after the rules of {target} were flushed")).await;
        }
    }
    story.end_with_loss(REPAIR_LOSS, "flushed rules").await;
}

/// Devices of a network are deleted in both namespaces, and each returns.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_devices_return() {
    let mut story = Story::begin().await;
    let vni = networks::vni(&story.lab, "blue");
    let green = networks::subscribe(&story.lab, "h1").await;
    let green: Vec<_> = green.into_iter().filter(|(target, _)| target == "h1.green").collect();
    for (target, device) in [("h1.blue", "ovx"), ("h1.blue", "ovt"), ("h1", "ovt"), ("h1.blue", "ovb")] {
        let device = format!("{device}.{vni}");
        kernel::run(&story.lab, target, &["ip", "link", "delete", &device]);
        story.wait_repaired("h1", &format!("after {device} of {target} was deleted")).await;
    }
    networks::assert_quiet(&green, "while devices of the other network were recreated");
    story.restart_flow("blue").await;
    story.end("deleted devices").await["green"].assert_no_loss("the other network");
}

/// The VNI of a network with endpoints changes: it moves, the other one notices nothing.
#[tokio::test(flavor = "multi_thread")]
async fn changed_vni_is_followed() {
    let mut story = Story::begin().await;
    let green = networks::subscribe(&story.lab, "h2").await;
    let green: Vec<_> = green.into_iter().filter(|(target, _)| target == "h2.green").collect();
    let old = networks::vni(&story.lab, "blue");
    networks::network_command(&story.lab, &["set", "blue", "--vni", "7000"]).assert_code(0);
    for host in HOSTS {
        let target = format!("{host}.blue");
        eventually(&format!("{host} has the new devices only"), READY_TIMEOUT, || {
            let has = |device: &str, vni: u64| kernel::link(&story.lab, &target, &format!("{device}.{vni}")).is_some();
            let missing = ["ovx", "ovb", "ovt"].iter().find(|device| !has(device, 7000) || has(device, old));
            missing.map_or(Ok(()), |device| Err((*device).to_owned()))
        })
        .await;
        let stale = kernel::link(&story.lab, host, &format!("ovt.{old}"));
        assert!(stale.is_none() && kernel::link(&story.lab, host, "ovt.7000").is_some(), "the transit of {host}: {stale:?}");
    }
    networks::wait_ready(&story.lab, "blue", &HOSTS).await;
    story.restart_flow("blue").await;
    networks::assert_quiet(&green, "while the other network's VNI changed");
    let stats = story.end("a changed VNI").await;
    stats["green"].assert_no_loss("the other network");
    stats["blue"].assert_no_loss("the changed network");
}

/// A reboot: all namespaces of the host are gone, and with them its containers. The state directory remains.
#[tokio::test(flavor = "multi_thread")]
async fn rebooted_host_keeps_its_networks() {
    let story = Story::begin().await;
    let leases =
        |lab: &TestLab| NETWORKS.map(|network| networks::leases(lab, network).into_iter().map(|l| l.key).collect::<Vec<_>>());
    let before = leases(&story.lab);
    let Story { lab, containers, flows, prober, .. } = story;
    for (_, flow) in flows {
        flow.stop().await;
    }
    prober.stop("before the reboot").await;
    lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    let prefix = lab.layout().namespace("h1");
    let is_of_host =
        |name: &String| name.strip_prefix(&prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-']));
    for name in Netns::list().expect_ok("namespaces").into_iter().filter(is_of_host) {
        Netns::delete(&name).expect_ok(&name);
    }
    std::fs::remove_dir_all(lab.host("h1").run_dir()).expect_ok("remove the run directory");
    rebuild_host(&lab, "h1").await;
    lab.start_agent("h1").await;
    for network in NETWORKS {
        // The containers are gone: their endpoints are reported and can be attached again.
        networks::attach(&lab, "h1", network, &format!("{network}-c1")).await;
        networks::wait_ready(&lab, network, &HOSTS).await;
    }
    assert_eq!(leases(&lab), before, "the subnets stay");
    let prober = Prober::start(&lab).await;
    for network in NETWORKS {
        let flow = start_flow(&lab, network, &containers[&("h2", network)]).await;
        flow.run_for_replies(10).await;
        flow.stop().await.assert_no_loss(network);
    }
    prober.stop("after the reboot").await;
    lab.assert_full_reachability().await;
}

/// Creates a host's namespace anew, as the lab did, once the kernel has destroyed the old one.
async fn rebuild_host(lab: &Lab, host: &str) {
    eventually_true("the host's link is gone", CONVERGE_TIMEOUT, || kernel::link(lab, "net", host).is_none()).await;
    underlay::add_host(lab.layout(), lab.host(host).expect_ok(host).layout()).expect_ok("create the host");
}

/// `overlayd cleanup` removes all networks: namespaces, leases, and the host's entries.
#[tokio::test(flavor = "multi_thread")]
async fn cleanup_removes_all_networks() {
    let lab = TestLab::without_agents(2, overlayctl::lab::Families::V4).await;
    networks::create_all(&lab, &NETWORKS);
    for host in HOSTS {
        Notifications::subscribe(&lab.open_netns(host)).wait_quiet().await;
    }
    let before = NetnsDump::of(&lab.open_netns("h1"));
    for host in HOSTS {
        lab.start_agent(host).await;
    }
    for network in NETWORKS {
        networks::attach_to_each(&lab, network, &HOSTS).await;
    }
    let prober = Prober::start(&lab).await;
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    let (run_dir, state_dir) = (lab.host("h1").run_dir(), lab.host("h1").state_dir());
    let mut command = lab.overlayd_command("h1", run_dir, state_dir.clone());
    command.env("OVERLAYD_NETNS_PREFIX", lab.layout().isolated_prefix("h1")).arg("cleanup");
    lab.run_to_exit("h1", command).assert_code(0);
    for network in NETWORKS {
        assert!(!networks::has_namespace(&lab, "h1", network), "the namespace of {network} is gone");
        let leases = networks::leases(&lab, network);
        assert!(leases.len() == 1 && leases[0].value.contains("\"Name\":\"h2\""), "only h2 has a lease: {leases:?}");
        let links = kernel::list_json(&lab, &format!("h1-{network}-c1"), "ip", &["link", "show"]);
        assert_eq!(links.len(), 1, "the container keeps only its loopback device: {links:#?}");
    }
    assert!(!state_dir.exists(), "{} is gone", state_dir.display());
    eventually("the host has its initial state", CONVERGE_TIMEOUT, || {
        let changes = NetnsDump::of(&lab.open_netns("h1")).changes_since(&before);
        if changes.is_empty() { Ok(()) } else { Err(changes) }
    })
    .await;
    prober.stop("a cleanup").await;
    // The other host has lost a peer in each network, and nothing else.
    for network in NETWORKS {
        networks::wait_ready(&lab, network, &["h2"]).await;
    }
}
