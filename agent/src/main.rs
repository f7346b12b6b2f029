//! `overlayd`: arguments, log, runtime, exit code.

use std::process::ExitCode;
use std::time::Duration;

use overlay_agent::config::{HostConfig, command, gather};
use overlay_agent::{app, heap, telemetry};

/// Two threads: the reconciler can apply a large batch on one while the store and the socket go on on the other.
const WORKERS: usize = 2;

/// How long work that cannot be cancelled, such as a question to the system's resolver, is waited for at the end.
const LAST: Duration = Duration::from_secs(1);

/// Exit codes of the command line: error, usage.
const ERROR: u8 = 1;
const USAGE: u8 = 2;

fn main() -> ExitCode {
    heap::share_arena();
    let matches = command().get_matches();
    let raw = gather(&matches);
    let config = match HostConfig::check(raw.clone()) {
        Ok(config) => config,
        Err(mistakes) => return fail(&mistakes, USAGE),
    };
    let level = match telemetry::init(&config.log_level, config.log_format) {
        Ok(level) => level,
        Err(error) => return fail(&error, ERROR),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, ERROR),
    };
    let result = runtime.block_on(async {
        match matches.subcommand_name() {
            Some("cleanup") => app::cleanup(config).await,
            _ => app::run(config, level, app::Source::new(matches, raw)).await,
        }
    });
    // Every task has ended or was given up; a question to a resolver that does not answer is no reason to stay.
    runtime.shutdown_timeout(LAST);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&words(&error), ERROR),
    }
}

/// An error with its causes; what a message has said already is not said again.
fn words(error: &anyhow::Error) -> String {
    let mut said: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        if !said.iter().any(|words| words.contains(&cause)) {
            said.push(cause);
        }
    }
    said.join(": ")
}

fn fail(error: &dyn std::fmt::Display, code: u8) -> ExitCode {
    use std::io::Write;
    // A closed stderr is no reason to panic.
    let _ = writeln!(std::io::stderr(), "overlayd: {error}");
    ExitCode::from(code)
}
