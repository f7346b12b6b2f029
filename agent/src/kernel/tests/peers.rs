//! Peers' entries are written by the batch writer and read back.

use super::support::*;
use crate::kernel::KernelOptions;
use crate::kernel::PAUSE_EVENTS_ABOVE;
use std::net::IpAddr;

use crate::model::{Device, Family, Mac, NetworkConfig, PerFamily, Subnet, Vni};
use crate::plan::backend;
use crate::plan::isolation::Scope;
use crate::plan::ruleset::{Element, InetTableSpec, PeerPair, Table, inet_table};
use crate::plan::state::{NEXTHOP_IDS, RouteTarget};
use crate::plan::{Batch, DataPath, Key, Op, State, Value};

const CLASSIC_ROUTES: fn() -> KernelOptions = || KernelOptions { force_classic_routes: true, ..KernelOptions::default() };

/// The state without links, addresses and sysctls.
fn peer_entries(state: State) -> State {
    state.into_iter().filter(|(key, _)| !matches!(key, Key::Link(_) | Key::Address(..) | Key::Sysctl(_))).collect()
}

fn set_and_delete_peers(what: &str, options: KernelOptions, count: u32) {
    on_host(what, options, async |host| {
        host.create_devices().await;
        let nexthops = host.kernel.nexthop_objects();
        let is_bulk = usize::try_from(count).is_ok_and(|count| count >= PAUSE_EVENTS_ABOVE);
        for family in Family::ALL {
            let batch = peers(family, 0..count, nexthops);
            for _ in 0..2 {
                host.apply(&batch).await;
                let is = peer_entries(host.dump().await);
                let wanted = state_of(&batch);
                assert_eq!(is.len(), wanted.len(), "{family}");
                assert!(is == wanted, "{family}: read and set entries are equal");
            }
            host.expect_no_events().await;
            let delete_ops = deletions(&batch);
            host.apply(&delete_ops).await;
            assert_eq!(peer_entries(host.dump().await), State::new());
            if is_bulk {
                host.wait_for_resync("most peers were removed").await;
            }
            host.apply(&delete_ops).await;
            if is_bulk {
                host.wait_for_resync("most peers were removed").await;
                host.drain_events().await;
            }
            host.expect_no_events().await;
        }
    });
}

#[test]
fn thousand_peers_with_nexthop_objects_are_applied() {
    set_and_delete_peers("thousand", KernelOptions::default(), 1000);
}

#[test]
fn peers_with_classic_routes_are_applied() {
    set_and_delete_peers("classic", CLASSIC_ROUTES(), 300);
}

#[test]
fn route_by_the_underlay_is_applied() {
    on_host("via", KernelOptions::default(), async |host| {
        for (subnet, gateway, other) in [("10.244.3.0/24", "10.99.0.3", "10.99.0.4"), ("fd00:3::/64", "fd99::3", "fd99::4")] {
            let route = Key::Route(subnet.parse().expect(subnet));
            for gateway in [gateway, other] {
                let batch = vec![Op::Set(route.clone(), Value::Route(RouteTarget::Via(ip(gateway))))];
                host.apply(&batch).await;
                assert_eq!(peer_entries(host.dump().await), state_of(&batch));
            }
            host.expect_no_events().await;
            run(&format!("ip route del {subnet}"));
            assert_eq!(host.wait_for_change(&route).await, None);
        }
    });
}

#[test]
fn values_are_replaced_in_place() {
    on_host("replace", KernelOptions::default(), async |host| {
        host.create_devices().await;
        for family in Family::ALL {
            let old = peers(family, 0..3, true);
            let other = peers(family, 7..8, true);
            host.apply(&old).await;
            host.apply(&other).await;
            let mut new = old.clone();
            for (op, replacement) in new.iter_mut().zip([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]) {
                let (Op::Set(_, value), Op::Set(_, with)) = (op, &other[replacement]) else { panic!("only Set") };
                *value = with.clone();
            }
            host.apply(&new).await;
            let is = peer_entries(host.dump().await);
            for (key, value) in state_of(&new) {
                assert_eq!(is.get(&key), Some(&value), "{key}");
            }
            host.apply(&deletions(&new)).await;
            host.apply(&deletions(&other)).await;
        }
        host.expect_no_events().await;
    });
}

