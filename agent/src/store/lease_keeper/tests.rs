//! Tests of the waits between two snapshots.

use super::*;

/// The snapshot before the wait was read at revision 5.
#[tokio::test]
async fn removal_between_snapshot_and_wait_is_not_missed() {
    let (config, watch_state) = (StoreConfig::default(), WatchState::new());
    let host_lease = HostLease::new(&config);
    let ((events, _received), (_request, lease_request)) = (mpsc::channel(1), watch::channel(None));
    let mut keeper = LeaseKeeper::new(&config, &host_lease, &watch_state, events, lease_request);
    keeper.known_revision = 5;
    for (removed_at, is_new) in [(5, false), (6, true)] {
        watch_state.progress.send_modify(|progress| progress.removal_revision = removed_at);
        let waited = tokio::time::timeout(Duration::from_millis(200), keeper.wait_for_change(RETRY_INTERVAL)).await;
        assert_eq!(waited.is_ok(), is_new, "a removal at revision {removed_at}");
    }
}
