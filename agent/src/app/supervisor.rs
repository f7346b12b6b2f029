//! Starts, stops and restarts the networks and the reconcilers.
//!
//! A unit is a network with its part of the store, or the reconciler of a network namespace. Each unit has a keeper, a task that
//! starts the unit's tasks. If one of them fails, panics or ends, the keeper stops the others and, after a back-off, starts all
//! anew. The new tasks rebuild their state from the store and from the kernel; the kernel's entries stay meanwhile.
//!
//! The channels of a unit outlive its tasks, so that no other task notices a restart except by the messages that it gets.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex as BlockingMutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::{Mutex, mpsc};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use crate::backoff::Backoff;
use crate::metrics::Metrics;
use crate::model::event::StoreEvent;
use crate::model::{NamespaceName, NetworkName};
use crate::network::{self, Network, NetworkStateStore};
use crate::plan::DataPath;
use crate::plan::contribution::ReconcilerInput;
use crate::reconcile::{self, Reconciler, SysctlStore};
use crate::shutdown::{TaskExit, TaskOutcome, Tasks};

/// Pause before a restart.
const RESTART_BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));
/// A unit that ran this long starts again with the shortest pause. Until then the status shows its failure.
const STABLE_AFTER: Duration = Duration::from_secs(60);
/// Time limit for a unit's other tasks to end after one has ended.
const STOP_DEADLINE: Duration = Duration::from_secs(4);
/// If a network is slower than its store, the store waits at the channel; flow control passes that on to etcd.
const STORE_EVENT_CAPACITY: usize = 1024;

/// A part of the agent that is restarted by itself.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unit {
    /// A network, with its part of the store.
    Network(NetworkName),
    /// The reconciler of a network namespace.
    Reconciler(NamespaceName),
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unit::Network(name) => write!(f, "network {name}"),
            Unit::Reconciler(namespace) => write!(f, "reconciler of {namespace}"),
        }
    }
}

/// The last failure of each unit. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Failures(Arc<BlockingMutex<BTreeMap<Unit, Failure>>>);

#[derive(Debug)]
struct Failure {
    cause: String,
    restart: Instant,
}

impl Failures {
    /// A problem for each unit that has not been stable since its last failure.
    pub fn problems(&self) -> Vec<String> {
        let failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = failures.iter().filter(|(_, failure)| failure.restart.elapsed() < STABLE_AFTER);
        let problem = |(unit, Failure { cause, .. }): (&Unit, &Failure)| {
            format!("{unit} was restarted, the data path keeps forwarding meanwhile: {cause}; please report the agent's log")
        };
        recent.map(problem).collect()
    }

    fn record(&self, unit: &Unit, cause: String, restart: Instant) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(unit.clone(), Failure { cause, restart });
    }

    fn remove(&self, unit: &Unit) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(unit);
    }
}

/// Owner of the networks and reconcilers that run. Clones share them.
#[derive(Clone)]
pub struct Supervisor {
    units: Arc<BlockingMutex<BTreeMap<Unit, Keeper>>>,
    failures: Failures,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
    /// A keeper that panicked.
    panicked: CancellationToken,
}

