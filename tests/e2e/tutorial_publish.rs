//! A published port, from hosts outside and from its own.

use overlay_tests::tutorial::Tutorial;

#[tokio::test(flavor = "multi_thread")]
async fn a_published_port() {
    Tutorial::begin("A published port").await.to_the_end().await;
}
