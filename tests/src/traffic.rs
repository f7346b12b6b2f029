//! What runs in every story of a fault: pings and a TCP transfer between two containers, and the judgement over both.

use std::time::Duration;

use overlay_agent::model::Family;

use crate::ping::{PingFlow, PingStats};
use crate::tcp_stream::{Transfer, TransferStats};
use crate::{ExpectContext, TestLab};

/// A silence of the transfer that a busy machine explains: not one packet need be lost for it.
const MAX_STALL: Duration = Duration::from_secs(5);

/// Pings and a transfer.
#[derive(Debug)]
pub struct Traffic {
    label: String,
    pings: PingFlow,
    transfer: Transfer,
}

/// What became of them.
#[derive(Debug)]
pub struct TrafficStats {
    /// Who spoke with whom.
    pub label: String,
    /// The pings.
    pub pings: PingStats,
    /// The transfer.
    pub transfer: TransferStats,
}

impl Traffic {
    /// Between two containers, as the lab names them (`h1-c1`).
    pub async fn start(lab: &TestLab, from: &str, to: &str, family: Family) -> Traffic {
        let (host, name) = to.split_once('-').expect_ok("a container HOST-NAME");
        let endpoints = lab.host(host).client().endpoints().await.expect_ok(host).endpoints;
        let endpoint = endpoints.into_iter().find(|e| e.name.as_str() == name).expect_ok(to);
        let address = *endpoint.addresses().get(family).expect_ok("its address");
        let (near, far) = (lab.open_netns(from), lab.open_netns(to));
        let pings = PingFlow::start(&near, &far, address).await;
        let transfer = Transfer::start(&near, &far, address).await;
        Traffic { label: format!("{from} to {to} ({family})"), pings, transfer }
    }

    /// Lets it go on for a time.
    pub async fn run_for(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// Ends it.
    pub async fn stop(self) -> TrafficStats {
        let transfer = self.transfer.stop().await;
        TrafficStats { label: self.label, pings: self.pings.stop().await, transfer }
    }
}

impl TrafficStats {
    /// No ping is lost, and the transfer is whole.
    #[track_caller]
    pub fn assert_no_loss(&self, what: &str) {
        println!("{what}: {self}");
        self.pings.assert_no_loss(&format!("{what}, {}", self.label));
        self.transfer.assert_complete(&format!("{what}, {}", self.label), MAX_STALL);
    }

    /// At most so many pings are lost, and the transfer is whole, with no silence longer than this.
    #[track_caller]
    pub fn assert_loss_at_most(&self, max_lost: usize, max_stall: Duration, what: &str) {
        println!("{what}: {self}");
        let count = self.pings.lost.len();
        assert!(count <= max_lost, "{what}, {}: {count} pings lost, {max_lost} are allowed: {:?}", self.label, self.pings.lost);
        self.transfer.assert_complete(&format!("{what}, {}", self.label), max_stall.max(MAX_STALL));
    }
}

impl std::fmt::Display for TrafficStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (pings, tcp) = (&self.pings, &self.transfer);
        write!(
            f,
            "{}: {} of {} pings lost; {} kB over TCP, {} segments repeated, longest silence {} ms",
            self.label,
            pings.lost.len(),
            pings.sent,
            tcp.received / 1000,
            tcp.retransmitted,
            tcp.longest_stall.as_millis()
        )
    }
}
