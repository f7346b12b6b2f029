//! Without next-hop objects: classic routes do the same, and switching between the two loses nothing and leaves nothing behind.

use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, Story, eventually, kernel};
use overlayctl::lab::Families;

async fn settled_as(story: &Story, host: &str, classic: bool) {
    let expected = kernel::expected(&story.at(host), classic).await;
    eventually(&format!("{host} with classic routes: {classic}"), SOON, || {
        let difference = kernel::difference(&kernel::actual(story, host), &expected);
        if difference.is_empty() { Ok(()) } else { Err(format!("\n{difference}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mesh_works() {
    let story = Story::up(|options| {
        options.families = Families::Dual;
        options.containers = 1;
        options.agent_args = vec!["--nexthop-objects=false".to_owned()];
    })
    .await;
    for host in ["h1", "h2", "h3"] {
        settled_as(&story, host, true).await;
        assert!(kernel::listed(&story, host, "ip", &["nexthop", "show"]).is_empty(), "{host} has no next-hop object");
        let status = story.status(host).await;
        assert!(!status.data_path.nexthop_objects && status.problems.is_empty(), "{status:#?}");
    }
    let peers = story.at("h1").client().peers().await.must("peers").peers;
    assert!(peers.iter().all(|p| p.nexthop_id.is_none() && p.state == "programmed"), "{peers:#?}");
    story.assert_all_reach().await;

    // Drift is repaired here as well.
    kernel::shell(&story, "h1", "ip route show proto 86 type unicast | while read dst _; do ip route delete $dst proto 86; done");
    settled_as(&story, "h1", true).await;
    story.assert_all_reach().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn switching_to_and_fro() {
    let story = Story::up(|options| {
        options.families = Families::Dual;
        options.containers = 1;
        options.hosts = 2;
    })
    .await;
    let mut flows = Vec::new();
    for family in Family::ALL {
        flows.push((family, story.flow("h1-c1", "h2-c1", family).await));
    }
    for classic in [true, false, true, false] {
        for host in ["h1", "h2"] {
            story.at(host).agent_stop(Signal::SIGTERM).must("stop");
            story.at(host).agent_start(&[&format!("--nexthop-objects={}", !classic)]).must("start");
            story.at(host).wait_ready(READY).await.must("ready");
            settled_as(&story, host, classic).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for (family, flow) in flows {
        flow.stop().await.assert_no_loss(&format!("{family} over four switches"));
    }
}
