//! The range of the addresses between isolated networks and their hosts, which no network may use.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Cidr, Family};

/// 169.254.64.0/18 and fd6f:7665:726c:6179::/64.
const V4: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 0);
const V6: Ipv6Addr = Ipv6Addr::new(0xfd6f, 0x7665, 0x726c, 0x6179, 0, 0, 0, 0);

/// The range of all transfer addresses.
pub fn transfer_range(family: Family) -> Cidr {
    let (address, length) = match family {
        Family::V4 => (IpAddr::from(V4), 18),
        Family::V6 => (IpAddr::from(V6), 64),
    };
    Cidr::containing(address, length).unwrap_or_else(|| Cidr::host(address))
}
