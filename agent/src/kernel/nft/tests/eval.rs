//! Compares evaluated verdicts with the kernel's. Packets are sent over the loopback device; if the output hook drops one, the
//! send fails with `EPERM`.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use super::*;
use crate::kernel::nft::codec;
use crate::kernel::nft::snapshot::{ChainDump, RuleDump};
use crate::kernel::nft::table::hook_number;
use crate::kernel::nft::{RulesetSnapshot, Translation, legacy_tables};
use crate::kernel::packet::{Flow, Interface, Packet, SOURCE_PORT, TCP, UDP};
use crate::plan::ruleset::Hook;

/// Rules of a chain at the output hook. Each is evaluated for each port, in both families.
const RULES: [&str; 27] = [
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
    "meta pkttype host udp dport 53 drop",
    "udp dport vmap { * : drop, 53 : accept, 80 : accept }",
    "udp dport vmap { 50-60 : drop, 70-90 : accept, * : goto more }",
];

/// Arguments of iptables for the output chain of IPv4.
const IPTABLES_RULES: [&str; 18] = [
    "-p udp --dport 53 -j DROP",
    "-p udp ! --dport 53 -j DROP",
    "-p udp -m multiport --dports 53,8000:9000 -j DROP",
    "-p udp -m multiport ! --dports 53,80 -j DROP",
    "-p udp -m multiport --sports 1:1023,32768 -j DROP",
    "-p udp -m multiport --ports 53,1024:2048 -j REJECT",
    "-p tcp -m multiport --dports 53,80 -j DROP",
    "-m conntrack --ctstate NEW -p udp --dport 53 -j DROP",
    "-m conntrack ! --ctstate NEW -j DROP",
    "-m conntrack --ctstate UNTRACKED,RELATED -j DROP",
    "-m state --state NEW -j DROP",
    "-m addrtype --dst-type LOCAL -p udp --dport 53 -j DROP",
    "-m addrtype ! --dst-type LOCAL,BROADCAST -j DROP",
    "-m iprange --dst-range 127.0.0.1-127.0.0.9 -p udp --dport 80 -j DROP",
    "-m iprange ! --src-range 10.0.0.0-10.9.9.9 -j DROP",
    "-m pkttype --pkt-type unicast -p udp --dport 53 -j DROP",
    "-m pkttype --pkt-type broadcast -j DROP",
    "-j MARK --set-mark 1",
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

/// Compares the verdicts for each port with the kernel's; returns the number of dropped packets.
fn compare_with_kernel(address: &str, rules: &str) -> usize {
    let snapshot = RulesetSnapshot::read().expect("the rules");
    let address: IpAddr = address.parse().expect("an address");
    let socket = UdpSocket::bind(SocketAddr::new(address, SOURCE_PORT)).expect("a socket");
    let mut dropped = 0;
    for port in PORTS {
        let sent = socket.send_to(b"x", SocketAddr::new(address, port));
        let kernel = sent.as_ref().err().and_then(std::io::Error::raw_os_error) == Some(libc::EPERM);
        let flow = Flow { source: address, destination: address, protocol: UDP, port };
        let output = Some(Interface { index: 1, name: "lo".to_owned() });
        let packet = Packet { output, destination_is_local: Some(true), ..Packet::new(&flow) };
        let result = snapshot.evaluate(Hook::Output, false, &packet);
        assert!(result.possible_accepts.is_empty() && result.possible_drops.is_empty(), "{rules}: {result:?}");
        assert_eq!(result.is_certain_drop(), kernel, "`{rules}`, to {address} port {port}: {sent:?}, {result:?}");
        dropped += usize::from(kernel);
    }
    dropped
}

#[test]
fn evaluated_verdicts_match_kernel() {
    in_netns(|| {
        crate::kernel::netns::set_loopback_up().expect("lo up");
        let mut dropped = 0;
        let all = RULES.iter().map(|rules| (rules, "")).chain(UNTRACKED.iter().map(|rules| (rules, NOTRACK)));
        for (rules, policy, before) in all.flat_map(|(rules, before)| [(rules, "accept", before), (rules, "drop", before)]) {
            load_rules(rules, policy, before);
            let described = format!("{rules}, policy {policy}");
            dropped += compare_with_kernel("127.0.0.1", &described) + compare_with_kernel("::1", &described);
        }
        assert!(dropped > 100, "{dropped} of {} were dropped", RULES.len() * 16);
    });
}

#[test]
fn evaluated_verdicts_of_iptables_rules_match_kernel() {
    in_netns(|| {
        crate::kernel::netns::set_loopback_up().expect("lo up");
        let mut dropped = 0;
        for before in ["", NOTRACK] {
            for rule in IPTABLES_RULES {
                load_rules("", "accept", before);
                iptables(&format!("iptables -A OUTPUT {rule}"));
                dropped += compare_with_kernel("127.0.0.1", rule);
            }
        }
        assert!(dropped > 40, "{dropped} of {} were dropped", IPTABLES_RULES.len() * 8);
        load_rules("", "accept", "");
        iptables("ip6tables -A OUTPUT -m iprange --dst-range ::1-::2 -j DROP");
        assert_eq!(compare_with_kernel("::1", "an IPv6 range"), PORTS.len());
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
        // After an uncertain return the rest of the chain is uncertain.
        load_rules("limit rate 5/second return; drop", "accept", "");
        let result = evaluate();
        assert!(result.dropped.is_none() && result.possible_drops.len() == 1, "{result:?}");
        load_rules("limit rate 5/second return; accept; drop", "drop", "");
        let result = evaluate();
        assert!(!result.is_certain_drop() && result.possible_accepts.len() == 1, "{result:?}");
        assert!(result.possible_drops.is_empty(), "the accept ends the chain: {result:?}");
        // An uncertain accept ends its own base chain only.
        load_rules("limit rate 5/second accept", "accept", "chain p { type filter hook output priority 9; tcp dport 80 drop; }");
        assert!(evaluate().is_certain_drop());
        // In a chain that an uncertain jump enters, a certain accept precedes the drop.
        load_rules("limit rate 5/second jump a", "accept", "chain a { accept; drop; }");
        assert!(evaluate().possible_drops.is_empty());
        // An unknown key of a verdict map, an unknown value after a known one in a register, limits in objects, and header fields
        // that differ from packet to packet.
        for rules in [
            "meta cpu vmap { 0 : drop, 1 : accept }",
            "tcp dport 80 tcp option maxseg size 500-600 drop",
            "limit name \"l\" drop",
            "quota name \"q\" drop",
            "ip length > 1000 drop",
            "ip ttl < 5 drop",
            "ip dscp 46 drop",
            "tcp window 0 drop",
        ] {
            load_rules(rules, "accept", "limit l { rate 5/second; }\n quota q { over 5 bytes; }");
            let result = evaluate();
            assert!(result.dropped.is_none() && result.possible_drops.len() == 1, "{rules}: {result:?}");
        }
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
        iptables("iptables -I FORWARD -p tcp --tcp-flags SYN,ACK ACK -j DROP");
        assert!(evaluate_at(Hook::Forward).dropped.is_none());
        iptables("iptables -I FORWARD -d 10.0.0.2 -j REJECT");
        assert!(evaluate_at(Hook::Forward).is_certain_drop());
        nft(
            "table ip n { chain p { type nat hook prerouting priority -100; fib daddr type local tcp dport 80 dnat to 10.9.9.9:8080; }; \
             chain s { type nat hook postrouting priority 100; ip saddr 10.0.0.0/8 masquerade; }; }",
        );
        let (translation, rule) = evaluate_at(Hook::Prerouting).translation.expect("translated");
        let wanted = Translation::Destination { address: Some("10.9.9.9".parse().expect("ip")), port: Some(8080) };
        assert_eq!((translation, rule.chain.as_str()), (wanted, "p"));
        assert_eq!(evaluate_at(Hook::Postrouting).translation.expect("translated").0, Translation::Masquerade);
    });
}

/// A packet that stands for all of its source finds every translation that its sender can choose.
#[test]
fn any_destination_finds_possible_translations() {
    in_netns(|| {
        nft("table ip n {
 map ports { type inet_proto . inet_service : ipv4_addr . inet_service; elements = { tcp . 80 : 10.9.0.1 . 8080, udp . 53 : 10.9.0.2 . 5353 }; }
 chain p { type nat hook prerouting priority -100;
  iifname \"other\" dnat to 10.9.0.3
  ip saddr 10.0.0.0/8 ip daddr 192.0.2.1 tcp dport 90 dnat to 10.9.0.4:9090
  dnat ip to meta l4proto . th dport map @ports
  udp dport 70 dnat to 10.9.0.5-10.9.0.6
  udp dport 71 redirect
 }\n}");
        iptables("iptables -t nat -A PREROUTING -i in -p tcp --dport 99 -j DNAT --to-destination 10.9.0.7:9999");
        iptables("iptables -t nat -A PREROUTING -s 10.1.0.0/16 -j DNAT --to-destination 10.9.0.8");
        let [source, destination] = ["10.0.0.1", "192.0.2.9"].map(|text| text.parse().expect("ip"));
        let input = Some(Interface { index: 7, name: "in".to_owned() });
        let packet = Packet { input, any_destination: true, ..Packet::new(&Flow::echo_request(source, destination)) };
        let result = RulesetSnapshot::read().expect("the rules").evaluate(Hook::Prerouting, false, &packet);
        assert_eq!((result.translation, result.dropped), (None, None));
        let found: Vec<(Translation, Option<(u8, u16)>)> =
            result.possible_translations.into_iter().map(|possible| (possible.translation, possible.published)).collect();
        let to = |address: &str, port| Translation::Destination { address: Some(address.parse().expect("ip")), port };
        for wanted in [
            (to("10.9.0.4", Some(9090)), None),
            (to("10.9.0.1", Some(8080)), Some((TCP, 80))),
            (to("10.9.0.2", Some(5353)), Some((UDP, 53))),
            (Translation::Unknown, None),
            (Translation::Redirect, None),
            (to("10.9.0.7", Some(9999)), None),
        ] {
            assert!(found.contains(&wanted), "{wanted:?} in {found:?}");
        }
        assert_eq!(found.len(), 6, "{found:?}");
    });
}

#[test]
fn rules_that_redirect_packets_are_listed() {
    in_netns(|| {
        let listed = || RulesetSnapshot::read().expect("the rules").redirections().len();
        nft("table ip t { chain c { type filter hook prerouting priority 0; ip daddr 10.0.0.1 drop; }; }");
        assert_eq!(listed(), 0);
        nft("add rule ip t c dup to 10.0.0.2");
        nft("table netdev d { chain c { type filter hook ingress device lo priority 0; accept; }; }");
        assert_eq!(listed(), 2);
    });
}

#[test]
fn nat_of_untracked_packet_does_not_apply() {
    in_netns(|| {
        load_rules("", "accept", "chain n { type nat hook output priority -100; redirect; }");
        let [source, destination] = ["10.0.0.1", "10.0.0.2"].map(|text| text.parse().expect("ip"));
        let packet = Packet::new(&Flow { source, destination, protocol: UDP, port: 8472 });
        let evaluate = |untracked| {
            let packet = Packet { untracked, ..packet.clone() };
            RulesetSnapshot::read().expect("the rules").evaluate(Hook::Output, false, &packet).translation
        };
        assert!(evaluate(false).is_some() && evaluate(true).is_none());
    });
}

#[test]
fn legacy_tables_are_listed() {
    in_netns(|| {
        assert!(legacy_tables(Family::V4).is_empty() && legacy_tables(Family::V6).is_empty());
        iptables("ip6tables-legacy -A INPUT -j DROP");
        assert!(legacy_tables(Family::V4).is_empty());
        assert_eq!(legacy_tables(Family::V6), ["filter"]);
    });
}

#[test]
fn queue_and_unknown_target_may_accept_or_drop() {
    // The attribute `NFTA_TARGET_NAME`, padded to four bytes.
    let target = |name: &[u8; 8]| [&[12, 0, 1, 0], name.as_slice()].concat();
    for (name, data) in [("queue", Vec::new()), ("target", target(b"NFQUEUE\0")), ("target", target(b"STRANGE\0"))] {
        in_netns(|| {
            let mut snapshot = RulesetSnapshot::read().expect("the rules");
            let rule = RuleDump { handle: 1, comment: None, exprs: vec![(name.to_owned(), data)] };
            let chain = |name: &str, policy_drop, rules| ChainDump {
                family: codec::NFPROTO_INET,
                table: "t".to_owned(),
                name: name.to_owned(),
                base: Some((hook_number(Hook::Input), 0)),
                policy_drop,
                is_nat: false,
                rules,
            };
            let [source, destination] = ["10.0.0.1", "10.0.0.2"].map(|text| text.parse().expect("ip"));
            let packet = Packet::new(&Flow { source, destination, protocol: UDP, port: 53 });
            snapshot.chains.push(chain("a", false, vec![rule]));
            let result = snapshot.evaluate(Hook::Input, false, &packet);
            assert!(result.dropped.is_none() && result.possible_drops.len() == 1, "{name}: {result:?}");
            snapshot.chains[0].policy_drop = true;
            let result = snapshot.evaluate(Hook::Input, false, &packet);
            assert!(!result.is_certain_drop() && result.possible_drops.len() == 1, "{name}: {result:?}");
            // Also where the packet is accepted, later chains see it.
            snapshot.chains[0].policy_drop = false;
            snapshot.chains.push(chain("b", true, Vec::new()));
            assert!(snapshot.evaluate(Hook::Input, false, &packet).is_certain_drop());
        });
    }
}
