//! Containers of this host on an overlay network: names, addresses, and the steps of attach and detach.
//!
//! Each network has its own [`Endpoints`]; what the host has only once is in [`HostClaims`]. Owns `endpoints.json` and
//! `endpoints.journal` in the network's state directory (`persist`). Changes the kernel only through [`PortDriver`]. An endpoint is
//! persisted before anything is created in the kernel, and marked as attached afterwards. So the next start can remove everything
//! that a crash left incomplete.
//!
//! Tasks: each attach and detach runs as its own task, so that it completes even if the client disconnects. At most
//! [`MAX_CONCURRENT`] tasks run on the host, and one per name. The caller runs [`Endpoints::run`] as a task: it audits, and at
//! shutdown waits for the other tasks.

mod claims;
mod error;
mod id;
pub mod ipam;
mod persist;
mod record;
mod spec;
mod table;
mod view;
mod work;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{Notify, OwnedMutexGuard, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::blocking::blocking;
use crate::model::api::{AttachRequest, AttachResponse, DetachResponse};
use crate::model::endpoint::EndpointName;
use crate::model::{Endpoint, Mode, NetworkName};
use crate::plan::PortDriver;
use crate::state::{FileError, StateDir, StateError};

pub use claims::{HostClaims, MAX_CONCURRENT};
pub use error::{EndpointError, ErrorClass};
pub use id::EndpointId;
pub use persist::{StoredEndpoint, read_stored};
pub use spec::EndpointNetwork;

use claims::NetworkEndpoints;
use persist::{EndpointStore, lock};
use record::Phase;
use spec::AttachSpec;
use table::EndpointTable;

/// Interval of the audits of the namespaces.
const AUDIT_INTERVAL: Duration = Duration::from_secs(30);

/// Maximum time for which an attach waits for its endpoint's rules. Usual are some milliseconds, or a second while thousands of
/// peers are added.
const APPLY_TIMEOUT: Duration = Duration::from_secs(3);

/// Handle to the endpoints of a network on this host; cheap to clone.
#[derive(Debug)]
pub struct Endpoints<C>(Arc<Inner<C>>);

impl<C> Clone for Endpoints<C> {
    fn clone(&self) -> Self {
        Endpoints(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct Inner<C> {
    network: NetworkName,
    driver: C,
    claims: HostClaims,
    table: Mutex<EndpointTable>,
    /// The persisted table; locked while it is written.
    store: Mutex<EndpointStore>,
    /// One lock per name with running work.
    name_locks: Mutex<HashMap<EndpointName, Arc<tokio::sync::Mutex<()>>>>,
    /// Running tasks; `None` once the agent shuts down.
    tasks: Mutex<Option<JoinSet<()>>>,
    ports: watch::Sender<Vec<Arc<Endpoint>>>,
    /// The endpoints of `ports` whose entries are applied; `None` if no reconciler reports them.
    applied_endpoints: Mutex<Option<watch::Sender<Vec<Arc<Endpoint>>>>>,
    /// Endpoints whose namespace is gone as of the last check; their ports are not desired any more.
    missing: Mutex<BTreeSet<EndpointName>>,
    /// Endpoints whose namespace was gone at the last audit.
    missing_before: Mutex<BTreeSet<EndpointName>>,
    /// Wakes the audit: there may be endpoints to check again.
    work_done: Notify,
    /// Whether a network is set.
    has_network: watch::Sender<bool>,
}

impl<C: PortDriver + 'static> Endpoints<C> {
    /// Reads the network's stored endpoints, removes incomplete ones, and audits the namespaces once. No subnet is set yet. All
    /// networks of the host get the same `claims`; each is restored before any of them attaches.
    pub async fn restore(
        state: Arc<StateDir>,
        driver: C,
        network: NetworkName,
        claims: HostClaims,
    ) -> Result<Endpoints<C>, StateError> {
        let (store, stored) = blocking(|| EndpointStore::open(state))?;
        let mut table = EndpointTable::from_stored(stored, network.clone(), claims.clone());
        table.set_host_netns(&driver.host_netns());
        let incomplete: Vec<EndpointName> =
            table.records().filter(|r| r.phase != Phase::Attached).map(|r| r.endpoint.name.clone()).collect();
        let ports = watch::Sender::new(table.ports(&BTreeSet::new()));
        let inner = Arc::new(Inner {
            network,
            driver,
            claims,
            table: Mutex::new(table),
            store: Mutex::new(store),
            name_locks: Mutex::default(),
            tasks: Mutex::new(Some(JoinSet::new())),
            ports,
            applied_endpoints: Mutex::default(),
            missing: Mutex::default(),
            missing_before: Mutex::default(),
            work_done: Notify::new(),
            has_network: watch::Sender::new(false),
        });
        let as_seen_by_others: Weak<dyn NetworkEndpoints> = Arc::<Inner<C>>::downgrade(&inner);
        inner.claims.lock().register(inner.network.clone(), as_seen_by_others);
        let endpoints = Endpoints(inner);
        for name in incomplete {
            tracing::info!(endpoint = %name, "removing an incomplete endpoint");
            endpoints.remove_partial(&name).await;
        }
        endpoints.audit().await;
        Ok(endpoints)
    }

    /// Sets the network for further attaches; `None` while no subnet is leased. Existing endpoints stay unchanged. Endpoints with
    /// an address outside a new subnet are logged and returned by [`Endpoints::stale`].
    pub fn set_network(&self, network: Option<EndpointNetwork>) {
        let stale = {
            let mut table = lock(&self.0.table);
            table.set_network(network);
            table.stale()
        };
        self.0.has_network.send_replace(network.is_some());
        for endpoint in stale {
            tracing::warn!(
                endpoint = %endpoint.name, addresses = %endpoint.addresses(),
                subnet = network.map(|n| tracing::field::display(n.subnet)),
                "endpoint's address is outside the present subnet: detach it and attach it again"
            );
        }
    }

    /// Waits until a network is set.
    pub async fn wait_for_network(&self) {
        let mut network = self.0.has_network.subscribe();
        // Cannot fail: `self` owns the sender.
        let _network_set = network.wait_for(|is_set| *is_set).await;
    }

    /// Attaches a container. A repeated request returns the same endpoint and restores its missing parts. The work completes even
    /// if the returned future is dropped.
    pub async fn attach(&self, name: EndpointName, request: AttachRequest) -> Result<AttachResponse, EndpointError> {
        let network = &self.0.network;
        if !network.is_default() && request.mode != Mode::Overlay {
            return Err(EndpointError::UnsupportedInNetwork { mode: request.mode, network: network.clone() });
        }
        let spec = AttachSpec::from_request(request)?;
        loop {
            let (inner, task_name, spec) = (Arc::clone(&self.0), name.clone(), spec.clone());
            match self.run_task(name.clone(), async move { inner.attach(task_name, spec).await }).await {
                // Each iteration releases the resource that the previous one lacked.
                Err(error) if self.release_dead_holders(&error).await => {}
                outcome => return outcome,
            }
        }
    }

    /// Releases endpoints whose namespace is gone, if they hold the resource that an attach was refused. Returns whether any of
    /// them changed.
    ///
    /// The audit would find them later, but a runtime that lost a container without a detach starts the next one at once. No name
    /// lock is held meanwhile, so two attaches never wait for each other.
    async fn release_dead_holders(&self, error: &EndpointError) -> bool {
        if let Some(holder) = error.holder().filter(|holder| holder.network != self.0.network) {
            let other = self.0.claims.lock().network(&holder.network);
            return match other {
                Some(other) => other.release_dead_holder(error).await,
                None => false,
            };
        }
        let holders = lock(&self.0.table).holders(error);
        if holders.is_empty() {
            // A concurrent attach or detach has released the resource since.
            return error.holder().is_some();
        }
        let inner = Arc::clone(&self.0);
        let dead =
            tokio::task::spawn_blocking(move || holders.into_iter().filter(|r| !inner.holds_resources(r)).collect::<Vec<_>>());
        let mut changed = false;
        // Fails only while the Tokio runtime shuts down.
        for record in dead.await.unwrap_or_default() {
            self.release(&record.endpoint.name).await;
            changed |= lock(&self.0.table).get(&record.endpoint.name) != Some(&record);
        }
        changed
    }

    /// Releases an endpoint whose namespace is gone.
    async fn release(&self, name: &EndpointName) -> bool {
        let (inner, task_name) = (Arc::clone(&self.0), name.clone());
        let released = self.run_task(name.clone(), async move { inner.release_if_gone(task_name).await }).await;
        released.unwrap_or_else(|error| {
            tracing::warn!(endpoint = %name, %error, "cannot detach an endpoint whose namespace is gone");
            false
        })
    }

    /// Detaches a container; an unknown name is no error. A container whose namespace other endpoints share is detached only with
    /// `force`, together with those endpoints. The work completes even if the returned future is dropped.
    pub async fn detach(&self, name: EndpointName, force: bool) -> Result<DetachResponse, EndpointError> {
        let (inner, task_name) = (Arc::clone(&self.0), name.clone());
        let sharers = self.run_task(name.clone(), async move { inner.detach(task_name, force).await }).await?;
        Ok(DetachResponse { endpoint: sharers.is_some().then_some(name), sharers: sharers.unwrap_or_default() })
    }

    /// The attached endpoints, by name.
    pub fn list(&self) -> Vec<Endpoint> {
        let table = lock(&self.0.table);
        table.records().filter(|r| r.phase == Phase::Attached).map(|r| Endpoint::clone(&r.endpoint)).collect()
    }

    /// Endpoints with an address outside the present subnet.
    pub fn stale(&self) -> Vec<Endpoint> {
        lock(&self.0.table).stale()
    }

    /// The endpoints with a port on the bridge, by name, without those whose namespace was gone at the last check. The receiver
    /// gets every change. A veth pair exists in the kernel some time before it is listed and after it is not listed any more, so
    /// the reconciler leaves unlisted ports alone.
    pub fn ports(&self) -> watch::Receiver<Vec<Arc<Endpoint>>> {
        self.0.ports.subscribe()
    }

    /// Channel for the endpoints of [`Endpoints::ports`] whose rules and published ports are applied. Once it exists, an attach
    /// waits for its endpoint on it, at most `APPLY_TIMEOUT`, before it answers.
    pub fn applied_endpoints(&self) -> watch::Sender<Vec<Arc<Endpoint>>> {
        lock(&self.0.applied_endpoints).get_or_insert_default().clone()
    }

    /// Checks each endpoint's namespace. An endpoint is detached if its namespace is gone at two audits in a row, because a
    /// runtime may be replacing the namespace at the first. Incomplete detaches are retried. Returns the names of the detached
    /// endpoints.
    pub async fn audit(&self) -> Vec<EndpointName> {
        let inner = Arc::clone(&self.0);
        let task = tokio::task::spawn_blocking(move || {
            let records: Vec<_> = lock(&inner.table).records().cloned().collect();
            records.into_iter().filter(|r| r.phase != Phase::Attached || !inner.is_alive(r)).collect::<Vec<_>>()
        });
        // Fails only while the Tokio runtime shuts down.
        let Ok(candidates) = task.await else { return Vec::new() };
        let missing: BTreeSet<EndpointName> =
            candidates.iter().filter(|r| r.phase == Phase::Attached).map(|r| r.endpoint.name.clone()).collect();
        let missing_twice: Vec<EndpointName> = {
            let mut missing_before = lock(&self.0.missing_before);
            let missing_twice = missing.intersection(&missing_before).cloned().collect();
            missing_before.clone_from(&missing);
            *lock(&self.0.missing) = missing;
            missing_twice
        };
        self.0.broadcast_ports();
        let mut released = Vec::new();
        for name in missing_twice {
            if self.release(&name).await {
                released.push(name);
            }
        }
        for name in candidates.into_iter().filter(|r| r.phase != Phase::Attached).map(|r| r.endpoint.name.clone()) {
            self.remove_partial(&name).await;
        }
        released
    }

    /// Restores the ports of all endpoints whose namespace exists, in case another process removed interfaces. Complete ports
    /// stay unchanged. The port of an endpoint whose namespace is gone is not desired any more. Returns the failures.
    pub async fn reconcile_ports(&self) -> Vec<(EndpointName, EndpointError)> {
        let names: Vec<EndpointName> = self.list().into_iter().map(|e| e.name).collect();
        let mut failed = Vec::new();
        for name in names {
            let inner = Arc::clone(&self.0);
            let task_name = name.clone();
            if let Err(error) = self.run_task(name.clone(), async move { inner.reattach(task_name).await }).await {
                failed.push((name, error));
            }
        }
        failed
    }

    /// Runs the audits until `stop`, then waits for running work and refuses new requests.
    pub async fn run(&self, stop: CancellationToken) {
        self.audit_every(AUDIT_INTERVAL, stop).await;
        self.close().await;
    }

    /// Audits periodically until `stop`; sleeps while there is nothing to audit.
    async fn audit_every(&self, interval: Duration, stop: CancellationToken) {
        let mut ticks = tokio::time::interval_at(self.0.claims.next_audit(interval), interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            let is_idle = self.is_idle();
            tokio::select! {
                () = stop.cancelled() => break,
                () = self.0.work_done.notified(), if is_idle => ticks.reset_at(self.0.claims.next_audit(interval)),
                _ = ticks.tick(), if !is_idle => {
                    self.audit().await;
                    if let Err(error) = self.flush().await {
                        tracing::warn!(%error, "endpoints are written, but cannot be synced to disk");
                    }
                }
            }
        }
    }

    /// Whether there is nothing to audit and nothing to write, so that a host without containers does not wake up.
    fn is_idle(&self) -> bool {
        let inner = &self.0;
        let no_endpoints = lock(&inner.table).records().next().is_none() && lock(&inner.missing_before).is_empty();
        no_endpoints && inner.store.try_lock().is_ok_and(|store| store.is_synced(&inner.table))
    }

    /// Refuses new work and waits for running work.
    pub async fn close(&self) {
        let tasks = lock(&self.0.tasks).take();
        let Some(mut tasks) = tasks else { return };
        while let Some(result) = tasks.join_next().await {
            log_panic(result);
        }
        if let Err(error) = self.flush().await {
            tracing::warn!(%error, "cannot write the endpoints at shutdown");
        }
    }

    /// Refuses new work if there is neither an endpoint nor running work, so that the host can leave the network. Returns whether
    /// it does.
    pub fn close_if_unused(&self) -> bool {
        let mut tasks = lock(&self.0.tasks);
        let Some(running) = tasks.as_mut() else { return true };
        while let Some(result) = running.try_join_next() {
            log_panic(result);
        }
        let unused = running.is_empty() && lock(&self.0.table).records().next().is_none();
        if unused {
            *tasks = None;
        }
        unused
    }

    /// Syncs the table to disk.
    async fn flush(&self) -> Result<(), StateError> {
        let inner = Arc::clone(&self.0);
        let task = tokio::task::spawn_blocking(move || lock(&inner.store).flush(&inner.table));
        // Fails only while the Tokio runtime shuts down.
        task.await.unwrap_or_else(|e| {
            let file = std::path::Path::new(persist::FILE);
            Err(FileError::new("finish the work on", file, std::io::Error::other(e)).into())
        })
    }

    /// Removes the remaining parts of an endpoint that is not attached.
    async fn remove_partial(&self, name: &EndpointName) {
        let inner = Arc::clone(&self.0);
        let task_name = name.clone();
        if let Err(error) = self.run_task(name.clone(), async move { inner.remove_partial(task_name).await }).await {
            tracing::warn!(endpoint = %name, %error, "detach incomplete, retrying at the next audit");
        }
    }

    /// Runs work on one name as a task. It waits for the name's lock and a permit, both of which it gives up if the caller is
    /// dropped. The work then runs to completion.
    async fn run_task<T: Send + 'static>(
        &self,
        name: EndpointName,
        work: impl Future<Output = Result<T, EndpointError>> + Send + 'static,
    ) -> Result<T, EndpointError> {
        let name_guard = self.lock_name(&name).await;
        let permit = self.0.claims.permits().acquire_owned().await.map_err(|_| EndpointError::ShuttingDown)?;
        let (sender, receiver) = oneshot::channel();
        {
            let mut running = lock(&self.0.tasks);
            let running = running.as_mut().ok_or(EndpointError::ShuttingDown)?;
            while let Some(result) = running.try_join_next() {
                log_panic(result);
            }
            let inner = Arc::clone(&self.0);
            running.spawn(async move {
                let outcome = work.await;
                inner.work_done.notify_one();
                drop((name_guard, permit));
                // The caller may be gone; the work is complete nevertheless.
                let _ = sender.send(outcome);
            });
        }
        receiver.await.unwrap_or_else(|_| {
            Err(EndpointError::Internal { name, text: "its task ended without a result (see the log)".to_owned() })
        })
    }

    async fn lock_name(&self, name: &EndpointName) -> OwnedMutexGuard<()> {
        let name_lock = {
            let mut names = lock(&self.0.name_locks);
            names.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(names.entry(name.clone()).or_default())
        };
        name_lock.lock_owned().await
    }
}

impl<C: PortDriver + 'static> NetworkEndpoints for Inner<C> {
    fn release_dead_holder<'a>(self: Arc<Self>, error: &'a EndpointError) -> BoxFuture<'a, bool> {
        Box::pin(async move { Endpoints(self).release_dead_holders(error).await })
    }
}

fn log_panic(result: Result<(), tokio::task::JoinError>) {
    if let Some(panic) = result.err().and_then(crate::shutdown::panic_text) {
        tracing::error!(panic, "work on an endpoint panicked");
    }
}

#[cfg(test)]
mod tests;
