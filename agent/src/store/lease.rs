//! What a host without a lease, or with one, does next: a pure function of what stands in the store, what is wished and what is remembered.
//! [`hold`](super::hold) carries it out.

use std::net::IpAddr;
use std::time::Duration;

use super::codec::{self, Owner};
use super::keys::claimed_ranges;
use super::pick;
use super::read::{Listing, RawConfig, RawEntry};
use crate::model::event::{HeldLease, LeaseOrigin, LeaseWish};
use crate::model::lease::printable;
use crate::model::{Backend, Cidr, Lease, NetworkConfig, PerFamily, Subnet};

/// How long a host waits that cannot get a subnet before it looks again by itself.
pub(super) const RETRY: Duration = Duration::from_secs(10);

/// An entry of the store, as far as who holds what is concerned.
#[derive(Debug, Clone)]
pub(super) struct Claim {
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
pub(super) struct Look {
    pub(super) revision: i64,
    pub(super) config: Option<RawConfig>,
    pub(super) claims: Vec<Claim>,
}

/// What a holder remembers from one look to the next.
#[derive(Debug, Clone, Default)]
pub(super) struct Memory {
    /// What this process holds.
    pub(super) held: Option<Held>,
    /// What it held before it lost it.
    pub(super) last: Option<Subnet>,
    /// The entry (key and revision of its last change) whose holder was found to be gone.
    pub(super) dead: Option<(String, i64)>,
    /// Who overwrote our entry.
    pub(super) rival: Option<Owner>,
    /// Races lost since the last success.
    pub(super) attempt: u32,
}

/// An entry that this process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) key: String,
    /// The revision of the last change that is known to be good.
    pub(super) mod_revision: i64,
    pub(super) lease: HeldLease,
}

/// What to do next. Every write is guarded by the revision of what the decision rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// The entry is ours and as it should be.
    Keep(Held),
    /// The entry is ours (now): write our value; the etcd lease stays as it is.
    Write(Held),
    /// The entry's holder is gone: write our value with an etcd lease of our own.
    TakeOver(Held),
    /// Make a new entry.
    Acquire {
        subnet: Subnet,
        /// Also compare that nothing at all was made since the look, because another key could name the same range.
        whole: bool,
    },
    /// The entry is ours and must go.
    Release { key: String, mod_revision: i64, etcd_lease: Option<i64>, reason: String },
    /// Find out whether the holder still renews this etcd lease.
    Prove { key: String, mod_revision: i64, etcd_lease: i64, reason: String },
    /// Nothing can be done now.
    Wait { reason: String },
    /// The wish rests on an older configuration than the store's: nothing is to be done before the next wish.
    Stay,
}

impl Look {
    /// What a listing says to the host with this identity.
    pub(super) fn of(listing: Listing, id: &str) -> Look {
        let claims = listing.entries.into_iter().map(|entry| Claim::of(entry, id)).collect();
        Look { revision: listing.revision, config: listing.config, claims }
    }

    pub(super) fn claim(&self, key: &str) -> Option<&Claim> {
        self.claims.iter().find(|claim| claim.key == key)
    }

    fn taken(&self) -> Vec<Cidr> {
        self.claims.iter().flat_map(|claim| claim.ranges.iter().copied()).collect()
    }
}

