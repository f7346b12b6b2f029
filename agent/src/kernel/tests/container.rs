//! Containers are wired, all or nothing.

use super::support::*;
use crate::kernel::netns::{Netns, named_path};
use crate::kernel::{KernelOptions, Plugger};
use crate::model::device::BRIDGE_PORTS;
use crate::model::{Cidr, Family, Mac};
use crate::plan::{ContainerPath, DataPath, Key, LinkKind, LinkState, Op, Plug, Value};

fn wanted(container: &Scratch) -> Plug {
    Plug {
        netns: named_path(container.name()).expect("a path"),
        interface: "eth0".to_owned(),
        host_interface: "ove1".to_owned(),
        bridge: bridge(),
        mac: Mac([2, 0, 0, 0, 2, 2]),
        mtu: 1430,
        addresses: vec!["10.244.0.2/24".parse().expect("address"), "fd00:244::2/64".parse().expect("address")],
        routes: vec![(Cidr::all(Family::V4), ip("10.244.0.1")), (Cidr::all(Family::V6), ip("fd00:244::1"))],
        source_check: true,
    }
}

fn look(netns: &Netns) -> String {
    netns.run(|| ["ip -o address", "ip route", "ip -6 route", "ip -o link"].map(run).concat()).expect("inside")
}

#[test]
fn plugged_twice_and_unplugged_twice() {
    let container = Scratch::new("ctr");
    on_host("plug", KernelOptions::default(), async |host| {
        let plugger: Plugger = host.kernel.plugger();
        let plug = wanted(&container);
        let error = plugger.plug(&plug).await.expect_err("no bridge yet");
        assert!(error.message.contains("bridge ovb.1 is not there"), "{error}");
        host.make_devices().await;
        host.settle().await;
        let before = look(&container.netns);
        plugger.plug(&plug).await.expect("plugged");
        host.quiet().await;
        let inside = look(&container.netns);
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

        plugger.plug(&plug).await.expect("again");
        assert_eq!(look(&container.netns), inside, "nothing was made anew");
        host.quiet().await;
        container.netns.run(|| run("ip address del 10.244.0.2/24 dev eth0")).expect("inside");
        plugger.plug(&plug).await.expect("repaired");
        assert!(look(&container.netns).contains("10.244.0.2/24"));

        plugger.unplug("ove1").await.expect("unplugged");
        plugger.unplug("ove1").await.expect("again");
        assert_eq!(look(&container.netns), before, "the namespace is as it was");
        host.quiet().await;
    });
}

#[test]
fn second_interface_gets_routes_to_the_overlay_network_only() {
    let container = Scratch::new("ctrsecond");
    on_host("plugsecond", KernelOptions::default(), async |host| {
        host.make_devices().await;
        host.settle().await;
        let plugger = host.kernel.plugger();
        let change = |command: &str| container.netns.run(|| run(command)).expect("inside");
        for command in ["ip link add eth0 type bridge", "ip address add 192.0.2.2/24 dev eth0", "ip link set eth0 up"] {
            change(command);
        }
        change("ip route add default via 192.0.2.1");
        let mut plug = wanted(&container);
        plug.interface = "eth1".to_owned();
        let error = plugger.plug(&plug).await.expect_err("a default route is there");
        assert!(error.message.contains("--no-default-route") && error.message.contains("\"isDefaultGateway\": false"), "{error}");
        let networks = ["10.244.0.0/16", "fd00:244::/56"].map(|text| text.parse::<Cidr>().expect(text));
        plug.routes = networks.into_iter().zip([ip("10.244.0.1"), ip("fd00:244::1")]).collect();
        plugger.plug(&plug).await.expect("plugged");
        assert_eq!(plugger.difference(&plug), Ok(None));
        let inside = look(&container.netns);
        for part in [
            "default via 192.0.2.1 dev eth0",
            "10.244.0.0/16 via 10.244.0.1 dev eth1 proto 86",
            "fd00:244::/56 via fd00:244::1 dev eth1 proto 86",
        ] {
            assert!(inside.contains(part), "{part} in {inside}");
        }
        assert!(!inside.contains("default via 10.244") && !inside.contains("default via fd00"), "{inside}");
        plugger.plug(&plug).await.expect("again");
        assert_eq!(look(&container.netns), inside, "nothing was made anew");
        for (route, wanted) in [
            ("ip route del 10.244.0.0/16", "the route to 10.244.0.0/16 via 10.244.0.1 is not there"),
            ("ip -6 route del fd00:244::/56", "the route to fd00:244::/56 via fd00:244::1 is not there"),
        ] {
            change(route);
            assert_eq!(plugger.difference(&plug), Ok(Some(wanted.to_owned())));
            plugger.plug(&plug).await.expect("repaired");
            assert_eq!(plugger.difference(&plug), Ok(None));
        }
        assert!(look(&container.netns).contains("default via 192.0.2.1 dev eth0"));

        // A second one on the same overlay.
        let mut second = wanted(&container);
        (second.interface, second.host_interface, second.mac) = ("eth2".to_owned(), "ove2".to_owned(), Mac([2, 0, 0, 0, 2, 3]));
        second.addresses = ["10.244.0.3/24", "fd00:244::3/64"].map(|text| text.parse().expect(text)).to_vec();
        second.routes = plug.routes.clone();
        let error = plugger.plug(&second).await.expect_err("such a route is there");
        assert!(error.message.contains("one interface on the overlay is enough"), "{error}");
        assert_eq!(plugger.difference(&plug), Ok(None), "the first one stays as it is");
    });
}

