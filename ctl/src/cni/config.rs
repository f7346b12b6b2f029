//! The network configuration on standard input (`SPEC.md`, "Plugin configuration objects"): the specification's keys, and this
//! plugin's.

use std::path::PathBuf;
use std::time::Duration;

use overlay_agent::model::NetworkName;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::environment::{is_identifier, quoted};
use super::error::{CniError, Code};
use super::log::Level;
use super::result::{CniResult, Dns};
use super::version::Version;
use crate::client::DEFAULT_SOCKET;

/// Default of `timeout`. An agent is back from a restart in one or two seconds, and runtimes wait for a minute or more.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Valid values of `timeout`.
const TIMEOUT_RANGE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(600);

/// Key of GC's list of attachments to keep.
const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// A validated configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// `cniVersion`.
    pub version: Version,
    /// `name`: name of the network at the runtime.
    pub name: String,
    /// `network`: the overlay network.
    pub network: NetworkName,
    /// `socket`: path of the agent's socket.
    pub socket: PathBuf,
    /// `timeout`: limit of one verb.
    pub timeout: Duration,
    /// `logFile`.
    pub log_file: Option<PathBuf>,
    /// `logLevel`.
    pub log_level: Level,
    /// `sourceCheck`.
    pub source_check: Option<bool>,
    /// `isDefaultGateway`, named as in the plugin `bridge`.
    pub default_route: Option<bool>,
    /// `dns`, copied to the result.
    pub dns: Dns,
    /// `runtimeConfig`: the runtime's values by capability.
    pub runtime_config: RuntimeConfig,
    /// `args.cni`: the runtime's values by the older convention.
    pub args: CniArgs,
    /// `prevResult`: the result of the previous plugin, or of the last ADD.
    pub prev_result: Option<CniResult>,
    /// `cni.dev/valid-attachments`.
    pub valid_attachments: Option<Vec<ValidAttachment>>,
}

/// `runtimeConfig`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RuntimeConfig {
    /// Requested addresses, with or without a prefix length.
    pub ips: Vec<String>,
    /// Requested MAC.
    pub mac: Option<String>,
    /// Ports to publish.
    pub port_mappings: Vec<PortMapping>,
    /// Bandwidth limits; not supported.
    pub bandwidth: Option<Value>,
    /// Resolver settings.
    pub dns: Option<RuntimeDns>,
}

/// One port to publish (`CONVENTIONS.md`, `portMappings`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// Port on the host.
    pub host_port: i64,
    /// Port in the container.
    pub container_port: i64,
    /// Protocol; `tcp` if absent or empty.
    #[serde(default)]
    pub protocol: String,
    /// Address of the host; any if absent or empty.
    #[serde(default, rename = "hostIP")]
    pub host_ip: String,
}

/// Resolver settings by capability (`CONVENTIONS.md`, `dns`).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct RuntimeDns {
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

/// `args.cni`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct CniArgs {
    /// Requested addresses.
    pub ips: Vec<String>,
    /// Requested MAC.
    pub mac: Option<String>,
}

/// An attachment that the runtime keeps.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ValidAttachment {
    /// `CNI_CONTAINERID` of its ADD.
    #[serde(rename = "containerID")]
    pub container: String,
    /// `CNI_IFNAME` of its ADD.
    #[serde(rename = "ifname")]
    pub interface: String,
}

/// The configuration's keys; each is removed when it is read.
struct Keys(Map<String, Value>);

impl Keys {
    /// Removes a key and returns its value; `None` if absent or null.
    fn take<T: serde::de::DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>, CniError> {
        let Some(value) = self.0.remove(key).filter(|value| !value.is_null()) else { return Ok(None) };
        serde_json::from_value(value)
            .map(Some)
            .map_err(|e| CniError::new(Code::Decode, format!("key {key} of the network configuration is invalid: {e}")))
    }

    /// Reads a path. It must be absolute: the runtime's working directory is arbitrary.
    fn path(&mut self, key: &str) -> Result<Option<PathBuf>, CniError> {
        let path = self.take::<PathBuf>(key)?;
        match path {
            Some(path) if !path.is_absolute() => Err(invalid_value(key, &path.display().to_string(), "is not an absolute path")),
            path => Ok(path),
        }
    }
}

fn invalid_value(key: &str, value: &str, rule: &str) -> CniError {
    CniError::new(Code::InvalidConfig, format!("{key} {} of the network configuration {rule}", quoted(value)))
}

fn parse_object(bytes: &[u8]) -> Result<Keys, CniError> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(keys)) => Ok(Keys(keys)),
        Ok(_) => Err(CniError::new(Code::Decode, "the network configuration on standard input is not a JSON object")),
        Err(e) => Err(CniError::new(Code::Decode, format!("the network configuration on standard input is not JSON: {e}"))),
    }
}

