//! The monitor reports changes by other processes, and none of our own.

use netlink_packet_core::NetlinkHeader;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;

use super::support::*;
use crate::kernel::events::{HostInterfaces, PendingEvents, apply_event};
use crate::kernel::nlmsg::messages;
use crate::kernel::peer_messages;
use crate::kernel::subscription::EventClass;
use crate::kernel::{Kernel, KernelOptions, Shared};
use crate::model::Family;
use crate::plan::ruleset::Table;
use crate::plan::state::{LinkKind, RouteTarget};
use crate::plan::sysctls;
use crate::plan::{Batch, KernelEvent, Key, LinkState, Op, Ruleset, Value};

#[test]
fn external_entry_changes_are_reported() {
    on_host("drift", KernelOptions::default(), async |host| {
        host.create_devices().await;
        for family in Family::ALL {
            let batch = peers(family, 0..1, true);
            host.apply(&batch).await;
            host.expect_no_events().await;
            let [Op::Set(fdb, fdb_value), Op::Set(neigh, neigh_value), Op::Set(nexthop, nexthop_value), Op::Set(route, _)] =
                &batch[..]
            else {
                panic!("four entries")
            };
            let (Key::Fdb(device, mac), Key::Neigh(_, base), Key::Nexthop(id), Key::Route(cidr)) = (fdb, neigh, nexthop, route)
            else {
                panic!("four kinds")
            };
            let flag = if family == Family::V4 { "-4" } else { "-6" };

            run(&format!("bridge fdb del {mac} dev {device}"));
            assert_eq!(host.wait_for_change(fdb).await, None);
            run(&format!("ip neigh del {base} dev {device}"));
            assert_eq!(host.wait_for_change(neigh).await, None);
            run(&format!("ip {flag} route del {cidr}"));
            assert_eq!(host.wait_for_change(route).await, None);
            host.apply(&batch).await;
            host.expect_no_events().await;

            let other_vtep = if family == Family::V4 { "10.99.66.6" } else { "fd99::6666" };
            run(&format!("bridge fdb replace {mac} dev {device} dst {other_vtep} self permanent"));
            assert_eq!(host.wait_for_change(fdb).await, Some(Value::Fdb(ip(other_vtep))));
            run(&format!("ip neigh replace {base} dev {device} lladdr 02:66:66:66:66:66 nud permanent"));
            assert_eq!(host.wait_for_change(neigh).await, Some(Value::Neigh("02:66:66:66:66:66".parse().expect("mac"))));
            run(&format!("ip neigh replace {base} dev {device} lladdr 02:66:66:66:66:66 nud reachable"));
            assert_eq!(host.wait_for_change(neigh).await, None);
            run(&format!("ip {flag} route replace {cidr} dev eth0"));
            assert_eq!(host.wait_for_change(route).await, Some(Value::Route(RouteTarget::Foreign)));
            // Not the next hop: IPv6 refuses it while another interface's route covers the gateway.
            host.apply(&vec![batch[0].clone(), batch[1].clone(), batch[3].clone()]).await;
            host.expect_no_events().await;
            let state = host.dump().await;
            assert_eq!(state.get(fdb), Some(fdb_value));
            assert_eq!(state.get(neigh), Some(neigh_value));
            assert_eq!(state.get(nexthop), Some(nexthop_value));

            run(&format!("ip nexthop del id {id}"));
            assert_eq!(host.wait_for_change(nexthop).await, None);
            host.wait_for_resync("next hop").await;
            host.drain_events().await;
            assert_eq!(host.dump().await.get(route), None, "the kernel removed the route with it");
            host.apply(&deletions(&batch)).await;
            host.drain_events().await;
        }
    });
}

#[test]
fn pausing_entry_events_requires_resync() {
    on_host("deaf", KernelOptions::default(), async |host| {
        host.create_devices().await;
        let batch = peers(Family::V4, 0..2, true);
        host.apply(&batch).await;
        host.expect_no_events().await;
        let mut neighbours = batch.iter().map(Op::key).filter(|key| matches!(key, Key::Neigh(..)));
        let (Some(Key::Neigh(device, first)), Some(Key::Neigh(_, second))) = (neighbours.next(), neighbours.next()) else {
            panic!("two entries")
        };
        let pause_guard = host.kernel.subscriptions.pause(vec![EventClass::PeerEntries]);
        run(&format!("ip neigh del {first} dev {device}"));
        host.expect_no_events().await;
        drop(pause_guard);
        host.wait_for_resync("most peers were removed").await;
        host.drain_events().await;
        run(&format!("ip neigh del {second} dev {device}"));
        assert_eq!(host.wait_for_change(&Key::Neigh(*device, *second)).await, None, "events are resumed");
    });
}

