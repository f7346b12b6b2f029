//! Rules there and back without a kernel.

use std::net::IpAddr;

use proptest::prelude::*;

use super::*;

fn any_cidr() -> impl Strategy<Value = Cidr> {
    any::<(IpAddr, u8)>().prop_filter_map("length fits", |(address, length)| Cidr::containing(address, length % 129))
}

fn any_expr() -> impl Strategy<Value = Expr> {
    prop_oneof![
        (any_cidr(), any::<bool>()).prop_map(|(cidr, negate)| Expr::Source { cidr, negate }),
        (any_cidr(), any::<bool>()).prop_map(|(cidr, negate)| Expr::Destination { cidr, negate }),
        "[a-z0-9.]{1,15}".prop_map(Expr::InputInterface),
        Just(Expr::Counter),
        Just(Expr::Accept),
        Just(Expr::Drop),
        Just(Expr::Masquerade),
    ]
}

fn there_and_back(rule: &Rule, dialect: Dialect, family: Option<Family>) -> Rule {
    let mut writer = Writer::default();
    write(&mut writer, rule, dialect);
    read(writer.finish().expect("fits"), family)
}

proptest! {
    #[test]
    fn every_rule_comes_back(exprs in proptest::collection::vec(any_expr(), 0..6)) {
        let rule = Rule { exprs };
        prop_assert_eq!(&there_and_back(&rule, Dialect::Inet, None), &rule);
    }

    #[test]
    fn every_address_comes_back_from_iptables(cidr in any_cidr(), negate in any::<bool>()) {
        let rule = Rule { exprs: vec![Expr::Destination { cidr, negate }, Expr::Counter, Expr::Accept] };
        prop_assert_eq!(&there_and_back(&rule, Dialect::Iptables, Some(cidr.family())), &rule);
    }

    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = read(&bytes, None);
        let mut writer = Writer::default();
        writer.nest(wire::NFTA_RULE_EXPRESSIONS, |w| w.nest(NFTA_LIST_ELEM, |w| w.bytes(NFTA_EXPR_NAME, &bytes)));
        let _ = read(writer.finish().expect("fits"), None);
    }
}

#[test]
fn what_is_not_ours_is_foreign() {
    let raw = |body: &dyn Fn(&mut Writer)| {
        let mut writer = Writer::default();
        writer.nest(wire::NFTA_RULE_EXPRESSIONS, |w| body(w));
        read(writer.finish().expect("fits"), None).exprs
    };
    // A protocol without an address, an address without a protocol, an interface with a wildcard, other masks, flags, verdicts.
    assert_eq!(
        raw(&|w| {
            meta(w, NFT_META_NFPROTO);
            compare(w, NFT_CMP_EQ, &[NFPROTO_IPV4]);
            verdict(w, NF_ACCEPT);
        }),
        [Expr::Accept, Expr::Foreign]
    );
    let cidr: Cidr = "10.0.0.0/8".parse().expect("cidr");
    assert_eq!(raw(&|w| address(w, cidr, false, false, Dialect::Inet)), [Expr::Foreign]);
    assert_eq!(
        raw(&|w| {
            meta(w, NFT_META_IIFNAME);
            compare(w, NFT_CMP_EQ, b"ov");
        }),
        [Expr::Foreign]
    );
    assert_eq!(raw(&|w| expression(w, "masq", |_| {})), [Expr::Foreign]);
    assert_eq!(raw(&|w| verdict(w, u32::MAX)), [Expr::Foreign]);
    assert_eq!(raw(&|w| expression(w, "log", |_| {})), [Expr::Foreign]);
}

#[test]
fn odd_masks_are_foreign() {
    for (mask, value) in [([0xff, 0, 0xff, 0], [10, 0, 1, 0]), ([0xff, 0, 0, 0], [10, 1, 0, 0])] {
        assert_eq!(read_address(Some(Family::V4), 12, 4, Some(&mask), NFT_CMP_EQ, &value), None);
    }
    assert_eq!(read_address(Some(Family::V4), 13, 1, None, NFT_CMP_EQ, &[10]), None);
    assert_eq!(read_address(Some(Family::V4), 12, 2, None, 2, &[10, 0]), None);
    assert_eq!(read_address(Some(Family::V4), 12, 8, None, NFT_CMP_EQ, &[10, 0, 0, 0, 0, 0, 0, 0]), None);
}
