//! Table of all leases in the store, and their classification. Indexes make one change independent of the number of leases.
//!
//! A lease is rejected if it is invalid by itself (outside the network, another backend), if it conflicts with this host (subnet,
//! address or endpoint), or if it conflicts with a lease that ranks before it. Leases that the network's pools could allocate rank
//! before others; then older ones rank before younger ones. A rejected lease keeps its rank, so that a classification depends on
//! directly conflicting leases only, never on a chain of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::backend;
use crate::model::event::StoreEntry;
use crate::model::peer::RemoteSubnet;
use crate::model::{
    Cidr, Family, LeaseRecord, NetworkConfig, Peer, PeerEndpoint, PerFamily, RejectReason, RejectedLease, StorePosition, Subnet,
};

/// The part of a lease's key after `<prefix>/subnets/`.
pub type LeaseKey = Arc<str>;

/// The properties of this host that leases can conflict with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalHost {
    /// Its subnet.
    pub subnet: Subnet,
    /// Its underlay addresses.
    pub public_ip: PerFamily<IpAddr>,
    /// Its endpoints.
    pub endpoints: PerFamily<PeerEndpoint>,
    /// Whether the network is isolated. Outer packets never meet its routes then, so hosts may have addresses in its range.
    pub isolated: bool,
}

/// Classification of a lease from this host's view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Classification {
    /// This host's own lease.
    Own,
    /// A peer in the data path.
    Accepted(Peer),
    /// A rejected lease.
    Rejected(RejectedLease),
}

/// All leases in the store.
#[derive(Debug, Default)]
pub struct LeaseTable {
    entries: BTreeMap<LeaseKey, Result<LeaseRecord, RejectedLease>>,
    by_cidr: BTreeMap<Cidr, Owners>,
    /// Number of ranges of each prefix length. Usually all have the same, and no lookup of shorter ones is needed.
    prefix_lengths: BTreeMap<(Family, u8), usize>,
    by_endpoint: HashMap<(Family, PeerEndpoint), Owners>,
    /// Whether two leases may share an address or an endpoint. Usually none do, and then classification skips the search for conflicts.
    has_conflicts: bool,
}

/// Sorted keys of the leases of one range or one endpoint. Usually there is one, which needs no allocation.
#[derive(Debug)]
enum Owners {
    One(LeaseKey),
    /// Empty only temporarily. Boxed, so that `One` takes no more than a key.
    #[expect(clippy::box_collection, reason = "a vector would enlarge each of the many `One` values by half")]
    Many(Box<Vec<LeaseKey>>),
}

impl Owners {
    fn insert(&mut self, key: &LeaseKey) {
        let Err(position) = self.as_slice().binary_search(key) else { return };
        match self {
            Owners::One(first) => {
                let mut keys = vec![first.clone()];
                keys.insert(position, key.clone());
                *self = Owners::Many(Box::new(keys));
            }
            Owners::Many(keys) => keys.insert(position, key.clone()),
        }
    }

    fn remove(&mut self, key: &LeaseKey) {
        match self {
            Owners::One(first) if first == key => *self = Owners::Many(Box::default()),
            Owners::One(_) => {}
            Owners::Many(keys) => keys.retain(|other| other != key),
        }
    }

    fn as_slice(&self) -> &[LeaseKey] {
        match self {
            Owners::One(key) => std::slice::from_ref(key),
            Owners::Many(keys) => keys,
        }
    }

    fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }

    fn iter(&self) -> std::slice::Iter<'_, LeaseKey> {
        self.as_slice().iter()
    }
}

