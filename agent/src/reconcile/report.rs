//! Answers to questions: what the agent knows, in the shapes of the socket.

use super::{Memory, Query, Reconciler, SubnetRow};
use crate::model::api::{
    DataPathStatus, Health, LeaseStatus, PeerEntry, Peers, Status, StoreStatus, SubnetEntry, UnderlayStatus,
};
use crate::model::event::{Connection, OwnLease};
use crate::model::network::IPV6_LEAST_MTU;
use crate::model::peer::Reach;
use crate::model::{Device, Family};
use crate::plan::desired::Host;
use crate::plan::state::{State, Value, Via};
use crate::plan::{DataPath, Key};

/// How many failed entries and refusals the status lists; the numbers are complete.
const LISTED: usize = 100;

impl<D: DataPath, M: Memory> Reconciler<D, M> {
    pub(super) fn answer(&self, query: Query) {
        // A client that has gone away is no error.
        match query {
            Query::Status(reply) => drop(reply.send(self.status())),
            Query::Subnets(reply) => drop(reply.send(self.subnets())),
            Query::Peers(reply) => drop(reply.send(self.peers())),
        }
    }

    fn status(&self) -> Status {
        let problems = self.problems();
        let ready = self.is_ready();
        let (connected, revision, error) = match &self.connection {
            Connection::Up { revision } => (true, *revision, None),
            Connection::Down { error } => (false, 0, Some(error.clone())),
        };
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.settings.node.name.clone(),
            node_id: self.settings.node.id.clone(),
            uptime_seconds: self.started.elapsed().as_secs(),
            ready,
            health: match (ready, problems.is_empty()) {
                (true, true) => Health::Ok,
                (true, false) => Health::Degraded,
                // A data path that is in place forwards on, whatever the agent waits for.
                (false, _) if self.host.is_some() => Health::Degraded,
                (false, _) => Health::Waiting,
            },
            problems,
            store: StoreStatus {
                connected,
                endpoints: self.settings.store_endpoints.clone(),
                prefix: self.settings.store_prefix.clone(),
                revision,
                error,
                config_errors: self.config_errors.as_ref().map(|errors| errors.0.clone()).unwrap_or_default(),
                leases: self.roster.len(),
                refused: self.refused.values().take(LISTED).cloned().collect(),
            },
            network: self.network.clone(),
            lease: match &self.own {
                OwnLease::Held(held) => Some(LeaseStatus { subnet: held.subnet, reservation: held.etcd_lease.is_none() }),
                OwnLease::Wanted { .. } => None,
            },
            underlay: self.underlay.as_ref().map(|underlay| UnderlayStatus {
                interface: underlay.name.clone(),
                mtu: underlay.mtu,
                public_ip: underlay.public_ip,
            }),
            data_path: DataPathStatus {
                peers: self.peers.len(),
                failed: self.repairs.failures(LISTED),
                drift_repairs: self.repairs.count(),
                last_drift: self.repairs.last().cloned(),
                mtu: self.host.as_ref().map(|host| host.mtu()),
                nexthop_objects: self.settings.nexthop_objects,
                // The kernel counts them; whoever hands the status on asks it.
                dropped: std::collections::BTreeMap::new(),
            },
            endpoints: self.endpoints.len(),
        }
    }

    /// What is not well, in the order in which it has to be mended.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Connection::Down { error } = &self.connection {
            problems.push(format!("etcd does not answer, the data path stays as it is: {error}"));
        }
        if self.lease_over && self.held_for_a_time() {
            problems.push(
                "etcd has not answered for as long as this host's lease lasts, so another host may get its subnet: bring etcd back before \
                 hosts join"
                    .to_owned(),
            );
        }
        let config = format!("{}/config", self.settings.store_prefix);
        if self.config_missing {
            problems.push(match self.network {
                None => {
                    format!("waiting for the network's configuration under {config}: write it with `overlayctl config set FILE`")
                }
                Some(_) => format!("the network's configuration under {config} is gone, the last one stays in force"),
            });
        }
        if let Some(errors) = &self.config_errors {
            let kept = if self.network.is_some() { "; the last good one stays in force" } else { "" };
            problems.push(format!(
                "the network's configuration under {config} is bad: {errors}; correct it and write it with `overlayctl config set FILE`{kept}"
            ));
        }
        problems.extend(self.underlay_error.iter().chain(&self.ipv6_problem).cloned());
        problems.extend(self.dump_error.as_ref().map(|error| format!("the kernel's state cannot be read: {error}")));
        if let OwnLease::Wanted { reason } = &self.own
            && self.underlay.is_some()
        {
            problems.push(format!("no subnet is leased: {reason}"));
        }
        problems.extend(self.host.as_ref().and_then(mtu_too_small));
        if let Some(first) = self.repairs.failures(1).first() {
            let waiting = match self.blocked() {
                0 => String::new(),
                blocked => format!("; {blocked} more stand on them and wait"),
            };
            problems.push(format!(
                "{} entries cannot be programmed, the first: {}: {}{waiting}",
                self.repairs.causes(),
                first.entry,
                first.error
            ));
        }
        if let Some((key, repairs)) = self.repairs.fights().next() {
            problems.push(format!(
                "something on this host keeps undoing {} entries, the first: {key}, changed by others {repairs} times within seconds: \
                 `ip monitor` and `nft monitor` show who",
                self.repairs.fights().count()
            ));
        }
        if !self.refused.is_empty() {
            let first = self.refused.values().next().map(ToString::to_string).unwrap_or_default();
            problems.push(format!("{} leases are left out, the first: {first}", self.refused.len()));
        }
        problems
    }

    /// How many entries wait for one that cannot be set.
    fn blocked(&self) -> usize {
        let blocked = |(key, value): &(&Key, &Value)| self.blocked_by(key, value).is_some();
        self.desired.iter().filter(blocked).count()
    }

    fn subnets(&self) -> Vec<SubnetRow> {
        let mut rows: Vec<SubnetRow> = self
            .roster
            .iter()
            .map(|(key, value)| {
                let refused = self.refused.get(key).map(|refusal| refusal.kind.to_string());
                match value {
                    Ok(record) => {
                        let own = self.own_host.as_ref().is_some_and(|own| own.subnet == record.subnet);
                        let mut entry = SubnetEntry::from_record(key, record);
                        entry.own = own;
                        entry.refused = refused;
                        (entry, record.etcd_lease)
                    }
                    Err(refusal) => (SubnetEntry::from_refusal(refusal), None),
                }
            })
            .collect();
        rows.sort_by(|(a, _), (b, _)| (a.refused.is_some(), a.subnet, &a.key).cmp(&(b.refused.is_some(), b.subnet, &b.key)));
        rows
    }

    fn peers(&self) -> Peers {
        let mut peers = Vec::new();
        let Some(host) = &self.host else { return Peers { peers } };
        for (key, peer) in &self.peers {
            let name = match self.roster.get(key) {
                Some(Ok(record)) => record.lease.node.as_ref().map(|node| node.name.clone()),
                _ => None,
            };
            for (family, reach) in peer.reach.iter() {
                peers.push(self.peer_entry(Device::vxlan(family, host.network.vxlan.vni), reach, name.clone()));
            }
        }
        peers.sort_by_key(|peer| peer.subnet);
        Peers { peers }
    }

    fn peer_entry(&self, device: Device, reach: &Reach, host: Option<String>) -> PeerEntry {
        let route = Key::Route(reach.subnet);
        let nexthop_id = match self.desired.get(&route) {
            Some(Value::Route(Via::Nexthop(id))) => Some(*id),
            _ => None,
        };
        let keys = [
            Some(Key::Fdb(device, reach.vtep)),
            Some(Key::Neigh(device, reach.subnet.base())),
            nexthop_id.map(Key::Nexthop),
            Some(route),
        ];
        let same = |key: &Key, state: &State| self.desired.get(key) == state.get(key);
        let missing: Vec<String> = keys
            .iter()
            .flatten()
            .filter(|key| !same(key, &self.actual))
            .map(|key| match (self.desired.get(key).and_then(|value| self.blocked_by(key, value)), self.repairs.failure(key)) {
                (Some(cause), _) => format!("{}: waits for {cause}", key.kind()),
                (None, Some(error)) => format!("{}: {error}", key.kind()),
                (None, None) => key.kind().to_owned(),
            })
            .collect();
        PeerEntry {
            subnet: reach.subnet,
            host,
            public_ip: reach.public_ip,
            vtep: reach.vtep,
            device: device.name(),
            nexthop_id,
            state: if missing.is_empty() { "programmed".to_owned() } else { format!("missing {}", missing.join(", ")) },
            last_repair: keys.iter().flatten().filter_map(|key| self.repairs.last_of(key)).max(),
        }
    }
}

/// That IPv6 cannot work with the overlay's MTU: the kernel has none on such devices (RFC 8200, section 5), and refuses what stands on it.
fn mtu_too_small(host: &Host) -> Option<String> {
    let small = host.families().any(|family| family == Family::V6) && host.mtu() < IPV6_LEAST_MTU;
    small.then(|| {
        let (name, overhead) = (&host.underlay.name, host.underlay.mtu.saturating_sub(host.mtu()));
        format!(
            "the overlay's MTU is {}, and IPv6 needs {IPV6_LEAST_MTU}: raise the MTU of {name} (now {}) to {} or more, on every host and \
             between them, or take IPv6 out of the network's configuration",
            host.mtu(),
            host.underlay.mtu,
            IPV6_LEAST_MTU + overhead
        )
    })
}
