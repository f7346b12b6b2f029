//! Allocator of the addresses of one family of the host's subnet. Pure: no clock, no files, no tasks.
//!
//! Addresses are allocated in the order of their last use: first never used ones, ascending from a cursor, then released ones,
//! the oldest first. So an address is not reused right after its release, while neighbour entries and connections still refer to
//! its last owner. Memory grows with the number of used and released addresses, never with the size of the range.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::model::family::address_value;
use crate::model::{Cidr, DockerShare, Family};

/// Maximum number of remembered released addresses. Beyond it, which takes a range larger than a /16, the oldest count as never
/// used.
const MAX_RELEASED: usize = 65_536;

/// Allocator of one range.
#[derive(Debug, Clone)]
pub struct Ipam {
    range: Cidr,
    /// The part of the range that Docker uses.
    docker_share: Option<DockerShare>,
    /// The lowest and the highest allocatable address.
    first: u128,
    last: u128,
    used: BTreeSet<u128>,
    /// Released addresses, by the sequence number of their release, and the inverse map.
    released: BTreeMap<u64, u128>,
    released_at: BTreeMap<u128, u64>,
    release_count: u64,
    cursor: u128,
}

/// Why an address cannot be allocated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// No address is free.
    #[error("subnet {range} is full: {in_use} addresses in use; detach endpoints, or give the hosts larger subnets (SubnetLen)")]
    Full {
        /// The range.
        range: Cidr,
        /// Number of addresses in use.
        in_use: usize,
    },
    /// The requested address is outside the range.
    #[error("address {address} is outside this host's subnet {range}")]
    Outside {
        /// The requested address.
        address: IpAddr,
        /// The range.
        range: Cidr,
    },
    /// The requested address has a fixed purpose.
    #[error("address {address} is the {purpose} of subnet {range}; containers can have {first} to {last}")]
    Reserved {
        /// The requested address.
        address: IpAddr,
        /// Its purpose.
        purpose: &'static str,
        /// The range.
        range: Cidr,
        /// The lowest allocatable address.
        first: IpAddr,
        /// The highest one.
        last: IpAddr,
    },
    /// The requested address is in the part that Docker uses.
    #[error("address {address} is in Docker's part of subnet {range}; containers attached here can have {first} to {last}")]
    Docker {
        /// The requested address.
        address: IpAddr,
        /// The range.
        range: Cidr,
        /// The lowest allocatable address.
        first: IpAddr,
        /// The highest one.
        last: IpAddr,
    },
    /// The requested address is in use.
    #[error("address {address} is in use")]
    InUse {
        /// The requested address.
        address: IpAddr,
    },
}

impl Ipam {
    /// An allocator of a range without used addresses. The base, the gateway (base + 1) and, in IPv4, the broadcast address are
    /// never allocated.
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

    /// An allocator of the part of a range that Docker does not use, or of the whole range if it is too small to be shared.
    pub fn with_docker_share(range: Cidr) -> Ipam {
        let mut ipam = Ipam::new(range);
        ipam.docker_share = DockerShare::from_range(range);
        if let Some(share) = ipam.docker_share {
            ipam.last = ipam.last.min(address_value(share.first_address).saturating_sub(1));
        }
        ipam
    }

    /// The part of the range that Docker uses.
    pub fn docker_share(&self) -> Option<DockerShare> {
        self.docker_share
    }

    /// The range.
    pub fn range(&self) -> Cidr {
        self.range
    }

    /// The lowest allocatable address.
    pub fn first(&self) -> IpAddr {
        self.range.family().address(self.first)
    }

    /// The highest allocatable address.
    pub fn last(&self) -> IpAddr {
        self.range.family().address(self.last)
    }

    /// Number of allocatable addresses.
    pub fn capacity(&self) -> u128 {
        self.last.saturating_add(1).saturating_sub(self.first)
    }

    /// Number of addresses in use.
    pub fn in_use(&self) -> usize {
        self.used.len()
    }

    /// The next candidate of the search for a never used address; [`Ipam::resume`] restores it after a restart.
    pub fn cursor(&self) -> IpAddr {
        self.range.family().address(self.cursor)
    }

    /// Continues at the cursor of an earlier allocator of the range; an address outside the range is ignored.
    pub fn resume(&mut self, cursor: IpAddr) {
        let value = address_value(cursor);
        if Family::of(cursor) == self.range.family() && (self.first..=self.last).contains(&value) {
            self.cursor = value;
        }
    }

    /// Allocates the address that has been unused the longest.
    pub fn allocate(&mut self) -> Result<IpAddr, IpamError> {
        let value = self.next_unused().or_else(|| self.released.values().next().copied());
        let Some(value) = value else { return Err(IpamError::Full { range: self.range, in_use: self.used.len() }) };
        self.mark_used(value);
        Ok(self.range.family().address(value))
    }

    /// Allocates this address.
    pub fn reserve(&mut self, address: IpAddr) -> Result<(), IpamError> {
        self.check(address)?;
        self.mark_used(address_value(address));
        Ok(())
    }

    /// Checks whether [`Ipam::reserve`] would succeed.
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

    /// Releases an address; an unused one is no error.
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

    /// The next address from the cursor on that is neither in use nor released; `None` if there is none.
    fn next_unused(&mut self) -> Option<u128> {
        if (self.used.len() + self.released.len()) as u128 >= self.capacity() {
            return None;
        }
        // Of `used + released + 1` consecutive addresses at least one is free, so the loop ends.
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
            assert!(
                error.contains(
                    "is in Docker's part of subnet 10.244.1.0/28; containers attached here can have 10.244.1.2 to 10.244.1.7"
                ),
                "{error}"
            );
        }
        // A cursor from before Docker got its part.
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
            ("10.244.1.255", "is the broadcast address of subnet 10.244.1.0/24; containers can have 10.244.1.2 to 10.244.1.254"),
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
        /// Compares the allocator with a simple model, in ranges small enough to become full. No address is allocated twice, none
        /// is reserved, and a full error occurs only if the range is full. A released address is allocated only if every other
        /// address is in use or was used since.
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
                            // No free address has been unused for longer.
                            let age = released.get(&address).copied();
                            for free in (0..size).filter_map(|n| range.nth(n)).filter(|a| !used.contains(a) && ipam.check(*a).is_ok()) {
                                prop_assert!(age <= released.get(&free).copied(), "{} before {}", address, free);
                            }
                            used.push(address);
                        }
                        Err(_) => prop_assert_eq!(used.len() as u128, capacity),
                    },
                    2 => {
                        let address = range.nth(u128::from(pick) % size).unwrap();
                        let free = !used.contains(&address)
                            && address != range.base() && Some(address) != range.nth(1) && (v6 || address != range.last());
                        prop_assert_eq!(ipam.reserve(address).is_ok(), free);
                        if free {
                            used.push(address);
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
