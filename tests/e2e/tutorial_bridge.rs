//! Two containers on one bridge, by hand and by the agent: pings, a line of text, the world outside with forwarding and masquerade and not without.

use overlay_tests::tutorial::Tutorial;

#[tokio::test(flavor = "multi_thread")]
async fn by_hand() {
    Tutorial::begin("By hand").await.to_the_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn by_the_agent() {
    Tutorial::begin("Two containers on one bridge").await.to_the_end().await;
}
