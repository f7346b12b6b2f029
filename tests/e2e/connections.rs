//! Continuous flows while their rules change. Each packet is handled by the current rules, not by those of the flow's first
//! packet.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use overlay_agent::model::api::AttachResponse;
use overlay_agent::model::{Endpoint, Family};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, REPAIR_DEADLINE};
use overlay_tests::{ExpectContext, TestLab, eventually, kernel};
use overlayctl::lab::Families;

/// Ten datagrams a second: each renews the flow's conntrack entry, which expires after 30 seconds.
const SEND_INTERVAL: Duration = Duration::from_millis(100);
const PORT: u16 = 5353;

/// Two hosts with one container each, in both families.
async fn start_lab() -> TestLab {
    TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await
}

/// Attaches a container to the first host.
fn attach(lab: &TestLab, name: &str, arguments: &[&str]) -> Endpoint {
    let arguments = [&["-o", "json", "attach", name], arguments].concat();
    lab.ctl("h1", &arguments).assert_code(0).json::<AttachResponse>().endpoint
}

fn socket(lab: &TestLab, target: &str, at: SocketAddr) -> UdpSocket {
    lab.open_netns(target).run(|| UdpSocket::bind(at)).expect_ok("enter").expect_ok("a socket")
}

/// A socket that receives on a port and answers.
struct Server(UdpSocket);

impl Server {
    fn bind(lab: &TestLab, target: &str, port: u16) -> Server {
        let socket = socket(lab, target, (Ipv6Addr::UNSPECIFIED, port).into());
        socket.set_nonblocking(true).expect_ok("a nonblocking socket");
        Server(socket)
    }

    /// The sources of datagrams since the last call.
    fn drain_sources(&self) -> Vec<SocketAddr> {
        let mut buffer = [0; 64];
        std::iter::from_fn(|| self.0.recv_from(&mut buffer).ok()).map(|(_, from)| from).collect()
    }

    /// Waits for a datagram; returns its source.
    async fn wait_for_datagram(&self, what: &str, limit: Duration) -> IpAddr {
        let from = eventually(what, limit, || self.drain_sources().pop().ok_or_else(|| "no datagram".to_owned())).await;
        from.ip().to_canonical()
    }
}