#[test]
fn failed_op_is_reported_and_batch_continues() {
    on_host("failures", KernelOptions::default(), async |host| {
        host.create_devices().await;
        for family in Family::ALL {
            let mut batch = peers(family, 0..500, true);
            let bad_route = |n: usize| {
                (1500 + n, Op::Set(batch[1500 + n].key().clone(), Value::Route(RouteTarget::Nexthop(NEXTHOP_IDS.end - 1))))
            };
            let bad_ops = [
                (3, Op::Set(batch[3].key().clone(), Value::Neigh(Mac([2; 6])))),
                (200, Op::Set(Key::Fdb(vxlan(family), Mac([0; 6])), Value::Fdb(ip("10.99.0.9")))),
                (399, Op::Set(Key::Fdb(vxlan(family), Mac([1, 0, 0, 0, 0, 1])), Value::Fdb(ip("10.99.0.9")))),
                bad_route(0),
                bad_route(1),
                bad_route(498),
                bad_route(499),
            ];
            let expected: Vec<usize> = bad_ops.iter().map(|(i, _)| *i).collect();
            for (i, op) in bad_ops {
                batch[i] = op;
            }
            let report = host.kernel.apply(&batch).await;
            let failed: Vec<usize> = report.failed.iter().map(|(i, _)| *i).collect();
            assert_eq!(failed, expected, "{:?}", report.failed);
            assert!(report.failed.iter().all(|(i, e)| e.message.starts_with(&batch[*i].to_string())), "{:?}", report.failed);
            assert_eq!(peer_entries(host.dump().await).len(), batch.len() - expected.len());
            host.apply(&deletions(&peers(family, 0..500, true))).await;
        }
    });
}

