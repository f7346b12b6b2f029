//! A process's own memory.

use std::fs;

use crate::ExpectContext;

/// Anonymous resident memory of a process, in kB (`RssAnon` in `proc_pid_status(5)`): its heap, stacks and written data. `VmRSS` also counts the
/// program's file pages, which are shared, and which the agent unmaps and the kernel maps again at any time: their number says nothing of growth.
pub fn anonymous_rss_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect_ok("a process's status");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect_ok("RssAnon");
    line.trim().trim_end_matches(" kB").parse().expect_ok("kilobytes")
}