struct Keeper {
    stop: CancellationToken,
    task: JoinHandle<()>,
    /// Inputs of the reconcilers that a network contributes to.
    contributes_to: Vec<mpsc::Sender<ReconcilerInput>>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Supervisor {
    /// A supervisor without units. `shutdown` stops all units and leaves the data path unchanged.
    pub fn new(failures: Failures, metrics: Arc<Metrics>, shutdown: CancellationToken) -> Supervisor {
        Supervisor { units: Arc::default(), failures, metrics, shutdown, panicked: CancellationToken::new() }
    }

    /// Starts a network. `make` makes it, without any state; `follow_store` sends it the store's events, from a snapshot on, and
    /// keeps its lease.
    pub fn start_network<M, F, E>(
        &self,
        name: NetworkName,
        channels: network::Channels,
        make: impl Fn() -> Network<M> + Send + Sync + 'static,
        follow_store: impl Fn(mpsc::Sender<StoreEvent>, CancellationToken) -> F + Send + Sync + 'static,
    ) where
        M: NetworkStateStore + 'static,
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: fmt::Display + 'static,
    {
        let links = std::iter::once(&channels.host).chain(&channels.own);
        let contributes_to = links.map(|link| link.input.clone()).collect();
        let channels = Arc::new(Mutex::new(channels));
        let span = log_span(&name);
        self.start(Unit::Network(name), contributes_to, move |delay, stop| {
            let (sender, events) = mpsc::channel(STORE_EVENT_CAPACITY);
            let (network, channels, stop_network) = (make(), Arc::clone(&channels), stop.clone());
            let store = follow_store(sender, stop.clone());
            let mut tasks = Tasks::new();
            let network = async move {
                let mut channels = channels.lock().await;
                network.run(events, &mut channels, delay, stop_network).await;
            };
            tasks.spawn_infallible("network", network.instrument(span.clone()));
            let store = async move {
                match stop.run_until_cancelled(tokio::time::sleep(delay)).await {
                    Some(()) => store.await,
                    None => Ok(()),
                }
            };
            tasks.spawn("store", store.instrument(span.clone()));
            tasks
        });
    }

    /// Starts the reconciler of a network namespace. `make` makes it, without any state.
    pub fn start_reconciler<D, S>(
        &self,
        namespace: NamespaceName,
        channels: reconcile::Channels,
        make: impl Fn() -> Reconciler<D, S> + Send + Sync + 'static,
    ) where
        D: DataPath + 'static,
        S: SysctlStore + 'static,
    {
        let channels = Arc::new(Mutex::new(channels));
        let span = match &namespace {
            NamespaceName::Host => Span::none(),
            NamespaceName::Network(network) => log_span(network),
        };
        self.start(Unit::Reconciler(namespace), Vec::new(), move |delay, stop| {
            let (reconciler, channels) = (make(), Arc::clone(&channels));
            let mut tasks = Tasks::new();
            let reconcile = async move {
                let mut channels = channels.lock().await;
                reconciler.run(&mut channels, delay, stop).await;
            };
            tasks.spawn_infallible("reconcile", reconcile.instrument(span.clone()));
            tasks
        });
    }

    fn start(
        &self,
        unit: Unit,
        contributes_to: Vec<mpsc::Sender<ReconcilerInput>>,
        start: impl Fn(Duration, CancellationToken) -> Tasks + Send + Sync + 'static,
    ) {
        let (stop, panicked) = (self.shutdown.child_token(), self.panicked.clone());
        let keeper = keep(unit.clone(), start, self.failures.clone(), stop.clone());
        let task = tokio::spawn(async move {
            // Cancels the token also if the keeper panics.
            let guard = panicked.drop_guard();
            keeper.await;
            guard.disarm();
        });
        self.units().insert(unit, Keeper { stop, task, contributes_to });
    }

    /// Stops a network. With `withdraw`, its entries are removed from the kernel; otherwise they stay.
    pub async fn stop_network(&self, name: &NetworkName, withdraw: bool) {
        let contributes_to = self.stop(&Unit::Network(name.clone())).await;
        for reconciler in contributes_to.into_iter().filter(|_| withdraw) {
            // Fails only if the reconciler was stopped before.
            let _ = reconciler.send(ReconcilerInput::Withdraw(name.clone())).await;
        }
        self.metrics.remove_network(name);
    }

    /// Stops the reconciler of a network namespace. Its entries stay.
    pub async fn stop_reconciler(&self, namespace: NamespaceName) {
        self.stop(&Unit::Reconciler(namespace)).await;
    }

    /// Stops a unit; returns what it contributes to.
    async fn stop(&self, unit: &Unit) -> Vec<mpsc::Sender<ReconcilerInput>> {
        let Some(mut keeper) = self.units().remove(unit) else { return Vec::new() };
        keeper.stop.cancel();
        if let Err(error) = (&mut keeper.task).await {
            tracing::error!(%unit, %error, "cannot stop");
        }
        self.failures.remove(unit);
        std::mem::take(&mut keeper.contributes_to)
    }

    fn units(&self) -> MutexGuard<'_, BTreeMap<Unit, Keeper>> {
        self.units.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The task: waits until all units were stopped by the shutdown.
    ///
    /// # Errors
    /// A keeper panicked.
    pub async fn run(self) -> Result<(), JoinError> {
        tokio::select! {
            () = self.shutdown.cancelled() => {}
            () = self.panicked.cancelled() => {}
        }
        let units = std::mem::take(&mut *self.units());
        units.values().for_each(|keeper| keeper.stop.cancel());
        for mut keeper in units.into_values() {
            (&mut keeper.task).await?;
        }
        Ok(())
    }
}

/// Names the network in the log lines of its tasks, unless it is the default one.
fn log_span(network: &NetworkName) -> Span {
    // At this level the span is there whatever the log's level is.
    if network.is_default() { Span::none() } else { tracing::error_span!("unit", %network) }
}

/// Runs a unit until `stop`. `start` starts its tasks, after the given delay, until its token is cancelled.
async fn keep(unit: Unit, start: impl Fn(Duration, CancellationToken) -> Tasks, failures: Failures, stop: CancellationToken) {
    let mut backoff = RESTART_BACKOFF;
    let mut random = SmallRng::from_rng(&mut rand::rng());
    let mut delay = Duration::ZERO;
    loop {
        let (started, stop_tasks) = (Instant::now() + delay, stop.child_token());
        let mut tasks = start(delay, stop_tasks.clone());
        let first = tokio::select! {
            biased;
            () = stop.cancelled() => None,
            exit = tasks.next_exit() => exit,
        };
        stop_tasks.cancel();
        let exits: Vec<TaskExit> = first.into_iter().chain(tasks.join_all(STOP_DEADLINE).await).collect();
        if stop.is_cancelled() {
            exits.iter().for_each(|exit| tracing::warn!(%unit, %exit, "task failed during shutdown"));
            return;
        }
        if started.elapsed() >= STABLE_AFTER {
            backoff.reset();
        }
        delay = backoff.next_delay(&mut random);
        // A task that panics takes the other one with it.
        let panicked = exits.iter().find(|exit| matches!(exit.outcome, TaskOutcome::Panicked(_)));
        let cause = panicked.or(exits.first()).map(ToString::to_string).unwrap_or_default();
        tracing::error!(%unit, cause, delay_ms = delay.as_millis(), "restarting; data path keeps forwarding");
        failures.record(&unit, cause, Instant::now() + delay);
    }
}
