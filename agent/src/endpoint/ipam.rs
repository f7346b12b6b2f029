//! The addresses of one family of the host's subnet: which are in use, and which comes next. Pure: no clock, no files, no tasks.
//!
//! Addresses are handed out in the order of their last use: those that were never in use first, ascending from a cursor, then those that were
//! given back, the oldest first. So an address is not in other hands a moment after it was given back, while neighbours and
//! connections still remember its last owner. Memory grows with the addresses in use and given back, never with the size of the range.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::model::family::address_value;
use crate::model::{Cidr, DockerShare, Family};

/// How many addresses given back are remembered. Beyond that (only a range larger than a /16 comes there) the oldest are as good as never
/// used.
const MAX_RELEASED: usize = 65_536;

/// The allocator of one range.
#[derive(Debug, Clone)]
pub struct Ipam {
    range: Cidr,
    /// What of the range is Docker's.
    docker_share: Option<DockerShare>,
    /// The lowest and the highest address that can be handed out.
    first: u128,
    last: u128,
    used: BTreeSet<u128>,
    /// Given back and not in use since: by the order in which they were, and the same the other way round.
    released: BTreeMap<u64, u128>,
    released_at: BTreeMap<u128, u64>,
    release_count: u64,
    cursor: u128,
}

/// Why an address is not handed out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// Nothing is left.
    #[error("subnet {range} is full: {in_use} addresses in use; detach endpoints, or give the hosts larger subnets (SubnetLen)")]
    Full {
        /// The range.
        range: Cidr,
        /// How many addresses are handed out.
        in_use: usize,
    },
    /// The wished address lies elsewhere.
    #[error("address {address} is outside this host's subnet {range}")]
    Outside {
        /// The wished address.
        address: IpAddr,
        /// The range.
        range: Cidr,
    },
    /// The wished address has another use.
    #[error("address {address} is the {purpose} of subnet {range}; from {first} to {last} are for containers")]
    Reserved {
        /// The wished address.
        address: IpAddr,
        /// What it is for.
        purpose: &'static str,
        /// The range.
        range: Cidr,
        /// The lowest address that can be handed out.
        first: IpAddr,
        /// The highest one.
        last: IpAddr,
    },
    /// The wished address is of the part that is Docker's.
    #[error("address {address} is of Docker's part of subnet {range}; from {first} to {last} are for containers attached here")]
    Docker {
        /// The wished address.
        address: IpAddr,
        /// The range.
        range: Cidr,
        /// The lowest address that can be handed out.
        first: IpAddr,
        /// The highest one.
        last: IpAddr,
    },
    /// The wished address is handed out.
    #[error("address {address} is in use")]
    InUse {
        /// The wished address.
        address: IpAddr,
    },
}

impl Ipam {
    /// The allocator of a range with nothing handed out. Never handed out: the base, the gateway (base + 1), and in IPv4 the broadcast
    /// address.
    pub fn new(range: Cidr) -> Ipam {
        let first = address_value(range.base()).saturating_add(2);
        let last = match range.family() {
            Family::V4 => address_value(range.last()).saturating_sub(1),
            Family::V6 => address_value(range.last()),
        };
        Ipam {
            range,
            docker_share: None,
            first,
            last,
            used: BTreeSet::new(),
            released: BTreeMap::new(),
            released_at: BTreeMap::new(),
            release_count: 0,
            cursor: first,
        }
    }

    /// The allocator of what Docker leaves of a range; of all of it where it is too small to be shared.
    pub fn with_docker_share(range: Cidr) -> Ipam {
        let mut ipam = Ipam::new(range);
        ipam.docker_share = DockerShare::from_range(range);
        if let Some(share) = ipam.docker_share {
            ipam.last = ipam.last.min(address_value(share.first_address).saturating_sub(1));
        }
        ipam
    }

    /// What of the range is Docker's.
    pub fn docker_share(&self) -> Option<DockerShare> {
        self.docker_share
    }

    /// The range.
    pub fn range(&self) -> Cidr {
        self.range
    }

