//! The runtime's parameters in the environment: the verb and the attachment (`SPEC.md`, "Parameters").

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use super::error::{CniError, Code};
use super::version::Version;

/// Longest interface name in bytes: `IFNAMSIZ` - 1 (linux/if.h).
const MAX_INTERFACE_NAME: usize = 15;

/// Verb of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Attach a container.
    Add,
    /// Detach the container.
    Del,
    /// Compare the container with its attachment.
    Check,
    /// Detach all attachments except the listed ones.
    Gc,
    /// Report whether containers can be attached.
    Status,
    /// Report the supported versions.
    Version,
}

impl Verb {
    const ALL: [Verb; 6] = [Verb::Add, Verb::Del, Verb::Check, Verb::Gc, Verb::Status, Verb::Version];

    /// The value of `CNI_COMMAND`.
    pub fn as_str(self) -> &'static str {
        match self {
            Verb::Add => "ADD",
            Verb::Del => "DEL",
            Verb::Check => "CHECK",
            Verb::Gc => "GC",
            Verb::Status => "STATUS",
            Verb::Version => "VERSION",
        }
    }

    /// Oldest supported version of the specification that has the verb.
    pub fn since(self) -> Version {
        match self {
            Verb::Add | Verb::Del | Verb::Version => Version::V0_3_1,
            Verb::Check => Version::V0_4_0,
            Verb::Gc | Verb::Status => Version::V1_1_0,
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One interface of one container. Together with the network's name it identifies an attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_IFNAME`.
    pub interface: String,
    /// `CNI_NETNS`. Optional for DEL: the namespace can be gone.
    pub netns: Option<PathBuf>,
}

/// Values of `CNI_ARGS`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Arguments {
    /// `IP`: requested addresses, separated by commas.
    pub ips: Vec<String>,
    /// `MAC`: the requested MAC.
    pub mac: Option<String>,
}

fn invalid(text: impl Into<String>) -> CniError {
    CniError::new(Code::InvalidEnvironment, text)
}

/// Reads a variable; an empty one counts as unset.
fn optional(variable: &impl Fn(&str) -> Option<OsString>, name: &str) -> Result<Option<String>, CniError> {
    match variable(name).filter(|value| !value.is_empty()) {
        None => Ok(None),
        Some(value) => value.into_string().map(Some).map_err(|_| invalid(format!("{name} is not UTF-8"))),
    }
}

fn required(variable: &impl Fn(&str) -> Option<OsString>, name: &str) -> Result<String, CniError> {
    optional(variable, name)?.ok_or_else(|| invalid(format!("{name} is not set: the runtime must set it for this verb")))
}

/// Reads the verb.
pub fn verb(variable: &impl Fn(&str) -> Option<OsString>) -> Result<Verb, CniError> {
    let Some(verb_name) = optional(variable, "CNI_COMMAND")? else {
        return Err(invalid("CNI_COMMAND is not set: a container runtime runs overlay-cni (see overlay-cni --help)"));
    };
    Verb::ALL.into_iter().find(|verb| verb.as_str() == verb_name).ok_or_else(|| {
        let known = Verb::ALL.map(Verb::as_str).join(", ");
        invalid(format!("CNI_COMMAND={} is unknown; valid: {known}", quoted(&verb_name)))
    })
}

/// Reads the attachment; `with_netns` requires its namespace.
pub fn attachment(variable: &impl Fn(&str) -> Option<OsString>, with_netns: bool) -> Result<Attachment, CniError> {
    let container = required(variable, "CNI_CONTAINERID")?;
    if !is_identifier(&container) {
        let rule = "it must start with a letter or digit and contain only a-z A-Z 0-9 . _ -";
        return Err(invalid(format!("CNI_CONTAINERID={} is not a container ID: {rule}", quoted(&container))));
    }
    let interface = required(variable, "CNI_IFNAME")?;
    if !is_interface_name(&interface) {
        let rule = "1 to 15 visible ASCII characters without / : %, and not `lo`, `.` or `..`";
        return Err(invalid(format!("CNI_IFNAME={} is not an interface name: {rule}", quoted(&interface))));
    }
    let netns = if with_netns { Some(required(variable, "CNI_NETNS")?) } else { optional(variable, "CNI_NETNS")? };
    Ok(Attachment { container, interface, netns: netns.map(PathBuf::from) })
}

/// Parses `CNI_ARGS` (`SPEC.md`: `FOO=BAR;ABC=123`). Rejects an unknown key unless `IgnoreUnknown` is set, as the reference
/// library does.
pub fn arguments(variable: &impl Fn(&str) -> Option<OsString>) -> Result<Arguments, CniError> {
    let all = optional(variable, "CNI_ARGS")?.unwrap_or_default();
    let mut arguments = Arguments::default();
    let mut ignore = false;
    let mut unknown = Vec::new();
    for pair in all.split(';').map(str::trim).filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| invalid(format!("CNI_ARGS: {} is not KEY=VALUE", quoted(pair))))?;
        match key {
            "IgnoreUnknown" => {
                ignore = match value.to_ascii_lowercase().as_str() {
                    "1" | "true" => true,
                    "0" | "false" | "" => false,
                    _ => return Err(invalid(format!("CNI_ARGS: IgnoreUnknown={} is neither 1 nor 0", quoted(value)))),
                }
            }
            "IP" => arguments.ips.extend(value.split(',').filter(|ip| !ip.is_empty()).map(str::to_owned)),
            "MAC" if value.is_empty() => {}
            "MAC" => arguments.mac = Some(value.to_owned()),
            _ => unknown.push(quoted(key)),
        }
    }
    if unknown.is_empty() || ignore {
        Ok(arguments)
    } else {
        Err(invalid(format!("CNI_ARGS has unknown keys: {}; valid: IP, MAC and IgnoreUnknown=1", unknown.join(", "))))
    }
}

/// Whether a text is a container ID or a network name: `SPEC.md` defines both as `^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$`.
pub(super) fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// The agent's rule for interface names, checked here so that the error names the variable.
fn is_interface_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%');
    (1..=MAX_INTERFACE_NAME).contains(&name.len()) && name.bytes().all(allowed) && !matches!(name, "." | ".." | "lo")
}

/// Quotes a value for a message: printable, and at most one line long.
pub(super) fn quoted(text: &str) -> String {
    let truncated: String = text.chars().take(80).collect();
    format!("{truncated:?}")
}
