//! Connects to one etcd server that answers: endpoints, TLS, login, timeouts.
//!
//! A session reads, watches and writes through the same server, so that it sees its own writes. If the server fails, the next
//! endpoint is tried. Files are read at each connect, so that renewed certificates and passwords take effect without a restart.

use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rand::seq::SliceRandom;
use tracing::{debug, warn};

use super::error::Context;
use super::keys::{DEFAULT_PREFIX, Keys};
use super::{StoreError, certificate, discovery};
use crate::config::secret::{self, SecretError};
use crate::metrics::Metrics;
use crate::model::NetworkName;

/// Timeout for opening a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Delay before the next endpoint is tried concurrently. An endpoint in a family that this host cannot send by never answers.
const CONNECTION_ATTEMPT_DELAY: Duration = Duration::from_secs(1);
/// Timeout for a response.
pub(super) const RPC_TIMEOUT: Duration = Duration::from_secs(5);
/// HTTP/2 ping after this long without a frame. etcd closes connections that ping more often than every 5 s
/// (`--grpc-keepalive-min-time`).
const PING_INTERVAL: Duration = Duration::from_secs(6);
/// A server that does not answer a ping for this long is dead. With the interval: detected within 10 s.
const PING_TIMEOUT: Duration = Duration::from_secs(4);
/// Port of an endpoint without one.
const DEFAULT_PORT: u16 = 2379;
/// Largest accepted response, in bytes; 2,000 leases take some 0.6 MB.
const MAX_RESPONSE_SIZE: usize = 32 << 20;
/// Bundle of public CA certificates in most distributions.
const SYSTEM_CA_FILE: &str = "/etc/ssl/certs/ca-certificates.crt";
/// TTL of the etcd lease behind a subnet; flannel's value.
const LEASE_TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// Maximum time between two renewals of an etcd lease. Far shorter than the TTL needs: a host that stopped renewing is
/// recognised as dead within half a minute.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// How to reach etcd, and the network's key prefix. Contains no secrets, only the paths of files that do.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// URLs such as `https://etcd1:2379`. Without a scheme: https if TLS files are given, otherwise http. Default port 2379.
    pub endpoints: Vec<String>,
    /// Domain whose SRV records name the endpoints; replaces `endpoints`.
    pub discovery_srv: Option<String>,
    /// The key prefix.
    pub prefix: String,
    /// PEM file of the CAs that sign the servers' certificates. Default: the system's CAs.
    pub cafile: Option<PathBuf>,
    /// PEM file of the client certificate.
    pub certfile: Option<PathBuf>,
    /// PEM file of the client certificate's key.
    pub keyfile: Option<PathBuf>,
    /// The etcd user.
    pub username: Option<String>,
    /// File that contains the user's password. A trailing line end is stripped.
    pub password_file: Option<PathBuf>,
    /// TTL of the etcd lease behind a subnet: 24 h; only tests change it.
    #[doc(hidden)]
    pub lease_ttl: Duration,
    /// Maximum time between two renewals, the same on all hosts: 20 s; only tests change it.
    #[doc(hidden)]
    pub keep_alive: Duration,
}

impl Default for StoreConfig {
    fn default() -> Self {
        StoreConfig {
            endpoints: Vec::new(),
            discovery_srv: None,
            prefix: DEFAULT_PREFIX.to_owned(),
            cafile: None,
            certfile: None,
            keyfile: None,
            username: None,
            password_file: None,
            lease_ttl: LEASE_TTL,
            keep_alive: KEEP_ALIVE_INTERVAL,
        }
    }
}

