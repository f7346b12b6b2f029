//! What a host without a lease, or with one, does next: a pure function of what stands in the store, what is wished and what is
//! remembered. [`hold`](super::hold) carries it out.

use std::net::IpAddr;
use std::time::Duration;

use super::codec::{self, Owner};
use super::keys::claimed_ranges;
use super::pick;
use super::read::{Listing, RawConfig, RawEntry};
use crate::model::event::{HeldLease, LeaseOrigin, LeaseRequest};
use crate::model::lease::printable;
use crate::model::{Backend, Cidr, Lease, NetworkConfig, PerFamily, Subnet};

/// How long a host waits that cannot get a subnet before it looks again by itself.
pub(super) const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// An entry of the store, as far as who holds what is concerned.
#[derive(Debug, Clone)]
pub(super) struct LeaseEntry {
    pub(super) key: String,
    /// The subnet, where the key is in canonical form.
    pub(super) subnet: Option<Subnet>,
    /// Every range that the key names in any form.
    ranges: Vec<Cidr>,
    pub(super) owner: Owner,
    /// The value, where it is of this host.
    value: Vec<u8>,
    pub(super) mod_revision: i64,
    create_revision: i64,
    pub(super) etcd_lease: Option<i64>,
}

/// Everything in the store at one revision.
#[derive(Debug, Clone)]
pub(super) struct LeaseSnapshot {
    pub(super) revision: i64,
    pub(super) config: Option<RawConfig>,
    pub(super) entries: Vec<LeaseEntry>,
}

/// What a holder remembers from one look to the next.
#[derive(Debug, Clone, Default)]
pub(super) struct HolderState {
    /// What this process holds.
    pub(super) held: Option<HeldEntry>,
    /// What it held before it lost it.
    pub(super) last_subnet: Option<Subnet>,
    /// The entry (key and revision of its last change) whose holder was found to be gone.
    pub(super) dead_entry: Option<(String, i64)>,
    /// Who overwrote our entry.
    pub(super) contender: Option<Owner>,
    /// Races lost since the last success.
    pub(super) attempt: u32,
}

/// An entry that this process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HeldEntry {
    pub(super) key: String,
    /// The revision of the last change that is known to be good.
    pub(super) mod_revision: i64,
    pub(super) lease: HeldLease,
}

/// What to do next. Every write is guarded by the revision of what the decision rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// The entry is ours and as it should be.
    Keep(HeldEntry),
    /// The entry is ours (now): write our value; the etcd lease stays as it is.
    Write(HeldEntry),
    /// The entry's holder is gone: write our value with an etcd lease of our own.
    TakeOver(HeldEntry),
    /// Make a new entry.
    Acquire {
        subnet: Subnet,
        /// Also compare that nothing at all was made since the look, because another key could name the same range.
        compare_all: bool,
    },
    /// The entry is ours and must go.
    Release { key: String, mod_revision: i64, etcd_lease: Option<i64>, reason: String },
    /// Find out whether the holder still renews this etcd lease.
    VerifyLiveness { key: String, mod_revision: i64, etcd_lease: i64, reason: String },
    /// Nothing can be done now.
    RetryLater { reason: String },
    /// The wish rests on an older configuration than the store's: nothing is to be done before the next wish.
    Idle,
}

impl LeaseSnapshot {
    /// What a listing says to the host with this identity.
    pub(super) fn from_listing(listing: Listing, id: &str) -> LeaseSnapshot {
        let claims = listing.entries.into_iter().map(|entry| LeaseEntry::from_raw(entry, id)).collect();
        LeaseSnapshot { revision: listing.revision, config: listing.config, entries: claims }
    }

    pub(super) fn entry(&self, key: &str) -> Option<&LeaseEntry> {
        self.entries.iter().find(|claim| claim.key == key)
    }

    fn allocated_ranges(&self) -> Vec<Cidr> {
        self.entries.iter().flat_map(|claim| claim.ranges.iter().copied()).collect()
    }
}

