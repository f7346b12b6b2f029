//! Expressions as the kernel has them, as far as we use them.

use super::uapi::*;
use super::{Load, protocol_family};
use crate::kernel::nft::wire::{self, NF_ACCEPT, NF_DROP};
use crate::model::Family;
use crate::plan::ruleset::{Counter, Expr};

/// `NF_NAT_RANGE_MAP_IPS | NF_NAT_RANGE_PROTO_SPECIFIED`, `linux/netfilter/nf_nat.h`: what the kernel adds by itself.
const NAT_FLAGS: u32 = 0x1 | 0x2;

/// An expression. Places of registers are counted in four bytes.
pub(super) enum Raw<'a> {
    Load {
        what: Load,
        place: u32,
    },
    Mask {
        place: u32,
        mask: &'a [u8],
    },
    /// Of the first register.
    Compare {
        operation: u32,
        value: &'a [u8],
    },
    /// Of the first register. `NFT_RANGE_EQ` and `NFT_RANGE_NEQ` have the numbers of `NFT_CMP_EQ` and `NFT_CMP_NEQ`.
    Range {
        operation: u32,
        first: &'a [u8],
        last: &'a [u8],
    },
    /// From the first register on; `into`: what a map says goes there.
    Lookup {
        set: &'a [u8],
        into: bool,
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
    Count(&'a [u8]),
    Masquerade {
        flags: u32,
    },
    Untrack,
    Other,
}

/// A translation of the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Nat {
    pub(super) family: Family,
    /// The place of the port's register.
    pub(super) port: u32,
}

