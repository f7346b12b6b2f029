//! Two containers on one bridge, manually and by the agent: pings, a line of text, and the outside with and without forwarding
//! and masquerade.

use overlay_tests::tutorial::Tutorial;

#[tokio::test(flavor = "multi_thread")]
async fn manual_bridge_section_runs() {
    Tutorial::begin("By hand").await.run_to_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_bridge_section_runs() {
    Tutorial::begin("Two containers on one bridge").await.run_to_end().await;
}
