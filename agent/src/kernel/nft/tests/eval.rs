//! Compares evaluated verdicts with the kernel's. Packets are sent over the loopback device; if the output hook drops one, the
//! send fails with `EPERM`.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use super::*;
use crate::kernel::nft::{RulesetSnapshot, Translation};
use crate::kernel::trace::packet::{Flow, Interface, Packet, SOURCE_PORT, TCP, UDP};
use crate::plan::ruleset::Hook;

/// Rules of a chain at the output hook. Each is evaluated for each port, in both families.
const RULES: [&str; 24] = [
    "udp dport 53 drop",
    "udp dport { 22, 53, 80 } drop",
    "udp dport != { 22, 53 } drop",
    "udp dport 50-60 drop",
    "udp dport { 10-19, 50-60, 8000-9000 } drop",
    "udp dport >= 80 drop",
    "udp dport < 80 drop",
    "tcp dport 53 drop",
    "meta l4proto { tcp, udp } drop",
    "meta l4proto udp udp dport 80 accept; drop",
    "ip daddr 127.0.0.0/8 udp dport 53 drop",
    "ip daddr 127.0.0.2 drop",
    "ip daddr { 10.0.0.0/8, 127.0.0.0/16 } drop",
    "ip6 daddr ::1 udp dport 80 drop",
    "ip6 daddr fe80::/10 drop",
    "ip6 saddr { ::1, fd00::/8 } drop",
    "oifname \"lo\" udp dport 8472 drop",
    "oifname \"l*\" udp dport 8472 drop",
    "oif lo meta mark 0 udp dport 53 reject",
    "iifname \"eth0\" drop",
    "ct state { established, related } accept; ct state new udp dport 80 drop",
    "ct state vmap { established : accept, related : accept, invalid : drop, new : jump more }",
    "udp dport vmap { 53 : drop, 80 : goto more }; udp dport 8472 drop",
    "ip daddr . udp dport { 127.0.0.1 . 53, 127.0.0.1 . 80 } drop",
];

/// Rules after a chain that exempts two of the ports from conntrack.
const UNTRACKED: [&str; 6] = [
    "ct state new drop",
    "ct state untracked drop",
    "ct state { new, untracked } udp dport 80 drop",
    "ct state new udp dport 80 accept; drop",
    "ct status dnat drop",
    "ct direction original drop",
];
const NOTRACK: &str = "chain r { type filter hook output priority raw; udp dport { 53, 80 } notrack; }";

const PORTS: [u16; 4] = [53, 80, 8472, 9999];

fn load_rules(rules: &str, policy: &str, before: &str) {
    let rules = rules.replace("; ", "\n");
    nft(&format!(
        "flush ruleset\ntable inet t {{\n {before}\n chain more {{\n udp dport 80 drop\n udp dport 8472 return\n udp dport 9999 counter drop\n }}\n \
         chain o {{\n type filter hook output priority 0; policy {policy};\n {rules}\n }}\n}}\n"
    ));
}

#[test]
fn evaluated_verdicts_match_kernel() {
    in_netns(|| {
        crate::kernel::netns::set_loopback_up().expect("lo up");
        let mut dropped = 0;
        let all = RULES.iter().map(|rules| (rules, "")).chain(UNTRACKED.iter().map(|rules| (rules, NOTRACK)));
        for (rules, policy, before) in all.flat_map(|(rules, before)| [(rules, "accept", before), (rules, "drop", before)]) {
            load_rules(rules, policy, before);
            let snapshot = RulesetSnapshot::read().expect("the rules");
            for address in ["127.0.0.1", "::1"] {
                let address: IpAddr = address.parse().expect("an address");
                let socket = UdpSocket::bind(SocketAddr::new(address, SOURCE_PORT)).expect("a socket");
                for port in PORTS {
                    let sent = socket.send_to(b"x", SocketAddr::new(address, port));
                    let kernel = sent.as_ref().err().and_then(std::io::Error::raw_os_error) == Some(libc::EPERM);
                    let flow = Flow { source: address, destination: address, protocol: UDP, port };
                    let lo = Interface { index: 1, name: "lo".to_owned() };
                    let result = snapshot.evaluate(Hook::Output, false, &Packet { output: Some(lo), ..Packet::new(&flow) });
                    assert!(result.possible_accepts.is_empty() && result.possible_drops.is_empty(), "{rules}: {result:?}");
                    assert_eq!(
                        result.is_certain_drop(),
                        kernel,
                        "`{rules}`, policy {policy}, to {address} port {port}: {sent:?}, {result:?}"
                    );
                    dropped += usize::from(kernel);
                }
            }
        }
        assert!(dropped > 100, "{dropped} of {} were dropped", RULES.len() * 16);
    });
}

