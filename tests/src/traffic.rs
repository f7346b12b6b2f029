//! What runs in every story of a fault: pings and a TCP transfer between two containers, and the judgement over both.

use std::time::Duration;

use overlay_agent::model::Family;

use crate::flow::{Flow, Outcome};
use crate::transfer::{Moved, Transfer};
use crate::{Must, Story};

/// A silence of the transfer that a busy machine explains: not one packet need be lost for it.
const SILENCE: Duration = Duration::from_secs(5);

/// Pings and a transfer.
#[derive(Debug)]
pub struct Traffic {
    between: String,
    pings: Flow,
    transfer: Transfer,
}

/// What became of them.
#[derive(Debug)]
pub struct Toll {
    /// Who spoke with whom.
    pub between: String,
    /// The pings.
    pub pings: Outcome,
    /// The transfer.
    pub transfer: Moved,
}

impl Traffic {
    /// Between two containers, as the lab names them (`h1-c1`).
    pub async fn start(story: &Story, from: &str, to: &str, family: Family) -> Traffic {
        let (host, name) = to.split_once('-').must("a container HOST-NAME");
        let endpoints = story.at(host).client().endpoints().await.must(host).endpoints;
        let endpoint = endpoints.into_iter().find(|e| e.name.as_str() == name).must(to);
        let address = *endpoint.addresses().get(family).must("its address");
        let (near, far) = (story.inside(from), story.inside(to));
        let pings = Flow::start(&near, &far, address).await;
        let transfer = Transfer::start(&near, &far, address).await;
        Traffic { between: format!("{from} to {to} ({family})"), pings, transfer }
    }

    /// Lets it go on for a time.
    pub async fn go_on(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// Ends it.
    pub async fn stop(self) -> Toll {
        let transfer = self.transfer.stop().await;
        Toll { between: self.between, pings: self.pings.stop().await, transfer }
    }
}

impl Toll {
    /// No ping is lost, and the transfer is whole.
    #[track_caller]
    pub fn assert_none(&self, what: &str) {
        println!("{what}: {self}");
        self.pings.assert_no_loss(&format!("{what}, {}", self.between));
        self.transfer.assert_whole(&format!("{what}, {}", self.between), SILENCE);
    }

    /// At most so many pings are lost, and the transfer is whole, with no silence longer than this.
    #[track_caller]
    pub fn assert_at_most(&self, lost: usize, silence: Duration, what: &str) {
        println!("{what}: {self}");
        let count = self.pings.lost.len();
        assert!(count <= lost, "{what}, {}: {count} pings lost, {lost} are allowed: {:?}", self.between, self.pings.lost);
        self.transfer.assert_whole(&format!("{what}, {}", self.between), silence.max(SILENCE));
    }
}

impl std::fmt::Display for Toll {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (pings, tcp) = (&self.pings, &self.transfer);
        write!(
            f,
            "{}: {} of {} pings lost; {} kB over TCP, {} segments repeated, longest silence {} ms",
            self.between,
            pings.lost.len(),
            pings.sent,
            tcp.received / 1000,
            tcp.repeated,
            tcp.longest.as_millis()
        )
    }
}
