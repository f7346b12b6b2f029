//! Output of the commands: tables for people, JSON and YAML for programs. Owns standard output.
//!
//! A closed pipe (`overlayctl subnets | head -1`) is a clean end: [`OutputError::Closed`], which the binary maps to exit code 0.

use std::io::{ErrorKind, IsTerminal, Write};

use clap::ValueEnum;
use comfy_table::{Attribute, Cell, Color, Row};
use serde::Serialize;

/// Output format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// A table with the most important columns.
    #[default]
    Table,
    /// A table with every column.
    Wide,
    /// One JSON document; with `--watch` one per line.
    Json,
    /// YAML.
    Yaml,
}

/// Failure to write output.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The reader closed the pipe, which is no error.
    #[error("the reader closed the output")]
    Closed,
    /// Standard output cannot be written.
    #[error("cannot write to standard output: {source}")]
    Write {
        /// Error of the system call.
        source: std::io::Error,
    },
    /// The value cannot be encoded.
    #[error("cannot print as {format}: {reason}")]
    Encode {
        /// `JSON` or `YAML`.
        format: &'static str,
        /// Reason.
        reason: String,
    },
}

impl From<std::io::Error> for OutputError {
    fn from(source: std::io::Error) -> Self {
        if source.kind() == ErrorKind::BrokenPipe { OutputError::Closed } else { OutputError::Write { source } }
    }
}

/// A value that prints as text for people and as JSON or YAML for programs.
pub trait View: Serialize {
    /// Formats the text, without a final line end. `wide` selects every column.
    fn text(&self, style: Style, wide: bool) -> String;
}

/// Whether text may have colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    colour: bool,
}

/// Emphasis of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// Healthy.
    Good,
    /// Needs attention.
    Warning,
    /// Broken.
    Bad,
    /// Secondary.
    Quiet,
}

impl Style {
    /// Without colours.
    pub const PLAIN: Style = Style { colour: false };

    /// With colours if the stream is a terminal, `NO_COLOR` (no-color.org) is unset or empty and `TERM` is not `dumb`.
    pub fn for_stream(stream: &impl IsTerminal) -> Style {
        let refused =
            std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty()) || std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        Style { colour: stream.is_terminal() && !refused }
    }

    /// Formats the text in a tone.
    pub fn paint(self, tone: Tone, text: &str) -> String {
        // ECMA-48 "select graphic rendition" parameters.
        let code = match tone {
            Tone::Good => "32",
            Tone::Warning => "33",
            Tone::Bad => "31",
            Tone::Quiet => "2",
        };
        if self.colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

/// A table without borders: two blanks between columns, headers in capitals.
#[derive(Debug)]
pub struct Table {
    style: Style,
    inner: comfy_table::Table,
}

impl Table {
    /// Creates an empty table with these column headers.
    pub fn new(style: Style, header: &[&str]) -> Table {
        let mut inner = comfy_table::Table::new();
        inner.load_style(comfy_table::presets::NOTHING);
        inner.force_no_tty();
        if style.colour {
            inner.enforce_styling();
        }
        inner.set_header(Row::from(header.iter().map(|h| Cell::new(h).add_attribute(Attribute::Dim)).collect::<Vec<_>>()));
        for column in inner.column_iter_mut() {
            column.set_padding((0, 2));
        }
        Table { style, inner }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<Cell>) {
        self.inner.add_row(Row::from(cells));
    }

    /// Formats the table.
    pub fn text(&self) -> String {
        let lines: Vec<String> = self.inner.lines().map(|line| line.trim_end().to_owned()).collect();
        lines.join("\n")
    }

    /// Style of the table.
    pub fn style(&self) -> Style {
        self.style
    }
}

/// Creates a cell of text; `None` prints as `-`.
pub fn cell(value: Option<impl ToString>) -> Cell {
    match value {
        Some(value) => Cell::new(value.to_string()),
        None => Cell::new("-"),
    }
}

/// Creates a cell in a tone.
pub fn toned(tone: Tone, text: impl ToString) -> Cell {
    let cell = Cell::new(text.to_string());
    match tone {
        Tone::Good => cell.fg(Color::Green),
        Tone::Warning => cell.fg(Color::Yellow),
        Tone::Bad => cell.fg(Color::Red),
        Tone::Quiet => cell.add_attribute(Attribute::Dim),
    }
}

/// Prints values in the selected format.
#[derive(Debug, Clone, Copy)]
pub struct Printer {
    format: Format,
    style: Style,
}

impl Printer {
    /// Creates a printer for standard output.
    pub fn new(format: Format) -> Printer {
        Printer { format, style: Style::for_stream(&std::io::stdout()) }
    }

    /// Selected format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether the format is for people: table or wide.
    pub fn is_human_readable(&self) -> bool {
        matches!(self.format, Format::Table | Format::Wide)
    }

    /// Style of standard output.
    pub fn style(&self) -> Style {
        self.style
    }

    /// Prints one value.
    pub fn print(&self, value: &impl View) -> Result<(), OutputError> {
        let text = self.render(value)?;
        self.print_line(&text)
    }

    /// Prints one value of a sequence: JSON on one line, YAML as a separate document, tables below each other, or on a terminal
    /// in place of the previous one.
    pub fn print_next(&self, value: &impl View) -> Result<(), OutputError> {
        match self.format {
            Format::Json => self.print_line(&encode_json(value, false)?),
            Format::Yaml => self.print_line(&format!("---\n{}", self.render(value)?)),
            Format::Table | Format::Wide => {
                let text = self.render(value)?;
                if std::io::stdout().is_terminal() {
                    // Cursor home, then clear below: no flicker, and the scroll-back stays.
                    self.print_line(&format!("\u{1b}[H\u{1b}[J{text}"))
                } else {
                    self.print_line(&format!("{text}\n"))
                }
            }
        }
    }

    /// Prints a text and a line end.
    pub fn print_line(&self, text: &str) -> Result<(), OutputError> {
        self.write_raw(format!("{text}\n").as_bytes())
    }

    /// Writes bytes unchanged.
    pub fn write_raw(&self, bytes: &[u8]) -> Result<(), OutputError> {
        let mut out = std::io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()?;
        Ok(())
    }

    fn render(&self, value: &impl View) -> Result<String, OutputError> {
        match self.format {
            Format::Table => Ok(value.text(self.style, false)),
            Format::Wide => Ok(value.text(self.style, true)),
            Format::Json => encode_json(value, true),
            Format::Yaml => serde_norway::to_string(value)
                .map(|text| text.trim_end().to_owned())
                .map_err(|e| OutputError::Encode { format: "YAML", reason: e.to_string() }),
        }
    }
}

fn encode_json(value: &impl Serialize, pretty: bool) -> Result<String, OutputError> {
    if pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) }
        .map_err(|e| OutputError::Encode { format: "JSON", reason: e.to_string() })
}

