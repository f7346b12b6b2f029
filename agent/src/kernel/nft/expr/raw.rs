//! The kernel's nf_tables expressions, as far as we use them.

use super::uapi::*;
use crate::kernel::nft::codec::{self, NF_ACCEPT, NF_DROP, Writer, protocol_family};
use crate::model::Family;
use crate::plan::ruleset::{Counter, Expr, SetName};

/// `NF_NAT_RANGE_MAP_IPS | NF_NAT_RANGE_PROTO_SPECIFIED`, `linux/netfilter/nf_nat.h`: the kernel sets these itself.
const IMPLICIT_NAT_FLAGS: u32 = 0x1 | 0x2;

/// An expression. Registers are counted in units of 4 bytes.
pub(super) enum RawExpr<'a> {
    Load {
        source: RegisterLoad,
        reg32: u32,
    },
    Mask {
        reg32: u32,
        mask: &'a [u8],
    },
    /// Compares the first register.
    Compare {
        operation: u32,
        value: &'a [u8],
    },
    /// Compares the first register. `NFT_RANGE_EQ` and `NFT_RANGE_NEQ` have the numbers of `NFT_CMP_EQ` and `NFT_CMP_NEQ`.
    Range {
        operation: u32,
        first: &'a [u8],
        last: &'a [u8],
    },
    /// The key starts in the first register; with `is_map`, the map's data are stored there too.
    Lookup {
        set: &'a [u8],
        is_map: bool,
    },
    /// The destination's address is in the first register.
    Nat(Nat),
    /// `fib daddr type` into the first register.
    DestinationType,
    /// `ct status` into the first register.
    ConnectionStatus,
    Verdict {
        code: u32,
        chain: Option<&'a [u8]>,
    },
    Counter,
    CounterRef(&'a [u8]),
    Masquerade {
        flags: u32,
    },
    Untrack,
    Other,
}

/// A destination NAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Nat {
    pub(super) family: Family,
    /// The register of the port, in units of 4 bytes.
    pub(super) port_reg32: u32,
}

/// The source of a register load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RegisterLoad {
    /// `NFT_META_*`.
    Meta(u32),
    /// Bytes of the packet.
    Payload {
        /// `NFT_PAYLOAD_*`.
        base: u32,
        offset: u32,
        length: u32,
    },
}

