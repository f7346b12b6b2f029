//! Decides the next action for this host's lease: a pure function of the store's content, the lease request and the holder's
//! state. [`lease_keeper`](super::lease_keeper) executes it.

use std::net::IpAddr;
use std::time::Duration;

use super::codec::{self, Owner};
use super::keys::claimed_ranges;
use super::pick;
use super::read::{Listing, RawConfig, RawEntry};
use crate::model::event::{self, LeaseOrigin, LeaseRequest};
use crate::model::text::printable;
use crate::model::{Cidr, ExpiryId, Lease, NetworkConfig, PerFamily, Subnet};

/// Delay before a host that cannot get a subnet reads a new snapshot without a change.
pub(super) const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// An entry of the store, reduced to its ranges and holder.
#[derive(Debug, Clone)]
pub(super) struct LeaseEntry {
    pub(super) key: String,
    /// The subnet, if the key is in canonical form.
    pub(super) subnet: Option<Subnet>,
    /// All ranges that the key names, in any form.
    ranges: Vec<Cidr>,
    pub(super) owner: Owner,
    /// The value if the entry is this host's, otherwise empty.
    value: Vec<u8>,
    pub(super) mod_revision: i64,
    create_revision: i64,
    pub(super) etcd_lease: Option<i64>,
}

/// Configuration and all entries at one revision.
#[derive(Debug, Clone)]
pub(super) struct LeaseSnapshot {
    pub(super) revision: i64,
    pub(super) config: Option<RawConfig>,
    pub(super) entries: Vec<LeaseEntry>,
}

/// The holder's state between two snapshots.
#[derive(Debug, Clone, Default)]
pub(super) struct HolderState {
    /// The entry that this process holds.
    pub(super) held: Option<HeldEntry>,
    /// The subnet that it held before the loss.
    pub(super) last_subnet: Option<Subnet>,
    /// The entry (key and revision of its last change) whose holder was found dead.
    pub(super) dead_entry: Option<(String, i64)>,
    /// The host that overwrote our entry.
    pub(super) contender: Option<Owner>,
    /// Races lost since the last success.
    pub(super) attempt: u32,
}

/// A lease that this host holds, with its etcd lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HeldLease {
    /// The subnet.
    pub(super) subnet: Subnet,
    /// The etcd lease; `None` for a reservation.
    pub(super) etcd_lease: Option<i64>,
    /// How it was obtained.
    pub(super) origin: LeaseOrigin,
}

impl HeldLease {
    /// The lease as the other layers see it.
    pub(super) fn to_event(&self) -> event::HeldLease {
        event::HeldLease { subnet: self.subnet, expiry: self.etcd_lease.map(ExpiryId), origin: self.origin }
    }
}

/// An entry that this process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HeldEntry {
    pub(super) key: String,
    /// The revision of the last change that is verified as ours.
    pub(super) mod_revision: i64,
    pub(super) lease: HeldLease,
}

/// The next action. Each write is conditional on the revisions that the decision is based on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// The entry is ours and correct.
    Keep(HeldEntry),
    /// The entry is ours or becomes ours: write our value and keep its etcd lease.
    Write(HeldEntry),
    /// The entry's holder is dead: write our value with our own etcd lease.
    TakeOver(HeldEntry),
    /// Create a new entry.
    Acquire {
        subnet: Subnet,
        /// Also compare that no entry at all was created since the snapshot, because another key could name the same range.
        compare_all: bool,
    },
    /// The entry is ours and must be deleted.
    Release { key: String, mod_revision: i64, etcd_lease: Option<i64>, reason: String },
    /// Check whether the holder still renews this etcd lease.
    VerifyLiveness { key: String, mod_revision: i64, etcd_lease: i64, reason: String },
    /// No action is possible now.
    RetryLater { reason: String },
    /// The lease request is based on an older configuration than the store's: wait for the next request.
    Idle,
}

impl LeaseSnapshot {
    /// Builds a snapshot from a listing, for the host with this identity.
    pub(super) fn from_listing(listing: Listing, id: &str) -> LeaseSnapshot {
        let entries = listing.entries.into_iter().map(|entry| LeaseEntry::from_raw(entry, id)).collect();
        LeaseSnapshot { revision: listing.revision, config: listing.config, entries }
    }

    pub(super) fn entry(&self, key: &str) -> Option<&LeaseEntry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    fn allocated_ranges(&self) -> Vec<Cidr> {
        self.entries.iter().flat_map(|entry| entry.ranges.iter().copied()).collect()
    }
}

