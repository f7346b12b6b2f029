//! Soak test: random steps with hosts, containers, isolated networks, agents, kernel faults and store faults, with checkpoints in between.
//!
//! At each checkpoint all faults have ended, and all invariants are checked. The seed is printed; it repeats the same steps.
//!
//! `OVERLAY_SOAK_MINUTES` sets the duration, `OVERLAY_SOAK_SEED` the seed.

#[path = "soak/networks.rs"]
mod networks;
#[path = "soak/quiet.rs"]
mod quiet;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Mode;
use overlay_agent::model::api::AttachRequest;
use overlay_tests::dump::NetnsDump;
use overlay_tests::faults::{Fault, LinkCut};
use overlay_tests::notify::Notifications;
use overlay_tests::programs::CommandOutput;
use overlay_tests::{ExpectContext, TestLab, churn, cluster, etcd, kernel_fault};
use overlayctl::client::ClientError;
use overlayctl::lab::Families;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

const MINUTES_VAR: &str = "OVERLAY_SOAK_MINUTES";
const SEED_VAR: &str = "OVERLAY_SOAK_SEED";

/// The default duration, without the lab's setup and removal.
const DEFAULT_DURATION: Duration = Duration::from_secs(15);

/// Number of steps reported on a failure: those since the last checkpoint but one.
const REPORTED_STEPS: usize = 3 * STEPS_PER_CHECKPOINT;

/// The hosts. The first one stays and is never restarted, to detect growth.
const HOSTS: [&str; 4] = ["h1", "h2", "h3", "h4"];
const STABLE_HOST: &str = HOSTS[0];

/// Maximum number of containers on a host; more would test nothing new.
const MAX_CONTAINERS: usize = 4;

/// Ports that containers publish: so few that conflicts occur.
const PUBLISHED_PORTS: Range<u16> = 7000..7016;
/// The port of a container's server.
const SERVICE_PORT: u16 = 7080;

/// Steps between two checkpoints.
const STEPS_PER_CHECKPOINT: usize = 8;

/// The kind of a container's attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachKind {
    /// Overlay addresses.
    Overlay,
    /// Overlay addresses, and this published TCP port of the host.
    Published(u16),
    /// Loopback only.
    LoopbackOnly,
}

/// The lab and its expected state.
struct Soak {
    lab: TestLab,
    rng: SmallRng,
    /// Maximum duration of a store fault.
    max_fault_duration: Duration,
    /// Participating hosts, with their containers.
    containers_by_host: BTreeMap<&'static str, BTreeMap<String, AttachKind>>,
    /// The VNIs of the isolated networks.
    vnis: BTreeMap<&'static str, u64>,
    /// Containers in isolated networks: host, network and name.
    in_networks: BTreeSet<(&'static str, &'static str, String)>,
    /// Peers that exist only as leases.
    peers: BTreeSet<u8>,
    /// The current lasting fault.
    fault: Option<Fault>,
    /// The number of the next container.
    next_container: u32,
    /// The hosts' state before their first agent.
    initial_dumps: BTreeMap<&'static str, NetnsDump>,
    /// Open files and anonymous memory of each agent at its first checkpoint.
    sizes: BTreeMap<i32, quiet::ProcessSize>,
    counts: BTreeMap<String, u32>,
    /// All steps, in order.
    steps: Vec<String>,
}

impl Drop for Soak {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let last = &self.steps[self.steps.len().saturating_sub(REPORTED_STEPS)..];
            eprintln!("--- last steps of {}:\n  {}", self.steps.len(), last.join("\n  "));
        }
    }
}

