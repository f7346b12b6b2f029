//! Messages to systemd while the agent runs: readiness, status line, watchdog.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::admin::{ApiError, Backend};
use crate::model::api;
use crate::systemd::Notifier;

/// Interval of status line updates, unless the watchdog needs a shorter one.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);
/// Watchdog messages per watchdog timeout.
const WATCHDOG_DIVISOR: u32 = 4;
/// Time limit of the status query. The reconcile loop answers it, and the watchdog supervises that loop.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);

/// Inputs of the task.
pub(super) struct HealthInputs {
    /// Whether the agent is ready.
    pub(super) ready: watch::Receiver<bool>,
    /// One per loop of the network and of the reconciler: incremented in each iteration; a status query causes an iteration.
    pub(super) heartbeats: Vec<watch::Receiver<u64>>,
}

/// The task: sends messages to systemd until `stop`.
///
/// It feeds the watchdog only after a new iteration of each loop. So a stuck loop ends the agent even if all other tasks run. An
/// idle loop makes an iteration because of the status query here.
pub(super) async fn notify<B: Backend>(notifier: Arc<Notifier>, inputs: HealthInputs, backend: Arc<B>, stop: CancellationToken) {
    let query_status = || async { tokio::time::timeout(STATUS_TIMEOUT, backend.status()).await.ok() };
    notify_with(&notifier, inputs, query_status, stop).await;
}

/// `query_status` returns the agent's status, or `None` after its timeout.
async fn notify_with<F>(notifier: &Notifier, mut inputs: HealthInputs, query_status: impl Fn() -> F, stop: CancellationToken)
where
    F: Future<Output = Option<Result<api::Status, ApiError>>>,
{
    if !notifier.is_enabled() {
        return stop.cancelled().await;
    }
    let interval = notifier.watchdog().map_or(STATUS_INTERVAL, |watchdog| (watchdog / WATCHDOG_DIVISOR).min(STATUS_INTERVAL));
    let mut tick = tokio::time::interval(interval);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last_sent = None;
    loop {
        // Before the status query, which may take a while.
        if inputs.heartbeats.iter().all(|heartbeat| heartbeat.has_changed().unwrap_or(false)) {
            inputs.heartbeats.iter_mut().for_each(watch::Receiver::mark_unchanged);
            notifier.feed_watchdog().await;
        }
        let ready = *inputs.ready.borrow_and_update();
        if ready {
            notifier.ready().await;
        }
        let status = status_line(ready, query_status().await);
        if last_sent.as_ref() != Some(&status) {
            notifier.status(&status).await;
            last_sent = Some(status);
        }
        tokio::select! {
            () = stop.cancelled() => return notifier.stopping().await,
            _ = tick.tick() => {}
            changed = inputs.ready.changed() => if changed.is_err() {
                stop.cancelled().await;
            },
        }
    }
}

/// The status line.
fn status_line(ready: bool, status: Option<Result<api::Status, ApiError>>) -> String {
    let prefix = if ready { "Ready" } else { "Not ready" };
    match status {
        Some(Ok(status)) => {
            let subnet = status.lease.map_or_else(|| "no subnet yet".to_owned(), |lease| lease.subnet.to_string());
            let problem = status.problems.first().map(|problem| format!("; {problem}")).unwrap_or_default();
            format!("{prefix}: {subnet}, peers {}, containers {}{problem}", status.data_path.peers, status.endpoints)
        }
        Some(Err(error)) => format!("{prefix}: {error}"),
        None => format!("{prefix}: the reconcile loop is busy"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::ErrorKind;
    use tokio::net::UnixDatagram;

    /// The next message, or `None` after the given time.
    async fn receive_message(systemd: &UnixDatagram, watchdog: Duration) -> Option<String> {
        let mut bytes = [0; 1024];
        let length = tokio::time::timeout(watchdog, systemd.recv(&mut bytes)).await.ok()?.unwrap();
        Some(String::from_utf8(bytes[..length].to_vec()).unwrap())
    }

    #[tokio::test]
    async fn watchdog_is_fed_only_by_loop_progress() {
        let watchdog = Duration::from_secs(1);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::connect_to(path, Some(watchdog)).unwrap();
        let (heartbeat, first) = watch::channel(0);
        let (other_heartbeat, second) = watch::channel(0);
        let (readiness, ready) = watch::channel(false);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        // A stuck loop does not answer the status query either.
        let task = tokio::spawn(async move {
            let ask = || async { None };
            notify_with(&notifier, HealthInputs { ready, heartbeats: vec![first, second] }, ask, stopped).await;
        });
        assert_eq!(receive_message(&systemd, watchdog).await.as_deref(), Some("STATUS=Not ready: the reconcile loop is busy"));
        assert_eq!(receive_message(&systemd, 2 * watchdog).await, None, "fed although the loop has made no progress");
        heartbeat.send_modify(|count| *count += 1);
        assert_eq!(receive_message(&systemd, 2 * watchdog).await, None, "fed although one loop has made no progress");
        other_heartbeat.send_modify(|count| *count += 1);
        assert_eq!(receive_message(&systemd, 4 * watchdog).await.as_deref(), Some("WATCHDOG=1"));
        assert_eq!(receive_message(&systemd, 2 * watchdog).await, None, "fed twice for one iteration");
        readiness.send_replace(true);
        assert_eq!(receive_message(&systemd, 4 * watchdog).await.as_deref(), Some("READY=1"));
        assert!(receive_message(&systemd, 4 * watchdog).await.unwrap().starts_with("STATUS=Ready"));
        stop.cancel();
        while let Some(text) = receive_message(&systemd, 4 * watchdog).await {
            if text.starts_with("STOPPING=1") {
                return task.await.unwrap();
            }
        }
        panic!("no STOPPING=1 was sent");
    }

    #[test]
    fn error_is_shown_in_status_line() {
        let error = ApiError::new(ErrorKind::NotReady, "the agent is shutting down");
        assert_eq!(status_line(false, Some(Err(error))), "Not ready: the agent is shutting down");
    }
}
