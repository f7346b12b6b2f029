//! Encodes and decodes rules as lists of nf_tables expressions.
//!
//! A match is a load, an optional mask, and a comparison or set lookup. Several lookup fields are loaded into consecutive
//! registers. In the inet family, a layer 3 protocol comparison precedes the first field of a rule that needs it. Decoding
//! accepts any encoding of a mask, so that equivalent rules compare equal. Unsupported expressions decode as [`Expr::Foreign`].

mod field;
mod raw;
#[cfg(test)]
mod tests;
pub(super) mod uapi;

use super::codec::{self, NF_ACCEPT, NF_DROP, Writer, protocol_family, protocol_number};
use crate::model::family::address_value;
use crate::model::{Cidr, Family};
use crate::plan::ruleset::{Expr, Field, Rule, Table};

use raw::{
    RawExpr, RegisterLoad, compare, expression, length_u32, load, mask, mask_bytes, nat_for_map, register_number, verdict,
};
use uapi::*;
pub(super) use uapi::{IFNAMSIZ, NFTA_DATA_VALUE};

/// The encoding of a rule's matches.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RuleEncoding {
    /// For an inet table, as `nft` writes it: the protocol is matched, whole bytes need no mask.
    Inet,
    /// For a bridge table: the rule matches the protocol itself.
    Bridge,
    /// For an ip or ip6 table, as every release of `iptables-nft` reads it: whole addresses with a mask.
    Iptables(Family),
}

impl RuleEncoding {
    /// The encoding of one of our tables.
    pub(super) const fn for_table(table: Table) -> RuleEncoding {
        match table {
            Table::Inet => RuleEncoding::Inet,
            Table::Bridge => RuleEncoding::Bridge,
        }
    }

    /// The table that holds the sets.
    const fn table(self) -> Table {
        match self {
            RuleEncoding::Bridge => Table::Bridge,
            RuleEncoding::Inet | RuleEncoding::Iptables(_) => Table::Inet,
        }
    }
}

/// Writes the attribute of a rule's expressions. [`Expr::Foreign`] cannot be encoded and is skipped; validate the rule first.
pub(super) fn write(writer: &mut Writer, rule: &Rule, encoding: RuleEncoding) {
    writer.nest(codec::NFTA_RULE_EXPRESSIONS, |w| {
        let mut protocol = None;
        for expr in &rule.exprs {
            if let (Some(family), RuleEncoding::Inet) = (expr_family(expr), encoding)
                && protocol != Some(family)
            {
                protocol = Some(family);
                load(w, RegisterLoad::Meta(NFT_META_NFPROTO), 0);
                compare(w, NFT_CMP_EQ, &[protocol_number(family)]);
            }
            write_expr(w, expr, encoding);
        }
    });
}

/// The family whose IP header an expression reads.
fn expr_family(expr: &Expr) -> Option<Family> {
    match expr {
        Expr::Source { cidr, .. } | Expr::Destination { cidr, .. } => Some(cidr.family()),
        Expr::Field { field, .. } | Expr::Range { field, .. } => field.family(),
        Expr::In { fields, .. } | Expr::Translate { fields, .. } => fields.iter().find_map(|field| field.family()),
        _ => None,
    }
}

