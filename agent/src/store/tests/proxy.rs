//! TCP proxy from one agent to the members of a cluster. It can be paused; data sent meanwhile arrives after it resumes. It can
//! be closed; all connections end then, and new ones are refused.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use super::harness::Etcd;

/// A pausable proxy; it stops when dropped.
pub(super) struct PausableProxy {
    port: u16,
    paused: watch::Sender<bool>,
    closed: watch::Sender<bool>,
    /// Number of accepted connections.
    accepted: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl PausableProxy {
    /// Starts a proxy that connects to the members in rotation.
    pub(super) async fn connect_to(members: &[Etcd]) -> PausableProxy {
        let targets: Vec<u16> =
            members.iter().map(|m| m.endpoint().rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")).collect();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let (paused, paused_rx) = watch::channel(false);
        let (closed, mut closed_rx) = watch::channel(false);
        let accepted = Arc::<AtomicUsize>::default();
        let count = Arc::clone(&accepted);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            for target in targets.iter().cycle() {
                let Ok((client, _)) = listener.accept().await else { return };
                if *closed_rx.borrow_and_update() {
                    continue;
                }
                count.fetch_add(1, Ordering::Relaxed);
                let (target, paused_rx, mut closed_rx) = (*target, paused_rx.clone(), closed_rx.clone());
                connections.spawn(async move {
                    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)).await else { return };
                    let ((client_read, client_write), (server_read, server_write)) = (client.into_split(), server.into_split());
                    // The end of one direction ends both.
                    tokio::select! {
                        () = copy_stream(client_read, server_write, paused_rx.clone()) => {}
                        () = copy_stream(server_read, client_write, paused_rx) => {}
                        _ = closed_rx.wait_for(|is_closed| *is_closed) => {}
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        PausableProxy { port, paused, closed, accepted, task: task.abort_handle() }
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Pauses or resumes all connections.
    pub(super) fn set_paused(&self, paused: bool) {
        self.paused.send_replace(paused);
    }

    /// Closes all connections and refuses new ones, or accepts them again.
    pub(super) fn set_closed(&self, closed: bool) {
        self.closed.send_replace(closed);
    }

    pub(super) fn connection_count(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }

    pub(super) fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }
}

impl Drop for PausableProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn copy_stream(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut paused: watch::Receiver<bool>) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
        if paused.wait_for(|is_paused| !is_paused).await.is_err() || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
