//! Traces the path of a packet hop by hop, from the kernel's own lookups: `overlayctl trace`.
//!
//! It queries the kernel itself, so that it works if the agent is the fault. The agent only provides names: the endpoint of an
//! address, the host of a subnet. [`targets`] resolves SRC and DST, [`tracer`] follows the path on this host, `networks` between the
//! namespaces of isolated networks, [`live`] watches sent packets. Everything blocks.

mod container;
mod hop_log;
pub mod live;
pub mod namespace_view;
mod networks;
pub mod targets;
#[cfg(test)]
pub(crate) mod tests;
pub mod tracer;
mod tunnel;

use std::net::IpAddr;
use std::path::PathBuf;

use overlay_agent::kernel::netns::NetnsError;
use overlay_agent::plan::OpError;
use serde::{Deserialize, Serialize};

/// Failure of a trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The kernel cannot be queried.
    #[error("{}", .0.message)]
    Kernel(#[from] OpError),
    /// A container's namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    /// SRC or DST is unknown.
    #[error("{message}")]
    Target {
        /// The error and the valid forms.
        message: String,
    },
}

/// Outcome of a hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TraceOutcome {
    /// The packet continues.
    Ok,
    /// The packet continues; the hop needs attention, or its outcome is unknown.
    Unsure,
    /// The packet stops here.
    Stop,
}

/// One hop, or one query to the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// Location: `host`, `ov-NETWORK` for the namespace of an isolated network, or `container NAME`.
    pub place: String,
    /// Subject of the query: `route`, `next hop`, `neighbour`, `fdb`, `outer route`, `rules forward` and so on.
    pub step: String,
    /// Outcome.
    pub outcome: TraceOutcome,
    /// The kernel's answer.
    pub answer: String,
    /// Remedy, if the packet stops or the outcome is unsure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// One end of the path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndView {
    /// Description: `container web`, `this host`, `host worker-9`, `outside the overlay`.
    pub what: String,
    /// Address.
    pub address: IpAddr,
}

/// Result of a trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// Source.
    pub from: EndView,
    /// Destination.
    pub to: EndView,
    /// `icmp`, `tcp`, `udp`.
    pub protocol: String,
    /// Destination port; absent for `icmp`.
    pub port: Option<u16>,
    /// Worst outcome of the hops.
    pub outcome: TraceOutcome,
    /// End of the path, for the operator.
    pub end: String,
    /// Hops, in order; a hop that stops the packet is the last.
    pub hops: Vec<Hop>,
    /// Remarks for the reader.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Observation of sent packets; absent unless requested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<Live>,
    /// Every form of source and destination along the path.
    #[serde(skip)]
    pub addresses_seen: Vec<(IpAddr, IpAddr)>,
    /// UDP port of the tunnel.
    #[serde(skip)]
    pub tunnel_port: u16,
    /// Namespace of the source's isolated network.
    #[serde(skip)]
    pub netns: Option<PathBuf>,
}

/// Result of a watch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Live {
    /// Packets at interfaces, in order.
    pub interfaces: Vec<Observation>,
    /// Packets in rules, in order. The kernel gives no time, so their order relative to the interfaces is unknown.
    pub rules: Vec<Observation>,
    /// Summary for the operator.
    pub summary: String,
    /// Whether the rules dropped a packet.
    pub dropped: bool,
    /// Whether an answer was seen.
    pub answered: bool,
    /// Whether events were lost.
    pub lost: bool,
}

/// A packet at one interface or rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// At interfaces `request` or `reply`; in rules the packet's trace ID from the kernel.
    pub packet: String,
    /// Interface or chain.
    pub place: String,
    /// Event: direction and addresses, or rule and verdict.
    pub what: String,
}