/// Reads the version of a VERSION request; `None` for empty input, which very old runtimes send.
pub fn requested_version(bytes: &[u8]) -> Result<Option<String>, CniError> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    parse_object(bytes)?.take("cniVersion")
}

impl Config {
    /// Reads the configuration. An error comes with the version of its JSON format.
    pub fn decode(bytes: &[u8]) -> Result<Config, (Version, CniError)> {
        let with_latest_version = |error| (Version::LATEST, error);
        let mut keys = parse_object(bytes).map_err(with_latest_version)?;
        let text: Option<String> = keys.take("cniVersion").map_err(with_latest_version)?;
        let version = Version::parse(text.as_deref()).map_err(with_latest_version)?;
        Config::from_keys(version, keys).map_err(|error| (version, error))
    }

    fn from_keys(version: Version, mut keys: Keys) -> Result<Config, CniError> {
        let name: String =
            keys.take("name")?.ok_or_else(|| CniError::new(Code::InvalidConfig, "the network configuration has no name"))?;
        if !is_identifier(&name) {
            let rule = "is not a network name: it must start with a letter or digit and contain only a-z A-Z 0-9 . _ -";
            return Err(invalid_value("name", &name, rule));
        }
        // An IPAM plugin would choose the addresses, and here the agent chooses them.
        let ipam: Option<Map<String, Value>> = keys.take("ipam")?;
        if let Some(ipam) = ipam.filter(|ipam| !ipam.is_empty()) {
            let ipam_text = Value::Object(ipam);
            let text = format!(
                "ipam {ipam_text} is not supported: the agent assigns addresses of the host's subnet; remove the key ipam"
            );
            return Err(CniError::new(Code::UnsupportedField, text));
        }
        let runtime: RuntimeConfig = keys.take("runtimeConfig")?.unwrap_or_default();
        let mut args: Map<String, Value> = keys.take("args")?.unwrap_or_default();
        let args = args.remove("cni").map(|cni| Keys([("args.cni".to_owned(), cni)].into_iter().collect()));
        let args: Option<CniArgs> = args.map(|mut cni| cni.take("args.cni")).transpose()?.flatten();
        let mut dns: Dns = keys.take("dns")?.unwrap_or_default();
        if let Some(RuntimeDns { servers, searches, options }) = runtime.dns.clone() {
            let override_with = |requested: Vec<String>, configured: &mut Vec<String>| {
                if !requested.is_empty() {
                    *configured = requested;
                }
            };
            override_with(servers, &mut dns.nameservers);
            override_with(searches, &mut dns.search);
            override_with(options, &mut dns.options);
        }
        let valid = match keys.0.get(VALID_ATTACHMENTS) {
            // Go's reference library writes an empty list as null.
            Some(Value::Null) => Some(Vec::new()),
            _ => keys.take(VALID_ATTACHMENTS)?,
        };
        let previous = keys.take::<Value>("prevResult")?.map(CniResult::parse).transpose()?;
        Ok(Config {
            version,
            name,
            network: network(&mut keys)?,
            socket: keys.path("socket")?.unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET)),
            timeout: timeout(&mut keys)?,
            log_file: keys.path("logFile")?,
            log_level: log_level(&mut keys)?,
            source_check: keys.take("sourceCheck")?,
            default_route: keys.take("isDefaultGateway")?,
            dns,
            runtime_config: runtime,
            args: args.unwrap_or_default(),
            prev_result: previous,
            valid_attachments: valid,
        })
    }
}

fn network(keys: &mut Keys) -> Result<NetworkName, CniError> {
    let Some(text) = keys.take::<String>("network")? else { return Ok(NetworkName::default()) };
    text.parse().map_err(|e| CniError::new(Code::InvalidConfig, format!("key network of the network configuration: {e}")))
}

fn timeout(keys: &mut Keys) -> Result<Duration, CniError> {
    let Some(text) = keys.take::<String>("timeout")? else { return Ok(DEFAULT_TIMEOUT) };
    let given = humantime::parse_duration(&text).ok().filter(|duration| TIMEOUT_RANGE.contains(duration));
    given.ok_or_else(|| invalid_value("timeout", &text, "is not a duration from 1s to 10m, such as 30s"))
}

fn log_level(keys: &mut Keys) -> Result<Level, CniError> {
    let Some(text) = keys.take::<String>("logLevel")? else { return Ok(Level::Info) };
    let given = Level::ALL.into_iter().find(|level| level.as_str() == text);
    given.ok_or_else(|| invalid_value("logLevel", &text, &format!("is none of {}", Level::ALL.map(Level::as_str).join(", "))))
}
