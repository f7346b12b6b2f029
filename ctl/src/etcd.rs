//! etcd without an agent: the flags that reach it, the configuration, and every lease.

use std::path::PathBuf;

use overlay_agent::model::api::Subnets;

/// How to reach etcd, with the names and variables that overlayd has.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "etcd")]
pub struct EtcdArgs {
    /// Servers, as https://HOST:2379
    #[arg(long = "etcd-endpoints", value_name = "URLS", env = "OVERLAYD_ETCD_ENDPOINTS", value_delimiter = ',')]
    pub endpoints: Vec<String>,
    /// The key prefix
    #[arg(long = "etcd-prefix", value_name = "PREFIX", env = "OVERLAYD_ETCD_PREFIX", default_value = DEFAULT_PREFIX)]
    pub prefix: String,
    /// The CAs that sign the servers' certificates (PEM)
    #[arg(long = "etcd-cafile", value_name = "FILE", env = "OVERLAYD_ETCD_CAFILE")]
    pub cafile: Option<PathBuf>,
    /// The client certificate (PEM)
    #[arg(long = "etcd-certfile", value_name = "FILE", env = "OVERLAYD_ETCD_CERTFILE")]
    pub certfile: Option<PathBuf>,
    /// The client certificate's key (PEM)
    #[arg(long = "etcd-keyfile", value_name = "FILE", env = "OVERLAYD_ETCD_KEYFILE")]
    pub keyfile: Option<PathBuf>,
    /// The user
    #[arg(long = "etcd-username", value_name = "NAME", env = "OVERLAYD_ETCD_USERNAME")]
    pub username: Option<String>,
    /// The file with the user's password
    #[arg(long = "etcd-password-file", value_name = "FILE", env = "OVERLAYD_ETCD_PASSWORD_FILE")]
    pub password_file: Option<PathBuf>,
    /// The domain whose SRV records name the servers
    #[arg(long = "etcd-discovery-srv", value_name = "DOMAIN", env = "OVERLAYD_ETCD_DISCOVERY_SRV")]
    pub discovery_srv: Option<String>,
}

const DEFAULT_PREFIX: &str = "/coreos.com/network";

/// Why etcd was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// shim
    #[error("{0}")]
    Shim(String),
}

/// The configuration as it stands in etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The JSON text.
    pub text: String,
    /// The revision of its last change.
    pub mod_revision: i64,
}

impl EtcdArgs {
    /// Servers without TLS or login.
    pub fn plain(endpoints: Vec<String>, prefix: &str) -> EtcdArgs {
        EtcdArgs { endpoints, prefix: prefix.to_owned(), ..EtcdArgs::default() }
    }

    /// Whether etcd is to be asked rather than the agent.
    pub fn given(&self) -> bool {
        !self.endpoints.is_empty() || self.discovery_srv.is_some()
    }

    /// The key of the configuration.
    pub fn config_key(&self) -> String {
        format!("{}/config", self.prefix.trim_end_matches('/'))
    }

    fn ctl(&self, args: &[&str]) -> Result<String, EtcdError> {
        let out = std::process::Command::new("etcdctl").env("ETCDCTL_API", "3").args(["--endpoints", &self.endpoints.join(",")]).args(args).output().map_err(|e| EtcdError::Shim(e.to_string()))?;
        if out.status.success() { Ok(String::from_utf8_lossy(&out.stdout).into_owned()) } else { Err(EtcdError::Shim(String::from_utf8_lossy(&out.stderr).into_owned())) }
    }

    /// The configuration.
    pub async fn config(&self) -> Result<Option<Stored>, EtcdError> {
        let text = self.ctl(&["get", "--print-value-only", &self.config_key()])?;
        Ok(if text.trim().is_empty() { None } else { Some(Stored { text: text.trim().to_owned(), mod_revision: 0 }) })
    }

    /// Writes the configuration.
    pub async fn put_config(&self, text: &str, _before: Option<&Stored>) -> Result<(), EtcdError> {
        self.ctl(&["put", &self.config_key(), text]).map(|_| ())
    }

    /// Every lease.
    pub async fn subnets(&self) -> Result<Subnets, EtcdError> {
        Err(EtcdError::Shim("later".to_owned()))
    }
}

/// Every lease again at each change.
#[derive(Debug)]
pub struct SubnetsWatch {}

impl SubnetsWatch {
    /// Starts.
    pub async fn start(_args: &EtcdArgs) -> Result<SubnetsWatch, EtcdError> {
        Err(EtcdError::Shim("later".to_owned()))
    }

    /// Next.
    pub async fn next(&mut self) -> Result<Subnets, EtcdError> {
        Err(EtcdError::Shim("later".to_owned()))
    }
}
