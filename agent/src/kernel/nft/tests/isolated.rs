//! Rules of isolated networks, with packets between namespaces: each network has one with a container behind it.

use std::fs::File;
use std::io::{Read, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::*;
use crate::model::{Transport, Vni};
use crate::plan::isolation::{Isolation, PeerNetwork, Transit};
use crate::plan::ruleset::{Counter, Element};

/// Port of the containers' server, and the host's port that is published for it.
const SERVER: u16 = 8080;
const PUBLISHED: u16 = 80;
/// A client outside, and this host.
const WORLD: [&str; 2] = ["192.0.2.9", "2001:db8::9"];
/// The container of each isolated network.
const CONTAINER: [&str; 2] = ["10.9.1.2", "fd00:9:0:8::2"];
const HOST: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

/// The isolated network with this VNI. All have one range.
fn isolated(vni: u32, scope: Scope, publishes: bool) -> InetTableSpec {
    let network = network(&format!(
        r#"{{"Network":"10.9.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:9::/53","Backend":{{"VNI":{vni}}}}}"#
    ));
    let transit = Transit::new(u16::try_from(vni).expect("a small VNI"));
    let isolation = Isolation { transit, peers: Vec::new() };
    let mut spec = InetTableSpec { numbered_sets: true, scope, isolation: Some(isolation), ..spec(&network, true, publishes) };
    if scope == Scope::Network {
        spec.local = PerFamily::default();
    }
    spec
}

fn transit(spec: &InetTableSpec) -> Transit {
    spec.isolation.as_ref().and_then(|isolation| isolation.transit).expect("a transit")
}

/// The default network, a routed one, two isolated ones that are peers, and an internal one.
fn host_table() -> Ruleset {
    let routed = network(r#"{"Network":"10.99.0.0/16","Backend":{"VNI":6,"Port":4789}}"#);
    let routed = InetTableSpec { numbered_sets: true, ..spec(&routed, false, false) };
    let [mut blue, red, mut internal] = [7, 8, 9].map(|vni| isolated(vni, Scope::Host, vni == 7));
    let ranges = red.network.pools.map(|_, pool| pool.network);
    let peer = PeerNetwork { name: "red".into(), namespace: "ov-red".to_owned(), vni: Vni::try_from(8).expect("a VNI"), ranges };
    blue.isolation.as_mut().expect("isolated").peers.push(peer);
    internal.isolation.as_mut().expect("isolated").transit = None;
    inet_table(&[&spec(&dual(), true, true), &routed, &blue, &red, &internal])
}

fn chain(rules: &Ruleset, name: &str) -> Vec<String> {
    let chain = rules.chains.iter().find(|chain| chain.name == name);
    chain.map(|chain| chain.rules.iter().map(ToString::to_string).collect()).unwrap_or_default()
}

#[test]
fn tables_of_isolated_networks_round_trip() {
    in_netns(|| {
        let mut tables = Tables::open();
        let own = |publishes| inet_table(&[&isolated(7, Scope::Network, publishes)]);
        for rules in [host_table(), own(true), own(false), inet_table(&[&isolated(7, Scope::Host, true)]), rules()] {
            tables.apply(&[set_table(rules.clone())]);
            assert_eq!(run_command("nft", &["-s", "-t", "list", "table", "inet", "overlayd"], ""), rules.to_string());
            assert_eq!(tables.ruleset(), Some(rules));
            // Chains are listed in the order in which they were created.
            tables.delete();
        }
    });
}

#[test]
fn host_table_has_the_rules_of_transits() {
    let rules = host_table();
    let to_isolation = |from: &str, to: &str| format!("{from}oifname \"{to}*\" jump isolation");
    let from_transit = "iifname \"ovt.*\" ";
    assert_eq!(
        chain(&rules, "forward"),
        [(from_transit, "ovb."), (from_transit, "ovx."), (from_transit, "ovx6."), ("", "ovt.")].map(|(a, b)| to_isolation(a, b))
    );
    assert_eq!(chain(&rules, "isolation"), ["ct status snat,dnat accept", "counter name \"isolation\" drop"]);
    let drops =
        ["ovb.1", "ovb.6", "ovt.7", "ovt.8"].map(|from| format!("iifname \"{from}\" counter name \"encapsulation\" drop"));
    assert_eq!(chain(&rules, "encapsulated")[..4], drops);
    assert_eq!(chain(&rules, "vxlan")[..4], drops);
    assert_eq!(
        chain(&rules, "incoming")[2..5],
        [
            "iifname \"ovt.*\" ip daddr 127.0.0.0/8 counter name \"loopback\" drop",
            "iifname \"ovt.*\" ip saddr 127.0.0.0/8 counter name \"loopback\" drop",
            "iifname != \"ovb.*\" accept",
        ]
    );
    // An internal network's tunnel is filtered as any other.
    assert!(!chain(&rules, "vxlan.9").is_empty() && rules.to_string().contains("set ranges4.8 {"));
    assert!(!chain(&rules, "overlay").iter().any(|rule| rule.contains("10.9.")), "the host reaches no container of theirs");
    let postrouting = chain(&rules, "postrouting");
    let of_transits: Vec<&String> = postrouting.iter().filter(|rule| rule.contains("ovt.")).collect();
    assert_eq!(
        of_transits,
        [
            "oifname \"ovt.7\" ct status dnat ip saddr 169.254.64.15 masquerade random,fully-random",
            "oifname \"ovt.7\" ct status dnat ip saddr 127.0.0.0/8 masquerade random,fully-random",
            "oifname \"ovt.7\" ct status dnat ip6 saddr fd6f:7665:726c:6179::f masquerade random,fully-random",
            "oifname \"ovt.7\" ct status dnat ip6 saddr ::1 masquerade random,fully-random",
            "ip saddr 169.254.64.0-169.254.127.255 oifname != \"ovt.*\" ip daddr != 169.254.64.0-169.254.127.255 masquerade random,fully-random",
            "ip6 saddr fd6f:7665:726c:6179::-fd6f:7665:726c:6179:ffff:ffff:ffff:ffff oifname != \"ovt.*\" ip6 daddr != \
             fd6f:7665:726c:6179::-fd6f:7665:726c:6179:ffff:ffff:ffff:ffff masquerade random,fully-random",
        ]
    );
    let with_counter = |rules: &Ruleset| rules.counters.contains(&Counter::Isolation);
    assert!(with_counter(&rules) && !with_counter(&super::rules()) && chain(&super::rules(), "forward").is_empty());
}

#[test]
fn own_table_has_no_tunnel_filter() {
    let rules = inet_table(&[&isolated(7, Scope::Network, true)]);
    let names: Vec<&str> = rules.chains.iter().map(|chain| chain.name.as_str()).collect();
    assert_eq!(names, ["encapsulated", "incoming", "overlay", "postrouting", "prerouting"]);
    assert_eq!(chain(&rules, "encapsulated"), ["iifname \"ovb.7\" counter name \"encapsulation\" drop"]);
    assert_eq!(
        chain(&rules, "prerouting"),
        [
            "iifname \"ovt.7\" dnat ip to meta l4proto . th dport map @ports4",
            "iifname \"ovt.7\" dnat ip6 to meta l4proto . th dport map @ports6",
        ]
    );
    assert_eq!(
        chain(&rules, "postrouting")[0],
        "ip saddr 10.9.1.0-10.9.255.255 oifname \"ovt.7\" ip daddr != 10.9.1.0-10.9.255.255 masquerade random,fully-random"
    );
}

/// A network namespace that lives as long as its file.
fn new_netns() -> File {
    let create = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace");
        ip("link set lo up");
        File::open("/proc/thread-self/ns/net").expect("the namespace")
    };
    std::thread::scope(|scope| scope.spawn(create).join().expect("the thread ends"))
}

/// Runs `body` on a thread in a namespace.
fn inside<T: Send>(netns: &File, body: impl FnOnce() -> T + Send) -> T {
    let run = || {
        nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).expect("the namespace");
        body()
    };
    std::thread::scope(|scope| scope.spawn(run).join().expect("the thread ends"))
}

