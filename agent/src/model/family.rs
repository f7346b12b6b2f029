//! Address families as values, so that IPv4 and IPv6 use the same code.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families, in the order of processing.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Family {
        if address.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// Address length in bits: 32 or 128.
    pub const fn bits(self) -> u8 {
        match self {
            Family::V4 => 32,
            Family::V6 => 128,
        }
    }

    /// The unspecified address of this family (`0.0.0.0`, `::`).
    pub const fn unspecified(self) -> IpAddr {
        match self {
            Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }

    /// An address of this family from its value as an integer (IPv4: the low 32 bits).
    #[expect(clippy::cast_possible_truncation, reason = "an IPv4 address is the low 32 bits by definition")]
    pub const fn address(self, value: u128) -> IpAddr {
        match self {
            Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(value as u32)),
            Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(value)),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// The value of an address as an integer (IPv4: 0 to 2^32-1).
pub const fn address_value(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => a.to_bits() as u128,
        IpAddr::V6(a) => a.to_bits(),
    }
}

/// One optional value per family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PerFamily<T> {
    /// The IPv4 value.
    #[serde(skip_serializing_if = "Option::is_none", default = "Option::default")]
    pub v4: Option<T>,
    /// The IPv6 value.
    #[serde(skip_serializing_if = "Option::is_none", default = "Option::default")]
    pub v6: Option<T>,
}

impl<T> Default for PerFamily<T> {
    fn default() -> Self {
        PerFamily { v4: None, v6: None }
    }
}

impl<T> PerFamily<T> {
    /// The value of one family.
    pub fn get(&self, family: Family) -> Option<&T> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    /// Mutable access to one family's value.
    pub fn slot(&mut self, family: Family) -> &mut Option<T> {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// The present values, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = (Family, &T)> {
        Family::ALL.into_iter().filter_map(|family| self.get(family).map(|value| (family, value)))
    }

    /// The families that have a value.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        self.iter().map(|(family, _)| family)
    }

    /// Whether neither family has a value.
    pub fn is_empty(&self) -> bool {
        self.v4.is_none() && self.v6.is_none()
    }

    /// Maps both families' values; an absent value stays absent.
    pub fn map<U>(&self, mut f: impl FnMut(Family, &T) -> U) -> PerFamily<U> {
        PerFamily { v4: self.v4.as_ref().map(|v| f(Family::V4, v)), v6: self.v6.as_ref().map(|v| f(Family::V6, v)) }
    }
}

impl<T> FromIterator<(Family, T)> for PerFamily<T> {
    fn from_iter<I: IntoIterator<Item = (Family, T)>>(items: I) -> Self {
        let mut all = PerFamily::default();
        for (family, value) in items {
            *all.slot(family) = Some(value);
        }
        all
    }
}

/// The present values, IPv4 first, separated by a space.
impl<T: fmt::Display> fmt::Display for PerFamily<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (_, value)) in self.iter().enumerate() {
            write!(f, "{}{value}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

/// An address range in CIDR form. Its host bits are always zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr(IpNetwork);

/// Error of parsing a [`Cidr`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    /// The text does not have the format `ADDRESS/LENGTH`.
    #[error("`{text}` is not a CIDR: expected ADDRESS/LENGTH such as 10.244.0.0/16 or fd00:10:244::/56")]
    Syntax {
        /// The rejected text.
        text: String,
    },
    /// Bits after the prefix length are set.
    #[error("`{text}` has host bits set: the network of that length is {masked}")]
    HostBits {
        /// The rejected text.
        text: String,
        /// The same range with its host bits cleared.
        masked: Cidr,
    },
}

impl Cidr {
    /// The range of prefix length `length` that contains `address`; `None` if the length exceeds the family's.
    pub fn containing(address: IpAddr, length: u8) -> Option<Cidr> {
        let family = Family::of(address);
        if length > family.bits() {
            return None;
        }
        let base = family.address(address_value(address) & mask(family, length));
        IpNetwork::new(base, length).ok().map(Cidr)
    }

    /// All addresses of a family: the destination of a default route.
    pub fn all(family: Family) -> Cidr {
        let unspecified = family.unspecified();
        Cidr::containing(unspecified, 0).unwrap_or_else(|| Cidr::host(unspecified))
    }

    /// The range of one address.
    pub fn host(address: IpAddr) -> Cidr {
        Cidr(IpNetwork::from(address))
    }

    /// The address family.
    pub fn family(self) -> Family {
        Family::of(self.base())
    }

    /// The lowest address.
    pub fn base(self) -> IpAddr {
        self.0.ip()
    }

