//! A long life in short: hosts join and leave, containers come and go, agents end and hang, kernel state is damaged, the store fails; and at each
//! quiet point all is as it should be. The seed is printed; with it the same steps come again.
//!
//! `OVERLAY_SOAK_MINUTES` makes it longer, `OVERLAY_SOAK_SEED` repeats one.

#[path = "soak/quiet.rs"]
mod quiet;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Mode;
use overlay_agent::model::api::AttachRequest;
use overlay_tests::dump::Dump;
use overlay_tests::faults::{Cut, Fault};
use overlay_tests::notify::Notifications;
use overlay_tests::programs::Said;
use overlay_tests::{Must, Story, churn, cluster, damage, etcd};
use overlayctl::client::ClientError;
use overlayctl::lab::Families;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

const MINUTES: &str = "OVERLAY_SOAK_MINUTES";
const SEED: &str = "OVERLAY_SOAK_SEED";

/// How long it takes where nobody says otherwise, the lab's coming and going aside.
const SHORT: Duration = Duration::from_secs(15);

/// Steps that are told where something is wrong: those since the last but one quiet point.
const LAST: usize = 3 * STEPS;

/// The first one stays and is never restarted: growth would show there.
const HOSTS: [&str; 4] = ["h1", "h2", "h3", "h4"];
const STAYS: &str = HOSTS[0];

/// More containers than this on a host say nothing more.
const CONTAINERS: usize = 4;

/// Ports that containers publish: so few that some are taken.
const PORTS: Range<u16> = 7000..7016;
/// Where a container serves them.
const SERVED: u16 = 7080;

/// Steps between two quiet points.
const STEPS: usize = 8;

/// What a container was attached with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Addresses of the overlay.
    Overlay,
    /// The same, and this TCP port of the host leads to it.
    Published(u16),
    /// Loopback only.
    Nothing,
}

/// The lab and what must be true of it.
struct Soak {
    story: Story,
    random: SmallRng,
    /// How long a fault of the store may last.
    longest: Duration,
    /// Hosts that take part, with their containers.
    active: BTreeMap<&'static str, BTreeMap<String, Wish>>,
    /// Peers that are leases alone.
    peers: BTreeSet<u8>,
    /// What lasts at the moment.
    fault: Option<Fault>,
    /// Numbers containers.
    serial: u32,
    /// The hosts before an agent ran there.
    clean: BTreeMap<&'static str, Dump>,
    /// Open files and anonymous memory of each agent at its first quiet point.
    sizes: BTreeMap<i32, quiet::Size>,
    counts: BTreeMap<String, u32>,
    /// What was done, in order.
    steps: Vec<String>,
}

impl Drop for Soak {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let last = &self.steps[self.steps.len().saturating_sub(LAST)..];
            eprintln!("--- the last steps of {}:\n  {}", self.steps.len(), last.join("\n  "));
        }
    }
}

impl Soak {
    async fn new(seed: u64, long: bool) -> Soak {
        let story = cluster::up(|options| {
            options.hosts = u16::try_from(HOSTS.len()).must("hosts");
            options.containers = 0;
            options.agents = false;
            options.families = Families::Dual;
            // The hosts' subnets are apart from those of the peers that are leases alone.
            options.config.insert("SubnetMax".to_owned(), "10.244.200.0".into());
        })
        .await;
        let mut clean = BTreeMap::new();
        for host in HOSTS {
            Notifications::listen(&story.inside(host)).settle().await;
            clean.insert(host, Dump::of(&story.inside(host)));
        }
        let mut soak = Soak {
            story,
            random: SmallRng::seed_from_u64(seed),
            longest: if long { Duration::from_secs(14) } else { Duration::from_millis(1500) },
            active: BTreeMap::new(),
            peers: BTreeSet::new(),
            fault: None,
            serial: 0,
            clean,
            sizes: BTreeMap::new(),
            counts: BTreeMap::new(),
            steps: Vec::new(),
        };
        for host in &HOSTS[..3] {
            soak.join(host);
            soak.story.at(host).wait_ready(overlay_tests::story::READY).await.must(host);
            soak.attach(host).await;
        }
        soak
    }

    /// The containers of a host that have addresses.
    fn with_addresses(&self, host: &str) -> usize {
        self.active[host].values().filter(|wish| **wish != Wish::Nothing).count()
    }

    /// Notes what is done, and where.
    fn count(&mut self, place: &str, what: impl Into<String>) {
        let what = what.into();
        self.steps.push(format!("{place}: {what}"));
        *self.counts.entry(what).or_default() += 1;
    }

