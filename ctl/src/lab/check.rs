//! Connectivity check of a lab. Every container calls every other one, which answers with the address that it sees: it must be
//! the caller's own, so there is no address translation. Every container also calls the outside world, which must see the address
//! of the container's host. In a lab with isolated networks, calls stay within a network, and datagrams to the containers of the
//! others must not arrive.
//!
//! Everything runs in this process: a socket belongs to the namespace of the thread that opened it, whichever thread uses it. The
//! tasks are the servers (one per container, one in the world) and at most sixteen calls at once; all end with [`check`].

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::{Family, NetworkName, PerFamily};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinSet;

use super::container::{self, AttachedContainer};
use super::crossing::{self, Crossing, Listeners, Party};
use super::layout::outside_address;
use super::{Lab, LabError};
use crate::check::read_net_stat;

/// Port of the servers: in the dynamic range, so a container's own service is unlikely to use it.
const SERVER_PORT: u16 = 49_771;

/// Maximum number of concurrent calls.
const MAX_CONCURRENT: usize = 16;

/// Failed calls after which the rest is skipped: the fault is general, and each call would take its full timeout.
const MAX_FAILURES: usize = 96;

/// Time after which no further call starts: thousands take some seconds in a healthy lab.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(60);

/// Limits on the remaining calls: failures and time.
struct TimeBudget {
    failures: AtomicUsize,
    end: Instant,
}

impl TimeBudget {
    fn new() -> TimeBudget {
        TimeBudget { failures: AtomicUsize::new(0), end: Instant::now() + TOTAL_TIMEOUT }
    }

    /// Reason for not starting a further call.
    fn exhausted(&self) -> Option<String> {
        if self.failures.load(Ordering::Relaxed) >= MAX_FAILURES {
            return Some(format!("skipped: {MAX_FAILURES} calls failed before"));
        }
        (Instant::now() >= self.end)
            .then(|| format!("skipped: the other calls took {} already", humantime::format_duration(TOTAL_TIMEOUT)))
    }
}

/// Time for a datagram to cross: more than the path within a host or between two, with the first packet's neighbour resolution.
const CROSSING_TIMEOUT: Duration = Duration::from_secs(1);

/// Timeout of one call: a lost SYN is sent again after 1 s and 3 s (RFC 6298), so a slower call has no path.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Result of a check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Whether every call had the expected answer.
    pub ok: bool,
    /// Names of the containers, in call order.
    pub containers: Vec<String>,
    /// Calls from every container to every other one of its network, in each family.
    pub overlay: Vec<Probe>,
    /// Calls from every container to the outside world, in each family.
    pub egress: Vec<Probe>,
    /// Datagrams to containers of other networks; absent in a lab with one network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
    /// Further information about failed calls.
    pub remarks: Vec<String>,
}

/// Outcome of datagrams between networks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Isolation {
    /// Number of networks.
    pub networks: usize,
    /// Number of datagrams.
    pub sent: usize,
    /// Those that arrived.
    pub crossings: Vec<Crossing>,
}

/// One call and its outcome.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// Caller: a container such as `h1-c1`.
    pub from: String,
    /// Callee: a container, or `world`.
    pub to: String,
    /// Address family.
    pub family: Family,
    /// Called address.
    pub address: IpAddr,
    /// Caller address that the callee must see.
    pub expected: IpAddr,
    /// Caller address that the callee saw.
    pub seen: Option<IpAddr>,
    /// Microseconds from the first packet to the answer.
    pub micros: Option<u64>,
    /// Error; absent for a successful call.
    pub error: Option<String>,
}

/// A container with its open namespace.
struct Prober {
    name: String,
    network: NetworkName,
    netns: Netns,
    addresses: PerFamily<IpAddr>,
    host_addresses: PerFamily<IpAddr>,
}

