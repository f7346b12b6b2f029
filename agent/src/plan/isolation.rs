//! Isolated networks: the two network namespaces that they contribute to, and what connects these (`docs/decisions/0042`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::family::address_value;
use crate::model::{Cidr, Family, Mac, NetworkName, PerFamily, Vni, transfer_range};

/// Where a network's entries belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// The host's network namespace. A routed network has only this.
    Host,
    /// An isolated network's own network namespace.
    Network,
}

/// What an isolated network needs besides a routed one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Isolation {
    /// Its way to the host; `None` if it has no way out.
    pub transit: Option<Transit>,
    /// The networks that it is routed to, by name.
    pub peers: Vec<PeerNetwork>,
}

/// An isolated network's number on this host, which its transfer addresses follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Transit(u16);

/// Another isolated network on this host that this one is routed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerNetwork {
    /// Its name.
    pub name: NetworkName,
    /// The name of its network namespace.
    pub namespace: String,
    /// Its VNI.
    pub vni: Vni,
    /// Its ranges.
    pub ranges: PerFamily<Cidr>,
}

/// The gateways of the routes between peer networks, which no device has: neighbour entries lead to the other end.
pub const PEER_GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 127, 254);
/// As [`PEER_GATEWAY_V4`].
pub const PEER_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd6f, 0x7665, 0x726c, 0x6179, 0, 0, 0, 0x3ffe);

impl Transit {
    /// Number of networks with a transit that a host can be in. The last pair of addresses is [`PEER_GATEWAY_V4`]'s.
    pub const COUNT: u16 = 8191;

    /// The transit with this number; `None` from [`Transit::COUNT`] on.
    pub fn new(number: u16) -> Option<Transit> {
        (number < Transit::COUNT).then_some(Transit(number))
    }

    /// The number.
    pub fn number(self) -> u16 {
        self.0
    }

    /// Address of the host's end.
    pub fn host(self, family: Family) -> IpAddr {
        transfer_address(family, 2 * u32::from(self.0))
    }

    /// Address of the network's end.
    pub fn network(self, family: Family) -> IpAddr {
        transfer_address(family, 2 * u32::from(self.0) + 1)
    }

    /// Length of the addresses' prefixes: both ends and no other address.
    pub const fn prefix_length(family: Family) -> u8 {
        family.bits() - 1
    }
}

fn transfer_address(family: Family, n: u32) -> IpAddr {
    family.address(address_value(transfer_range(family).base()) + u128::from(n))
}

/// The MAC of a peer link's end in the namespace of the network with this VNI.
pub fn peer_link_mac(vni: Vni) -> Mac {
    let [_, a, b, c] = vni.get().to_be_bytes();
    Mac([0x0a, 0x6f, 0x76, a, b, c])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfer_addresses_are_pairs_in_their_range() {
        let last = Transit::new(Transit::COUNT - 1).expect("the last one");
        let first = Transit::new(0).expect("the first one");
        let text = |address: IpAddr| address.to_string();
        assert_eq!(
            (text(first.host(Family::V4)), text(first.network(Family::V4))),
            ("169.254.64.0".into(), "169.254.64.1".into())
        );
        assert_eq!(text(last.network(Family::V4)), "169.254.127.253");
        assert_eq!(text(last.network(Family::V6)), "fd6f:7665:726c:6179::3ffd");
        assert_eq!(Transit::new(Transit::COUNT), None);
        for family in Family::ALL {
            let pair = Cidr::containing(last.network(family), Transit::prefix_length(family)).expect("a pair");
            assert!(pair.base() == last.host(family) && transfer_range(family).contains(pair.last()));
        }
        assert!(
            transfer_range(Family::V4).contains(PEER_GATEWAY_V4.into())
                && transfer_range(Family::V6).contains(PEER_GATEWAY_V6.into())
        );
    }
}
