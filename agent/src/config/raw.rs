//! Unparsed settings, each with its origin.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use clap::parser::ValueSource;

use super::settings::{DEFAULT_CONFIG_FILE, SECRET_FILES, SETTINGS, SettingKind, env_variable};
use super::{SettingError, secret};

/// The origin of a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag,
    /// An environment variable.
    Environment,
    /// The configuration file.
    File(PathBuf),
    /// The built-in default.
    Default,
}

/// All unparsed values, and the errors of the file's syntax and keys.
#[derive(Debug, Clone, Default)]
pub struct RawSettings {
    values: BTreeMap<&'static str, (Vec<String>, Origin)>,
    pub(super) errors: Vec<SettingError>,
}

impl RawSettings {
    /// A setting's value; `None` if it is unset without a default, or empty.
    pub fn text(&self, name: &str) -> Option<String> {
        self.values.get(name).and_then(|(values, _)| values.last()).filter(|text| !text.is_empty()).cloned()
    }

    /// The values of a list setting.
    pub fn list(&self, name: &str) -> Vec<String> {
        let values = self.values.get(name).map(|(values, _)| values.clone()).unwrap_or_default();
        values.iter().map(|v| v.trim().to_owned()).filter(|v| !v.is_empty()).collect()
    }

    /// Whether the setting has a value other than by default.
    pub fn is_set(&self, name: &str) -> bool {
        self.values.get(name).is_some_and(|(_, origin)| *origin != Origin::Default)
    }

    /// The settings whose values differ, regardless of their origin.
    pub fn changed_settings(&self, other: &RawSettings) -> Vec<&'static str> {
        let differs = |name: &&'static str| {
            let value = |raw: &RawSettings| raw.values.get(name).map(|(values, _)| values.clone());
            value(self) != value(other)
        };
        SETTINGS.iter().map(|setting| setting.name).filter(differs).collect()
    }

    /// The origin of a setting's value, for messages.
    pub fn location(&self, name: &str) -> String {
        match self.values.get(name).map(|(_, origin)| origin) {
            Some(Origin::Environment) => env_variable(name),
            Some(Origin::File(path)) => format!("{name} in {}", path.display()),
            Some(Origin::Flag | Origin::Default) | None => format!("--{name}"),
        }
    }
}

/// Merges flags, environment, file and defaults.
pub fn load_settings(matches: &ArgMatches) -> RawSettings {
    let mut raw = RawSettings::default();
    let config_path = matches.get_one::<String>("config").map(PathBuf::from);
    let path = config_path.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_CONFIG_FILE));
    let mut file = match std::fs::read_to_string(&path) {
        Ok(text) => parse_file(&text, &path, &mut raw.errors),
        Err(error) if config_path.is_none() && error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
        Err(error) => {
            let location = "--config".to_owned();
            let advice = match error.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    format!("; the agent's user needs to read it: chmod 644 {}", path.display())
                }
                _ => String::new(),
            };
            let rule = format!("cannot be read: {error}{advice}");
            raw.errors.push(SettingError { location, value: path.display().to_string(), rule });
            BTreeMap::new()
        }
    };
    if SECRET_FILES.iter().any(|name| file.contains_key(name))
        && let Some(exposed) = secret::writable_by_others(&path)
    {
        let value = path.display().to_string();
        raw.errors.push(SettingError { location: "--config".to_owned(), value, rule: exposed.to_string() });
    }
    for setting in SETTINGS {
        let given = matches.get_many::<String>(setting.name).map(|values| values.cloned().collect::<Vec<_>>());
        let from_file = file.remove(setting.name);
        let value = match (given, matches.value_source(setting.name), from_file) {
            (Some(values), Some(ValueSource::EnvVariable), _) => Some((values, Origin::Environment)),
            (Some(values), _, _) => Some((values, Origin::Flag)),
            (None, _, Some(values)) => Some((values, Origin::File(path.clone()))),
            (None, _, None) if !setting.default.is_empty() => Some((vec![setting.default.to_owned()], Origin::Default)),
            (None, _, None) => None,
        };
        if let Some(value) = value {
            raw.values.insert(setting.name, value);
        }
    }
    raw
}

/// The file's values as text. Unknown keys and values of a wrong type are errors.
fn parse_file(text: &str, path: &Path, errors: &mut Vec<SettingError>) -> BTreeMap<&'static str, Vec<String>> {
    let mut values = BTreeMap::new();
    let table = match text.parse::<toml::Table>() {
        Ok(table) => table,
        Err(error) => {
            let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].lines().count().max(1));
            let location = format!("{} line {line}", path.display());
            let mut value = text.lines().nth(line.saturating_sub(1)).unwrap_or_default().to_owned();
            if let Some((key, _)) = value.split_once('=').filter(|(key, _)| secret::looks_secret(key)) {
                value = format!("{key}= ...");
            }
            errors.push(SettingError { location, value, rule: format!("is not TOML: {}", error.message()) });
            return values;
        }
    };
    for (key, value) in table {
        let location = format!("{key} in {}", path.display());
        let shown = match &value {
            // The table may contain a secret.
            toml::Value::Table(_) => format!("[{key}]"),
            other => other.to_string(),
        };
        let mut fail = |rule: String| errors.push(SettingError { location: location.clone(), value: shown.clone(), rule });
        let Some(setting) = SETTINGS.iter().find(|setting| setting.name == key) else {
            if secret::looks_secret(&key) {
                let rule = "is not a setting: put the secret into its own file and name it in etcd-password-file or etcd-keyfile";
                errors.push(SettingError { location, value: "...".to_owned(), rule: rule.to_owned() });
                continue;
            }
            let suggestion = match &value {
                toml::Value::Table(table) => table_advice(&key, table),
                _ => nearest_setting(&key).map_or_else(String::new, |name| format!(": did you mean `{name}`?")),
            };
            fail(format!("is not a setting{suggestion}"));
            continue;
        };
        let texts = match (&value, setting.kind) {
            (toml::Value::String(text), SettingKind::List) => Some(text.split(',').map(str::to_owned).collect()),
            (toml::Value::String(text), _) => Some(vec![text.clone()]),
            (toml::Value::Boolean(value), SettingKind::Boolean) => Some(vec![value.to_string()]),
            (toml::Value::Array(items), SettingKind::List) => {
                items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
            }
            _ => None,
        };
        match texts {
            Some(texts) => {
                values.insert(setting.name, texts);
            }
            None => fail(match setting.kind {
                SettingKind::Text => "is not a string".to_owned(),
                SettingKind::List => "is neither a string nor an array of strings".to_owned(),
                SettingKind::Boolean => "is neither true nor false".to_owned(),
            }),
        }
    }
    values
}

/// The remedy for a table, which cannot contain a setting.
fn table_advice(table: &str, entries: &toml::Table) -> String {
    let nearest = entries.keys().find_map(|key| nearest_setting(&format!("{table}-{key}")).or_else(|| nearest_setting(key)));
    let example = nearest.map_or_else(String::new, |name| format!(", as `{name} = ...`"));
    format!(" but a table: settings belong at the top level of the file, not below a line in brackets{example}")
}

/// The setting with the most similar name, at most two letters added, left out or changed; `None` without such a name.
fn nearest_setting(key: &str) -> Option<&'static str> {
    let key = key.replace('_', "-");
    let distance = |name| strsim::damerau_levenshtein(&key, name);
    SETTINGS.iter().map(|setting| (distance(setting.name), setting.name)).filter(|(d, _)| *d <= 2).min().map(|(_, name)| name)
}
