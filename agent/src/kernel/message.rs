//! The byte form of netlink messages: a header, a fixed body, attributes. Writing into a buffer that is used again, and reading without copying.
//! Layout: `linux/netlink.h`; numbers are in the host's byte order unless an attribute says otherwise.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::Mac;

/// Length of `struct nlmsghdr` in bytes.
pub const HEADER: usize = 16;
/// Length of `struct nlattr` in bytes.
const ATTRIBUTE: usize = 4;
/// The type bits of an attribute's kind, without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const KIND_MASK: u16 = 0x3fff;
const NLA_F_NESTED: u16 = 0x8000;

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
        let flags = flags | flag(libc::NLM_F_REQUEST);
        buffer.extend_from_slice(&[0; 4]);
        buffer.extend_from_slice(&kind.to_ne_bytes());
        buffer.extend_from_slice(&flags.to_ne_bytes());
        buffer.extend_from_slice(&sequence.to_ne_bytes());
        buffer.extend_from_slice(&[0; 4]);
        Message { buffer, start }
    }

    /// Appends the fixed body, or a part of it.
    pub fn body(&mut self, bytes: &[u8]) -> &mut Self {
        self.buffer.extend_from_slice(bytes);
        self
    }

    /// Appends an attribute.
    pub fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(ATTRIBUTE + value.len()).unwrap_or(u16::MAX);
        self.buffer.extend_from_slice(&length.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(value);
        self.pad();
        self
    }

    /// Appends a 32-bit attribute.
    pub fn put_u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// Appends a text attribute with its closing zero.
    pub fn put_text(&mut self, kind: u16, value: &str) -> &mut Self {
        let length = u16::try_from(ATTRIBUTE + value.len() + 1).unwrap_or(u16::MAX);
        self.buffer.extend_from_slice(&length.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(value.as_bytes());
        self.buffer.push(0);
        self.pad();
        self
    }

    /// Appends an address attribute: 4 or 16 bytes.
    pub fn put_address(&mut self, kind: u16, value: IpAddr) -> &mut Self {
        match value {
            IpAddr::V4(a) => self.put(kind, &a.octets()),
            IpAddr::V6(a) => self.put(kind, &a.octets()),
        }
    }

    /// Appends an attribute that holds what `inner` writes.
    pub fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.buffer.len();
        self.buffer.extend_from_slice(&[0; 2]);
        self.buffer.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        inner(self);
        let length = u16::try_from(self.buffer.len() - start).unwrap_or(u16::MAX);
        self.buffer[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    fn pad(&mut self) {
        while !(self.buffer.len() - self.start).is_multiple_of(4) {
            self.buffer.push(0);
        }
    }
}

impl Drop for Message<'_> {
    /// A message is complete when it goes out of scope: its length is known then.
    fn drop(&mut self) {
        self.pad();
        let length = u32::try_from(self.buffer.len() - self.start).unwrap_or(u32::MAX);
        self.buffer[self.start..self.start + 4].copy_from_slice(&length.to_ne_bytes());
    }
}

/// A header of a message that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// `RTM_...` or `NLMSG_...`.
    pub kind: u16,
    /// `NLM_F_...`.
    pub flags: u16,
    /// The sequence number of the request that it answers.
    pub sequence: u32,
    /// The port id of the socket by which the change was asked for; 0 where the kernel does not say.
    pub port: u32,
}

/// The messages in what was received; ends at the first one that is cut off.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (Header, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let body = bytes.get(HEADER..length)?;
        let header =
            Header { kind: u16_at(bytes, 4)?, flags: u16_at(bytes, 6)?, sequence: u32_at(bytes, 8)?, port: u32_at(bytes, 12)? };
        bytes = bytes.get(align(length)..).unwrap_or_default();
        Some((header, body))
    })
}

/// The attributes behind a fixed body of `skip` bytes, as kind and value; ends at the first one that is cut off.
pub fn attributes(body: &[u8], skip: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut bytes = body.get(align(skip)..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & KIND_MASK;
        let value = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(align(length)..).unwrap_or_default();
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

/// A text attribute, without its closing zero; what is not UTF-8 is replaced.
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

/// A flag or message number of `libc`, which has them in several integer types, as the 16 bits of the header.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "NLM_F_* and RTM_* fit 16 bits by the header's layout"
)]
pub const fn flag(value: libc::c_int) -> u16 {
    value as u16
}

const fn align(length: usize) -> usize {
    (length + 3) & !3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut buffer = Vec::new();
        for sequence in [7, 8] {
            let mut m = Message::begin(&mut buffer, 24, 0x500, sequence);
            m.body(&[1, 2, 3, 4]).put_text(3, "ab").put_u32(4, 1450);
            m.nest(18, |m| {
                m.put_text(1, "vxlan").nest(2, |m| {
                    m.put_address(17, IpAddr::V6(Ipv6Addr::LOCALHOST));
                });
            });
        }
        let read: Vec<_> = messages(&buffer).collect();
        assert_eq!(read.len(), 2);
        let (header, body) = read[1];
        assert_eq!(header, Header { kind: 24, flags: 0x501, sequence: 8, port: 0 });
        let attrs: Vec<_> = attributes(body, 4).collect();
        assert_eq!(attrs.len(), 3);
        assert_eq!((attrs[0].0, text(attrs[0].1).as_str()), (3, "ab"));
        assert_eq!((attrs[1].0, u32_at(attrs[1].1, 0)), (4, Some(1450)));
        let inner: Vec<_> = attributes(attrs[2].1, 0).collect();
        assert_eq!(text(inner[0].1), "vxlan");
        let innermost: Vec<_> = attributes(inner[1].1, 0).collect();
        assert_eq!(address(innermost[0].1), Some(IpAddr::V6(Ipv6Addr::LOCALHOST)));
    }

    #[test]
    fn cut_off_and_hostile_lengths_end_the_reading() {
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
