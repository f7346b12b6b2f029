//! Rule sets as firewalls write them, and which drops the probes meet there. They are loaded into network namespaces, as root.

use std::io::Write;
use std::process::{Command, Stdio};

use super::*;

fn interface(index: u32, name: &str) -> Option<Interface> {
    Some(Interface { index, name: name.to_owned() })
}

fn tunnel() -> Probe {
    let [source, destination] = ["10.99.1.2", "10.99.1.1"].map(|text| text.parse().expect("an address"));
    let flow = Flow { source, destination, protocol: UDP, port: 8472 };
    Probe { description: "tunnel".to_owned(), required: true, hook: Hook::Input, flow, input: interface(2, "eth0"), output: None }
}

fn forwarded() -> Probe {
    let [source, destination] = ["10.244.1.2", "10.244.2.2"].map(|text| text.parse().expect("an address"));
    let flow = Flow { source, destination, protocol: TCP, port: ANY_PORT };
    let (input, output) = (interface(3, "ovb.1"), interface(4, "ovx.1"));
    Probe { description: "containers".to_owned(), required: true, hook: Hook::Forward, flow, input, output }
}

/// Runs a program with an input in a new network namespace; then `body` in the same.
fn in_netns_after<T: Send>(program: &[&str], input: &str, body: impl FnOnce() -> T + Send) -> T {
    let run = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace: run the tests as root");
        let mut child = Command::new(program[0]).args(&program[1..]).stdin(Stdio::piped()).spawn().expect("a program");
        child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("the program reads its input");
        assert!(child.wait().expect("the program ends").success(), "{program:?}: {input}");
        body()
    };
    match std::thread::scope(|scope| scope.spawn(run).join()) {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// What drops a probe in a rule set.
fn dropped_by(rules: &str, probe: Probe) -> Option<DropVerdict> {
    let drops = in_netns_after(&["nft", "-f", "-"], rules, || evaluate(vec![probe])).expect("the rules");
    drops.into_iter().next().map(|(_, drop)| drop)
}

fn input(rules: &str) -> Option<DropVerdict> {
    let text = format!(
        "table inet filter {{\n set open {{\n type inet_service\n flags interval\n elements = {{ 22, 8000-9000, 53 }}\n }}\n chain other {{\n drop\n }}\n \
         chain input {{\n type filter hook input priority filter; policy accept;\n{rules}\n }}\n}}\n"
    );
    dropped_by(&text, tunnel())
}

#[test]
fn tunnel_dropping_rules_are_found() {
    for rule in [
        "udp dport 8472 drop",
        "iifname \"eth0\" ip saddr 10.0.0.0/8 udp dport 8472 counter packets 0 bytes 0 reject",
        "meta l4proto udp udp dport { 1, 8472 } counter packets 0 bytes 0 drop",
        "iifname { \"lo\", \"e*\" } meta l4proto 17 drop",
        "udp dport @open drop",
        "tcp dport != 22 accept\nudp dport != { 53, 67 } drop",
        "ip6 saddr ::1 accept\nct state untracked drop",
        "jump other",
        "ct state vmap { established : accept, related : accept, untracked : goto other }",
        // Accepted it would be only if conntrack knew it.
        "ct state new udp dport 8472 accept\ndrop",
        "udp dport 8000-9000 log prefix \"a drop of accept: \" level warn drop",
        "ip saddr != 192.0.2.0/24 drop comment \"accept\"",
        "meta mark set 0x1\ndrop",
        "meta pkttype host drop",
        "fib daddr type local drop",
    ] {
        let dropped = input(rule).unwrap_or_else(|| panic!("passes: {rule}"));
        assert!(dropped.certain, "{rule}: {dropped:?}");
    }
}

#[test]
fn tunnel_passing_rules_yield_no_drop() {
    for rule in [
        "udp dport 4789 drop",
        "tcp dport 8472 drop",
        "iifname \"eth1\" drop",
        "ip6 daddr != ::1 drop",
        "tcp dport != 22 drop",
        "udp dport 8472 accept\ndrop",
        "iifname != \"lo\" udp dport @open accept\ndrop",
        "ct state invalid drop",
        "ct state new drop",
        "ct state { new, untracked } udp dport 8472 accept\ndrop",
        "ct state established,related accept",
        "ip saddr 10.99.1.3-10.99.1.9 drop",
        "meta pkttype broadcast drop",
        "fib daddr type unicast drop",
    ] {
        assert_eq!(input(rule), None, "{rule}");
    }
}

#[test]
fn unknown_match_is_uncertain() {
    for rule in [
        "meta cpu 1 drop",
        "limit rate 5/second drop",
        "meta mark 0x7 accept\ndrop",
        "meta mark 0 accept\ndrop",
        "udp length > 1400 drop",
        "meta skuid 0 return\ndrop",
    ] {
        let dropped = input(rule).unwrap_or_else(|| panic!("passes: {rule}"));
        assert!(!dropped.certain, "{rule}: {dropped:?}");
    }
    assert_eq!(input("meta mark 0x7 accept"), None);
}

#[test]
fn certain_drop_is_preferred_to_uncertain_one() {
    let rules = "table ip a { chain p { type filter hook prerouting priority 0; limit rate 1/second drop; }; \
                 chain i { type filter hook input priority 0; udp dport 8472 drop; }; }";
    let dropped = dropped_by(rules, tunnel()).expect("dropped");
    assert_eq!((dropped.certain, dropped.rule.chain.as_str()), (true, "i"));
}

#[test]
fn notrack_rule_keeps_packet_untracked() {
    let rules = |raw: &str| {
        format!(
            "table ip t {{ chain p {{ type filter hook prerouting priority raw; {raw}; }}; chain f {{ type filter hook forward priority 0; \
             ct state untracked drop; }}; }}"
        )
    };
    assert!(dropped_by(&rules("ip saddr 10.244.0.0/16 notrack"), forwarded()).is_some_and(|drop| drop.certain));
    assert_eq!(dropped_by(&rules("ip saddr 10.9.0.0/16 notrack"), forwarded()), None);
}

#[test]
fn drop_policy_and_foreign_chains_are_evaluated() {
    let docker = |accept: &str| {
        format!(
            "table ip filter {{\n chain DOCKER-USER {{\n counter packets 0 bytes 0 return\n }}\n chain DOCKER {{\n drop\n }}\n chain FORWARD {{\n type \
             filter hook forward priority filter; policy drop;\n {accept}\n counter packets 0 bytes 0 jump DOCKER-USER\n oifname \"docker0\" counter \
             packets 0 bytes 0 jump DOCKER\n }}\n}}\n"
        )
    };
    let dropped = dropped_by(&docker(""), forwarded()).expect("dropped");
    assert!(dropped.certain && dropped.rule.handle.is_none() && is_iptables(&dropped.rule, "FORWARD"), "{dropped:?}");
    assert_eq!(dropped.rule.path, ["FORWARD", "DOCKER-USER"]);
    assert!(remedy(&dropped.rule, &forwarded()).contains("iptables -I DOCKER-USER -o ovb.1 -j ACCEPT"));
    let accept_rule = "ip saddr 10.244.0.0/16 counter packets 0 bytes 0 accept comment \"overlayd\"";
    assert_eq!(dropped_by(&docker(accept_rule), forwarded()), None);
    let firewalld = "table inet firewalld {\n chain filter_FORWARD {\n type filter hook forward priority filter + 10; policy accept;\n ct state { \
                     established, related } accept\n iifname \"lo\" accept\n reject with icmpx admin-prohibited\n }\n}\n";
    let dropped = dropped_by(firewalld, forwarded()).expect("dropped");
    assert!(remedy(&dropped.rule, &forwarded()).starts_with("firewall-cmd --permanent --zone=trusted"), "{dropped:?}");
    assert_eq!(dropped_by(&firewalld.replace("firewalld", "overlayd"), forwarded()), None, "our own");
}

#[tokio::test]
async fn unlisted_rule_is_named_by_its_location() {
    let absent = "table inet absent-here { chain i { type filter hook input priority 0; udp dport 8472 drop; }; }";
    let dropped = dropped_by(absent, tunnel()).expect("dropped");
    let handle = dropped.rule.handle.expect("a rule");
    assert_eq!(rule_text(&dropped.rule).await, format!("rule {handle} of chain inet absent-here i"));
}

#[test]
fn remedy_names_base_chain_of_rule_in_other_chain() {
    let nested =
        "table inet t { chain more { udp dport 8472 drop; }; chain i { type filter hook input priority 0; jump more; }; }";
    let dropped = dropped_by(nested, tunnel()).expect("dropped");
    assert_eq!(dropped.rule.chain, "more");
    assert!(remedy(&dropped.rule, &tunnel()).starts_with("nft insert rule inet t i udp dport 8472 accept"));
}