impl LeaseEntry {
    fn from_raw(entry: RawEntry, id: &str) -> LeaseEntry {
        let owner = codec::owner(&entry.value);
        // The values of other hosts are not needed again, and there can be many.
        let ours = owner.node.as_ref().is_some_and(|node| node.id == id);
        LeaseEntry {
            subnet: Subnet::from_key(&entry.key).ok(),
            ranges: claimed_ranges(&entry.key),
            owner,
            key: entry.key,
            value: if ours { entry.value } else { Vec::new() },
            mod_revision: entry.mod_revision,
            create_revision: entry.create_revision,
            etcd_lease: entry.etcd_lease,
        }
    }

    fn belongs_to(&self, request: &LeaseRequest) -> bool {
        self.owner.node.as_ref().is_some_and(|node| node.id == request.node.id)
    }

    /// This entry as a held one.
    fn to_held(&self, subnet: Subnet, origin: LeaseOrigin) -> HeldEntry {
        let lease = HeldLease { subnet, etcd_lease: self.etcd_lease, origin };
        HeldEntry { key: self.key.clone(), mod_revision: self.mod_revision, lease }
    }

    fn describe_holder(&self) -> String {
        let ips: Vec<String> = self.owner.public_ip.iter().map(|(_, ip)| ip.to_string()).collect();
        let ips = if ips.is_empty() { "no public IP".to_owned() } else { format!("public IP {}", ips.join(", ")) };
        match &self.owner.node {
            Some(node) => format!("host {} (identity {}, {ips})", node.name, node.id),
            None => format!("a flannel host ({ips})"),
        }
    }
}

/// The lease value for a lease request.
pub(super) fn lease_value(request: &LeaseRequest) -> Lease {
    Lease { public_ip: request.public_ip, backend: request.backend.clone(), node: Some(request.node.clone()) }
}

fn shares_address(one: &PerFamily<IpAddr>, other: &PerFamily<IpAddr>) -> bool {
    one.iter().any(|(family, ip)| other.get(family) == Some(ip))
}

impl HolderState {
    /// Detects the loss of the held lease. Returns the entry and the reason, `None` if it is not lost.
    pub(super) fn detect_loss(&mut self, snapshot: &LeaseSnapshot, request: &LeaseRequest) -> Option<(HeldEntry, String)> {
        let held = self.held.clone()?;
        let reason = match snapshot.entry(&held.key) {
            None => format!("the lease of {} is gone: it was deleted or has expired", held.lease.subnet),
            Some(entry) if entry.mod_revision == held.mod_revision => return None,
            Some(entry) if entry.belongs_to(request) && self.is_this_host(entry, request) => return None,
            Some(entry) => {
                self.contender = Some(entry.owner.clone());
                format!("the lease of {} was overwritten by {}", held.lease.subnet, entry.describe_holder())
            }
        };
        self.forget_held();
        Some((held, reason))
    }

    /// Forgets the held entry. Its subnet stays the first choice.
    pub(super) fn forget_held(&mut self) {
        if let Some(held) = self.held.take() {
            self.last_subnet = Some(held.lease.subnet);
        }
    }

    /// Whether an entry with our identity was written by this host, as far as one snapshot shows.
    fn is_this_host(&self, entry: &LeaseEntry, request: &LeaseRequest) -> bool {
        let is_unchanged = self.held.as_ref().is_some_and(|h| h.key == entry.key && h.mod_revision == entry.mod_revision);
        is_unchanged || entry.owner.public_ip.is_empty() || shares_address(&entry.owner.public_ip, &request.public_ip)
    }

    fn is_dead(&self, entry: &LeaseEntry) -> bool {
        self.dead_entry.as_ref().is_some_and(|(key, revision)| *key == entry.key && *revision == entry.mod_revision)
    }

    fn origin(&self, entry: &LeaseEntry) -> LeaseOrigin {
        self.held.as_ref().filter(|held| held.key == entry.key).map_or(LeaseOrigin::Reused, |held| held.lease.origin)
    }
}

