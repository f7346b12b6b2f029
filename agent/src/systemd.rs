//! The systemd protocols: `sd_notify(3)` for readiness, status and watchdog, and `sd_listen_fds(3)` for the inherited socket.
//!
//! Without systemd nothing is sent. `docs/dependencies.md` says why no library is used.

mod listen;

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::net::UnixDatagram;

pub use listen::{ListenError, take_listener};

/// The longest status text, in characters: one line of `systemctl status`.
const MAX_STATUS_LENGTH: usize = 300;

/// Sends notifications to systemd. A failed message is logged and not retried: systemd then acts by its timeouts.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
    ready: AtomicBool,
}

/// The reason why systemd cannot be notified.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// `NOTIFY_SOCKET` is not an address.
    #[error("NOTIFY_SOCKET is `{}`, which is neither an absolute path nor an abstract name (`@...`): {source}", address.display())]
    Address {
        /// The variable's value.
        address: PathBuf,
        /// The parse error.
        source: io::Error,
    },
    /// The socket cannot be opened or connected.
    #[error("cannot reach systemd at NOTIFY_SOCKET `{}`: {source}", address.display())]
    Socket {
        /// The variable's value.
        address: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl Notifier {
    /// Reads systemd's environment variables (`NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID`). Needs a tokio runtime.
    pub fn from_environment() -> Result<Notifier, NotifyError> {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        // With another PID the watchdog is for another process, and the variables were inherited by mistake.
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|usec| ours && *usec > 0).map(Duration::from_micros);
        match std::env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty()) {
            Some(address) => Notifier::connect_to(PathBuf::from(address), watchdog),
            None => Ok(Notifier { socket: None, watchdog: None, ready: AtomicBool::new(false) }),
        }
    }

    /// Connects to the notification socket; `watchdog` is the timeout for [`Notifier::feed_watchdog`]. Needs a tokio runtime.
    pub fn connect_to(address: PathBuf, watchdog: Option<Duration>) -> Result<Notifier, NotifyError> {
        Ok(Notifier { socket: Some(connect(address)?), watchdog, ready: AtomicBool::new(false) })
    }

    /// How long systemd waits for [`Notifier::feed_watchdog`] before it restarts the agent.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Whether there is a notification socket.
    pub fn is_enabled(&self) -> bool {
        self.socket.is_some()
    }

    /// Reports readiness, so that systemd starts the units ordered after the agent. Repeated calls do nothing.
    pub async fn ready(&self) {
        if !self.ready.swap(true, Ordering::Relaxed) {
            self.send("READY=1").await;
        }
    }

    /// Sets the status line of `systemctl status`.
    pub async fn status(&self, text: &str) {
        let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_STATUS_LENGTH).collect();
        self.send(&format!("STATUS={line}")).await;
    }

    /// Reports progress to the watchdog.
    pub async fn feed_watchdog(&self) {
        self.send("WATCHDOG=1").await;
    }

    /// Reports the start of the shutdown.
    pub async fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=Stopping; the data path keeps forwarding").await;
    }

    /// Reports the start of a reload; call [`Notifier::reloaded`] after it.
    ///
    /// Both do nothing before the agent is ready: the message that ends a reload, `READY=1`, would also end the start.
    pub async fn reloading(&self) {
        if self.ready.load(Ordering::Relaxed) {
            self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", monotonic_time().as_micros())).await;
        }
    }

    /// Reports the end of a reload.
    pub async fn reloaded(&self) {
        if self.ready.load(Ordering::Relaxed) {
            self.send("READY=1").await;
        }
    }

    async fn send(&self, message: &str) {
        let Some(socket) = &self.socket else { return };
        match socket.send(message.as_bytes()).await {
            Ok(_) => tracing::trace!(message, "notified systemd"),
            Err(error) => tracing::warn!(message, %error, "cannot notify systemd"),
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

/// `CLOCK_MONOTONIC`; systemd uses it to tell the end of an earlier reload from the start of a new one.
fn monotonic_time() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A socket in place of systemd's, and a notifier connected to it.
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
