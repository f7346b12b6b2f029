//! Reconnects of two hundred agents after an etcd outage are spread over time. A gate between the agents and the server records
//! the time of each connection.

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

/// After this outage an agent has failed some six times, and its backoff is up to six seconds.
const OUTAGE: Duration = Duration::from_secs(5);

/// Width of the histogram's columns, and the maximum number of agents in one. Evenly spread over six seconds, a column has 17
/// agents; in a stampede it has 200. A busy machine can merge several columns.
const BUCKET_WIDTH: Duration = Duration::from_millis(500);
const MAX_PER_BUCKET: usize = 100;

/// The gate that agents connect to.
struct ConnectionGate {
    address: SocketAddr,
    target: SocketAddr,
    arrivals: Arc<Mutex<Vec<Instant>>>,
    task: Option<JoinHandle<()>>,
}

impl ConnectionGate {
    async fn open(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        let (target, arrivals) = (self.target, Arc::clone(&self.arrivals));
        self.task = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                arrivals.lock().unwrap().push(Instant::now());
                connections.spawn(async move {
                    if let Ok(mut server) = TcpStream::connect(target).await {
                        // The result does not matter: the agent reconnects.
                        let _ended = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                    }
                });
            }
        }));
    }

    /// Closes all connections and refuses new ones.
    async fn close(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            // The task owns the listener.
            let _ended = task.await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reconnects_are_spread_after_outage() {
    let etcd = Etcd::start().await;
    etcd.put_config(NETWORK).await;
    let target = etcd.endpoint().trim_start_matches("http://").parse().unwrap();
    let mut gate = ConnectionGate { address: (Ipv4Addr::LOCALHOST, 0).into(), target, arrivals: Arc::default(), task: None };
    gate.open().await;
    let config = StoreConfig { endpoints: vec![format!("http://{}", gate.address)], ..StoreConfig::default() };
    let mut agents: Vec<Agent> = (1..=AGENTS).map(|n| Agent::start(config.clone(), Some(lease_request(NETWORK, n)))).collect();
    for agent in &mut agents {
        agent.next_held().await;
    }
    let (before, _) = etcd.subnets().await;
    // An agent blocks while its event channel is full.
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
    assert_eq!(etcd.subnets().await.0, before, "no lease changed");
}
