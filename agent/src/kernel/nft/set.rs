//! Encodes and decodes the sets and maps of our tables, and their elements.
//!
//! A key of several fields is their concatenation, each padded to four bytes. Sets without ranges are hash tables in the kernel:
//! the cost of adding an element does not depend on their number.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::codec::{self, NLM_F_CREATE, Object, Writer};
use super::expr::NFTA_DATA_VALUE;
use super::nfnl_socket::{NfnlSocket, Transaction};
use crate::model::{Family, Mac};
use crate::plan::ruleset::{Element, SetFieldType, SetName, SetValue, TABLE, Table};
use crate::plan::{Key, OpError, State, Value};

pub(super) const NFTA_SET_TABLE: u16 = 1;
pub(super) const NFTA_SET_NAME: u16 = 2;
pub(super) const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DATA_TYPE: u16 = 6;
const NFTA_SET_DATA_LEN: u16 = 7;
const NFTA_SET_DESC: u16 = 9;
const NFTA_SET_ID: u16 = 10;
const NFTA_SET_TIMEOUT: u16 = 11;
const NFTA_SET_USERDATA: u16 = 13;
const NFTA_SET_EXPR: u16 = 17;
const NFTA_SET_EXPRESSIONS: u16 = 18;
const NFTA_SET_DESC_CONCAT: u16 = 2;
const NFTA_SET_FIELD_LEN: u16 = 1;
pub(super) const NFT_SET_INTERVAL: u32 = 0x4;
const NFT_SET_MAP: u32 = 0x8;
pub(super) const NFT_SET_CONCAT: u32 = 0x80;

pub(super) const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
pub(super) const NFTA_SET_ELEM_LIST_SET: u16 = 2;
pub(super) const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
pub(super) const NFTA_SET_ELEM_KEY: u16 = 1;
pub(super) const NFTA_SET_ELEM_DATA: u16 = 2;
pub(super) const NFTA_SET_ELEM_FLAGS: u16 = 3;
const NFTA_SET_ELEM_TIMEOUT: u16 = 4;
pub(super) const NFTA_SET_ELEM_KEY_END: u16 = 10;
/// `NFT_SET_ELEM_INTERVAL_END`: the first value after an interval.
pub(super) const NFT_SET_ELEM_INTERVAL_END: u32 = 1;

/// Elements per message. The element list is one attribute of less than 64 KiB, and the longest element has some 90 bytes.
pub(super) const ELEMENTS_PER_MESSAGE: usize = 500;

/// Bits per type number in the type number of a concatenation: `TYPE_BITS` in nftables' `include/datatype.h`, which also defines
/// the type numbers. The kernel only stores the number, for programs that list the set.
const TYPE_BITS: u32 = 6;

/// User data for programs that list the set: `NFTNL_UDATA_SET_KEYBYTEORDER` (libnftnl's `include/libnftnl/udata.h`), its length,
/// and nftables' `BYTEORDER_HOST_ENDIAN` in host byte order.
const HOST_ENDIAN_USERDATA: [u8; 6] = {
    let [a, b, c, d] = 1_u32.to_ne_bytes();
    [0, 4, a, b, c, d]
};

/// Writes the message that creates a set.
pub(super) fn add_set(transaction: &mut Transaction, set: SetName, id: u32) {
    transaction.push_message(codec::NFT_MSG_NEWSET, NLM_F_CREATE, codec::table_family(set.table()), |w| {
        w.text(NFTA_SET_TABLE, TABLE);
        w.text(NFTA_SET_NAME, &set.name());
        w.u32(NFTA_SET_FLAGS, set_flags(set));
        w.u32(NFTA_SET_KEY_TYPE, type_id(&set.key()));
        w.u32(NFTA_SET_KEY_LEN, encoded_length(&set.key()));
        if !set.data().is_empty() {
            w.u32(NFTA_SET_DATA_TYPE, type_id(&set.data()));
            w.u32(NFTA_SET_DATA_LEN, encoded_length(&set.data()));
        }
        if set.has_ranges() {
            w.nest(NFTA_SET_DESC, |w| {
                w.nest(NFTA_SET_DESC_CONCAT, |w| {
                    for field in set.key() {
                        w.nest(NFTA_LIST_ELEM, |w| w.u32(NFTA_SET_FIELD_LEN, u32::try_from(field.length()).unwrap_or(0)));
                    }
                });
            });
        }
        w.u32(NFTA_SET_ID, id);
        if set.key() == [SetFieldType::Interface] {
            // Without this, `nft` lists interface names reversed.
            w.bytes(NFTA_SET_USERDATA, &HOST_ENDIAN_USERDATA);
        }
    });
}

