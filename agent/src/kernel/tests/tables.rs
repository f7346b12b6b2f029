//! Policy rules, routes of all tables, and numbers of namespaces.

use super::support::{TestNetns, ip, run};
use crate::kernel::trace::KernelQuery;
use crate::model::Family;

#[test]
fn neighbour_in_resolution_is_awaited() {
    let netns = TestNetns::new("resolution");
    let silent = TestNetns::new("silent");
    netns
        .netns
        .run(|| {
            run("ip link add left type veth peer name right");
            run(&format!("ip link set right netns {}", silent.name()));
            run("ip link set left up");
            run("ip address add 10.0.0.1/24 dev left");
            run(&format!("ip -n {} link set right up", silent.name()));
            let socket = std::net::UdpSocket::bind("10.0.0.1:0").expect("a socket");
            let mut kernel = KernelQuery::open_in(&netns.netns).expect("a query");
            let interface = kernel.links().expect("links").into_iter().find(|link| link.name == "left").expect("left").index;
            socket.send_to(b"x", "10.0.0.2:9").expect("sent");
            assert!(run("ip neigh show 10.0.0.2").contains("INCOMPLETE"));
            let address = format!("ip -n {} address add 10.0.0.2/24 dev right", silent.name());
            let neighbour = std::thread::scope(|scope| {
                // The first request, sent above, stays without an answer; the second one has an answer.
                scope.spawn(|| netns.netns.run_in_place(|| run(&address)).expect("the address"));
                kernel.neighbour(interface, ip("10.0.0.2")).expect("an entry")
            });
            assert!(neighbour.is_usable(), "{neighbour:?}");
            socket.send_to(b"x", "10.0.0.3:9").expect("sent");
            let neighbour = kernel.neighbour(interface, ip("10.0.0.3")).expect("an entry");
            assert_eq!((neighbour.state.as_str(), neighbour.is_usable()), ("FAILED", false));
        })
        .expect("a thread inside");
}

#[test]
fn rules_and_routes_of_all_tables_are_read() {
    let netns = TestNetns::new("tables");
    netns
        .netns
        .run(|| {
            for command in [
                "ip link add left type veth peer name right",
                "ip link set left up",
                "ip link set right up",
                "ip address add 10.0.0.1/24 dev left",
                "ip rule add from 10.1.0.0/16 iif a lookup 100 priority 50",
                "ip rule add fwmark 7 lookup 101 priority 51",
                "ip route add 10.2.0.0/16 via 10.0.0.2 table 100",
                "ip route add 10.3.0.0/16 table 101 nexthop via 10.0.0.2 nexthop via 10.0.0.3",
                "ip -6 route add fd00:2::/64 dev right table 1000",
                "ip nexthop add id 7 via 10.0.0.2 dev left",
                "ip route add 10.4.0.0/16 nhid 7",
            ] {
                run(command);
            }
            let mut kernel = KernelQuery::open_in(&netns.netns).expect("a query");
            let index = |kernel: &mut KernelQuery, name: &str| {
                kernel.links().expect("links").into_iter().find(|link| link.name == name).expect(name).index
            };
            let (a, b) = (index(&mut kernel, "left"), index(&mut kernel, "right"));
            let rules = kernel.policy_rules(Family::V4).expect("rules");
            let rule = |priority| rules.iter().find(|rule| rule.priority == priority).expect("a rule");
            let first = rule(50);
            assert_eq!((first.table, first.input.as_deref(), first.conditional), (Some(100), Some("a"), false));
            assert_eq!(first.from.map(|from| from.to_string()).as_deref(), Some("10.1.0.0/16"));
            assert_eq!((rule(51).table, rule(51).conditional), (Some(101), true));
            assert!(!rule(32766).conditional && rule(32766).table == Some(254));
            let mut routes = kernel.routes(Family::V4).expect("routes");
            routes.extend(kernel.routes(Family::V6).expect("routes"));
            for (destination, table, interfaces, unpredictable) in [
                ("10.2.0.0/16", 100, vec![a], false),
                ("10.3.0.0/16", 101, vec![a, a], true),
                ("fd00:2::/64", 1000, vec![b], false),
                ("10.4.0.0/16", 254, vec![a], false),
            ] {
                let route = routes.iter().find(|route| route.destination.to_string() == destination).expect(destination);
                assert_eq!(
                    (route.table, &route.interfaces, route.unpredictable),
                    (table, &interfaces, unpredictable),
                    "{destination}"
                );
            }
        })
        .expect("a thread inside");
}

#[test]
fn links_name_other_end_and_its_namespace() {
    let (here, there) = (TestNetns::new("pair-here"), TestNetns::new("pair-there"));
    here.netns.run(|| run(&format!("ip link add x type veth peer name y netns {}", there.name()))).expect("a thread inside");
    let mut kernel = KernelQuery::open_in(&here.netns).expect("a query");
    let link = kernel.links().expect("links").into_iter().find(|link| link.name == "x").expect("x");
    let mut other = KernelQuery::open_in(&there.netns).expect("a query");
    let end = other.links().expect("links").into_iter().find(|link| link.name == "y").expect("y");
    assert_eq!((link.peer, link.peer_netns), (Some(end.index), kernel.netns_id(&there.netns).expect("a number")));
    assert!(link.peer_netns.is_some() && kernel.ingress_qdiscs().expect("qdiscs").is_empty());
    let unrelated = TestNetns::new("pair-no");
    assert_eq!(kernel.netns_id(&unrelated.netns).expect("no number"), None);
    here.netns.run(|| run("tc qdisc add dev x clsact")).expect("a thread inside");
    assert_eq!(kernel.ingress_qdiscs().expect("qdiscs"), [link.index]);
}
