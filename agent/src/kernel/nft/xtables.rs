//! Evaluates the xtables matches that iptables-nft writes into rules. Layouts are in `linux/netfilter/xt_*.h`.
//!
//! Numbers are in host byte order, addresses in network byte order. A match that is not listed here is unknown.

use std::net::IpAddr;

use super::codec;
use super::expr::uapi::*;
use super::translation::Translation;
use crate::kernel::packet::{Packet, TCP, UDP};
use crate::model::Family;

// `xt_conntrack.h`: the match flags, and the states that are no `NF_CT_STATE_BIT`.
const XT_CONNTRACK_STATE: u16 = 1;
const XT_CONNTRACK_STATE_ALIAS: u16 = 1 << 13;
const XT_CONNTRACK_STATE_DNAT: u16 = 1 << 7;
const XT_CONNTRACK_STATE_UNTRACKED: u16 = 1 << 8;
const XT_CONNTRACK_STATE_NEW: u16 = 1 << 3;
/// `XT_STATE_UNTRACKED`, `xt_state.h`: another bit than that of `xt_conntrack.h`.
const XT_STATE_UNTRACKED: u32 = 1 << 6;
/// `XT_MULTI_PORTS`, `xt_multiport.h`.
const XT_MULTI_PORTS: usize = 15;

/// Evaluates a `match` expression; `None` if its result is unknown.
pub(super) fn evaluate_match(data: &[u8], packet: &Packet, untracked: bool) -> Option<bool> {
    let info = Info(codec::attribute(data, NFTA_MATCH_INFO).unwrap_or_default());
    let revision = codec::attribute_u32(data, NFTA_MATCH_REV).unwrap_or(0);
    let name = codec::attribute(data, NFTA_MATCH_NAME).map(codec::strip_nul).unwrap_or_default();
    match (name, revision) {
        (b"comment", _) => Some(true),
        (b"tcp" | b"udp" | b"multiport" | b"iprange", _) if packet.any_destination => None,
        // Revision 1 has states of eight bits.
        (b"conntrack", 2..) => info.conntrack(packet, untracked),
        (b"state", 0) => info.u32(0).map(|states| states & if untracked { XT_STATE_UNTRACKED } else { 8 } != 0),
        (b"tcp", 0) => info.tcp(packet),
        (b"udp", 0) => info.ports(packet, UDP, 8),
        (b"multiport", 1) => info.multiport(packet),
        (b"addrtype", 1) => info.addrtype(packet),
        (b"iprange", 1) => info.iprange(packet),
        // `PACKET_HOST` is 0, and the type of a packet to this host or through it.
        (b"pkttype", 0) => info.u32(0).zip(info.u32(4)).map(|(kind, invert)| (kind == 0) != (invert != 0)),
        _ => None,
    }
}

/// `NF_NAT_RANGE_MAP_IPS` and `NF_NAT_RANGE_PROTO_SPECIFIED`, `linux/netfilter/nf_nat.h`.
const NF_NAT_RANGE_MAP_IPS: u32 = 1;
const NF_NAT_RANGE_PROTO_SPECIFIED: u32 = 2;

