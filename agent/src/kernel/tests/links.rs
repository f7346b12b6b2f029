//! Links, addresses and sysctls are set, read back, changed in place and refused.

use std::time::Instant;

use super::support::*;
use crate::kernel::KernelOptions;
use crate::kernel::sysctl;
use crate::model::{Family, Mac};
use crate::plan::state::{LinkKind, LinkState};
use crate::plan::sysctls;
use crate::plan::underlay::{Flaw, ForeignLink};
use crate::plan::{DataPath, Key, Op, Value};

#[test]
fn setting_devices_is_idempotent() {
    on_host("devices", KernelOptions::default(), async |host| {
        assert!(host.dump().await.keys().all(|key| matches!(key, Key::Sysctl(_))), "no state of ours at first");
        let batch = devices(host.underlay);
        for _ in 0..2 {
            host.apply(&batch).await;
            let state = host.dump().await;
            for (key, value) in state_of(&batch) {
                assert_eq!(state.get(&key), Some(&value), "{key}");
            }
            let entry_count = state.keys().filter(|key| !matches!(key, Key::Sysctl(_))).count();
            assert_eq!(entry_count, batch.len(), "{state:#?}");
            for device in [bridge(), vxlan(Family::V4), vxlan(Family::V6)] {
                let key = Key::Sysctl(sysctl::accept_ra(&device.name()).into());
                assert_eq!(state.get(&key), Some(&Value::Sysctl("0".into())), "{key}");
            }
        }
        let output = run("ip -d link show ovx.1");
        for word in ["nolearning", "dstport 8472", "local 10.99.0.1 dev eth0", "alias overlayd", "addrgenmode none", "ttl 64"] {
            assert!(output.contains(word), "{word} in {output}");
        }
        let addresses = run("ip -6 address show dev ovx.1") + &run("ip -6 address show dev ovb.1");
        assert!(!addresses.contains("fe80"), "no link-local address: {addresses}");
        host.expect_no_events().await;
        host.apply(&deletions(&batch)).await;
        host.apply(&deletions(&batch)).await;
        assert!(host.dump().await.keys().all(|key| matches!(key, Key::Sysctl(_))));
        host.expect_no_events().await;
    });
}

#[test]
fn link_changes_in_place_when_possible() {
    on_host("inplace", KernelOptions::default(), async |host| {
        host.create_devices().await;
        let before = run("ip -o link show ovx.1");
        let mut wanted = vxlan_link(Family::V4, host.underlay);
        wanted.mac = Some(Mac([2, 0, 0, 0, 1, 99]));
        wanted.mtu = 1400;
        let LinkKind::Vxlan(settings) = &mut wanted.kind else { panic!("a vxlan device") };
        settings.local = ip("10.99.0.2");
        settings.tx_checksum = false;
        host.apply(&vec![set_link(vxlan(Family::V4), wanted.clone())]).await;
        let key = Key::Link("ovx.1".into());
        assert_eq!(link_of(host.dump().await.get(&key)), wanted);
        let number = |text: &str| text.split(':').next().map(str::to_owned);
        assert_eq!(number(&before), number(&run("ip -o link show ovx.1")), "the same device");
        host.expect_no_events().await;

        let LinkKind::Vxlan(settings) = &mut wanted.kind else { panic!("a vxlan device") };
        settings.port = 4789;
        host.apply(&vec![set_link(vxlan(Family::V4), wanted.clone())]).await;
        assert_eq!(link_of(host.dump().await.get(&key)), wanted);
        assert_ne!(number(&before), number(&run("ip -o link show ovx.1")), "the UDP port cannot be changed in place: recreated");
        host.expect_no_events().await;
    });
}

#[test]
fn foreign_link_with_own_name_is_refused() {
    on_host("foreign", KernelOptions::default(), async |host| {
        run("ip link add ovx.1 type bridge");
        run("ip link add ovb.1 type veth peer name other");
        let state = host.dump().await;
        let foreign_link = link_of(state.get(&Key::Link("ovx.1".into())));
        assert_eq!(foreign_link.kind, LinkKind::Foreign { kind: "bridge".to_owned() });
        let unmarked = link_of(state.get(&Key::Link("ovb.1".into())));
        assert_eq!(unmarked.kind, LinkKind::Foreign { kind: "veth".to_owned() });
        let before = run("ip -d link");
        let mut batch = devices(host.underlay);
        batch.extend(deletions(&batch));
        let report = host.kernel.apply(&batch).await;
        let error_message = |name: &str, n: usize| {
            let named = report.failed.iter().filter(|(i, _)| batch[*i].key() == &Key::Link(name.into()));
            named.map(|(_, e)| e.message.clone()).nth(n).expect("refused")
        };
        let message = error_message("ovx.1", 0);
        assert_eq!(
            message,
            "interface ovx.1 exists and is not managed by overlayd (kind bridge, no alias `overlayd`): remove or rename it: ip link delete ovx.1"
        );
        assert_eq!(error_message("ovx.1", 1), message, "nor is it deleted");
        assert!(error_message("ovb.1", 0).contains("kind veth"));
        assert_eq!(before, run("ip -d link"), "untouched");
        assert!(report.failed.is_sorted_by_key(|(i, _)| *i));
    });
}

