//! Ways opened by hand between namespaces that are built as the agent builds those of networks.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use overlay_agent::kernel::netns::Netns;

use super::{Pair, Verdict, verify};

/// Builds network `$N`, number `$n`, VNI `1$n`, with one container, in the namespaces `ov-$N` and `$N-c`.
const NETWORK: &str = r#"
ip netns add ov-$N; ip netns add $N-c
ip -n ov-$N link set lo up
ip link add ovx.1$n mtu 1450 group 22102 netns ov-$N type vxlan id 1$n dstport 8472 local 192.0.2.10 dev eth0 nolearning
ip -n ov-$N link add ovb.1$n group 22102 type bridge
ip link add ovt.1$n group 22102 type veth peer name ovt.1$n group 22102 netns ov-$N
ip -n ov-$N link add ove$n group 22102 type veth peer name eth0 netns $N-c
ip -n ov-$N link set ove$n master ovb.1$n
for d in ovx.1$n ovb.1$n ovt.1$n ove$n; do ip -n ov-$N link set $d up; done
ip link set ovt.1$n up; ip -n $N-c link set lo up; ip -n $N-c link set eth0 up
for family in 4 6; do
  if [ $family = 4 ]; then bridge=10.$n.7.1/24 inside=10.$n.7.5/24 gateway=10.$n.7.1 h=169.254.64.$((2*n)) e=169.254.64.$((2*n+1)) length=31 flag=
  else bridge=fd00:$n::1/64 inside=fd00:$n::5/64 gateway=fd00:$n::1 h=fd6f:7665:726c:6179::$((2*n)) e=fd6f:7665:726c:6179::$((2*n+1)) length=127 flag=nodad; fi
  ip -n ov-$N address add $bridge dev ovb.1$n $flag
  ip -n $N-c address add $inside dev eth0 $flag
  ip -n $N-c -$family route add default via $gateway
  ip address add $h/$length dev ovt.1$n $flag
  ip -n ov-$N address add $e/$length dev ovt.1$n $flag
  ip -n ov-$N -$family route add default via $h
done
ip -n ov-$N route add 10.$n.9.0/24 via 10.$n.9.0 dev ovx.1$n onlink
ip netns exec ov-$N sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
ip netns exec ov-$N nft "
table inet overlayd {
  map ports { type inet_proto . inet_service : ipv4_addr . inet_service; }
  chain prerouting { type nat hook prerouting priority dstnat; fib daddr type local dnat ip to meta l4proto . th dport map @ports; }
  chain postrouting { type nat hook postrouting priority srcnat; oifname ovt.1$n masquerade; }
}
table bridge overlayd {
  chain ports { type filter hook prerouting priority 0;
    iifname ove$n ether type ip ip saddr 10.$n.7.5 accept; iifname ove$n ether type ip6 ip6 saddr fd00:$n::5 accept; iifname ove$n drop; }
}"
"#;

/// Builds the host's part.
const HOST: &str = r#"
ip link set lo up; ip link add eth0 type veth peer name wire; ip link set wire up; ip link set eth0 up
ip address add 192.0.2.10/24 dev eth0; ip address add 2001:db8::10/64 dev eth0 nodad
ip route add default via 192.0.2.254; ip -6 route add default via 2001:db8::fe
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
nft '
table inet overlayd {
  map ports { type inet_proto . inet_service : ipv4_addr . inet_service; }
  chain prerouting { type nat hook prerouting priority dstnat; fib daddr type local dnat ip to meta l4proto . th dport map @ports; }
  chain forward { type filter hook forward priority filter; ct status dnat accept; iifname "ovt.*" oifname { "ovt.*", "ovb.*", "ovx.*" } drop; }
  chain postrouting { type nat hook postrouting priority srcnat; ip saddr 169.254.64.0/18 oifname != "ovt.*" masquerade; }
}'
"#;

/// A host with two isolated networks of one container each; removed when it goes out of scope.
struct TwoNetworks {
    host: String,
    a: String,
    b: String,
}

impl TwoNetworks {
    fn build() -> TwoNetworks {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let networks = TwoNetworks { host: format!("vh{id}"), a: format!("va{id}"), b: format!("vb{id}") };
        Netns::create(&networks.host).expect("a namespace");
        networks.run(HOST);
        for (number, name) in [(1, &networks.a), (2, &networks.b)] {
            networks.run(&format!("n={number} N={name}\n{NETWORK}"));
        }
        networks
    }

    /// Runs a script in the host's namespace; `$A` and `$B` are the networks' names.
    fn run(&self, script: &str) {
        let mut command = Command::new("sh");
        command.args(["-ec", script]).env("A", &self.a).env("B", &self.b);
        let run = || command.output().expect("a shell");
        let output = Netns::named(&self.host).expect("the host").run(run).expect("a thread inside");
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The results from the first network to the second, and back.
    fn verify(&self) -> [Pair; 2] {
        let work = || verify(Some((&self.a, &self.b))).expect("a report");
        let report = Netns::named(&self.host).expect("the host").run(work).expect("a thread inside");
        report.pairs.try_into().expect("two pairs")
    }
}

impl Drop for TwoNetworks {
    fn drop(&mut self) {
        let TwoNetworks { host, a, b } = self;
        for name in [host.clone(), format!("ov-{a}"), format!("ov-{b}"), format!("{a}-c"), format!("{b}-c")] {
            if let Err(error) = Netns::delete(&name) {
                eprintln!("{error}");
            }
        }
    }
}

/// Publishes port 8080 of the second network's container.
const PUBLISH: &str = r#"
nft add element inet overlayd ports '{ tcp . 8080 : 169.254.64.5 . 8080 }'
ip netns exec ov-$B nft add element inet overlayd ports '{ tcp . 8080 : 10.2.7.5 . 80 }'
"#;

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
        let pairs = networks.verify();
        let [first, _] = &pairs;
        let mut reasons = first.ways.iter().map(|way| &way.by).chain(&first.unknown);
        let is_named = opened_by.is_empty() || reasons.any(|reason| reason.contains(opened_by));
        if pairs.each_ref().map(|pair| pair.verdict) != *verdicts || !is_named {
            failures.push(format!("{what}: {pairs:#?}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
