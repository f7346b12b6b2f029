//! `overlayctl inspect` and `GET /v1/network`, compared with the output of the kernel's tools.

use overlay_agent::model::Family;
use overlay_agent::model::api::{AttachResponse, EndpointView, NetworkView};
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::{ExpectContext, TestLab, eventually, http, kernel};
use overlayctl::lab::Families;

fn network(lab: &TestLab) -> NetworkView {
    lab.ctl("h1", &["-o", "json", "inspect"]).assert_code(0).json()
}

fn endpoint(lab: &TestLab, name: &str) -> EndpointView {
    lab.ctl("h1", &["-o", "json", "inspect", name]).assert_code(0).json()
}

#[tokio::test(flavor = "multi_thread")]
async fn inspect_matches_kernel_state() {
    let lab = TestLab::up(|options| {
        options.hosts = 1;
        options.containers = 0;
        options.families = Families::Dual;
    })
    .await;
    let empty = network(&lab);
    assert!(empty.endpoints.is_empty() && empty.bridge.expect_ok("the bridge").ports.is_empty());
    assert!(empty.ipam.iter().all(|(_, ipam)| ipam.in_use == 0));

    let web: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "web", "--publish", "8080:80"]).assert_code(0).json();
    lab.ctl("h1", &["attach", "db", "--owner", "a test"]).assert_code(0);
    lab.ctl("h1", &["attach", "side", "--mode", "container:web"]).assert_code(0);
    let seen = network(&lab);
    let answer = http::request(&lab.host("h1").socket(), "GET", "/v1/network", "");
    assert_eq!(answer.json::<NetworkView>().endpoints.len(), 3);
    assert_eq!(
        (seen.name.as_str(), seen.driver.as_str(), seen.vni.map(|vni| u64::from(vni.get()))),
        ("default", "vxlan", Some(kernel::vni(&lab)))
    );
    let subnet = lab.status("h1").await.lease.expect_ok("a lease").subnet;
    for (family, ipam) in seen.ipam.iter() {
        let range = subnet.get(family).expect_ok("a range");
        assert_eq!((ipam.subnet, Some(ipam.gateway), ipam.in_use), (range, subnet.gateway(family), 2));
        let free = (1_u128 << (family.bits() - range.length())) - if family == Family::V4 { 3 } else { 2 } - 2;
        assert_eq!(ipam.free, free.to_string());
    }
    // Devices as `ip` shows them.
    for device in seen.devices.iter().chain(seen.bridge.iter().map(|b| &b.device)) {
        let link = kernel::link(&lab, "h1", &device.interface).expect_ok(&device.interface);
        assert_eq!(device.mac.expect_ok("a MAC").to_string(), kernel::text(&link, "address"));
        assert_eq!((u64::from(device.mtu), device.up), (kernel::number(&link, "mtu"), true));
        assert!(!device.addresses.is_empty(), "{}", device.interface);
    }
    assert_eq!(seen.devices.len(), 2);
    // Ports as `bridge` shows them.
    let ports = &seen.bridge.expect_ok("the bridge").ports;
    let listed = kernel::list_json(&lab, "h1", "bridge", &["link", "show"]);
    assert_eq!(ports.len(), listed.len());
    for port in ports {
        let link = listed.iter().find(|link| link["ifname"] == port.interface.as_str()).expect_ok(&port.interface);
        assert_eq!(port.state, kernel::text(link, "state"));
    }
    let port = web.endpoint.port.clone().expect_ok("a port");
    let view = endpoint(&lab, "web");
    assert_eq!((view.endpoint, view.state.as_str()), (web.endpoint.clone(), "in place"));
    assert_eq!(view.shared_by.iter().map(|n| n.as_str()).collect::<Vec<_>>(), ["side"]);
    let on_bridge = ports.iter().find(|p| p.interface == port.host_interface).expect_ok("its port");
    assert_eq!((on_bridge.endpoint.as_ref(), view.bridge_port), (Some(&web.endpoint.name), Some(on_bridge.number)));
    let side = endpoint(&lab, "side");
    assert!(side.counters.is_none() && side.bridge_port.is_none() && side.state == "in place");

    // Counters, from the container's point of view.
    let before = view.counters.expect_ok("counters");
    let gateway = web.gateway.v4.expect_ok("IPv4").to_string();
    kernel::run(&lab, "h1-web", &["ping", "-c", "3", "-i", "0.05", "-s", "1000", "-W", "2", &gateway]);
    let after = endpoint(&lab, "web").counters.expect_ok("counters");
    assert!(after.tx_bytes >= before.tx_bytes + 3000 && after.rx_packets >= before.rx_packets + 3, "{before:?} {after:?}");

    // The text output.
    let text = lab.ctl("h1", &["inspect", "web"]).assert_code(0).stdout;
    for wanted in ["8080:80/tcp", &port.host_interface, &port.mac.to_string(), "shared by", "side", "in place"] {
        assert!(text.contains(wanted), "{wanted} in {text}");
    }
    assert!(lab.ctl("h1", &["inspect", "db"]).assert_code(0).stdout.contains("a test"));
    let text = lab.ctl("h1", &["inspect", "-o", "wide"]).assert_code(0).stdout;
    assert!(text.contains(&subnet.gateway(Family::V4).expect_ok("a gateway").to_string()) && text.contains("2 in use"), "{text}");
    let tree = lab.ctl("h1", &["inspect", "--tree"]).assert_code(0).stdout;
    let line = tree.lines().find(|line| line.contains(&port.host_interface)).expect_ok("its line");
    assert!(line.contains("forwarding") && line.contains("eth0 of web"), "{tree}");
    lab.ctl("h1", &["inspect", "nobody"]).assert_code(1).assert_stderr_contains(&["no endpoint nobody"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn inspect_names_missing_parts() {
    let lab = TestLab::up(|options| {
        options.hosts = 1;
        options.containers = 0;
    })
    .await;
    let web: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "web"]).assert_code(0).json();
    let (address, length) = (web.endpoint.addresses().v4.expect_ok("IPv4"), web.prefix_length.v4.expect_ok("a length"));
    let gateway = web.gateway.v4.expect_ok("a gateway");
    for (break_it, state) in [
        ("ip link set eth0 down".to_owned(), "eth0 is down".to_owned()),
        ("ip route del default".to_owned(), format!("the default route via {gateway} is missing")),
        ("ip link set eth0 address 02:00:00:00:00:99".to_owned(), "eth0 has MAC 02:00:00:00:00:99".to_owned()),
        ("ip link set eth0 mtu 1300".to_owned(), "eth0 has MTU 1300, not 1450".to_owned()),
        (format!("ip address del {address}/{length} dev eth0"), format!("eth0 lacks {address}/{length}")),
    ] {
        kernel::shell(&lab, "h1-web", &break_it);
        let found = endpoint(&lab, "web").state;
        assert!(found.starts_with(&state), "{break_it}: {found}, not {state}");
        // A repeated attach repairs it.
        lab.ctl("h1", &["attach", "web"]).assert_code(0);
        assert_eq!(endpoint(&lab, "web").state, "in place", "{break_it}");
    }
    // A foreign port belongs to no endpoint.
    kernel::shell(&lab, "h1", "ip link add name foreign type veth peer name foreign2 && ip link set foreign master ovb.1");
    let ports = network(&lab).bridge.expect_ok("the bridge").ports;
    let foreign = ports.iter().find(|port| port.interface == "foreign").expect_ok("the foreign port");
    assert!(foreign.endpoint.is_none() && ports.len() == 2);
    assert!(lab.ctl("h1", &["inspect", "--tree"]).assert_code(0).stdout.contains("  no endpoint"));
    kernel::run(&lab, "h1", &["ip", "netns", "delete", &lab.layout().namespace("h1-web")]);
    eventually("the deleted namespace is named", CONVERGE_TIMEOUT, || {
        let state = endpoint(&lab, "web").state;
        if state == "its network namespace is gone" { Ok(()) } else { Err(state) }
    })
    .await;
}