/// Each of more links than threads has its own result. Together they take less than half of their time in turn.
#[test]
fn many_links_are_deleted_in_parallel() {
    on_host("manylinks", KernelOptions::default(), async |host| {
        let name = |n: u32| format!("ove{n}");
        let delete = |n: u32| Op::Delete(Key::Link(name(n).as_str().into()), Value::Link(Box::new(bridge_link())));
        for n in 0..73 {
            let group = if n == 40 { 0 } else { 22_102 };
            run(&format!("ip link add {} group {group} type veth peer name far{n}", name(n)));
        }
        let started = Instant::now();
        for n in 65..73 {
            host.apply(&vec![delete(n)]).await;
        }
        let eight = started.elapsed();
        let started = Instant::now();
        let report = host.kernel.apply(&(0..65).map(delete).collect()).await;
        let elapsed = started.elapsed();
        let failed: Vec<(usize, i32)> = report.failed.iter().map(|(at, error)| (*at, error.errno)).collect();
        assert_eq!(failed, [(40, libc::EEXIST)], "only the foreign link is kept");
        let kept = run("ip -br link show type veth");
        assert_eq!(kept.lines().filter(|line| line.starts_with("ove")).count(), 1, "{kept}");
        assert!(elapsed < 4 * eight, "64 links took {elapsed:?}, 8 in turn {eight:?}");
    });
}

#[test]
fn half_created_link_is_adopted() {
    on_host("torn", KernelOptions::default(), async |host| {
        run("ip link add ovb.1 group 22102 type bridge");
        host.create_devices().await;
        assert!(run("ip -d link show ovb.1").contains("alias overlayd"));
    });
}

#[test]
fn vxlan_conflict_error_names_the_cause() {
    on_host("rival", KernelOptions::default(), async |host| {
        run("ip link add flannel.1 type vxlan id 1 local 10.99.0.1 dev eth0 dstport 8472 nolearning");
        let report = host.kernel.apply(&vec![set_link(vxlan(Family::V4), vxlan_link(Family::V4, host.underlay))]).await;
        let (_, error) = report.failed.first().expect("refused");
        assert_eq!(error.errno, libc::EEXIST);
        assert!(error.message.contains("VNI 1 on UDP port 8472 is in use by interface flannel.1"), "{error}");
        run("ip link delete flannel.1");
        let socket = std::net::UdpSocket::bind("0.0.0.0:8472").expect("bind");
        let report = host.kernel.apply(&vec![set_link(vxlan(Family::V4), vxlan_link(Family::V4, host.underlay))]).await;
        let (_, error) = report.failed.first().expect("refused");
        assert!(error.message.contains("UDP port 8472 is taken by another program"), "{error}");
        drop(socket);
        host.create_devices().await;
        let mut large = vxlan_link(Family::V4, host.underlay);
        large.mtu = 70_000;
        let report = host.kernel.apply(&vec![set_link(vxlan(Family::V4), large)]).await;
        assert!(report.failed[0].1.message.contains("MTU 70000 may be more than"), "{:?}", report.failed);
    });
}

#[test]
fn port_is_changed_but_never_created() {
    on_host("port", KernelOptions::default(), async |host| {
        host.create_devices().await;
        let port = LinkState { kind: LinkKind::Port, mac: None, mtu: 1400, up: true, master: Some(bridge()), hairpin: true };
        let set = vec![Op::Set(Key::Link("ove0".into()), Value::Link(Box::new(port.clone())))];
        let report = host.kernel.apply(&set).await;
        assert_eq!(report.failed[0].1.errno, libc::ENODEV);
        run("ip link add ove0 type veth peer name inner");
        let report = host.kernel.apply(&set).await;
        assert!(report.failed[0].1.message.contains("is not managed by overlayd"), "{:?}", report.failed);
        run("ip link set ove0 alias overlayd");
        host.apply(&set).await;
        let is = link_of(host.dump().await.get(&Key::Link("ove0".into())));
        assert_eq!(LinkState { mac: None, ..is }, port);
    });
}

