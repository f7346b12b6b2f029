//! The task that probes peers with ICMP echo requests.
//!
//! It sends one request at a time, at most [`MAX_PROBES_PER_SECOND`](crate::plan::mesh::MAX_PROBES_PER_SECOND) a second. The
//! results are in [`MeshState`], which the socket serves. The task runs until `stop`; an error that prevents probing is kept
//! there and logged once.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::queries::Queries;
use crate::kernel::icmp::PingSocket;
use crate::metrics::Metrics;
use crate::model::api::{Mesh, Peers};
use crate::model::{Family, PerFamily};
use crate::plan::mesh::{Probe, ProbeTable};

/// Delay before a new round after one without peers or without a socket.
const IDLE_RETRY_DELAY: Duration = Duration::from_secs(5);

/// The probes' results.
#[derive(Debug)]
pub(super) struct MeshState {
    node: String,
    interval: Option<Duration>,
    state: Mutex<(ProbeTable, Option<String>)>,
    metrics: Arc<Metrics>,
}

impl MeshState {
    pub(super) fn new(node: String, interval: Option<Duration>, metrics: Arc<Metrics>) -> MeshState {
        MeshState { node, interval, state: Mutex::default(), metrics }
    }

    /// Updates the gauges.
    pub(super) fn update_metrics(&self) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.metrics.set_mesh(self.interval.is_some() && state.1.is_none(), state.0.summary());
    }

    /// This host's row.
    pub(super) fn view(&self) -> Mesh {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut mesh = state.0.view(&self.node, self.interval.unwrap_or_default());
        mesh.error.clone_from(&state.1);
        mesh
    }

    fn with_table<T>(&self, work: impl FnOnce(&mut ProbeTable) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).0)
    }

    fn set_error(&self, error: Option<String>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = error.as_ref().filter(|error| state.1.as_ref() != Some(*error)) {
            tracing::warn!(%error, "cannot probe peers; --mesh-interval=0s disables probing");
        }
        state.1 = error;
    }
}

/// Probes peers until `stop`; `changes` is incremented when the peers may have changed.
pub(super) async fn run(state: Arc<MeshState>, queries: Queries, changes: watch::Receiver<u64>, stop: CancellationToken) {
    let Some(interval) = state.interval else { return stop.cancelled().await };
    tokio::select! {
        () = stop.cancelled() => {}
        () = probe_peers(&state, interval, &queries, changes) => {}
    }
    stop.cancelled().await;
}

/// Probes in rounds until the agent stops.
async fn probe_peers(state: &MeshState, interval: Duration, queries: &Queries, mut changes: watch::Receiver<u64>) {
    let start = Instant::now();
    let now = || u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
    let mut sockets: PerFamily<AsyncFd<PingSocket>> = PerFamily::default();
    // A random delay, so that hosts started together do not probe at the same moment.
    tokio::time::sleep(interval.mul_f64(rand::random::<f64>())).await;
    loop {
        changes.mark_unchanged();
        let Some(Peers { peers }) = queries.peers().await else { return };
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        state.with_table(|table| table.start_round(&peers, epoch));
        if peers.is_empty() {
            if changes.changed().await.is_err() {
                return;
            }
            tokio::time::sleep(IDLE_RETRY_DELAY).await;
            continue;
        }
        if let Err(error) = open_sockets(
            &mut sockets,
            peers.iter().map(|peer| peer.subnet.family()).chain(peers.iter().map(|p| Family::of(p.public_ip))),
        ) {
            state.set_error(Some(error));
            tokio::time::sleep(IDLE_RETRY_DELAY).await;
            continue;
        }
        state.set_error(None);
        let probe_interval = state.with_table(|table| table.probe_interval(interval));
        while let Some(probe) = state.with_table(|table| table.next_probe(now())) {
            send_probe(state, &sockets, probe);
            receive_for(state, &sockets, probe_interval, &now).await;
        }
    }
}

/// Opens the sockets of these families that are not open yet.
fn open_sockets(sockets: &mut PerFamily<AsyncFd<PingSocket>>, families: impl Iterator<Item = Family>) -> Result<(), String> {
    for family in families {
        let slot = sockets.slot(family);
        if slot.is_none() {
            let socket = PingSocket::open(family, rand::random(), None).map_err(|error| error.message)?;
            // SAFETY: `PingSocket` owns its descriptor, always returns the same one, and closes it only when it is dropped.
            let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
            *slot = Some(registered.map_err(|error| error.into_parts().1.to_string())?);
        }
    }
    Ok(())
}

fn send_probe(state: &MeshState, sockets: &PerFamily<AsyncFd<PingSocket>>, probe: Probe) {
    let sent = match sockets.get(Family::of(probe.address)) {
        Some(socket) => socket.get_ref().send(probe.address, probe.number).map_err(|error| error.to_string()),
        None => Err("no ICMP socket for the address's family".to_owned()),
    };
    if let Err(error) = sent
        && let Some(path) = state.with_table(|table| table.send_failed(probe.number, error))
    {
        state.metrics.probe_lost(path);
    }
}

/// Receives replies for the given time, then expires old probes.
async fn receive_for(state: &MeshState, sockets: &PerFamily<AsyncFd<PingSocket>>, duration: Duration, now: &impl Fn() -> u64) {
    let deadline = tokio::time::Instant::now() + duration;
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(deadline) => break,
            () = receive_replies(state, sockets.get(Family::V4), now) => {}
            () = receive_replies(state, sockets.get(Family::V6), now) => {}
        }
    }
    state.with_table(|table| table.expire(now(), |path| state.metrics.probe_lost(path)));
}

/// Waits for replies on one socket and records them. Cancel-safe: there is no await after a read.
async fn receive_replies(state: &MeshState, socket: Option<&AsyncFd<PingSocket>>, now: &impl Fn() -> u64) {
    let Some(socket) = socket else { return std::future::pending().await };
    let Ok(mut ready) = socket.readable().await else { return std::future::pending().await };
    loop {
        match socket.get_ref().receive() {
            Ok(Some(reply)) => {
                if let Some((path, round_trip)) = state.with_table(|table| table.on_reply(reply.sequence, reply.from, now())) {
                    state.metrics.probe_answered(path, Duration::from_micros(round_trip));
                }
            }
            Ok(None) => {
                ready.clear_ready();
                return;
            }
            Err(error) => {
                tracing::debug!(%error, "cannot receive echo reply");
                ready.clear_ready();
                return;
            }
        }
    }
}
