//! etcd's endpoints from DNS: SRV records `_etcd-client-ssl._tcp.NAME` (TLS) and `_etcd-client._tcp.NAME`, as etcd's own client finds
//! them. Asked anew at each connect, with the resolver that the system is set to at that moment.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;
use rand::{Rng, RngExt};

use super::StoreError;

/// How long the resolver may take for all its tries.
const SRV_LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the name of a server may take to be resolved. Connecting resolves it again, and has more time.
const HOST_LOOKUP_TIMEOUT: Duration = Duration::from_secs(1);

/// One SRV record (RFC 2782).
#[derive(Debug, Clone, PartialEq, Eq)]
struct SrvRecord {
    priority: u16,
    weight: u16,
    host: String,
    port: u16,
}

/// The endpoints of a domain as URLs, in the order in which they are to be tried. With `tls`, only those that speak it.
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
        // With the dot at the end no search domain is appended.
        let answer = tokio::time::timeout(SRV_LOOKUP_TIMEOUT, resolver.srv_lookup(format!("{service}.{domain}."))).await;
        match answer {
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
                // The root as target says that the service is not there (RFC 2782).
                let targets = targets.filter(|target| !target.host.is_empty()).collect();
                let sorted = order_records(targets, &mut rand::rng());
                endpoints.extend(sorted.into_iter().map(|target| format!("{scheme}://{}:{}", target.host, target.port)));
            }
        }
    }
    match (endpoints.is_empty(), errors.is_empty()) {
        (false, _) => Ok(endpoints),
        (true, false) => Err(failed(errors.join("; "))),
        (true, true) => Err(failed("the answer holds no SRV record with a target".to_owned())),
    }
}

/// The addresses that endpoints as URLs stand for now. A name without an answer in time has none.
pub(super) async fn resolve_addresses(endpoints: &[String]) -> BTreeSet<IpAddr> {
    let mut found = BTreeSet::new();
    for endpoint in endpoints {
        let authority = endpoint.rsplit("://").next().unwrap_or_default();
        match tokio::time::timeout(HOST_LOOKUP_TIMEOUT, tokio::net::lookup_host(authority)).await {
            Ok(Ok(addresses)) => found.extend(addresses.map(|address| address.ip())),
            Ok(Err(error)) => tracing::debug!(endpoint, %error, "the name of an etcd server is not resolved"),
            Err(_) => tracing::debug!(endpoint, "the name of an etcd server is not resolved in time"),
        }
    }
    found
}

/// Lowest priority first; within one, drawn by weight (RFC 2782).
fn order_records(mut targets: Vec<SrvRecord>, random: &mut impl Rng) -> Vec<SrvRecord> {
    targets.sort_by_key(|target| (target.priority, target.weight));
    let mut sorted = Vec::with_capacity(targets.len());
    while let Some(priority) = targets.first().map(|target| target.priority) {
        let group = targets.iter().take_while(|target| target.priority == priority);
        let total: u32 = group.map(|target| u32::from(target.weight)).sum();
        let draw = random.random_range(0..=total);
        let mut sum = 0;
        let hit = targets.iter().position(|target| {
            sum += u32::from(target.weight);
            sum >= draw
        });
        sorted.push(targets.remove(hit.unwrap_or(0)));
    }
    sorted
}

#[cfg(test)]
#[path = "tests/discovery.rs"]
mod tests;
