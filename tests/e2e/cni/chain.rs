//! A chain with the plugins of Debian's package, which continue from our result.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Family;
use overlay_tests::cni::{Attachment, Network, SUPPORTED_VERSIONS, parse_error};
use overlay_tests::programs::require_program;
use overlay_tests::{ExpectContext, TestLab, kernel};
use overlayctl::lab::Families;
use serde_json::{Value, json};

use super::{dump_when_stable, endpoints, wait_unchanged};

/// Time limit of a call.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Answers one connection inside a namespace with a word.
fn serve_hello_once(inside: &Netns, port: u16) -> thread::JoinHandle<()> {
    let listener = inside.run(|| TcpListener::bind(("0.0.0.0", port))).expect_ok("enter").expect_ok("bind");
    thread::spawn(move || {
        if let Ok((mut stream, _)) = listener.accept() {
            let _sent = stream.write_all(b"hello");
        }
    })
}

/// The answer to a connection from a namespace.
#[track_caller]
fn read_hello(from: &Netns, to: IpAddr, port: u16) -> String {
    let output = from.run(|| {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to, port), CALL_TIMEOUT)?;
        stream.set_read_timeout(Some(CALL_TIMEOUT))?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    });
    output.expect_ok("enter").expect_ok(&format!("call {to} port {port}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn chain_with_debian_plugins_works() {
    require_program("iptables", "iptables");
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.families = Families::Dual;
    })
    .await;
    let mut network = Network::overlay_only(&lab, "h1", "1.0.0");
    // The chained plugin publishes ports, not ours.
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
    let public = lab.status("h1").await.underlay.expect_ok("an underlay").public_ip.v4.expect_ok("IPv4");
    let attachment = Attachment::new(&lab, "h1", "c1");
    let mut before = None;
    // The versions that Debian's plugins support.
    for version in &SUPPORTED_VERSIONS[1..3] {
        network.version = (*version).to_owned();
        let result = network
            .add(&attachment)
            .unwrap_or_else(|output| panic!("{version}: `{}`: {}{}", output.command, output.stdout, output.stderr));
        assert_eq!(result["interfaces"][1]["name"], "eth0", "our plugin is first: {result}");
        let tuned = kernel::sysctl(&lab, "h1-c1", "ipv4/conf/eth0/arp_filter");
        assert_eq!(tuned, "1", "tuning found the interface");
        let qdiscs = kernel::run(&lab, "h1", &["tc", "qdisc", "show"]);
        assert!(qdiscs.contains("tbf"), "bandwidth found the host side: {qdiscs}");
        let answering = serve_hello_once(&attachment.open_netns(), 80);
        assert_eq!(read_hello(&lab.open_netns("h2"), public, 8080), "hello", "from another host, by the published port");
        answering.join().unwrap_or_else(|_| panic!("the server panicked"));
        // CHECK of Debian's portmap 1.1.1 also looks for IPv4 rules in ip6tables, and always fails where that is installed.
        let mut checked = network.clone();
        checked.plugins.retain(|plugin| plugin["type"] != "portmap");
        checked
            .check(&attachment, &result)
            .unwrap_or_else(|output| panic!("{version}: `{}`: {}{}", output.command, output.stdout, output.stderr));
        network
            .del(&attachment, &result)
            .unwrap_or_else(|output| panic!("{version}: `{}`: {}{}", output.command, output.stdout, output.stderr));
        assert!(endpoints(&lab).await.is_empty());
        // The other plugins leave iptables chains behind; from the second round on there are no new ones.
        let (host, inside) = (lab.open_netns("h1"), attachment.open_netns());
        if let Some((host_before, inside_before)) = &before {
            wait_unchanged(&format!("{version}: the host"), &host, host_before).await;
            wait_unchanged(&format!("{version}: the container"), &inside, inside_before).await;
        } else {
            before = Some((dump_when_stable(&host).await, dump_when_stable(&inside).await));
        }
    }
}

