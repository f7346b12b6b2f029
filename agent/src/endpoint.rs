//! The containers of this host on the overlay: names, addresses, and the order of work when one is attached or detached.
//!
//! Owns `endpoint_count.json` and `endpoint_count.journal` in the state directory (`book`). Touches the kernel only through [`PortDriver`]. An endpoint is written down before
//! anything is made in the kernel and marked complete afterwards, so that what a crash leaves half made is removed at the next start.
//!
//! Tasks: each attach and detach runs as a task of its own, so that a client that goes away cannot stop it half way; at most
//! [`MAX_CONCURRENT`] of them, one at a time for each name. [`Endpoints::run`] is a task that the caller runs: it audits, and at the end waits for
//! the others.

mod error;
pub mod ipam;
mod persist;
mod spec;
mod table;
mod view;
mod work;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedMutexGuard, Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::blocking::blocking;
use crate::model::api::{AttachRequest, AttachResponse, DetachResponse};
use crate::model::endpoint::EndpointName;
use crate::model::{Cidr, Device, Endpoint, PerFamily, Subnet};
use crate::plan::PortDriver;
use crate::state::{FileError, StateDir, StateError};

pub use error::{EndpointError, ErrorClass};
pub use persist::{StoredEndpoint, read_stored};

use persist::EndpointStore;
use spec::AttachSpec;
use table::{EndpointTable, Phase};

/// How many attaches and detaches run at the same time: far above what two cores can use, far below what would hurt.
pub const MAX_CONCURRENT: usize = 64;

/// How often the namespaces are looked at.
const AUDIT_INTERVAL: Duration = Duration::from_secs(30);

/// How long an attach waits for the rules of its endpoint: some milliseconds are usual, a second where thousands of peers come at once.
const APPLY_TIMEOUT: Duration = Duration::from_secs(3);

/// What the containers of this host are attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointNetwork {
    /// The host's subnet.
    pub subnet: Subnet,
    /// The ranges of the whole overlay network, of which the subnet is a part.
    pub networks: PerFamily<Cidr>,
    /// The bridge.
    pub bridge: Device,
    /// The overlay's MTU in bytes.
    pub mtu: u32,
    /// Whether a part of the subnet is Docker's ([`crate::model::DockerShare`]).
    pub docker: bool,
}

/// The endpoints of this host: a handle, cheap to clone.
#[derive(Debug)]
pub struct Endpoints<C>(Arc<Inner<C>>);

