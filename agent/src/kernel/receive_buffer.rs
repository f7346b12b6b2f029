//! The receive buffer of netlink sockets: one per thread, because most sockets are idle. A host in a hundred networks has a
//! thousand.

use std::cell::Cell;

/// Size in bytes. The kernel's datagrams have at most 32 KiB (`netlink_dump` in `net/netlink/af_netlink.c`).
const SIZE: usize = 64 * 1024;

thread_local! {
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Runs a function with an empty buffer. Within another call it gets a buffer of its own.
pub fn with<T>(work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    let mut buffer = BUFFER.take();
    buffer.clear();
    buffer.reserve_exact(SIZE);
    let outcome = work(&mut buffer);
    BUFFER.set(buffer);
    outcome
}
