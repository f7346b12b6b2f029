//! Merges flags, environment and file into one validated [`HostConfig`].
//!
//! All errors are reported at once, before the agent changes anything. [`SETTINGS`] is the single list of settings: flags,
//! environment variables, keys of the file and the reference in `docs/configuration.md` are derived from it. A flag overrides the
//! environment, the environment the file, the file the default.

mod credential;
mod raw;
pub mod secret;
mod settings;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use regex::Regex;

pub use raw::{Origin, RawSettings, load_settings};
pub use settings::{DEFAULT_CONFIG_FILE, SERVE_NETNS_NAME, SETTINGS, Setting, SettingKind, command};

use self::secret::SecretError;
use self::settings::SECRET_FILES;
use crate::model::{NetworkName, PerFamily};
use crate::plan::underlay::UnderlaySelector;
use crate::telemetry::{LOG_FORMATS, LogFormat, parse_filter};

/// The agent's configuration on this host.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// The connection to etcd.
    pub etcd: EtcdConfig,
    /// Selection of the external interface.
    pub selection: UnderlaySelector,
    /// Named networks that the host is in also without containers there.
    pub networks: Vec<NetworkName>,
    /// How long the host stays in a named network without containers there.
    pub leave_after: Duration,
    /// Start of the names of isolated networks' namespaces.
    pub netns_prefix: String,
    /// The host's display name.
    pub node_name: String,
    /// Whether traffic that leaves the overlay is masqueraded.
    pub ip_masq: bool,
    /// Whether a part of the subnet is reserved for Docker's containers on the bridge.
    pub docker: bool,
    /// Directory of the socket, the lock and `subnet.env`.
    pub run_dir: PathBuf,
    /// Directory of the host's identity, MACs and endpoints.
    pub state_dir: PathBuf,
    /// The file with the leased subnet, for other tools.
    pub subnet_file: PathBuf,
    /// File of the default network's CNI network list; `None`: not written.
    pub cni_conflist: Option<PathBuf>,
    /// TCP address for metrics and health; `None`: disabled.
    pub metrics_listen: Option<SocketAddr>,
    /// A filter of the `tracing` crate.
    pub log_level: String,
    /// Format of the log.
    pub log_format: LogFormat,
    /// Transmit checksum offload on the VXLAN devices.
    pub vxlan_tx_checksum: bool,
    /// Whether the agent may use next-hop objects instead of classic routes.
    pub nexthop_objects: bool,
    /// Interval of full comparisons with the kernel's state.
    pub resync_interval: Duration,
    /// Interval of probes to each peer; `None`: no probes.
    pub mesh_interval: Option<Duration>,
}

/// The connection to etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// URLs; empty with `discovery_srv`.
    pub endpoints: Vec<String>,
    /// Domain whose SRV records name the endpoints.
    pub discovery_srv: Option<String>,
    /// Key prefix without a trailing slash.
    pub prefix: String,
    /// CA certificate file (PEM).
    pub cafile: Option<PathBuf>,
    /// Client certificate and its key (PEM).
    pub client_certificate: Option<(PathBuf, PathBuf)>,
    /// User name and password file.
    pub user: Option<(String, PathBuf)>,
}

/// One error in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingError {
    /// The value's place: flag, environment variable, or key and file.
    pub location: String,
    /// The value.
    pub value: String,
    /// The violated rule, with the allowed values.
    pub rule: String,
}

/// All errors in the configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct SettingErrors(pub Vec<SettingError>);

impl fmt::Display for SettingErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(f, "{count} {} in the configuration:", if count == 1 { "error" } else { "errors" })?;
        for SettingError { location, value, rule } in &self.0 {
            write!(f, "\n  {location}: `{value}` {rule}")?;
        }
        Ok(())
    }
}

/// Parses the values of [`RawSettings`] and collects all errors.
struct Validator {
    raw: RawSettings,
    errors: Vec<SettingError>,
}

impl HostConfig {
    /// Validates all values together. Only reads from the file system.
    pub fn validate(raw: RawSettings) -> Result<HostConfig, SettingErrors> {
        let errors = raw.errors.clone();
        let mut validator = Validator { raw, errors };
        let config = validator.host();
        if validator.errors.is_empty() { Ok(config) } else { Err(SettingErrors(validator.errors)) }
    }
}

