//! Grants, renews and revokes etcd leases, and checks whether another host renews one.

use std::time::Duration;

use etcd_client::LeaseTimeToLiveOptions;

use super::StoreError;
use super::connect::{Session, keep_alive_interval};

/// Granted and remaining TTL of an etcd lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LeaseTtl {
    pub(super) granted: Duration,
    pub(super) remaining: Duration,
}

/// Whether an etcd lease is being renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Liveness {
    /// Not renewed for longer than a running agent's interval.
    Dead,
    /// Renewed since the first check.
    Alive {
        /// Look again after this long.
        recheck_after: Duration,
    },
    /// Undecided yet.
    Unknown {
        /// Look again after this long.
        recheck_after: Duration,
    },
}

/// Whether an etcd lease is being renewed, `observed_for` after the first check. Hosts renew at least every `max_interval`.
pub(super) fn liveness(ttl: LeaseTtl, max_interval: Duration, observed_for: Duration) -> Liveness {
    let age = ttl.granted.saturating_sub(ttl.remaining);
    // etcd rounds both TTLs down to whole seconds: one second for each, and half an interval for a busy host.
    let limit = keep_alive_interval(ttl.granted, max_interval) * 3 / 2 + Duration::from_secs(2);
    if age > limit {
        Liveness::Dead
    } else if age + Duration::from_secs(2) < observed_for {
        Liveness::Alive { recheck_after: limit }
    } else {
        Liveness::Unknown { recheck_after: limit - age + Duration::from_secs(1) }
    }
}

impl Session {
    /// Sends one renewal and awaits the response.
    ///
    /// Each renewal opens a new stream because of `etcd grpc-proxy`. On a long-lived stream the proxy answers the first renewal
    /// at once, and later ones only after a third of the TTL, which is eight hours (`keepAliveLoop` in etcd's
    /// `proxy/grpcproxy/lease.go`).
    pub(super) async fn renew(&self, id: i64) -> Result<(), StoreError> {
        let mut client = self.client.lease_client();
        // The library opens a stream, sends one request and reads one response. Dropping the stream closes it.
        match self.with_timeout("renew the lease", client.keep_alive(id)).await {
            Ok(_) => Ok(()),
            Err(StoreError::RequestFailed { detail, .. }) if detail.contains("lease not found") => {
                Err(StoreError::LeaseNotFound { lease: id })
            }
            Err(StoreError::LeaseNotFound { .. }) => Err(StoreError::LeaseNotFound { lease: id }),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn grant(&self, ttl: Duration) -> Result<i64, StoreError> {
        let seconds = i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX);
        let mut client = self.client.lease_client();
        Ok(self.with_timeout("get an etcd lease", client.grant(seconds, None)).await?.id())
    }

    /// Revokes an etcd lease. Succeeds if it does not exist.
    pub(super) async fn revoke(&self, id: i64) -> Result<(), StoreError> {
        match self.with_timeout("revoke an etcd lease", self.client.lease_client().revoke(id)).await {
            Ok(_) | Err(StoreError::LeaseNotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Revokes an etcd lease unless keys are bound to it, of any network.
    pub(super) async fn revoke_unbound(&self, id: i64) -> Result<(), StoreError> {
        let mut client = self.client.lease_client();
        let options = LeaseTimeToLiveOptions::new().with_keys();
        let response = self.with_timeout("read an etcd lease", client.time_to_live(id, Some(options))).await?;
        if response.ttl() > 0 && response.keys().is_empty() { self.revoke(id).await } else { Ok(()) }
    }

    /// Reads the TTLs of an etcd lease; `None` if it does not exist.
    pub(super) async fn time_to_live(&self, id: i64) -> Result<Option<LeaseTtl>, StoreError> {
        let mut client = self.client.lease_client();
        let response = self.with_timeout("read an etcd lease", client.time_to_live(id, None)).await?;
        let seconds = |value: i64| u64::try_from(value).ok().map(Duration::from_secs);
        Ok(match (seconds(response.granted_ttl()), seconds(response.ttl())) {
            (Some(granted), Some(remaining)) => Some(LeaseTtl { granted, remaining }),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn liveness_follows_lease_age() {
        let longest = Duration::from_secs(20);
        let day = 86_400;
        let at = |age: u64, watched: u64| {
            let ttl = LeaseTtl { granted: Duration::from_secs(day), remaining: Duration::from_secs(day - age) };
            liveness(ttl, longest, Duration::from_secs(watched))
        };
        let seconds = Duration::from_secs;
        assert_eq!(at(5, 0), Liveness::Unknown { recheck_after: seconds(28) });
        assert_eq!(at(5, 28), Liveness::Alive { recheck_after: seconds(32) });
        assert_eq!(at(32, 27), Liveness::Unknown { recheck_after: seconds(1) });
        assert_eq!(at(33, 28), Liveness::Dead);
        assert_eq!(at(4000, 0), Liveness::Dead);
        // A short TTL is renewed more often.
        let short = LeaseTtl { granted: seconds(6), remaining: seconds(0) };
        assert_eq!(liveness(short, longest, Duration::ZERO), Liveness::Dead);
        for (granted, remaining) in [(0, 0), (0, 5), (3, 9)] {
            liveness(LeaseTtl { granted: seconds(granted), remaining: seconds(remaining) }, longest, seconds(1));
        }
    }
}
