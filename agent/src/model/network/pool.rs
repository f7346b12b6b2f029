//! The leasable subnets of a network.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::model::family::address_value;
use crate::model::{Cidr, Family};

/// The subnets of one family: the network is divided into ranges of equal length, and those from `min` to `max` can be leased.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// The whole address space.
    pub network: Cidr,
    /// Prefix length of each subnet.
    pub subnet_length: u8,
    /// The first leasable subnet.
    pub min: Cidr,
    /// The last leasable subnet.
    pub max: Cidr,
}

impl Pool {
    /// Number of leasable subnets, at least 1.
    pub fn count(&self) -> u128 {
        ((self.value(self.max) - self.value(self.min)) >> self.shift()) + 1
    }

    /// The subnet with this index, from 0 at `min`; `None` after `max`.
    pub fn nth(&self, index: u128) -> Option<Cidr> {
        if index >= self.count() {
            return None;
        }
        let base = self.network.family().address(self.value(self.min) + (index << self.shift()));
        Cidr::containing(base, self.subnet_length)
    }

    /// The index of a subnet in the pool; `None` if it is not part of it.
    pub fn index_of(&self, subnet: Cidr) -> Option<u128> {
        self.allows_subnet(subnet).then(|| (self.value(subnet) - self.value(self.min)) >> self.shift())
    }

    /// Whether exactly this subnet can be leased.
    pub fn allows_subnet(&self, subnet: Cidr) -> bool {
        subnet.length() == self.subnet_length
            && subnet.family() == self.network.family()
            && (self.min..=self.max).contains(&subnet)
    }

    /// Whether an address lies in a leasable subnet.
    pub fn covers_address(&self, address: IpAddr) -> bool {
        Family::of(address) == self.network.family() && (self.min.base()..=self.max.last()).contains(&address)
    }

    /// The smallest CIDR that covers all leasable addresses.
    pub fn span(&self) -> Cidr {
        let contains_max = |cidr: &Cidr| cidr.contains(self.max.last());
        let mut spans =
            (self.network.length()..=self.subnet_length).rev().filter_map(|length| Cidr::containing(self.min.base(), length));
        spans.find(contains_max).unwrap_or(self.network)
    }

    /// The minimal list of CIDRs that cover exactly the leasable addresses, ascending. It has one element if `min` and `max` are
    /// the network's first and last subnet, otherwise at most two for each bit between network and subnet length.
    pub fn leasable(&self) -> Vec<Cidr> {
        let family = self.network.family();
        let last = address_value(self.max.last());
        let mut ranges = Vec::new();
        let mut next = Some(self.value(self.min));
        while let Some(base) = next.filter(|base| *base <= last) {
            // The shortest prefix that begins at `base` and does not extend beyond `last`.
            let range_of_length = |length: &u8| {
                Cidr::containing(family.address(base), *length)
                    .filter(|cidr| self.value(*cidr) == base && address_value(cidr.last()) <= last)
            };
            let Some(range) = (self.network.length()..=self.subnet_length).find_map(|length| range_of_length(&length)) else {
                break;
            };
            next = address_value(range.last()).checked_add(1);
            ranges.push(range);
        }
        ranges
    }

    /// Like [`Self::leasable`], without the subnets that contain any of these addresses.
    pub fn leasable_without(&self, addresses: &BTreeSet<IpAddr>) -> Vec<Cidr> {
        let mut ranges = Vec::new();
        let mut pending: Vec<Cidr> = self.leasable().into_iter().rev().collect();
        while let Some(range) = pending.pop() {
            if !addresses.iter().any(|address| range.contains(*address)) {
                ranges.push(range);
            } else if range.length() < self.subnet_length {
                pending
                    .extend([range.last(), range.base()].into_iter().filter_map(|end| Cidr::containing(end, range.length() + 1)));
            }
        }
        ranges
    }

    fn value(&self, cidr: Cidr) -> u128 {
        address_value(cidr.base())
    }

    fn shift(&self) -> u32 {
        u32::from(self.network.family().bits() - self.subnet_length)
    }
}
