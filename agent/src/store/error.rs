//! Errors of the etcd client, each with place, value and remedy. No message contains a password.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::metrics::Metrics;

use crate::config::secret::ExposedFile;

/// An error of a request or connection to etcd.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Neither endpoints nor a discovery name are configured.
    #[error("no etcd endpoint configured: set --etcd-endpoints or --etcd-discovery-srv")]
    NoEndpoint,
    /// The key prefix is invalid.
    #[error("etcd prefix `{prefix}` {rule}: use a path such as /coreos.com/network")]
    Prefix {
        /// The rejected prefix.
        prefix: String,
        /// The violated rule.
        rule: &'static str,
    },
    /// An endpoint is not a valid URL of an etcd server.
    #[error("etcd endpoint `{endpoint}` {rule}")]
    Endpoint {
        /// The rejected endpoint.
        endpoint: String,
        /// The violated rule, and what is allowed.
        rule: String,
    },
    /// A configured file cannot be read.
    #[error("the {purpose} {} cannot be read: {source}", path.display())]
    File {
        /// The file's purpose, with its flag.
        purpose: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A configured file has invalid content.
    #[error("the {purpose} {} {rule}", path.display())]
    Content {
        /// The file's purpose, with its flag.
        purpose: &'static str,
        /// The file.
        path: PathBuf,
        /// The violated rule.
        rule: &'static str,
    },
    /// The mode of a secret file is too permissive.
    #[error("the {purpose} {} {exposed}", path.display())]
    Exposed {
        /// The file's purpose, with its flag.
        purpose: &'static str,
        /// The file.
        path: PathBuf,
        /// The file's mode, and the remedy.
        exposed: ExposedFile,
    },
    /// A user without a password file, a certificate without a key, or the reverse.
    #[error("{given} also needs {missing}")]
    Incomplete {
        /// The flag that is given.
        given: &'static str,
        /// The flag that is missing.
        missing: &'static str,
    },
    /// The SRV lookup failed.
    #[error("etcd discovery by SRV records of `{name}` failed: {detail}; check with `dig SRV _etcd-client._tcp.{name}`")]
    Discovery {
        /// The domain.
        name: String,
        /// The resolver's error.
        detail: String,
    },
    /// An endpoint cannot be reached.
    #[error("etcd {endpoint} cannot be reached: {detail}; {}", unreachable(endpoint, detail))]
    Unreachable {
        /// The endpoint.
        endpoint: String,
        /// The cause.
        detail: String,
    },
    /// An endpoint did not answer in time.
    #[error(
        "etcd {endpoint} did not answer within {seconds} s ({what}): it is not running, its name does not resolve here, or a firewall drops its packets"
    )]
    Timeout {
        /// The endpoint.
        endpoint: String,
        /// The request.
        what: &'static str,
        /// The timeout, in seconds.
        seconds: f32,
    },
    /// The TLS connection failed.
    #[error("TLS with etcd {endpoint} failed: {detail}; {remedy}")]
    Tls {
        /// The endpoint.
        endpoint: String,
        /// The TLS library's message.
        detail: String,
        /// The remedy.
        remedy: &'static str,
    },
    /// etcd rejected the user.
    #[error("etcd {endpoint} refuses {who}: {detail}; check --etcd-username and --etcd-password-file")]
    Login {
        /// The endpoint.
        endpoint: String,
        /// The rejected user.
        who: String,
        /// etcd's message.
        detail: String,
    },
    /// The user lacks a permission.
    #[error(
        "{who} may not {what} at etcd {endpoint}: grant it with `etcdctl role grant-permission ROLE readwrite --prefix {prefix}/`"
    )]
    Permission {
        /// The endpoint.
        endpoint: String,
        /// The rejected user.
        who: String,
        /// The request.
        what: &'static str,
        /// The prefix.
        prefix: String,
    },
    /// etcd's database quota is exhausted.
    #[error("etcd {endpoint} is out of space and accepts no writes: compact and defragment it, then `etcdctl alarm disarm`")]
    NoSpace {
        /// The endpoint.
        endpoint: String,
    },
    /// An etcd lease has expired or was revoked.
    #[error("etcd lease {lease:x} does not exist: it expired or was revoked")]
    LeaseNotFound {
        /// The etcd lease.
        lease: i64,
    },
    /// This host's underlay address has changed. The connection may be bound to an address that the host no longer has; the
    /// kernel would keep waiting for responses that cannot arrive.
    #[error("this host's underlay address has changed: reconnecting to etcd")]
    AddressChanged,
    /// The requested revision has been compacted.
    #[error("etcd has compacted the requested revision {revision}")]
    Compacted {
        /// The requested revision; 0 if unknown.
        revision: i64,
    },
    /// A response exceeds the size limit.
    #[error("etcd {endpoint} sent a response that is too large: {detail}")]
    TooLarge {
        /// The endpoint.
        endpoint: String,
        /// The sizes.
        detail: String,
    },
    /// Any other error response. It concerns this request only.
    #[error("etcd {endpoint} could not {what}: {detail}")]
    RequestFailed {
        /// The endpoint.
        endpoint: String,
        /// The request.
        what: &'static str,
        /// etcd's message.
        detail: String,
    },
    /// The server cannot serve requests now, whatever they ask. It knows no leader, for example.
    #[error("etcd {endpoint} could not {what}: {detail}")]
    Unavailable {
        /// The endpoint.
        endpoint: String,
        /// The request.
        what: &'static str,
        /// etcd's message.
        detail: String,
    },
    /// None of the endpoints can be used.
    #[error("no usable etcd endpoint: {}", errors.join("; "))]
    AllFailed {
        /// The error of each endpoint.
        errors: Vec<String>,
    },
    /// Another client changed the configuration in the meantime.
    #[error("the configuration was changed meanwhile (revision {found} instead of {expected}): read it again, then retry")]
    Conflict {
        /// The revision of the last change that the caller expected; 0 for none.
        expected: i64,
        /// The revision found; 0 for none.
        found: i64,
    },
    /// There is no connection to etcd now.
    #[error("not connected to etcd, retrying: {error}")]
    NotConnected {
        /// The last error of the connection.
        error: String,
    },
    /// The receiver of store events was dropped.
    #[error("the receiver of store events was dropped")]
    ReceiverClosed,
}

