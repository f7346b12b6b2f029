//! Labs without root. A supervisor process holds a user, a mount and a network namespace in which the user is root; every later
//! command on the lab re-executes itself inside them.
//!
//! The supervisor is `unshare --user --map-root-user --mount --net overlayctl lab supervisor`; commands enter with `nsenter`.
//! Both programs are part of util-linux, which every system has.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::unistd::geteuid;

use super::down::{MAX_KILL_ROUNDS, TeardownSummary, recorded_processes, remove_dir};
pub use super::labs_dir::is_inside;
use super::labs_dir::{DIR_VARIABLE, INSIDE_VARIABLE};
use super::process::{ProcessId, TERM_GRACE, log_tail, start, terminate_all};
use super::{LabError, LabName, LabsDir};

/// Variable with the caller's working directory, which entering a mount namespace loses.
const CWD_VARIABLE: &str = "OVERLAY_LAB_CWD";

/// Time for the supervisor to become ready: some milliseconds of system calls.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether labs of this user need a supervisor.
pub fn is_needed() -> bool {
    !geteuid().is_root()
}

/// PID file of the supervisor.
fn pid_file(dir: &Path) -> PathBuf {
    dir.join("supervisor.pid")
}

fn log_file(dir: &Path) -> PathBuf {
    dir.join("supervisor.log")
}

/// Supervisor of a lab, if it runs.
pub fn supervisor(labs_dir: &LabsDir, name: &LabName) -> Option<ProcessId> {
    ProcessId::from_pid_file(&pid_file(&labs_dir.lab_dir(name))).filter(ProcessId::is_alive)
}

/// Starts the supervisor of a lab. Blocks until it is ready.
pub fn start_supervisor(labs_dir: &LabsDir, name: &LabName) -> Result<ProcessId, LabError> {
    let dir = labs_dir.create_lab_dir(name)?;
    let own = current_program()?;
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "--net", "--"]).arg(own);
    command.args(["lab", "supervisor", "--directory"]).arg(&dir);
    let supervisor = start(command, None, &log_file(&dir), &pid_file(&dir))?;
    let end = Instant::now() + READY_TIMEOUT;
    while !dir.join("supervisor.ready").exists() {
        if supervisor.is_alive() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        let reason = format!("its supervisor did not start:\n{}", log_tail(&log_file(&dir)));
        let mut failures = terminate_all(&[supervisor], Duration::ZERO);
        failures.extend(remove_dir(&dir).err());
        return Err(LabError::Rootless {
            reason: failures.into_iter().fold(reason, |r, l| format!("{r}\n{l}")),
            advice: userns_hint(),
        });
    }
    Ok(supervisor)
}

/// Advice on a setting that may forbid user namespaces.
fn userns_hint() -> String {
    let forbidden = |path: &str, value: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == value);
    if forbidden("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        ", or allow user namespaces: sysctl kernel.apparmor_restrict_unprivileged_userns=0".to_owned()
    } else if forbidden("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        ", or allow user namespaces: sysctl kernel.unprivileged_userns_clone=1".to_owned()
    } else if forbidden("/proc/sys/user/max_user_namespaces", "0") {
        ", or allow user namespaces: sysctl user.max_user_namespaces=10000".to_owned()
    } else {
        String::new()
    }
}

fn current_program() -> Result<PathBuf, LabError> {
    std::env::current_exe().map_err(|source| LabError::Spawn { program: "overlayctl inside the lab".to_owned(), source })
}

/// Runs the current command again inside the lab's namespaces and waits for it. Returns its exit code. Blocks.
pub fn enter(labs_dir: &LabsDir, name: &LabName) -> Result<u8, LabError> {
    let Some(supervisor) = supervisor(labs_dir, name) else {
        // Either the lab does not exist, or its supervisor is gone and its namespaces with it.
        labs_dir.read_layout(name)?;
        let reason = format!("the supervisor of lab `{name}` is gone: remove the lab (overlayctl lab down --name {name})");
        return Err(LabError::Rootless { reason, advice: String::new() });
    };
    let mut command = Command::new("nsenter");
    command.args(["--target", &supervisor.pid.to_string(), "--user", "--mount", "--net", "--preserve-credentials", "--"]);
    command.arg(current_program()?).args(std::env::args_os().skip(1));
    command.env(INSIDE_VARIABLE, "1").env(DIR_VARIABLE, labs_dir.base());
    if let Ok(cwd) = std::env::current_dir() {
        command.env(CWD_VARIABLE, cwd);
    }
    let status = command.status().map_err(|source| LabError::Spawn { program: "nsenter".to_owned(), source })?;
    // Exit code of a shell: 128 plus the signal.
    let code = status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(1);
    Ok(u8::try_from(code).unwrap_or(1))
}