impl LeaseEntry {
    fn from_raw(entry: RawEntry, id: &str) -> LeaseEntry {
        let owner = codec::owner(&entry.value);
        // Others' values are not needed again, and there can be many.
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

    /// The entry as one that we hold.
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

/// The lease that a wish asks for.
pub(super) fn lease_value(request: &LeaseRequest) -> Lease {
    let backend = Backend::Vxlan { vni: request.network.vxlan.vni, vtep: request.vtep };
    Lease { public_ip: request.public_ip, backend, node: Some(request.node.clone()) }
}

fn shares_address(one: &PerFamily<IpAddr>, other: &PerFamily<IpAddr>) -> bool {
    one.iter().any(|(family, ip)| other.get(family) == Some(ip))
}

impl HolderState {
    /// Takes note of a lease that is not ours any more, and tells why. `None` where nothing is lost.
    pub(super) fn detect_loss(&mut self, snapshot: &LeaseSnapshot, request: &LeaseRequest) -> Option<(HeldEntry, String)> {
        let held = self.held.clone()?;
        let reason = match snapshot.entry(&held.key) {
            None => format!("the lease of {} is gone: it was deleted or has expired", held.lease.subnet),
            Some(claim) if claim.mod_revision == held.mod_revision => return None,
            Some(claim) if claim.belongs_to(request) && self.is_this_host(claim, request) => return None,
            Some(claim) => {
                self.contender = Some(claim.owner.clone());
                format!("the lease of {} was overwritten by {}", held.lease.subnet, claim.describe_holder())
            }
        };
        self.forget_held();
        Some((held, reason))
    }

    /// Forgets what is held; the subnet stays the first choice.
    pub(super) fn forget_held(&mut self) {
        if let Some(held) = self.held.take() {
            self.last_subnet = Some(held.lease.subnet);
        }
    }

    /// Whether a claim with our identity was written by this host, as far as one look can tell.
    fn is_this_host(&self, entry: &LeaseEntry, request: &LeaseRequest) -> bool {
        let untouched = self.held.as_ref().is_some_and(|h| h.key == entry.key && h.mod_revision == entry.mod_revision);
        untouched || entry.owner.public_ip.is_empty() || shares_address(&entry.owner.public_ip, &request.public_ip)
    }

    fn is_dead(&self, entry: &LeaseEntry) -> bool {
        self.dead_entry.as_ref().is_some_and(|(key, revision)| *key == entry.key && *revision == entry.mod_revision)
    }

    fn origin(&self, entry: &LeaseEntry) -> LeaseOrigin {
        self.held.as_ref().filter(|held| held.key == entry.key).map_or(LeaseOrigin::Reused, |held| held.lease.origin)
    }
}

/// What to do next.
pub(super) fn decide(snapshot: &LeaseSnapshot, request: &LeaseRequest, state: &HolderState) -> Action {
    let config = snapshot.config.as_ref().and_then(|config| NetworkConfig::parse(&config.text).ok());
    if config.is_some_and(|parsed| parsed.config != request.network) {
        // Whoever wishes has not seen it yet; the next wish comes from it.
        return Action::Idle;
    }
    // A host on which IPv6 is switched off has no address to lease a subnet of it with.
    let request = &LeaseRequest { network: request.network.restricted_to(request.public_ip.families()), ..request.clone() };
    action_for_own_entry(snapshot, request, state)
        .or_else(|| action_for_shared_address(snapshot, request, state))
        .unwrap_or_else(|| action_for_new_entry(snapshot, request, state))
}

/// An entry that names this host.
fn action_for_own_entry(snapshot: &LeaseSnapshot, request: &LeaseRequest, state: &HolderState) -> Option<Action> {
    let mut ours: Vec<(&LeaseEntry, Subnet)> = snapshot
        .entries
        .iter()
        .filter(|claim| claim.belongs_to(request))
        .filter_map(|claim| Some((claim, claim.subnet?)))
        .collect();
    let here = |claim: &LeaseEntry| state.is_this_host(claim, request);
    let held = |claim: &LeaseEntry| state.held.as_ref().is_some_and(|held| held.key == claim.key);
    // The best first: ours for certain, held, fitting, reserved, oldest.
    ours.sort_by_key(|(claim, subnet)| {
        (!here(claim), !held(claim), !request.network.allows_subnet(subnet), claim.etcd_lease.is_some(), claim.create_revision)
    });
    let (claim, subnet) = *ours.first()?;
    if !here(claim) && !state.is_dead(claim) {
        let reason = format!(
            "this host's identity is that of {}, which holds {subnet}: if this host was copied from that one, stop overlayd here, \
             remove <state-dir>/node-id and start it again",
            claim.describe_holder(),
        );
        match claim.etcd_lease {
            Some(etcd_lease) => {
                let (key, mod_revision) = (claim.key.clone(), claim.mod_revision);
                return Some(Action::VerifyLiveness { key, mod_revision, etcd_lease, reason });
            }
            // A reservation does not tell whether its holder lives. It is followed unless its other holder just took it from us.
            None if state.contender.as_ref() == Some(&claim.owner) => return Some(Action::RetryLater { reason }),
            None => {}
        }
    }
    if !request.network.allows_subnet(&subnet) {
        let networks: Vec<String> =
            request.network.pools.iter().map(|(_, p)| format!("{} (/{})", p.network, p.subnet_length)).collect();
        let misfit = format!("{subnet} is no subnet of the network {} any more", networks.join(" "));
        return Some(match claim.etcd_lease {
            None => Action::RetryLater {
                reason: format!(
                    "the reservation {misfit}: delete its key `{}` from etcd, or change the network",
                    printable(&claim.key)
                ),
            },
            Some(_) => release(claim, misfit),
        });
    }
    let extra = ours.iter().skip(1).find(|(other, _)| other.etcd_lease.is_some() && here(other));
    if let Some((other, subnet)) = extra {
        return Some(release(other, format!("{subnet} is a second lease of this host")));
    }
    let entry = claim.to_held(subnet, state.origin(claim));
    if codec::decode_value(&subnet, &claim.value).as_ref() == Ok(&lease_value(request)) {
        return Some(Action::Keep(entry));
    }
    Some(peer_reject_reason(&subnet, request).map_or(Action::Write(entry), |reason| Action::RetryLater { reason }))
}

fn release(entry: &LeaseEntry, reason: String) -> Action {
    Action::Release { key: entry.key.clone(), mod_revision: entry.mod_revision, etcd_lease: entry.etcd_lease, reason }
}

/// An entry with this host's public IP and another identity, or none: it is this host's from before it lost its state or ran
/// flannel.
fn action_for_shared_address(snapshot: &LeaseSnapshot, request: &LeaseRequest, state: &HolderState) -> Option<Action> {
    let mut same: Vec<(&LeaseEntry, Subnet)> = snapshot
        .entries
        .iter()
        .filter(|claim| !claim.belongs_to(request) && shares_address(&claim.owner.public_ip, &request.public_ip))
        .filter_map(|claim| Some((claim, claim.subnet?)))
        .collect();
    // One that may be somebody's who lives comes first: it decides whether anything may be taken at all.
    let doubtful = |claim: &LeaseEntry| claim.owner.node.is_some() && claim.etcd_lease.is_some() && !state.is_dead(claim);
    same.sort_by_key(|(claim, subnet)| (!doubtful(claim), !request.network.allows_subnet(subnet), claim.create_revision));
    let (claim, subnet) = *same.first()?;
    let reason = || {
        let shared: Vec<String> = request.public_ip.iter().map(|(_, ip)| ip.to_string()).collect();
        format!(
            "public IP {} is in use by {}, which holds {subnet}: give each host an address of its own (--public-ip), or run `overlayd \
             cleanup` on the other one; where that is this very host, which has lost its state directory, it takes the lease over by itself \
             once nobody renews it",
            shared.join(", "),
            claim.describe_holder(),
        )
    };
    if let (true, Some(etcd_lease)) = (doubtful(claim), claim.etcd_lease) {
        let (key, mod_revision) = (claim.key.clone(), claim.mod_revision);
        return Some(Action::VerifyLiveness { key, mod_revision, etcd_lease, reason: reason() });
    }
    if state.contender.as_ref() == Some(&claim.owner) && claim.etcd_lease.is_none() {
        return Some(Action::RetryLater { reason: reason() });
    }
    if !request.network.allows_subnet(&subnet) {
        return None;
    }
    Some(
        peer_reject_reason(&subnet, request)
            .map_or(Action::TakeOver(claim.to_held(subnet, LeaseOrigin::TakenOver)), |reason| Action::RetryLater { reason }),
    )
}

/// A subnet that nobody has.
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
    // Where every key has the form of ours, the key alone decides a race; a foreign one may name the range in another form.
    let usual = |claim: &LeaseEntry| claim.owner.node.is_some() && claim.subnet.is_some_and(|s| same_shape(network, &s));
    let whole = network.families().count() > 1 || snapshot.config.is_none() || !snapshot.entries.iter().all(usual);
    Action::Acquire { subnet, compare_all: whole }
}

fn covers_network(network: &NetworkConfig, range: Cidr) -> bool {
    network.network(range.family()).is_some_and(|all| range.covers(all))
}

fn same_shape(network: &NetworkConfig, subnet: &Subnet) -> bool {
    network.families().eq(subnet.families())
        && subnet.iter().all(|(family, cidr)| network.pools.get(family).is_some_and(|pool| pool.subnet_length == cidr.length()))
}

/// Why others would refuse our own value; nobody is helped by a lease that is left out everywhere.
fn peer_reject_reason(subnet: &Subnet, request: &LeaseRequest) -> Option<String> {
    let lease = lease_value(request);
    let text = match codec::encode(&lease) {
        Ok(text) => text,
        Err(error) => return Some(format!("this host's lease cannot be written: {error}")),
    };
    match codec::decode_value(subnet, text.as_bytes()) {
        Ok(read) if read == lease => None,
        Ok(_) => Some("this host's public IPs and MACs are not of the network's families".to_owned()),
        Err(kind) => Some(format!("other hosts would refuse this host's lease: {kind}")),
    }
}

#[cfg(test)]
#[path = "tests/lease.rs"]
mod tests;
