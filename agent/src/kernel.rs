//! The Linux kernel: links, addresses, forwarding, neighbour, next-hop and route entries, sysctls, nftables, network namespaces.
//!
//! Only here are netlink sockets opened. Requests of rtnetlink are answered before the `send` returns, whoever makes them: there is nothing
//! to await, only work to keep away from the runtime's other tasks ([`blocking`]).

pub mod message;
pub mod netns;
pub mod nft;
pub mod request;
pub mod setup;
pub mod socket;
pub mod uapi;

use tokio::runtime::{Handle, RuntimeFlavor};

/// Runs work that blocks for up to some milliseconds: on a runtime of several threads the other tasks go on elsewhere, on a runtime of one
/// thread, or outside any, it simply runs.
pub(crate) fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current() {
        Ok(handle) if handle.runtime_flavor() == RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}

#[cfg(test)]
mod tests;