fn write_expr(w: &mut Writer, expr: &Expr, encoding: RuleEncoding) {
    match expr {
        Expr::Source { cidr, negate } => write_address_match(w, *cidr, false, *negate, encoding),
        Expr::Destination { cidr, negate } => write_address_match(w, *cidr, true, *negate, encoding),
        Expr::Range { field, first, last, negate } => {
            field::load_fields(w, &[*field]);
            let size = usize::from(field.length());
            expression(w, "range", |w| {
                w.u32(NFTA_RANGE_SREG, NFT_REG_1);
                w.u32(NFTA_RANGE_OP, operation(*negate));
                for (kind, bound) in [(NFTA_RANGE_FROM_DATA, first), (NFTA_RANGE_TO_DATA, last)] {
                    w.nest(kind, |w| w.bytes(NFTA_DATA_VALUE, &address_bytes(Cidr::host(*bound))[..size]));
                }
            });
        }
        Expr::InputInterface(name) => write_interface_match(w, NFT_META_IIFNAME, name),
        Expr::OutputInterface(name) => write_interface_match(w, NFT_META_OIFNAME, name),
        Expr::Field { field, negate, value } => {
            field::load_fields(w, &[*field]);
            compare(w, operation(*negate), value);
        }
        Expr::ToThisHost => {
            expression(w, "fib", |w| {
                w.u32(NFTA_FIB_RESULT, NFT_FIB_RESULT_ADDRTYPE);
                w.u32(NFTA_FIB_FLAGS, NFTA_FIB_F_DADDR);
                w.u32(NFTA_FIB_DREG, NFT_REG_1);
            });
            compare(w, NFT_CMP_EQ, &RTN_LOCAL.to_ne_bytes());
        }
        Expr::Translated | Expr::AddressTranslated => {
            let status = if *expr == Expr::Translated { IPS_DST_NAT } else { IPS_NAT_MASK };
            expression(w, "ct", |w| {
                w.u32(NFTA_CT_KEY, NFT_CT_STATUS);
                w.u32(NFTA_CT_DREG, NFT_REG_1);
            });
            mask(w, 0, &status.to_ne_bytes());
            compare(w, NFT_CMP_NEQ, &[0; 4]);
        }
        Expr::In { fields, set } => {
            field::load_fields(w, fields);
            expression(w, "lookup", |w| {
                w.text(NFTA_LOOKUP_SET, &set.name());
                w.u32(NFTA_LOOKUP_SREG, NFT_REG_1);
            });
        }
        Expr::Translate { fields, map } => {
            field::load_fields(w, fields);
            expression(w, "lookup", |w| {
                w.text(NFTA_LOOKUP_SET, &map.name());
                w.u32(NFTA_LOOKUP_SREG, NFT_REG_1);
                w.u32(NFTA_LOOKUP_DREG, NFT_REG_1);
            });
            if let Some(nat) = nat_for_map(*map) {
                expression(w, "nat", |w| {
                    w.u32(NFTA_NAT_TYPE, NFT_NAT_DNAT);
                    w.u32(NFTA_NAT_FAMILY, u32::from(protocol_number(nat.family)));
                    w.u32(NFTA_NAT_REG_ADDR_MIN, NFT_REG_1);
                    w.u32(NFTA_NAT_REG_PROTO_MIN, register_number(nat.port_reg32));
                });
            }
        }
        Expr::Counter => expression(w, "counter", |_| {}),
        Expr::Count(counter) => expression(w, "objref", |w| {
            w.u32(NFTA_OBJREF_IMM_TYPE, codec::NFT_OBJECT_COUNTER);
            w.text(NFTA_OBJREF_IMM_NAME, counter.name());
        }),
        Expr::Accept => verdict(w, NF_ACCEPT, None),
        Expr::Drop => verdict(w, NF_DROP, None),
        Expr::Return => verdict(w, NFT_RETURN, None),
        Expr::Jump(chain) => verdict(w, NFT_JUMP, Some(chain)),
        Expr::Masquerade => expression(w, "masq", |w| w.u32(NFTA_MASQ_FLAGS, MASQUERADE_RANDOM)),
        Expr::Untrack => expression(w, "notrack", |_| {}),
        Expr::Foreign => {}
    }
}

fn write_address_match(w: &mut Writer, cidr: Cidr, destination: bool, negate: bool, encoding: RuleEncoding) {
    let family = cidr.family();
    let size = usize::from(family.bits() / 8);
    let length = cidr.length();
    let value = address_bytes(cidr);
    let whole_bytes = !matches!(encoding, RuleEncoding::Iptables(_)) && length > 0 && length.is_multiple_of(8);
    let loaded = if whole_bytes { usize::from(length / 8) } else { size };
    let offset = field::address_offset(family, destination);
    load(w, RegisterLoad::Payload { base: NFT_PAYLOAD_NETWORK_HEADER, offset, length: length_u32(loaded) }, 0);
    if !whole_bytes && length < family.bits() {
        mask(w, 0, &mask_bytes(length)[..size]);
    }
    compare(w, operation(negate), &value[..loaded]);
}

