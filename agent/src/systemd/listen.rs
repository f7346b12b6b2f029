//! The listening socket inherited from systemd. Clients wait during an agent's restart instead of getting ECONNREFUSED.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{SockType, getsockopt, sockopt};

/// The first descriptor that systemd passes (`SD_LISTEN_FDS_START` in `sd-daemon.h`).
const SD_LISTEN_FDS_START: RawFd = 3;

/// The reason why the inherited socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The descriptor is not the agent's socket.
    #[error(
        "systemd passes {found}, but the agent's socket is {}: set ListenStream= in overlayd.socket to that path, or --run-dir to the \
         socket's directory, or disable overlayd.socket",
        wanted.display()
    )]
    WrongSocket {
        /// The inherited descriptor.
        found: String,
        /// The expected path.
        wanted: PathBuf,
    },
    /// More than one socket.
    #[error("systemd passes {count} sockets; the agent takes one: leave a single ListenStream= in overlayd.socket")]
    TooMany {
        /// The number of sockets.
        count: i32,
    },
    /// The descriptor is not open.
    #[error("LISTEN_FDS announces a socket as descriptor {fd}, which is not open: {source}")]
    Descriptor {
        /// The descriptor.
        fd: RawFd,
        /// The system's error.
        source: nix::Error,
    },
}

/// Takes the socket that systemd passes; `None` if it passes none.
///
/// Call it once, before the process opens a file that could get the descriptor's number.
pub fn take_listener(wanted: &Path) -> Result<Option<UnixListener>, ListenError> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<i32>().ok());
    let ours = number("LISTEN_PID").is_some_and(|pid| u32::try_from(pid) == Ok(std::process::id()));
    let count = number("LISTEN_FDS").unwrap_or_default();
    if !ours || count <= 0 {
        return Ok(None);
    }
    if count > 1 {
        return Err(ListenError::TooMany { count });
    }
    adopt_listener(SD_LISTEN_FDS_START, wanted).map(Some)
}

fn adopt_listener(fd: RawFd, wanted: &Path) -> Result<UnixListener, ListenError> {
    // SAFETY: systemd passes the descriptor and its ownership to this process (sd_listen_fds(3)), and no other code uses it. The
    // next call checks whether it is open.
    let fd_owned = unsafe { OwnedFd::from_raw_fd(fd) };
    if let Err(source) = fcntl(&fd_owned, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        // Dropping it would close a descriptor that is not open.
        std::mem::forget(fd_owned);
        return Err(ListenError::Descriptor { fd, source });
    }
    let other = |found: String| ListenError::WrongSocket { found, wanted: wanted.to_owned() };
    let listens = getsockopt(&fd_owned, sockopt::AcceptConn).unwrap_or(false);
    if !listens || getsockopt(&fd_owned, sockopt::SockType) != Ok(SockType::Stream) {
        return Err(other("a descriptor that is not a listening stream socket".to_owned()));
    }
    let listener = UnixListener::from(fd_owned);
    let address = listener.local_addr().ok();
    let path = address.as_ref().and_then(|address| address.as_pathname());
    // One of the paths may contain a symbolic link, such as /var/run.
    let canonical = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    match path {
        Some(path) if canonical(path) == canonical(wanted) => Ok(listener),
        Some(path) => Err(other(path.display().to_string())),
        None => Err(other("a socket without a path".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn only_listening_socket_at_path_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlayd.sock");
        let fd = UnixListener::bind(&path).unwrap().into_raw_fd();
        let adopted = adopt_listener(fd, &path).unwrap();
        let flags = fcntl(&adopted, FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        adopt_listener(adopted.into_raw_fd(), &link.join("overlayd.sock")).unwrap();

        let other = UnixListener::bind(dir.path().join("other")).unwrap().into_raw_fd();
        let error = adopt_listener(other, &path).unwrap_err().to_string();
        assert!(error.contains("other") && error.contains("ListenStream="), "{error}");
        let datagram = UnixDatagram::bind(dir.path().join("datagram")).unwrap().into_raw_fd();
        assert!(adopt_listener(datagram, &path).unwrap_err().to_string().contains("not a listening stream socket"));
        // Far above the open descriptors of a test process.
        assert!(matches!(adopt_listener(60_000, &path), Err(ListenError::Descriptor { fd: 60_000, .. })));
    }
}
