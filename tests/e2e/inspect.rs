//! `overlayctl inspect` and `GET /v1/network`, compared with what the kernel's own tools say.

use overlay_agent::model::Family;
use overlay_agent::model::api::{Attached, EndpointView, NetworkView};
use overlay_tests::story::SOON;
use overlay_tests::{Must, Story, eventually, http, kernel};
use overlayctl::lab::Families;

fn network(story: &Story) -> NetworkView {
    story.ctl("h1", &["-o", "json", "inspect"]).exits(0).json()
}

fn endpoint(story: &Story, name: &str) -> EndpointView {
    story.ctl("h1", &["-o", "json", "inspect", name]).exits(0).json()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_there_is_shown() {
    let story = Story::up(|options| {
        options.hosts = 1;
        options.containers = 0;
        options.families = Families::Dual;
    })
    .await;
    let empty = network(&story);
    assert!(empty.endpoints.is_empty() && empty.bridge.must("the bridge").ports.is_empty());
    assert!(empty.ipam.iter().all(|(_, ipam)| ipam.in_use == 0));

    let web: Attached = story.ctl("h1", &["-o", "json", "attach", "web", "--publish", "8080:80"]).exits(0).json();
    story.ctl("h1", &["attach", "db", "--owner", "a test"]).exits(0);
    story.ctl("h1", &["attach", "side", "--mode", "container:web"]).exits(0);
    let seen = network(&story);
    let answer = http::ask(&story.at("h1").socket(), "GET", "/v1/network", "");
    assert_eq!(answer.json::<NetworkView>().endpoints.len(), 3);
    assert_eq!((seen.name.as_str(), seen.driver.as_str(), u64::from(seen.vni.get())), ("default", "vxlan", kernel::vni(&story)));
    let subnet = story.status("h1").await.lease.must("a lease").subnet;
    for (family, ipam) in seen.ipam.iter() {
        let range = subnet.get(family).must("a range");
        assert_eq!((ipam.subnet, Some(ipam.gateway), ipam.in_use), (range, subnet.gateway(family), 2));
        let free = (1_u128 << (family.bits() - range.length())) - if family == Family::V4 { 3 } else { 2 } - 2;
        assert_eq!(ipam.free, free.to_string());
    }
    // Devices as `ip` has them.
    for device in seen.devices.iter().chain(seen.bridge.iter().map(|b| &b.device)) {
        let link = kernel::link(&story, "h1", &device.interface).must(&device.interface);
        assert_eq!(device.mac.must("a MAC").to_string(), kernel::text(&link, "address"));
        assert_eq!((u64::from(device.mtu), device.up), (kernel::number(&link, "mtu"), true));
        assert!(!device.addresses.is_empty(), "{}", device.interface);
    }
    assert_eq!(seen.devices.len(), 2);
    // Ports as `bridge` has them.
    let ports = &seen.bridge.must("the bridge").ports;
    let listed = kernel::listed(&story, "h1", "bridge", &["link", "show"]);
    assert_eq!(ports.len(), listed.len());
    for port in ports {
        let link = listed.iter().find(|link| link["ifname"] == port.interface.as_str()).must(&port.interface);
        assert_eq!(port.state, kernel::text(link, "state"));
    }
    let port = web.endpoint.port.clone().must("a port");
    let view = endpoint(&story, "web");
    assert_eq!((view.endpoint, view.state.as_str()), (web.endpoint.clone(), "in place"));
    assert_eq!(view.shared_by.iter().map(|n| n.as_str()).collect::<Vec<_>>(), ["side"]);
    let on_bridge = ports.iter().find(|p| p.interface == port.host_interface).must("its port");
    assert_eq!((on_bridge.endpoint.as_ref(), view.bridge_port), (Some(&web.endpoint.name), Some(on_bridge.number)));
    let side = endpoint(&story, "side");
    assert!(side.counters.is_none() && side.bridge_port.is_none() && side.state == "in place");

    // Counters, from the container's side.
    let before = view.counters.must("counters");
    let gateway = web.gateway.v4.must("IPv4").to_string();
    kernel::run(&story, "h1-web", &["ping", "-c", "3", "-i", "0.05", "-s", "1000", "-W", "2", &gateway]);
    let after = endpoint(&story, "web").counters.must("counters");
    assert!(after.tx_bytes >= before.tx_bytes + 3000 && after.rx_packets >= before.rx_packets + 3, "{before:?} {after:?}");

    // For people.
    let text = story.ctl("h1", &["inspect", "web"]).exits(0).out;
    for wanted in ["8080:80/tcp", &port.host_interface, &port.mac.to_string(), "shared by", "side", "in place"] {
        assert!(text.contains(wanted), "{wanted} in {text}");
    }
    assert!(story.ctl("h1", &["inspect", "db"]).exits(0).out.contains("a test"));
    let text = story.ctl("h1", &["inspect", "-o", "wide"]).exits(0).out;
    assert!(text.contains(&subnet.gateway(Family::V4).must("a gateway").to_string()) && text.contains("2 in use"), "{text}");
    let tree = story.ctl("h1", &["inspect", "--tree"]).exits(0).out;
    let line = tree.lines().find(|line| line.contains(&port.host_interface)).must("its line");
    assert!(line.contains("forwarding") && line.contains("eth0 of web"), "{tree}");
    story.ctl("h1", &["inspect", "nobody"]).exits(1).complains(&["there is no endpoint nobody"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_in_place_is_named() {
    let story = Story::up(|options| {
        options.hosts = 1;
        options.containers = 0;
    })
    .await;
    let web: Attached = story.ctl("h1", &["-o", "json", "attach", "web"]).exits(0).json();
    let (address, length) = (web.endpoint.addresses().v4.must("IPv4"), web.prefix_length.v4.must("a length"));
    let gateway = web.gateway.v4.must("a gateway");
    for (break_it, state) in [
        ("ip link set eth0 down".to_owned(), "eth0 is down".to_owned()),
        ("ip route del default".to_owned(), format!("the default route via {gateway} is not there")),
        ("ip link set eth0 address 02:00:00:00:00:99".to_owned(), "eth0 has MAC 02:00:00:00:00:99".to_owned()),
        ("ip link set eth0 mtu 1300".to_owned(), "eth0 has MTU 1300, not 1450".to_owned()),
        (format!("ip address del {address}/{length} dev eth0"), format!("eth0 lacks {address}/{length}")),
    ] {
        kernel::shell(&story, "h1-web", &break_it);
        let found = endpoint(&story, "web").state;
        assert!(found.starts_with(&state), "{break_it}: {found}, not {state}");
        // Asked for again, it is whole again.
        story.ctl("h1", &["attach", "web"]).exits(0);
        assert_eq!(endpoint(&story, "web").state, "in place", "{break_it}");
    }
    // A port that somebody else made is shown as nobody's.
    kernel::shell(&story, "h1", "ip link add name mine type veth peer name mine2 && ip link set mine master ovb.1");
    let ports = network(&story).bridge.must("the bridge").ports;
    let mine = ports.iter().find(|port| port.interface == "mine").must("the foreign port");
    assert!(mine.endpoint.is_none() && ports.len() == 2);
    assert!(story.ctl("h1", &["inspect", "--tree"]).exits(0).out.contains("of no endpoint"));
    kernel::run(&story, "h1", &["ip", "netns", "delete", &story.layout().namespace("h1-web")]);
    eventually("the namespace that is gone is named", SOON, || {
        let state = endpoint(&story, "web").state;
        if state == "its network namespace is gone" { Ok(()) } else { Err(state) }
    })
    .await;
}