impl StoreConfig {
    /// Checks for missing and contradicting settings, which no retry can fix. Does not read files.
    ///
    /// # Errors
    /// [`StoreError::NoEndpoint`], [`StoreError::Prefix`], [`StoreError::Endpoint`], [`StoreError::Incomplete`].
    pub fn validate(&self) -> Result<Keys, StoreError> {
        let pairs = [
            ("--etcd-certfile", self.certfile.is_some(), "--etcd-keyfile", self.keyfile.is_some()),
            ("--etcd-username", self.username.is_some(), "--etcd-password-file", self.password_file.is_some()),
        ];
        for (one, has_one, other, has_other) in pairs {
            match (has_one, has_other) {
                (true, false) => return Err(StoreError::Incomplete { given: one, missing: other }),
                (false, true) => return Err(StoreError::Incomplete { given: other, missing: one }),
                _ => {}
            }
        }
        if self.endpoints.is_empty() && self.discovery_srv.is_none() {
            return Err(StoreError::NoEndpoint);
        }
        for endpoint in &self.endpoints {
            normalise_endpoint(endpoint, self.uses_tls())?;
        }
        Keys::new(&self.prefix)
    }

    /// The settings for requests to a network: the same servers, and the prefix of its keys.
    ///
    /// # Errors
    /// [`StoreError::Prefix`].
    pub fn of_network(&self, name: &NetworkName) -> Result<StoreConfig, StoreError> {
        let prefix = Keys::new(&self.prefix)?.network(name).prefix().to_owned();
        Ok(StoreConfig { prefix, ..self.clone() })
    }

    /// Minimum remaining validity of a lease when etcd stops answering: the TTL minus the maximum time since the last renewal.
    pub fn min_lease_validity(&self) -> Duration {
        self.lease_ttl.saturating_sub(keep_alive_interval(self.lease_ttl, self.keep_alive))
    }

    pub(super) fn uses_tls(&self) -> bool {
        self.cafile.is_some() || self.certfile.is_some()
    }

    /// The endpoints, in the order to try.
    pub(super) async fn candidates(&self) -> Result<Vec<String>, StoreError> {
        if let Some(name) = &self.discovery_srv {
            return discovery::endpoints(name, self.uses_tls()).await;
        }
        let mut endpoints =
            self.endpoints.iter().map(|e| normalise_endpoint(e, self.uses_tls())).collect::<Result<Vec<_>, StoreError>>()?;
        // Spreads the agents of many hosts over the servers.
        endpoints.shuffle(&mut rand::rng());
        Ok(endpoints)
    }

    fn tls_options(&self) -> Result<TlsOptions, StoreError> {
        let (authorities, identity) = self.tls_files()?;
        let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(authorities));
        Ok(match identity {
            Some((certificate, key)) => tls.identity(Identity::from_pem(certificate, key)),
            None => tls,
        })
    }

    /// The CAs, and the client certificate with its key if configured; all as PEM.
    pub(super) fn tls_files(&self) -> Result<TlsFiles, StoreError> {
        let system = PathBuf::from(SYSTEM_CA_FILE);
        let cafile = self.cafile.as_ref().unwrap_or(&system);
        let authorities = read_pem("etcd CA (--etcd-cafile)", cafile, "CERTIFICATE")?;
        let (Some(certfile), Some(keyfile)) = (&self.certfile, &self.keyfile) else { return Ok((authorities, None)) };
        let certificate = read_pem("client certificate (--etcd-certfile)", certfile, "CERTIFICATE")?;
        let purpose = "client certificate's key (--etcd-keyfile)";
        let key = check_pem(read_secret(purpose, keyfile)?, purpose, keyfile, "PRIVATE KEY")?;
        Ok((authorities, Some((certificate, key))))
    }

    /// Whether the client certificate has expired by this host's clock. Read errors are reported by [`Self::tls_files`].
    fn certificate_expired(&self) -> bool {
        let pem = self.certfile.as_ref().and_then(|path| fs::read(path).ok());
        pem.and_then(|pem| certificate::has_expired(&pem, SystemTime::now())).unwrap_or(false)
    }

    fn read_credentials(&self) -> Result<Option<(String, String)>, StoreError> {
        let (Some(user), Some(path)) = (&self.username, &self.password_file) else { return Ok(None) };
        let purpose = "etcd password file (--etcd-password-file)";
        let bytes = read_secret(purpose, path)?;
        let text =
            String::from_utf8(bytes).map_err(|_| StoreError::Content { purpose, path: path.clone(), rule: "is not UTF-8" })?;
        let password = text.strip_suffix('\n').unwrap_or(&text);
        let password = password.strip_suffix('\r').unwrap_or(password);
        if password.is_empty() {
            return Err(StoreError::Content { purpose, path: path.clone(), rule: "is empty: write the password into it" });
        }
        Ok(Some((user.clone(), password.to_owned())))
    }
}

