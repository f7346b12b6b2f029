//! A TCP transfer during a test: a steady stream of numbered words between two containers, each verified.
//!
//! Two tasks send and receive; both end with [`Transfer::stop`], or when the transfer is dropped.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use overlay_agent::kernel::netns::Netns;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::{ExpectContext, bind};

/// The port of the receiver: in the dynamic range, next to the ping flow's.
const RECEIVER_PORT: u16 = 49_774;

/// Words of 8 bytes in a block, and the interval of blocks: some 3 MB a second, which leaves the machine to the test.
const WORDS_PER_BLOCK: u64 = 2048;
const BLOCK_INTERVAL: Duration = Duration::from_millis(5);

/// Time limit for outstanding data at the end: TCP retransmits after 0.2, 0.4, 0.8 ... seconds (RFC 6298).
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// A transfer in progress.
#[derive(Debug)]
pub struct Transfer {
    sender: JoinHandle<std::io::Result<u32>>,
    receiver: JoinHandle<Result<(), String>>,
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    longest_stall: Arc<Mutex<Duration>>,
}

/// The result of a transfer.
#[derive(Debug, Clone)]
pub struct TransferStats {
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received in order.
    pub received: u64,
    /// Retransmitted segments. On a busy machine a late ACK counts as well.
    pub retransmitted: u32,
    /// The longest time without a byte.
    pub longest_stall: Duration,
    /// The error that ended it.
    pub error: Option<String>,
}

impl TransferStats {
    /// Checks that the connection survived, every byte arrived, and no stall exceeded the limit.
    #[track_caller]
    pub fn assert_complete(&self, context: &str, max_stall: Duration) {
        assert!(self.error.is_none() && self.sent > 0 && self.sent == self.received, "{context}: the transfer failed: {self:?}");
        assert!(self.longest_stall <= max_stall, "{context}: the transfer stalled for {:?}: {self:?}", self.longest_stall);
    }
}

impl Transfer {
    /// Starts a transfer to a container's address, and waits for the first bytes.
    pub async fn start(from: &Netns, to: &Netns, address: IpAddr) -> Transfer {
        let at = SocketAddr::new(address, RECEIVER_PORT);
        let listener = TcpListener::from_std(bind::tcp(to, at)).expect_ok("a listener of the runtime");
        // The kernel completes the handshake before accept().
        let connect = || {
            let stream = std::net::TcpStream::connect_timeout(&at, Duration::from_secs(10))?;
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true).map(|()| stream)
        };
        let stream = from.run(connect).expect_ok("enter the container").expect_ok(&format!("connect to {at}"));
        let stream = TcpStream::from_std(stream).expect_ok("a stream of the runtime");
        let (receiving_end, _) = listener.accept().await.expect_ok("the connection");
        let (stop, sent, received) = (Arc::default(), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let longest = Arc::new(Mutex::new(Duration::ZERO));
        let transfer = Transfer {
            sender: tokio::spawn(send(stream, Arc::clone(&stop), Arc::clone(&sent))),
            receiver: tokio::spawn(receive(receiving_end, Arc::clone(&received), Arc::clone(&longest))),
            stop,
            sent,
            received,
            longest_stall: longest,
        };
        crate::eventually_true("the first bytes arrive", DRAIN_TIMEOUT, || transfer.received.load(Ordering::Relaxed) > 0).await;
        transfer
    }

    /// Bytes received so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Stops sending, waits for outstanding data, and returns the result.
    pub async fn stop(mut self) -> TransferStats {
        self.stop.store(true, Ordering::Relaxed);
        let (repeated, mut error) = match tokio::time::timeout(DRAIN_TIMEOUT, &mut self.sender).await {
            Ok(Ok(Ok(repeated))) => (repeated, None),
            Ok(Ok(Err(error))) => (0, Some(format!("sending: {error}"))),
            Ok(Err(error)) => (0, Some(format!("sending: {error}"))),
            Err(_) => (0, Some(format!("sending does not end within {DRAIN_TIMEOUT:?}"))),
        };
        let received = tokio::time::timeout(DRAIN_TIMEOUT, &mut self.receiver).await;
        error = error.or(match received {
            Ok(Ok(Ok(()))) => None,
            Ok(Ok(Err(error))) => Some(error),
            Ok(Err(error)) => Some(format!("receiving: {error}")),
            Err(_) => Some(format!("receiving does not end within {DRAIN_TIMEOUT:?}")),
        });
        let longest = *self.longest_stall.lock().unwrap_or_else(PoisonError::into_inner);
        TransferStats {
            sent: self.sent.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
            retransmitted: repeated,
            longest_stall: longest,
            error,
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.sender.abort();
        self.receiver.abort();
    }
}

/// Sends until stopped. Returns the number of retransmitted segments.
async fn send(mut stream: TcpStream, stop: Arc<AtomicBool>, sent: Arc<AtomicU64>) -> std::io::Result<u32> {
    let mut interval = tokio::time::interval(BLOCK_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut next = 0u64;
    while !stop.load(Ordering::Relaxed) {
        interval.tick().await;
        let block: Vec<u8> = (next..next + WORDS_PER_BLOCK).flat_map(u64::to_be_bytes).collect();
        next += WORDS_PER_BLOCK;
        stream.write_all(&block).await?;
        sent.fetch_add(WORDS_PER_BLOCK * 8, Ordering::Relaxed);
    }
    let repeated = retransmitted_segments(&stream)?;
    stream.shutdown().await?;
    Ok(repeated)
}

/// Retransmitted segments of a connection: `tcpi_total_retrans` of `TCP_INFO` (tcp(7)).
fn retransmitted_segments(stream: &TcpStream) -> std::io::Result<u32> {
    // SAFETY: all of its fields are integers, for which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap_or_default();
    // SAFETY: the kernel writes at most `length` bytes, the size of the structure, which consists of integers alone.
    let result = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut length)
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(info.tcpi_total_retrans) }
}

async fn receive(mut stream: TcpStream, received: Arc<AtomicU64>, longest: Arc<Mutex<Duration>>) -> Result<(), String> {
    let mut buffer = vec![0; 64 << 10];
    let (mut filled, mut next, mut last) = (0, 0u64, Instant::now());
    loop {
        let count = stream.read(&mut buffer[filled..]).await.map_err(|error| format!("receiving: {error}"))?;
        let stall = std::mem::replace(&mut last, Instant::now()).elapsed();
        let mut longest = longest.lock().unwrap_or_else(PoisonError::into_inner);
        *longest = stall.max(*longest);
        if count == 0 {
            return if filled == 0 { Ok(()) } else { Err(format!("the stream ends inside word {next}")) };
        }
        filled += count;
        received.fetch_add(count as u64, Ordering::Relaxed);
        let whole_words_len = filled / 8 * 8;
        for word in buffer[..whole_words_len].chunks_exact(8) {
            if word != next.to_be_bytes() {
                return Err(format!("word {next} is {word:?}"));
            }
            next += 1;
        }
        buffer.copy_within(whole_words_len..filled, 0);
        filled -= whole_words_len;
    }
}
