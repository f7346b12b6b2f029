//! Processes of a lab. Each starts in its namespace and its own session, so that it outlives the command that starts it. PID and
//! start time identify it, because PIDs are reused: only the lab's own processes are ended.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use overlay_agent::kernel::netns::Netns;
use serde::{Deserialize, Serialize};

use super::LabError;

/// Time for a process to end after SIGTERM; then it is killed.
pub const TERM_GRACE: Duration = Duration::from_secs(5);

/// Time for a killed process to end: only a hang in the kernel takes longer.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Time for a process to stop, as `KILL_TIMEOUT`.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Poll interval for ending and stopping processes.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Identity of a process, distinct from later processes with the same PID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// PID.
    pub pid: i32,
    /// Clock ticks between boot and the process's start (`proc_pid_stat(5)`, field 22).
    pub start_time: u64,
}

impl ProcessId {
    /// Identifies the process with this PID; `None` if there is none, or only a zombie.
    pub fn from_pid(pid: i32) -> Option<ProcessId> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields = stat_fields(&stat)?;
        if matches!(fields.first(), Some(&"Z" | &"X")) && !has_threads(pid) {
            return None;
        }
        Some(ProcessId { pid, start_time: fields.get(19)?.parse().ok()? })
    }

    /// Whether any of its threads runs. Reaps an ended child of this process.
    pub fn is_alive(&self) -> bool {
        let _collected = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
        ProcessId::from_pid(self.pid) == Some(*self)
    }

    /// Sends a signal; an ended process is no error. SIGSTOP returns once all threads are stopped: `kill(2)` itself returns
    /// earlier, and on a busy machine a thread may answer a request in between. Blocks.
    pub fn signal(&self, signal: Signal) -> Result<(), Errno> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Err(Errno::ESRCH) => Ok(()),
            Ok(()) if signal == Signal::SIGSTOP => self.wait_stopped(),
            other => other,
        }
    }

    fn wait_stopped(&self) -> Result<(), Errno> {
        let end = Instant::now() + STOP_TIMEOUT;
        while self.is_alive() && !is_stopped(self.pid) {
            if Instant::now() >= end {
                return Err(Errno::ETIMEDOUT);
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Waits for its end. Returns whether it ended in time. Blocks.
    pub fn wait(&self, limit: Duration) -> bool {
        wait_all(&[*self], limit).is_empty()
    }

    /// Writes the PID file atomically.
    pub fn write_pid_file(&self, path: &Path) -> Result<(), LabError> {
        let temporary = path.with_extension("new");
        let text = format!("{} {}\n", self.pid, self.start_time);
        fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, path)).map_err(|source| LabError::File {
            action: "write",
            path: path.to_owned(),
            source,
        })
    }

    /// Reads a PID file; `None` if it is absent or torn.
    pub fn from_pid_file(path: &Path) -> Option<ProcessId> {
        let text = fs::read_to_string(path).ok()?;
        let (pid, start_time) = text.trim().split_once(' ')?;
        Some(ProcessId { pid: pid.parse().ok()?, start_time: start_time.parse().ok()? })
    }
}

/// Starts a background process: in the namespace, in its own session, with its output appended to a log.
pub fn start(mut command: Command, netns: Option<&Netns>, log: &Path, pid_file: &Path) -> Result<ProcessId, LabError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let file = |source| LabError::File { action: "write", path: log.to_owned(), source };
    let output = File::options().create(true).append(true).open(log).map_err(file)?;
    command.stdin(Stdio::null()).stdout(output.try_clone().map_err(file)?).stderr(output);
    // SAFETY: between fork and exec only setsid is called, which is async-signal-safe (signal-safety(7)) and touches no memory.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(std::io::Error::from));
    }
    // A child inherits the namespace of the thread that starts it.
    let spawned = match netns {
        Some(netns) => netns.run(|| command.spawn())?,
        None => command.spawn(),
    };
    let child = spawned.map_err(|source| LabError::Spawn { program: program.clone(), source })?;
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    let Some(id) = ProcessId::from_pid(pid) else {
        return Err(ended_error(&program, log));
    };
    if let Err(error) = id.write_pid_file(pid_file) {
        let _ignored = terminate_all(&[id], Duration::ZERO);
        return Err(error);
    }
    Ok(id)
}

/// Whether threads remain after the end of the main thread: a killed thread inside the kernel ends later than the others, and
/// holds all files and locks until then.
fn has_threads(pid: i32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|threads| threads.count() > 1)
}