impl Soak {
    async fn new(seed: u64, long: bool) -> Soak {
        let lab = cluster::up(|options| {
            options.hosts = u16::try_from(HOSTS.len()).expect_ok("hosts");
            options.containers = 0;
            options.agents = false;
            options.families = Families::Dual;
            // The hosts' subnets are separate from those of the lease-only peers.
            options.config.insert("SubnetMax".to_owned(), "10.244.200.0".into());
        })
        .await;
        let mut clean = BTreeMap::new();
        for host in HOSTS {
            Notifications::subscribe(&lab.open_netns(host)).wait_quiet().await;
            clean.insert(host, NetnsDump::of(&lab.open_netns(host)));
        }
        let mut soak = Soak {
            lab,
            rng: SmallRng::seed_from_u64(seed),
            max_fault_duration: if long { Duration::from_secs(14) } else { Duration::from_millis(1500) },
            containers_by_host: BTreeMap::new(),
            vnis: BTreeMap::new(),
            in_networks: BTreeSet::new(),
            peers: BTreeSet::new(),
            fault: None,
            next_container: 0,
            initial_dumps: clean,
            sizes: BTreeMap::new(),
            counts: BTreeMap::new(),
            steps: Vec::new(),
        };
        soak.create_networks();
        for host in &HOSTS[..3] {
            soak.join(host);
            soak.lab.host(host).wait_ready(overlay_tests::test_lab::READY_TIMEOUT).await.expect_ok(host);
            soak.attach(host).await;
        }
        soak
    }

    /// The number of a host's containers with addresses.
    fn addressed_containers(&self, host: &str) -> usize {
        self.containers_by_host[host].values().filter(|kind| **kind != AttachKind::LoopbackOnly).count()
    }

    /// Records a step and its place.
    fn record_step(&mut self, location: &str, event: impl Into<String>) {
        let event = event.into();
        self.steps.push(format!("{location}: {event}"));
        *self.counts.entry(event).or_default() += 1;
    }

