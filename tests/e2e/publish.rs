//! Published ports: reachable from every intended place and from nowhere else, for the endpoint's lifetime.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::api::{AttachResponse, Endpoints};
use overlay_agent::model::{Family, PerFamily};
use overlay_tests::calls::Protocol::{self, Tcp, Udp};
use overlay_tests::calls::{Connection, observe_source, observe_source_within, serve};
use overlay_tests::notify::Notifications;
use overlay_tests::packet_builder::{self, PacketSocket};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::wait::eventually_async;
use overlay_tests::{ExpectContext, TestLab, eventually, kernel};
use overlayctl::lab::Families;
use tokio::task::JoinSet;

/// Two hosts with one container each, in both families.
async fn start_lab(agent_args: &[&str]) -> TestLab {
    TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
        options.agent_args = agent_args.iter().map(|flag| (*flag).to_owned()).collect();
    })
    .await
}

/// Switches the hooks of `br_netfilter` for bridged frames on or off. Returns whether the kernel has them.
fn set_bridge_netfilter(lab: &TestLab, on: bool) -> bool {
    let names = ["iptables", "ip6tables"].map(|name| format!("/proc/sys/net/bridge/bridge-nf-call-{name}"));
    if !Path::new(&names[0]).exists() {
        return false;
    }
    kernel::shell(lab, "h1", &format!("for f in {}; do echo {} >$f; done", names.join(" "), u8::from(on)));
    true
}

/// Attaches a container with servers to the first host.
fn attach(lab: &TestLab, name: &str, publish: &[&str], ports: &[(Protocol, u16)]) -> (AttachResponse, JoinSet<()>) {
    let flags = publish.iter().flat_map(|port| ["--publish", port]);
    let arguments: Vec<&str> = ["-o", "json", "attach", name].into_iter().chain(flags).collect();
    let attached = lab.ctl("h1", &arguments).assert_code(0).json();
    (attached, serve(&lab.open_netns(&format!("h1-{name}")), ports))
}

fn underlay_address(lab: &TestLab, host: &str, family: Family) -> IpAddr {
    *lab.host(host).layout().addresses.get(family).expect_ok("an address")
}

fn world_address(family: Family) -> IpAddr {
    if family == Family::V4 { [10, 99, 0, 254].into() } else { [0xfd99, 0, 0, 0, 0, 0, 0, 0x254].into() }
}

fn loopback_address(family: Family) -> IpAddr {
    if family == Family::V4 { [127, 0, 0, 1].into() } else { [0, 0, 0, 0, 0, 0, 0, 1].into() }
}

async fn container_addresses(lab: &TestLab, host: &str) -> PerFamily<IpAddr> {
    let endpoints = lab.host(host).client().endpoints().await.expect_ok(host).endpoints;
    endpoints.into_iter().find(|endpoint| endpoint.name.as_str() == "c1").expect_ok("c1").addresses()
}

/// The source address that the server sees; the call must succeed.
async fn observed_source(lab: &TestLab, from: &str, to: SocketAddr, protocol: Protocol) -> IpAddr {
    observe_source(&lab.open_netns(from), to, protocol).await.expect_ok(&format!("{from} calls {to} ({protocol:?})"))
}

/// Time without an answer that counts as unreachable.
const NO_ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Checks that a call is not answered.
async fn assert_unreachable(lab: &TestLab, from: &str, to: &str) {
    let to = to.parse().expect_ok("an address and a port");
    for protocol in [Tcp, Udp] {
        let answer = observe_source_within(&lab.open_netns(from), to, protocol, NO_ANSWER_TIMEOUT).await;
        assert!(answer.is_err(), "{from} reaches {to} ({protocol:?}) and is seen as {answer:?}");
    }
}

