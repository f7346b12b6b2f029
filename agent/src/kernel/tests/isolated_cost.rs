//! What an opened network namespace costs while nothing happens in it.

use super::support::*;
use crate::kernel::{Kernel, KernelOptions};

/// Number of namespaces in [`idle_namespaces`].
const COUNT: u64 = 100;

/// Limits for each opened namespace: resident kilobytes, and open files.
const MAX_RESIDENT: u64 = 20;
const MAX_FILES: u64 = 12;

/// A number of `/proc/self/status`.
fn status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect(field);
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().expect("a number")
}

fn files() -> u64 {
    std::fs::read_dir("/proc/self/fd").expect("files").count() as u64
}

/// How often the process's threads began to wait: an idle one does not wake up.
fn waits() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("threads");
    let waits_of = |task: std::fs::DirEntry| {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:").map(str::to_owned));
        line.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or_default()
    };
    tasks.flatten().map(waits_of).sum()
}

/// The other tests of this process would count too.
#[test]
fn idle_namespace_is_cheap() {
    let program = std::env::current_exe().expect("the program");
    let measured = std::process::Command::new(program)
        .args(["--exact", "kernel::tests::isolated_cost::idle_namespaces", "--ignored", "--nocapture"])
        .output()
        .expect("a process");
    let output = String::from_utf8_lossy(&measured.stdout).into_owned() + &String::from_utf8_lossy(&measured.stderr);
    assert!(measured.status.success() && output.contains("1 passed"), "{output}");
}

#[test]
#[ignore = "idle_namespace_is_cheap runs it in a process of its own"]
fn idle_namespaces() {
    crate::allocator::use_single_arena();
    let host = TestNetns::new("costhost");
    let namespaces: Vec<TestNetns> = (0..COUNT).map(|n| TestNetns::new(&format!("cost{n}"))).collect();
    host.block_on(async || {
        let options = KernelOptions { host: Some(host.netns.clone()), ..KernelOptions::default() };
        let mut opened = Vec::new();
        // What the first one initializes is not counted.
        let mut before = None;
        for namespace in &namespaces {
            let (mut kernel, events, monitor) = Kernel::open(&namespace.netns, &options).expect("a kernel");
            crate::plan::DataPath::dump(&mut kernel).await.expect("a dump");
            opened.push((kernel, events, tokio::spawn(monitor.run())));
            before.get_or_insert_with(|| (status("RssAnon"), files(), status("Threads")));
        }
        let (resident, open, threads) = before.expect("the first one");
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        crate::allocator::trim_memory();
        let each = |now: u64, before: u64| now.saturating_sub(before) / (COUNT - 1);
        let (resident, open) = (each(status("RssAnon"), resident), each(files(), open));
        let before = waits();
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        let woken = waits() - before;
        eprintln!("each namespace: {resident} kB, {open} files; {woken} waits in two seconds");
        assert_eq!(status("Threads"), threads);
        assert!(resident <= MAX_RESIDENT && open <= MAX_FILES && woken < 10);
    });
}
