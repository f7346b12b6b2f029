//! What the allocator does with memory: one arena, and what is not used any more is given back.

/// Makes all threads share one arena of the allocator; to be called before there are others. glibc gives each thread one of its own: what one of the
/// agent's two threads freed would lie idle while the other asked the kernel for more. With ten thousand peers that was up to 10 MiB. Each thread has
/// its own cache of small pieces all the same (`mallopt(3)`), so they rarely wait for each other.
pub fn share_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes two numbers and changes nothing but the allocator's own settings.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

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