/// Removing a few peers pauses no entry events; removing most of them does.
#[test]
fn removing_most_peers_pauses_entry_events() {
    on_host("leave", KernelOptions::default(), async |host| {
        host.create_devices().await;
        let batch = peers(Family::V4, 0..1200, true);
        host.apply(&batch).await;
        host.drain_events().await;
        // Removing fewer than half of the peers causes no full read.
        host.apply(&deletions(&peers(Family::V4, 0..550, true))).await;
        host.expect_no_events().await;
        host.apply(&deletions(&peers(Family::V4, 550..1150, true))).await;
        host.wait_for_resync("most peers were removed").await;
        let remaining = host.dump().await.keys().filter(|key| matches!(key, Key::Neigh(..))).count();
        assert_eq!(remaining, 50);
        // Only routes and next hops are deleted explicitly; the other entries go with their device.
        let batch = peers(Family::V4, 0..600, true);
        host.apply(&batch).await;
        host.drain_events().await;
        let deleted_explicitly = |op: &Op| matches!(op.key(), Key::Route(_) | Key::Nexthop(_));
        host.apply(&deletions(&batch).into_iter().filter(deleted_explicitly).collect()).await;
        host.wait_for_resync("most peers were removed").await;
    });
}

#[test]
fn fdb_changes_during_pause_are_found() {
    on_host("paused", KernelOptions::default(), async |host| {
        host.create_devices().await;
        let batch = peers(Family::V4, 0..3, true);
        host.apply(&batch).await;
        host.expect_no_events().await;
        let fdb: Vec<&Key> = batch.iter().map(Op::key).filter(|key| matches!(key, Key::Fdb(..))).collect();
        let [Key::Fdb(device, first), Key::Fdb(_, second), _] = fdb[..] else { panic!("three entries") };
        let pause_guard = host.kernel.subscriptions.pause(vec![EventClass::Fdb]);
        run(&format!("bridge fdb del {first} dev {device}"));
        run(&format!("bridge fdb replace {second} dev {device} dst 10.99.66.6 self permanent"));
        run("bridge fdb add 02:66:66:66:66:66 dev ovx.1 dst 10.99.66.7 self permanent");
        // Other events still arrive.
        run("ip link set ovb.1 mtu 1301");
        let bridge = Key::Link("ovb.1".into());
        match host.events.recv().await.expect("an event") {
            KernelEvent::Changed(changes) => assert_eq!(changes.iter().map(|(key, _)| key).collect::<Vec<_>>(), [&bridge]),
            other => panic!("{other:?}"),
        }
        host.expect_no_events().await;
        drop(pause_guard);
        let foreign_entry = Key::Fdb(*device, "02:66:66:66:66:66".parse().expect("mac"));
        let mut wanted = vec![
            (fdb[0].clone(), None),
            (fdb[1].clone(), Some(Value::Fdb(ip("10.99.66.6")))),
            (foreign_entry.clone(), Some(Value::Fdb(ip("10.99.66.7")))),
        ];
        wanted.sort_by(|(a, _), (b, _)| a.cmp(b));
        match host.events.recv().await.expect("an event") {
            KernelEvent::Changed(changes) => assert_eq!(changes, wanted),
            other => panic!("{other:?}"),
        }
        // Later FDB events arrive again.
        run("bridge fdb del 02:66:66:66:66:66 dev ovx.1");
        assert_eq!(host.wait_for_change(&foreign_entry).await, None);
    });
}

/// The second event of a set or removed FDB entry, which rtnetlink's core sends after the device's own before Linux 6.13.
fn rtnl_fdb_notification(kind: u16, index: u32, key: &Key) -> (NetlinkHeader, Vec<u8>) {
    let mut buffer = Vec::new();
    assert!(peer_messages::write_delete(&mut buffer, 0, index, key), "{key}");
    let (mut header, body) = messages(&buffer).next().expect("a message");
    header.message_type = kind;
    header.flags = 0;
    (header, body.to_vec())
}

