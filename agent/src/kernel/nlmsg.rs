//! Encodes and decodes netlink messages: a header, a fixed body, attributes.
//!
//! Layout: `linux/netlink.h`. Numbers are in the host's byte order unless an attribute says otherwise.
//!
//! Decoding uses `netlink-packet-core`'s headers, without copying. Encoding is for peers' entries ([`super::peer_messages`]),
//! into a reused buffer, and for a few queries. All other requests are values of `netlink-packet-route`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLA_HEADER_SIZE, NLA_TYPE_MASK, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, Parseable};

use crate::model::Mac;

/// Length of a message's header, `struct nlmsghdr`.
const NLMSG_HDRLEN: usize = 16;

/// A message that is being written at the end of a buffer.
#[derive(Debug)]
pub struct Message<'a> {
    buffer: &'a mut Vec<u8>,
    start: usize,
}

impl<'a> Message<'a> {
    /// Begins a request: kind (`RTM_...`), flags (`NLM_F_REQUEST` is added) and sequence number.
    pub fn begin(buffer: &'a mut Vec<u8>, kind: u16, flags: u16, sequence: u32) -> Message<'a> {
        let start = buffer.len();
        let mut header = [0; NLMSG_HDRLEN];
        header[4..6].copy_from_slice(&kind.to_ne_bytes());
        header[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        header[8..12].copy_from_slice(&sequence.to_ne_bytes());
        buffer.extend_from_slice(&header);
        Message { buffer, start }
    }

    /// Appends the fixed body, or a part of it.
    pub fn body(&mut self, bytes: &[u8]) -> &mut Self {
        self.buffer.extend_from_slice(bytes);
        self
    }

    /// Appends an attribute.
    pub fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(NLA_HEADER_SIZE + value.len()).unwrap_or(u16::MAX);
        let [[a, b], [c, d]] = [length.to_ne_bytes(), kind.to_ne_bytes()];
        self.buffer.extend_from_slice(&[a, b, c, d]);
        self.buffer.extend_from_slice(value);
        self.pad();
        self
    }

    /// Appends a 32-bit attribute.
    pub fn put_u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// Appends an address attribute: 4 or 16 bytes.
    pub fn put_address(&mut self, kind: u16, value: IpAddr) -> &mut Self {
        match value {
            IpAddr::V4(a) => self.put(kind, &a.octets()),
            IpAddr::V6(a) => self.put(kind, &a.octets()),
        }
    }

    fn pad(&mut self) {
        self.buffer.resize(self.start + nlmsg_align(self.buffer.len() - self.start), 0);
    }
}

impl Drop for Message<'_> {
    /// Completes the message: its length is known only now.
    fn drop(&mut self) {
        self.pad();
        let length = u32::try_from(self.buffer.len() - self.start).unwrap_or(u32::MAX);
        self.buffer[self.start..self.start + 4].copy_from_slice(&length.to_ne_bytes());
    }
}

/// Iterates over received messages; ends at the first truncated one.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (NetlinkHeader, &[u8])> {
    std::iter::from_fn(move || {
        let message = NetlinkBuffer::new_checked(bytes).ok()?;
        let header = NetlinkHeader::parse(&message).ok()?;
        let length = usize::try_from(header.length).ok()?;
        bytes = bytes.get(nlmsg_align(length)..).unwrap_or_default();
        Some((header, message.payload()))
    })
}

/// Iterates over the attributes after a fixed body of `skip` bytes, as kind and value; ends at the first truncated one. This is
/// the innermost loop of a dump of ten thousand peers: the buffers and errors of `NlasIterator` would cost a tenth of it.
pub fn attributes(body: &[u8], skip: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut bytes = body.get(nlmsg_align(skip)..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & NLA_TYPE_MASK;
        let value = bytes.get(NLA_HEADER_SIZE..length)?;
        bytes = bytes.get(nlmsg_align(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A 16-bit number at an offset.
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(offset..offset.checked_add(2)?)?.try_into().ok()?))
}

/// A 32-bit number at an offset.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset.checked_add(4)?)?.try_into().ok()?))
}

/// A text attribute, without its terminating zero; invalid UTF-8 is replaced.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// An address attribute of 4 or 16 bytes.
pub fn address(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(|b| IpAddr::V4(Ipv4Addr::from(b))),
        16 => <[u8; 16]>::try_from(value).ok().map(|b| IpAddr::V6(Ipv6Addr::from(b))),
        _ => None,
    }
}

/// A MAC attribute.
pub fn mac(value: &[u8]) -> Option<Mac> {
    value.try_into().ok().map(Mac)
}

const fn nlmsg_align(length: usize) -> usize {
    (length + 3) & !3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_messages_read_back() {
        let mut buffer = Vec::new();
        for sequence in [7, 8] {
            let mut m = Message::begin(&mut buffer, 24, 0x500, sequence);
            m.body(&[1, 2, 3, 4]).put(3, &[1, 2]).put_u32(4, 1450).put_address(17, IpAddr::V6(Ipv6Addr::LOCALHOST));
        }
        let read: Vec<_> = messages(&buffer).collect();
        assert_eq!(read.len(), 2);
        let (header, body) = read[1];
        assert_eq!((header.message_type, header.flags, header.sequence_number, header.port_number), (24, 0x501, 8, 0));
        let attrs: Vec<_> = attributes(body, 4).collect();
        assert_eq!(attrs.len(), 3);
        assert_eq!(attrs[0], (3, &[1, 2][..]));
        assert_eq!((attrs[1].0, u32_at(attrs[1].1, 0)), (4, Some(1450)));
        assert_eq!((attrs[2].0, address(attrs[2].1)), (17, Some(IpAddr::V6(Ipv6Addr::LOCALHOST))));
    }

    #[test]
    fn invalid_lengths_end_iteration() {
        let mut buffer = Vec::new();
        Message::begin(&mut buffer, 24, 0, 1).body(&[0; 12]).put_u32(1, 5);
        for end in 0..buffer.len() {
            assert_eq!(messages(&buffer[..end]).count(), 0, "{end}");
        }
        for length in [0u32, 1, 15, u32::MAX] {
            buffer[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(messages(&buffer).count(), 0, "{length}");
        }
        for bytes in [&[0u8, 0, 1, 0][..], &[3, 0, 1, 0], &[9, 0, 1, 0, 1], &[255, 255, 255, 255]] {
            assert_eq!(attributes(bytes, 0).count(), 0, "{bytes:?}");
        }
    }
}