    /// The lowest address that can be handed out.
    pub fn first(&self) -> IpAddr {
        self.range.family().address(self.first)
    }

    /// The highest one.
    pub fn last(&self) -> IpAddr {
        self.range.family().address(self.last)
    }

    /// How many addresses the range can hand out.
    pub fn capacity(&self) -> u128 {
        self.last.saturating_add(1).saturating_sub(self.first)
    }

    /// How many are handed out.
    pub fn in_use(&self) -> usize {
        self.used.len()
    }

    /// Where the search for a never used address goes on; kept over a restart by [`Ipam::resume_from`].
    pub fn cursor(&self) -> IpAddr {
        self.range.family().address(self.cursor)
    }

    /// Goes on where an earlier allocator of the range stopped; an address outside the range is ignored.
    pub fn resume(&mut self, cursor: IpAddr) {
        let value = address_value(cursor);
        if Family::of(cursor) == self.range.family() && (self.first..=self.last).contains(&value) {
            self.cursor = value;
        }
    }

    /// Hands out the address that has been out of use the longest.
    pub fn allocate(&mut self) -> Result<IpAddr, IpamError> {
        let value = self.next_unused().or_else(|| self.released.values().next().copied());
        let Some(value) = value else { return Err(IpamError::Full { range: self.range, in_use: self.used.len() }) };
        self.mark_used(value);
        Ok(self.range.family().address(value))
    }

    /// Hands out this very address.
    pub fn reserve(&mut self, address: IpAddr) -> Result<(), IpamError> {
        self.check(address)?;
        self.mark_used(address_value(address));
        Ok(())
    }

    /// Whether [`Ipam::take`] would succeed.
    pub fn check(&self, address: IpAddr) -> Result<(), IpamError> {
        let range = self.range;
        if !range.contains(address) {
            return Err(IpamError::Outside { address, range });
        }
        let value = address_value(address);
        if self.docker_share.is_some_and(|share| value >= address_value(share.first_address)) {
            return Err(IpamError::Docker { address, range, first: self.first(), last: self.last() });
        }
        if !(self.first..=self.last).contains(&value) {
            let purpose = match value - address_value(range.base()) {
                0 => "base",
                1 => "gateway",
                _ => "broadcast address",
            };
            return Err(IpamError::Reserved { address, purpose, range, first: self.first(), last: self.last() });
        }
        if self.used.contains(&value) { Err(IpamError::InUse { address }) } else { Ok(()) }
    }

    /// Takes an address back. That it was not handed out is no error.
    pub fn release(&mut self, address: IpAddr) {
        let value = address_value(address);
        if Family::of(address) != self.range.family() || !self.used.remove(&value) {
            return;
        }
        self.release_count += 1;
        self.released.insert(self.release_count, value);
        self.released_at.insert(value, self.release_count);
        if self.released.len() > MAX_RELEASED
            && let Some((_, oldest)) = self.released.pop_first()
        {
            self.released_at.remove(&oldest);
        }
    }

    fn mark_used(&mut self, value: u128) {
        self.used.insert(value);
        if let Some(order) = self.released_at.remove(&value) {
            self.released.remove(&order);
        }
        if value == self.cursor {
            self.cursor = if value == self.last { self.first } else { value + 1 };
        }
    }

