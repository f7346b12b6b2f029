//! The journal's native protocol (systemd's `JOURNAL_NATIVE_PROTOCOL.md`): one datagram per event, with one journal field per
//! field.
//!
//! `MESSAGE` holds the complete line including the fields, because `journalctl -u overlayd` shows it. The fields are repeated as
//! `OVERLAYD_<NAME>` for searches (`journalctl OVERLAYD_PEER=...`).

use std::ffi::OsStr;
use std::fmt::{Debug, Write as _};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// The path of journald's socket.
const JOURNAL_SOCKET: &str = "/run/systemd/journal/socket";
/// The longest field name (systemd's `journal_field_valid`).
const MAX_FIELD_NAME_LENGTH: usize = 64;
/// How long a slow journal may block an event. After that the event goes to standard error, which the journal also reads.
const SEND_TIMEOUT: Duration = Duration::from_millis(500);

/// A `tracing` layer that writes events to the journal.
pub(super) struct JournalLayer {
    socket: UnixDatagram,
}

impl JournalLayer {
    /// Connects to the system's journal.
    pub(super) fn open() -> io::Result<JournalLayer> {
        JournalLayer::connect_to(Path::new(JOURNAL_SOCKET))
    }

    fn connect_to(path: &Path) -> io::Result<JournalLayer> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        socket.connect(path)?;
        Ok(JournalLayer { socket })
    }
}

/// Whether systemd's `JOURNAL_STREAM` (`<device>:<inode>`) names this descriptor, so that its output goes to the journal.
pub(super) fn is_journal_stream(variable: Option<&OsStr>, stream: impl AsFd) -> bool {
    let named = variable.and_then(OsStr::to_str).and_then(|text| text.split_once(':'));
    let Some((device, inode)) = named else { return false };
    let (Ok(device), Ok(inode)) = (device.parse::<u64>(), inode.parse::<u64>()) else { return false };
    nix::sys::stat::fstat(stream).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (device, inode))
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for JournalLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = EventFields::default();
            attributes.record(&mut fields);
            span.extensions_mut().insert(fields);
        }
    }

    /// An event has the fields of its spans, too.
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = EventFields::default();
        event.record(&mut fields);
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(of_span) = span.extensions().get::<EventFields>() {
                fields.named_fields.extend_from_slice(&of_span.named_fields);
                fields.rendered_fields.push_str(&of_span.rendered_fields);
            }
        }
        let metadata = event.metadata();
        let mut entry = Vec::with_capacity(512);
        append_field(&mut entry, "MESSAGE", &fields.line());
        append_field(&mut entry, "PRIORITY", priority(*metadata.level()));
        append_field(&mut entry, "SYSLOG_IDENTIFIER", "overlayd");
        append_field(&mut entry, "OVERLAYD_MODULE", metadata.target());
        if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
            append_field(&mut entry, "CODE_FILE", file);
            append_field(&mut entry, "CODE_LINE", &line.to_string());
        }
        for (name, value) in &fields.named_fields {
            append_field(&mut entry, &field_name(name), value);
        }
        if self.socket.send(&entry).is_err() {
            // The prefix `<N>` is the line's priority for journald (sd-daemon(3)). If this write fails too, the event is lost.
            let _ = io::Write::write_fmt(&mut io::stderr(), format_args!("<{}>{}\n", priority(*metadata.level()), fields.line()));
        }
    }
}

/// An event's message and fields.
#[derive(Default)]
struct EventFields {
    message: String,
    /// Name and raw value of each field.
    named_fields: Vec<(&'static str, String)>,
    rendered_fields: String,
}

impl EventFields {
    fn line(&self) -> String {
        format!("{}{}", self.message, self.rendered_fields)
    }

    fn record_field(&mut self, field: &Field, value: String, rendered: &dyn Debug) {
        if field.name() == "message" {
            self.message = value;
        } else {
            // Writing to a String cannot fail.
            let _ = write!(self.rendered_fields, " {}={rendered:?}", field.name());
            self.named_fields.push((field.name(), value));
        }
    }
}

impl Visit for EventFields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_field(field, value.to_owned(), &value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record_field(field, format!("{value:?}"), value);
    }
}

/// Severity of `syslog(3)`; `debug` is the lowest.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        _ => "7",
    }
}

