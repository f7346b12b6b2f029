//! `overlayctl status`: the agent's health, and waiting until it is ready.

use std::time::Duration;

use overlay_agent::model::NetworkName;
use overlay_agent::model::api::{Health, NetworkEntry, NetworkKind, Status};
use overlay_agent::plan::backend;
use overlay_agent::plan::underlay::SelectionReason;
use serde::Serialize;
use tokio::time::Instant;

use super::{CommandError, Context, Outcome};
use crate::client::{Client, ClientError};
use crate::output::{Style, Tone, View, format_ago, format_seconds, joined};

/// Interval of `--wait`: short next to an agent's start (about 1 s), long next to a request (1 ms).
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit codes: 0 success, 1 no agent, 3 degraded or not ready, 4 not ready in time (--wait).")]
pub struct Args {
    /// Network [default: the default network, with a line for each other one]
    #[arg(long, value_name = "NAME")]
    network: Option<NetworkName>,
    /// Wait until the agent is ready, at most this long (30s, 2m); also waits for the agent to start
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    wait: Option<Duration>,
    /// Print one line only
    #[arg(long)]
    brief: bool,
}

/// Prints the status.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let client = context.client.of_network(args.network.as_ref());
    let (status, outcome) = match args.wait {
        None => {
            let status = client.status().await?;
            let outcome = if status.ready && status.health == Health::Ok { Outcome::Ok } else { Outcome::Degraded };
            (status, outcome)
        }
        Some(limit) => match wait(&client, limit).await? {
            Some(status) => {
                let outcome = if status.ready { Outcome::Ok } else { Outcome::TimedOut };
                (status, outcome)
            }
            None => return Ok(Outcome::TimedOut),
        },
    };
    let networks = if args.network.is_none() { other_networks(&client).await? } else { Vec::new() };
    let outcome = match outcome {
        Outcome::Ok if !networks.iter().all(|network| network.ready && network.problems == 0) => Outcome::Degraded,
        outcome => outcome,
    };
    context.printer.print(&StatusView { status: &status, network: args.network.as_ref(), networks, brief: args.brief })?;
    if outcome == Outcome::TimedOut {
        eprintln!("overlayctl: not ready within {}", humantime::format_duration(args.wait.unwrap_or_default()));
    }
    Ok(outcome)
}

/// The networks that this host is in besides the default one.
async fn other_networks(client: &Client) -> Result<Vec<NetworkEntry>, ClientError> {
    Ok(client.networks().await?.networks.into_iter().filter(|entry| !entry.name.is_default()).collect())
}

/// Returns the status once the agent is ready, or the last one at the limit. `None`, with an error on standard error, if no agent
/// answered.
async fn wait(client: &Client, limit: Duration) -> Result<Option<Status>, CommandError> {
    let end = Instant::now() + limit;
    // Bounds a request that hangs, so that it does not outlast the limit by much.
    let client = client.clone().with_timeout(limit.clamp(POLL_INTERVAL, Duration::from_secs(5)));
    loop {
        let status = client.status().await;
        let timed_out = Instant::now() + POLL_INTERVAL > end;
        match status {
            Ok(status) if status.ready || timed_out => return Ok(Some(status)),
            Ok(_) => {}
            Err(
                error @ (ClientError::NoSocket { .. }
                | ClientError::ConnectionRefused { .. }
                | ClientError::ConnectionLost { .. }),
            )
            | Err(error @ ClientError::TimedOut { .. }) => {
                if timed_out {
                    eprintln!("overlayctl: not ready within {}: {error}", humantime::format_duration(limit));
                    return Ok(None);
                }
            }
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep_until((Instant::now() + POLL_INTERVAL).min(end)).await;
    }
}

#[derive(Serialize)]
struct StatusView<'a> {
    #[serde(flatten)]
    status: &'a Status,
    #[serde(skip)]
    network: Option<&'a NetworkName>,
    /// The other networks, if any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    networks: Vec<NetworkEntry>,
    #[serde(skip)]
    brief: bool,
}

impl View for StatusView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        if self.brief { brief(self.status, style) } else { full(self, style, wide) }
    }
}

fn state_text(status: &Status, style: Style) -> String {
    match (status.ready, status.health) {
        (true, Health::Ok) => style.paint(Tone::Good, "ready"),
        (true, _) => style.paint(Tone::Warning, "ready, degraded"),
        (false, Health::Degraded) => style.paint(Tone::Warning, "degraded, not ready"),
        (false, _) => style.paint(Tone::Warning, "waiting"),
    }
}

fn brief(status: &Status, style: Style) -> String {
    let lease = status.lease.as_ref().map_or_else(|| "no subnet".to_owned(), |l| l.subnet.to_string());
    let first = status.problems.first().map_or_else(String::new, |p| format!(": {p}"));
    format!(
        "{} {} {lease}, {} peers, {} endpoints{first}",
        status.node,
        state_text(status, style),
        status.data_path.peers,
        status.endpoints
    )
}