impl RawExpr<'_> {
    pub(super) fn read(element: &[u8]) -> RawExpr<'_> {
        let name = codec::attribute(element, NFTA_EXPR_NAME).map(codec::strip_nul).unwrap_or_default();
        let data = codec::attribute(element, NFTA_EXPR_DATA).unwrap_or_default();
        RawExpr::parse(name, data).unwrap_or(RawExpr::Other)
    }

    fn parse<'a>(name: &[u8], data: &'a [u8]) -> Option<RawExpr<'a>> {
        let number = |kind| codec::attribute_u32(data, kind);
        let value = |kind| codec::attribute(data, kind).and_then(|nested| codec::attribute(nested, NFTA_DATA_VALUE));
        let reg32_from = |kind| number(kind).and_then(reg32_index);
        let first = |kind| reg32_from(kind).filter(|reg32| *reg32 == 0);
        match name {
            b"meta" => {
                Some(RawExpr::Load { source: RegisterLoad::Meta(number(NFTA_META_KEY)?), reg32: reg32_from(NFTA_META_DREG)? })
            }
            b"payload" => {
                let (base, offset) = (number(NFTA_PAYLOAD_BASE)?, number(NFTA_PAYLOAD_OFFSET)?);
                let source = RegisterLoad::Payload { base, offset, length: number(NFTA_PAYLOAD_LEN)? };
                let reg32 = reg32_from(NFTA_PAYLOAD_DREG)?;
                number(NFTA_PAYLOAD_SREG).is_none().then_some(RawExpr::Load { source, reg32 })
            }
            b"bitwise" => {
                let source = reg32_from(NFTA_BITWISE_SREG)?;
                let plain = reg32_from(NFTA_BITWISE_DREG)? == source
                    && number(NFTA_BITWISE_OP).unwrap_or(0) == 0
                    && value(NFTA_BITWISE_XOR)?.iter().all(|byte| *byte == 0);
                if plain { value(NFTA_BITWISE_MASK).map(|mask| RawExpr::Mask { reg32: source, mask }) } else { None }
            }
            b"cmp" => {
                first(NFTA_CMP_SREG)?;
                Some(RawExpr::Compare { operation: number(NFTA_CMP_OP)?, value: value(NFTA_CMP_DATA)? })
            }
            b"range" => {
                first(NFTA_RANGE_SREG)?;
                let (first, last) = (value(NFTA_RANGE_FROM_DATA)?, value(NFTA_RANGE_TO_DATA)?);
                Some(RawExpr::Range { operation: number(NFTA_RANGE_OP)?, first, last })
            }
            b"lookup" => {
                first(NFTA_LOOKUP_SREG)?;
                let is_map = match number(NFTA_LOOKUP_DREG) {
                    Some(_) => first(NFTA_LOOKUP_DREG).map(|_| true)?,
                    None => false,
                };
                let set = codec::strip_nul(codec::attribute(data, NFTA_LOOKUP_SET)?);
                (number(NFTA_LOOKUP_FLAGS).unwrap_or(0) == 0).then_some(RawExpr::Lookup { set, is_map })
            }
            b"nat" => {
                first(NFTA_NAT_REG_ADDR_MIN)?;
                let port_reg32 = reg32_from(NFTA_NAT_REG_PROTO_MIN)?;
                let same = |max, min: u32| number(max).is_none_or(|n| self::reg32_index(n) == Some(min));
                let plain = number(NFTA_NAT_TYPE)? == NFT_NAT_DNAT
                    && same(NFTA_NAT_REG_ADDR_MAX, 0)
                    && same(NFTA_NAT_REG_PROTO_MAX, port_reg32)
                    && number(NFTA_NAT_FLAGS).unwrap_or(0) & !IMPLICIT_NAT_FLAGS == 0;
                let family = protocol_family(u8::try_from(number(NFTA_NAT_FAMILY)?).ok()?)?;
                plain.then_some(RawExpr::Nat(Nat { family, port_reg32 }))
            }
            b"fib" => {
                first(NFTA_FIB_DREG)?;
                let plain = number(NFTA_FIB_RESULT)? == NFT_FIB_RESULT_ADDRTYPE && number(NFTA_FIB_FLAGS)? == NFTA_FIB_F_DADDR;
                plain.then_some(RawExpr::DestinationType)
            }
            b"ct" => {
                first(NFTA_CT_DREG)?;
                let plain = number(NFTA_CT_KEY)? == NFT_CT_STATUS && codec::attribute(data, NFTA_CT_DIRECTION).is_none();
                plain.then_some(RawExpr::ConnectionStatus)
            }
            b"immediate" => {
                let verdict = codec::attribute(codec::attribute(data, NFTA_IMMEDIATE_DATA)?, NFTA_DATA_VERDICT)?;
                let code = codec::attribute_u32(verdict, NFTA_VERDICT_CODE)?;
                let chain = codec::attribute(verdict, NFTA_VERDICT_CHAIN).map(codec::strip_nul);
                (number(NFTA_IMMEDIATE_DREG)? == NFT_REG_VERDICT).then_some(RawExpr::Verdict { code, chain })
            }
            b"counter" => Some(RawExpr::Counter),
            b"objref" => {
                let name = codec::strip_nul(codec::attribute(data, NFTA_OBJREF_IMM_NAME)?);
                (number(NFTA_OBJREF_IMM_TYPE)? == codec::NFT_OBJECT_COUNTER).then_some(RawExpr::CounterRef(name))
            }
            b"notrack" => Some(RawExpr::Untrack),
            b"masq" => {
                let plain = number(NFTA_MASQ_REG_PROTO_MIN).is_none();
                plain.then_some(RawExpr::Masquerade { flags: number(NFTA_MASQ_FLAGS).unwrap_or(0) })
            }
            _ => None,
        }
    }

    /// The meaning of an expression outside a sequence.
    pub(super) fn standalone(&self) -> Option<Expr> {
        match self {
            RawExpr::Verdict { code: NF_ACCEPT, .. } => Some(Expr::Accept),
            RawExpr::Verdict { code: NF_DROP, .. } => Some(Expr::Drop),
            RawExpr::Verdict { code: NFT_RETURN, .. } => Some(Expr::Return),
            RawExpr::Verdict { code: NFT_JUMP, chain: Some(chain) } => {
                Some(Expr::Jump(std::str::from_utf8(chain).ok()?.to_owned()))
            }
            RawExpr::Counter => Some(Expr::Counter),
            RawExpr::CounterRef(name) => {
                Counter::ALL.into_iter().find(|counter| counter.name().as_bytes() == *name).map(Expr::Count)
            }
            RawExpr::Masquerade { flags: MASQUERADE_RANDOM } => Some(Expr::Masquerade),
            RawExpr::Untrack => Some(Expr::Untrack),
            _ => None,
        }
    }
}

