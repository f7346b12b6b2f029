//! Logging: `tracing` to standard error, as text for people or JSON for programs, or to the journal with each field a field of its own; with a
//! level that can be changed while the agent runs.
//!
//! Levels: `error` the agent cannot go on or a user's wish failed for good; `print_warnings` something needs a look and the agent goes on; `info`
//! what an operator wants in the journal (start, lease, peers, repairs); `debug` each event and batch; `trace` each message. Secrets are
//! logged at no level.

mod journal;

use std::io::{self, IsTerminal};
use std::str::FromStr;
use std::sync::Arc;

use tracing::Subscriber;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

/// The longest filter that is taken, in bytes: some twenty directives.
const MAX_FILTER_LENGTH: usize = 1024;

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// The form of the log (`--log_file-format`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// The journal where standard error is its stream, text otherwise.
    #[default]
    Auto,
    /// One line an event, for people.
    Text,
    /// One JSON object an event.
    Json,
    /// The journal, with fields.
    Journal,
}

/// The words for the formats.
pub const LOG_FORMATS: [(&str, LogFormat); 4] =
    [("auto", LogFormat::Auto), ("text", LogFormat::Text), ("json", LogFormat::Json), ("journal", LogFormat::Journal)];

impl FromStr for LogFormat {
    type Err = TelemetryError;

    fn from_str(text: &str) -> Result<LogFormat, TelemetryError> {
        let known = LOG_FORMATS.iter().find(|(word, _)| *word == text).map(|(_, format)| *format);
        known.ok_or_else(|| TelemetryError::Format { text: crate::model::lease::printable(text) })
    }
}

/// Why the log is not as wished.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is none.
    #[error(
        "`{text}` is no log level: {reason}; expected off, error, warn, info, debug or trace, and for single parts \
         TARGET=LEVEL, such as info,overlay_agent::store=debug"
    )]
    Level {
        /// The refused text, cut to 80 characters.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The format is none.
    #[error("`{text}` is no log format: expected auto, text, json or journal")]
    Format {
        /// The refused text, cut to 80 characters.
        text: String,
    },
    /// The journal cannot be written to.
    #[error("cannot write to the journal (--log-format=journal): {source}; without systemd choose text or json")]
    Journal {
        /// The system's answer.
        source: Arc<io::Error>,
    },
    /// The process has a log already.
    #[error("the log was set up twice in one process")]
    AlreadyInitialized,
    /// The log is gone: only while the process ends.
    #[error("the log is closed already")]
    Closed,
}

/// Reads and changes the level of the running agent.
#[derive(Debug, Clone)]
pub struct LevelHandle(reload::Handle<EnvFilter, Registry>);

impl LevelHandle {
    /// The filter in force.
    pub fn get(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Puts another filter in force, from the next event on.
    pub fn set(&self, level: &str) -> Result<(), TelemetryError> {
        self.0.reload(parse_filter(level)?).map_err(|_| TelemetryError::Closed)
    }
}

/// Sets the process's log up, on standard error or in the journal.
pub fn init(level: &str, format: LogFormat) -> Result<LevelHandle, TelemetryError> {
    let journal = match format {
        // A journal that is promised and not there is no reason to be silent.
        LogFormat::Auto if journal::is_journal_stream(std::env::var_os("JOURNAL_STREAM").as_deref(), io::stderr()) => {
            journal::JournalLayer::open().ok()
        }
        LogFormat::Journal => {
            Some(journal::JournalLayer::open().map_err(|source| TelemetryError::Journal { source: Arc::new(source) })?)
        }
        _ => None,
    };
    if let Some(journal) = journal {
        let (filter, handle) = reload::Layer::new(parse_filter(level)?);
        tracing_subscriber::registry().with(filter).with(journal).try_init().map_err(|_| TelemetryError::AlreadyInitialized)?;
        return Ok(LevelHandle(handle));
    }
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let (subscriber, handle) = build_subscriber(level, format, colours, std::io::stderr)?;
    subscriber.try_init().map_err(|_| TelemetryError::AlreadyInitialized)?;
    Ok(handle)
}

/// The log on another writer.
fn build_subscriber<W>(
    level: &str,
    format: LogFormat,
    colours: bool,
    writer: W,
) -> Result<(impl Subscriber + Send + Sync + 'static, LevelHandle), TelemetryError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(parse_filter(level)?);
    let output = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colours);
    let output = match format {
        LogFormat::Json => output.json().flatten_event(true).with_current_span(false).boxed(),
        _ => output.boxed(),
    };
    Ok((tracing_subscriber::registry().with(filter).with(output), LevelHandle(handle)))
}

