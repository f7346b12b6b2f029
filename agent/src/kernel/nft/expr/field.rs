//! Fields of packets as loads into registers, one behind the other, there and back.

use super::raw::Raw;
use super::uapi::*;
use super::{Load, load, mask, mask_bytes, nat_of};
use crate::kernel::nft::wire::Writer;
use crate::model::Family;
use crate::plan::ruleset::{Expr, Field, SetName, Table};

/// The fields that stand at a fixed place, but for those of the transport header.
const FIXED: [Field; 14] = [
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

/// Where an address stands in the IP header of its family, in bytes.
pub(super) fn address_offset(family: Family, destination: bool) -> u32 {
    match (family, destination) {
        // RFC 791 section 3.1, RFC 8200 section 3.
        (Family::V4, false) => 12,
        (Family::V4, true) => 16,
        (Family::V6, false) => 8,
        (Family::V6, true) => 24,
    }
}

/// How a field is loaded.
fn load_of(field: Field) -> Load {
    let length = u32::from(field.length());
    let network = |offset| Load::Payload { base: NFT_PAYLOAD_NETWORK_HEADER, offset, length };
    let transport = |offset| Load::Payload { base: NFT_PAYLOAD_TRANSPORT_HEADER, offset, length };
    match field {
        Field::InputInterface => Load::Meta(NFT_META_IIFNAME),
        Field::OutputInterface => Load::Meta(NFT_META_OIFNAME),
        Field::Protocol => Load::Meta(NFT_META_PROTOCOL),
        Field::Layer4 => Load::Meta(NFT_META_L4PROTO),
        Field::EtherSource => Load::Payload { base: NFT_PAYLOAD_LINK_HEADER, offset: 6, length },
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

/// Loads fields one behind the other, each at the next multiple of four bytes.
pub(super) fn load_all(w: &mut Writer, fields: &[Field]) {
    let mut place = 0;
    for field in fields {
        load(w, load_of(*field), place);
        if let Field::Transport { length, prefix, .. } = field
            && *prefix < length * 8
        {
            mask(w, place, &mask_bytes(*prefix)[..usize::from(*length)]);
        }
        place += places(*field);
    }
}

/// How many registers of four bytes a field takes.
fn places(field: Field) -> u32 {
    u32::from(field.length()).div_ceil(4)
}

/// Reads loads and what becomes of them: a comparison, a look-up, a translation. What it means and how many expressions it is.
pub(super) fn read(raw: &[Raw<'_>], table: Table) -> Option<(Option<Expr>, usize)> {
    let mut fields = Vec::new();
    let mut next = 0;
    let mut rest = raw;
    while let [Raw::Load { what, place }, behind @ ..] = rest {
        if *place != next {
            return None;
        }
        rest = behind;
        let mut field = field_of(*what)?;
        if let (Field::Transport { length, prefix, .. }, [Raw::Mask { place, mask }, behind @ ..]) = (&mut field, rest)
            && *place == next
        {
            *prefix = (0..*length * 8).find(|bits| mask_bytes(*bits)[..usize::from(*length)] == **mask)?;
            rest = behind;
        }
        next += places(field);
        fields.push(field);
    }
    let set = |name: &[u8]| SetName::from_name(table, name);
    let (expr, used) = match (fields.as_slice(), rest) {
        ([field], [Raw::Compare { operation, value }, ..]) => {
            let negate = match *operation {
                NFT_CMP_EQ => false,
                NFT_CMP_NEQ => true,
                _ => return None,
            };
            (compared(*field, negate, value)?, 1)
        }
        ([_, ..], [Raw::Lookup { set: name, into: false }, ..]) => (Expr::In { set: set(name)?, fields }, 1),
        ([_, ..], [Raw::Lookup { set: name, into: true }, Raw::Nat(nat), ..]) => {
            let map = set(name)?;
            if nat_of(map) != Some(*nat) {
                return None;
            }
            (Expr::Translate { fields, map }, 2)
        }
        _ => return None,
    };
    Some((Some(expr), raw.len() - rest.len() + used))
}

/// A comparison of one field.
fn compared(field: Field, negate: bool, value: &[u8]) -> Option<Expr> {
    let whole = value.len() == usize::from(field.length());
    let name = || {
        let name = crate::kernel::nft::wire::name(value);
        let padded = value.contains(&0) && value[name.len()..].iter().all(|byte| *byte == 0);
        std::str::from_utf8(name).ok().filter(|text| padded && !text.is_empty()).map(str::to_owned)
    };
    match field {
        Field::InputInterface if whole && !negate => name().map(Expr::InputInterface),
        Field::OutputInterface if whole && !negate => name().map(Expr::OutputInterface),
        // A shorter comparison is one with a wildcard at the end.
        Field::InputInterface | Field::OutputInterface if !value.is_empty() => {
            Some(Expr::Field { field, negate, value: value.to_vec() })
        }
        // Addresses are compared as ranges.
        Field::Source(_) | Field::Destination(_) => None,
        Field::Transport { length, prefix, .. } if prefix < length * 8 => None,
        _ => whole.then(|| Expr::Field { field, negate, value: value.to_vec() }),
    }
}

/// The field that a load is of.
fn field_of(what: Load) -> Option<Field> {
    if let Some(field) = FIXED.into_iter().find(|field| load_of(*field) == what) {
        return Some(field);
    }
    match what {
        Load::Payload { base: NFT_PAYLOAD_TRANSPORT_HEADER, offset, length } if (1..=16).contains(&length) => {
            Some(Field::transport(u8::try_from(offset).ok()?, u8::try_from(length).ok()?))
        }
        _ => None,
    }
}
