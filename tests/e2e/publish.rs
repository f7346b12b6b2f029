//! Ports of a host that lead to a container: from everywhere where they are meant to be reached, from nowhere else, and as long as the endpoint is
//! there.

#[path = "publish/calls.rs"]
mod calls;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::time::Duration;

use calls::Protocol::{self, Tcp, Udp};
use calls::{Connection, call, call_within, serve};
use nix::sys::signal::Signal;
use overlay_agent::model::api::{Attached, Endpoints};
use overlay_agent::model::{Family, PerFamily};
use overlay_tests::craft::{self, Wire};
use overlay_tests::notify::Notifications;
use overlay_tests::story::{READY, SOON};
use overlay_tests::wait::eventually_asked;
use overlay_tests::{Must, Story, eventually, kernel};
use overlayctl::lab::Families;
use tokio::task::JoinSet;

/// Two hosts with a container each, both families.
async fn lab(agent_args: &[&str]) -> Story {
    Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
        options.agent_args = agent_args.iter().map(|flag| (*flag).to_owned()).collect();
    })
    .await
}

/// Switches netfilter's hooks for frames that stay on a bridge on or off, which `br_netfilter` brings. Whether there are any.
fn hooks_on_the_bridge(story: &Story, on: bool) -> bool {
    let names = ["iptables", "ip6tables"].map(|name| format!("/proc/sys/net/bridge/bridge-nf-call-{name}"));
    if !Path::new(&names[0]).exists() {
        return false;
    }
    kernel::shell(story, "h1", &format!("for f in {}; do echo {} >$f; done", names.join(" "), u8::from(on)));
    true
}

/// Attaches a container to the first host, with servers in it.
fn attach(story: &Story, name: &str, publish: &[&str], ports: &[(Protocol, u16)]) -> (Attached, JoinSet<()>) {
    let flags = publish.iter().flat_map(|port| ["--publish", port]);
    let arguments: Vec<&str> = ["-o", "json", "attach", name].into_iter().chain(flags).collect();
    let attached = story.ctl("h1", &arguments).exits(0).json();
    (attached, serve(&story.inside(&format!("h1-{name}")), ports))
}

fn underlay(story: &Story, host: &str, family: Family) -> IpAddr {
    *story.at(host).layout().addresses.get(family).must("an address")
}

fn world(family: Family) -> IpAddr {
    if family == Family::V4 { [10, 99, 0, 254].into() } else { [0xfd99, 0, 0, 0, 0, 0, 0, 0x254].into() }
}

fn loopback(family: Family) -> IpAddr {
    if family == Family::V4 { [127, 0, 0, 1].into() } else { [0, 0, 0, 0, 0, 0, 0, 1].into() }
}

async fn container(story: &Story, host: &str) -> PerFamily<IpAddr> {
    let endpoints = story.at(host).client().endpoints().await.must(host).endpoints;
    endpoints.into_iter().find(|endpoint| endpoint.name.as_str() == "c1").must("c1").addresses()
}

/// What the server sees of a call; the call must be answered.
async fn seen(story: &Story, from: &str, to: SocketAddr, protocol: Protocol) -> IpAddr {
    call(&story.inside(from), to, protocol).await.must(&format!("{from} calls {to} ({protocol:?})"))
}

/// How long nobody answers.
const SILENCE: Duration = Duration::from_secs(2);

/// A call that nobody answers.
async fn unreachable(story: &Story, from: &str, to: &str) {
    let to = to.parse().must("an address and a port");
    for protocol in [Tcp, Udp] {
        let answer = call_within(&story.inside(from), to, protocol, SILENCE).await;
        assert!(answer.is_err(), "{from} reaches {to} ({protocol:?}) and is seen as {answer:?}");
    }
}

