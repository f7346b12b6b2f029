//! The table `bridge overlayd`: the source filter (anti-spoofing) for containers' frames. It sees each frame before the bridge
//! does, so the bridge learns nothing from dropped frames.

use std::net::Ipv6Addr;

use super::{Base, Chain, ChainKind, Counter, Expr, Field, Hook, ICMPV6, Rule, Ruleset, SetName, Table, UDP, is, is_not, rule};
use crate::model::device::PORT_PREFIX;
use crate::model::{Cidr, Family};

/// `NF_BR_PRI_NAT_DST_BRIDGED` in `linux/netfilter_bridge.h`: the first priority of the bridge's hook.
const NF_BR_PRI_NAT_DST_BRIDGED: i32 = -300;

/// EtherTypes (IEEE 802 numbers).
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// The ports of DHCP clients. Packets to these ports are server answers, from any source port (RFC 2131 section 4.1, RFC 8415
/// section 7.2).
const DHCP_CLIENT: u16 = 68;
const DHCPV6_CLIENT: u16 = 546;

/// ICMPv6 types (RFC 4861 section 4).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// Multicast listener report (RFC 3810 section 5.2).
const MLDV2_REPORT: u8 = 143;

/// Fields of neighbour solicitations and advertisements: target, option type and the MAC in the option.
const ICMPV6_TYPE: Field = Field::transport(0, 1);
const ND_TARGET: Field = Field::transport(8, 16);
const ND_OPTION_TYPE: Field = Field::transport(24, 1);
const ND_OPTION_MAC: Field = Field::transport(26, 6);
/// Payload lengths without an option, and with one option of eight bytes.
const ND_LENGTH_NO_OPTION: [u8; 2] = [0, 24];
const ND_LENGTH_ONE_OPTION: [u8; 2] = [0, 32];
/// Option types: source and target link-layer address.
const ND_OPT_SOURCE_LL_ADDR: u8 = 1;
const ND_OPT_TARGET_LL_ADDR: u8 = 2;

/// Builds the table `bridge overlayd`. It filters only the interfaces of endpoints, by their name prefix. Foreign ports on a
/// bridge pass unchecked.
///
/// - `guard`: accepts IPv4, IPv6 and ARP with the sender's own MAC and address. Everything else is dropped, including unknown
///   EtherTypes. VLAN-tagged frames are checked like untagged ones. Interfaces in the set `unchecked` are exempt.
/// - `nd`: drops router advertisements, router solicitations and redirects of every endpoint, also of those in `unchecked`.
///   Neighbour solicitations and advertisements may only state the sender's own MAC and address. They have at most one option, so
///   that no option can hide behind another.
pub fn source_filter() -> Ruleset {
    let source_filter_chain = Chain {
        name: "guard".to_owned(),
        base: Some(Base { hook: Hook::Prerouting, kind: ChainKind::Filter, priority: NF_BR_PRI_NAT_DST_BRIDGED }),
        rules: source_filter_rules(),
    };
    let regular_chain = |name: &str, rules| Chain { name: name.to_owned(), base: None, rules };
    Ruleset {
        table: Table::Bridge,
        counters: vec![Counter::Dhcp, Counter::Router, Counter::Source],
        sets: vec![SetName::Source(Family::V4), SetName::Source(Family::V6), SetName::Unchecked],
        chains: vec![
            regular_chain("advertisement", advertisement_rules()),
            source_filter_chain,
            regular_chain("nd", nd_rules()),
            regular_chain("solicitation", solicitation_rules()),
        ],
        foreign: Vec::new(),
    }
}

fn source_filter_rules() -> Vec<Rule> {
    let dhcp = |ethertype: &[u8], port: u16| {
        let to = is(Field::DestinationPort, &port.to_be_bytes());
        rule([is(Field::Protocol, ethertype), is(Field::Layer4, &UDP), to, Expr::Count(Counter::Dhcp), Expr::Drop])
    };
    let own_source = |ethertype: &[u8], family| {
        rule([is(Field::Protocol, ethertype), in_source_set(family, Field::EtherSource, Field::Source(family)), Expr::Accept])
    };
    let arp = |mac| in_source_set(Family::V4, mac, Field::ArpSenderAddress);
    // Frequent matches come first: each match costs every later packet some 25 ns.
    vec![
        rule([is_not(Field::InputInterface, PORT_PREFIX.as_bytes()), Expr::Accept]),
        dhcp(&ETHERTYPE_IPV4, DHCP_CLIENT),
        own_source(&ETHERTYPE_IPV4, Family::V4),
        rule([is_ipv6(), is(Field::Layer4, &ICMPV6), jump("nd")]),
        dhcp(&ETHERTYPE_IPV6, DHCPV6_CLIENT),
        own_source(&ETHERTYPE_IPV6, Family::V6),
        rule([in_unchecked_set(), Expr::Accept]),
        rule([is(Field::Protocol, &ETHERTYPE_ARP), arp(Field::EtherSource), arp(Field::ArpSenderMac), Expr::Accept]),
        count_and_drop(),
    ]
}

