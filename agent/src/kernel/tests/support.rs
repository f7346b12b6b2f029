//! Namespaces for tests, removed also when a test fails.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::kernel::netns::Netns;

/// A named namespace that is deleted when it goes out of scope.
#[derive(Debug)]
pub struct Scratch {
    name: String,
    pub netns: Netns,
}

impl Scratch {
    pub fn new(what: &str) -> Scratch {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!("ovt-{what}-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let netns = Netns::create(&name).unwrap_or_else(|e| panic!("these tests make network namespaces: {e}"));
        Scratch { name, netns }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a test inside, on a runtime of one thread.
    pub fn block_on<T: Send>(&self, test: impl AsyncFnOnce() -> T + Send) -> T {
        let run = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(test())
        };
        self.netns.run(run).expect("a thread inside")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = Netns::delete(&self.name) {
            eprintln!("left behind: {error}");
        }
    }
}

/// Runs a command in the namespace of the calling thread and gives what it prints.
pub fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let program = words.next().expect("a command");
    let output = std::process::Command::new(program).args(words).output();
    let output = output.unwrap_or_else(|e| panic!("cannot run `{command}`, is iproute2 installed: {e}"));
    assert!(output.status.success(), "`{command}`: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