    /// The next address from the cursor on that is neither in use nor resting; `None` where each address is one or the other.
    fn next_unused(&mut self) -> Option<u128> {
        if (self.used.len() + self.released.len()) as u128 >= self.capacity() {
            return None;
        }
        // One of at most `used + resting + 1` addresses in a row is free, so this ends.
        while self.used.contains(&self.cursor) || self.released_at.contains_key(&self.cursor) {
            self.cursor = if self.cursor == self.last { self.first } else { self.cursor + 1 };
        }
        Some(self.cursor)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn ipam(range: &str) -> Ipam {
        Ipam::new(range.parse().expect(range))
    }

    #[test]
    fn slash_24_has_253_addresses() {
        let mut ipam = ipam("10.244.1.0/24");
        let all: BTreeSet<IpAddr> = (0..253).map(|_| ipam.allocate().unwrap()).collect();
        assert_eq!(all.len(), 253);
        assert_eq!(all.first().unwrap().to_string(), "10.244.1.2");
        assert_eq!(all.last().unwrap().to_string(), "10.244.1.254");
        let error = ipam.allocate().unwrap_err().to_string();
        assert!(error.starts_with("subnet 10.244.1.0/24 is full: 253 addresses in use"), "{error}");
    }

    #[test]
    fn smallest_and_largest_ranges_allocate() {
        let mut small = ipam("10.0.0.4/30");
        assert_eq!(small.allocate().unwrap().to_string(), "10.0.0.6");
        assert!(small.allocate().is_err());
        let mut six = ipam("fd00::/126");
        assert_eq!(six.capacity(), 2);
        assert_eq!([six.allocate().unwrap().to_string(), six.allocate().unwrap().to_string()], ["fd00::2", "fd00::3"]);
        for tiny in ["10.0.0.0/31", "10.0.0.0/32", "fd00::/127", "fd00::/128", "255.255.255.255/32"] {
            assert!(ipam(tiny).allocate().is_err(), "{tiny}");
        }
        let mut huge = ipam("fd00:10:244:51::/64");
        let first = huge.allocate().unwrap();
        assert_eq!(first.to_string(), "fd00:10:244:51::2");
        huge.release(first);
        assert_eq!(huge.allocate().unwrap().to_string(), "fd00:10:244:51::3");
        huge.reserve("fd00:10:244:51:ffff:ffff:ffff:ffff".parse().unwrap()).unwrap();
    }

    #[test]
    fn docker_share_is_excluded() {
        let mut ipam = Ipam::with_docker_share("10.244.1.0/28".parse().unwrap());
        assert_eq!((ipam.capacity(), ipam.last().to_string()), (6, "10.244.1.7".to_owned()));
        let last = (0..6).map(|_| ipam.allocate().unwrap()).last().unwrap();
        assert_eq!(last.to_string(), "10.244.1.7");
        assert!(matches!(ipam.allocate(), Err(IpamError::Full { in_use: 6, .. })));
        for address in ["10.244.1.8", "10.244.1.15"] {
            let error = ipam.reserve(address.parse().unwrap()).unwrap_err().to_string();
            assert!(error.contains("is of Docker's part of subnet 10.244.1.0/28; from 10.244.1.2 to 10.244.1.7"), "{error}");
        }
        // A cursor from a time when all was ours.
        ipam.resume("10.244.1.12".parse().unwrap());
        ipam.release(last);
        assert_eq!(ipam.allocate().unwrap(), last);
        let mut six = Ipam::with_docker_share("fd00:10:244:51::/64".parse().unwrap());
        six.reserve("fd00:10:244:51::ffff:ffff".parse().unwrap()).unwrap();
        assert!(matches!(six.reserve("fd00:10:244:51:0:242:af4:181".parse().unwrap()), Err(IpamError::Docker { .. })));
        // Too small to be shared.
        assert_eq!(Ipam::with_docker_share("10.0.0.4/30".parse().unwrap()).docker_share(), None);
    }

    #[test]
    fn released_addresses_are_reused_last_in_order() {
        let mut ipam = ipam("10.0.0.0/29");
        let all: Vec<IpAddr> = (0..5).map(|_| ipam.allocate().unwrap()).collect();
        for i in [3, 0, 4] {
            ipam.release(all[i]);
        }
        assert_eq!((0..3).map(|_| ipam.allocate().unwrap()).collect::<Vec<_>>(), [all[3], all[0], all[4]]);
    }

    #[test]
    fn restart_resumes_after_last_address() {
        let mut ipam = ipam("10.0.0.0/24");
        ipam.resume("10.0.0.200".parse().unwrap());
        ipam.reserve("10.0.0.200".parse().unwrap()).unwrap();
        assert_eq!(ipam.allocate().unwrap().to_string(), "10.0.0.201");
        ipam.resume("10.0.1.5".parse().unwrap());
        ipam.resume("10.0.0.255".parse().unwrap());
        assert_eq!(ipam.cursor().to_string(), "10.0.0.202");
        ipam.resume("10.0.0.254".parse().unwrap());
        assert_eq!(ipam.allocate().unwrap().to_string(), "10.0.0.254");
        assert_eq!(ipam.allocate().unwrap().to_string(), "10.0.0.2");
    }

    #[test]
    fn unavailable_addresses_are_explained() {
        let mut ipam = ipam("10.244.1.0/24");
        for (address, expected) in [
            ("10.244.1.0", "is the base of"),
            ("10.244.1.1", "is the gateway of"),
            ("10.244.1.255", "is the broadcast address of subnet 10.244.1.0/24; from 10.244.1.2 to 10.244.1.254"),
            ("10.244.2.7", "is outside this host's subnet 10.244.1.0/24"),
            ("fd00::7", "is outside"),
        ] {
            let error = ipam.reserve(address.parse().unwrap()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        ipam.reserve("10.244.1.7".parse().unwrap()).unwrap();
        assert!(matches!(ipam.reserve("10.244.1.7".parse().unwrap()), Err(IpamError::InUse { .. })));
    }

    #[test]
    fn memory_is_bounded_in_a_large_range() {
        let mut ipam = ipam("fd00::/64");
        for _ in 0..MAX_RELEASED + 100 {
            let address = ipam.allocate().unwrap();
            ipam.release(address);
        }
        assert_eq!((ipam.released.len(), ipam.released_at.len(), ipam.in_use()), (MAX_RELEASED, MAX_RELEASED, 0));
    }

    proptest! {
        /// Against a simple model, in ranges small enough to run full: no address twice, none that is reserved, full only when full, and a
        /// released one only when all others were in use since or are.
        #[test]
        fn matches_reference_model(
            v6 in any::<bool>(), bits in 2u8..6, steps in proptest::collection::vec((0u8..4, any::<u16>()), 1..300)
        ) {
            let range = if v6 { format!("fd00:0:0:7::/{}", 128 - bits) } else { format!("10.9.8.0/{}", 32 - bits) };
            let mut ipam = ipam(&range);
            let range = ipam.range();
            let size = 1u128 << bits;
            let capacity = if v6 { size - 2 } else { size - 3 };
            prop_assert_eq!(ipam.capacity(), capacity);
            let mut used: Vec<IpAddr> = Vec::new();
            let mut released: HashMap<IpAddr, usize> = HashMap::new();
            for (now, (kind, pick)) in steps.into_iter().enumerate() {
                match kind {
                    0 | 1 => match ipam.allocate() {
                        Ok(address) => {
                            prop_assert!(range.contains(address) && !used.contains(&address));
                            prop_assert!(address != range.base() && Some(address) != range.nth(1));
                            prop_assert!(v6 || address != range.last());
                            // Nothing that is free has rested longer.
                            let age = released.get(&address).copied();
                            for free in (0..size).filter_map(|n| range.nth(n)).filter(|a| !used.contains(a) && ipam.check(*a).is_ok()) {
                                prop_assert!(age <= released.get(&free).copied(), "{} before {}", address, free);
                            }
                            used.push(address);
                        }
                        Err(_) => prop_assert_eq!(used.len() as u128, capacity),
                    },
                    2 => {
                        let wish = range.nth(u128::from(pick) % size).unwrap();
                        let free = !used.contains(&wish)
                            && wish != range.base() && Some(wish) != range.nth(1) && (v6 || wish != range.last());
                        prop_assert_eq!(ipam.reserve(wish).is_ok(), free);
                        if free {
                            used.push(wish);
                        }
                    }
                    _ if used.is_empty() => {}
                    _ => {
                        let address = used.swap_remove(usize::from(pick) % used.len());
                        ipam.release(address);
                        ipam.release(address);
                        released.insert(address, now);
                    }
                }
                prop_assert_eq!(ipam.in_use(), used.len());
            }
        }
    }
}
