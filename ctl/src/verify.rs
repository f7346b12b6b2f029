//! Proves that isolated networks do not reach each other, from the kernel's state of this host alone.
//!
//! `spaces` reads the host's namespace, those of the networks, and those of their containers. `segments` finds the devices that
//! one frame reaches: ports of a bridge, ends of a veth pair, VXLAN devices with one VNI. `packets` chooses packets that stand for
//! all that a network can send. `walk` follows each through the namespaces: the kernel looks up the routes, the rules are
//! evaluated. A drop counts only if it is certain. What it cannot decide is reported as unknown, never as isolated.

mod packets;
mod report;
mod segments;
mod spaces;
mod taints;
#[cfg(test)]
mod tests;
mod walk;

use crate::trace::TraceError;
pub use report::{Pair, Report, Verdict, Way, WayHop};
use segments::Segments;
use spaces::Spaces;

/// Failure of a proof.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The kernel cannot be queried.
    #[error(transparent)]
    Kernel(#[from] TraceError),
    /// This host is not in the network, or the network is routed.
    #[error("network {name} has no namespace /run/netns/ov-{name} on this host: {}", present(networks))]
    NoNamespace {
        /// The name.
        name: String,
        /// The isolated networks of this host.
        networks: Vec<String>,
    },
}

fn present(networks: &[String]) -> String {
    match networks {
        [] => "it has no isolated network".to_owned(),
        names => format!("its isolated networks are {}", names.join(", ")),
    }
}

/// Examines all ordered pairs of isolated networks of this host, or those of two networks. Blocks; must run in the host's
/// namespace.
///
/// # Errors
/// The kernel cannot be queried, or a network has no namespace here.
pub fn verify(between: Option<(&str, &str)>) -> Result<Report, VerifyError> {
    let mut spaces = Spaces::read()?;
    let networks: Vec<String> = spaces.networks.iter().map(|network| network.name.clone()).collect();
    if let Some((a, b)) = between
        && let Some(name) = [a, b].into_iter().find(|name| !networks.iter().any(|network| network == name))
    {
        return Err(VerifyError::NoNamespace { name: name.to_owned(), networks });
    }
    let is_wanted = |from: &str, to: &str| between.is_none_or(|(a, b)| (from, to) == (a, b) || (from, to) == (b, a));
    let fdb_vnis = taints::fdb_vnis(&mut spaces)?;
    let segments = Segments::find(&spaces, &fdb_vnis);
    let mut pairs = Vec::new();
    for (from, name) in networks.iter().enumerate() {
        let targets: Vec<usize> = (0..networks.len()).filter(|to| *to != from && is_wanted(name, &networks[*to])).collect();
        if !targets.is_empty() {
            pairs.extend(walk::pairs_from(&mut spaces, &segments, from, &targets)?);
        }
    }
    Ok(Report { networks, pairs })
}