/// Decodes a target that translates addresses. A range of addresses is unknown.
pub(super) fn translation(data: &[u8], family: Family) -> Translation {
    let info = Info(codec::attribute(data, NFTA_MATCH_INFO).unwrap_or_default());
    // `struct nf_nat_ipv4_multi_range_compat` before revision 1 of IPv4, else `nf_nat_range` and `nf_nat_range2`.
    let is_compat = family == Family::V4 && codec::attribute_u32(data, NFTA_MATCH_REV).unwrap_or(0) == 0;
    let (flags, first, last, ports) = if is_compat { (4, 8, 12, 16) } else { (0, 4, 20, 36) };
    let flags = info.u32(flags).unwrap_or(0);
    let address = |at: usize| match family {
        Family::V4 => Some(IpAddr::from(<[u8; 4]>::try_from(info.0.get(at..at + 4)?).ok()?)),
        Family::V6 => Some(IpAddr::from(<[u8; 16]>::try_from(info.0.get(at..at + 16)?).ok()?)),
    };
    let found = address(first).filter(|found| flags & NF_NAT_RANGE_MAP_IPS != 0 && address(last) == Some(*found));
    let port = info.u16(ports).map(u16::from_be).filter(|_| flags & NF_NAT_RANGE_PROTO_SPECIFIED != 0);
    match (codec::attribute(data, NFTA_MATCH_NAME).map(codec::strip_nul).unwrap_or_default(), found) {
        (b"MASQUERADE", _) => Translation::Masquerade,
        (b"REDIRECT", _) => Translation::Redirect,
        (b"DNAT", Some(_)) => Translation::Destination { address: found, port },
        (b"SNAT", Some(_)) => Translation::Source { address: found },
        _ => Translation::Unknown,
    }
}

/// The parameters of a match. Results are `None` if unknown.
struct Info<'a>(&'a [u8]);

impl Info<'_> {
    fn byte(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    fn u16(&self, at: usize) -> Option<u16> {
        Some(u16::from_ne_bytes(self.0.get(at..at + 2)?.try_into().ok()?))
    }

    fn u32(&self, at: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(self.0.get(at..at + 4)?.try_into().ok()?))
    }

    /// `match_flags`, `invert_flags` and `state_mask` of `struct xt_conntrack_mtinfo3` (`conntrack_mt` in
    /// net/netfilter/xt_conntrack.c).
    fn conntrack(&self, packet: &Packet, untracked: bool) -> Option<bool> {
        let (flags, invert, states) = (self.u16(146)?, self.u16(148)?, self.u16(150)?);
        let translated = if packet.destination_translated { XT_CONNTRACK_STATE_DNAT } else { 0 };
        let state = if untracked { XT_CONNTRACK_STATE_UNTRACKED } else { XT_CONNTRACK_STATE_NEW | translated };
        let has_state = flags & XT_CONNTRACK_STATE != 0;
        if has_state && (states & state != 0) == (invert & XT_CONNTRACK_STATE != 0) {
            return Some(false);
        }
        if untracked {
            return Some(has_state);
        }
        (flags & !(XT_CONNTRACK_STATE | XT_CONNTRACK_STATE_ALIAS) == 0).then_some(true)
    }

    /// The port ranges of `struct xt_tcp` and `struct xt_udp`; the inversion flags are at `invert`.
    fn ports(&self, packet: &Packet, protocol: u8, invert: usize) -> Option<bool> {
        let invert = self.byte(invert)?;
        let in_range =
            |port: usize, first: usize| Some((self.u16(first)?..=self.u16(first + 2)?).contains(&port_at(packet, port)?));
        if packet.protocol != protocol {
            return Some(false);
        }
        Some((in_range(0, 0)? != (invert & 1 != 0)) && (in_range(2, 4)? != (invert & 2 != 0)))
    }

    fn tcp(&self, packet: &Packet) -> Option<bool> {
        let (option, mask, flags, invert) = (self.byte(8)?, self.byte(9)?, self.byte(10)?, self.byte(11)?);
        if !self.ports(packet, TCP, 11)? {
            return Some(false);
        }
        let flags_match = packet.transport.get(13)? & mask == flags;
        if flags_match == (invert & 4 != 0) {
            return Some(false);
        }
        // TCP options are not predicted.
        (option == 0).then_some(true)
    }

    /// `struct xt_multiport_v1`.
    fn multiport(&self, packet: &Packet) -> Option<bool> {
        let (side, count) = (self.byte(0)?, usize::from(self.byte(1)?));
        let (source, destination) = (port_at(packet, 0)?, port_at(packet, 2)?);
        let port_matches = |first: u16, last: u16| {
            let range = first..=last;
            (side != 1 && range.contains(&source)) || (side != 0 && range.contains(&destination))
        };
        let (mut index, mut found) = (0, false);
        while index < count.min(XT_MULTI_PORTS) {
            let first = self.u16(2 + 2 * index)?;
            // A flag marks the first port of a range.
            index += usize::from(self.byte(2 + 2 * XT_MULTI_PORTS + index)? != 0);
            found |= port_matches(first, self.u16(2 + 2 * index)?);
            index += 1;
        }
        Some(found != (self.byte(2 + 3 * XT_MULTI_PORTS)? != 0))
    }

    /// `struct xt_addrtype_info_v1`. The type of a source, and one relative to an interface, are unknown.
    fn addrtype(&self, packet: &Packet) -> Option<bool> {
        let (source, destination, flags) = (self.u16(0)?, self.u16(2)?, self.u32(4)?);
        let kind = if packet.destination_is_local? { RTN_LOCAL } else { RTN_UNICAST };
        let found = u32::from(destination) & (1 << kind) != 0;
        (source == 0 && flags & !2 == 0).then_some(found != (flags & 2 != 0))
    }

    /// `struct xt_iprange_mtinfo`.
    fn iprange(&self, packet: &Packet) -> Option<bool> {
        let (source_at, length) = match packet.family {
            Family::V4 => (12, 4),
            Family::V6 => (8, 16),
        };
        let flags = self.byte(64)?;
        let in_range = |address: usize, first: usize| {
            let address = packet.network.get(address..address + length)?;
            Some(self.0.get(first..first + length)? <= address && address <= self.0.get(first + 16..first + 16 + length)?)
        };
        let source = flags & 1 == 0 || in_range(source_at, 0)? != (flags & 0x10 != 0);
        let destination = flags & 2 == 0 || in_range(source_at + length, 32)? != (flags & 0x20 != 0);
        Some(source && destination)
    }
}