fn ip(line: &str) {
    let words: Vec<&str> = line.split(' ').collect();
    run_command("ip", &words, "");
}

/// Creates a veth pair to a namespace. Both ends get an address.
fn veth(name: &str, addresses: &[String], other: &File, other_name: &str, other_addresses: &[String]) {
    let path = format!("/proc/{}/fd/{}", std::process::id(), other.as_raw_fd());
    ip(&format!("link add {name} type veth peer name {other_name} netns {path}"));
    let up = |name: &str, addresses: &[String]| {
        addresses.iter().for_each(|address| ip(&format!("addr add {address} dev {name} nodad")));
        ip(&format!("link set {name} up"));
    };
    up(name, addresses);
    inside(other, || up(other_name, other_addresses));
}

fn both(v4: &str, v6: &str) -> [String; 2] {
    [v4.to_owned(), v6.to_owned()]
}

fn forward() {
    for (path, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
    ] {
        std::fs::write(format!("/proc/sys/net/{path}"), value).expect(path);
    }
}

/// The namespace of an isolated network and that of its container.
fn isolated_namespace(vni: u32) -> [File; 2] {
    let spec = isolated(vni, Scope::Network, true);
    let (own, container) = (new_netns(), new_netns());
    let addresses = |end: fn(Transit, Family) -> IpAddr| {
        Family::ALL.map(|family| format!("{}/{}", end(transit(&spec), family), Transit::prefix_length(family)))
    };
    let device = format!("ovt.{vni}");
    veth(&device, &addresses(Transit::host), &own, &device, &addresses(Transit::network));
    inside(&own, || {
        forward();
        let bridge = format!("ovb.{vni}");
        veth(&bridge, &both("10.9.1.1/24", "fd00:9:0:8::1/64"), &container, "eth0", &both("10.9.1.2/24", "fd00:9:0:8::2/64"));
        for family in Family::ALL {
            ip(&format!("-{} route add default via {}", if family == Family::V4 { 4 } else { 6 }, transit(&spec).host(family)));
        }
        publish(inet_table(&[&spec]), CONTAINER.map(|address| address.parse().expect(address)), SERVER);
    });
    inside(&container, || {
        ip("-4 route add default via 10.9.1.1");
        ip("-6 route add default via fd00:9:0:8::1");
        serve(SERVER);
    });
    [own, container]
}