/// Whether every thread of a process is stopped.
fn is_stopped(pid: i32) -> bool {
    let state = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("stat")).ok();
    let stopped = |stat: String| stat_fields(&stat).is_some_and(|fields| fields.first() == Some(&"T"));
    fs::read_dir(format!("/proc/{pid}/task"))
        .is_ok_and(|threads| threads.flatten().all(|thread| state(thread).is_none_or(stopped)))
}

/// Fields of `proc_pid_stat(5)` from the third on. Field 2, the name, is in parentheses and can contain blanks and parentheses
/// itself.
fn stat_fields(stat: &str) -> Option<Vec<&str>> {
    stat.rsplit_once(')').map(|(_, rest)| rest.split_ascii_whitespace().collect())
}

/// Error for a program that has ended, with the end of its log.
pub fn ended_error(program: &str, log: &Path) -> LabError {
    LabError::Ended { program: program.to_owned(), log: log.to_owned(), tail: log_tail(log) }
}

/// Last lines of a log, indented.
pub fn log_tail(log: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(12);
    if lines.is_empty() {
        "  (empty)".to_owned()
    } else {
        lines[from..].iter().map(|l| format!("  {l}")).collect::<Vec<_>>().join("\n")
    }
}

/// Ends processes: SIGTERM, a wait, SIGKILL, a wait. Returns a line for each process that remains. Blocks.
pub fn terminate_all(processes: &[ProcessId], grace: Duration) -> Vec<String> {
    let mut failures = Vec::new();
    let mut send = |remaining: &[ProcessId], signal: Signal| {
        for process in remaining {
            if let Err(errno) = process.signal(signal) {
                failures.push(format!("process {}: cannot send {signal}: {}", process.pid, errno.desc()));
            }
        }
    };
    let mut remaining: Vec<ProcessId> = processes.iter().copied().filter(ProcessId::is_alive).collect();
    if !grace.is_zero() {
        send(&remaining, Signal::SIGTERM);
        remaining = wait_all(&remaining, grace);
    }
    if !remaining.is_empty() {
        send(&remaining, Signal::SIGKILL);
        remaining = wait_all(&remaining, KILL_TIMEOUT);
    }
    failures.extend(remaining.iter().map(|p| format!("process {} does not end after SIGKILL", p.pid)));
    failures
}

/// Returns the processes still alive at the limit, or none as soon as all have ended.
fn wait_all(processes: &[ProcessId], limit: Duration) -> Vec<ProcessId> {
    let end = Instant::now() + limit;
    let mut remaining = processes.to_vec();
    loop {
        remaining.retain(ProcessId::is_alive);
        if remaining.is_empty() || Instant::now() >= end {
            return remaining;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_is_started_recorded_and_terminated() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (log, record) = (dir.path().join("log"), dir.path().join("pid"));
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' TERM; echo started; while :; do sleep 0.05; done"]);
        let id = start(command, None, &log, &record).expect("sh starts");
        let end = Instant::now() + TERM_GRACE;
        while log_tail(&log) != "  started" && Instant::now() < end {
            std::thread::sleep(POLL_INTERVAL);
        }
        assert!(id.is_alive());
        assert_eq!(ProcessId::from_pid_file(&record), Some(id));
        let reused_pid = ProcessId { start_time: id.start_time + 1, ..id };
        assert!(!reused_pid.is_alive());
        assert_eq!(terminate_all(&[reused_pid], TERM_GRACE), Vec::<String>::new());
        assert!(id.is_alive(), "the end of another process is not its end");
        id.signal(Signal::SIGSTOP).expect("it stops");
        assert!(is_stopped(id.pid));
        id.signal(Signal::SIGCONT).expect("it goes on");
        // The process ignores SIGTERM.
        assert_eq!(terminate_all(&[id], Duration::from_millis(100)), Vec::<String>::new());
        assert!(!id.is_alive());
        assert_eq!(log_tail(&log), "  started");
    }

    #[test]
    fn missing_program_is_reported() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let error = start(Command::new("/no/such/program"), None, &dir.path().join("log"), &dir.path().join("pid"));
        assert!(error.expect_err("missing").to_string().contains("/no/such/program"));
    }

    #[test]
    fn torn_pid_file_is_ignored() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("pid");
        for text in ["", "12", "12 x", "x 12"] {
            fs::write(&path, text).expect("writable");
            assert_eq!(ProcessId::from_pid_file(&path), None);
        }
    }
}