#[test]
fn duplicate_fdb_notification_is_ignored() {
    on_host("twice", KernelOptions::default(), async |host| {
        host.create_devices().await;
        for family in Family::ALL {
            let batch = peers(family, 0..1, true);
            host.apply(&batch).await;
            host.expect_no_events().await;
            let Some(fdb @ Key::Fdb(device, mac)) = batch.iter().map(Op::key).find(|key| matches!(key, Key::Fdb(..))) else {
                panic!("an FDB entry")
            };
            for kind in [libc::RTM_NEWNEIGH, libc::RTM_DELNEIGH] {
                let mut shared = host.kernel.shared.lock().await;
                let index = shared.cache.index(*device).expect("the device");
                let (header, body) = rtnl_fdb_notification(kind, index, fdb);
                let mut pending = PendingEvents::default();
                apply_event(header, &body, &mut shared, &mut HostInterfaces::default(), &mut pending);
                assert!(pending.is_empty(), "{kind}: {pending:?}");
            }
            run(&format!("bridge fdb del {mac} dev {device}"));
            assert_eq!(host.wait_for_change(fdb).await, None);
        }
    });
}

#[test]
fn external_link_and_address_changes_are_reported() {
    on_host("linkdrift", KernelOptions::default(), async |host| {
        host.create_devices().await;
        host.expect_no_events().await;
        let key = Key::Link("ovx.1".into());
        let mut wanted = vxlan_link(Family::V4, host.underlay);
        run("ip link set ovx.1 mtu 1300");
        wanted.mtu = 1300;
        assert_eq!(host.wait_for_change(&key).await, Some(Value::Link(Box::new(wanted.clone()))));
        run("ip link set ovx.1 down");
        wanted.up = false;
        assert_eq!(host.wait_for_change(&key).await, Some(Value::Link(Box::new(wanted))));
        host.wait_for_resync("went down").await;
        host.drain_events().await;

        let address = Key::Address(bridge(), "10.244.0.1/24".parse().expect("address"));
        run("ip address del 10.244.0.1/24 dev ovb.1");
        assert_eq!(host.wait_for_change(&address).await, None);
        run("ip address add 10.244.0.1/24 dev ovb.1");
        assert_eq!(host.wait_for_change(&address).await, Some(Value::Address));
        run("ip address add fd00:66::1/64 dev ovb.1");
        let foreign_address = Key::Address(bridge(), "fd00:66::1/64".parse().expect("address"));
        assert_eq!(host.wait_for_change(&foreign_address).await, Some(Value::Address));
        host.drain_events().await;

        run("ip link delete ovb.1");
        assert_eq!(host.wait_for_change(&Key::Link("ovb.1".into())).await, None);
        host.wait_for_resync("of ours w").await;
        host.drain_events().await;
        run("ip link delete ovx.1");
        assert_eq!(host.wait_for_change(&key).await, None);
        host.drain_events().await;
        run("ip link add ovx.1 type bridge");
        match host.wait_for_change(&key).await {
            Some(Value::Link(link)) => assert_eq!(link.kind, LinkKind::Foreign { kind: "bridge".to_owned() }),
            other => panic!("{other:?}"),
        }
        run("ip link delete ovx.1");
        host.drain_events().await;
        host.create_devices().await;
        host.expect_no_events().await;
        let batch = peers(Family::V4, 0..3, true);
        host.apply(&batch).await;
        host.expect_no_events().await;
        run("ip link set ovx.1 name elsewhere");
        assert_eq!(host.wait_for_change(&key).await, None);
    });
}

/// Link events as the kernel would send them now.
fn link_messages(shared: &mut Shared) -> Vec<(NetlinkHeader, Vec<u8>)> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let read = |all: &mut Vec<_>, header, body: &[u8]| all.push((header, body.to_vec()));
    shared.socket.dump(&request, Vec::new, read).expect("the links")
}

