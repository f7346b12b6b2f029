//! Flows that go on while what they go by changes: a client that never pauses gets what holds now, not what held for its first packet.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use overlay_agent::model::api::Attached;
use overlay_agent::model::{Endpoint, Family};
use overlay_tests::story::{SECOND, SOON};
use overlay_tests::{Must, Story, eventually, kernel};
use overlayctl::lab::Families;

/// Ten datagrams a second: each renews the entry of its flow, which the kernel forgets after 30 seconds without.
const PACE: Duration = Duration::from_millis(100);
const PORT: u16 = 5353;

/// Two hosts with a container each, both families.
async fn lab() -> Story {
    Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await
}

/// Attaches a container to the first host.
fn attach(story: &Story, name: &str, arguments: &[&str]) -> Endpoint {
    let arguments = [&["-o", "json", "attach", name], arguments].concat();
    story.ctl("h1", &arguments).exits(0).json::<Attached>().endpoint
}

fn socket(story: &Story, target: &str, at: SocketAddr) -> UdpSocket {
    story.inside(target).run(|| UdpSocket::bind(at)).must("enter").must("a socket")
}

/// A socket that hears what comes to a port, and answers where it is to.
struct Server(UdpSocket);

impl Server {
    fn at(story: &Story, target: &str, port: u16) -> Server {
        let socket = socket(story, target, (Ipv6Addr::UNSPECIFIED, port).into());
        socket.set_nonblocking(true).must("a socket that does not wait");
        Server(socket)
    }

    /// From whom datagrams came since the last look.
    fn heard(&self) -> Vec<SocketAddr> {
        let mut buffer = [0; 64];
        std::iter::from_fn(|| self.0.recv_from(&mut buffer).ok()).map(|(_, from)| from).collect()
    }

    /// Waits until a datagram comes; from whom.
    async fn hears(&self, what: &str, limit: Duration) -> IpAddr {
        let from = eventually(what, limit, || self.heard().pop().ok_or_else(|| "nothing came".to_owned())).await;
        from.ip().to_canonical()
    }
}

/// A client that sends from one socket without a pause, until it is dropped.
struct Client {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    fn start(story: &Story, from: &str, to: SocketAddr) -> Client {
        let any: IpAddr = if to.is_ipv4() { [0_u8; 4].into() } else { [0_u16; 8].into() };
        let socket = socket(story, from, (any, 0).into());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // What an earlier datagram met (a port that nobody has) is not this one's.
                let _sent = socket.send_to(b"?", to);
                thread::sleep(PACE);
            }
        });
        Client { stop, thread: Some(thread) }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

fn published(story: &Story, family: Family) -> SocketAddr {
    SocketAddr::new(*story.at("h1").layout().addresses.get(family).must("an address"), PORT)
}

