//! Attaching containers is idempotent, and all or nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::support::*;
use crate::kernel::cache::lock;
use crate::kernel::netns::{Netns, named_path};
use crate::kernel::{KernelOptions, PortManager};
use crate::model::device::MAX_BRIDGE_PORTS;
use crate::model::{Cidr, Family, Mac};
use crate::plan::ruleset::{Element, source_filter};
use crate::plan::{DataPath, Key, LinkKind, LinkState, Op, PortDriver, PortSpec, SourceFilter, Value};

fn port_spec(container: &TestNetns) -> PortSpec {
    PortSpec {
        netns: named_path(container.name()).expect("a path"),
        interface: "eth0".to_owned(),
        host_interface: "ove1".to_owned(),
        bridge: bridge(),
        mac: Mac([2, 0, 0, 0, 2, 2]),
        mtu: 1430,
        addresses: vec!["10.244.0.2/24".parse().expect("address"), "fd00:244::2/64".parse().expect("address")],
        routes: vec![(Cidr::all(Family::V4), ip("10.244.0.1")), (Cidr::all(Family::V6), ip("fd00:244::1"))],
        sources: ["10.244.0.2", "fd00:244::2"].map(|address| source("ove1", address)).to_vec(),
    }
}

fn source(interface: &str, address: &str) -> Element {
    Element::Source(Box::new((interface.to_owned(), Mac([2, 0, 0, 0, 2, 2]), ip(address))))
}

fn netns_state(netns: &Netns) -> String {
    netns.run(|| ["ip -o address", "ip route", "ip -6 route", "ip -o link"].map(run).concat()).expect("inside")
}

#[test]
fn attach_and_detach_are_idempotent() {
    let container = TestNetns::new("ctr");
    on_host("plug", KernelOptions::default(), async |host| {
        let port_manager: PortManager = host.kernel.port_manager();
        let spec = port_spec(&container);
        let error = port_manager.attach_port(&spec).await.expect_err("no bridge yet");
        assert!(error.message.contains("bridge ovb.1 does not exist"), "{error}");
        host.create_devices().await;
        host.drain_events().await;
        let before = netns_state(&container.netns);
        port_manager.attach_port(&spec).await.expect("attached");
        host.expect_no_events().await;
        let inside = netns_state(&container.netns);
        for part in [
            "10.244.0.2/24",
            "fd00:244::2/64",
            "default via 10.244.0.1 dev eth0 proto 86",
            "default via fd00:244::1 dev eth0 proto 86",
            "02:00:00:00:02:02",
        ] {
            assert!(inside.contains(part), "{part} in {inside}");
        }
        let ours = inside.lines().filter(|line| !line.contains("fe80"));
        assert!(!ours.clone().any(|line| line.contains("tentative")), "{inside}");
        let outside = run("ip -d link show ove1") + &run("ip address show ove1");
        for part in ["master ovb.1", "alias overlayd", "addrgenmode none", "mtu 1430"] {
            assert!(outside.contains(part), "{part} in {outside}");
        }
        assert!(!outside.contains("inet"), "{outside}");
        assert!(host.dump().await.contains_key(&Key::Link("ove1".into())));

        port_manager.attach_port(&spec).await.expect("again");
        assert_eq!(netns_state(&container.netns), inside, "nothing was recreated");
        host.expect_no_events().await;
        container.netns.run(|| run("ip address del 10.244.0.2/24 dev eth0")).expect("inside");
        port_manager.attach_port(&spec).await.expect("repaired");
        assert!(netns_state(&container.netns).contains("10.244.0.2/24"));

        port_manager.detach_port("ove1").await.expect("detached");
        port_manager.detach_port("ove1").await.expect("again");
        assert_eq!(netns_state(&container.netns), before, "the namespace is as it was");
        host.expect_no_events().await;
    });
}

