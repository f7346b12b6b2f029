//! Memory use of the process: one malloc arena for all threads, and unused memory returned to the kernel.

/// The smallest page size, in bytes. With larger pages the kernel rejects an unaligned range with EINVAL, which changes nothing.
const MIN_PAGE_SIZE: usize = 4096;

/// Makes all threads share one malloc arena. Call it before other threads exist.
///
/// By default glibc gives each thread its own arena: memory freed by one of the agent's two threads would lie idle while the
/// other thread asked the kernel for more. With ten thousand peers that was up to 10 MiB. Each thread still has its own cache of
/// small chunks (`mallopt(3)`), so the threads rarely wait for each other.
pub fn use_single_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two integers and changes only the allocator's own settings.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Returns memory to the kernel: unused heap, and the program's own pages, most of which only the start needs.
pub fn trim_memory() {
    trim_heap();
    unmap_unmodified_pages();
}

/// Returns empty heap pages to the kernel.
///
/// After a snapshot of thousands of leases the empty pages outnumber the used ones: the snapshot's text, the batch and the merged
/// trees were freed. By itself glibc returns only memory at the end of a heap (`malloc_trim(3)`). Takes some milliseconds with
/// ten thousand peers.
fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointer, and the allocator locks its own data (malloc_trim(3): MT-Safe).
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Unmaps the program's unmodified pages: code and constants.
///
/// These pages stay in the page cache, which all agents of the host share. The next access maps them again, 64 KiB at a time,
/// without disk I/O.
fn unmap_unmodified_pages() {
    // SAFETY: the callback only reads its argument, and only during the call.
    unsafe {
        libc::dl_iterate_phdr(Some(unmap_read_only_segments), std::ptr::null_mut());
    }
}

/// Callback for the program, which comes first. The return value 1 ends the iteration before any library (`dl_iterate_phdr(3)`).
unsafe extern "C" fn unmap_read_only_segments(
    object: *mut libc::dl_phdr_info,
    _size: usize,
    _data: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the loader passes a description that is valid during the call, with `dlpi_phnum` headers.
    let (base, headers) = unsafe {
        let object = &*object;
        (object.dlpi_addr, std::slice::from_raw_parts(object.dlpi_phdr, usize::from(object.dlpi_phnum)))
    };
    let page = MIN_PAGE_SIZE as u64 - 1;
    for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0) {
        let start = (base + header.p_vaddr) & !page;
        let Ok(length) = usize::try_from(((base + header.p_vaddr + header.p_memsz + page) & !page) - start) else { continue };
        // SAFETY: a segment that is never writable equals the file: the loader's relocations go to writable segments
        // (`PT_GNU_RELRO` is part of those and becomes read-only later). An unmapped page is read from the file again at the next
        // access, including the pages of this function.
        unsafe {
            libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED);
        }
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident size of this program's code, in kB (`proc_pid_smaps(5)`).
    fn resident_code() -> u64 {
        let program = std::env::current_exe().expect("the program");
        let smaps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
        let mut within = false;
        let mut sum = 0;
        for line in smaps.lines() {
            if line.contains("r-xp") || line.contains("rw-p") || line.contains("r--p") || line.contains("---p") {
                within = line.contains("r-xp") && line.ends_with(&*program.to_string_lossy());
            } else if let Some(size) = line.strip_prefix("Rss:").filter(|_| within) {
                sum += size.trim().trim_end_matches(" kB").parse::<u64>().expect("a number");
            }
        }
        sum
    }

    #[test]
    fn trim_memory_unmaps_startup_code() {
        // The other tests of this process map code again at any time.
        let is_unmapped = (0..100).any(|_| {
            let before = resident_code();
            trim_memory();
            resident_code() < before
        });
        assert!(is_unmapped, "{} kB of code stay", resident_code());
    }
}
