//! What becomes of memory: one arena for all threads, and what is not used any more is given back.

/// Bytes of a page at the least; with larger ones the kernel takes what is aligned, and answers EINVAL else, which changes nothing.
const MIN_PAGE_SIZE: usize = 4096;

/// Makes all threads share one arena of the allocator; to be called before there are others. glibc gives each thread one of its own: what one of the
/// agent's two threads freed would lie idle while the other asked the kernel for more. With ten thousand peers that was up to 10 MiB. Each thread has
/// its own cache of small pieces all the same (`mallopt(3)`), so they rarely wait for each other.
pub fn use_single_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes two numbers and changes nothing but the allocator's own settings.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives memory back to the kernel: what the allocator holds unused, and the program's own pages, most of which only the start needs.
pub fn trim_memory() {
    trim_heap();
    unmap_unmodified_pages();
}

/// Gives pages that hold nothing back to the kernel. After a snapshot of thousands of leases they are more than what stays in use: its text, the
/// batch, the trees that were merged. glibc gives back only what lies at the end of a heap by itself (`malloc_trim(3)`). Takes some milliseconds
/// with ten thousand peers.
fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointer; the allocator locks its own data (malloc_trim(3): MT-Safe).
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Unmaps what of the program nothing has written to: code and constants. They are in the page cache, which every agent of the host shares; what is
/// used again is mapped again at its first use, 64 KiB at a time, without a disk.
fn unmap_unmodified_pages() {
    // SAFETY: the callback only reads what it is given while it is called.
    unsafe {
        libc::dl_iterate_phdr(Some(unmap_read_only_segments), std::ptr::null_mut());
    }
}

/// Called with the program first, and by its answer with no library after it (`dl_iterate_phdr(3)`).
unsafe extern "C" fn unmap_read_only_segments(
    object: *mut libc::dl_phdr_info,
    _size: usize,
    _data: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the loader hands on a description that is valid during the call, and of as many headers as it says.
    let (base, headers) = unsafe {
        let object = &*object;
        (object.dlpi_addr, std::slice::from_raw_parts(object.dlpi_phdr, usize::from(object.dlpi_phnum)))
    };
    let page = MIN_PAGE_SIZE as u64 - 1;
    for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0) {
        let start = (base + header.p_vaddr) & !page;
        let Ok(length) = usize::try_from(((base + header.p_vaddr + header.p_memsz + page) & !page) - start) else { continue };
        // SAFETY: a segment that is never writable is as it is in the file: the loader's relocations go to writable ones (those of `PT_GNU_RELRO`
        // become read-only later and are a part of these). What is unmapped is read from the file again when it is used, this function included.
        unsafe {
            libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED);
        }
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is resident of this program's code, in kB (`smaps` in `proc_pid_smaps(5)`).
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
        let before = resident_code();
        trim_memory();
        let after = resident_code();
        assert!(after < before, "{before} kB of code before, {after} kB after");
    }
}
