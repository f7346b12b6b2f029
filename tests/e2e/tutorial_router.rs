//! Hosts on two switches, with a router between them.

use overlay_tests::tutorial::Tutorial;

#[tokio::test(flavor = "multi_thread")]
async fn two_switches_and_a_router() {
    Tutorial::begin("Two switches and a router between them").await.to_the_end().await;
}