fn at(address: IpAddr, port: u16) -> String {
    SocketAddr::new(address, port).to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn from_everywhere() {
    let story = lab(&[]).await;
    let publish = ["8080:80", "8080:80/udp", "9000-9002:7000-7002"];
    let ports = [(Tcp, 80), (Udp, 80), (Tcp, 7000), (Tcp, 7001), (Tcp, 7002)];
    let (web, _servers) = attach(&story, "web", &publish, &ports);
    // Without and with netfilter's hooks for what stays on the bridge.
    println!("this kernel has br_netfilter: {}", hooks_on_the_bridge(&story, false));
    everywhere(&story, &web, false).await;
    if hooks_on_the_bridge(&story, true) {
        everywhere(&story, &web, true).await;
    }
    let said = story.ctl("h1", &["inspect", "web"]).exits(0).out;
    assert!(said.contains("8080") && said.contains("9000"), "{said}");
}

async fn everywhere(story: &Story, web: &Attached, hooks: bool) {
    let neighbour = container(story, "h1").await;
    let far = container(story, "h2").await;
    let h2 = story.status("h2").await.lease.must("a lease").subnet;
    for family in Family::ALL {
        let of = |addresses: &PerFamily<IpAddr>| *addresses.get(family).must("an address");
        let (host, gateway, direct) = (underlay(story, "h1", family), of(&web.gateway), of(&web.endpoint.addresses()));
        let h2_base = h2.get(family).must("a subnet").base();
        for protocol in [Tcp, Udp] {
            for (from, to, port, expected, why) in [
                ("world", host, 8080, world(family), "from outside"),
                ("h2", host, 8080, underlay(story, "h2", family), "from another host"),
                ("h2", gateway, 8080, h2_base, "from another host through the overlay"),
                ("h2-c1", gateway, 8080, of(&far), "from another host's container through the overlay"),
                ("h2-c1", host, 8080, underlay(story, "h2", family), "from another host's container, by its host's address"),
                ("h1", host, 8080, host, "from the host by its own address"),
                ("h1", gateway, 8080, gateway, "from the host by the bridge's address"),
                ("h1", loopback(family), 8080, gateway, "from the host by loopback"),
                ("h1-c1", host, 8080, gateway, "from the neighbour by the host's address"),
                ("h1-c1", gateway, 8080, gateway, "from the neighbour by the gateway"),
                ("h1-c1", direct, 80, of(&neighbour), "from the neighbour, past the published port"),
                ("h2-c1", direct, 80, of(&far), "from another host's container, past the published port"),
                ("h1-web", host, 8080, gateway, "from the container itself"),
            ] {
                if hooks && to == loopback(Family::V6) {
                    // The limit: the answer is translated back on the bridge, and the kernel takes nothing to ::1 from a wire (`ip6_rcv_core`).
                    unreachable(story, from, &at(to, port)).await;
                    continue;
                }
                let address = seen(story, from, SocketAddr::new(to, port), protocol).await;
                assert_eq!(address, expected, "{why} ({family}, {protocol:?}, hooks on the bridge: {hooks})");
            }
        }
        for port in [9000, 9001, 9002] {
            seen(story, "world", SocketAddr::new(host, port), Tcp).await;
        }
        unreachable(story, "world", &at(host, 9003)).await;
        unreachable(story, "world", &at(host, 80)).await;
    }
}

/// Where nothing is masqueraded, another host's container is seen by its own address also by way of the host's.
#[tokio::test(flavor = "multi_thread")]
async fn without_masquerade() {
    let story = lab(&["--ip-masq=false"]).await;
    hooks_on_the_bridge(&story, false);
    let (_web, _servers) = attach(&story, "web", &["8080:80", "8080:80/udp"], &[(Tcp, 80), (Udp, 80)]);
    let far = container(&story, "h2").await;
    for (family, own) in far.iter() {
        let host = SocketAddr::new(underlay(&story, "h1", family), 8080);
        for protocol in [Tcp, Udp] {
            assert_eq!(seen(&story, "h2-c1", host, protocol).await, *own, "{family}, {protocol:?}");
            assert_eq!(seen(&story, "world", host, protocol).await, world(family));
            // Answers of a neighbour and of the container itself would go past the host.
            for from in ["h1-c1", "h1-web", "h1"] {
                seen(&story, from, host, protocol).await;
            }
            seen(&story, "h1", SocketAddr::new(loopback(family), 8080), protocol).await;
        }
    }
}

/// A port of one address is reached by that address alone, one of loopback from the host alone.
#[tokio::test(flavor = "multi_thread")]
async fn only_where_it_is_bound() {
    let story = lab(&[]).await;
    hooks_on_the_bridge(&story, false);
    kernel::shell(&story, "h1", "ip address add 10.99.77.1/16 dev eth0; ip address add fd99::77:1/64 dev eth0 nodad");
    let own = Family::ALL.map(|family| underlay(&story, "h1", family));
    let bound = [at("127.0.0.1".parse().must("it"), 8081), "[::1]:8081".to_owned(), at(own[0], 8082), at(own[1], 8082)];
    let publish: Vec<String> = bound.iter().flat_map(|at| [format!("{at}:80"), format!("{at}:80/udp")]).collect();
    let publish: Vec<&str> = publish.iter().map(String::as_str).collect();
    let (web, _servers) = attach(&story, "web", &publish, &[(Tcp, 80), (Udp, 80)]);
    let second: [IpAddr; 2] = ["10.99.77.1", "fd99::77:1"].map(|text| text.parse().must("an address"));
    for (index, family) in Family::ALL.into_iter().enumerate() {
        let gateway = *web.gateway.get(family).must("a gateway");
        for protocol in [Tcp, Udp] {
            seen(&story, "h1", SocketAddr::new(loopback(family), 8081), protocol).await;
            for from in ["world", "h1", "h1-c1", "h2-c1", "h1-web"] {
                seen(&story, from, SocketAddr::new(own[index], 8082), protocol).await;
            }
        }
        for from in ["world", "h1", "h1-c1", "h2-c1"] {
            unreachable(&story, from, &at(own[index], 8081)).await;
            unreachable(&story, from, &at(second[index], 8081)).await;
            unreachable(&story, from, &at(second[index], 8082)).await;
            unreachable(&story, from, &at(gateway, 8082)).await;
        }
        unreachable(&story, "h1", &at(loopback(family), 8082)).await;
    }
    unreachable(&story, "h1", "127.0.0.2:8081").await;

    // Not by a packet made by hand, either: from outside to loopback, and from "loopback".
    let mac = |host: &str| -> craft::Mac {
        let link = kernel::link(&story, host, "eth0").must("eth0");
        let bytes = kernel::text(&link, "address");
        let bytes: Vec<u8> = bytes.split(':').map(|byte| u8::from_str_radix(byte, 16).must("a MAC")).collect();
        bytes.try_into().ok().must("six bytes")
    };
    let wire = Wire::open(&story.inside("world"), "eth0");
    let tap = Wire::open(&story.inside("h1-web"), "eth0");
    let (to, from) = (mac("h1"), mac("world"));
    let own: SocketAddr = SocketAddr::new(own[0], 8082);
    let marks = [b"hand made A".as_slice(), b"hand made B", b"hand made C", b"hand made D"];
    for (source, destination, mark) in [
        ("10.99.0.254:9", "127.0.0.1:8081", marks[0]),
        ("127.0.0.1:9", "127.0.0.1:8081", marks[1]),
        ("127.0.0.1:9", &own.to_string(), marks[2]),
        ("10.99.0.254:9", &own.to_string(), marks[3]),
    ] {
        let parsed = |text: &str| text.parse().must("an address");
        wire.send(&craft::ip_frame(to, from, &craft::udp(parsed(source), parsed(destination), mark)));
    }
    let mut came = Vec::new();
    eventually("the one that may come has come", SOON, || {
        came.extend(tap.frames());
        if came.iter().any(|frame| frame.ends_with(marks[3])) { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    for mark in &marks[..3] {
        assert!(!came.iter().any(|frame| frame.ends_with(mark)), "{} came", String::from_utf8_lossy(mark));
    }
}

/// Who holds a port already is named, and nothing is left of what was refused.
#[tokio::test(flavor = "multi_thread")]
async fn conflicts() {
    let story = lab(&[]).await;
    let own = underlay(&story, "h1", Family::V4);
    let inside = story.inside("h1");
    let listener = inside.run(|| TcpListener::bind("0.0.0.0:8090")).must("enter").must("a listener");
    let bound = inside.run(|| UdpSocket::bind((own, 8091))).must("enter").must("a socket");
    let six = inside.run(|| TcpListener::bind("[::1]:8092")).must("enter").must("a listener");
    let program = std::env::current_exe().must("this program");
    // As /proc/PID/comm has it.
    let name: String = program.file_name().must("a name").to_string_lossy().chars().take(15).collect();
    let (_web, _servers) = attach(&story, "web", &["8080:80", "9000-9009:7000-7009", "10.99.1.1:8200:80"], &[(Tcp, 80)]);
    let refused = |ports: &str, words: &[&str]| {
        story.ctl("h1", &["attach", "other", "--publish", ports]).exits(1).complains(words);
        assert!(story.netns("h1-other").is_err(), "{ports}: no namespace is left behind");
    };
    refused("8090:80", &["8090", "listens on 0.0.0.0:8090", &name]);
    refused("127.0.0.1:8090:80", &["8090", &name]);
    refused("8091:80/udp", &["8091", &at(own, 8091), &name]);
    refused("8092:80", &["[::1]:8092", &name]);
    refused("8085-8095:80-90", &["8090", &name]);
    refused("8080:81", &["8080", "endpoint web", "overlayctl detach web"]);
    refused("127.0.0.1:8080:81", &["8080", "endpoint web"]);
    refused("9009-9012:1-4", &["9009", "endpoint web"]);
    refused("8200:80", &["8200", "endpoint web"]);
    refused("192.0.2.1:8300:80", &["192.0.2.1"]);
    let listed: Endpoints = story.ctl("h1", &["-o", "json", "endpoints"]).exits(0).json();
    assert_eq!(listed.endpoints.len(), 2, "web and c1: {listed:?}");
    // No conflict: another protocol, another address, a port beside.
    let free = ["8090:80/udp", "8091:80", "127.0.0.1:8091:80/udp", "127.0.0.1:8200:80", "9010:80", "10.99.1.1:8092:80"];
    let (_other, _servers) = attach(&story, "other", &free, &[(Tcp, 80), (Udp, 80)]);
    for (protocol, port) in [(Udp, 8090), (Tcp, 8091), (Tcp, 9010), (Tcp, 8092)] {
        seen(&story, "world", SocketAddr::new(own, port), protocol).await;
    }
    drop((listener, bound, six));
    // Once the holder is gone the port is free.
    story.ctl("h1", &["detach", "web"]).exits(0);
    attach(&story, "next", &["8080:80", "8090:80"], &[]);
}

/// Runtimes publish on both wildcards by default, also where containers have one family.
#[tokio::test(flavor = "multi_thread")]
async fn wildcards_of_both_families_in_single_family_overlay_are_taken() {
    for (families, family) in [(Families::V4, Family::V4), (Families::V6, Family::V6)] {
        let story = Story::up(|options| {
            options.hosts = 1;
            options.containers = 0;
            options.families = families;
        })
        .await;
        hooks_on_the_bridge(&story, false);
        let (missing, specific) = match family {
            Family::V4 => ("[::]:8081:80", "[::1]:8082:80"),
            Family::V6 => ("0.0.0.0:8081:80", "127.0.0.1:8082:80"),
        };
        let publish = ["0.0.0.0:8080:80", "[::]:8080:80", missing];
        let (web, _servers) = attach(&story, "web", &publish, &[(Tcp, 80)]);
        assert_eq!(web.endpoint.published.len(), 3);
        assert_eq!(attach(&story, "web", &publish, &[]).0.endpoint, web.endpoint, "the same again");
        let own = underlay(&story, "h1", family);
        seen(&story, "world", SocketAddr::new(own, 8080), Tcp).await;
        unreachable(&story, "world", &at(own, 8081)).await;
        let shown = story.ctl("h1", &["inspect", "web"]).exits(0).out;
        assert!(shown.contains("[::]:8080") && shown.contains("0.0.0.0:8080") && shown.contains("in place"), "{shown}");
        let status = story.status("h1").await;
        assert!(status.ready && status.problems.is_empty(), "{:?}", status.problems);
        story.ctl("h1", &["attach", "other", "--publish", specific]).exits(1).complains(&[specific, "no container could answer"]);
        // What has no effect is no claim to the port.
        attach(&story, "next", &["8081:80"], &[]);
    }
}

/// What the first host's kernel has for published ports, without order: a table that was made anew has its parts in another one.
fn host_state(story: &Story) -> BTreeSet<String> {
    let rules = kernel::run(story, "h1", &["nft", "-s", "list", "ruleset"]);
    let routes = kernel::run(story, "h1", &["ip", "-6", "route", "show", "table", "all"]);
    // The underlay's own addresses come when they like.
    let routes = routes.lines().filter(|line| line.contains("ovb."));
    let localnet = format!("route_localnet {}", kernel::sysctl(story, "h1", "ipv4/conf/ovb.1/route_localnet"));
    let parts = rules.split(['\n', ',', '{', '}']).chain(routes).chain([localnet.as_str()]);
    parts.map(|part| part.trim().trim_start_matches("elements = ").to_owned()).collect()
}

/// Ports end with the endpoint; a killed agent, a new one and somebody who flushes all rules end none.
#[tokio::test(flavor = "multi_thread")]
async fn as_long_as_the_endpoint() {
    let story = lab(&[]).await;
    hooks_on_the_bridge(&story, false);
    let before = host_state(&story);
    let (_web, _servers) = attach(&story, "web", &["8080:80", "8080:80/udp"], &[(Tcp, 80), (Udp, 80)]);
    let all = |story: &Story| -> Vec<(&'static str, SocketAddr)> {
        let at = |family| {
            [("world", underlay(story, "h1", family)), ("h1", loopback(family)), ("h1-web", underlay(story, "h1", family))]
        };
        Family::ALL.into_iter().flat_map(at).map(|(from, address)| (from, SocketAddr::new(address, 8080))).collect()
    };
    let mut connections = Vec::new();
    for (from, to) in all(&story) {
        connections.push(Connection::open(&story.inside(from), to).await.must(from));
    }
    let kernel_changes = Notifications::listen(&story.inside("h1"));
    kernel_changes.settle().await;
    story.at("h1").agent_stop(Signal::SIGKILL).must("SIGKILL");
    for (from, to) in all(&story) {
        for protocol in [Tcp, Udp] {
            seen(&story, from, to, protocol).await;
        }
    }
    story.at("h1").agent_start(&[]).must("start");
    story.at("h1").wait_ready(READY).await.must("ready");
    for connection in &mut connections {
        connection.ask().await.must("a connection that was there before");
    }
    // On a busy machine the kernel itself forgets neighbours of the underlay (port 0).
    let by_agent = |line: &String| !(line.starts_with("neighbour") && line.ends_with("by port 0"));
    let changes: Vec<String> = kernel_changes.take().into_iter().filter(by_agent).collect();
    assert!(changes.is_empty(), "a killed agent and the next one changed the kernel: {changes:?}");

    kernel::run(&story, "h1", &["nft", "flush", "ruleset"]);
    for (from, to) in all(&story) {
        let story = &story;
        eventually_asked(&format!("{from} reaches {to} again"), SOON, || async move {
            call(&story.inside(from), to, Tcp).await.map(|_| ())
        })
        .await;
        // What had an entry of conntrack as it was without rules must not be in the way of a new call.
        eventually_asked(&format!("{from} reaches {to} again by UDP"), SOON, || async move {
            call(&story.inside(from), to, Udp).await.map(|_| ())
        })
        .await;
    }
    story.ctl("h1", &["detach", "web"]).exits(0);
    for (from, to) in all(&story).into_iter().filter(|(from, _)| *from != "h1-web") {
        unreachable(&story, from, &to.to_string()).await;
    }
    eventually("nothing of it is left", SOON, || {
        let difference = kernel::difference(&host_state(&story), &before);
        if difference.is_empty() { Ok(()) } else { Err(format!("\n{difference}")) }
    })
    .await;
}

/// `run` publishes as `attach` does, for as long as the command takes.
#[tokio::test(flavor = "multi_thread")]
async fn of_a_command() {
    let story = lab(&[]).await;
    let own = SocketAddr::new(underlay(&story, "h1", Family::V4), 8080);
    let program = overlay_tests::programs::overlayctl().to_string_lossy().into_owned();
    let command = [&program, "run", "--name", "web", "--publish", "8080:80", "--", "sleep", "60"].map(String::from);
    let mut running = story.command("h1", &command).must("h1").spawn().must("overlayctl run");
    eventually("the command's namespace is there", SOON, || story.netns("h1-web").map(|_| ()).map_err(|e| e.to_string())).await;
    let _servers = serve(&story.inside("h1-web"), &[(Tcp, 80)]);
    let reached = || async { call(&story.inside("world"), own, Tcp).await };
    eventually_asked("the port is published", SOON, || async { reached().await.map(|_| ()) }).await;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(running.id()).must("a process id"));
    nix::sys::signal::kill(pid, Signal::SIGTERM).must("SIGTERM");
    running.wait().must("the end");
    assert!(reached().await.is_err(), "the port ends with the command");
}

/// SCTP is translated like the others; this machine's kernel need not have sockets of it, so the first packet of an association is made by hand.
#[tokio::test(flavor = "multi_thread")]
async fn sctp() {
    let story = lab(&[]).await;
    let (web, _servers) = attach(&story, "web", &["2905:2906/sctp"], &[]);
    let tap = Wire::open(&story.inside("h1-web"), "eth0");
    for (family, inner) in web.endpoint.addresses().iter() {
        let to = SocketAddr::new(underlay(&story, "h1", family), 2905);
        let init = sctp_init(4000, to.port());
        let packet = craft::ip(world(family), to.ip(), SCTP, &init);
        let wire = Wire::open(&story.inside("world"), "eth0");
        let link = |host: &str| kernel::text(&kernel::link(&story, host, "eth0").must("eth0"), "address");
        let mac = |host: &str| -> craft::Mac {
            let bytes: Vec<u8> = link(host).split(':').map(|byte| u8::from_str_radix(byte, 16).must("a MAC")).collect();
            bytes.try_into().ok().must("six bytes")
        };
        let frame = craft::ip_frame(mac("h1"), mac("world"), &packet);
        wire.send(&frame);
        // Behind its IP header: the ports, of which the second is the container's now.
        let ports = [4000_u16.to_be_bytes(), 2906_u16.to_be_bytes()].concat();
        let address = craft::octets(*inner);
        eventually(&format!("the association's first packet comes ({family})"), SOON, || {
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
const SCTP: u8 = 132;

/// An INIT chunk in a packet of its own (RFC 9260 sections 3.1 and 3.3.2).
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
