//! An echo server in a container, fetched from the host and from another container.

use overlay_tests::tutorial::Tutorial;

#[tokio::test(flavor = "multi_thread")]
async fn an_echo_server() {
    Tutorial::begin("An echo server").await.to_the_end().await;
}
