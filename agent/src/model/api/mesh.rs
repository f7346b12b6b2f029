//! `GET /v1/mesh`: how this host reaches each other host, over the overlay and over the underlay.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::model::Cidr;

/// One host's row of the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// The host that probes.
    pub node: String,
    /// Seconds between two probes of a peer, as asked for; 0 where probing is off.
    pub interval_seconds: u64,
    /// Why nothing is probed although it should be; absent where all is well.
    pub error: Option<String>,
    /// Every peer, by its subnet; those that have gone behind them.
    pub peers: Vec<MeshEntry>,
}

/// One peer, one element a family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshEntry {
    /// The peer's range.
    pub subnet: Cidr,
    /// The host's name; absent for a flannel host.
    pub host: Option<String>,
    /// What the two paths come to.
    pub state: Reachability,
    /// To the peer's VTEP, through the tunnel.
    pub overlay: PathView,
    /// To the peer's public IP.
    pub underlay: PathView,
    /// Seconds since the epoch since when its lease is gone; absent while it is there.
    pub gone_since: Option<u64>,
}

/// What probes of one path say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathView {
    /// The address that is probed.
    pub address: IpAddr,
    /// Probes that were answered or given up, the last 16 at the most.
    pub probes: u32,
    /// Those of them that were not answered.
    pub lost: u32,
    /// Round trip of the last answer in microseconds.
    pub last_micros: Option<u64>,
    /// The mean of the last answers, each counting an eighth, in microseconds (RFC 6298).
    pub mean_micros: Option<u64>,
    /// Why the last probe could not even be sent.
    pub error: Option<String>,
}

/// How a peer is reached. The order is the one of concern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reachability {
    /// Both paths answer.
    Ok,
    /// Not probed yet.
    Unknown,
    /// The overlay answers, the underlay does not: something there drops ICMP.
    UnderlaySilent,
    /// Both answer, and some probes are lost.
    Lossy,
    /// Its lease is gone: it has left.
    Gone,
    /// The underlay answers, the overlay does not: the tunnel is at fault.
    OverlayDown,
    /// Neither answers, and its lease is there.
    Unreachable,
}

impl Reachability {
    /// As a word.
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
