//! An echo server in a container, fetched from the host and from another container.

use overlay_tests::tutorial::Tutorial;

#[tokio::test(flavor = "multi_thread")]
async fn echo_server_section_runs() {
    Tutorial::begin("An echo server").await.run_to_end().await;
}