/// The offset of a register in units of 4 bytes. The kernel has two numberings: by 16 bytes and by 4 bytes.
fn reg32_index(register: u32) -> Option<u32> {
    match register {
        NFT_REG_1..=4 => Some((register - NFT_REG_1) * 4),
        NFT_REG32_00..=23 => Some(register - NFT_REG32_00),
        _ => None,
    }
}

/// Writes a load into a register. `reg32` counts registers in units of 4 bytes.
pub(super) fn load(w: &mut Writer, source: RegisterLoad, reg32: u32) {
    match source {
        RegisterLoad::Meta(key) => expression(w, "meta", |w| {
            w.u32(NFTA_META_KEY, key);
            w.u32(NFTA_META_DREG, register_number(reg32));
        }),
        RegisterLoad::Payload { base, offset, length } => expression(w, "payload", |w| {
            w.u32(NFTA_PAYLOAD_DREG, register_number(reg32));
            w.u32(NFTA_PAYLOAD_BASE, base);
            w.u32(NFTA_PAYLOAD_OFFSET, offset);
            w.u32(NFTA_PAYLOAD_LEN, length);
        }),
    }
}

pub(super) fn mask(w: &mut Writer, reg32: u32, mask: &[u8]) {
    expression(w, "bitwise", |w| {
        w.u32(NFTA_BITWISE_SREG, register_number(reg32));
        w.u32(NFTA_BITWISE_DREG, register_number(reg32));
        w.u32(NFTA_BITWISE_LEN, length_u32(mask.len()));
        w.nest(NFTA_BITWISE_MASK, |w| w.bytes(NFTA_DATA_VALUE, mask));
        w.nest(NFTA_BITWISE_XOR, |w| w.bytes(NFTA_DATA_VALUE, &[0; 16][..mask.len()]));
    });
}

pub(super) fn compare(w: &mut Writer, operation: u32, value: &[u8]) {
    expression(w, "cmp", |w| {
        w.u32(NFTA_CMP_SREG, NFT_REG_1);
        w.u32(NFTA_CMP_OP, operation);
        w.nest(NFTA_CMP_DATA, |w| w.bytes(NFTA_DATA_VALUE, value));
    });
}

pub(super) fn verdict(w: &mut Writer, code: u32, chain: Option<&str>) {
    expression(w, "immediate", |w| {
        w.u32(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT);
        w.nest(NFTA_IMMEDIATE_DATA, |w| {
            w.nest(NFTA_DATA_VERDICT, |w| {
                w.u32(NFTA_VERDICT_CODE, code);
                if let Some(chain) = chain {
                    w.text(NFTA_VERDICT_CHAIN, chain);
                }
            });
        });
    });
}

pub(super) fn expression(w: &mut Writer, name: &str, data: impl FnOnce(&mut Writer)) {
    w.nest(NFTA_LIST_ELEM, |w| {
        w.text(NFTA_EXPR_NAME, name);
        w.nest(NFTA_EXPR_DATA, data);
    });
}

/// The layout of a map's data for a translation: address, then port.
pub(super) fn nat_for_map(map: SetName) -> Option<Nat> {
    match map {
        SetName::Bound(family) | SetName::Ports(family) => Some(Nat { family, port_reg32: u32::from(family.bits() / 32) }),
        _ => None,
    }
}

/// A netmask of this prefix length, left-aligned in 16 bytes.
pub(super) fn mask_bytes(length: u8) -> [u8; 16] {
    u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0).to_be_bytes()
}

/// The kernel's number of a register that is counted in units of 4 bytes.
pub(super) fn register_number(reg32: u32) -> u32 {
    if reg32 == 0 { NFT_REG_1 } else { NFT_REG32_00 + reg32 }
}

pub(super) fn length_u32(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
