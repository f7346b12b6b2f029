//! What the allocator keeps of memory that is not used any more.

/// Gives pages that hold nothing back to the kernel. After a snapshot of thousands of leases they are more than what stays in use: its text, the
/// batch, the trees that were merged. glibc gives back only what lies at the end of a heap by itself (`malloc_trim(3)`). Takes some milliseconds
/// with ten thousand peers.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointer; the allocator locks its own data (malloc_trim(3): MT-Safe).
    unsafe {
        libc::malloc_trim(0);
    }
}