/// CAs, and a client certificate with its key.
type TlsFiles = (Vec<u8>, Option<(Vec<u8>, Vec<u8>)>);

/// Reads a PEM file that must contain at least one block of this kind.
fn read_pem(purpose: &'static str, path: &Path, kind: &str) -> Result<Vec<u8>, StoreError> {
    let bytes = fs::read(path).map_err(|source| StoreError::File { purpose, path: path.to_owned(), source })?;
    check_pem(bytes, purpose, path, kind)
}

/// Reads a secret file. Fails if others have access, or the group may write.
fn read_secret(purpose: &'static str, path: &Path) -> Result<Vec<u8>, StoreError> {
    secret::read(path).map_err(|error| match error {
        SecretError::File(source) => StoreError::File { purpose, path: path.to_owned(), source },
        SecretError::Exposed(exposed) => StoreError::Exposed { purpose, path: path.to_owned(), exposed },
    })
}

fn check_pem(bytes: Vec<u8>, purpose: &'static str, path: &Path, kind: &str) -> Result<Vec<u8>, StoreError> {
    let text = String::from_utf8_lossy(&bytes);
    if text.lines().any(|line| line.starts_with("-----BEGIN ") && line.trim_end().ends_with(&format!("{kind}-----"))) {
        Ok(bytes)
    } else {
        Err(StoreError::Content { purpose, path: path.to_owned(), rule: "holds none in PEM form" })
    }
}

/// Normalises an endpoint to a URL with scheme and port.
pub(super) fn normalise_endpoint(endpoint: &str, tls: bool) -> Result<String, StoreError> {
    let error = |rule: &str| {
        let endpoint = crate::model::text::printable(&secret::redact_credentials(endpoint));
        StoreError::Endpoint { endpoint, rule: rule.to_owned() }
    };
    let (scheme, rest) = match endpoint.trim().split_once("://") {
        Some((scheme, rest)) => (scheme.to_ascii_lowercase(), rest),
        None => (if tls { "https" } else { "http" }.to_owned(), endpoint.trim()),
    };
    match scheme.as_str() {
        "http" if tls => return Err(error("is http:// although TLS files are given: use https://")),
        "http" | "https" => {}
        _ => return Err(error("has an unsupported scheme: use http:// or https://")),
    }
    let authority = rest.trim_end_matches('/');
    if authority.contains('@') {
        return Err(error("holds a user: use --etcd-username and --etcd-password-file"));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._:[]%".contains(c);
    if authority.is_empty() || !authority.chars().all(allowed) {
        return Err(error("is not of the form https://HOST:PORT"));
    }
    let host_end = authority.rfind(']').map_or(0, |at| at + 1);
    if host_end == 0 && authority.matches(':').count() > 1 {
        return Err(error("has an IPv6 address without brackets: use https://[ADDRESS]:PORT"));
    }
    match authority[host_end..].rsplit_once(':') {
        None => Ok(format!("{scheme}://{authority}:{DEFAULT_PORT}")),
        Some((_, port)) if port.parse::<u16>().is_ok_and(|port| port > 0) => Ok(format!("{scheme}://{authority}")),
        Some(_) => Err(error("has a port outside 1 to 65535")),
    }
}

/// A connection to one etcd server that has answered.
#[derive(Clone)]
pub(super) struct Session {
    pub(super) client: Client,
    pub(super) context: Context,
    pub(super) keys: Keys,
    /// Cluster state in the server's first response.
    pub(super) cluster_state: ClusterState,
}

/// Cluster ID, Raft term and revision of a response; used to detect a restored or replaced cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClusterState {
    pub(super) cluster_id: u64,
    pub(super) term: u64,
    pub(super) revision: i64,
}

