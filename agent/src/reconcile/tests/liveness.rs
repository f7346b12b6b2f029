//! Heartbeat of the loop: it stops if the loop is stuck, and an idle loop does not wake up.

use super::*;

#[tokio::test]
async fn heartbeat_stops_when_loop_is_stuck() {
    /// Long enough for one iteration on a busy machine.
    const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(5);
    let mut fixture = Fixture::ready([1]).await;
    for _ in 0..2 {
        fixture.heartbeat.mark_unchanged();
        fixture.status().await;
        tokio::time::timeout(HEARTBEAT_TIMEOUT, fixture.heartbeat.changed()).await.expect("a heartbeat after a query").unwrap();
    }
    fixture.kernel.lock().stuck = true;
    fixture.delete(route(1)).await;
    // Iterations before the repair may still send a heartbeat. Once the repair is stuck, no query causes one.
    for _ in 0..10 {
        fixture.heartbeat.mark_unchanged();
        let (reply, _answer) = oneshot::channel();
        fixture.queries.host.try_send(ReconcilerQuery::Status(reply)).expect("room for a query");
        if tokio::time::timeout(Duration::from_secs(1), fixture.heartbeat.changed()).await.is_err() {
            return;
        }
    }
    panic!("a stuck loop still sends heartbeats");
}

#[tokio::test]
async fn idle_loop_does_not_wake() {
    let mut fixture = Fixture::ready([1]).await;
    // The start ends with one trim of the heap.
    let mut wakeups = 0;
    while tokio::time::timeout(HEAP_TRIM_DELAY * 3, fixture.heartbeat.changed()).await.is_ok() {
        wakeups += 1;
        assert!(wakeups < 10, "an idle loop wakes up");
    }
    fixture.status().await;
    assert!(fixture.heartbeat.has_changed().unwrap(), "a query wakes it");
}