    /// One of the participating hosts.
    fn random_host(&mut self) -> &'static str {
        let all: Vec<&'static str> = self.containers_by_host.keys().copied().collect();
        all.choose(&mut self.rng).copied().expect_ok("a host")
    }

    async fn step(&mut self) {
        let host = self.random_host();
        match self.rng.random_range(0..100) {
            0..10 => self.join_or_leave().await,
            10..24 => self.attach(host).await,
            24..33 => self.detach(host).await,
            33..50 => self.network_step(host).await,
            50..60 => self.restart(host).await,
            60..77 => {
                let fault = kernel_fault::ALL.choose(&mut self.rng).expect_ok("a kernel fault");
                self.record_step(host, format!("kernel fault: {}", fault.name));
                // The entries may be missing already.
                fault.try_inject(&self.lab, host);
            }
            77..86 => self.toggle_peer(),
            _ => self.inject_store_fault(host).await,
        }
        let pause = self.rng.random_range(0..200);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    async fn join_or_leave(&mut self) {
        let absent_hosts: Vec<&'static str> =
            HOSTS.into_iter().filter(|host| !self.containers_by_host.contains_key(host)).collect();
        if let Some(host) = absent_hosts.choose(&mut self.rng).copied() {
            self.join(host);
            return;
        }
        let removable_hosts: Vec<&'static str> =
            self.containers_by_host.keys().copied().filter(|host| *host != STABLE_HOST).collect();
        let host = removable_hosts.choose(&mut self.rng).copied().expect_ok("another host");
        // Its lease can be deleted only while the store answers.
        if self.fault.is_some() {
            return;
        }
        while !self.containers_by_host[host].is_empty() {
            self.detach(host).await;
        }
        self.detach_all_in_networks(host).await;
        self.record_step(host, "host leaves");
        self.lab.host(host).agent_stop(Signal::SIGTERM).expect_ok("stop");
        let mut command = self.lab.overlayd_command(host, self.lab.host(host).run_dir(), self.lab.host(host).state_dir());
        command.env("OVERLAYD_NETNS_PREFIX", self.lab.layout().isolated_prefix(host)).arg("cleanup");
        let output: CommandOutput = self.lab.run_to_exit(host, command);
        output.assert_code(0);
        self.containers_by_host.remove(host);
    }

    fn join(&mut self, host: &'static str) {
        self.record_step(host, "host joins");
        self.lab.host(host).agent_start(&[]).expect_ok("start");
        self.containers_by_host.insert(host, BTreeMap::new());
    }

    async fn attach(&mut self, host: &'static str) {
        if self.containers_by_host[host].len() >= MAX_CONTAINERS {
            return;
        }
        self.next_container += 1;
        let name = format!("c{}", self.next_container);
        let kind = match self.rng.random_range(0..10) {
            0..2 => AttachKind::LoopbackOnly,
            2..5 => AttachKind::Published(self.rng.random_range(PUBLISHED_PORTS)),
            _ => AttachKind::Overlay,
        };
        // A host without a lease, or with a deleted bridge, refuses and leaves nothing behind.
        match self.attach_as(host, &name, kind).await {
            Ok(()) => {
                self.containers_by_host.entry(host).or_default().insert(name, kind);
                self.record_step(
                    host,
                    match kind {
                        AttachKind::Overlay => "container attached",
                        AttachKind::Published(_) => "container attached, with a port",
                        AttachKind::LoopbackOnly => "container attached, without a network",
                    },
                );
            }
            Err(error) => {
                println!("  {host} refuses {name}, {kind:?}: {error}");
                self.record_step(host, "container refused");
            }
        }
    }

    /// Creates the namespace and attaches it.
    async fn attach_as(&self, host: &str, name: &str, kind: AttachKind) -> Result<(), ClientError> {
        let netns = Netns::create(&self.namespace_name(host, name)).expect_ok("a container's namespace");
        let mut request = AttachRequest { netns: Some(netns.path().to_owned()), ..AttachRequest::default() };
        match kind {
            AttachKind::Overlay => {}
            AttachKind::Published(port) => request.publish = vec![format!("{port}:{SERVICE_PORT}").parse().expect_ok("a port")],
            AttachKind::LoopbackOnly => request.mode = Mode::None,
        }
        let result = self.lab.host(host).client().attach(&name.parse().expect_ok("a name"), &request).await;
        if result.is_err() {
            Netns::delete(&self.namespace_name(host, name)).expect_ok("delete the container");
        }
        result.map(|_| ())
    }

    fn namespace_name(&self, host: &str, name: &str) -> String {
        self.lab.layout().namespace(&format!("{host}-{name}"))
    }

    async fn detach(&mut self, host: &'static str) {
        let all: Vec<String> = self.containers_by_host[host].keys().cloned().collect();
        let Some(name) = all.choose(&mut self.rng).cloned() else { return };
        self.detach_named(host, &name).await;
        self.containers_by_host.entry(host).or_default().remove(&name);
        self.record_step(host, "container detached");
    }

    async fn detach_named(&self, host: &str, name: &str) {
        self.lab.host(host).client().detach(&name.parse().expect_ok("a name")).await.expect_ok("detach");
        Netns::delete(&self.namespace_name(host, name)).expect_ok("delete the container");
    }

    async fn restart(&mut self, host: &'static str) {
        let signal = [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGSTOP].choose(&mut self.rng).copied().expect_ok("a signal");
        if host == STABLE_HOST || signal == Signal::SIGSTOP {
            self.record_step(host, "agent hangs");
            let fault = Fault::AgentFrozen(host);
            fault.begin(&self.lab).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            fault.end(&self.lab).await;
            return;
        }
        self.record_step(host, format!("agent ends: {signal}"));
        Fault::AgentKilled(host, signal).begin(&self.lab).await;
        Fault::AgentKilled(host, signal).end(&self.lab).await;
        // The next step needs the socket.
        let socket = self.lab.host(host).client();
        overlay_tests::wait::eventually_async("the agent answers", overlay_tests::test_lab::CONVERGE_TIMEOUT, || async {
            socket.status().await.map(|_| ()).map_err(|error| error.to_string())
        })
        .await;
    }

    /// Adds, changes or removes a lease-only peer.
    fn toggle_peer(&mut self) {
        if self.fault.is_some() {
            return;
        }
        let number = self.rng.random_range(1..=12u8);
        let key = etcd::lease_key(&format!("10.244.{}.0-24", 200 + number));
        if self.peers.remove(&number) {
            self.record_step(&key, "peer leaves");
            etcd::delete(&self.lab, &key);
        } else {
            self.record_step(&key, "peer joins");
            self.peers.insert(number);
            etcd::put(&self.lab, &key, &churn::lease(number, self.rng.random_range(0..9)));
        }
    }

    /// Injects a fault of the store, or between the store and a host.
    async fn inject_store_fault(&mut self, host: &'static str) {
        if self.fault.is_some() {
            self.end_fault().await;
            return;
        }
        let member = self.rng.random_range(1..=3u8);
        let kind = self.rng.random_range(0..9);
        let instant_fault = match kind {
            0 => Some((Fault::LeaderMoves, "leader moves")),
            1 => Some((Fault::HistoryCompacted, "compacted")),
            2 => Some((Fault::Defragmented, "defragmented")),
            // After another fault it may have no lease to revoke.
            3 if self.has_lease(host) => Some((Fault::LeaseRevoked(host), "lease revoked")),
            4 if self.has_lease(host) => Some((Fault::KeyDeleted(host), "key deleted")),
            3 | 4 => return,
            _ => None,
        };
        if let Some((fault, name)) = instant_fault {
            self.record_step(&format!("store ({host}, e{member})"), name);
            fault.begin(&self.lab).await;
            return;
        }
        let (fault, name) = match kind {
            5 => (Fault::MembersKilled(vec![member]), "a member dies"),
            6 => (Fault::MembersFrozen(vec![member]), "a member hangs"),
            7 => (Fault::all_members_killed(), "all members die"),
            _ => (Fault::LinkCut(LinkCut::from_cluster(host)), "a host is cut off"),
        };
        self.record_step(&format!("store ({host}, e{member})"), name);
        fault.begin(&self.lab).await;
        self.fault = Some(fault);
    }

    fn has_lease(&self, host: &str) -> bool {
        let name_field = format!("\"Name\":\"{host}\"");
        etcd::leases(&self.lab).iter().any(|entry| entry.value.contains(&name_field) && entry.lease != 0)
    }

    /// Lets the current fault last, and ends it.
    async fn end_fault(&mut self) {
        let Some(fault) = self.fault.take() else { return };
        let max_millis = u64::try_from(self.max_fault_duration.as_millis()).expect_ok("milliseconds");
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(0..max_millis))).await;
        self.steps.push(format!("ends: {fault}"));
        fault.end(&self.lab).await;
        cluster::wait_members_healthy(&self.lab, &cluster::MEMBERS).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_faults_converge() {
    let minutes = std::env::var(MINUTES_VAR).ok().map(|text| text.parse::<u64>().expect_ok(MINUTES_VAR));
    let seed = std::env::var(SEED_VAR).map_or_else(|_| rand::rng().random(), |text| text.parse().expect_ok(SEED_VAR));
    println!("{SEED_VAR}={seed}");
    let mut soak = Soak::new(seed, minutes.is_some()).await;
    let end = Instant::now() + minutes.map_or(DEFAULT_DURATION, |minutes| Duration::from_secs(minutes * 60));
    let (mut rounds, mut steps) = (0, 0);
    // At least two checkpoints, even on a busy machine.
    while Instant::now() < end || rounds < 2 {
        for _ in 0..STEPS_PER_CHECKPOINT {
            soak.step().await;
            steps += 1;
        }
        soak.check_invariants().await;
        rounds += 1;
        if rounds % 20 == 0 {
            println!("{rounds} checkpoints after {steps} steps: {}", soak.growth());
        }
    }
    println!("{rounds} checkpoints, {steps} steps: {:#?}\n{}", soak.counts, soak.growth());
}
