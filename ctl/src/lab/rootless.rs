//! Labs without root: a keeper process holds a user, a mount and a network namespace in which the user is root, and every later command on
//! the lab runs itself again inside of them.
//!
//! The keeper is `unshare --user --map-root-user --mount --net overlayctl start_lab supervisor`; commands enter by `nsenter`; both programs are of
//! util-linux, which every system has.

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
use super::labs_dir::DIR_VARIABLE;
use super::process::{ProcessId, TERM_GRACE, log_tail, start, terminate_all};
use super::{LabError, LabName, LabsDir};

/// Set for a command that runs inside a keeper's namespaces.
const INSIDE_VARIABLE: &str = "OVERLAY_LAB_INSIDE";

/// The caller's working directory, which entering a mount namespace loses.
const CWD_VARIABLE: &str = "OVERLAY_LAB_CWD";

/// How long the keeper may take to set itself up: some milliseconds of system calls.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether this process is inside a keeper's namespaces.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE_VARIABLE).is_some()
}

/// Whether labs of this user need a keeper.
pub fn is_needed() -> bool {
    !geteuid().is_root()
}

/// Where the keeper's process id is kept.
fn pid_file(dir: &Path) -> PathBuf {
    dir.join("keeper.pid")
}

fn log_file(dir: &Path) -> PathBuf {
    dir.join("keeper.log")
}

/// The keeper of a lab, where it runs.
pub fn supervisor(labs_dir: &LabsDir, name: &LabName) -> Option<ProcessId> {
    ProcessId::from_pid_file(&pid_file(&labs_dir.lab_dir(name))).filter(ProcessId::is_alive)
}

/// Starts the keeper of a lab. Blocks until it is set up.
pub fn start_supervisor(labs_dir: &LabsDir, name: &LabName) -> Result<ProcessId, LabError> {
    let dir = labs_dir.create_lab_dir(name)?;
    let own = current_program()?;
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "--net", "--"]).arg(own);
    command.args(["lab", "keeper", "--directory"]).arg(&dir);
    let supervisor = start(command, None, &log_file(&dir), &pid_file(&dir))?;
    let end = Instant::now() + READY_TIMEOUT;
    while !dir.join("keeper.ready").exists() {
        if supervisor.is_alive() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        let reason = format!("its keeper did not come up:\n{}", log_tail(&log_file(&dir)));
        let mut left = terminate_all(&[supervisor], Duration::ZERO);
        left.extend(remove_dir(&dir).err());
        return Err(LabError::Rootless {
            reason: left.into_iter().fold(reason, |r, l| format!("{r}\n{l}")),
            advice: userns_hint(),
        });
    }
    Ok(supervisor)
}

/// What on this machine may forbid user namespaces.
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
    std::env::current_exe().map_err(|source| LabError::Spawn { program: "overlayctl again".to_owned(), source })
}

/// Runs this very command again inside the lab's namespaces and waits for it; its exit code. Blocks.
pub fn enter(labs_dir: &LabsDir, name: &LabName) -> Result<u8, LabError> {
    let Some(supervisor) = supervisor(labs_dir, name) else {
        // Either there is no such lab, or its keeper is gone and with it every name in it.
        labs_dir.read_layout(name)?;
        let reason = format!("the keeper of lab `{name}` is gone: take the lab down (overlayctl lab down --name {name})");
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
    // As shells count: 128 and the signal.
    let code = status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(1);
    Ok(u8::try_from(code).unwrap_or(1))
}

/// Goes where the caller of [`nsenter_command`] was.
pub fn restore_directory() {
    if let Some(dir) = std::env::var_os(CWD_VARIABLE) {
        // One that cannot be entered any more leaves the command at the root.
        let _moved = std::env::set_current_dir(dir);
    }
}

/// Takes a lab down that has a keeper: ends every process in its user namespace, the keeper too, and removes the directory. Namespaces and
/// mounts end with the last process in them. Works without the keeper as well, from what was recorded. Blocks.
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
            Ok(there) => removed.directory = there,
            Err(error) => failures.push(error),
        }
    }
    if failures.is_empty() { Ok(removed) } else { Err(LabError::NotRemoved { name: name.to_string(), failures }) }
}

/// Every process in the user namespaces of these, unless that is our own.
fn user_namespace_processes(processes: &BTreeSet<ProcessId>) -> BTreeSet<ProcessId> {
    let namespace = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/user")).ok().map(|m| (m.dev(), m.ino()));
    let Some(own) = namespace("self") else { return BTreeSet::new() };
    let theirs: BTreeSet<(u64, u64)> =
        processes.iter().filter_map(|p| namespace(&p.pid.to_string())).filter(|n| *n != own).collect();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let inside = pids.filter(|pid| namespace(&pid.to_string()).is_some_and(|n| theirs.contains(&n)));
    inside.filter_map(ProcessId::from_pid).collect()
}

/// What the keeper does: makes /run/netns writable, says so, and stays until it is ended. Returns only where something fails.
pub fn run_supervisor(dir: &Path) -> Result<std::convert::Infallible, LabError> {
    let file = |action, path: PathBuf| move |source| LabError::File { action, path, source };
    prepare_run_netns(dir).map_err(file("make room for namespaces in", PathBuf::from("/run")))?;
    fs::write(dir.join("keeper.ready"), "").map_err(file("write", dir.join("keeper.ready")))?;
    loop {
        // SIGTERM ends it: there is nothing to put in order, the namespaces go with it.
        nix::unistd::pause();
    }
}

/// An empty /run/netns of our own. Where there is none, /run itself becomes ours, with everything that was in it.
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
    // The lab's directory can be below /run itself: only the working directory still leads to it once /run is covered.
    std::env::set_current_dir(&before)?;
    tmpfs(run)?;
    for entry in fs::read_dir(".")?.flatten() {
        let (from, to) = (entry.path(), run.join(entry.file_name()));
        let kind = entry.file_type()?;
        let bound = if kind.is_symlink() {
            fs::read_link(&from).and_then(|target| std::os::unix::fs::symlink(target, &to))
        } else {
            let made = if kind.is_dir() { fs::create_dir(&to) } else { fs::File::create(&to).map(|_| ()) };
            made.and_then(|()| Ok(mount(Some(&from), &to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?))
        };
        if let Err(error) = bound {
            eprintln!("{} is not seen inside the lab: {error}", to.display());
        }
    }
    std::env::set_current_dir("/")?;
    fs::create_dir(netns)
}