fn write_interface_match(w: &mut Writer, key: u32, name: &str) {
    let mut padded = [0; IFNAMSIZ];
    for (to, from) in padded.iter_mut().zip(name.as_bytes()) {
        *to = *from;
    }
    load(w, RegisterLoad::Meta(key), 0);
    compare(w, NFT_CMP_EQ, &padded);
}

/// Decodes a rule from the attributes of its message.
pub(super) fn read(attributes: &[u8], encoding: RuleEncoding) -> Rule {
    let raw: Vec<RawExpr<'_>> = codec::attribute(attributes, codec::NFTA_RULE_EXPRESSIONS)
        .map(|list| codec::attributes(list).map(|(_, element)| RawExpr::read(element)).collect())
        .unwrap_or_default();
    let mut exprs = Vec::new();
    let mut protocol = match encoding {
        RuleEncoding::Iptables(family) => Some(family),
        RuleEncoding::Inet | RuleEncoding::Bridge => None,
    };
    // A protocol match that no field has used yet.
    let mut protocol_pending = false;
    let mut rest = raw.as_slice();
    while let Some(first) = rest.first() {
        if let [
            RawExpr::Load { source: RegisterLoad::Meta(NFT_META_NFPROTO), reg32: 0 },
            RawExpr::Compare { operation: NFT_CMP_EQ, value: [number] },
            ..,
        ] = rest
            && encoding == RuleEncoding::Inet
            && !protocol_pending
            && let Some(family) = protocol_family(*number)
        {
            protocol = Some(family);
            protocol_pending = true;
            rest = &rest[2..];
            continue;
        }
        let (expr, used) = read_address(protocol, rest)
            .or_else(|| read_range(protocol, rest))
            .or_else(|| field::read(rest, encoding.table()))
            .or_else(|| read_fib_or_ct(rest))
            .unwrap_or((first.standalone(), 1));
        if let Some(family) = expr.as_ref().and_then(expr_family) {
            protocol_pending &= protocol != Some(family);
        }
        // In a bridge table, the rule itself matches the protocol of its addresses.
        if let (Some(Expr::Field { field: Field::Protocol, negate: false, value }), RuleEncoding::Bridge) = (&expr, encoding) {
            protocol = match value.as_slice() {
                [0x08, 0x00] => Some(Family::V4),
                [0x86, 0xdd] => Some(Family::V6),
                _ => None,
            };
        }
        let supported = expr
            .filter(|expr| encoding == RuleEncoding::Bridge || expr_family(expr).is_none_or(|family| protocol == Some(family)));
        exprs.push(supported.unwrap_or(Expr::Foreign));
        rest = &rest[used..];
    }
    if protocol_pending {
        exprs.push(Expr::Foreign);
    }
    Rule { exprs }
}

/// The text of a rule's `-m comment` match (`struct xt_comment_info`, `linux/netfilter/xt_comment.h`), as iptables writes it.
pub(super) fn comment_match(attributes: &[u8]) -> Option<&[u8]> {
    codec::attributes(codec::attribute(attributes, codec::NFTA_RULE_EXPRESSIONS)?).find_map(|(_, element)| {
        let data = codec::attribute(element, NFTA_EXPR_DATA)?;
        let text = |kind| codec::attribute(data, kind).map(codec::strip_nul);
        let comment =
            codec::attribute(element, NFTA_EXPR_NAME).map(codec::strip_nul)? == b"match" && text(NFTA_MATCH_NAME)? == b"comment";
        comment.then(|| text(NFTA_MATCH_INFO)).flatten()
    })
}

