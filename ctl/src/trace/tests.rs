//! A host with two isolated networks, built by hand as the agent builds them, and packets traced through them.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Endpoint;

use super::targets::Inventory;
use super::tracer::trace;
use super::{Trace, TraceOutcome};

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
pub(crate) struct TwoNetworks {
    host: String,
    pub(crate) a: String,
    pub(crate) b: String,
}

impl TwoNetworks {
    pub(crate) fn build() -> TwoNetworks {
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
    pub(crate) fn run(&self, script: &str) {
        let mut command = Command::new("sh");
        command.args(["-ec", script]).env("A", &self.a).env("B", &self.b);
        let output = self.inside(|| command.output().expect("a shell"));
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Runs a function in the host's namespace.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        Netns::named(&self.host).expect("the host").run(work).expect("a thread inside")
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
pub(crate) const PUBLISH: &str = r#"
nft add element inet overlayd ports '{ tcp . 8080 : 169.254.64.5 . 8080 }'
ip netns exec ov-$B nft add element inet overlayd ports '{ tcp . 8080 : 10.2.7.5 . 80 }'
"#;

impl TwoNetworks {
    /// The containers: `web` in the first network, `db` in the second.
    fn inventory(&self) -> Inventory {
        let endpoint = |name: &str, network: &str, number: u8| -> Endpoint {
            serde_json::from_value(serde_json::json!({
                "name": name,
                "netns": format!("/run/netns/{network}-c"),
                "mode": "overlay",
                "interface": "eth0",
                "host_interface": format!("ove{number}"),
                "mac": "02:00:00:00:00:01",
                "addresses": {"v4": format!("10.{number}.7.5"), "v6": format!("fd00:{number}::5")},
                "attached_at": 0,
            }))
            .expect("an endpoint")
        };
        Inventory { endpoints: vec![endpoint("web", &self.a, 1), endpoint("db", &self.b, 2)], leases: None }
    }

    fn trace(&self, from: &str, to: &str) -> Trace {
        self.inside(|| trace(from, to, None, &self.inventory()).expect("a trace"))
    }
}

/// The answers of a step in a namespace.
fn answers<'t>(trace: &'t Trace, place: &str, step: &str) -> Vec<&'t str> {
    let hops = trace.hops.iter().filter(|hop| hop.place == place && hop.step == step);
    hops.map(|hop| hop.answer.as_str()).collect()
}

#[test]
fn trace_follows_packet_through_namespaces() {
    let networks = TwoNetworks::build();
    networks.run(PUBLISH);
    let (own, other) = (format!("ov-{}", networks.a), format!("ov-{}", networks.b));
    // Out: both translations of the source, each in its namespace.
    let out = networks.trace("web", "198.51.100.7");
    assert_eq!(out.outcome, TraceOutcome::Ok, "{out:#?}");
    assert_eq!(answers(&out, &own, "link"), ["ovt.11 leads to namespace host"]);
    assert!(answers(&out, &own, "translation")[0].contains("source becomes 169.254.64.3 (masquerade)"), "{out:#?}");
    assert!(answers(&out, "host", "translation")[0].contains("source becomes 192.0.2.10 (masquerade)"), "{out:#?}");
    assert!(out.end.starts_with("leaves this host by eth0") && out.from.what.ends_with(&format!("of network {}", networks.a)));
    // In: a published port, translated twice.
    let published = networks.trace("192.0.2.77", "192.0.2.10:8080");
    assert_eq!((published.outcome, published.end.as_str()), (TraceOutcome::Ok, "arrives in container db"), "{published:#?}");
    assert_eq!(answers(&published, "host", "link"), [format!("ovt.12 leads to namespace {other}")]);
    assert!(answers(&published, &other, "translation")[0].contains("destination becomes 10.2.7.5:80"), "{published:#?}");
    // To another host: the outer packet leaves by the host's namespace.
    networks.run(
        "ip -n ov-$A neigh add 10.1.9.0 lladdr 02:00:00:00:00:09 dev ovx.11 nud permanent; \
         bridge -n ov-$A fdb add 02:00:00:00:00:09 dev ovx.11 dst 192.0.2.20 self permanent",
    );
    let far = networks.trace("web", "10.1.9.5");
    assert_eq!(answers(&far, "host", "outer route"), ["192.0.2.20 dev eth0"], "{far:#?}");
    assert_eq!(answers(&far, &own, "fdb"), ["02:00:00:00:00:09 is behind 192.0.2.20"], "{far:#?}");
    // The other network's container is elsewhere.
    let isolated = networks.trace("web", "db");
    assert!(isolated.end.starts_with("leaves this host by eth0"), "{isolated:#?}");
    let reason = format!("db is in network {}, which network {} reaches only by its published ports", networks.b, networks.a);
    assert!(isolated.notes[0].starts_with(&reason), "{:?}", isolated.notes);
}
