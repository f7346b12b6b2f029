//! Short blocking work inside the tokio runtime.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Runs work that blocks for up to some milliseconds.
///
/// On a multi-threaded runtime the other tasks move to other threads. On a single-threaded runtime, or outside a runtime, the
/// work runs directly. Use `tokio::task::spawn_blocking` for work that may take longer.
pub fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current() {
        Ok(handle) if handle.runtime_flavor() == RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}
