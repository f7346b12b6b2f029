//! Answers queries to a network with the types of the admin socket's API.

use super::{Network, NetworkQuery, NetworkStateStore, NetworkStatus, PeerRow, SubnetRow};
use crate::model::api::{DataPathStatus, Health, LeaseStatus, NetworkKind, Status, StoreStatus, SubnetEntry, UnderlayStatus};
use crate::model::event::{Connection, OwnLease};
use crate::model::network::IPV6_MIN_MTU;
use crate::model::{Device, Family, NetworkName, StorePosition};
use crate::plan::Key;
use crate::plan::desired::HostSpec;

/// Maximum number of rejected leases that the status lists; the count is complete.
const MAX_LISTED: usize = 100;

impl<M: NetworkStateStore> Network<M> {
    pub(super) fn answer_query(&self, query: NetworkQuery) {
        // A client that has gone away is no error.
        match query {
            NetworkQuery::Status(reply) => drop(reply.send(self.status())),
            NetworkQuery::Subnets(reply) => drop(reply.send(self.subnets())),
            NetworkQuery::Peers(reply) => drop(reply.send(self.peers())),
        }
    }

    fn status(&self) -> NetworkStatus {
        NetworkStatus {
            status: self.own_status(),
            rejected_problem: self.rejected_problem().map(|problem| of_network(&self.settings.name, problem)),
        }
    }

    fn own_status(&self) -> Status {
        let (connected, position, error) = match &self.store.connection {
            Connection::Up { position } => (true, *position, None),
            Connection::Down { error } => (false, StorePosition::default(), Some(error.clone())),
        };
        Status {
            name: self.settings.name.to_string(),
            kind: if self.settings.isolated { NetworkKind::Isolated } else { NetworkKind::Routed },
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.settings.node.name.clone(),
            node_id: self.settings.node.id.clone(),
            uptime_seconds: self.uptime_since.elapsed().as_secs(),
            ready: self.is_ready(),
            health: Health::Waiting,
            problems: self.problems().into_iter().map(|problem| of_network(&self.settings.name, problem)).collect(),
            store: StoreStatus {
                connected,
                endpoints: self.settings.store_endpoints.clone(),
                prefix: self.settings.store_prefix.clone(),
                revision: position.0,
                error,
                config_errors: self.store.config_errors.as_ref().map(|errors| errors.0.clone()).unwrap_or_default(),
                leases: self.store.leases.len(),
                refused: self.planner.rejected.values().take(MAX_LISTED).cloned().collect(),
            },
            network: self.store.config().cloned(),
            lease: match &self.store.own_lease {
                OwnLease::Held(held) => Some(LeaseStatus { subnet: held.subnet, reservation: held.expiry.is_none() }),
                OwnLease::NotHeld { .. } => None,
            },
            underlay: self.underlay.selected.as_ref().map(|underlay| UnderlayStatus {
                interface: underlay.name.clone(),
                mtu: underlay.mtu,
                public_ip: underlay.public_ip,
                local: underlay.local,
                reasons: self.underlay.reasons.map(|_, reason| reason.to_string()),
            }),
            data_path: DataPathStatus {
                peers: self.planner.peers.len(),
                mtu: self.planner.host.as_ref().map(HostSpec::mtu),
                ..DataPathStatus::default()
            },
            endpoints: self.endpoints.len(),
        }
    }

