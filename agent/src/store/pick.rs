//! Chooses a free subnet for a host that has none. Pure.
//!
//! The first choice is a hash of the host's identity, so that a host that lost its state gets its old subnet back if that is
//! free. If the subnet is taken or a race is lost, the next choice is uniformly distributed over the free subnets. Many hosts
//! that start at once thus choose different subnets, and do not all contend for the next one in order.

use crate::model::family::address_value;
use crate::model::network::Pool;
use crate::model::{Cidr, Family, NetworkConfig, PerFamily, Subnet};

/// The allocated subnets of a pool: disjoint ranges of indexes (first and last, inclusive), ascending.
struct AllocatedRanges(Vec<(u128, u128)>);

impl AllocatedRanges {
    fn from_ranges(pool: &Pool, ranges: &[Cidr]) -> AllocatedRanges {
        let shift = u32::from(pool.network.family().bits() - pool.subnet_length);
        let (first, last) = (address_value(pool.min.base()), address_value(pool.max.last()));
        // A range as large as the network is not a valid subnet. It must not block the whole pool.
        let is_in_pool = |range: &&Cidr| range.family() == pool.network.family() && !range.covers(pool.network);
        let spans = ranges.iter().filter(is_in_pool).filter_map(|range| {
            let low = address_value(range.base()).max(first);
            let high = address_value(range.last()).min(last);
            (low <= high).then(|| ((low - first) >> shift, (high - first) >> shift))
        });
        AllocatedRanges::merge(spans.collect())
    }

    fn merge(mut spans: Vec<(u128, u128)>) -> AllocatedRanges {
        spans.sort_unstable();
        let mut merged: Vec<(u128, u128)> = Vec::with_capacity(spans.len());
        for (low, high) in spans {
            match merged.last_mut() {
                Some(previous) if low <= previous.1.saturating_add(1) => previous.1 = previous.1.max(high),
                _ => merged.push((low, high)),
            }
        }
        AllocatedRanges(merged)
    }

    fn union(&self, other: &AllocatedRanges) -> AllocatedRanges {
        AllocatedRanges::merge(self.0.iter().chain(&other.0).copied().collect())
    }

    fn contains(&self, index: u128) -> bool {
        self.0.iter().any(|(low, high)| (*low..=*high).contains(&index))
    }

    /// Number of free indexes among the first `count`.
    fn free_count(&self, count: u128) -> u128 {
        let allocated = self.0.iter().filter(|(low, _)| *low < count).map(|(low, high)| (*high).min(count - 1) - low + 1);
        count - allocated.sum::<u128>()
    }

    /// The `n`-th free index, from 0. The caller ensures that it exists.
    fn nth_free(&self, n: u128) -> u128 {
        let mut index = n;
        for (low, high) in &self.0 {
            if index < *low {
                break;
            }
            index += high - low + 1;
        }
        index
    }

    /// The index that a host chooses at this attempt, among the first `count`. `None` if none is free.
    fn choose(&self, count: u128, identity: &str, attempt: u32) -> Option<u128> {
        let first = hash(identity, 0) % count;
        if attempt == 0 && !self.contains(first) {
            return Some(first);
        }
        let free = self.free_count(count);
        (free > 0).then(|| self.nth_free(hash(identity, attempt.wrapping_add(1)) % free))
    }
}

/// Picks a free subnet for this host, a different one at each attempt. `None` if a family has no free subnet.
///
/// `allocated` lists the ranges of all entries in the store. With two families the same index in both pools is preferred, so that
/// the two subnets of a host look alike.
pub(super) fn pick(network: &NetworkConfig, allocated: &[Cidr], identity: &str, attempt: u32) -> Option<Subnet> {
    let pools: Vec<(Family, Pool, AllocatedRanges)> =
        network.pools.iter().map(|(family, pool)| (family, *pool, AllocatedRanges::from_ranges(pool, allocated))).collect();
    let common_count = pools.iter().map(|(_, pool, _)| pool.count()).min()?;
    let union = pools.iter().fold(AllocatedRanges(Vec::new()), |merged, (_, _, ranges)| merged.union(ranges));
    let common_index = union.choose(common_count, identity, attempt);
    let mut cidrs = PerFamily::default();
    for (family, pool, ranges) in &pools {
        let index = match common_index {
            Some(index) => index,
            None => ranges.choose(pool.count(), identity, attempt)?,
        };
        *cidrs.slot(*family) = Some(pool.nth(index)?);
    }
    Subnet::new(cidrs).ok()
}

