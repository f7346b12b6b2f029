//! What a host has only once, whatever its networks: published ports, interfaces of namespaces, names of veth pairs.
//!
//! Each network has an endpoint table of its own. The endpoints of all tables are here, too, so that these resources are checked
//! and claimed under one lock. Its holder takes no other lock.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::EndpointError;
use super::id::EndpointId;
use super::spec::NetnsRef;
use crate::model::{Endpoint, Mode, NetworkName, PublishedPort};

/// Maximum number of concurrent attaches and detaches of all networks: far above what two cores can use, far below what would
/// overload a host.
pub const MAX_CONCURRENT: usize = 64;

/// The endpoints of all networks of this host; cheap to clone.
#[derive(Debug, Clone)]
pub struct HostClaims(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    claims: Mutex<Claims>,
    /// All audits are due at multiples of their interval after this time.
    started: Instant,
    permits: Arc<Semaphore>,
}

impl Default for HostClaims {
    fn default() -> HostClaims {
        let permits = Arc::new(Semaphore::new(MAX_CONCURRENT));
        HostClaims(Arc::new(Shared { claims: Mutex::default(), started: Instant::now(), permits }))
    }
}

/// The endpoints of one network, as the other networks see them.
pub(super) trait NetworkEndpoints: Send + Sync {
    /// Releases the holder of a resource that an attach was refused, if its namespace is gone. Returns whether it changed.
    fn release_dead_holder<'a>(self: Arc<Self>, error: &'a EndpointError) -> BoxFuture<'a, bool>;
}

impl HostClaims {
    /// Locks the claims.
    pub(super) fn lock(&self) -> MutexGuard<'_, Claims> {
        self.0.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One permit per concurrent attach or detach.
    pub(super) fn permits(&self) -> Arc<Semaphore> {
        Arc::clone(&self.0.permits)
    }

    /// Time of the next audit. It is the same for all networks, so that the host wakes up once for all of them.
    pub(super) fn next_audit(&self, interval: Duration) -> Instant {
        let audits = self.0.started.elapsed().as_nanos() / interval.as_nanos().max(1);
        self.0.started + interval * u32::try_from(audits + 1).unwrap_or(u32::MAX)
    }
}

/// The claims, locked.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// Endpoints with a network namespace of their own, in any phase. The others claim nothing.
    endpoints: BTreeMap<EndpointId, Arc<Endpoint>>,
    networks: BTreeMap<NetworkName, Weak<dyn NetworkEndpoints>>,
}

impl Claims {
    /// Registers a network's endpoints.
    pub(super) fn register(&mut self, network: NetworkName, endpoints: Weak<dyn NetworkEndpoints>) {
        self.networks.insert(network, endpoints);
    }

    /// The endpoints of another network.
    pub(super) fn network(&self, network: &NetworkName) -> Option<Arc<dyn NetworkEndpoints>> {
        self.networks.get(network)?.upgrade()
    }

    /// Adds an endpoint's claims, which have been checked.
    pub(super) fn insert(&mut self, endpoint: &Arc<Endpoint>) {
        if matches!(endpoint.mode, Mode::Overlay | Mode::None) {
            self.endpoints.insert(EndpointId::of(endpoint), Arc::clone(endpoint));
        }
    }

    /// Removes an endpoint's claims, unless a later endpoint has its name.
    pub(super) fn remove(&mut self, endpoint: &Arc<Endpoint>) {
        let id = EndpointId::of(endpoint);
        if self.endpoints.get(&id).is_some_and(|claimed| Arc::ptr_eq(claimed, endpoint)) {
            self.endpoints.remove(&id);
        }
    }

    /// Checks that no endpoint has published any of this port.
    pub(super) fn check_published(&self, wanted: &PublishedPort) -> Result<(), EndpointError> {
        for (id, endpoint) in &self.endpoints {
            let mut in_effect = endpoint.published.iter().filter(|published| endpoint.has_address_for(published));
            if let Some(held) = in_effect.find(|published| published.conflicts_with(wanted)) {
                return Err(EndpointError::PublishInUse { wanted: *wanted, holder: id.clone(), held: *held });
            }
        }
        Ok(())
    }

    /// Checks that no endpoint of these modes uses the namespace exclusively.
    pub(super) fn check_netns_free(&self, netns: &NetnsRef, conflicts: impl Fn(&Mode) -> bool) -> Result<(), EndpointError> {
        match self.endpoints.iter().find(|(_, e)| conflicts(&e.mode) && netns.is_at(&e.netns)) {
            Some((id, e)) => {
                Err(EndpointError::NetnsInUse { netns: netns.path.clone(), holder: id.clone(), mode: e.mode.clone() })
            }
            None => Ok(()),
        }
    }

    /// Checks that no endpoint has this interface of the namespace.
    pub(super) fn check_interface_free(&self, netns: &NetnsRef, interface: &str) -> Result<(), EndpointError> {
        let is_same = |e: &Endpoint| e.port.as_ref().is_some_and(|port| port.interface == interface) && netns.is_at(&e.netns);
        match self.endpoints.iter().find(|(_, endpoint)| is_same(endpoint)) {
            Some((id, _)) => Err(EndpointError::InterfaceInUse {
                interface: interface.to_owned(),
                netns: netns.path.clone(),
                holder: id.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Whether an endpoint's veth pair has this name on the host. Routed networks share the host's namespace.
    pub(super) fn has_host_interface(&self, interface: &str) -> bool {
        self.endpoints.values().any(|e| e.port.as_ref().is_some_and(|port| port.host_interface == interface))
    }
}