impl Validator {
    fn host(&mut self) -> HostConfig {
        let run_dir = self.absolute_path("run-dir");
        let subnet_file =
            if self.raw.is_set("subnet-file") { self.absolute_path("subnet-file") } else { run_dir.join("subnet.env") };
        HostConfig {
            etcd: self.etcd(),
            selection: self.selection(),
            networks: self.networks(),
            leave_after: self.duration("leave-after", Duration::from_secs(1), Duration::from_secs(86_400)),
            netns_prefix: self.netns_prefix(),
            node_name: self.node_name(),
            ip_masq: self.boolean("ip-masq"),
            docker: self.boolean("docker"),
            subnet_file,
            cni_conflist: self.raw.text("cni-conflist").is_some().then(|| self.absolute_path("cni-conflist")),
            run_dir,
            state_dir: self.absolute_path("state-dir"),
            metrics_listen: self.parsed("metrics-listen", "is not ADDRESS:PORT such as 127.0.0.1:9780"),
            log_level: self.log_level(),
            log_format: self.one_of("log-format", &LOG_FORMATS, LogFormat::Auto),
            vxlan_tx_checksum: self.boolean("vxlan-tx-checksum"),
            nexthop_objects: self.boolean("nexthop-objects"),
            resync_interval: self.duration("resync-interval", Duration::from_secs(1), Duration::from_secs(86_400)),
            mesh_interval: Some(self.duration("mesh-interval", Duration::ZERO, Duration::from_secs(86_400)))
                .filter(|i| !i.is_zero()),
        }
    }

