//! The part of a host's subnet that is left to Docker, if Docker attaches its containers to our bridge (`docs/docker.md`). Pure.

use std::net::IpAddr;

use super::family::address_value;
use super::{Cidr, Family};

/// The longest IPv6 prefix in which Docker derives a container's address from its MAC. In a longer prefix it counts from the
/// base, as we do (libnetwork, `daemon_unix.go`: `deferIPv6Alloc`).
const MAX_MAC_DERIVED_PREFIX: u8 = 80;

/// The agent allocates the lowest 2^32 addresses of such a prefix. Docker's addresses have the MAC, which begins with 02:42, in
/// the last 48 bits.
const OWN_IPV6_BITS: u32 = 32;

/// The longest IPv4 prefix of which half is still usable for both sides.
const MAX_SHARED_IPV4_PREFIX: u8 = 29;

/// Docker's part of one family's range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DockerShare {
    /// The value of Docker's `fixed-cidr` (IPv6: `fixed-cidr-v6`).
    pub fixed_cidr: Cidr,
    /// The agent allocates no address from here to the end of the range.
    pub first_address: IpAddr,
}

impl DockerShare {
    /// Docker's part of a host's range: the upper half in IPv4, all but the lowest 2^32 addresses in IPv6. `None` if the range is
    /// too small to be shared (IPv4 longer than /29, IPv6 longer than /80).
    pub fn from_range(range: Cidr) -> Option<DockerShare> {
        let family = range.family();
        let own = match family {
            Family::V4 if range.length() <= MAX_SHARED_IPV4_PREFIX => 1u128 << (family.bits() - range.length() - 1),
            Family::V6 if range.length() <= MAX_MAC_DERIVED_PREFIX => 1u128 << OWN_IPV6_BITS,
            _ => return None,
        };
        let first = family.address(address_value(range.base()) + own);
        let fixed = match family {
            Family::V4 => Cidr::containing(first, range.length() + 1)?,
            // It must contain the gateway, or Docker gives the bridge an address of its own choice.
            Family::V6 => range,
        };
        Some(DockerShare { fixed_cidr: fixed, first_address: first })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_share_excludes_lower_addresses() {
        for (range, expected) in [
            ("10.244.7.0/24", Some(("10.244.7.128/25", "10.244.7.128"))),
            ("10.244.0.0/16", Some(("10.244.128.0/17", "10.244.128.0"))),
            ("10.244.7.248/29", Some(("10.244.7.252/30", "10.244.7.252"))),
            ("10.244.7.252/30", None),
            ("fd00:10:244:51::/64", Some(("fd00:10:244:51::/64", "fd00:10:244:51:0:1::"))),
            ("fd00::/80", Some(("fd00::/80", "fd00::1:0:0"))),
            ("fd00::/81", None),
        ] {
            let share = DockerShare::from_range(range.parse().expect(range));
            let shown = share.map(|share| (share.fixed_cidr.to_string(), share.first_address.to_string()));
            assert_eq!(shown, expected.map(|(fixed, first)| (fixed.to_owned(), first.to_owned())), "{range}");
        }
    }
}
