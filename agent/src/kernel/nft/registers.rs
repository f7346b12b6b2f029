//! The registers of a rule, and the expressions that load and compare them. A byte that cannot be predicted is unknown, and so
//! are results derived from it.

use std::net::IpAddr;
use std::ops::Range;
use std::rc::Rc;

use super::codec;
use super::expr::uapi::*;
use super::set::{NFT_SET_CONCAT, NFT_SET_INTERVAL};
use super::snapshot::{ChainDump, ElementDump, RulesetSnapshot, SetDump};
use super::translation::Translation;
use super::xtables;
use crate::kernel::packet::{Packet, ethertype};
use crate::model::Family;

/// Whether a rule matches (three-valued logic).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MatchResult {
    True,
    False,
    Unknown,
}

impl MatchResult {
    pub(super) fn from_bool(value: bool) -> MatchResult {
        if value { MatchResult::True } else { MatchResult::False }
    }

    /// Logical AND.
    pub(super) fn and(self, other: MatchResult) -> MatchResult {
        match (self, other) {
            (MatchResult::False, _) | (_, MatchResult::False) => MatchResult::False,
            (MatchResult::True, MatchResult::True) => MatchResult::True,
            _ => MatchResult::Unknown,
        }
    }

    fn not(self) -> MatchResult {
        match self {
            MatchResult::True => MatchResult::False,
            MatchResult::False => MatchResult::True,
            MatchResult::Unknown => MatchResult::Unknown,
        }
    }
}

/// Sixteen registers of four bytes after the 16 bytes of the verdict (`struct nft_regs`).
const REGISTER_WORDS: usize = 20;

// `linux/netfilter/nf_tables.h`.
const NFT_CMP_LT: u32 = 2;
const NFT_CMP_LTE: u32 = 3;
const NFT_CMP_GT: u32 = 4;
const NFT_META_MARK: u32 = 3;
const NFT_META_IIF: u32 = 4;
const NFT_META_OIF: u32 = 5;
const NFT_META_PKTTYPE: u32 = 19;
const NFT_CT_STATE: u32 = 0;
const NFT_CT_DIRECTION: u32 = 1;
const NFT_CT_MARK: u32 = 3;
/// `NF_CT_STATE_BIT(IP_CT_NEW)`.
const CT_STATE_NEW: u32 = 8;
/// `NF_CT_STATE_UNTRACKED_BIT`, `linux/netfilter/nf_conntrack_common.h`.
const CT_STATE_UNTRACKED: u32 = 1 << 6;
const NFTA_BYTEORDER_SREG: u16 = 1;
const NFTA_BYTEORDER_DREG: u16 = 2;
const NFTA_BYTEORDER_LEN: u16 = 4;
const NFTA_BYTEORDER_SIZE: u16 = 5;
const NFT_LOOKUP_F_INV: u32 = 1;
/// `PACKET_HOST`, `linux/if_packet.h`: the packet is addressed to this host's MAC, or sent by it.
const PACKET_HOST: u8 = 0;
/// `NFT_OBJECT_QUOTA`, `_LIMIT`, `_CONNLIMIT` and `_SYNPROXY`: objects that match or not, or consume the packet.
const MATCHING_OBJECTS: [u32; 4] = [2, 4, 5, 10];

/// The register contents during a rule's evaluation.
pub(super) struct Registers<'a> {
    bytes: [Option<u8>; REGISTER_WORDS * 4],
    packet: &'a Packet,
    snapshot: &'a RulesetSnapshot,
    chain: &'a ChainDump,
    untracked: bool,
    /// The register and map of a lookup whose key is unknown.
    open_lookup: Option<(u32, Rc<SetDump>)>,
}

