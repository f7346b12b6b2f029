//! Two hundred agents whose etcd is back after an outage: they come back spread over time. Each moment of a new connection is
//! noted by a gate between them and the server.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use super::harness::*;
use crate::model::event::{Connection, StoreEvent};
use crate::store::StoreConfig;

const AGENTS: u16 = 200;

/// By then an agent has failed some six times, and waits for up to six seconds.
const OUTAGE: Duration = Duration::from_secs(5);

/// The width of the histogram's columns, and the most agents in one: evenly spread over six seconds there would be 17, in a
/// stampede 200. A busy machine lets several columns go at once.
const BUCKET_WIDTH: Duration = Duration::from_millis(500);
const MAX_PER_BUCKET: usize = 100;

/// Where agents connect.
struct ConnectionGate {
    at: SocketAddr,
    target: SocketAddr,
    arrivals: Arc<Mutex<Vec<Instant>>>,
    task: Option<JoinHandle<()>>,
}

impl ConnectionGate {
    async fn open(&mut self) {
        let listener = TcpListener::bind(self.at).await.unwrap();
        self.at = listener.local_addr().unwrap();
        let (target, arrivals) = (self.target, Arc::clone(&self.arrivals));
        self.task = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                arrivals.lock().unwrap().push(Instant::now());
                connections.spawn(async move {
                    if let Ok(mut far) = TcpStream::connect(target).await {
                        // However it ends, the agent comes again.
                        let _ended = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    }
                });
            }
        }));
    }

    /// Every connection ends, new ones are refused.
    async fn close(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            // The listener goes with the task.
            let _ended = task.await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reconnects_are_spread_after_outage() {
    let etcd = Etcd::start().await;
    etcd.put_config(NETWORK).await;
    let target = etcd.endpoint().trim_start_matches("http://").parse().unwrap();
    let mut gate = ConnectionGate { at: (Ipv4Addr::LOCALHOST, 0).into(), target, arrivals: Arc::default(), task: None };
    gate.open().await;
    let config = StoreConfig { endpoints: vec![format!("http://{}", gate.at)], ..StoreConfig::default() };
    let mut agents: Vec<Agent> = (1..=AGENTS).map(|n| Agent::start(config.clone(), Some(lease_request(NETWORK, n)))).collect();
    for agent in &mut agents {
        agent.next_held().await;
    }
    let (before, _) = etcd.subnets().await;
    // Each agent is listened to, else it would wait for its events to be taken.
    let ups = Arc::new(AtomicUsize::new(0));
    let mut listeners = JoinSet::new();
    for mut agent in agents {
        let ups = Arc::clone(&ups);
        listeners.spawn(async move {
            while let Some(event) = agent.events.recv().await {
                if matches!(event, StoreEvent::Connection(Connection::Up { .. })) {
                    ups.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    assert_eq!(before.len(), usize::from(AGENTS));

    gate.close().await;
    tokio::time::sleep(OUTAGE).await;
    gate.arrivals.lock().unwrap().clear();
    ups.store(0, Ordering::Relaxed);
    gate.open().await;
    let back = Instant::now();
    let deadline = back + TEST_TIMEOUT;
    while ups.load(Ordering::Relaxed) < usize::from(AGENTS) {
        assert!(Instant::now() < deadline, "{} of {AGENTS} are back", ups.load(Ordering::Relaxed));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let arrivals = gate.arrivals.lock().unwrap().clone();
    let mut columns = [0; 64];
    for arrival in &arrivals {
        let column = arrival.duration_since(back).as_millis() / BUCKET_WIDTH.as_millis();
        columns[usize::try_from(column).unwrap().min(63)] += 1;
    }
    let used = columns.iter().rposition(|count| *count > 0).unwrap_or(0);
    for (number, count) in columns[..=used].iter().enumerate() {
        println!("{:>5} ms {:>4} {}", number * 500, count, "#".repeat(*count));
    }
    let most = columns.iter().max().unwrap();
    println!(
        "{} connections of {AGENTS} agents over {} ms, at most {most} within {BUCKET_WIDTH:?}",
        arrivals.len(),
        (used + 1) * 500
    );
    assert!(*most <= MAX_PER_BUCKET, "a stampede: {columns:?}");
    assert!(used >= 5, "spread over some seconds: {columns:?}");
    assert!(arrivals.len() < 2 * usize::from(AGENTS), "most come once: {}", arrivals.len());
    assert_eq!(etcd.subnets().await.0, before, "nobody lost anything");
}
