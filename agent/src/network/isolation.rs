//! What an isolated network is connected to on this host: its transit, and the networks that it is routed to.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Network, NetworkStateStore};
use crate::model::{NetworkName, NetworkRecord};
use crate::plan::isolation::{Isolation, PeerNetwork, Transit};

/// The connections, and why others are missing.
#[derive(Debug, Default)]
pub(super) struct Connections {
    /// The records of this host's networks.
    pub(super) others: Arc<BTreeMap<NetworkName, NetworkRecord>>,
    problems: Vec<String>,
}

impl<M: NetworkStateStore> Network<M> {
    /// What connects an isolated network; `None` without a record.
    pub(super) fn isolation(&mut self) -> Option<Isolation> {
        let name = &self.settings.name;
        let record = self.store.record.as_ref()?;
        let (peers, mut problems) = peers(name, record, &self.connections.others, &self.settings.netns_prefix);
        let transit = if record.internal { None } else { self.state_store.transit() };
        if transit.is_none() && !record.internal {
            let count = Transit::COUNT;
            problems.push(format!("it has no way out: this host is in {count} other networks that have one; leave some"));
        }
        if self.connections.problems != problems {
            for problem in &problems {
                tracing::warn!(problem, "a connection of the network is missing");
            }
            self.connections.problems = problems;
            self.changed = true;
        }
        Some(Isolation { transit, peers })
    }

    /// Why connections are missing.
    pub(super) fn connection_problems(&self) -> impl Iterator<Item = String> {
        self.connections.problems.iter().cloned()
    }
}

/// The networks that a network is routed to, and why others that it names are not.
fn peers(
    name: &NetworkName,
    record: &NetworkRecord,
    others: &BTreeMap<NetworkName, NetworkRecord>,
    netns_prefix: &str,
) -> (Vec<PeerNetwork>, Vec<String>) {
    let mut peers: Vec<(&NetworkName, &NetworkRecord)> = Vec::new();
    let mut problems = Vec::new();
    for peer in record.peers.iter().filter(|peer| *peer != name) {
        let remedy = format!("`overlayctl network set {name} --remove-peer {peer}` ends this");
        let Some(other) = others.get(peer) else {
            problems
                .push(format!("its peer {peer} is not on this host, perhaps since it has no valid record: create it; {remedy}"));
            continue;
        };
        let overlap = peers.iter().find_map(|(second, other_peer)| Some((Some(second), other.overlap(other_peer)?)));
        let overlap = other.overlap(record).map(|ranges| (None, ranges)).or(overlap);
        if !other.isolated {
            problems.push(format!("its peer {peer} is routed, and only isolated networks are routed to each other: {remedy}"));
        } else if !other.peers.contains(name) {
            problems.push(format!(
                "its peer {peer} does not name it, so nothing is routed between them: `overlayctl network set {peer} --peer {name}` \
                 routes, {remedy}"
            ));
        } else if let Some((second, (range, other_range))) = overlap {
            let holder = second.map_or_else(|| "its own".to_owned(), |second| format!("that of its peer {second}"));
            problems
                .push(format!("the range {range} of its peer {peer} overlaps {holder} {other_range}: choose another; {remedy}"));
        } else {
            peers.push((peer, other));
        }
    }
    let peer = |(name, record): (&NetworkName, &NetworkRecord)| {
        let ranges = record.config.pools.map(|_, pool| pool.network);
        Some(PeerNetwork { name: name.clone(), namespace: format!("{netns_prefix}{name}"), vni: record.vni()?, ranges })
    };
    (peers.into_iter().filter_map(peer).collect(), problems)
}