/// A filter of the `tracing` crate. A bare word has to be a level: `tracing` itself takes any other one for a target, so that a slip
/// (`inof`) would silence the log.
pub fn parse_filter(text: &str) -> Result<EnvFilter, TelemetryError> {
    let error = |reason: &str| TelemetryError::Level { text: crate::model::lease::printable(text), reason: reason.to_owned() };
    if text.len() > MAX_FILTER_LENGTH {
        return Err(error("it is longer than 1024 bytes"));
    }
    let level = |word: &str| LEVELS.iter().any(|level| word.eq_ignore_ascii_case(level));
    for part in text.split(',') {
        match part.rsplit_once('=') {
            None if part.is_empty() => return Err(error("a part of it is empty")),
            None if !level(part) => return Err(error("that word is unknown")),
            Some((target, word)) if target.is_empty() || !level(word) => return Err(error("a part of it is not TARGET=LEVEL")),
            _ => {}
        }
    }
    // `debug` and `trace` alone mean the agent's own events: below them the HTTP/2 library tells of every frame.
    let ours = |part: &str| match part.to_ascii_lowercase().as_str() {
        word @ ("debug" | "trace") => format!("info,overlay_agent={word}"),
        _ => part.to_owned(),
    };
    let text: Vec<String> = text.split(',').map(ours).collect();
    EnvFilter::builder().parse(text.join(",")).map_err(|e| error(&e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Buffer {
        fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
        }
    }

    #[test]
    fn log_level_change_takes_effect() {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let (subscriber, handle) = build_subscriber("info", LogFormat::Text, false, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!("quiet");
            tracing::info!(peer = "10.99.1.2", "heard");
            let text = buffer.take();
            assert!(text.contains("INFO") && text.contains("heard peer=\"10.99.1.2\"") && !text.contains("quiet"), "{text}");
            assert!(!text.contains('\x1b'), "{text}");
            handle.set("warn,overlay_agent::telemetry=debug").unwrap();
            tracing::debug!("loud");
            assert!(buffer.take().contains("loud"));
            assert!(handle.set("inof").is_err());
            assert!(handle.get().contains("overlay_agent::telemetry=debug"), "{}", handle.get());
            handle.set("off").unwrap();
            tracing::error!("nothing");
            assert_eq!(buffer.take(), "");
        });
    }

    #[test]
    fn json_format_writes_one_object_per_line() {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let (subscriber, _handle) = build_subscriber("info", LogFormat::Json, true, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || tracing::info!(peers = 3, "two\nlines"));
        let event: serde_json::Value = serde_json::from_str(buffer.take().trim_end()).unwrap();
        assert_eq!(event["peers"], 3);
        assert_eq!(event["message"], "two\nlines");
        assert_eq!(event["level"], "INFO");
    }

    #[test]
    fn filter_syntax_is_validated() {
        for good in ["info", "DEBUG", "off", "warn,overlay_agent::store=trace", "info,hyper=error,tokio=off"] {
            parse_filter(good).expect(good);
        }
        for bad in ["", "inof", "info,", "=info", "store=loud", "info debug", "a=b=c", "\u{1b}[31m", &"x".repeat(2000)] {
            let error = parse_filter(bad).expect_err(bad).to_string();
            assert!(error.contains("is no log level") && !error.contains('\u{1b}') && error.len() < 400, "{error}");
        }
        assert!("jsn".parse::<LogFormat>().is_err());
    }
}
