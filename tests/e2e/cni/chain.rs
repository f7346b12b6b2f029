//! In a chain with the plugins of Debian's package: each goes on from what ours has made.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Family;
use overlay_tests::cni::{Attachment, Network, VERSIONS, error_of};
use overlay_tests::programs::needs;
use overlay_tests::{Must, Story, kernel};
use overlayctl::lab::Families;
use serde_json::{Value, json};

use super::{as_before, endpoints, still};

/// How long a call may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Says a word to whoever calls, once, inside a namespace.
fn answers(inside: &Netns, port: u16) -> thread::JoinHandle<()> {
    let listener = inside.run(|| TcpListener::bind(("0.0.0.0", port))).must("enter").must("bind");
    thread::spawn(move || {
        if let Ok((mut stream, _)) = listener.accept() {
            let _told = stream.write_all(b"hello");
        }
    })
}

/// What is said to a call from a namespace.
#[track_caller]
fn called(from: &Netns, to: IpAddr, port: u16) -> String {
    let said = from.run(|| {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to, port), LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    });
    said.must("enter").must(&format!("call {to} port {port}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn with_portmap_firewall_tuning_and_bandwidth() {
    needs("iptables", "iptables");
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.families = Families::Dual;
    })
    .await;
    let mut network = Network::of(&story, "h1", "1.0.0");
    // Published by the chained plugin, not by ours.
    network.plugins[0]["capabilities"]["portMappings"] = false.into();
    network.plugins.extend([
        json!({ "type": "portmap", "capabilities": { "portMappings": true } }),
        json!({ "type": "firewall", "backend": "iptables" }),
        json!({ "type": "tuning", "sysctl": { "net.ipv4.conf.eth0.arp_filter": "1" } }),
        json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } }),
    ]);
    let rate = json!({ "ingressRate": 8_000_000, "ingressBurst": 8_000_000, "egressRate": 8_000_000, "egressBurst": 8_000_000 });
    network.runtime =
        json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }], "bandwidth": rate });
    let public = story.status("h1").await.underlay.must("an underlay").public_ip.v4.must("IPv4");
    let who = Attachment::new(&story, "h1", "c1");
    let mut before = None;
    // Debian's plugins speak these.
    for version in &VERSIONS[1..3] {
        network.version = (*version).to_owned();
        let result = network.add(&who).unwrap_or_else(|said| panic!("{version}: `{}`: {}{}", said.command, said.out, said.err));
        assert_eq!(result["interfaces"][1]["name"], "eth0", "ours comes first: {result}");
        let tuned = kernel::sysctl(&story, "h1-c1", "ipv4/conf/eth0/arp_filter");
        assert_eq!(tuned, "1", "tuning found the interface");
        let qdiscs = kernel::run(&story, "h1", &["tc", "qdisc", "show"]);
        assert!(qdiscs.contains("tbf"), "bandwidth found the host's end: {qdiscs}");
        let answering = answers(&who.inside(), 80);
        assert_eq!(called(&story.inside("h2"), public, 8080), "hello", "from another host, by the published port");
        answering.join().unwrap_or_else(|_| panic!("the server panicked"));
        // CHECK of Debian's portmap 1.1.1 looks for IPv4's rules in ip6tables, too, and never succeeds where that is installed.
        let mut checked = network.clone();
        checked.plugins.retain(|plugin| plugin["type"] != "portmap");
        checked.check(&who, &result).unwrap_or_else(|said| panic!("{version}: `{}`: {}{}", said.command, said.out, said.err));
        network.del(&who, &result).unwrap_or_else(|said| panic!("{version}: `{}`: {}{}", said.command, said.out, said.err));
        assert!(endpoints(&story).await.is_empty());
        // What the others leave behind is theirs (chains of iptables); from the second round on there is no more of it.
        let (host, inside) = (story.inside("h1"), who.inside());
        if let Some((host_before, inside_before)) = &before {
            as_before(&format!("{version}: the host"), &host, host_before).await;
            as_before(&format!("{version}: the container"), &inside, inside_before).await;
        } else {
            before = Some((still(&host).await, still(&inside).await));
        }
    }
}

