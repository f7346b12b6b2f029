//! `overlayctl mesh`: reachability between hosts, over the overlay and over the underlay, worst first.
//!
//! The socket of this host's agent returns only its own row. Other rows come from agents that listen on TCP (`--metrics-listen`),
//! or from other sockets of this machine, as in a lab.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use overlay_agent::http::{self, Response};
use overlay_agent::model::Cidr;
use overlay_agent::model::api::{Mesh, MeshEntry, PathView, Reachability, SubnetEntry};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{CommandError, Context, Outcome};
use crate::client::Client;
use crate::output::{Style, Table, Tone, View, cell, format_ago, format_seconds, toned};

/// Timeout of a request to another agent.
const PEER_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum number of concurrent requests.
const MAX_CONCURRENT: usize = 16;
/// Largest row, in bytes: 10,000 peers take some 5 MB.
const MAX_RESPONSE_BYTES: u64 = 64 << 20;
/// Seconds by which a peer's lease may lag behind this host's. An agent renews its lease at least every 20 s.
const LEASE_IDLE_THRESHOLD: i64 = 90;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Query every other host too, on the TCP port of its --metrics-listen
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Query the agent at another socket of this machine too; repeatable
    #[arg(long, value_name = "SOCKET")]
    also: Vec<PathBuf>,
}

/// Reachability matrix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Matrix {
    /// Hosts whose agents answered.
    pub hosts: Vec<String>,
    /// Every path between two hosts, worst first.
    pub paths: Vec<PathEntry>,
    /// Hosts without a row, with the reason.
    pub missing: Vec<MissingHost>,
    /// Errors that prevent hosts from probing.
    pub problems: Vec<String>,
}

/// Path from one host to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathEntry {
    /// Probing host.
    pub from: String,
    /// Result of its probes.
    #[serde(flatten)]
    pub entry: MeshEntry,
    /// Seconds since the peer's agent last renewed its lease; 0 if it renews it, absent if unknown.
    pub lease_idle_seconds: Option<i64>,
    /// Diagnosis for the operator.
    pub says: String,
}

/// Host without a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingHost {
    /// Name of the host.
    pub host: String,
    /// Reason.
    pub error: String,
}

/// Prints the matrix. Exit code 3 if a host is unreachable.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let own_row = context.client.mesh().await?;
    let leases = context.client.subnets().await?.subnets;
    let mut missing = Vec::new();
    let mut rows = vec![own_row];
    for socket in &args.also {
        match Client::new(socket).with_timeout(PEER_TIMEOUT).mesh().await {
            Ok(mesh) => rows.push(mesh),
            Err(error) => missing.push(MissingHost { host: socket.display().to_string(), error: error.to_string() }),
        }
    }
    if let Some(port) = args.port {
        let peers: Vec<SubnetEntry> = leases.iter().filter(|lease| !lease.own && lease.refused.is_none()).cloned().collect();
        let queries = stream::iter(peers).map(|lease| async move { (host_name(&lease), query_host(&lease, port).await) });
        for (host, answer) in queries.buffered(MAX_CONCURRENT).collect::<Vec<_>>().await {
            match answer {
                Ok(mesh) => rows.push(mesh),
                Err(error) => missing.push(MissingHost { host, error }),
            }
        }
    }
    let matrix = matrix(rows, &leases, missing);
    let outcome = outcome(&matrix);
    context.printer.print(&MatrixView(&matrix))?;
    Ok(outcome)
}

/// `Degraded` if any path is down.
pub(super) fn outcome(matrix: &Matrix) -> Outcome {
    let path_down =
        matrix.paths.iter().any(|path| matches!(path.entry.state, Reachability::OverlayDown | Reachability::Unreachable));
    if path_down || !matrix.problems.is_empty() { Outcome::Degraded } else { Outcome::Ok }
}

/// Builds the matrix from the rows, worst path first.
pub(super) fn matrix(rows: Vec<Mesh>, leases: &[SubnetEntry], missing: Vec<MissingHost>) -> Matrix {
    let idle = lease_idle(leases);
    let mut matrix = Matrix { hosts: Vec::new(), paths: Vec::new(), missing, problems: Vec::new() };
    for row in rows {
        if matrix.hosts.contains(&row.node) {
            continue;
        }
        if let Some(error) = &row.error {
            matrix.problems.push(format!("{}: {error}", row.node));
        }
        if row.interval_seconds == 0 && row.peers.is_empty() {
            matrix
                .problems
                .push(format!("{}: probing is switched off (--mesh-interval=0s): use `overlayctl ping-mesh`", row.node));
        }
        for entry in row.peers {
            let lease_idle_seconds = idle.get(&entry.subnet).copied().flatten();
            let says = diagnosis(&entry, lease_idle_seconds);
            matrix.paths.push(PathEntry { from: row.node.clone(), entry, lease_idle_seconds, says });
        }
        matrix.hosts.push(row.node);
    }
    let rank = |path: &PathEntry| {
        let entry = &path.entry;
        (entry.state, entry.overlay.lost + entry.underlay.lost, entry.overlay.mean_micros)
    };
    matrix.paths.sort_by(|a, b| rank(b).cmp(&rank(a)).then_with(|| (&a.from, a.entry.subnet).cmp(&(&b.from, b.entry.subnet))));
    matrix
}

