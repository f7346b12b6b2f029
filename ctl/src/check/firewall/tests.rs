//! Rule sets as firewalls write them, and what becomes of the tunnel's packets in them.

use super::packet::{Hook, Packet};
use super::rules::{Dropped, Ruleset};

fn tunnel() -> Packet {
    let addresses = ("10.99.1.2".parse().expect("an address"), "10.99.1.1".parse().expect("an address"));
    Packet::udp(Hook::Input, ("eth0", ""), addresses, (40_000, 8472))
}

fn forwarded() -> Packet {
    let addresses = ("10.244.1.2".parse().expect("an address"), "10.244.2.2".parse().expect("an address"));
    Packet::tcp(Hook::Forward, ("ovb.1", "ovx.1"), addresses, (40_000, 40_000))
}

fn input(rules: &str) -> Option<Dropped> {
    let text = format!(
        "table inet filter {{ # handle 1\n\tset open {{\n\t\ttype inet_service\n\t\telements = {{ 22, 8000-9000,\n\t\t\t53 }}\n\t}}\n\tchain input \
         {{ # handle 2\n\t\ttype filter hook input priority filter; policy accept;\n{rules}\n\t}}\n\n\tchain other {{\n\t\tdrop # handle 9\n\t}}\n}}\n"
    );
    Ruleset::parse(&text).verdict(&tunnel(), "overlayd")
}

#[test]
fn rules_that_drop_the_tunnel() {
    for rule in [
        "udp dport 8472 drop # handle 4",
        "iifname \"eth0\" ip saddr 10.0.0.0/8 udp dport 8472  counter packets 0 bytes 0 reject # handle 4",
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
    ] {
        let dropped = input(rule).unwrap_or_else(|| panic!("passes: {rule}"));
        assert!(dropped.certain, "{rule}: {dropped:?}");
    }
}

#[test]
fn rules_that_pass_the_tunnel() {
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
        "jump nowhere",
        "ip saddr 10.99.1.3-10.99.1.9 drop",
    ] {
        assert_eq!(input(rule), None, "{rule}");
    }
}

#[test]
fn unknown_match_is_uncertain() {
    for rule in ["xt match \"weird\" drop", "limit rate 5/second drop", "meta mark 0x7 accept\ndrop", "udp dport @unknown drop"] {
        let dropped = input(rule).unwrap_or_else(|| panic!("passes: {rule}"));
        assert!(!dropped.certain, "{rule}: {dropped:?}");
    }
    assert_eq!(input("meta mark 0x7 accept"), None);
}

#[test]
fn forwarding_by_policy_and_through_chains_of_others() {
    let docker = |accept: &str| {
        format!(
            "table ip filter {{\n\tchain FORWARD {{\n\t\ttype filter hook forward priority filter; policy drop;\n\t\t{accept}\n\t\tcounter packets 0 bytes 0 \
             jump DOCKER-USER # handle 3\n\t\toifname \"docker0\" counter packets 0 bytes 0 jump DOCKER\n\t}}\n\tchain DOCKER-USER {{\n\t\tcounter \
             packets 0 bytes 0 return\n\t}}\n\tchain DOCKER {{\n\t\tdrop\n\t}}\n}}\n"
        )
    };
    let dropped = Ruleset::parse(&docker("")).verdict(&forwarded(), "overlayd").expect("dropped");
    assert!(dropped.is_policy() && dropped.certain && dropped.is_iptables(), "{dropped:?}");
    assert_eq!(dropped.place, "table ip filter, chain FORWARD");
    let ours = "ip saddr 10.244.0.0/16 counter packets 0 bytes 0 accept comment \"overlayd\"";
    assert_eq!(Ruleset::parse(&docker(ours)).verdict(&forwarded(), "overlayd"), None);
    let firewalld = "table inet firewalld {\n\tchain filter_FORWARD {\n\t\ttype filter hook forward priority filter + 10; policy accept;\n\t\tct state { \
                     established, related } accept\n\t\tiifname \"lo\" accept\n\t\treject with icmpx admin-prohibited\n\t}\n}\n";
    let dropped = Ruleset::parse(firewalld).verdict(&forwarded(), "overlayd").expect("dropped");
    assert!(dropped.place.contains("firewalld"), "{dropped:?}");
    assert_eq!(Ruleset::parse(&firewalld.replace("firewalld", "overlayd")).verdict(&forwarded(), "overlayd"), None, "our own");
}

#[test]
fn translated_rules_of_the_older_iptables() {
    let text = "# Translated by iptables-restore-translate v1.8.9\nadd table ip filter\nadd chain ip filter INPUT { type filter hook input priority 0; \
                policy accept; }\nadd rule ip filter INPUT udp dport 8472 counter drop\n# Completed\n";
    let dropped = Ruleset::parse_commands(text).verdict(&tunnel(), "overlayd").expect("dropped");
    assert_eq!(
        (dropped.rule.as_str(), dropped.place.as_str()),
        ("udp dport 8472 counter drop", "table ip filter, chain INPUT (iptables-legacy)")
    );
}
