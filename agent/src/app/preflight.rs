//! Checks before the agent changes anything: its capabilities, and that no other agent runs in its network namespace.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use anyhow::{Context, bail};

use crate::kernel::abstract_socket;

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

/// Abstract socket name that an agent holds in its network namespace.
const LOCK_NAME: &str = "overlayd";

/// Locks the network namespace by an abstract socket name, until the listener is dropped.
///
/// Two agents with different directories would otherwise manage the same devices. The kernel releases the name when the process
/// ends for any reason. Every user may bind the name, also to keep the agent from starting: if neither root nor this user holds
/// it, the holder is logged and ignored, and there is no lock (`None`).
pub(super) fn lock_namespace() -> anyhow::Result<Option<UnixListener>> {
    let address = SocketAddr::from_abstract_name(LOCK_NAME).context("cannot name the namespace's lock")?;
    match UnixListener::bind_addr(&address) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            let owners = abstract_socket::owners(LOCK_NAME).unwrap_or_default();
            let own = nix::unistd::geteuid().as_raw();
            if let Some(foreign_user) = owners.first()
                && !owners.iter().any(|user| *user == 0 || *user == own)
            {
                tracing::warn!(
                    user = foreign_user,
                    "the name @{LOCK_NAME} is held by a user who cannot run the agent; starting without the lock: a second agent in this \
                     network namespace would not be detected (`ss -xlp src @{LOCK_NAME}` shows the holder)"
                );
                return Ok(None);
            }
            bail!("another overlayd runs in this network namespace (`ss -xlp src @overlayd` shows it): stop that one first")
        }
        Err(error) => Err(error).context("cannot take the namespace's lock @overlayd"),
    }
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
}
