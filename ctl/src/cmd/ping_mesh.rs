//! `overlayctl ping-mesh`: probes every peer from this host now, over the overlay and over the underlay.

use std::time::{Duration, Instant};

use overlay_agent::kernel::icmp::PingSocket;
use overlay_agent::model::api::{Mesh, PeerEntry};
use overlay_agent::model::{Family, PerFamily};
use overlay_agent::plan::mesh::ProbeTable;

use super::mesh::{Matrix, MatrixView, matrix, outcome};
use super::{CommandError, Context, Outcome};

/// Timeout of one read for replies.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Probes per path; at most 50 per second over all paths
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    count: u8,
}

/// Probes all peers and prints the row.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let peers = context.client.peers().await?.peers;
    let leases = context.client.subnets().await?.subnets;
    let node = context.client.status().await?.node;
    let count = args.count;
    let probed = tokio::task::spawn_blocking(move || probe_peers(&node, &peers, count)).await;
    let row = probed.unwrap_or_else(|error| Err(format!("probing failed: {error}")));
    let row = row.map_err(|message| CommandError::Missing { message })?;
    let matrix: Matrix = matrix(vec![row], &leases, Vec::new());
    let outcome = outcome(&matrix);
    context.printer.print(&MatrixView(&matrix))?;
    Ok(outcome)
}

/// Runs `count` rounds of probes over all peers.
fn probe_peers(node: &str, peers: &[PeerEntry], count: u8) -> Result<Mesh, String> {
    let start = Instant::now();
    let now = || u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
    let mut probes = ProbeTable::default();
    let mut sockets: PerFamily<PingSocket> = PerFamily::default();
    for family in peers.iter().flat_map(|peer| [peer.subnet.family(), Family::of(peer.public_ip)]) {
        if sockets.get(family).is_none() {
            let token = u64::from(std::process::id()) << 32 | u64::from(start.elapsed().subsec_nanos());
            *sockets.slot(family) = Some(PingSocket::open(family, token, Some(POLL_INTERVAL)).map_err(|error| error.message)?);
        }
    }
    let gap = {
        probes.start_round(peers, 0);
        probes.probe_interval(Duration::ZERO)
    };
    for _ in 0..count {
        probes.start_round(peers, 0);
        while let Some(probe) = probes.next_probe(now()) {
            if let Some(socket) = sockets.get(Family::of(probe.address))
                && let Err(error) = socket.send(probe.address, probe.number)
            {
                probes.send_failed(probe.number, error.to_string());
            }
            let end = Instant::now() + gap;
            while Instant::now() < end {
                poll_replies(&mut probes, &sockets, &now)?;
            }
            probes.expire(now(), |_| {});
        }
    }
    while probes.has_in_flight() {
        poll_replies(&mut probes, &sockets, &now)?;
        probes.expire(now(), |_| {});
    }
    // A non-zero interval: 0 would mean that probing is switched off.
    Ok(probes.view(node, Duration::from_secs(1)))
}

fn poll_replies(probes: &mut ProbeTable, sockets: &PerFamily<PingSocket>, now: &impl Fn() -> u64) -> Result<(), String> {
    for (_, socket) in sockets.iter() {
        if let Some(reply) = socket.receive().map_err(|error| error.to_string())? {
            probes.on_reply(reply.sequence, reply.from, now());
        }
    }
    Ok(())
}