#[test]
fn a_port_is_looked_at_as_it_is() {
    let container = Scratch::new("ctrlook");
    on_host("pluglook", KernelOptions::default(), async |host| {
        host.make_devices().await;
        host.settle().await;
        let plug = wanted(&container);
        let mut port =
            LinkState { kind: LinkKind::Port, mac: None, mtu: plug.mtu, up: true, master: Some(bridge()), hairpin: true };
        assert_eq!(host.kernel.link("ove1").await, Ok(None));
        host.kernel.plugger().plug(&plug).await.expect("plugged");
        host.apply(&vec![Op::Set(Key::Link("ove1".into()), Value::Link(Box::new(port.clone())))]).await;
        host.settle().await;

        run("ip link set ove1 mtu 1300");
        port.mtu = 1300;
        let looked = host.kernel.link("ove1").await.expect("looked").expect("a port");
        assert_eq!(LinkState { mac: None, ..looked }, port);
        // What was told meanwhile is known by now.
        host.quiet().await;
    });
}

#[test]
fn a_failed_plug_leaves_nothing() {
    let container = Scratch::new("ctrfail");
    on_host("plugfail", KernelOptions::default(), async |host| {
        host.make_devices().await;
        host.settle().await;
        let plugger = host.kernel.plugger();
        let outside = run("ip -o link");
        container.netns.run(|| run("ip link add eth0 type bridge")).expect("inside");
        let before = look(&container.netns);
        let error = plugger.plug(&wanted(&container)).await.expect_err("the name is taken");
        assert!(error.message.contains("has an interface of that name already"), "{error}");
        assert_eq!(look(&container.netns), before);
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
        let before = look(&container.netns);
        let error = plugger.plug(&wanted(&container)).await.expect_err("a default route is there");
        assert!(error.message.contains("has a default route already"), "{error}");
        assert_eq!(look(&container.netns), before);
        assert_eq!(run("ip -o link"), outside);
        host.quiet().await;

        let mut gone = wanted(&container);
        gone.netns = "/run/netns/ovt-none".into();
        let error = plugger.plug(&gone).await.expect_err("no such namespace");
        assert!(error.message.contains("there is no network namespace"), "{error}");
        assert!(!plugger.netns_alive(&gone.netns) && plugger.netns_alive(&wanted(&container).netns));
        run("ip link add ove1 type bridge");
        let error = plugger.plug(&wanted(&container)).await.expect_err("a foreign interface");
        assert!(error.message.contains("is not ours"), "{error}");
        assert!(plugger.unplug("ove1").await.is_err());
    });
}

#[test]
fn plug_into_full_bridge_names_the_kernels_limit() {
    let container = Scratch::new("ctrfull");
    on_host("plugfull", KernelOptions::default(), async |host| {
        host.make_devices().await;
        host.settle().await;
        let bridge = bridge().name();
        // Both ends of a pair are ports.
        let pairs = BRIDGE_PORTS.div_ceil(2);
        let mut lines: String = (0..pairs).map(|n| format!("link add p{n} type veth peer name q{n}\n")).collect();
        for port in (0..pairs).flat_map(|n| [format!("p{n}"), format!("q{n}")]).take(BRIDGE_PORTS) {
            lines.push_str(&format!("link set {port} master {bridge}\n"));
        }
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), lines).expect("a batch");
        run(&format!("ip -batch {}", file.path().display()));
        let before = look(&container.netns);
        let error = host.kernel.plugger().plug(&wanted(&container)).await.expect_err("the bridge is full");
        assert!(error.message.contains("all of the 1023 ports that the kernel gives it: detach containers"), "{error}");
        assert_eq!((look(&container.netns), run("ip -o link").contains("ove1")), (before, false));
    });
}

/// Those who know the addresses' last MAC replace it, though none of them sends anything.
#[test]
fn plug_with_another_mac_updates_the_neighbours() {
    let [neighbour, first, second] = ["ctrnear", "ctrfirst", "ctrsecond"].map(Scratch::new);
    on_host("plugmac", KernelOptions::default(), async |host| {
        host.make_devices().await;
        let plugger = host.kernel.plugger();
        let near = Plug {
            host_interface: "ove2".to_owned(),
            mac: Mac([2, 0, 0, 0, 2, 9]),
            addresses: vec!["10.244.0.9/24".parse().expect("address"), "fd00:244::9/64".parse().expect("address")],
            ..wanted(&neighbour)
        };
        plugger.plug(&near).await.expect("plugged");
        plugger.plug(&wanted(&first)).await.expect("plugged");
        let ping = || ["10.244.0.2", "fd00:244::2"].map(|address| run(&format!("ping -c 1 -W 2 {address}")));
        let known = || ["-4", "-6"].map(|family| run(&format!("ip {family} neigh show"))).concat();
        ping();
        neighbour.netns.run(ping).expect("inside");

        plugger.unplug("ove1").await.expect("unplugged");
        plugger.plug(&Plug { mac: Mac([2, 0, 0, 0, 2, 3]), ..wanted(&second) }).await.expect("plugged");
        let end = std::time::Instant::now() + std::time::Duration::from_secs(1);
        loop {
            let told = [known(), neighbour.netns.run(known).expect("inside")];
            let is_new = |line: &&str| line.contains("lladdr 02:00:00:00:02:03");
            let of_address = |text: &String, address: &str| {
                text.lines().filter(|line| line.starts_with(&format!("{address} "))).any(|line| is_new(&line))
            };
            if told.iter().all(|text| of_address(text, "10.244.0.2") && of_address(text, "fd00:244::2")) {
                break;
            }
            assert!(std::time::Instant::now() < end, "an old MAC stays:\n{}", told.join("--\n"));
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    });
}
