//! Packets between networks during a test, of which none may arrive.
//!
//! Every container sends to every container of another network: datagrams by its routes, and frames made by hand with its own
//! addresses or those of the other network, to the gateway, to the other container's MAC, and to all. Each packet carries the
//! names of its sender and of the sender's network, so that an arrival is recognised also where networks have the same range.
//! Every container also sends within its network: the packets that arrive there show that the prober works.
//!
//! One thread; it ends with the prober.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use overlay_agent::model::{Family, NetworkName};
use overlayctl::lab::crossing::{self, Crossing, Party};
use overlayctl::lab::{Host, container};

use crate::packet_builder::{self, BROADCAST, Mac, PacketSocket};
use crate::{ExpectContext, TestLab, kernel};

/// Pause between two rounds.
const ROUND_INTERVAL: Duration = Duration::from_millis(100);

/// Time for the last packets to arrive.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(300);

/// Time for packets to arrive within each network.
const FIRST_ARRIVALS_TIMEOUT: Duration = Duration::from_secs(20);

/// ICMP and the types of its echo requests (RFC 792, RFC 4443).
const ICMP: u8 = 1;
const ECHO: u8 = 8;
const ECHO_V6: u8 = 128;

/// A container, its sockets, and what its frames need.
struct Station {
    party: Party,
    socket: PacketSocket,
    mac: Mac,
    gateway_mac: Mac,
}

/// What the thread has seen.
#[derive(Debug, Default)]
struct Seen {
    sent: usize,
    rounds: usize,
    crossings: BTreeSet<Crossing>,
    /// Number of arrivals from other containers of the same network.
    within: BTreeMap<NetworkName, usize>,
}

/// A running prober.
#[derive(Debug)]
pub struct Prober {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    /// Networks of which more than one container exists.
    expected: BTreeSet<NetworkName>,
    pairs: usize,
    thread: Option<JoinHandle<()>>,
}

impl Prober {
    /// Starts a prober among all containers of all networks of the lab, and waits until packets arrive within each network.
    pub async fn start(lab: &TestLab) -> Prober {
        Prober::start_except(lab, &[]).await
    }

    /// The same. Packets between the networks of each group may arrive: these networks are routed to each other.
    pub async fn start_except(lab: &TestLab, routed: &[&[&str]]) -> Prober {
        let stations: Vec<Station> = lab.hosts().flat_map(|host| stations(lab, &host)).collect();
        let mut counts: BTreeMap<NetworkName, usize> = BTreeMap::new();
        for station in &stations {
            *counts.entry(station.party.network.clone()).or_default() += 1;
        }
        let pairs = counts.len() * (counts.len() - 1);
        assert!(pairs > 0, "a prober needs two networks: {counts:?}");
        let expected = counts.into_iter().filter(|(_, count)| *count > 1).map(|(network, _)| network).collect();
        let routed: Vec<BTreeSet<String>> =
            routed.iter().map(|group| group.iter().map(|name| (*name).to_owned()).collect()).collect();
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Seen::default())));
        let (thread_stop, thread_seen) = (Arc::clone(&stop), Arc::clone(&seen));
        let thread = std::thread::spawn(move || run(&stations, &routed, &thread_stop, &thread_seen));
        let prober = Prober { stop, seen, expected, pairs, thread: Some(thread) };
        let end = Instant::now() + FIRST_ARRIVALS_TIMEOUT;
        while let Some(silent) = prober.silent_network() {
            assert!(Instant::now() < end, "no packet arrives within network {silent}: the prober would detect nothing");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        prober
    }

    /// A network within which no packet has arrived.
    fn silent_network(&self) -> Option<NetworkName> {
        let seen = lock(&self.seen);
        self.expected.iter().find(|network| !seen.within.contains_key(network)).cloned()
    }

    /// The crossings so far.
    pub fn crossings(&self) -> Vec<Crossing> {
        lock(&self.seen).crossings.iter().cloned().collect()
    }

    /// Checks that no packet has crossed so far.
    #[track_caller]
    pub fn assert_isolated(&self, context: &str) {
        let seen = lock(&self.seen);
        assert!(seen.crossings.is_empty(), "{context}: packets crossed between networks: {:#?}", seen.crossings);
    }

    /// Ends the prober after that many more rounds, and checks that no packet crossed.
    pub async fn stop_after(mut self, rounds: usize, context: &str) {
        let wanted = lock(&self.seen).rounds + rounds;
        let end = Instant::now() + FIRST_ARRIVALS_TIMEOUT;
        while lock(&self.seen).rounds < wanted {
            assert!(Instant::now() < end, "{context}: the prober sends no more");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.end();
        self.assert_isolated(context);
        let seen = lock(&self.seen);
        println!(
            "{context}: {} ordered pairs of networks, {} packets in {} rounds, 0 crossings",
            self.pairs, seen.sent, seen.rounds
        );
    }

    /// Ends the prober, and checks that no packet crossed.
    pub async fn stop(self, context: &str) {
        self.stop_after(1, context).await;
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the prober panicked");
        }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.end();
    }
}

