//! Round-trip tests of rules, without a kernel.

use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::plan::ruleset::{Counter, SetName, Table};

fn any_cidr() -> impl Strategy<Value = Cidr> {
    any::<(IpAddr, u8)>().prop_filter_map("length fits", |(address, length)| Cidr::containing(address, length % 129))
}

fn any_expr() -> impl Strategy<Value = Expr> {
    prop_oneof![
        (any_cidr(), any::<bool>()).prop_map(|(cidr, negate)| Expr::Source { cidr, negate }),
        (any_cidr(), any::<bool>()).prop_map(|(cidr, negate)| Expr::Destination { cidr, negate }),
        any_range(),
        "[a-z0-9.]{1,15}".prop_map(Expr::InputInterface),
        "[a-z0-9.]{1,15}".prop_map(Expr::OutputInterface),
        "[a-z0-9.]{1,15}".prop_map(Expr::Jump),
        any_comparison(),
        any_lookup(),
        proptest::sample::select(Counter::ALL.to_vec()).prop_map(Expr::Count),
        Just(Expr::ToThisHost),
        Just(Expr::Translated),
        Just(Expr::AddressTranslated),
        Just(Expr::Return),
        Just(Expr::Counter),
        Just(Expr::Accept),
        Just(Expr::Drop),
        Just(Expr::Masquerade),
    ]
}

fn any_range() -> impl Strategy<Value = Expr> {
    (any::<(u128, u128, bool, bool)>(), proptest::sample::select(Family::ALL.to_vec())).prop_map(
        |((first, last, destination, negate), family)| {
            let bound = |value: u128| family.address(value >> (128 - u32::from(family.bits())));
            let field = if destination { Field::Destination(family) } else { Field::Source(family) };
            Expr::Range { field, first: bound(first), last: bound(last), negate }
        },
    )
}

fn any_transport() -> impl Strategy<Value = Field> {
    let transport_fields = (any::<u8>(), 1u8..17, any::<u8>()).prop_map(|(offset, length, prefix)| Field::Transport {
        offset,
        length,
        prefix: prefix % (length * 8) + 1,
    });
    // The destination port has a field of its own.
    transport_fields.prop_filter("an unnamed offset", |field| !matches!(field, Field::Transport { offset: 2, length: 2, .. }))
}

fn any_field() -> impl Strategy<Value = Field> {
    let named = proptest::sample::select(vec![
        Field::InputInterface,
        Field::OutputInterface,
        Field::Protocol,
        Field::Layer4,
        Field::EtherSource,
        Field::Source(Family::V4),
        Field::Destination(Family::V4),
        Field::NextHeader,
        Field::PayloadLength,
        Field::ArpSenderMac,
        Field::ArpSenderAddress,
        Field::DestinationPort,
    ]);
    prop_oneof![named, any_transport()]
}

/// Comparisons of whole fields that have no expression of their own.
fn any_comparison() -> impl Strategy<Value = Expr> {
    let plain_fields = any_field().prop_filter_map("a field compared as is", |field| match field {
        Field::Source(_) | Field::Destination(_) | Field::InputInterface | Field::OutputInterface => None,
        // Their offsets are those of IPv6 addresses in a rule on IPv6.
        Field::ArpSenderMac | Field::ArpSenderAddress => None,
        Field::Transport { offset, length, .. } => Some(Field::transport(offset, length)),
        field => Some(field),
    });
    (plain_fields, any::<bool>(), any::<u8>()).prop_map(|(field, negate, byte)| Expr::Field {
        field,
        negate,
        value: vec![byte; usize::from(field.length())],
    })
}

fn any_lookup() -> impl Strategy<Value = Expr> {
    let inet: Vec<SetName> = SetName::ALL.into_iter().filter(|set| set.table() == Table::Inet).collect();
    let fields = proptest::collection::vec(any_field(), 1..4);
    let fits = |fields: &Vec<Field>| fields.iter().map(|field| usize::from(field.length())).sum::<usize>() <= 48;
    (fields.prop_filter("in the registers", fits), proptest::sample::select(inet)).prop_map(|(fields, set)| {
        if set.data().is_empty() { Expr::In { fields, set } } else { Expr::Translate { fields, map: set } }
    })
}