/// Loads a table, whose published port leads to these addresses.
fn publish(rules: Ruleset, targets: [IpAddr; 2], port: u16) {
    let element = |target: IpAddr| {
        let key = Key::Element(Element::Port(Family::of(target), Transport::Tcp, PUBLISHED));
        Op::Set(key, Value::Element(Some(Box::new(SocketAddr::new(target, port)))))
    };
    Tables::open().apply(&[&[set_table(rules)], targets.map(element).as_slice()].concat());
}

/// Answers each connection with the client's address.
fn serve(port: u16) {
    let listener = TcpListener::bind(format!("[::]:{port}")).expect("a listener");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let client = stream.peer_addr().map(|address| address.ip().to_canonical().to_string());
            let _closed = stream.write_all(client.unwrap_or_default().as_bytes());
        }
    });
}

/// The client's address as the server sees it; `None` if the server cannot be reached.
fn client_at(address: &str, port: u16) -> Option<String> {
    let server = SocketAddr::new(address.parse().expect(address), port);
    let mut stream = TcpStream::connect_timeout(&server, Duration::from_millis(500)).ok()?;
    let mut client = String::new();
    stream.read_to_string(&mut client).ok()?;
    Some(client)
}

fn isolation_drops() -> u64 {
    let mut nft = Nft::open().expect("open");
    nft.counters().expect("counters")[&Counter::Isolation].packets
}

