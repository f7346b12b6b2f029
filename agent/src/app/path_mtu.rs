//! The task that has the kernel learn the MTU of the path to each peer over IPv6.
//!
//! The tunnel's packets are untracked, so what a router says of one of them ("packet too big") belongs to no connection: a firewall that accepts only what is
//! related drops it, and from some size on all that the tunnel carries is lost. An echo request is tracked. What a router says of it is related and passes, the
//! kernel keeps the MTU for the address (`ip -6 route http_get_metrics ADDRESS`), and the tunnel goes by it. IPv4 needs none of this: routers fragment the tunnel's packets.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::kernel::icmp::PingSocket;
use crate::model::Family;
use crate::reconcile::ReconcilerQuery;

/// How long until a path is probed again. The kernel keeps an MTU for 600 s (`net.is_ipv6.route.mtu_expires`): two of three probes may be lost.
const PROBE_INTERVAL: Duration = Duration::from_secs(190);
/// The same where no probe could be sent: there is no route yet, say.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// Pause between two probes: fifty a second, as the mesh's, 75 kB at the usual MTU.
const PROBE_SPACING: Duration = Duration::from_millis(20);
/// How long changes settle before peers are asked for again.
const SETTLE_DELAY: Duration = Duration::from_secs(1);

/// Probes until `stop_agent`; `changes` counts up with what may be new among the peers.
pub(super) async fn run(queries: mpsc::Sender<ReconcilerQuery>, changes: watch::Receiver<u64>, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        _gone = probe_peers(&queries, changes) => {}
    }
    stop.cancelled().await;
}

/// Rounds without end; `None` once nobody answers any more.
async fn probe_peers(queries: &mpsc::Sender<ReconcilerQuery>, mut changes: watch::Receiver<u64>) -> Option<()> {
    let mut echo = None;
    let mut due: HashMap<IpAddr, Instant> = HashMap::new();
    loop {
        changes.mark_unchanged();
        let underlay = ReconcilerQuery::ask(queries, ReconcilerQuery::Status)
            .await?
            .underlay
            .filter(|underlay| underlay.public_ip.v6.is_some());
        let peers =
            if underlay.is_some() { ReconcilerQuery::ask(queries, ReconcilerQuery::Peers).await?.peers } else { Vec::new() };
        let now = Instant::now();
        due = peers
            .iter()
            .filter(|peer| peer.public_ip.is_ipv6())
            .map(|peer| (peer.public_ip, due.get(&peer.public_ip).copied().unwrap_or(now)))
            .collect();
        for (address, due) in due.iter_mut().filter(|(_, due)| **due <= now) {
            let mtu = underlay.as_ref().map_or(0, |underlay| underlay.mtu);
            let delay = match send_probe(&mut echo, *address, mtu) {
                Ok(()) => PROBE_INTERVAL,
                Err(error) => {
                    tracing::debug!(%address, mtu, error, "the MTU of the path cannot be probed");
                    RETRY_INTERVAL
                }
            };
            *due = now + delay;
            tokio::time::sleep(PROBE_SPACING).await;
        }
        let next = due.values().min().copied().unwrap_or(now + PROBE_INTERVAL);
        tokio::select! {
            changed = changes.changed() => changed.ok()?,
            () = tokio::time::sleep_until(next) => {}
        }
        tokio::time::sleep(SETTLE_DELAY).await;
    }
}

fn send_probe(echo: &mut Option<PingSocket>, address: IpAddr, mtu: u32) -> Result<(), String> {
    let echo = match echo {
        Some(echo) => echo,
        None => echo.insert(PingSocket::open_pmtu_probe(Family::V6).map_err(|error| error.message)?),
    };
    echo.send_sized(address, mtu).map_err(|error| error.to_string())
}
