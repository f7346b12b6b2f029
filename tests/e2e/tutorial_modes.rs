//! The four modes, each with the interfaces that it shows.

use overlay_tests::tutorial::Tutorial;

#[tokio::test(flavor = "multi_thread")]
async fn modes_section_runs() {
    Tutorial::begin("The four modes").await.run_to_end().await;
}