/// Behind another plugin: what it has made stays in the result, and ours is added.
#[tokio::test(flavor = "multi_thread")]
async fn behind_another() {
    let story = Story::one_host(Families::V4).await;
    let mut network = Network::of(&story, "h1", "1.0.0");
    let ours = network.plugins.remove(0);
    let local = json!({
        "type": "bridge", "bridge": "other0",
        "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.77.0.0/24" }]], "dataDir": story.at("h1").dir().join("host-local") },
    });
    let bridge = Network { plugins: vec![local], name: "other".to_owned(), ..network.clone() };
    let mut who = Attachment::new(&story, "h1", "c1");
    let first = bridge.add(&who).unwrap_or_else(|said| panic!("{}{}", said.out, said.err));
    who.interface = "eth1".to_owned();
    network.plugins = vec![ours];
    let plugin = &network.plugins[0];
    let said = network.run("ADD", &who, plugin, &network.config(plugin, &[("prevResult", first.clone())])).exits(0);
    let result: Value = said.json();
    let count = |value: &Value, key: &str| value[key].as_array().map_or(0, Vec::len);
    assert_eq!(count(&result, "interfaces"), count(&first, "interfaces") + 2);
    assert_eq!(result["ips"][0], first["ips"][0]);
    let place = usize::try_from(result["ips"][1]["interface"].as_u64().must("a place")).must("a place");
    assert_eq!(result["interfaces"][place]["name"], "eth1", "{result}");
    network.check(&who, &result).unwrap_or_else(|said| panic!("{}{}", said.out, said.err));
    network.del(&who, &result).unwrap_or_else(|said| panic!("{}{}", said.out, said.err));
    assert!(kernel::link(&story, "h1-c1", "eth1").is_none() && kernel::link(&story, "h1-c1", "eth0").is_some());
}

/// The overlay as the second network of a container whose first one has the default route: refused with the key as the remedy, and with that key in
/// each version.
#[tokio::test(flavor = "multi_thread")]
async fn second_network_leaves_the_default_route_to_the_first() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    let mut network = Network::of(&story, "h1", "1.0.0");
    let first = json!({
        "type": "bridge", "bridge": "other0", "isDefaultGateway": true,
        "ipam": {
            "type": "host-local", "dataDir": story.at("h1").dir().join("host-local"),
            "ranges": [[{ "subnet": "10.77.0.0/24" }], [{ "subnet": "2001:db8:77::/64" }]],
        },
    });
    let bridge = Network { plugins: vec![first], name: "other".to_owned(), ..network.clone() };
    let mut who = Attachment::new(&story, "h1", "c2");
    bridge.add(&who).unwrap_or_else(|said| panic!("{}{}", said.out, said.err));
    who.interface = "eth1".to_owned();
    let (_, text) = error_of(&network.add(&who).expect_err("a default route is there"));
    assert!(text.contains("has a default route already") && text.contains("\"isDefaultGateway\": false"), "{text}");
    assert!(kernel::link(&story, "h1-c2", "eth1").is_none());

    network.plugins[0]["isDefaultGateway"] = false.into();
    let far = story.endpoints("h2").into_iter().find(|e| e.name.as_str() == "c1").must("c1").addresses();
    for version in VERSIONS {
        network.version = version.to_owned();
        let result = network.add(&who).unwrap_or_else(|said| panic!("{version}: {}{}", said.out, said.err));
        let networks = &story.status("h1").await.network.must("a network").pools;
        let gateway = |n: usize| result["ips"][n]["gateway"].clone();
        let routes = [networks.v4.must("IPv4").network, networks.v6.must("IPv6").network];
        let wanted = json!([
            { "dst": routes[0].to_string(), "gw": gateway(0) }, { "dst": routes[1].to_string(), "gw": gateway(1) },
        ]);
        assert_eq!(result["routes"], wanted, "{version}");
        for (family, address) in far.iter() {
            kernel::run(&story, "h1-c2", &["ping", "-c", "1", "-W", "2", &address.to_string()]);
            let flag = if family == Family::V4 { "-4" } else { "-6" };
            let shown = kernel::run(&story, "h1-c2", &["ip", flag, "route", "show", "default"]);
            assert!(shown.contains("dev eth0") && !shown.contains("dev eth1"), "{shown}");
        }
        if version != VERSIONS[0] {
            network.check(&who, &result).unwrap_or_else(|said| panic!("{version}: {}{}", said.out, said.err));
            kernel::run(&story, "h1-c2", &["ip", "route", "delete", &routes[0].to_string()]);
            let (code, text) = error_of(&network.check(&who, &result).expect_err("a route is gone"));
            assert!(code == 103 && text.contains(&format!("there is no route to {} via", routes[0])), "{code}: {text}");
        }
        network.del(&who, &result).unwrap_or_else(|said| panic!("{version}: {}{}", said.out, said.err));
    }
}
