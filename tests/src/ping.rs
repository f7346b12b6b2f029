//! Traffic during a test: numbered UDP packets between two containers at a constant rate, with every loss counted.
//!
//! Three tasks send, receive and echo; all end with [`PingFlow::stop`], or when the flow is dropped.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use overlay_agent::kernel::netns::Netns;
use tokio::net::UdpSocket;
use tokio::task::{JoinHandle, JoinSet};

use crate::test_lab::CONVERGE_TIMEOUT;
use crate::{ExpectContext, bind, eventually};

/// The port of the echo server: in the dynamic range, and different from the lab check's.
const ECHO_PORT: u16 = 49_773;

/// A hundred packets a second.
const PING_INTERVAL: Duration = Duration::from_millis(10);

/// Minimum number of packets for a meaningful result.
const MIN_PACKETS: usize = 20;

/// How long an outstanding packet is awaited at the end before it counts as lost.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A flow of packets with echoes.
#[derive(Debug)]
pub struct PingFlow {
    tasks: JoinSet<()>,
    sender: JoinHandle<()>,
    stop: Arc<AtomicBool>,
    counts: Arc<Mutex<Counts>>,
}

#[derive(Debug, Default)]
struct Counts {
    /// The time of each packet since the start.
    sent: Vec<Duration>,
    /// Whether each packet was answered.
    answered: Vec<bool>,
    /// Errors of sending and receiving, with their counts.
    errors: BTreeMap<String, u32>,
}

/// The result of a flow.
#[derive(Debug, Clone)]
pub struct PingStats {
    /// The number of packets sent.
    pub sent: usize,
    /// The send times of the lost packets since the start of the flow.
    pub lost: Vec<Duration>,
    /// Errors of sending and receiving, with their counts.
    pub errors: BTreeMap<String, u32>,
}

impl PingStats {
    /// Checks that packets were sent and none was lost.
    #[track_caller]
    pub fn assert_no_loss(&self, context: &str) {
        assert!(self.sent >= MIN_PACKETS, "{context}: only {} packets were sent, too few for a result", self.sent);
        assert!(
            self.lost.is_empty(),
            "{context}: {} of {} packets were lost, sent at {:?} after the start; errors: {:?}",
            self.lost.len(),
            self.sent,
            self.lost,
            self.errors
        );
    }
}

impl PingFlow {
    /// Starts a flow from a container to another container's address, and waits for the first reply.
    pub async fn start(from: &Netns, to: &Netns, address: IpAddr) -> PingFlow {
        let echo = socket(to, SocketAddr::new(address, ECHO_PORT));
        let any: IpAddr = if address.is_ipv4() { [0u8; 4].into() } else { [0u16; 8].into() };
        let client = Arc::new(socket(from, SocketAddr::new(any, 0)));
        client.connect(SocketAddr::new(address, ECHO_PORT)).await.expect_ok("the flow's socket");
        let (stop, counts) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Counts::default())));
        let start = Instant::now();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut buffer = [0; 64];
            loop {
                // An error belongs to an earlier packet (port unreachable); the next packet is counted separately.
                if let Ok((length, caller)) = echo.recv_from(&mut buffer).await {
                    let _sent = echo.send_to(&buffer[..length], caller).await;
                }
            }
        });
        tasks.spawn(receive(Arc::clone(&client), Arc::clone(&counts)));
        let sender = tokio::spawn(send(client, Arc::clone(&counts), Arc::clone(&stop), start));
        let flow = PingFlow { tasks, sender, stop, counts };
        let end = Instant::now() + Duration::from_secs(10);
        while !flow.with_counts(|counts| counts.answered.iter().any(|a| *a)) {
            assert!(Instant::now() < end, "no reply from {address}: {:?}", flow.with_counts(|c| c.errors.clone()));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Packets lost during neighbour resolution are not part of the test.
        flow.with_counts(|counts| {
            counts.answered.iter_mut().for_each(|a| *a = true);
            counts.errors.clear();
        });
        flow
    }

    /// Lets the flow continue for some time.
    pub async fn run_for(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// Lets the flow continue for that many more replies.
    pub async fn run_for_replies(&self, count: usize) {
        let answered = || self.with_counts(|counts| counts.answered.iter().filter(|answered| **answered).count());
        let wanted = answered() + count;
        eventually("more replies", CONVERGE_TIMEOUT, || {
            let now = answered();
            if now >= wanted { Ok(()) } else { Err(format!("{now} of {wanted}")) }
        })
        .await;
    }

    /// Stops sending, waits for outstanding packets, and returns the result.
    pub async fn stop(mut self) -> PingStats {
        // A busy machine sends more slowly: fewer packets are not a meaningful result.
        let end = Instant::now() + DRAIN_TIMEOUT;
        while self.with_counts(|counts| counts.sent.len()) < MIN_PACKETS && Instant::now() < end {
            tokio::time::sleep(PING_INTERVAL).await;
        }
        self.stop.store(true, Ordering::Relaxed);
        // The sender may send one more packet, which is awaited like the others.
        (&mut self.sender).await.expect_ok("the sending task");
        let end = Instant::now() + DRAIN_TIMEOUT;
        while self.with_counts(|counts| counts.answered.contains(&false)) && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // The next flow to the same container binds the same port.
        self.tasks.shutdown().await;
        self.with_counts(|counts| PingStats {
            sent: counts.sent.len(),
            lost: counts.sent.iter().zip(&counts.answered).filter(|(_, answered)| !**answered).map(|(at, _)| *at).collect(),
            errors: counts.errors.clone(),
        })
    }

    fn with_counts<T>(&self, f: impl FnOnce(&mut Counts) -> T) -> T {
        f(&mut lock(&self.counts))
    }
}

impl Drop for PingFlow {
    fn drop(&mut self) {
        self.tasks.abort_all();
        self.sender.abort();
    }
}

fn lock(counts: &Mutex<Counts>) -> std::sync::MutexGuard<'_, Counts> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

fn socket(netns: &Netns, at: SocketAddr) -> UdpSocket {
    UdpSocket::from_std(bind::udp(netns, at)).expect_ok("a socket of the runtime")
}

async fn send(socket: Arc<UdpSocket>, counts: Arc<Mutex<Counts>>, stop: Arc<AtomicBool>, start: Instant) {
    let mut interval = tokio::time::interval(PING_INTERVAL);
    // A busy machine sends late, but never in bursts.
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !stop.load(Ordering::Relaxed) {
        interval.tick().await;
        let number = {
            let mut counts = lock(&counts);
            counts.sent.push(start.elapsed());
            counts.answered.push(false);
            counts.sent.len() - 1
        };
        if let Err(error) = socket.send(&number.to_be_bytes()).await {
            count_error(&counts, &error);
        }
    }
}

async fn receive(socket: Arc<UdpSocket>, counts: Arc<Mutex<Counts>>) {
    let mut buffer = [0; 8];
    loop {
        match socket.recv(&mut buffer).await {
            Ok(8) => {
                let number = usize::from_be_bytes(buffer);
                if let Some(answered) = lock(&counts).answered.get_mut(number) {
                    *answered = true;
                }
            }
            Ok(_) => {}
            Err(error) => count_error(&counts, &error),
        }
    }
}

fn count_error(counts: &Mutex<Counts>, error: &io::Error) {
    *lock(counts).errors.entry(error.to_string()).or_default() += 1;
}