/// The flows that the first host's conntrack has entries of.
fn entries(story: &Story) -> BTreeSet<String> {
    let listed = kernel::shell(story, "h1", "cat /proc/net/nf_conntrack");
    let flow = |line: &str| {
        let words =
            line.split_whitespace().filter(|word| word.contains("src=") || word.contains("dst=") || word.contains("port="));
        words.collect::<Vec<_>>().join(" ")
    };
    listed.lines().map(flow).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_of_one_socket_follow_a_published_port() {
    let story = lab().await;
    let publish = ["--publish", "5353:5353/udp"];
    let clients: Vec<Client> = Family::ALL
        .into_iter()
        .flat_map(|family| ["world", "h1", "h1-c1"].map(|from| Client::start(&story, from, published(&story, family))))
        .collect();
    // Before anybody published the port: the entries of the clients have no translation.
    eventually("the clients have entries", SOON, || {
        let count = entries(&story).iter().filter(|flow| flow.contains("dport=5353")).count();
        if count >= clients.len() { Ok(()) } else { Err(format!("{count} of {}", clients.len())) }
    })
    .await;
    let mut previous: Option<String> = None;
    for name in ["a1", "a2", "a3"] {
        if let Some(previous) = previous.replace(name.to_owned()) {
            story.ctl("h1", &["detach", &previous]).exits(0);
        }
        let begin = Instant::now();
        attach(&story, name, &publish);
        let server = Server::at(&story, &format!("h1-{name}"), PORT);
        let mut callers = BTreeSet::new();
        eventually(&format!("{name} hears each client"), SECOND * 2, || {
            callers.extend(server.heard());
            if callers.len() >= clients.len() { Ok(()) } else { Err(format!("{callers:?}")) }
        })
        .await;
        println!("{name} heard all clients {} ms after its attach began", begin.elapsed().as_millis());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn detach_deletes_the_flows_of_its_addresses_alone() {
    let story = lab().await;
    let world: [SocketAddr; 2] = ["10.99.0.254:7000", "[fd99::254]:7000"].map(|text| text.parse().must("an address"));
    let server = Server::at(&story, "world", 7000);
    let first = attach(&story, "a1", &["--publish", "5353:5353/udp"]);
    let _other = attach(&story, "other", &["--publish", "5354:5353/udp"]);
    let inner = [Server::at(&story, "h1-a1", PORT), Server::at(&story, "h1-other", PORT)];
    let once = |from: &str, to: SocketAddr| {
        let client = socket(&story, from, if to.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() });
        client.send_to(b"?", to).must("send");
        client
    };
    // Flows that send nothing more: an entry that was deleted does not come back.
    let mut idle = Vec::new();
    for (family, world) in Family::ALL.into_iter().zip(world) {
        for from in ["h1-a1", "h1-other", "h1-c1"] {
            idle.push(once(from, world));
            server.hears(&format!("the world hears {from}"), SOON).await;
        }
        for (port, inner) in [(5353, &inner[0]), (5354, &inner[1])] {
            idle.push(once("world", SocketAddr::new(published(&story, family).ip(), port)));
            inner.hears(&format!("port {port} is heard"), SOON).await;
        }
    }
    let before = entries(&story);
    let own: Vec<String> = first.addresses().iter().map(|(_, address)| long(*address)).collect();
    let is_own = |flow: &str| own.iter().any(|address| flow.split(' ').any(|word| word.ends_with(&format!("={address}"))));
    assert_eq!(before.iter().filter(|flow| is_own(flow)).count(), 4, "both ways in both families: {before:?}");
    story.ctl("h1", &["detach", "a1"]).exits(0);
    let (expected, after) = (before.into_iter().filter(|flow| !is_own(flow)), entries(&story));
    let missing: Vec<String> = expected
        .filter(|flow| flow.contains("dport=7000") || flow.contains("dport=5354"))
        .filter(|flow| !after.contains(flow))
        .collect();
    assert!(missing.is_empty(), "entries of others went: {missing:?}");
    let left: Vec<&String> = after.iter().filter(|flow| is_own(flow)).collect();
    assert!(left.is_empty(), "entries of a container that is gone: {left:?}");
    drop(idle);
}

/// An address as `/proc/net/nf_conntrack` has it: IPv6 in full length.
fn long(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => address.segments().map(|segment| format!("{segment:04x}")).join(":"),
    }
}

/// A flow that begins while somebody has deleted the rules would leave the overlay with the container's own address for as long as it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn flow_begun_without_rules_is_masqueraded_once_they_are_back() {
    let story = lab().await;
    let server = Server::at(&story, "world", 7000);
    let agent = story.at("h1").agent().must("an agent");
    agent.signal(Signal::SIGSTOP).must("SIGSTOP");
    // Another's rule keeps conntrack at work meanwhile, as on a host with a firewall.
    let other = "add table inet other; add chain inet other forward { type filter hook forward priority 0; }; \
                 add rule inet other forward ct state established accept; delete table inet overlayd";
    kernel::run(&story, "h1", &["nft", other]);
    let client = Client::start(&story, "h1-c1", "10.99.0.254:7000".parse().must("an address"));
    let source = server.hears("the world hears the container", SOON).await;
    assert!(source.to_string().starts_with("10.244."), "the case is one without masquerade: {source}");
    agent.signal(Signal::SIGCONT).must("SIGCONT");
    let host = published(&story, Family::V4).ip();
    eventually("the flow is masqueraded", SOON, || {
        let last = server.heard().pop().map(|from| from.ip().to_canonical());
        if last == Some(host) { Ok(()) } else { Err(format!("from {last:?}")) }
    })
    .await;
    drop(client);
}
