//! Creates, opens, enters and deletes network namespaces by file, as `ip netns` does (`ip-netns(8)`).
//!
//! Code that must run inside a namespace runs on a new thread. If that would cost more than the work, it runs on the calling
//! thread, which returns before anything else can run on it ([`Netns::run_in_place`]).
//!
//! `names` gives namespaces their names.
//!
//! Everything also works inside a user namespace, if the caller owns a mount namespace and has a writable `/run/netns`.

mod names;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::LinkUnspec;

pub use names::{NETWORK_PREFIX, serve_name_request};

use super::route_socket::RouteSocket;
use crate::plan::OpError;

/// Directory of the named namespaces.
pub const NETNS_RUN_DIR: &str = "/run/netns";
/// Interface index of `lo` in each namespace (`LOOPBACK_IFINDEX` in `include/net/net_namespace.h`).
pub(super) const LOOPBACK_IFINDEX: u32 = 1;
/// The calling thread's namespace. `/proc/self` would be the main thread's.
const CURRENT_NETNS: &str = "/proc/thread-self/ns/net";

/// An error of creating, opening, entering or deleting a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The name cannot be a file name.
    #[error("`{name}` cannot name a network namespace: 1 to 255 bytes, no slash, neither `.` nor `..`")]
    InvalidName {
        /// The refused name.
        name: String,
    },
    /// The name is taken.
    #[error("network namespace {path} exists already: delete it (ip netns delete) or choose another name")]
    AlreadyExists {
        /// Its path.
        path: PathBuf,
    },
    /// The path does not exist.
    #[error(
        "there is no network namespace {path}: `ip netns list` lists the named ones, and that of a process is /proc/PID/ns/net"
    )]
    NotFound {
        /// The path.
        path: PathBuf,
    },
    /// The path is another kind of file.
    #[error("{path} is not a network namespace")]
    NotNetns {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {action} {path}: {source}{}", advice(source))]
    Io {
        /// The attempted action.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The helper outside the agent's mount namespace refused.
    #[error("cannot name network namespace {path}: {reason}")]
    Helper {
        /// Its path.
        path: PathBuf,
        /// The helper's answer.
        reason: String,
    },
    /// The loopback device of a new namespace did not come up.
    #[error("cannot bring up the loopback device of {path}: {source}")]
    Loopback {
        /// The namespace.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: OpError,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "; this needs CAP_SYS_ADMIN: run as root, or inside `unshare --user --map-root-user --mount --net` with a tmpfs on /run/netns"
        }
        Some(libc::ENOSPC) => {
            "; the limit of namespaces is reached: see /proc/sys/user/max_net_namespaces and max_mnt_namespaces"
        }
        _ => "",
    }
}

/// An open network namespace. Clones share the descriptor.
#[derive(Debug, Clone)]
pub struct Netns {
    path: PathBuf,
    fd: Arc<OwnedFd>,
}