/// The failures of elements and of the entries that follow are reported at their places in the batch.
#[test]
fn failures_of_elements_and_entries_keep_their_place() {
    on_host("places", KernelOptions::default(), async |host| {
        host.create_devices().await;
        let network = NetworkConfig::parse(r#"{"Network":"10.128.0.0/10","SubnetLen":24}"#).expect("a network").config;
        let own = network.pools.v4.and_then(|pool| pool.nth(3)).map(|cidr| (Family::V4, cidr));
        let own = Subnet::new(own.into_iter().collect()).expect("a subnet");
        let local = std::iter::once((Family::V4, [192, 0, 2, 1].into())).collect();
        let spec = InetTableSpec {
            network: network.clone(),
            bridge: Device::bridge(Vni::DEFAULT),
            devices: PerFamily::default(),
            tunnel: backend::of(&network).tunnel(),
            subnet: own,
            local,
            masquerade: true,
            publishes: false,
            numbered_sets: false,
            scope: Scope::Host,
            isolation: None,
        };
        let rules = inet_table(&[&spec]);
        host.apply(&vec![Op::Set(Key::Ruleset(Table::Inet), Value::Ruleset(Box::new(rules)))]).await;
        let before = peer_entries(host.dump().await).len();
        let element = |n: u16| {
            let [a, b] = n.to_be_bytes();
            let peer =
                Element::Peer(PeerPair::new(IpAddr::from([198, 18, a, b]), IpAddr::from([10, a, b, 0])).expect("one family"));
            // This set does not exist if containers' packets are masqueraded.
            let host = Element::Host(IpAddr::from([198, 18, a, b]));
            Op::Set(Key::Element(if n == 7 { host } else { peer }), Value::Element(None))
        };
        let mut batch: Batch = (0..3000).map(element).collect();
        batch.extend(peers(Family::V4, 0..1000, true));
        batch[3100] = Op::Set(Key::Fdb(vxlan(Family::V4), Mac([0; 6])), Value::Fdb(ip("10.99.0.9")));
        let report = host.kernel.apply(&batch).await;
        let failed: Vec<usize> = report.failed.iter().map(|(i, _)| *i).collect();
        assert_eq!(failed, [7, 3100], "{:?}", report.failed);
        assert_eq!(peer_entries(host.dump().await).len(), before + batch.len() - 2);
        host.expect_no_events().await;
    });
}

#[test]
fn lost_replies_resend_messages_individually() {
    on_host("lost", KernelOptions::default(), async |host| {
        host.create_devices().await;
        host.kernel.set_batch_receive_buffer(2048).await;
        let mut batch = peers(Family::V4, 0..400, true);
        for n in 0..100 {
            let route = 1250 + n;
            batch[route] = Op::Set(batch[route].key().clone(), Value::Route(RouteTarget::Nexthop(NEXTHOP_IDS.end - 1)));
        }
        let report = host.kernel.apply(&batch).await;
        let failed: Vec<usize> = report.failed.iter().map(|(i, _)| *i).collect();
        assert_eq!(failed, (1250..1350).collect::<Vec<_>>());
        assert_eq!(peer_entries(host.dump().await).len(), 1500);
    });
}

#[test]
fn missing_device_fails_set_but_not_delete() {
    on_host("nodevice", KernelOptions::default(), async |host| {
        let batch = peers(Family::V4, 0..3, true);
        let report = host.kernel.apply(&batch).await;
        assert_eq!(report.failed.len(), batch.len());
        assert!(report.failed[0].1.message.contains("device ovx.1 does not exist"), "{:?}", report.failed);
        host.apply(&deletions(&batch)).await;
    });
}

#[test]
fn foreign_route_is_neither_listed_nor_removed() {
    on_host("others", KernelOptions::default(), async |host| {
        host.create_devices().await;
        run("ip route add 10.128.0.1/32 dev eth0");
        run("ip route add 10.200.0.0/16 dev eth0");
        run("ip nexthop add id 77 via 10.99.0.254 dev eth0");
        assert_eq!(peer_entries(host.dump().await), State::new());
        let batch = peers(Family::V4, 0..1, true);
        host.apply(&deletions(&batch)).await;
        assert!(run("ip route").contains("10.128.0.1"));
        host.apply(&batch).await;
        assert_eq!(peer_entries(host.dump().await), state_of(&batch));
        host.apply(&deletions(&batch)).await;
        assert!(run("ip route").contains("10.200.0.0/16") && run("ip nexthop").contains("id 77"));
    });
}

/// A peer's route and the unreachable route to the same range are separate entries. Each is removed by itself, and the kernel
/// uses the peer's.
#[test]
fn peer_route_takes_precedence_over_unreachable_route() {
    on_host("unreachable", KernelOptions::default(), async |host| {
        host.create_devices().await;
        for family in Family::ALL {
            for nexthops in [true, false] {
                let batch = peers(family, 0..1, nexthops);
                let Some(Key::Route(range)) = batch.last().map(|op| op.key().clone()) else { panic!("a route") };
                let unreachable = vec![Op::Set(Key::Unreachable(range), Value::Unreachable)];
                let both = [batch.clone(), unreachable.clone()].concat();
                for first in [&unreachable, &batch] {
                    host.apply(first).await;
                    host.apply(&both).await;
                    assert!(peer_entries(host.dump().await) == state_of(&both), "{family}");
                    let found = host.kernel.route_to(range.base()).await.expect("an answer");
                    assert!(found.is_some_and(|index| index != host.underlay), "{family}: the peer's route is used: {found:?}");
                    host.apply(&deletions(&unreachable)).await;
                    assert!(peer_entries(host.dump().await) == state_of(&batch), "{family}: the peer's stays");
                    host.apply(&unreachable).await;
                    host.apply(&deletions(&batch)).await;
                    assert!(peer_entries(host.dump().await) == state_of(&unreachable), "{family}: the unreachable one stays");
                    assert_eq!(host.kernel.route_to(range.base()).await.expect("an answer"), None, "{family}");
                    // Delete the peer's entries once more when none is left.
                    host.apply(&deletions(&batch)).await;
                    assert!(peer_entries(host.dump().await) == state_of(&unreachable), "{family}: the unreachable one stays");
                    host.apply(&deletions(&unreachable)).await;
                }
                host.expect_no_events().await;
                host.apply(&unreachable).await;
                let (key, flag) = (Key::Unreachable(range), if family == Family::V4 { "-4" } else { "-6" });
                run(&format!("ip {flag} route replace blackhole {range} metric 4294967295"));
                assert_eq!(host.wait_for_change(&key).await, None, "{family}: replaced by a foreign route");
                host.apply(&unreachable).await;
                assert!(peer_entries(host.dump().await) == state_of(&unreachable), "{family}: it is replaced");
                run(&format!("ip {flag} route delete unreachable {range} metric 4294967295"));
                assert_eq!(host.wait_for_change(&key).await, None, "{family}: it was deleted");
                host.drain_events().await;
            }
        }
    });
}