/// A client that sends continuously from one socket until it is dropped.
struct Client {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    fn start(lab: &TestLab, from: &str, to: SocketAddr) -> Client {
        let any: IpAddr = if to.is_ipv4() { [0_u8; 4].into() } else { [0_u16; 8].into() };
        let socket = socket(lab, from, (any, 0).into());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // An error may belong to an earlier datagram (port unreachable).
                let _sent = socket.send_to(b"?", to);
                thread::sleep(SEND_INTERVAL);
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

fn published_address(lab: &TestLab, family: Family) -> SocketAddr {
    SocketAddr::new(*lab.host("h1").layout().addresses.get(family).expect_ok("an address"), PORT)
}

/// The flows in the first host's conntrack table.
fn conntrack_entries(lab: &TestLab) -> BTreeSet<String> {
    let listed = kernel::shell(lab, "h1", "cat /proc/net/nf_conntrack");
    let flow = |line: &str| {
        let words =
            line.split_whitespace().filter(|word| word.contains("src=") || word.contains("dst=") || word.contains("port="));
        words.collect::<Vec<_>>().join(" ")
    };
    listed.lines().map(flow).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn udp_flow_follows_published_port() {
    let lab = start_lab().await;
    let publish = ["--publish", "5353:5353/udp"];
    let clients: Vec<Client> = Family::ALL
        .into_iter()
        .flat_map(|family| ["world", "h1", "h1-c1"].map(|from| Client::start(&lab, from, published_address(&lab, family))))
        .collect();
    // Before the port is published: the clients' conntrack entries have no translation.
    eventually("the clients have entries", CONVERGE_TIMEOUT, || {
        let count = conntrack_entries(&lab).iter().filter(|flow| flow.contains("dport=5353")).count();
        if count >= clients.len() { Ok(()) } else { Err(format!("{count} of {}", clients.len())) }
    })
    .await;
    let mut previous: Option<String> = None;
    for name in ["a1", "a2", "a3"] {
        if let Some(previous) = previous.replace(name.to_owned()) {
            lab.ctl("h1", &["detach", &previous]).assert_code(0);
        }
        let begin = Instant::now();
        attach(&lab, name, &publish);
        let server = Server::bind(&lab, &format!("h1-{name}"), PORT);
        let mut callers = BTreeSet::new();
        eventually(&format!("{name} receives from each client"), REPAIR_DEADLINE * 2, || {
            callers.extend(server.drain_sources());
            if callers.len() >= clients.len() { Ok(()) } else { Err(format!("{callers:?}")) }
        })
        .await;
        println!("{name} received from all clients {} ms after its attach began", begin.elapsed().as_millis());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn detach_deletes_only_own_conntrack_entries() {
    let lab = start_lab().await;
    let world: [SocketAddr; 2] = ["10.99.0.254:7000", "[fd99::254]:7000"].map(|text| text.parse().expect_ok("an address"));
    let server = Server::bind(&lab, "world", 7000);
    let first = attach(&lab, "a1", &["--publish", "5353:5353/udp"]);
    let _other = attach(&lab, "other", &["--publish", "5354:5353/udp"]);
    let inner = [Server::bind(&lab, "h1-a1", PORT), Server::bind(&lab, "h1-other", PORT)];
    let once = |from: &str, to: SocketAddr| {
        let client = socket(&lab, from, if to.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() });
        client.send_to(b"?", to).expect_ok("send");
        client
    };
    // Flows that send no more: a deleted entry does not come back.
    let mut idle = Vec::new();
    for (family, world) in Family::ALL.into_iter().zip(world) {
        for from in ["h1-a1", "h1-other", "h1-c1"] {
            idle.push(once(from, world));
            server.wait_for_datagram(&format!("world receives from {from}"), CONVERGE_TIMEOUT).await;
        }
        for (port, inner) in [(5353, &inner[0]), (5354, &inner[1])] {
            idle.push(once("world", SocketAddr::new(published_address(&lab, family).ip(), port)));
            inner.wait_for_datagram(&format!("port {port} receives"), CONVERGE_TIMEOUT).await;
        }
    }
    let before = conntrack_entries(&lab);
    let own: Vec<String> = first.addresses().iter().map(|(_, address)| conntrack_address(*address)).collect();
    let is_own = |flow: &str| own.iter().any(|address| flow.split(' ').any(|word| word.ends_with(&format!("={address}"))));
    assert_eq!(before.iter().filter(|flow| is_own(flow)).count(), 4, "both ways in both families: {before:?}");
    lab.ctl("h1", &["detach", "a1"]).assert_code(0);
    let (expected, after) = (before.into_iter().filter(|flow| !is_own(flow)), conntrack_entries(&lab));
    let missing: Vec<String> = expected
        .filter(|flow| flow.contains("dport=7000") || flow.contains("dport=5354"))
        .filter(|flow| !after.contains(flow))
        .collect();
    assert!(missing.is_empty(), "entries of other flows were deleted: {missing:?}");
    let left: Vec<&String> = after.iter().filter(|flow| is_own(flow)).collect();
    assert!(left.is_empty(), "entries of a detached container remain: {left:?}");
    drop(idle);
}

/// An address in the format of `/proc/net/nf_conntrack`: IPv6 in full length.
fn conntrack_address(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => address.segments().map(|segment| format!("{segment:04x}")).join(":"),
    }
}

/// A flow that begins without rules would leave the overlay with the container's own address for its whole life.
#[tokio::test(flavor = "multi_thread")]
async fn flow_is_masqueraded_after_rules_return() {
    let lab = start_lab().await;
    let server = Server::bind(&lab, "world", 7000);
    let agent = lab.host("h1").agent().expect_ok("an agent");
    agent.signal(Signal::SIGSTOP).expect_ok("SIGSTOP");
    // Another program's rule keeps conntrack active meanwhile, as on a host with a firewall.
    let other = "add table inet other; add chain inet other forward { type filter hook forward priority 0; }; \
                 add rule inet other forward ct state established accept; delete table inet overlayd";
    kernel::run(&lab, "h1", &["nft", other]);
    let client = Client::start(&lab, "h1-c1", "10.99.0.254:7000".parse().expect_ok("an address"));
    let source = server.wait_for_datagram("world receives from the container", CONVERGE_TIMEOUT).await;
    assert!(source.to_string().starts_with("10.244."), "the flow begins without masquerade: {source}");
    agent.signal(Signal::SIGCONT).expect_ok("SIGCONT");
    let host = published_address(&lab, Family::V4).ip();
    eventually("the flow is masqueraded", CONVERGE_TIMEOUT, || {
        let last = server.drain_sources().pop().map(|from| from.ip().to_canonical());
        if last == Some(host) { Ok(()) } else { Err(format!("from {last:?}")) }
    })
    .await;
    drop(client);
}