/// The port at an offset of the transport header.
fn port_at(packet: &Packet, offset: usize) -> Option<u16> {
    Some(u16::from_be_bytes(packet.transport.get(offset..offset + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::packet::Flow;

    /// `struct xt_tcp` and `xt_udp` of older iptables-nft; newer ones write nf_tables expressions.
    #[test]
    fn ports_and_flags_of_tcp_and_udp_are_compared() {
        let [source, destination] = ["10.0.0.1", "10.0.0.2"].map(|text| text.parse().expect("ip"));
        let packet = |protocol| Packet::new(&Flow { source, destination, protocol, port: 80 });
        let info = |last: u16, rest: &[u8]| {
            let ports = [0, u16::MAX, 80, last].map(u16::to_ne_bytes).concat();
            [ports.as_slice(), rest].concat()
        };
        for (last, rest, result) in [
            (80, [0, 0, 0, 0], Some(true)),
            (80, [0, 0, 0, 2], Some(false)),
            (79, [0, 0, 0, 2], Some(true)),
            (79, [0, 0, 0, 0], Some(false)),
            // SYN of SYN and ACK; ACK; not ACK.
            (90, [0, 0x12, 0x02, 0], Some(true)),
            (90, [0, 0x12, 0x10, 0], Some(false)),
            (90, [0, 0x12, 0x10, 4], Some(true)),
            // A TCP option.
            (90, [2, 0, 0, 0], None),
            (79, [2, 0, 0, 0], Some(false)),
        ] {
            let bytes = info(last, &rest);
            assert_eq!(Info(&bytes).tcp(&packet(TCP)), result, "{last} {rest:?}");
            assert_eq!(Info(&bytes).tcp(&packet(UDP)), Some(false));
        }
        assert_eq!(Info(&info(80, &[0])).ports(&packet(UDP), UDP, 8), Some(true));
        assert_eq!(Info(&info(80, &[1])).ports(&packet(UDP), UDP, 8), Some(false));
        assert_eq!(Info(&[]).tcp(&packet(TCP)), None);
    }
}
