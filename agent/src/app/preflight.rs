//! What has to hold before anything is touched: the rights the agent needs, and that it is alone in its network namespace.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use anyhow::{Context, bail};

use crate::kernel::abstract_socket;

/// `CAP_NET_ADMIN` and `CAP_SYS_ADMIN` in `linux/capability.h`.
const REQUIRED_CAPABILITIES: [(u32, &str, &str); 2] =
    [(12, "CAP_NET_ADMIN", "to make links, routes and rules"), (21, "CAP_SYS_ADMIN", "to enter containers' network namespaces")];

/// Fails unless the process has the capabilities it needs.
pub(super) fn check_capabilities() -> anyhow::Result<()> {
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let missing = missing_capabilities(&status);
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = missing.iter().map(|(_, name, purpose)| format!("{name} ({purpose})")).collect();
    bail!(
        "the agent lacks {}: run it as root, or by the systemd unit, which grants them. Nothing was touched",
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

/// The name that says that an agent runs in a network namespace.
const LOCK_NAME: &str = "overlayd";

/// A name in the namespace's abstract socket address space, held as long as this lives: two agents with different directories would still
/// fight over the same devices. The kernel lets go of it when the process ends, however it ends.
///
/// Anybody may take that name, also to keep the agent from starting: where its holders are neither root nor this user, they are told of and passed
/// over; then there is no lock.
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
                    "the name @{LOCK_NAME} is held by a user who cannot run the agent, and is passed over: a second agent of this network namespace would \
                     not be noticed (`ss -xlp src @{LOCK_NAME}` shows who it is)"
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
