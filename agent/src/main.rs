//! The program `overlayd`: arguments, log, runtime, exit code.

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use overlay_agent::config::{HostConfig, SERVE_NETNS_NAME, command, load_settings};
use overlay_agent::kernel::netns::serve_name_request;
use overlay_agent::model::NetworkName;
use overlay_agent::{allocator, app, telemetry};

/// Two threads: the reconciler can apply a large batch on one while the store and the socket run on the other.
const WORKER_THREADS: usize = 2;

/// Time limit at shutdown for uncancellable work, such as a query of the system's resolver.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

/// Exit codes: runtime error, usage error.
const EXIT_ERROR: u8 = 1;
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    allocator::use_single_arena();
    let matches = command().get_matches();
    if matches.subcommand_name() == Some(SERVE_NETNS_NAME) {
        let client = std::io::stdin().as_fd().try_clone_to_owned();
        return client
            .and_then(|client| serve_name_request(client.into()))
            .map_or_else(|e| fail(&e, EXIT_ERROR), |()| ExitCode::SUCCESS);
    }
    let raw = load_settings(&matches);
    let config = match HostConfig::validate(raw.clone()) {
        Ok(config) => config,
        Err(errors) => return fail(&errors, EXIT_USAGE),
    };
    let networks = match cleaned_networks(&matches) {
        Ok(networks) => networks,
        Err(error) => return fail(&error, EXIT_USAGE),
    };
    let level = match telemetry::init(&config.log_level, config.log_format) {
        Ok(level) => level,
        Err(error) => return fail(&error, EXIT_ERROR),
    };
    raise_file_limit();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(WORKER_THREADS).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, EXIT_ERROR),
    };
    let result = runtime.block_on(async {
        match matches.subcommand_name() {
            Some("cleanup") => app::cleanup(config, &networks).await,
            _ => app::run(config, level, app::SettingsSource::new(matches, raw)).await,
        }
    });
    // All tasks have ended or were aborted; a resolver query without an answer must not delay the exit.
    runtime.shutdown_timeout(SHUTDOWN_GRACE);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error_chain(&error), EXIT_ERROR),
    }
}

/// The networks of `cleanup --network`.
fn cleaned_networks(matches: &clap::ArgMatches) -> Result<Vec<NetworkName>, String> {
    let cleanup = matches.subcommand_matches("cleanup");
    let names = cleanup.and_then(|cleanup| cleanup.get_many::<String>("network")).into_iter().flatten();
    names.map(|name| name.parse().map_err(|error| format!("--network: {error}"))).collect()
}

/// Raises the limit of open files to what the system allows: each isolated network takes a dozen. Without effect if it is raised
/// already, as by the packaged service.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(soft, hard)| if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) });
    if let Err(error) = raised {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}

/// The error followed by its causes. A cause is left out if an earlier message already contains its text.
fn error_chain(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        if !parts.iter().any(|words| words.contains(&cause)) {
            parts.push(cause);
        }
    }
    parts.join(": ")
}

fn fail(error: &dyn std::fmt::Display, code: u8) -> ExitCode {
    use std::io::Write;
    // A closed stderr must not cause a panic.
    let _ = writeln!(std::io::stderr(), "overlayd: {error}");
    ExitCode::from(code)
}