#[test]
fn second_interface_gets_overlay_routes_only() {
    let container = TestNetns::new("ctrsecond");
    on_host("plugsecond", KernelOptions::default(), async |host| {
        host.create_devices().await;
        host.drain_events().await;
        let port_manager = host.kernel.port_manager();
        let change = |command: &str| container.netns.run(|| run(command)).expect("inside");
        for command in ["ip link add eth0 type bridge", "ip address add 192.0.2.2/24 dev eth0", "ip link set eth0 up"] {
            change(command);
        }
        change("ip route add default via 192.0.2.1");
        let mut spec = port_spec(&container);
        spec.interface = "eth1".to_owned();
        let error = port_manager.attach_port(&spec).await.expect_err("a default route is there");
        assert!(error.message.contains("--no-default-route") && error.message.contains("\"isDefaultGateway\": false"), "{error}");
        let networks = ["10.244.0.0/16", "fd00:244::/56"].map(|text| text.parse::<Cidr>().expect(text));
        spec.routes = networks.into_iter().zip([ip("10.244.0.1"), ip("fd00:244::1")]).collect();
        port_manager.attach_port(&spec).await.expect("attached");
        assert_eq!(port_manager.check_port(&spec), Ok(None));
        let inside = netns_state(&container.netns);
        for part in [
            "default via 192.0.2.1 dev eth0",
            "10.244.0.0/16 via 10.244.0.1 dev eth1 proto 86",
            "fd00:244::/56 via fd00:244::1 dev eth1 proto 86",
        ] {
            assert!(inside.contains(part), "{part} in {inside}");
        }
        assert!(!inside.contains("default via 10.244") && !inside.contains("default via fd00"), "{inside}");
        port_manager.attach_port(&spec).await.expect("again");
        assert_eq!(netns_state(&container.netns), inside, "nothing was recreated");
        for (route, wanted) in [
            ("ip route del 10.244.0.0/16", "the route to 10.244.0.0/16 via 10.244.0.1 is missing"),
            ("ip -6 route del fd00:244::/56", "the route to fd00:244::/56 via fd00:244::1 is missing"),
        ] {
            change(route);
            assert_eq!(port_manager.check_port(&spec), Ok(Some(wanted.to_owned())));
            port_manager.attach_port(&spec).await.expect("repaired");
            assert_eq!(port_manager.check_port(&spec), Ok(None));
        }
        assert!(netns_state(&container.netns).contains("default via 192.0.2.1 dev eth0"));

        // A second interface on the same overlay.
        let mut second = port_spec(&container);
        (second.interface, second.host_interface, second.mac) = ("eth2".to_owned(), "ove2".to_owned(), Mac([2, 0, 0, 0, 2, 3]));
        second.addresses = ["10.244.0.3/24", "fd00:244::3/64"].map(|text| text.parse().expect(text)).to_vec();
        second.routes = spec.routes.clone();
        let error = port_manager.attach_port(&second).await.expect_err("such a route is there");
        assert!(error.message.contains("one interface on the overlay is enough"), "{error}");
        assert_eq!(port_manager.check_port(&spec), Ok(None), "the first one stays as it is");
    });
}

#[test]
fn link_event_carries_current_port_state() {
    let container = TestNetns::new("ctrlook");
    on_host("pluglook", KernelOptions::default(), async |host| {
        host.create_devices().await;
        host.drain_events().await;
        let spec = port_spec(&container);
        let mut port =
            LinkState { kind: LinkKind::Port, mac: None, mtu: spec.mtu, up: true, master: Some(bridge()), hairpin: true };
        assert_eq!(host.kernel.local().link("ove1"), None);
        host.kernel.port_manager().attach_port(&spec).await.expect("attached");
        host.apply(&vec![Op::Set(Key::Link("ove1".into()), Value::Link(Box::new(port.clone())))]).await;
        host.drain_events().await;

        run("ip link set ove1 mtu 1300");
        port.mtu = 1300;
        let link = link_of(host.wait_for_change(&Key::Link("ove1".into())).await.as_ref());
        assert_eq!(host.kernel.local().link("ove1"), Some(&link));
        assert_eq!(LinkState { mac: None, ..link }, port);
        // Further events of the same change are not reported.
        host.expect_no_events().await;
    });
}

