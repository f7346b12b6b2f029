//! Finds etcd endpoints by DNS SRV records `_etcd-client-ssl._tcp.NAME` (TLS) and `_etcd-client._tcp.NAME`, like etcd's own
//! client. Each connect queries again, with the system's resolver settings at that moment.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;
use rand::{Rng, RngExt};

use super::StoreError;

/// Timeout of an SRV lookup, with all retries of the resolver.
const SRV_LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Timeout for resolving a server's name. Connecting resolves it again, with a longer timeout.
const HOST_LOOKUP_TIMEOUT: Duration = Duration::from_secs(1);

/// One SRV record (RFC 2782).
#[derive(Debug, Clone, PartialEq, Eq)]
struct SrvRecord {
    priority: u16,
    weight: u16,
    host: String,
    port: u16,
}

/// The endpoints of a domain as URLs, in the order to try. With `tls`, only TLS endpoints.
pub(super) async fn endpoints(name: &str, tls: bool) -> Result<Vec<String>, StoreError> {
    let resolver = TokioResolver::builder_tokio().and_then(|builder| builder.build());
    let resolver = resolver.map_err(|e| StoreError::Discovery { name: name.to_owned(), detail: e.to_string() })?;
    endpoints_with(&resolver, name, tls).await
}

async fn endpoints_with(resolver: &TokioResolver, name: &str, tls: bool) -> Result<Vec<String>, StoreError> {
    let failed = |detail: String| StoreError::Discovery { name: name.to_owned(), detail };
    let services: &[(&str, &str)] = if tls {
        &[("_etcd-client-ssl._tcp", "https")]
    } else {
        &[("_etcd-client-ssl._tcp", "https"), ("_etcd-client._tcp", "http")]
    };
    let domain = name.trim_end_matches('.');
    let mut endpoints = Vec::new();
    let mut errors = Vec::new();
    for (service, scheme) in services {
        // The trailing dot prevents that a search domain is appended.
        let result = tokio::time::timeout(SRV_LOOKUP_TIMEOUT, resolver.srv_lookup(format!("{service}.{domain}."))).await;
        match result {
            Err(_) => errors.push(format!("no answer within {} s", SRV_LOOKUP_TIMEOUT.as_secs())),
            Ok(Err(error)) => errors.push(error.to_string()),
            Ok(Ok(lookup)) => {
                let targets = lookup.answers().iter().filter_map(|record| match &record.data {
                    RData::SRV(srv) => Some(SrvRecord {
                        priority: srv.priority,
                        weight: srv.weight,
                        host: srv.target.to_utf8().trim_end_matches('.').to_owned(),
                        port: srv.port,
                    }),
                    _ => None,
                });
                // The root as target means that the service is not available (RFC 2782).
                let targets = targets.filter(|target| !target.host.is_empty()).collect();
                let sorted = order_records(targets, &mut rand::rng());
                endpoints.extend(sorted.into_iter().map(|target| format!("{scheme}://{}:{}", target.host, target.port)));
            }
        }
    }
    match (endpoints.is_empty(), errors.is_empty()) {
        (false, _) => Ok(endpoints),
        (true, false) => Err(failed(errors.join("; "))),
        (true, true) => Err(failed("the response contains no SRV record with a target".to_owned())),
    }
}

/// Resolves endpoint URLs to their current addresses. A name that does not resolve in time yields none.
pub(super) async fn resolve_addresses(endpoints: &[String]) -> BTreeSet<IpAddr> {
    let mut found = BTreeSet::new();
    for endpoint in endpoints {
        let authority = endpoint.rsplit("://").next().unwrap_or_default();
        match tokio::time::timeout(HOST_LOOKUP_TIMEOUT, tokio::net::lookup_host(authority)).await {
            Ok(Ok(addresses)) => found.extend(addresses.map(|address| address.ip())),
            Ok(Err(error)) => tracing::debug!(endpoint, %error, "cannot resolve etcd server name"),
            Err(_) => tracing::debug!(endpoint, "timeout resolving etcd server name"),
        }
    }
    found
}

/// Sorts by ascending priority; within one priority, draws by weight (RFC 2782).
fn order_records(mut targets: Vec<SrvRecord>, random: &mut impl Rng) -> Vec<SrvRecord> {
    targets.sort_by_key(|target| (target.priority, target.weight));
    let mut sorted = Vec::with_capacity(targets.len());
    while let Some(priority) = targets.first().map(|target| target.priority) {
        let group = targets.iter().take_while(|target| target.priority == priority);
        let total: u32 = group.map(|target| u32::from(target.weight)).sum();
        let draw = random.random_range(0..=total);
        let mut sum = 0;
        let chosen = targets.iter().position(|target| {
            sum += u32::from(target.weight);
            sum >= draw
        });
        sorted.push(targets.remove(chosen.unwrap_or(0)));
    }
    sorted
}

#[cfg(test)]
#[path = "tests/discovery.rs"]
mod tests;
