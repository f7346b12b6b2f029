//! Answers queries with the types of the admin socket's API.

use super::{Reconciler, ReconcilerQuery, StateStore, SubnetRow};
use crate::model::api::{
    DataPathStatus, Health, LeaseStatus, PeerEntry, Peers, Status, StoreStatus, SubnetEntry, UnderlayStatus,
};
use crate::model::event::{Connection, OwnLease};
use crate::model::network::IPV6_MIN_MTU;
use crate::model::peer::RemoteSubnet;
use crate::model::{Device, Family};
use crate::plan::desired::HostSpec;
use crate::plan::state::{RouteTarget, State, Value};
use crate::plan::{DataPath, Key};

/// Maximum number of failed entries and of rejected leases that the status lists; the counts are complete.
const MAX_LISTED: usize = 100;

impl<D: DataPath, M: StateStore> Reconciler<D, M> {
    pub(super) fn answer_query(&self, query: ReconcilerQuery) {
        // A client that has gone away is no error.
        match query {
            ReconcilerQuery::Status(reply) => drop(reply.send(self.status())),
            ReconcilerQuery::Subnets(reply) => drop(reply.send(self.subnets())),
            ReconcilerQuery::Peers(reply) => drop(reply.send(self.peers())),
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
                // An existing data path keeps forwarding while the agent waits.
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
                leases: self.leases.len(),
                refused: self.rejected.values().take(MAX_LISTED).cloned().collect(),
            },
            network: self.network.clone(),
            lease: match &self.own_lease {
                OwnLease::Held(held) => Some(LeaseStatus { subnet: held.subnet, reservation: held.etcd_lease.is_none() }),
                OwnLease::NotHeld { .. } => None,
            },
            underlay: self.underlay.as_ref().map(|underlay| UnderlayStatus {
                interface: underlay.name.clone(),
                mtu: underlay.mtu,
                public_ip: underlay.public_ip,
                local: underlay.local,
                reasons: self.underlay_reasons.map(|_, reason| reason.to_string()),
            }),
            data_path: DataPathStatus {
                peers: self.peers.len(),
                failed: self.retries.list_failures(MAX_LISTED),
                drift_repairs: self.retries.repair_count(),
                last_drift: self.retries.last_drift().cloned(),
                mtu: self.host.as_ref().map(|host| host.mtu()),
                nexthop_objects: self.settings.nexthop_objects,
                // The kernel counts them; `app` reads the counters and adds them.
                dropped: std::collections::BTreeMap::new(),
            },
            endpoints: self.endpoints.len(),
        }
    }

    /// Problems, in the order in which they have to be solved.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Connection::Down { error } = &self.connection {
            problems.push(format!("etcd does not answer, the data path stays unchanged: {error}"));
        }
        if self.lease_expired && self.lease_can_expire() {
            problems.push(
                "etcd has not answered for longer than this host's lease TTL, so another host may get its subnet: restore etcd before \
                 new hosts join"
                    .to_owned(),
            );
        }
        let config = format!("{}/config", self.settings.store_prefix);
        if self.config_missing {
            problems.push(match self.network {
                None => {
                    format!("waiting for the network's configuration under {config}: write it with `overlayctl config set FILE`")
                }
                Some(_) => format!("the network's configuration under {config} was deleted; the last one stays in use"),
            });
        }
        if let Some(errors) = &self.config_errors {
            let kept = if self.network.is_some() { "; the last valid one stays in use" } else { "" };
            problems.push(format!(
                "the network's configuration under {config} is invalid: {errors}; correct it with `overlayctl config set FILE`{kept}"
            ));
        }
        problems.extend(self.underlay_problems());
        problems.extend(self.dump_error.as_ref().map(|error| format!("cannot dump kernel state: {error}")));
        if let OwnLease::NotHeld { reason } = &self.own_lease
            && self.underlay.is_some()
        {
            problems.push(format!("no subnet is leased: {reason}"));
        }
        problems.extend(self.host.as_ref().and_then(ipv6_mtu_problem));
        if let Some(first) = self.retries.list_failures(1).first() {
            let (failed, them) = match self.retries.root_failure_count() {
                1 => ("1 entry cannot be programmed".to_owned(), "it"),
                causes => (format!("{causes} entries cannot be programmed, the first"), "them"),
            };
            let waiting = match self.blocked_count() {
                0 => String::new(),
                blocked => format!("; {blocked} more depend on {them} and wait"),
            };
            problems.push(format!("{failed}: {}: {}{waiting}", first.entry, first.error));
        }
        if let Some((key, repairs)) = self.retries.contended().next() {
            problems.push(format!(
                "another process keeps changing {} entries, the first: {key}, changed by another process {repairs} times within seconds: \
                 find it with `ip monitor` and `nft monitor`",
                self.retries.contended().count()
            ));
        }
        if !self.rejected.is_empty() {
            let first = self.rejected.values().next().map(ToString::to_string).unwrap_or_default();
            problems.push(format!("{} leases ignored, the first: {first}", self.rejected.len()));
        }
        problems
    }

    /// Number of entries that depend on a failed entry.
    fn blocked_count(&self) -> usize {
        let blocked = |(key, value): &(&Key, &Value)| self.blocked_by(key, value).is_some();
        self.desired.iter().filter(blocked).count()
    }

    fn subnets(&self) -> Vec<SubnetRow> {
        let mut rows: Vec<SubnetRow> = self
            .leases
            .iter()
            .map(|(key, value)| {
                let refused = self.rejected.get(key).map(|refusal| refusal.kind.to_string());
                match value {
                    Ok(record) => {
                        let own = self.local_host.as_ref().is_some_and(|own| own.subnet == record.subnet);
                        let mut entry = SubnetEntry::from_record(key, record);
                        entry.own = own;
                        entry.refused = refused;
                        (entry, record.etcd_lease)
                    }
                    Err(refusal) => (SubnetEntry::from_rejected(refusal), None),
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
            let name = match self.leases.get(key) {
                Some(Ok(record)) => record.lease.node.as_ref().map(|node| node.name.clone()),
                _ => None,
            };
            for (family, reach) in peer.remote_subnets.iter() {
                peers.push(self.peer_entry(Device::vxlan(family, host.network.vxlan.vni), reach, name.clone()));
            }
        }
        peers.sort_by_key(|peer| peer.subnet);
        Peers { peers }
    }

    fn peer_entry(&self, device: Device, reach: &RemoteSubnet, host: Option<String>) -> PeerEntry {
        let route = Key::Route(reach.subnet);
        let nexthop_id = match self.desired.get(&route) {
            Some(Value::Route(RouteTarget::Nexthop(id))) => Some(*id),
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
            .map(|key| match (self.desired.get(key).and_then(|value| self.blocked_by(key, value)), self.retries.error_of(key)) {
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
            last_repair: keys.iter().flatten().filter_map(|key| self.retries.last_repair_of(key)).max(),
        }
    }
}

/// The problem text if the overlay's MTU is too small for IPv6. The kernel has no IPv6 on such devices (RFC 8200, section 5) and
/// rejects entries that depend on it.
fn ipv6_mtu_problem(host: &HostSpec) -> Option<String> {
    let small = host.families().any(|family| family == Family::V6) && host.mtu() < IPV6_MIN_MTU;
    small.then(|| {
        let (name, overhead) = (&host.underlay.name, host.underlay.mtu.saturating_sub(host.mtu()));
        format!(
            "the overlay's MTU is {}, and IPv6 needs {IPV6_MIN_MTU}: raise the MTU of {name} (now {}) to {} or more, on every host and \
             between them, or take IPv6 out of the network's configuration",
            host.mtu(),
            host.underlay.mtu,
            IPV6_MIN_MTU + overhead
        )
    })
}