/// A valid journal field name: capitals, digits and underscores, without a leading underscore.
fn field_name(name: &str) -> String {
    let upper = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
    format!("OVERLAYD_{}", upper.collect::<String>()).chars().take(MAX_FIELD_NAME_LENGTH).collect()
}

/// Appends a field. A multi-line value is preceded by its length, so that it cannot forge another field.
fn append_field(entry: &mut Vec<u8>, name: &str, value: &str) {
    entry.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        entry.push(b'\n');
        entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        entry.push(b'=');
    }
    entry.extend_from_slice(value.as_bytes());
    entry.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::os::unix::fs::MetadataExt;
    use tracing_subscriber::layer::SubscriberExt;

    /// Parses a datagram as journald does.
    fn parse(mut bytes: &[u8]) -> BTreeMap<String, String> {
        let mut fields = BTreeMap::new();
        while !bytes.is_empty() {
            let end = bytes.iter().position(|b| *b == b'\n').unwrap();
            let line = std::str::from_utf8(&bytes[..end]).unwrap();
            let (name, value, rest) = match line.split_once('=') {
                Some((name, value)) => (name, value.to_owned(), &bytes[end + 1..]),
                None => {
                    let (length, rest) = bytes[end + 1..].split_at(8);
                    let (value, rest) = rest.split_at(usize::try_from(u64::from_le_bytes(length.try_into().unwrap())).unwrap());
                    (line, String::from_utf8(value.to_vec()).unwrap(), &rest[1..])
                }
            };
            fields.insert(name.to_owned(), value);
            bytes = rest;
        }
        fields
    }

    #[test]
    fn event_fields_become_journal_fields() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journald = UnixDatagram::bind(&path).unwrap();
        let subscriber = tracing_subscriber::registry().with(JournalLayer::connect_to(&path).unwrap());
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(peer.subnet = "10.244.7.0/24", attempts = 3, note = "a\nPRIORITY=0", error = %"no luck", "peer lost");
        });
        let mut bytes = [0; 4096];
        let length = journald.recv(&mut bytes).unwrap();
        let fields = parse(&bytes[..length]);
        let wanted = "peer lost peer.subnet=\"10.244.7.0/24\" attempts=3 note=\"a\\nPRIORITY=0\" error=no luck";
        for (name, value) in [
            ("MESSAGE", wanted),
            ("PRIORITY", "4"),
            ("SYSLOG_IDENTIFIER", "overlayd"),
            ("OVERLAYD_MODULE", module_path!()),
            ("OVERLAYD_PEER_SUBNET", "10.244.7.0/24"),
            ("OVERLAYD_ATTEMPTS", "3"),
            ("OVERLAYD_NOTE", "a\nPRIORITY=0"),
            ("OVERLAYD_ERROR", "no luck"),
        ] {
            assert_eq!(fields.get(name).map(String::as_str), Some(value), "{name} of {fields:?}");
        }
        assert!(fields["CODE_FILE"].ends_with("journal.rs"));
    }

    #[test]
    fn fields_of_spans_are_those_of_their_events() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journald = UnixDatagram::bind(&path).unwrap();
        let subscriber = tracing_subscriber::registry().with(JournalLayer::connect_to(&path).unwrap());
        tracing::subscriber::with_default(subscriber, || {
            tracing::error_span!("unit", network = %"blue").in_scope(|| tracing::warn!(peers = 3, "read"));
        });
        let mut bytes = [0; 4096];
        let length = journald.recv(&mut bytes).unwrap();
        let fields = parse(&bytes[..length]);
        assert_eq!((fields["MESSAGE"].as_str(), fields["OVERLAYD_NETWORK"].as_str()), ("read peers=3 network=blue", "blue"));
    }

    #[test]
    fn journal_stream_is_recognised() {
        let file = tempfile::tempfile().unwrap();
        let (device, inode) = file.metadata().map(|m| (m.dev(), m.ino())).unwrap();
        let named = |text: &str| is_journal_stream(Some(OsStr::new(text)), &file);
        assert!(named(&format!("{device}:{inode}")));
        assert!(!named(&format!("{device}:{}", inode + 1)) && !named("") && !named("x:y"));
        assert!(!is_journal_stream(None, &file));
    }
}
