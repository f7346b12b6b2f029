//! The names of network namespaces: files in `/run/netns`, on each of which a namespace is mounted.
//!
//! A mount belongs to a mount namespace, and the packaged agent has one of its own, with a read-only file system: what it mounted
//! there nobody else would see, and it would end with the agent. Its service gets no right to leave that mount namespace, because
//! with that right it could replace any file of the host. Instead a helper outside ([`serve_name_request`], the unit
//! `overlayd-netns@.service`) mounts and unmounts, and only names of isolated networks. The agent asks it if it may not mount
//! itself.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{NETNS_RUN_DIR, Netns, NetnsError, io_error, named_path};

/// Start of the names of isolated networks' namespaces.
pub const NETWORK_PREFIX: &str = "ov-";

/// The helper's socket.
const HELPER_SOCKET: &str = "/run/overlayd/netns.sock";

/// Time limit of each read from the helper or its client. A mount takes less than a millisecond.
const HELPER_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum length of a request or an answer in bytes.
const MAX_MESSAGE: u64 = 4096;

impl Netns {
    /// Opens the named namespace, or creates it.
    pub fn ensure(name: &str) -> Result<Netns, NetnsError> {
        match Netns::named(name) {
            // A plain file: what a crash left between its creation and the mount, or an unmount by hand.
            Err(NetnsError::NotNetns { .. }) => Netns::delete(name)?,
            Err(NetnsError::NotFound { .. }) => {}
            opened => return opened,
        }
        Netns::create(name)
    }

    /// Unmounts and removes a named namespace. The kernel frees it when its last process and open file are gone. Succeeds if the
    /// name does not exist.
    pub fn delete(name: &str) -> Result<(), NetnsError> {
        let path = named_path(name)?;
        or_by_helper(remove(&path), &path, || request(HELPER_SOCKET, REMOVE, name))
    }

    /// Whether its file still names it.
    pub fn is_named(&self) -> bool {
        Netns::open(&self.path).and_then(|named| named.is_same(self)).unwrap_or(false)
    }

    /// Makes its file name it again, after `ip netns delete` by hand. The namespace lives as long as it is open, so no packet is
    /// lost meanwhile. Fails if the name is another namespace's now.
    pub fn name_again(&self) -> Result<(), NetnsError> {
        match Netns::open(&self.path) {
            Ok(named) if named.is_same(self)? => return Ok(()),
            Err(NetnsError::NotNetns { .. }) => Netns::delete(self.name())?,
            _ => {}
        }
        self.bind_name()
    }

    /// Creates its file and mounts it there.
    pub(super) fn bind_name(&self) -> Result<(), NetnsError> {
        // The helper learns the namespace from the connection.
        or_by_helper(bind(self), &self.path, || {
            self.run_in_place(|| request(HELPER_SOCKET, BIND, self.name())).unwrap_or_else(|e| Err(io::Error::other(e)))
        })
    }

    fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }
}

/// Requests to the helper: a line of one of these words and a name.
const BIND: &str = "bind";
const REMOVE: &str = "remove";

/// The result, or the helper's if this process may not mount and there is a helper.
fn or_by_helper(result: Result<(), NetnsError>, path: &Path, ask: impl FnOnce() -> io::Result<String>) -> Result<(), NetnsError> {
    let Err(NetnsError::Io { source, .. }) = &result else { return result };
    if !matches!(source.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::EROFS)) {
        return result;
    }
    match ask() {
        Ok(answer) if answer.is_empty() => Ok(()),
        Ok(reason) => Err(NetnsError::Helper { path: path.to_owned(), reason }),
        Err(error) => {
            tracing::debug!(%error, socket = HELPER_SOCKET, "no helper names network namespaces");
            result
        }
    }
}

/// Sends a request; returns the answer, which is empty if all is well.
fn request(socket: impl AsRef<Path>, verb: &str, name: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(HELPER_TIMEOUT))?;
    writeln!(stream, "{verb} {name}")?;
    let mut answer = String::new();
    stream.take(MAX_MESSAGE).read_to_string(&mut answer)?;
    Ok(answer)
}

/// Serves one request: gives the client's network namespace a name, or removes a name. Only names with [`NETWORK_PREFIX`].
///
/// # Errors
/// The client did not send a request, or left.
pub fn serve_name_request(mut client: UnixStream) -> io::Result<()> {
    client.set_read_timeout(Some(HELPER_TIMEOUT))?;
    let mut line = String::new();
    BufReader::new((&client).take(MAX_MESSAGE)).read_line(&mut line)?;
    let answer = match line.trim_end().split_once(' ') {
        Some((_, name)) if !name.starts_with(NETWORK_PREFIX) => {
            format!("`{name}` is not an isolated network's namespace, whose name starts with {NETWORK_PREFIX}")
        }
        Some((BIND, name)) => answer(named_path(name).and_then(|path| bind(&client_netns(&client, path)?))),
        Some((REMOVE, name)) => answer(named_path(name).and_then(|path| remove(&path))),
        _ => format!("a request is `{BIND} NAME` or `{REMOVE} NAME`"),
    };
    client.write_all(answer.as_bytes())?;
    client.shutdown(Shutdown::Both)
}

fn answer(result: Result<(), NetnsError>) -> String {
    result.map_or_else(|error| error.to_string(), |()| String::new())
}

/// The network namespace in which the client connected: a UNIX socket belongs to the namespace of the thread that connects
/// (`unix_stream_connect` in net/unix/af_unix.c).
fn client_netns(client: &UnixStream, path: PathBuf) -> Result<Netns, NetnsError> {
    // SAFETY: SIOCGSKNS takes no argument and returns a new descriptor (socket(7) of Linux 4.9, net/socket.c).
    let fd = unsafe { libc::ioctl(client.as_raw_fd(), libc::SIOCGSKNS) };
    if fd < 0 {
        return Err(NetnsError::Io { action: "find the client's namespace for", path, source: io::Error::last_os_error() });
    }
    // SAFETY: the kernel has just opened it, for this call only.
    Ok(Netns { path, fd: Arc::new(unsafe { OwnedFd::from_raw_fd(fd) }) })
}

fn bind(netns: &Netns) -> Result<(), NetnsError> {
    let path = &netns.path;
    prepare_directory()?;
    File::options().write(true).create_new(true).open(path).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => NetnsError::AlreadyExists { path: path.clone() },
        _ => NetnsError::Io { action: "create", path: path.clone(), source },
    })?;
    let open = format!("/proc/self/fd/{}", netns.fd.as_raw_fd());
    mount(Some(open.as_str()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(|errno| {
        if let Err(second) = remove(path) {
            tracing::warn!(error = %second, "cannot remove incomplete network namespace");
        }
        io_error("mount on", path)(errno)
    })
}

fn remove(path: &Path) -> Result<(), NetnsError> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // EINVAL: the file is not a mount point, as after a crash between its creation and the mount.
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(errno) => return Err(io_error("unmount", path)(errno)),
    }
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(NetnsError::Io { action: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Makes `/run/netns` a shared mount point, as `ip netns add` does, so that a deletion in one mount namespace reaches the others.
fn prepare_directory() -> Result<(), NetnsError> {
    let path = Path::new(NETNS_RUN_DIR);
    fs::create_dir_all(path).map_err(|source| NetnsError::Io { action: "create", path: path.to_owned(), source })?;
    let share = || mount(None::<&str>, path, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>);
    match share() {
        Err(nix::Error::EINVAL) => {
            mount(Some(path), path, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
                .map_err(io_error("mount on itself", path))?;
            share().map_err(io_error("share", path))
        }
        other => other.map_err(io_error("share", path)),
    }
}
