//! The CNI plugin, driven like a container runtime does.
//!
//! The specification section by section in each version, a chain with Debian's plugins, and failures.

#[path = "cni/chain.rs"]
mod chain;
#[path = "cni/faults.rs"]
mod faults;
#[path = "cni/spec.rs"]
mod spec;

use std::time::{Duration, Instant};

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Endpoint;
use overlay_tests::dump::NetnsDump;
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::{ExpectContext, TestLab, eventually};

async fn endpoints(lab: &TestLab) -> Vec<Endpoint> {
    lab.host("h1").client().endpoints().await.expect_ok("endpoints").endpoints
}

/// How long a namespace must be unchanged to count as stable. The kernel updates the carrier of links once a second
/// (`linkwatch_do_dev` in net/core/link_watch.c), and an address is tentative for as long.
const STABLE_PERIOD: Duration = Duration::from_millis(1500);

/// The dump of a namespace once it is stable.
async fn dump_when_stable(netns: &Netns) -> NetnsDump {
    let (mut last, mut since) = (NetnsDump::of(netns), Instant::now());
    eventually("a namespace becomes stable", 2 * CONVERGE_TIMEOUT, || {
        let now = NetnsDump::of(netns);
        if now != last {
            let changes = now.changes_since(&last);
            (last, since) = (now, Instant::now());
            return Err(changes);
        }
        // On a busy machine duplicate address detection takes longest.
        if let Some(line) = now.lines().iter().find(|line| line.contains("\"tentative\":true")) {
            return Err(line.clone());
        }
        if since.elapsed() >= STABLE_PERIOD { Ok(now) } else { Err("unchanged for too short a time".to_owned()) }
    })
    .await
}

/// Waits until a namespace equals an earlier dump.
async fn wait_unchanged(what: &str, netns: &Netns, before: &NetnsDump) {
    eventually(&format!("{what} has its earlier state"), CONVERGE_TIMEOUT, || {
        let changes = NetnsDump::of(netns).changes_since(before);
        if changes.is_empty() { Ok(()) } else { Err(changes) }
    })
    .await;
}