    /// One of the hosts that take part.
    fn some_host(&mut self) -> &'static str {
        let all: Vec<&'static str> = self.active.keys().copied().collect();
        all.choose(&mut self.random).copied().must("a host")
    }

    async fn step(&mut self) {
        let host = self.some_host();
        match self.random.random_range(0..100) {
            0..12 => self.come_or_go().await,
            12..32 => self.attach(host).await,
            32..44 => self.detach(host).await,
            44..56 => self.restart(host).await,
            56..76 => {
                let damage = damage::ALL.choose(&mut self.random).must("a damage");
                self.count(host, format!("damage: {}", damage.name));
                // What it would damage may be away already.
                damage.tried_on(&self.story, host);
            }
            76..86 => self.peer(),
            _ => self.store(host).await,
        }
        let pause = self.random.random_range(0..200);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    async fn come_or_go(&mut self) {
        let away: Vec<&'static str> = HOSTS.into_iter().filter(|host| !self.active.contains_key(host)).collect();
        if let Some(host) = away.choose(&mut self.random).copied() {
            self.join(host);
            return;
        }
        let others: Vec<&'static str> = self.active.keys().copied().filter(|host| *host != STAYS).collect();
        let host = others.choose(&mut self.random).copied().must("another host");
        // Its lease is given back only while the store answers.
        if self.fault.is_some() {
            return;
        }
        while !self.active[host].is_empty() {
            self.detach(host).await;
        }
        self.count(host, "host leaves");
        self.story.at(host).agent_stop(Signal::SIGTERM).must("stop");
        let mut command = self.story.overlayd(host, self.story.at(host).run_dir(), self.story.at(host).state_dir());
        command.arg("cleanup");
        let said: Said = self.story.ends(host, command);
        said.exits(0);
        self.active.remove(host);
    }

    fn join(&mut self, host: &'static str) {
        self.count(host, "host joins");
        self.story.at(host).agent_start(&[]).must("start");
        self.active.insert(host, BTreeMap::new());
    }

    async fn attach(&mut self, host: &'static str) {
        if self.active[host].len() >= CONTAINERS {
            return;
        }
        self.serial += 1;
        let name = format!("c{}", self.serial);
        let wish = match self.random.random_range(0..10) {
            0..2 => Wish::Nothing,
            2..5 => Wish::Published(self.random.random_range(PORTS)),
            _ => Wish::Overlay,
        };
        // A host that has no lease yet, or whose bridge was just deleted, says so, and nothing is left behind.
        match self.attach_as(host, &name, wish).await {
            Ok(()) => {
                self.active.entry(host).or_default().insert(name, wish);
                self.count(
                    host,
                    match wish {
                        Wish::Overlay => "container attached",
                        Wish::Published(_) => "container attached, with a port",
                        Wish::Nothing => "container attached, without a network",
                    },
                );
            }
            Err(error) => {
                println!("  {host} refuses {name}, {wish:?}: {error}");
                self.count(host, "container refused");
            }
        }
    }

    /// Makes the namespace and has the agent attach it.
    async fn attach_as(&self, host: &str, name: &str, wish: Wish) -> Result<(), ClientError> {
        let netns = Netns::create(&self.namespace(host, name)).must("a container's namespace");
        let mut request = AttachRequest { netns: Some(netns.path().to_owned()), ..AttachRequest::default() };
        match wish {
            Wish::Overlay => {}
            Wish::Published(port) => request.publish = vec![format!("{port}:{SERVED}").parse().must("a port")],
            Wish::Nothing => request.mode = Mode::None,
        }
        let answer = self.story.at(host).client().attach(&name.parse().must("a name"), &request).await;
        if answer.is_err() {
            Netns::delete(&self.namespace(host, name)).must("delete the container");
        }
        answer.map(|_| ())
    }

    fn namespace(&self, host: &str, name: &str) -> String {
        self.story.layout().namespace(&format!("{host}-{name}"))
    }

    async fn detach(&mut self, host: &'static str) {
        let all: Vec<String> = self.active[host].keys().cloned().collect();
        let Some(name) = all.choose(&mut self.random).cloned() else { return };
        self.detach_named(host, &name).await;
        self.active.entry(host).or_default().remove(&name);
        self.count(host, "container detached");
    }

    async fn detach_named(&self, host: &str, name: &str) {
        self.story.at(host).client().detach(&name.parse().must("a name")).await.must("detach");
        Netns::delete(&self.namespace(host, name)).must("delete the container");
    }

    async fn restart(&mut self, host: &'static str) {
        let signal = [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGSTOP].choose(&mut self.random).copied().must("a signal");
        if host == STAYS || signal == Signal::SIGSTOP {
            self.count(host, "agent hangs");
            let fault = Fault::AgentHangs(host);
            fault.begin(&self.story).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            fault.end(&self.story).await;
            return;
        }
        self.count(host, format!("agent ends: {signal}"));
        Fault::AgentEnds(host, signal).begin(&self.story).await;
        Fault::AgentEnds(host, signal).end(&self.story).await;
        // So that the next step finds a socket.
        let socket = self.story.at(host).client();
        overlay_tests::wait::eventually_asked("the agent answers", overlay_tests::story::SOON, || async {
            socket.status().await.map(|_| ()).map_err(|error| error.to_string())
        })
        .await;
    }

    /// A peer that is a lease alone comes, changes or goes.
    fn peer(&mut self) {
        if self.fault.is_some() {
            return;
        }
        let number = self.random.random_range(1..=12u8);
        let key = etcd::lease_key(&format!("10.244.{}.0-24", 200 + number));
        if self.peers.remove(&number) {
            self.count(&key, "peer goes");
            etcd::delete(&self.story, &key);
        } else {
            self.count(&key, "peer comes");
            self.peers.insert(number);
            etcd::put(&self.story, &key, &churn::lease(number, self.random.random_range(0..9)));
        }
    }

    /// Something happens to the store, or between it and a host.
    async fn store(&mut self, host: &'static str) {
        if self.fault.is_some() {
            self.end_fault().await;
            return;
        }
        let member = self.random.random_range(1..=3u8);
        let kind = self.random.random_range(0..9);
        let moment = match kind {
            0 => Some((Fault::LeaderMoves, "leader moves")),
            1 => Some((Fault::Compacted, "compacted")),
            2 => Some((Fault::Defragmented, "defragmented")),
            // Right after another fault it may have no lease: nothing to end.
            3 if self.has_lease(host) => Some((Fault::LeaseRevoked(host), "lease revoked")),
            4 if self.has_lease(host) => Some((Fault::KeyDeleted(host), "key deleted")),
            3 | 4 => return,
            _ => None,
        };
        if let Some((fault, name)) = moment {
            self.count(&format!("store ({host}, e{member})"), name);
            fault.begin(&self.story).await;
            return;
        }
        let (fault, name) = match kind {
            5 => (Fault::MembersDie(vec![member]), "a member dies"),
            6 => (Fault::MembersHang(vec![member]), "a member hangs"),
            7 => (Fault::all_members_die(), "all members die"),
            _ => (Fault::Cut(Cut::from_cluster(host)), "a host is cut off"),
        };
        self.count(&format!("store ({host}, e{member})"), name);
        fault.begin(&self.story).await;
        self.fault = Some(fault);
    }

    fn has_lease(&self, host: &str) -> bool {
        let named = format!("\"Name\":\"{host}\"");
        etcd::leases(&self.story).iter().any(|entry| entry.value.contains(&named) && entry.lease != 0)
    }

    /// Lets what lasts last a while, and ends it.
    async fn end_fault(&mut self) {
        let Some(fault) = self.fault.take() else { return };
        let longest = u64::try_from(self.longest.as_millis()).must("milliseconds");
        tokio::time::sleep(Duration::from_millis(self.random.random_range(0..longest))).await;
        self.steps.push(format!("ends: {fault}"));
        fault.end(&self.story).await;
        cluster::healthy(&self.story, &cluster::MEMBERS).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_happens() {
    let minutes = std::env::var(MINUTES).ok().map(|text| text.parse::<u64>().must(MINUTES));
    let seed = std::env::var(SEED).map_or_else(|_| rand::rng().random(), |text| text.parse().must(SEED));
    println!("{SEED}={seed}");
    let mut soak = Soak::new(seed, minutes.is_some()).await;
    let end = Instant::now() + minutes.map_or(SHORT, |minutes| Duration::from_secs(minutes * 60));
    let (mut rounds, mut steps) = (0, 0);
    // On a machine that is busy with other things, too, there is more than one.
    while Instant::now() < end || rounds < 2 {
        for _ in 0..STEPS {
            soak.step().await;
            steps += 1;
        }
        soak.quiet().await;
        rounds += 1;
        if rounds % 20 == 0 {
            println!("{rounds} quiet points after {steps} steps: {}", soak.growth());
        }
    }
    println!("{rounds} quiet points, {steps} steps: {:#?}\n{}", soak.counts, soak.growth());
}
