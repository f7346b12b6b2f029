//! Reads the JSON fields of a lease.

use serde_json::{Map, Value};

use super::RejectReason;
use super::text::printable;

/// Looks up a field by its exact name, then case-insensitively as Go does. `null` counts as absent.
pub fn get<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    fields
        .get(name)
        .or_else(|| fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value))
        .filter(|value| !value.is_null())
}

/// A field that must be a string; empty if absent.
pub fn text(fields: &Map<String, Value>, name: &str, path: &str) -> Result<String, RejectReason> {
    match get(fields, name) {
        None => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(field_error(&format!("{path}{name}"), &other.to_string(), "must be a string")),
    }
}

/// The reason for rejecting a field's value.
pub fn field_error(name: &str, value: &str, rule: &str) -> RejectReason {
    let value = if value.is_empty() { "missing".to_owned() } else { format!("`{}`", printable(value)) };
    RejectReason::Field { field: name.to_owned(), value, rule: rule.to_owned() }
}
