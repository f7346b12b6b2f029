//! The table `bridge overlayd`: what containers may send. It sees each frame before the bridge does: what is dropped here teaches the bridge
//! nothing.

use std::net::Ipv6Addr;

use super::{Base, Chain, ChainKind, Counter, Expr, Field, Hook, ICMPV6, Rule, Ruleset, SetName, Table, UDP, is, is_not, rule};
use crate::model::device::PORT_PREFIX;
use crate::model::{Cidr, Family};

/// `NF_BR_PRI_NAT_DST_BRIDGED` in `linux/netfilter_bridge.h`: before all others of the bridge's hook.
const FIRST: i32 = -300;

/// EtherTypes (IEEE 802 numbers).
const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
const IPV6: [u8; 2] = [0x86, 0xdd];

/// The ports that DHCP clients listen on: what is sent there is a server's answer, whatever port it comes from (RFC 2131 section 4.1, RFC 8415
/// section 7.2).
const DHCP_CLIENT: u16 = 68;
const DHCPV6_CLIENT: u16 = 546;

/// ICMPv6 types (RFC 4861 section 4).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// A multicast listener's report (RFC 3810 section 5.2).
const REPORT: u8 = 143;

/// Where solicitations and advertisements have their target, their option's type and the MAC in it.
const KIND: Field = Field::transport(0, 1);
const TARGET: Field = Field::transport(8, 16);
const OPTION: Field = Field::transport(24, 1);
const OPTION_MAC: Field = Field::transport(26, 6);
/// The length of one without an option, and of one with a single option of eight bytes.
const BARE: [u8; 2] = [0, 24];
const WITH_OPTION: [u8; 2] = [0, 32];
/// The options source and target link-layer address.
const SOURCE_MAC: u8 = 1;
const TARGET_MAC: u8 = 2;

/// The table `bridge overlayd`. It looks at the interfaces of endpoints alone, by the beginning of their names; ports that others put on a bridge
/// are not judged.
///
/// - `guard`: an IPv4, IPv6 or ARP packet passes with the sender's own MAC and address; everything else is dropped, unknown
///   EtherTypes included. What is behind a VLAN tag is judged like what has none. An interface in the set `unchecked` is free of that.
/// - `nd`: no router advertisements, solicitations and redirects, from nobody. Neighbour solicitations and advertisements tell nothing but
///   the sender's own MAC and address: they have one option at the most, so that none hides behind another.
pub fn guard() -> Ruleset {
    let guard = Chain {
        name: "guard".to_owned(),
        base: Some(Base { hook: Hook::Prerouting, kind: ChainKind::Filter, priority: FIRST }),
        rules: guard_rules(),
    };
    let jumped_to = |name: &str, rules| Chain { name: name.to_owned(), base: None, rules };
    Ruleset {
        table: Table::Bridge,
        counters: vec![Counter::Dhcp, Counter::Router, Counter::Source],
        sets: vec![SetName::Source(Family::V4), SetName::Source(Family::V6), SetName::Unchecked],
        chains: vec![
            jumped_to("advertisement", advertisement_rules()),
            guard,
            jumped_to("nd", nd_rules()),
            jumped_to("solicitation", solicitation_rules()),
        ],
        foreign: Vec::new(),
    }
}

fn guard_rules() -> Vec<Rule> {
    let dhcp = |ethertype: &[u8], port: u16| {
        let to = is(Field::DestinationPort, &port.to_be_bytes());
        rule([is(Field::Protocol, ethertype), is(Field::Layer4, &UDP), to, Expr::Count(Counter::Dhcp), Expr::Drop])
    };
    let own_source = |ethertype: &[u8], family| {
        rule([is(Field::Protocol, ethertype), own(family, Field::EtherSource, Field::Source(family)), Expr::Accept])
    };
    let arp = |mac| own(Family::V4, mac, Field::ArpSenderAddress);
    // What passes often stands first: each match costs every packet that goes by it some 25 ns.
    vec![
        rule([is_not(Field::InputInterface, PORT_PREFIX.as_bytes()), Expr::Accept]),
        dhcp(&IPV4, DHCP_CLIENT),
        own_source(&IPV4, Family::V4),
        rule([ipv6(), is(Field::Layer4, &ICMPV6), jump("nd")]),
        dhcp(&IPV6, DHCPV6_CLIENT),
        own_source(&IPV6, Family::V6),
        rule([unchecked(), Expr::Accept]),
        rule([is(Field::Protocol, &ARP), arp(Field::EtherSource), arp(Field::ArpSenderMac), Expr::Accept]),
        dropped(),
    ]
}

