//! What systemd is told while the agent runs: that it is ready, how it is, that it makes progress.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::admin::{ApiError, Backend};
use crate::model::api;
use crate::systemd::Notifier;

/// How often the status line is renewed where no watchdog asks for more.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);
/// How many times within the watchdog's time the agent says that it makes progress.
const FEEDS: u32 = 4;
/// How long the answer for the status line may take: it comes from the loop that the watchdog is about.
const ANSWER_WAIT: Duration = Duration::from_secs(1);

/// What the task watches.
pub(super) struct Signs {
    /// Whether the agent is ready.
    pub(super) ready: watch::Receiver<bool>,
    /// Counts up with each turn of the reconcile loop; a question for the status is a turn.
    pub(super) beats: watch::Receiver<u64>,
}

/// The task: tells systemd until `stop`. The watchdog is fed only where the reconcile loop has turned since the last time, so that a loop that is
/// stuck ends the agent, whatever its other tasks do. A loop with nothing to do turns because it is asked for the status here.
pub(super) async fn tell<B: Backend>(notifier: Arc<Notifier>, signs: Signs, backend: Arc<B>, stop: CancellationToken) {
    let ask = || async { tokio::time::timeout(ANSWER_WAIT, backend.status()).await.ok() };
    tell_with(&notifier, signs, ask, stop).await;
}

/// `ask` answers the agent's status, or nothing where that takes too long.
async fn tell_with<F>(notifier: &Notifier, mut signs: Signs, ask: impl Fn() -> F, stop: CancellationToken)
where
    F: Future<Output = Option<Result<api::Status, ApiError>>>,
{
    if !notifier.is_heard() {
        return stop.cancelled().await;
    }
    let interval = notifier.watchdog().map_or(STATUS_INTERVAL, |watchdog| (watchdog / FEEDS).min(STATUS_INTERVAL));
    let mut tick = tokio::time::interval(interval);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told = None;
    loop {
        // Before the status, whose answer may be long in coming.
        if signs.beats.has_changed().unwrap_or(false) {
            signs.beats.mark_unchanged();
            notifier.alive().await;
        }
        let ready = *signs.ready.borrow_and_update();
        if ready {
            notifier.ready().await;
        }
        let status = line(ready, ask().await);
        if told.as_ref() != Some(&status) {
            notifier.status(&status).await;
            told = Some(status);
        }
        tokio::select! {
            () = stop.cancelled() => return notifier.stopping().await,
            _ = tick.tick() => {}
            changed = signs.ready.changed() => if changed.is_err() {
                stop.cancelled().await;
            },
        }
    }
}

/// The status line.
fn line(ready: bool, answer: Option<Result<api::Status, ApiError>>) -> String {
    let prefix = if ready { "Ready" } else { "Not ready" };
    match answer {
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

    /// The next message, within the watchdog's time.
    async fn heard(systemd: &UnixDatagram, watchdog: Duration) -> Option<String> {
        let mut bytes = [0; 1024];
        let length = tokio::time::timeout(watchdog, systemd.recv(&mut bytes)).await.ok()?.unwrap();
        Some(String::from_utf8(bytes[..length].to_vec()).unwrap())
    }

    #[tokio::test]
    async fn the_watchdog_is_fed_by_the_loop_alone() {
        let watchdog = Duration::from_secs(1);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::at(path, Some(watchdog)).unwrap();
        let (beat, beats) = watch::channel(0);
        let (readiness, ready) = watch::channel(false);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        // The loop is so stuck that it does not answer either.
        let task = tokio::spawn(async move {
            let ask = || async { None };
            tell_with(&notifier, Signs { ready, beats }, ask, stopped).await;
        });
        assert_eq!(heard(&systemd, watchdog).await.as_deref(), Some("STATUS=Not ready: the reconcile loop is busy"));
        assert_eq!(heard(&systemd, 2 * watchdog).await, None, "fed although the loop has not turned");
        beat.send_modify(|count| *count += 1);
        assert_eq!(heard(&systemd, 4 * watchdog).await.as_deref(), Some("WATCHDOG=1"));
        assert_eq!(heard(&systemd, 2 * watchdog).await, None, "fed twice for one turn");
        readiness.send_replace(true);
        assert_eq!(heard(&systemd, 4 * watchdog).await.as_deref(), Some("READY=1"));
        assert!(heard(&systemd, 4 * watchdog).await.unwrap().starts_with("STATUS=Ready"));
        stop.cancel();
        while let Some(text) = heard(&systemd, 4 * watchdog).await {
            if text.starts_with("STOPPING=1") {
                return task.await.unwrap();
            }
        }
        panic!("the end is not told");
    }

    #[test]
    fn an_error_is_told_in_the_status() {
        let error = ApiError::new(ErrorKind::NotReady, "the agent is ending");
        assert_eq!(line(false, Some(Err(error))), "Not ready: the agent is ending");
    }
}
