//! How the agent ends: signals become tokens, and every task has a name and a watched end.
//!
//! One task of its own, run by the caller: [`Signals::watch`]. Nothing here calls `exit`; `main` does, when it sees what happened.

use std::collections::HashMap;
use std::fmt::Display;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

/// The two steps of an end.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// End in order: let go of clients, leave the data path as it is.
    pub begin: CancellationToken,
    /// End at once: a second signal came.
    pub now: CancellationToken,
}

/// SIGTERM and SIGINT, caught from the moment this is made.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Catches the signals. Needs a tokio runtime; the error is the system's.
    pub fn catch() -> std::io::Result<Signals> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The task: the first signal cancels `begin`, the second `now`, and then it ends. Cancel-safe.
    pub async fn watch(mut self, shutdown: Shutdown) {
        let name = self.next().await;
        tracing::info!(signal = name, "ending; a second signal ends at once");
        shutdown.begin.cancel();
        let name = self.next().await;
        tracing::warn!(signal = name, "ending at once");
        shutdown.now.cancel();
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It returned well.
    Done,
    /// It returned an error; its text.
    Failed(String),
    /// It panicked; the panic's text.
    Panicked(String),
    /// It did not end within the deadline and was aborted.
    Aborted,
}

/// A task that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The task's name.
    pub task: &'static str,
    /// How it ended.
    pub outcome: Outcome,
}

impl Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.outcome {
            Outcome::Done => write!(f, "task {} ended", self.task),
            Outcome::Failed(error) => write!(f, "task {} failed: {error}", self.task),
            Outcome::Panicked(text) => write!(f, "task {} panicked: {text}", self.task),
            Outcome::Aborted => write!(f, "task {} did not end in time and was aborted", self.task),
        }
    }
}

/// The agent's long-lived tasks. Dropping it aborts them all.
#[derive(Debug, Default)]
pub struct Tasks {
    set: JoinSet<Result<(), String>>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    /// No task yet.
    pub fn new() -> Tasks {
        Tasks::default()
    }

    /// Starts a task that can fail.
    pub fn spawn<E: Display>(&mut self, task: &'static str, future: impl Future<Output = Result<(), E>> + Send + 'static) {
        let handle = self.set.spawn(async move { future.await.map_err(|e| e.to_string()) });
        self.names.insert(handle.id(), task);
    }

    /// The next task that ends; `None` when there is none left. Cancel-safe.
    pub async fn next_end(&mut self) -> Option<Ended> {
        let joined = self.set.join_next_with_id().await?;
        Some(self.ended(joined))
    }

    /// Waits for all tasks, which the caller has asked to end, until the deadline; aborts those that are left. Returns every end that was
    /// not [`Outcome::Done`].
    pub async fn finish(&mut self, deadline: Duration) -> Vec<Ended> {
        let mut ends = Vec::new();
        let drain = async {
            while let Some(end) = self.next_end().await {
                ends.push(end);
            }
        };
        if tokio::time::timeout(deadline, drain).await.is_err() {
            self.set.abort_all();
            while let Some(end) = self.next_end().await {
                ends.push(end);
            }
        }
        ends.retain(|end| end.outcome != Outcome::Done);
        ends
    }

    fn ended(&mut self, joined: Result<(Id, Result<(), String>), JoinError>) -> Ended {
        let (id, outcome) = match joined {
            Ok((id, Ok(()))) => (id, Outcome::Done),
            Ok((id, Err(error))) => (id, Outcome::Failed(error)),
            Err(e) => (e.id(), panic_text(e).map_or(Outcome::Aborted, Outcome::Panicked)),
        };
        Ended { task: self.names.remove(&id).unwrap_or("unnamed"), outcome }
    }
}

/// The text of a task's panic; `None` where it was aborted.
pub fn panic_text(error: JoinError) -> Option<String> {
    let payload = error.try_into_panic().ok()?;
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| payload.downcast_ref::<String>().cloned());
    Some(text.unwrap_or_else(|| "without a text".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[tokio::test]
    async fn ends_are_named_with_their_reason() {
        let mut tasks = Tasks::new();
        tasks.spawn("fails", async { Err(io::Error::other("no luck")) });
        assert_eq!(tasks.next_end().await.map(|e| e.to_string()).as_deref(), Some("task fails failed: no luck"));
        tasks.spawn("panics", async {
            if tokio::task::try_id().is_some() {
                panic!("at line {}", 7);
            }
            Ok::<(), io::Error>(())
        });
        assert_eq!(tasks.next_end().await.map(|e| e.to_string()).as_deref(), Some("task panics panicked: at line 7"));
        tasks.spawn("done", async { Ok::<(), io::Error>(()) });
        assert_eq!(tasks.next_end().await, Some(Ended { task: "done", outcome: Outcome::Done }));
        assert_eq!(tasks.next_end().await, None);
    }

    #[tokio::test]
    async fn what_does_not_end_in_time_is_aborted_and_named() {
        let token = CancellationToken::new();
        let mut tasks = Tasks::new();
        let child = token.clone();
        tasks.spawn("well", async move {
            child.cancelled().await;
            Ok::<(), io::Error>(())
        });
        tasks.spawn("stuck", std::future::pending::<Result<(), io::Error>>());
        token.cancel();
        assert_eq!(tasks.finish(Duration::from_millis(200)).await, vec![Ended { task: "stuck", outcome: Outcome::Aborted }]);
    }

    #[tokio::test]
    async fn the_first_signal_begins_and_the_second_ends_at_once() {
        let shutdown = Shutdown::default();
        let signals = Signals::catch().unwrap();
        let task = tokio::spawn(signals.watch(shutdown.clone()));
        let limit = Duration::from_secs(10);
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM).unwrap();
        tokio::time::timeout(limit, shutdown.begin.cancelled()).await.unwrap();
        assert!(!shutdown.now.is_cancelled());
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGINT).unwrap();
        tokio::time::timeout(limit, shutdown.now.cancelled()).await.unwrap();
        task.await.unwrap();
    }
}