impl<C> Clone for Endpoints<C> {
    fn clone(&self) -> Self {
        Endpoints(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct Inner<C> {
    driver: C,
    table: Mutex<EndpointTable>,
    /// The table as it is written down; held while it is.
    store: Mutex<EndpointStore>,
    /// One lock for each name that is worked on.
    name_locks: Mutex<HashMap<EndpointName, Arc<tokio::sync::Mutex<()>>>>,
    permits: Arc<Semaphore>,
    /// Running work; `None` when the agent is ending.
    tasks: Mutex<Option<JoinSet<()>>>,
    ports: watch::Sender<Vec<Arc<Endpoint>>>,
    /// What has been made of `plugged`; `None` while nobody makes anything of it.
    applied_endpoints: Mutex<Option<watch::Sender<Vec<Arc<Endpoint>>>>>,
    /// Endpoints whose namespace is gone, as far as is known: their ports are wanted no more.
    missing: Mutex<BTreeSet<EndpointName>>,
    /// Those whose namespace was gone at the last audit.
    missing_before: Mutex<BTreeSet<EndpointName>>,
    /// Tells the audit that there may be something to look at again.
    work_done: Notify,
    /// Whether a network is set.
    has_network: watch::Sender<bool>,
}

/// A lock whose holder panicked protects data that is still whole: each change of it is made at once.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<C: PortDriver + 'static> Endpoints<C> {
    /// Reads what is written down, removes what was left half made, and takes a first look at the namespaces. No subnet is set yet.
    pub async fn restore(state: Arc<StateDir>, driver: C) -> Result<Endpoints<C>, StateError> {
        let (store, stored) = blocking(|| EndpointStore::open(state))?;
        let mut table = EndpointTable::from_stored(stored);
        table.set_host_netns(&driver.host_netns());
        let incomplete: Vec<EndpointName> =
            table.records().filter(|r| r.phase != Phase::Attached).map(|r| r.endpoint.name.clone()).collect();
        let ports = watch::Sender::new(table.ports(&BTreeSet::new()));
        let endpoints = Endpoints(Arc::new(Inner {
            driver,
            table: Mutex::new(table),
            store: Mutex::new(store),
            name_locks: Mutex::default(),
            permits: Arc::new(Semaphore::new(MAX_CONCURRENT)),
            tasks: Mutex::new(Some(JoinSet::new())),
            ports,
            applied_endpoints: Mutex::default(),
            missing: Mutex::default(),
            missing_before: Mutex::default(),
            work_done: Notify::new(),
            has_network: watch::Sender::new(false),
        }));
        for name in incomplete {
            tracing::info!(endpoint = %name, "removing an endpoint that was left half attached");
            endpoints.remove_partial(&name).await;
        }
        endpoints.audit().await;
        Ok(endpoints)
    }

    /// Sets what containers are attached to from now on; `None` while no subnet is leased. Endpoints that are there stay as they are; those
    /// with an address outside a new subnet are named in a warning and by [`Endpoints::stale`].
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
                "the endpoint's address is outside the present subnet: detach it and attach it again"
            );
        }
    }

    /// Waits until a network is set.
    pub async fn wait_for_network(&self) {
        let mut network = self.0.has_network.subscribe();
        // Fails only where the sender is gone, which lives in `self`.
        let _known = network.wait_for(|known| *known).await;
    }

    /// Attaches a container. Asked again with the same, it answers the same endpoint, and puts back what is missing of it. Goes on to its end
    /// when the returned future is dropped.
    pub async fn attach(&self, name: EndpointName, request: AttachRequest) -> Result<AttachResponse, EndpointError> {
        let spec = AttachSpec::from_request(request)?;
        loop {
            let (inner, task_name, spec) = (Arc::clone(&self.0), name.clone(), spec.clone());
            match self.run_task(name.clone(), async move { inner.attach(task_name, spec).await }).await {
                // Each turn frees what the one before was refused for.
                Err(error) if self.release_dead_holders(&error).await => {}
                outcome => return outcome,
            }
        }
    }

    /// Releases the endpoints whose namespace is gone among those that hold what was refused; whether any is not as it was. The audit finds them
    /// later: a runtime that lost a container without a detach starts the next one at once. No name is held meanwhile, so two attaches never
    /// wait for each other.
    async fn release_dead_holders(&self, error: &EndpointError) -> bool {
        let holders = lock(&self.0.table).holders(error);
        if holders.is_empty() {
            return false;
        }
        let inner = Arc::clone(&self.0);
        let dead =
            tokio::task::spawn_blocking(move || holders.into_iter().filter(|r| !inner.holds_resources(r)).collect::<Vec<_>>());
        let mut changed = false;
        // It fails only while the runtime ends.
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

    /// Detaches a container; that there was none of that name is no error. One whose namespace others share goes only where `force` is
    /// given, and they with it. Goes on to its end when the returned future is dropped.
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

    /// The endpoints that are plugged into the bridge, by name, but for those whose namespace was gone at the last look. Changes are
    /// announced. A pair exists in the kernel some moments before it is here and after it has gone from here: a port that is not here is
    /// left alone.
    pub fn ports(&self) -> watch::Receiver<Vec<Arc<Endpoint>>> {
        self.0.ports.subscribe()
    }

    /// Where to tell which of [`Endpoints::plugged`] have been seen to, rules and published ports: from now on an attach waits for it, a
    /// bounded time, before it answers.
    pub fn applied_endpoints(&self) -> watch::Sender<Vec<Arc<Endpoint>>> {
        lock(&self.0.applied_endpoints).get_or_insert_default().clone()
    }

    /// Looks at each endpoint's namespace. One that is gone now and was at the last look is detached (twice, because a runtime may be replacing
    /// it), and what an earlier failure left half detached is tried again. Returns the names of the detached ones.
    pub async fn audit(&self) -> Vec<EndpointName> {
        let inner = Arc::clone(&self.0);
        let looked = tokio::task::spawn_blocking(move || {
            let records: Vec<_> = lock(&inner.table).records().cloned().collect();
            records.into_iter().filter(|r| r.phase != Phase::Attached || !inner.is_alive(r)).collect::<Vec<_>>()
        });
        // It fails only while the runtime ends.
        let Ok(suspects) = looked.await else { return Vec::new() };
        let gone: BTreeSet<EndpointName> =
            suspects.iter().filter(|r| r.phase == Phase::Attached).map(|r| r.endpoint.name.clone()).collect();
        let missing_twice: Vec<EndpointName> = {
            let mut before = lock(&self.0.missing_before);
            let twice = gone.intersection(&before).cloned().collect();
            before.clone_from(&gone);
            *lock(&self.0.missing) = gone;
            twice
        };
        self.0.broadcast_ports();
        let mut released = Vec::new();
        for name in missing_twice {
            if self.release(&name).await {
                released.push(name);
            }
        }
        for name in suspects.into_iter().filter(|r| r.phase != Phase::Attached).map(|r| r.endpoint.name.clone()) {
            self.remove_partial(&name).await;
        }
        released
    }

    /// Plugs each endpoint again whose namespace is there: for the case that others removed interfaces. Changes nothing where all is in
    /// place. The port of one whose namespace is gone is not wanted any more. Returns what failed.
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

    /// The task: audits, and when told to stop, lets running work come to its end. What is asked for then is refused.
    pub async fn run(&self, stop: CancellationToken) {
        self.audit_every(AUDIT_INTERVAL, stop).await;
        self.close().await;
    }

    /// Audits until told to stop, and does not wake up while there is nothing to audit.
    async fn audit_every(&self, interval: Duration, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first tick is at once, and `restore` has just looked.
        ticks.tick().await;
        loop {
            let is_idle = self.is_idle();
            tokio::select! {
                () = stop.cancelled() => break,
                () = self.0.work_done.notified(), if is_idle => ticks.reset(),
                _ = ticks.tick(), if !is_idle => {
                    self.audit().await;
                    if let Err(error) = self.flush().await {
                        tracing::warn!(%error, "the endpoints are written down, but not on the disk for certain");
                    }
                }
            }
        }
    }

    /// Whether there is nothing to look at and nothing to write down: a host without containers is not woken up for them.
    fn is_idle(&self) -> bool {
        let inner = &self.0;
        let no_endpoints = lock(&inner.table).records().next().is_none() && lock(&inner.missing_before).is_empty();
        no_endpoints && inner.store.try_lock().is_ok_and(|book| book.is_synced(&inner.table))
    }

    /// Refuses new work and waits for what is running.
    pub async fn close(&self) {
        let work = lock(&self.0.tasks).take();
        let Some(mut work) = work else { return };
        while let Some(end) = work.join_next().await {
            log_panic(end);
        }
        if let Err(error) = self.flush().await {
            tracing::warn!(%error, "the endpoints could not be written down at the end");
        }
    }

    /// Waits until the disk has the table.
    async fn flush(&self) -> Result<(), StateError> {
        let inner = Arc::clone(&self.0);
        let task = tokio::task::spawn_blocking(move || lock(&inner.store).flush(&inner.table));
        // It fails only while the runtime ends.
        task.await.unwrap_or_else(|e| {
            let file = std::path::Path::new(persist::FILE);
            Err(FileError::new("finish the work on", file, std::io::Error::other(e)).into())
        })
    }

    /// Takes down what is left of an endpoint that is not attached.
    async fn remove_partial(&self, name: &EndpointName) {
        let inner = Arc::clone(&self.0);
        let task_name = name.clone();
        if let Err(error) = self.run_task(name.clone(), async move { inner.remove_partial(task_name).await }).await {
            tracing::warn!(endpoint = %name, %error, "an endpoint is half detached; it is tried again");
        }
    }

    /// Runs work on one name as a task: waits for the name and a permit (both given up when the caller goes away), then runs to its end.
    async fn run_task<T: Send + 'static>(
        &self,
        name: EndpointName,
        work: impl Future<Output = Result<T, EndpointError>> + Send + 'static,
    ) -> Result<T, EndpointError> {
        let guard = self.lock_name(&name).await;
        let permit = Arc::clone(&self.0.permits).acquire_owned().await.map_err(|_| EndpointError::ShuttingDown)?;
        let (answer, receiver) = oneshot::channel();
        {
            let mut running = lock(&self.0.tasks);
            let running = running.as_mut().ok_or(EndpointError::ShuttingDown)?;
            while let Some(end) = running.try_join_next() {
                log_panic(end);
            }
            let inner = Arc::clone(&self.0);
            running.spawn(async move {
                let outcome = work.await;
                inner.work_done.notify_one();
                drop((guard, permit));
                // The caller may have gone away; the work is done all the same.
                let _ = answer.send(outcome);
            });
        }
        receiver.await.unwrap_or_else(|_| {
            Err(EndpointError::Internal { name, text: "the work on it ended without an answer (see the log)".to_owned() })
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

fn log_panic(end: Result<(), tokio::task::JoinError>) {
    if let Some(panic) = end.err().and_then(crate::shutdown::panic_text) {
        tracing::error!(panic, "work on an endpoint panicked");
    }
}

#[cfg(test)]
mod tests;
