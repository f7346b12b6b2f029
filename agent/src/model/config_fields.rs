//! Reads the fields of a JSON object with Go's rules for names, and collects errors and warnings.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::text::printable;

/// One error or warning of a configuration field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{field}: `{value}` {rule}")]
pub struct FieldError {
    /// The field, as documented.
    pub field: String,
    /// The value found, cut to 80 characters.
    pub value: String,
    /// The violated rule.
    pub rule: String,
}

/// All errors of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct ConfigErrors(pub Vec<FieldError>);

/// Takes known fields out of a JSON object; the remaining fields are unknown.
pub struct FieldReader {
    path: String,
    fields: Map<String, Value>,
    pub errors: Vec<FieldError>,
    pub warnings: Vec<FieldError>,
}

impl FieldReader {
    pub fn new(path: &str, fields: Map<String, Value>) -> FieldReader {
        FieldReader { path: path.to_owned(), fields, errors: Vec::new(), warnings: Vec::new() }
    }

    /// Reads a configuration's JSON text.
    pub fn of_object(text: &str) -> Result<FieldReader, ConfigErrors> {
        let rule = match serde_json::from_str::<Value>(text) {
            Ok(Value::Object(fields)) => return Ok(FieldReader::new("", fields)),
            Ok(_) => "is not a JSON object".to_owned(),
            Err(e) => format!("is not JSON: {e}"),
        };
        Err(ConfigErrors(vec![field_error("config", text, &rule)]))
    }

    /// Takes a field by case-insensitive name. Of several spellings the last one wins, as in Go. `null` counts as absent.
    pub fn take_field(&mut self, name: &str) -> Option<Value> {
        let spellings: Vec<String> = self.fields.keys().filter(|k| k.eq_ignore_ascii_case(name)).cloned().collect();
        let mut found = None;
        for key in spellings {
            found = self.fields.remove(&key);
        }
        found.filter(|value| !value.is_null())
    }

    pub fn fail(&mut self, name: &str, value: &str, rule: &str) {
        self.errors.push(field_error(&format!("{}{name}", self.path), value, rule));
    }

    pub fn warn(&mut self, name: &str, rule: &str) {
        self.warnings.push(field_error(&format!("{}{name}", self.path), "", rule));
    }

    pub fn boolean(&mut self, name: &str) -> Option<bool> {
        match self.take_field(name)? {
            Value::Bool(value) => Some(value),
            other => {
                self.fail(name, &other.to_string(), "is neither true nor false");
                None
            }
        }
    }

    pub fn number(&mut self, name: &str, min: u64, max: u64) -> Option<u64> {
        let value = self.take_field(name)?;
        match value.as_u64() {
            Some(number) if (min..=max).contains(&number) => Some(number),
            _ => {
                self.fail(name, &value.to_string(), &format!("is not a whole number from {min} to {max}"));
                None
            }
        }
    }

    pub fn string(&mut self, name: &str) -> Option<String> {
        match self.take_field(name)? {
            Value::String(text) => Some(text),
            other => {
                self.fail(name, &other.to_string(), "is not a string");
                None
            }
        }
    }

    /// A list of strings; absent means empty.
    pub fn strings(&mut self, name: &str) -> Vec<String> {
        let Some(value) = self.take_field(name) else { return Vec::new() };
        let texts = value.as_array().and_then(|items| items.iter().map(|item| item.as_str().map(str::to_owned)).collect());
        texts.unwrap_or_else(|| {
            self.fail(name, &value.to_string(), "is not a list of strings");
            Vec::new()
        })
    }

    pub fn finish(mut self) -> (Vec<FieldError>, Vec<FieldError>) {
        for (name, value) in std::mem::take(&mut self.fields) {
            self.warnings.push(field_error(
                &format!("{}{}", self.path, printable(&name)),
                &value.to_string(),
                "is an unknown field, ignored",
            ));
        }
        (self.errors, self.warnings)
    }
}

pub fn field_error(field: &str, value: &str, rule: &str) -> FieldError {
    FieldError { field: field.to_owned(), value: printable(value), rule: rule.to_owned() }
}