/// Formats a number of seconds in its two largest units: `23h59m`, `4m7s`, `12s`.
pub fn format_seconds(total: u64) -> String {
    let units = [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)];
    let first = units.iter().position(|(_, size)| total >= *size).unwrap_or(units.len() - 1);
    let mut rest = total;
    let mut text = String::new();
    for (unit, size) in units.iter().skip(first).take(2) {
        let count = rest / size;
        rest %= size;
        if count > 0 || text.is_empty() {
            text.push_str(&format!("{count}{unit}"));
        }
    }
    text
}

/// Formats the age of a time (seconds since the epoch), as in `4m7s ago`.
pub fn format_ago(at: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(at, |d| d.as_secs());
    format!("{} ago", format_seconds(now.saturating_sub(at)))
}

/// Joins both families' values on one line; `-` for none.
pub fn joined<T: ToString>(values: impl IntoIterator<Item = T>) -> String {
    let texts: Vec<String> = values.into_iter().map(|v| v.to_string()).collect();
    if texts.is_empty() { "-".to_owned() } else { texts.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_use_two_largest_units() {
        for (total, text) in
            [(0, "0s"), (59, "59s"), (60, "1m"), (247, "4m7s"), (86_399, "23h59m"), (90_000, "1d1h"), (3_601, "1h")]
        {
            assert_eq!(format_seconds(total), text);
        }
    }

    #[test]
    fn tables_have_no_borders_and_no_trailing_blanks() {
        let mut table = Table::new(Style::PLAIN, &["SUBNET", "HOST"]);
        table.row(vec![Cell::new("10.244.1.0/24"), cell(Some("h1"))]);
        table.row(vec![Cell::new("10.244.12.0/24"), cell(None::<String>)]);
        assert_eq!(table.text(), "SUBNET          HOST\n10.244.1.0/24   h1\n10.244.12.0/24  -");
    }

    #[test]
    fn colours_only_when_enabled() {
        let mut table = Table::new(Style { colour: true }, &["STATE"]);
        table.row(vec![toned(Tone::Bad, "down")]);
        assert!(table.text().contains("\u{1b}["));
        let mut table = Table::new(Style::PLAIN, &["STATE"]);
        table.row(vec![toned(Tone::Bad, "down")]);
        assert!(!table.text().contains('\u{1b}'));
        assert_eq!(Style::PLAIN.paint(Tone::Good, "x"), "x");
    }

    #[test]
    fn broken_pipe_is_a_clean_end() {
        assert!(matches!(OutputError::from(std::io::Error::from(ErrorKind::BrokenPipe)), OutputError::Closed));
        assert!(matches!(OutputError::from(std::io::Error::from(ErrorKind::StorageFull)), OutputError::Write { .. }));
    }
}