fn socket_address(address: IpAddr, port: u16) -> String {
    SocketAddr::new(address, port).to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn published_port_is_reachable_from_everywhere() {
    let lab = start_lab(&[]).await;
    let publish = ["8080:80", "8080:80/udp", "9000-9002:7000-7002"];
    let ports = [(Tcp, 80), (Udp, 80), (Tcp, 7000), (Tcp, 7001), (Tcp, 7002)];
    let (web, _servers) = attach(&lab, "web", &publish, &ports);
    // Without and with br_netfilter's hooks for bridged frames.
    println!("this kernel has br_netfilter: {}", set_bridge_netfilter(&lab, false));
    assert_reachable_from_everywhere(&lab, &web, false).await;
    if set_bridge_netfilter(&lab, true) {
        assert_reachable_from_everywhere(&lab, &web, true).await;
    }
    let output = lab.ctl("h1", &["inspect", "web"]).assert_code(0).stdout;
    assert!(output.contains("8080") && output.contains("9000"), "{output}");
}

async fn assert_reachable_from_everywhere(lab: &TestLab, web: &AttachResponse, hooks: bool) {
    let neighbour = container_addresses(lab, "h1").await;
    let far = container_addresses(lab, "h2").await;
    let h2 = lab.status("h2").await.lease.expect_ok("a lease").subnet;
    for family in Family::ALL {
        let of = |addresses: &PerFamily<IpAddr>| *addresses.get(family).expect_ok("an address");
        let (host, gateway, direct) = (underlay_address(lab, "h1", family), of(&web.gateway), of(&web.endpoint.addresses()));
        let h2_base = h2.get(family).expect_ok("a subnet").base();
        for protocol in [Tcp, Udp] {
            for (from, to, port, expected, why) in [
                ("world", host, 8080, world_address(family), "from outside"),
                ("h2", host, 8080, underlay_address(lab, "h2", family), "from another host"),
                ("h2", gateway, 8080, h2_base, "from another host through the overlay"),
                ("h2-c1", gateway, 8080, of(&far), "from another host's container through the overlay"),
                (
                    "h2-c1",
                    host,
                    8080,
                    underlay_address(lab, "h2", family),
                    "from another host's container, by its host's address",
                ),
                ("h1", host, 8080, host, "from the host by its own address"),
                ("h1", gateway, 8080, gateway, "from the host by the bridge's address"),
                ("h1", loopback_address(family), 8080, gateway, "from the host by loopback"),
                ("h1-c1", host, 8080, gateway, "from the neighbour by the host's address"),
                ("h1-c1", gateway, 8080, gateway, "from the neighbour by the gateway"),
                ("h1-c1", direct, 80, of(&neighbour), "from the neighbour, past the published port"),
                ("h2-c1", direct, 80, of(&far), "from another host's container, past the published port"),
                ("h1-web", host, 8080, gateway, "from the container itself"),
            ] {
                if hooks && to == loopback_address(Family::V6) {
                    // A limit: the answer is translated on the bridge, and the kernel accepts no ::1 from a device
                    // (`ip6_rcv_core`).
                    assert_unreachable(lab, from, &socket_address(to, port)).await;
                    continue;
                }
                let address = observed_source(lab, from, SocketAddr::new(to, port), protocol).await;
                assert_eq!(address, expected, "{why} ({family}, {protocol:?}, hooks on the bridge: {hooks})");
            }
        }
        for port in [9000, 9001, 9002] {
            observed_source(lab, "world", SocketAddr::new(host, port), Tcp).await;
        }
        assert_unreachable(lab, "world", &socket_address(host, 9003)).await;
        assert_unreachable(lab, "world", &socket_address(host, 80)).await;
    }
}

/// Without masquerade, another host's container keeps its own address, also via the host's address.
#[tokio::test(flavor = "multi_thread")]
async fn unmasqueraded_source_address_is_kept() {
    let lab = start_lab(&["--ip-masq=false"]).await;
    set_bridge_netfilter(&lab, false);
    let (_web, _servers) = attach(&lab, "web", &["8080:80", "8080:80/udp"], &[(Tcp, 80), (Udp, 80)]);
    let far = container_addresses(&lab, "h2").await;
    for (family, own) in far.iter() {
        let host = SocketAddr::new(underlay_address(&lab, "h1", family), 8080);
        for protocol in [Tcp, Udp] {
            assert_eq!(observed_source(&lab, "h2-c1", host, protocol).await, *own, "{family}, {protocol:?}");
            assert_eq!(observed_source(&lab, "world", host, protocol).await, world_address(family));
            // Answers of a neighbour and of the container itself would bypass the host.
            for from in ["h1-c1", "h1-web", "h1"] {
                observed_source(&lab, from, host, protocol).await;
            }
            observed_source(&lab, "h1", SocketAddr::new(loopback_address(family), 8080), protocol).await;
        }
    }
}

/// A port bound to an address is reachable only by that address. One on loopback only from the host.
#[tokio::test(flavor = "multi_thread")]
async fn bound_port_is_reachable_only_there() {
    let lab = start_lab(&[]).await;
    set_bridge_netfilter(&lab, false);
    kernel::shell(&lab, "h1", "ip address add 10.99.77.1/16 dev eth0; ip address add fd99::77:1/64 dev eth0 nodad");
    let own = Family::ALL.map(|family| underlay_address(&lab, "h1", family));
    let bound = [
        socket_address("127.0.0.1".parse().expect_ok("it"), 8081),
        "[::1]:8081".to_owned(),
        socket_address(own[0], 8082),
        socket_address(own[1], 8082),
    ];
    let publish: Vec<String> = bound.iter().flat_map(|at| [format!("{at}:80"), format!("{at}:80/udp")]).collect();
    let publish: Vec<&str> = publish.iter().map(String::as_str).collect();
    let (web, _servers) = attach(&lab, "web", &publish, &[(Tcp, 80), (Udp, 80)]);
    let second: [IpAddr; 2] = ["10.99.77.1", "fd99::77:1"].map(|text| text.parse().expect_ok("an address"));
    for (index, family) in Family::ALL.into_iter().enumerate() {
        let gateway = *web.gateway.get(family).expect_ok("a gateway");
        for protocol in [Tcp, Udp] {
            observed_source(&lab, "h1", SocketAddr::new(loopback_address(family), 8081), protocol).await;
            for from in ["world", "h1", "h1-c1", "h2-c1", "h1-web"] {
                observed_source(&lab, from, SocketAddr::new(own[index], 8082), protocol).await;
            }
        }
        for from in ["world", "h1", "h1-c1", "h2-c1"] {
            assert_unreachable(&lab, from, &socket_address(own[index], 8081)).await;
            assert_unreachable(&lab, from, &socket_address(second[index], 8081)).await;
            assert_unreachable(&lab, from, &socket_address(second[index], 8082)).await;
            assert_unreachable(&lab, from, &socket_address(gateway, 8082)).await;
        }
        assert_unreachable(&lab, "h1", &socket_address(loopback_address(family), 8082)).await;
    }
    assert_unreachable(&lab, "h1", "127.0.0.2:8081").await;

    // Not by handmade packets either: from outside to loopback, and with a loopback source.
    let mac = |host: &str| -> packet_builder::Mac {
        let link = kernel::link(&lab, host, "eth0").expect_ok("eth0");
        let bytes = kernel::text(&link, "address");
        let bytes: Vec<u8> = bytes.split(':').map(|byte| u8::from_str_radix(byte, 16).expect_ok("a MAC")).collect();
        bytes.try_into().ok().expect_ok("six bytes")
    };
    let packet_socket = PacketSocket::open(&lab.open_netns("world"), "eth0");
    let tap = PacketSocket::open(&lab.open_netns("h1-web"), "eth0");
    let (to, from) = (mac("h1"), mac("world"));
    let own: SocketAddr = SocketAddr::new(own[0], 8082);
    let marks = [b"hand made A".as_slice(), b"hand made B", b"hand made C", b"hand made D"];
    for (source, destination, mark) in [
        ("10.99.0.254:9", "127.0.0.1:8081", marks[0]),
        ("127.0.0.1:9", "127.0.0.1:8081", marks[1]),
        ("127.0.0.1:9", &own.to_string(), marks[2]),
        ("10.99.0.254:9", &own.to_string(), marks[3]),
    ] {
        let parsed = |text: &str| text.parse().expect_ok("an address");
        packet_socket.send(&packet_builder::ip_frame(to, from, &packet_builder::udp(parsed(source), parsed(destination), mark)));
    }
    let mut came = Vec::new();
    eventually("the allowed packet has arrived", CONVERGE_TIMEOUT, || {
        came.extend(tap.frames());
        if came.iter().any(|frame| frame.ends_with(marks[3])) { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    for mark in &marks[..3] {
        assert!(!came.iter().any(|frame| frame.ends_with(mark)), "{} was delivered", String::from_utf8_lossy(mark));
    }
}

/// The error names the current holder of a port, and a refused attach leaves nothing.
#[tokio::test(flavor = "multi_thread")]
async fn taken_ports_are_refused() {
    let lab = start_lab(&[]).await;
    let own = underlay_address(&lab, "h1", Family::V4);
    let inside = lab.open_netns("h1");
    let listener = inside.run(|| TcpListener::bind("0.0.0.0:8090")).expect_ok("enter").expect_ok("a listener");
    let bound = inside.run(|| UdpSocket::bind((own, 8091))).expect_ok("enter").expect_ok("a socket");
    let six = inside.run(|| TcpListener::bind("[::1]:8092")).expect_ok("enter").expect_ok("a listener");
    let program = std::env::current_exe().expect_ok("this program");
    // The name in /proc/PID/comm.
    let name: String = program.file_name().expect_ok("a name").to_string_lossy().chars().take(15).collect();
    let (_web, _servers) = attach(&lab, "web", &["8080:80", "9000-9009:7000-7009", "10.99.1.1:8200:80"], &[(Tcp, 80)]);
    let refused = |ports: &str, words: &[&str]| {
        lab.ctl("h1", &["attach", "other", "--publish", ports]).assert_code(1).assert_stderr_contains(words);
        assert!(lab.netns("h1-other").is_err(), "{ports}: no namespace is left behind");
    };
    refused("8090:80", &["8090", "listens on 0.0.0.0:8090", &name]);
    refused("127.0.0.1:8090:80", &["8090", &name]);
    refused("8091:80/udp", &["8091", &socket_address(own, 8091), &name]);
    refused("8092:80", &["[::1]:8092", &name]);
    refused("8085-8095:80-90", &["8090", &name]);
    refused("8080:81", &["8080", "endpoint web", "overlayctl detach web"]);
    refused("127.0.0.1:8080:81", &["8080", "endpoint web"]);
    refused("9009-9012:1-4", &["9009", "endpoint web"]);
    refused("8200:80", &["8200", "endpoint web"]);
    refused("192.0.2.1:8300:80", &["192.0.2.1"]);
    let listed: Endpoints = lab.ctl("h1", &["-o", "json", "endpoints"]).assert_code(0).json();
    assert_eq!(listed.endpoints.len(), 2, "web and c1: {listed:?}");
    // No conflict: another protocol, another address, the next port.
    let free = ["8090:80/udp", "8091:80", "127.0.0.1:8091:80/udp", "127.0.0.1:8200:80", "9010:80", "10.99.1.1:8092:80"];
    let (_other, _servers) = attach(&lab, "other", &free, &[(Tcp, 80), (Udp, 80)]);
    for (protocol, port) in [(Udp, 8090), (Tcp, 8091), (Tcp, 9010), (Tcp, 8092)] {
        observed_source(&lab, "world", SocketAddr::new(own, port), protocol).await;
    }
    drop((listener, bound, six));
    // The holder's end frees the port.
    lab.ctl("h1", &["detach", "web"]).assert_code(0);
    attach(&lab, "next", &["8080:80", "8090:80"], &[]);
}

/// Runtimes publish on both wildcards by default, even if containers have one family.
#[tokio::test(flavor = "multi_thread")]
async fn dual_stack_wildcards_are_accepted_in_single_family() {
    for (families, family) in [(Families::V4, Family::V4), (Families::V6, Family::V6)] {
        let lab = TestLab::up(|options| {
            options.hosts = 1;
            options.containers = 0;
            options.families = families;
        })
        .await;
        set_bridge_netfilter(&lab, false);
        let (missing, specific) = match family {
            Family::V4 => ("[::]:8081:80", "[::1]:8082:80"),
            Family::V6 => ("0.0.0.0:8081:80", "127.0.0.1:8082:80"),
        };
        let publish = ["0.0.0.0:8080:80", "[::]:8080:80", missing];
        let (web, _servers) = attach(&lab, "web", &publish, &[(Tcp, 80)]);
        assert_eq!(web.endpoint.published.len(), 3);
        assert_eq!(attach(&lab, "web", &publish, &[]).0.endpoint, web.endpoint, "the same again");
        let own = underlay_address(&lab, "h1", family);
        observed_source(&lab, "world", SocketAddr::new(own, 8080), Tcp).await;
        assert_unreachable(&lab, "world", &socket_address(own, 8081)).await;
        let output = lab.ctl("h1", &["inspect", "web"]).assert_code(0).stdout;
        assert!(output.contains("[::]:8080") && output.contains("0.0.0.0:8080") && output.contains("in place"), "{output}");
        let status = lab.status("h1").await;
        assert!(status.ready && status.problems.is_empty(), "{:?}", status.problems);
        lab.ctl("h1", &["attach", "other", "--publish", specific])
            .assert_code(1)
            .assert_stderr_contains(&[specific, "no container could reply"]);
        // An ineffective binding does not claim the port.
        attach(&lab, "next", &["8081:80"], &[]);
    }
}

/// The first host's kernel state of published ports, without order: a recreated table has another order.
fn publish_state(lab: &TestLab) -> BTreeSet<String> {
    let rules = kernel::run(lab, "h1", &["nft", "-s", "list", "ruleset"]);
    let routes = kernel::run(lab, "h1", &["ip", "-6", "route", "show", "table", "all"]);
    // The underlay's own addresses change by themselves.
    let routes = routes.lines().filter(|line| line.contains("ovb."));
    let localnet = format!("route_localnet {}", kernel::sysctl(lab, "h1", "ipv4/conf/ovb.1/route_localnet"));
    let parts = rules.split(['\n', ',', '{', '}']).chain(routes).chain([localnet.as_str()]);
    parts.map(|part| part.trim().trim_start_matches("elements = ").to_owned()).collect()
}

/// Ports end with the endpoint; a killed agent, a new agent and flushed rules end none.
#[tokio::test(flavor = "multi_thread")]
async fn published_port_lives_as_long_as_endpoint() {
    let lab = start_lab(&[]).await;
    set_bridge_netfilter(&lab, false);
    let before = publish_state(&lab);
    let (_web, _servers) = attach(&lab, "web", &["8080:80", "8080:80/udp"], &[(Tcp, 80), (Udp, 80)]);
    let all = |lab: &TestLab| -> Vec<(&'static str, SocketAddr)> {
        let at = |family| {
            [
                ("world", underlay_address(lab, "h1", family)),
                ("h1", loopback_address(family)),
                ("h1-web", underlay_address(lab, "h1", family)),
            ]
        };
        Family::ALL.into_iter().flat_map(at).map(|(from, address)| (from, SocketAddr::new(address, 8080))).collect()
    };
    let mut connections = Vec::new();
    for (from, to) in all(&lab) {
        connections.push(Connection::open(&lab.open_netns(from), to).await.expect_ok(from));
    }
    let kernel_changes = Notifications::subscribe(&lab.open_netns("h1"));
    kernel_changes.wait_quiet().await;
    lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    for (from, to) in all(&lab) {
        for protocol in [Tcp, Udp] {
            observed_source(&lab, from, to, protocol).await;
        }
    }
    lab.host("h1").agent_start(&[]).expect_ok("start");
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    for connection in &mut connections {
        connection.ask().await.expect_ok("a connection that was there before");
    }
    // On a busy machine the kernel itself removes underlay neighbours (port 0).
    let by_agent = |line: &String| !(line.starts_with("neighbour") && line.ends_with("by port 0"));
    let changes: Vec<String> = kernel_changes.drain().into_iter().filter(by_agent).collect();
    assert!(changes.is_empty(), "a killed agent and the next one changed the kernel: {changes:?}");

    kernel::run(&lab, "h1", &["nft", "flush", "ruleset"]);
    for (from, to) in all(&lab) {
        let lab = &lab;
        eventually_async(&format!("{from} reaches {to} again"), CONVERGE_TIMEOUT, || async move {
            observe_source(&lab.open_netns(from), to, Tcp).await.map(|_| ())
        })
        .await;
        // A conntrack entry from the time without rules must not block a new call.
        eventually_async(&format!("{from} reaches {to} again by UDP"), CONVERGE_TIMEOUT, || async move {
            observe_source(&lab.open_netns(from), to, Udp).await.map(|_| ())
        })
        .await;
    }
    lab.ctl("h1", &["detach", "web"]).assert_code(0);
    for (from, to) in all(&lab).into_iter().filter(|(from, _)| *from != "h1-web") {
        assert_unreachable(&lab, from, &to.to_string()).await;
    }
    eventually("no state is left", CONVERGE_TIMEOUT, || {
        let difference = kernel::difference(&publish_state(&lab), &before);
        if difference.is_empty() { Ok(()) } else { Err(format!("\n{difference}")) }
    })
    .await;
}

/// `overlayctl run` publishes ports for the command's lifetime.
#[tokio::test(flavor = "multi_thread")]
async fn run_publishes_ports_while_command_runs() {
    let lab = start_lab(&[]).await;
    let own = SocketAddr::new(underlay_address(&lab, "h1", Family::V4), 8080);
    let program = overlay_tests::programs::overlayctl().to_string_lossy().into_owned();
    let command = [&program, "run", "--name", "web", "--publish", "8080:80", "--", "sleep", "60"].map(String::from);
    let mut running = lab.command("h1", &command).expect_ok("h1").spawn().expect_ok("overlayctl run");
    eventually("the command's namespace exists", CONVERGE_TIMEOUT, || lab.netns("h1-web").map(|_| ()).map_err(|e| e.to_string()))
        .await;
    let _servers = serve(&lab.open_netns("h1-web"), &[(Tcp, 80)]);
    let reached = || async { observe_source(&lab.open_netns("world"), own, Tcp).await };
    eventually_async("the port is published", CONVERGE_TIMEOUT, || async { reached().await.map(|_| ()) }).await;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(running.id()).expect_ok("a process id"));
    nix::sys::signal::kill(pid, Signal::SIGTERM).expect_ok("SIGTERM");
    running.wait().expect_ok("the end");
    assert!(reached().await.is_err(), "the port ends with the command");
}

/// SCTP is translated like TCP and UDP. The machine's kernel may lack SCTP sockets, so the first packet is handmade.
#[tokio::test(flavor = "multi_thread")]
async fn sctp_port_is_translated() {
    let lab = start_lab(&[]).await;
    let (web, _servers) = attach(&lab, "web", &["2905:2906/sctp"], &[]);
    let tap = PacketSocket::open(&lab.open_netns("h1-web"), "eth0");
    for (family, inner) in web.endpoint.addresses().iter() {
        let to = SocketAddr::new(underlay_address(&lab, "h1", family), 2905);
        let init = sctp_init(4000, to.port());
        let packet = packet_builder::ip(world_address(family), to.ip(), IPPROTO_SCTP, &init);
        let packet_socket = PacketSocket::open(&lab.open_netns("world"), "eth0");
        let link = |host: &str| kernel::text(&kernel::link(&lab, host, "eth0").expect_ok("eth0"), "address");
        let mac = |host: &str| -> packet_builder::Mac {
            let bytes: Vec<u8> = link(host).split(':').map(|byte| u8::from_str_radix(byte, 16).expect_ok("a MAC")).collect();
            bytes.try_into().ok().expect_ok("six bytes")
        };
        let frame = packet_builder::ip_frame(mac("h1"), mac("world"), &packet);
        packet_socket.send(&frame);
        // The ports follow the IP header; the second one is now the container's.
        let ports = [4000_u16.to_be_bytes(), 2906_u16.to_be_bytes()].concat();
        let address = packet_builder::octets(*inner);
        eventually(&format!("the association's first packet arrives ({family})"), CONVERGE_TIMEOUT, || {
            let frames = tap.frames();
            let header = if family == Family::V4 { 14 + 20 } else { 14 + 40 };
            let is_it = |frame: &&Vec<u8>| {
                frame.get(header..header + 4) == Some(&ports) && frame[header - address.len()..header] == address
            };
            match frames.iter().find(is_it) {
                Some(frame) => {
                    let mut bare = frame[header..].to_vec();
                    bare[8..12].fill(0);
                    assert_eq!(frame[header + 8..header + 12], crc32c(&bare).to_le_bytes(), "its checksum is right");
                    Ok(())
                }
                None => Err(format!("{} other frames", frames.len())),
            }
        })
        .await;
    }
}

/// SCTP's protocol number (IANA).
const IPPROTO_SCTP: u8 = 132;

/// A packet with a single INIT chunk (RFC 9260 sections 3.1 and 3.3.2).
fn sctp_init(source: u16, destination: u16) -> Vec<u8> {
    let head = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    let chunk =
        [[1, 0, 0, 20].as_slice(), &7_u32.to_be_bytes(), &65536_u32.to_be_bytes(), &[0, 1, 0, 1], &1_u32.to_be_bytes()].concat();
    let mut packet = [head.as_slice(), &[0; 8], &chunk].concat();
    let sum = crc32c(&packet).to_le_bytes();
    packet[8..12].copy_from_slice(&sum);
    packet
}

/// CRC32c, bit by bit (RFC 9260 appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}