fn full(view: &StatusView<'_>, style: Style, wide: bool) -> String {
    let status = view.status;
    let mut lines = vec![format!(
        "{}  {}  {}",
        status.node,
        state_text(status, style),
        style.paint(Tone::Quiet, &format!("overlayd {}, up {}", status.version, format_seconds(status.uptime_seconds)))
    )];
    let mut line =
        |label: &str, text: String| lines.push(format!("  {}{text}", style.paint(Tone::Quiet, &format!("{label:<13}"))));
    if wide {
        line("node id", status.node_id.clone());
    }
    line("store", store(status, style));
    let name = view.network.filter(|name| !name.is_default());
    line("network", name.map_or_else(|| network(status), |name| format!("{name}, {}", network(status))));
    line("lease", lease(status));
    line("underlay", underlay(status));
    if let Some(text) = address_reasons(status, wide) {
        line("", text);
    }
    line("data path", data_path(status));
    if let Some(drift) = &status.data_path.last_drift {
        line("last repair", format!("{} ({})", drift.entry, format_ago(drift.at)));
    }
    if let Some(text) = dropped(status) {
        line("dropped", text);
    }
    line("endpoints", status.endpoints.to_string());
    for (n, entry) in view.networks.iter().enumerate() {
        line(if n == 0 { "networks" } else { "" }, other_network(entry, style));
    }
    let mut problem = |tone: Tone, text: String| lines.push(format!("  {} {text}", style.paint(tone, "!")));
    for text in &status.problems {
        problem(Tone::Bad, text.clone());
    }
    if wide {
        status.store.config_errors.iter().for_each(|e| problem(Tone::Bad, format!("configuration: {e}")));
        status.store.refused.iter().for_each(|r| problem(Tone::Warning, r.to_string()));
        status
            .data_path
            .failed
            .iter()
            .for_each(|f| problem(Tone::Bad, format!("{}: {} (tried {}x)", f.entry, f.error, f.attempts)));
    }
    lines.join("\n")
}

fn store(status: &Status, style: Style) -> String {
    let store = &status.store;
    let state = if store.connected { "connected".to_owned() } else { style.paint(Tone::Bad, "not connected") };
    let refused = if store.refused.is_empty() { String::new() } else { format!(", {} ignored", store.refused.len()) };
    format!("{state} ({} under {}), {} leases{refused}", store.endpoints.join(", "), store.prefix, store.leases)
}

fn network(status: &Status) -> String {
    match &status.network {
        None if !status.store.connected => "not known yet".to_owned(),
        None if !status.store.config_errors.is_empty() => "none: the stored configuration is invalid".to_owned(),
        None => "none yet: write one with `overlayctl config set FILE`".to_owned(),
        Some(network) => {
            let pools = joined(network.pools.iter().map(|(_, pool)| pool.network));
            let backend = backend::of(network);
            let port = backend.tunnel().map_or_else(String::new, |tunnel| format!(" port {}", tunnel.port));
            format!("{pools}, {}{port}", backend.label())
        }
    }
}

fn other_network(entry: &NetworkEntry, style: Style) -> String {
    let NetworkEntry { name, kind, subnet, ready, endpoints, problems } = entry;
    let kind = match kind {
        NetworkKind::Routed => "routed",
        NetworkKind::Isolated => "isolated",
    };
    let subnet = subnet.map_or_else(|| "no subnet".to_owned(), |subnet| subnet.to_string());
    let state = match (ready, problems) {
        (true, 0) => style.paint(Tone::Good, "ready"),
        (true, _) => style.paint(Tone::Warning, "ready, degraded"),
        (false, _) => style.paint(Tone::Warning, "not ready"),
    };
    let problems = match problems {
        0 => String::new(),
        n => format!(", {n} problems: overlayctl status --network {name}"),
    };
    format!("{name} {state}, {kind} {subnet}, {endpoints} endpoints{problems}")
}

fn lease(status: &Status) -> String {
    match &status.lease {
        None => "none yet".to_owned(),
        Some(lease) => format!("{}{}", lease.subnet, if lease.reservation { ", reserved" } else { "" }),
    }
}

fn underlay(status: &Status) -> String {
    match &status.underlay {
        None => "none chosen yet".to_owned(),
        Some(underlay) => {
            let addresses = joined(underlay.public_ip.iter().map(|(_, a)| a));
            format!("{} {addresses}, MTU {}", underlay.interface, underlay.mtu)
        }
    }
}

/// Reasons for the chosen underlay addresses, if there was a choice.
fn address_reasons(status: &Status, wide: bool) -> Option<String> {
    let underlay = status.underlay.as_ref()?;
    let only = SelectionReason::Only.to_string();
    let reasons = underlay.reasons.iter().filter(|(_, reason)| wide || **reason != only);
    let texts: Vec<String> =
        reasons.filter_map(|(family, reason)| Some(format!("{}: {reason}", underlay.local.get(family)?))).collect();
    (!texts.is_empty()).then(|| texts.join("; "))
}

fn data_path(status: &Status) -> String {
    let path = &status.data_path;
    let mtu = path.mtu.map_or_else(String::new, |mtu| format!(", MTU {mtu}"));
    let routes = if path.nexthop_objects { "next-hop objects" } else { "classic routes" };
    let failed = match path.failed.len() {
        0 => String::new(),
        1 => ", 1 entry failed".to_owned(),
        several => format!(", {several} entries failed"),
    };
    format!("{} peers{mtu}, {routes}, {} repairs{failed}", path.peers, path.drift_repairs)
}

/// Packets that the rules dropped, by reason; `dropped` in `docs/security.md` explains each.
fn dropped(status: &Status) -> Option<String> {
    let nonzero = status.data_path.dropped.iter().filter(|(_, packets)| **packets > 0);
    let words: Vec<String> = nonzero.map(|(reason, packets)| format!("{packets} {reason}")).collect();
    (!words.is_empty()).then(|| format!("packets: {}", words.join(", ")))
}
