//! The CNI plugin: a container runtime runs it to attach a container to the overlay (Container Network Interface specification
//! 0.3.1 to 1.1.0, `containernetworking/cni` `SPEC.md`).
//!
//! One process per verb: it reads its environment and standard input, sends requests to the agent's socket, prints a result or an
//! error as JSON, and exits. The agent owns addresses, interfaces and published ports. The plugin keeps no state between runs. It
//! starts no async runtime: the requests are blocking, which keeps the start of the process cheap.
//!
//! | module | owns |
//! | --- | --- |
//! | [`environment`] | the verb and the attachment, from `CNI_*` |
//! | [`config`], [`attach_request`] | the network configuration on standard input; the request to the agent |
//! | [`version`], [`error`], [`result`] | the specification's versions, errors and results |
//! | [`name`] | an attachment's endpoint name and owner at the agent |
//! | [`agent`] | the agent's socket, with a deadline and retries |
//! | [`sandbox`] | reads a container's network namespace |
//! | [`verbs`], [`check`] | the verbs |
//! | [`log`] | the log file |

pub mod agent;
pub mod attach_request;
pub mod check;
pub mod config;
pub mod environment;
pub mod error;
pub mod log;
pub mod name;
pub mod result;
pub mod sandbox;
pub mod verbs;
pub mod version;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::Instant;

use serde_json::Value;

use config::Config;
use environment::Verb;
use error::{CniError, Code};
use log::Log;
use version::Version;

/// Largest input, in bytes: a configuration has a few hundred, the list of GC some 150 per attachment.
const MAX_INPUT_BYTES: u64 = 16 << 20;

/// Runs one verb with this process's environment and standard input. Prints an error in the specification's format; the exit code
/// is then 1.
pub fn run() -> ExitCode {
    let started = Instant::now();
    let variable = |name: &str| std::env::var_os(name);
    if let Some(argument) = std::env::args().nth(1) {
        return print_usage(&argument);
    }
    let input = |limit: u64| {
        let mut bytes = Vec::new();
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes).map(|_| bytes)
    };
    let (output, code) = match handle(variable, input, started) {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(value)) => (value, ExitCode::SUCCESS),
        Err(failed) => (failed.error.to_json(failed.version.as_str()), ExitCode::FAILURE),
    };
    // A failed write cannot be reported: the runtime has closed its end, and undoes an attachment with DEL.
    match writeln!(std::io::stdout(), "{output}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// An error, with the version of its JSON format.
struct VersionedError {
    version: Version,
    error: CniError,
}

fn handle(
    variable: impl Fn(&str) -> Option<OsString>,
    input: impl FnOnce(u64) -> std::io::Result<Vec<u8>>,
    started: Instant,
) -> Result<Option<Value>, VersionedError> {
    // No other version is known before the configuration is read.
    let with_latest_version = |error| VersionedError { version: Version::LATEST, error };
    let verb = environment::verb(&variable).map_err(with_latest_version)?;
    let bytes = input(MAX_INPUT_BYTES + 1).map_err(|e| {
        with_latest_version(CniError::new(Code::Io, format!("cannot read the network configuration from standard input: {e}")))
    })?;
    if bytes.len() as u64 > MAX_INPUT_BYTES {
        return Err(with_latest_version(CniError::new(
            Code::Decode,
            format!("the network configuration exceeds {MAX_INPUT_BYTES} bytes"),
        )));
    }
    if verb == Verb::Version {
        return config::requested_version(&bytes)
            .map(|asked| Some(version::supported(asked.as_deref())))
            .map_err(with_latest_version);
    }
    let config = Config::decode(&bytes).map_err(|(version, error)| VersionedError { version, error })?;
    let log = Log::open(config.log_file.as_deref(), config.log_level);
    let outcome = dispatch(verb, &variable, &config, &log, started);
    if let Err(error) = &outcome {
        log.error(format_args!("{verb}: {error}"));
    }
    outcome.map_err(|error| VersionedError { version: config.version, error })
}

fn dispatch(
    verb: Verb,
    variable: &impl Fn(&str) -> Option<OsString>,
    config: &Config,
    log: &Log,
    started: Instant,
) -> Result<Option<Value>, CniError> {
    if config.version < verb.since() {
        let text = format!("cniVersion {} has no {verb}: {verb} requires {}", config.version, verb.since());
        return Err(CniError::new(Code::IncompatibleVersion, text));
    }
    let context = verbs::Context { config, log, started };
    match verb {
        Verb::Add => {
            let attachment = environment::attachment(variable, true)?;
            let arguments = environment::arguments(variable)?;
            context.add(&attachment, &arguments).map(|result| Some(result.to_json(config.version)))
        }
        Verb::Del => context.del(&environment::attachment(variable, false)?).map(|()| None),
        Verb::Check => context.check(&environment::attachment(variable, true)?).map(|()| None),
        Verb::Gc => context.gc().map(|()| None),
        Verb::Status => context.status().map(|()| None),
        Verb::Version => Ok(None),
    }
}

/// Prints the usage. A plugin takes no arguments, so a person runs it by hand.
fn print_usage(argument: &str) -> ExitCode {
    let own = env!("CARGO_PKG_VERSION");
    if matches!(argument, "--version" | "-V") {
        println!("overlay-cni {own}");
        return ExitCode::SUCCESS;
    }
    let known = matches!(argument, "--help" | "-h");
    let text = format!(
        "overlay-cni {own}: the CNI plugin of overlayd, CNI {}\nA container runtime runs it with CNI_COMMAND in the environment and the \
         network configuration on standard input; it has no arguments but --version. See docs/cni.md.",
        Version::ALL.map(Version::as_str).join(", ")
    );
    if known {
        println!("{text}");
        return ExitCode::SUCCESS;
    }
    eprintln!("unknown argument {argument}\n{text}");
    ExitCode::from(2)
}

#[cfg(test)]
mod tests;
