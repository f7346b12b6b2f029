//! Rules as lists of nf_tables expressions, there and back.
//!
//! An address match is a load of bytes from the network header, a mask where the prefix ends inside a byte, and a comparison; in the
//! inet family a comparison of the layer 3 protocol goes before the first of a rule. Reading knows a match again however its mask was
//! written, so that what is equal in effect compares equal; what it does not know becomes [`Expr::Foreign`].

#[cfg(test)]
mod tests;

use super::wire::{self, NF_ACCEPT, NF_DROP, NFPROTO_IPV4, NFPROTO_IPV6, Writer};
use crate::model::family::address_value;
use crate::model::{Cidr, Family};
use crate::plan::ruleset::{Expr, Rule};

const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;

const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;

const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;

const NFTA_BITWISE_SREG: u16 = 1;
const NFTA_BITWISE_DREG: u16 = 2;
const NFTA_BITWISE_LEN: u16 = 3;
const NFTA_BITWISE_MASK: u16 = 4;
const NFTA_BITWISE_XOR: u16 = 5;
const NFTA_BITWISE_OP: u16 = 6;

const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_NEQ: u32 = 1;

const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFTA_PAYLOAD_SREG: u16 = 5;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;

const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFT_META_IIFNAME: u32 = 6;
const NFT_META_NFPROTO: u32 = 15;

const NFTA_MASQ_FLAGS: u16 = 1;
const NFTA_MASQ_REG_PROTO_MIN: u16 = 2;
/// `NF_NAT_RANGE_PROTO_RANDOM | NF_NAT_RANGE_PROTO_RANDOM_FULLY`, `linux/netfilter/nf_nat.h`.
const MASQUERADE_RANDOM: u32 = 0x4 | 0x10;

/// `NFTA_MATCH_NAME` and `NFTA_MATCH_INFO`, `linux/netfilter/nf_tables_compat.h`: a match of xtables inside a rule.
const NFTA_MATCH_NAME: u16 = 1;
const NFTA_MATCH_INFO: u16 = 3;

/// The register of verdicts, and the one that we load values into.
const NFT_REG_VERDICT: u32 = 0;
const NFT_REG_1: u32 = 1;

/// Length of an interface's name with its terminating zero: the kernel compares all 16 bytes.
pub(super) const IFNAMSIZ: usize = 16;

/// How a rule's address matches are written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// For a table of the inet family, as `nft` writes it: the protocol is matched, whole bytes need no mask.
    Inet,
    /// For a table of one family, as every release of `iptables-nft` reads it: whole addresses with a mask.
    Iptables,
}

/// Where an address stands in the IP header of its family, in bytes.
fn offset(family: Family, destination: bool) -> u32 {
    match (family, destination) {
        // RFC 791 section 3.1, RFC 8200 section 3.
        (Family::V4, false) => 12,
        (Family::V4, true) => 16,
        (Family::V6, false) => 8,
        (Family::V6, true) => 24,
    }
}

/// Writes the attribute that holds a rule's expressions. [`Expr::Foreign`] has no form and is left out: check before.
pub(super) fn write(writer: &mut Writer, rule: &Rule, dialect: Dialect) {
    writer.nest(wire::NFTA_RULE_EXPRESSIONS, |w| {
        let mut protocol = None;
        for expr in &rule.exprs {
            match expr {
                Expr::Source { cidr, negate } | Expr::Destination { cidr, negate } => {
                    let family = cidr.family();
                    if dialect == Dialect::Inet && protocol != Some(family) {
                        protocol = Some(family);
                        meta(w, NFT_META_NFPROTO);
                        compare(w, NFT_CMP_EQ, &[protocol_number(family)]);
                    }
                    address(w, *cidr, matches!(expr, Expr::Destination { .. }), *negate, dialect);
                }
                Expr::InputInterface(name) => {
                    let mut padded = [0; IFNAMSIZ];
                    for (to, from) in padded.iter_mut().zip(name.as_bytes()) {
                        *to = *from;
                    }
                    meta(w, NFT_META_IIFNAME);
                    compare(w, NFT_CMP_EQ, &padded);
                }
                Expr::Counter => expression(w, "counter", |_| {}),
                Expr::Accept => verdict(w, NF_ACCEPT),
                Expr::Drop => verdict(w, NF_DROP),
                Expr::Masquerade => expression(w, "masq", |w| w.u32(NFTA_MASQ_FLAGS, MASQUERADE_RANDOM)),
                Expr::Foreign => {}
            }
        }
    });
}