/// The containers of a host.
fn stations(lab: &TestLab, host: &Host<'_>) -> Vec<Station> {
    let mac_of = |target: &str, device: &str| -> Option<Mac> {
        let link = kernel::link(lab, target, device)?;
        let bytes: Vec<u8> = kernel::text(&link, "address").split(':').filter_map(|b| u8::from_str_radix(b, 16).ok()).collect();
        bytes.try_into().ok()
    };
    let bridge_mac = |target: &str| {
        let links = kernel::list_json(lab, target, "ip", &["link", "show", "type", "bridge"]);
        links.iter().find_map(|link| mac_of(target, &kernel::text(link, "ifname"))).expect_ok(&format!("a bridge in {target}"))
    };
    let attached = container::list_attached(host).expect_ok(host.name());
    let station = |found: container::AttachedContainer| {
        let target = format!("{}-{}", host.name(), found.name);
        let gateway =
            if found.network.is_default() { host.name().to_owned() } else { format!("{}.{}", host.name(), found.network) };
        Station {
            socket: PacketSocket::open_all(&found.netns),
            mac: mac_of(&target, "eth0").expect_ok(&format!("eth0 in {target}")),
            gateway_mac: bridge_mac(&gateway),
            party: Party { name: target, network: found.network, netns: found.netns, addresses: found.addresses },
        }
    };
    attached.into_iter().map(station).collect()
}

fn run(stations: &[Station], routed: &[BTreeSet<String>], stop: &AtomicBool, seen: &Mutex<Seen>) {
    while !stop.load(Ordering::Relaxed) {
        let mut sent = 0;
        for from in stations {
            sent += send_from(from, stations);
            receive(stations, routed, seen);
        }
        let mut seen = lock(seen);
        seen.sent += sent;
        seen.rounds += 1;
        drop(seen);
        std::thread::sleep(ROUND_INTERVAL);
    }
    let end = Instant::now() + DRAIN_TIMEOUT;
    while Instant::now() < end {
        receive(stations, routed, seen);
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends from a container to all others. Failures do not count: a fault may have taken the interface or the route.
fn send_from(from: &Station, all: &[Station]) -> usize {
    let others = all.iter().filter(|to| to.party.name != from.party.name);
    let mut sent = crossing::send(&from.party, others.clone().map(|to| &to.party)).unwrap_or(0);
    let Ok(Some(interface)) = from.party.netns.run_in_place(|| nix::net::if_::if_nametoindex("eth0").ok()) else { return sent };
    for to in others.filter(|to| to.party.network != from.party.network) {
        for frame in frames(from, to) {
            sent += usize::from(from.socket.try_send_at(interface, &frame));
        }
    }
    sent
}

/// Frames from a container to one of another network.
fn frames(from: &Station, to: &Station) -> Vec<Vec<u8>> {
    let data = crossing::payload(&from.party);
    let mut all = Vec::new();
    for (family, own) in from.party.addresses.iter() {
        let Some(target) = to.party.addresses.get(family) else { continue };
        let udp = |source: IpAddr| {
            packet_builder::udp(SocketAddr::new(source, crossing::PORT), SocketAddr::new(*target, crossing::PORT), &data)
        };
        for mac in [from.gateway_mac, to.mac, BROADCAST] {
            all.push(packet_builder::ip_frame(mac, from.mac, &udp(*own)));
        }
        // As if the other network's container, or the one before it, had sent it.
        for mac in [from.gateway_mac, to.gateway_mac] {
            all.push(packet_builder::ip_frame(mac, from.mac, &udp(*target)));
            all.push(packet_builder::ip_frame(mac, to.mac, &udp(neighbour(*target))));
        }
        all.push(packet_builder::ip_frame(from.gateway_mac, from.mac, &echo(family, *own, *target, &data)));
    }
    all
}

/// The address before.
fn neighbour(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => IpAddr::V4(address.to_bits().wrapping_sub(1).into()),
        IpAddr::V6(address) => IpAddr::V6(address.to_bits().wrapping_sub(1).into()),
    }
}

/// An echo request with data.
fn echo(family: Family, from: IpAddr, to: IpAddr, data: &[u8]) -> Vec<u8> {
    let body = [&[0, 1, 0, 1], data].concat();
    match family {
        Family::V6 => packet_builder::icmpv6(from, to, ECHO_V6, &body),
        Family::V4 => {
            let mut message = [&[ECHO, 0, 0, 0], body.as_slice()].concat();
            let sum = packet_builder::checksum(&[&message]);
            message[2..4].copy_from_slice(&sum);
            packet_builder::ip(from, to, ICMP, &message)
        }
    }
}

/// Reads what has arrived at all containers.
fn receive(stations: &[Station], routed: &[BTreeSet<String>], seen: &Mutex<Seen>) {
    for to in stations {
        for frame in to.socket.frames() {
            let Some((from_network, from)) = crossing::find_payload(&frame) else { continue };
            // A packet socket also reports what its own container sends.
            if from == to.party.name {
                continue;
            }
            let network = to.party.network.to_string();
            let mut seen = lock(seen);
            if from_network == network {
                *seen.within.entry(to.party.network.clone()).or_default() += 1;
            } else if !routed.iter().any(|group| group.contains(&from_network) && group.contains(&network)) {
                seen.crossings.insert(Crossing { from, from_network, to: to.party.name.clone(), to_network: network });
            }
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}