impl LeaseTable {
    /// Every lease, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&LeaseKey, &Result<LeaseRecord, RejectedLease>)> {
        self.entries.iter()
    }

    /// One lease.
    pub fn get(&self, key: &str) -> Option<&Result<LeaseRecord, RejectedLease>> {
        self.entries.get(key)
    }

    /// Number of leases, including rejected ones.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no lease.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Replaces the leases by those of a snapshot. Returns the keys whose classification may have changed; `None` for all keys,
    /// if the table was empty or most leases are gone.
    pub fn replace(&mut self, snapshot: Vec<StoreEntry>) -> Option<BTreeSet<LeaseKey>> {
        if self.entries.len() > 2 * snapshot.len() || self.entries.is_empty() {
            *self = LeaseTable::default();
            self.fill(snapshot);
            return None;
        }
        let new: BTreeSet<&str> = snapshot.iter().map(|entry| entry.key.as_str()).collect();
        let removed: Vec<LeaseKey> = self.entries.keys().filter(|key| !new.contains(key.as_ref())).cloned().collect();
        let mut affected = BTreeSet::new();
        for key in removed {
            affected.extend(self.remove(&key));
        }
        for entry in snapshot {
            affected.extend(self.upsert(entry));
        }
        Some(affected)
    }

    /// Fills an empty table. It builds each index in bulk, in a quarter of the time of inserting lease by lease.
    fn fill(&mut self, snapshot: Vec<StoreEntry>) {
        self.entries = snapshot.into_iter().map(|entry| (entry.key.into(), entry.value)).collect();
        self.by_endpoint.reserve(self.entries.len());
        let mut ranges: Vec<(Cidr, &LeaseKey)> = Vec::with_capacity(self.entries.len());
        for (key, value) in &self.entries {
            let Ok(record) = value else { continue };
            ranges.extend(record.subnet.iter().map(|(_, cidr)| (cidr, key)));
            for endpoint in endpoints(record) {
                let add_owner = |keys: &mut Owners| {
                    keys.insert(key);
                    self.has_conflicts = true;
                };
                self.by_endpoint.entry(endpoint).and_modify(add_owner).or_insert_with(|| Owners::One(key.clone()));
            }
        }
        ranges.sort_unstable();
        // In sorted order, a range that overlaps any earlier one overlaps the earlier one that extends furthest.
        let mut furthest: Option<Cidr> = None;
        for (cidr, _) in &ranges {
            self.has_conflicts |= furthest.is_some_and(|range| range.overlaps(*cidr));
            if furthest.is_none_or(|range| !range.contains(cidr.base())) {
                furthest = Some(*cidr);
            }
        }
        let mut owners: Vec<(Cidr, Owners)> = Vec::with_capacity(ranges.len());
        for (cidr, key) in ranges {
            match owners.last_mut() {
                Some((last, keys)) if *last == cidr => keys.insert(key),
                _ => {
                    *self.prefix_lengths.entry((cidr.family(), cidr.length())).or_default() += 1;
                    owners.push((cidr, Owners::One(key.clone())));
                }
            }
        }
        self.by_cidr = owners.into_iter().collect();
    }

    /// Adds or changes a lease. Returns the keys whose classification may have changed; none if only positions changed.
    pub fn upsert(&mut self, entry: StoreEntry) -> BTreeSet<LeaseKey> {
        let StoreEntry { key, value } = entry;
        if let Some(old) = self.entries.get(key.as_str())
            && is_equivalent(old, &value)
        {
            // A renewal changes the position only.
            self.entries.insert(key.into(), value);
            return BTreeSet::new();
        }
        let mut affected = self.remove(&key);
        let key: LeaseKey = key.into();
        if let Ok(record) = &value {
            for (_, cidr) in record.subnet.iter() {
                self.by_cidr.entry(cidr).and_modify(|keys| keys.insert(&key)).or_insert_with(|| {
                    *self.prefix_lengths.entry((cidr.family(), cidr.length())).or_default() += 1;
                    Owners::One(key.clone())
                });
            }
            for endpoint in endpoints(record) {
                self.by_endpoint.entry(endpoint).and_modify(|keys| keys.insert(&key)).or_insert_with(|| Owners::One(key.clone()));
            }
            let candidates = self.conflict_candidates(record);
            self.has_conflicts |= candidates.iter().any(|other| *other != key);
            affected.extend(candidates);
            affected.extend(self.entries_covering(record));
        }
        self.entries.insert(key.clone(), value);
        affected.insert(key);
        affected
    }

    /// Removes a lease. Returns the keys whose classification may have changed, including its own.
    pub fn remove(&mut self, key: &str) -> BTreeSet<LeaseKey> {
        let Some((key, value)) = self.entries.remove_entry(key) else { return BTreeSet::new() };
        let mut affected = BTreeSet::new();
        if let Ok(record) = &value {
            affected = self.conflict_candidates(record);
            affected.extend(self.entries_covering(record));
            for (_, cidr) in record.subnet.iter() {
                self.remove_range(cidr, &key);
            }
            for endpoint in endpoints(record) {
                if let Some(keys) = self.by_endpoint.get_mut(&endpoint) {
                    keys.remove(&key);
                    if keys.is_empty() {
                        self.by_endpoint.remove(&endpoint);
                    }
                }
            }
        }
        affected.insert(key);
        affected
    }

    /// Classifies a lease; `None` for an unknown key.
    pub fn classify(&self, key: &str, network: &NetworkConfig, own: Option<&LocalHost>) -> Option<Classification> {
        self.entries.get(key).map(|value| self.classify_entry(key, value, network, own))
    }

    /// Classifies all leases, in the order of the keys.
    pub fn classify_all(
        &self,
        network: &NetworkConfig,
        own: Option<&LocalHost>,
    ) -> impl Iterator<Item = (&LeaseKey, Classification)> {
        self.entries.iter().map(move |(key, value)| (key, self.classify_entry(key, value, network, own)))
    }

    fn classify_entry(
        &self,
        key: &str,
        value: &Result<LeaseRecord, RejectedLease>,
        network: &NetworkConfig,
        own: Option<&LocalHost>,
    ) -> Classification {
        let record = match value {
            Ok(record) => record,
            Err(rejected) => return Classification::Rejected(rejected.clone()),
        };
        if own.is_some_and(|own| own.subnet == record.subnet) {
            return Classification::Own;
        }
        let conflict = || self.covered_host(key, record, network, own).or_else(|| self.conflict(key, record, network));
        let verdict = check_record(record, network, own).and_then(|peer| conflict().map_or(Ok(peer), Err));
        match verdict {
            Ok(peer) => Classification::Accepted(peer),
            Err(kind) => Classification::Rejected(RejectedLease { key: crate::model::text::printable(key), kind }),
        }
    }

    /// Rejects a lease whose range contains the underlay address of this host or of another lease: the tunnel to it would be
    /// routed into itself. Ranges that the pools allocate need no check, because a lease with such an address is rejected itself.
    fn covered_host(
        &self,
        key: &str,
        record: &LeaseRecord,
        network: &NetworkConfig,
        own: Option<&LocalHost>,
    ) -> Option<RejectReason> {
        record.subnet.iter().find_map(|(family, subnet)| {
            let pool = network.pools.get(family)?;
            if pool.allows_subnet(subnet) || own.is_some_and(|own| own.isolated) {
                return None;
            }
            let own_address = own.and_then(|own| own.public_ip.get(family).copied());
            let peer_addresses = self
                .entries
                .iter()
                .filter(|(other, _)| other.as_ref() != key)
                .filter_map(|(_, value)| value.as_ref().ok()?.lease.public_ip.get(family).copied());
            let address = own_address
                .into_iter()
                .chain(peer_addresses)
                .find(|address| subnet.contains(*address) && !pool.covers_address(*address))?;
            Some(RejectReason::CoversHost { subnet, address })
        })
    }

    /// The leases whose range contains an address of a record.
    fn entries_covering(&self, record: &LeaseRecord) -> impl Iterator<Item = LeaseKey> {
        record.lease.public_ip.iter().flat_map(|(_, address)| self.overlapping(Cidr::host(*address)))
    }

    /// The first conflict with a lease that ranks before this one.
    fn conflict(&self, key: &str, record: &LeaseRecord, network: &NetworkConfig) -> Option<RejectReason> {
        if !self.has_conflicts {
            return None;
        }
        let precedes = |other: &LeaseKey| match self.entries.get(other) {
            Some(Ok(o)) if other.as_ref() != key => (rank(o, network), other.as_ref()) < (rank(record, network), key),
            _ => false,
        };
        for (_, cidr) in record.subnet.iter() {
            if let Some(other) = self.overlapping(cidr).into_iter().find(|other| precedes(other)) {
                return Some(RejectReason::Overlap { other: other.to_string() });
            }
        }
        endpoints(record).find_map(|(family, endpoint)| {
            let other = self.by_endpoint.get(&(family, endpoint))?.iter().find(|other| {
                // Two leases of one host (one of them stale) have the same address for the endpoint, which is no conflict.
                let same_host = self.entries.get(*other).is_some_and(|value| {
                    value.as_ref().is_ok_and(|o| o.lease.public_ip.get(family) == record.lease.public_ip.get(family))
                });
                !same_host && precedes(other)
            })?;
            Some(endpoint.conflict(Some(other.to_string())))
        })
    }

    /// The leases that share an address or an endpoint with a record.
    fn conflict_candidates(&self, record: &LeaseRecord) -> BTreeSet<LeaseKey> {
        let mut keys = BTreeSet::new();
        for (_, cidr) in record.subnet.iter() {
            keys.extend(self.overlapping(cidr));
        }
        for endpoint in endpoints(record) {
            keys.extend(self.by_endpoint.get(&endpoint).into_iter().flat_map(Owners::iter).cloned());
        }
        keys
    }

    /// Removes a key from a range.
    fn remove_range(&mut self, cidr: Cidr, key: &LeaseKey) {
        let Some(keys) = self.by_cidr.get_mut(&cidr) else { return };
        keys.remove(key);
        if !keys.is_empty() {
            return;
        }
        self.by_cidr.remove(&cidr);
        let length_key = (cidr.family(), cidr.length());
        if let Some(count) = self.prefix_lengths.get_mut(&length_key) {
            *count -= 1;
            if *count == 0 {
                self.prefix_lengths.remove(&length_key);
            }
        }
    }

    /// The leases whose range overlaps `cidr`: those that cover it (one lookup per existing shorter length) and those inside it.
    fn overlapping(&self, cidr: Cidr) -> Vec<LeaseKey> {
        let shorter = self.prefix_lengths.range((cidr.family(), 0)..(cidr.family(), cidr.length()));
        let covering = shorter.filter_map(|((_, length), _)| self.by_cidr.get(&Cidr::containing(cidr.base(), *length)?));
        let inside = self.by_cidr.range(cidr..).take_while(|(other, _)| cidr.contains(other.base())).map(|(_, keys)| keys);
        covering.chain(inside).flat_map(Owners::iter).cloned().collect()
    }
}

