//! Encodes and decodes nfnetlink messages. The readers check every length.
//!
//! Constants have their values and names from `linux/netlink.h`, `linux/netfilter/nfnetlink.h` and `linux/netfilter/nf_tables.h`.
//! Headers are in host byte order, numbers inside attributes in network byte order.

pub(super) use netlink_packet_core::{
    NLA_F_NESTED, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
};
use netlink_packet_core::{NLMSG_DONE, NLMSG_ERROR};

use crate::kernel::nlmsg::{self, u32_at};
use crate::kernel::route_socket::{KernelError, parse_ack};
use crate::model::Family;
use crate::plan::ruleset::Table;

/// Subsystem of nf_tables: the upper byte of each message type.
pub(super) const NFNL_SUBSYS_NFTABLES: u8 = 10;
/// Subsystem of ctnetlink.
pub(super) const NFNL_SUBSYS_CTNETLINK: u8 = 1;
/// Multicast group for all nf_tables changes in the namespace.
pub(in crate::kernel) const NFNLGRP_NFTABLES: u32 = 7;

/// `NFPROTO_UNSPEC`: any family.
pub(super) const NFPROTO_UNSPEC: u8 = 0;
/// `NFPROTO_INET`: tables for both IPv4 and IPv6.
pub(super) const NFPROTO_INET: u8 = 1;
/// `NFPROTO_IPV4`.
pub(super) const NFPROTO_IPV4: u8 = 2;
/// `NFPROTO_IPV6`.
pub(super) const NFPROTO_IPV6: u8 = 10;

/// `NFPROTO_BRIDGE`.
pub(super) const NFPROTO_BRIDGE: u8 = 7;

/// Begin and end of a transaction (`NLMSG_MIN_TYPE` and the next number; they have no subsystem).
pub(super) const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
pub(super) const NFNL_MSG_BATCH_END: u16 = 0x11;
/// The generation that a transaction is based on. The kernel refuses an outdated one (`ERESTART`).
pub(super) const NFNL_BATCH_GENID: u16 = 1;

pub(super) const NFT_MSG_NEWTABLE: u8 = 0;
pub(super) const NFT_MSG_GETTABLE: u8 = 1;
pub(super) const NFT_MSG_DELTABLE: u8 = 2;
pub(super) const NFT_MSG_NEWCHAIN: u8 = 3;
pub(super) const NFT_MSG_GETCHAIN: u8 = 4;
pub(super) const NFT_MSG_DELCHAIN: u8 = 5;
pub(super) const NFT_MSG_NEWRULE: u8 = 6;
pub(super) const NFT_MSG_GETRULE: u8 = 7;
pub(super) const NFT_MSG_DELRULE: u8 = 8;
pub(super) const NFT_MSG_NEWSET: u8 = 9;
pub(super) const NFT_MSG_GETSET: u8 = 10;
pub(super) const NFT_MSG_DELSET: u8 = 11;
pub(super) const NFT_MSG_NEWSETELEM: u8 = 12;
pub(super) const NFT_MSG_GETSETELEM: u8 = 13;
pub(super) const NFT_MSG_DELSETELEM: u8 = 14;
pub(super) const NFT_MSG_NEWGEN: u8 = 15;
pub(super) const NFT_MSG_GETGEN: u8 = 16;
pub(super) const NFT_MSG_NEWOBJ: u8 = 18;
pub(super) const NFT_MSG_GETOBJ: u8 = 19;
pub(super) const NFT_MSG_DELOBJ: u8 = 20;
pub(super) const NFT_MSG_GETFLOWTABLE: u8 = 23;

pub(super) const NFTA_GEN_ID: u16 = 1;

pub(super) const NFTA_TABLE_NAME: u16 = 1;
pub(super) const NFTA_TABLE_FLAGS: u16 = 2;

pub(super) const NFTA_CHAIN_TABLE: u16 = 1;
pub(super) const NFTA_CHAIN_NAME: u16 = 3;
pub(super) const NFTA_CHAIN_HOOK: u16 = 4;
pub(super) const NFTA_CHAIN_POLICY: u16 = 5;
pub(super) const NFTA_CHAIN_TYPE: u16 = 7;
pub(super) const NFTA_CHAIN_FLAGS: u16 = 10;
/// `NFT_CHAIN_BASE`, which is set on every base chain.
pub(super) const NFT_CHAIN_BASE: u32 = 1;

pub(super) const NFTA_HOOK_HOOKNUM: u16 = 1;
pub(super) const NFTA_HOOK_PRIORITY: u16 = 2;
pub(super) const NFTA_HOOK_DEV: u16 = 3;
pub(super) const NFTA_HOOK_DEVS: u16 = 4;