fn address(w: &mut Writer, cidr: Cidr, destination: bool, negate: bool, dialect: Dialect) {
    let family = cidr.family();
    let size = usize::from(family.bits() / 8);
    let length = cidr.length();
    let value = address_bytes(cidr);
    let mask = mask_bytes(length);
    let whole_bytes = dialect == Dialect::Inet && length > 0 && length.is_multiple_of(8);
    let loaded = if whole_bytes { usize::from(length / 8) } else { size };
    expression(w, "payload", |w| {
        w.u32(NFTA_PAYLOAD_DREG, NFT_REG_1);
        w.u32(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER);
        w.u32(NFTA_PAYLOAD_OFFSET, offset(family, destination));
        w.u32(NFTA_PAYLOAD_LEN, length_u32(loaded));
    });
    if !whole_bytes && length < family.bits() {
        expression(w, "bitwise", |w| {
            w.u32(NFTA_BITWISE_SREG, NFT_REG_1);
            w.u32(NFTA_BITWISE_DREG, NFT_REG_1);
            w.u32(NFTA_BITWISE_LEN, length_u32(size));
            w.nest(NFTA_BITWISE_MASK, |w| w.bytes(NFTA_DATA_VALUE, &mask[..size]));
            w.nest(NFTA_BITWISE_XOR, |w| w.bytes(NFTA_DATA_VALUE, &[0; 16][..size]));
        });
    }
    compare(w, if negate { NFT_CMP_NEQ } else { NFT_CMP_EQ }, &value[..loaded]);
}

fn meta(w: &mut Writer, key: u32) {
    expression(w, "meta", |w| {
        w.u32(NFTA_META_KEY, key);
        w.u32(NFTA_META_DREG, NFT_REG_1);
    });
}

fn compare(w: &mut Writer, operation: u32, value: &[u8]) {
    expression(w, "cmp", |w| {
        w.u32(NFTA_CMP_SREG, NFT_REG_1);
        w.u32(NFTA_CMP_OP, operation);
        w.nest(NFTA_CMP_DATA, |w| w.bytes(NFTA_DATA_VALUE, value));
    });
}

fn verdict(w: &mut Writer, code: u32) {
    expression(w, "immediate", |w| {
        w.u32(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT);
        w.nest(NFTA_IMMEDIATE_DATA, |w| w.nest(NFTA_DATA_VERDICT, |w| w.u32(NFTA_VERDICT_CODE, code)));
    });
}

fn expression(w: &mut Writer, name: &str, data: impl FnOnce(&mut Writer)) {
    w.nest(NFTA_LIST_ELEM, |w| {
        w.text(NFTA_EXPR_NAME, name);
        w.nest(NFTA_EXPR_DATA, data);
    });
}