/// Checks a lab.
pub async fn check(lab: &Lab) -> Result<Report, LabError> {
    let probers = list_probers(lab)?;
    let mut servers = JoinSet::new();
    for prober in &probers {
        for (_, address) in prober.addresses.iter() {
            serve(&mut servers, &prober.netns, &prober.name, *address)?;
        }
    }
    let world = lab.netns("world")?;
    for family in lab.layout().families() {
        serve(&mut servers, &world, "world", outside_address(family))?;
    }
    let families: Vec<Family> = lab.layout().families().collect();
    let mut overlay = Vec::new();
    let mut egress = Vec::new();
    for from in &probers {
        for family in &families {
            for to in probers.iter().filter(|to| to.name != from.name && to.network == from.network) {
                overlay.push(plan_probe(from, *family, &to.name, to.addresses.get(*family), from.addresses.get(*family)));
            }
            egress.push(plan_probe(from, *family, "world", Some(&outside_address(*family)), from.host_addresses.get(*family)));
        }
    }
    let overflows = neighbour_overflows();
    let budget = TimeBudget::new();
    let run = |planned: Probe| run_probe(probers.iter().find(|p| p.name == planned.from), planned, &budget);
    let overlay = stream::iter(overlay).map(run).buffered(MAX_CONCURRENT).collect::<Vec<_>>().await;
    let egress = stream::iter(egress).map(run).buffered(MAX_CONCURRENT).collect::<Vec<_>>().await;
    servers.shutdown().await;
    let isolation = check_isolation(&probers).await?;
    let ok = overlay.iter().chain(&egress).all(|c| c.error.is_none())
        && isolation.as_ref().is_none_or(|isolation| isolation.crossings.is_empty());
    let mut remarks = Vec::new();
    if !ok && neighbour_overflows() > overflows {
        remarks.push(
            "the kernel's neighbour table, shared by all namespaces of the machine, overflowed during the check: use fewer hosts, or on a machine of \
             your own sysctl net.ipv4.neigh.default.gc_thresh3=16384 net.ipv6.neigh.default.gc_thresh3=16384"
                .to_owned(),
        );
    }
    Ok(Report { ok, containers: probers.into_iter().map(|p| p.name).collect(), overlay, egress, isolation, remarks })
}

/// Sends datagrams from each container to those of other networks; `None` with one network.
async fn check_isolation(probers: &[Prober]) -> Result<Option<Isolation>, LabError> {
    let party = |prober: &Prober| Party {
        name: prober.name.clone(),
        network: prober.network.clone(),
        netns: prober.netns.clone(),
        addresses: prober.addresses,
    };
    let parties: Vec<Party> = probers.iter().map(party).collect();
    let networks = parties.iter().map(|party| &party.network).collect::<BTreeSet<_>>().len();
    if networks < 2 {
        return Ok(None);
    }
    let mut listeners = Listeners::default();
    for party in &parties {
        listeners.add(party)?;
    }
    let mut sent = 0;
    for from in &parties {
        let others = parties.iter().filter(|to| to.network != from.network);
        sent += others.clone().map(|to| to.addresses.iter().count()).sum::<usize>();
        crossing::send(from, others)?;
    }
    tokio::time::sleep(CROSSING_TIMEOUT).await;
    Ok(Some(Isolation { networks, sent, crossings: listeners.crossings() }))
}

/// Number of overflows of the kernel's neighbour tables since boot; 0 if unreadable. Hosts in full mesh need one entry per pair,
/// and `gc_thresh3` (arp(7)) counts the entries of all namespaces together.
fn neighbour_overflows() -> u64 {
    ["arp_cache", "ndisc_cache"].into_iter().flat_map(|file| read_net_stat(file, "table_fulls")).sum()
}

/// Lists every container of every host from the kernel's state: a data path must work while its agent is stopped.
fn list_probers(lab: &Lab) -> Result<Vec<Prober>, LabError> {
    let mut probers = Vec::new();
    for host in lab.hosts() {
        for AttachedContainer { name, network, netns, addresses } in container::list_attached(&host)? {
            let name = format!("{}-{name}", host.name());
            probers.push(Prober { name, network, netns, addresses, host_addresses: host.layout().addresses });
        }
    }
    Ok(probers)
}