pub(super) const NFTA_RULE_TABLE: u16 = 1;
pub(super) const NFTA_RULE_CHAIN: u16 = 2;
pub(super) const NFTA_RULE_HANDLE: u16 = 3;
pub(super) const NFTA_RULE_EXPRESSIONS: u16 = 4;
pub(super) const NFTA_RULE_USERDATA: u16 = 7;

/// `NFT_OBJECT_COUNTER`.
pub(super) const NFT_OBJECT_COUNTER: u32 = 1;

/// Verdicts, `linux/netfilter.h`; also the policies of base chains.
pub(super) const NF_DROP: u32 = 0;
pub(super) const NF_ACCEPT: u32 = 1;

/// Length of `struct nfgenmsg`, after the header.
const NFGENMSG_LEN: usize = 4;

/// The message type of an nf_tables message.
pub(super) const fn nft_message_type(message: u8) -> u16 {
    message_type(NFNL_SUBSYS_NFTABLES, message)
}

/// The message type of a message in a subsystem.
pub(super) const fn message_type(subsystem: u8, message: u8) -> u16 {
    u16::from_be_bytes([subsystem, message])
}

/// A buffer of messages to send.
#[derive(Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
    /// A length field overflowed.
    overflow: bool,
}

impl Writer {
    /// Writes a message: header, `nfgenmsg` and the attributes from `body`.
    pub(super) fn message(
        &mut self,
        kind: u16,
        flags: u16,
        sequence: u32,
        family: u8,
        resource: u16,
        body: impl FnOnce(&mut Writer),
    ) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        body(self);
        match u32::try_from(self.bytes.len() - start) {
            Ok(length) => self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes()),
            Err(_) => self.overflow = true,
        }
    }

    /// Writes an attribute of raw bytes.
    pub(super) fn bytes(&mut self, kind: u16, payload: &[u8]) {
        self.attribute(kind, |writer| writer.bytes.extend_from_slice(payload));
    }

    /// Writes a NUL-terminated string attribute.
    pub(super) fn text(&mut self, kind: u16, text: &str) {
        self.attribute(kind, |writer| {
            writer.bytes.extend_from_slice(text.as_bytes());
            writer.bytes.push(0);
        });
    }

    /// Writes a 32-bit number.
    pub(super) fn u32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// Writes a 64-bit number.
    pub(super) fn u64(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// Writes a nested attribute.
    pub(super) fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Writer)) {
        self.attribute(kind | NLA_F_NESTED, body);
    }

    /// The written bytes; `None` if a length field overflowed.
    pub(super) fn finish(&self) -> Option<&[u8]> {
        (!self.overflow).then_some(&self.bytes)
    }

    fn attribute(&mut self, kind: u16, body: impl FnOnce(&mut Writer)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        body(self);
        match u16::try_from(self.bytes.len() - start) {
            Ok(length) => self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes()),
            Err(_) => self.overflow = true,
        }
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }
}

/// The contents of a received message.
pub(super) enum Payload<'a> {
    /// An acknowledgement (`errno` 0) or an error.
    Ack {
        /// Positive error number.
        errno: i32,
        /// The kernel's extended acknowledgement text, if any.
        text: Option<String>,
    },
    /// The end of a dump, with its error.
    Done {
        /// Positive error number, 0 for a complete dump.
        errno: i32,
    },
    /// An object or event of a subsystem.
    Object(Object<'a>),
    /// Anything else.
    Other,
}

/// An object or event of a subsystem.
#[derive(Clone, Copy)]
pub(super) struct Object<'a> {
    /// `NFT_MSG_*`, or a message of another subsystem.
    pub(super) kind: u8,
    /// `NFPROTO_*`.
    pub(super) family: u8,
    /// Its attributes.
    pub(super) attributes: &'a [u8],
}

/// A received message.
pub(super) struct ReceivedMessage<'a> {
    /// The sequence number of the request.
    pub(super) sequence: u32,
    /// In events: the port id of the socket that made the change.
    pub(super) port_id: u32,
    /// `NLM_F_DUMP_INTR`: the dump mixes two states.
    pub(super) interrupted: bool,
    /// The contents.
    pub(super) payload: Payload<'a>,
}

/// The messages of a datagram. Stops at the first invalid length.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = ReceivedMessage<'_>> {
    nlmsg::messages(datagram).map(|(header, body)| ReceivedMessage {
        sequence: header.sequence_number,
        port_id: header.port_number,
        interrupted: header.flags & NLM_F_DUMP_INTR != 0,
        payload: parse_payload(header.message_type, body),
    })
}

fn parse_payload(kind: u16, payload: &[u8]) -> Payload<'_> {
    match kind {
        NLMSG_ERROR => match parse_ack(payload) {
            Ok(()) => Payload::Ack { errno: 0, text: None },
            Err(KernelError { errno, detail }) => Payload::Ack { errno, text: Some(detail).filter(|text| !text.is_empty()) },
        },
        NLMSG_DONE => Payload::Done { errno: u32_at(payload, 0).map_or(0, |code| code.cast_signed().saturating_neg()) },
        kind => match (kind.to_be_bytes(), payload.get(NFGENMSG_LEN..)) {
            // Begin and end of a transaction have no subsystem.
            ([1..=u8::MAX, kind], Some(attributes)) => Payload::Object(Object { kind, family: payload[0], attributes }),
            _ => Payload::Other,
        },
    }
}