/// The kernel sends some link events late, so that they are queued behind a change of ours, whose own event is dropped.
#[test]
fn late_link_event_is_not_reported() {
    on_host("late", KernelOptions::default(), async |host| {
        host.create_devices().await;
        host.drain_events().await;
        let late = link_messages(&mut *host.kernel.shared.lock().await);
        let changed = LinkState { mtu: 1400, ..bridge_link() };
        host.apply(&vec![set_link(bridge(), changed.clone())]).await;
        let replay = async |kernel: &Kernel| {
            let mut shared = kernel.shared.lock().await;
            let mut pending = PendingEvents::default();
            let mut host_interfaces = HostInterfaces::read(&mut shared.socket).expect("the links");
            for (header, body) in &late {
                apply_event(*header, body, &mut shared, &mut host_interfaces, &mut pending);
            }
            pending.read_links(&mut shared);
            pending.next_event()
        };
        assert_eq!(replay(&host.kernel).await, None);
        // A late event and another program's change: the report is the present state.
        run("ip link set ovb.1 mtu 1300");
        let now = Some(Value::Link(Box::new(LinkState { mtu: 1300, ..changed })));
        assert_eq!(replay(&host.kernel).await, Some(KernelEvent::Changed(vec![(Key::Link("ovb.1".into()), now)])));
    });
}

#[test]
fn external_forwarding_change_is_reported() {
    on_host("forward", KernelOptions::default(), async |host| {
        host.create_devices().await;
        host.drain_events().await;
        for path in [sysctls::IPV4_FORWARD, sysctls::IPV6_FORWARD] {
            let key = Key::Sysctl(path.into());
            host.apply(&vec![Op::Set(key.clone(), Value::Sysctl("1".into()))]).await;
            host.expect_no_events().await;
            std::fs::write(format!("/proc/sys/net/{path}"), "0").expect("written");
            assert_eq!(host.wait_for_change(&key).await, Some(Value::Sysctl("0".into())));
            host.drain_events().await;
        }
    });
}

#[test]
fn external_interface_sysctl_changes_are_reported() {
    on_host("settings", KernelOptions::default(), async |host| {
        host.create_devices().await;
        host.drain_events().await;
        let of = |interface: &str, family, setting: &str| sysctls::interface_path(interface, family, setting);
        for (path, expected, wrong) in [
            (of("ovb.1", Family::V4, "forwarding"), "1", "0"),
            (of("ovx.1", Family::V4, "rp_filter"), "2", "1"),
            (of("ovb.1", Family::V4, "proxy_arp"), "0", "1"),
            (of("eth0", Family::V4, "forwarding"), "1", "0"),
            (of("ovb.1", Family::V6, "forwarding"), "1", "0"),
        ] {
            let key = Key::Sysctl(path.clone().into());
            host.apply(&vec![Op::Set(key.clone(), Value::Sysctl(expected.into()))]).await;
            host.expect_no_events().await;
            std::fs::write(format!("/proc/sys/net/{path}"), wrong).expect("written");
            assert_eq!(host.wait_for_change(&key).await, Some(Value::Sysctl(wrong.into())), "{path}");
            host.drain_events().await;
        }
    });
}

/// The kernel reports only the removal of the addresses.
#[test]
fn external_ipv6_disable_is_reported() {
    on_host("noipv6", KernelOptions::default(), async |host| {
        host.create_devices().await;
        let path = sysctls::interface_path("ovb.1", Family::V6, "disable_ipv6");
        let key = Key::Sysctl(path.clone().into());
        assert_eq!(host.dump().await.get(&key), Some(&Value::Sysctl("0".into())));
        host.drain_events().await;
        std::fs::write(format!("/proc/sys/net/{path}"), "1").expect("written");
        assert_eq!(host.wait_for_change(&key).await, Some(Value::Sysctl("1".into())));
        assert!(matches!(host.next_event().await, KernelEvent::ResyncNeeded { reason } if reason.contains("IPv6")));
    });
}