impl Claim {
    fn of(entry: RawEntry, id: &str) -> Claim {
        let owner = codec::owner(&entry.value);
        // Others' values are not needed again, and there can be many.
        let ours = owner.node.as_ref().is_some_and(|node| node.id == id);
        Claim {
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

    fn is_of(&self, wish: &LeaseWish) -> bool {
        self.owner.node.as_ref().is_some_and(|node| node.id == wish.node.id)
    }

    /// The entry as one that we hold.
    fn held(&self, subnet: Subnet, origin: LeaseOrigin) -> Held {
        let lease = HeldLease { subnet, etcd_lease: self.etcd_lease, origin };
        Held { key: self.key.clone(), mod_revision: self.mod_revision, lease }
    }

    fn holder(&self) -> String {
        let ips: Vec<String> = self.owner.public_ip.iter().map(|(_, ip)| ip.to_string()).collect();
        let ips = if ips.is_empty() { "no public IP".to_owned() } else { format!("public IP {}", ips.join(", ")) };
        match &self.owner.node {
            Some(node) => format!("host {} (identity {}, {ips})", node.name, node.id),
            None => format!("a flannel host ({ips})"),
        }
    }
}

/// The lease that a wish asks for.
pub(super) fn wished(wish: &LeaseWish) -> Lease {
    let backend = Backend::Vxlan { vni: wish.network.vxlan.vni, vtep: wish.vtep };
    Lease { public_ip: wish.public_ip, backend, node: Some(wish.node.clone()) }
}

fn shares_address(one: &PerFamily<IpAddr>, other: &PerFamily<IpAddr>) -> bool {
    one.iter().any(|(family, ip)| other.get(family) == Some(ip))
}

impl Memory {
    /// Takes note of a lease that is not ours any more, and tells why. `None` where nothing is lost.
    pub(super) fn notice_loss(&mut self, look: &Look, wish: &LeaseWish) -> Option<(Held, String)> {
        let held = self.held.clone()?;
        let reason = match look.claim(&held.key) {
            None => format!("the lease of {} is gone: it was deleted or has expired", held.lease.subnet),
            Some(claim) if claim.mod_revision == held.mod_revision => return None,
            Some(claim) if claim.is_of(wish) && self.is_this_host(claim, wish) => return None,
            Some(claim) => {
                self.rival = Some(claim.owner.clone());
                format!("the lease of {} was overwritten by {}", held.lease.subnet, claim.holder())
            }
        };
        self.lose();
        Some((held, reason))
    }

    /// Forgets what is held; the subnet stays the first choice.
    pub(super) fn lose(&mut self) {
        if let Some(held) = self.held.take() {
            self.last = Some(held.lease.subnet);
        }
    }

    /// Whether a claim with our identity was written by this host, as far as one look can tell.
    fn is_this_host(&self, claim: &Claim, wish: &LeaseWish) -> bool {
        let untouched = self.held.as_ref().is_some_and(|h| h.key == claim.key && h.mod_revision == claim.mod_revision);
        untouched || claim.owner.public_ip.is_empty() || shares_address(&claim.owner.public_ip, &wish.public_ip)
    }

    fn is_dead(&self, claim: &Claim) -> bool {
        self.dead.as_ref().is_some_and(|(key, revision)| *key == claim.key && *revision == claim.mod_revision)
    }

    fn origin(&self, claim: &Claim) -> LeaseOrigin {
        self.held.as_ref().filter(|held| held.key == claim.key).map_or(LeaseOrigin::Reused, |held| held.lease.origin)
    }
}

/// What to do next.
pub(super) fn decide(look: &Look, wish: &LeaseWish, memory: &Memory) -> Step {
    let config = look.config.as_ref().and_then(|config| NetworkConfig::parse(&config.text).ok());
    if config.is_some_and(|parsed| parsed.config != wish.network) {
        // Whoever wishes has not seen it yet; the next wish comes from it.
        return Step::Stay;
    }
    // A host on which IPv6 is switched off has no address to lease a subnet of it with.
    let wish = &LeaseWish { network: wish.network.only(wish.public_ip.families()), ..wish.clone() };
    own_entry(look, wish, memory)
        .or_else(|| entry_with_our_address(look, wish, memory))
        .unwrap_or_else(|| new_entry(look, wish, memory))
}

/// An entry that names this host.
fn own_entry(look: &Look, wish: &LeaseWish, memory: &Memory) -> Option<Step> {
    let mut ours: Vec<(&Claim, Subnet)> =
        look.claims.iter().filter(|claim| claim.is_of(wish)).filter_map(|claim| Some((claim, claim.subnet?))).collect();
    let here = |claim: &Claim| memory.is_this_host(claim, wish);
    let held = |claim: &Claim| memory.held.as_ref().is_some_and(|held| held.key == claim.key);
    // The best first: ours for certain, held, fitting, reserved, oldest.
    ours.sort_by_key(|(claim, subnet)| {
        (!here(claim), !held(claim), !wish.network.leases(subnet), claim.etcd_lease.is_some(), claim.create_revision)
    });
    let (claim, subnet) = *ours.first()?;
    if !here(claim) && !memory.is_dead(claim) {
        let reason = format!(
            "this host's identity is that of {}, which holds {subnet}: if this host was copied from that one, stop overlayd here, \
             remove <state-dir>/node-id and start it again",
            claim.holder(),
        );
        match claim.etcd_lease {
            Some(etcd_lease) => {
                let (key, mod_revision) = (claim.key.clone(), claim.mod_revision);
                return Some(Step::Prove { key, mod_revision, etcd_lease, reason });
            }
            // A reservation does not tell whether its holder lives. It is followed unless its other holder just took it from us.
            None if memory.rival.as_ref() == Some(&claim.owner) => return Some(Step::Wait { reason }),
            None => {}
        }
    }
    if !wish.network.leases(&subnet) {
        let networks: Vec<String> =
            wish.network.pools.iter().map(|(_, p)| format!("{} (/{})", p.network, p.subnet_length)).collect();
        let misfit = format!("{subnet} is no subnet of the network {} any more", networks.join(" "));
        return Some(match claim.etcd_lease {
            None => Step::Wait {
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
    let entry = claim.held(subnet, memory.origin(claim));
    if codec::decode_value(&subnet, &claim.value).as_ref() == Ok(&wished(wish)) {
        return Some(Step::Keep(entry));
    }
    Some(fit(&subnet, wish).map_or(Step::Write(entry), |reason| Step::Wait { reason }))
}

fn release(claim: &Claim, reason: String) -> Step {
    Step::Release { key: claim.key.clone(), mod_revision: claim.mod_revision, etcd_lease: claim.etcd_lease, reason }
}

/// An entry with this host's public IP and another identity, or none: it is this host's from before it lost its state or ran flannel.
fn entry_with_our_address(look: &Look, wish: &LeaseWish, memory: &Memory) -> Option<Step> {
    let mut same: Vec<(&Claim, Subnet)> = look
        .claims
        .iter()
        .filter(|claim| !claim.is_of(wish) && shares_address(&claim.owner.public_ip, &wish.public_ip))
        .filter_map(|claim| Some((claim, claim.subnet?)))
        .collect();
    // One that may be somebody's who lives comes first: it decides whether anything may be taken at all.
    let doubtful = |claim: &Claim| claim.owner.node.is_some() && claim.etcd_lease.is_some() && !memory.is_dead(claim);
    same.sort_by_key(|(claim, subnet)| (!doubtful(claim), !wish.network.leases(subnet), claim.create_revision));
    let (claim, subnet) = *same.first()?;
    let reason = || {
        let shared: Vec<String> = wish.public_ip.iter().map(|(_, ip)| ip.to_string()).collect();
        format!(
            "public IP {} is in use by {}, which holds {subnet}: give each host an address of its own (--public-ip), or run `overlayd \
             cleanup` on the other one; where that is this very host, which has lost its state directory, it takes the lease over by itself \
             once nobody renews it",
            shared.join(", "),
            claim.holder(),
        )
    };
    if let (true, Some(etcd_lease)) = (doubtful(claim), claim.etcd_lease) {
        let (key, mod_revision) = (claim.key.clone(), claim.mod_revision);
        return Some(Step::Prove { key, mod_revision, etcd_lease, reason: reason() });
    }
    if memory.rival.as_ref() == Some(&claim.owner) && claim.etcd_lease.is_none() {
        return Some(Step::Wait { reason: reason() });
    }
    if !wish.network.leases(&subnet) {
        return None;
    }
    Some(fit(&subnet, wish).map_or(Step::TakeOver(claim.held(subnet, LeaseOrigin::TakenOver)), |reason| Step::Wait { reason }))
}

/// A subnet that nobody has.
fn new_entry(look: &Look, wish: &LeaseWish, memory: &Memory) -> Step {
    let network = &wish.network;
    let taken = look.taken();
    let free = |subnet: &Subnet| {
        let clear = |cidr: Cidr| !taken.iter().any(|other| other.overlaps(cidr) && !covers_network(network, *other));
        network.leases(subnet) && subnet.iter().all(|(_, cidr)| clear(cidr))
    };
    let known = [memory.last, wish.preferred].into_iter().flatten().find(|subnet| free(subnet));
    let Some(subnet) = known.or_else(|| pick::pick(network, &taken, &wish.node.id, memory.attempt)) else {
        let pools: Vec<String> =
            network.pools.iter().map(|(_, p)| format!("{} of {} (/{})", p.count(), p.network, p.subnet_length)).collect();
        let reason = format!(
            "no free subnet: all {} are leased; release the leases of hosts that are gone (`overlayctl subnets` lists them) or \
             configure a larger network",
            pools.join(" or all "),
        );
        return Step::Wait { reason };
    };
    if let Some(reason) = fit(&subnet, wish) {
        return Step::Wait { reason };
    }
    // Where every key has the form of ours, the key alone decides a race; a foreign one may name the range in another form.
    let usual = |claim: &Claim| claim.owner.node.is_some() && claim.subnet.is_some_and(|s| same_shape(network, &s));
    let whole = network.families().count() > 1 || look.config.is_none() || !look.claims.iter().all(usual);
    Step::Acquire { subnet, whole }
}

fn covers_network(network: &NetworkConfig, range: Cidr) -> bool {
    network.network(range.family()).is_some_and(|all| range.covers(all))
}

fn same_shape(network: &NetworkConfig, subnet: &Subnet) -> bool {
    network.families().eq(subnet.families())
        && subnet.iter().all(|(family, cidr)| network.pools.get(family).is_some_and(|pool| pool.subnet_length == cidr.length()))
}

/// Why others would refuse our own value; nobody is helped by a lease that is left out everywhere.
fn fit(subnet: &Subnet, wish: &LeaseWish) -> Option<String> {
    let lease = wished(wish);
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
