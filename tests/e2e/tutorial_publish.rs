//! A published port, from outside hosts and from its own host.

use overlay_tests::tutorial::Tutorial;

#[tokio::test(flavor = "multi_thread")]
async fn published_port_section_runs() {
    Tutorial::begin("A published port").await.run_to_end().await;
}
