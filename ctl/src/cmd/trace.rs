//! `overlayctl trace`: the path of a packet, and the hop that stops it.

use std::path::PathBuf;
use std::time::Duration;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::{Family, NetworkName};
use serde::Serialize;

use super::{CommandError, Context, Outcome};
use crate::client::{Client, ClientError};
use crate::output::{Style, Table, Tone, View, cell, toned};
use crate::trace::targets::{Inventory, TargetArg, TraceEnd};
use crate::trace::{self, Trace, TraceError};
use crate::trace::{Live, live};

/// Timeout of the agent's requests. Short, because the kernel's answers count, not the agent's.
const AGENT_TIMEOUT: Duration = Duration::from_secs(2);

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Source: a container of this host, `host`, or an address
    #[arg(value_name = "SRC")]
    from: String,
    /// Destination: a container of this host, a host of the overlay, or an address; with a port, as in ADDRESS:80/tcp
    #[arg(value_name = "DST")]
    to: String,
    /// Network of the containers' and hosts' names [default: default]
    #[arg(long, value_name = "NAME")]
    network: Option<NetworkName>,
    /// Use IPv6 if both ends have both families
    #[arg(short = '6', long = "ipv6")]
    v6: bool,
    /// Watch sent packets at rules and interfaces
    #[arg(long)]
    live: bool,
    /// Send one packet from SRC to watch
    #[arg(long, requires = "live")]
    send: bool,
    /// Maximum time to wait for a packet
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration, requires = "live")]
    wait: Duration,
    /// State directory of the agent, used for container names if the agent does not answer
    #[arg(long, value_name = "DIR", env = "OVERLAYD_STATE_DIR", default_value = "/var/lib/overlayd")]
    state_dir: PathBuf,
}

/// Prints the path. Exit code 1 if the packet stops, 3 if that is unknown.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let client = context.client.of_network(args.network.as_ref()).with_timeout(AGENT_TIMEOUT);
    let (inventory, note) = load_inventory(&client, args).await?;
    let (from, to) = (args.from.clone(), args.to.clone());
    let family = args.v6.then_some(Family::V6);
    let watch = args.live.then_some(live::WatchOptions { wait: args.wait, send: args.send, netns: None });
    let work = move || -> Result<Trace, TraceError> {
        let mut trace = trace::tracer::trace(&from, &to, family, &inventory)?;
        trace.notes.splice(0..0, note);
        if let Some(mut watch) = watch {
            if let TraceEnd::Container(endpoint) = inventory.resolve(&TargetArg::parse(&from)?.name)? {
                watch.netns = Some(endpoint.netns);
            }
            let watched = match &trace.netns {
                Some(netns) => Netns::open(netns)?.run(|| live::watch(&trace, &watch))?,
                None => live::watch(&trace, &watch),
            };
            trace.live = Some(watched?);
        }
        Ok(trace)
    };
    let trace =
        tokio::task::spawn_blocking(work).await.map_err(|e| TraceError::Target { message: format!("tracing failed: {e}") })??;
    context.printer.print(&TraceView(&trace))?;
    Ok(match (trace.outcome, &trace.live) {
        (_, Some(live)) if live.dropped => Outcome::Negative,
        (trace::TraceOutcome::Stop, _) => Outcome::Negative,
        (trace::TraceOutcome::Unsure, _) => Outcome::Degraded,
        (trace::TraceOutcome::Ok, _) => Outcome::Ok,
    })
}

/// Loads the hosts and containers of the client's network, with a note if the agent does not answer. The state directory has the
/// containers of the default network.
async fn load_inventory(client: &Client, args: &Args) -> Result<(Inventory, Option<String>), ClientError> {
    match client.endpoints().await {
        Ok(endpoints) => {
            let leases = client.subnets().await.ok().map(|subnets| subnets.subnets);
            Ok((Inventory { endpoints: endpoints.endpoints, leases }, None))
        }
        Err(error) if !client.network_name().is_default() => Err(error),
        Err(error) => {
            let note = format!("{error}. Names come from {}; the path comes from the kernel", args.state_dir.display());
            Ok((Inventory::from_state(&args.state_dir), Some(note)))
        }
    }
}

#[derive(Serialize)]
#[serde(transparent)]
struct TraceView<'a>(&'a Trace);

fn outcome_style(outcome: trace::TraceOutcome) -> (Tone, &'static str) {
    match outcome {
        trace::TraceOutcome::Ok => (Tone::Good, "ok"),
        trace::TraceOutcome::Unsure => (Tone::Warning, "unsure"),
        trace::TraceOutcome::Stop => (Tone::Bad, "STOP"),
    }
}

impl View for TraceView<'_> {
    fn text(&self, style: Style, _wide: bool) -> String {
        let trace = self.0;
        let port = trace.port.map(|port| format!(" port {port}")).unwrap_or_default();
        let mut text = format!(
            "{} ({}) to {} ({}), {}{port}\n\n",
            trace.from.address, trace.from.what, trace.to.address, trace.to.what, trace.protocol
        );
        let mut table = Table::new(style, &["", "WHERE", "STEP", "ANSWER"]);
        for hop in &trace.hops {
            let (tone, word) = outcome_style(hop.outcome);
            table.row(vec![toned(tone, word), cell(Some(&hop.place)), cell(Some(&hop.step)), cell(Some(&hop.answer))]);
        }
        text.push_str(&table.text());
        let (tone, _) = outcome_style(trace.outcome);
        let head = match trace.outcome {
            trace::TraceOutcome::Ok => "It passes",
            trace::TraceOutcome::Unsure => "It passes as far as known",
            trace::TraceOutcome::Stop => "It stops",
        };
        text.push_str(&format!("\n\n{}: {}", style.paint(tone, head), trace.end));
        for hop in trace.hops.iter().filter(|hop| hop.outcome != trace::TraceOutcome::Ok) {
            if let Some(remedy) = &hop.remedy {
                text.push_str(&format!("\n  {} of {}: {remedy}", hop.step, hop.place));
            }
        }
        for note in &trace.notes {
            text.push_str(&format!("\nnote: {note}"));
        }
        if let Some(live) = &trace.live {
            text.push_str(&live_text(live, style));
        }
        text
    }
}

fn live_text(live: &Live, style: Style) -> String {
    let mut text = "\n\n".to_owned();
    for (head, all) in [("INTERFACE", &live.interfaces), ("CHAIN", &live.rules)] {
        if all.is_empty() {
            continue;
        }
        let mut table = Table::new(style, &["PACKET", head, "WHAT"]);
        for observation in all {
            table.row(vec![cell(Some(&observation.packet)), cell(Some(&observation.place)), cell(Some(&observation.what))]);
        }
        text.push_str(&table.text());
        text.push_str("\n\n");
    }
    let tone = if live.answered && !live.dropped { Tone::Good } else { Tone::Bad };
    text.push_str(&style.paint(tone, &live.summary));
    if live.lost {
        text.push_str("\nnote: more packets arrived than are shown");
    }
    text
}
