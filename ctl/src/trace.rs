//! The way a packet takes, hop by hop, from the kernel's own answers: `overlayctl trace`.
//!
//! Asks the kernel itself, so that it works where the agent is the fault. The agent is asked for names only: whose an address is, which host holds
//! a subnet. [`ends`] says what SRC and DST are, [`tracer`] goes the way on this host, [`running_agent_ignores_invalid_values`] watches packets that are sent. Everything blocks.

mod container;
mod hop_log;
mod host_view;
pub mod live;
pub mod targets;
pub mod tracer;
mod tunnel;

use std::net::IpAddr;

use overlay_agent::kernel::netns::NetnsError;
use overlay_agent::plan::OpError;
use serde::{Deserialize, Serialize};

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The kernel cannot be asked.
    #[error("{}", .0.message)]
    Kernel(#[from] OpError),
    /// A container's namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    /// SRC or DST is nothing that is known.
    #[error("{message}")]
    Target {
        /// What is wrong, and what to write instead.
        message: String,
    },
}

/// How a hop turned out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TraceOutcome {
    /// The packet goes on.
    Ok,
    /// It goes on, but something is worth a look or cannot be known.
    Unsure,
    /// Here it stops.
    Stop,
}

/// One hop, or one question to the kernel on the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// Where: `host`, or `container NAME`.
    pub place: String,
    /// What was asked: `route`, `next hop`, `set_neighbour`, `fdb`, `outer route`, `rules forward` and so on.
    pub step: String,
    /// How it turned out.
    pub outcome: TraceOutcome,
    /// The kernel's answer.
    pub answer: String,
    /// What to do about it, where the packet stops.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// One end of the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndView {
    /// What it is: `container web`, `this host`, `host worker-9`, `outside the overlay`.
    pub what: String,
    /// Its address.
    pub address: IpAddr,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// From where.
    pub from: EndView,
    /// To where.
    pub to: EndView,
    /// `icmp`, `tcp`, `udp`.
    pub protocol: String,
    /// The port at the destination; absent for `icmp`.
    pub port: Option<u16>,
    /// The worst of the hops.
    pub outcome: TraceOutcome,
    /// Where the way ends, for a person.
    pub end: String,
    /// The hops, in order; behind the one that stops there is none.
    pub hops: Vec<Hop>,
    /// What a reader should know beside them.
    #[serde(default)]
    pub notes: Vec<String>,
    /// What was seen of packets that were sent; only where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<live::Live>,
    /// Source and destination in every form that they take on the way.
    #[serde(skip)]
    pub addresses_seen: Vec<(IpAddr, IpAddr)>,
    /// The tunnel's UDP port.
    #[serde(skip)]
    pub tunnel_port: u16,
}
