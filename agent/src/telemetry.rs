//! Logging with `tracing`: to standard error as text or JSON, or to the journal with its fields. The level can be changed at run
//! time.
//!
//! | level | events |
//! | --- | --- |
//! | `error` | the agent cannot continue, or a user's request failed permanently |
//! | `warn` | the operator should check something; the agent continues |
//! | `info` | start, lease, peers, repairs |
//! | `debug` | each event and batch |
//! | `trace` | each message |
//!
//! Secrets are logged at no level.

mod journal;
pub mod rate_limit;

use std::io::{self, IsTerminal};
use std::str::FromStr;
use std::sync::Arc;

use tracing::Subscriber;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

/// The longest accepted filter, in bytes: some twenty directives.
const MAX_FILTER_LENGTH: usize = 1024;

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// The format of the log (`--log-format`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// The journal if standard error is connected to it, text otherwise.
    #[default]
    Auto,
    /// One text line per event.
    Text,
    /// One JSON object per event.
    Json,
    /// The journal, with fields.
    Journal,
}

/// The names of the formats.
pub const LOG_FORMATS: [(&str, LogFormat); 4] =
    [("auto", LogFormat::Auto), ("text", LogFormat::Text), ("json", LogFormat::Json), ("journal", LogFormat::Journal)];

impl FromStr for LogFormat {
    type Err = TelemetryError;

    fn from_str(text: &str) -> Result<LogFormat, TelemetryError> {
        let format = LOG_FORMATS.iter().find(|(word, _)| *word == text).map(|(_, format)| *format);
        format.ok_or_else(|| TelemetryError::Format { text: crate::model::text::printable(text) })
    }
}

/// The reason why the log cannot be set up or changed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is invalid.
    #[error(
        "`{text}` is not a log level: {reason}; expected off, error, warn, info, debug or trace, and for single modules \
         TARGET=LEVEL, such as info,overlay_agent::store=debug"
    )]
    Level {
        /// The rejected text, cut to 80 characters.
        text: String,
        /// The rule that the text violates.
        reason: String,
    },
    /// The format is unknown.
    #[error("`{text}` is not a log format: expected auto, text, json or journal")]
    Format {
        /// The rejected text, cut to 80 characters.
        text: String,
    },
    /// The journal's socket cannot be connected.
    #[error("cannot write to the journal (--log-format=journal): {source}; without systemd choose text or json")]
    Journal {
        /// The system's error.
        source: Arc<io::Error>,
    },
    /// The process already has a log.
    #[error("the log was set up twice in one process")]
    AlreadyInitialized,
    /// The log was dropped, which happens only at the end of the process.
    #[error("the log is closed already")]
    Closed,
}

/// Reads and changes the level of the running agent.
#[derive(Debug, Clone)]
pub struct LevelHandle(reload::Handle<EnvFilter, Registry>);

impl LevelHandle {
    /// The current filter.
    pub fn get(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Changes the filter, from the next event on.
    pub fn set(&self, level: &str) -> Result<(), TelemetryError> {
        self.0.reload(parse_filter(level)?).map_err(|_| TelemetryError::Closed)
    }
}

/// Sets up the process's log, on standard error or in the journal.
pub fn init(level: &str, format: LogFormat) -> Result<LevelHandle, TelemetryError> {
    let journal = match format {
        // If JOURNAL_STREAM names a journal that cannot be opened, the log falls back to text.
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

/// Builds the text or JSON log for this writer.
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

/// Parses a filter of the `tracing` crate.
///
/// A bare word must be a level: `tracing` itself takes any other word as a target, so a typo (`inof`) would silence the log.
pub fn parse_filter(text: &str) -> Result<EnvFilter, TelemetryError> {
    let error = |reason: &str| TelemetryError::Level { text: crate::model::text::printable(text), reason: reason.to_owned() };
    if text.len() > MAX_FILTER_LENGTH {
        return Err(error("it is longer than 1024 bytes"));
    }
    let level = |word: &str| LEVELS.iter().any(|level| word.eq_ignore_ascii_case(level));
    for part in text.split(',') {
        match part.rsplit_once('=') {
            None if part.is_empty() => return Err(error("one of its parts is empty")),
            None if !level(part) => return Err(error("unknown level")),
            Some((target, word)) if target.is_empty() || !level(word) => {
                return Err(error("one of its parts is not TARGET=LEVEL"));
            }
            _ => {}
        }
    }
    // A bare `debug` or `trace` applies to the agent's own events only, because the HTTP/2 library logs every frame at these
    // levels.
    let expand_level = |part: &str| match part.to_ascii_lowercase().as_str() {
        word @ ("debug" | "trace") => format!("info,overlay_agent={word}"),
        _ => part.to_owned(),
    };
    let text: Vec<String> = text.split(',').map(expand_level).collect();
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
            assert!(error.contains("is not a log level") && !error.contains('\u{1b}') && error.len() < 400, "{error}");
        }
        assert!("jsn".parse::<LogFormat>().is_err());
    }
}
