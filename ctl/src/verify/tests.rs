//! Ways opened by hand between namespaces that are built as the agent builds those of networks.

use super::{Pair, Verdict, verify};
use crate::trace::tests::{PUBLISH, TwoNetworks};

/// The results from the first network to the second, and back.
fn verify_both(networks: &TwoNetworks) -> [Pair; 2] {
    let report = networks.inside(|| verify(Some((&networks.a, &networks.b))).expect("a report"));
    report.pairs.try_into().expect("two pairs")
}

/// Removes the drop of packets between transits.
const NO_DROP: &str = "nft flush chain inet overlayd forward\n";

/// A pair between the two namespaces, without routes.
const PAIR: &str = "ip -n ov-$A link add leak type veth peer name leak netns ov-$B; ip -n ov-$A link set leak up; ip -n ov-$B link set leak up\n";

/// A container in both networks that forwards packets.
const ROUTER: &str = "
ip -n ov-$B link add ove9 type veth peer name eth1 netns $A-c
ip -n ov-$B link set ove9 master ovb.12 up
ip -n $A-c address add 10.2.7.9/24 dev eth1; ip -n $A-c link set eth1 up
ip netns exec $A-c sysctl -qw net.ipv4.ip_forward=1
";

/// What is done to a clean host, the verdicts in both directions, and what opens the first way from the first network.
const CASES: &[(&str, &[&str], [Verdict; 2], &str)] = &[
    ("nothing", &[], [Verdict::Isolated; 2], ""),
    ("host's rules flushed", &["nft flush ruleset"], [Verdict::Isolated; 2], ""),
    ("published port", &[PUBLISH], [Verdict::ByDesign, Verdict::Isolated], "published port 8080/tcp"),
    ("published port, no drop", &[PUBLISH, NO_DROP], [Verdict::ByDesign, Verdict::Isolated], "published port 8080/tcp"),
    (
        "peers",
        &["
        ip -n ov-$A link add ovr.12 group 22102 type veth peer name ovr.11 group 22102 netns ov-$B
        ip -n ov-$A link set ovr.12 up; ip -n ov-$B link set ovr.11 up
        ip -n ov-$A route add 10.2.0.0/16 via 169.254.127.254 dev ovr.12 onlink; ip -n ov-$B route add 10.1.0.0/16 via 169.254.127.254 dev ovr.11 onlink"],
        [Verdict::ByDesign; 2],
        "Peers",
    ),
    ("pair without a route", &[PAIR], [Verdict::Isolated; 2], ""),
    (
        "pair with a route",
        &[PAIR, "ip -n ov-$A route add 10.2.0.0/16 dev leak"],
        [Verdict::Reachable, Verdict::Isolated],
        "route 10.2.0.0/16 dev leak in ov-",
    ),
    (
        "pair with an IPv6 route",
        &[PAIR, "ip -n ov-$A route add fd00:2::/64 dev leak"],
        [Verdict::Reachable, Verdict::Isolated],
        "route fd00:2::/64 dev leak in ov-",
    ),
    (
        "pair with a route to one container on another host",
        &[PAIR, "ip -n ov-$A route add 10.2.9.77/32 dev leak"],
        [Verdict::Reachable, Verdict::Isolated],
        "route 10.2.9.77/32 dev leak in ov-",
    ),
    (
        "pair between the bridges",
        &[PAIR, "ip -n ov-$A link set leak master ovb.11; ip -n ov-$B link set leak master ovb.12"],
        [Verdict::Reachable; 2],
        "leak (veth) leads to leak in ov-",
    ),
    (
        "port of the second bridge in the first namespace",
        &[PAIR, "ip -n ov-$B link set leak master ovb.12; ip -n ov-$B link set leak type bridge_slave; ip netns exec ov-$B nft delete table bridge overlayd; ip -n ov-$A route add 10.2.7.0/24 dev leak"],
        [Verdict::Reachable; 2],
        "route 10.2.7.0/24 dev leak in ov-",
    ),
    (
        "router between the networks",
        &[ROUTER, "ip netns exec ov-$B nft delete table bridge overlayd"],
        [Verdict::Reachable, Verdict::Isolated],
        "route 10.2.7.0/24 dev eth1 in /run/netns/va",
    ),
    (
        "container in both networks, source filter in place",
        &[ROUTER, "ip netns exec ov-$B nft insert rule bridge overlayd ports iifname ove9 ether type ip ip saddr != 10.2.7.9 drop"],
        [Verdict::Isolated; 2],
        "",
    ),
    (
        "second network's VNI in the first bridge",
        &["ip netns exec ov-$A ip link add x type vxlan id 12 dstport 8472 local 169.254.64.3; ip -n ov-$A link set x master ovb.11 up"],
        [Verdict::Reachable; 2],
        "x sends and receives VNI 12 in ov-",
    ),
    (
        "second network's VNI in the first namespace",
        &["ip netns exec ov-$A ip link add x type vxlan id 12 dstport 8472 local 169.254.64.3; ip -n ov-$A link set x up; ip -n ov-$A route add 10.2.0.0/16 dev x"],
        [Verdict::Reachable; 2],
        "route 10.2.0.0/16 dev x in ov-",
    ),
    (
        "FDB entry with the second network's VNI",
        &["bridge -n ov-$A fdb add 02:00:00:00:00:09 dev ovx.11 dst 192.0.2.20 vni 12 self permanent"],
        [Verdict::Reachable; 2],
        "ovx.11 sends and receives VNI 12 in ov-",
    ),
    ("host's route behind the drop", &["ip route add 10.2.0.0/16 via 169.254.64.5"], [Verdict::Isolated; 2], ""),
    (
        "host's route without the drop",
        &[NO_DROP, "ip route add 10.2.0.0/16 via 169.254.64.5"],
        [Verdict::Reachable, Verdict::Isolated],
        "route 10.2.0.0/16 via 169.254.64.5 dev ovt.12 in host",
    ),
    (
        "host's IPv6 route without the drop",
        &[NO_DROP, "ip route add fd00:2::/64 via fd6f:7665:726c:6179::5"],
        [Verdict::Reachable, Verdict::Isolated],
        "route fd00:2::/64 via fd6f:7665:726c:6179::5 dev ovt.12 in host",
    ),
    (
        "translation to the transit",
        &[PUBLISH, r#"nft 'table ip other { chain p { type nat hook prerouting priority -110; iifname "ovt.11" ip daddr 198.51.100.1 tcp dport 9000 dnat to 169.254.64.5:8080; }; }'"#],
        [Verdict::Reachable, Verdict::Isolated],
        "rule 2 of chain ip other p of host",
    ),
    (
        "translation by iptables",
        &[PUBLISH, "iptables-nft -t nat -A PREROUTING -i ovt.11 -p tcp --dport 9000 -j DNAT --to 169.254.64.5:8080"],
        [Verdict::Reachable, Verdict::Isolated],
        "of chain ip nat PREROUTING of host",
    ),
    (
        "translation of another interface",
        &[PUBLISH, "iptables-nft -t nat -A PREROUTING -i eth0 -p tcp --dport 9000 -j DNAT --to 169.254.64.5:8080"],
        [Verdict::ByDesign, Verdict::Isolated],
        "published port 8080/tcp",
    ),
    (
        "policy rule",
        &[NO_DROP, "ip route add 10.2.0.0/16 via 169.254.64.5 table 100; ip rule add iif ovt.11 lookup 100"],
        [Verdict::Reachable, Verdict::Isolated],
        "route 10.2.0.0/16 via 169.254.64.5 dev ovt.12 in host",
    ),
    (
        "table without a policy rule",
        &[NO_DROP, "ip route add 10.2.0.0/16 via 169.254.64.5 table 100"],
        [Verdict::Isolated; 2],
        "",
    ),
    (
        "policy rule by mark",
        &["ip route add 10.2.0.0/16 via 169.254.64.5 table 100; ip rule add fwmark 1 lookup 100"],
        [Verdict::Unknown, Verdict::Isolated],
        "host: a policy rule with conditions leads to the route 10.2.0.0/16 of table 100",
    ),
    (
        "drop that depends on the rate",
        &[NO_DROP, "ip route add 10.2.0.0/16 via 169.254.64.5; nft add rule inet overlayd forward limit rate over 1/second drop"],
        [Verdict::Unknown, Verdict::Isolated],
        "of chain inet overlayd forward may drop it",
    ),
    (
        "traffic control",
        &["tc qdisc add dev ovt.11 clsact"],
        [Verdict::Unknown; 2],
        "host: traffic control at ovt.11 may redirect packets",
    ),
];

#[test]
fn ways_opened_by_hand_are_found() {
    let mut failures = Vec::new();
    for (what, scripts, verdicts, opened_by) in CASES {
        let networks = TwoNetworks::build();
        scripts.iter().for_each(|script| networks.run(script));
        let pairs = verify_both(&networks);
        let [first, _] = &pairs;
        let mut reasons = first.ways.iter().map(|way| &way.by).chain(&first.unknown);
        let is_named = opened_by.is_empty() || reasons.any(|reason| reason.contains(opened_by));
        if pairs.each_ref().map(|pair| pair.verdict) != *verdicts || !is_named {
            failures.push(format!("{what}: {pairs:#?}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
