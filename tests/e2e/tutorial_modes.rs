//! The four modes, each with the interfaces that it shows.

use overlay_tests::tutorial::Tutorial;

#[tokio::test(flavor = "multi_thread")]
async fn the_four_modes() {
    Tutorial::begin("The four modes").await.to_the_end().await;
}
