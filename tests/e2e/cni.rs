//! The CNI plugin, driven as a runtime drives it: the specification section by section in each version, in a chain with Debian's plugins, and
//! when things go wrong.

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

/// How long a namespace has to stay as it is to count as still: the kernel looks at the carrier of links once a second
/// (`linkwatch_do_dev` in net/core/link_watch.c), and an address is tentative for as long.
const STABLE_PERIOD: Duration = Duration::from_millis(1500);

/// What a namespace holds once nothing moves in it any more.
async fn dump_when_stable(netns: &Netns) -> NetnsDump {
    let (mut last, mut since) = (NetnsDump::of(netns), Instant::now());
    eventually("a namespace comes to rest", 2 * CONVERGE_TIMEOUT, || {
        let now = NetnsDump::of(netns);
        if now != last {
            let changes = now.changes_since(&last);
            (last, since) = (now, Instant::now());
            return Err(changes);
        }
        // On a busy machine duplicate address detection takes longer than anything else.
        if let Some(line) = now.lines().iter().find(|line| line.contains("\"tentative\":true")) {
            return Err(line.clone());
        }
        if since.elapsed() >= STABLE_PERIOD { Ok(now) } else { Err("it was as it is for a moment only".to_owned()) }
    })
    .await
}

/// Waits until a namespace holds what it held before.
async fn wait_unchanged(what: &str, netns: &Netns, before: &NetnsDump) {
    eventually(&format!("{what} is as it was before"), CONVERGE_TIMEOUT, || {
        let changes = NetnsDump::of(netns).changes_since(before);
        if changes.is_empty() { Ok(()) } else { Err(changes) }
    })
    .await;
}