impl Netns {
    /// Creates a named namespace with its loopback device up. Leaves nothing behind if it fails.
    pub fn create(name: &str) -> Result<Netns, NetnsError> {
        let path = named_path(name)?;
        let created = run_on_thread(&path, || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(io_error("create a network namespace for", &path))?;
            set_loopback_up().map_err(|source| NetnsError::Loopback { path: path.clone(), source })?;
            Netns::current()
        })??;
        let netns = Netns { path, fd: created.fd };
        netns.bind_name()?;
        Ok(netns)
    }

    /// Opens the namespace of a file: `/run/netns/NAME`, `/proc/PID/ns/net`. Refuses any other file.
    pub fn open(path: impl AsRef<Path>) -> Result<Netns, NetnsError> {
        let path = path.as_ref().to_owned();
        // Opening a FIFO would block, and opening a device may have side effects. A namespace is a regular file of nsfs.
        let is_file = fs::metadata(&path).map(|m| m.is_file());
        let opened = match is_file {
            Ok(true) => File::open(&path),
            Ok(false) => return Err(NetnsError::NotNetns { path }),
            Err(source) => Err(source),
        };
        let fd = match opened {
            Ok(file) => OwnedFd::from(file),
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Err(NetnsError::NotFound { path }),
            Err(source) => return Err(NetnsError::Io { action: "open", path, source }),
        };
        // SAFETY: NS_GET_NSTYPE takes no argument and only reads; on any other file the kernel returns ENOTTY (ioctl_nsfs(2)).
        let kind = unsafe { libc::ioctl(fd.as_raw_fd(), libc::NS_GET_NSTYPE) };
        if kind != libc::CLONE_NEWNET {
            return Err(NetnsError::NotNetns { path });
        }
        Ok(Netns { path, fd: Arc::new(fd) })
    }

    /// Opens a namespace by its name in `/run/netns`.
    pub fn named(name: &str) -> Result<Netns, NetnsError> {
        Netns::open(named_path(name)?)
    }

    /// The calling thread's namespace.
    pub fn current() -> Result<Netns, NetnsError> {
        Netns::open(CURRENT_NETNS)
    }

    /// The names in `/run/netns`, sorted; empty if the directory does not exist.
    pub fn list() -> Result<BTreeSet<String>, NetnsError> {
        let failed = |source| NetnsError::Io { action: "read", path: PathBuf::from(NETNS_RUN_DIR), source };
        let entries = match fs::read_dir(NETNS_RUN_DIR) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Err(source) => return Err(failed(source)),
        };
        let mut names = BTreeSet::new();
        for entry in entries {
            names.extend(entry.map_err(failed)?.file_name().into_string());
        }
        Ok(names)
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a function inside the namespace, on a new thread, and waits for it. A panic of the function continues in the caller.
    ///
    /// Sockets opened inside stay in the namespace. So do threads and processes started inside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        run_on_thread(&self.path, || {
            setns(&self.fd, CloneFlags::CLONE_NEWNET).map_err(io_error("enter", &self.path))?;
            Ok(work())
        })?
    }

    /// Runs a short function inside the namespace on the calling thread, which has left the namespace when this returns. A panic
    /// continues after that. A new thread would take some 200 µs. A thread that is in the namespace already needs no permission.
    ///
    /// A thread that could not return would do other work in the wrong namespace: the process is aborted then. That happens only
    /// if the kernel lacks memory for a few hundred bytes, because returning needs the same resources as entering.
    pub fn run_in_place<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetnsError> {
        let original = Netns::current()?;
        if original.is_same(self)? {
            return Ok(work());
        }
        setns(&self.fd, CloneFlags::CLONE_NEWNET).map_err(io_error("enter", &self.path))?;
        let outcome = panic::catch_unwind(panic::AssertUnwindSafe(work));
        if let Err(errno) = setns(&original.fd, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%errno, netns = %self.path.display(), "cannot leave network namespace; aborting");
            std::process::abort();
        }
        outcome.map_err(|cause| panic::resume_unwind(cause))
    }

    /// Opens a socket for requests about the namespace, which every thread may use.
    pub(super) fn route_socket(&self) -> Result<RouteSocket, OpError> {
        self.run_in_place(RouteSocket::open).map_err(|e| OpError::from(&e))?
    }

    /// Whether both are the same namespace.
    pub fn is_same(&self, other: &Netns) -> Result<bool, NetnsError> {
        Ok(self.device_and_inode()? == other.device_and_inode()?)
    }

    /// Identifies the namespace uniquely: by the boot id and the kernel's cookie (`SO_NETNS_COOKIE`, since Linux 5.14). The
    /// kernel reuses no cookie before a reboot. Paths and inode numbers are reused.
    pub fn id(&self) -> Result<String, NetnsError> {
        let boot = Path::new("/proc/sys/kernel/random/boot_id");
        let read = |source| NetnsError::Io { action: "read", path: boot.to_owned(), source };
        let boot = fs::read_to_string(boot).map_err(read)?;
        let cookie = self.run_in_place(netns_cookie)?.map_err(|source| NetnsError::Io {
            action: "read the cookie of",
            path: self.path.clone(),
            source,
        })?;
        Ok(format!("{}/{cookie}", boot.trim()))
    }

    /// The processes whose main thread is in the namespace, except this one.
    pub fn pids(&self) -> Result<Vec<i32>, NetnsError> {
        let identity = self.device_and_inode()?;
        let proc = Path::new("/proc");
        let entries = fs::read_dir(proc).map_err(|source| NetnsError::Io { action: "read", path: proc.to_owned(), source })?;
        let own = std::process::id().cast_signed();
        let in_namespace = |pid: &i32| {
            // Skip a process that has ended, or whose namespace is not visible: the caller could not end it.
            fs::metadata(proc.join(pid.to_string()).join("ns/net")).is_ok_and(|m| (m.dev(), m.ino()) == identity)
        };
        let pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
        Ok(pids.filter(|pid| *pid != own).filter(in_namespace).collect())
    }

    fn device_and_inode(&self) -> Result<(u64, u64), NetnsError> {
        let stat = nix::sys::stat::fstat(&self.fd).map_err(io_error("examine", &self.path))?;
        Ok((stat.st_dev, stat.st_ino))
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The path of a named namespace, whether it exists or not.
pub fn named_path(name: &str) -> Result<PathBuf, NetnsError> {
    let invalid = name.is_empty() || name.len() > 255 || name == "." || name == ".." || name.contains(['/', '\0']);
    if invalid {
        return Err(NetnsError::InvalidName { name: name.chars().take(80).collect() });
    }
    Ok(Path::new(NETNS_RUN_DIR).join(name))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(nix::Error) -> NetnsError {
    let path = path.to_owned();
    move |errno| NetnsError::Io { action, path, source: errno.into() }
}

/// Runs on a thread that ends with the work, so that no other code runs in the namespace that it enters.
fn run_on_thread<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, work)
            .map_err(|source| NetnsError::Io { action: "start a thread for", path: path.to_owned(), source })?;
        thread.join().map_err(|cause| panic::resume_unwind(cause))
    })
}

/// The kernel's cookie of the calling thread's network namespace.
fn netns_cookie() -> io::Result<u64> {
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, which has as many, and the written size to `length`.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if outcome == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Sets `lo` up, over the blocking socket: namespaces are also created without a runtime.
pub(super) fn set_loopback_up() -> Result<(), OpError> {
    let up = LinkUnspec::new_with_index(LOOPBACK_IFINDEX).up().build();
    RouteSocket::open()?.change_link(up).map_err(|e| e.context("cannot set lo up"))
}

impl From<&NetnsError> for OpError {
    fn from(error: &NetnsError) -> OpError {
        let errno = match error {
            NetnsError::Io { source, .. } => source.raw_os_error().unwrap_or_default(),
            NetnsError::NotFound { .. } => libc::ENOENT,
            NetnsError::NotNetns { .. } => libc::EINVAL,
            _ => 0,
        };
        OpError { errno, message: error.to_string() }
    }
}
