//! The task that makes the kernel learn the path MTU to each peer over IPv6.
//!
//! The tunnel's packets are untracked, so a router's "packet too big" message about one of them belongs to no connection. A
//! firewall that accepts only related ICMPv6 drops the message, and the tunnel loses all packets above some size. An echo request
//! is tracked: a router's message about it is related and passes, the kernel stores the MTU for the address
//! (`ip -6 route get ADDRESS`), and the tunnel uses it. IPv4 does not need this, because routers fragment the tunnel's packets.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::networks::HostNetworks;
use crate::kernel::icmp::PingSocket;
use crate::model::Family;

/// Interval of probes of a path. The kernel keeps an MTU for 600 s (`net.ipv6.route.mtu_expires`), so two of three may be lost.
const PROBE_INTERVAL: Duration = Duration::from_secs(190);
/// Delay after a probe that could not be sent, for example because there is no route yet.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// Pause between two probes: fifty a second, as in the mesh, which is 75 kB/s at the usual MTU.
const PROBE_SPACING: Duration = Duration::from_millis(20);
/// How long changes are collected before the peers are queried again.
const SETTLE_DELAY: Duration = Duration::from_secs(1);

/// Probes paths until `stop`; `changes` is incremented when the peers may have changed.
pub(super) async fn run(networks: Arc<HostNetworks>, changes: watch::Receiver<u64>, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        _gone = probe_peers(&networks, changes) => {}
    }
    stop.cancelled().await;
}

/// Probes in rounds; returns `None` once the reconciler no longer answers.
async fn probe_peers(networks: &HostNetworks, mut changes: watch::Receiver<u64>) -> Option<()> {
    let mut socket = None;
    let mut due: HashMap<IpAddr, Instant> = HashMap::new();
    loop {
        changes.mark_unchanged();
        let (mut underlay, mut peers) = (None, Vec::new());
        for network in networks.all() {
            let status = network.queries.status().await?;
            if let Some(used) = status.underlay.filter(|underlay| underlay.public_ip.v6.is_some()) {
                underlay = Some(used);
                peers.append(&mut network.queries.peers().await?.peers);
            }
        }
        let now = Instant::now();
        due = peers
            .iter()
            .filter(|peer| peer.public_ip.is_ipv6())
            .map(|peer| (peer.public_ip, due.get(&peer.public_ip).copied().unwrap_or(now)))
            .collect();
        for (address, due) in due.iter_mut().filter(|(_, due)| **due <= now) {
            let mtu = underlay.as_ref().map_or(0, |underlay| underlay.mtu);
            let delay = match send_probe(&mut socket, *address, mtu) {
                Ok(()) => PROBE_INTERVAL,
                Err(error) => {
                    tracing::debug!(%address, mtu, error, "cannot probe path MTU");
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

fn send_probe(socket: &mut Option<PingSocket>, address: IpAddr, mtu: u32) -> Result<(), String> {
    let socket = match socket {
        Some(socket) => socket,
        None => socket.insert(PingSocket::open_pmtu_probe(Family::V6).map_err(|error| error.message)?),
    };
    socket.send_sized(address, mtu).map_err(|error| error.to_string())
}