#[test]
fn packets_pass_a_transit_only_as_published_ports_and_replies() {
    in_netns(|| {
        ip("link set lo up");
        forward();
        let world = new_netns();
        let cidrs = |addresses: [&str; 2]| both(&format!("{}/24", addresses[0]), &format!("{}/64", addresses[1]));
        veth("eth0", &cidrs(HOST), &world, "eth0", &cidrs(WORLD));
        let [[own, blue], [_own, red]] = [7, 8].map(isolated_namespace);
        // A container of a routed network.
        let routed = new_netns();
        veth(
            "ovb.1",
            &both("10.244.3.1/24", "fd00:10:244:3::1/64"),
            &routed,
            "eth0",
            &both("10.244.3.2/24", "fd00:10:244:3::2/64"),
        );
        inside(&routed, || {
            ip("-4 route add default via 10.244.3.1");
            ip("-6 route add default via fd00:10:244:3::1");
            serve(SERVER);
        });
        let specs = [spec(&dual(), true, true), isolated(7, Scope::Host, true), isolated(8, Scope::Host, false)];
        let transits = [transit(&specs[1]), transit(&specs[2])];
        publish(inet_table(&specs.each_ref()), Family::ALL.map(|family| transits[0].network(family)), PUBLISHED);
        inside(&world, || {
            // A neighbour of the host that knows how transfer addresses are chosen.
            ip(&format!("-4 route add 169.254.64.0/18 via {}", HOST[0]));
            ip(&format!("-6 route add fd6f:7665:726c:6179::/64 via {}", HOST[1]));
            serve(SERVER);
        });
        std::fs::write("/proc/sys/net/ipv4/conf/ovt.7/route_localnet", "1").expect("route_localnet");
        for (n, family) in Family::ALL.into_iter().enumerate() {
            let [blue_end, host_end] = [transits[0].network(family), transits[0].host(family)].map(|address| address.to_string());
            let red_end = transits[1].network(family).to_string();
            let client = |netns: &File, address: &str, port| inside(netns, || client_at(address, port));

            assert_eq!(client(&blue, WORLD[n], SERVER).as_deref(), Some(HOST[n]), "to the world, masqueraded");
            assert_eq!(
                client(&world, HOST[n], PUBLISHED).as_deref(),
                Some(WORLD[n]),
                "a published port keeps the client's address"
            );
            assert_eq!(client_at(HOST[n], PUBLISHED).as_deref(), Some(HOST[n]), "from the host itself");
            assert_eq!(client(&blue, HOST[n], PUBLISHED), Some(host_end.clone()), "from the container to itself, by the host");
            assert_eq!(client(&red, HOST[n], PUBLISHED), Some(red_end), "from another isolated network, as from the world");
            let from_routed = client(&routed, HOST[n], PUBLISHED);
            assert_eq!(from_routed, Some(host_end.clone()), "from a routed network, as all that leaves it");
            assert_eq!(client(&own, CONTAINER[n], SERVER).as_deref(), Some(["10.9.1.1", "fd00:9:0:8::1"][n]));

            let mut drops = isolation_drops();
            let routed_address = ["10.244.3.2", "fd00:10:244:3::2"][n];
            for (netns, address, port) in [
                (&world, blue_end.as_str(), PUBLISHED),
                (&routed, blue_end.as_str(), PUBLISHED),
                (&red, blue_end.as_str(), PUBLISHED),
                (&blue, routed_address, SERVER),
            ] {
                assert_eq!(client(netns, address, port), None, "{address}");
                let now = isolation_drops();
                assert!(now > drops, "{address}: not counted");
                drops = now;
            }
        }
        assert_eq!(client_at("127.0.0.1", PUBLISHED), Some(transits[0].host(Family::V4).to_string()), "from the host's loopback");
        // With the rules flushed the world reaches a transfer address: it is the rules that keep it out.
        nft("flush chain inet overlayd forward");
        let blue_end = transits[0].network(Family::V4).to_string();
        assert!(inside(&world, || client_at(&blue_end, PUBLISHED)).is_some());
    });
}
