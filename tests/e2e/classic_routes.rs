//! Classic routes instead of next-hop objects, and loss-free switches between the two.

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, eventually, kernel};
use overlayctl::lab::Families;

async fn wait_converged_as(lab: &TestLab, host: &str, classic: bool) {
    let expected = kernel::expected_state(&lab.host(host), classic).await;
    eventually(&format!("{host} with classic routes: {classic}"), CONVERGE_TIMEOUT, || {
        let difference = kernel::difference(&kernel::actual_state(lab, host), &expected);
        if difference.is_empty() { Ok(()) } else { Err(format!("\n{difference}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mesh_works_without_nexthop_objects() {
    let lab = TestLab::up(|options| {
        options.families = Families::Dual;
        options.containers = 1;
        options.agent_args = vec!["--nexthop-objects=false".to_owned()];
    })
    .await;
    for host in ["h1", "h2", "h3"] {
        wait_converged_as(&lab, host, true).await;
        assert!(kernel::list_json(&lab, host, "ip", &["nexthop", "show"]).is_empty(), "{host} has no next-hop object");
        let status = lab.status(host).await;
        assert!(!status.data_path.nexthop_objects && status.problems.is_empty(), "{status:#?}");
    }
    let peers = lab.host("h1").client().peers().await.expect_ok("peers").peers;
    assert!(peers.iter().all(|p| p.nexthop_id.is_none() && p.state == "programmed"), "{peers:#?}");
    lab.assert_full_reachability().await;

    // Drift is repaired in this mode as well.
    kernel::shell(&lab, "h1", "ip route show proto 86 type unicast | while read dst _; do ip route delete $dst proto 86; done");
    wait_converged_as(&lab, "h1", true).await;
    lab.assert_full_reachability().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nexthop_mode_switch_loses_no_packet() {
    let lab = TestLab::up(|options| {
        options.families = Families::Dual;
        options.containers = 1;
        options.hosts = 2;
    })
    .await;
    let mut flows = Vec::new();
    for family in Family::ALL {
        flows.push((family, lab.start_ping("h1-c1", "h2-c1", family).await));
    }
    for classic in [true, false, true, false] {
        for host in ["h1", "h2"] {
            lab.host(host).agent_stop(Signal::SIGTERM).expect_ok("stop");
            lab.host(host).agent_start(&[&format!("--nexthop-objects={}", !classic)]).expect_ok("start");
            lab.host(host).wait_ready(READY_TIMEOUT).await.expect_ok("ready");
            wait_converged_as(&lab, host, classic).await;
        }
        for (_, flow) in &flows {
            flow.run_for_replies(5).await;
        }
    }
    for (family, flow) in flows {
        flow.stop().await.assert_no_loss(&format!("{family} over four switches"));
    }
}