/// Decides the next action.
pub(super) fn decide(snapshot: &LeaseSnapshot, request: &LeaseRequest, state: &HolderState) -> Action {
    let config = snapshot.config.as_ref().and_then(|config| NetworkConfig::parse(&config.text).ok());
    if config.is_some_and(|parsed| parsed.config != request.network) {
        // The requester has not seen this configuration yet; its next request will be based on it.
        return Action::Idle;
    }
    // A host with IPv6 disabled has no IPv6 address for a lease of an IPv6 subnet.
    let request = &LeaseRequest { network: request.network.restricted_to(request.public_ip.families()), ..request.clone() };
    action_for_own_entry(snapshot, request, state)
        .or_else(|| action_for_shared_address(snapshot, request, state))
        .unwrap_or_else(|| action_for_new_entry(snapshot, request, state))
}

/// The action for an entry that names this host.
fn action_for_own_entry(snapshot: &LeaseSnapshot, request: &LeaseRequest, state: &HolderState) -> Option<Action> {
    let mut ours: Vec<(&LeaseEntry, Subnet)> = snapshot
        .entries
        .iter()
        .filter(|entry| entry.belongs_to(request))
        .filter_map(|entry| Some((entry, entry.subnet?)))
        .collect();
    let is_this_host = |entry: &LeaseEntry| state.is_this_host(entry, request);
    let is_held = |entry: &LeaseEntry| state.held.as_ref().is_some_and(|held| held.key == entry.key);
    // Best first: certainly ours, held, inside the network, reserved, oldest.
    ours.sort_by_key(|(entry, subnet)| {
        (
            !is_this_host(entry),
            !is_held(entry),
            !request.network.allows_subnet(subnet),
            entry.etcd_lease.is_some(),
            entry.create_revision,
        )
    });
    let (entry, subnet) = *ours.first()?;
    if !is_this_host(entry) && !state.is_dead(entry) {
        let reason = format!(
            "this host's identity is that of {}, which holds {subnet}: if this host was copied from that one, stop overlayd here, \
             remove <state-dir>/node-id and start it again",
            entry.describe_holder(),
        );
        match entry.etcd_lease {
            Some(etcd_lease) => {
                let (key, mod_revision) = (entry.key.clone(), entry.mod_revision);
                return Some(Action::VerifyLiveness { key, mod_revision, etcd_lease, reason });
            }
            // The liveness of a reservation's holder cannot be checked. We use it unless the other holder just took it from us.
            None if state.contender.as_ref() == Some(&entry.owner) => return Some(Action::RetryLater { reason }),
            None => {}
        }
    }
    if !request.network.allows_subnet(&subnet) {
        let networks: Vec<String> =
            request.network.pools.iter().map(|(_, p)| format!("{} (/{})", p.network, p.subnet_length)).collect();
        let mismatch = format!("{subnet} is not a subnet of the network {}", networks.join(" "));
        return Some(match entry.etcd_lease {
            None => Action::RetryLater {
                reason: format!(
                    "the reservation {mismatch}: delete its key `{}` from etcd, or change the network",
                    printable(&entry.key)
                ),
            },
            Some(_) => release(entry, mismatch),
        });
    }
    let extra = ours.iter().skip(1).find(|(other, _)| other.etcd_lease.is_some() && is_this_host(other));
    if let Some((other, subnet)) = extra {
        return Some(release(other, format!("{subnet} is a second lease of this host")));
    }
    let held_entry = entry.to_held(subnet, state.origin(entry));
    if codec::decode_value(&subnet, &entry.value).as_ref() == Ok(&lease_value(request)) {
        return Some(Action::Keep(held_entry));
    }
    Some(peer_reject_reason(&subnet, request).map_or(Action::Write(held_entry), |reason| Action::RetryLater { reason }))
}

fn release(entry: &LeaseEntry, reason: String) -> Action {
    Action::Release { key: entry.key.clone(), mod_revision: entry.mod_revision, etcd_lease: entry.etcd_lease, reason }
}