/// Reads a rule from the attributes of its message. `family` is that of the table, `None` for inet.
pub(super) fn read(attributes: &[u8], family: Option<Family>) -> Rule {
    let raw: Vec<Raw<'_>> = wire::attribute(attributes, wire::NFTA_RULE_EXPRESSIONS)
        .map(|list| wire::attributes(list).map(|(_, element)| Raw::read(element)).collect())
        .unwrap_or_default();
    let mut exprs = Vec::new();
    let mut protocol = family;
    // A match on the protocol that no address match has followed yet.
    let mut bare = false;
    let mut rest = raw.as_slice();
    while let Some(first) = rest.first() {
        let (expr, used) = match rest {
            [Raw::Meta(NFT_META_NFPROTO), Raw::Compare { operation: NFT_CMP_EQ, value: [number] }, ..]
                if family.is_none() && !bare && protocol_family(*number).is_some() =>
            {
                protocol = protocol_family(*number);
                bare = true;
                rest = &rest[2..];
                continue;
            }
            [Raw::Payload { offset, length }, Raw::Mask(mask), Raw::Compare { operation, value }, ..] => {
                (read_address(protocol, *offset, *length, Some(*mask), *operation, value), 3)
            }
            [Raw::Payload { offset, length }, Raw::Compare { operation, value }, ..] => {
                (read_address(protocol, *offset, *length, None, *operation, value), 2)
            }
            [Raw::Meta(NFT_META_IIFNAME), Raw::Compare { operation: NFT_CMP_EQ, value }, ..] => (read_interface(value), 2),
            _ => (first.alone(), 1),
        };
        if matches!(expr, Some(Expr::Source { .. } | Expr::Destination { .. })) {
            bare = false;
        }
        exprs.push(expr.unwrap_or(Expr::Foreign));
        rest = &rest[used..];
    }
    if bare {
        exprs.push(Expr::Foreign);
    }
    Rule { exprs }
}

/// The text of iptables' `-m comment`, where a rule has one (`struct xt_comment_info`, `linux/netfilter/xt_comment.h`).
pub(super) fn comment_match(attributes: &[u8]) -> Option<&[u8]> {
    wire::attributes(wire::attribute(attributes, wire::NFTA_RULE_EXPRESSIONS)?).find_map(|(_, element)| {
        let data = wire::attribute(element, NFTA_EXPR_DATA)?;
        let text = |kind| wire::attribute(data, kind).map(wire::name);
        let comment =
            wire::attribute(element, NFTA_EXPR_NAME).map(wire::name)? == b"match" && text(NFTA_MATCH_NAME)? == b"comment";
        comment.then(|| text(NFTA_MATCH_INFO)).flatten()
    })
}

fn read_address(
    protocol: Option<Family>,
    at: u32,
    length: u32,
    mask: Option<&[u8]>,
    operation: u32,
    value: &[u8],
) -> Option<Expr> {
    let family = protocol?;
    let size = usize::from(family.bits() / 8);
    let loaded = usize::try_from(length).ok()?;
    if loaded > size || value.len() != loaded || mask.is_some_and(|mask| mask.len() != loaded) {
        return None;
    }
    // As numbers, left-aligned: bytes that were not loaded are not compared.
    let number = |bytes: &[u8]| {
        let mut all = [0; 16];
        all[..bytes.len()].copy_from_slice(bytes);
        u128::from_be_bytes(all)
    };
    let loaded_mask = number(&[0xff; 16][..loaded]);
    let mask = mask.map_or(loaded_mask, |mask| number(mask) & loaded_mask);
    let prefix = mask.leading_ones();
    let base = number(value);
    if mask.count_ones() != prefix || base & !mask != 0 {
        return None;
    }
    let address = family.address(base >> (128 - u32::from(family.bits())));
    let cidr = Cidr::containing(address, u8::try_from(prefix).ok()?)?;
    let negate = match operation {
        NFT_CMP_EQ => false,
        NFT_CMP_NEQ => true,
        _ => return None,
    };
    match at {
        at if at == offset(family, false) => Some(Expr::Source { cidr, negate }),
        at if at == offset(family, true) => Some(Expr::Destination { cidr, negate }),
        _ => None,
    }
}

fn read_interface(value: &[u8]) -> Option<Expr> {
    // A shorter comparison is one with a wildcard at the end.
    if value.len() != IFNAMSIZ || !value.contains(&0) {
        return None;
    }
    let name = wire::name(value);
    let text = std::str::from_utf8(name).ok().filter(|text| !text.is_empty())?;
    Some(Expr::InputInterface(text.to_owned()))
}

