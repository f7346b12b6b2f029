//! Encodes and decodes packet fields as loads into consecutive registers.

use super::raw::{RawExpr, RegisterLoad, load, mask, mask_bytes, nat_for_map};
use super::uapi::*;
use crate::kernel::nft::codec::Writer;
use crate::model::Family;
use crate::plan::ruleset::{Expr, Field, SetName, Table};

/// The fields at a fixed offset, except generic fields of the transport header.
const FIXED_FIELDS: [Field; 14] = [
    Field::InputInterface,
    Field::OutputInterface,
    Field::Protocol,
    Field::Layer4,
    Field::EtherSource,
    Field::Source(Family::V4),
    Field::Source(Family::V6),
    Field::Destination(Family::V4),
    Field::Destination(Family::V6),
    Field::NextHeader,
    Field::PayloadLength,
    Field::ArpSenderMac,
    Field::ArpSenderAddress,
    Field::DestinationPort,
];

/// The byte offset of an address in the IP header of its family.
pub(super) fn address_offset(family: Family, destination: bool) -> u32 {
    match (family, destination) {
        // RFC 791 section 3.1, RFC 8200 section 3.
        (Family::V4, false) => 12,
        (Family::V4, true) => 16,
        (Family::V6, false) => 8,
        (Family::V6, true) => 24,
    }
}

/// The register load of a field.
fn load_for_field(field: Field) -> RegisterLoad {
    let length = u32::from(field.length());
    let network = |offset| RegisterLoad::Payload { base: NFT_PAYLOAD_NETWORK_HEADER, offset, length };
    let transport = |offset| RegisterLoad::Payload { base: NFT_PAYLOAD_TRANSPORT_HEADER, offset, length };
    match field {
        Field::InputInterface => RegisterLoad::Meta(NFT_META_IIFNAME),
        Field::OutputInterface => RegisterLoad::Meta(NFT_META_OIFNAME),
        Field::Protocol => RegisterLoad::Meta(NFT_META_PROTOCOL),
        Field::Layer4 => RegisterLoad::Meta(NFT_META_L4PROTO),
        Field::EtherSource => RegisterLoad::Payload { base: NFT_PAYLOAD_LINK_HEADER, offset: 6, length },
        Field::Source(family) => network(address_offset(family, false)),
        Field::Destination(family) => network(address_offset(family, true)),
        Field::NextHeader => network(6),
        Field::PayloadLength => network(4),
        // RFC 826: `ar$sha` and `ar$spa` of Ethernet and IPv4.
        Field::ArpSenderMac => network(8),
        Field::ArpSenderAddress => network(14),
        Field::DestinationPort => transport(2),
        Field::Transport { offset, .. } => transport(u32::from(offset)),
    }
}

/// Writes the loads of several fields, each at the next multiple of four bytes.
pub(super) fn load_fields(w: &mut Writer, fields: &[Field]) {
    let mut reg32 = 0;
    for field in fields {
        load(w, load_for_field(*field), reg32);
        if let Field::Transport { length, prefix, .. } = field
            && *prefix < length * 8
        {
            mask(w, reg32, &mask_bytes(*prefix)[..usize::from(*length)]);
        }
        reg32 += reg32_count(*field);
    }
}

/// The number of 4-byte registers that a field occupies.
fn reg32_count(field: Field) -> u32 {
    u32::from(field.length()).div_ceil(4)
}

/// Decodes loads with their comparison, set lookup or translation. Returns the expression and the number of raw expressions.
pub(super) fn read(raw: &[RawExpr<'_>], table: Table) -> Option<(Option<Expr>, usize)> {
    let mut fields = Vec::new();
    let mut next_reg32 = 0;
    let mut rest = raw;
    while let [RawExpr::Load { source, reg32 }, tail @ ..] = rest {
        if *reg32 != next_reg32 {
            return None;
        }
        rest = tail;
        let mut field = field_for_load(*source)?;
        if let (Field::Transport { length, prefix, .. }, [RawExpr::Mask { reg32, mask }, tail @ ..]) = (&mut field, rest)
            && *reg32 == next_reg32
        {
            *prefix = (0..*length * 8).find(|bits| mask_bytes(*bits)[..usize::from(*length)] == **mask)?;
            rest = tail;
        }
        next_reg32 += reg32_count(field);
        fields.push(field);
    }
    let set = |name: &[u8]| SetName::from_name(table, name);
    let (expr, used) = match (fields.as_slice(), rest) {
        ([field], [RawExpr::Compare { operation, value }, ..]) => {
            let negate = match *operation {
                NFT_CMP_EQ => false,
                NFT_CMP_NEQ => true,
                _ => return None,
            };
            (read_comparison(*field, negate, value)?, 1)
        }
        ([_, ..], [RawExpr::Lookup { set: name, is_map: false }, ..]) => (Expr::In { set: set(name)?, fields }, 1),
        ([_, ..], [RawExpr::Lookup { set: name, is_map: true }, RawExpr::Nat(nat), ..]) => {
            let map = set(name)?;
            if nat_for_map(map) != Some(*nat) {
                return None;
            }
            (Expr::Translate { fields, map }, 2)
        }
        _ => return None,
    };
    Some((Some(expr), raw.len() - rest.len() + used))
}

/// Decodes the comparison of one field.
fn read_comparison(field: Field, negate: bool, value: &[u8]) -> Option<Expr> {
    let is_full_length = value.len() == usize::from(field.length());
    let name = || {
        let name = crate::kernel::nft::codec::strip_nul(value);
        let padded = value.contains(&0) && value[name.len()..].iter().all(|byte| *byte == 0);
        std::str::from_utf8(name).ok().filter(|text| padded && !text.is_empty()).map(str::to_owned)
    };
    match field {
        Field::InputInterface if is_full_length && !negate => name().map(Expr::InputInterface),
        Field::OutputInterface if is_full_length && !negate => name().map(Expr::OutputInterface),
        // A shorter value is a prefix match (a wildcard at the end).
        Field::InputInterface | Field::OutputInterface if !value.is_empty() => {
            Some(Expr::Field { field, negate, value: value.to_vec() })
        }
        // Address comparisons are decoded as CIDRs elsewhere.
        Field::Source(_) | Field::Destination(_) => None,
        Field::Transport { length, prefix, .. } if prefix < length * 8 => None,
        _ => is_full_length.then(|| Expr::Field { field, negate, value: value.to_vec() }),
    }
}

/// The field of a register load.
fn field_for_load(load: RegisterLoad) -> Option<Field> {
    if let Some(field) = FIXED_FIELDS.into_iter().find(|field| load_for_field(*field) == load) {
        return Some(field);
    }
    match load {
        RegisterLoad::Payload { base: NFT_PAYLOAD_TRANSPORT_HEADER, offset, length } if (1..=16).contains(&length) => {
            Some(Field::transport(u8::try_from(offset).ok()?, u8::try_from(length).ok()?))
        }
        _ => None,
    }
}
