//! What passes between the agent and systemd: readiness, status and watchdog (`sd_notify(3)`), and the socket that systemd holds for the agent
//! (`sd_listen_fds(3)`). Without systemd all of it is silence.
//!
//! Both protocols are a few lines over a datagram and two environment variables; a library would bring as much code as it saves.

mod listen;

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::UnixDatagram;

pub use listen::{ListenError, take_listener};

/// The longest status text, in characters: one line of `systemctl map_status`.
const MAX_STATUS_LENGTH: usize = 300;

/// Tells systemd how the agent is. A message that cannot be sent is logged and forgotten: systemd then acts by its timeouts.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
    ready: AtomicBool,
}

/// Why systemd cannot be told anything.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// The variable is no address.
    #[error("NOTIFY_SOCKET is `{}`, which is neither an absolute path nor an abstract name (`@...`): {source}", address.display())]
    Address {
        /// Its value.
        address: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
    /// No socket.
    #[error("cannot reach systemd at NOTIFY_SOCKET `{}`: {source}", address.display())]
    Socket {
        /// Its value.
        address: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl Notifier {
    /// By the environment that systemd sets (`NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID`). Needs a tokio runtime.
    pub fn from_environment() -> Result<Notifier, NotifyError> {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        // A watchdog that is meant for another process was inherited by mistake.
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|usec| ours && *usec > 0).map(Duration::from_micros);
        match std::env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty()) {
            Some(address) => Notifier::connect_to(PathBuf::from(address), watchdog),
            None => Ok(Notifier { socket: None, watchdog: None, ready: AtomicBool::new(false) }),
        }
    }

    /// Tells whoever listens at this address, who wants to hear [`Notifier::alive`] that often. Needs a tokio runtime.
    pub fn connect_to(address: PathBuf, watchdog: Option<Duration>) -> Result<Notifier, NotifyError> {
        Ok(Notifier { socket: Some(connect(address)?), watchdog, ready: AtomicBool::new(false) })
    }

    /// How long systemd waits for [`Notifier::alive`] before it ends the agent and starts it anew.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Whether anybody listens.
    pub fn is_enabled(&self) -> bool {
        self.socket.is_some()
    }

    /// The agent is ready. What waits for it starts now; said again it does nothing.
    pub async fn ready(&self) {
        if !self.ready.swap(true, Ordering::Relaxed) {
            self.send("READY=1").await;
        }
    }

    /// One line for `systemctl map_status`.
    pub async fn status(&self, text: &str) {
        let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_STATUS_LENGTH).collect();
        self.send(&format!("STATUS={line}")).await;
    }

    /// The agent makes progress.
    pub async fn feed_watchdog(&self) {
        self.send("WATCHDOG=1").await;
    }

    /// The end began.
    pub async fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=Ending; the data path stays").await;
    }

    /// The configuration is read again; [`Notifier::reloaded`] has to follow. Before the agent was ready systemd is not told of either: the
    /// message that ends a reload is the one that ends a start.
    pub async fn reloading(&self) {
        if self.ready.load(Ordering::Relaxed) {
            self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", monotonic_time().as_micros())).await;
        }
    }

    /// The configuration was read again.
    pub async fn reloaded(&self) {
        if self.ready.load(Ordering::Relaxed) {
            self.send("READY=1").await;
        }
    }

    async fn send(&self, message: &str) {
        let Some(socket) = &self.socket else { return };
        match socket.send(message.as_bytes()).await {
            Ok(_) => tracing::trace!(message, "told systemd"),
            Err(error) => tracing::warn!(message, %error, "systemd cannot be told"),
        }
    }
}

fn connect(address: PathBuf) -> Result<UnixDatagram, NotifyError> {
    let bytes = address.as_os_str().as_bytes();
    let parsed = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None if address.is_absolute() => SocketAddr::from_pathname(&address),
        None => Err(io::Error::from(io::ErrorKind::InvalidInput)),
    };
    let parsed = parsed.map_err(|source| NotifyError::Address { address: address.clone(), source })?;
    let open = || {
        let socket = std::os::unix::net::UnixDatagram::unbound()?;
        socket.connect_addr(&parsed)?;
        socket.set_nonblocking(true)?;
        UnixDatagram::from_std(socket)
    };
    open().map_err(|source| NotifyError::Socket { address, source })
}

/// `CLOCK_MONOTONIC`, by which systemd tells a reload that has ended from one that begins.
fn monotonic_time() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid, writable timespec for the whole call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    Duration::new(now.tv_sec.try_into().unwrap_or_default(), now.tv_nsec.try_into().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A listener in systemd's place, and the agent's end.
    fn socket_and_notifier(address: &str) -> (std::os::unix::net::UnixDatagram, Notifier) {
        let ours = match address.strip_prefix('@') {
            Some(name) => std::os::unix::net::UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap(),
            None => std::os::unix::net::UnixDatagram::bind(address).unwrap(),
        };
        ours.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        (ours, Notifier::connect_to(PathBuf::from(address), None).unwrap())
    }

    fn receive_message(socket: &std::os::unix::net::UnixDatagram) -> Option<String> {
        let mut bytes = [0; 1024];
        let length = socket.recv(&mut bytes).ok()?;
        Some(String::from_utf8(bytes[..length].to_vec()).unwrap())
    }

    #[tokio::test]
    async fn reload_is_notified_only_after_ready() {
        let dir = tempfile::tempdir().unwrap();
        let (systemd, notifier) = socket_and_notifier(dir.path().join("notify").to_str().unwrap());
        notifier.reloading().await;
        notifier.reloaded().await;
        assert_eq!(receive_message(&systemd), None, "READY=1 before the agent is ready");
        notifier.ready().await;
        assert_eq!(receive_message(&systemd).as_deref(), Some("READY=1"));
        let before = monotonic_time();
        notifier.reloading().await;
        let text = receive_message(&systemd).unwrap();
        let usec: u128 = text.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().parse().unwrap();
        assert!((before.as_micros()..=monotonic_time().as_micros()).contains(&usec), "{usec}");
        notifier.reloaded().await;
        assert_eq!(receive_message(&systemd).as_deref(), Some("READY=1"));
    }

    #[tokio::test]
    async fn status_is_one_bounded_line() {
        let (systemd, notifier) = socket_and_notifier(&format!("@overlayd-test-{}", std::process::id()));
        notifier.status("one\nREADY=1").await;
        assert_eq!(receive_message(&systemd).as_deref(), Some("STATUS=one READY=1"));
        notifier.status(&"ü".repeat(400)).await;
        assert_eq!(receive_message(&systemd).unwrap().chars().count(), "STATUS=".len() + MAX_STATUS_LENGTH);
    }

    #[tokio::test]
    async fn invalid_notify_address_is_named() {
        let error = connect(PathBuf::from("run/notify")).unwrap_err().to_string();
        assert!(error.contains("`run/notify`") && error.contains("absolute"), "{error}");
        let error = connect(PathBuf::from("/nonexistent/notify")).unwrap_err().to_string();
        assert!(error.contains("cannot reach systemd") && error.contains("/nonexistent/notify"), "{error}");
    }
}