    /// The highest address.
    pub fn last(self) -> IpAddr {
        let family = self.family();
        family.address(address_value(self.base()) | (family_max(family) & !mask(family, self.length())))
    }

    /// The prefix length in bits.
    pub fn length(self) -> u8 {
        self.0.prefix()
    }

    /// The address at `offset` from the base; `None` outside the range.
    pub fn nth(self, offset: u128) -> Option<IpAddr> {
        let value = address_value(self.base()).checked_add(offset)?;
        (value <= address_value(self.last())).then(|| self.family().address(value))
    }

    /// Whether the address lies in the range.
    pub fn contains(self, address: IpAddr) -> bool {
        Family::of(address) == self.family()
            && address_value(address) & mask(self.family(), self.length()) == address_value(self.base())
    }

    /// Whether the other range lies entirely in this one.
    pub fn covers(self, other: Cidr) -> bool {
        other.length() >= self.length() && self.contains(other.base())
    }

    /// Whether both ranges share an address (CIDRs are nested or disjoint).
    pub fn overlaps(self, other: Cidr) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// The same value in the type of the `ipnetwork` crate.
    pub fn network(self) -> IpNetwork {
        self.0
    }
}

const fn family_max(family: Family) -> u128 {
    match family {
        Family::V4 => u32::MAX as u128,
        Family::V6 => u128::MAX,
    }
}

/// The network mask of `length` bits as an integer.
const fn mask(family: Family, length: u8) -> u128 {
    let max = family_max(family);
    if length == 0 { 0 } else { max & (max << (family.bits() - length)) }
}

impl Ord for Cidr {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.family(), address_value(self.base()), self.length()).cmp(&(
            other.family(),
            address_value(other.base()),
            other.length(),
        ))
    }
}

impl PartialOrd for Cidr {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let syntax = || CidrError::Syntax { text: super::text::printable(text) };
        let (address, length) = text.split_once('/').ok_or_else(syntax)?;
        let address: IpAddr = address.parse().map_err(|_| syntax())?;
        let plain_digits = !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit());
        let length: u8 = if plain_digits { length.parse().map_err(|_| syntax())? } else { return Err(syntax()) };
        let masked = Cidr::containing(address, length).ok_or_else(syntax)?;
        if masked.base() == address { Ok(masked) } else { Err(CidrError::HostBits { text: text.to_owned(), masked }) }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Cidr {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().expect(text)
    }

    #[test]
    fn host_bits_are_rejected_with_remedy() {
        let error = "10.244.1.7/16".parse::<Cidr>().expect_err("host bits");
        assert_eq!(error.to_string(), "`10.244.1.7/16` has host bits set: the network of that length is 10.244.0.0/16");
    }

    #[test]
    fn malformed_cidr_is_rejected() {
        for text in ["", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/+8", "fd00::/129", "x/8", "10.0.0.0/8/8", "/8"] {
            assert!(matches!(text.parse::<Cidr>(), Err(CidrError::Syntax { .. })), "{text}");
        }
    }

    #[test]
    fn per_family_display_joins_values() {
        let mut addresses: PerFamily<IpAddr> = PerFamily::default();
        assert_eq!(addresses.to_string(), "");
        addresses.v6 = Some(Ipv6Addr::LOCALHOST.into());
        assert_eq!(addresses.to_string(), "::1");
        addresses.v4 = Some(Ipv4Addr::LOCALHOST.into());
        assert_eq!(addresses.to_string(), "127.0.0.1 ::1");
    }

    #[test]
    fn cidr_bounds_are_computed() {
        assert_eq!(cidr("10.1.0.0/16").last().to_string(), "10.1.255.255");
        assert_eq!(cidr("0.0.0.0/0").last().to_string(), "255.255.255.255");
        assert_eq!(cidr("fd00::/126").last().to_string(), "fd00::3");
        assert_eq!(cidr("10.1.0.0/30").nth(3).map(|a| a.to_string()).as_deref(), Some("10.1.0.3"));
        assert_eq!(cidr("10.1.0.0/30").nth(4), None);
    }

    #[test]
    fn nested_cidrs_cover_and_overlap() {
        assert!(cidr("10.0.0.0/8").covers(cidr("10.2.0.0/16")));
        assert!(!cidr("10.2.0.0/16").covers(cidr("10.0.0.0/8")));
        assert!(cidr("10.2.0.0/16").overlaps(cidr("10.0.0.0/8")));
        assert!(!cidr("10.2.0.0/16").overlaps(cidr("10.3.0.0/16")));
        assert!(!cidr("::/0").overlaps(cidr("0.0.0.0/0")));
    }
}
