//! The log file: one line per event, appended. Any number of processes can write to it, and renaming rotates it.

use std::fmt::Arguments;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::SystemTime;

/// Severity of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// A verb failed.
    Error,
    /// A verb succeeded after an anomaly.
    Warn,
    /// A verb succeeded.
    Info,
    /// Each step of a verb.
    Debug,
}

impl Level {
    /// All levels.
    pub const ALL: [Level; 4] = [Level::Error, Level::Warn, Level::Info, Level::Debug];

    /// The value of `logLevel`.
    pub fn as_str(self) -> &'static str {
        match self {
            Level::Error => "error",
            Level::Warn => "warn",
            Level::Info => "info",
            Level::Debug => "debug",
        }
    }
}

/// The log. Writes nothing if no file is configured.
#[derive(Debug)]
pub struct Log {
    file: Option<File>,
    level: Level,
}

impl Log {
    /// Opens the file, if one is configured. A failure is reported on standard error and does not fail the verb.
    pub fn open(file: Option<&Path>, level: Level) -> Log {
        let open = |path: &Path| {
            let opened = OpenOptions::new().append(true).create(true).mode(0o640).open(path);
            opened.map_err(|e| eprintln!("overlay-cni: cannot open logFile {}: {e}", path.display())).ok()
        };
        Log { file: file.and_then(open), level }
    }

    /// Logs a failed verb.
    pub fn error(&self, text: Arguments<'_>) {
        self.write(Level::Error, text);
    }

    /// Logs an anomaly.
    pub fn warn(&self, text: Arguments<'_>) {
        self.write(Level::Warn, text);
    }

    /// Logs a successful verb.
    pub fn info(&self, text: Arguments<'_>) {
        self.write(Level::Info, text);
    }

    /// Logs a step.
    pub fn debug(&self, text: Arguments<'_>) {
        self.write(Level::Debug, text);
    }

    fn write(&self, level: Level, text: Arguments<'_>) {
        let Some(mut file) = self.file.as_ref().filter(|_| level <= self.level) else { return };
        let time = humantime::format_rfc3339_millis(SystemTime::now());
        // One write per line, so that lines of several processes do not mix; line breaks are escaped.
        let body = text.to_string().replace('\n', "\\n");
        let line = format!("{time} {:5} [{}] {body}\n", level.as_str(), std::process::id());
        if let Err(error) = file.write_all(line.as_bytes()) {
            eprintln!("overlay-cni: cannot write to logFile: {error}");
        }
    }
}
