//! Private memory of a process.

use std::fs;

use crate::ExpectContext;

/// Anonymous resident memory of a process, in kB (`RssAnon` in `proc_pid_status(5)`): its heap, stacks and written data. `VmRSS`
/// also counts the program's file pages. These are shared; the agent unmaps them and the kernel maps them again at any time, so
/// that their number does not indicate growth.
pub fn anonymous_rss_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect_ok("a process's status");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect_ok("RssAnon");
    line.trim().trim_end_matches(" kB").parse().expect_ok("kilobytes")
}
