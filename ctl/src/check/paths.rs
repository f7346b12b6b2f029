//! Tests every peer with real packets: pings with the don't-fragment flag, over the underlay and over the overlay; a TCP
//! connection to a closed port, whose refusal proves that checksums arrive intact both ways; and a train of UDP segments that the
//! kernel or the network card splits.
//!
//! Bounded: the requested number of peers, eight at once; some twenty packets and at most 64 KiB for each.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use nix::sys::socket::{setsockopt, sockopt};
use overlay_agent::model::Family;
use overlay_agent::model::api::PeerEntry;
use tokio::net::TcpStream;

use super::facts::{ToolError, report_unchecked, run_tool, run_tool_json, run_tool_with_timeout};
use super::{Facts, Findings};

/// Maximum number of peers probed at once.
const MAX_CONCURRENT: usize = 8;
/// Discard (RFC 863): hardly any host listens there, and a listener discards the data.
const DISCARD_PORT: u16 = 9;
/// Timeout of an answer: a lost SYN is sent again after 1 s (RFC 6298).
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Length of IPv4 and IPv6 headers without options, and of ICMP echo and UDP headers, in bytes (RFC 791, RFC 8200, RFC 792, RFC
/// 768).
const fn ip_header_len(family: Family) -> u32 {
    match family {
        Family::V4 => 20,
        Family::V6 => 40,
    }
}
const L4_HEADER_LEN: u32 = 8;
/// Smallest packet that each family guarantees (RFC 791, RFC 8200): pings of that size need no path MTU.
const fn min_packet_len(family: Family) -> u32 {
    match family {
        Family::V4 => 576,
        Family::V6 => 1280,
    }
}
/// Segments per train, and number of trains: a kernel reports closed ports at a limited rate (`icmp_ratelimit`).
const SEGMENTS: u32 = 16;
const TRAINS: u32 = 3;

/// Results for one peer.
#[derive(Debug)]
struct PeerProbe {
    name: String,
    peer: PeerEntry,
    /// Bytes that the underlay carries unfragmented; 0 if not even the smallest ping is answered.
    underlay: u32,
    /// Same for the overlay.
    overlay: u32,
    /// Path MTU to the peer that the kernel has learnt from routers and applies.
    cached_path_mtu: Option<u64>,
    tcp: Option<bool>,
    segments: Option<bool>,
}

pub(super) async fn check(facts: &Facts, findings: &mut Findings) {
    let Some(status) = facts.status() else { return };
    let (Some(underlay), Some(overlay_mtu)) = (&status.underlay, status.data_path.mtu) else { return };
    if facts.peers.is_empty() {
        return;
    }
    if let Err(error) = run_tool(&["ping", "-V"]).await {
        return report_unchecked(findings, "paths to peers", &error);
    }
    let probed: Vec<PeerEntry> = facts.peers.iter().take(facts.settings.peers).cloned().collect();
    let unprobed = facts.peers.len() - probed.len();
    if unprobed > 0 {
        findings.info(
            format!("{unprobed} of {} peers were not probed", facts.peers.len()),
            vec![format!("the first {} were probed", probed.len())],
            "overlayctl check --peers NUMBER probes more",
        );
    }
    let probes = stream::iter(probed).map(|peer| probe_peer(peer, underlay.mtu, overlay_mtu));
    let results: Vec<PeerProbe> = probes.buffered(MAX_CONCURRENT).collect().await;
    for probe in &results {
        report(facts, probe, underlay.mtu, overlay_mtu, findings);
    }
}

async fn probe_peer(peer: PeerEntry, underlay_mtu: u32, overlay_mtu: u32) -> PeerProbe {
    let overlay_address = peer.subnet.base();
    let name = peer.host.clone().unwrap_or_else(|| peer.public_ip.to_string());
    let underlay = probe_mtu(peer.public_ip, underlay_mtu).await;
    let overlay = probe_mtu(overlay_address, overlay_mtu).await;
    let (tcp, segments) = match overlay {
        0 => (None, None),
        _ => (Some(tcp_answers(overlay_address).await), Some(udp_segments_answered(overlay_address, overlay).await)),
    };
    let cached_path_mtu = query_path_mtu(peer.public_ip).await;
    PeerProbe { name, peer, underlay, overlay, cached_path_mtu, tcp, segments }
}

async fn query_path_mtu(address: IpAddr) -> Option<u64> {
    let answer = run_tool_json(&["ip", "-j", "route", "get", &address.to_string()]).await.ok()?;
    answer.first()?["metrics"].as_array()?.iter().find_map(|metric| metric["mtu"].as_u64())
}

/// Finds the largest packet up to `max_size` that is answered unfragmented; 0 if not even the smallest is.
async fn probe_mtu(address: IpAddr, max_size: u32) -> u32 {
    if ping(address, max_size).await {
        return max_size;
    }
    let (mut passed_size, mut failed_size) = (min_packet_len(Family::of(address)).min(max_size), max_size);
    if !ping(address, passed_size).await {
        return 0;
    }
    // Eleven halvings find any Ethernet MTU; jumbo frames take three more.
    while failed_size - passed_size > 1 {
        let middle = passed_size + (failed_size - passed_size) / 2;
        if ping(address, middle).await {
            passed_size = middle;
        } else {
            failed_size = middle;
        }
    }
    passed_size
}

/// Whether one of two unfragmented pings of this size is answered.
async fn ping(address: IpAddr, size: u32) -> bool {
    let payload = size.saturating_sub(ip_header_len(Family::of(address)) + L4_HEADER_LEN).to_string();
    let target = address.to_string();
    let command = ["ping", "-n", "-q", "-M", "do", "-c", "2", "-i", "0.2", "-W", "1", "-s", &payload, &target];
    // ping exits with 0 if one of them was answered.
    run_tool_with_timeout(&command, ANSWER_TIMEOUT + ANSWER_TIMEOUT).await.map_err(|error: ToolError| error).is_ok()
}

/// Whether TCP gets an answer: a refusal, or a connection if a process listens.
async fn tcp_answers(address: IpAddr) -> bool {
    match tokio::time::timeout(ANSWER_TIMEOUT, TcpStream::connect(SocketAddr::new(address, DISCARD_PORT))).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => error.kind() == ErrorKind::ConnectionRefused,
        Err(_) => false,
    }
}