/// The action for an entry with this host's public IP and another identity, or none. This host wrote it before it lost its state,
/// or while it ran flannel.
fn action_for_shared_address(snapshot: &LeaseSnapshot, request: &LeaseRequest, state: &HolderState) -> Option<Action> {
    let mut matching: Vec<(&LeaseEntry, Subnet)> = snapshot
        .entries
        .iter()
        .filter(|entry| !entry.belongs_to(request) && shares_address(&entry.owner.public_ip, &request.public_ip))
        .filter_map(|entry| Some((entry, entry.subnet?)))
        .collect();
    // An entry whose holder may be alive comes first: it decides whether any entry may be taken over.
    let may_be_alive = |entry: &LeaseEntry| entry.owner.node.is_some() && entry.etcd_lease.is_some() && !state.is_dead(entry);
    matching.sort_by_key(|(entry, subnet)| (!may_be_alive(entry), !request.network.allows_subnet(subnet), entry.create_revision));
    let (entry, subnet) = *matching.first()?;
    let reason = || {
        let shared_ips: Vec<String> = request.public_ip.iter().map(|(_, ip)| ip.to_string()).collect();
        format!(
            "public IP {} is in use by {}, which holds {subnet}: give each host an address of its own (--public-ip), or run `overlayd \
             cleanup` on the other host; if this host wrote it before it lost its state directory, overlayd takes it over by itself \
             once it is no longer renewed",
            shared_ips.join(", "),
            entry.describe_holder(),
        )
    };
    if let (true, Some(etcd_lease)) = (may_be_alive(entry), entry.etcd_lease) {
        let (key, mod_revision) = (entry.key.clone(), entry.mod_revision);
        return Some(Action::VerifyLiveness { key, mod_revision, etcd_lease, reason: reason() });
    }
    if state.contender.as_ref() == Some(&entry.owner) && entry.etcd_lease.is_none() {
        return Some(Action::RetryLater { reason: reason() });
    }
    if !request.network.allows_subnet(&subnet) {
        return None;
    }
    Some(
        peer_reject_reason(&subnet, request)
            .map_or(Action::TakeOver(entry.to_held(subnet, LeaseOrigin::TakenOver)), |reason| Action::RetryLater { reason }),
    )
}

/// The action for a new entry with a free subnet.
fn action_for_new_entry(snapshot: &LeaseSnapshot, request: &LeaseRequest, state: &HolderState) -> Action {
    let network = &request.network;
    let allocated = snapshot.allocated_ranges();
    let free = |subnet: &Subnet| {
        let clear = |cidr: Cidr| !allocated.iter().any(|other| other.overlaps(cidr) && !covers_network(network, *other));
        network.allows_subnet(subnet) && subnet.iter().all(|(_, cidr)| clear(cidr))
    };
    let reusable = [state.last_subnet, request.preferred].into_iter().flatten().find(|subnet| free(subnet));
    let Some(subnet) = reusable.or_else(|| pick::pick(network, &allocated, &request.node.id, state.attempt)) else {
        let pools: Vec<String> =
            network.pools.iter().map(|(_, p)| format!("{} of {} (/{})", p.count(), p.network, p.subnet_length)).collect();
        let reason = format!(
            "no free subnet: all {} are leased; release the leases of hosts that are gone (`overlayctl subnets` lists them) or \
             configure a larger network",
            pools.join(" or all "),
        );
        return Action::RetryLater { reason };
    };
    if let Some(reason) = peer_reject_reason(&subnet, request) {
        return Action::RetryLater { reason };
    }
    // If all keys have our form, the key alone decides a race. A foreign key may name the range in another form.
    let is_canonical = |entry: &LeaseEntry| entry.owner.node.is_some() && entry.subnet.is_some_and(|s| same_shape(network, &s));
    let compare_all = network.families().count() > 1 || snapshot.config.is_none() || !snapshot.entries.iter().all(is_canonical);
    Action::Acquire { subnet, compare_all }
}

fn covers_network(network: &NetworkConfig, range: Cidr) -> bool {
    network.network(range.family()).is_some_and(|all| range.covers(all))
}

fn same_shape(network: &NetworkConfig, subnet: &Subnet) -> bool {
    network.families().eq(subnet.families())
        && subnet.iter().all(|(family, cidr)| network.pools.get(family).is_some_and(|pool| pool.subnet_length == cidr.length()))
}

/// Why other hosts would reject our own value. Such a lease must not be written: every host would ignore it.
fn peer_reject_reason(subnet: &Subnet, request: &LeaseRequest) -> Option<String> {
    let lease = lease_value(request);
    let text = match codec::encode(&lease) {
        Ok(text) => text,
        Err(error) => return Some(format!("cannot encode this host's lease: {error}")),
    };
    match codec::decode_value(subnet, text.as_bytes()) {
        Ok(read) if read == lease => None,
        Ok(_) => Some("this host's public IPs and MACs do not match the network's families".to_owned()),
        Err(kind) => Some(format!("other hosts would reject this host's lease: {kind}")),
    }
}

#[cfg(test)]
#[path = "tests/lease.rs"]
mod tests;