fn nd_rules() -> Vec<Rule> {
    let mut rules: Vec<Rule> = [ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT, REDIRECT]
        .map(|kind| rule([is(KIND, &[kind]), Expr::Count(Counter::Router), Expr::Drop]))
        .to_vec();
    rules.push(rule([unchecked(), Expr::Accept]));
    // From the unspecified address while an interface comes up (RFC 3810 section 5.2.13): it says nothing that anybody may believe, and it is no
    // attack to be counted.
    rules.push(rule([ipv6(), is(KIND, &[REPORT]), from_nobody(), Expr::Drop]));
    rules.push(rule([is(KIND, &[SOLICITATION]), jump("solicitation")]));
    rules.push(rule([is(KIND, &[ADVERTISEMENT]), jump("advertisement")]));
    rules
}

fn solicitation_rules() -> Vec<Rule> {
    let from_own = || own(Family::V6, Field::EtherSource, Field::Source(Family::V6));
    vec![
        headers_between(),
        // Duplicate address detection: for an address of its own. A MAC in it is not believed by anybody (RFC 4861 section 7.1.1).
        rule([ipv6(), from_nobody(), own(Family::V6, Field::EtherSource, TARGET), Expr::Accept]),
        rule([ipv6(), is(Field::PayloadLength, &BARE), from_own(), Expr::Accept]),
        rule([
            ipv6(),
            is(Field::PayloadLength, &WITH_OPTION),
            is(OPTION, &[SOURCE_MAC]),
            from_own(),
            own(Family::V6, OPTION_MAC, Field::Source(Family::V6)),
            Expr::Accept,
        ]),
        dropped(),
    ]
}

fn advertisement_rules() -> Vec<Rule> {
    let of_own = || own(Family::V6, Field::EtherSource, TARGET);
    let from_own = || own(Family::V6, Field::EtherSource, Field::Source(Family::V6));
    vec![
        headers_between(),
        rule([ipv6(), is(Field::PayloadLength, &BARE), from_own(), of_own(), Expr::Accept]),
        rule([
            ipv6(),
            is(Field::PayloadLength, &WITH_OPTION),
            is(OPTION, &[TARGET_MAC]),
            from_own(),
            own(Family::V6, OPTION_MAC, TARGET),
            Expr::Accept,
        ]),
        dropped(),
    ]
}

/// Extension headers before a neighbour discovery message have no use, and would move what is checked.
fn headers_between() -> Rule {
    rule([ipv6(), is_not(Field::NextHeader, &ICMPV6), Expr::Count(Counter::Source), Expr::Drop])
}

/// The interface, a MAC and an address belong together.
fn own(family: Family, mac: Field, address: Field) -> Expr {
    Expr::In { fields: vec![Field::InputInterface, mac, address], set: SetName::Source(family) }
}

fn from_nobody() -> Expr {
    Expr::Source { cidr: Cidr::host(Ipv6Addr::UNSPECIFIED.into()), negate: false }
}

fn ipv6() -> Expr {
    is(Field::Protocol, &IPV6)
}

fn unchecked() -> Expr {
    Expr::In { fields: vec![Field::InputInterface], set: SetName::Unchecked }
}

fn dropped() -> Rule {
    rule([Expr::Count(Counter::Source), Expr::Drop])
}

fn jump(chain: &str) -> Expr {
    Expr::Jump(chain.to_owned())
}