impl StoreError {
    /// Whether the connection is unusable, for all networks. `false` for error responses over a working connection.
    pub(super) fn ends_session(&self) -> bool {
        use StoreError as E;
        matches!(
            self,
            E::Unreachable { .. } | E::Timeout { .. } | E::Tls { .. } | E::Login { .. } | E::AddressChanged | E::ReceiverClosed
        )
    }
}

/// Endpoint and user of a request; maps the client library's errors to [`StoreError`].
#[derive(Debug, Clone)]
pub(super) struct Context {
    /// The endpoint.
    pub(super) endpoint: String,
    /// The user, if configured.
    pub(super) user: Option<String>,
    /// The prefix.
    pub(super) prefix: String,
    /// Whether the server has answered a request yet.
    pub(super) has_responded: bool,
    /// Whether the client certificate has expired.
    pub(super) certificate_expired: bool,
    /// The metrics that record requests.
    pub(super) metrics: Option<Arc<Metrics>>,
}

// gRPC status codes (grpc.io, `statuscodes.md`).
const INVALID_ARGUMENT: i32 = 3;
const DEADLINE_EXCEEDED: i32 = 4;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const FAILED_PRECONDITION: i32 = 9;
const OUT_OF_RANGE: i32 = 11;
const UNAUTHENTICATED: i32 = 16;

/// Error texts of a connection that the server closed after it was established.
const CONNECTION_CLOSED_TEXTS: [&str; 3] = ["connection closed", "broken pipe", "reset by peer"];

/// Prefixes and suffixes of the client library that add nothing to the system's error message.
const REDUNDANT_TEXTS: [&str; 3] = ["tcp connect error: ", "transport error: ", ": transport error"];

impl Context {
    pub(super) fn user_description(&self) -> String {
        self.user.as_ref().map_or_else(|| "a client without a user name".to_owned(), |user| format!("user `{user}`"))
    }

    /// Maps an error of the client library.
    pub(super) fn map_error(&self, what: &'static str, error: etcd_client::Error) -> StoreError {
        use etcd_client::Error as E;
        let endpoint = self.endpoint.clone();
        match error {
            E::GRpcStatus(status) => {
                let detail = error_chain(status.message(), status.source());
                self.map_status(what, i32::from(status.code()), status.source().is_some(), detail)
            }
            E::TransportError(error) => self.map_transport_error(error_chain("", Some(&error))),
            E::IoError(error) => StoreError::Unreachable { endpoint, detail: error.to_string() },
            E::WatchError(detail) => StoreError::Unreachable { endpoint, detail },
            E::InvalidUri(error) => StoreError::Endpoint { endpoint, rule: format!("is not a URL: {error}") },
            other => StoreError::RequestFailed { endpoint, what, detail: other.to_string() },
        }
    }

    fn map_status(&self, what: &'static str, code: i32, local: bool, detail: String) -> StoreError {
        let endpoint = self.endpoint.clone();
        let contains = |text: &str| detail.contains(text);
        if contains("required revision has been compacted") {
            return StoreError::Compacted { revision: 0 };
        }
        if contains("decoded message length too large") || contains("message larger than max") {
            return StoreError::TooLarge { endpoint, detail };
        }
        if contains("database space exceeded") {
            return StoreError::NoSpace { endpoint };
        }
        if contains("authentication failed")
            || contains("user name is empty")
            || contains("invalid auth token")
            || contains("revision of auth store is old")
            || code == UNAUTHENTICATED
        {
            return StoreError::Login { endpoint, who: self.user_description(), detail };
        }
        match code {
            PERMISSION_DENIED => {
                StoreError::Permission { endpoint, who: self.user_description(), what, prefix: self.prefix.clone() }
            }
            NOT_FOUND if contains("lease not found") => StoreError::LeaseNotFound { lease: 0 },
            INVALID_ARGUMENT | NOT_FOUND | FAILED_PRECONDITION | OUT_OF_RANGE if !local => {
                StoreError::RequestFailed { endpoint, what, detail }
            }
            DEADLINE_EXCEEDED | RESOURCE_EXHAUSTED => StoreError::Unavailable { endpoint, what, detail },
            _ if local => self.map_transport_error(detail),
            _ => StoreError::Unavailable { endpoint, what, detail },
        }
    }