/// Computes how long each peer's lease was not renewed. The reference is this host's own renewed lease, which has the same TTL.
/// Hosts that renew differently (flannel) give no value.
fn lease_idle(leases: &[SubnetEntry]) -> BTreeMap<Cidr, Option<i64>> {
    let own_expires_in = leases.iter().find(|lease| lease.own).and_then(|lease| lease.expires_in_seconds);
    let mut all = BTreeMap::new();
    for lease in leases.iter().filter(|lease| !lease.own) {
        let idle_seconds = match (own_expires_in, lease.expires_in_seconds, &lease.node_id) {
            (Some(own_expires_in), Some(expires_in), Some(_)) if own_expires_in > expires_in + LEASE_IDLE_THRESHOLD => {
                Some(own_expires_in - expires_in)
            }
            (Some(_), Some(_), Some(_)) => Some(0),
            _ => None,
        };
        for (_, range) in lease.subnet.iter().flat_map(|subnet| subnet.iter()) {
            all.insert(range, idle_seconds);
        }
    }
    all
}

fn diagnosis(entry: &MeshEntry, idle: Option<i64>) -> String {
    match (entry.state, idle, entry.gone_since) {
        (Reachability::Unreachable, Some(0), _) => {
            format!(
                "no answer on either path, but its lease was renewed within the last {LEASE_IDLE_THRESHOLD} s: partitioned from this host, not down"
            )
        }
        (Reachability::Unreachable, Some(idle), _) => {
            let idle = format_seconds(u64::try_from(idle).unwrap_or(0));
            format!("no answer on either path, and its lease was not renewed for {idle}: the host is down")
        }
        (Reachability::Unreachable, None, _) => "no answer on either path".to_owned(),
        (Reachability::OverlayDown, ..) => {
            "the underlay answers, the tunnel does not: `overlayctl trace host HOST` shows where it stops".to_owned()
        }
        (Reachability::UnderlaySilent, ..) => "the overlay answers; the underlay drops ICMP".to_owned(),
        (Reachability::Lossy, ..) => "some probes are lost".to_owned(),
        (Reachability::Gone, _, Some(since)) => format!("its lease ended {}", format_ago(since)),
        (Reachability::Unknown, ..) => "not probed yet".to_owned(),
        _ => String::new(),
    }
}

fn host_name(lease: &SubnetEntry) -> String {
    lease.host.clone().unwrap_or_else(|| lease.key.clone())
}

/// Queries another host's agent over TCP, at its public IP, then at its VTEP.
async fn query_host(lease: &SubnetEntry, port: u16) -> Result<Mesh, String> {
    let public = lease.public_ip.iter().map(|(_, address)| *address);
    let vteps = lease.subnet.iter().flat_map(|subnet| subnet.iter()).map(|(_, range)| range.base());
    let mut errors = Vec::new();
    for address in public.chain(vteps).collect::<Vec<IpAddr>>() {
        match tokio::time::timeout(PEER_TIMEOUT, fetch(SocketAddr::new(address, port))).await {
            Ok(Ok(mesh)) => return Ok(mesh),
            Ok(Err(error)) => errors.push(format!("{address}: {error}")),
            Err(_) => errors.push(format!("{address}: no answer within {} s", PEER_TIMEOUT.as_secs())),
        }
    }
    errors.push(format!("its agent must listen there: --metrics-listen ADDRESS:{port}"));
    Err(errors.join("; "))
}

async fn fetch(address: SocketAddr) -> Result<Mesh, String> {
    let mut stream = TcpStream::connect(address).await.map_err(|e| e.to_string())?;
    stream.write_all(&http::request("GET", "/mesh", address, &[])).await.map_err(|e| e.to_string())?;
    let mut answer = Vec::new();
    stream.take(MAX_RESPONSE_BYTES).read_to_end(&mut answer).await.map_err(|e| e.to_string())?;
    let response = Response::parse(answer).map_err(|e| e.to_string())?;
    if response.status != 200 {
        return Err(format!("HTTP response {}", response.head.lines().next().unwrap_or_default()));
    }
    serde_json::from_slice(&response.body).map_err(|e| format!("cannot parse its response: {e}"))
}

#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct MatrixView<'a>(pub(super) &'a Matrix);

