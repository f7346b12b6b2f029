//! The data path of a namespace, used by threads in another one.

use super::support::*;
use crate::kernel::netns::Netns;
use crate::model::{Device, Family, Vni};
use crate::plan::ruleset::{Table, source_filter};
use crate::plan::sysctls;
use crate::plan::{DataPath, Key, Op, Value};

/// What another program would see of the calling thread's namespace.
fn namespace_state() -> String {
    let commands = ["ip -br link", "ip -br address", "ip route", "ip -6 route", "ip nexthop", "bridge fdb", "nft list ruleset"];
    let sysctls = ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"].map(|path| format!("cat {path}"));
    commands.map(str::to_owned).iter().chain(&sysctls).map(|command| run(command)).collect()
}

#[test]
fn kernel_handle_acts_in_its_namespace() {
    on_host_from_outside("handle", async |host, inside| {
        let outside = Netns::current().expect("own");
        assert!(!outside.is_same(inside).expect("comparable"));
        let before = namespace_state();

        host.create_devices().await;
        let peers = peers(Family::V4, 0..3, true);
        let forwarding = (Key::Sysctl(sysctls::forwarding(Family::V6).into()), Value::Sysctl("1".into()));
        let ruleset = (Key::Ruleset(Table::Bridge), Value::Ruleset(Box::new(source_filter())));
        let mut batch = vec![Op::Set(forwarding.0.clone(), forwarding.1.clone()), Op::Set(ruleset.0.clone(), ruleset.1.clone())];
        batch.extend(peers.iter().cloned());
        host.apply(&batch).await;
        let state = host.dump().await;
        for op in &batch {
            assert!(matches!(op, Op::Set(key, value) if state.get(key) == Some(value)), "{op}");
        }
        let bridge = Device::bridge(Vni::DEFAULT);
        let accept_ra = format!("ipv6/conf/{bridge}/accept_ra");
        host.kernel.watch_sysctls(vec![accept_ra.clone()]).await.expect("a sysctl");
        let accept_ra = host.kernel.local().get(&Key::Sysctl(accept_ra.into())).cloned();
        assert_eq!(accept_ra, Some(Value::Sysctl("0".into())));
        let ports = host.kernel.port_manager();
        assert!(ports.snapshot(bridge).expect("a snapshot").bridge.is_some());
        assert!(!ports.dropped_packets().expect("counters").is_empty());
        assert!(host.kernel.inventory().await.expect("an inventory").links.iter().any(|link| link.name == "eth0"));
        assert_eq!(host.kernel.route_to(ip("10.99.0.254")).await, Ok(Some(host.underlay)));

        let found = inside.run(namespace_state).expect("inside");
        for text in ["ovx.1", "ovb.1", "10.128.0.3 nhid", "table bridge overlayd"] {
            assert!(found.contains(text), "{text} in\n{found}");
        }
        assert!(found.trim_end().ends_with("1"), "IPv6 forwarding in\n{found}");

        // Another process's change there is an event here.
        let Some(Op::Set(route, _)) = peers.last() else { panic!("a route") };
        let Key::Route(destination) = route else { panic!("a route: {route}") };
        inside.run(|| run(&format!("ip route delete {destination}"))).expect("inside");
        assert_eq!(host.wait_for_change(route).await, None);
        inside.run(|| run("nft delete table bridge overlayd")).expect("inside");
        assert_eq!(host.wait_for_change(&ruleset.0).await, None);

        // Links are removed by threads of the runtime.
        let links = deletions(&devices(host.underlay)).into_iter().filter(|op| matches!(op.key(), Key::Link(_))).collect();
        host.apply(&links).await;
        assert!(!inside.run(namespace_state).expect("inside").contains("ovx.1"));

        assert_eq!(namespace_state(), before);
        assert!(outside.is_same(&Netns::current().expect("own")).expect("comparable"));
    });
}