/// Whether UDP segments arrive that the kernel receives in one piece (`UDP_SEGMENT`, udp(7)): the peer reports the port as
/// closed.
async fn udp_segments_answered(address: IpAddr, mtu: u32) -> bool {
    let probe = tokio::task::spawn_blocking(move || -> std::io::Result<bool> {
        let socket = UdpSocket::bind(SocketAddr::new(Family::of(address).unspecified(), 0))?;
        socket.connect(SocketAddr::new(address, DISCARD_PORT))?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT / TRAINS))?;
        let segment = mtu.saturating_sub(ip_header_len(Family::of(address)) + L4_HEADER_LEN).min(65_000 / SEGMENTS);
        let size = i32::try_from(segment).unwrap_or(i32::MAX);
        setsockopt(&socket, sockopt::UdpGsoSegment, &size)?;
        let bytes = vec![0; usize::try_from(segment * SEGMENTS).unwrap_or(0)];
        for _ in 0..TRAINS {
            match socket.send(&bytes).and_then(|_| socket.recv(&mut [0; 1])) {
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(true),
                Err(_) => {}
            }
        }
        Ok(false)
    });
    matches!(probe.await, Ok(Ok(true)))
}

fn report(facts: &Facts, probe: &PeerProbe, underlay_mtu: u32, overlay_mtu: u32, findings: &mut Findings) {
    let PeerProbe { name, peer, underlay, overlay, cached_path_mtu, tcp, segments } = probe;
    let (public, overlay_address) = (peer.public_ip, peer.subnet.base());
    if *overlay == 0 {
        let evidence = vec![
            format!("ping {public} (underlay): {}", if *underlay > 0 { "answered" } else { "no answer" }),
            format!("ping {overlay_address} (overlay, by {}): no answer", peer.device),
            if peer.state == "programmed" { String::new() } else { format!("the peer is {}", peer.state) },
        ];
        if *underlay > 0 {
            findings.error(
                format!("{name} is reached by the underlay, but not by the overlay"),
                evidence,
                "its UDP port is blocked on the path (security group, the peer's firewall), or its agent is not running: run overlayctl check on that host",
            );
        } else {
            findings.warning(
                format!("{name} is not reached at all"),
                evidence,
                "it is off, or the underlay is down: if the host is gone for good, its lease expires",
            );
        }
        return;
    }
    if *overlay < overlay_mtu {
        let evidence = format!(
            "ping -M do -s {} {overlay_address}: no answer",
            overlay_mtu - ip_header_len(Family::of(overlay_address)) - L4_HEADER_LEN
        );
        let remedy = format!(
            "raise the MTU on the path to {public} by {} bytes, or set `Backend.MTU`, the underlay's, to {} in the network's configuration \
             (overlayctl config set)",
            overlay_mtu - overlay,
            overlay + facts.backend().map_or(0, |backend| backend.overhead(Family::of(public)))
        );
        match cached_path_mtu {
            Some(mtu) => findings.warning(
                format!(
                    "the overlay to {name} carries {overlay} of {overlay_mtu} bytes: senders learn the path MTU when their first large packet is lost"
                ),
                vec![evidence, format!("ip route get {public}: mtu {mtu}")],
                remedy,
            ),
            None => findings.error(
                format!("the overlay to {name} carries {overlay} of {overlay_mtu} bytes: large packets are lost"),
                vec![evidence],
                remedy,
            ),
        }
    } else if *underlay > 0 && *underlay < underlay_mtu {
        findings.warning(
            format!("the underlay to {name} carries {underlay} of {underlay_mtu} bytes unfragmented: the tunnel's packets are fragmented, or lost"),
            vec![format!("ping -M do -s {} {public}: no answer", underlay_mtu - ip_header_len(Family::of(public)) - L4_HEADER_LEN)],
            format!(
                "raise the MTU on the path, or set `Backend.MTU`, the underlay's, to {underlay} in the network's configuration (overlayctl config set)"
            ),
        );
    } else if *underlay == 0 {
        findings.info(
            format!("{name} answers no ping over the underlay: the path MTU is known for the overlay only"),
            vec![format!("ping {public}: no answer; ping {overlay_address}: {overlay} bytes")],
            "none, if the overlay works",
        );
    }
    let offload = "try overlayd --vxlan-tx-checksum=false on both hosts (at once: ethtool -K DEVICE tx off): some network cards and hypervisors write wrong \
                   checksums into tunnelled packets; otherwise look for a firewall on the peer that drops such packets"
        .replace("DEVICE", &peer.device);
    if *tcp == Some(false) {
        findings.error(
            format!("{name} answers pings over the overlay, but no TCP: checksums arrive broken, or TCP is dropped"),
            vec![format!(
                "connect to {overlay_address} port {DISCARD_PORT}: neither refused nor accepted within {} s",
                ANSWER_TIMEOUT.as_secs()
            )],
            offload,
        );
    } else if *segments == Some(false) {
        findings.warning(
            format!(
                "large sends do not arrive at {name}: segmentation by the kernel or the network card is broken, or UDP is dropped"
            ),
            vec![format!("{TRAINS} trains of {SEGMENTS} UDP segments to {overlay_address} port {DISCARD_PORT}: no answer")],
            offload,
        );
    }
}