#[test]
fn external_rule_changes_are_reported() {
    on_host("rules", KernelOptions::default(), async |host| {
        let batch: Batch = Table::ALL
            .map(|table| {
                let rules = Ruleset { table, ..Ruleset::default() };
                Op::Set(Key::Ruleset(table), Value::Ruleset(Box::new(rules)))
            })
            .to_vec();
        host.apply(&batch).await;
        host.expect_no_events().await;
        assert_eq!(host.dump().await.keys().filter(|key| matches!(key, Key::Ruleset(_))).count(), 2);
        run("nft add table inet mine");
        host.expect_no_events().await;
        run("nft delete table inet overlayd");
        assert_eq!(host.wait_for_change(&Key::Ruleset(Table::Inet)).await, None);
        run("nft delete table bridge overlayd");
        assert_eq!(host.wait_for_change(&Key::Ruleset(Table::Bridge)).await, None);
    });
}

#[test]
fn rule_changes_during_pause_are_found() {
    on_host("unheardrules", KernelOptions::default(), async |host| {
        let tables = || {
            let table = |table| Op::Set(Key::Ruleset(table), Value::Ruleset(Box::new(Ruleset { table, ..Ruleset::default() })));
            Table::ALL.map(table).to_vec()
        };
        host.apply(&tables()).await;
        host.expect_no_events().await;
        let generation = host.kernel.shared.lock().await.nft.foreign_generation().expect("a number");
        let pause_guard = host.kernel.subscriptions.pause(vec![EventClass::Rules(generation)]);
        run("nft delete table inet overlayd");
        host.expect_no_events().await;
        // An earlier number counts until the monitor has taken it.
        let generation = host.kernel.shared.lock().await.nft.foreign_generation().expect("a number");
        drop(host.kernel.subscriptions.pause(vec![EventClass::Rules(generation)]));
        drop(pause_guard);
        assert_eq!(host.wait_for_change(&Key::Ruleset(Table::Inet)).await, None);
        host.apply(&tables()).await;
        host.drain_events().await;
        run("nft delete table bridge overlayd");
        assert_eq!(host.wait_for_change(&Key::Ruleset(Table::Bridge)).await, None, "events are resumed");
    });
}

#[test]
fn host_network_changes_are_reported() {
    on_host("underlay", KernelOptions::default(), async |host| {
        host.create_devices().await;
        host.drain_events().await;
        for command in [
            "ip address add 10.99.0.77/24 dev eth0",
            "ip address del 10.99.0.77/24 dev eth0",
            "ip link set eth0 mtu 1400",
            "ip route replace default via 10.99.0.253",
            "ip -6 route del default",
            "ip link add eth1 type bridge",
            "ip link delete eth1",
        ] {
            run(command);
            loop {
                // The MTU of eth0 may change that of the VXLAN devices.
                match host.next_event().await {
                    KernelEvent::HostNetworkChanged => break,
                    KernelEvent::Changed(_) => {}
                    other => panic!("{command}: {other:?}"),
                }
            }
            host.drain_events().await;
        }
        run("ip route add 198.51.100.0/24 dev eth0");
        run("ip neigh add 10.99.0.5 lladdr 02:00:00:00:00:05 dev eth0");
        host.expect_no_events().await;
    });
}

#[test]
fn receive_buffer_overrun_requires_resync() {
    on_host_with_monitor(
        "overrun",
        KernelOptions::default(),
        |monitor| monitor.set_receive_buffer(2048),
        async |host| {
            host.create_devices().await;
            host.drain_events().await;
            let lines: String =
                (0..3000).map(|n| format!("route add 10.{}.{}.0/24 dev eth0 proto 86\n", n / 250, n % 250)).collect();
            let file = tempfile::NamedTempFile::new().expect("a file");
            std::fs::write(file.path(), lines).expect("written");
            run(&format!("ip -batch {}", file.path().display()));
            host.wait_for_resync("events were lost").await;
        },
    );
}

#[test]
fn slow_reader_loses_no_events() {
    let options = KernelOptions { event_capacity: 1, ..KernelOptions::default() };
    on_host("slow", options, async |host| {
        host.create_devices().await;
        host.drain_events().await;
        for n in 0..40 {
            run(&format!("ip route add 10.1.{n}.0/24 dev eth0 proto 86"));
            tokio::task::yield_now().await;
        }
        let mut seen = std::collections::BTreeSet::new();
        while seen.len() < 40 {
            if let KernelEvent::Changed(changes) = host.next_event().await {
                seen.extend(changes.into_iter().map(|(key, _)| key));
            }
        }
        host.expect_no_events().await;
    });
}