fn nd_rules() -> Vec<Rule> {
    let mut rules: Vec<Rule> = [ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT, REDIRECT]
        .map(|kind| rule([is(ICMPV6_TYPE, &[kind]), Expr::Count(Counter::Router), Expr::Drop]))
        .to_vec();
    rules.push(rule([in_unchecked_set(), Expr::Accept]));
    // From the unspecified address while an interface comes up (RFC 3810 section 5.2.13). Receivers ignore such a report. It is
    // not an attack, so it is dropped without a counter.
    rules.push(rule([is_ipv6(), is(ICMPV6_TYPE, &[MLDV2_REPORT]), from_unspecified(), Expr::Drop]));
    rules.push(rule([is(ICMPV6_TYPE, &[NEIGHBOUR_SOLICITATION]), jump("solicitation")]));
    rules.push(rule([is(ICMPV6_TYPE, &[NEIGHBOUR_ADVERTISEMENT]), jump("advertisement")]));
    rules
}

fn solicitation_rules() -> Vec<Rule> {
    let from_own = || in_source_set(Family::V6, Field::EtherSource, Field::Source(Family::V6));
    vec![
        drop_extension_headers(),
        // Duplicate address detection for an own address. Receivers ignore a MAC in such a message (RFC 4861 section 7.1.1).
        rule([is_ipv6(), from_unspecified(), in_source_set(Family::V6, Field::EtherSource, ND_TARGET), Expr::Accept]),
        rule([is_ipv6(), is(Field::PayloadLength, &ND_LENGTH_NO_OPTION), from_own(), Expr::Accept]),
        rule([
            is_ipv6(),
            is(Field::PayloadLength, &ND_LENGTH_ONE_OPTION),
            is(ND_OPTION_TYPE, &[ND_OPT_SOURCE_LL_ADDR]),
            from_own(),
            in_source_set(Family::V6, ND_OPTION_MAC, Field::Source(Family::V6)),
            Expr::Accept,
        ]),
        count_and_drop(),
    ]
}

fn advertisement_rules() -> Vec<Rule> {
    let of_own = || in_source_set(Family::V6, Field::EtherSource, ND_TARGET);
    let from_own = || in_source_set(Family::V6, Field::EtherSource, Field::Source(Family::V6));
    vec![
        drop_extension_headers(),
        rule([is_ipv6(), is(Field::PayloadLength, &ND_LENGTH_NO_OPTION), from_own(), of_own(), Expr::Accept]),
        rule([
            is_ipv6(),
            is(Field::PayloadLength, &ND_LENGTH_ONE_OPTION),
            is(ND_OPTION_TYPE, &[ND_OPT_TARGET_LL_ADDR]),
            from_own(),
            in_source_set(Family::V6, ND_OPTION_MAC, ND_TARGET),
            Expr::Accept,
        ]),
        count_and_drop(),
    ]
}

/// Drops extension headers before a neighbour discovery message. They have no use there, and would shift the checked offsets.
fn drop_extension_headers() -> Rule {
    rule([is_ipv6(), is_not(Field::NextHeader, &ICMPV6), Expr::Count(Counter::Source), Expr::Drop])
}

/// A match: the interface, the MAC and the address belong to one endpoint.
fn in_source_set(family: Family, mac: Field, address: Field) -> Expr {
    Expr::In { fields: vec![Field::InputInterface, mac, address], set: SetName::Source(family) }
}

fn from_unspecified() -> Expr {
    Expr::Source { cidr: Cidr::host(Ipv6Addr::UNSPECIFIED.into()), negate: false }
}

fn is_ipv6() -> Expr {
    is(Field::Protocol, &ETHERTYPE_IPV6)
}

fn in_unchecked_set() -> Expr {
    Expr::In { fields: vec![Field::InputInterface], set: SetName::Unchecked }
}

fn count_and_drop() -> Rule {
    rule([Expr::Count(Counter::Source), Expr::Drop])
}

fn jump(chain: &str) -> Expr {
    Expr::Jump(chain.to_owned())
}