impl ClusterState {
    /// Whether this state can follow `before` in the same cluster: revisions and terms only grow.
    pub(super) fn is_continuation_of(&self, before: &ClusterState, last_revision: i64) -> bool {
        self.cluster_id == before.cluster_id && self.term >= before.term && self.revision >= last_revision
    }
}

/// Connects to the first endpoint that answers. Endpoints are tried in order; after a delay the next one is tried concurrently.
///
/// # Errors
/// [`StoreError::AllFailed`] with every endpoint's error, or a settings error.
pub(super) async fn connect(config: &StoreConfig) -> Result<Session, StoreError> {
    config.validate()?;
    connect_to_any(config, config.candidates().await?, None).await
}

/// Like [`connect`], with endpoints that are already known. Records requests in `metrics`.
pub(super) async fn connect_to_any(
    config: &StoreConfig,
    endpoints: Vec<String>,
    metrics: Option<&Arc<Metrics>>,
) -> Result<Session, StoreError> {
    let keys = config.validate()?;
    let credentials = config.read_credentials()?;
    let mut candidates = endpoints.into_iter();
    let attempt = |endpoint| {
        let (user, prefix) = (config.username.clone(), keys.prefix().to_owned());
        let (expired, metrics) = (config.certificate_expired(), metrics.cloned());
        let context = Context { endpoint, user, prefix, has_responded: false, certificate_expired: expired, metrics };
        connect_to(config, context, &keys, credentials.clone())
    };
    let mut errors = Vec::new();
    let mut attempts: FuturesUnordered<_> = candidates.next().map(&attempt).into_iter().collect();
    while !attempts.is_empty() {
        tokio::select! {
            Some(outcome) = attempts.next() => match outcome {
                Ok(session) => {
                    debug!(endpoint = session.context.endpoint, revision = session.cluster_state.revision, "connected to etcd");
                    return Ok(session);
                }
                Err(error) => {
                    debug!(%error, "etcd endpoint unusable");
                    errors.push(error);
                }
            },
            () = tokio::time::sleep(CONNECTION_ATTEMPT_DELAY), if candidates.len() > 0 => {}
        }
        attempts.extend(candidates.next().map(&attempt));
    }
    if errors.len() == 1
        && let Some(only) = errors.pop()
    {
        return Err(only);
    }
    let mut errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
    errors.sort();
    Err(StoreError::AllFailed { errors })
}

async fn connect_to(
    config: &StoreConfig,
    context: Context,
    keys: &Keys,
    credentials: Option<(String, String)>,
) -> Result<Session, StoreError> {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
        // etcd treats pings without an open stream as abuse.
        .with_keep_alive_while_idle(false)
        .with_tcp_keepalive(PING_INTERVAL)
        .with_require_leader(true)
        .with_auto_token_refresh(true);
    if context.endpoint.starts_with("https://") {
        options = options.with_tls(config.tls_options()?);
    }
    let with_user = match credentials {
        Some((user, password)) => options.clone().with_user(user, password),
        None => options.clone(),
    };
    let open = |options| with_timeout(&context, "log in", Client::connect([context.endpoint.clone()], Some(options)));
    let client = match open(with_user).await {
        Err(StoreError::RequestFailed { detail, .. }) if detail.contains("authentication is not enabled") => {
            warn!(endpoint = context.endpoint, "etcd authentication is disabled; ignoring --etcd-username");
            open(options).await?
        }
        other => other?,
    };
    let cluster_state = ClusterState { cluster_id: 0, term: 0, revision: 0 };
    let mut session = Session { client, context, keys: keys.clone(), cluster_state };
    let (_, header) = session.get_config().await?;
    session.cluster_state = header;
    session.context.has_responded = true;
    Ok(session)
}