/// Whether two values are equal except for the position of the last change.
fn is_equivalent(a: &Result<LeaseRecord, RejectedLease>, b: &Result<LeaseRecord, RejectedLease>) -> bool {
    match (a, b) {
        (Ok(a), Ok(b)) => a.subnet == b.subnet && a.lease == b.lease && a.created == b.created,
        (a, b) => a == b,
    }
}

/// Rank of a lease; lower ranks win a conflict.
fn rank(record: &LeaseRecord, network: &NetworkConfig) -> (bool, StorePosition) {
    let is_in_pools =
        record.subnet.iter().all(|(family, cidr)| network.pools.get(family).is_some_and(|pool| pool.allows_subnet(cidr)));
    (!is_in_pools, record.created)
}

fn endpoints(record: &LeaseRecord) -> impl Iterator<Item = (Family, PeerEndpoint)> {
    let endpoints = record.lease.backend.endpoints();
    Family::ALL.into_iter().filter_map(move |family| Some((family, *endpoints.get(family)?)))
}

/// Checks a record without regard to other leases.
fn check_record(record: &LeaseRecord, network: &NetworkConfig, own: Option<&LocalHost>) -> Result<Peer, RejectReason> {
    backend::of(network).check_lease(record)?;
    let endpoints = record.lease.backend.endpoints();
    let mut remote_subnets = PerFamily::default();
    for (family, subnet) in record.subnet.iter() {
        let Some(pool) = network.pools.get(family) else { continue };
        if !pool.network.covers(subnet) {
            return Err(RejectReason::OutsideNetwork { subnet, network: pool.network });
        }
        // `SubnetLen` divides a network into at least four subnets, so no valid lease has more than a quarter of it.
        if subnet.length() < pool.network.length() + 2 {
            return Err(RejectReason::TooWide { subnet, network: pool.network });
        }
        let missing = || RejectReason::Field {
            field: "PublicIP".to_owned(),
            value: "null".to_owned(),
            rule: format!("needed for {subnet}"),
        };
        let public_ip = *record.lease.public_ip.get(family).ok_or_else(missing)?;
        let endpoint = endpoints.get(family).copied();
        if let Some(own) = own {
            if own.public_ip.get(family) == Some(&public_ip) {
                return Err(RejectReason::OwnAddress { address: public_ip });
            }
            if let Some(endpoint) = endpoint.filter(|endpoint| own.endpoints.get(family) == Some(endpoint)) {
                return Err(endpoint.conflict(None));
            }
        }
        let isolated = own.is_some_and(|own| own.isolated);
        if !isolated && (pool.covers_address(public_ip) || subnet.contains(public_ip)) {
            // The outer packet would be routed into the overlay.
            return Err(RejectReason::Field {
                field: "PublicIP".to_owned(),
                value: public_ip.to_string(),
                rule: format!(
                    "must not lie among the overlay's subnets, {} to {} and {subnet}",
                    pool.min.base(),
                    pool.max.last()
                ),
            });
        }
        *remote_subnets.slot(family) = Some(RemoteSubnet { subnet, public_ip, endpoint });
    }
    if let Some(own) = own
        && own.subnet.overlaps(&record.subnet)
    {
        return Err(RejectReason::OverlapsOwn { subnet: record.subnet, own: own.subnet });
    }
    match record.subnet.iter().next() {
        Some((_, subnet)) if remote_subnets.is_empty() => Err(RejectReason::FamilyNotUsed { subnet }),
        _ => Ok(Peer { remote_subnets }),
    }
}

#[cfg(test)]
mod tests;