/// Reads the sets of a table: our sets, and descriptions of foreign ones.
pub(super) fn read_sets(socket: &mut NfnlSocket, table: Table) -> Result<(Vec<SetName>, Vec<String>), OpError> {
    let (mut sets, mut foreign) = (Vec::new(), Vec::new());
    let of_table = |w: &mut Writer| w.text(NFTA_SET_TABLE, TABLE);
    socket.dump(codec::NFT_MSG_GETSET, codec::table_family(table), of_table, |object| {
        if !codec::attribute_equals(object.attributes, NFTA_SET_TABLE, TABLE) {
            return;
        }
        let name = codec::attribute(object.attributes, NFTA_SET_NAME).map(codec::strip_nul).unwrap_or_default();
        match SetName::from_name(table, name) {
            Some(set) if matches_definition(object.attributes, set) => sets.push(set),
            Some(set) => foreign.push(format!("set {} with another definition", set.name())),
            None => foreign.push(format!("set {}", String::from_utf8_lossy(name))),
        }
    })?;
    sets.sort();
    Ok((sets, foreign))
}

fn matches_definition(attributes: &[u8], set: SetName) -> bool {
    let number = |kind| codec::attribute_u32(attributes, kind).unwrap_or(0);
    let data = set.data();
    number(NFTA_SET_FLAGS) == set_flags(set)
        && number(NFTA_SET_KEY_TYPE) == type_id(&set.key())
        && number(NFTA_SET_KEY_LEN) == encoded_length(&set.key())
        && number(NFTA_SET_DATA_TYPE) == type_id(&data)
        && number(NFTA_SET_DATA_LEN) == encoded_length(&data)
        && [NFTA_SET_TIMEOUT, NFTA_SET_EXPR, NFTA_SET_EXPRESSIONS]
            .iter()
            .all(|kind| codec::attribute(attributes, *kind).is_none())
}

/// Writes the message that adds elements to a set, or deletes them.
pub(super) fn change_elements(
    transaction: &mut Transaction,
    message: u8,
    set: SetName,
    elements: &[(&Element, Option<SocketAddr>)],
) {
    let flags = if message == codec::NFT_MSG_NEWSETELEM { NLM_F_CREATE } else { 0 };
    transaction.push_message(message, flags, codec::table_family(set.table()), |w| {
        w.text(NFTA_SET_ELEM_LIST_TABLE, TABLE);
        w.text(NFTA_SET_ELEM_LIST_SET, &set.name());
        w.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |w| {
            for (element, target) in elements {
                w.nest(NFTA_LIST_ELEM, |w| {
                    let value = |w: &mut Writer, kind, data: &[SetValue]| {
                        w.nest(kind, |w| w.bytes(NFTA_DATA_VALUE, &encode(data)));
                    };
                    value(w, NFTA_SET_ELEM_KEY, &element.key());
                    if let Some(end) = element.key_end() {
                        value(w, NFTA_SET_ELEM_KEY_END, &end);
                    }
                    if let (Some(target), codec::NFT_MSG_NEWSETELEM) = (target, message) {
                        value(w, NFTA_SET_ELEM_DATA, &[SetValue::Address(target.ip()), SetValue::Port(target.port())]);
                    }
                });
            }
        });
    });
}

/// Reads the elements of a set into a state. Returns false if the set has foreign elements.
pub(super) fn read_elements(socket: &mut NfnlSocket, set: SetName, state: &mut State) -> Result<bool, OpError> {
    let mut all_ours = true;
    let of_set = |w: &mut Writer| {
        w.text(NFTA_SET_ELEM_LIST_TABLE, TABLE);
        w.text(NFTA_SET_ELEM_LIST_SET, &set.name());
    };
    socket.dump(codec::NFT_MSG_GETSETELEM, codec::table_family(set.table()), of_set, |object: Object<'_>| {
        let list = codec::attribute(object.attributes, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
        for (_, attributes) in codec::attributes(list) {
            match read_element(set, attributes) {
                Some((element, target)) => {
                    state.insert(Key::Element(element), Value::Element(target.map(Box::new)));
                }
                None => all_ours = false,
            }
        }
    })?;
    Ok(all_ours)
}

fn read_element(set: SetName, attributes: &[u8]) -> Option<(Element, Option<SocketAddr>)> {
    let value = |kind| codec::attribute(attributes, kind).and_then(|nested| codec::attribute(nested, NFTA_DATA_VALUE));
    let plain = codec::attribute_u32(attributes, NFTA_SET_ELEM_FLAGS).unwrap_or(0) == 0
        && codec::attribute(attributes, NFTA_SET_ELEM_TIMEOUT).is_none();
    let key = decode(&set.key(), value(NFTA_SET_ELEM_KEY)?)?;
    let end = match value(NFTA_SET_ELEM_KEY_END) {
        Some(end) => Some(decode(&set.key(), end)?),
        None => None,
    };
    let target = match value(NFTA_SET_ELEM_DATA) {
        Some(data) => match decode(&set.data(), data)?.as_slice() {
            [SetValue::Address(address), SetValue::Port(port)] => Some(SocketAddr::new(*address, *port)),
            _ => return None,
        },
        None => None,
    };
    let element = Element::from_key(set, key, end)?;
    (plain && target.is_some() != set.data().is_empty()).then_some((element, target))
}