/// Awaits a response with a timeout, and maps the library's errors to [`StoreError`].
pub(super) async fn with_timeout<T>(
    context: &Context,
    what: &'static str,
    request: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, StoreError> {
    let started = Instant::now();
    let response = tokio::time::timeout(RPC_TIMEOUT, request).await;
    if let Some(metrics) = &context.metrics {
        metrics.store_request_finished(started.elapsed(), matches!(response, Ok(Ok(_))));
    }
    match response {
        Ok(response) => response.map_err(|error| context.map_error(what, error)),
        Err(_) => {
            let seconds = RPC_TIMEOUT.as_secs_f32();
            Err(StoreError::Timeout { endpoint: context.endpoint.clone(), what, seconds })
        }
    }
}

impl Session {
    pub(super) fn kv(&self) -> etcd_client::KvClient {
        self.client.kv_client().max_decoding_message_size(MAX_RESPONSE_SIZE)
    }

    pub(super) fn watcher(&self) -> etcd_client::WatchClient {
        self.client.watch_client().max_decoding_message_size(MAX_RESPONSE_SIZE)
    }

    /// The same connection for requests to the keys of another network.
    pub(super) fn of_network(&self, keys: Keys) -> Session {
        let mut session = self.clone();
        session.context.prefix = keys.prefix().to_owned();
        session.keys = keys;
        session
    }

    /// Awaits a response of this server with a timeout.
    pub(super) async fn with_timeout<T>(
        &self,
        what: &'static str,
        request: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, StoreError> {
        with_timeout(&self.context, what, request).await
    }
}

/// Interval between two renewals of an etcd lease with this TTL.
pub(super) fn keep_alive_interval(ttl: Duration, max_interval: Duration) -> Duration {
    (ttl / 3).min(max_interval)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoint_defaults_are_filled_in() {
        for (given, tls, wanted) in [
            ("http://127.0.0.1:2379", false, "http://127.0.0.1:2379"),
            ("https://etcd1:2379/", true, "https://etcd1:2379"),
            ("etcd1", false, "http://etcd1:2379"),
            ("etcd1:4001", true, "https://etcd1:4001"),
            ("HTTPS://[fd00::1]", false, "https://[fd00::1]:2379"),
            ("https://[fd00::1]:77", false, "https://[fd00::1]:77"),
        ] {
            assert_eq!(normalise_endpoint(given, tls).expect(given), wanted);
        }
    }

    #[test]
    fn invalid_endpoint_is_rejected_with_remedy() {
        for (given, tls, wanted) in [
            ("", false, "is not of the form"),
            ("http://", false, "is not of the form"),
            ("ftp://x", false, "unsupported scheme"),
            ("http://x", true, "use https://"),
            ("http://x:0", false, "a port outside"),
            ("http://x:99999", false, "a port outside"),
            ("http://fd00::1:2379", false, "without brackets"),
            ("http://root:secret@x", false, "holds a user"),
            ("http://x/path", false, "is not of the form"),
            ("http://x y", false, "is not of the form"),
        ] {
            let error = normalise_endpoint(given, tls).expect_err(given).to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn contradicting_settings_are_rejected() {
        let good = StoreConfig { endpoints: vec!["x".to_owned()], ..StoreConfig::default() };
        assert!(good.validate().is_ok());
        let errors = [
            StoreConfig::default(),
            StoreConfig { prefix: "/".to_owned(), ..good.clone() },
            StoreConfig { username: Some("u".to_owned()), ..good.clone() },
            StoreConfig { keyfile: Some("k".into()), ..good.clone() },
        ]
        .map(|config| config.validate().expect_err("refused").to_string());
        assert!(errors[0].contains("--etcd-endpoints") && errors[1].contains("prefix"), "{errors:?}");
        assert!(errors[2].contains("--etcd-password-file") && errors[3].contains("--etcd-certfile"), "{errors:?}");
    }

    #[test]
    fn restored_cluster_is_detected() {
        let before = ClusterState { cluster_id: 1, term: 5, revision: 100 };
        assert!(ClusterState { revision: 130, ..before }.is_continuation_of(&before, 120));
        assert!(ClusterState { term: 6, revision: 130, ..before }.is_continuation_of(&before, 120));
        assert!(!ClusterState { revision: 119, ..before }.is_continuation_of(&before, 120));
        assert!(!ClusterState { cluster_id: 2, revision: 130, ..before }.is_continuation_of(&before, 120));
        assert!(!ClusterState { term: 2, revision: 130, ..before }.is_continuation_of(&before, 120));
    }
}