    /// Problems, in the order in which they have to be solved.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Connection::Down { error } = &self.store.connection {
            problems.push(format!("etcd does not answer, the data path stays unchanged: {error}"));
        }
        if self.store.lease_may_have_expired() {
            problems.push(
                "etcd has not answered for longer than this host's lease TTL, so another host may get its subnet: restore etcd before \
                 new hosts join"
                    .to_owned(),
            );
        }
        problems.extend(self.record_problem());
        if !self.is_of_recorded_kind() {
            problems.push(self.kind_problem());
        }
        problems.extend(self.underlay_problems());
        if let OwnLease::NotHeld { reason } = &self.store.own_lease
            && self.underlay.selected.is_some()
        {
            problems.push(format!("no subnet is leased: {reason}"));
        }
        problems.extend(self.planner.host.as_ref().and_then(ipv6_mtu_problem));
        problems.extend(self.connection_problems());
        problems
    }

    /// The problem text if the record is missing or invalid.
    fn record_problem(&self) -> Option<String> {
        let (name, key) = (&self.settings.name, format!("{}/config", self.settings.store_prefix));
        let write = match name.is_default() {
            true => "`overlayctl config set FILE`".to_owned(),
            false => format!("`overlayctl network create {name}`"),
        };
        if let Some(errors) = &self.store.config_errors {
            let kept = if self.store.record.is_some() { "; the last valid one stays in use" } else { "" };
            let correct = if name.is_default() { write } else { format!("`overlayctl network set {name}`") };
            return Some(format!(
                "the network's configuration under {key} is invalid: {errors}; correct it with {correct}{kept}"
            ));
        }
        match &self.store.record {
            _ if !self.store.config_missing => None,
            None => Some(format!("waiting for the network's configuration under {key}: write it with {write}")),
            Some(_) if name.is_default() => {
                Some(format!("the network's configuration under {key} was deleted; the last one stays in use"))
            }
            Some(_) => Some(format!(
                "the network's configuration under {key} was deleted; the last one stays in use: detach its containers, or write it \
                 again with {write}"
            )),
        }
    }

    /// The problem text if the record has another kind than the network was started as.
    fn kind_problem(&self) -> String {
        let (name, routed) = (&self.settings.name, !self.settings.isolated);
        let (present, recorded) = if routed { ("routed", "isolated") } else { ("isolated", "routed") };
        format!(
            "its configuration says {recorded} now, but it stays {present} and unchanged on this host: detach its containers, or set \
             it back with `overlayctl network set {name} --routed={routed}`"
        )
    }

    fn rejected_problem(&self) -> Option<String> {
        let first = self.planner.rejected.values().next()?;
        Some(format!("{} leases ignored, the first: {first}", self.planner.rejected.len()))
    }

    fn subnets(&self) -> Vec<SubnetRow> {
        let mut rows: Vec<SubnetRow> = self
            .store
            .leases
            .iter()
            .map(|(key, value)| {
                let refused = self.planner.rejected.get(key).map(|rejected| rejected.kind.to_string());
                match value {
                    Ok(record) => {
                        let own = self.planner.local_host.as_ref().is_some_and(|own| own.subnet == record.subnet);
                        let mut entry = SubnetEntry::from_record(key, record);
                        entry.own = own;
                        entry.refused = refused;
                        (entry, record.expiry)
                    }
                    Err(rejected) => (SubnetEntry::from_rejected(rejected), None),
                }
            })
            .collect();
        rows.sort_by(|(a, _), (b, _)| (a.refused.is_some(), a.subnet, &a.key).cmp(&(b.refused.is_some(), b.subnet, &b.key)));
        rows
    }

    fn peers(&self) -> Vec<PeerRow> {
        let mut rows = Vec::new();
        let Some(host) = &self.planner.host else { return rows };
        let (backend, mut entries) = (host.backend(), Vec::new());
        for (key, peer) in &self.planner.peers {
            let name = match self.store.leases.get(key) {
                Some(Ok(record)) => record.lease.node.as_ref().map(|node| node.name.clone()),
                _ => None,
            };
            for (family, remote) in peer.remote_subnets.iter() {
                let interface = backend.device(family).map_or_else(|| host.underlay.name.clone(), Device::name);
                backend.peer_entries(host, family, remote, &mut entries);
                let keys = entries.drain(..).map(|(key, _)| key).filter(|key| !matches!(key, Key::Element(_)));
                rows.push(PeerRow { interface, remote: *remote, host: name.clone(), entries: keys.collect() });
            }
        }
        rows
    }
}

/// The problem text if the overlay's MTU is too small for IPv6. The kernel has no IPv6 on such devices (RFC 8200, section 5) and
/// rejects entries that depend on it.
fn ipv6_mtu_problem(host: &HostSpec) -> Option<String> {
    let is_too_small = host.families().any(|family| family == Family::V6) && host.mtu() < IPV6_MIN_MTU;
    is_too_small.then(|| {
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

/// The text with the network's name, unless it is the default one.
pub fn of_network(name: &NetworkName, text: String) -> String {
    if name.is_default() { text } else { format!("network {name}: {text}") }
}