/// The source filter's elements are in place with the port, in the kernel and in the local entries.
#[test]
fn port_has_planned_elements_only() {
    let container = TestNetns::new("ctrsource");
    on_host("plugsource", KernelOptions::default(), async |host| {
        host.create_devices().await;
        host.dump().await;
        host.drain_events().await;
        let port_manager = host.kernel.port_manager();
        let spec = port_spec(&container);
        assert_eq!(port_manager.attach_port(&spec).await, Ok(SourceFilter::Pending), "there is no table");
        let table = source_filter();
        host.apply(&vec![Op::Set(Key::Ruleset(table.table), Value::Ruleset(Box::new(table)))]).await;
        let sources = |host: &Host, interface: &str| host.kernel.local().source_elements(interface).collect::<Vec<_>>();
        assert_eq!(port_manager.attach_port(&spec).await, Ok(SourceFilter::Applied));
        assert_eq!(sources(host, "ove1"), spec.sources);
        let other = source("ove2", "10.244.0.9");
        let obsolete = source("ove1", "10.244.0.8");
        host.apply(&[&other, &obsolete].map(|e| Op::Set(Key::Element(e.clone()), Value::Element(None))).to_vec()).await;
        assert_eq!(port_manager.attach_port(&spec).await, Ok(SourceFilter::Applied));
        assert_eq!(sources(host, "ove1"), spec.sources, "an earlier user's element is gone");
        let local = host.kernel.local().clone();
        host.dump().await;
        assert_eq!(*host.kernel.local(), local, "the local entries are the kernel's");
        port_manager.detach_port("ove1").await.expect("detached");
        assert_eq!((sources(host, "ove1"), sources(host, "ove2")), (Vec::new(), vec![other]));
        assert_eq!(host.kernel.local().link("ove1"), None);
        host.expect_no_events().await;
    });
}

/// A comparison during an attach has to find the port of the elements: it deletes elements without one.
#[test]
fn port_is_known_before_its_elements() {
    let container = TestNetns::new("ctrorder");
    on_host("plugorder", KernelOptions::default(), async |host| {
        host.create_devices().await;
        let table = source_filter();
        host.apply(&vec![Op::Set(Key::Ruleset(table.table), Value::Ruleset(Box::new(table)))]).await;
        let (local, attached) = (Arc::clone(&host.kernel.local), Arc::new(AtomicBool::new(false)));
        let stop = Arc::clone(&attached);
        let watcher = std::thread::spawn(move || {
            let mut orphaned = false;
            while !stop.load(Ordering::Relaxed) {
                let local = lock(&local);
                orphaned |= local.source_elements("ove1").next().is_some() && local.link("ove1").is_none();
                drop(local);
                std::thread::sleep(std::time::Duration::from_micros(20));
            }
            orphaned
        });
        let source_filter = host.kernel.port_manager().attach_port(&port_spec(&container)).await;
        attached.store(true, Ordering::Relaxed);
        assert_eq!((source_filter, watcher.join().expect("the watcher")), (Ok(SourceFilter::Applied), false));
    });
}

/// The reconciler learns of a detach later than the kernel, and may set the elements again while the link is removed.
#[test]
fn detach_removes_elements_that_were_set_meanwhile() {
    let container = TestNetns::new("ctrmeanwhile");
    on_host("plugmeanwhile", KernelOptions::default(), async |host| {
        host.create_devices().await;
        let table = source_filter();
        host.apply(&vec![Op::Set(Key::Ruleset(table.table), Value::Ruleset(Box::new(table)))]).await;
        let (spec, port_manager) = (port_spec(&container), host.kernel.port_manager());
        for _ in 0..50 {
            assert_eq!(port_manager.attach_port(&spec).await, Ok(SourceFilter::Applied));
            let mut kernel = host.kernel.clone();
            let again = spec.sources.iter().map(|e| Op::Set(Key::Element(e.clone()), Value::Element(None))).collect();
            let setter = std::thread::spawn(move || {
                while kernel.local().source_elements("ove1").next().is_some() {
                    std::thread::sleep(std::time::Duration::from_micros(20));
                }
                let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
                assert!(runtime.block_on(kernel.apply(&again)).failed.is_empty());
                kernel.local().link("ove1").is_some()
            });
            port_manager.detach_port("ove1").await.expect("detached");
            let was_meanwhile = setter.join().expect("the other thread");
            if was_meanwhile {
                assert_eq!(host.kernel.local().source_elements("ove1").next(), None);
                return;
            }
            // Set after the end of the detach: the next comparison finds no link and removes them.
            port_manager.detach_port("ove1").await.expect("again");
        }
        panic!("the elements were never set during a detach");
    });
}

