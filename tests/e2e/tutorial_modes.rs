//! The four attach modes, each with its interfaces.

use overlay_tests::tutorial::Tutorial;

#[tokio::test(flavor = "multi_thread")]
async fn modes_section_runs() {
    Tutorial::begin("The four modes").await.run_to_end().await;
}
