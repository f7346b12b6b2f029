//! Hosts on two switches with a router between them, and two switches with a router on one host.

use overlay_tests::tutorial::Tutorial;

#[tokio::test(flavor = "multi_thread")]
async fn router_section_runs() {
    Tutorial::begin("Two switches and a router between them").await.run_to_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_host_router_section_runs() {
    Tutorial::begin("Two switches and a router on one host").await.run_to_end().await;
}