#[test]
fn failed_attach_leaves_nothing() {
    let container = TestNetns::new("ctrfail");
    on_host("plugfail", KernelOptions::default(), async |host| {
        host.create_devices().await;
        host.drain_events().await;
        let port_manager = host.kernel.port_manager();
        let outside = run("ip -o link");
        container.netns.run(|| run("ip link add eth0 type bridge")).expect("inside");
        let before = netns_state(&container.netns);
        let error = port_manager.attach_port(&port_spec(&container)).await.expect_err("the name is taken");
        assert!(error.message.contains("has an interface of that name already"), "{error}");
        assert_eq!(netns_state(&container.netns), before);
        container
            .netns
            .run(|| {
                [
                    run("ip link set eth0 name other"),
                    run("ip address add 192.0.2.2/24 dev other"),
                    run("ip link set other up"),
                    run("ip route add default via 192.0.2.1"),
                ]
            })
            .expect("inside");
        let before = netns_state(&container.netns);
        let error = port_manager.attach_port(&port_spec(&container)).await.expect_err("a default route is there");
        assert!(error.message.contains("has a default route already"), "{error}");
        assert_eq!(netns_state(&container.netns), before);
        assert_eq!(run("ip -o link"), outside);
        host.expect_no_events().await;

        let mut missing_spec = port_spec(&container);
        missing_spec.netns = "/run/netns/ovt-none".into();
        let error = port_manager.attach_port(&missing_spec).await.expect_err("no such namespace");
        assert!(error.message.contains("there is no network namespace"), "{error}");
        assert!(!port_manager.netns_exists(&missing_spec.netns) && port_manager.netns_exists(&port_spec(&container).netns));
        run("ip link add ove1 type bridge");
        let error = port_manager.attach_port(&port_spec(&container)).await.expect_err("a foreign interface");
        assert!(error.message.contains("is not managed by overlayd"), "{error}");
        assert!(port_manager.detach_port("ove1").await.is_err());
    });
}

#[test]
fn attach_to_full_bridge_names_kernel_limit() {
    let container = TestNetns::new("ctrfull");
    on_host("plugfull", KernelOptions::default(), async |host| {
        host.create_devices().await;
        host.drain_events().await;
        let bridge = bridge().name();
        // Both ends of a pair are ports.
        let pairs = MAX_BRIDGE_PORTS.div_ceil(2);
        let mut lines: String = (0..pairs).map(|n| format!("link add p{n} type veth peer name q{n}\n")).collect();
        for port in (0..pairs).flat_map(|n| [format!("p{n}"), format!("q{n}")]).take(MAX_BRIDGE_PORTS) {
            lines.push_str(&format!("link set {port} master {bridge}\n"));
        }
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), lines).expect("a batch");
        run(&format!("ip -batch {}", file.path().display()));
        let before = netns_state(&container.netns);
        let error = host.kernel.port_manager().attach_port(&port_spec(&container)).await.expect_err("the bridge is full");
        assert!(error.message.contains("bridge uses all 1023 ports that the kernel allows: detach containers"), "{error}");
        assert_eq!((netns_state(&container.netns), run("ip -o link").contains("ove1")), (before, false));
    });
}

/// Neighbours replace an address's old MAC although neither container sends anything.
#[test]
fn attach_with_new_mac_updates_neighbours() {
    let [neighbour, first, second] = ["ctrnear", "ctrfirst", "ctrsecond"].map(TestNetns::new);
    on_host("plugmac", KernelOptions::default(), async |host| {
        host.create_devices().await;
        let port_manager = host.kernel.port_manager();
        let neighbour_spec = PortSpec {
            host_interface: "ove2".to_owned(),
            mac: Mac([2, 0, 0, 0, 2, 9]),
            addresses: vec!["10.244.0.9/24".parse().expect("address"), "fd00:244::9/64".parse().expect("address")],
            ..port_spec(&neighbour)
        };
        port_manager.attach_port(&neighbour_spec).await.expect("attached");
        port_manager.attach_port(&port_spec(&first)).await.expect("attached");
        let ping = || ["10.244.0.2", "fd00:244::2"].map(|address| run(&format!("ping -c 1 -W 2 {address}")));
        let neighbours = || ["-4", "-6"].map(|family| run(&format!("ip {family} neigh show"))).concat();
        ping();
        neighbour.netns.run(ping).expect("inside");

        port_manager.detach_port("ove1").await.expect("detached");
        port_manager.attach_port(&PortSpec { mac: Mac([2, 0, 0, 0, 2, 3]), ..port_spec(&second) }).await.expect("attached");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(1);
        loop {
            let tables = [neighbours(), neighbour.netns.run(neighbours).expect("inside")];
            let is_new = |line: &&str| line.contains("lladdr 02:00:00:00:02:03");
            let of_address = |text: &String, address: &str| {
                text.lines().filter(|line| line.starts_with(&format!("{address} "))).any(|line| is_new(&line))
            };
            if tables.iter().all(|text| of_address(text, "10.244.0.2") && of_address(text, "fd00:244::2")) {
                break;
            }
            assert!(std::time::Instant::now() < deadline, "an old MAC stays:\n{}", tables.join("--\n"));
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    });
}
