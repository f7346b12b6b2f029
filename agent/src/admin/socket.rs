//! The socket file: its mode and its owner.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use tokio::net::UnixListener;

/// Only root and the socket's group may connect: a client can attach to any network namespace.
const SOCKET_MODE: u32 = 0o660;

/// Maximum number of connections that wait for accept.
const BACKLOG: i32 = 128;

/// The agent's listening socket. Dropping it removes the file, unless another agent has replaced it or systemd owns it.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file; `None` if systemd owns it.
    file_id: Option<(u64, u64)>,
}

/// The reason why the socket cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A live agent listens on the path.
    #[error("{path} belongs to a live agent ({holder}): stop that one, or start this one with its own --run-dir and --state-dir")]
    InUse {
        /// The socket's path.
        path: PathBuf,
        /// `pid 123`, or a text for an unknown PID.
        holder: String,
    },
    /// The path is not a socket.
    #[error("{path} exists and is not a socket: it is left unchanged; move it away, or choose another --run-dir")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The path does not fit into `sockaddr_un`.
    #[error("the socket path {path} is too long: a UNIX socket's path has at most 107 bytes; choose a shorter --run-dir")]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {action} the socket {path}: {source}")]
    System {
        /// The attempted action.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl AdminSocket {
    /// Listens on `path` with mode 0660. A stale socket file is replaced; any other existing file is an error.
    /// Needs a tokio runtime. Blocks only for file system operations.
    pub fn bind(path: &Path) -> Result<AdminSocket, SocketError> {
        let system = |action| move |source: io::Error| SocketError::System { action, path: path.to_owned(), source };
        let address = UnixAddr::new(path).map_err(|_| SocketError::TooLong { path: path.to_owned() })?;
        remove_stale(path, &address)?;
        let fd = listen_private(&address).map_err(|e| system("create")(e.into()))?;
        // The umask can only have narrowed the mode.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE)).map_err(system("set the mode of"))?;
        let metadata = std::fs::symlink_metadata(path).map_err(system("stat"))?;
        let listener = UnixListener::from_std(std::os::unix::net::UnixListener::from(fd)).map_err(system("listen on"))?;
        Ok(AdminSocket { listener, path: path.to_owned(), file_id: Some((metadata.dev(), metadata.ino())) })
    }

    /// Uses an inherited listening socket at `path`; systemd owns its file, mode and removal. Needs a tokio runtime.
    pub fn from_listener(listener: std::os::unix::net::UnixListener, path: &Path) -> Result<AdminSocket, SocketError> {
        let system = |source: io::Error| SocketError::System { action: "listen on", path: path.to_owned(), source };
        listener.set_nonblocking(true).map_err(system)?;
        let listener = UnixListener::from_std(listener).map_err(system)?;
        Ok(AdminSocket { listener, path: path.to_owned(), file_id: None })
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        let ours = |m: &std::fs::Metadata| Some((m.dev(), m.ino())) == self.file_id;
        if std::fs::symlink_metadata(&self.path).is_ok_and(|m| ours(&m)) {
            // If the removal fails, the next start replaces the stale file.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes a stale socket, on which no process listens, from the path.
fn remove_stale(path: &Path, address: &UnixAddr) -> Result<(), SocketError> {
    let system = |action| move |source: io::Error| SocketError::System { action, path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(system("stat")(e)),
        Ok(m) if !m.file_type().is_socket() => return Err(SocketError::NotASocket { path: path.to_owned() }),
        Ok(_) => {}
    }
    let probe = stream_socket().map_err(|e| system("probe")(e.into()))?;
    match connect(probe.as_raw_fd(), address) {
        Err(nix::errno::Errno::ECONNREFUSED) => {
            tracing::info!(path = %path.display(), "replacing stale socket");
            match std::fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(system("remove the stale")(e)),
                _ => Ok(()),
            }
        }
        Err(nix::errno::Errno::ENOENT) => Ok(()),
        // EAGAIN: the listener's backlog is full.
        Ok(()) | Err(nix::errno::Errno::EAGAIN) => {
            let pid = getsockopt(&probe, sockopt::PeerCredentials).map(|c| c.pid()).unwrap_or_default();
            let holder = if pid > 0 { format!("pid {pid}") } else { "its pid is not known".to_owned() };
            Err(SocketError::InUse { path: path.to_owned(), holder })
        }
        Err(e) => Err(system("probe")(e.into())),
    }
}

fn stream_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
}

/// Creates a listening socket whose file never has more than [`SOCKET_MODE`], not even for a moment.
///
/// On Linux the file gets the mode of the socket's inode, less the umask (`unix_bind_bsd` in the kernel's net/unix/af_unix.c).
fn listen_private(address: &UnixAddr) -> nix::Result<OwnedFd> {
    let fd = stream_socket()?;
    fchmod(&fd, Mode::from_bits_truncate(SOCKET_MODE))?;
    bind(fd.as_raw_fd(), address)?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[tokio::test]
    async fn socket_mode_is_private_under_any_umask() {
        let dir = tempfile::tempdir().unwrap();
        for umask in [0o000, 0o022, 0o077, 0o777] {
            let raw = dir.path().join(format!("raw-{umask:o}"));
            let whole = dir.path().join(format!("whole-{umask:o}"));
            let runtime = tokio::runtime::Handle::current();
            // The umask belongs to the process. A thread with CLONE_FS unshared changes only its own.
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
                    nix::sys::stat::umask(Mode::from_bits_truncate(umask));
                    let _runtime = runtime.enter();
                    let _fd = listen_private(&UnixAddr::new(&raw).unwrap()).unwrap();
                    assert_eq!(file_mode(&raw), SOCKET_MODE & !umask, "umask {umask:o}");
                    let socket = AdminSocket::bind(&whole).unwrap();
                    assert_eq!(file_mode(socket.path()), SOCKET_MODE);
                });
            });
        }
    }

    #[tokio::test]
    async fn stale_socket_is_replaced_and_live_agent_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlayd.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = AdminSocket::bind(&path).unwrap();
        let error = AdminSocket::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::InUse { .. }));
        assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
        // The rejected bind leaves the file; its owner removes it.
        assert!(path.exists());
        drop(socket);
        assert!(!path.exists());
        // The first owner does not remove a file that another agent has replaced.
        let first = AdminSocket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = AdminSocket::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        // An inherited socket stays for the next agent.
        let held = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(AdminSocket::from_listener(held.try_clone().unwrap(), &path).unwrap());
        assert!(path.exists());
    }

    #[tokio::test]
    async fn full_backlog_counts_as_live_agent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let address = UnixAddr::new(&path).unwrap();
        let _listening = listen_private(&address).unwrap();
        let mut waiting = Vec::new();
        for _ in 0..=BACKLOG {
            let client = stream_socket().unwrap();
            connect(client.as_raw_fd(), &address).unwrap();
            waiting.push(client);
        }
        assert!(matches!(AdminSocket::bind(&path), Err(SocketError::InUse { .. })));
    }

    #[tokio::test]
    async fn non_socket_path_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "mine").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
        for path in [&file, &link, &dir.path().to_owned()] {
            assert!(matches!(AdminSocket::bind(path), Err(SocketError::NotASocket { .. })), "{}", path.display());
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"mine");
        let long = dir.path().join("x".repeat(120));
        assert!(matches!(AdminSocket::bind(&long), Err(SocketError::TooLong { .. })));
        assert!(matches!(AdminSocket::bind(&dir.path().join("none/s")), Err(SocketError::System { .. })));
    }
}