    fn etcd(&mut self) -> EtcdConfig {
        let discovery_srv = self.raw.text("etcd-discovery-srv");
        if let Some(domain) = &discovery_srv {
            let is_valid = domain.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
            if domain.is_empty() || domain.len() > 253 || !is_valid {
                self.fail("etcd-discovery-srv", domain, "is not a domain name");
            }
            if self.raw.is_set("etcd-endpoints") {
                self.fail("etcd-discovery-srv", domain, "cannot be combined with --etcd-endpoints: choose one of the two");
            }
        }
        let endpoints = if discovery_srv.is_some() { Vec::new() } else { self.raw.list("etcd-endpoints") };
        for endpoint in &endpoints {
            let rest = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"));
            let is_valid = rest.is_some_and(|rest| {
                let host = rest.strip_suffix('/').unwrap_or(rest);
                let port = host.rsplit_once(':').map(|(name, port)| (!name.is_empty(), port.parse::<u16>().is_ok()));
                port == Some((true, true)) && !host.contains(['/', '@', ' '])
            });
            if !is_valid {
                let rule = match rest {
                    _ if endpoint.contains('@') => "holds a user: use --etcd-username and --etcd-password-file".to_owned(),
                    Some(host) if !host.is_empty() && !host.contains([':', '/', ' ']) => {
                        format!("has no port: is it {endpoint}:2379?")
                    }
                    None if !endpoint.contains(['/', ' ']) && endpoint.contains(':') => {
                        format!("has no scheme: http://{endpoint}, or https://{endpoint} where etcd speaks TLS")
                    }
                    _ => "is not a URL such as http://192.0.2.10:2379 or https://etcd-1:2379".to_owned(),
                };
                self.fail("etcd-endpoints", &secret::redact_credentials(endpoint), &rule);
            }
        }
        let prefix = self.raw.text("etcd-prefix").unwrap_or_default();
        let trimmed = prefix.trim_end_matches('/').to_owned();
        if !trimmed.starts_with('/') || trimmed.contains("//") || trimmed.chars().any(char::is_control) {
            self.fail("etcd-prefix", &prefix, "is not a key prefix such as /coreos.com/network: it begins with a slash");
        }
        let cafile = self.readable_file("etcd-cafile");
        let client_certificate = match (self.readable_file("etcd-certfile"), self.readable_file("etcd-keyfile")) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (Some(certificate), None) => {
                // A key file that is set but unreadable is reported already.
                if !self.raw.is_set("etcd-keyfile") {
                    self.fail("etcd-certfile", &certificate.display().to_string(), "needs --etcd-keyfile as well");
                }
                None
            }
            (None, Some(key)) => {
                if !self.raw.is_set("etcd-certfile") {
                    self.fail("etcd-keyfile", &key.display().to_string(), "needs --etcd-certfile as well");
                }
                None
            }
            (None, None) => None,
        };
        if (cafile.is_some() || client_certificate.is_some()) && !endpoints.is_empty() {
            let plain: Vec<&String> = endpoints.iter().filter(|e| e.starts_with("http://")).collect();
            for endpoint in plain {
                self.fail("etcd-endpoints", endpoint, "is not https://, although certificates are given");
            }
        }
        let user = match (self.raw.text("etcd-username"), self.readable_file("etcd-password-file")) {
            (Some(user), Some(file)) => Some((user, file)),
            (Some(user), None) => {
                if !self.raw.is_set("etcd-password-file") {
                    self.fail("etcd-username", &user, "needs --etcd-password-file as well");
                }
                None
            }
            (None, Some(file)) => {
                self.fail("etcd-password-file", &file.display().to_string(), "needs --etcd-username as well");
                None
            }
            (None, None) => None,
        };
        EtcdConfig { endpoints, discovery_srv, prefix: trimmed, cafile, client_certificate, user }
    }

    fn selection(&mut self) -> UnderlaySelector {
        let regex = self.raw.text("iface-regex").and_then(|text| match Regex::new(&text) {
            Ok(regex) => Some(regex),
            Err(error) => {
                let detail = error.to_string().lines().last().unwrap_or_default().trim().to_owned();
                self.fail("iface-regex", &text, &format!("is not a regular expression: {detail}"));
                None
            }
        });
        let can_reach: Option<IpAddr> = self.parsed("iface-can-reach", "is not an IP address");
        let public_ip = PerFamily {
            v4: self.public_ip("public-ip", IpAddr::is_ipv4, "is not an IPv4 address that peers can send to"),
            v6: self.public_ip("public-ipv6", IpAddr::is_ipv6, "is not an IPv6 address that peers can send to"),
        };
        UnderlaySelector { interfaces: self.raw.list("iface"), regex, can_reach, public_ip }
    }

    fn public_ip(&mut self, name: &str, family: impl Fn(&IpAddr) -> bool, rule: &str) -> Option<IpAddr> {
        let text = self.raw.text(name)?;
        let address =
            text.parse::<IpAddr>().ok().filter(|a| family(a) && !a.is_loopback() && !a.is_multicast() && !a.is_unspecified());
        if address.is_none() {
            self.fail(name, &text, rule);
        }
        address
    }

    fn networks(&mut self) -> Vec<NetworkName> {
        let mut names = Vec::new();
        for text in self.raw.list("networks") {
            match text.parse::<NetworkName>() {
                // The host is always in it.
                Ok(name) if name.is_default() => {}
                Ok(name) => names.push(name),
                Err(_) => self.fail("networks", &text, "is not a network name: a DNS label of 1 to 32 characters"),
            }
        }
        names
    }

    fn netns_prefix(&mut self) -> String {
        let text = self.raw.text("netns-prefix").unwrap_or_default();
        let is_valid = (1..=100).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
        if !is_valid {
            self.fail("netns-prefix", &text, "is not 1 to 100 of a-z A-Z 0-9 . - _ beginning with a letter or digit");
        }
        text
    }

    fn node_name(&mut self) -> String {
        let given = self.raw.text("node-name");
        let name = given
            .clone()
            .unwrap_or_else(|| nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default());
        let is_valid =
            (1..=253).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
        if !is_valid {
            let rule = "is not 1 to 253 of a-z A-Z 0-9 . - _ (the default is the host's name)";
            self.fail("node-name", &name, rule);
        }
        name
    }

    fn log_level(&mut self) -> String {
        let text = self.raw.text("log-level").unwrap_or_default();
        if let Err(error) = parse_filter(&text) {
            self.fail("log-level", &text, &format!("is not a filter: {error}"));
        }
        text
    }

    fn fail(&mut self, name: &str, value: &str, rule: &str) {
        let location = self.raw.location(name);
        self.errors.push(SettingError { location, value: value.chars().take(200).collect(), rule: rule.to_owned() });
    }

    fn boolean(&mut self, name: &str) -> bool {
        self.one_of(name, &[("true", true), ("false", false)], false)
    }

    fn one_of<T: Copy>(&mut self, name: &str, allowed: &[(&str, T)], default: T) -> T {
        let text = self.raw.text(name).unwrap_or_default();
        if let Some((_, value)) = allowed.iter().find(|(word, _)| *word == text) {
            return *value;
        }
        let words: Vec<&str> = allowed.iter().map(|(word, _)| *word).collect();
        self.fail(name, &text, &format!("is not {}", words.join(" or ")));
        default
    }

    fn parsed<T: std::str::FromStr>(&mut self, name: &str, rule: &str) -> Option<T> {
        let text = self.raw.text(name)?;
        let value = text.parse().ok();
        if value.is_none() {
            self.fail(name, &text, rule);
        }
        value
    }

    fn duration(&mut self, name: &str, min: Duration, max: Duration) -> Duration {
        let text = self.raw.text(name).unwrap_or_default();
        match humantime::parse_duration(&text) {
            Ok(value) if (min..=max).contains(&value) => value,
            _ => {
                let (least, most) = (humantime::format_duration(min), humantime::format_duration(max));
                self.fail(name, &text, &format!("is not a duration from {least} to {most}, such as 5m or 30s"));
                placeholder_duration()
            }
        }
    }

    fn absolute_path(&mut self, name: &str) -> PathBuf {
        let text = self.raw.text(name).unwrap_or_default();
        if !Path::new(&text).is_absolute() {
            self.fail(name, &text, "is not an absolute path");
        }
        PathBuf::from(text)
    }

    fn readable_file(&mut self, name: &str) -> Option<PathBuf> {
        let text = self.raw.text(name)?;
        let path = credential::resolve(&text);
        let secret = SECRET_FILES.contains(&name);
        let opened = if secret { secret::open(&path) } else { std::fs::File::open(&path).map_err(SecretError::File) };
        match opened {
            Ok(_) => Some(path),
            Err(SecretError::Exposed(exposed)) => {
                self.fail(name, &text, &exposed.to_string());
                None
            }
            Err(SecretError::File(error)) => {
                let resolved_path = if path == Path::new(&text) { String::new() } else { format!(" at {}", path.display()) };
                let advice = credential::advice(&text, &error);
                self.fail(name, &text, &format!("cannot be read{resolved_path}: {error}{advice}"));
                None
            }
        }
    }
}