/// The attributes in a buffer, as type and payload. Stops at the first invalid length.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    nlmsg::attributes(bytes, 0)
}

/// The first attribute of that type.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| *k == kind).map(|(_, payload)| payload)
}

/// The string up to its terminating zero.
pub(super) fn strip_nul(payload: &[u8]) -> &[u8] {
    payload.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The 32-bit number in an attribute's payload.
pub(super) fn be32(payload: &[u8]) -> Option<u32> {
    payload.try_into().ok().map(u32::from_be_bytes)
}

/// The 64-bit number in an attribute's payload.
pub(super) fn be64(payload: &[u8]) -> Option<u64> {
    payload.try_into().ok().map(u64::from_be_bytes)
}

/// The 32-bit number in the first attribute of that type.
pub(super) fn attribute_u32(bytes: &[u8], kind: u16) -> Option<u32> {
    attribute(bytes, kind).and_then(be32)
}

/// Whether a string attribute has this value.
pub(super) fn attribute_equals(attributes: &[u8], kind: u16, name: &str) -> bool {
    attribute(attributes, kind).is_some_and(|value| strip_nul(value) == name.as_bytes())
}

/// The nf_tables family of a table of one address family.
pub(super) const fn protocol_number(family: Family) -> u8 {
    match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    }
}

/// The address family of an nf_tables family; `None` for inet, bridge and unknown ones.
pub(super) const fn protocol_family(number: u8) -> Option<Family> {
    match number {
        NFPROTO_IPV4 => Some(Family::V4),
        NFPROTO_IPV6 => Some(Family::V6),
        _ => None,
    }
}

/// The nf_tables family of one of our tables.
pub(super) const fn table_family(table: Table) -> u8 {
    match table {
        Table::Inet => NFPROTO_INET,
        Table::Bridge => NFPROTO_BRIDGE,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::uapi::NLMSGERR_ATTR_MSG;

    #[test]
    fn written_messages_read_back() {
        let mut writer = Writer::default();
        writer.message(nft_message_type(NFT_MSG_NEWRULE), NLM_F_REQUEST, 7, NFPROTO_INET, 0, |w| {
            w.text(NFTA_RULE_TABLE, "abc");
            w.nest(NFTA_RULE_EXPRESSIONS, |w| w.u32(1, 0x0102_0304));
            w.u64(NFTA_RULE_HANDLE, 9);
        });
        writer.message(NFNL_MSG_BATCH_END, 0, 8, 0, 10, |_| {});
        let bytes = writer.finish().expect("fits");
        let read: Vec<_> = messages(bytes).collect();
        assert_eq!(read.len(), 2);
        assert_eq!((read[0].sequence, read[1].sequence), (7, 8));
        assert!(matches!(read[1].payload, Payload::Other));
        let Payload::Object(object) = read[0].payload else { panic!("no nf_tables message") };
        assert_eq!((object.kind, object.family), (NFT_MSG_NEWRULE, NFPROTO_INET));
        assert_eq!(attribute(object.attributes, NFTA_RULE_TABLE).map(strip_nul), Some(&b"abc"[..]));
        assert_eq!(attribute(object.attributes, NFTA_RULE_HANDLE).and_then(be64), Some(9));
        let nested = attribute(object.attributes, NFTA_RULE_EXPRESSIONS).expect("nested");
        assert_eq!(attribute_u32(nested, 1), Some(0x0102_0304));
    }

    #[test]
    fn oversized_attribute_fails_finish() {
        let mut writer = Writer::default();
        writer.bytes(1, &vec![0; 70_000]);
        assert!(writer.finish().is_none());
    }

    #[test]
    fn error_carries_extended_ack_text() {
        // Layout of linux/netlink.h: error, header of the refused request, attributes.
        let mut payload = (-libc::EPERM).to_ne_bytes().to_vec();
        payload.extend_from_slice(&[0; 16]);
        let mut text = Writer::default();
        text.text(NLMSGERR_ATTR_MSG, "no way");
        payload.extend_from_slice(text.finish().expect("fits"));
        match parse_payload(NLMSG_ERROR, &payload) {
            Payload::Ack { errno, text } => assert_eq!((errno, text.as_deref()), (libc::EPERM, Some("no way"))),
            _ => panic!("not an answer"),
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in messages(&bytes) {
                if let Payload::Object(object) = message.payload {
                    prop_assert!(attributes(object.attributes).count() <= bytes.len());
                }
            }
            prop_assert!(attributes(&bytes).count() <= bytes.len());
        }
    }
}
