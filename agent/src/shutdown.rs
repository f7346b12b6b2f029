//! Shutdown: signals become cancellation tokens, and every task has a name and a recorded outcome.
//!
//! One task, spawned by the caller: [`Signals::watch`]. Nothing here calls `exit`; `main` returns the exit code.

use std::collections::HashMap;
use std::fmt::Display;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

/// The two stages of a shutdown.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Graceful shutdown: close client connections, leave the data path unchanged.
    pub graceful: CancellationToken,
    /// Immediate shutdown, after a second signal.
    pub immediate: CancellationToken,
}

/// SIGTERM and SIGINT, caught from the construction of this value.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Installs the signal handlers. Needs a tokio runtime; the error is the system's.
    pub fn catch() -> std::io::Result<Signals> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The task: the first signal cancels `graceful`, the second `immediate`; then the task ends. Cancel-safe.
    pub async fn watch(mut self, shutdown: Shutdown) {
        let name = self.next().await;
        tracing::info!(signal = name, "shutting down; a second signal exits immediately");
        shutdown.graceful.cancel();
        let name = self.next().await;
        tracing::warn!(signal = name, "second signal: exiting immediately");
        shutdown.immediate.cancel();
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// The outcome of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TaskOutcome {
    /// The task returned `Ok`.
    Completed,
    /// The task returned an error, with this text.
    Failed(String),
    /// The task panicked, with this text.
    Panicked(String),
    /// The task did not end before the deadline and was aborted.
    Aborted,
}

/// A task that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskExit {
    /// The task's name.
    pub task: &'static str,
    /// The task's outcome.
    pub outcome: TaskOutcome,
}

impl Display for TaskExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.outcome {
            TaskOutcome::Completed => write!(f, "task {} ended", self.task),
            TaskOutcome::Failed(error) => write!(f, "task {} failed: {error}", self.task),
            TaskOutcome::Panicked(text) => write!(f, "task {} panicked: {text}", self.task),
            TaskOutcome::Aborted => write!(f, "task {} did not end in time and was aborted", self.task),
        }
    }
}

/// The agent's long-lived tasks. Dropping this value aborts them all.
#[derive(Debug, Default)]
pub struct Tasks {
    set: JoinSet<Result<(), String>>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    /// An empty set of tasks.
    pub fn new() -> Tasks {
        Tasks::default()
    }

    /// Starts a task that can fail.
    pub fn spawn<E: Display>(&mut self, task: &'static str, future: impl Future<Output = Result<(), E>> + Send + 'static) {
        let handle = self.set.spawn(async move { future.await.map_err(|e| e.to_string()) });
        self.names.insert(handle.id(), task);
    }

    /// Starts a task that cannot fail.
    pub fn spawn_infallible(&mut self, task: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        self.spawn(task, async move {
            future.await;
            Ok::<_, std::convert::Infallible>(())
        });
    }

    /// Waits for the next task to end; `None` if no task is left. Cancel-safe.
    pub async fn next_exit(&mut self) -> Option<TaskExit> {
        let joined = self.set.join_next_with_id().await?;
        Some(self.record_exit(joined))
    }

    /// Waits until the deadline for all tasks to end, then aborts the remaining tasks.
    ///
    /// The caller has told the tasks to stop before. Returns each exit other than [`TaskOutcome::Completed`].
    pub async fn join_all(&mut self, deadline: Duration) -> Vec<TaskExit> {
        let mut exits = Vec::new();
        let drain = async {
            while let Some(exit) = self.next_exit().await {
                exits.push(exit);
            }
        };
        if tokio::time::timeout(deadline, drain).await.is_err() {
            self.set.abort_all();
            while let Some(exit) = self.next_exit().await {
                exits.push(exit);
            }
        }
        exits.retain(|exit| exit.outcome != TaskOutcome::Completed);
        exits
    }

    fn record_exit(&mut self, joined: Result<(Id, Result<(), String>), JoinError>) -> TaskExit {
        let (id, outcome) = match joined {
            Ok((id, Ok(()))) => (id, TaskOutcome::Completed),
            Ok((id, Err(error))) => (id, TaskOutcome::Failed(error)),
            Err(e) => (e.id(), panic_text(e).map_or(TaskOutcome::Aborted, TaskOutcome::Panicked)),
        };
        TaskExit { task: self.names.remove(&id).unwrap_or("unnamed"), outcome }
    }
}

/// The panic message of a task; `None` if the task was aborted.
pub fn panic_text(error: JoinError) -> Option<String> {
    let payload = error.try_into_panic().ok()?;
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| payload.downcast_ref::<String>().cloned());
    Some(text.unwrap_or_else(|| "no panic message".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[tokio::test]
    async fn task_exit_names_task_and_reason() {
        let mut tasks = Tasks::new();
        tasks.spawn("fails", async { Err(io::Error::other("no luck")) });
        assert_eq!(tasks.next_exit().await.map(|e| e.to_string()).as_deref(), Some("task fails failed: no luck"));
        tasks.spawn("panics", async {
            if tokio::task::try_id().is_some() {
                panic!("at line {}", 7);
            }
            Ok::<(), io::Error>(())
        });
        assert_eq!(tasks.next_exit().await.map(|e| e.to_string()).as_deref(), Some("task panics panicked: at line 7"));
        tasks.spawn("done", async { Ok::<(), io::Error>(()) });
        assert_eq!(tasks.next_exit().await, Some(TaskExit { task: "done", outcome: TaskOutcome::Completed }));
        assert_eq!(tasks.next_exit().await, None);
    }

    #[tokio::test]
    async fn stuck_task_is_aborted_at_deadline() {
        let token = CancellationToken::new();
        let mut tasks = Tasks::new();
        let child = token.clone();
        tasks.spawn("well", async move {
            child.cancelled().await;
            Ok::<(), io::Error>(())
        });
        tasks.spawn("stuck", std::future::pending::<Result<(), io::Error>>());
        token.cancel();
        assert_eq!(
            tasks.join_all(Duration::from_millis(200)).await,
            vec![TaskExit { task: "stuck", outcome: TaskOutcome::Aborted }]
        );
    }

    #[tokio::test]
    async fn second_signal_ends_immediately() {
        let shutdown = Shutdown::default();
        let signals = Signals::catch().unwrap();
        let task = tokio::spawn(signals.watch(shutdown.clone()));
        let limit = Duration::from_secs(10);
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM).unwrap();
        tokio::time::timeout(limit, shutdown.graceful.cancelled()).await.unwrap();
        assert!(!shutdown.immediate.is_cancelled());
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGINT).unwrap();
        tokio::time::timeout(limit, shutdown.immediate.cancelled()).await.unwrap();
        task.await.unwrap();
    }
}