/// Placeholder for an invalid value; the configuration is rejected anyway.
const fn placeholder_duration() -> Duration {
    Duration::from_secs(300)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn check(args: &[&str], file: &str) -> Result<HostConfig, String> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("overlayd.toml");
        std::fs::write(&path, file).expect("a file");
        let mut all: Vec<OsString> = vec!["overlayd".into(), "--config".into(), path.into()];
        all.extend(args.iter().map(OsString::from));
        let matches = settings::command().try_get_matches_from(all).map_err(|e| e.to_string())?;
        HostConfig::validate(load_settings(&matches)).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults() {
        let config = check(&["--node-name", "h1"], "").expect("defaults are good");
        assert_eq!(config.etcd.endpoints, ["http://127.0.0.1:2379"]);
        assert_eq!(config.etcd.prefix, "/coreos.com/network");
        assert_eq!(config.subnet_file, Path::new("/run/overlayd/subnet.env"));
        assert!(config.ip_masq && config.vxlan_tx_checksum && config.nexthop_objects);
        assert_eq!(config.resync_interval, Duration::from_secs(300));
    }

    #[test]
    fn flag_overrides_file() {
        let file =
            "run-dir = \"/run/a\"\nip-masq = false\niface = [\"eth1\", \"eth2\"]\netcd-endpoints = \"http://a:1,http://b:2\"\n";
        let config = check(&["--run-dir=/run/b", "--ip-masq"], file).expect("good");
        assert_eq!(config.run_dir, Path::new("/run/b"));
        assert!(config.ip_masq);
        assert_eq!(config.selection.interfaces, ["eth1", "eth2"]);
        assert_eq!(config.etcd.endpoints, ["http://a:1", "http://b:2"]);
    }

    #[test]
    fn all_errors_are_reported_with_location() {
        let error = check(
            &["--public-ip=::1", "--etcd-endpoints=127.0.0.1:2379", "--iface-regex=("],
            "run-dri = 1\nlog-format = \"xml\"\nresync-interval = \"0s\"\netcd-certfile = \"/nonexistent\"\nip-masq = 3\n",
        )
        .expect_err("errors");
        for wanted in [
            "8 errors",
            "--public-ip: `::1`",
            "--etcd-endpoints: `127.0.0.1:2379` has no scheme: http://127.0.0.1:2379, or https://",
            "--iface-regex: `(` is not a regular expression",
            "run-dri in ",
            "is not a setting: did you mean `run-dir`?",
            "log-format in ",
            "`xml` is not auto or text or json or journal",
            "resync-interval in ",
            "etcd-certfile in ",
            "ip-masq in ",
        ] {
            assert!(error.contains(wanted), "no `{wanted}` in {error}");
        }
    }

    #[test]
    fn errors_do_not_reveal_secrets() {
        for (args, file, wanted) in [
            (&["--etcd-endpoints=https://root:hunter2@a:2379"][..], "", "use --etcd-username and --etcd-password-file"),
            (&[][..], "etcd-password = \"hunter2\"\n", "name it in etcd-password-file or etcd-keyfile"),
            (&[][..], "etcd-password = \"hunter2\n", "is not TOML"),
            (&[][..], "[etcd]\npassword = \"hunter2\"\n", "but a table: settings belong at the top level of the file"),
        ] {
            let error = check(args, file).expect_err(wanted);
            assert!(error.contains(wanted) && !error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn dependent_settings_are_required_together() {
        for (args, wanted) in [
            (&["--etcd-username=u"][..], "needs --etcd-password-file"),
            (&["--etcd-certfile=/dev/null"][..], "needs --etcd-keyfile"),
            (&["--etcd-keyfile=/dev/null"][..], "needs --etcd-certfile"),
            (&["--etcd-cafile=/dev/null", "--etcd-endpoints=http://a:1"][..], "is not https://"),
            (&["--etcd-discovery-srv=example.org", "--etcd-endpoints=http://a:1"][..], "choose one of the two"),
            (&["--run-dir=run"][..], "is not an absolute path"),
            (&["--node-name=a b"][..], "is not 1 to 253"),
        ] {
            let error = check(args, "").expect_err(wanted);
            assert!(error.contains(wanted), "{error}");
        }
    }
}