fn set_flags(set: SetName) -> u32 {
    let map = if set.data().is_empty() { 0 } else { NFT_SET_MAP };
    map | if set.has_ranges() { NFT_SET_INTERVAL | NFT_SET_CONCAT } else { 0 }
}

fn type_id(fields: &[SetFieldType]) -> u32 {
    fields.iter().fold(0, |number, field| {
        number << TYPE_BITS
            | match field {
                SetFieldType::Address(Family::V4) => 7,
                SetFieldType::Address(Family::V6) => 8,
                SetFieldType::Mac => 9,
                SetFieldType::Protocol => 12,
                SetFieldType::Port => 13,
                SetFieldType::Interface => 41,
            }
    })
}

fn encoded_length(fields: &[SetFieldType]) -> u32 {
    let bytes: usize = fields.iter().map(|field| field.length().next_multiple_of(4)).sum();
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

fn encode(data: &[SetValue]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(64);
    for datum in data {
        match datum {
            SetValue::Address(IpAddr::V4(address)) => bytes.extend_from_slice(&address.octets()),
            SetValue::Address(IpAddr::V6(address)) => bytes.extend_from_slice(&address.octets()),
            SetValue::Mac(mac) => bytes.extend_from_slice(&mac.0),
            SetValue::Protocol(number) => bytes.push(*number),
            SetValue::Port(port) => bytes.extend_from_slice(&port.to_be_bytes()),
            SetValue::Interface(name) => {
                let mut padded = [0; super::expr::IFNAMSIZ];
                for (to, from) in padded.iter_mut().zip(name.as_bytes()) {
                    *to = *from;
                }
                bytes.extend_from_slice(&padded);
            }
        }
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

fn decode(fields: &[SetFieldType], mut bytes: &[u8]) -> Option<Vec<SetValue>> {
    let mut data = Vec::with_capacity(fields.len());
    if bytes.len() != encoded_length(fields) as usize {
        return None;
    }
    for field in fields {
        let value = bytes.get(..field.length())?;
        bytes = bytes.get(field.length().next_multiple_of(4)..)?;
        data.push(match field {
            SetFieldType::Address(Family::V4) => SetValue::Address(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?).into()),
            SetFieldType::Address(Family::V6) => SetValue::Address(Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into()),
            SetFieldType::Mac => SetValue::Mac(Mac(value.try_into().ok()?)),
            SetFieldType::Protocol => SetValue::Protocol(*value.first()?),
            SetFieldType::Port => SetValue::Port(u16::from_be_bytes(value.try_into().ok()?)),
            SetFieldType::Interface => SetValue::Interface(std::str::from_utf8(codec::strip_nul(value)).ok()?.to_owned()),
        });
    }
    Some(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Transport;
    use crate::plan::ruleset::PeerPair;

    #[test]
    fn element_keys_round_trip() {
        let ip = |text: &str| text.parse::<IpAddr>().expect(text);
        for family in Family::ALL {
            let (a, b, c) = match family {
                Family::V4 => (ip("192.0.2.1"), ip("10.1.0.0"), ip("10.1.3.255")),
                Family::V6 => (ip("2001:db8::1"), ip("fd00:1::"), ip("fd00:1::ffff")),
            };
            for element in [
                Element::Peer(PeerPair::new(a, b).expect("one family")),
                Element::Range(Box::new((a, b, c))),
                Element::Host(a),
                Element::Port(family, Transport::Sctp, 65535),
                Element::Bound(a, Transport::Udp, 1),
                Element::Source(Box::new(("ove0123456789a".to_owned(), Mac([2, 3, 4, 5, 6, 7]), b))),
                Element::Unchecked("fifteen.bytes.x".into()),
            ] {
                let set = element.set();
                assert_eq!(SetName::from_name(set.table(), set.name().as_bytes()), Some(set));
                let fields = set.key();
                let bytes = encode(&element.key());
                assert_eq!(u32::try_from(bytes.len()).expect("short"), encoded_length(&fields));
                let end = element.key_end().map(|end| decode(&fields, &encode(&end)).expect("an end"));
                assert_eq!(Element::from_key(set, decode(&fields, &bytes).expect("a key"), end), Some(element));
                assert_eq!(decode(&fields, &bytes[1..]), None);
            }
        }
        assert!(encoded_length(&SetName::Source(Family::V6).key()) <= 64, "NFT_DATA_VALUE_MAXLEN");
    }
}