impl Raw<'_> {
    pub(super) fn read(element: &[u8]) -> Raw<'_> {
        let name = wire::attribute(element, NFTA_EXPR_NAME).map(wire::name).unwrap_or_default();
        let data = wire::attribute(element, NFTA_EXPR_DATA).unwrap_or_default();
        Raw::known(name, data).unwrap_or(Raw::Other)
    }

    fn known<'a>(name: &[u8], data: &'a [u8]) -> Option<Raw<'a>> {
        let number = |kind| wire::number(data, kind);
        let value = |kind| wire::attribute(data, kind).and_then(|nested| wire::attribute(nested, NFTA_DATA_VALUE));
        let place = |kind| number(kind).and_then(place);
        let first = |kind| place(kind).filter(|place| *place == 0);
        match name {
            b"meta" => Some(Raw::Load { what: Load::Meta(number(NFTA_META_KEY)?), place: place(NFTA_META_DREG)? }),
            b"payload" => {
                let (base, offset) = (number(NFTA_PAYLOAD_BASE)?, number(NFTA_PAYLOAD_OFFSET)?);
                let what = Load::Payload { base, offset, length: number(NFTA_PAYLOAD_LEN)? };
                let place = place(NFTA_PAYLOAD_DREG)?;
                number(NFTA_PAYLOAD_SREG).is_none().then_some(Raw::Load { what, place })
            }
            b"bitwise" => {
                let source = place(NFTA_BITWISE_SREG)?;
                let plain = place(NFTA_BITWISE_DREG)? == source
                    && number(NFTA_BITWISE_OP).unwrap_or(0) == 0
                    && value(NFTA_BITWISE_XOR)?.iter().all(|byte| *byte == 0);
                if plain { value(NFTA_BITWISE_MASK).map(|mask| Raw::Mask { place: source, mask }) } else { None }
            }
            b"cmp" => {
                first(NFTA_CMP_SREG)?;
                Some(Raw::Compare { operation: number(NFTA_CMP_OP)?, value: value(NFTA_CMP_DATA)? })
            }
            b"range" => {
                first(NFTA_RANGE_SREG)?;
                let (first, last) = (value(NFTA_RANGE_FROM_DATA)?, value(NFTA_RANGE_TO_DATA)?);
                Some(Raw::Range { operation: number(NFTA_RANGE_OP)?, first, last })
            }
            b"lookup" => {
                first(NFTA_LOOKUP_SREG)?;
                let into = match number(NFTA_LOOKUP_DREG) {
                    Some(_) => first(NFTA_LOOKUP_DREG).map(|_| true)?,
                    None => false,
                };
                let set = wire::name(wire::attribute(data, NFTA_LOOKUP_SET)?);
                (number(NFTA_LOOKUP_FLAGS).unwrap_or(0) == 0).then_some(Raw::Lookup { set, into })
            }
            b"nat" => {
                first(NFTA_NAT_REG_ADDR_MIN)?;
                let port = place(NFTA_NAT_REG_PROTO_MIN)?;
                let same = |max, min: u32| number(max).is_none_or(|n| self::place(n) == Some(min));
                let plain = number(NFTA_NAT_TYPE)? == NFT_NAT_DNAT
                    && same(NFTA_NAT_REG_ADDR_MAX, 0)
                    && same(NFTA_NAT_REG_PROTO_MAX, port)
                    && number(NFTA_NAT_FLAGS).unwrap_or(0) & !NAT_FLAGS == 0;
                let family = protocol_family(u8::try_from(number(NFTA_NAT_FAMILY)?).ok()?)?;
                plain.then_some(Raw::Nat(Nat { family, port }))
            }
            b"fib" => {
                first(NFTA_FIB_DREG)?;
                let plain = number(NFTA_FIB_RESULT)? == NFT_FIB_RESULT_ADDRTYPE && number(NFTA_FIB_FLAGS)? == NFTA_FIB_F_DADDR;
                plain.then_some(Raw::DestinationType)
            }
            b"ct" => {
                first(NFTA_CT_DREG)?;
                let plain = number(NFTA_CT_KEY)? == NFT_CT_STATUS && wire::attribute(data, NFTA_CT_DIRECTION).is_none();
                plain.then_some(Raw::ConnectionStatus)
            }
            b"immediate" => {
                let verdict = wire::attribute(wire::attribute(data, NFTA_IMMEDIATE_DATA)?, NFTA_DATA_VERDICT)?;
                let code = wire::number(verdict, NFTA_VERDICT_CODE)?;
                let chain = wire::attribute(verdict, NFTA_VERDICT_CHAIN).map(wire::name);
                (number(NFTA_IMMEDIATE_DREG)? == NFT_REG_VERDICT).then_some(Raw::Verdict { code, chain })
            }
            b"counter" => Some(Raw::Counter),
            b"objref" => {
                let name = wire::name(wire::attribute(data, NFTA_OBJREF_IMM_NAME)?);
                (number(NFTA_OBJREF_IMM_TYPE)? == wire::NFT_OBJECT_COUNTER).then_some(Raw::Count(name))
            }
            b"notrack" => Some(Raw::Untrack),
            b"masq" => {
                let plain = number(NFTA_MASQ_REG_PROTO_MIN).is_none();
                plain.then_some(Raw::Masquerade { flags: number(NFTA_MASQ_FLAGS).unwrap_or(0) })
            }
            _ => None,
        }
    }

    /// What it means where it belongs to no sequence.
    pub(super) fn alone(&self) -> Option<Expr> {
        match self {
            Raw::Verdict { code: NF_ACCEPT, .. } => Some(Expr::Accept),
            Raw::Verdict { code: NF_DROP, .. } => Some(Expr::Drop),
            Raw::Verdict { code: NFT_RETURN, .. } => Some(Expr::Return),
            Raw::Verdict { code: NFT_JUMP, chain: Some(chain) } => Some(Expr::Jump(std::str::from_utf8(chain).ok()?.to_owned())),
            Raw::Counter => Some(Expr::Counter),
            Raw::Count(name) => Counter::ALL.into_iter().find(|counter| counter.name().as_bytes() == *name).map(Expr::Count),
            Raw::Masquerade { flags: MASQUERADE_RANDOM } => Some(Expr::Masquerade),
            Raw::Untrack => Some(Expr::Untrack),
            _ => None,
        }
    }
}

/// The place of a register: the kernel names the same one by its number of 16 bytes or of 4 bytes.
fn place(register: u32) -> Option<u32> {
    match register {
        NFT_REG_1..=4 => Some((register - NFT_REG_1) * 4),
        NFT_REG32_00..=23 => Some(register - NFT_REG32_00),
        _ => None,
    }
}