#[test]
fn sysctls_are_written_and_read_back() {
    on_host("sysctl", KernelOptions::default(), async |host| {
        let key = Key::Sysctl(sysctls::IPV4_FORWARD.into());
        let other = Key::Sysctl("ipv4/conf/eth0/rp_filter".into());
        let set = |key: &Key, text: &str| Op::Set(key.clone(), Value::Sysctl(text.into()));
        host.apply(&vec![set(&key, "1"), set(&other, "2")]).await;
        let state = host.dump().await;
        assert_eq!(state.get(&key), Some(&Value::Sysctl("1".into())));
        assert_eq!(state.get(&other), Some(&Value::Sysctl("2".into())), "a written sysctl is read from then on");
        assert_eq!(state.get(&Key::Sysctl(sysctls::IPV6_FORWARD.into())), Some(&Value::Sysctl("0".into())));
        host.expect_no_events().await;
        let report = host.kernel.apply(&vec![set(&Key::Sysctl("ipv4/none".into()), "1"), set(&other, "0")]).await;
        assert_eq!(report.failed.len(), 1);
        assert_eq!(report.failed[0].0, 0);
    });
}

#[test]
fn inventory_lists_foreign_links_and_routes() {
    on_host("inventory", KernelOptions::default(), async |host| {
        host.create_devices().await;
        run("ip link add eth1 mtu 9000 type veth peer name far1");
        run("ip link set far1 up");
        run("ip address add 192.0.2.7/24 dev eth1");
        run("ip link set eth1 up");
        run("ip route add default via 192.0.2.1 metric 50");
        run("ip -6 route add default via fd99::aa dev eth0 metric 10 proto ra");
        let inventory = host.kernel.inventory().await.expect("an inventory");
        let names: Vec<_> = inventory.links.iter().map(|l| l.name.as_str()).collect();
        let named = |name| inventory.links.iter().find(|l| l.name == name).expect(name);
        assert_eq!(names.len(), 5, "{names:?}");
        let (lo, eth0, eth1) = (named("lo"), named("eth0"), named("eth1"));
        assert!(lo.loopback && !eth0.loopback);
        let addresses = |link: &ForeignLink| link.addresses.iter().map(|a| a.address).collect::<Vec<_>>();
        assert_eq!(addresses(eth0), [ip("10.99.0.1"), ip("fd99::1")]);
        assert_eq!((eth1.mtu, eth1.up, addresses(eth1)), (9000, true, vec![ip("192.0.2.7")]));
        let defaults: Vec<_> =
            inventory.default_routes.iter().map(|d| (d.family, d.interface, d.from_router_advertisement)).collect();
        assert_eq!(
            defaults,
            [
                (Family::V4, eth0.index, false),
                (Family::V4, eth1.index, false),
                (Family::V6, eth0.index, true),
                (Family::V6, eth0.index, false)
            ]
        );
        assert_eq!((inventory.default_routes[1].source, inventory.default_routes[1].gateway), (None, Some(ip("192.0.2.1"))));
        assert!(inventory.forward_drops.is_empty());
        run("ip address add 192.0.2.8/24 dev eth1");
        run("ip address add 192.0.2.100/32 dev eth1");
        run("ip address add 169.254.7.7/16 dev eth1");
        run("ip route replace default via 192.0.2.1 metric 50 src 192.0.2.8");
        run("ip address add fd98::7/64 dev eth1");
        run("ip address add fd98::8/64 dev eth1 nodad preferred_lft 0");
        run("ip address add fd98::9/64 dev eth1 nodad valid_lft 900 preferred_lft 800");
        let inventory = host.kernel.inventory().await.expect("an inventory");
        let eth1 = inventory.links.iter().find(|l| l.name == "eth1").expect("eth1");
        let found = |text: &str| {
            let found = eth1.addresses.iter().find(|a| a.address == ip(text)).expect(text);
            (found.length, found.secondary, found.flaw)
        };
        assert_eq!(found("192.0.2.7"), (24, false, None));
        assert_eq!(found("192.0.2.8"), (24, true, None));
        assert_eq!(found("192.0.2.100"), (32, false, None));
        assert_eq!(found("169.254.7.7"), (16, false, Some(Flaw::LinkLocal)));
        assert_eq!(found("fd98::7"), (64, false, Some(Flaw::Tentative)));
        assert_eq!(found("fd98::8"), (64, false, Some(Flaw::Deprecated)));
        assert_eq!(found("fd98::9"), (64, false, None));
        assert_eq!(inventory.default_routes[1].source, Some(ip("192.0.2.8")));
        let mut to = async |text| host.kernel.route_to(ip(text)).await.expect("an answer");
        assert_eq!(to("192.0.2.99").await, Some(eth1.index));
        assert_eq!(to("203.0.113.1").await, Some(eth0.index));
        assert_eq!(to("2001:db8::1").await, Some(eth0.index));
        run("ip route add unreachable 203.0.113.0/24");
        run("ip -6 route add unreachable 2001:db8::/32");
        let mut to = async |text| host.kernel.route_to(ip(text)).await.expect("an answer");
        assert_eq!(to("203.0.113.1").await, None);
        assert_eq!(to("2001:db8::1").await, None);
    });
}