/// An expression as the kernel has it, as far as we use it. Registers are all [`NFT_REG_1`], others make it [`Raw::Other`].
enum Raw<'a> {
    Meta(u32),
    Payload { offset: u32, length: u32 },
    Mask(&'a [u8]),
    Compare { operation: u32, value: &'a [u8] },
    Verdict(u32),
    Counter,
    Masquerade { flags: u32 },
    Other,
}

impl Raw<'_> {
    fn read(element: &[u8]) -> Raw<'_> {
        let name = wire::attribute(element, NFTA_EXPR_NAME).map(wire::name).unwrap_or_default();
        let data = wire::attribute(element, NFTA_EXPR_DATA).unwrap_or_default();
        Raw::known(name, data).unwrap_or(Raw::Other)
    }

    fn known<'a>(name: &[u8], data: &'a [u8]) -> Option<Raw<'a>> {
        let number = |kind| wire::number(data, kind);
        let value = |kind| wire::attribute(data, kind).and_then(|nested| wire::attribute(nested, NFTA_DATA_VALUE));
        let register = |kind| number(kind).filter(|register| *register == NFT_REG_1);
        match name {
            b"meta" => {
                register(NFTA_META_DREG)?;
                number(NFTA_META_KEY).map(Raw::Meta)
            }
            b"payload" => {
                register(NFTA_PAYLOAD_DREG)?;
                let plain = number(NFTA_PAYLOAD_BASE)? == NFT_PAYLOAD_NETWORK_HEADER && number(NFTA_PAYLOAD_SREG).is_none();
                plain.then_some(Raw::Payload { offset: number(NFTA_PAYLOAD_OFFSET)?, length: number(NFTA_PAYLOAD_LEN)? })
            }
            b"bitwise" => {
                register(NFTA_BITWISE_SREG)?;
                register(NFTA_BITWISE_DREG)?;
                let plain = number(NFTA_BITWISE_OP).unwrap_or(0) == 0 && value(NFTA_BITWISE_XOR)?.iter().all(|byte| *byte == 0);
                if plain { value(NFTA_BITWISE_MASK).map(Raw::Mask) } else { None }
            }
            b"cmp" => {
                register(NFTA_CMP_SREG)?;
                Some(Raw::Compare { operation: number(NFTA_CMP_OP)?, value: value(NFTA_CMP_DATA)? })
            }
            b"immediate" => {
                let verdict = wire::attribute(wire::attribute(data, NFTA_IMMEDIATE_DATA)?, NFTA_DATA_VERDICT)?;
                let code = wire::number(verdict, NFTA_VERDICT_CODE)?;
                (number(NFTA_IMMEDIATE_DREG)? == NFT_REG_VERDICT).then_some(Raw::Verdict(code))
            }
            b"counter" => Some(Raw::Counter),
            b"masq" => {
                let plain = number(NFTA_MASQ_REG_PROTO_MIN).is_none();
                plain.then_some(Raw::Masquerade { flags: number(NFTA_MASQ_FLAGS).unwrap_or(0) })
            }
            _ => None,
        }
    }

    /// What it means where it belongs to no sequence.
    fn alone(&self) -> Option<Expr> {
        match self {
            Raw::Verdict(NF_ACCEPT) => Some(Expr::Accept),
            Raw::Verdict(NF_DROP) => Some(Expr::Drop),
            Raw::Counter => Some(Expr::Counter),
            Raw::Masquerade { flags: MASQUERADE_RANDOM } => Some(Expr::Masquerade),
            _ => None,
        }
    }
}

/// The address left-aligned in 16 bytes.
fn address_bytes(cidr: Cidr) -> [u8; 16] {
    (address_value(cidr.base()) << (128 - u32::from(cidr.family().bits()))).to_be_bytes()
}

/// A prefix of that many ones, left-aligned in 16 bytes.
fn mask_bytes(length: u8) -> [u8; 16] {
    u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0).to_be_bytes()
}

fn length_u32(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// The nf_tables family of a table of one address family.
pub(super) const fn protocol_number(family: Family) -> u8 {
    match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    }
}

/// The address family of an nf_tables family; `None` for those of both or neither.
pub(super) const fn protocol_family(number: u8) -> Option<Family> {
    match number {
        NFPROTO_IPV4 => Some(Family::V4),
        NFPROTO_IPV6 => Some(Family::V6),
        _ => None,
    }
}