fn round_trip(rule: &Rule, encoding: RuleEncoding) -> Rule {
    let mut writer = Writer::default();
    write(&mut writer, rule, encoding);
    read(writer.finish().expect("fits"), encoding)
}

proptest! {
    #[test]
    fn any_rule_round_trips(exprs in proptest::collection::vec(any_expr(), 0..6)) {
        let rule = Rule { exprs };
        prop_assert_eq!(&round_trip(&rule, RuleEncoding::Inet), &rule);
    }

    #[test]
    fn any_iptables_address_round_trips(cidr in any_cidr(), negate in any::<bool>()) {
        let rule = Rule { exprs: vec![Expr::Destination { cidr, negate }, Expr::Counter, Expr::Accept] };
        prop_assert_eq!(&round_trip(&rule, RuleEncoding::Iptables(cidr.family())), &rule);
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = read(&bytes, RuleEncoding::Inet);
        let mut writer = Writer::default();
        writer.nest(codec::NFTA_RULE_EXPRESSIONS, |w| w.nest(NFTA_LIST_ELEM, |w| w.bytes(NFTA_EXPR_NAME, &bytes)));
        let _ = read(writer.finish().expect("fits"), RuleEncoding::Inet);
    }
}

#[test]
fn unknown_expressions_read_as_foreign() {
    let raw = |body: &dyn Fn(&mut Writer)| {
        let mut writer = Writer::default();
        writer.nest(codec::NFTA_RULE_EXPRESSIONS, |w| body(w));
        read(writer.finish().expect("fits"), RuleEncoding::Inet).exprs
    };
    // Each of these is foreign: a protocol without an address, an address without a protocol, other masks, flags and verdicts. An
    // interface with a wildcard is a field comparison.
    assert_eq!(
        raw(&|w| {
            load(w, RegisterLoad::Meta(NFT_META_NFPROTO), 0);
            compare(w, NFT_CMP_EQ, &[codec::NFPROTO_IPV4]);
            verdict(w, NF_ACCEPT, None);
        }),
        [Expr::Accept, Expr::Foreign]
    );
    let cidr: Cidr = "10.0.0.0/8".parse().expect("cidr");
    assert!(raw(&|w| write_address_match(w, cidr, false, false, RuleEncoding::Inet)).iter().all(|expr| *expr == Expr::Foreign));
    assert_eq!(
        raw(&|w| {
            load(w, RegisterLoad::Meta(NFT_META_IIFNAME), 0);
            compare(w, NFT_CMP_EQ, b"ov");
        }),
        [Expr::Field { field: Field::InputInterface, negate: false, value: b"ov".to_vec() }]
    );
    assert_eq!(raw(&|w| expression(w, "masq", |_| {})), [Expr::Foreign]);
    assert_eq!(raw(&|w| verdict(w, u32::MAX, None)), [Expr::Foreign]);
    assert_eq!(raw(&|w| expression(w, "log", |_| {})), [Expr::Foreign]);
}

#[test]
fn unsupported_masks_are_rejected() {
    for (mask, value) in [([0xff, 0, 0xff, 0], [10, 0, 1, 0]), ([0xff, 0, 0, 0], [10, 1, 0, 0])] {
        assert_eq!(parse_address_match(Family::V4, (12, 4), Some(&mask), NFT_CMP_EQ, &value), None);
    }
    assert_eq!(parse_address_match(Family::V4, (13, 1), None, NFT_CMP_EQ, &[10]), None);
    assert_eq!(parse_address_match(Family::V4, (12, 2), None, 2, &[10, 0]), None);
    assert_eq!(parse_address_match(Family::V4, (12, 8), None, NFT_CMP_EQ, &[10, 0, 0, 0, 0, 0, 0, 0]), None);
}