/// FNV-1a over 128 bits (draft-eastlake-fnv) of the text followed by the attempt. Stable across versions of this program. Folded
/// once, so that every bit depends on the whole text.
fn hash(text: &str, attempt: u32) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let bytes = text.bytes().chain(attempt.to_be_bytes());
    let hash = bytes.fold(OFFSET, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME));
    let folded = (hash ^ (hash >> 61)).wrapping_mul(PRIME);
    folded ^ (folded >> 67)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn network(text: &str) -> NetworkConfig {
        NetworkConfig::parse(text).expect(text).config
    }

    fn cidrs(texts: &[&str]) -> Vec<Cidr> {
        texts.iter().map(|t| t.parse().expect(t)).collect()
    }

    const SMALL: &str = r#"{"Network":"10.1.0.0/16","SubnetLen":24,"SubnetMin":"10.1.10.0","SubnetMax":"10.1.19.0"}"#;
    const DUAL: &str = r#"{"Network":"10.1.0.0/16","SubnetMin":"10.1.10.0","SubnetMax":"10.1.13.0","EnableIPv6":true,"IPv6Network":"fd00::/56"}"#;

    #[test]
    fn pick_exhausts_pool_then_returns_none() {
        let network = network(SMALL);
        let mut allocated = Vec::new();
        for host in 0..10 {
            let subnet = pick(&network, &allocated, &format!("host{host}"), 0).expect("a free subnet");
            assert!(network.allows_subnet(&subnet), "{subnet}");
            let cidr = subnet.get(Family::V4).expect("IPv4");
            assert!(!allocated.contains(&cidr), "{cidr} twice");
            allocated.push(cidr);
        }
        assert_eq!(pick(&network, &allocated, "one more", 3), None);
    }

    #[test]
    fn pick_avoids_foreign_ranges_of_any_length() {
        let network = network(SMALL);
        let allocated = cidrs(&["10.1.8.0/21", "10.1.16.0/23", "10.1.19.128/25", "fd00::/8", "10.9.0.0/16"]);
        for attempt in 0..50 {
            assert_eq!(pick(&network, &allocated, "h", attempt).map(|s| s.to_string()).as_deref(), Some("10.1.18.0/24"));
        }
        assert!(pick(&network, &cidrs(&["0.0.0.0/0", "10.1.0.0/16"]), "h", 0).is_some(), "network-wide range is ignored");
    }

    #[test]
    fn dual_stack_pick_prefers_same_index() {
        let network = network(DUAL);
        let index = |subnet: &Subnet, family| {
            network.pools.get(family).and_then(|pool| pool.index_of(subnet.get(family)?)).expect("of the pool")
        };
        let subnet = pick(&network, &[], "h", 0).expect("free");
        assert_eq!(index(&subnet, Family::V4), index(&subnet, Family::V6));
        // No index is free in both families, but each family has a free one.
        let allocated = cidrs(&["10.1.10.0/24", "10.1.11.0/24", "fd00:0:0:3::/64", "fd00:0:0:4::/64"]);
        let subnet = pick(&network, &allocated, "h", 5).expect("free");
        assert!(network.allows_subnet(&subnet) && subnet.iter().all(|(_, c)| !allocated.contains(&c)), "{subnet}");
        assert_eq!(pick(&network, &cidrs(&["10.1.8.0/21"]), "h", 0), None, "one family is exhausted");
    }

    #[test]
    fn first_choices_of_hosts_are_spread() {
        let network = network(r#"{"Network":"10.0.0.0/8"}"#);
        for attempt in [0, 1, 7] {
            let mut all: Vec<_> = (0..1000).filter_map(|n| pick(&network, &[], &format!("host-{n}"), attempt)).collect();
            all.sort_unstable();
            all.dedup();
            assert!(all.len() > 980, "{} distinct choices among 1000 hosts", all.len());
        }
    }

    proptest! {
        #[test]
        fn picked_subnet_is_free_and_in_pool(
            ranges in prop::collection::vec((any::<u32>(), 8_u8..=32), 0..60), identity in "[a-z0-9]{1,12}", attempt in 0_u32..9,
        ) {
            let network = network(r#"{"Network":"10.0.0.0/12","SubnetLen":20}"#);
            let taken: Vec<Cidr> = ranges
                .into_iter()
                .filter_map(|(bits, length)| Cidr::containing(Family::V4.address(u128::from(0x0a00_0000 | (bits & 0xf_ffff))), length))
                .collect();
            let pool = network.pools.v4.expect("IPv4");
            let taken: Vec<Cidr> = taken.into_iter().filter(|t| !t.covers(pool.network)).collect();
            let free = (0..pool.count()).filter_map(|i| pool.nth(i)).filter(|s| !taken.iter().any(|t| t.overlaps(*s))).count();
            match pick(&network, &taken, &identity, attempt) {
                None => prop_assert_eq!(free, 0),
                Some(subnet) => {
                    prop_assert!(network.allows_subnet(&subnet));
                    prop_assert!(subnet.iter().all(|(_, c)| !taken.iter().any(|t| t.overlaps(c))), "{} is taken", subnet);
                }
            }
        }
    }
}