/// Starts a server at an address of a namespace. It sends each caller the address that it sees.
fn serve(servers: &mut JoinSet<()>, netns: &Netns, name: &str, address: IpAddr) -> Result<(), LabError> {
    let at = SocketAddr::new(address, SERVER_PORT);
    let bind = || -> std::io::Result<std::net::TcpListener> {
        let listener = std::net::TcpListener::bind(at)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    let error = |source: std::io::Error| LabError::Spawn { program: format!("a server at {at} in {name}"), source };
    let listener = netns.run(bind)?.and_then(TcpListener::from_std).map_err(error)?;
    servers.spawn(async move {
        // Sequential service is enough, because callers wait; a failed accept shows up as the caller's error.
        while let Ok((mut stream, caller)) = listener.accept().await {
            let _sent = stream.write_all(format!("{}\n", caller.ip()).as_bytes()).await;
        }
    });
    Ok(())
}

/// Prepares a call.
fn plan_probe(from: &Prober, family: Family, to: &str, address: Option<&IpAddr>, expected: Option<&IpAddr>) -> Probe {
    let unspecified = family.unspecified();
    let error = match (address, expected) {
        (None, _) => Some(format!("{to} has no {family} address")),
        (_, None) => Some(format!("{} has no {family} address", from.name)),
        _ => None,
    };
    Probe {
        from: from.name.clone(),
        to: to.to_owned(),
        family,
        address: *address.unwrap_or(&unspecified),
        expected: *expected.unwrap_or(&unspecified),
        seen: None,
        micros: None,
        error,
    }
}

/// Makes a call, and counts a failure.
async fn run_probe(from: Option<&Prober>, mut probe: Probe, budget: &TimeBudget) -> Probe {
    let (Some(from), None) = (from, &probe.error) else { return probe };
    if let Some(reason) = budget.exhausted() {
        probe.error = Some(reason);
        return probe;
    }
    match tokio::time::timeout(PROBE_TIMEOUT, query_seen_address(&from.netns, probe.address)).await {
        Ok(Ok((seen, time))) => {
            probe.seen = Some(seen);
            probe.micros = u64::try_from(time.as_micros()).ok();
            if seen != probe.expected {
                probe.error = Some(format!("the callee sees {seen} instead of {}", probe.expected));
            }
        }
        Ok(Err(error)) => probe.error = Some(error.to_string()),
        Err(_) => probe.error = Some(format!("no answer within {}", humantime::format_duration(PROBE_TIMEOUT))),
    }
    if probe.error.is_some() {
        budget.failures.fetch_add(1, Ordering::Relaxed);
    }
    probe
}

/// Asks the server at an address for the caller address that it sees. Returns it with the time for connection and answer.
async fn query_seen_address(netns: &Netns, address: IpAddr) -> std::io::Result<(IpAddr, Duration)> {
    let open = || if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = netns.run(open).map_err(std::io::Error::other)??;
    let start = Instant::now();
    let mut stream = socket.connect(SocketAddr::new(address, SERVER_PORT)).await?;
    let mut answer = String::new();
    (&mut stream).take(64).read_to_string(&mut answer).await?;
    let time = start.elapsed();
    let seen =
        answer.trim().parse().map_err(|_| std::io::Error::other(format!("the answer `{}` is not an address", answer.trim())))?;
    Ok((seen, time))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a separate namespace: the loopback address is seen unchanged, and a closed port is an error.
    #[tokio::test]
    async fn probe_detects_nat_and_closed_port() {
        let name = format!("ovt-check-{}", std::process::id());
        let netns = Netns::create(&name).expect("a namespace (root is needed)");
        Netns::delete(&name).expect("its name is not needed any more");
        let loopback: IpAddr = "127.0.0.1".parse().expect("an address");
        let mut servers = JoinSet::new();
        serve(&mut servers, &netns, "test", loopback).expect("a free port");
        let budget = TimeBudget::new();
        let prober = Prober {
            name: "a".to_owned(),
            network: NetworkName::default(),
            netns,
            addresses: PerFamily { v4: Some(loopback), v6: None },
            host_addresses: PerFamily { v4: "10.0.0.1".parse().ok(), v6: None },
        };
        let good =
            run_probe(Some(&prober), plan_probe(&prober, Family::V4, "b", Some(&loopback), Some(&loopback)), &budget).await;
        assert_eq!((good.seen, &good.error), (Some(loopback), &None));
        let translated = run_probe(
            Some(&prober),
            plan_probe(&prober, Family::V4, "b", Some(&loopback), prober.host_addresses.get(Family::V4)),
            &budget,
        )
        .await;
        assert_eq!(translated.error.as_deref(), Some("the callee sees 127.0.0.1 instead of 10.0.0.1"));
        let absent = run_probe(Some(&prober), plan_probe(&prober, Family::V6, "b", None, None), &budget).await;
        assert_eq!(absent.error.as_deref(), Some("b has no IPv6 address"));
        servers.shutdown().await;
        let closed =
            run_probe(Some(&prober), plan_probe(&prober, Family::V4, "b", Some(&loopback), Some(&loopback)), &budget).await;
        assert!(closed.error.is_some_and(|e| e.contains("refused")));
        // No call was made to the absent address.
        assert_eq!(budget.failures.into_inner(), 2);
    }
}