impl<'a> Registers<'a> {
    pub(super) fn new(packet: &'a Packet, snapshot: &'a RulesetSnapshot, chain: &'a ChainDump, untracked: bool) -> Registers<'a> {
        Registers { bytes: [None; REGISTER_WORDS * 4], packet, snapshot, chain, untracked, open_lookup: None }
    }

    /// Executes an expression without a verdict; returns whether it matches.
    pub(super) fn execute(&mut self, name: &str, data: &[u8]) -> MatchResult {
        let number = |kind| codec::attribute_u32(data, kind);
        match name {
            "meta" => match (number(NFTA_META_DREG), number(NFTA_META_KEY)) {
                (Some(register), Some(key)) => self.load(register, 16, self.meta(key)),
                // Sets a mark.
                _ => MatchResult::True,
            },
            "payload" => match (number(NFTA_PAYLOAD_DREG), number(NFTA_PAYLOAD_LEN)) {
                (Some(register), Some(length)) => {
                    let (base, offset) = (number(NFTA_PAYLOAD_BASE), number(NFTA_PAYLOAD_OFFSET));
                    let value = self.payload(base, offset, length);
                    self.load(register, length as usize, value)
                }
                _ => MatchResult::True,
            },
            "ct" => match (number(NFTA_CT_DREG), number(NFTA_CT_KEY)) {
                (Some(register), Some(key)) => {
                    let status = if self.packet.destination_translated { IPS_DST_NAT } else { 0 };
                    let value = match key {
                        NFT_CT_STATE if self.untracked => Some(CT_STATE_UNTRACKED.to_ne_bytes().to_vec()),
                        // An untracked packet has no connection: the rule ends (`nft_ct_get_eval` in net/netfilter/nft_ct.c).
                        _ if self.untracked => return MatchResult::False,
                        NFT_CT_STATE => Some(CT_STATE_NEW.to_ne_bytes().to_vec()),
                        NFT_CT_DIRECTION => Some(vec![0]),
                        NFT_CT_STATUS => Some(status.to_ne_bytes().to_vec()),
                        NFT_CT_MARK => self.mark(),
                        _ => None,
                    };
                    self.load(register, 16, value)
                }
                _ => MatchResult::True,
            },
            "fib" => {
                let kind = number(NFTA_FIB_RESULT) == Some(NFT_FIB_RESULT_ADDRTYPE);
                let destination = number(NFTA_FIB_FLAGS) == Some(NFTA_FIB_F_DADDR);
                let is_local = self.packet.destination_is_local.filter(|_| kind && destination);
                let value = is_local.map(|local| if local { RTN_LOCAL } else { RTN_UNICAST }.to_ne_bytes().to_vec());
                number(NFTA_FIB_DREG).map_or(MatchResult::Unknown, |register| self.load(register, 16, value))
            }
            "immediate" => {
                let value = codec::attribute(data, NFTA_IMMEDIATE_DATA).and_then(|d| codec::attribute(d, NFTA_DATA_VALUE));
                let register = number(NFTA_IMMEDIATE_DREG);
                register.map_or(MatchResult::True, |register| self.load(register, 16, value.map(<[u8]>::to_vec)))
            }
            "bitwise" => self.bitwise(data),
            "byteorder" => self.byteorder(data),
            "cmp" => self.compare(data),
            "range" => self.range(data),
            "lookup" => match self.lookup(data) {
                Some((matched, found)) => {
                    let value = found.and_then(|d| codec::attribute(&d, NFTA_DATA_VALUE).map(<[u8]>::to_vec));
                    if let Some(register) = number(NFTA_LOOKUP_DREG) {
                        self.load(register, 64, value);
                    }
                    if number(NFTA_LOOKUP_FLAGS).unwrap_or(0) & NFT_LOOKUP_F_INV != 0 { matched.not() } else { matched }
                }
                None => {
                    self.bytes = [None; REGISTER_WORDS * 4];
                    self.open_lookup = number(NFTA_LOOKUP_DREG).zip(self.set(data));
                    MatchResult::Unknown
                }
            },
            // ebtables has other matches, some of the same names.
            "match" if self.chain.family != codec::NFPROTO_BRIDGE => {
                let matched = xtables::evaluate_match(data, self.packet, self.untracked);
                matched.map_or(MatchResult::Unknown, MatchResult::from_bool)
            }
            "objref" => match number(NFTA_OBJREF_IMM_TYPE) {
                Some(kind) if !MATCHING_OBJECTS.contains(&kind) => MatchResult::True,
                _ => MatchResult::Unknown,
            },
            "counter" | "log" | "last" | "dup" | "flow_offload" => MatchResult::True,
            // A limit, a quota, a random number, a socket: the result depends on a real packet. It may be in any register.
            _ => {
                self.bytes = [None; REGISTER_WORDS * 4];
                MatchResult::Unknown
            }
        }
    }

    fn meta(&self, key: u32) -> Option<Vec<u8>> {
        let packet = self.packet;
        let name = |interface: Option<&crate::kernel::packet::Interface>| {
            let mut name = interface.map_or("", |i| &i.name).as_bytes().to_vec();
            name.resize(IFNAMSIZ, 0);
            Some(name)
        };
        let index =
            |interface: Option<&crate::kernel::packet::Interface>| Some(interface.map_or(0, |i| i.index).to_ne_bytes().to_vec());
        match key {
            NFT_META_PROTOCOL => Some(ethertype(packet.family).to_vec()),
            NFT_META_NFPROTO => Some(vec![match packet.family {
                Family::V4 => codec::NFPROTO_IPV4,
                Family::V6 => codec::NFPROTO_IPV6,
            }]),
            NFT_META_L4PROTO => (!packet.any_destination).then(|| vec![packet.protocol]),
            NFT_META_MARK => self.mark(),
            // A bridge also sees frames to other MACs.
            NFT_META_PKTTYPE if self.chain.family != codec::NFPROTO_BRIDGE => Some(vec![PACKET_HOST]),
            NFT_META_IIF => index(packet.input.as_ref()),
            NFT_META_OIF => index(packet.output.as_ref()),
            NFT_META_IIFNAME => name(packet.input.as_ref()),
            NFT_META_OIFNAME => name(packet.output.as_ref()),
            _ => None,
        }
    }

    fn mark(&self) -> Option<Vec<u8>> {
        self.packet.mark.map(|mark| mark.to_ne_bytes().to_vec())
    }

    fn payload(&self, base: Option<u32>, offset: Option<u32>, length: u32) -> Option<Vec<u8>> {
        let (header, assumed): (_, &[Range<usize>]) = match base? {
            NFT_PAYLOAD_LINK_HEADER => (&self.packet.link, &[]),
            NFT_PAYLOAD_NETWORK_HEADER => (&self.packet.network, self.packet.assumed_network_bytes()),
            NFT_PAYLOAD_TRANSPORT_HEADER => (&self.packet.transport, self.packet.assumed_transport_bytes()),
            _ => return None,
        };
        let offset = offset? as usize;
        let read = offset..offset + length as usize;
        if assumed.iter().any(|field| field.start < read.end && read.start < field.end) {
            return None;
        }
        header.get(read).map(<[u8]>::to_vec)
    }

    /// Loads a value; an unknown value makes `length` bytes unknown.
    fn load(&mut self, register: u32, length: usize, value: Option<Vec<u8>>) -> MatchResult {
        let start = register_offset(register);
        let length = value.as_ref().map_or(length, Vec::len);
        for (at, slot) in self.bytes.iter_mut().skip(start).take(length.next_multiple_of(4)).enumerate() {
            *slot = value.as_ref().map(|value| value.get(at).copied().unwrap_or(0));
        }
        MatchResult::True
    }

    fn value(&self, register: u32, length: usize) -> Option<Vec<u8>> {
        let start = register_offset(register);
        self.bytes.get(start..start + length)?.iter().copied().collect()
    }

    fn bitwise(&mut self, data: &[u8]) -> MatchResult {
        let number = |kind| codec::attribute_u32(data, kind);
        let bytes = |kind| codec::attribute(data, kind).and_then(|d| codec::attribute(d, NFTA_DATA_VALUE));
        let (Some(source), Some(target), Some(length)) =
            (number(NFTA_BITWISE_SREG), number(NFTA_BITWISE_DREG), number(NFTA_BITWISE_LEN))
        else {
            return MatchResult::Unknown;
        };
        let length = length as usize;
        let masked = match (number(NFTA_BITWISE_OP).unwrap_or(0), bytes(NFTA_BITWISE_MASK), bytes(NFTA_BITWISE_XOR)) {
            (0, Some(mask), Some(xor)) => {
                let start = register_offset(source);
                let masked_byte = |index: usize| {
                    let (mask, xor) = (*mask.get(index)?, *xor.get(index)?);
                    // A byte that is masked out may be unknown.
                    if mask == 0 { Some(xor) } else { Some((*self.bytes.get(start + index)?)? & mask ^ xor) }
                };
                (0..length).map(masked_byte).collect()
            }
            _ => None,
        };
        self.load(target, length, masked)
    }

    fn byteorder(&mut self, data: &[u8]) -> MatchResult {
        let number = |kind| codec::attribute_u32(data, kind);
        let (Some(source), Some(target), Some(length), Some(size)) =
            (number(NFTA_BYTEORDER_SREG), number(NFTA_BYTEORDER_DREG), number(NFTA_BYTEORDER_LEN), number(NFTA_BYTEORDER_SIZE))
        else {
            return MatchResult::Unknown;
        };
        let swap = |mut value: Vec<u8>| {
            if cfg!(target_endian = "little") {
                value.chunks_mut((size as usize).max(1)).for_each(<[u8]>::reverse);
            }
            value
        };
        let value = self.value(source, length as usize).map(swap);
        self.load(target, length as usize, value)
    }

    fn compare(&self, data: &[u8]) -> MatchResult {
        let number = |kind| codec::attribute_u32(data, kind);
        let wanted = codec::attribute(data, NFTA_CMP_DATA).and_then(|d| codec::attribute(d, NFTA_DATA_VALUE));
        let (Some(register), Some(op), Some(wanted)) = (number(NFTA_CMP_SREG), number(NFTA_CMP_OP), wanted) else {
            return MatchResult::Unknown;
        };
        let Some(value) = self.value(register, wanted.len()) else { return MatchResult::Unknown };
        let value = value.as_slice();
        MatchResult::from_bool(match op {
            NFT_CMP_EQ => value == wanted,
            NFT_CMP_NEQ => value != wanted,
            NFT_CMP_LT => value < wanted,
            NFT_CMP_LTE => value <= wanted,
            NFT_CMP_GT => value > wanted,
            _ => value >= wanted,
        })
    }

    fn range(&self, data: &[u8]) -> MatchResult {
        let bytes = |kind| codec::attribute(data, kind).and_then(|d| codec::attribute(d, NFTA_DATA_VALUE));
        let (Some(register), Some(from), Some(to)) =
            (codec::attribute_u32(data, NFTA_RANGE_SREG), bytes(NFTA_RANGE_FROM_DATA), bytes(NFTA_RANGE_TO_DATA))
        else {
            return MatchResult::Unknown;
        };
        let Some(value) = self.value(register, from.len()) else { return MatchResult::Unknown };
        let in_range = MatchResult::from_bool(from <= value.as_slice() && value.as_slice() <= to);
        if codec::attribute_u32(data, NFTA_RANGE_OP) == Some(NFT_CMP_NEQ) { in_range.not() } else { in_range }
    }

    /// The set of a lookup.
    fn set(&self, data: &[u8]) -> Option<Rc<SetDump>> {
        let name = codec::attribute(data, NFTA_LOOKUP_SET).map(codec::strip_nul)?;
        self.snapshot.set(self.chain.family, &self.chain.table, std::str::from_utf8(name).ok()?)
    }

    /// Looks up the register's value in a set. Returns the match, and the data attributes of a map element.
    pub(super) fn lookup(&self, data: &[u8]) -> Option<(MatchResult, Option<Vec<u8>>)> {
        let set = self.set(data)?;
        let register = codec::attribute_u32(data, NFTA_LOOKUP_SREG)?;
        // The catch-all element of a set has no key.
        let Some(length) = set.elements.iter().map(|element| element.key.len()).max() else {
            return Some((MatchResult::False, None));
        };
        let value = self.value(register, length)?;
        let found = find_element(&set, &value).or_else(|| set.elements.iter().find(|element| element.key.is_empty()));
        Some((MatchResult::from_bool(found.is_some()), found.and_then(|element| element.data.clone())))
    }

    /// The translations of a statement whose match is uncertain, each with the key of its map's element.
    pub(super) fn possible_translations(&mut self, name: &str, data: &[u8]) -> Vec<(Translation, Vec<u8>)> {
        let Some((register, map)) = self.open_lookup.take() else { return vec![(self.translation(name, data), Vec::new())] };
        let element = |element: &ElementDump| {
            let value = element.data.as_ref().and_then(|data| codec::attribute(data, NFTA_DATA_VALUE).map(<[u8]>::to_vec));
            self.load(register, 64, value);
            (self.translation(name, data), element.key.clone())
        };
        map.elements.iter().filter(|element| !element.is_interval_end).map(element).collect()
    }

    /// Decodes an address translation statement.
    pub(super) fn translation(&self, name: &str, data: &[u8]) -> Translation {
        let register = |kind| codec::attribute_u32(data, kind);
        let address_at = |register| match self.packet.family {
            Family::V4 => Some(IpAddr::from(<[u8; 4]>::try_from(self.value(register, 4)?).ok()?)),
            Family::V6 => Some(IpAddr::from(<[u8; 16]>::try_from(self.value(register, 16)?).ok()?)),
        };
        let address = register(NFTA_NAT_REG_ADDR_MIN).and_then(address_at);
        let is_range = register(NFTA_NAT_REG_ADDR_MAX).is_some_and(|last| address_at(last) != address);
        let is_undecoded = register(NFTA_NAT_REG_ADDR_MIN).is_some() && address.is_none();
        let port = register(NFTA_NAT_REG_PROTO_MIN)
            .and_then(|register| self.value(register, 2))
            .map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
        match name {
            "masq" => Translation::Masquerade,
            "redir" => Translation::Redirect,
            _ if is_range || is_undecoded => Translation::Unknown,
            "nat" if register(NFTA_NAT_TYPE) == Some(NFT_NAT_DNAT) => Translation::Destination { address, port },
            "nat" => Translation::Source { address },
            _ => Translation::Unknown,
        }
    }
}

/// The byte offset of a register, in either numbering.
fn register_offset(register: u32) -> usize {
    let register = register as usize;
    let first32 = NFT_REG32_00 as usize;
    if register < first32 { register * 16 } else { 16 + (register - first32) * 4 }
}

/// The set element that contains a value, except for the catch-all element.
fn find_element<'s>(set: &'s SetDump, value: &[u8]) -> Option<&'s ElementDump> {
    let mut elements = set.elements.iter().filter(|element| !element.key.is_empty());
    if set.flags & NFT_SET_INTERVAL == 0 {
        return elements.find(|element| element.key == value);
    }
    if set.flags & NFT_SET_CONCAT != 0 {
        let contains_value = |element: &&ElementDump| {
            let end = element.key_end.as_ref().unwrap_or(&element.key);
            // Field lengths are unknown here, so the value is compared in words of four bytes. That is exact for fields of up to
            // four bytes. Consecutive words of a longer field are compared as one number.
            let words = value.chunks(4).zip(element.key.chunks(4)).zip(end.chunks(4));
            let mut open = (false, false);
            words.into_iter().all(|((value, low), high)| {
                let is_equal = low == high;
                let in_range = (open.0 || low <= value) && (open.1 || value <= high);
                open = if is_equal { (false, false) } else { (open.0 || low < value, open.1 || value < high) };
                in_range
            })
        };
        return elements.find(contains_value);
    }
    // Each element is the start of an interval, or the first value after one.
    let below = elements.filter(|element| element.key.as_slice() <= value);
    let last = below.max_by(|a, b| a.key.cmp(&b.key).then(b.is_interval_end.cmp(&a.is_interval_end)))?;
    (!last.is_interval_end).then_some(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(key: &[u8], end: Option<&[u8]>, is_interval_end: bool) -> ElementDump {
        ElementDump { key: key.to_vec(), key_end: end.map(<[u8]>::to_vec), is_interval_end, data: None }
    }

    #[test]
    fn set_lookup_finds_members_and_intervals() {
        let plain = SetDump { flags: 0, elements: vec![element(&[1, 2, 0, 0], None, false)] };
        assert!(find_element(&plain, &[1, 2, 0, 0]).is_some() && find_element(&plain, &[1, 3, 0, 0]).is_none());
        // 10 to 19, 30 and above; the kernel lists them in any order.
        let elements = vec![element(&[30], None, false), element(&[20], None, true), element(&[10], None, false)];
        let ranges = SetDump { flags: NFT_SET_INTERVAL, elements };
        let inside: Vec<u8> = (0..40).filter(|n| find_element(&ranges, &[*n]).is_some()).collect();
        assert_eq!(inside, (10..20).chain(30..40).collect::<Vec<_>>());
        let elements = vec![element(&[1, 0, 0, 0, 5, 0, 0, 0], Some(&[1, 0, 0, 0, 9, 255, 255, 255]), false)];
        let pairs = SetDump { flags: NFT_SET_INTERVAL | NFT_SET_CONCAT, elements };
        assert!(find_element(&pairs, &[1, 0, 0, 0, 7, 1, 2, 3]).is_some());
        assert!(
            find_element(&pairs, &[2, 0, 0, 0, 7, 1, 2, 3]).is_none()
                && find_element(&pairs, &[1, 0, 0, 0, 10, 0, 0, 0]).is_none()
        );
    }
}
