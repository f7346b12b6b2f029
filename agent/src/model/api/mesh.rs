//! `GET /v1/mesh`: reachability of each peer over the overlay and the underlay.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::model::Cidr;

/// Reachability of all peers from one host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// The probing host.
    pub node: String,
    /// Configured seconds between two probes of a peer; 0 if probing is off.
    pub interval_seconds: u64,
    /// Why probing is enabled but does not work; absent if it works.
    pub error: Option<String>,
    /// All peers, ordered by subnet; departed ones last.
    pub peers: Vec<MeshEntry>,
}

/// One family of a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshEntry {
    /// The peer's range.
    pub subnet: Cidr,
    /// The host's name; absent for a flannel host.
    pub host: Option<String>,
    /// Summary of the two paths.
    pub state: Reachability,
    /// The path to the peer's VTEP, through the tunnel.
    pub overlay: PathView,
    /// The path to the peer's public IP.
    pub underlay: PathView,
    /// Seconds since the epoch at which its lease was removed; absent while the lease exists.
    pub gone_since: Option<u64>,
}

/// Probe results of one path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathView {
    /// The probed address.
    pub address: IpAddr,
    /// Number of completed probes, answered or timed out; at most the last 16.
    pub probes: u32,
    /// Number of those without a reply.
    pub lost: u32,
    /// Round-trip time of the last reply in microseconds.
    pub last_micros: Option<u64>,
    /// Smoothed round-trip time in microseconds, each reply weighted 1/8 (RFC 6298).
    pub mean_micros: Option<u64>,
    /// Why the last probe could not be sent.
    pub error: Option<String>,
}

/// Reachability of a peer, ordered by ascending severity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reachability {
    /// Both paths answer.
    Ok,
    /// Not probed yet.
    Unknown,
    /// Only the overlay answers: the underlay drops ICMP.
    UnderlaySilent,
    /// Both paths answer, but some probes are lost.
    Lossy,
    /// Its lease was removed: it has left.
    Gone,
    /// Only the underlay answers: the tunnel is broken.
    OverlayDown,
    /// Neither path answers, but the lease exists.
    Unreachable,
}

impl Reachability {
    /// The name in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Reachability::Ok => "ok",
            Reachability::Unknown => "unknown",
            Reachability::UnderlaySilent => "underlay-silent",
            Reachability::Lossy => "lossy",
            Reachability::Gone => "gone",
            Reachability::OverlayDown => "overlay-down",
            Reachability::Unreachable => "unreachable",
        }
    }
}