fn path_text(path: &PathView) -> String {
    if let Some(error) = &path.error {
        return error.split(" (os error").next().unwrap_or(error).to_owned();
    }
    if path.probes == 0 {
        return "-".to_owned();
    }
    let mean = path.mean_micros.filter(|_| path.lost < path.probes);
    let mean = mean.map(|micros| format!("{:.2} ms", Duration::from_micros(micros).as_secs_f64() * 1000.0));
    format!("{}, {}/{} lost", mean.unwrap_or_else(|| "no answer".to_owned()), path.lost, path.probes)
}

impl View for MatrixView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        let matrix = self.0;
        let mut header = vec!["FROM", "TO", "STATE", "OVERLAY", "UNDERLAY"];
        if wide {
            header.extend(["SUBNET", "VTEP", "PUBLIC IP"]);
        }
        header.push("NOTE");
        let mut table = Table::new(style, &header);
        for path in &matrix.paths {
            let entry = &path.entry;
            let tone = match entry.state {
                Reachability::Ok => Tone::Good,
                Reachability::Unknown | Reachability::Gone => Tone::Quiet,
                Reachability::UnderlaySilent | Reachability::Lossy => Tone::Warning,
                Reachability::OverlayDown | Reachability::Unreachable => Tone::Bad,
            };
            let to = entry.host.clone().unwrap_or_else(|| entry.subnet.to_string());
            let mut row = vec![
                cell(Some(&path.from)),
                cell(Some(to)),
                toned(tone, entry.state.as_str()),
                cell(Some(path_text(&entry.overlay))),
                cell(Some(path_text(&entry.underlay))),
            ];
            if wide {
                row.extend([cell(Some(entry.subnet)), cell(Some(entry.overlay.address)), cell(Some(entry.underlay.address))]);
            }
            row.push(cell(Some(&path.says)));
            table.row(row);
        }
        let mut text = if matrix.paths.is_empty() { "no peers to probe".to_owned() } else { table.text() };
        for problem in &matrix.problems {
            text.push_str(&format!("\nproblem: {problem}"));
        }
        for missing in &matrix.missing {
            text.push_str(&format!("\nno row from {}: {}", missing.host, missing.error));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u8, state: Reachability) -> MeshEntry {
        let path = |text: String| PathView {
            address: text.parse().expect("ip"),
            probes: 4,
            lost: u32::from(state == Reachability::Unreachable) * 4,
            last_micros: Some(900),
            mean_micros: Some(1_000),
            error: None,
        };
        MeshEntry {
            subnet: format!("10.244.{number}.0/24").parse().expect("cidr"),
            host: Some(format!("h{number}")),
            state,
            overlay: path(format!("10.244.{number}.0")),
            underlay: path(format!("192.0.2.{number}")),
            gone_since: None,
        }
    }

    fn lease(number: u8, expires_in: i64, own: bool) -> SubnetEntry {
        let text = format!(
            r#"{{"key":"10.244.{number}.0-24","subnet":{{"v4":"10.244.{number}.0/24"}},"host":"h{number}","node_id":"{number}",
            "public_ip":{{"v4":"192.0.2.{number}"}},"backend":"vxlan","vni":1,"vtep":{{}},"expires_in_seconds":{expires_in},
            "reservation":false,"own":{own},"refused":null}}"#
        );
        serde_json::from_str(&text).expect("a lease")
    }

    #[test]
    fn down_host_is_distinguished_from_cut_off_host() {
        let leases = [lease(1, 86_395, true), lease(2, 86_390, false), lease(3, 86_100, false), lease(4, 86_380, false)];
        let row = Mesh {
            node: "h1".to_owned(),
            interval_seconds: 30,
            error: None,
            peers: vec![entry(2, Reachability::Ok), entry(3, Reachability::Unreachable), entry(4, Reachability::Unreachable)],
        };
        let matrix = matrix(vec![row.clone(), row], &leases, Vec::new());
        let reported: Vec<(&str, Option<i64>)> =
            matrix.paths.iter().map(|p| (p.entry.host.as_deref().unwrap_or_default(), p.lease_idle_seconds)).collect();
        assert_eq!(reported, [("h3", Some(295)), ("h4", Some(0)), ("h2", Some(0))]);
        assert!(matrix.paths[0].says.contains("not renewed for 4m55s: the host is down"), "{}", matrix.paths[0].says);
        assert!(matrix.paths[1].says.contains("partitioned from this host, not down"), "{}", matrix.paths[1].says);
        assert_eq!(outcome(&matrix), Outcome::Degraded);
        let text = MatrixView(&matrix).text(Style::PLAIN, false);
        assert!(text.lines().nth(1).is_some_and(|line| line.contains("h3") && line.contains("no answer, 4/4 lost")), "{text}");
        assert!(text.contains("1.00 ms, 0/4 lost"), "{text}");
    }
}