/// Restores the working directory of the caller of [`enter`].
pub fn restore_directory() {
    if let Some(dir) = std::env::var_os(CWD_VARIABLE) {
        // An inaccessible directory leaves the command at the root.
        let _ignored = std::env::set_current_dir(dir);
    }
}

/// Removes a rootless lab: ends every process in its user namespace, the supervisor too, and removes the directory. Namespaces
/// and mounts end with their last process. Also works without the supervisor, from the PID files. Blocks.
pub fn down(labs_dir: &LabsDir, name: &LabName) -> Result<TeardownSummary, LabError> {
    let dir = labs_dir.lab_dir(name);
    let mut removed = TeardownSummary::default();
    let mut failures = Vec::new();
    for _ in 0..MAX_KILL_ROUNDS {
        let mut processes = recorded_processes(&dir);
        processes.extend(supervisor(labs_dir, name));
        processes.extend(user_namespace_processes(&processes));
        if processes.is_empty() {
            break;
        }
        removed.processes += processes.len();
        failures.extend(terminate_all(&processes.into_iter().collect::<Vec<_>>(), TERM_GRACE));
    }
    if failures.is_empty() {
        match remove_dir(&dir) {
            Ok(existed) => removed.directory = existed,
            Err(error) => failures.push(error),
        }
    }
    if failures.is_empty() { Ok(removed) } else { Err(LabError::NotRemoved { name: name.to_string(), failures }) }
}

/// Lists every process in the user namespaces of the given processes, except in this process's own.
fn user_namespace_processes(processes: &BTreeSet<ProcessId>) -> BTreeSet<ProcessId> {
    let namespace = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/user")).ok().map(|m| (m.dev(), m.ino()));
    let Some(own) = namespace("self") else { return BTreeSet::new() };
    let namespaces: BTreeSet<(u64, u64)> =
        processes.iter().filter_map(|p| namespace(&p.pid.to_string())).filter(|n| *n != own).collect();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let members = pids.filter(|pid| namespace(&pid.to_string()).is_some_and(|n| namespaces.contains(&n)));
    members.filter_map(ProcessId::from_pid).collect()
}

/// Runs the supervisor: makes /run/netns writable, reports that it is ready, and waits for its end. Returns only on failure.
pub fn run_supervisor(dir: &Path) -> Result<std::convert::Infallible, LabError> {
    let file = |action, path: PathBuf| move |source| LabError::File { action, path, source };
    prepare_run_netns(dir).map_err(file("prepare namespaces in", PathBuf::from("/run")))?;
    fs::write(dir.join("supervisor.ready"), "").map_err(file("write", dir.join("supervisor.ready")))?;
    loop {
        // SIGTERM ends it. No cleanup is needed: the namespaces end with it.
        nix::unistd::pause();
    }
}

/// Mounts an empty /run/netns. If the directory is absent, replaces /run by a tmpfs that contains all of its entries.
fn prepare_run_netns(dir: &Path) -> io::Result<()> {
    let netns = Path::new("/run/netns");
    let tmpfs = |at: &Path| mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0755"));
    if netns.is_dir() {
        return Ok(tmpfs(netns)?);
    }
    let run = Path::new("/run");
    let before = dir.join("run-before");
    fs::create_dir_all(&before)?;
    mount(Some(run), &before, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    // The lab's directory can be below /run itself: after the mount on /run only the working directory still reaches it.
    std::env::set_current_dir(&before)?;
    tmpfs(run)?;
    for entry in fs::read_dir(".")?.flatten() {
        let (from, to) = (entry.path(), run.join(entry.file_name()));
        let kind = entry.file_type()?;
        let result = if kind.is_symlink() {
            fs::read_link(&from).and_then(|target| std::os::unix::fs::symlink(target, &to))
        } else {
            let created = if kind.is_dir() { fs::create_dir(&to) } else { fs::File::create(&to).map(|_| ()) };
            created.and_then(|()| Ok(mount(Some(&from), &to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?))
        };
        if let Err(error) = result {
            eprintln!("{} is missing inside the lab: {error}", to.display());
        }
    }
    std::env::set_current_dir("/")?;
    fs::create_dir(netns)
}