    /// Maps a failure below gRPC. TLS errors can only be told apart by their text.
    fn map_transport_error(&self, detail: String) -> StoreError {
        let endpoint = self.endpoint.clone();
        let contains = |text: &str| detail.contains(text);
        let alert = contains("alert")
            || (endpoint.starts_with("https://")
                && !self.has_responded
                && CONNECTION_CLOSED_TEXTS.iter().any(|text| contains(text)));
        let remedy = if self.certificate_expired && alert {
            // Not every server reports the expiry.
            "the client certificate of --etcd-certfile has expired: renew it, or set this host's clock right"
        } else if contains("UnknownIssuer") || contains("BadSignature") {
            "its certificate is not signed by the CA of --etcd-cafile (by none that this host trusts, where no file is given)"
        } else if contains("NotValidForName") || contains("not valid for name") {
            "its certificate names other hosts: use the name in the certificate as endpoint"
        } else if contains("NotValidYet") || contains("not valid yet") {
            "its certificate is not valid yet: is this host's clock right?"
        } else if contains("Expired") || contains("expired") {
            "its certificate has expired: renew it, or set this host's clock right"
        } else if contains("CertificateRequired")
            || contains("certificate required")
            || contains("BadCertificate")
            || contains("UnknownCA")
        {
            "it wants a client certificate of its CA: set --etcd-certfile and --etcd-keyfile"
        } else if contains("InvalidContentType") || contains("corrupt message") || contains("handshake eof") {
            "if the server does not speak TLS, use an http:// endpoint"
        } else if endpoint.starts_with("https://")
            && !self.has_responded
            && CONNECTION_CLOSED_TEXTS.iter().any(|text| contains(text))
        {
            // TLS 1.3 servers check the client's certificate only after the handshake. A server without TLS sends an error
            // response, but it need not arrive before the connection is closed.
            "the server closed the connection: if it requires a client certificate of its CA, set --etcd-certfile and --etcd-keyfile; \
             if it does not speak TLS, use an http:// endpoint"
        } else if contains("certificate") || contains("tls") || contains("TLS") || contains("fatal alert") {
            "check --etcd-cafile, --etcd-certfile and --etcd-keyfile"
        } else {
            return StoreError::Unreachable { endpoint, detail: strip_redundant_text(&detail) };
        };
        StoreError::Tls { endpoint, detail: strip_redundant_text(&detail), remedy }
    }
}

fn strip_redundant_text(detail: &str) -> String {
    REDUNDANT_TEXTS.iter().fold(detail.to_owned(), |detail, redundant| detail.replace(redundant, ""))
}

/// The remedy for an unreachable endpoint, by the system's error message.
fn unreachable(endpoint: &str, detail: &str) -> String {
    let contains = |text: &str| detail.contains(text);
    if contains("refused") {
        "nothing listens there: start etcd, or set --etcd-endpoints to its address".to_owned()
    } else if contains("o route to host") || contains("etwork is unreachable") {
        "is the address of --etcd-endpoints right? `ip route get ADDRESS` shows this host's route to it".to_owned()
    } else if contains("lookup") || contains("dns error") {
        let host = endpoint.rsplit_once("://").map_or(endpoint, |(_, rest)| rest);
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        format!("is the name of --etcd-endpoints right? `getent hosts {name}` resolves it like the agent")
    } else if endpoint.starts_with("http://") && CONNECTION_CLOSED_TEXTS.iter().any(|text| contains(text)) {
        "the server closed the connection: if it speaks TLS, use an https:// endpoint and --etcd-cafile; use etcd's client \
         port, usually 2379"
            .to_owned()
    } else {
        "is etcd running there, and is its client port reachable from this host?".to_owned()
    }
}

/// An error's message and those of its sources, without repetition.
fn error_chain(first: &str, source: Option<&(dyn Error + 'static)>) -> String {
    let mut parts: Vec<String> = if first.is_empty() { Vec::new() } else { vec![first.to_owned()] };
    let mut next = source;
    while let Some(error) = next {
        let text = error.to_string();
        if !parts.iter().any(|part| part.contains(&text)) {
            parts.push(text);
        }
        next = error.source();
    }
    // Long enough for a chain of causes, short enough for a log line.
    parts.join(": ").chars().take(400).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
