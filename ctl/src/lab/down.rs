//! Removal of a lab: its processes, its namespaces, its directory. It needs only the lab's name, so that it also removes an
//! incomplete lab. It continues after errors and reports all.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use overlay_agent::kernel::netns::Netns;

use super::labs_dir::is_inside;
use super::layout::{LabName, prefix};
use super::process::{ProcessId, TERM_GRACE, terminate_all};
use super::{Lab, LabError, agent, etcd};
use crate::resolver;

/// Maximum number of searches for processes: one may be starting another.
pub(super) const MAX_KILL_ROUNDS: usize = 3;

/// Removed objects.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct TeardownSummary {
    /// Number of ended processes.
    pub processes: usize,
    /// Number of deleted namespaces.
    pub namespaces: usize,
    /// Whether the directory existed.
    pub directory: bool,
}

impl TeardownSummary {
    /// Whether nothing existed.
    pub fn is_empty(&self) -> bool {
        *self == TeardownSummary::default()
    }
}

/// Removes a lab. Blocks.
pub fn down(dir: &Path, name: &LabName) -> Result<TeardownSummary, LabError> {
    let mut removed = TeardownSummary::default();
    let mut failures = Vec::new();
    for _ in 0..MAX_KILL_ROUNDS {
        let processes = processes(dir, name, &mut failures);
        if processes.is_empty() {
            break;
        }
        removed.processes += processes.len();
        failures.extend(terminate_all(&processes.into_iter().collect::<Vec<_>>(), TERM_GRACE));
    }
    match namespaces(name) {
        Ok(names) => {
            for namespace in names {
                match Netns::delete(&namespace) {
                    Ok(()) => removed.namespaces += 1,
                    Err(error) => failures.push(error.to_string()),
                }
            }
        }
        Err(error) => failures.push(error.to_string()),
    }
    if let Err(error) = resolver::remove_managed(&prefix(name)) {
        failures.push(error.to_string());
    }
    // After a failure the layout file stays for the next try. Inside a supervisor's namespaces the command outside removes the
    // directory, with the supervisor's PID file.
    if failures.is_empty() && !is_inside() {
        match remove_dir(dir) {
            Ok(existed) => removed.directory = existed,
            Err(error) => failures.push(error),
        }
    }
    failures.dedup();
    if failures.is_empty() { Ok(removed) } else { Err(LabError::NotRemoved { name: name.to_string(), failures }) }
}

impl Lab {
    /// Removes the lab: processes, namespaces, directory. Blocks for a few seconds at most. Continues after errors and reports
    /// all.
    pub fn down(&self) -> Result<TeardownSummary, LabError> {
        down(&self.dir, &self.layout.name)
    }

    /// Wraps the lab in a guard that removes it on drop, for tests.
    pub fn guarded(self) -> LabGuard {
        LabGuard { lab: self }
    }
}

/// Guard that removes its lab on drop.
#[derive(Debug)]
pub struct LabGuard {
    lab: Lab,
}

impl std::ops::Deref for LabGuard {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl Drop for LabGuard {
    fn drop(&mut self) {
        if let Err(error) = self.lab.down() {
            eprintln!("lab {}: {error}", self.lab.layout.name);
        }
    }
}

/// Removes the lab's directory. Returns whether it existed.
pub(super) fn remove_dir(dir: &Path) -> Result<bool, String> {
    match fs::remove_dir_all(dir) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(format!("cannot remove {}: {e}", dir.display())),
    }
}

/// Lists the namespaces of a lab, by their prefix.
fn namespaces(name: &LabName) -> Result<Vec<String>, LabError> {
    let prefix = prefix(name);
    Ok(Netns::list()?.into_iter().filter(|n| n.starts_with(&prefix)).collect())
}

/// Lists every process that is in a namespace of the lab or in a PID file.
fn processes(dir: &Path, name: &LabName, failures: &mut Vec<String>) -> BTreeSet<ProcessId> {
    let mut found: BTreeSet<ProcessId> = recorded_processes(dir);
    let names = match namespaces(name) {
        Ok(names) => names,
        Err(error) => {
            failures.push(error.to_string());
            Vec::new()
        }
    };
    for namespace in names {
        // A file without a mounted namespace (after a crash between the two) has no processes.
        let Ok(netns) = Netns::named(&namespace) else { continue };
        match netns.pids() {
            Ok(pids) => found.extend(pids.into_iter().filter_map(ProcessId::from_pid)),
            Err(error) => failures.push(error.to_string()),
        }
    }
    found
}

/// Lists the running processes from the lab's PID files.
pub(super) fn recorded_processes(dir: &Path) -> BTreeSet<ProcessId> {
    let hosts = fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    let files = hosts.map(|host| agent::pid_file(dir, &host)).chain([etcd::pid_file(dir)]);
    files.filter_map(|file| ProcessId::from_pid_file(&file)).filter(ProcessId::is_alive).collect()
}
