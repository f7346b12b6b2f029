//! Work that blocks for a short while, inside the runtime.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Runs work that blocks for up to some milliseconds: on a runtime of several threads the other tasks go on elsewhere, on a runtime of one
/// thread, or outside any, it simply runs. What may take longer has `tokio::task::spawn_blocking`.
pub fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current() {
        Ok(handle) if handle.runtime_flavor() == RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}
