//! `overlayctl ping-mesh`: probes every peer from this host now, over the overlay and over the underlay.

use std::time::{Duration, Instant};

use overlay_agent::kernel::echo::Echo;
use overlay_agent::model::api::{Mesh, PeerEntry};
use overlay_agent::model::{Family, PerFamily};
use overlay_agent::plan::mesh::Book;

use super::mesh::{Matrix, MatrixView, matrix, outcome};
use super::{CommandError, Context, Outcome};

/// How long one look for answers takes at the most.
const PAUSE: Duration = Duration::from_millis(5);

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Probes of each path; 50 a second over all are sent at the most
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    count: u8,
}

/// Probes and prints.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let peers = context.client.peers().await?.peers;
    let leases = context.client.subnets().await?.subnets;
    let node = context.client.status().await?.node;
    let count = args.count;
    let probed = tokio::task::spawn_blocking(move || probe(&node, &peers, count)).await;
    let row = probed.unwrap_or_else(|error| Err(format!("probing broke off: {error}")));
    let row = row.map_err(|message| CommandError::Missing { message })?;
    let matrix: Matrix = matrix(vec![row], &leases, Vec::new());
    let outcome = outcome(&matrix);
    context.printer.show(&MatrixView(&matrix))?;
    Ok(outcome)
}

/// Some rounds over all peers.
fn probe(node: &str, peers: &[PeerEntry], count: u8) -> Result<Mesh, String> {
    let start = Instant::now();
    let now = || u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
    let mut book = Book::default();
    let mut sockets: PerFamily<Echo> = PerFamily::default();
    for family in peers.iter().flat_map(|peer| [peer.subnet.family(), Family::of(peer.public_ip)]) {
        if sockets.get(family).is_none() {
            let token = u64::from(std::process::id()) << 32 | u64::from(start.elapsed().subsec_nanos());
            *sockets.slot(family) = Some(Echo::open(family, token, Some(PAUSE)).map_err(|error| error.message)?);
        }
    }
    let gap = {
        book.begin(peers, 0);
        book.pause(Duration::ZERO)
    };
    for _ in 0..count {
        book.begin(peers, 0);
        while let Some(probe) = book.next(now()) {
            if let Some(socket) = sockets.get(Family::of(probe.address))
                && let Err(error) = socket.send(probe.address, probe.number)
            {
                book.unsent(probe.number, error.to_string());
            }
            let end = Instant::now() + gap;
            while Instant::now() < end {
                receive(&mut book, &sockets, &now)?;
            }
            book.expire(now(), |_| {});
        }
    }
    while book.is_waiting() {
        receive(&mut book, &sockets, &now)?;
        book.expire(now(), |_| {});
    }
    // An interval, so that nobody takes it for switched off.
    Ok(book.view(node, Duration::from_secs(1)))
}

fn receive(book: &mut Book, sockets: &PerFamily<Echo>, now: &impl Fn() -> u64) -> Result<(), String> {
    for (_, socket) in sockets.iter() {
        if let Some(reply) = socket.receive().map_err(|error| error.to_string())? {
            book.answered(reply.number, reply.from, now());
        }
    }
    Ok(())
}
