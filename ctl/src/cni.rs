//! The CNI plugin: what a container runtime runs to put a container on the overlay (Container Network Interface specification 0.3.1 to 1.1.0,
//! `containernetworking/cni` `SPEC.md`).
//!
//! One process a verb: it reads its environment and standard input, asks the agent over its socket, prints a result or an error as JSON, and
//! ends. Addresses, interfaces and published ports are the agent's. Nothing is kept between two runs, and no async runtime is started: the one
//! conversation with the agent is blocking, which makes the start of the process cheap.
//!
//! | module | owns |
//! | --- | --- |
//! | [`environment`] | the verb and the attachment, from `CNI_*` |
//! | [`config`], [`wish`] | the network configuration on standard input; what it asks of the agent |
//! | [`ip_version`], [`error`], [`result`] | the specification's shapes |
//! | [`name`] | how an attachment is called at the agent |
//! | [`agent`] | the socket, with a deadline and retries |
//! | [`sandbox`] | a look into a container's namespace |
//! | [`verbs`], [`check`] | what each verb does |
//! | [`log_file`] | the log file |

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

/// The largest input read, in bytes: a configuration has a few hundred, the list of GC some 150 an attachment.
const MAX_INPUT_BYTES: u64 = 16 << 20;

/// Runs one verb with this process's environment and standard input. An error is printed as the specification has it, and the exit code
/// is 1 then.
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
        Err(failed) => (failed.error.to_json(failed.version), ExitCode::FAILURE),
    };
    // A runtime that has gone away cannot be told anything more; it undoes an attachment by DEL.
    match writeln!(std::io::stdout(), "{output}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// An error, and the version in which the runtime wants it.
struct VersionedError {
    version: Version,
    error: CniError,
}

fn handle(
    variable: impl Fn(&str) -> Option<OsString>,
    input: impl FnOnce(u64) -> std::io::Result<Vec<u8>>,
    started: Instant,
) -> Result<Option<Value>, VersionedError> {
    // Before the configuration is read no other version is known.
    let early = |error| VersionedError { version: Version::LATEST, error };
    let verb = environment::verb(&variable).map_err(early)?;
    let bytes = input(MAX_INPUT_BYTES + 1)
        .map_err(|e| early(CniError::new(Code::Io, format!("cannot read the network configuration from standard input: {e}"))))?;
    if bytes.len() as u64 > MAX_INPUT_BYTES {
        return Err(early(CniError::new(
            Code::Decode,
            format!("the network configuration has more than {MAX_INPUT_BYTES} bytes"),
        )));
    }
    if verb == Verb::Version {
        return config::requested_version(&bytes).map(|asked| Some(version::supported(asked.as_deref()))).map_err(early);
    }
    let config = Config::decode(&bytes).map_err(|(version, error)| VersionedError { version, error })?;
    let log = Log::open(&config);
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
        let text = format!("cniVersion {} has no {verb}: it came with {}", config.version, verb.since());
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

/// A plugin has no arguments; a person who starts it by hand is told what it is.
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
