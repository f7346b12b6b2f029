//! The heartbeat of the loop: it stops with a stuck loop, and an idle loop sleeps.

use super::*;

#[tokio::test]
async fn heartbeat_stops_when_loop_is_stuck() {
    /// Long enough for a turn on a busy machine.
    const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(5);
    let mut fixture = Fixture::ready([1]).await;
    for _ in 0..2 {
        fixture.heartbeat.mark_unchanged();
        fixture.status().await;
        tokio::time::timeout(HEARTBEAT_TIMEOUT, fixture.heartbeat.changed()).await.expect("a beat at a question").unwrap();
    }
    fixture.kernel.lock().stuck = true;
    fixture.delete(route(1)).await;
    // The turns until the repair begins may still beat; after it none does, whoever asks.
    for _ in 0..10 {
        fixture.heartbeat.mark_unchanged();
        let (reply, _answer) = oneshot::channel();
        fixture.queries.try_send(ReconcilerQuery::Status(reply)).expect("room for a question");
        if tokio::time::timeout(Duration::from_secs(1), fixture.heartbeat.changed()).await.is_err() {
            return;
        }
    }
    panic!("a loop that is stuck beats on");
}

#[tokio::test]
async fn idle_loop_does_not_wake() {
    let mut fixture = Fixture::ready([1]).await;
    tokio::time::sleep(HEAP_TRIM_DELAY * 2).await; // Once after the start memory is given back.
    fixture.heartbeat.mark_unchanged();
    let turned = tokio::time::timeout(HEAP_TRIM_DELAY * 3, fixture.heartbeat.changed()).await;
    assert!(turned.is_err(), "a turn, though nothing happens");
}