/// After another plugin: its part of the result stays, and ours is added.
#[tokio::test(flavor = "multi_thread")]
async fn chained_plugin_extends_previous_result() {
    let lab = TestLab::one_host(Families::V4).await;
    let mut network = Network::overlay_only(&lab, "h1", "1.0.0");
    let ours = network.plugins.remove(0);
    let local = json!({
        "type": "bridge", "bridge": "other0",
        "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.77.0.0/24" }]], "dataDir": lab.host("h1").dir().join("host-local") },
    });
    let bridge = Network { plugins: vec![local], name: "other".to_owned(), ..network.clone() };
    let mut attachment = Attachment::new(&lab, "h1", "c1");
    let first = bridge.add(&attachment).unwrap_or_else(|output| panic!("{}{}", output.stdout, output.stderr));
    attachment.interface = "eth1".to_owned();
    network.plugins = vec![ours];
    let plugin = &network.plugins[0];
    let output =
        network.exec_plugin("ADD", &attachment, plugin, &network.config(plugin, &[("prevResult", first.clone())])).assert_code(0);
    let result: Value = output.json();
    let count = |value: &Value, key: &str| value[key].as_array().map_or(0, Vec::len);
    assert_eq!(count(&result, "interfaces"), count(&first, "interfaces") + 2);
    assert_eq!(result["ips"][0], first["ips"][0]);
    let index = usize::try_from(result["ips"][1]["interface"].as_u64().expect_ok("an index")).expect_ok("an index");
    assert_eq!(result["interfaces"][index]["name"], "eth1", "{result}");
    network.check(&attachment, &result).unwrap_or_else(|output| panic!("{}{}", output.stdout, output.stderr));
    network.del(&attachment, &result).unwrap_or_else(|output| panic!("{}{}", output.stdout, output.stderr));
    assert!(kernel::link(&lab, "h1-c1", "eth1").is_none() && kernel::link(&lab, "h1-c1", "eth0").is_some());
}

/// The overlay as a second network, after one with the default route. The error names a key as the remedy; with it, ADD succeeds
/// in each version.
#[tokio::test(flavor = "multi_thread")]
async fn second_network_keeps_first_default_route() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    let mut network = Network::overlay_only(&lab, "h1", "1.0.0");
    let first = json!({
        "type": "bridge", "bridge": "other0", "isDefaultGateway": true,
        "ipam": {
            "type": "host-local", "dataDir": lab.host("h1").dir().join("host-local"),
            "ranges": [[{ "subnet": "10.77.0.0/24" }], [{ "subnet": "2001:db8:77::/64" }]],
        },
    });
    let bridge = Network { plugins: vec![first], name: "other".to_owned(), ..network.clone() };
    let mut attachment = Attachment::new(&lab, "h1", "c2");
    bridge.add(&attachment).unwrap_or_else(|output| panic!("{}{}", output.stdout, output.stderr));
    attachment.interface = "eth1".to_owned();
    let (_, text) = parse_error(&network.add(&attachment).expect_err("a default route is there"));
    assert!(text.contains("has a default route already") && text.contains("\"isDefaultGateway\": false"), "{text}");
    assert!(kernel::link(&lab, "h1-c2", "eth1").is_none());

    network.plugins[0]["isDefaultGateway"] = false.into();
    let far = lab.endpoints("h2").into_iter().find(|e| e.name.as_str() == "c1").expect_ok("c1").addresses();
    for version in SUPPORTED_VERSIONS {
        network.version = version.to_owned();
        let result = network.add(&attachment).unwrap_or_else(|output| panic!("{version}: {}{}", output.stdout, output.stderr));
        let networks = &lab.status("h1").await.network.expect_ok("a network").pools;
        let gateway = |n: usize| result["ips"][n]["gateway"].clone();
        let routes = [networks.v4.expect_ok("IPv4").network, networks.v6.expect_ok("IPv6").network];
        let wanted = json!([
            { "dst": routes[0].to_string(), "gw": gateway(0) }, { "dst": routes[1].to_string(), "gw": gateway(1) },
        ]);
        assert_eq!(result["routes"], wanted, "{version}");
        for (family, address) in far.iter() {
            kernel::run(&lab, "h1-c2", &["ping", "-c", "1", "-W", "2", &address.to_string()]);
            let flag = if family == Family::V4 { "-4" } else { "-6" };
            let routes = kernel::run(&lab, "h1-c2", &["ip", flag, "route", "show", "default"]);
            assert!(routes.contains("dev eth0") && !routes.contains("dev eth1"), "{routes}");
        }
        if version != SUPPORTED_VERSIONS[0] {
            network.check(&attachment, &result).unwrap_or_else(|output| panic!("{version}: {}{}", output.stdout, output.stderr));
            kernel::run(&lab, "h1-c2", &["ip", "route", "delete", &routes[0].to_string()]);
            let (code, text) = parse_error(&network.check(&attachment, &result).expect_err("a route is gone"));
            assert!(code == 103 && text.contains(&format!("no route to {} via", routes[0])), "{code}: {text}");
        }
        network.del(&attachment, &result).unwrap_or_else(|output| panic!("{version}: {}{}", output.stdout, output.stderr));
    }
}