/// Decodes a match on a CIDR: load, optional mask, comparison. Returns the match and the number of expressions.
fn read_address(protocol: Option<Family>, rest: &[RawExpr<'_>]) -> Option<(Option<Expr>, usize)> {
    let network = |register_load: &RegisterLoad| match register_load {
        RegisterLoad::Payload { base: NFT_PAYLOAD_NETWORK_HEADER, offset, length } => Some((*offset, *length)),
        _ => None,
    };
    let (location, mask, operation, value, used) = match rest {
        [RawExpr::Load { source, reg32: 0 }, RawExpr::Mask { reg32: 0, mask }, RawExpr::Compare { operation, value }, ..] => {
            (network(source)?, Some(*mask), *operation, *value, 3)
        }
        [RawExpr::Load { source, reg32: 0 }, RawExpr::Compare { operation, value }, ..] => {
            (network(source)?, None, *operation, *value, 2)
        }
        _ => return None,
    };
    Some((Some(parse_address_match(protocol?, location, mask, operation, value)?), used))
}

fn parse_address_match(
    family: Family,
    (offset, length): (u32, u32),
    mask: Option<&[u8]>,
    operation: u32,
    value: &[u8],
) -> Option<Expr> {
    let size = usize::from(family.bits() / 8);
    let loaded = usize::try_from(length).ok()?;
    if loaded > size || value.len() != loaded || mask.is_some_and(|mask| mask.len() != loaded) {
        return None;
    }
    // As left-aligned numbers: bytes that were not loaded are not compared.
    let number = |bytes: &[u8]| {
        let mut padded = [0; 16];
        padded[..bytes.len()].copy_from_slice(bytes);
        u128::from_be_bytes(padded)
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
    match offset {
        offset if offset == field::address_offset(family, false) => Some(Expr::Source { cidr, negate }),
        offset if offset == field::address_offset(family, true) => Some(Expr::Destination { cidr, negate }),
        _ => None,
    }
}

/// Decodes a match on an address range: load and comparison.
fn read_range(protocol: Option<Family>, rest: &[RawExpr<'_>]) -> Option<(Option<Expr>, usize)> {
    let [
        RawExpr::Load { source: RegisterLoad::Payload { base: NFT_PAYLOAD_NETWORK_HEADER, offset, length }, reg32: 0 },
        RawExpr::Range { operation, first, last },
        ..,
    ] = rest
    else {
        return None;
    };
    let family = protocol?;
    let is_at_offset = |field: &Field| *offset == field::address_offset(family, *field == Field::Destination(family));
    let field = [Field::Source(family), Field::Destination(family)].into_iter().find(is_at_offset)?;
    let is_full_length = |bound: &[u8]| *length == u32::from(field.length()) && bound.len() == usize::from(field.length());
    let address = |bound: &[u8]| family.address(bound.iter().fold(0, |number, byte| number << 8 | u128::from(*byte)));
    let negate = match *operation {
        NFT_CMP_EQ => false,
        NFT_CMP_NEQ => true,
        _ => return None,
    };
    let expr = Expr::Range { field, first: address(first), last: address(last), negate };
    (is_full_length(first) && is_full_length(last)).then_some((Some(expr), 2))
}

/// Decodes matches on the destination's address type and the connection's status.
fn read_fib_or_ct(rest: &[RawExpr<'_>]) -> Option<(Option<Expr>, usize)> {
    match rest {
        [RawExpr::DestinationType, RawExpr::Compare { operation: NFT_CMP_EQ, value }, ..]
            if **value == RTN_LOCAL.to_ne_bytes() =>
        {
            Some((Some(Expr::ToThisHost), 2))
        }
        [RawExpr::ConnectionStatus, RawExpr::Mask { reg32: 0, mask }, RawExpr::Compare { operation: NFT_CMP_NEQ, value }, ..]
            if **value == [0; 4] =>
        {
            let expr = [(IPS_DST_NAT, Expr::Translated), (IPS_NAT_MASK, Expr::AddressTranslated)]
                .into_iter()
                .find_map(|(status, expr)| (**mask == status.to_ne_bytes()).then_some(expr))?;
            Some((Some(expr), 3))
        }
        _ => None,
    }
}

/// The address left-aligned in 16 bytes.
fn address_bytes(cidr: Cidr) -> [u8; 16] {
    (address_value(cidr.base()) << (128 - u32::from(cidr.family().bits()))).to_be_bytes()
}

fn operation(negate: bool) -> u32 {
    if negate { NFT_CMP_NEQ } else { NFT_CMP_EQ }
}
