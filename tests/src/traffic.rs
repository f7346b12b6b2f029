//! Pings and a TCP transfer between two containers during a fault, and the checks of both.

use std::time::Duration;

use overlay_agent::model::Family;

use crate::ping::{PingFlow, PingStats};
use crate::tcp_stream::{Transfer, TransferStats};
use crate::{ExpectContext, TestLab};

/// Maximum stall of the transfer on a busy machine, even without packet loss.
const MAX_STALL: Duration = Duration::from_secs(5);

/// A ping flow and a transfer.
#[derive(Debug)]
pub struct Traffic {
    label: String,
    pings: PingFlow,
    transfer: Transfer,
}

/// The results of both.
#[derive(Debug)]
pub struct TrafficStats {
    /// The two containers and the family.
    pub label: String,
    /// The pings.
    pub pings: PingStats,
    /// The transfer.
    pub transfer: TransferStats,
}

impl Traffic {
    /// Starts both between two containers with the lab's names (`h1-c1`).
    pub async fn start(lab: &TestLab, from: &str, to: &str, family: Family) -> Traffic {
        let (host, name) = to.split_once('-').expect_ok("a container HOST-NAME");
        let endpoints = lab.host(host).client().endpoints().await.expect_ok(host).endpoints;
        let endpoint = endpoints.into_iter().find(|e| e.name.as_str() == name).expect_ok(to);
        let address = *endpoint.addresses().get(family).expect_ok("the container's address");
        let (source, target) = (lab.open_netns(from), lab.open_netns(to));
        let pings = PingFlow::start(&source, &target, address).await;
        let transfer = Transfer::start(&source, &target, address).await;
        Traffic { label: format!("{from} to {to} ({family})"), pings, transfer }
    }

    /// Lets both continue for some time.
    pub async fn run_for(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// Ends both.
    pub async fn stop(self) -> TrafficStats {
        let transfer = self.transfer.stop().await;
        TrafficStats { label: self.label, pings: self.pings.stop().await, transfer }
    }
}

impl TrafficStats {
    /// Checks that no ping is lost and the transfer is complete.
    #[track_caller]
    pub fn assert_no_loss(&self, context: &str) {
        println!("{context}: {self}");
        self.pings.assert_no_loss(&format!("{context}, {}", self.label));
        self.transfer.assert_complete(&format!("{context}, {}", self.label), MAX_STALL);
    }

    /// Checks a limit of lost pings, and a complete transfer with a limited stall.
    #[track_caller]
    pub fn assert_loss_at_most(&self, max_lost: usize, max_stall: Duration, context: &str) {
        println!("{context}: {self}");
        let count = self.pings.lost.len();
        assert!(
            count <= max_lost,
            "{context}, {}: {count} pings lost, {max_lost} are allowed: {:?}",
            self.label,
            self.pings.lost
        );
        self.transfer.assert_complete(&format!("{context}, {}", self.label), max_stall.max(MAX_STALL));
    }
}

impl std::fmt::Display for TrafficStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (pings, tcp) = (&self.pings, &self.transfer);
        write!(
            f,
            "{}: {} of {} pings lost; {} kB over TCP, {} segments retransmitted, longest stall {} ms",
            self.label,
            pings.lost.len(),
            pings.sent,
            tcp.received / 1000,
            tcp.retransmitted,
            tcp.longest_stall.as_millis()
        )
    }
}
