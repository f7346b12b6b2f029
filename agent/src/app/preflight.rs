//! Checks before the agent changes anything: its capabilities, and that no other agent runs in its network namespace.

use std::fs::{File, TryLockError};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, bail};

/// `CAP_NET_ADMIN` and `CAP_SYS_ADMIN` in `linux/capability.h`.
const REQUIRED_CAPABILITIES: [(u32, &str, &str); 2] = [
    (12, "CAP_NET_ADMIN", "to create links, routes and rules"),
    (21, "CAP_SYS_ADMIN", "to enter containers' network namespaces"),
];

/// Fails unless the process has the capabilities it needs.
pub(super) fn check_capabilities() -> anyhow::Result<()> {
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let missing = missing_capabilities(&status);
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = missing.iter().map(|(_, name, purpose)| format!("{name} ({purpose})")).collect();
    bail!(
        "the agent lacks {}: run it as root, or use the systemd unit, which grants them. Nothing was touched",
        list.join(" and ")
    )
}

fn missing_capabilities(status: &str) -> Vec<&'static (u32, &'static str, &'static str)> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    REQUIRED_CAPABILITIES.iter().filter(|(bit, ..)| effective & (1 << bit) == 0).collect()
}

/// The calling thread's network namespace.
const NETNS: &str = "/proc/thread-self/ns/net";

/// Locks the network namespace by an `flock(2)` on its file, until the returned file is closed.
///
/// Two agents with different directories would otherwise manage the same devices. The kernel releases the lock when the process
/// ends for any reason. Every user may lock the file, also to keep the agent from starting: a holder that is neither root nor this
/// user is logged and ignored, and there is no lock (`None`).
pub(super) fn lock_namespace() -> anyhow::Result<Option<File>> {
    let netns = File::open(NETNS).with_context(|| format!("cannot open {NETNS}"))?;
    match netns.try_lock() {
        Ok(()) => return Ok(Some(netns)),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the network namespace"),
    }
    let inode = netns.metadata().with_context(|| format!("cannot examine {NETNS}"))?.ino();
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let Some(pid) = lock_holder(&locks, inode) else {
        bail!(
            "another overlayd runs in this network namespace: stop that one first (`lslocks` does not show its process to this one)"
        )
    };
    // Without the directory, the process has just ended.
    let user = std::fs::metadata(format!("/proc/{pid}")).map_or(0, |process| process.uid());
    if user != 0 && user != nix::unistd::geteuid().as_raw() {
        tracing::warn!(
            pid,
            user,
            "a user who cannot run the agent has locked this network namespace; starting without the lock: a second agent here would \
             not be detected"
        );
        return Ok(None);
    }
    bail!("another overlayd runs in this network namespace (pid {pid}): stop that one first")
}

/// The process that holds the `flock(2)` on a namespace's file, by `/proc/locks` (`proc_locks(5)`). Inode numbers of namespaces are
/// unique among all kinds.
fn lock_holder(locks: &str, inode: u64) -> Option<u32> {
    let held = locks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|fields| {
        let file = fields.get(5).and_then(|file| file.rsplit_once(':'));
        fields.get(1) == Some(&"FLOCK")
            && file.is_some_and(|(device, found)| device.starts_with("00:") && found == inode.to_string())
    });
    held?.get(4)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_effective_set() {
        let names = |status: &str| missing_capabilities(status).iter().map(|(_, name, _)| *name).collect::<Vec<_>>();
        assert!(names("CapEff:\t000001ffffffffff\n").is_empty());
        assert_eq!(names("CapPrm:\t000001ffffffffff\nCapEff:\t0000000000001000\n"), ["CAP_SYS_ADMIN"]);
        assert_eq!(names("CapEff:\t0000000000000000\n"), ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"]);
    }

    #[test]
    fn holder_of_a_namespace_lock_is_found() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 00:04:4026531833 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 8 fe:00:4026531833 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 9 00:04:4026531833 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 1508 00:04:4026531833 0 EOF\n";
        assert_eq!(lock_holder(locks, 4_026_531_833), Some(1508));
        assert_eq!(lock_holder(locks, 4_026_531_834), None);
    }
}