#[test]
fn undecidable_matches_are_reported() {
    in_netns(|| {
        let flow = Flow {
            source: "10.0.0.1".parse().expect("ip"),
            destination: "10.0.0.2".parse().expect("ip"),
            protocol: TCP,
            port: 80,
        };
        let evaluate = || RulesetSnapshot::read().expect("the rules").evaluate(Hook::Output, false, &Packet::new(&flow));
        load_rules("limit rate over 5/second drop comment \"too many\"", "accept", "");
        let result = evaluate();
        assert!(result.dropped.is_none() && result.possible_drops.len() == 1, "{result:?}");
        assert!(
            result.possible_drops[0].to_string().ends_with("of chain inet t o (\"too many\")"),
            "{}",
            result.possible_drops[0]
        );
        load_rules("meta skuid 7 accept", "drop", "");
        let result = evaluate();
        assert!(result.dropped.is_some() && !result.is_certain_drop() && result.possible_accepts.len() == 1, "{result:?}");
        // An uncertain jump gives no verdict.
        load_rules("limit rate 5/second jump more", "accept", "");
        assert!(!evaluate().is_certain_drop());
        // A dormant table is not evaluated.
        load_rules("drop", "accept", "");
        assert!(evaluate().is_certain_drop());
        nft("add table inet t { flags dormant; }");
        assert!(evaluate().dropped.is_none() && evaluate().chains.is_empty());
    });
}

#[test]
fn iptables_rules_and_nat_are_evaluated() {
    in_netns(|| {
        let flow = Flow {
            source: "10.0.0.1".parse().expect("ip"),
            destination: "10.0.0.2".parse().expect("ip"),
            protocol: TCP,
            port: 80,
        };
        let evaluate_at = |hook| {
            RulesetSnapshot::read().expect("the rules").evaluate(
                hook,
                false,
                &Packet { destination_is_local: Some(true), ..Packet::new(&flow) },
            )
        };
        iptables("iptables -P FORWARD DROP");
        assert_eq!(evaluate_at(Hook::Forward).dropped.expect("dropped").to_string(), "the policy of chain ip filter FORWARD");
        iptables("iptables -A FORWARD -p tcp --dport 443 -j ACCEPT");
        iptables("iptables -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
        assert!(evaluate_at(Hook::Forward).is_certain_drop());
        iptables("iptables -A FORWARD -s 10.0.0.0/8 -p tcp --dport 80 -m comment --comment web -j ACCEPT");
        assert!(evaluate_at(Hook::Forward).dropped.is_none());
        iptables("iptables -I FORWARD -d 10.0.0.2 -j REJECT");
        assert!(evaluate_at(Hook::Forward).is_certain_drop());
        nft(
            "table ip n { chain p { type nat hook prerouting priority -100; fib daddr type local tcp dport 80 dnat to 10.9.9.9:8080; }; \
             chain s { type nat hook postrouting priority 100; ip saddr 10.0.0.0/8 masquerade; }; }",
        );
        let (how, rule) = evaluate_at(Hook::Prerouting).translation.expect("translated");
        let wanted = Translation::Destination { address: Some("10.9.9.9".parse().expect("ip")), port: Some(8080) };
        assert_eq!((how, rule.chain.as_str()), (wanted, "p"));
        assert_eq!(evaluate_at(Hook::Postrouting).translation.expect("translated").0, Translation::Masquerade);
    });
}
